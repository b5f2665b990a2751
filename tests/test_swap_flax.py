"""The plugin behind `make test-flax`, and the two of Flax's cases that it names."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import swap_flax

from normjax import linen

CASES = {  # as in Flax's tests: the shape of x, how far it is from 0, the axes reduced
    "NormalizationTest::test_layer_norm4": ((2, 3, 4), 1e6, -1),
    "NormalizationTest::test_instance_norm3": ((2, 3, 4, 5), 1e4, (1, 2)),
}
TEST_OF_FLAX = """
import unittest
from flax import linen, nnx

class NormalizationTest(unittest.TestCase):
    def test_here(self):
        assert linen.BatchNorm.__module__ == "normjax.linen"
        assert nnx.GroupNorm.__module__ == "normjax.nnx"
        assert linen.SpectralNorm.__module__.startswith("flax")

    def test_layer_norm4(self):
        assert False

    def test_not_known(self):
        assert False
"""


def test_plugin_swaps_and_names_what_it_knows(tmp_path):
    (tmp_path / "test_it.py").write_text(TEST_OF_FLAX)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "swap_flax", str(tmp_path)]
    command += ["-c", "/dev/null", "-p", "no:cacheprovider"]
    run = subprocess.run(
        command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )
    assert "1 failed, 1 passed, 1 xfailed" in run.stdout, run.stdout + run.stderr
    assert "test_not_known" in run.stdout


@pytest.mark.parametrize("case", swap_flax.KNOWN)
def test_known_cases_of_flax_expect_what_is_wrong(case):
    """In float64 the formula gives what normjax gives in float32, and not what is
    expected there, which is the formula in float32."""
    shape, far, axes = CASES[case]
    x = jax.random.normal(jax.random.key(0), shape) + jnp.float32(far)
    fields = {"use_bias": False, "use_scale": False, "epsilon": 1e-5}
    if "layer" in case:
        module = linen.LayerNorm(reduction_axes=axes, **fields)
    else:
        module = linen.InstanceNorm(**fields)
    y = module.apply({}, x)

    def formula(x):
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5)

    right = formula(np.asarray(x, np.float64))
    np.testing.assert_allclose(y, right, atol=1e-6)
    assert np.abs(formula(np.asarray(x)) - right).max() > 2e-4
