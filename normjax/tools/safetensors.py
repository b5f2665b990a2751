"""Files of .safetensors, one or several with an index: numpy reads and writes them.

A file is the size of its header in 8 bytes, the header in JSON, and the bytes of all
arrays. https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import pathlib
import re
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from normjax import _check
from normjax.tools import bounds
from normjax.tools.bounds import AGAIN, OBJECT, Source

INDEX = ".safetensors.index.json"

# The dtypes of a .safetensors file, by its names.
DTYPES = {
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, that of the format
_RANK_LIMIT = 64  # that of numpy


def read(source: Source) -> dict[str, np.ndarray]:
    """Reads one file.

    Args:
      source: the file.

    Returns:
      Arrays by name, in the order of the file.

    Raises:
      ValueError: if the file is cut off, declares more than it has, or would take more
        memory than it may.

    Example:
      >>> import io
      >>> from normjax.tools import bounds, safetensors
      >>> data = (2).to_bytes(8, "little") + b"{}"
      >>> safetensors.read(bounds.Source("read", "a", io.BytesIO(data), 10))
      {}
    """
    size, file = source.size, source.file
    length = int.from_bytes(source.at(0, 8), "little")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise source.refused(
            "the header of a .safetensors file must lie within the file, and have"
            f" at most {_HEADER_LIMIT} bytes",
            f"{size} bytes, and a header that declares {length}",
        )
    entries = _header(source, file.read(length))
    available, position = size - 8 - length, 0
    for name, (dtype, shape, begin, end) in entries.items():
        declared = math.prod(shape) * dtype.itemsize
        if (begin, end) != (position, position + declared) or end > available:
            raise source.refused(
                "arrays must lie one after another, as large as they are declared,"
                " within the file",
                f"{name!r} of {NAMES[dtype]} {list(shape)}, {declared} bytes, at"
                f" {begin} to {end}; the one before it ends at {position}, and the"
                f" file has {available} bytes of arrays",
            )
        position = end
    if position != available:
        raise source.refused(
            "the arrays must fill the file",
            f"{position} bytes declared, {available} there",
        )
    source.need(position, f"{len(entries)} arrays")
    return {
        name: source.array(8 + length + begin, dtype, shape)
        for name, (dtype, shape, begin, _) in entries.items()
    }


def json_of(source: Source, text: bytes, what: str) -> Any:
    """Reads JSON that makes no more objects than reading may; no name comes twice."""
    check_parts(source, text, what)
    return json.loads(text, object_pairs_hook=_unique)


def check_parts(source: Source, text: bytes, what: str, each: int = OBJECT) -> None:
    """Refuses JSON that makes more objects than reading may, of so many bytes each."""
    # Each of these begins an object of Python, or it is in a word and begins none.
    count = sum(text.count(mark) for mark in b",:[{") + 1
    source.need(count * each + 4 * len(text), f"{what} of {count} parts")


def _unique(pairs: list) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _header(source: Source, text: bytes) -> dict[str, tuple]:
    """The dtype, shape, begin and end of each array, by name, in their order."""
    name = "the header"
    try:
        header = json_of(source, text, "a header")
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            offsets = entry["data_offsets"]
            if not isinstance(shape, list) or not isinstance(offsets, list):
                raise TypeError(f"shape {shape!r} at {offsets!r}")
            begin, end = offsets
            if len(shape) > _RANK_LIMIT:
                raise ValueError(f"{len(shape)} axes")
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if not whole or math.prod(n or 1 for n in shape) >= 2**59:
                raise ValueError(f"shape {shape} at {begin} to {end}")
            entries[name] = dtype, tuple(shape), begin, end
    except bounds.RefusedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise source.refused(
            "the header of a .safetensors file says the dtype, shape and data_offsets"
            " of each array, in JSON",
            f"{name}: {bounds.words(fault)}",
            f"Dtypes are {', '.join(DTYPES)}. {AGAIN}",
        ) from fault
    return dict(sorted(entries.items(), key=lambda item: item[1][2:]))


def read_index(source: Source, max_bytes: int | None) -> dict[str, np.ndarray]:
    """Reads the files beside an index, which says in which each array is.

    Args:
      source: the index.
      max_bytes: of memory, for all files; None is the default for each.

    Returns:
      The arrays of all files by name.

    Raises:
      ValueError: if the index is damaged, an array is not in its file, or in two.
      FileNotFoundError: if a file is missing.

    Example:
      >>> import io
      >>> from normjax.tools import bounds, safetensors
      >>> index = io.BytesIO(b'{"weight_map": {}}')
      >>> safetensors.read_index(bounds.Source("read", "a", index, 18), None)
      {}
    """
    rule = (
        "an index of .safetensors files has a weight_map, in JSON, from the names of"
        " arrays to those of files beside it"
    )
    try:
        source.need(source.size, "an index")
        places = json_of(source, source.at(0, source.size), "an index")["weight_map"]
        for name, file in places.items():
            # No path: it would lead out of the folder.
            if not re.fullmatch(r"[^/\\\0:]+\.safetensors", file):
                raise ValueError(f"{name!r} in {file!r}")
    except bounds.RefusedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise source.refused(rule, bounds.words(fault)) from fault
    found: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(places.values()):
        path = pathlib.Path(source.path).with_name(file)
        left = None
        if max_bytes is not None:
            left = max(0, max_bytes - sum(a.nbytes for a in found.values()))
        if not path.exists():
            raise _check.error(
                FileNotFoundError,
                source.caller,
                "the files of an index must lie beside it",
                f"{source.path}, and no {file!r}",
                "Get all files that it names",
            )
        with bounds.opened(source.caller, path, left) as shard:
            arrays = read(shard)
        if twice := sorted(set(arrays) & set(found)):
            raise source.refused(
                "an array must be in one of the files of an index",
                f"{twice[0]!r} in {file} and in one before it",
            )
        missing = {n for n, f in places.items() if f == file} - set(arrays)
        if missing:
            raise source.refused(
                "the files of an index must hold what it says",
                f"no {min(missing)!r} in {file}",
            )
        found |= arrays
    return found


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file that is not there yet.

    Args:
      path: of the file.
      arrays: by name, of dtypes that are in ``NAMES``.

    Raises:
      ValueError: if an array has the name ``__metadata__``.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from normjax.tools import safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "a.safetensors")
      ...     safetensors.write(path, {"w": np.ones(2)})
      ...     os.path.getsize(path)
      80
    """
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
            "dtype": NAMES[a.dtype.newbyteorder("=")],
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
        to_disk(file)


def _little(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder("<")) if a.dtype.byteorder == ">" else a


def to_disk(file: BinaryIO) -> None:
    """Returns when the bytes of a file are on the disk."""
    file.flush()
    os.fsync(file.fileno())
