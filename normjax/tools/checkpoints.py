"""Checkpoints of any model as plain trees of arrays; nothing is ever unpickled."""

import contextlib
import math
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check

# Of a compressed file that says it holds more than that, and than so many times its
# size, nothing is believed.
LIMIT, RATIO = 2**30, 100


def load(path: Any) -> dict[str, Any]:
    """Reads a checkpoint, without the model it is of.

    Args:
      path: a folder of orbax, of one tree or of a ``CheckpointManager``, of which the
        newest step is read; a file of Flax's ``to_bytes`` (msgpack); or an ``.npz``
        whose names have slashes.

    Returns:
      The tree: dictionaries, whose leaves are numpy arrays.

    Raises:
      FileNotFoundError: if there is nothing.
      ImportError: if a folder is to be read, and orbax is missing.
      ValueError: if it is no checkpoint of these kinds, or damaged; a pickle is none.

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
    with _reading(path):
        return _plain(path, _orbax(path) if path.is_dir() else _file(path))


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


class _HouseError(ValueError):
    """An error in the house form, which is not wrapped into another."""


def _refused(
    rule: str,
    got: str,
    todo: str = "Pass the folder of an orbax checkpoint, or a file of"
    " flax.serialization.to_bytes or numpy.savez",
    kind: str = "",
) -> Exception:
    of = FileNotFoundError if kind == "missing" else _HouseError
    return _check.error(of, "checkpoint", rule, got, todo)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What a library raises over damaged data, as an error that says so.

    A file that is damaged, or made to harm, can lead a reader to any kind of error.
    """
    try:
        yield
    except (_HouseError, ImportError, PermissionError):
        raise
    except Exception as fault:
        words = " ".join(f"{type(fault).__name__}: {fault}".split())[:200].rstrip(".: ")
        raise _refused(
            "the checkpoint must be whole, and of the kind it seems to be",
            f"{path}, of which reading ends in {words}",
            "Copy it again from where it was written, or take the one before it",
        ) from fault


def _plain(path: pathlib.Path, tree: Any) -> dict[str, Any]:
    """The tree with arrays alone as leaves; refuses what is none."""
    if not isinstance(tree, Mapping):
        raise _refused(
            "a checkpoint must hold a tree of names", f"{path} of {type(tree).__name__}"
        )

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return {str(i): plain(v) for i, v in enumerate(value)}
        a = np.asarray(value)
        if a.dtype == np.dtype("V2"):  # what numpy makes of bfloat16 in a file
            a = a.view(jnp.bfloat16)
        numeric = a.dtype == bool or jnp.issubdtype(a.dtype, jnp.number)
        return a if numeric else None  # words, None and the like

    return plain(tree)


# Files.


def _file(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK":
        return _npz(path)
    # A pickle says its protocol first. To msgpack the first byte is an empty map, which
    # nothing follows.
    if len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        raise _pickle(path)
    from flax.serialization import msgpack_restore

    return msgpack_restore(path.read_bytes())


def _pickle(path: pathlib.Path) -> Exception:
    return _refused(
        "a checkpoint must not be a pickle, because reading one runs what is in it",
        f"{path}",
        "Save it anew where it is trusted, with numpy.savez or"
        " flax.serialization.to_bytes",
    )


def _npz(path: pathlib.Path) -> Any:
    tree: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.filename.endswith(".pkl") for m in members):  # of torch.save
            raise _pickle(path)
        if others := [m.filename for m in members if not m.filename.endswith(".npy")]:
            raise _refused(
                "a zip must hold arrays of numpy alone", f"{others[0]} in {path}"
            )
        _believed(path, sum(m.file_size for m in members))
        for member in members:
            *names, last = member.filename[: -len(".npy")].split("/")
            node = tree
            for name in names:
                node = node.setdefault(name, {})
            with archive.open(member) as file:
                _check_header(path, member, file)
            with archive.open(member) as file:
                node[last] = np.lib.format.read_array(file, allow_pickle=False)
    return tree


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


def _believed(path: pathlib.Path, declared: int) -> None:
    files = path.rglob("*") if path.is_dir() else [path]
    there = sum(f.stat().st_size for f in files if f.is_file())
    if declared > max(LIMIT, RATIO * there):
        raise _refused(
            f"a checkpoint must not hold more than {RATIO} times what it takes on disk",
            f"{path} of {there} bytes, which says it holds {declared}",
            "Copy it again from where it was written, if you trust who wrote it",
        )


# Folders.


def _orbax(path: pathlib.Path) -> Any:
    """The tree in a folder: there itself, in an item, in the newest step."""
    if (path / "_METADATA").is_file():
        return _restored(path)
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
        return _restored(path / items[0])
    if not steps:
        raise _refused("a folder must be a checkpoint of orbax", f"{path}")
    return _orbax(steps[max(steps)])


def _step(name: str) -> int | None:
    """The number of a step's folder; None where it is none, or is not finished."""
    found = re.fullmatch(r"(?:\w+[_-])?(\d+)", name)
    return int(found[1]) if found else None


def _restored(path: pathlib.Path) -> Any:
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
        sizes = [
            math.prod(m.shape) * np.dtype(m.dtype).itemsize
            for m in jax.tree.leaves(tree)
            if getattr(m, "shape", None) is not None
        ]
        _believed(path, sum(sizes))
        # Without it arrays are put on the devices they were on, which may not be here.
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=numpy)
