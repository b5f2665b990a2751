"""The formula ``y = scale * (x - mean) / sqrt(var + epsilon) + bias``, two doors to it,
and its derivative.

`standardize` takes the moments of x itself and carries the one hand-written rule.
`normalize` is given its moments, which do not depend on x, and needs none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from normjax import _axes, _check, _moments
from normjax._moments import (
    Moments,
    Reduction,
    added,
    aligned,
    average,
    counted,
    own,
    product,
    squared,
    weighed,
    widened,
)
from normjax._types import ArrayLike, Axes, DTypeLike, Scalar

# The name of the moments that a norm keeps for its backward pass. A policy of
# jax.checkpoint that saves them has no sum to take again, and nothing to send again
# between devices, when it computes y anew.
MOMENTS = "norm_moments"


def _rstd(var: jax.Array, epsilon: float) -> jax.Array:
    return lax.rsqrt(var + jnp.asarray(epsilon, var.dtype))


def _small(x: jax.Array, *operands: jax.Array | None) -> bool:
    """Whether the operands together broadcast to less than the shape of x."""
    shapes = [a.shape for a in operands if a is not None]
    return jnp.broadcast_shapes(*shapes) != x.shape


def _apply(x, m, scale, bias, where, epsilon, centered, dtype):
    """The formula, in the dtype of the moments; y is zero where nothing counts."""
    stat = m.var.dtype
    y = widened(counted(x, where), stat)
    if centered:
        y = added(added(y, -own(m.mean, 3)), -own(m.rest, 3))
    rstd = _rstd(m.var, epsilon)
    if scale is None or _small(x, rstd, scale):
        factor = rstd if scale is None else product(rstd, widened(scale, stat))
        y = product(y, own(factor, 1))
    else:
        y = product(product(y, own(rstd, 1)), widened(scale, stat))
    if bias is not None:
        y = added(y, widened(bias, stat))
    return counted(y.astype(dtype), where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _standardize(x, scale, bias, where, r: Reduction, epsilon: float, dtype: Any):
    """Normalizes x by its own moments, over the reduction r.

    Args:
      x: floating or complex, of rank 1 or more.
      scale: None, or of the rank of x, broadcasting to it.
      bias: as scale.
      where: None, or boolean or weights, of the rank of x, broadcasting to it.
      r: over what the moments are taken.
      epsilon: added to the variance.
      dtype: of y.

    Returns:
      y and the moments, which broadcast against x. Both may be differentiated, in
      forward and reverse mode, to any order.
    """
    m = _moments.take(x, where, r, _moments.statistics_dtype(x, dtype))
    return _apply(x, m, scale, bias, where, epsilon, r.centered, dtype), m


def _standardize_jvp(r, epsilon, dtype, primals, tangents):
    x, scale, bias, where = primals
    # The moments first, and y from them as named, so that y does not want them anew.
    m = _standardize(x, None, None, where, r, epsilon, dtype)[1]
    m = checkpoint_name(m, MOMENTS)
    y = _apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
    *tangents, where_dot = tangents
    # The tangent of weights that are not differentiated costs nothing; masks have none.
    weights = where is not None and where.dtype != jnp.bool_
    if not weights or isinstance(where_dot, SymbolicZero):
        where_dot = None
    tangents = [
        jnp.zeros_like(a) if isinstance(t, SymbolicZero) else t
        for a, t in zip((x, scale, bias), tangents, strict=True)
    ]
    tangent = functools.partial(_tangent, r, epsilon, dtype)
    # A checkpoint keeps for the backward pass just what the map is given: x in its own
    # dtype, the mask, the moments and the parameters. The barrier of prevent_cse keeps
    # XLA from sharing, and so storing, what forward and backward both compute.
    tangent = jax.checkpoint(tangent, prevent_cse=True)
    y_dot, mean_dot, var_dot, count_dot = tangent(
        x, scale, bias, where, m, *tangents, where_dot
    )
    if count_dot is None:
        count_dot = jnp.zeros_like(m.count)
    m_dot = Moments(
        count_dot, mean_dot, var_dot, jnp.zeros_like(m.carry), jnp.zeros_like(m.rest)
    )
    return (y, m), (y_dot, m_dot)


_standardize.defjvp(_standardize_jvp, symbolic_zeros=True)

# Compiled, so that a call outside of jit is one program; inlined, so that a call inside
# is no boundary to XLA; and traced once for all calls alike.
standardize = jax.jit(_standardize, static_argnums=(4, 5, 6), inline=True)


def _tangent(
    r, epsilon, dtype, x, scale, bias, where, m, x_dot, scale_dot, bias_dot, where_dot
):
    """The derivative, as a map that is linear in its last four arguments.

        a     = <x_dot>                    mean_dot = a
        c     = <Re(conj(x_hat) * x_dot)>  var_dot  = 2 c / rstd
        y_dot = scale * rstd * (x_dot - a - x_hat * c) + x_hat * scale_dot + bias_dot

    where <.> averages over the reduced axes and the devices, and an uncentered norm has
    no a. Weights w make <.> = sum(w * .) / sum(w), and add to the averages

        a: sum(w_dot * (x - mean)) / sum(w)
        c: sum(w_dot * (|x - mean|**2 - var)) / sum(w) * rstd / 2

    where they are not 0. JAX transposes the map, and that is reverse mode.
    """
    stat = m.var.dtype
    x, x_dot = (widened(counted(v, where), stat) for v in (x, x_dot))

    rstd = _rstd(m.var, epsilon)

    def centered(use):  # one for each use, with its own copies: see `own`
        return (x - own(m.mean, use)) - own(m.rest, use) if r.centered else x

    def x_hat(use):
        return counted(product(centered(use), own(rstd, use)), where)

    terms = [weighed(aligned(x_hat(1), x_dot), where)]
    if r.centered:
        terms.append(weighed(x_dot, where))
    count_dot = None
    if where_dot is not None:
        w_dot = counted(jnp.broadcast_to(where_dot.astype(stat), x.shape), where)
        spread = (squared(centered(3)) - m.var) * (rstd / 2)
        terms[0] = terms[0] + spread * w_dot
        if r.centered:
            terms[1] = terms[1] + product(centered(4), w_dot)
        terms.append(w_dot)
    averages = average(terms, m, r)
    c = averages[0]
    a = averages[1] if r.centered else jnp.zeros_like(m.mean)
    if where_dot is not None:
        count_dot = averages[-1] * m.count
    if scale is not None:
        scale, scale_dot = widened(scale, stat), widened(scale_dot, stat)
    if bias is not None:
        bias_dot = widened(bias_dot, stat)
    if scale is None or _small(x, rstd, scale):
        # Of x_dot, x_hat and 1, the coefficients first, at their small shape: the
        # transpose then needs just the two sums that dscale and dbias are anyway.
        of_x_dot = rstd if scale is None else product(scale, rstd)
        of_x_hat = -product(of_x_dot, c)
        if scale is not None:
            of_x_hat = scale_dot + of_x_hat
        y_dot = added(product(of_x_dot, x_dot), product(x_hat(2), of_x_hat))
        if r.centered or bias is not None:
            of_one = -product(of_x_dot, a)
            y_dot = added(y_dot, of_one if bias is None else added(bias_dot, of_one))
    else:
        inner = x_dot - a if r.centered else x_dot
        inner = product(rstd, inner - product(x_hat(2), c))
        y_dot = added(product(scale, inner), product(x_hat(3), scale_dot))
        if bias is not None:
            y_dot = added(y_dot, bias_dot)
    return counted(y_dot.astype(dtype), where), a, 2 * c / rstd, count_dot


def normalize(
    x: ArrayLike,
    moments: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: Scalar,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes ``x`` by moments that are given.

    ``y = scale * (x - mean) / sqrt(var + epsilon) + bias``. The moments count as
    independent of ``x``, so that the gradient needs no reduction: inference, frozen
    statistics, moments of another batch. Where they are those of ``x`` itself and carry
    gradients (``normalize(x, moments(x, axis))``), the gradient is the full one.

    Args:
      x: ``[...]``, floating or complex.
      moments: of the rank of ``x``, broadcasting to it, or with the features' shape.
      scale: None, the features' shape, or of the rank of ``x``, broadcasting to it.
      bias: as ``scale``.
      epsilon: added to the variance; above zero. A traced one has a derivative, too,
        and is not checked.
      feature_axis: the axes, one or several, along which a vector of features lies.
      where: boolean or weights, broadcasts to ``x``; ``y`` is zero where it is.
      dtype: of ``y``; None for that of ``x``.

    Returns:
      y, of the shape of ``x``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if shapes, axes or epsilon do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> m = normjax.Moments(jnp.ones(2), mean=jnp.array([1.0, 2.0]), var=jnp.ones(2))
      >>> normjax.normalize(jnp.array([[2.0, 4.0]]), m, epsilon=1e-6).round(3)
      Array([[1., 2.]], dtype=float32)
    """
    return normalized(
        "normalize",
        x,
        moments,
        scale,
        bias,
        epsilon=epsilon,
        feature_axis=feature_axis,
        where=where,
        dtype=dtype,
    )


def normalized(
    name, x, moments, scale, bias, *, epsilon, feature_axis, where, dtype
) -> jax.Array:
    """`normalize`, for the function ``name`` that errors are to name."""
    x = _check.inexact(name, x)
    moments = _moments.uniform(name, moments)
    axes = _axes.canonical(name, feature_axis, x.ndim, "feature_axis")
    where = _check.where(name, where, x.shape)
    lay = functools.partial(_axes.lay, name, axes=axes, shape=x.shape)
    scale, bias = lay("scale", scale), lay("bias", bias)
    operands = {"x": x, "scale": scale, "bias": bias, "moments.mean": moments.mean}
    dtype = _check.output_dtype(name, dtype, operands)
    stat = _moments.statistics_dtype(x, dtype)
    mean = widened(lay("moments.mean", moments.mean), stat)
    var = lay("moments.var", moments.var).astype(stat)
    rest = widened(jnp.asarray(lay("moments.rest", moments.rest)), stat)
    m = Moments(jnp.ones_like(var), mean, var, jnp.zeros_like(var), rest)
    epsilon = _check.epsilon(name, epsilon, stat)
    return _apply(x, m, scale, bias, where, epsilon, True, dtype)
