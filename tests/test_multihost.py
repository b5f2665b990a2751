"""examples/multihost.py: each fault costs a restart, and no loss differs after it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "multihost.py"
LIMIT = 150  # seconds that a run may take
STEPS = 14  # the first checkpoint is of step 10


def command(out, *options):
    base = [sys.executable, str(EXAMPLE), "--processes", "2", "--steps", str(STEPS)]
    return [*base, "--batch-size", "16", "--out", str(out), *options]


def run(out, *options):
    """Runs the launcher to its end, and takes its workers with it if it has none."""
    process = subprocess.Popen(
        command(out, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        words, _ = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    return process.returncode, words


def end(process):
    """Kills a launcher and all its workers, which are in a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(10)


def losses(out):
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    status, words = run(out)
    assert status == 0, words
    found = losses(out)
    assert len(found) == STEPS and found[-1] < found[0]
    return found


FAULTS = {
    "kill:1:12": ("worker 1 was killed by SIGKILL", 11),
    "kill:0:12": ("worker 0 was killed by SIGKILL", 11),  # the coordinator
    "raise:1:12": ("worker 1 failed with status 1", 11),
    "hang:1:12": ("worker 1 hangs before step 12, 8 s", 11),
    "kill:1:3": ("worker 1 was killed by SIGKILL", 1),  # before any checkpoint
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_costs_no_loss(undisturbed, tmp_path, fault):
    why, again = FAULTS[fault]
    status, words = run(tmp_path, "--fault", fault, "--hang-timeout", "8")
    assert status == 0, words
    assert why in words and f"training from step {again}" in words, words
    assert losses(tmp_path) == undisturbed


def test_sigterm_leaves_a_checkpoint_from_which_training_goes_on(undisturbed, tmp_path):
    status, words = run(tmp_path, "--fault", "term:1:4")
    assert status == 75 and "as SIGTERM asked" in words, words
    status, words = run(tmp_path, "--resume")
    assert status == 0 and "training from step 1\n" not in words, words
    assert losses(tmp_path) == undisturbed


def test_a_checkpoint_that_is_cut_off_is_passed_over(undisturbed, tmp_path):
    status, words = run(tmp_path)
    assert status == 0, words
    newest = tmp_path / "checkpoints" / str(STEPS)
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 0]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "losses.json").unlink()
    status, words = run(tmp_path, "--resume")
    assert status == 0, words
    assert f"checkpoint {STEPS} cannot be read" in words
    assert "training from step 11" in words, words
    assert losses(tmp_path) == undisturbed
    (aside,) = tmp_path.glob(f"unreadable-{STEPS}-*")  # nothing is deleted
    assert len([p for p in aside.rglob("*") if p.is_file()]) >= len(files)


def test_it_gives_up_in_the_end_and_says_where_to_look(tmp_path):
    status, words = run(tmp_path, "--fault", "raise:0:2", "--restarts", "0")
    assert status == 1 and "Gave up after 0 restarts" in words, words
    assert "a fault that is rehearsed" in (tmp_path / "worker-0.log").read_text()


def test_no_worker_outlives_the_launcher_that_is_told_to_leave(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("step 10"):
                break
        process.send_signal(signal.SIGTERM)
        words, _ = process.communicate(timeout=60)
        assert process.returncode == 75 and "Go on with --resume" in words
        time.sleep(0.5)
        with pytest.raises(ProcessLookupError):  # the whole session is gone
            os.killpg(process.pid, 0)
    finally:
        end(process)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--processes", "3"],
            "--batch-size must be a multiple of the number of devices. Got --batch-size"
            " 16, 3 processes of 1 devices. Nearest: 15 or 18.",
        ),
        (
            ["--fault", "flood:0:1"],
            "--fault must be kind:worker:step, the kind one of kill, raise, hang, term."
            " Got --fault flood:0:1. Pass --fault kill:1:20, say.",
        ),
        (["--resume"], "--resume needs a checkpoint."),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    status, words = run(tmp_path / "out", *options)
    assert status == 2 and message in " ".join(words.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_mesh_is_refused(undisturbed, tmp_path):
    status, words = run(tmp_path, "--steps", "10")
    assert status == 0, words
    status, words = run(tmp_path, "--steps", "10", "--processes", "4", "--resume")
    assert status == 2, words
    found = " ".join(words.split())
    assert "Got --processes 4" in found and "has --processes 2" in found
