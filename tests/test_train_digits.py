"""The demo learns, agrees with itself over devices, resumes exactly, and says no."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_digits.py"

_spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
demo = importlib.util.module_from_spec(_spec)
sys.modules["train_digits"] = demo
_spec.loader.exec_module(demo)


@pytest.fixture
def small(monkeypatch):
    """A network of 4 layers instead of 15, which compiles in less time."""
    monkeypatch.setattr(demo, "STAGES", ((8, 2),))
    monkeypatch.setattr(demo, "BLOCKS", 1)


def trained(*options):
    """The losses and the running statistics after training with the options."""
    args, devices = demo.read_options(demo.make_parser(), list(options))
    history = {"loss": [], "accuracy": []}
    with jax.enable_x64(args.dtype == "float64"):
        state = demo.train(args, devices, demo.initial_state(args), history)
    return np.array(history["loss"]), state["stats"]


def interrupt_at(step, monkeypatch):
    """Presses Ctrl-C while that step is under way."""
    batch = demo.batch

    def pressed(data, size, seed, now):
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return batch(data, size, seed, now)

    monkeypatch.setattr(demo, "batch", pressed)


def last_checkpoint(out):
    """The state as the last checkpoint holds it, its losses and its accuracies."""
    with demo.open_checkpoints(out) as manager:
        step = manager.latest_step()
        like = manager.item_metadata(step).state
        state, history = demo.restore(manager, like)
    return step, jax.device_get(state), history


def files(folder):
    """All files below the folder, with what they hold."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(capsys, *options):
    """What the demo says when it refuses the options."""
    with pytest.raises(SystemExit) as raised:
        demo.main([str(o) for o in options])
    assert raised.value.code == 2
    return capsys.readouterr().err.split("error: ")[1].strip()


# The claims.


@pytest.mark.further  # make demo does the same
def test_demo_reaches_98_percent_and_leaves_checkpoint_and_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"^Accuracy: ([\d.]+)% of the held-out", done.stdout, re.M)
    assert float(accuracy[1]) >= 98
    checkpoint = re.search(r"^Checkpoint: (.*)$", done.stdout, re.M)[1]
    assert Path(checkpoint) == tmp_path / "out" / "checkpoints" / str(demo.STEPS)
    assert Path(checkpoint).is_dir()
    picture = re.search(r"^Picture: (.*)$", done.stdout, re.M)[1]
    assert list((tmp_path / "out").glob("*.png")) == [Path(picture)]
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def assert_parallel_ways_agree(dtype, tolerance):
    """Over 20 steps, in losses and in running statistics."""
    options = ("--steps", "20", "--dtype", dtype)
    losses, stats = trained(*options, "--parallel", "jit")
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    for way in ("shard_map", "pmap"):
        other, other_stats = trained(*options, "--parallel", way)
        np.testing.assert_allclose(other, losses, rtol=0, atol=tolerance)
        for a, b in zip(
            jax.tree.leaves(other_stats), jax.tree.leaves(stats), strict=True
        ):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.further
def test_parallel_ways_agree_to_1e_5_in_float32(monkeypatch):
    monkeypatch.setattr(demo, "BLOCKS", 1)  # 9 layers, which compile in less time
    assert_parallel_ways_agree("float32", 1e-5)


def test_parallel_ways_agree_to_1e_10_in_float64(small):
    assert_parallel_ways_agree("float64", 1e-10)


def test_resume_is_the_uninterrupted_run_bit_for_bit(
    small, monkeypatch, tmp_path, capsys
):
    # Through a checkpoint made by Ctrl-C, past an evaluation.
    options = ["--steps", "32", "--out"]
    assert demo.main([*options, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        interrupt_at(27, patched)
        assert demo.main([*options, str(tmp_path / "parts")]) == 130
    assert "Stopped after step 27 of 32" in capsys.readouterr().out
    step, _, history = last_checkpoint(tmp_path / "parts")
    assert step == len(history["loss"]) == 27
    assert demo.main([*options, str(tmp_path / "parts"), "--resume"]) == 0

    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole[0] == parts[0] == len(whole[2]["loss"]) == 32
    assert [step for step, _ in whole[2]["accuracy"]] == [25, 32]
    assert whole[2] == parts[2]
    assert jax.tree.all(jax.tree.map(np.array_equal, whole[1], parts[1]))


# What else it does.


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance", "none"])
def test_other_norms_train(norm, small):
    losses, stats = trained("--norm", norm, "--steps", "12")
    assert losses[-1] < losses[0]
    assert not jax.tree.leaves(stats)


def test_local_batch_is_not_synced_and_batch_is(small):
    options = ("--steps", "1", "--batch-size", "16")
    one, _ = trained(*options, "--devices", "1")
    synced, _ = trained(*options, "--parallel", "shard_map")
    np.testing.assert_allclose(synced, one, rtol=1e-5)
    local, _ = trained(*options, "--norm", "local-batch")
    assert abs(local - one) > 1e-3


def test_run_again_replaces_the_earlier_run(small, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "spreads", lambda args, state: {})
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    for steps in (3, 2):
        assert demo.main(["--steps", str(steps), "--out", str(tmp_path / "out")]) == 0
    step, _, history = last_checkpoint(tmp_path / "out")
    assert step == len(history["loss"]) == 2
    assert json.loads((tmp_path / "out" / demo.MARK).read_text())["steps"] == 2


def test_ctrl_c_while_evaluating_still_saves(small, monkeypatch):
    monkeypatch.setattr(demo, "EVALUATE_EVERY", 1)
    make_evaluate, kept = demo.make_evaluate, []

    def pressed(args, held_out):
        evaluate = make_evaluate(args, held_out)

        def while_evaluating(state):
            if len(history["loss"]) == 2:
                signal.raise_signal(signal.SIGINT)
            return evaluate(state)

        return while_evaluating

    def keep(step, state, history):
        kept.append((step, len(history["loss"]), len(history["accuracy"])))

    monkeypatch.setattr(demo, "make_evaluate", pressed)
    args, devices = demo.read_options(demo.make_parser(), ["--steps", "9"])
    history = {"loss": [], "accuracy": []}
    demo.train(args, devices, demo.initial_state(args), history, keep)
    # What was under way ends as it would have; the step after it is the last.
    assert kept == [(3, 3, 3)]
    assert len(history["loss"]) == 3


def test_second_ctrl_c_is_not_held_back():
    # As Python sets it at a terminal; a shell's background jobs start without it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), demo.ctrl_c_noted() as noted:
            signal.raise_signal(signal.SIGINT)
            assert noted.is_set()
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_batch_is_of_its_step_alone():
    data, held_out = demo.digits("float32")
    assert (len(data.labels), len(held_out.labels)) == (1437, 360)
    first, again = (demo.batch(data, 96, 0, 7) for _ in range(2))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.labels, again.labels)
    assert first.images.shape == (96, 8, 8, 1)
    assert not np.array_equal(first.images, demo.batch(data, 96, 0, 8).images)
    assert not np.array_equal(first.images, demo.batch(data, 96, 1, 7).images)


def test_batch_moves_images_by_up_to_a_pixel():
    images = np.zeros((9, 8, 8, 1), np.float32)
    images[:, 3, 4] = 1
    moved, _ = demo.batch(demo.Digits(images, np.arange(9)), 9, 0, 0)
    _, rows, columns, _ = np.nonzero(moved)
    assert len(rows) == 9
    assert set(rows) == {2, 3, 4}
    assert set(columns) == {3, 4, 5}


# What it refuses, before it writes anything.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--batch-size 100 --devices 8",
            "--batch-size must be a multiple of the number of devices, and at most"
            " 1437, the images to train on. Got --batch-size 100, 8 cpu devices."
            " Nearest: 96 or 104.",
        ),
        (
            "--batch-size 1600 --devices 8",
            "--batch-size must be a multiple of the number of devices, and at most"
            " 1437, the images to train on. Got --batch-size 1600, 8 cpu devices."
            " Nearest: 1432.",
        ),
        ("--batch-size 0", "--batch-size must be 1 or more. Got --batch-size 0."),
        ("--steps 0", "--steps must be 1 or more. Got --steps 0."),
        ("--seed=-1", "--seed must be 0 or more. Got --seed -1."),
        ("--devices 0", "--devices must be 1 or more. Got --devices 0."),
        (
            "--learning-rate nan",
            "--learning-rate must be 0 or more. Got --learning-rate nan.",
        ),
        (
            "--devices 999",
            "--devices must not be more than there are. Got --devices 999, {n} cpu"
            " devices. Pass {n} or fewer.",
        ),
        (
            "--norm local-batch --parallel jit",
            "--norm local-batch needs devices that know of themselves. Got --parallel"
            " jit, under which statistics are always synced. Pass --parallel shard_map"
            " or pmap.",
        ),
        (
            "--resume",
            "--resume needs a checkpoint. Got {out}, where there is none. Leave out"
            " --resume, or pass the --out of the run to resume.",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path, capsys):
    demo.choose_devices(None, pytest.fail)  # 8 CPU devices, if none are there yet
    out = tmp_path / "out"
    said = refusal(capsys, *options.split(), "--out", out)
    assert said == message.format(out=out, n=len(jax.devices()))
    assert not out.exists()


def test_resume_with_other_settings_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--steps", "2", "--out", str(out)]
    settings = demo.settings_of(*demo.read_options(demo.make_parser(), options))
    demo.start_afresh(out, settings, pytest.fail)
    with demo.open_checkpoints(out) as manager:
        demo.save(manager, 1, {"params": np.zeros(3)}, {"loss": [1.0], "accuracy": []})
    before = files(out)
    said = refusal(capsys, "--resume", "--steps", 3, "--norm", "layer", "--out", out)
    assert said == (
        "--resume needs the settings of the checkpoint. Got --norm layer, --steps 3;"
        f" the checkpoint in {out} has --norm batch, --steps 2. Pass those, or another"
        " --out to train anew."
    )
    assert files(out) == before


def test_folder_of_others_is_left_alone(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("ten years")
    before = files(tmp_path)
    said = refusal(capsys, "--out", tmp_path)
    assert said == (
        "--out must be new, empty, or of an earlier run of this demo. Got"
        f" {tmp_path}, which has files but no train_digits.json. Pass another folder."
    )
    said = refusal(capsys, "--out", tmp_path / "checkpoints" / "thesis.txt")
    assert said.startswith("--out must be a folder.")
    assert files(tmp_path) == before


def test_import_has_no_side_effects():
    # JAX refuses another number of devices once a backend is in use.
    code = (
        "import jax, train_digits; jax.config.update('jax_num_cpu_devices', 3);"
        "assert len(jax.devices('cpu')) == 3"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=SCRIPT.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
