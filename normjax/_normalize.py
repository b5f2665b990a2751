"""Two doors to the formula ``y = scale * (x - mean) / sqrt(var + epsilon) + bias``.

`standardize` takes the moments of x itself and carries the one hand-written rule.
`normalize` is given its moments, which do not depend on x, and needs none.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normjax import _axes, _check, _formula, _moments, _numbers
from normjax._devices import Reduction
from normjax._formula import apply, named
from normjax._measure import (
    Kept,
    kept,
    measured,
    moments_dot,
    opened_dot,
    tangents_of,
)
from normjax._moments import Moments, closed, opened, var_in
from normjax._numbers import widened
from normjax._operations import by_operations, why_no_form
from normjax._types import ArrayLike, Axes, DTypeLike, Scalar
from normjax.kernels import choice


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
    m, var = measured(x, where, r, _numbers.statistics_dtype(x, dtype))
    y = apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
    return y, opened(m, var)


def _standardize_jvp(r, epsilon, dtype, primals, tangents):
    x, scale, bias, where = primals
    m, var = measured(x, where, r, _numbers.statistics_dtype(x, dtype))
    m, var = named((m, var))
    y = apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
    tangents = tangents_of(where, primals, tangents)
    tangent = functools.partial(_formula.tangent, r, epsilon, dtype)
    # A checkpoint keeps for the backward pass just what the map is given: x in its own
    # dtype, the mask, the moments and the parameters. The barrier of prevent_cse keeps
    # XLA from sharing, and so storing, what forward and backward both compute.
    tangent = jax.checkpoint(tangent, prevent_cse=True)
    y_dot, *dots, var_dot, of_held = tangent(x, scale, bias, where, kept(m), *tangents)
    m_dot = opened_dot(moments_dot(m, *dots, of_held), var, var_dot)
    return (y, opened(m, var)), (y_dot, m_dot)


_standardize.defjvp(_standardize_jvp, symbolic_zeros=True)


class View(NamedTuple):
    """How x is laid out before it is normalized.

    Attributes:
      batch: the axis that ghost batches split.
      size: how many samples are in a ghost batch; 0 for no ghost batches.
      units: axes of size 1 that are left out, of the ghosts' x where there are some.
    """

    batch: int = 0
    size: int = 0
    units: tuple[int, ...] = ()

    def ghosts(self, shape: tuple, whole: tuple) -> tuple:
        """The shape of an operand of x of shape ``whole``: N -> (N / size, size)."""
        if not self.size:
            return shape
        n = shape[self.batch]
        split = (n // self.size, self.size) if n == whole[self.batch] else (1, 1)
        return *shape[: self.batch], *split, *shape[self.batch + 1 :]


def _viewed(norm, x, scale, bias, where, view: View):
    """Normalizes operands in a view; y has the shape of x, the moments are in it."""
    shape = x.shape
    if view.size and where is not None:
        where = _axes.lying_like(where, x)
    operands = (
        None
        if a is None
        else jnp.squeeze(a.reshape(view.ghosts(a.shape, shape)), view.units)
        for a in (x, scale, bias, where)
    )
    y, m = norm(*operands)
    if view.units:
        y, m = jax.tree.map(lambda a: jnp.expand_dims(a, view.units), (y, m))
    return y.reshape(shape), m


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8), inline=True)
def standardize(x, scale, bias, where, r, epsilon, dtype, view: View, implementation):
    """`_standardize` in a view.

    Compiled, so that a call outside of jit is one program; inlined, so that a call
    inside is no boundary to XLA; and traced once for all calls alike. The view is taken
    inside: outside, jax_debug_nans stops at one of NaN that does not count.
    """

    def norm(x, scale, bias, where):
        why_not = why_no_form(x, scale, bias, where, r)
        if why_not is None:
            return by_operations(x, scale, bias, r, epsilon, dtype, implementation)
        if implementation == "native":
            raise choice.refused(implementation, why_not)
        return _standardize(x, scale, bias, where, r, epsilon, dtype)

    return _viewed(norm, x, scale, bias, where, view)


@functools.partial(jax.jit, static_argnums=(5, 6, 7), inline=True)
def standardize_traced(x, scale, bias, where, epsilon, r, dtype, view: View):
    """`standardize` with an epsilon that is an operand, and has a derivative.

    By the moments' own rule, and by the formula.
    """

    def norm(x, scale, bias, where):
        m, var = measured(x, where, r, _numbers.statistics_dtype(x, dtype))
        m, var = named((m, var))
        y = apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
        return y, opened(m, var)

    return _viewed(norm, x, scale, bias, where, view)


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
    epsilon = _check.epsilon(name, epsilon, _numbers.statistics_dtype(x, dtype))
    # All fields have one shape; the mean comes first, and errors name it.
    fields = {"mean": moments.mean, **vars(moments)}
    fields = {k: lay(f"moments.{k}", v) for k, v in fields.items()}
    return _given(x, Moments(**fields), scale, bias, where, epsilon, dtype)


# Compiled, so that a call outside of jit is one program, and inlined in one inside.
@functools.partial(jax.jit, static_argnums=6, inline=True)
def _given(x, m: Moments, scale, bias, where, epsilon, dtype):
    """The formula by moments as users see them, which broadcast against x."""
    stat = _numbers.statistics_dtype(x, dtype)
    var = var_in(closed(m).var, stat)
    mean, rest = widened(m.mean, stat), widened(m.rest, stat)
    given = Kept(jnp.ones_like(var), mean, rest, var)
    return apply(x, given, scale, bias, where, epsilon, True, dtype)
