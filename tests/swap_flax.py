"""A pytest plugin that puts normjax's modules where a test of Flax looks for Flax's.

`make test-flax FLAX=path/of/flax` runs Flax's own tests of norms with it, from a
checkout of which nothing is changed: its tests ask ``flax.linen`` and ``flax.nnx`` for
a norm when they run, and are given this one.
"""

import flax.linen
import flax.nnx
import pytest

import normjax.linen
import normjax.nnx

LIBRARIES = {flax.linen: normjax.linen, flax.nnx: normjax.nnx}
# Where the expected value itself is wrong: y is compared, at x = 1e6 or 1e4 with std 1,
# with (x - mean) / std in float32, whose mean is rounded to 0.03 or 5e-4. Here the mean
# keeps what its rounding leaves over; test_swap_flax.py shows who is right, in float64.
KNOWN = {
    "NormalizationTest::test_layer_norm4": "the expected y is wrong by 0.04",
    "NormalizationTest::test_instance_norm3": "the expected y is wrong by 5e-4",
}


def pytest_configure():
    for theirs, ours in LIBRARIES.items():
        for name in ours.__all__:
            setattr(theirs, name, getattr(ours, name))


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in KNOWN.items():
            if item.nodeid.endswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(autouse=True)
def _swapped():
    """Fails every test for which the swap was undone."""
    for theirs, ours in LIBRARIES.items():
        for name in ours.__all__:
            assert getattr(theirs, name) is getattr(ours, name), name
