"""examples/multihost.py: each fault costs a restart, and no loss differs after it."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "multihost.py"
LIMIT = 150  # seconds that a run may take
STEPS = 10  # checkpoints are of steps 4, 8 and this


def command(out, *options):
    base = [sys.executable, str(EXAMPLE), "--processes", "2", "--steps", str(STEPS)]
    base += ["--save-every", "4", "--batch-size", "16", "--out", str(out)]
    return [*base, *options]


def run(out, *options):
    """Runs the launcher to its end, and takes its workers with it if it has none."""
    return run_to_its_end(command(out, *options))


def run_to_its_end(command):
    process = subprocess.Popen(
        command,
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


def run_workers(out, *options):
    """Runs two workers by themselves: the exit status of each, and its errors."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [*command(out, *options), "--address", address, "--worker", str(number)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=LIMIT)[1] for worker in workers]
        return [worker.returncode for worker in workers], errors
    finally:
        for worker in workers:
            end(worker)


@pytest.fixture(scope="module", autouse=True)
def compiled(once, pytestconfig):
    """What is compiled by one test serves the next, and is compiled as tests are."""
    quick = not pytestconfig.getoption("--optimized")
    with pytest.MonkeyPatch.context() as patch:
        folder = once("compiled", lambda folder: None)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(quick))
        yield


def files(folder):
    """All files of the training below the folder, with what they hold."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".log")
    return {p: p.read_bytes() for p in found}


def losses(out):
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def finished(once, compiled):
    """The folder of a run that nothing befell."""

    def make(folder):
        status, words = run(folder / "run")
        assert status == 0, words

    return once("finished", make) / "run"


@pytest.fixture(scope="module")
def undisturbed(finished):
    found = losses(finished)
    assert len(found) == STEPS and found[-1] < found[0]
    return found


FAULTS = {
    # A checkpoint may be under way; the one before it is there.
    "kill:1:9": ("worker 1 was killed by SIGKILL", (5, 9)),
    "kill:0:9": ("worker 0 was killed by SIGKILL", (5, 9)),  # the coordinator
    "raise:1:9": ("worker 1 failed: RuntimeError: a fault that is rehearsed", (5, 9)),
    "hang:1:8": ("worker 1 hangs before step 8, 8 s", (5,)),
    "freeze:1:9": ("worker 1 shows no sign of life", (5, 9)),
    "kill:1:3": ("worker 1 was killed by SIGKILL", (1,)),  # before any checkpoint
    "disk:0:3": ("File too large", (1,)),  # while the first checkpoint is written
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_costs_no_loss(undisturbed, tmp_path, fault):
    why, again = FAULTS[fault]
    bounds = (
        "--hang-timeout",
        "8" if "hang" in fault else "60",
        "--save-timeout",
        "15",
    )
    status, words = run(tmp_path, "--fault", fault, *bounds)
    assert status == 0 and why in words, words
    began = re.findall(r"training from step (\d+)", words)
    assert len(began) == 2 and began[0] == "1" and int(began[1]) in again, words
    assert losses(tmp_path) == undisturbed


NOBODY = {
    "kill:1:3": ([1, -signal.SIGKILL], 0, "reset by peer|closed by peer"),
    "kill:0:3": ([-signal.SIGKILL, 1], 1, "reset by peer|closed by peer"),
    "hang:1:3": ([1, 1], 1, r"Timeout \(0:00:11\)!(.|\n)* in rehearse\n"),
}


@pytest.mark.parametrize("fault", NOBODY)
def test_a_fault_ends_workers_that_nobody_watches(tmp_path, fault):
    """As on a cluster, whose scheduler starts them again when they have ended."""
    want, who, why = NOBODY[fault]
    status, errors = run_workers(tmp_path, "--fault", fault, "--hang-timeout", "1")
    assert status == want, errors
    assert re.search(why, errors[who]), errors


def test_sigterm_leaves_a_checkpoint_from_which_training_goes_on(undisturbed, tmp_path):
    status, words = run(tmp_path, "--fault", "term:1:4")
    assert status == 75 and "as SIGTERM asked" in words, words
    status, words = run(tmp_path, "--resume")
    assert status == 0 and "training from step 1\n" not in words, words
    assert losses(tmp_path) == undisturbed


def test_a_checkpoint_that_is_cut_off_is_passed_over(finished, undisturbed, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / str(STEPS)
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 0]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "losses.json").unlink()
    status, words = run(tmp_path, "--resume")
    assert status == 0, words
    assert f"checkpoint {STEPS} cannot be read" in words
    assert "training from step 9" in words, words
    assert losses(tmp_path) == undisturbed
    (aside,) = tmp_path.glob(f"unreadable-{STEPS}-*")  # nothing is deleted
    assert len([p for p in aside.rglob("*") if p.is_file()]) >= len(files)


def can_mount():
    """Whether a small disk of one's own may be had, in a namespace of one's own."""
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        return False


FULL_DISK = """
mount -t tmpfs -o size=8M none {out}
head -c {ballast} /dev/zero > {out}/ballast
{command} --out {out}/run; echo "first status $?"
rm {out}/ballast
{command} --out {out}/run --resume; echo "second status $?"
cp {out}/run/losses.json {losses}
"""


@pytest.mark.skipif(not can_mount(), reason="no tmpfs may be mounted here (unshare)")
def test_a_full_disk_damages_nothing(undisturbed, tmp_path):
    """There is room for one checkpoint, and when there is for more, it goes on."""
    (tmp_path / "disk").mkdir()
    script = FULL_DISK.format(
        out=tmp_path / "disk",
        ballast=2**23 - 7 * 2**19,
        command=shlex.join(command(tmp_path)),
        losses=tmp_path / "losses.json",
    )
    status, words = run_to_its_end(["unshare", "-Urm", "sh", "-c", script])
    assert status == 0, words
    first, second = words.split("first status 1")
    assert f"step {STEPS}: no checkpoint, since it needs" in first, words
    assert "has no room for. Free some, and go on" in first, words
    assert "training from step 5" in second and "second status 0" in second, words
    assert losses(tmp_path) == undisturbed


def test_it_gives_up_in_the_end_and_says_where_to_look(tmp_path):
    status, words = run(tmp_path, "--fault", "raise:0:2", "--restarts", "0")
    assert status == 1 and "Gave up after 0 restarts" in words, words
    assert "a fault that is rehearsed" in (tmp_path / "worker-0.log").read_text()


def wait_for(file):
    end = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["as they start", "step 10"])
def test_no_worker_outlives_the_launcher_that_is_told_to_leave(tmp_path, when):
    process = subprocess.Popen(
        command(tmp_path, "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if when == "as they start":
            wait_for(tmp_path / "worker-1.log")
        else:
            next(line for line in process.stdout if line.startswith(when))
        process.send_signal(signal.SIGTERM)
        words, _ = process.communicate(timeout=60)
        assert process.returncode == 75 and "Go on with --resume" in words, words
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
            "--fault must be kind:worker:step, the kind one of kill, raise, hang,"
            " freeze, term, disk. Got --fault flood:0:1. Pass --fault kill:1:20, say.",
        ),
        (["--resume"], "--resume needs a checkpoint."),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    status, words = run(tmp_path / "out", *options)
    assert status == 2 and message in " ".join(words.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_mesh_is_refused(finished):
    before = files(finished)
    assert before
    status, words = run(finished, "--processes", "4", "--resume")
    assert status == 2, words
    found = " ".join(words.split())
    assert "Got --processes 4" in found and "has --processes 2" in found
    assert files(finished) == before


def test_a_worker_refuses_the_checkpoint_of_another_model(finished):
    """Without the launcher, too, as on a cluster: each of them, and writes nothing."""
    before = files(finished)
    for of_one in run_workers(finished, "--norm", "group")[1]:
        assert "Refused: --resume needs the settings of the checkpoint." in of_one
        assert "Got --norm group; the checkpoint" in of_one
        assert "has --norm batch." in of_one
    assert files(finished) == before


def test_the_checkpoints_of_a_model_that_was_changed_are_not_touched(
    finished, tmp_path, monkeypatch
):
    """The code, that is: no option says so, and all processes find it out."""
    shutil.copytree(EXAMPLE.parent, tmp_path / "examples")
    code = tmp_path / "examples" / "train_digits.py"
    changed = code.read_text().replace("64", "48")
    assert changed != code.read_text()
    code.write_text(changed)
    monkeypatch.setitem(globals(), "EXAMPLE", code.with_name(EXAMPLE.name))
    before = files(finished)
    assert before
    status, words = run(finished, "--resume")
    assert status == 2, words
    found = " ".join(words.split())
    assert (
        f"checkpoints [4, 8, {STEPS}] none can be read:"
        " optimizer/1/0/trace/ConvNorm_10/BatchNorm_0/bias is (64,) in checkpoint"
        f" {STEPS}, and (48,) in the model. Restore" in found
    )
    assert "training from" not in found
    assert files(finished) == before
