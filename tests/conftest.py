"""Eight simulated devices for every test, and the modes that tests ask for."""

import fcntl
import gc
import os
import shutil

import jax
import pytest

gc.set_threshold(100_000, 50, 100)  # what tests leave is not looked through so often
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


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a folder once for all workers of xdist: once(name, make) returns it.

    The first to come calls make(folder); the others wait for it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name, make):
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made
