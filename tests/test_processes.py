"""Real processes that train together, over gloo: the numbers of one process."""

import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import process_worker
import pytest

pytestmark = pytest.mark.processes

LIMIT = 150  # seconds that all processes of a test may take
WORKER = pathlib.Path(process_worker.__file__)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def together(processes, devices, out):
    """Runs the workers to their end; none of them outlives the call."""
    address = f"localhost:{free_port()}"
    command = [sys.executable, str(WORKER), address, str(processes)]
    running = []
    try:
        for i in range(processes):
            log = (out / f"{i}.log").open("w")
            running.append(
                subprocess.Popen(
                    [*command, str(i), str(devices), str(out)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
            log.close()
        ends = [process.wait(LIMIT) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # jax takes SIGTERM as a notice
                process.wait(10)
    logs = "\n".join((out / f"{i}.log").read_text()[-2000:] for i in range(processes))
    assert ends == [0] * processes, logs


@pytest.fixture(scope="module", params=[(2, 2), (4, 1)], ids="{0[0]} processes".format)
def trained(request, once):
    processes, devices = request.param
    name = f"trained-by-{processes}"
    return processes, once(name, lambda out: together(processes, devices, out))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("way", process_worker.WAYS)
def test_processes_train_as_one_does(trained, way, dtype):
    """In losses, gradients and statistics; one process may have no sample."""
    processes, out = trained
    with jax.enable_x64(True):
        want = process_worker.flat(process_worker.alone(processes, dtype))
    limit = {"float64": 1e-12, "float32": 1e-5}[dtype]
    for i in range(processes):
        with np.load(out / f"{way}-{dtype}-{i}.npz") as got:
            assert set(got) == set(want)
            for name, w in want.items():
                assert got[name].dtype == w.dtype == dtype
                error = np.abs(got[name] - w).max() / max(1.0, np.abs(w).max())
                assert error <= limit, (name, error)


def test_replicas_that_drift_between_processes_are_found_by_all_of_them(trained):
    processes, out = trained
    devices = {2: (4, "2, 3"), 4: (4, "1")}[processes]
    for i in range(processes):
        assert (out / f"drifting-{i}.txt").read_text() == (
            "['mean'] differs on {1}, of {0} devices".format(*devices)
        )


def test_processes_that_disagree_about_arrays_are_told_so_all_of_them(trained):
    processes, out = trained
    for i in range(processes):
        assert (out / f"disagree-{i}.txt").read_text() == (
            "global_batch: all processes must have arrays of the same names, shapes and"
            " dtypes, in one order. Got ['x']: (8, 6) float32 on process 0, (9, 6)"
            " float32 on process 1. Pad each batch with pad_batch, to one size on all"
            " of them.\n"
            "global_batch: all processes must have arrays of the same names, shapes and"
            " dtypes, in one order. Got their order: ['x'], ['y'] on process 0, ['y'],"
            " ['x'] on process 1. Pad each batch with pad_batch, to one size on all of"
            " them."
        )


def test_keys_and_weights_of_all_processes_need_no_jit(trained):
    processes, out = trained
    told = {2: "4.0 of mean 1.5", 4: "4.0 of mean 2.5"}[processes]
    for i in range(processes):
        assert (out / f"outside_of_jit-{i}.txt").read_text() == told
