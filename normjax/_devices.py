"""Moments and sums across devices: the only file that talks to named device axes."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import _axes
from normjax._moments import (
    SUMMED,
    Moments,
    held,
    in_two_parts,
    in_unit,
    join_limbs,
    limbs,
    merged,
    near_of,
    only,
    opened,
    small_unit,
)
from normjax._numbers import alone, divided, hidden, product, scaled, squared

# Up to this many bytes, moments cross the devices in one all-reduce of a buffer with a
# row for each device; above, in two all-reduces, whose size does not grow.
ONE_ALL_REDUCE_BYTES = 1024 * 1024


class Reduction(NamedTuple):
    """Over what moments are taken; static, one for each call of a norm.

    Attributes:
      axes: axes of x that are summed over.
      group_axes: feature axes whose moments are merged within groups, or ().
      num_groups: into how many groups; 0 where group_axes is ().
      names: device axes over which moments are merged.
      groups: sub-groups of those devices, each of which merges its own, or ().
      centered: whether the variance is about the mean, or about zero.
      whole: whether arrays are known to lie whole on a device.
    """

    axes: tuple[int, ...]
    group_axes: tuple[int, ...] = ()
    num_groups: int = 0
    names: tuple = ()
    groups: tuple[tuple[int, ...], ...] = ()
    centered: bool = True
    whole: bool = False

    def size(self, shape: tuple) -> Any:
        """How many values of x, of this shape, each moment is of on a device.

        A size that is left open may be among the factors.
        """
        in_group = math.prod(shape[a] for a in self.group_axes)
        in_group //= self.num_groups or 1
        return in_group * math.prod(shape[a] for a in self.axes)


def counts_of(where: jax.Array | None) -> str:
    """How values count: as many on each device, "alike", by a "mask", or "weights"."""
    if where is None:
        return "alike"
    return "mask" if where.dtype == jnp.bool_ else "weights"


def across_devices(m: Moments, r: Reduction, counts: str) -> Moments:
    """Merges the moments of all devices along r.names, or of those in one's group.

    Exactly, where a plain psum of (count, sum, sum of squares) would be as unsafe as
    E[x**2] - E[x]**2: each device writes its moments into its own row of zeros, one
    psum fills all rows everywhere, and the rows are merged. Counts that are alike on
    each device need not travel: see `counts_of`. Sub-groups exchange rows among
    themselves, where they can.
    """
    if not r.centered:
        return _across_devices_uncentered(m, r, counts)
    size = lax.axis_size(r.names)
    names = ["mean", "rest", "var"]
    names += {"alike": [], "mask": ["count", "carry"]}.get(
        counts, ["count", "carry", "squares"]
    )
    fields = [getattr(m, name) for name in names]
    buffer = _packed(fields)
    apart = _are_apart(r, buffer)
    large = size * buffer.size * buffer.dtype.itemsize > ONE_ALL_REDUCE_BYTES
    if large and not apart:
        return _across_devices_twice(m, r, counts)
    rows = _of_group(buffer, r) if apart else gathered(buffer, r.names)
    sent = dict(zip(names, _unpacked(rows, fields, axis=1), strict=True))
    for name in ("count", "carry"):
        if name not in sent:
            sent[name] = jnp.broadcast_to(getattr(m, name), sent["var"].shape)
    m = Moments(**sent)
    if r.groups and not apart:
        # As if those of other groups had counted nothing; a product would keep NaN.
        ours = _groups_of(r)[np.arange(size)] == _groups_of(r)[lax.axis_index(r.names)]
        ours = ours.reshape(size, *(1 for _ in m.var.shape[1:]))
        m = jax.tree.map(lambda a: alone(a, ours), m)
    return only(merged(m, 0))


def _across_devices_uncentered(m: Moments, r: Reduction, counts: str) -> Moments:
    """`across_devices` of mean squares, which add up, in both units."""
    small = jnp.full_like(m.var, small_unit(m.var.dtype))
    plain = opened(m).var
    terms = [m.count * plain, m.count * in_unit(m, small)[0]]
    terms, count, carry, squares = _sums(terms, m, r, counts)
    var = held(*(divided(a, count) for a in terms))
    var = var + (count == 0).astype(var.dtype)
    return Moments(count, m.mean, var, carry, squares=squares)


def _across_devices_twice(m: Moments, r: Reduction, counts: str) -> Moments:
    """`across_devices` for large moments: first means, then distances from them.

    Their squares are added up in both units, for their range.
    """
    (total,), *sums = _sums([product(m.count, scaled(m.mean, SUMMED))], m, r, counts)
    count, carry, squares = sums
    near = near_of(divided(total, count))
    summed, unit = hidden([SUMMED, small_unit(m.var.dtype)], m.var.dtype)

    def off(factor):
        mean, middle, rest = (product(a, factor) for a in (m.mean, near, m.rest))
        return (mean - middle) + rest

    small = jnp.broadcast_to(unit, m.var.shape)
    terms = [
        product(m.count, off(summed)),
        m.count * (opened(m).var + squared((m.mean - near) + m.rest)),
        m.count * (in_unit(m, small)[0] + squared(off(unit))),
    ]
    rest, plain, large = (divided(a, count) for a in _added_up(terms, r))
    plain = plain - squared(product(rest, 1 / summed))
    large = large - squared(product(rest, unit / summed))
    var = held(jnp.where(plain < 0, jnp.zeros_like(plain), plain), large)
    var = var + (count == 0).astype(var.dtype)
    mean, rest = in_two_parts(near, product(rest, 1 / summed))
    return Moments(count, mean, var, carry, rest, squares=squares)


def _sums(terms: list, m: Moments, r: Reduction, counts: str) -> tuple:
    """Adds up terms and counts over the devices, in one all-reduce.

    Returns the terms, count, carry and the squares of weights.
    """
    high, low = limbs(m)
    if counts == "alike":
        sizes = [len(group) for group in r.groups] or [lax.axis_size(r.names)]
        group = _groups_of(r)[lax.axis_index(r.names)] if r.groups else 0
        size = jnp.asarray(sizes, m.count.dtype)[group]
        terms, high, low = _added_up(terms, r), high * size, low * size
        squares = None
    else:
        of_weights = [m.squares] if counts == "weights" else []
        sums = _added_up([*terms, high, low, *of_weights], r)
        terms, (high, low, *squares) = sums[: len(terms)], sums[len(terms) :]
        squares = squares[0] if squares else None
    return terms, *join_limbs(high, low), squares


def _added_up(terms: list, r: Reduction) -> list:
    """Adds up each term over the devices, or over those of one's group, in one psum.

    Groups that are not apart have a row each, in a psum over all devices.
    """
    packed = _packed(terms)
    if not r.groups:
        return _unpacked(lax.psum(packed, r.names), terms)
    if _are_apart(r, packed):
        return _unpacked(_of_group(packed, r).sum(0), terms)
    packed = packed[None]
    mine = _row(_groups_of(r)[lax.axis_index(r.names)], len(r.groups), packed)
    rows = lax.psum(alone(packed, mine), r.names)
    return _unpacked(alone(rows, mine).sum(0), terms)


def _are_apart(r: Reduction, a: jax.Array) -> bool:
    """Whether each sub-group can have a collective of its own, of an array.

    All have to be of one size, and of devices: vmap knows no groups. A psum of groups
    is refused under shard_map with check_vma, an all-gather is not; but jax 0.10 takes
    the type of one wrong, of an array that lies over other, explicit axes.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    sizes = {len(group) for group in r.groups}
    return (
        len(sizes) == 1 and set(r.names) <= set(manual) and not any(_axes.lies_over(a))
    )


def _of_group(a: jax.Array, r: Reduction) -> jax.Array:
    """Gathers an array of each device of one's sub-group into rows."""
    return lax.all_gather(a, r.names, axis_index_groups=r.groups)


def _groups_of(r: Reduction) -> jax.Array:
    """The number of the group that each device is in."""
    members = sorted((i, g) for g, group in enumerate(r.groups) for i in group)
    return jnp.asarray([g for _, g in members], jnp.int32)


def _row(index: jax.Array, size: int, like: jax.Array) -> jax.Array:
    """Marks one row of so many, to broadcast against arrays of rows."""
    mine = jnp.arange(size, dtype=jnp.int32) == index
    return mine.reshape(size, *(1 for _ in like.shape[1:]))


def gathered(a: jax.Array, names: tuple) -> jax.Array:
    """Gathers an array of each device into rows that all of them have, in one psum.

    An all-gather would not be typed as replicated.
    """
    a = a[None]
    mine = _row(lax.axis_index(names), lax.axis_size(names), a)
    return lax.psum(alone(a, mine), names)


def _packed(arrays: list) -> jax.Array:
    """Stacks arrays of one shape; a complex one as its two parts."""
    parts = ([a.real, a.imag] if jnp.iscomplexobj(a) else [a] for a in arrays)
    return jnp.stack(list(itertools.chain.from_iterable(parts)))


def _unpacked(packed: jax.Array, like: list, axis: int = 0) -> list:
    """Undoes `_packed`, along an axis."""
    parts = iter(jnp.moveaxis(packed, axis, 0))
    return [
        lax.complex(next(parts), next(parts)) if jnp.iscomplexobj(a) else next(parts)
        for a in like
    ]


def totals(terms: list, r: Reduction) -> list:
    """Adds up terms of the shape of x over a reduction, all in one all-reduce.

    Each total broadcasts against x, as the moments do.
    """
    terms = [t.sum(r.axes, keepdims=True) for t in terms]
    shape = terms[0].shape
    if r.group_axes:
        terms = [
            _axes.split_groups(t, r.group_axes, r.num_groups).sum(-1, keepdims=True)
            for t in terms
        ]
    if r.names:
        terms = _added_up(terms, r)
    if r.group_axes:
        terms = [_axes.join_groups(t, r.group_axes, shape) for t in terms]
    return terms


def average(terms: list, count: jax.Array, r: Reduction) -> list:
    """`totals`, over a count; 0 where nothing was counted."""
    return [divided(t, count) for t in totals(terms, r)]
