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
    text = "compile as users do; it takes longer"
    parser.addoption("--optimized", action="store_true", help=text)
    text = "every combination; without it a part of them, in which each kind is"
    parser.addoption("--whole", action="store_true", help=text)


def pytest_configure(config):
    """Compiles quickly, since tests mostly wait for the compiler.

    Without LLVM's optimizations, and with XLA's older emitters, where it has them, in
    one piece: they take half the time.
    """
    quick = not config.getoption("--optimized")
    jax.config.update("jax_disable_most_optimizations", quick)
    # Of jax 0.10: a version ends the process at a flag that it does not know.
    older = "--xla_cpu_use_fusion_emitters=false"
    one = "--xla_cpu_parallel_codegen_split_count=1"
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ < (0, 11) and older not in flags and quick:
        os.environ["XLA_FLAGS"] = f"{flags} {older} {one}"


# Files that take longest come first, so that no worker waits for another at the end.
SLOWEST = (
    "derivatives arguments doctor notebooks docs train_digits compare_norms extremes"
    " types look replace nnx linen fold compiled state recalibrate fuzz accuracy"
).split()


def _turn(item):
    name = item.path.stem.removeprefix("test_")
    return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


def pytest_collection_modifyitems(config, items):
    """Puts the slowest files first, and leaves further combinations to --whole."""
    items.sort(key=_turn)
    further = [item for item in items if item.get_closest_marker("further")]
    if further and not config.getoption("--whole"):
        config.hook.pytest_deselected(items=further)
        items[:] = [item for item in items if not item.get_closest_marker("further")]


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
