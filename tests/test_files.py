"""Files of weights: what is written comes back, and no file is believed unseen."""

import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from golden import write_weights

from normjax import tools

h5py = pytest.importorskip("h5py", reason="files of Keras need h5py")
safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason="the other reader of .safetensors is its own package"
)
NO_TORCH = importlib.util.find_spec("torch") is None
needs_torch = pytest.mark.skipif(NO_TORCH, reason="reads .pt, which needs torch")

DTYPES = [
    "float32",
    "float64",
    "float16",
    "int8",
    "int64",
    "uint16",
    "bool",
    "complex64",
]


EXTENDED = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "uint32", "uint64"]


def arrays(dtypes):
    rng = np.random.default_rng(0)
    found = {
        f"layer.{n}": rng.integers(0, 2, 12).reshape(3, 2, 2).astype(dtype)
        for n, dtype in enumerate(dtypes)
    }
    nan = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    return found | {"nan": nan, "scalar": np.array(7), "empty": np.zeros((0, 3))}


def assert_same_bits(got, want):
    assert set(got) == set(want)
    for name, a in want.items():
        assert got[name].dtype == a.dtype and got[name].shape == a.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(a).tobytes(), name


# What is written comes back.


@pytest.mark.parametrize(
    ("suffix", "dtypes"),
    [
        (".safetensors", [*DTYPES, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]),
        (".weights.h5", [*DTYPES, ml_dtypes.bfloat16]),
    ],
)
def test_what_is_written_comes_back_bit_for_bit(suffix, dtypes, tmp_path):
    want = arrays(dtypes)
    want["strided"] = np.arange(12.0)[::2]
    want["big"] = np.arange(3, dtype=">f4")
    tools.write_weights(tmp_path / f"a{suffix}", want)
    want["big"] = want["big"].astype("<f4")
    got = tools.read_weights(tmp_path / f"a{suffix}")
    got["big"] = got["big"].astype("<f4")  # HDF5 keeps the order of bytes
    assert_same_bits(got, want)
    assert all(a.flags.writeable and a.flags.aligned for a in got.values())
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_safetensors_are_those_of_the_package(tmp_path):
    want = arrays([*DTYPES, ml_dtypes.bfloat16])
    safetensors_numpy.save_file(want, tmp_path / "theirs.safetensors")
    assert_same_bits(tools.read_weights(tmp_path / "theirs.safetensors"), want)
    tools.write_weights(tmp_path / "ours.safetensors", want)
    assert_same_bits(safetensors_numpy.load_file(tmp_path / "ours.safetensors"), want)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.h5"
    tools.write_weights(path, {"a": np.ones(3)})
    before, float8 = path.read_bytes(), np.ones(3, ml_dtypes.float8_e4m3fn)
    for weights, got in [
        ({"b": np.ones(3), "b/c": np.ones(3)}, "'b/c' of dtype float64: "),
        (
            {"b": float8},
            "'b' of dtype float8_e4m3fn: TypeError: it has none for it. ",
        ),
        *(
            (
                {name: np.ones(3)},
                f"{name!r} of dtype float64: ValueError: HDF5 would change it. ",
            )
            for name in ("", "a//b", "/a", "a/.", "a\0b")
        ),
    ]:
        with pytest.raises(ValueError) as error:
            tools.write_weights(path, weights)
        assert str(error.value).startswith(
            "write_weights: an .h5 file takes arrays of dtypes that HDF5 has, by names"
            f" like 'a/b', of which none goes on where another ends. Got {got}"
        )
        assert str(error.value).endswith(" Write a .safetensors file.")
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed_and_stays(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    real, link = (
        tmp_path / "a" / "real.safetensors",
        tmp_path / "b" / "link.safetensors",
    )
    link.symlink_to(real)
    tools.write_weights(link, {"w": np.ones(2)})
    assert link.is_symlink() and [p.name for p in real.parent.iterdir()] == [
        "real.safetensors"
    ]
    assert_same_bits(tools.read_weights(link), {"w": np.ones(2)})


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tools.write_weights(tmp_path / "none" / "a.h5", {})
    assert str(error.value) == (
        f"write_weights: the folder of a file must be there. Got {tmp_path / 'none'},"
        " which is not. Make it with os.makedirs."
    )


@needs_torch
def test_tensors_are_written(tmp_path):
    import torch

    path = tmp_path / "a.safetensors"
    half = torch.ones(2, dtype=torch.bfloat16)
    tools.write_weights(path, {"a": half, "b": torch.nn.Parameter(torch.ones(2))})
    want = {"a": np.ones(2, ml_dtypes.bfloat16), "b": np.ones(2, np.float32)}
    assert_same_bits(tools.read_weights(path), want)


@needs_torch
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pt_is_read_through_torch(suffix, tmp_path):
    import torch

    state = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.ones(3, dtype=torch.bfloat16),
        "f8": torch.ones(3).to(torch.float8_e5m2),
        "n": torch.tensor(5),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(state, tmp_path / f"a{suffix}")
    got = tools.read_weights(tmp_path / f"a{suffix}")
    want = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.ones(3, ml_dtypes.bfloat16),
        "f8": np.ones(3, ml_dtypes.float8_e5m2),
        "n": np.array(5),
        "p": np.ones(2, np.float32),
    }
    assert_same_bits(
        {k: np.ascontiguousarray(a) if a.ndim else a for k, a in got.items()}, want
    )


# Files that lie. Each is refused in words, and before memory is taken.


def lying(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def of(shape, offsets, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


ORDER = (
    "arrays must lie one after another, as large as they are declared, within the file"
)
HEADER = (
    "the header of a .safetensors file says the dtype, shape and data_offsets of each"
    " array, in JSON"
)
PLACE = (
    "the header of a .safetensors file must lie within the file, and have at most"
    " 100000000 bytes"
)
KNOWN = (
    "Dtypes are BOOL, U8, I8, F8_E5M2, F8_E4M3, U16, I16, F16, BF16, U32, I32, F32, U64,"
    " I64, F64, C64. Get the file again from where it came from."
)
AGAIN = "Get the file again from where it came from."
SAFETENSORS = {
    "ten gigabytes": (
        lying(of([2_500_000_000], [0, 10_000_000_000])),
        ORDER,
        "'w' of F32 [2500000000], 10000000000 bytes, at 0 to 10000000000; the one before"
        " it ends at 0, and the file has 16 bytes of arrays",
        AGAIN,
    ),
    "shape": (
        lying(of([2_500_000_000], [0, 16])),
        ORDER,
        "'w' of F32 [2500000000], 10000000000 bytes, at 0 to 16; the one before it ends"
        " at 0, and the file has 16 bytes of arrays",
        AGAIN,
    ),
    "overlap": (
        lying(
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            }
        ),
        ORDER,
        "'b' of F32 [2], 8 bytes, at 8 to 16; the one before it ends at 16, and the file"
        " has 16 bytes of arrays",
        AGAIN,
    ),
    "left over": (
        lying(of([2], [0, 8])),
        "the arrays must fill the file",
        "8 bytes declared, 16 there",
        AGAIN,
    ),
    "cut off": (
        lying(of([4], [0, 16]))[:-1],
        ORDER,
        "'w' of F32 [4], 16 bytes, at 0 to 16; the one before it ends at 0, and the file"
        " has 15 bytes of arrays",
        AGAIN,
    ),
    "header of exabytes": (
        lying(b"{}", b"", 2**63),
        PLACE,
        "10 bytes, and a header that declares 9223372036854775808",
        AGAIN,
    ),
    "nothing": (b"", PLACE, "0 bytes, and a header that declares 0", AGAIN),
    "negative": (
        lying(of([-4], [0, 16])),
        HEADER,
        "w: ValueError: shape [-4] at 0 to 16",
        KNOWN,
    ),
    "nothing of exabytes": (
        lying(of([0, 2**40, 2**40], [0, 0]), b""),
        HEADER,
        "w: ValueError: shape [0, 1099511627776, 1099511627776] at 0 to 0",
        KNOWN,
    ),
    "true": (
        lying(of([True], [0, 4])),
        HEADER,
        "w: ValueError: shape [True] at 0 to 4",
        KNOWN,
    ),
    "rank": (
        lying(of([1] * 65, [0, 4])),
        HEADER,
        "w: ValueError: 65 axes",
        KNOWN,
    ),
    "dtype": (lying(of([1], [0, 4], "O")), HEADER, "w: KeyError: 'O'", KNOWN),
    "twice": (
        lying(b'{"w": 1, "w": 2}'),
        HEADER,
        "the header: ValueError: a name twice",
        KNOWN,
    ),
    "a list": (
        lying(b"[]"),
        HEADER,
        "the header: TypeError: pop expected at most 1 argument, got 2",
        KNOWN,
    ),
    "deep": (lying(b"[" * 200_000), HEADER, None, KNOWN),
}


@pytest.mark.parametrize("fault", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_refused(fault, tmp_path):
    data, rule, got, todo = SAFETENSORS[fault]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
    message = str(error.value)
    if got is None:  # Python's own words
        assert message.startswith(f"read_weights: {rule}. Got {path}: the header: ")
        assert message.endswith(todo)
    else:
        assert message == f"read_weights: {rule}. Got {path}: {got}. {todo}"


PLAIN = (
    "datasets must be plain arrays that lie in the file as they are, neither chunked,"
    " compressed, virtual nor external"
)
REPACK = "Save it with Keras 3, or type: h5repack -f NONE -l CONTI in.h5 out.h5."
SAVE = "Save it with Keras 3: model.save_weights('model.weights.h5')."
ONCE = "a file must hold groups and datasets, each in one place"
STORED = "a dataset must declare just what is stored of it, within the file"
NUMBERS = "datasets must hold numbers, of a dtype that numpy has"
LINKS = "a file must hold its arrays itself, without links"


def virtual(file, tmp_path):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", (3,))
    file.create_virtual_dataset("layers/w", layout)


def virtual_of_a_pipe(file, tmp_path):
    """Of unlimited size: to say its shape, HDF5 would open its source, and hang."""
    os.mkfifo(tmp_path / "pipe.h5")
    everything = slice(0, h5py.h5s.UNLIMITED)
    source = h5py.VirtualSource(str(tmp_path / "pipe.h5"), "w", (3,), maxshape=(None,))
    layout = h5py.VirtualLayout((3,), "f4", maxshape=(None,))
    layout[everything] = source[everything]
    file.create_virtual_dataset("layers/w", layout)


def unallocated(file, tmp_path):
    """Ten gigabytes, of which nothing is stored: all are the fill value."""
    file.create_dataset("layers/w", (2_500_000_000,), "f4")


def cycle(file, tmp_path):
    file.create_group("layers")
    file["layers/again"] = file["layers"]


def hard_link(file, tmp_path):
    file["layers/w"] = np.ones(3)
    file["layers/x"] = file["layers/w"]


def put(name, value):
    return lambda file, tmp_path: file.__setitem__(name, value)


def create(**fields):
    return lambda file, tmp_path: file.create_dataset("layers/w", **fields)


H5 = {
    "soft link": (
        put("layers/w", h5py.SoftLink("/elsewhere")),
        LINKS,
        "'layers/w', of SoftLink",
        SAVE,
    ),
    "external link": (
        put("layers/w", h5py.ExternalLink("/etc/passwd", "/")),
        LINKS,
        "'layers/w', of ExternalLink",
        SAVE,
    ),
    "cycle": (cycle, ONCE, "'layers/again', of Group, which is in two", SAVE),
    "hard link": (hard_link, ONCE, "'layers/x', of Dataset, which is in two", SAVE),
    "type": (put("layers/w", np.dtype("f4")), ONCE, "'layers/w', of Datatype", SAVE),
    "virtual": (virtual, PLAIN, "'layers/w', virtual", REPACK),
    "virtual of a pipe": (virtual_of_a_pipe, PLAIN, "'layers/w', virtual", REPACK),
    "external": (
        create(shape=(3,), dtype="f4", external=[("passwd", 0, 12)]),
        PLAIN,
        "'layers/w', external",
        REPACK,
    ),
    "bomb": (
        create(
            shape=(2_500_000_000,), dtype="f4", chunks=(1_000_000,), compression="gzip"
        ),
        PLAIN,
        "'layers/w', chunked",
        REPACK,
    ),
    "empty": (create(dtype="f4"), PLAIN, "'layers/w', empty", REPACK),
    "ten gigabytes": (
        unallocated,
        STORED,
        "'layers/w' of float32 [2500000000], 10000000000 bytes; 0 stored from byte 0 on,"
        " in a file of 2432",
        AGAIN,
    ),
    "object": (
        create(data=["a"], dtype=h5py.string_dtype()),
        NUMBERS,
        "'layers/w', of HDF5's class variable-length",
        "Leave it out of the file.",
    ),
    "structure": (
        create(data=np.zeros(2, [("a", "f4")])),
        NUMBERS,
        "'layers/w', of HDF5's class compound",
        "Leave it out of the file.",
    ),
}


KERAS_3 = "Save it with Keras 3: model.save('model.keras')."


def keras_zip(path, inside, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model.weights.h5", inside)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("fault", H5)
def test_a_file_of_keras_that_is_no_plain_arrays_is_refused(fault, suffix, tmp_path):
    write, rule, got, todo = H5[fault]
    inner, path = tmp_path / "inner.h5", tmp_path / f"a{suffix}"
    with h5py.File(inner, "w") as file:
        write(file, tmp_path)
    if suffix == ".keras":
        keras_zip(path, inner.read_bytes())
    else:
        inner.rename(path)
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    message = str(error.value)
    assert message == f"read_weights: {rule}. Got {path}: {got}. {todo}"


def edited(data, where, new):
    return data[:where] + new + data[where + len(new) :]


def test_a_dataset_that_declares_more_than_is_stored_is_refused(tmp_path):
    """Ten gigabytes in two kilobytes: the header of a real dataset is changed."""
    path = tmp_path / "a.h5"
    tools.write_weights(path, {"w": np.arange(4, dtype=np.float32)})
    data = path.read_bytes()
    shape = data.index(struct.pack("<QQ", 4, 4))  # and the largest shape
    data = edited(data, shape, struct.pack("<QQ", *[2_500_000_000] * 2))
    stored = data.index(struct.pack("<QQ", 2048, 16)) + 8
    for lie in (data, edited(data, stored, struct.pack("<Q", 10_000_000_000))):
        path.write_bytes(lie)
        with pytest.raises(ValueError) as error:
            tools.read_weights(path)
        assert str(error.value).startswith(  # HDF5 finds it, or, of old, we do
            (
                f"read_weights: a file of Keras must be HDF5, whole. Got {path}: 'w': K",
                f"read_weights: {STORED}. Got {path}: 'w' of float32 [2500000000], ",
            )
        )


def test_datasets_in_one_place_are_counted_each(tmp_path):
    """Many claims to the same bytes add up to more than the file."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        a = file.create_dataset("a", data=np.ones(10_000, np.float32))
        b = file.create_dataset("b", data=np.ones(3, np.float32))
        places = [d.id.get_offset() for d in (a, b)]
    data = path.read_bytes()
    shape = data.index(struct.pack("<QQ", 3, 3))
    data = edited(data, shape, struct.pack("<QQ", 10_000, 10_000))
    layout = data.index(struct.pack("<QQ", places[1], 12))
    data = edited(data, layout, struct.pack("<QQ", places[0], 40_000))
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        "read_weights: datasets must not declare more than the file holds. Got"
        f" {path}: 80000 bytes with 'b', {len(data)} there. {AGAIN}"
    )


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    golden = write_weights.KERAS.read_bytes()
    with zipfile.ZipFile(write_weights.KERAS) as archive:
        inside = archive.read("model.weights.h5")
    for suffix, data, rule in [
        (".keras", golden, "a .keras file must be a zip, whole"),
        (".weights.h5", inside, "a file of Keras must be HDF5, whole"),
        (".safetensors", write_weights.SAFETENSORS.read_bytes(), ORDER),
    ]:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError) as error:
            tools.read_weights(path)
        start = f"read_weights: {rule}. Got {path}: "
        assert str(error.value).startswith(start), str(error.value)


def test_a_keras_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        "read_weights: a .keras file must hold model.weights.h5, whole. Got"
        f""" {path}: KeyError: "There is no item named 'model.weights.h5' in the"""
        f""" archive". {KERAS_3}"""
    )


def test_a_zip_that_would_unpack_to_more_is_refused(tmp_path):
    path = tmp_path / "a.keras"
    keras_zip(path, b"\0" * 10_000_000, zipfile.ZIP_DEFLATED)
    size = path.stat().st_size
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    rule = (
        "read_weights: what is in the zip must lie in it as it is, neither compressed nor"
        " encrypted, and not be larger than the zip."
    )
    todo = "Save it once more with Keras or torch, which do not compress."
    assert str(error.value) == (
        f"{rule} Got {path}: 'model.weights.h5' of 10000000 bytes, 10000000 with those"
        f" before it, compressed, in a zip of {size}. {todo}"
    )
    # Compressed, though it would unpack to no more than the zip.
    noise = np.random.default_rng(0).bytes(1000)
    keras_zip(path, noise, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"of 1000 bytes, 1000 with .* compressed, in"):
        tools.read_weights(path)
    # Declared ten times as large in the directory, and said to be stored.
    keras_zip(path, b"\0" * 1000)
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02") + 24
    path.write_bytes(edited(data, place, struct.pack("<I", 10_000)))
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        f"{rule} Got {path}: 'model.weights.h5' of 10000 bytes, 10000 with those before"
        f" it, in a zip of {len(data)}. {todo}"
    )


UNREADABLE = "a .keras file must hold model.weights.h5, whole. Got {path}: {fault}"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            6,
            64,
            "a .keras file must be a zip, whole. Got {path}: {size} bytes, {fault}: zip"
            f" file version 6.4. {AGAIN[:-1]}; a .pt of torch before 1.6 must be saved"
            " once more.",
        ),
        (8, 32, f"{UNREADABLE}: compressed patched data (flag bit 5). {KERAS_3}"),
        (8, 64, f"{UNREADABLE}: strong encryption (flag bit 6). {KERAS_3}"),
    ],
    ids=["version", "patched", "encrypted"],
)
def test_a_zip_that_python_cannot_read_is_refused(place, value, message, tmp_path):
    path = tmp_path / "a.keras"
    keras_zip(path, b"\0" * 1000)
    data = path.read_bytes()
    place += data.index(b"PK\x01\x02")
    path.write_bytes(edited(data, place, bytes([value])))
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    facts = {"path": path, "size": len(data), "fault": "NotImplementedError"}
    assert str(error.value) == f"read_weights: {message.format(**facts)}"


class Runs:
    """What a pickle does that runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def hostile_pt(path, marker):
    """A .pt whose pickle would create a file: in torch's own form, of a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": Runs(marker)}, protocol=2))
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")


PICKLED = (
    "read_weights: the pickle in a .pt file must have at most 10000000 bytes, and name"
    " what a state dict of dense tensors is made of, and nothing else"
)
ALONE = "Save model.state_dict() alone."


@needs_torch
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    import torch

    path, marker = tmp_path / "a.pt", tmp_path / "ran"
    hostile_pt(path, marker)
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == f"{PICKLED}. Got {path}: io.open. {ALONE}"
    assert not marker.exists()
    torch.load(path, weights_only=False)["w"].close()  # what it would have done
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    for suffix in (".pt", ".keras", ".h5", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pickle.dumps(Runs(marker)))
        with pytest.raises((ValueError, ImportError), match=r"^read_weights: "):
            tools.read_weights(path)
    assert not marker.exists()


def test_without_torch_a_pt_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path, marker = tmp_path / "a.pt", tmp_path / "ran"
    hostile_pt(path, marker)
    with pytest.raises(ImportError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        "read_weights: a .pt file is a pickle, which can run code; only torch, with"
        f" weights_only=True, may read it. Got {path}, and no torch. Type where torch is:"
        ' python -c "import sys, torch, safetensors.torch as s; s.save_file({k:'
        " v.contiguous().clone() for k, v in torch.load(sys.argv[1],"
        ' weights_only=True).items()}, sys.argv[2])"'
        f" {path} {path.with_suffix('.safetensors')}."
    )
    assert not marker.exists()


@needs_torch
def test_the_line_to_type_converts(tmp_path, monkeypatch):
    import torch

    shared = torch.arange(6.0)
    state = {"a": shared[:3], "b": shared, "t": shared.reshape(2, 3).T}
    name = 'it\'s $(touch ran) `touch ran` & "all"'
    torch.save(state, tmp_path / f"{name}.pt")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError) as error:
            tools.read_weights(tmp_path / f"{name}.pt")
    line = str(error.value).split("Type where torch is: python ")[1].removesuffix(".")
    line = f"{sys.executable} {line}"
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, timeout=120)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.pt", f"{name}.safetensors"}
    got = tools.read_weights(tmp_path / f"{name}.safetensors")
    assert_same_bits(
        got, {k: np.ascontiguousarray(v.numpy()) for k, v in state.items()}
    )


def pt_with(path, text):
    """A .pt of torch with another pickle in it."""
    import torch

    whole = io.BytesIO()
    torch.save({"w": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            pickled = member.endswith("data.pkl")
            new.writestr(member, text if pickled else old.read(member))


HUGE = b"J" + (500_000_000).to_bytes(4, "little") + b"\x85R"
# A storage that is in no file, as an attribute of a dictionary, and a tensor of it.
FROM_NOWHERE = (
    b"ccollections\nOrderedDict\n)R}(X\x05\0\0\0dtypectorch\nfloat32\n"
    b"X\x10\0\0\0_untyped_storagectorch.storage\nUntypedStorage\n"
    + HUGE
    + b"ubK\0K\x01\x85K\x01\x85\x89N"
)
HOSTILE = {
    "bytearray": (
        b"cbuiltins\nbytearray\n" + HUGE,
        f"{PICKLED}. Got {{path}}: builtins.bytearray. {ALONE}",
    ),
    "storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + FROM_NOWHERE + b"tR",
        "read_weights: tensors must not hold more than the file. Got {path}: 500000000"
        f" bytes of tensors, {{size}} there. {AGAIN}",
    ),
    "cut off": (
        b"",
        f"{PICKLED}. Got {{path}}: pickle exhausted before seeing STOP. {ALONE}",
    ),
    "large": (b"N" * 10_000_000, f"{PICKLED}. Got {{path}}: 10000011 bytes. {ALONE}"),
}


@needs_torch
@pytest.mark.parametrize("fault", HOSTILE)
def test_a_pickle_that_would_take_memory_is_refused(fault, tmp_path):
    path, (value, message) = tmp_path / "a.pt", HOSTILE[fault]
    end = b"" if fault == "cut off" else b"s."
    pt_with(path, b"\x80\x02}X\x01\0\0\0w" + value + end)
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == message.format(path=path, size=path.stat().st_size)


def zip_of(*names, comment=b"", before=b""):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = comment
        for name in names:
            archive.writestr(name, b"")
    return before + file.getvalue()


@needs_torch
@pytest.mark.parametrize(
    ("data", "got"),
    [
        (zip_of("a/data.pkl", "a/DATA.PKL"), "2 of them among 2 members"),
        (zip_of("a/version"), "0 of them among 1 members"),
        (
            zip_of("a/data.pkl", before=pickle.dumps(0)),
            "1 of them among 1 members, and other bytes around the zip",
        ),
        (
            zip_of("a/data.pkl", before=zip_of("b/data.pkl")),
            "1 of them among 1 members, and other bytes around the zip",
        ),
        (
            zip_of("a/data.pkl", comment=b"PK"),
            "1 of them among 1 members, and other bytes around the zip",
        ),
    ],
    ids=["two", "none", "legacy before", "zip before", "comment"],
)
def test_a_pt_that_others_read_as_another_is_refused(data, got, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        "read_weights: a .pt file must be one zip from its first byte to its last, with"
        f" one data.pkl. Got {path}: {got}. {ALONE}"
    )


@needs_torch
def test_every_dtype_of_both_is_read_from_a_pt(tmp_path):
    """And so is what torch keeps as a bit beside the numbers."""
    import torch

    path = tmp_path / "a.pt"
    want = {str(d): np.ones(2, d) for d in (*DTYPES, *EXTENDED)}
    state = {k: torch.ones(2).to(getattr(torch, k)) for k in want}
    state["conj"] = torch.tensor([1 + 2j]).conj()
    state["neg"] = torch.tensor([1 + 2j]).conj().imag
    torch.save(state, path)
    want |= {"conj": np.array([1 - 2j], np.complex64), "neg": np.float32([-2])}
    assert_same_bits(tools.read_weights(path), want)


PT = {
    "expanded": (
        lambda torch: {"w": torch.zeros(1).expand(2_500_000_000)},
        "a tensor must not declare more than its storage holds",
        "'w' of shape (2500000000,), 10000000000 bytes, in 4",
        "Save tensor.contiguous().",
    ),
    "sparse": (
        lambda torch: {"w": torch.ones(2, 2).to_sparse()},
        PICKLED.removeprefix("read_weights: "),
        "torch._utils._rebuild_sparse_tensor",
        ALONE,
    ),
    "dtype": (
        lambda torch: {"w": torch.ones(2, dtype=torch.complex128)},
        "tensors must be dense, on the CPU, and of a dtype that numpy has",
        "'w' of torch.complex128, torch.strided, on cpu",
        "Save tensor.cpu(), dense, in such a dtype.",
    ),
    "nested": (
        lambda torch: {"epoch": 3, "model": {"w": torch.ones(1)}},
        "a .pt file must hold a state dict, tensors by name",
        "'epoch' of int",
        "Save model.state_dict() alone, or pass the inner dictionary, once"
        " torch.load(weights_only=True) has read it, to from_torch.",
    ),
    "one tensor": (
        lambda torch: [torch.ones(1)],
        "a .pt file must hold a state dict, tensors by name",
        "'list' of list",
        "Save model.state_dict() alone, or pass the inner dictionary, once"
        " torch.load(weights_only=True) has read it, to from_torch.",
    ),
}


@needs_torch
@pytest.mark.parametrize("fault", PT)
def test_a_pt_that_is_no_state_dict_is_refused(fault, tmp_path):
    import torch

    make, rule, got, todo = PT[fault]
    path = tmp_path / "a.pt"
    torch.save(make(torch), path)
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == f"read_weights: {rule}. Got {path}: {got}. {todo}"


@needs_torch
def test_a_pt_of_before_zip_is_refused(tmp_path):
    """It says the sizes of its storages in the pickle, before there is any data."""
    import torch

    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    size = path.stat().st_size
    with pytest.raises(ValueError) as error:
        tools.read_weights(path)
    assert str(error.value) == (
        f"read_weights: a .pt file must be a zip, whole. Got {path}: {size} bytes,"
        " BadZipFile: File is not a zip file. Get the file again from where it came from;"
        " a .pt of torch before 1.6 must be saved once more."
    )


def damaged(data, rng):
    """A few bytes changed, or cut off."""
    data = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 4)):
        data[place] = rng.integers(0, 256)
    return bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)


@pytest.mark.parametrize("suffix", [".safetensors", ".weights.h5"])
def test_damaged_files_are_refused_in_words_or_read(suffix, tmp_path):
    """No other error, and no memory beyond the file's size."""
    path = tmp_path / f"a{suffix}"
    tools.write_weights(path, {"a/b": np.ones((2, 3)), "c": np.ones(4, np.int8)})
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        path.write_bytes(damaged(good, rng))
        try:
            found = tools.read_weights(path)
        except ValueError as error:
            assert str(error).startswith("read_weights: "), error
            refused += 1
        else:
            assert sum(a.nbytes for a in found.values()) <= len(good)
    assert 10 < refused < 200


# What cannot be.


def test_files_of_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        tools.read_weights("model.ckpt")
    assert str(error.value) == (
        "read_weights: the name of a file must end in one of .safetensors, .pt, .pth,"
        " .keras, .h5, .safetensors.index.json. Got model.ckpt. Save the weights as .safetensors, say."
    )
    with pytest.raises(ValueError) as error:
        tools.write_weights(tmp_path / "model.pt", {})
    assert str(error.value) == (
        "write_weights: the name of a file must end in one of .safetensors, .h5. Got"
        f" {tmp_path / 'model.pt'}. PyTorch loads .safetensors, and Keras .weights.h5."
    )
    with pytest.raises(ValueError) as error:
        tools.write_weights(tmp_path / "a.safetensors", {"a": np.array(["x"])})
    assert str(error.value) == (
        "write_weights: weights are arrays by name, of a dtype among bool, uint8, int8,"
        " float8_e5m2, float8_e4m3fn, uint16, int16, float16, bfloat16, uint32, int32,"
        " float32, uint64, int64, float64, complex64. Got 'a' of dtype <U1. Leave it out,"
        " or cast it."
    )
    with pytest.raises(ValueError) as error:
        tools.write_weights(tmp_path / "a.safetensors", {"__metadata__": np.ones(1)})
    assert str(error.value) == (
        "write_weights: in a .safetensors file the name __metadata__ is of no array. Got"
        " '__metadata__' in weights. Give it another name."
    )
    for weights, got in [([np.ones(1)], "a list"), ({3: np.ones(1)}, "the key 3")]:
        with pytest.raises(TypeError) as error:
            tools.write_weights(tmp_path / "a.safetensors", weights)
        assert str(error.value) == (
            "write_weights: weights must be a mapping whose keys are names. Got"
            f" {got}. Pass read_weights(path) or model.state_dict(), say, with names"
            " alone."
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError) as error:
        tools.write_weights(tmp_path / "a.h5", {"a": np.ones(1)})
    said = str(error.value)
    assert said.startswith("write_weights: writing files of Keras needs h5py. Got ")
    assert said.endswith(", and no h5py. Type pip install 'normjax[convert]'.")
    # Reading them does not.
    assert len(tools.read_weights(write_weights.KERAS)) == 21


def test_a_keras_file_holds_what_its_h5_does(tmp_path):
    with zipfile.ZipFile(write_weights.KERAS) as archive:
        (tmp_path / "a.h5").write_bytes(archive.read("model.weights.h5"))
    assert_same_bits(
        tools.read_weights(write_weights.KERAS), tools.read_weights(tmp_path / "a.h5")
    )
