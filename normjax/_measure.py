"""Moments of arrays: taken over axes and devices, and their derivative."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from normjax import _axes, _check
from normjax._devices import (
    Reduction,
    across_devices,
    average,
    counts_of,
    totals,
)
from normjax._moments import (
    SUMMED,
    Moments,
    below_zero,
    held,
    in_two_parts,
    laid_like,
    near_of,
    opened,
    rstd_of,
    small_unit,
    unit_of,
)
from normjax._numbers import (
    added,
    aligned,
    counted,
    divided,
    hidden,
    inverse,
    is_inf,
    is_zero,
    own,
    product,
    scaled,
    selected,
    squared,
    statistics_dtype,
    times_square,
    weighed,
    widened,
)
from normjax._types import ArrayLike, Axes, AxisNames, Groups

# A sample has one value in 32, but at least 16, so that no single one decides its mean,
# and of a row at least 128, the width of a TPU's vectors.
_FRACTION, _FEWEST, _LANES = 32, 16, 128


def take(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Takes the moments of x, to broadcast against x.

    First on each device; then devices merge into one batch. The variance is as
    `unit_of` says.
    """
    m = _local(x, where, r._replace(names=(), groups=()), dtype)
    m = laid_like(m, m.mean)  # a count without a mask lies nowhere yet
    if r.names and r.group_axes:
        # Of the members of a group, which have the same, one travels.
        axes, groups, shape = r.group_axes, r.num_groups, m.mean.shape
        m = jax.tree.map(lambda a: _axes.split_groups(a, axes, groups)[..., :1], m)
        m = across_devices(m, r, counts_of(where))
        return jax.tree.map(lambda a: _axes.join_groups(a, axes, shape), m)
    return across_devices(m, r, counts_of(where)) if r.names else m


def _local(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any) -> Moments:
    """Moments on a device: the mean, then the distances from it and their squares.

    Sums are taken channel by channel, and then of the channels of a group.

    E[x**2] - E[x]**2 in float32 loses all digits when mean / std is large.

    Squares of float32 may lie beyond float32. Two sums in float64 are exact and have
    the range, where three in float32 are needed for the digits alone. On a CPU each is
    a pass over memory. On a GPU neither waits for the other: of rows both share a pass,
    and XLA stores no distances of the size of x, as it does of groups else.
    A TPU has no float64, but sums there share a pass, and one more, of values times the
    small unit, has the range. Distances from the mean of a sample need no pass for the
    mean: see `_sample`.
    """
    if where is not None and where.dtype != jnp.bool_:
        # What does not count is not there, to derivatives by the weight either.
        where = counted(where, where)
    x = counted(x, where)
    in_dtype = functools.partial(_in_dtype, r=r, dtype=dtype)
    if dtype != jnp.float32:
        return in_dtype(x, where)
    two, one = (functools.partial(_in_double, r=r, passes=n) for n in (2, 1))
    forms = {"cpu": two, "cuda": one, "rocm": one}
    if where is None and _has_sample(x, r):
        in_dtype = functools.partial(in_dtype, sampled=True)
    return lax.platform_dependent(x, where, **forms, default=in_dtype)


def _in_double(
    x: jax.Array, where: jax.Array | None, r: Reduction, passes: int
) -> Moments:
    """Moments in float32 of values of no more than that, from sums in float64.

    With two passes, from the distances to the mean, else from E[x**2] - E[x]**2. That
    loses eps * (mean / std)**2 of the variance, with the eps of float64: less than
    rounding values to float32 changes.
    """
    single = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    with jax.enable_x64(True):

        def total(a):
            return totals([weighed(widened(a, jnp.float64), where)], r)[0]

        def in_two_parts(a, dtype):
            near = lax.convert_element_type(a, dtype)
            lost = lax.sub(a, lax.convert_element_type(near, a.dtype))
            return near, lax.convert_element_type(lost, dtype)

        if where is None:
            n = jnp.asarray(r.size(x.shape)).astype(jnp.float64)
            n = squares = jnp.broadcast_to(n, _reduced(x.shape, r.axes))
        else:
            weights = jnp.broadcast_to(_axes.sharded_like(where, x), x.shape)
            weights = weights.astype(jnp.float64)
            (n,) = totals([weights], r)
            squares = n
            if where.dtype != jnp.bool_:
                (squares,) = totals([jnp.square(weights)], r)
        off = x.astype(single)
        if r.centered:
            middle = divided(total(off), n)
            mean, rest = in_two_parts(middle, single)
        if r.centered and passes == 2:
            # Half of each distance: between two float32 it may lie beyond float32. By
            # an array of its own, since XLA may store one that norms share, spread to
            # the size of x.
            half = jnp.full(n.shape, 0.5, jnp.float32)
            half, _ = lax.optimization_barrier((half, mean))
            off = lax.sub(product(off, half), own(scaled(mean, 0.5), 1))
            off = counted(lax.sub(off, own(scaled(rest, 0.5), 1)), where)
        var = total(squared(widened(off, jnp.float64)))
        if r.centered and passes == 2:
            var = scaled(var, 4)
        var = divided(var, n, empty=1.0)
        if r.centered and passes == 1:
            of_mean = squared(middle)
            var = lax.sub(var, of_mean)
            # What is left of values that are all alike is rounding.
            alike = lax.lt(var, scaled(of_mean, 2.0**-48))
            var = selected(alike, jnp.zeros_like(var), var)
        large = scaled(var, small_unit(jnp.float32) ** 2)
        var = held(var.astype(jnp.float32), large.astype(jnp.float32))
        if not r.centered:
            mean = rest = jnp.zeros_like(var, dtype=single)
        count, carry = in_two_parts(n, jnp.float32)
        squares = squares.astype(jnp.float32)
        return Moments(count, mean, var, carry, rest, squares=squares)


def _in_dtype(
    x: jax.Array,
    where: jax.Array | None,
    r: Reduction,
    dtype: Any,
    sampled: bool = False,
) -> Moments:
    """Moments in a dtype, from sums in it of distances from an estimate of the mean.

    That of all values or, where ``sampled``, of a sample, which saves a pass.
    """
    summed, unit = hidden([SUMMED, small_unit(dtype)], dtype)
    may_overflow = 2 * jnp.finfo(x.dtype).maxexp > jnp.finfo(dtype).maxexp
    seen = _sample(x, r.axes) if sampled else x
    x, seen = widened(x, dtype), widened(seen, dtype)

    def average(a):
        return divided(totals([weighed(a, where)], r)[0], count)

    def off(use):  # one for each use, with its own copies: see `own`
        if not r.centered:
            return x
        # Half of each distance: between two values it may lie beyond their dtype.
        return counted(lax.sub(scaled(x, 0.5), own(scaled(near, 0.5), use)), where)

    count, carry = _count(x, where, r, dtype)
    squares = count
    if where is not None and where.dtype != jnp.bool_:
        squares = jnp.broadcast_to(where.astype(dtype), x.shape)
        (squares,) = totals([jnp.square(squares)], r)
    near, half = jnp.zeros((), x.dtype), jnp.zeros((), x.dtype)
    if r.centered:
        near = average(product(seen, summed))
        if sampled:
            axis = _sampled(x, r.axes)
            near = scaled(near, x.shape[axis] / seen.shape[axis])
        near = near_of(near)
        half = product(average(product(off(1), summed)), inverse(summed))
    by = 4 if r.centered else 1
    var = scaled(lax.sub(average(squared(off(2))), squared(half)), by)
    var = lax.max(var, jnp.zeros_like(var))
    if may_overflow:
        large = average(squared(product(off(4), unit)))
        large = scaled(lax.sub(large, squared(product(half, unit))), by)
        var = held(var, large)
    if r.centered:
        mean, rest = (scaled(a, 2) for a in in_two_parts(scaled(near, 0.5), half))
    else:
        mean = rest = jnp.zeros_like(var, dtype=x.dtype)
    var = lax.add(var, is_zero(count))
    return Moments(count, mean, var, carry, rest, squares=squares)


def _has_sample(x: jax.Array, r: Reduction) -> bool:
    """Whether a part of x is at hand, without another collective to get it.

    It may lie on other devices, but for axes that are seldom divided among them.
    """
    sizes = [x.shape[a] for a in r.axes]
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        return False
    if r.whole or _axes.are_whole():
        return True
    inside = 0 < _sampled(x, r.axes) < x.ndim - 1
    return inside and not _axes.is_on_explicit_mesh(x)


def _sampled(x: jax.Array, axes: tuple[int, ...]) -> int:
    """The axis along which a sample is taken.

    Not the last of x, and the last but one of the others where there are several, since
    compilers rarely lay that out as the last of memory; of rows, the row.
    """
    over = [a for a in axes if x.shape[a] > 1 and a < x.ndim - 1] or axes
    return over[max(len(over) - 2, 0)]


def _sample(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Some of the values that each mean is of: at least one of 33.

    Whatever the values, the mean of a fraction f of them is off the mean of all by
    sqrt(1 / f - 1) of their std at most. So `E[d**2] - E[d]**2` of distances d from it
    loses at most eps / f of the variance.
    """
    axis = _sampled(x, axes)
    n = x.shape[axis]
    if axis == x.ndim - 1:
        return lax.slice_in_dim(x, 0, min(n, max(n // _FRACTION, _LANES)), axis=axis)
    values = math.prod(x.shape[a] for a in axes)
    step = max(1, min(n, _FRACTION, values // _FEWEST))
    return lax.slice_in_dim(x, 0, n, step, axis=axis)


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if a in axes else n for a, n in enumerate(shape))


def _count(x: jax.Array, where: jax.Array | None, r: Reduction, dtype: Any):
    """Counts values, as (count, carry) with the shape of the moments."""
    shape, n = _reduced(x.shape, r.axes), r.size(x.shape)
    if where is None and isinstance(n, int):
        count = jnp.asarray(n, dtype)
        carry = jnp.asarray(n - int(jnp.finfo(dtype).dtype.type(n)), dtype)
        return jnp.broadcast_to(count, shape), jnp.broadcast_to(carry, shape)
    if where is not None:
        where = jnp.broadcast_to(_axes.sharded_like(where, x), x.shape)
        if where.dtype != jnp.bool_ or (
            # It shares the all-reduce of the sums in the dtype of statistics.
            isinstance(n, int) and n < 1 / jnp.finfo(dtype).eps
        ):
            (count,) = totals([where.astype(dtype)], r)
            return count, jnp.zeros_like(count)
    # Of 2**31 values and more, or of as many as jax.export leaves open.
    few = isinstance(n, int) and n < 2**31
    with jax.enable_x64(not few or jax.config.read("jax_enable_x64")):
        if where is None:
            total = jnp.broadcast_to(jnp.asarray(n), shape)
        else:
            (total,) = totals([where.astype(jnp.int32 if few else jnp.int64)], r)
        count = total.astype(dtype)
        return count, (total - count.astype(total.dtype)).astype(dtype)


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
        added(x, lax.neg(own(product(unit, m.mean), use))),
        lax.neg(own(product(unit, m.rest), use)),
    )


def standardized(x, m, centered: bool, of_units: jax.Array, use: int) -> jax.Array:
    """``(x - mean) / std``; ``of_units`` is 1 / std of values times their unit."""
    if centered:
        return product(distance(x, m, centered, use), own(of_units, use))
    # Of the largest values 1 / std is no normal number, but 16 / std is.
    rstd = product(scaled(of_units, 16), unit_of(m.var))
    return scaled(product(x, own(rstd, use)), 1 / 16)


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
    m, var = measured(*primals, r, dtype)
    return (m, var), _dots(r, m, primals, tangents)


def _dots(r, m, primals, tangents):
    """The tangents of moments m of x, and of their variance as users see it."""
    x, where = primals
    x_dot, where_dot = tangents_of(where, primals, tangents)
    # A checkpoint keeps for the backward pass just what the map is given. The barrier
    # of prevent_cse keeps XLA from sharing, and so storing, what both passes compute.
    dots = jax.checkpoint(functools.partial(_tangent, r), prevent_cse=True)
    *dots, var_dot, of_held = dots(x, where, kept(m), x_dot, where_dot)
    return moments_dot(m, *dots, of_held), var_dot


_measured.defjvp(_measured_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _known(x, where, m: Moments, r: Reduction):
    """`_measured`, of moments of x that were merged from those of its parts.

    Their derivative by x and the weights is the same, whatever they were merged from.
    """
    return m, opened(m).var


def _known_jvp(r, primals, tangents):
    *primals, m = primals
    m, var = known(*primals, m, r)
    return (m, var), _dots(r, m, primals, tangents[:2])


_known.defjvp(_known_jvp, symbolic_zeros=True)


# Compiled, so that a call outside of jit is one program; inlined, so that a call inside
# is no boundary to XLA; and traced once for all calls alike.
measured = jax.jit(_measured, static_argnums=(2, 3), inline=True)
known = jax.jit(_known, static_argnums=3, inline=True)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _seen(x, where, r: Reduction, dtype: Any) -> Moments:
    """`measured`, as users see moments."""
    return opened(*measured(x, where, r, dtype))


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


def opened_dot(m_dot: Moments, var: jax.Array, var_dot: jax.Array) -> Moments:
    """The tangent of what `opened` makes of moments, with a variance for users."""
    rest_dot = selected(is_inf(var), lax.neg(m_dot.var), m_dot.var_rest)
    return dataclasses.replace(m_dot, var=var_dot, var_rest=rest_dot)


def _tangent(r, x, where, m, x_dot, where_dot):
    """The derivative of moments, as a map that is linear in its last two arguments."""
    x, x_dot = (widened(counted(v, where), m.var.dtype) for v in (x, x_dot))
    # It keeps averages near the size of x_dot, and what follows is divided by it again.
    # The 64 is for backward: twice the std meets the cotangent of a variance before the
    # count divides both, and of the largest values would be beyond the dtype.
    factor = 64 * lax.stop_gradient(rstd_of(m.var, 0.0))
    a, c, aw, cw, *dots = dot_averages(r, x, where, m, factor, x_dot, where_dot)
    return mean_dot(m, a, aw), *dots, *var_dots(m, factor, c, cw)


def mean_dot(m: Kept, a: jax.Array, aw: jax.Array | None) -> jax.Array:
    """The tangent of a mean, from the averages of `dot_averages`."""
    return a if aw is None else added(a, product(aw, inverse(unit_of(m.var))))


def var_dots(m: Kept, factor: jax.Array, c: jax.Array, cw: jax.Array | None) -> tuple:
    """The tangents of a variance as users see it, and of it as `unit_of` says.

    From the averages of `dot_averages`.
    """
    # By products alone: XLA takes a quotient of a quotient for one by their product.
    unit = unit_of(m.var)
    of_values, std = inverse(unit), scaled(inverse(factor), 2)
    var_dot = product(product(c, std), of_values)
    held_dot = product(in_units(m, c, cw), std)
    if cw is not None:
        var_dot = added(var_dot, times_square(product(cw, std), of_values))
    ones = jnp.ones_like(unit)
    sign = selected(below_zero(m.var), lax.neg(ones), ones)
    return var_dot, product(held_dot, sign)


def in_units(m: Kept, v: jax.Array, vw: jax.Array | None) -> jax.Array:
    """All of an average of `dot_averages`, of values times the unit."""
    v = product(v, unit_of(m.var))
    return v if vw is None else added(v, vw)


def dot_averages(r, x, where, m, factor, x_dot, where_dot) -> tuple:
    """What the derivatives of moments and of what they normalize are made of.

        a = <x_dot>
        c = <Re(conj(x - mean) * x_dot)>, of values times the unit and a factor

    where <.> averages over the reduced axes and the devices, and an uncentered norm has
    no a. Weights w make <.> = sum(w * .) / sum(w), and add to the averages

        a: sum(w_dot * (x - mean)) / sum(w)
        c: sum(w_dot * (|x - mean|**2 - var)) / sum(w) / 2

    where they are not 0. Returns a, c, what weights add to each, once more times the
    unit, and the tangents of count and of the squares of weights; the last four are
    None where weights have no tangent, and the first of them without a mean, too.
    """

    def far(use):
        return distance(x, m, r.centered, use)

    x_hat = counted(standardized(x, m, r.centered, factor, 1), where)
    terms = [weighed(aligned(x_hat, x_dot), where)]
    if r.centered:
        terms.append(weighed(x_dot, where))
    if where_dot is None:
        c, *centers = average(terms, m.count, r)
        centers = centers or [jnp.zeros_like(m.mean)]
        return *centers, c, None, None, None, None
    w_dot = jnp.broadcast_to(where_dot.astype(m.var.dtype), x.shape)
    w_dot = counted(w_dot, where)
    # Where the variance is held, the square of a distance of small weight may not be.
    spread = aligned(product(far(3), factor / 2), far(3)) - jnp.abs(m.var) * factor / 2
    terms += [spread * w_dot, w_dot, weighed(2 * w_dot, where)]
    if r.centered:
        terms.append(product(far(4), w_dot))
    c, *averages = average(terms, m.count, r)
    a, aw = jnp.zeros_like(m.mean), None
    if r.centered:
        a, *averages, aw = averages
    cw, count_dot, squares_dot = averages
    return a, c, aw, cw, count_dot * m.count, squares_dot * m.count


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
    return _seen(x, where, r, statistics_dtype(x))
