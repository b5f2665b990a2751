"""Moments: what they are, and how they merge."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax import _axes, _check, _trees
from normjax._numbers import (
    added,
    aligned,
    alone,
    by_parts,
    divided,
    exact_sum,
    fixed,
    inverse,
    is_inf,
    is_zero,
    number,
    product,
    scaled,
    selected,
    squared,
    times_square,
)
from normjax._types import Axes, DTypeLike

# Counts are added in two limbs, multiples of this and the rest, so that float32 holds
# their sums exactly far beyond its 2**24.
_LIMB = 4096


# A unit in which no sum of up to 2**31 values overflows.
SUMMED = 2.0**-32


@_trees.tree
@dataclasses.dataclass(frozen=True)
class Moments:
    """How many values there were, their mean, and their mean squared distance from it.

    ``var`` is the biased variance, ``sum(|x - mean|**2) / count``; see `unbiased_var`
    for the unbiased one. Uncentered moments (`rms_norm`) have mean 0 and
    ``var = sum(|x|**2) / count``. Where nothing was counted, count is 0, mean 0, var 1.
    With weights, every sum is weighted, and count is the sum of the weights. A variance
    that the dtype cannot hold, of float32 values more than 1.8e19 apart, is inf. Its
    derivative is that of the formula, while a cotangent times a distance fits.

    Attributes:
      count: how many values were counted, real, at least float32.
      mean: their mean, of the same shape; complex where the values are.
      var: their biased variance, real, of the same shape.
      carry: what the dtype of ``count`` could not hold: ``count + carry`` is exact in a
        stream of any length, where float32 alone would stop at 2**24.
      rest: what the dtype of ``mean`` could not hold: ``mean + rest`` has about twice
        its digits, for data far from zero.
      var_rest: what the dtype of ``var`` could not hold, so that a long stream does not
        drift. Where ``var`` is inf, the variance in a unit that makes it fit, so that
        merging, and normalizing by these moments, is exact nevertheless.
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
        return _both(first, laid_like(other, first.mean))


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


def only(m: Moments) -> Moments:
    return jax.tree.map(lambda a: a[0], m)


def unbiased(m: Moments) -> tuple[jax.Array, jax.Array]:
    """The unbiased variance, and where there is one; elsewhere it is the biased one.

    Of fewer than 1.001 values by weight, rounding would be most of it.
    """
    n = m.count * divided(m.count, m.squares)
    there = n > 1.001
    return m.var * jnp.where(there, n / jnp.where(there, n - 1, n), 1), there


def small_unit(dtype: Any) -> float:
    """The unit of `unit_of`: of float32 2**-96, of float64 2**-768.

    From the largest variance that a dtype holds to the square of its largest value, the
    variance in this unit, and the third power of its root, which is in derivatives, are
    far from both ends.
    """
    return 2.0 ** -(3 * int(jnp.finfo(dtype).maxexp) // 4)


def unit_of(var: jax.Array) -> jax.Array:
    """The power of two in which distances are held: 1, or far below it.

    Within this package, a variance that its dtype cannot hold stands as minus that of
    the values times the small unit, so that no field more is kept or sent for it.
    """
    small = jnp.full_like(var, small_unit(var.dtype))
    return selected(below_zero(var), small, jnp.ones_like(var))


def below_zero(var: jax.Array) -> jax.Array:
    """Where a variance, as `unit_of` says, is in small units."""
    return lax.lt(var, number(0, var))


def rstd_of(var: jax.Array, epsilon: Any) -> jax.Array:
    """``1 / sqrt(var + epsilon)``, of values times their unit."""
    unit = unit_of(var)
    # In a small unit epsilon may be nothing, and so may the variance of constants.
    tiny = jnp.asarray(jnp.finfo(var.dtype).tiny, var.dtype)
    floored = lax.mul(lax.mul(unit, jnp.asarray(epsilon, var.dtype)), unit)
    return lax.rsqrt(lax.add(lax.abs(var), lax.max(floored, tiny)))


def var_of_values(var: jax.Array) -> jax.Array:
    """The variance, as `unit_of` says, of the values: inf where it can't be held."""
    beyond = times_square(lax.neg(var), inverse(unit_of(var)))
    return selected(below_zero(var), beyond, var)


def opened(m: Moments, var: jax.Array | None = None) -> Moments:
    """Moments for users: a variance that the dtype cannot hold is inf.

    That of the values times the small unit is then what the dtype could not hold of it,
    so that `closed` finds it again. ``var`` is the one for users, where it is known.
    """
    if var is None:
        var = var_of_values(m.var)
    var_rest = selected(is_inf(var), lax.neg(m.var), m.var_rest)
    return dataclasses.replace(m, var=var, var_rest=var_rest)


def closed(m: Moments) -> Moments:
    """Undoes `opened`."""
    positive = lax.gt(m.var_rest, number(0, m.var_rest))
    large = lax.bitwise_and(is_inf(m.var), positive)
    var = selected(large, lax.neg(m.var_rest), m.var)
    rest = selected(large, jnp.zeros_like(var), m.var_rest)
    return dataclasses.replace(m, var=var, var_rest=rest)


def var_in(var: jax.Array, dtype: Any) -> jax.Array:
    """A variance, as `unit_of` says, in another dtype of statistics."""
    if var.dtype == dtype:
        return var
    if dtype == jnp.float64:
        wide = var.astype(dtype)
        return jnp.where(wide < 0, -wide / small_unit(var.dtype) ** 2, wide)
    large = (var * small_unit(dtype) ** 2).astype(dtype)
    beyond = -jnp.full_like(large, jnp.inf)  # of float64, too
    return jnp.where(var < 0, beyond, held(var.astype(dtype), large))


def _fits(var: jax.Array) -> jax.Array:
    """Where a variance is not at the end of its dtype, or beyond it."""
    end = 2.0 ** (int(jnp.finfo(var.dtype).maxexp) - 1)
    return lax.lt(var, number(end, var))


def held(plain: jax.Array, large: jax.Array) -> jax.Array:
    """The variance as `unit_of` says, from that of the values and that in small units.

    The second is taken where the first does not fit.
    """
    tiny = jnp.asarray(jnp.finfo(plain.dtype).tiny, plain.dtype)
    return selected(_fits(plain), plain, lax.neg(lax.max(large, tiny)))


def near_of(mean: jax.Array) -> jax.Array:
    """A mean of values times `SUMMED` as a fixed one of the values.

    The first of two parts: values that vanish in that unit are in the second, the rest.
    """
    info = jnp.finfo(mean.dtype)
    unit = SUMMED
    # Rounding must not take it beyond the dtype.
    top = float(info.max) * (1 - 4 * float(info.eps)) * unit

    def of_values(p):
        p = lax.clamp(number(-top, p), p, number(top, p))
        return lax.div(p, number(unit, p))

    return by_parts(of_values, fixed(mean))


def in_two_parts(near: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean ``near + rest``, where near is fixed and rest small, as (mean, rest)."""
    rest = fixed(rest)
    mean = lax.add(near, rest)
    return mean, lax.add(lax.sub(near, mean), rest)


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
    return _all(m, _axes.one("merge", axis, len(m.shape)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _together(m: Moments, axis: int) -> Moments:
    """`merge` of moments whose fields are arrays of one shape."""
    return opened(merged(closed(m), axis))


def _together_jvp(axis, primals, tangents):
    """The derivative of the formula, where a variance is beyond its dtype, too.

        mean = sum(share * mean_i)   var = sum(share * (var_i + |mean_i - mean|**2))

    with ``share = count_i / count``. Autodiff of `merged` would multiply cotangents by
    the inverse square of the small unit, which is beyond float32.
    """
    (m,), (dot,) = primals, tangents
    whole = _together(m, axis)
    some, is_large = m.count > 0, jnp.isinf(m.var)
    mean, rest, dot = jax.tree.map(lambda a: alone(a, some), (m.mean, m.rest, dot))
    share = divided(m.count, whole.count)
    share_dot = divided(dot.count + dot.carry, whole.count)
    mean_dot, var_dot = added(dot.mean, dot.rest), dot.var
    var_dot = var_dot + jnp.where(is_large, jnp.zeros_like(var_dot), dot.var_rest)

    var = closed(whole).var
    unit = unit_of(var)
    off = product(mean, unit) - product(whole.mean, unit)
    off = alone(off + (product(rest, unit) - product(whole.rest, unit)), some)
    parts, _ = in_unit(closed(m), unit)
    # The factor that may be 0 comes first, since the square of a distance may be inf.
    of_shares = share_dot * parts - share_dot * jnp.abs(var)
    of_shares = of_shares + aligned(product(off, share_dot), off)
    of_means = 2 * aligned(off, mean_dot)

    def total(a):
        return a.sum(axis, keepdims=True)

    in_units = jnp.where(is_large, dot.var_rest, times_square(var_dot, unit))
    in_units = total(share * (in_units + of_means * unit) + of_shares)
    plain = total(share * (var_dot + of_means * (1 / unit)))
    plain = plain + times_square(total(of_shares), 1 / unit)
    mean_dot = total(product(mean_dot, share))
    mean_dot = mean_dot + product(total(product(off, share_dot)), 1 / unit)
    zeros = jnp.zeros_like(plain)
    return whole, Moments(
        total(dot.count + dot.carry),
        mean_dot,
        plain,
        zeros,
        jnp.zeros_like(mean_dot),
        jnp.where(jnp.isinf(whole.var), in_units, zeros),
        total(dot.squares),
    )


_together.defjvp(_together_jvp)


# Compiled, so that a call outside of jit is one program, and inlined in one inside.
_all = jax.jit(_together, static_argnums=1, inline=True)


@functools.partial(jax.jit, inline=True)
def _both(first: Moments, other: Moments) -> Moments:
    """`Moments.merge` of moments whose fields are arrays of one shape."""
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, other)
    # The sum of two and its exact rounding error; the limbs of `merge` have an end.
    count, lost = exact_sum(first.count, other.count)
    count, carry = exact_sum(count, lost + (first.carry + other.carry))
    return dataclasses.replace(only(_together(both, 0)), count=count, carry=carry)


def merged(m: Moments, axis: int) -> Moments:
    """`merge`, with variances as `unit_of` says."""
    # What counted nothing may be anything, NaN say.
    some = m.count > 0
    mean, rest, var = (alone(a, some) for a in (m.mean, m.rest, m.var))
    m = dataclasses.replace(m, mean=mean, rest=rest, var=var)
    count, carry = join_limbs(*(a.sum(axis, keepdims=True) for a in limbs(m)))
    share = divided(m.count, count)
    near = near_of(product(share, scaled(mean, SUMMED)).sum(axis, keepdims=True))
    unit = unit_for((mean - near) + rest, var, axis)
    mean, rest, middle = (product(unit, a) for a in (mean, rest, near))
    var, var_rest = in_unit(m, unit)
    off = (mean - middle) + rest
    shift = product(share, off).sum(axis, keepdims=True)
    # About the variance within, what shares miss that do not add up to 1 is nothing,
    # and what is added to it is small, so that a long stream does not drift.
    within = (share * var).sum(axis, keepdims=True)
    more = ((var - within) + var_rest) + squared(off - shift)
    more = selected(is_inf(within), jnp.zeros_like(more), more)
    var, var_rest = exact_sum(within, (share * more).sum(axis, keepdims=True))
    var, var_rest = from_unit(var, var_rest, unit)
    var = lax.add(var, is_zero(count))
    mean, rest = in_two_parts(near, by_parts(lambda p: lax.div(p, unit), shift))
    squares = alone(m.squares, some).sum(axis, keepdims=True)
    return Moments(count, mean, var, carry, rest, var_rest, squares)


def unit_for(off: jax.Array, var: jax.Array, axis: int) -> jax.Array:
    """The unit, 1 or the small one, in which moments along an axis can be merged.

    It is the small one where a distance of a mean from a common one is too large to be
    squared, or a variance to be added to.
    """
    end = 2.0 ** (int(jnp.finfo(var.dtype).maxexp) // 2 - 2)  # float32: 2**62
    parts = [off.real, off.imag] if jnp.iscomplexobj(off) else [off]
    far = [jnp.abs(p) > jnp.asarray(end, p.dtype) for p in parts]
    wide = (var < 0) | (var > jnp.asarray(end**2, var.dtype))
    # By arithmetic, since on an explicit mesh a select wants all sharded alike.
    beyond = functools.reduce(jnp.logical_or, far, wide).any(axis, keepdims=True)
    of = beyond.astype(var.dtype)
    return of * jnp.asarray(small_unit(of.dtype), of.dtype) + (1 - of)


def in_unit(m: Moments, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The variance, and what its dtype could not hold, of values times a unit."""
    plain = times_square(m.var, unit)
    var = selected(below_zero(m.var), lax.neg(m.var), plain)
    return var, times_square(m.var_rest, unit)


def from_unit(var, var_rest, unit) -> tuple[jax.Array, jax.Array]:
    """Undoes `in_unit`, as `unit_of` says."""
    zeros, of_values = jnp.zeros_like(var), inverse(unit)
    var = selected(below_zero(var), zeros, var)  # of rounding alone
    plain = times_square(var, of_values)
    signed = selected(lax.lt(unit, number(1, unit)), held(plain, var), plain)
    var_rest = selected(below_zero(signed), zeros, times_square(var_rest, of_values))
    return signed, var_rest


def limbs(m: Moments) -> tuple[jax.Array, jax.Array]:
    low = lax.rem(m.count, number(_LIMB, m.count))
    return lax.sub(m.count, low), lax.add(low, m.carry)


def join_limbs(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = high + low
    return count, low - (count - high)
