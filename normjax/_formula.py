"""The formula ``y = scale * (x - mean) / sqrt(var + epsilon) + bias`` of given moments,
and its derivative where they are those of x.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax._measure import (
    distance,
    dot_averages,
    in_units,
    mean_dot,
    standardized,
    var_dots,
)
from normjax._moments import rstd_of, unit_of
from normjax._numbers import added, by_parts, counted, own, product, widened

# The name of the moments that a norm keeps for its backward pass. A policy of
# jax.checkpoint that saves them has no sum to take again, and nothing to send again
# between devices, when it computes y anew.
MOMENTS = "norm_moments"


def _small(x: jax.Array, *operands: jax.Array | None) -> bool:
    """Whether the operands together broadcast to less than the shape of x."""
    shapes = [a.shape for a in operands if a is not None]
    return jnp.broadcast_shapes(*shapes) != x.shape


def apply(x, m, scale, bias, where, epsilon, centered, dtype):
    """The formula, in the dtype of the moments; y is zero where nothing counts.

    So is the distance that scale meets there: it may be infinite, and the gradient of
    scale is a sum of distances times a dy of 0.
    """
    stat = m.var.dtype
    x = widened(counted(x, where), stat)
    rstd = rstd_of(m.var, epsilon)
    if scale is not None:
        scale = widened(scale, stat)
    if centered and scale is not None and _small(x, rstd, scale):
        # One small array, where there would be two.
        far = counted(distance(x, m, centered, 5), where)
        y = product(far, own(product(rstd, scale), 1))
    else:
        y = counted(standardized(x, m, centered, rstd, 5), where)
        y = y if scale is None else product(y, scale)
    if bias is not None:
        y = added(y, widened(bias, stat))
    return counted(y.astype(dtype), where)


def tangent(
    r, epsilon, dtype, x, scale, bias, where, m, x_dot, scale_dot, bias_dot, where_dot
):
    """The derivative, as a map that is linear in its last four arguments.

        a     = <x_dot>                    mean_dot = a
        c     = <Re(conj(x_hat) * x_dot)>  var_dot  = 2 c / rstd
        y_dot = scale * rstd * (x_dot - a - x_hat * c) + x_hat * scale_dot + bias_dot

    where <.> averages over the reduced axes and the devices: see `dot_averages`. JAX
    transposes the map, and that is reverse mode.
    """
    stat = m.var.dtype
    x, x_dot = (widened(counted(v, where), stat) for v in (x, x_dot))
    of_units = rstd_of(m.var, epsilon)
    rstd = product(of_units, unit_of(m.var))

    def x_hat(use):  # one for each use, with its own copies: see `own`
        return counted(standardized(x, m, r.centered, of_units, use), where)

    a, c, aw, cw, *dots = dot_averages(r, x, where, m, of_units, x_dot, where_dot)
    dots = [mean_dot(m, a, aw), *dots, *var_dots(m, of_units, c, cw)]
    a, c = in_units(m, a, aw), in_units(m, c, cw)
    if scale is not None:
        scale, scale_dot = widened(scale, stat), widened(scale_dot, stat)
    if bias is not None:
        bias_dot = widened(bias_dot, stat)
    if scale is None or _small(x, rstd, scale):
        # Of x_dot, x_hat and 1, the coefficients first, at their small shape: the
        # transpose then needs just the two sums that dscale and dbias are anyway. The
        # barriers keep XLA from taking those of a sample and those of a batch apart.
        of_x_dot = rstd if scale is None else product(scale, rstd)
        of_averages = of_units if scale is None else product(scale, of_units)
        of_x_hat = -product(of_averages, c)
        if scale is not None:
            of_x_hat = lax.optimization_barrier(scale_dot + of_x_hat)
        y_dot = added(product(of_x_dot, x_dot), product(x_hat(2), of_x_hat))
        if r.centered:  # an uncentered norm has no bias
            of_one = -product(of_averages, a)
            if bias is not None:
                of_one = lax.optimization_barrier(added(bias_dot, of_one))
            y_dot = added(y_dot, of_one)
    else:
        inner = product(rstd, x_dot)
        inner = lax.sub(inner, product(x_hat(2), product(c, of_units)))
        if r.centered:
            inner = lax.sub(inner, product(of_units, a))
        y_dot = added(product(scale, inner), product(x_hat(3), scale_dot))
        if bias is not None:
            y_dot = added(y_dot, bias_dot)
    return counted(y_dot.astype(dtype), where), *dots


def named(tree: Any) -> Any:
    """Names moments that a norm keeps for its backward pass.

    By parts: of a complex array jax 0.10 cannot keep a named one.
    """

    def name(part):
        return checkpoint_name(part, MOMENTS)

    return jax.tree.map(lambda a: by_parts(name, a), tree)
