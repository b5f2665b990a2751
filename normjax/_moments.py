"""Moments: take them, merge them, and merge them across devices.

This is the only file that talks to named device axes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import _axes, _check
from normjax._types import ArrayLike, Axes, AxisNames, DTypeLike, Groups

# Up to this many bytes, moments cross the devices in one all-reduce of a buffer with a
# row for each device; above, in two all-reduces of one row each.
ONE_ALL_REDUCE_BYTES = 1024 * 1024

# Counts are added in two limbs, multiples of this and the rest, so that float32 holds
# their sums exactly far beyond its 2**24.
_LIMB = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """How many values there were, their mean, and their mean squared distance from it.

    ``var`` is the biased variance, ``sum(|x - mean|**2) / count``; the unbiased one is
    ``var * count / (count - 1)``. Uncentered moments (`rms_norm`) have mean 0 and
    ``var = sum(|x|**2) / count``. Where nothing was counted, count is 0, mean 0, var 1.
    With weights, every sum is weighted, and count is the sum of the weights.

    Attributes:
      count: how many values were counted, real, at least float32.
      mean: their mean, of the same shape; complex where the values are.
      var: their biased variance, real, of the same shape.
      carry: what the dtype of ``count`` could not hold: ``count + carry`` is exact in a
        stream of any length, where float32 alone would stop at 2**24.
      rest: what the dtype of ``mean`` could not hold: ``mean + rest`` has about twice
        its digits, for data far from zero.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]])
      >>> normjax.moments(x, axis=0).mean
      Array([[3., 4.]], dtype=float32)
      >>> first, rest = normjax.moments(x[:1], 0), normjax.moments(x[1:], 0)
      >>> first.merge(rest).mean
      Array([[3., 4.]], dtype=float32)
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array
    carry: jax.Array | float = 0.0
    rest: jax.Array | float = 0.0

    def __post_init__(self):
        # Left out, they become arrays like the others, so that moments built by hand
        # can be mapped, stacked and carried through a scan.
        if isinstance(self.carry, float) and _check.has_known_dtype(self.count):
            object.__setattr__(self, "carry", jnp.zeros_like(self.count))
        if isinstance(self.rest, float) and _check.has_known_dtype(self.mean):
            object.__setattr__(self, "rest", jnp.zeros_like(self.mean))

    @classmethod
    def empty(cls, shape: Axes, dtype: DTypeLike = jnp.float32) -> "Moments":
        """Returns the moments of nothing: the identity of merge, and a stream's start.

        Args:
          shape: of the moments, an integer or several.
          dtype: of the moments, at least float32; complex for a complex mean.

        Returns:
          Moments with count 0, mean 0, var 1.

        Raises:
          TypeError: if ``dtype`` is an integer or holds less than float32, or ``shape``
            is no shape.
          ValueError: if ``shape`` has a negative size.

        Example:
          >>> import jax, jax.numpy as jnp, normjax
          >>> batches = jnp.arange(12.0).reshape(3, 4, 1)
          >>> def step(m, x):
          ...     return m.merge(normjax.moments(x, 0)), None
          >>> m, _ = jax.lax.scan(step, normjax.Moments.empty((1, 1)), batches)
          >>> m.count, m.mean
          (Array([[12.]], dtype=float32), Array([[5.5]], dtype=float32))
        """
        shape = _axes.shape("Moments.empty", shape)
        dtype = _check.statistics_dtype("Moments.empty", dtype)
        zeros = jnp.zeros(shape, jnp.finfo(dtype).dtype)
        none = zeros.astype(dtype)
        return cls(zeros, none, jnp.ones_like(zeros), zeros, none)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mean."""
        return jnp.shape(self.mean)

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of values together.

        The merge of Chan, Golub and LeVeque
        (http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf): exact,
        associative, and with moments of count 0 as its identity.

        Args:
          other: moments of the same shape as these.

        Returns:
          The merged moments, of the same shape.

        Raises:
          TypeError: if ``other`` is no `Moments`, or a field no array of its kind.
          ValueError: if the shapes differ.

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> m = normjax.moments(jnp.array([1.0, 2.0, 3.0]), 0)
          >>> n = normjax.moments(jnp.array([5.0]), 0)
          >>> m.merge(n).count, m.merge(n).var
          (Array([4.], dtype=float32), Array([2.1875], dtype=float32))
        """
        first = uniform("Moments.merge", self, "moments")
        other = uniform("Moments.merge", other, "other")
        if first.shape != other.shape:
            raise _check.error(
                ValueError,
                "Moments.merge",
                "both moments must have one shape",
                f"shapes {first.shape} and {other.shape}",
                "Take both over the same axes",
            )
        m, n = first, laid_like(other, first.mean)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), m, n)
        merged = _first(merge(both, 0))
        # The sum of two and its exact rounding error; the limbs of `merge` have an end.
        count, lost = _exact_sum(m.count, n.count)
        count, carry = _exact_sum(count, lost + (m.carry + n.carry))
        return dataclasses.replace(merged, count=count, carry=carry)


def uniform(name: str, m: Any, what: str = "moments") -> Moments:
    """Gives all fields of moments that were built by hand the shape of the mean.

    Refuses what are no moments, and fields that are no arrays of their kind.
    """
    if not isinstance(m, Moments):
        raise _check.error(
            TypeError,
            name,
            f"{what} must be Moments",
            _check.shown(what, m),
            "Pass what moments or batch_norm returns; of running moments, what read()"
            " does",
        )
    fields = {k: _check.statistic(name, k, what, v) for k, v in vars(m).items()}
    mean = fields["mean"]
    if jnp.iscomplexobj(fields["rest"]) and not jnp.iscomplexobj(mean):
        raise _check.error(
            TypeError,
            name,
            f"{what}.rest must be real, as the mean is",
            f"{what}.rest.dtype={fields['rest'].dtype}, {what}.mean.dtype={mean.dtype}",
            f"Pass {what}.rest.real",
        )
    for k, v in fields.items():
        _check.broadcasts(name, f"{what}.{k}", v.shape, f"{what}.mean", mean.shape)
    return laid_like(dataclasses.replace(m, **fields), mean)


def laid_like(m: Moments, a: jax.Array) -> Moments:
    """Moments whose fields have the shape of ``a``, and lie over a mesh as it does."""
    a = jnp.asarray(a)
    return jax.tree.map(
        lambda field: _axes.sharded_like(jnp.broadcast_to(field, a.shape), a), m
    )


def _exact_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a + b as rounded, and what the rounding left over (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _first(m: Moments) -> Moments:
    return jax.tree.map(lambda a: a[0], m)


class Reduction(NamedTuple):
    """Over what moments are taken; static, one for each call of a norm.

    Attributes:
      axes: axes of x that are summed over.
      group_axes: feature axes whose moments are merged within groups, or ().
      num_groups: into how many groups; 0 where group_axes is ().
      names: device axes over which moments are merged.
      groups: sub-groups of those devices, each of which merges its own, or ().
      centered: whether the variance is about the mean, or about zero.
    """

    axes: tuple[int, ...]
    group_axes: tuple[int, ...] = ()
    num_groups: int = 0
    names: tuple = ()
    groups: tuple[tuple[int, ...], ...] = ()
    centered: bool = True


def statistics_dtype(x: jax.Array, dtype: Any = None) -> Any:
    """The dtype statistics accumulate in: float32 or what x or y have beyond it.

    Real. The mean of complex x has the complex dtype of this precision.
    """
    dtypes = [jnp.float32, x.dtype, x.dtype if dtype is None else dtype]
    return max((jnp.finfo(d).dtype for d in dtypes), key=lambda d: d.itemsize)


def widened(a: jax.Array, dtype: Any) -> jax.Array:
    """Returns ``a`` in a dtype of statistics, or the complex one of its precision."""
    if jnp.iscomplexobj(a):
        dtype = jnp.complex64 if dtype == jnp.float32 else jnp.complex128
    return a.astype(dtype)


def by_parts(f: Callable, a: jax.Array) -> jax.Array:
    """Applies ``f`` to the real and the imaginary part, if there are two."""
    return lax.complex(f(a.real), f(a.imag)) if jnp.iscomplexobj(a) else f(a)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a * b``, where either may be complex and none is made so for it."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(b):
        return a * b
    a, b = (a, b) if jnp.iscomplexobj(a) else (b, a)
    return by_parts(lambda part: part * b, a)


def added(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a + b``, where either may be complex."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(b):
        return a + b
    a, b = (a, b) if jnp.iscomplexobj(a) else (b, a)
    return a + b.astype(a.dtype)


def aligned(a: jax.Array, b: jax.Array) -> jax.Array:
    """``Re(conj(a) * b)``, what the square is to a product: real, linear in both."""
    if jnp.iscomplexobj(a):
        return a.real * b.real + a.imag * b.imag
    return a * b


def squared(a: jax.Array) -> jax.Array:
    """``|a|**2``."""
    return aligned(a, a) if jnp.iscomplexobj(a) else jnp.square(a)


def own(a: jax.Array, copy: int) -> jax.Array:
    """Gives a consumer its own copy of a small array, numbered from 1 among them.

    XLA on a CPU stores an expression that two consumers share, though it has the size
    of x and costs less to compute again. With a copy of the small operand for each, the
    expressions differ, and nothing of the size of x is stored. A copy of 1 / std also
    keeps its square root from being taken anew for each value, and the sums before it
    out of the loop that writes y. Elsewhere a barrier could split a fusion; none is
    set.
    """
    if jax.default_backend() != "cpu":
        return a
    # XLA merges barriers of one operand: each copy is a barrier around the one before.
    for _ in range(copy):
        a = lax.optimization_barrier(a)
    if a.shape[-1] == 1:
        return a
    # What makes an array that lies along the last axis would be computed anew for each
    # value there, in spite of the barrier. Divisions are what XLA leaves out of loops.
    ones = lax.optimization_barrier(jnp.ones(a.shape, jnp.finfo(a.dtype).dtype))
    return by_parts(lambda part: part / ones, a)


def counted(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeroes what does not count, so that NaN there leaves no trace."""
    if where is None:
        return x
    if where.dtype != jnp.bool_:
        where = where > 0
    return jnp.where(_axes.sharded_like(where, x), x, jnp.zeros_like(x))


def weighed(a: jax.Array, where: jax.Array | None) -> jax.Array:
    """Multiplies by the weights, where there are other ones than 0 and 1.

    What does not count is zero already.
    """
    if where is None or where.dtype == jnp.bool_:
        return a
    weights = where.astype(jnp.finfo(a.dtype).dtype)
    return product(a, _axes.sharded_like(weights, a))


def divided(total: jax.Array, count: jax.Array, empty: float = 0.0) -> jax.Array:
    """``total / count``; where nothing was counted the total is 0, and this ``empty``.

    By arithmetic, since on an explicit mesh a select wants both sharded alike.
    """
    nothing = (count == 0).astype(count.dtype)
    quotient = by_parts(lambda part: part / (count + nothing), total)
    return quotient + empty * nothing if empty else quotient


def take(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Takes the moments of x, to broadcast against x.

    First over the axes, channel by channel; then channels merge into groups, and
    devices into one batch.
    """
    m = _local(x, where, r, dtype)
    m = laid_like(m, m.mean)  # a count without a mask lies nowhere yet
    if r.group_axes:
        members = jax.tree.map(
            lambda a: _axes.split_groups(a, r.group_axes, r.num_groups), m
        )
        m = merge(members, -1)
    if r.names:
        m = across_devices(m, r, even=where is None)
    if r.group_axes:
        shape = tuple(1 if a in r.axes else n for a, n in enumerate(x.shape))
        m = jax.tree.map(lambda a: _axes.join_groups(a, r.group_axes, shape), m)
    return m


def _local(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Moments over r.axes: the mean, then the distances from it and their squares.

    E[x**2] - E[x]**2 takes one pass and loses all digits when mean / std is large.
    """
    if where is not None and where.dtype != jnp.bool_:
        # What does not count is not there, to derivatives by the weight either.
        where = jnp.where(where > 0, where, jnp.zeros_like(where))

    def total(a):
        return weighed(a, where).sum(r.axes, keepdims=True)

    x = widened(counted(x, where), dtype)
    count, carry = _count(x, where, r.axes, dtype)
    if not r.centered:
        var = divided(total(squared(x)), count, empty=1.0)
        return Moments(count, jnp.zeros_like(var, dtype=x.dtype), var, carry)
    mean = _fixed(divided(total(x), count))
    rest = divided(total(counted(x - own(mean, 1), where)), count)
    spread = total(squared(counted(x - own(mean, 2), where)))
    var = jnp.maximum(divided(spread, count, empty=1.0) - squared(rest), 0)
    return _in_two_parts(count, mean, rest, var, carry)


def _fixed(a: jax.Array) -> jax.Array:
    """Rounds a small array to one bit less than its dtype has.

    All its uses then see the same number. Else XLA may compute a mean, a product, anew
    in each fusion that uses it, and contract it there with the sum that follows.
    """
    info = jnp.finfo(a.dtype)
    return by_parts(lambda p: lax.reduce_precision(p, info.nexp, info.nmant - 1), a)


def _in_two_parts(count, near, rest, var, carry) -> Moments:
    """Moments with the mean ``near + rest``, where near is fixed and rest small."""
    rest = _fixed(rest)
    mean = near + rest
    return Moments(count, mean, var, carry, (near - mean) + rest)


def _count(x: jax.Array, where: jax.Array | None, axes: tuple[int, ...], dtype: Any):
    """Counts values, as (count, carry) with the shape of the moments."""
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    n = math.prod(x.shape[a] for a in axes)
    if where is not None:
        where = jnp.broadcast_to(_axes.sharded_like(where, x), x.shape)
    if where is None and isinstance(n, int):
        count = jnp.asarray(n, dtype)
        carry = jnp.asarray(n - int(jnp.finfo(dtype).dtype.type(n)), dtype)
        return jnp.broadcast_to(count, shape), jnp.broadcast_to(carry, shape)
    if where is None:  # of a size that jax.export leaves open
        total = jnp.broadcast_to(jnp.asarray(n), shape)
    elif where.dtype != jnp.bool_:
        count = where.sum(axes, keepdims=True, dtype=dtype)
        return count, jnp.zeros_like(count)
    else:
        # A sum in the dtype of statistics shares their all-reduce, where it is exact.
        exact = isinstance(n, int) and n < 1 / jnp.finfo(dtype).eps
        of = dtype if exact else jnp.int32
        total = where.sum(axes, keepdims=True, dtype=of)
    count = total.astype(dtype)
    return count, (total - count.astype(total.dtype)).astype(dtype)


def merge(m: Moments, axis: int) -> Moments:
    """Merges an array of moments along an axis.

    What `Moments.merge` does to two, for any number: channels of a group, devices of a
    global batch, batches of a population.

    Args:
      m: moments of shape ``[..., K, ...]``.
      axis: the axis of length K to merge along.

    Returns:
      Moments of shape ``[..., 1, ...]``.

    Raises:
      TypeError: if ``m`` is no `Moments`, or a field no array of its kind.
      ValueError: if ``m`` has no such axis, or its fields do not broadcast to the mean.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> by_channel = normjax.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
      >>> normjax.merge(by_channel, axis=1).mean
      Array([[3.]], dtype=float32)
    """
    m = uniform("merge", m, "m")
    axis = _axes.one("merge", axis, len(m.shape))
    count, carry = _join_limbs(*(a.sum(axis, keepdims=True) for a in _limbs(m)))
    share = divided(m.count, count)
    mean = _fixed(product(share, m.mean).sum(axis, keepdims=True))
    off = (m.mean - mean) + m.rest
    rest = product(share, off).sum(axis, keepdims=True)
    spread = m.var + squared(off - rest)
    # Shares do not add up to 1 exactly. About var, what they miss is nothing, so that a
    # long stream does not drift. Moments of nothing have var 1; their share is 0.
    var = (share * spread).sum(axis, keepdims=True)
    var = var + (share * (spread - var)).sum(axis, keepdims=True)
    var = var + (count == 0).astype(var.dtype)
    return _in_two_parts(count, mean, rest, var, carry)


def _limbs(m: Moments) -> tuple[jax.Array, jax.Array]:
    low = jnp.mod(m.count, _LIMB)
    return m.count - low, low + m.carry


def _join_limbs(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = high + low
    return count, low - (count - high)


def across_devices(m: Moments, r: Reduction, even: bool) -> Moments:
    """Merges the moments of all devices along r.names, or of those in one's group.

    Exactly, where a plain psum of (count, sum, sum of squares) would be as unsafe as
    E[x**2] - E[x]**2: each device writes its moments into its own row of zeros, one
    psum fills all rows everywhere, and the rows are merged. Counts that are even, the
    same on each device, need not travel. Sub-groups exchange rows among themselves,
    where they can.
    """
    if not r.centered:
        (total,), count, carry = _sums([m.count * m.var], m, r, even)
        return Moments(count, m.mean, divided(total, count, 1.0), carry)
    size = lax.axis_size(r.names)
    fields = [m.mean, m.rest, m.var] + ([] if even else [m.count, m.carry])
    buffer = _packed(fields)
    apart = _are_apart(r, buffer)
    large = size * buffer.size * buffer.dtype.itemsize > ONE_ALL_REDUCE_BYTES
    if large and not apart:
        return _across_devices_twice(m, r, even)
    rows = _of_group(buffer, r) if apart else gathered(buffer, r.names)
    mean, rest, var, *counts = _unpacked(rows, fields, axis=1)
    if even:
        counts = [jnp.broadcast_to(a, var.shape) for a in (m.count, m.carry)]
    m = Moments(counts[0], mean, var, counts[1], rest)
    if r.groups and not apart:
        # As if those of other groups had counted nothing; a product would keep NaN.
        ours = _groups_of(r)[np.arange(size)] == _groups_of(r)[lax.axis_index(r.names)]
        ours = ours.reshape(size, *(1 for _ in var.shape[1:]))
        m = jax.tree.map(lambda a: _alone(a, ours), m)
    return _first(merge(m, 0))


def _across_devices_twice(m: Moments, r: Reduction, even: bool) -> Moments:
    """`across_devices` for large moments: first means, then distances from them."""
    (total,), count, carry = _sums([product(m.count, m.mean)], m, r, even)
    mean = _fixed(divided(total, count))
    off = (m.mean - mean) + m.rest
    terms = [product(m.count, off), m.count * (m.var + squared(off))]
    rest, spread = (divided(a, count) for a in _added_up(terms, r))
    var = jnp.maximum(spread - squared(rest), 0) + (count == 0).astype(spread.dtype)
    return _in_two_parts(count, mean, rest, var, carry)


def _sums(terms: list, m: Moments, r: Reduction, even: bool):
    """Adds up terms and counts over the devices, in one all-reduce."""
    high, low = _limbs(m)
    if even:
        sizes = [len(group) for group in r.groups] or [lax.axis_size(r.names)]
        group = _groups_of(r)[lax.axis_index(r.names)] if r.groups else 0
        size = jnp.asarray(sizes, m.count.dtype)[group]
        return _added_up(terms, r), *_join_limbs(high * size, low * size)
    *terms, high, low = _added_up([*terms, high, low], r)
    return terms, *_join_limbs(high, low)


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
    rows = lax.psum(_alone(packed, mine), r.names)
    return _unpacked(_alone(rows, mine).sum(0), terms)


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
    return lax.psum(_alone(a, mine), names)


def _alone(a: jax.Array, rows: jax.Array) -> jax.Array:
    """Zeroes all but the rows that are marked."""
    return jnp.where(rows, a, jnp.zeros_like(a))


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


def average(terms: list, m: Moments, r: Reduction) -> list:
    """Averages terms of the shape of x over a reduction, all in one all-reduce.

    Each average broadcasts against x, as the moments do; 0 where nothing was counted.
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
    return [divided(t, m.count) for t in terms]


def moments(
    x: ArrayLike,
    axis: Axes,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
) -> Moments:
    """Takes the moments of ``x`` over ``axis``.

    ``mean = sum(x) / count`` and ``var = sum((x - mean)**2) / count``, corrected for
    the rounding of the mean, in at least float32: right for data far from zero.

    Args:
      x: ``[...]``, floating or complex.
      axis: the axes reduced; they are kept with size 1.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. None: all alike.
      axis_name: device axes, one or several, over which the moments are merged, exactly
        and weighted by count.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        merge each their own. None: all devices together.

    Returns:
      `Moments` of the shape of ``x`` with the reduced axes of size 1.

    Raises:
      TypeError: if ``x`` or ``where`` is no array of numbers or one of integers, or an
        axis name is no name.
      ValueError: if an axis is out of range or given twice, ``where`` does not
        broadcast or has one axis less than ``x``, a weight is negative or not finite,
        an axis name is not bound, or groups do not divide the devices.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> m = normjax.moments(jnp.array([[1.0, 2.0, 3.0, 9.0]]), axis=-1)
      >>> m.count, m.mean
      (Array([[4.]], dtype=float32), Array([[3.75]], dtype=float32))
      >>> m.var
      Array([[9.6875]], dtype=float32)
    """
    name = "moments"
    x = _check.inexact(name, x)
    axes = _axes.canonical(name, axis, x.ndim)
    names, groups = _check.devices(name, axis_name, axis_index_groups)
    r = Reduction(axes, names=names, groups=groups)
    where = _check.where(name, where, x.shape)
    return take(x, where, r, statistics_dtype(x))
