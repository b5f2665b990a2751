"""Eight simulated devices for every test, and the modes that tests ask for."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict():
    """Refuses every implicit promotion of a dtype or a rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def float64():
    """Lets arrays be of 64 bits."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compile():
    """Compiling costs most of the time; the arithmetic is the same without its best."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
