"""Moments: take them, merge them, and merge them across devices.

This is the only file that talks to named device axes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from normjax import _axes, _check, _trees
from normjax._types import ArrayLike, Axes, AxisNames, DTypeLike, Groups

# Up to this many bytes, moments cross the devices in one all-reduce of a buffer with a
# row for each device; above, in two all-reduces of one row each.
ONE_ALL_REDUCE_BYTES = 1024 * 1024

# Counts are added in two limbs, multiples of this and the rest, so that float32 holds
# their sums exactly far beyond its 2**24.
_LIMB = 4096

# A unit in which no sum of up to 2**31 values overflows.
_SUMMED = 2.0**-32


@_trees.tree
@dataclasses.dataclass(frozen=True)
class Moments:
    """How many values there were, their mean, and their mean squared distance from it.

    ``var`` is the biased variance, ``sum(|x - mean|**2) / count``; see `unbiased_var`
    for the unbiased one. Uncentered moments (`rms_norm`) have mean 0 and
    ``var = sum(|x|**2) / count``. Where nothing was counted, count is 0, mean 0, var 1.
    With weights, every sum is weighted, and count is the sum of the weights. A variance
    that the dtype cannot hold, of float32 values more than 1.8e19 apart, is inf.

    Attributes:
      count: how many values were counted, real, at least float32.
      mean: their mean, of the same shape; complex where the values are.
      var: their biased variance, real, of the same shape.
      carry: what the dtype of ``count`` could not hold: ``count + carry`` is exact in a
        stream of any length, where float32 alone would stop at 2**24.
      rest: what the dtype of ``mean`` could not hold: ``mean + rest`` has about twice
        its digits, for data far from zero.
      var_rest: what the dtype of ``var`` could not hold, so that a long stream does not
        drift.
      squares: the sum of the squared weights, which is ``count`` where all weights are
        1. If None, ``count``. The unbiased variance needs it.

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
    carry: Any = 0.0
    rest: Any = 0.0
    var_rest: Any = 0.0
    squares: Any = None

    def __post_init__(self):
        _trees.tell_flax()
        # Left out, they become arrays like the others, so that moments built by hand
        # can be mapped, stacked and carried through a scan.
        for name, of in (("carry", "count"), ("rest", "mean"), ("var_rest", "var")):
            a = getattr(self, of)
            if isinstance(getattr(self, name), float) and _check.has_known_dtype(a):
                object.__setattr__(self, name, jnp.zeros_like(a))
        if self.squares is None:
            object.__setattr__(self, "squares", self.count)

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
        return cls(zeros, zeros.astype(dtype), jnp.ones_like(zeros))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mean."""
        return jnp.shape(self.mean)

    @property
    def unbiased_var(self) -> jax.Array:
        """The unbiased variance, NaN of fewer values than two.

        ``var * n / (n - 1)`` with ``n = sum(w)**2 / sum(w**2)``, the count where all
        weights are alike: the form for reliability weights, which does not depend on
        their scale
        (https://en.wikipedia.org/wiki/Weighted_arithmetic_mean#Reliability_weights).

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> normjax.moments(jnp.array([1.0, 2.0, 6.0]), 0).unbiased_var
          Array([7.], dtype=float32)
        """
        var, there = unbiased(self)
        return jnp.where(there, var, jnp.full_like(var, jnp.nan))

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
        merged = opened(_first(_merged(both, 0)))
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


def unbiased(m: Moments) -> tuple[jax.Array, jax.Array]:
    """The unbiased variance, and where there is one; elsewhere it is the biased one.

    Of fewer than 1.001 values by weight, rounding would be most of it.
    """
    n = m.count * divided(m.count, m.squares)
    there = n > 1.001
    return m.var * jnp.where(there, n / jnp.where(there, n - 1, n), 1), there


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


def scaled(a: jax.Array, factor: float) -> jax.Array:
    """``a`` times a number, in its dtype."""
    return by_parts(lambda part: part * jnp.asarray(factor, part.dtype), a)


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


def _small_unit(dtype: Any) -> float:
    """The unit of `unit_of`: of float32 2**-80, of float64 2**-640.

    The square of the largest value in it is far from the end of the dtype.
    """
    return 2.0 ** -(5 * int(jnp.finfo(dtype).maxexp) // 8)


def unit_of(var: jax.Array) -> jax.Array:
    """The power of two in which distances are held: 1, or far below it.

    Within this package, a variance that its dtype cannot hold stands as minus that of
    the values times the small unit, so that no field more is kept or sent for it.
    """
    small = jnp.full_like(var, _small_unit(var.dtype))
    return jnp.where(var < 0, small, jnp.ones_like(var))


def times_square(a: jax.Array, factor: jax.Array) -> jax.Array:
    """``a * factor**2``, where the dtype cannot hold the square.

    XLA would multiply or divide by the square of its own accord.
    """
    return lax.optimization_barrier(a * factor) * factor


def rstd_of(var: jax.Array, epsilon: float) -> jax.Array:
    """``1 / sqrt(var + epsilon)``, of values times their unit."""
    unit = unit_of(var)
    # In a small unit epsilon may be nothing, and so may the variance of constants.
    tiny = jnp.asarray(jnp.finfo(var.dtype).tiny, var.dtype)
    added_ = lax.max(jnp.asarray(epsilon, var.dtype) * unit * unit, tiny)
    return lax.rsqrt(jnp.abs(var) + added_)


def opened(m: Moments) -> Moments:
    """Moments for users: a variance that the dtype cannot hold is inf."""
    held = times_square(-m.var, 1 / unit_of(m.var))
    return dataclasses.replace(m, var=jnp.where(m.var < 0, held, m.var))


def _fits(var: jax.Array) -> jax.Array:
    """Where a variance is not near the end of its dtype, or beyond it."""
    end = 2.0 ** (int(jnp.finfo(var.dtype).maxexp) - 8)
    return var < jnp.asarray(end, var.dtype)


def _held(plain: jax.Array, large: jax.Array) -> jax.Array:
    """The variance as `unit_of` says, from that of the values and that in small units.

    The second is taken where the first does not fit.
    """
    tiny = jnp.asarray(jnp.finfo(plain.dtype).tiny, plain.dtype)
    return jnp.where(_fits(plain), plain, -lax.max(large, tiny))


def take(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Takes the moments of x, to broadcast against x.

    First over the axes, channel by channel; then channels merge into groups, and
    devices into one batch. The variance is as `unit_of` says.
    """
    m = _local(x, where, r, dtype)
    m = laid_like(m, m.mean)  # a count without a mask lies nowhere yet
    if r.group_axes:
        members = jax.tree.map(
            lambda a: _axes.split_groups(a, r.group_axes, r.num_groups), m
        )
        m = _merged(members, -1)
    if r.names:
        m = across_devices(m, r, counts_of(where))
    if r.group_axes:
        shape = tuple(1 if a in r.axes else n for a, n in enumerate(x.shape))
        m = jax.tree.map(lambda a: _axes.join_groups(a, r.group_axes, shape), m)
    return m


def counts_of(where: jax.Array | None) -> str:
    """How values count: as many on each device, "alike", by a "mask", or "weights"."""
    if where is None:
        return "alike"
    return "mask" if where.dtype == jnp.bool_ else "weights"


def _local(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Moments over r.axes: the mean, then the distances from it and their squares.

    E[x**2] - E[x]**2 takes one pass and loses all digits when mean / std is large.

    Squares of float32 may lie beyond float32. On a CPU every sum is a pass over memory,
    and two of them in float64 are exact and have the range. Elsewhere sums share a
    pass, float64 may be slow or missing, and one more sum, of values times the small
    unit, has the range.
    """
    if where is not None and where.dtype != jnp.bool_:
        # What does not count is not there, to derivatives by the weight either.
        where = jnp.where(where > 0, where, jnp.zeros_like(where))
    x = counted(x, where)
    in_dtype = functools.partial(_in_dtype, r=r, dtype=dtype)
    if dtype != jnp.float32:
        return in_dtype(x, where)
    in_double = functools.partial(_in_double, r=r)
    return lax.platform_dependent(x, where, cpu=in_double, default=in_dtype)


def _in_double(x: jax.Array, where: jax.Array | None, r: Reduction) -> Moments:
    """Moments in float32 of values of no more than that, from sums in float64."""
    single = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    with jax.enable_x64(True):

        def total(a):
            return weighed(widened(a, jnp.float64), where).sum(r.axes, keepdims=True)

        def in_two_parts(a, dtype):
            near = a.astype(dtype)
            return near, (a - near.astype(a.dtype)).astype(dtype)

        if where is None:
            n = jnp.asarray(math.prod(x.shape[a] for a in r.axes)).astype(jnp.float64)
            n = squares = jnp.broadcast_to(n, _reduced(x.shape, r.axes))
        else:
            weights = jnp.broadcast_to(_axes.sharded_like(where, x), x.shape)
            weights = weights.astype(jnp.float64)
            n = squares = weights.sum(r.axes, keepdims=True)
            if where.dtype != jnp.bool_:
                squares = jnp.square(weights).sum(r.axes, keepdims=True)
        # Half of each distance: between two float32 it may lie beyond float32.
        off = scaled(x.astype(single), 0.5)
        mean = rest = jnp.zeros(n.shape, single)
        if r.centered:
            mean, rest = in_two_parts(divided(total(x), n), single)
            off = off - own(scaled(mean, 0.5), 1) - own(scaled(rest, 0.5), 1)
            off = counted(off, where)
        var = divided(total(squared(widened(off, jnp.float64))), n, empty=0.25) * 4
        large = var * np.float64(_small_unit(jnp.float32) ** 2)
        var = _held(var.astype(jnp.float32), large.astype(jnp.float32))
        count, carry = in_two_parts(n, jnp.float32)
        squares = squares.astype(jnp.float32)
        return Moments(count, mean, var, carry, rest, squares=squares)


def _in_dtype(
    x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any
) -> Moments:
    """Moments in a dtype, from sums in it."""
    unit = _small_unit(dtype)
    may_overflow = 2 * jnp.finfo(x.dtype).maxexp > jnp.finfo(dtype).maxexp
    x = widened(x, dtype)

    def average(a):
        return divided(weighed(a, where).sum(r.axes, keepdims=True), count)

    def off(use, factor):  # one for each use, with its own copies: see `own`
        if not r.centered:
            return scaled(x, factor)
        far = scaled(x, factor) - own(scaled(near, factor), use)
        return counted(far, where)

    count, carry = _count(x, where, r.axes, dtype)
    squares = count
    if where is not None and where.dtype != jnp.bool_:
        squares = jnp.broadcast_to(where.astype(dtype), x.shape)
        squares = jnp.square(squares).sum(r.axes, keepdims=True)
    mean = rest = jnp.zeros(count.shape, x.dtype)
    if r.centered:
        near = _near(average(scaled(x, _SUMMED)))
        rest = scaled(average(off(1, _SUMMED)), 1 / _SUMMED)
    var = average(squared(off(2, 1.0))) - squared(rest)
    var = lax.max(var, jnp.zeros_like(var))
    if may_overflow:
        large = average(squared(off(4, unit))) - squared(scaled(rest, unit))
        var = _held(var, large)
    if r.centered:
        mean, rest = _in_two_parts(near, rest)
    var = var + (count == 0).astype(dtype)
    return Moments(count, mean, var, carry, rest, squares=squares)


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if a in axes else n for a, n in enumerate(shape))


def _fixed(a: jax.Array) -> jax.Array:
    """Rounds a small array to one bit less than its dtype has.

    All its uses then see the same number. Else XLA may compute a mean, a product, anew
    in each fusion that uses it, and contract it there with the sum that follows.
    """
    info = jnp.finfo(a.dtype)
    return by_parts(lambda p: lax.reduce_precision(p, info.nexp, info.nmant - 1), a)


def _near(mean: jax.Array) -> jax.Array:
    """A mean of values times `_SUMMED` as a fixed one of the values.

    The first of two parts: values that vanish in that unit are in the second, the rest.
    """
    info = jnp.finfo(mean.dtype)
    unit = _SUMMED
    # Rounding must not take it beyond the dtype.
    top = float(info.max) * (1 - 4 * float(info.eps)) * unit

    def of_values(p):
        top_ = jnp.asarray(top, p.dtype)
        return lax.clamp(-top_, p, top_) / jnp.asarray(unit, p.dtype)

    return by_parts(of_values, _fixed(mean))


def _in_two_parts(near: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean ``near + rest``, where near is fixed and rest small, as (mean, rest)."""
    rest = _fixed(rest)
    mean = near + rest
    return mean, (near - mean) + rest


def _count(x: jax.Array, where: jax.Array | None, axes: tuple[int, ...], dtype: Any):
    """Counts values, as (count, carry) with the shape of the moments."""
    shape = _reduced(x.shape, axes)
    n = math.prod(x.shape[a] for a in axes)
    if where is None and isinstance(n, int):
        count = jnp.asarray(n, dtype)
        carry = jnp.asarray(n - int(jnp.finfo(dtype).dtype.type(n)), dtype)
        return jnp.broadcast_to(count, shape), jnp.broadcast_to(carry, shape)
    if where is not None:
        where = jnp.broadcast_to(_axes.sharded_like(where, x), x.shape)
        if where.dtype != jnp.bool_:
            count = where.sum(axes, keepdims=True, dtype=dtype)
            return count, jnp.zeros_like(count)
        if isinstance(n, int) and n < 1 / jnp.finfo(dtype).eps:
            # It shares the all-reduce of the sums in the dtype of statistics.
            count = where.sum(axes, keepdims=True, dtype=dtype)
            return count, jnp.zeros_like(count)
    # Of 2**31 values and more, or of as many as jax.export leaves open.
    few = isinstance(n, int) and n < 2**31
    with jax.enable_x64(not few or jax.config.read("jax_enable_x64")):
        if where is None:
            total = jnp.broadcast_to(jnp.asarray(n), shape)
        else:
            total = where.sum(
                axes, keepdims=True, dtype=jnp.int32 if few else jnp.int64
            )
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
    return opened(_merged(m, _axes.one("merge", axis, len(m.shape))))


def _merged(m: Moments, axis: int) -> Moments:
    """`merge`, with variances as `unit_of` says."""
    # What counted nothing may be anything, NaN say.
    some = m.count > 0
    unit = unit_in(m, axis)
    count, carry = _join_limbs(*(a.sum(axis, keepdims=True) for a in _limbs(m)))
    share = divided(m.count, count)
    means = [product(unit, _alone(a, some)) for a in (m.mean, m.rest)]
    var, var_rest = (_alone(a, some) for a in _in_unit(m, unit))
    near = _fixed(product(share, means[0]).sum(axis, keepdims=True))
    off = (means[0] - near) + means[1]
    rest = product(share, off).sum(axis, keepdims=True)
    # About the variance within, what shares miss that do not add up to 1 is nothing,
    # and what is added to it is small, so that a long stream does not drift.
    within = (share * var).sum(axis, keepdims=True)
    more = ((var - within) + var_rest) + squared(off - rest)
    more = jnp.where(jnp.isinf(within), jnp.zeros_like(more), more)
    var, var_rest = _exact_sum(within, (share * more).sum(axis, keepdims=True))
    var, var_rest = _from_unit(var, var_rest, unit)
    var = var + (count == 0).astype(var.dtype)
    mean, rest = (by_parts(lambda p: p / unit, a) for a in _in_two_parts(near, rest))
    squares = _alone(m.squares, some).sum(axis, keepdims=True)
    return Moments(count, mean, var, carry, rest, var_rest, squares)


def beyond(m: Moments) -> jax.Array:
    """Where squares of distances from a common mean might overflow, or have."""
    half = 3 * int(jnp.finfo(m.var.dtype).maxexp) // 8  # float32: 2**48, 2**96
    parts = [m.mean.real, m.mean.imag] if jnp.iscomplexobj(m.mean) else [m.mean]
    far = [jnp.abs(p) > jnp.asarray(2.0**half, p.dtype) for p in parts]
    wide = (m.var < 0) | (m.var > jnp.asarray(2.0 ** (2 * half), m.var.dtype))
    return functools.reduce(jnp.logical_or, far, wide) & (m.count > 0)


def unit_in(m: Moments, axis: int) -> jax.Array:
    """The unit, 1 or the small one, in which moments along an axis can be merged."""
    # By arithmetic, since on an explicit mesh a select wants all sharded alike.
    far = beyond(m).any(axis, keepdims=True).astype(m.var.dtype)
    return far * jnp.asarray(_small_unit(far.dtype), far.dtype) + (1 - far)


def _in_unit(m: Moments, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The variance, and what its dtype could not hold, of values times a unit."""
    var = jnp.where(m.var < 0, -m.var, times_square(m.var, unit))
    return var, times_square(m.var_rest, unit)


def _from_unit(var, var_rest, unit) -> tuple[jax.Array, jax.Array]:
    """Undoes `_in_unit`, as `unit_of` says."""
    var = jnp.where(var < 0, jnp.zeros_like(var), var)  # of rounding alone
    plain = times_square(var, 1 / unit)
    held = jnp.where(unit < 1, _held(plain, var), plain)
    var_rest = jnp.where(
        held < 0, jnp.zeros_like(var), times_square(var_rest, 1 / unit)
    )
    return held, var_rest


def _limbs(m: Moments) -> tuple[jax.Array, jax.Array]:
    low = jnp.mod(m.count, _LIMB)
    return m.count - low, low + m.carry


def _join_limbs(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = high + low
    return count, low - (count - high)


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
        m = jax.tree.map(lambda a: _alone(a, ours), m)
    return _first(_merged(m, 0))


def _across_devices_uncentered(m: Moments, r: Reduction, counts: str) -> Moments:
    """`across_devices` of mean squares, which add up, in both units."""
    small = jnp.full_like(m.var, _small_unit(m.var.dtype))
    plain = opened(m).var
    terms = [m.count * plain, m.count * _in_unit(m, small)[0]]
    terms, count, carry, squares = _sums(terms, m, r, counts)
    var = _held(*(divided(a, count) for a in terms))
    var = var + (count == 0).astype(var.dtype)
    return Moments(count, m.mean, var, carry, squares=squares)


def _across_devices_twice(m: Moments, r: Reduction, counts: str) -> Moments:
    """`across_devices` for large moments: first means, then distances from them."""
    terms = [product(m.count, scaled(m.mean, _SUMMED)), beyond(m).astype(m.var.dtype)]
    (total, far), count, carry, squares = _sums(terms, m, r, counts)
    near = _near(divided(total, count))
    small = jnp.full_like(m.var, _small_unit(m.var.dtype))
    unit = jnp.where(far > 0, small, jnp.ones_like(small))
    parts = [product(unit, a) for a in (m.mean, near, m.rest)]
    off = (parts[0] - parts[1]) + parts[2]
    var = _in_unit(m, unit)[0]
    terms = [product(m.count, off), m.count * (var + squared(off))]
    rest, spread = (divided(a, count) for a in _added_up(terms, r))
    var, _ = _from_unit(spread - squared(rest), jnp.zeros_like(spread), unit)
    var = var + (count == 0).astype(var.dtype)
    mean, rest = _in_two_parts(near, by_parts(lambda p: p / unit, rest))
    return Moments(count, mean, var, carry, rest, squares=squares)


def _sums(terms: list, m: Moments, r: Reduction, counts: str) -> tuple:
    """Adds up terms and counts over the devices, in one all-reduce.

    Returns the terms, count, carry and the squares of weights.
    """
    high, low = _limbs(m)
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
    return terms, *_join_limbs(high, low), squares


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


def average(terms: list, count: jax.Array, r: Reduction) -> list:
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
    return [divided(t, count) for t in terms]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What derivatives need of moments, and so what is kept for a backward pass."""

    count: jax.Array
    mean: jax.Array
    rest: jax.Array
    var: jax.Array


def kept(m: Moments) -> Kept:
    """Of moments, what derivatives need."""
    return Kept(m.count, m.mean, m.rest, m.var)


def distance(x: jax.Array, m: Any, centered: bool, use: int) -> jax.Array:
    """``x - mean``, of values times `unit_of` the variance; one for each use of it.

    With its own copies of small arrays: see `own`.
    """
    unit = unit_of(m.var)
    x = product(x, own(unit, use))
    if not centered:
        return x
    return added(
        added(x, -own(product(unit, m.mean), use)), -own(product(unit, m.rest), use)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _measured(x, where, r: Reduction, dtype: Any):
    """Takes the moments of x, with the variance as `unit_of` says, and as users see it.

    Args:
      x: floating or complex, of rank 1 or more.
      where: None, or boolean or weights, of the rank of x, broadcasting to it.
      r: over what the moments are taken.
      dtype: of the statistics.

    Returns:
      The moments, which broadcast against x, and their variance, inf where the dtype
      cannot hold it. All may be differentiated, in forward and reverse mode, to any
      order.
    """
    m = take(x, where, r, dtype)
    return m, opened(m).var


def _measured_jvp(r, dtype, primals, tangents):
    x, where = primals
    m, var = measured(x, where, r, dtype)
    x_dot, where_dot = tangents_of(where, primals, tangents)
    # A checkpoint keeps for the backward pass just what the map is given. The barrier
    # of prevent_cse keeps XLA from sharing, and so storing, what both passes compute.
    dots = jax.checkpoint(functools.partial(_tangent, r), prevent_cse=True)
    *dots, var_dot, of_held = dots(x, where, kept(m), x_dot, where_dot)
    return (m, var), (moments_dot(m, *dots, of_held), var_dot)


_measured.defjvp(_measured_jvp, symbolic_zeros=True)

# Compiled, so that a call outside of jit is one program; inlined, so that a call inside
# is no boundary to XLA; and traced once for all calls alike.
measured = jax.jit(_measured, static_argnums=(2, 3), inline=True)


def tangents_of(where: jax.Array | None, primals: Any, tangents: Any) -> list:
    """Tangents as arrays; None for those of a mask, which has none, and of weights that
    are not differentiated, which then cost nothing.
    """
    *tangents, where_dot = tangents
    if counts_of(where) != "weights" or isinstance(where_dot, SymbolicZero):
        where_dot = None
    arrays = [
        jnp.zeros_like(a) if isinstance(t, SymbolicZero) else t
        for a, t in zip(primals, tangents, strict=False)
    ]
    return [*arrays, where_dot]


def moments_dot(m: Moments, mean_dot, count_dot, squares_dot, var_dot) -> Moments:
    """The tangent of moments; that of a count, where None, is 0."""
    count_dot, squares_dot = (
        jnp.zeros_like(m.count) if a is None else a for a in (count_dot, squares_dot)
    )
    carry, rest, var_rest = (jnp.zeros_like(a) for a in (m.carry, m.rest, m.var_rest))
    return Moments(count_dot, mean_dot, var_dot, carry, rest, var_rest, squares_dot)


def _tangent(r, x, where, m, x_dot, where_dot):
    """The derivative of moments, as a map that is linear in its last two arguments."""
    x, x_dot = (widened(counted(v, where), m.var.dtype) for v in (x, x_dot))
    c, *dots = dot_averages(r, x, where, m, None, x_dot, where_dot)
    return *dots, *var_dots(m, c)


def var_dots(m: Kept, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tangents of a variance as users see it, and of it as `unit_of` says.

    From ``c = <Re(conj(x - mean) * x_dot)>``, of values times the unit.
    """
    unit = unit_of(m.var)
    ones = jnp.ones_like(unit)
    return 2 * c / unit, 2 * c * unit * jnp.where(m.var < 0, -ones, ones)


def dot_averages(r, x, where, m, factor, x_dot, where_dot) -> tuple:
    """What the derivatives of moments and of what they normalize are made of.

        c = <Re(conj(x - mean) * x_dot)>, of values times the unit and a factor
        a = <x_dot>

    where <.> averages over the reduced axes and the devices, and an uncentered norm has
    no a. Weights w make <.> = sum(w * .) / sum(w), and add to the averages

        c: sum(w_dot * (|x - mean|**2 - var)) / sum(w) / 2
        a: sum(w_dot * (x - mean)) / sum(w)

    where they are not 0. Returns c, a, and the tangents of count and of the squares of
    weights, None where weights have none.
    """

    def far(use):
        far = distance(x, m, r.centered, use)
        return far if factor is None else product(far, own(factor, use))

    terms = [weighed(aligned(counted(far(1), where), x_dot), where)]
    if r.centered:
        terms.append(weighed(x_dot, where))
    if where_dot is not None:
        unit = unit_of(m.var)
        w_dot = jnp.broadcast_to(where_dot.astype(m.var.dtype), x.shape)
        w_dot = counted(w_dot, where)
        spread = (squared(distance(x, m, r.centered, 3)) - jnp.abs(m.var)) * (
            0.5 / unit
        )
        if factor is not None:
            spread = spread * factor
        terms[0] = terms[0] + spread * w_dot
        if r.centered:
            far_ = distance(x, m, r.centered, 4)
            terms[1] = terms[1] + product(product(far_, 1 / unit), w_dot)
        terms += [w_dot, weighed(2 * w_dot, where)]
    c, *averages = average(terms, m.count, r)
    a = averages.pop(0) if r.centered else jnp.zeros_like(m.mean)
    return c, a, *([v * m.count for v in averages] or (None, None))


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
    m, var = measured(x, where, r, statistics_dtype(x))
    return dataclasses.replace(m, var=var)
