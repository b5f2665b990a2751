"""Checkpoints of any model as plain trees of arrays; nothing is ever unpickled."""

import contextlib
import io
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check
from normjax.tools import bounds, safetensors
from normjax.tools.bounds import Source

# What a chunk of orbax's counts for: not its bytes, but the work of looking for it.
_CHUNK = 1000
# What an object of msgpack takes at most, about: a number, that is an array in the end;
# and a dictionary.
_OBJECT = 300


def load(path: Any, *, max_bytes: int | None = None) -> dict[str, Any]:
    """Reads a checkpoint, without the model it is of.

    Args:
      path: a folder of orbax, of one tree or of a ``CheckpointManager``, of which the
        newest step is read; a file of Flax's ``to_bytes`` (msgpack); an ``.npz`` whose
        names have slashes; a ``.safetensors`` or the ``.safetensors.index.json`` of
        several, whose names have slashes or dots: PyTorch's norms get Flax's names.
      max_bytes: of memory that reading may take, about. If None, 200 MB, or twice what
        the file or folder holds where that is more.

    Returns:
      The tree: dictionaries, whose leaves are numpy arrays.

    Raises:
      FileNotFoundError: if there is nothing.
      ImportError: if a folder is to be read, and orbax is missing.
      ValueError: if it is no checkpoint of these kinds, or damaged, or would take more
        than ``max_bytes``; a pickle is none, and neither is what is no regular file.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from normjax.tools import checkpoints
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(os.path.join(folder, "a.npz"), **{"norm/var": np.ones(2)})
      ...     checkpoints.load(os.path.join(folder, "a.npz"))
      {'norm': {'var': array([1., 1.])}}
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise _refused(
            "there must be a checkpoint", f"no file or folder {path}", kind="missing"
        )
    bounds.most("checkpoint", max_bytes, 0)  # refuses what is no number
    with _reading(path):
        read = _folder if path.is_dir() else _file
        return _plain(path, read(path, max_bytes))


# What an optimizer's state is called beside the collections of variables, and what
# moments in it are called, wherever it is.
_STATE = re.compile(r"opt(imizer)?_?states?|optimizer", re.IGNORECASE)
_MOMENTS = {"mu", "nu", "trace"}
_COLLECTIONS = {"params", "batch_stats"}


def without_optimizer(arrays: Mapping[tuple[str, ...], Any]) -> dict[tuple, Any]:
    """Leaves out what an optimizer keeps, which has the names of what it is of.

    That is what is called the state of one, and moments that are as params are, or as
    moments beside them. A name says so before that of a collection alone: after it, it
    is a module's, whose head may be ``mu``.

    Args:
      arrays: those of a checkpoint by path.

    Returns:
      The others.

    Example:
      >>> from normjax.tools import checkpoints
      >>> arrays = {("params", "mu", "scale"): 1, ("opt_state", "mu", "scale"): 2}
      >>> checkpoints.without_optimizer(arrays)
      {('params', 'mu', 'scale'): 1}
    """
    outside = {path: _outside(path) for path in arrays}
    found: set[tuple] = set()  # the paths of states and of moments
    trees: dict[tuple, dict[tuple, Any]] = {}  # of params and moments, by path
    for path, names in outside.items():
        for i, name in enumerate(names):
            if _STATE.fullmatch(name):
                found.add(path[: i + 1])
            elif name in _MOMENTS:
                below = path[i + 1 :]
                trees.setdefault(path[: i + 1], {})[below] = np.shape(arrays[path])
        if "params" in path:
            i = path.index("params") + 1
            trees.setdefault(path[:i], {})[path[i:]] = np.shape(arrays[path])
    for path, tree in trees.items():
        others = [
            other
            for at, other in trees.items()
            if at[-1] == "params" or (at[:-1] == path[:-1] and at != path)
        ]
        if path[-1] in _MOMENTS and tree in others:
            found.add(path)
    return {
        path: a
        for path, a in arrays.items()
        if not any(path[: i + 1] in found for i in range(len(path)))
    }


def _outside(path: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a path before that of a collection."""
    at = [i for i, name in enumerate(path) if name in _COLLECTIONS]
    return path[: min(at, default=len(path))]


def _refused(
    rule: str,
    got: str,
    todo: str = "Pass the folder of an orbax checkpoint, or a file of"
    " flax.serialization.to_bytes or numpy.savez",
    kind: str = "",
) -> Exception:
    of = FileNotFoundError if kind == "missing" else bounds.RefusedError
    return _check.error(of, "checkpoint", rule, got, todo)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What a library raises over damaged data, as an error that says so.

    A file that is damaged, or made to harm, can lead a reader to any kind of error.
    """
    try:
        yield
    except (bounds.RefusedError, ImportError, PermissionError):
        raise
    except Exception as fault:
        raise _refused(
            "the checkpoint must be whole, and of the kind it seems to be",
            f"{path}, of which reading ends in {bounds.words(fault)}",
            "Copy it again from where it was written, or take the one before it",
        ) from fault


def _plain(path: pathlib.Path, tree: Any) -> dict[str, Any]:
    """The tree with arrays alone as leaves, None for all else; refuses what is none."""
    if not isinstance(tree, Mapping):
        raise _refused(
            "a checkpoint must hold a tree of names", f"{path} of {type(tree).__name__}"
        )

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return {str(i): plain(v) for i, v in enumerate(value)}
        if value is None or isinstance(value, (str, bytes)):
            return None  # words; as an array they would take four times their bytes
        a = np.asarray(value)
        if a.dtype == np.dtype("V2"):  # what numpy makes of bfloat16 in a file
            a = a.view(jnp.bfloat16)
        numeric = a.dtype == bool or jnp.issubdtype(a.dtype, jnp.number)
        return a if numeric else None

    return plain(tree)


# Files.


def _file(path: pathlib.Path, max_bytes: int | None) -> Any:
    with bounds.opened("checkpoint", path, max_bytes) as source:
        if path.name.endswith(safetensors.INDEX):
            return _of_names(source, safetensors.read_index(source, max_bytes))
        if path.suffix == ".safetensors":
            return _of_names(source, safetensors.read(source))
        if path.suffix in (".h5", ".keras", ".pt", ".pth"):
            raise _refused(
                "a file of Keras or PyTorch must be converted first",
                f"{path}",
                "Pass read_weights(path) to from_keras or from_torch, and what they"
                " return to norm_table",
            )
        start = source.at(0, 8)
        if start[:2] == b"PK":
            return _npz(source)
        # A pickle says its protocol first. To msgpack the first byte is an empty map,
        # which nothing follows.
        if len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
            raise _pickle(path)
        return _msgpack(source)


class _Tree:
    """A tree of arrays by names, that grows no larger than memory may hold."""

    def __init__(self, source: Source):
        self.source, self.nodes = source, 0
        self.root: dict[str, Any] = {}

    def put(self, path: list[str], a: Any) -> None:
        """Puts an array in; refuses what would take the place of another."""
        *names, last = path
        node = self.root
        for name in names:
            if name not in node:
                self.nodes += 1
                self.source.need(self.nodes * _OBJECT, "the parts of names")
                node[name] = {}
            node = node[name]
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise _refused(
                "an array must have a name of its own, which goes on from no other's",
                f"{'/'.join(path)!r} in {self.source.path}",
                "Save it under another name",
            )
        node[last] = a


def _of_names(source: Source, arrays: dict[str, Any]) -> dict[str, Any]:
    """The tree of arrays whose names have slashes, or, where none has, dots."""
    mark = "/" if any("/" in name for name in arrays) else "."
    tree = _Tree(source)
    for name, a in arrays.items():
        tree.put(name.split(mark), a)
    return _of_torch(tree.root)


# PyTorch's names of what a norm has. What has a weight with one axis is a norm if it
# has a bias of its shape, or is called so.
_TORCH = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
_NORM = re.compile(r"norm|(^|_)ln|(^|_)bn", re.IGNORECASE)


def _of_torch(tree: dict[str, Any], called: str = "") -> dict[str, Any]:
    """The tree with the norms of PyTorch under Flax's names."""
    if any(isinstance(a, dict) for a in tree.values()):
        tree = {
            name: _of_torch(a, name) if isinstance(a, dict) else a
            for name, a in tree.items()
        }
    names = dict(_TORCH) if {"running_mean", "running_var"} <= set(tree) else {}
    shape, bias = np.shape(tree.get("weight", ())), tree.get("bias", ())
    plain = not {"weight", "bias"} & {n for n, a in tree.items() if type(a) is dict}
    if plain and "weight" in tree and len(shape) == 1 and "scale" not in tree:
        if names or _NORM.search(called) or np.shape(bias) == shape:
            names["weight"] = "scale"
    if "count" in names.values() and "num_batches_tracked" in tree:
        tree = tree | {"num_batches_tracked": np.float32(tree["num_batches_tracked"])}
    taken = set(tree) & set(names.values())
    return tree if taken else {names.get(name, name): a for name, a in tree.items()}


def _msgpack(source: Source) -> Any:
    from flax.serialization import msgpack_restore

    source.need(2 * source.size, "msgpack, and its arrays")
    data = source.at(0, source.size)
    _count(source, data)
    return msgpack_restore(data)


# By the first byte of an object of msgpack from 0xc0 on: how many bytes say its length,
# and how many come after it besides. https://github.com/msgpack/msgpack/blob/master/spec.md
_LENGTHS = dict(zip(range(0xC4, 0xCA), (1, 2, 4) * 2, strict=True))
_LENGTHS |= {0xD9: 1, 0xDA: 2, 0xDB: 4}
_AFTER = dict(zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True))
_AFTER |= dict(zip(range(0xD4, 0xD9), (1, 2, 4, 8, 16), strict=True))
_AFTER |= {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_EXTENSIONS = range(0xC7, 0xCA), range(0xD4, 0xD9)


def _count(source: Source, data: bytes) -> None:
    """Refuses more objects than memory may hold, before any is made."""
    parts, count = [(0, source.size)], 0
    while parts:
        place, end = parts.pop()
        while place < end:
            first = data[place]
            place += 1
            count += 1
            if count * _OBJECT > source.most:
                source.need(count * _OBJECT, f"more than {count} objects of msgpack")
            if first < 0xC0:
                place += first & 31 if first >= 0xA0 else 0
                continue
            wide = _LENGTHS.get(first, 0)
            length = _AFTER.get(first, 0)
            if wide:
                length = int.from_bytes(data[place : place + wide], "big")
            place += wide
            if any(first in codes for codes in _EXTENSIONS):
                place += 1  # of its kind; what Flax puts in is msgpack again
                parts.append((place, min(place + length, end)))
            place += length


def _pickle(path: pathlib.Path) -> Exception:
    return _refused(
        "a checkpoint must not be a pickle, because reading one runs what is in it",
        f"{path}",
        "Save it anew where it is trusted, with numpy.savez or"
        " flax.serialization.to_bytes",
    )


def _npz(source: Source) -> Any:
    path, tree = source.path, _Tree(source)
    with source.zip() as archive:
        members = archive.infolist()
        if any(m.filename.endswith(".pkl") for m in members):  # of torch.save
            raise _pickle(path)
        if others := [m.filename for m in members if not m.filename.endswith(".npy")]:
            raise _refused(
                "a zip must hold arrays of numpy alone", f"{others[0]} in {path}"
            )
        methods = {m.compress_type for m in members}
        if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise _refused(
                "the arrays in a zip must be compressed as numpy.savez_compressed does",
                f"the methods {sorted(methods)} in {path}",
            )
        source.need(sum(m.file_size for m in members), f"{len(members)} arrays")
        for member in members:
            with archive.open(member) as file:
                _check_header(path, member, file)
            with archive.open(member) as file:
                a = np.lib.format.read_array(file, allow_pickle=False)
            tree.put(member.filename.removesuffix(".npy").split("/"), a)
    return tree.root


def _check_header(path: pathlib.Path, member: zipfile.ZipInfo, file: Any) -> None:
    """Refuses an array that says it is larger than it is, before it is made."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise _pickle(path)
    declared, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if declared != there:
        raise _refused(
            "an array must be as large as it says",
            f"{member.filename} in {path}, {there} bytes for {dtype} of shape {shape}",
            "Copy it again from where it was written",
        )


# Folders.


def _folder(path: pathlib.Path, max_bytes: int | None) -> Any:
    found = _orbax(path)
    files = bounds.files_of("checkpoint", found)
    most = bounds.most("checkpoint", max_bytes, sum(files.values()))
    _check_json(files, most)
    return _restored(found, most)


def _orbax(path: pathlib.Path) -> pathlib.Path:
    """The folder of the tree in a folder: itself, an item, one in the newest step."""
    if (path / "_METADATA").is_file():
        return path
    inside = [p for p in path.iterdir() if p.is_dir()]
    items = sorted(p.name for p in inside if (p / "_METADATA").is_file())
    if len(items) > 1 and not all(map(_step, items)):
        raise _refused(
            "a step must hold one tree, or it must be said which",
            f"{', '.join(items)} in {path}",
            f"Pass {path / items[0]}, say",
        )
    steps = {n: p for p in inside if (n := _step(p.name)) is not None}
    if items and not steps:
        return path / items[0]
    if not steps:
        raise _refused("a folder must be a checkpoint of orbax", f"{path}")
    return _orbax(steps[max(steps)])


def _step(name: str) -> int | None:
    """The number of a step's folder; None where it is none, or is not finished."""
    found = re.fullmatch(r"(?:\w+[_-])?(\d+)", name)
    return int(found[1]) if found else None


def _check_json(files: Iterable[pathlib.Path], most: int) -> None:
    """Refuses JSON of more objects than memory may hold, or nested too deeply.

    The library that reads it otherwise ends the process.
    """
    for file in files:
        with bounds.opened("checkpoint", file, most) as source:
            # Whitespace and a mark of UTF-8 may come before it.
            start = source.at(0, 64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if start in (b"", b"{", b"["):
                _check_parts(source, source.at(0, source.size))
        if file.name == "manifest.ocdbt":
            _check_database(file.parent, most)


def _check_database(folder: pathlib.Path, most: int) -> None:
    """The same for a folder in which files are kept in one, by tensorstore."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        if key.endswith((b".zarray", b"zarr.json")):
            text = store.read(key).result().value
            name = folder / key.decode(errors="replace")
            kept = Source("checkpoint", name, io.BytesIO(text), len(text), most)
            _check_parts(kept, text)


def _check_parts(source: Source, text: bytes) -> None:
    safetensors.check_parts(source, text, "JSON", _OBJECT)
    # As leniently as anybody reads it: what is no JSON even so, numbers that begin like
    # it, is for others to read.
    words = text.decode("utf-8", "replace").lstrip("\ufeff")
    with contextlib.suppress(ValueError):
        json.loads(words, strict=False, parse_int=float)


def _wide(leaf: Any) -> int:
    return np.dtype(leaf.dtype).itemsize if leaf.dtype else 8


def _chunks(leaf: Any) -> list[tuple[int, ...]]:
    """The shapes of the chunks in which an array is kept, as far as they are known."""
    shapes = [getattr(leaf.storage, f"{k}_shape", None) for k in ("chunk", "write")]
    return [shape for shape in shapes if shape]


def _how_many(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    """How many chunks an array has."""
    return math.prod(-(-n // max(1, c)) for n, c in zip(shape, chunk, strict=False))


def _restored(path: pathlib.Path, most: int) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as fault:
        raise _check.error(
            ImportError,
            "checkpoint",
            "orbax must be installed to read its folders",
            f"{path}, and no orbax",
            "Run pip install orbax-checkpoint",
        ) from fault
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
        leaves = [m for m in jax.tree.leaves(tree) if hasattr(m, "shape")]
        sizes = [math.prod(m.shape) * _wide(m) for m in leaves]
        # A chunk is made whole, however little of it the array takes; and each is read
        # on its own, though there may be none on the disk.
        chunks = [(m, shape) for m in leaves for shape in _chunks(m)]
        count = sum(_how_many(m.shape, shape) for m, shape in chunks)
        largest = max((math.prod(c) * _wide(m) for m, c in chunks), default=0)
        needed = sum(sizes) + largest + _CHUNK * count
        bounds.need("checkpoint", path, most, needed, f"{len(sizes)} arrays")
        # Without it arrays are put on the devices they were on, which may not be here.
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=numpy)
