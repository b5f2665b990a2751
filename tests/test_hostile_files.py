"""No file hangs a reader, ends the process or takes more memory than it may."""

import functools
import io
import json
import os
import re
import socket
import struct
import time
import zipfile

import fuzz_files
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import to_bytes

from normjax import tools
from normjax.__main__ import main
from normjax.tools import bounds, checkpoints

h5py = pytest.importorskip("h5py", reason="writes files of Keras")
AGAIN = "Get the file again from where it came from."


def refused(read, path, seconds=10.0, megabytes=40):
    """The words in which a file is refused, soon and without memory."""
    fuzz_files.forget()
    start, (before, _) = time.monotonic(), fuzz_files.held()
    with pytest.raises(ValueError) as error:
        read(path)
    assert time.monotonic() - start < seconds
    assert fuzz_files.held()[1] - before < megabytes * 1e6
    return str(error.value)


def bound(caller, path, what, count, most=200_000_000):
    return (
        f"{caller}: reading must take no more memory than max_bytes, which is the"
        " larger of 200000000 and twice the file unless it is given. Got"
        f" {path}: {what}, about {count} bytes, and max_bytes={most}. If you trust the"
        f" file, pass max_bytes={count}, or more; on the command line --max-bytes."
    )


# HDF5, read by its structure.


def arrays_of(count):
    rng = np.random.default_rng(0)
    found = {f"vars/{i}": rng.normal(size=3).astype(np.float32) for i in range(count)}
    kinds = "? i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 c8 c16 >f4 >i2 >u8 >c8"
    for kind in kinds.split():
        found[f"kinds/{kind}/a"] = rng.integers(0, 2, (2, 3)).astype(kind)
    return found | {"scalar": np.array(7), "empty": np.zeros((0, 3))}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("version", [None, "earliest", ("v108", "v108"), "latest"])
@pytest.mark.parametrize("count", [0, 8, 9, 700])
def test_every_way_of_hdf5_to_keep_plain_arrays_is_read(
    count, version, ordered, tmp_path
):
    """Links in tables, in headers, in heaps of one block and of rows of blocks."""
    want, path = arrays_of(count), tmp_path / "a.h5"
    with h5py.File(path, "w", libver=version, track_order=ordered) as file:
        for name, a in want.items():
            file[name] = a
        for i in range(12):  # attributes, beyond what a header keeps
            file["scalar"].attrs[f"a{i}"] = "word" * i
        file["half"] = np.ones(3, ml_dtypes.bfloat16)
        file["half"].attrs["dtype"] = "bfloat16"
        plain = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plain.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((5,))
        made = h5py.h5d.create(file.id, b"compact", h5py.h5t.IEEE_F64LE, space, plain)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(5.0))
        file.create_group("nothing")
    want["half"], want["compact"] = np.ones(3, ml_dtypes.bfloat16), np.arange(5.0)
    got = tools.read_weights(path)
    assert set(got) == set(want)
    for name, a in want.items():
        assert (got[name].dtype, got[name].shape) == (a.dtype, a.shape), name
        assert got[name].tobytes() == a.tobytes() and got[name].flags.writeable, name


def test_hdf5_after_a_block_of_the_users_own_is_read(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["a/b"] = np.arange(3.0)
    assert tools.read_weights(path)["a/b"].tolist() == [0, 1, 2]


def of_keras(tmp_path, libver="latest"):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file["w"] = np.ones(3, ml_dtypes.bfloat16)
        file["w"].attrs["dtype"] = "bfloat16"
    return path


def changed(data, place, form, *values):
    new = struct.pack(form, *values)
    return data[:place] + new + data[place + len(new) :]


# By place in the heap of words of any length, or in the attribute that leads to it.
WORDS = {
    "address": ("dtype", 4, "<Q", 2**48, "16 bytes at 281474976710656 are not in it"),
    "object": ("dtype", 12, "<I", 9, "the value of an attribute is not where it says"),
    "size": ("GCOL", 8, "<Q", 0, "the value of an attribute is not where it says"),
    "number": ("GCOL", 16, "<H", 9, "the value of an attribute is not where it says"),
    "length": ("GCOL", 24, "<Q", 2**32 - 1, "4294967295 bytes at {} are not in it"),
    "long": ("GCOL", 24, "<Q", 2**63, "9223372036854775808 bytes at {} are not in it"),
    "step": ("GCOL", 24, "<Q", 2**64 - 32, "{} bytes at {} are not in it"),
}


@pytest.mark.parametrize("lie", WORDS)
def test_the_word_of_a_bfloat16_lies(lie, tmp_path):
    """Over which the library of HDF5 hangs, dies or takes gigabytes."""
    part, place, form, value, fault = WORDS[lie]
    path = of_keras(tmp_path, "earliest")
    data = path.read_bytes()
    heap = data.index(b"GCOL")
    if part == "dtype":  # length, address and number of the word
        place += data.index(struct.pack("<IQI", 8, heap, 1))
    else:
        place += heap
    path.write_bytes(changed(data, place, form, value))
    numbers = [value] * (fault.count("{}") - 1) + [heap + 32]
    assert refused(tools.read_weights, path) == (
        f"read_weights: a file of Keras must be HDF5, whole. Got {path}: 'w':"
        f" {fault.format(*numbers)}. {AGAIN}"
    )


def test_the_length_of_a_word_takes_no_memory(tmp_path):
    """The attribute says that its value has 4 GB."""
    path = of_keras(tmp_path, "earliest")
    data = path.read_bytes()
    place = data.index(struct.pack("<IQI", 8, data.index(b"GCOL"), 1))
    path.write_bytes(changed(data, place, "<I", 2**32 - 1))
    fuzz_files.forget()
    before, _ = fuzz_files.held()
    assert tools.read_weights(path)["w"].dtype == ml_dtypes.bfloat16
    assert fuzz_files.held()[1] - before < 20e6


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_many_words_in_few_heaps_are_read(version, tmp_path):
    """Small arrays of bfloat16: their words are most of the file, and read once."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=version) as file:
        for i in range(600):
            file[f"{i}/v"] = np.full((), i % 7, ml_dtypes.bfloat16)
            file[f"{i}/v"].attrs["dtype"] = "bfloat16"
    got = tools.read_weights(path)
    assert all(got[f"{i}/v"] == i % 7 for i in range(600)) and len(got) == 600


def test_a_checksum_of_hdf5_is_looked_at(tmp_path):
    path = of_keras(tmp_path)
    data = path.read_bytes()
    place = data.index(b"OHDR") + 8
    path.write_bytes(changed(data, place, "B", data[place] ^ 1))
    assert refused(tools.read_weights, path) == (
        f"read_weights: a file of Keras must be HDF5, whole. Got {path}: 'the file':"
        f" the checksum of OHDR at {data.index(b'OHDR')}. {AGAIN}"
    )


def old_group(links):
    """A file of which the root's table has these names and addresses, all in a row."""
    names = b"".join(name.encode() + b"\0" for name, _ in links)
    entries, place = b"", 0
    for name, address in links:
        entries += struct.pack("<QQII16x", place, address, 0, 0)
        place += len(name) + 1
    table = 96 + 40
    heap, tree = table + 8 + 40 * len(links), 96
    head = struct.pack(
        "<8s8B2HI", b"\x89HDF\r\n\x1a\n", 0, 0, 0, 0, 0, 8, 8, 0, 4, 16, 0
    )
    root = heap + 32 + len(names)
    end = root + 16 + 24
    head += struct.pack("<4Q", 0, 2**64 - 1, end, 2**64 - 1)
    head += struct.pack("<QQII16x", 0, root, 0, 0)
    data = head + struct.pack(
        "<4sBBHQQQQ", b"TREE", 0, 0, 1, 2**64 - 1, 2**64 - 1, 0, table
    )
    data = data[:96] + data[96:136].ljust(40, b"\0")
    data += struct.pack("<4sBBH", b"SNOD", 1, 0, len(links)) + entries
    data += struct.pack("<4sB3xQQQ", b"HEAP", 0, len(names), 0, heap + 32) + names
    data += struct.pack("<BBHII4x", 1, 0, 1, 1, 24)
    data += struct.pack("<HHB3xQQ", 0x11, 16, 0, tree, heap)
    return data


def test_parts_of_hdf5_that_lie_on_one_another_are_not_read_without_end(tmp_path):
    """A thousand objects that go on in the same part of 240 kB."""
    path, count, messages = tmp_path / "a.h5", 1000, 30_000
    names = [f"{i:05}" for i in range(count)]
    objects = len(old_group([(name, 0) for name in names]))
    data = old_group([(name, objects + 40 * i) for i, name in enumerate(names)])
    shared = len(data) + 40 * count
    for _ in names:
        data += struct.pack("<BBHII4x", 1, 0, messages + 1, 1, 24)
        data += struct.pack("<HHB3xQQ", 0x10, 16, 0, shared, 8 * messages)
    data += struct.pack("<HHB3x", 10, 0, 0) + bytes(8) * (messages - 1)
    path.write_bytes(data)
    assert refused(tools.read_weights, path, megabytes=60) == (
        f"read_weights: a file of Keras must be HDF5, whole. Got {path}: 'the file':"
        f" its parts lie on one another. {AGAIN}"
    )


def test_a_group_of_a_megabyte_of_names_is_read(tmp_path):
    """Its heap has blocks of blocks within blocks."""
    path, names = tmp_path / "a.h5", [f"{i:04}" + "n" * 500 for i in range(1500)]
    with h5py.File(path, "w", libver="latest") as file:
        for i, name in enumerate(names):
            file[name] = i
    got = tools.read_weights(path)
    assert [int(got[name]) for name in names] == [*range(1500)]


OLD = {
    "superblock": (8, 9, "version 9 of HDF5 is not known"),
    "addresses": (13, 4, "its addresses are not of 8 bytes, from where it begins"),
    "base": (24, 1, "its addresses are not of 8 bytes, from where it begins"),
    "tree": (96, 0, "no TREE\0 at 96"),
    "object": (-40, 7, "no object at {root}"),
    "count": (-38, 9, "9 messages at {root}, of which there are others"),
    "shared": (-20, 2, "a part of an object is kept elsewhere, shared with others"),
    "letters": (-44, 255, "the name b'\\xff' is not UTF-8"),
}


@pytest.mark.parametrize("lie", OLD)
def test_a_field_of_hdf5_lies(lie, tmp_path):
    path, (place, value, fault) = tmp_path / "a.h5", OLD[lie]
    data = bytearray(old_group([("abc", 0)]))
    root = len(data) - 40
    data[place] = value
    if lie == "letters":
        data[-43] = 0
    path.write_bytes(data)
    assert refused(tools.read_weights, path) == (
        f"read_weights: a file of Keras must be HDF5, whole. Got {path}: 'the file':"
        f" {fault.format(root=root)}. {AGAIN}"
    )


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_small_arrays_with_long_paths_are_read(version, tmp_path):
    path, folder = tmp_path / "a.h5", "/".join(["group_of_groups"] * 40)
    with h5py.File(path, "w", libver=version) as file:
        for i in range(300):
            file[f"{folder}/{i}"] = i
    got = tools.read_weights(path)
    assert [int(got[f"{folder}/{i}"]) for i in range(300)] == [*range(300)]


def test_names_of_hdf5_that_add_up_are_bounded(tmp_path):
    """One long name, of which each link is an end: 400 MB of names in 300 kB."""
    path, count = tmp_path / "a.h5", 2000
    data = bytearray(old_group([("n" * 200_000, 0)] + [("", 0)] * (count - 1)))
    table, objects = data.index(b"SNOD") + 8, len(data)
    for i in range(count):  # longer and longer, so that they are in order
        place, address = count - i, objects + 24 * i
        struct.pack_into("<QQ", data, table + 40 * i, place, address)
    empty = struct.pack("<BBHII4x", 1, 0, 1, 1, 8) + struct.pack("<HHB3x", 10, 0, 0)
    path.write_bytes(data + empty * count)
    said = refused(tools.read_weights, path, megabytes=120)
    assert ": the structure of groups and datasets, about " in said
    assert said.startswith("read_weights: reading must take no more memory than max_b")


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a"), ("",), ("a/b",)])
def test_names_of_hdf5_are_in_order_and_plain(names, tmp_path):
    path = tmp_path / "a.h5"
    data = old_group([(name, 0) for name in names])
    empty = struct.pack("<BBHII4x", 1, 0, 1, 1, 8) + struct.pack("<HHB3x", 10, 0, 0)
    data = bytearray(data + empty * len(names))
    for i in range(len(names)):
        place = data.index(b"SNOD") + 16 + 40 * i
        struct.pack_into("<Q", data, place, len(data) - 24 * (i + 1))
    path.write_bytes(data)
    said = refused(tools.read_weights, path)
    assert (
        "the names of a group are out of order" in said or "the name 'a/b' in" in said
    )


def test_a_circle_of_hdf5_ends(tmp_path):
    """A node of a group that is its own child; a header that goes on in itself."""
    path = tmp_path / "a.h5"
    data = bytearray(old_group([("a", 0)]))
    struct.pack_into("<B", data, 96 + 5, 1)  # the level
    struct.pack_into("<Q", data, 96 + 32, 96)
    path.write_bytes(data)
    assert "a node of a group is in two places" in refused(tools.read_weights, path)
    data = bytearray(old_group([("a", 0)]))
    root = len(data) - 40
    struct.pack_into("<HHB3xQQ", data, root + 16, 0x10, 16, 0, root + 16, 24)
    path.write_bytes(data)
    assert "a part of an object is in two places" in refused(tools.read_weights, path)


def test_what_takes_too_many_parts_is_refused(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for i in range(500):
            file[f"many/{i}"] = np.ones(1)
    said = refused(lambda p: tools.read_weights(p, max_bytes=100_000), path)
    words = re.escape("the structure of groups and datasets, about ")
    assert re.search(rf"{words}\d+ bytes, and max_bytes=100000\. If you trust", said)
    assert len(tools.read_weights(path, max_bytes=1_000_000)) == 500


# Pipes, devices, sockets, folders.

NAMES = ["a.safetensors", "a.h5", "a.keras", "a.pt", "m.safetensors.index.json"]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", [*NAMES, "a.npz", "a.msgpack"])
def test_only_regular_files_are_read(name, kind, tmp_path, monkeypatch):
    pytest.importorskip("torch") if name == "a.pt" else None
    monkeypatch.chdir(tmp_path)
    path, said = tmp_path / name, f"a {kind}"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":  # endless
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            server.bind(name)
        else:
            path.mkdir()
        caller, read = "read_weights", tools.read_weights
        if name not in NAMES:
            caller, read = "checkpoint", checkpoints.load
        message = refused(read, path)
    if (caller, kind) == ("checkpoint", "folder"):
        assert message.startswith("checkpoint: a folder must be a checkpoint of orbax")
    else:
        assert message == (
            f"{caller}: only regular files are read. Got {path}: {said}. Copy what it"
            " gives to a file, and pass that."
        )


def test_a_pipe_that_comes_after_the_look_does_not_hang(tmp_path, monkeypatch):
    """What was opened is looked at once more."""
    path, regular = tmp_path / "a.safetensors", os.stat(__file__)
    os.mkfifo(path)
    monkeypatch.setattr(bounds.os, "stat", lambda path: regular)
    with pytest.raises(ValueError, match=r"^read: only regular files are read\. Got "):
        with bounds.opened("read", path):
            pass


@pytest.mark.parametrize("damage", ["pipe", "loop", "folder loop"])
def test_a_folder_of_orbax_with_a_pipe_or_a_loop_in_it_does_not_hang(damage, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="writes folders of orbax")
    path = tmp_path / "tree"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"norm": {"scale": np.ones(3)}})
    (data,) = (path / "d").iterdir()
    if damage == "folder loop":
        (path / "again").symlink_to(path)
        assert checkpoints.load(path)["norm"]["scale"].tolist() == [1, 1, 1]
        return
    data.unlink()
    if damage == "pipe":
        os.mkfifo(data)
        assert refused(checkpoints.load, path) == (
            f"checkpoint: only regular files are read. Got {data}: a pipe. Copy what it"
            " gives to a file, and pass that."
        )
    else:
        data.symlink_to(data.name)
        assert "Too many levels of symbolic links" in refused(checkpoints.load, path)


def test_only_a_regular_file_is_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    with pytest.raises(ValueError) as error:
        tools.write_weights(path, {"a": np.ones(1)})
    assert str(error.value) == (
        f"write_weights: only a regular file is replaced. Got {path}, which is none."
        " Pass the name of a new file."
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_a_file_that_is_written_again_keeps_its_mode(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    tools.write_weights(path, {"a": np.ones(1)})
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    for mode in (0o600, 0o664):
        path.chmod(mode)
        tools.write_weights(path, {"a": np.zeros(1)})
        assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_the_longest_name_of_a_file_is_written(suffix, tmp_path):
    path = tmp_path / ("n" * (255 - len(suffix)) + suffix)
    want = {"a" * 60_000: np.ones(1), "b/c": np.ones(2)}
    tools.write_weights(path, want)
    assert {k: a.tolist() for k, a in tools.read_weights(path).items()} == {
        k: a.tolist() for k, a in want.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Bombs.


def st(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_metadata_of_ten_million_objects_is_refused(tmp_path):
    text = b'{"__metadata__":{"a":[' + b"{}," * 10_000_000 + b"{}]}}"
    path = st(tmp_path / "a.safetensors", text)
    what = "a header of 20000007 parts"
    count = 20_000_007 * 100 + 4 * len(text)
    said = refused(tools.read_weights, path, megabytes=200)  # of it 30 are the header
    assert said == bound("read_weights", path, what, count)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": "", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0, "1": 4}},
        {"dtype": "F32", "shape": [1], "data_offsets": "04"},
    ],
)
def test_a_shape_is_a_list(entry, tmp_path):
    path = st(tmp_path / "a.safetensors", json.dumps({"w": entry}).encode(), b"\0" * 4)
    said = refused(tools.read_weights, path)
    shape, offsets = entry["shape"], entry["data_offsets"]
    assert (
        f"Got {path}: w: TypeError: shape {shape!r} at {offsets!r}. Dtypes are" in said
    )


def zip_listing(count):
    """A zip of nothing but the list of its members."""
    entry = struct.pack("<4s24xHHHHHII", b"PK\1\2", 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry) * count, 0, 0)
    return entry * count + end


@pytest.mark.parametrize("name", ["a.npz", "a.keras", "a.pt"])
def test_a_zip_of_millions_of_members_is_refused(name, tmp_path):
    pytest.importorskip("torch") if name == "a.pt" else None
    path = tmp_path / name
    path.write_bytes(zip_listing(1_000_000))
    caller, read = "read_weights", tools.read_weights
    if name == "a.npz":
        caller, read = "checkpoint", checkpoints.load
    what = "the list of what is in a zip"
    assert refused(read, path) == bound(caller, path, what, 16 * 47 * 1_000_000)


def test_an_npz_of_zeros_is_refused_and_read_where_it_is_trusted(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(3):
            with archive.open(f"{i}.npy", "w") as file:
                np.save(file, np.zeros(90_000_000, np.uint8))
    assert path.stat().st_size < 2_000_000
    what, count = "3 arrays", 3 * (90_000_000 + 128)
    said = refused(checkpoints.load, path)
    assert said == bound("checkpoint", path, what, count)
    got = checkpoints.load(path, max_bytes=count)
    assert sum(a.nbytes for a in got.values()) == 270_000_000


MEMBERS = {
    "lzma": (zipfile.ZIP_LZMA, [14]),
    "bzip2": (zipfile.ZIP_BZIP2, [12]),
}


@pytest.mark.parametrize("method", MEMBERS)
def test_a_zip_that_numpy_does_not_write_is_refused(method, tmp_path):
    """The header of lzma can ask for gigabytes."""
    path, (number, said) = tmp_path / "a.npz", MEMBERS[method]
    with zipfile.ZipFile(path, "w", number) as archive:
        inner = io.BytesIO()
        np.save(inner, np.ones(3))
        archive.writestr("a.npy", inner.getvalue())
    assert refused(checkpoints.load, path) == (
        "checkpoint: the arrays in a zip must be compressed as numpy.savez_compressed"
        f" does. Got the methods {said} in {path}. Pass the folder of an orbax"
        " checkpoint, or a file of flax.serialization.to_bytes or numpy.savez."
    )


def ext(inner):
    return b"\x81\xa1a\xc9" + struct.pack(">I", len(inner)) + b"\1" + inner


def listed(count, item):
    return b"\xdd" + struct.pack(">I", count) + item * count


@pytest.mark.parametrize(
    "data",
    [
        listed(5_000_000, b"\xc0"),
        listed(3_000_000, b"\x80"),
        b"\x81\xa1a" + listed(1_000_000, b"\x05"),
        ext(listed(1_000_000, b"\xc0")),  # where Flax keeps arrays
        listed(400_000, b"\x81\xa0\xc0"),
    ],
    ids=["nils", "maps", "numbers", "in an array", "pairs"],
)
def test_msgpack_of_millions_of_objects_is_refused(data, tmp_path):
    path = tmp_path / "a.msgpack"
    path.write_bytes(data)
    said = refused(checkpoints.load, path)
    what = "more than 666667 objects of msgpack"
    assert said == bound("checkpoint", path, what, 200_000_100)


def test_words_in_msgpack_become_nothing_and_take_nothing(tmp_path):
    path = tmp_path / "a.msgpack"
    path.write_bytes(
        to_bytes({"w": "x" * 20_000_000, "b": b"y", "n": None, "s": [1, 2]})
    )
    fuzz_files.forget()
    before, _ = fuzz_files.held()
    got = checkpoints.load(path)
    assert fuzz_files.held()[1] - before < 60e6  # the file, and the word
    assert got == {"w": None, "b": None, "n": None, "s": {"0": 1, "1": 2}}


def test_all_kinds_of_msgpack_are_counted_as_one_object_each(tmp_path):
    """Lengths and what follows them are passed over, or the count would be another."""
    import msgpack

    words = ["", "a", "b" * 40, "c" * 300, "d" * 70_000]
    numbers = [0, 200, 60_000, 2**31, 2**40, -1, -100, -1000, -(2**30), -(2**40), 1.5]
    parts = [*words, *(w.encode() for w in words), *numbers, None, True, False]
    parts += [msgpack.ExtType(9, b"\xc0" * n) for n in (1, 2, 4, 8, 16, 3, 300, 70_000)]
    tree = {
        "few": parts,
        "many": list(range(20)),
        "map": {str(i): i for i in range(20)},
    }
    inside = 1 + 2 + 4 + 8 + 16 + 3 + 300 + 70_000  # nils, which are counted, too
    want = 1 + 3 + 1 + len(parts) + inside + 1 + 20 + 1 + 2 * 20
    data = msgpack.packb(tree, use_single_float=True) + msgpack.packb(1.5)
    file = io.BytesIO(data)
    for objects in (want, want + 1):
        source = bounds.Source("read", "a", file, len(data), 300 * objects)
        if objects > want:
            checkpoints._count(source, data)
            continue
        with pytest.raises(
            ValueError, match=rf"more than {want + 1} objects of msgpack"
        ):
            checkpoints._count(source, data)


def test_a_pickle_of_millions_of_steps_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="reads .pt")
    whole, path = io.BytesIO(), tmp_path / "a.pt"
    torch.save({"w": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            pickled = member.endswith("data.pkl")
            text = b"\x80\x02" + b"}" * 3_000_000 + b"."
            new.writestr(member, text if pickled else old.read(member))
    said = refused(tools.read_weights, path, seconds=20)
    what = "a pickle of as many steps"
    assert said == bound("read_weights", path, what, 200_000_100)


def test_parts_of_names_take_memory_too(tmp_path):
    """A name of dots is a folder in a folder in a folder."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "a.safetensors"
    st(path, json.dumps({"." * 1_000_000: entry}).encode())
    said = refused(checkpoints.load, path, megabytes=300, seconds=20)
    assert said == bound("checkpoint", path, "the parts of names", 200_000_100)
    np.savez(tmp_path / "a.npz", **{"a": np.ones(1), "a/b": np.ones(1)})
    assert refused(checkpoints.load, tmp_path / "a.npz") == (
        "checkpoint: an array must have a name of its own, which goes on from no"
        f" other's. Got 'a/b' in {tmp_path / 'a.npz'}. Save it under another name."
    )


def zarr(tmp_path, **fields):
    """A folder of orbax of which one array says other things of itself."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="writes folders of orbax")
    path = tmp_path / "tree"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, {"w": np.ones(6, np.float32)})
    said = json.loads((path / "w" / ".zarray").read_text())
    (path / "w" / ".zarray").write_text(json.dumps(said | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"chunks": [60_000_000_000_000]}, 24 + 24 * 10**13 + 1000),
        ({"shape": [60_000_000]}, 240_000_000 + 24 + 10_000_000 * 1000),
        ({"shape": [600_000], "chunks": [1]}, 2_400_000 + 4 + 600_000 * 1000),
    ],
    ids=["chunk", "array", "many"],
)
def test_what_orbax_would_make_is_known_before(fields, count, tmp_path):
    """A chunk of more than memory would end the process in tensorstore."""
    path = zarr(tmp_path, **fields)
    # Both of what orbax reads and of what it wrote are said.
    said = refused(checkpoints.load, path)
    found = re.search(r"1 arrays, about (\d+) bytes", said)
    assert found and count <= int(found[1]) <= 2 * count


def test_json_of_orbax_is_bounded(tmp_path):
    """Deep JSON ends the process in tensorstore; much takes memory."""
    path = zarr(tmp_path)
    file = path / "w" / ".zarray"
    whole = file.read_text()
    deep = "[" * 100_000 + "]" * 100_000
    for start, before in [
        ("", ""),
        (" " * 100, ""),
        ("\ufeff", ""),
        ("", f'"n": {"9" * 5000}, '),
        ("", '"w": "\x7f\t", '),
    ]:
        file.write_text(f'{start}{{{before}"x": {deep}, {whole[1:]}')
        assert "RecursionError" in refused(checkpoints.load, path)
    file.write_bytes(f'{{"x": {deep}, "w": "'.encode() + b'\xff"}')
    assert "RecursionError" in refused(checkpoints.load, path)
    (path / "w").rename(tmp_path / "elsewhere")
    (path / "w").symlink_to(tmp_path / "elsewhere")
    assert "RecursionError" in refused(checkpoints.load, path)
    file.write_text(" \n" + whole[:-1] + ', "x": [' + "1," * 1_000_000 + "1]}")
    said = refused(checkpoints.load, path)
    parts = 1_000_000 + sum(map(whole.count, ",:[{")) + 1 + 3
    count = 300 * parts + 4 * len(file.read_text())
    assert said == bound("checkpoint", file, f"JSON of {parts} parts", count)


def test_json_in_the_database_of_orbax_is_bounded(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="writes folders of orbax")
    import tensorstore

    path = tmp_path / "tree"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"w": np.ones(6, np.float32)})
    base = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    (key,) = [k for k in store.list().result() if k.endswith(b".zarray")]
    whole = store.read(key).result().value
    deep = b"[" * 100_000 + b"]" * 100_000
    store.write(key, whole[:-1] + b', "x": ' + deep + b"}").result()
    assert "RecursionError" in refused(checkpoints.load, path)


@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_max_bytes_is_a_number_of_bytes(value, tmp_path):
    path = tmp_path / "a.safetensors"
    tools.write_weights(path, {"w": np.ones(2)})
    for caller, read in {
        "read_weights": tools.read_weights,
        "checkpoint": checkpoints.load,
    }.items():
        with pytest.raises(ValueError) as error:
            read(path, max_bytes=value)
        assert str(error.value) == (
            f"{caller}: max_bytes must be a number of bytes, or None. Got"
            f" max_bytes={value!r}. Pass max_bytes=200000000, say."
        )


def test_max_bytes_bounds_what_lies_in_a_file_as_it_is(tmp_path):
    arrays = {"params/norm/scale": np.ones(1000)}
    tools.write_weights(tmp_path / "a.safetensors", arrays)
    tools.write_weights(tmp_path / "a.h5", arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    tree = {"params": {"norm": {"scale": np.ones(1000)}}}
    (tmp_path / "a.msgpack").write_bytes(to_bytes(tree))
    for read, name, least in [
        (tools.read_weights, "a.safetensors", 8000),
        (tools.read_weights, "a.h5", 8000),
        (checkpoints.load, "a.npz", 8128),
        (checkpoints.load, "a.msgpack", 2 * (tmp_path / "a.msgpack").stat().st_size),
    ]:
        little = functools.partial(read, max_bytes=least - 1)
        said = refused(little, tmp_path / name)
        assert f"about {least} bytes, and max_bytes={least - 1}." in said
        assert read(tmp_path / name, max_bytes=max(least, 30_000))


# An index, and what is printed.

FLAT = {
    "model.norm.weight": np.ones(4, np.float32),
    "model.bn.weight": np.ones(3, np.float32),
    "model.bn.bias": np.zeros(3, np.float32),
    "model.bn.running_mean": np.zeros(3, np.float32),
    "model.bn.running_var": np.full(3, 2, np.float32),
    "model.bn.num_batches_tracked": np.array(7),
    "model.fc.weight": np.ones((2, 3), np.float32),
    "model.fc.bias": np.zeros(2, np.float32),
}


def sharded(folder, **places):
    """FLAT in two files, with an index."""
    names = list(FLAT)
    found = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(names)}
    for file in set(found.values()):
        part = {k: FLAT[k] for k in names if found[k] == file}
        tools.write_weights(folder / file, part)
    path = folder / "model.safetensors.index.json"
    index = {"metadata": {"total_size": 1}, "weight_map": found | places}
    path.write_text(json.dumps(index))
    return path


def test_an_index_is_read_with_its_files(tmp_path):
    path = sharded(tmp_path)
    got = tools.read_weights(path)
    assert set(got) == set(FLAT)
    assert all((got[name] == a).all() for name, a in FLAT.items())


def test_max_bytes_is_of_all_files_of_an_index(tmp_path):
    for file in "ab":
        arrays = {file: np.ones(50_000, np.uint8)}
        tools.write_weights(tmp_path / f"{file}.safetensors", arrays)
    path = tmp_path / "m.safetensors.index.json"
    places = {file: f"{file}.safetensors" for file in "ab"}
    path.write_text(json.dumps({"weight_map": places}))
    assert len(tools.read_weights(path, max_bytes=100_000)) == 2
    said = refused(lambda p: tools.read_weights(p, max_bytes=99_000), path)
    shard = tmp_path / "b.safetensors"
    assert said == bound("read_weights", shard, "1 arrays", 50_000, 49_000)


INDEX = (
    "read_weights: an index of .safetensors files has a weight_map, in JSON, from the"
    " names of arrays to those of files beside it. Got {path}: "
)


@pytest.mark.parametrize(
    "place",
    ["../model-0.safetensors", "/a.safetensors", "a\\b.safetensors", "C:a.safetensors",
     "model-0.pt", "", 3, None, ["model-0.safetensors"]],
)  # fmt: skip
def test_an_index_leads_to_files_beside_it_alone(place, tmp_path):
    path = sharded(tmp_path, other=place)
    said = refused(tools.read_weights, path)
    assert said.startswith(INDEX.format(path=path)) and said.endswith(f". {AGAIN}")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    said = refused(tools.read_weights, path)
    assert said.startswith(INDEX.format(path=path)) and said.endswith(f". {AGAIN}")


def test_an_index_that_lies_is_refused(tmp_path):
    path = sharded(tmp_path, other="model-0.safetensors")
    assert refused(tools.read_weights, path) == (
        "read_weights: the files of an index must hold what it says. Got"
        f" {path}: no 'other' in model-0.safetensors. {AGAIN}"
    )
    path = sharded(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    tools.write_weights(
        shard, {**tools.read_weights(shard), "model.bn.bias": np.ones(3)}
    )
    assert refused(tools.read_weights, path) == (
        "read_weights: an array must be in one of the files of an index. Got"
        f" {path}: 'model.bn.bias' in model-1.safetensors and in one before it. {AGAIN}"
    )
    path = sharded(tmp_path, other="none.safetensors")
    with pytest.raises(FileNotFoundError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        "read_weights: the files of an index must lie beside it. Got"
        f" {path}, and no 'none.safetensors'. Get all files that it names."
    )


@pytest.mark.parametrize("kind", ["one", "several", "flax"])
def test_inspect_reads_safetensors(kind, tmp_path, capsys):
    path, flat = tmp_path / "a.safetensors", dict(FLAT)
    if kind == "several":
        path = sharded(tmp_path)
    elif kind == "flax":
        flat = {
            "params/norm/scale": np.ones(4),
            "params/bn/scale": np.ones(3),
            "batch_stats/bn/mean": np.zeros(3),
            "batch_stats/bn/var": np.full(3, 2.0),
        }
        tools.write_weights(path, flat)
    else:
        tools.write_weights(path, flat)
    assert main(["inspect", str(path), "--json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    top = "" if kind == "flax" else "model/"
    assert set(rows) == {f"{top}bn", f"{top}norm"}
    norm, bn = rows[f"{top}norm"], rows[f"{top}bn"]
    assert (norm["features"], norm["scale"], norm["mean"]) == (4, [1, 1, 1], None)
    assert (bn["kind"], bn["mean"], bn["var"]) == ("BatchNorm", [0, 0, 0], [2, 2, 2])
    assert bn["updates"] == (None if kind == "flax" else 7)
    assert main(["doctor", str(path)]) == 0


@pytest.mark.parametrize("name", ["a.h5", "a.keras", "a.pt"])
def test_inspect_says_what_reads_other_files(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"")
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == (
        "checkpoint: a file of Keras or PyTorch must be converted first. Got"
        f" {tmp_path / name}. Pass read_weights(path) to from_keras or from_torch, and"
        " what they return to norm_table.\n"
    )


def test_names_do_nothing_to_the_terminal(tmp_path, capsys):
    """Codes that clear it, that turn text around, half of a character."""
    evil = "a\x1b[2J\x1b]0;t\x07\r\x9b1m\u202e\\"
    path = tmp_path / "a.msgpack"
    path.write_bytes(to_bytes({evil: {"scale": np.full(3, np.nan, np.float32)}}))
    assert main(["inspect", str(path)]) == 0
    shown = r"a\x1b[2J\x1b]0;t\x07\r\x9b1m\u202e\\"
    out = capsys.readouterr().out
    assert shown in out and not set(out) & set("\x1b\x07\r\x9b\u202e")
    assert main(["doctor", str(path)]) == 1
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\r\x9b\u202e")
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["path"] == evil
    entry = {"dtype": "O", "shape": [], "data_offsets": [0, 0]}
    st(tmp_path / "a.safetensors", json.dumps({f"{evil}\ud800": entry}).encode())
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert not set(capsys.readouterr().err) & set("\x1b\x07\r\x9b\u202e\ud800")


def test_the_command_line_lifts_the_bound(tmp_path, capsys):
    path = tmp_path / "a.npz"
    np.savez(path, **{"norm/scale": np.ones(3)})
    assert main(["inspect", str(path), "--max-bytes", "100"]) == 2
    assert "on the command line --max-bytes." in capsys.readouterr().err
    assert main(["inspect", str(path), "--max-bytes", "10000"]) == 0
    assert main(["doctor", str(path), "--max-bytes", "100"]) == 2


# Damage at random.


def test_files_that_are_damaged_at_random_are_read_or_refused(capsys):
    """A short run; `make fuzz` is a long one."""
    assert fuzz_files.main(["--count", "400", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "400 mutations: 0 hangs, 0 deaths, 0 above the bound of memory, 0 odd" in out


def reading(behaviour):
    """What the fuzzer says of a reader that behaves badly at one case."""
    number = 2
    code = (
        "import sys, time, os\n"
        "first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "for i in range(first, 6):\n"
        f"    if i == {number}:\n"
        f"        {behaviour}\n"
        "    print(i, 'h5', 1000, 'read', flush=True)\n"
        "time.sleep(60)\n"
    )
    return code


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("time.sleep(60)", "6 mutations: 1 hangs, 0 deaths, 0 above"),
        ("os.abort()", "6 mutations: 0 hangs, 1 deaths, 0 above"),
        ("os._exit(0)", "6 mutations: 0 hangs, 1 deaths, 0 above"),
        (
            "print(i, 'h5', 9**9, 'memory 387 MB', flush=True); continue",
            "6 mutations: 0 hangs, 0 deaths, 1 above",
        ),
    ],
    ids=["hang", "death", "end", "memory"],
)
def test_the_fuzzer_sees_what_it_looks_for(
    behaviour, said, tmp_path, monkeypatch, capsys
):
    worker = tmp_path / "worker.py"
    worker.write_text(reading(behaviour))
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz_files, "__file__", str(worker))
    watched = fuzz_files.Watched(tmp_path, 0)
    assert fuzz_files.watch(watched, 0, 6, time.monotonic() + 60) == 1
    assert said in capsys.readouterr().out
