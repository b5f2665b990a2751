"""Checkpoints are read without their model; what is damaged or hostile is refused."""

import io
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.serialization import to_bytes
from golden import write

from normjax.__main__ import main
from normjax.tools import bounds, checkpoints, models

GOLDEN = pathlib.Path(write.__file__).parent
TREE = {
    "params": {"norm": {"scale": np.arange(3.0, dtype=np.float32)}},
    "batch_stats": {
        "norm": {"mean": np.ones(3), "var": np.ones(3, dtype=jnp.bfloat16)},
    },
    "step": np.array(7),
}


def saved(kind, folder, tree=TREE):
    path = folder / kind
    if kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif kind == "manager":
        options = ocp.CheckpointManagerOptions(step_prefix="run")
        with ocp.CheckpointManager(path, options=options) as manager:
            old = jax.tree.map(np.zeros_like, tree)
            manager.save(9, args=ocp.args.StandardSave(old))
            manager.save(10, args=ocp.args.StandardSave(tree))
    elif kind == "items":
        with ocp.CheckpointManager(path, item_names=("state", "notes")) as manager:
            state, notes = ocp.args.StandardSave(tree), ocp.args.JsonSave({"a": 1})
            manager.save(1, args=ocp.args.Composite(state=state, notes=notes))
    elif kind == "msgpack":
        path.write_bytes(to_bytes(tree))
    else:
        flat = jax.tree_util.tree_leaves_with_path(tree)
        names = {"/".join(k.key for k in keys): a for keys, a in flat}
        np.savez(path, **names)
        path = path.with_suffix(".npz")
    return path


@pytest.mark.parametrize("kind", ["orbax", "manager", "items", "msgpack", "npz"])
def test_every_kind_gives_the_tree_that_was_saved(kind, tmp_path):
    got = checkpoints.load(saved(kind, tmp_path))
    assert jax.tree.structure(got) == jax.tree.structure(TREE)
    jax.tree.map(np.testing.assert_array_equal, got, TREE)
    assert jax.tree.map(lambda a: (type(a), a.dtype), got) == jax.tree.map(
        lambda a: (type(a), a.dtype), TREE
    )


def test_a_checkpoint_of_other_devices_and_versions_is_read():
    folders = list(GOLDEN.glob("jax-*"))
    assert len(folders) == 2
    for folder in folders:
        want = checkpoints.load(folder / "linen.msgpack")
        got = checkpoints.load(folder / "linen.orbax")
        jax.tree.map(np.testing.assert_array_equal, got, want)
        of_nnx = models.flat(checkpoints.load(folder / "nnx.orbax"))
        assert of_nnx["BatchNorm", "var"].shape == (
            want["batch_stats"]["BatchNorm"]["var"].shape
        )


class Runs:
    """A pickle that runs code, where something reads it."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def hostile(kind):
    """The bytes of a file that is damaged, or made to harm."""
    good = to_bytes(TREE)
    if kind in ("cut", "longer"):
        return good[:-9] if kind == "cut" else good + b"\0"
    if kind == "pickle":
        return pickle.dumps({"params": Runs()})
    if kind == "words":
        return b"these are no weights"
    if kind == "number":
        return msgpack.packb(7)
    if kind == "claim":  # an array of as many as it likes
        return b"\x81\xa1a\xdd\xff\xff\xff\xff"
    if kind == "deep":
        return b"\x81\xa1a" * 1100 + b"\xc0"
    if kind == "object":
        inner = msgpack.packb(((1,), "O", b"\0" * 8))
        return msgpack.packb({"a": msgpack.ExtType(1, inner)})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "torch":
            archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
        elif kind == "keras":
            archive.writestr("model.weights.h5", b"")
        elif kind == "objects":
            inner = io.BytesIO()
            np.save(inner, np.array([Runs()], object), allow_pickle=True)
            archive.writestr("a.npy", inner.getvalue())
        elif kind == "lies":
            inner = io.BytesIO()
            header = {"descr": "<f4", "fortran_order": False, "shape": (10**10,)}
            np.lib.format.write_array_header_1_0(inner, header)
            archive.writestr("a.npy", inner.getvalue() + b"\0" * 16)
        elif kind == "bomb":
            with archive.open("a.npy", "w") as member:
                inner = io.BytesIO()
                header = {"descr": "|u1", "fortran_order": False, "shape": (2**21,)}
                np.lib.format.write_array_header_1_0(inner, header)
                member.write(inner.getvalue() + bytes(2**21))
    return file.getvalue()


PICKLE = (
    "a checkpoint must not be a pickle, because reading one runs what is in it. Got"
    " {path}. Save it anew where it is trusted, with numpy.savez or"
    " flax.serialization.to_bytes."
)
KINDS = (
    "Pass the folder of an orbax checkpoint, or a file of flax.serialization.to_bytes or"
    " numpy.savez."
)
DAMAGED = (
    "the checkpoint must be whole, and of the kind it seems to be. Got {path}, of which"
    " reading ends in %s. Copy it again from where it was written, or take the one"
    " before it."
)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", DAMAGED % "ValueError: Unpack failed: incomplete input"),
        ("longer", DAMAGED % "ExtraData: unpack(b) received extra data"),
        ("words", DAMAGED % "ExtraData: unpack(b) received extra data"),
        ("claim", DAMAGED % "ValueError: 4294967295 exceeds max_array_len(8)"),
        ("deep", DAMAGED % "StackError"),
        (
            "object",
            DAMAGED % "ValueError: cannot create an OBJECT array from memory buffer",
        ),
        ("pickle", PICKLE),
        ("torch", PICKLE),
        ("objects", PICKLE),
        ("keras", "a zip must hold arrays of numpy alone. Got model.weights.h5 in {path}."
         f" {KINDS}"),
        ("number", "a checkpoint must hold a tree of names. Got {path} of int. " + KINDS),
        ("lies", "an array must be as large as it says. Got a.npy in {path}, 16 bytes for"
         " float32 of shape (10000000000,). Copy it again from where it was written."),
        ("bomb", "reading must take no more memory than max_bytes, which is the larger of"
         " 1048576 and twice the file unless it is given. Got {path}: 1 arrays, about"
         " 2097280 bytes, and max_bytes=1048576. If you trust the file, pass"
         " max_bytes=2097280, or more; on the command line --max-bytes."),
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bounds, "DEFAULT", 2**20)
    path = tmp_path / "checkpoint"
    path.write_bytes(hostile(kind))
    with pytest.raises(ValueError) as error:
        checkpoints.load(path)
    said = message.format(path=path, size=path.stat().st_size)
    assert str(error.value) == f"checkpoint: {said}"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]  # nothing ran


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "1.orbax-checkpoint-tmp-0").mkdir()
    with pytest.raises(ValueError) as error:
        checkpoints.load(tmp_path)
    assert str(error.value) == (
        f"checkpoint: a folder must be a checkpoint of orbax. Got {tmp_path}. {KINDS}"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_METADATA").touch()
    with pytest.raises(ValueError) as error:
        checkpoints.load(tmp_path)
    assert str(error.value) == (
        "checkpoint: a step must hold one tree, or it must be said which. Got a, b in"
        f" {tmp_path}. Pass {tmp_path / 'a'}, say."
    )


def test_a_folder_with_a_file_cut_off_is_refused(tmp_path):
    path = saved("orbax", tmp_path, {"norm": {"var": np.arange(9.0)}})
    (data,) = [p for p in (path / "d").iterdir()]
    data.write_bytes(data.read_bytes()[:-20])
    with pytest.raises(ValueError) as error:
        checkpoints.load(path)
    rule = "checkpoint: the checkpoint must be whole, and of the kind it seems to be."
    assert str(error.value).startswith(f"{rule} Got {path}, of which reading ends in ")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.load(tmp_path / "none")
    assert str(error.value) == (
        "checkpoint: there must be a checkpoint. Got no file or folder"
        f" {tmp_path / 'none'}. {KINDS}"
    )


# python -m normjax doctor.


def command(*arguments):
    return main(["doctor", *map(str, arguments)])


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def with_var(value):
    norm = {"mean": np.ones(3, np.float32), "var": np.full(3, value, np.float32)}
    return {"batch_stats": {"norm": norm}}


def test_the_exit_status_tells(tmp_path, capsys):
    sound = saved("msgpack", tmp_path, with_var(2.0))
    assert command(sound, "--steps", 300) == 0
    assert capsys.readouterr().out.startswith("1 norm, 0 findings\n")
    slow = ("--steps", 10, "--momentum", 0.99)
    assert command(sound, *slow) == 0
    assert command(sound, *slow, "--strict") == 1
    assert command(saved("msgpack", tmp_path, with_var(np.nan))) == 1
    capsys.readouterr()
    assert command(tmp_path / "none") == 2
    assert "there must be a checkpoint" in capsys.readouterr().err
    assert command(saved("msgpack", tmp_path, {"w": np.ones(3)})) == 2
    assert "there must be a norm to look at" in capsys.readouterr().err


def test_json_is_printed(tmp_path, capsys):
    assert command(saved("npz", tmp_path, with_var(np.nan)), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    (finding,) = report["findings"]
    assert finding["name"] == "not-finite" and finding["path"] == "norm"
    assert set(finding) == {"name", "path", "what", "todo", "severity"}
    assert report["norms"] == 1 and "updated-twice" in report["skipped"]


def test_it_runs_as_a_module():
    path = GOLDEN / "jax-0.10.2" / "linen.msgpack"
    run = subprocess.run(
        [sys.executable, "-m", "normjax", "doctor", path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=GOLDEN.parent.parent,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("5 norms, 0 findings\n")
