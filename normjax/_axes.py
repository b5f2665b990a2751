"""Axis words: canonical axes, complement, groups, and vectors laid along axes."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normjax import _check
from normjax._types import Axes as Axes


def _are_several(value: Any) -> bool:
    """Whether a value is a sequence; letters and bytes are none of axes."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.ndim > 0 and _check.may_be_integers(value)
    letters = (str, bytes, bytearray, memoryview)
    return isinstance(value, Sequence) and not isinstance(value, letters)


def canonical(name: str, axis: Any, ndim: int, what: str = "axis") -> tuple[int, ...]:
    """Returns ``axis`` as axes counted from the front, in the order given."""
    several = _are_several(axis)
    axes = tuple(axis) if several else (axis,)
    if not all(map(_check.is_integer, axes)):
        raise _check.error(
            TypeError,
            name,
            f"{what} must be an integer or several",
            _check.shown(what, axis),
            f"Pass {what}=-1, say",
        )
    axes = tuple(map(operator.index, axes))
    axis = axes if several else axes[0]
    if any(not -ndim <= a < ndim for a in axes):
        raise _check.error(
            ValueError,
            name,
            f"{what} must lie in [{-ndim}, {ndim}), since x has {ndim} axes",
            f"{what}={axis}",
            f"Pass {what}=-1, say",
        )
    found = tuple(a % ndim for a in axes)
    if len(set(found)) != len(found):
        raise _check.error(
            ValueError,
            name,
            f"{what} must name each axis once",
            f"{what}={axis} for {ndim} axes",
            f"Pass {what}={tuple(dict.fromkeys(found))}",
        )
    return found


def one(name: str, axis: Any, ndim: int) -> int:
    """Returns ``axis``, counted from the front, if it is one."""
    axes = canonical(name, axis, ndim)
    if len(axes) != 1:
        raise _check.error(
            ValueError,
            name,
            "axis must be one",
            f"axis={axes}",
            "Call it once for each",
        )
    return axes[0]


def shape(name: str, value: Any) -> tuple:
    """Returns a shape, an integer or several, as a tuple."""
    sizes = tuple(value) if _are_several(value) else (value,)
    known = [n for n in sizes if not jax.export.is_symbolic_dim(n)]
    if not all(map(_check.is_integer, known)):
        raise _check.error(
            TypeError,
            name,
            "shape must be an integer or several",
            _check.shown("shape", value),
            "Pass shape=(), say, or that of the features",
        )
    if any(not 0 <= operator.index(n) < 2**63 for n in known):
        raise _check.error(
            ValueError,
            name,
            "shape must have sizes that are not negative, and fit 64 bits",
            _check.shown("shape", value),
            "Pass the shape of the features",
        )
    return sizes


def others(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes that are not in ``axes``."""
    return tuple(a for a in range(ndim) if a not in axes)


def space(
    name: str, axis: Axes | None, features: tuple[int, ...], ndim: int
) -> tuple[int, ...]:
    """Returns ``axis``, or all axes but the features and the batch, which leads."""
    if axis is None:
        return others(features, ndim)[1:]
    axes = canonical(name, axis, ndim)
    if set(axes) & set(features):
        raise _check.error(
            ValueError,
            name,
            "axis, the axes reduced, must not contain a feature axis",
            f"axis={axes}, feature axes {features} of {ndim}",
            f"Pass axis={tuple(a for a in axes if a not in features)}",
        )
    return axes


def lay(
    name: str, what: str, v: Any, axes: tuple[int, ...], shape: tuple[int, ...]
) -> Any:
    """Returns ``v`` with the rank of x, ready to broadcast against it; None for None.

    A ``v`` whose rank is the number of ``axes`` lies along those axes in order; any
    other must have the rank of x already, and so has one where ``axes`` are all axes
    of x. Nothing is guessed beyond that: ``[C]`` on ``[N, C, H, C]`` must not scale the
    wrong axis.
    """
    if v is None:
        return None
    v = _check.array(name, what, v)
    if not jnp.issubdtype(v.dtype, jnp.inexact):
        raise _check.error(
            TypeError,
            name,
            f"{what} must be floating or complex",
            f"{what}.dtype={v.dtype}",
            f"Pass {what}.astype(jnp.float32)",
        )
    along = tuple(shape[a] for a in axes)
    if v.shape == along and len(axes) < len(shape):
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        v = v if order == list(range(len(axes))) else v.transpose(order)
        return v.reshape([n if a in axes else 1 for a, n in enumerate(shape)])
    if v.ndim == len(shape) and all(
        n in (1, m) for n, m in zip(v.shape, shape, strict=True)
    ):
        return v
    raise _check.error(
        ValueError,
        name,
        f"{what} must have shape {along}, to lie along axes {axes} of x, or the rank"
        " of x and broadcast to it",
        f"{what}.shape={v.shape}, x.shape={shape}",
        f"Reshape {what}, or pass the axes that it lies along",
    )


def divisor(name: str, what: str, value: Any, axes: Any, of: str, shape: Any) -> int:
    """Returns ``value``, called ``what``, if it divides the size of ``axes`` of x."""
    size = math.prod(shape[a] for a in axes)
    if not _check.is_integer(value):
        raise _check.error(
            TypeError,
            name,
            f"{what} must be an integer",
            _check.shown(what, value),
            f"Pass {what}=32, say",
        )
    value = operator.index(value)
    if value >= 1 and not isinstance(size, int):  # that jax.export leaves open
        rest = size % value
        if isinstance(rest, int) and rest == 0:
            return value
        raise _check.error(
            ValueError,
            name,
            f"{what} must divide the number of {of}, whatever it is",
            f"{what}={value}, x.shape={shape}",
            f"Write {value}*n for the size in jax.export.symbolic_shape, or pass it"
            f" constraints=('mod({size}, {value}) == 0',)",
        )
    if value < 1 or size % value:
        size = size if isinstance(size, int) else 1
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        below = [d for d in divisors if d < value][-1:]
        above = [d for d in divisors if d > value][:1]
        nearest = " or ".join(map(str, below + above)) or f"none, there are no {of}"
        raise _check.error(
            ValueError,
            name,
            f"{what} must divide the number of {of}",
            f"{what}={value}, x.shape={shape}",
            f"Nearest: {nearest}",
        )
    return value


def split_groups(a: jax.Array, axes: tuple[int, ...], num_groups: int) -> jax.Array:
    """Gathers ``axes`` of a small array into two last ones, (groups, members)."""
    features = math.prod(a.shape[x] for x in axes)
    rest = others(axes, a.ndim)
    shape = [*(a.shape[x] for x in rest), num_groups, features // num_groups]
    # First one axis of all features: what an explicit mesh shards may not move with it.
    joined = _whole(a, axes).transpose(rest + axes).reshape(*shape[:-2], features)
    return joined.reshape(shape)


def join_groups(
    a: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Undoes `split_groups`: gives each member, of ``shape``, its group's value."""
    rest = others(axes, len(shape))
    order = rest + axes
    features = math.prod(shape[x] for x in axes)
    a = jnp.broadcast_to(a, (*a.shape[:-1], features // a.shape[-2]))
    inverse = tuple(order.index(x) for x in range(len(shape)))
    a = a.reshape(*a.shape[:-2], features)
    return a.reshape([shape[x] for x in order]).transpose(inverse)


def sharded_like(a: jax.Array, x: jax.Array) -> jax.Array:
    """Lays an array that broadcasts to x, a mask, say, over the devices as x lies.

    On an explicit mesh a select needs it, and so does a stack.
    """
    sharding = _explicit(x)
    if sharding is None:
        return a
    return jax.sharding.reshard(jnp.broadcast_to(a, x.shape), sharding)


def lying_like(a: jax.Array, x: jax.Array) -> jax.Array:
    """Lays an array over an explicit mesh as x, along axes that are as long in both."""
    sharding = _explicit(x)
    if sharding is None:
        return a
    same = zip(a.shape, x.shape, lies_over(x), strict=True)
    spec = PartitionSpec(*(names if m == n else None for m, n, names in same))
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, spec))


def _explicit(a: jax.Array) -> Any:
    """How an array lies on an explicit mesh, None for on none.

    With the devices themselves where it is there already, since no mesh need be in use.
    """
    sharding: Any = jax.typeof(a).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    here = isinstance(a, jax.Array) and _check.is_concrete(a)
    return a.sharding if here else sharding


def is_on_explicit_mesh(a: jax.Array) -> bool:
    """Whether an array lies on an explicit mesh, over its axes or on each device."""
    return _explicit(a) is not None


def are_whole() -> bool:
    """Whether all mesh axes are manual here: arrays are what a device has."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def lies_over(a: jax.Array) -> tuple:
    """Over which axes of an explicit mesh each axis of an array lies; None for none."""
    if _explicit(a) is None:
        return (None,) * a.ndim
    return tuple(jax.typeof(a).sharding.spec)


def pieces(x: jax.Array, axis: int) -> int:
    """Into how many pieces an explicit mesh shards an axis."""
    names = lies_over(x)[axis]
    names = names if isinstance(names, tuple) else (names,)
    sizes = jax.typeof(x).sharding.mesh.shape
    return math.prod(sizes[name] for name in names if name is not None)


def _whole(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Gathers a small array along ``axes`` where an explicit mesh shards them.

    An explicit mesh refuses to split a sharded axis whose shards are not whole groups.
    """
    over = lies_over(a)
    spec = [None if i in axes else s for i, s in enumerate(over)]
    if spec == list(over):
        return a
    mesh = _explicit(a).mesh
    return jax.sharding.reshard(a, NamedSharding(mesh, PartitionSpec(*spec)))


def features_of(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Undoes `lay`: drops the axes of size 1, leaving ``axes`` in their order."""
    return a.transpose(others(axes, a.ndim) + axes).reshape([a.shape[x] for x in axes])
