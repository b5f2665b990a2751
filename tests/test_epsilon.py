"""What modules take as epsilon: what Flax's take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import NAMES, SYSTEMS

both = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
X = 3 * jax.random.normal(jax.random.key(0), (4, 5, 6)) + 2


def called(system, name, library, epsilon, jitted=False):
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    norm = system(name, X, library, epsilon=epsilon, **fields)
    return norm(X, jitted=jitted, **running)


@both
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "epsilon", [np.float32(1e-2), np.float64(1e-2), jnp.float32(1e-2), 1], ids=repr
)
def test_epsilon_of_modules_may_be_what_flaxs_is(system, name, epsilon):
    want = called(system, name, system.flaxs, epsilon)
    got = called(system, name, system.ours, epsilon)
    np.testing.assert_allclose(got, want, atol=1e-5)


@both
def test_epsilon_of_modules_inside_jit(system):
    """A jax array is a leaf of nnx's state, and a traced value under jit."""
    for name in NAMES:
        got = called(system, name, system.ours, jnp.float32(1e-2), jitted=True)
        want = called(system, name, system.ours, 1e-2)
        np.testing.assert_allclose(got, want, atol=1e-5)


@both
@pytest.mark.parametrize("name", ["BatchNorm", "RMSNorm"])
@pytest.mark.parametrize("epsilon", [None, "1e-5", True])
def test_epsilon_of_modules_that_is_no_number(system, name, epsilon):
    with pytest.raises(TypeError, match="epsilon must be a number above zero"):
        called(system, name, system.ours, epsilon)
