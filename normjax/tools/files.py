"""Files of weights: read without running anything that is in them, written whole.

A file says how much it holds before it is believed: what is declared is compared with
the size of the file first, and only then is memory taken.
"""

import functools
import importlib
import io
import os
import pathlib
import pickletools
import re
import secrets
import shlex
import shutil
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from normjax import _check
from normjax.tools import bounds, hdf5, safetensors
from normjax.tools.bounds import AGAIN, OBJECT, Source
from normjax.tools.safetensors import NAMES


def read_weights(
    path: str | os.PathLike, *, max_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Reads a file of weights, as arrays by name.

    ``.safetensors``, ``.keras``, ``.weights.h5`` and ``.h5`` need no package; of HDF5
    only plain datasets that lie in the file as they are, as Keras writes them. ``.pt``
    and ``.pth`` need torch, and go through ``torch.load(weights_only=True)``. Nothing
    is ever unpickled otherwise.

    Args:
      path: of the file; the end of its name says what it is. Of a model in several
        files of ``.safetensors`` it is that of ``model.safetensors.index.json``.
      max_bytes: of memory that reading may take, about. If None, 200 MB, or twice the
        file where that is more.

    Returns:
      Arrays by name, bfloat16 among them: PyTorch's names in a state dict, or Keras's
      paths, ``layers/dense/vars/0``.

    Raises:
      ValueError: if the name's end is not one of these; if it is no regular file, is
        cut off, declares more than it has, would take more than ``max_bytes``, or holds
        what is not plain arrays: links, virtual, external, compressed or object
        datasets, code.
      ImportError: if torch is missing for ``.pt``.

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
    readers: dict[str, Callable[[Source], dict[str, np.ndarray]]] = {
        ".safetensors": safetensors.read,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".keras": _read_keras,
        ".h5": hdf5.read,
        safetensors.INDEX: functools.partial(
            safetensors.read_index, max_bytes=max_bytes
        ),
    }
    end = safetensors.INDEX if path.name.endswith(safetensors.INDEX) else path.suffix
    if end not in readers:
        raise _check.error(
            ValueError,
            "read_weights",
            f"the name of a file must end in one of {', '.join(readers)}",
            str(path),
            "Save the weights as .safetensors, say",
        )
    with bounds.opened("read_weights", path, max_bytes) as source:
        return readers[end](source)


def write_weights(path: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Writes arrays by name to a file, whole or not at all.

    PyTorch reads ``.safetensors`` with ``safetensors.torch.load_file``, and Keras
    ``.weights.h5`` with ``model.load_weights``.

    Args:
      path: of the file, which is replaced if it is there, and keeps its mode; of a
        link, what it leads to. Its name ends in ``.safetensors`` or ``.h5``.
      weights: arrays by name, or tensors on the CPU.

    Raises:
      ValueError: if the name ends in something else, is that of a pipe or a device, or
        an array has a dtype or a name that such a file has not.
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
    writers = {".safetensors": safetensors.write, ".h5": _write_h5}
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
        if a.dtype.newbyteorder("=") not in NAMES:
            raise _check.error(
                ValueError,
                "write_weights",
                "weights are arrays by name, of a dtype among"
                f" {', '.join(map(str, NAMES))}",
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
    if real.exists() and not real.is_file():
        raise _check.error(
            ValueError,
            "write_weights",
            "only a regular file is replaced",
            f"{real}, which is none",
            "Pass the name of a new file",
        )
    # Beside the file, so that it is renamed into place in one step; of a name of its
    # own, as that of the file may be as long as a name can be.
    unfinished = real.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        writers[path.suffix](unfinished, arrays)
        if real.exists():
            shutil.copymode(real, unfinished)
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


# .pt: a zip of a pickle and of the bytes of the tensors, for torch alone.

_PICKLE_LIMIT = 10_000_000  # bytes; a tensor takes about 200
# What the pickle of a state dict names. torch allows more, bytearray(10**10) among it.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch \w+Storage|torch\.storage UntypedStorage|torch (\w*int|b?float|complex)\w+"
)


def _read_torch(source: Source) -> dict[str, np.ndarray]:
    path, alone = source.path, "Save model.state_dict() alone"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        there = pathlib.Path(path).with_suffix(".safetensors")
        code = (
            "import sys, torch, safetensors.torch as s; s.save_file({k:"
            " v.contiguous().clone() for k, v in torch.load(sys.argv[1],"
            " weights_only=True).items()}, sys.argv[2])"
        )
        raise _check.error(
            ImportError,
            "read_weights",
            "a .pt file is a pickle, which can run code; only torch, with"
            " weights_only=True, may read it",
            f"{path}, and no torch",
            f'Type where torch is: python -c "{code}" {_typed(path)} {_typed(there)}',
        ) from None
    _check_pickle(source)
    source.need(source.size, "tensors")
    try:
        source.file.seek(0)
        found = torch.load(source.file, map_location="cpu", weights_only=True)
    except Exception as fault:  # whatever a hostile pickle makes it raise
        raise source.refused(
            "torch.load(weights_only=True) must be able to read a .pt file: tensors,"
            " and no code",
            bounds.words(fault),
            alone,
        ) from fault
    if not isinstance(found, Mapping):
        found = {type(found).__name__: found}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise source.refused(
                "a .pt file must hold a state dict, tensors by name",
                f"{name!r} of {type(value).__name__}",
                f"{alone}, or pass the inner dictionary, once"
                " torch.load(weights_only=True) has read it, to from_torch",
            )
    storages = [value.untyped_storage() for value in found.values()]
    held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    if held > source.size:
        raise source.refused(
            "tensors must not hold more than the file",
            f"{held} bytes of tensors, {source.size} there",
        )
    return {
        name: of_tensor("read_weights", path, name, value)
        for name, value in found.items()
    }


def _typed(path: Any) -> str:
    """A path as it is typed in a shell, where it is no option."""
    path = str(path)
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def array_of(caller: str, path: Any, name: str, a: Any) -> Any:
    """A tensor of torch as an array; anything else as it is."""
    tensor = hasattr(a, "untyped_storage")
    return of_tensor(caller, path, name, a) if tensor else a


def of_tensor(caller: str, path: Any, name: str, tensor: Any) -> np.ndarray:
    """A tensor's values, in its own memory; caller and path name it in errors."""
    tensor = tensor.detach()
    kind = str(tensor.dtype).removeprefix("torch.")
    known = {str(d): d for d in NAMES}
    plain = kind in known and str(tensor.layout) == "torch.strided"
    if not plain or tensor.is_nested or tensor.device.type != "cpu":
        raise bounds.refused(
            caller,
            path,
            "tensors must be dense, on the CPU, and of a dtype that numpy has",
            f"{name!r} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            + ", nested" * tensor.is_nested,
            "Save tensor.cpu(), dense, in such a dtype",
        )
    declared, there = tensor.nbytes, tensor.untyped_storage().nbytes()
    if declared > there:
        raise bounds.refused(
            caller,
            path,
            "a tensor must not declare more than its storage holds",
            f"{name!r} of shape {tuple(tensor.shape)}, {declared} bytes, in {there}",
            "Save tensor.contiguous()",
        )
    tensor = tensor.resolve_conj().resolve_neg()
    if known[kind].isbuiltin != 1:  # bfloat16, float8: numpy's are of ml_dtypes
        same = {1: "uint8", 2: "int16"}[known[kind].itemsize]
        tensor = tensor.view(getattr(importlib.import_module("torch"), same))
    return tensor.numpy().view(known[kind])


def _check_pickle(source: Source) -> None:
    """Refuses a .pt that torch reads in another way than as the zip of a state dict."""
    alone = "Save model.state_dict() alone"
    with _opened_zip(source) as archive:
        members = archive.infolist()
        # As torch looks for it: whatever the case.
        pickles = [m for m in members if m.filename.lower().endswith("/data.pkl")]
        whole = _starts_and_ends_as_a_zip(source, archive.start_dir)
        if len(pickles) != 1 or members[0].header_offset or not whole:
            raise source.refused(
                "a .pt file must be one zip from its first byte to its last, with one"
                " data.pkl",
                f"{len(pickles)} of them among {len(members)} members"
                + ", and other bytes around the zip" * (not whole),
                alone,
            )
        text = _member(source, archive, pickles[0].filename, alone)
    try:
        if len(text) > _PICKLE_LIMIT:
            raise ValueError(f"{len(text)} bytes")
        # This runs nothing. Other ways to name a global, torch refuses.
        for count, (opcode, name, _) in enumerate(pickletools.genops(text)):
            source.need(count * OBJECT, "a pickle of as many steps")
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(name)):
                raise ValueError(str(name).replace(" ", "."))
    except bounds.RefusedError:
        raise
    except ValueError as fault:
        raise source.refused(
            f"the pickle in a .pt file must have at most {_PICKLE_LIMIT} bytes, and"
            " name what a state dict of dense tensors is made of, and nothing else",
            str(fault),
            alone,
        ) from fault


def _starts_and_ends_as_a_zip(source: Source, directory: int) -> bool:
    """Whether all who read the zip find its directory at the same place.

    Some look for its end and count back, some go by the place that the end declares.
    """
    first, end = source.at(0, 4), source.at(source.size - 22, 22)
    declared = end[16:20]
    if source.size >= 98:  # with the end of a zip of 64 bits before it
        end64 = source.at(source.size - 98, 76)
        declared = end64[48:56] if end64[56:60] == b"PK\6\7" else declared
    ends = first == b"PK\3\4" and end[:4] == b"PK\5\6"
    return ends and int.from_bytes(declared, "little") == directory


# .keras: a zip with an .h5 in it.


def _opened_zip(source: Source) -> zipfile.ZipFile:
    """Opens a zip whose members lie in it as they are, so that none is a bomb."""
    size, suffix = source.size, pathlib.Path(source.path).suffix
    try:
        archive = source.zip()
    except bounds.RefusedError:
        raise
    except _ZIP_FAULTS as fault:
        raise source.refused(
            f"a {suffix} file must be a zip, whole",
            f"{size} bytes, {bounds.words(fault)}",
            f"{AGAIN}; a .pt of torch before 1.6 must be saved once more",
        ) from fault
    total = 0
    for member in archive.infolist():
        total += member.file_size
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.flag_bits & 1 or total > size:
            archive.close()
            raise source.refused(
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


def _member(source: Source, archive: zipfile.ZipFile, name: str, todo: str) -> bytes:
    try:
        return archive.read(name)
    except _ZIP_FAULTS as fault:
        suffix = pathlib.Path(source.path).suffix
        rule = f"a {suffix} file must hold {name}, whole"
        raise source.refused(rule, bounds.words(fault), todo) from fault


def _read_keras(source: Source) -> dict[str, np.ndarray]:
    with _opened_zip(source) as archive:
        source.need(2 * source.size, "the weights in a zip, and their arrays")
        inside = _member(
            source,
            archive,
            "model.weights.h5",
            "Save it with Keras 3: model.save('model.keras')",
        )
    # The bound is that of the zip, which is larger.
    inner = Source(
        source.caller, source.path, io.BytesIO(inside), len(inside), source.most
    )
    return hdf5.read(inner)


# .h5: groups of datasets.


def _h5py(name: str, path: pathlib.Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise _check.error(
            ImportError,
            name,
            "writing files of Keras needs h5py",
            f"{path}, and no h5py",
            "Type pip install 'normjax[convert]'",
        ) from None


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
                    f"{name!r} of dtype {a.dtype}: {bounds.words(fault)}",
                    "Write a .safetensors file",
                ) from fault
            if a.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
    with open(path, "rb+") as file:
        safetensors.to_disk(file)
