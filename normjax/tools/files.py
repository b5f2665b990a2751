"""Files of weights: read without running anything that is in them, written whole.

A file says how much it holds before it is believed: what is declared is compared with
the size of the file first, and only then is memory taken.
"""

import importlib
import io
import json
import math
import os
import pathlib
import pickletools
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from normjax import _check

# The dtypes of a .safetensors file, by its names.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, that of the format
_RANK_LIMIT = 64  # that of numpy
_AGAIN = "Get the file again from where it came from"


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a file of weights, as arrays by name.

    ``.safetensors`` needs no package. ``.keras``, ``.weights.h5`` and ``.h5`` need
    h5py; of them only plain datasets that lie in the file as they are, as Keras writes
    them. ``.pt`` and ``.pth`` need torch, and go through
    ``torch.load(weights_only=True)``. Nothing is ever unpickled otherwise.

    Args:
      path: of the file; the end of its name says what it is.

    Returns:
      Arrays by name, bfloat16 among them: PyTorch's names in a state dict, or Keras's
      paths, ``layers/dense/vars/0``.

    Raises:
      ValueError: if the name's end is not one of these; if the file is cut off,
        declares more than it has, or holds what is not plain arrays: links, virtual,
        external, compressed or object datasets, code.
      ImportError: if the package for it is missing.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from normjax import tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     tools.write_weights(path, {"fc.weight": np.ones((2, 3), np.float32)})
      ...     tools.read_weights(path)["fc.weight"].shape
      (2, 3)
    """
    path = pathlib.Path(path)
    readers = {
        ".safetensors": _read_safetensors,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".keras": _read_keras,
        ".h5": _read_h5,
    }
    if path.suffix not in readers:
        raise _check.error(
            ValueError,
            "read_weights",
            f"the name of a file must end in one of {', '.join(readers)}",
            str(path),
            "Save the weights as .safetensors, say",
        )
    return readers[path.suffix](path)


def write_weights(path: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Writes arrays by name to a file, whole or not at all.

    PyTorch reads ``.safetensors`` with ``safetensors.torch.load_file``, and Keras
    ``.weights.h5`` with ``model.load_weights``.

    Args:
      path: of the file, which is replaced if it is there; of a link, what it leads to.
        Its name ends in ``.safetensors`` or ``.h5``.
      weights: arrays by name, or tensors on the CPU.

    Raises:
      ValueError: if the name ends in something else, or an array has a dtype or a name
        that such a file has not.
      FileNotFoundError: if the folder is not there.
      ImportError: if h5py is missing for ``.h5``.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from normjax import tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     tools.write_weights(path, {"fc.bias": np.zeros(3)})
      ...     os.listdir(folder)
      ['model.safetensors']
    """
    path = pathlib.Path(path)
    writers = {".safetensors": _write_safetensors, ".h5": _write_h5}
    if path.suffix not in writers:
        raise _check.error(
            ValueError,
            "write_weights",
            f"the name of a file must end in one of {', '.join(writers)}",
            str(path),
            "PyTorch loads .safetensors, and Keras .weights.h5",
        )
    check_mapping("write_weights", "weights", weights)
    arrays = {
        name: np.asarray(array_of("write_weights", "weights", name, a))
        for name, a in weights.items()
    }
    for name, a in arrays.items():
        if a.dtype.newbyteorder("=") not in _NAMES:
            raise _check.error(
                ValueError,
                "write_weights",
                "weights are arrays by name, of a dtype among"
                f" {', '.join(map(str, _NAMES))}",
                f"{name!r} of dtype {a.dtype}",
                "Leave it out, or cast it",
            )
    real = pathlib.Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise _check.error(
            FileNotFoundError,
            "write_weights",
            "the folder of a file must be there",
            f"{real.parent}, which is not",
            "Make it with os.makedirs",
        )
    # Beside the file, so that it is renamed into place in one step.
    unfinished = real.with_name(f".{real.name}.{secrets.token_hex(4)}.tmp")
    try:
        writers[path.suffix](unfinished, arrays)
        os.replace(unfinished, real)
    finally:
        unfinished.unlink(missing_ok=True)


def check_mapping(caller: str, field: str, weights: Any) -> Mapping[str, Any]:
    """Refuses what is no mapping from names, in the name of the caller."""
    named = isinstance(weights, Mapping)
    odd = [key for key in weights if not isinstance(key, str)] if named else []
    if not named or odd:
        got = f"the key {odd[0]!r}" if odd else f"a {type(weights).__name__}"
        raise _check.error(
            TypeError,
            caller,
            f"{field} must be a mapping whose keys are names",
            got,
            "Pass read_weights(path) or model.state_dict(), say, with names alone",
        )
    return weights


class _RefusedError(ValueError):
    """In the house form, unlike the ValueErrors of those who read."""


def _refused(
    path: Any, rule: str, got: str, todo: str = _AGAIN, caller: str = "read_weights"
) -> Exception:
    return _check.error(_RefusedError, caller, rule, f"{path}: {got}", todo)


# .safetensors: the size of the header in 8 bytes, the header in JSON, and the bytes of
# all arrays. https://github.com/huggingface/safetensors#format


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _refused(
                path,
                "the header of a .safetensors file must lie within the file, and have"
                f" at most {_HEADER_LIMIT} bytes",
                f"{size} bytes, and a header that declares {length}",
            )
        entries = _header(path, file.read(length))
        available, position = size - 8 - length, 0
        for name, (dtype, shape, begin, end) in entries.items():
            declared = math.prod(shape) * dtype.itemsize
            if (begin, end) != (position, position + declared) or end > available:
                raise _refused(
                    path,
                    "arrays must lie one after another, as large as they are declared,"
                    " within the file",
                    f"{name!r} of {_NAMES[dtype]} {list(shape)}, {declared} bytes, at"
                    f" {begin} to {end}; the one before it ends at {position}, and the"
                    f" file has {available} bytes of arrays",
                )
            position = end
        if position != available:
            raise _refused(
                path,
                "the arrays must fill the file",
                f"{position} bytes declared, {available} there",
            )
        return {
            name: np.fromfile(file, np.uint8, end - begin).view(dtype).reshape(shape)
            for name, (dtype, shape, begin, end) in entries.items()
        }


def _header(path: pathlib.Path, text: bytes) -> dict[str, tuple]:
    """The dtype, shape, begin and end of each array, by name, in their order."""

    def unique(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    name = "the header"
    try:
        header = json.loads(text, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if len(shape) > _RANK_LIMIT:
                raise ValueError(f"{len(shape)} axes")
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if not whole or math.prod(n or 1 for n in shape) >= 2**59:
                raise ValueError(f"shape {list(shape)} at {begin} to {end}")
            entries[name] = dtype, shape, begin, end
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise _refused(
            path,
            "the header of a .safetensors file says the dtype, shape and data_offsets"
            " of each array, in JSON",
            f"{name}: {_words(fault)}",
            f"Dtypes are {', '.join(_DTYPES)}. {_AGAIN}",
        ) from fault
    return dict(sorted(entries.items(), key=lambda item: item[1][2:]))


def _words(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault)[:200]}".rstrip(".")


def _write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    if "__metadata__" in arrays:
        raise _check.error(
            ValueError,
            "write_weights",
            "in a .safetensors file the name __metadata__ is of no array",
            "'__metadata__' in weights",
            "Give it another name",
        )
    header, position = {}, 0
    # Large items first, so that every array starts at a multiple of its item's size.
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, a in ordered.items():
        header[name] = {
            "dtype": _NAMES[a.dtype.newbyteorder("=")],
            "shape": list(a.shape),
            "data_offsets": [position, position + a.nbytes],
        }
        position += a.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for a in ordered.values():
            file.write(np.ascontiguousarray(_little(a)).tobytes())
        _to_disk(file)


def _little(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder("<")) if a.dtype.byteorder == ">" else a


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# .pt: a zip of a pickle and of the bytes of the tensors, for torch alone.

_PICKLE_LIMIT = 10_000_000  # bytes; a tensor takes about 200
# What the pickle of a state dict names. torch allows more, bytearray(10**10) among it.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch \w+Storage|torch\.storage UntypedStorage|torch (\w*int|b?float|complex)\w+"
)


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        there = path.with_suffix(".safetensors")
        raise _check.error(
            ImportError,
            "read_weights",
            "a .pt file is a pickle, which can run code; only torch, with"
            " weights_only=True, may read it",
            f"{path}, and no torch",
            'Type where torch is: python -c "import torch, safetensors.torch as s;'
            " s.save_file({k: v.contiguous().clone() for k, v in"
            f" torch.load({str(path)!r}, weights_only=True).items()}}, {str(there)!r})"
            '"',
        ) from None
    _check_pickle(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # whatever a hostile pickle makes it raise
        raise _refused(
            path,
            "torch.load(weights_only=True) must be able to read a .pt file: tensors,"
            " and no code",
            _words(fault).splitlines()[0],
            "Save model.state_dict() alone",
        ) from fault
    if not isinstance(found, Mapping):
        found = {type(found).__name__: found}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise _refused(
                path,
                "a .pt file must hold a state dict, tensors by name",
                f"{name!r} of {type(value).__name__}",
                "Save model.state_dict() alone, or pass the inner dictionary, once"
                " torch.load(weights_only=True) has read it, to from_torch",
            )
    storages = [value.untyped_storage() for value in found.values()]
    held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    if held > (size := path.stat().st_size):
        raise _refused(
            path,
            "tensors must not hold more than the file",
            f"{held} bytes of tensors, {size} there",
        )
    return {
        name: of_tensor("read_weights", path, name, value)
        for name, value in found.items()
    }


def array_of(caller: str, path: Any, name: str, a: Any) -> Any:
    """A tensor of torch as an array; anything else as it is."""
    tensor = hasattr(a, "untyped_storage")
    return of_tensor(caller, path, name, a) if tensor else a


def of_tensor(caller: str, path: Any, name: str, tensor: Any) -> np.ndarray:
    """A tensor's values, in its own memory; caller and path name it in errors."""
    tensor = tensor.detach()
    kind = str(tensor.dtype).removeprefix("torch.")
    known = {str(d): d for d in _NAMES}
    plain = kind in known and str(tensor.layout) == "torch.strided"
    if not plain or tensor.is_nested or tensor.device.type != "cpu":
        raise _refused(
            path,
            "tensors must be dense, on the CPU, and of a dtype that numpy has",
            f"{name!r} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            + ", nested" * tensor.is_nested,
            "Save tensor.cpu(), dense, in such a dtype",
            caller,
        )
    declared, there = tensor.nbytes, tensor.untyped_storage().nbytes()
    if declared > there:
        raise _refused(
            path,
            "a tensor must not declare more than its storage holds",
            f"{name!r} of shape {tuple(tensor.shape)}, {declared} bytes, in {there}",
            "Save tensor.contiguous()",
            caller,
        )
    tensor = tensor.resolve_conj().resolve_neg()
    if known[kind].isbuiltin != 1:  # bfloat16, float8: numpy's are of ml_dtypes
        same = {1: "uint8", 2: "int16"}[known[kind].itemsize]
        tensor = tensor.view(getattr(importlib.import_module("torch"), same))
    return tensor.numpy().view(known[kind])


def _check_pickle(path: pathlib.Path) -> None:
    """Refuses a .pt that torch reads in another way than as the zip of a state dict."""
    with _opened_zip(path) as archive:
        members = archive.infolist()
        # As torch looks for it: whatever the case.
        pickles = [m for m in members if m.filename.lower().endswith("/data.pkl")]
        whole = _starts_and_ends_as_a_zip(path, archive.start_dir)
        if len(pickles) != 1 or members[0].header_offset or not whole:
            raise _refused(
                path,
                "a .pt file must be one zip from its first byte to its last, with one"
                " data.pkl",
                f"{len(pickles)} of them among {len(members)} members"
                + ", and other bytes around the zip" * (not whole),
                "Save model.state_dict() alone",
            )
        text = _member(
            path, archive, pickles[0].filename, "Save model.state_dict() alone"
        )
    try:
        if len(text) > _PICKLE_LIMIT:
            raise ValueError(f"{len(text)} bytes")
        # This runs nothing. Other ways to name a global, torch refuses.
        for opcode, name, _ in pickletools.genops(text):
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(name)):
                raise ValueError(str(name).replace(" ", "."))
    except ValueError as fault:
        raise _refused(
            path,
            f"the pickle in a .pt file must have at most {_PICKLE_LIMIT} bytes, and"
            " name what a state dict of dense tensors is made of, and nothing else",
            str(fault),
            "Save model.state_dict() alone",
        ) from fault


def _starts_and_ends_as_a_zip(path: pathlib.Path, directory: int) -> bool:
    """Whether all who read the zip find its directory at the same place.

    Some look for its end and count back, some go by the place that the end declares.
    """
    with open(path, "rb") as file:
        first = file.read(4)
        file.seek(-22, os.SEEK_END)
        end = file.read()
        declared = end[16:20]
        if path.stat().st_size >= 98:  # with the end of a zip of 64 bits before it
            file.seek(-98, os.SEEK_END)
            end64 = file.read(76)
            declared = end64[48:56] if end64[56:60] == b"PK\6\7" else declared
    ends = first == b"PK\3\4" and end[:4] == b"PK\5\6"
    return ends and int.from_bytes(declared, "little") == directory


# .keras: a zip with an .h5 in it.


def _opened_zip(path: pathlib.Path) -> zipfile.ZipFile:
    """Opens a zip whose members lie in it as they are, so that none is a bomb."""
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_FAULTS as fault:
        raise _refused(
            path,
            f"a {path.suffix} file must be a zip, whole",
            f"{size} bytes, {_words(fault)}",
            f"{_AGAIN}; a .pt of torch before 1.6 must be saved once more",
        ) from fault
    total = 0
    for member in archive.infolist():
        total += member.file_size
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.flag_bits & 1 or total > size:
            archive.close()
            raise _refused(
                path,
                "what is in the zip must lie in it as it is, neither compressed nor"
                " encrypted, and not be larger than the zip",
                f"{member.filename!r} of {member.file_size} bytes, {total} with those"
                f" before it,{'' if stored else ' compressed,'} in a zip of {size}",
                "Save it once more with Keras or torch, which do not compress",
            )
    return archive


# What zipfile raises of files that lie.
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
)


def _member(path: Any, archive: zipfile.ZipFile, name: str, todo: str) -> bytes:
    try:
        return archive.read(name)
    except _ZIP_FAULTS as fault:
        rule = f"a {path.suffix} file must hold {name}, whole"
        raise _refused(path, rule, _words(fault), todo) from fault


def _read_keras(path: pathlib.Path) -> dict[str, np.ndarray]:
    with _opened_zip(path) as archive:
        inside = _member(
            path,
            archive,
            "model.weights.h5",
            "Save it with Keras 3: model.save('model.keras')",
        )
    return _datasets_of(path, io.BytesIO(inside), len(inside))


# .h5: groups of datasets.

# What h5py raises.
_FAULTS = (OSError, RuntimeError, KeyError, TypeError, ValueError)


def _not_hdf5(path: Any, name: str, fault: Exception) -> Exception:
    return _refused(
        path, "a file of Keras must be HDF5, whole", f"{name!r}: {_words(fault)}"
    )


def _h5py(name: str, path: pathlib.Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise _check.error(
            ImportError,
            name,
            "files of Keras need h5py",
            f"{path}, and no h5py",
            "Type pip install 'normjax[convert]'",
        ) from None


def _read_h5(path: pathlib.Path) -> dict[str, np.ndarray]:
    return _datasets_of(path, path, path.stat().st_size)


def _datasets_of(path: pathlib.Path, source: Any, size: int) -> dict[str, np.ndarray]:
    """The datasets of a file or of its bytes, ``source``, that are plain arrays."""
    h5py = _h5py("read_weights", path)
    arrays, name = {}, "the file"
    try:
        with h5py.File(source, "r") as file:
            found = dict(_datasets(h5py, path, file))
            total = 0
            for name, dataset in found.items():
                total += _declared(h5py, path, name, dataset, size)
                if total > size:
                    raise _refused(
                        path,
                        "datasets must not declare more than the file holds",
                        f"{total} bytes with {name!r}, {size} there",
                    )
            for name, dataset in found.items():
                arrays[name] = np.asarray(dataset[()])
    except _RefusedError:
        raise
    except _FAULTS as fault:
        raise _not_hdf5(path, name, fault) from fault
    return {
        name: a.view(ml_dtypes.bfloat16) if a.dtype.kind == "V" else a
        for name, a in arrays.items()
    }


def _datasets(h5py: Any, path: Any, file: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset by its path; through hard links alone, and through each once."""
    seen = {h5py.h5o.get_info(file.id).addr}
    groups = [("", file)]
    while groups:
        prefix, group = groups.pop()
        for key in group:
            name = f"{prefix}{key}"
            try:
                link = group.get(key, getlink=True)
                item = group[key] if isinstance(link, h5py.HardLink) else None
            except _FAULTS as fault:
                raise _not_hdf5(path, name, fault) from fault
            if item is None:
                raise _refused(
                    path,
                    "a file must hold its arrays itself, without links",
                    f"{name!r}, of {type(link).__name__}",
                    "Save it with Keras 3: model.save_weights('model.weights.h5')",
                )
            address = h5py.h5o.get_info(item.id).addr
            if address in seen or not isinstance(item, (h5py.Group, h5py.Dataset)):
                raise _refused(
                    path,
                    "a file must hold groups and datasets, each in one place",
                    f"{name!r}, of {type(item).__name__}"
                    + ", which is in two" * (address in seen),
                    "Save it with Keras 3: model.save_weights('model.weights.h5')",
                )
            seen.add(address)
            if isinstance(item, h5py.Group):
                groups.append((f"{name}/", item))
            else:
                yield name, item


def _declared(h5py: Any, path: Any, name: str, dataset: Any, size: int) -> int:
    """How many bytes a dataset declares, once they are known to be there."""
    layouts = {h5py.h5d.CONTIGUOUS: "contiguous", h5py.h5d.COMPACT: "compact"}
    layout = layouts.get(dataset.id.get_create_plist().get_layout())
    # The shape of a virtual dataset is that of other files, which it would open.
    if layout is None or dataset.external or dataset.shape is None:
        what = "external" if dataset.external else "empty"
        if layout is None:
            what = "virtual" if dataset.is_virtual else "chunked"
        raise _refused(
            path,
            "datasets must be plain arrays that lie in the file as they are, neither"
            " chunked, compressed, virtual nor external",
            f"{name!r}, {what}",
            "Save it with Keras 3, or type: h5repack -f NONE -l CONTI in.h5 out.h5",
        )
    if dataset.dtype.kind not in "biufc" and not _is_bfloat16(dataset):
        raise _refused(
            path,
            "datasets must hold numbers",
            f"{name!r} of dtype {dataset.dtype}",
            "Leave it out of the file",
        )
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    start = (dataset.id.get_offset() or 0) if stored else 0
    if declared != stored or start + stored > size:
        raise _refused(
            path,
            "a dataset must declare just what is stored of it, within the file",
            f"{name!r} of {dataset.dtype} {list(dataset.shape)}, {declared} bytes;"
            f" {stored} stored from byte {start} on, in a file of {size}",
        )
    return declared


def _is_bfloat16(dataset: Any) -> bool:
    """Whether a dataset is what Keras makes of bfloat16: two bytes, and a word."""
    return (
        dataset.dtype == np.dtype("V2")
        and "dtype" in dataset.attrs
        and dataset.attrs["dtype"] == "bfloat16"
    )


def _write_h5(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    h5py = _h5py("write_weights", path)
    with h5py.File(path, "x") as file:
        for name, a in arrays.items():
            try:
                if a.dtype.kind == "V" and a.dtype != ml_dtypes.bfloat16:
                    raise TypeError("it has none for it")
                if {"", "."} & set(name.split("/")) or "\0" in name:
                    raise ValueError("HDF5 would change it")
                dataset = file.create_dataset(name, data=a)
            except (TypeError, ValueError) as fault:
                raise _check.error(
                    ValueError,
                    "write_weights",
                    "an .h5 file takes arrays of dtypes that HDF5 has, by names like"
                    " 'a/b', of which none goes on where another ends",
                    f"{name!r} of dtype {a.dtype}: {_words(fault)}",
                    "Write a .safetensors file",
                ) from fault
            if a.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
    with open(path, "rb+") as file:
        _to_disk(file)
