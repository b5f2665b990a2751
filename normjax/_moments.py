"""Moments: take them, merge them, and merge them across devices.

This is the only file that talks to named device axes.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax import _axes, _check

# Up to this many bytes, moments cross the devices in one all-reduce of a buffer with a
# row for each device; above, in two all-reduces of one row each.
ONE_ALL_REDUCE_BYTES = 256 * 1024

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

    Attributes:
      count: how many values were counted, real, at least float32.
      mean: their mean, of the same shape.
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
        if isinstance(self.carry, float) and hasattr(self.count, "dtype"):
            object.__setattr__(self, "carry", jnp.zeros_like(self.count))
        if isinstance(self.rest, float) and hasattr(self.mean, "dtype"):
            object.__setattr__(self, "rest", jnp.zeros_like(self.mean))

    @classmethod
    def empty(cls, shape: Any, dtype: Any = jnp.float32) -> "Moments":
        """Returns the moments of nothing: the identity of merge, and a stream's start.

        Args:
          shape: of the moments.
          dtype: of the moments.

        Returns:
          Moments with count 0, mean 0, var 1.

        Example:
          >>> import jax, jax.numpy as jnp, normjax
          >>> batches = jnp.arange(12.0).reshape(3, 4, 1)
          >>> def step(m, x):
          ...     return m.merge(normjax.moments(x, 0)), None
          >>> m, _ = jax.lax.scan(step, normjax.Moments.empty((1, 1)), batches)
          >>> m.count, m.mean
          (Array([[12.]], dtype=float32), Array([[5.5]], dtype=float32))
        """
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.ones(shape, dtype), zeros)

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
          ValueError: if the shapes differ.

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> m = normjax.moments(jnp.array([1.0, 2.0, 3.0]), 0)
          >>> n = normjax.moments(jnp.array([5.0]), 0)
          >>> m.merge(n).count, m.merge(n).var
          (Array([4.], dtype=float32), Array([2.1875], dtype=float32))
        """
        if self.shape != other.shape:
            raise _check.error(
                ValueError,
                "Moments.merge",
                "both moments must have one shape",
                f"shapes {self.shape} and {other.shape}",
                "Take both over the same axes",
            )
        m, n = uniform(self), uniform(other)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), m, n)
        merged = _first(merge(both, 0))
        # The sum of two and its exact rounding error; the limbs of `merge` have an end.
        count, lost = _exact_sum(m.count, n.count)
        count, carry = _exact_sum(count, lost + (m.carry + n.carry))
        return dataclasses.replace(merged, count=count, carry=carry)


def uniform(m: Moments) -> Moments:
    """Gives all fields of moments that were built by hand the shape of the mean."""
    return jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a), m.shape), m)


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
      centered: whether the variance is about the mean, or about zero.
    """

    axes: tuple[int, ...]
    group_axes: tuple[int, ...] = ()
    num_groups: int = 0
    names: tuple = ()
    centered: bool = True


def statistics_dtype(x: jax.Array, dtype: Any = None) -> Any:
    """The dtype statistics accumulate in: float32 or what x or y have beyond it."""
    dtypes = [jnp.dtype(jnp.float32), x.dtype, x.dtype if dtype is None else dtype]
    return max(dtypes, key=lambda d: jnp.finfo(d).bits)


def own(a: jax.Array, copy: int) -> jax.Array:
    """Gives a consumer its own copy of a small array, numbered from 1 among them.

    XLA on a CPU stores an expression that two consumers share, though it has the size
    of x and costs less to compute again. With a copy of the small operand for each, the
    expressions differ, and nothing of the size of x is stored.
    """
    # XLA merges barriers of one operand: each copy is a barrier around the one before.
    for _ in range(copy):
        a = lax.optimization_barrier(a)
    return a


def counted(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeroes what does not count, so that NaN there leaves no trace."""
    if where is None:
        return x
    return jnp.where(_axes.sharded_like(where, x), x, jnp.zeros_like(x))


def divided(total: jax.Array, count: jax.Array, empty: float = 0.0) -> jax.Array:
    """``total / count``; where nothing was counted the total is 0, and this ``empty``.

    By arithmetic, since on an explicit mesh a select wants both sharded alike.
    """
    nothing = (count == 0).astype(total.dtype)
    quotient = total / (count + nothing)
    return quotient + empty * nothing if empty else quotient


def take(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Takes the moments of x, to broadcast against x.

    First over the axes, channel by channel; then channels merge into groups, and
    devices into one batch.
    """
    m = _local(x, where, r, dtype)
    if r.group_axes:
        members = jax.tree.map(
            lambda a: _axes.split_groups(a, r.group_axes, r.num_groups), m
        )
        m = merge(members, -1)
    if r.names:
        m = _across_devices(m, r, even=where is None)
    if r.group_axes:
        shape = tuple(1 if a in r.axes else n for a, n in enumerate(x.shape))
        m = jax.tree.map(lambda a: _axes.join_groups(a, r.group_axes, shape), m)
    return m


def _local(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Moments over r.axes: the mean, then the distances from it and their squares.

    E[x**2] - E[x]**2 takes one pass and loses all digits when mean / std is large.
    """

    def total(a):
        return a.sum(r.axes, keepdims=True)

    x = counted(x, where).astype(dtype)
    count, carry = _count(x, where, r.axes, dtype)
    if not r.centered:
        var = divided(total(jnp.square(x)), count, empty=1.0)
        return Moments(count, jnp.zeros_like(var), var, carry)
    mean = _fixed(divided(total(x), count))
    rest = divided(total(counted(x - own(mean, 1), where)), count)
    spread = total(jnp.square(counted(x - own(mean, 2), where)))
    var = jnp.maximum(divided(spread, count, empty=1.0) - jnp.square(rest), 0)
    return _in_two_parts(count, mean, rest, var, carry)


def _fixed(a: jax.Array) -> jax.Array:
    """Rounds a small array to one bit less than its dtype has.

    All its uses then see the same number. Else XLA may compute a mean, a product, anew
    in each fusion that uses it, and contract it there with the sum that follows.
    """
    info = jnp.finfo(a.dtype)
    return lax.reduce_precision(a, info.nexp, info.nmant - 1)


def _in_two_parts(count, near, rest, var, carry) -> Moments:
    """Moments with the mean ``near + rest``, where near is fixed and rest small."""
    rest = _fixed(rest)
    mean = near + rest
    return Moments(count, mean, var, carry, (near - mean) + rest)


def _count(x: jax.Array, where: jax.Array | None, axes: tuple[int, ...], dtype: Any):
    """Counts values, as (count, carry) with the shape of the moments."""
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    n = math.prod(x.shape[a] for a in axes)
    if where is None:
        count = jnp.asarray(n, dtype)
        carry = jnp.asarray(n - int(jnp.finfo(dtype).dtype.type(n)), dtype)
        return jnp.broadcast_to(count, shape), jnp.broadcast_to(carry, shape)
    # A sum in the dtype of the statistics shares their all-reduce, where it is exact.
    exact = n < 1 / jnp.finfo(dtype).eps
    wide = jnp.broadcast_to(where, x.shape)
    total = wide.sum(axes, keepdims=True, dtype=dtype if exact else jnp.int32)
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
      ValueError: if ``m`` has no such axis.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> by_channel = normjax.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
      >>> normjax.merge(by_channel, axis=1).mean
      Array([[3.]], dtype=float32)
    """
    (axis,) = _axes.canonical("merge", axis, len(m.shape))
    m = uniform(m)
    count, carry = _join_limbs(*(a.sum(axis, keepdims=True) for a in _limbs(m)))
    share = divided(m.count, count)
    mean = _fixed((share * m.mean).sum(axis, keepdims=True))
    off = (m.mean - mean) + m.rest
    rest = (share * off).sum(axis, keepdims=True)
    spread = m.var + jnp.square(off - rest)
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


def _across_devices(m: Moments, r: Reduction, even: bool) -> Moments:
    """Merges the moments of all devices along r.names.

    Exactly, where a plain psum of (count, sum, sum of squares) would be as unsafe as
    E[x**2] - E[x]**2: each device writes its moments into its own row of zeros, one
    psum fills all rows everywhere, and the rows are merged. Counts that are even, the
    same on each device, need not travel.
    """
    if not r.centered:
        (total,), count, carry = _sums([m.count * m.var], m, r, even)
        return Moments(count, jnp.zeros_like(total), divided(total, count, 1.0), carry)
    size = lax.axis_size(r.names)
    rows = [m.mean, m.rest, m.var] + ([] if even else [m.count, m.carry])
    buffer = jnp.stack(rows)[None]
    if size * buffer.size * buffer.dtype.itemsize > ONE_ALL_REDUCE_BYTES:
        return _across_devices_twice(m, r, even)
    mine = jnp.arange(size, dtype=jnp.int32) == lax.axis_index(r.names)
    mine = mine.reshape(size, *(1 for _ in buffer.shape[1:]))
    buffer = lax.psum(jnp.where(mine, buffer, jnp.zeros_like(buffer)), r.names)
    mean, rest, var, *counts = (buffer[:, i] for i in range(buffer.shape[1]))
    if even:
        counts = [jnp.broadcast_to(a, mean.shape) for a in (m.count, m.carry)]
    return _first(merge(Moments(counts[0], mean, var, counts[1], rest), 0))


def _across_devices_twice(m: Moments, r: Reduction, even: bool) -> Moments:
    """`_across_devices` for large moments: first means, then distances from them."""
    (total,), count, carry = _sums([m.count * m.mean], m, r, even)
    mean = _fixed(divided(total, count))
    off = (m.mean - mean) + m.rest
    terms = [m.count * off, m.count * (m.var + jnp.square(off))]
    rest, spread = (divided(a, count) for a in lax.psum(jnp.stack(terms), r.names))
    var = jnp.maximum(spread - jnp.square(rest), 0) + (count == 0).astype(spread.dtype)
    return _in_two_parts(count, mean, rest, var, carry)


def _sums(terms: list, m: Moments, r: Reduction, even: bool):
    """Adds up terms and counts over the devices, in one all-reduce."""
    high, low = _limbs(m)
    if even:
        size = lax.axis_size(r.names)
        return lax.psum(jnp.stack(terms), r.names), *_join_limbs(
            high * size, low * size
        )
    *terms, high, low = lax.psum(jnp.stack([*terms, high, low]), r.names)
    return terms, *_join_limbs(high, low)


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
        terms = list(lax.psum(jnp.stack(terms), r.names))
    if r.group_axes:
        terms = [_axes.join_groups(t, r.group_axes, shape) for t in terms]
    return [divided(t, m.count) for t in terms]


def moments(
    x: Any,
    axis: _axes.Axes,
    *,
    where: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> Moments:
    """Takes the moments of ``x`` over ``axis``.

    ``mean = sum(x) / count`` and ``var = sum((x - mean)**2) / count``, corrected for
    the rounding of the mean, in at least float32: right for data far from zero.

    Args:
      x: ``[...]``, floating.
      axis: the axes reduced; they are kept with size 1.
      where: boolean, broadcasts to ``x``: which values count. None: all.
      axis_name: device axes, one or several, over which the moments are merged, exactly
        and weighted by count.
      axis_index_groups: sub-groups of devices; not supported yet.

    Returns:
      `Moments` of the shape of ``x`` with the reduced axes of size 1.

    Raises:
      TypeError: if ``x`` is not floating or ``where`` not boolean.
      ValueError: if an axis is out of range or given twice, ``where`` does not
        broadcast or has one axis less than ``x``, or an axis name is not bound.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> m = normjax.moments(jnp.array([[1.0, 2.0, 3.0, 9.0]]), axis=-1)
      >>> m.count, m.mean
      (Array([[4.]], dtype=float32), Array([[3.75]], dtype=float32))
      >>> m.var
      Array([[9.6875]], dtype=float32)
    """
    name = "moments"
    x = _check.floating(name, x)
    r = Reduction(
        axes=_axes.canonical(name, axis, x.ndim),
        names=_check.axis_names(name, axis_name, axis_index_groups),
    )
    where = _check.where(name, where, x.shape)
    return take(x, where, r, statistics_dtype(x))
