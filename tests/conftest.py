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


def pytest_addoption(parser):
    text = "compile as XLA does by default, in twice the time"
    parser.addoption("--optimized", action="store_true", help=text)


def pytest_configure(config):
    """Compiling is most of the time that tests take: leaves out what takes longest.

    XLA's older emitters take half of it, and so does LLVM without its optimizations.
    """
    if config.getoption("--optimized"):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    older = "--xla_cpu_use_fusion_emitters=false"  # which newer versions do not know
    if jax.__version_info__ < (0, 11) and older not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {older}"
    jax.config.update("jax_disable_most_optimizations", True)


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
def optimized(pytestconfig):
    """LLVM with its optimizations, for tests of what they may change."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    quick = not pytestconfig.getoption("--optimized")
    jax.config.update("jax_disable_most_optimizations", quick)


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
