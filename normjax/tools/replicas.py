"""Replicas that should be equal: whether they are, and how to make them so."""

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax import _check, _devices, _moments, _numbers
from normjax._devices import Reduction
from normjax._moments import Moments


class Drift(NamedTuple):
    """An array that is not the same on all devices that should hold the same of it.

    Attributes:
      path: of the array in the tree.
      devices: the devices that hold something else than most, or than the first where
        there is no majority; numbers along the first axis for stacked replicas, of
        process 0 first.
      of: how many devices were compared.

    Example:
      >>> from normjax import tools
      >>> str(tools.Drift("['mean']", (3,), 8))
      "['mean'] differs on 3, of 8 devices"
    """

    path: str
    devices: tuple
    of: int

    def __str__(self) -> str:
        """Says it in words."""
        where = ", ".join(map(str, self.devices))
        return f"{self.path} differs on {where}, of {self.of} devices"


def checksum(tree: Any) -> jax.Array:
    """Returns a checksum of every array of a tree, of its bits and where they stand.

    Each of an array's words of 32 bits is mixed with its place, and all are added up
    modulo 2**32: one word that changes always changes it, and of other changes one in
    2**32 does not.

    Args:
      tree: arrays of any dtype; keys of ``jax.random`` among them, and arrays of NumPy
        that are wider than those of JAX.

    Returns:
      uint32, ``[number of arrays]``, in the order of ``jax.tree.leaves``.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> tools.checksum({"mean": jnp.zeros(3), "var": jnp.array([1.0, 2.0])})
      Array([1132362509, 1684272698], dtype=uint32)
    """
    sums = [_checksum(a) for a in jax.tree.leaves(tree)]
    return jnp.stack(sums) if sums else jnp.zeros((0,), jnp.uint32)


def _checksum(a: jax.Array) -> jax.Array:
    words = _words(a).ravel()
    # 2**32 by the golden ratio: neighbours get keys that are far from each other.
    keys = lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9)
    return _mixed(words ^ _mixed(keys)).sum(dtype=jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """Another word for each, every bit of it of all bits: the end of MurmurHash3."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def _unrounded(a: Any) -> Any:
    """An array of NumPy that would lose digits as one of JAX, as words of 32 bits."""
    if isinstance(a, jax.Array):
        return a
    a = np.asarray(a)
    if jax.dtypes.canonicalize_dtype(a.dtype) == a.dtype:
        return a
    return np.ascontiguousarray(a[..., None]).view(np.uint32)


def _words(a: Any) -> jax.Array:
    """The bits of an array, as words of 32."""
    a = jnp.asarray(_unrounded(a))
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if jnp.iscomplexobj(a):
        a = jnp.stack([a.real, a.imag])
    if a.dtype == jnp.bool_:
        return a.astype(jnp.uint32)
    if a.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(a, jnp.uint32)
    narrow = jnp.dtype(f"uint{jax.dtypes.itemsize_bits(a.dtype)}")
    return lax.bitcast_convert_type(a, narrow).astype(jnp.uint32)


def find_drift(tree: Any, *, stacked: bool = False) -> list[Drift]:
    """Finds arrays that differ where replicas should hold the same, bit by bit.

    Each device takes checksums of what it holds, and one all-reduce brings them all
    together: cheap enough to call every so many steps. Devices that hold different
    pieces of an array are not compared; those that hold the same piece are. Call it on
    every process; the result is the same on all.

    Args:
      tree: global arrays on one mesh, replicated or sharded in part; or, where
        ``stacked``, arrays ``[replicas, ...]``, as ``pmap`` returns them, on each
        process those of its own devices.
      stacked: whether the first axis is that of the replicas.

    Returns:
      What differs, in the order of the tree; empty where nothing does.

    Raises:
      TypeError: if an array is not a JAX array on a mesh.
      ValueError: if arrays are on several meshes, if no two devices hold the same of
        any of them, or if stacked ones differ in length.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> stacked = {"mean": jnp.array([[1.0], [1.0], [2.0]])}
      >>> print(*tools.find_drift(stacked, stacked=True))
      ['mean'] differs on 2, of 3 devices
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path) or "the array" for path, _ in found]
    arrays = [a for _, a in found]
    if not arrays:
        return []
    if stacked:
        sums = _of_stacked(paths, arrays)
        names: list[Any] = list(range(len(sums)))
        groups = [[names] if names else []] * len(arrays)
    else:
        mesh = _mesh_of(paths, arrays)
        names = list(mesh.devices.flat)
        groups = [_holders(a, names) for a in arrays]
        if len(names) > 1 and not any(map(is_replicated, arrays)):
            raise _check.error(
                ValueError,
                "find_drift",
                "something must be on several devices, to be compared",
                f"{paths[0]} and all others in pieces of their own on each of"
                f" {len(names)} devices",
                "Pass stacked=True for what pmap returns, whose first axis is that of"
                " the replicas, or leave out what is sharded over all devices",
            )
        arrays = [_on_device(a) for a in arrays]
        shardings = tuple(a.sharding for a in arrays)
        sums = np.asarray(_gathered(mesh, shardings)(arrays).addressable_data(0))
    rows = {name: row for row, name in enumerate(names)}
    drifts = []
    for i, path in enumerate(paths):
        odd = [d for group in groups[i] for d in _odd_ones(group, sums[:, i], rows)]
        if odd:
            drifts.append(Drift(path, tuple(odd), len(names)))
    return drifts


def _of_stacked(paths: list, arrays: list) -> np.ndarray:
    """The checksums of all replicas, those of other processes among them."""
    _check_stacked("find_drift", dict(zip(paths, arrays, strict=True)))
    if not len(arrays[0]):
        return np.zeros((0, len(arrays)), np.uint32)
    sums = _checksums([_unrounded(a) for a in arrays])
    if jax.process_count() == 1:
        return np.asarray(sums)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(sums, tiled=True))


def _check_stacked(name: str, arrays: dict[str, Any]) -> None:
    """Refuses arrays, by path, that differ in how many replicas they are of."""
    sizes = {path: np.shape(a)[:1] for path, a in arrays.items()}
    if len(set(sizes.values())) > 1 or () in sizes.values():
        raise _check.error(
            ValueError,
            name,
            "stacked arrays must have as many replicas along their first axis",
            ", ".join(f"{n} in {path}" for path, n in sizes.items()),
            "Pass the trees of pmap whole, and nothing else",
        )


_checksums = jax.jit(jax.vmap(checksum))


def _on_device(a: jax.Array) -> jax.Array:
    """The array in the memory that devices compute in, if it waits in another."""
    sharding: Any = a.sharding
    here = sharding.mesh.devices.flat[0].default_memory().kind
    if sharding.memory_kind in (None, here):
        return a
    return jax.device_put(a, sharding.with_memory_kind(here))


def _mesh_of(paths: list, arrays: list) -> jax.sharding.Mesh:
    meshes: dict[Any, str] = {}
    for path, a in zip(paths, arrays, strict=True):
        if not isinstance(getattr(a, "sharding", None), NamedSharding):
            raise _check.error(
                TypeError,
                "find_drift",
                "arrays must lie on a mesh, so that there are replicas to compare",
                f"{path} of {getattr(a, 'sharding', type(a).__name__)}",
                "Put it there with jax.device_put(array, NamedSharding(mesh, P())), or"
                " pass stacked=True for arrays [replicas, ...]",
            )
        meshes.setdefault(a.sharding.mesh, path)
    if len(meshes) > 1:
        (one, first), (two, second), *_ = meshes.items()
        raise _check.error(
            ValueError,
            "find_drift",
            "all arrays must lie on one mesh",
            f"{first} on {_described(one)}, {second} on {_described(two)}",
            "Call it once for each mesh",
        )
    return next(iter(meshes))


def _described(mesh: jax.sharding.Mesh) -> str:
    """What a mesh may differ in from another."""
    devices = [device.id for device in mesh.devices.flat]
    kinds = ", ".join(kind.name for kind in mesh.axis_types)
    return f"{mesh.shape_tuple} ({kinds}) of devices {devices}"


@functools.lru_cache(maxsize=16)
def _gathered(mesh: jax.sharding.Mesh, shardings: tuple) -> Any:
    """A program that gives every device the checksums of all, [devices, arrays]."""
    return jax.jit(
        jax.shard_map(
            lambda arrays: _devices.gathered(checksum(arrays), mesh.axis_names),
            mesh=mesh,
            in_specs=([s.spec for s in shardings],),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def is_replicated(a: jax.Array) -> bool:
    """Whether several devices of its mesh hold the same of an array."""
    sharding: Any = a.sharding
    return len(_holders(a, list(sharding.mesh.devices.flat))) < sharding.mesh.size


def _holders(a: jax.Array, devices: list) -> list[list]:
    """Devices in groups that hold the same piece of an array."""
    pieces: dict[Any, list] = {}
    places = a.sharding.devices_indices_map(a.shape)
    for device in devices:
        piece = tuple((s.start, s.stop) for s in places[device])
        pieces.setdefault(piece, []).append(device)
    return list(pieces.values())


def _odd_ones(group: list, sums: np.ndarray, rows: dict) -> list:
    """Those of a group whose checksum is not that of most, or of the first."""
    values = [int(sums[rows[d]]) for d in group]
    ((usual, _),) = collections.Counter(values).most_common(1)
    return [d for d, value in zip(group, values, strict=True) if value != usual]


def merge_replicas(statistics: Any, axis_name: Any = None) -> Any:
    """Merges running statistics that replicas have kept each for itself, exactly.

    The variance of all replicas' data is the mean of their variances AND the variance
    of their means, which ``pmean`` leaves out. Replicas count alike.

    Args:
      statistics: a tree of mappings, lists and tuples, in which a ``mean`` stands
        beside a ``var``, such as ``batch_stats``, or the state of nnx modules. Of a
        ``count`` beside them, of updates, all get the largest; what else it holds
        stays as it is.
      axis_name: device axes, one or several, that the replicas lie along, within
        ``pmap`` or ``shard_map``. None: along the first axis of the arrays.

    Returns:
      The tree, in which all replicas have the merged statistics.

    Raises:
      TypeError: if a mean or a var is of integers.
      ValueError: if there is no mean beside a var, or if their shapes or numbers of
        replicas differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> stacked = {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.ones((2, 1))}
      >>> tools.merge_replicas(stacked)["var"]
      Array([[2.],
             [2.]], dtype=float32)
    """
    name = "merge_replicas"
    if axis_name is not None:
        axis_name, _ = _check.devices(name, axis_name, None)
    leaves, structure = jax.tree.flatten(statistics)
    norms = list(_norms(jax.tree.unflatten(structure, range(len(leaves))), ()))
    if not norms:
        raise _check.error(
            ValueError,
            name,
            "statistics must have a mean beside a var somewhere",
            f"a tree of {structure}",
            "Pass variables['batch_stats'], say",
        )
    found = [
        (path, {k: jnp.asarray(leaves[place]) for k, place in places.items()})
        for path, places in norms
    ]
    for path, norm in found:
        _check_norm(name, path, norm)
    if axis_name is None:
        of_all = {_joined((*p, k)): a for p, norm in found for k, a in norm.items()}
        _check_stacked(name, of_all)
    for (_, places), (_, norm) in zip(norms, found, strict=True):
        for key, merged in _one(norm, axis_name).items():
            leaves[places[key]] = merged
    return jax.tree.unflatten(structure, leaves)


def _norms(tree: Any, path: tuple) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The path of each mean beside a var in a tree, and its leaves there by name."""
    if isinstance(tree, list | tuple):
        items: Any = enumerate(tree)
    elif isinstance(tree, Mapping):
        items = tree.items()
        # A leaf may be in a box, of nnx or of linen's metadata.
        leaves = {
            k: jax.tree.leaves(tree[k])
            for k in ("mean", "var", "count", "skipped")
            if k in tree and not isinstance(tree[k], Mapping)
        }
        of_one = {k: found[0] for k, found in leaves.items() if len(found) == 1}
        if "mean" in of_one and "var" in of_one:
            yield path, of_one
    else:
        return
    for key, branch in items:
        yield from _norms(branch, (*path, key))


def _check_norm(name: str, path: tuple, norm: dict) -> None:
    """Refuses a mean and a var that are not those of one norm."""
    mean, var = norm["mean"], norm["var"]
    if not all(jnp.issubdtype(a.dtype, jnp.inexact) for a in (mean, var)):
        raise _check.error(
            TypeError,
            name,
            "mean and var must be floating",
            f"{_joined(path)}: mean of {mean.dtype}, var of {var.dtype}",
            "Pass statistics as a norm keeps them",
        )
    if mean.shape != var.shape:
        raise _check.error(
            ValueError,
            name,
            "mean and var must have one shape, with the replicas first where there is"
            " no axis_name",
            f"{_joined(path)}: mean of shape {mean.shape}, var of shape {var.shape}",
            "Pass the statistics of one model, of all its replicas",
        )


def _joined(path: tuple) -> str:
    return "/".join(map(str, path)) or "the tree"


def _one(norm: dict[str, jax.Array], axis_name: Any) -> dict[str, jax.Array]:
    """The statistics of one norm, merged."""
    mean, var = norm["mean"], norm["var"]
    dtype = _numbers.statistics_dtype(mean, var.dtype)
    m = Moments(
        jnp.ones(var.shape, dtype), _numbers.widened(mean, dtype), var.astype(dtype)
    )
    if axis_name is None:
        m = _moments.merge(m, 0)
    else:
        m = _devices.across_devices(m, Reduction((), names=axis_name), "alike")
    merged = {
        "mean": jnp.broadcast_to(m.mean + m.rest, mean.shape).astype(mean.dtype),
        "var": jnp.broadcast_to(m.var, var.shape).astype(var.dtype),
    }
    for counter in {"count", "skipped"} & norm.keys():
        merged[counter] = _largest(norm[counter], axis_name)
    return merged


def _largest(count: jax.Array, axis_name: Any) -> jax.Array:
    """The largest of the counts of all replicas, for each of them."""
    if axis_name is not None:
        return lax.pmax(count, axis_name)
    return jnp.broadcast_to(count.max(0, keepdims=True), count.shape)
