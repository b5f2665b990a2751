"""The comparison trains what it says, counts what diverges, and reads CIFAR-10."""

import importlib.util
import itertools
import json
import logging
import re
import sys
from pathlib import Path

import family
import jax
import numpy as np
import pytest
from jax import lax

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def load(name):
    """The example as a module, the one that other tests have loaded if they have."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


load("train_digits")  # which the comparison imports from beside itself
demo = load("compare_norms")
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
AGAIN = f"Get cifar-10-binary.tar.gz from {PAGE} again."


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of 3 layers instead of 7, which compiles in less time."""
    monkeypatch.setattr(demo, "STAGES", ((8, 1),))


class Bar:
    """Counts the examples that a progress bar is told of."""

    seen = 0

    def update(self, examples):
        self.seen += examples


def members(*rows):
    """Networks of these rates, initial scales and seeds."""
    rate, scale, seed = zip(*rows, strict=True)
    return demo.Members(np.float32(rate), np.float32(scale), np.int32(seed))


def trained(norm, devices, *rows, size=16, steps=3):
    """What becomes of the networks on digits, after steps of that many examples."""
    data, held_out = (demo.Images(*part) for part in demo.digits("float32"))
    devices, bar, these = jax.devices()[:devices], Bar(), members(*rows)
    per_device = size // len(devices)
    outcome = demo.compare(norm, per_device, devices, data, held_out, steps, bar, these)
    assert bar.seen == len(rows) * size * steps
    return outcome


def result(seed=0, accuracy=0.9, diverged=False, **setting):
    setting = {
        "norm": "batch",
        "per_device": 2,
        "rate": "small",
        "init": "good",
    } | setting
    return setting | {"seed": seed, "accuracy": accuracy, "diverged": diverged}


# What it trains.


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_convolve_is_a_convolution(size, stride):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 8, 6, 5)))
    kernel = np.float32(rng.normal(size=(size, size, 5, 7)))
    edge = (size // 2, size // 2)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(
        x, kernel, (stride, stride), (edge, edge), dimension_numbers=layout
    )
    found = demo.convolve(x, kernel, stride)
    assert found.shape == expected.shape
    atol = family.tolerance(size * size * 5, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.further  # of batch norm alone, tests/test_linen.py has it
def test_synced_training_ignores_how_the_batch_is_split_and_local_does_not():
    row = (1.0, 1.0, 0)
    whole = trained("batch", 1, row)
    split = trained("batch", 8, row)
    local = trained("local-batch", 8, row)
    np.testing.assert_allclose(split.loss, whole.loss, rtol=1e-5)
    assert abs(local.loss / whole.loss - 1) > 1e-3


def test_initial_network_is_of_its_seed_and_scale_alone():
    rows = [(0.3, 1.0, 0), (0.03, 4.0, 0), (0.3, 1.0, 1)]
    three = demo.make_state("none", (8, 8, 1), members(*rows)).params
    one = demo.make_state("none", (8, 8, 1), members(rows[1])).params
    kernel, alone = (p["ConvNorm_0"]["kernel"] for p in (three, one))
    assert np.array_equal(kernel[1], 4 * kernel[0])
    assert np.array_equal(kernel[1], alone[0])
    assert not np.array_equal(kernel[2], kernel[0])


def test_order_is_whole_epochs_of_its_seed():
    seen = demo.order(10, 25, 0)
    assert seen.shape == (25,)
    for epoch in (seen[:10], seen[10:20]):
        assert sorted(epoch) == list(range(10))
    assert len(set(seen[20:].tolist())) == 5
    assert np.array_equal(seen[:15], demo.order(10, 15, 0))
    assert not np.array_equal(seen, demo.order(10, 25, 1))


# What diverges.


def test_network_learns_beside_one_that_diverges_and_is_counted():
    rows = (np.inf, 1.0, 0), (1.0, 1.0, 0)
    outcome = trained("local-batch", 8, *rows, size=64, steps=128)
    assert outcome.diverged.tolist() == [True, False]
    assert outcome.accuracy[0] == 0
    assert outcome.accuracy[1] > 0.9  # chance: 0.1
    assert not np.isfinite(outcome.loss[0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "RATES", {"small": 0.1})
        patched.setattr(demo, "SEEDS", 1)
        found = demo.records("local-batch", 2, outcome)
    assert [r["diverged"] for r in found] == [True, False]
    assert json.loads(json.dumps(found, allow_nan=False))[0]["loss"] is None


@pytest.mark.parametrize(
    ("accuracies", "lines"),
    [
        ((0.9, 0.98, 0.95), ("95.0", "90.0–98.0")),
        ((0.9, None, 0.95), ("90.0", "1/3 diverged")),
        ((None, None, 0.95), ("diverged", "2/3, best 95.0")),
        ((None, None, None), ("diverged", "3/3")),
    ],
)
def test_cell_says_how_many_diverged(accuracies, lines):
    of_seeds = [
        result(seed, accuracy or 0.0, accuracy is None)
        for seed, accuracy in enumerate(accuracies)
    ]
    (cell,) = demo.cells(of_seeds).values()
    assert cell.lines() == lines


def test_finding_is_of_the_worst_setting_and_names_what_seeds_cannot_part():
    def of(norm, *settings):
        return [
            result(seed, accuracy, norm=norm, rate=rate)
            for rate, accuracies in zip(("small", "large"), settings, strict=True)
            for seed, accuracy in enumerate(accuracies)
        ]

    batch = of("batch", (0.9, 0.9, 0.9), (0.4, 0.5, 0.59))
    layer = of("layer", (0.6, 0.6, 0.7), (0.8, 0.9, 0.9))
    said = "Best in its worst of 2 settings: layer 60.0 %"
    assert demo.finding(demo.cells(batch + layer)) == said
    group = of("group", (0.5, 0.57, 0.6), (0.7, 0.7, 0.7))
    said += ", group 57.0 %"
    assert demo.finding(demo.cells(batch + layer + group)) == said


# The command.


def test_main_leaves_table_picture_and_results(tmp_path, capsys, caplog):
    out = tmp_path / "out"
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        options = ["--quick", "--norms", "none", "layer", "--out", str(out)]
        assert demo.main(options) == 0
    # One program for each norm at each batch size, with all rates in it.
    assert len(re.findall(r"Compiling jit\(train\)", caplog.text)) == 4

    assert {p.name for p in out.iterdir()} == {demo.PICTURE, demo.RESULTS}
    assert (out / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / demo.RESULTS).read_text())
    results = written["results"]
    assert written["settings"]["examples"] == demo.QUICK_STEPS * 32 * 8
    keys = ("norm", "per_device", "rate", "init", "seed")
    every = [("layer", "none"), demo.PER_DEVICE, demo.RATES, demo.INITS, range(3)]
    assert [tuple(r[k] for k in keys) for r in results] == list(
        itertools.product(*every)
    )
    # An accuracy is of 360 held-out images, or 0 where there is none.
    right = np.array([360 * r["accuracy"] for r in results])
    np.testing.assert_allclose(right, right.round(), atol=1e-6)
    assert all(r["accuracy"] == 0 for r in results if r["diverged"])
    assert len({r["accuracy"] for r in results}) > 8

    said = capsys.readouterr().out
    for per_device in demo.PER_DEVICE:
        assert f"{per_device} examples per device" in said
    for cell in demo.cells(results).values():
        for line in cell.lines():
            assert line in said
    assert demo.finding(demo.cells(results)) in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps must be 1 or more. Got --steps 0."),
        (
            "--data cifar10",
            "--data cifar10 and --data-dir go together. Got --data cifar10, --data-dir"
            " None. Pass both, or neither.",
        ),
        (
            "--data-dir x",
            "--data cifar10 and --data-dir go together. Got --data digits, --data-dir"
            " x. Pass both, or neither.",
        ),
        (
            f"--out {__file__}",
            f"--out must be a folder. Got {__file__}, a file. Pass another one.",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    assert refusal(capsys, *options.split()) == message


def refusal(capsys, *options):
    """What the comparison says when it refuses the options."""
    with pytest.raises(SystemExit) as raised:
        demo.main([str(o) for o in options])
    assert raised.value.code == 2
    return capsys.readouterr().err.split("error: ")[1].strip()


# CIFAR-10, of a few records.


def record(label, image):
    """The bytes of one record: the label, then one color after the other."""
    return bytes([label]) + image.transpose(2, 0, 1).tobytes()


@pytest.fixture
def cifar10(tmp_path):
    """A folder of tiny files, and the images [6, N, 32, 32, 3] in them."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(6, 3, 32, 32, 3), dtype=np.uint8)
    for i, name in enumerate(demo.CIFAR_FILES):
        rows = [record(i + n, image) for n, image in enumerate(images[i])]
        (folder / name).write_bytes(b"".join(rows))
    return folder, images


def test_cifar10_is_read_as_published(cifar10, capsys):
    folder, images = cifar10
    assert demo.CIFAR_RECORDS * demo.CIFAR_RECORD == 30_730_000
    train, held_out = demo.read_cifar10(folder)
    assert train.images.dtype == np.uint8
    assert np.array_equal(train.images, images[:5].reshape(15, 32, 32, 3))
    assert np.array_equal(held_out.images, images[5])
    assert train.labels.tolist() == [i + n for i in range(5) for n in range(3)]
    assert held_out.labels.tolist() == [5, 6, 7]
    notes = [
        f"Note: {folder / name} has 3 records, a published file 10000."
        for name in demo.CIFAR_FILES
    ]
    assert capsys.readouterr().err.splitlines() == notes


def test_cifar10_of_the_published_size_is_read_without_a_note(
    cifar10, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "CIFAR_RECORDS", 3)
    demo.read_cifar10(cifar10[0])
    assert capsys.readouterr().err == ""


def test_cifar10_trains_and_evaluates_on_more_devices_than_images(cifar10):
    train, held_out = demo.read_cifar10(cifar10[0])
    outcome = demo.compare(
        "none", 1, jax.devices(), train, held_out, 1, Bar(), members((0.1, 1, 0))
    )
    assert np.isfinite(outcome.loss) and not outcome.diverged
    assert 3 * outcome.accuracy in (0, 1, 2, 3)


def test_bytes_are_images_in_0_to_1(cifar10):
    image = demo.read_cifar10(cifar10[0])[1].images
    model = demo.Network("none")

    @jax.jit
    def logits_of(image):
        key = jax.random.key(0, impl="rbg")
        return model.init_with_output(key, image, train=True)[0]

    logits = logits_of(image)
    same = logits_of(np.float32(image) / np.float32(255))
    np.testing.assert_allclose(logits, same, rtol=1e-5)


def test_missing_cifar10_file_is_named(cifar10, capsys):
    folder, _ = cifar10
    (folder / "data_batch_2.bin").unlink()
    (folder / "test_batch.bin").unlink()
    message = (
        "read_cifar10: the folder must have the six files of the binary version. Got"
        f" {folder} without data_batch_2.bin, test_batch.bin. Unpack"
        f" cifar-10-binary.tar.gz from {PAGE}, and pass the folder with"
        " data_batch_1.bin in it."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        demo.read_cifar10(folder)
    out = folder / "out"
    options = ("--data", "cifar10", "--data-dir", folder, "--out", out)
    assert refusal(capsys, *options) == message
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "facts"),
    [
        (0, "0 bytes: 0 records and 0 bytes."),
        (3072, "3072 bytes: 0 records and 3072 bytes."),
        (2 * 3073 + 7, "6153 bytes: 2 records and 7 bytes."),
    ],
)
def test_truncated_cifar10_file_is_refused(size, facts, cifar10, capsys):
    path = cifar10[0] / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:size])
    message = (
        "read_cifar10: a file must be one or more whole records of 3073 bytes; a"
        f" published one has 30730000 bytes. Got {path} of {facts} {AGAIN}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        demo.read_cifar10(cifar10[0])
    said = refusal(capsys, "--data", "cifar10", "--data-dir", cifar10[0])
    assert said.endswith(message)


def test_wrong_cifar10_label_is_refused(cifar10):
    path = cifar10[0] / "test_batch.bin"
    whole = bytearray(path.read_bytes())
    whole[3073] = 10
    path.write_bytes(whole)
    message = (
        "read_cifar10: the first byte of a record is its label and must be 0 to 9. Got"
        f" 10 in record 1 of {path}. {AGAIN}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        demo.read_cifar10(cifar10[0])
