"""The formula ``y = scale * (x - mean) / sqrt(var + epsilon) + bias``, two doors to it,
and its derivative.

`standardize` takes the moments of x itself and carries the one hand-written rule.
`normalize` is given its moments, which do not depend on x, and needs none.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax import _axes, _check, _moments, _numbers
from normjax._devices import Reduction
from normjax._measure import (
    Kept,
    distance,
    dot_averages,
    in_units,
    kept,
    mean_dot,
    measured,
    moments_dot,
    opened_dot,
    standardized,
    tangents_of,
    var_dots,
)
from normjax._moments import (
    Moments,
    closed,
    opened,
    rstd_of,
    unit_of,
    var_in,
    var_of_values,
)
from normjax._numbers import (
    added,
    by_parts,
    counted,
    own,
    product,
    scaled,
    widened,
)
from normjax._types import ArrayLike, Axes, DTypeLike, Scalar
from normjax.kernels import choice, library
from normjax.kernels.operation import Native, Operation, spread

# The name of the moments that a norm keeps for its backward pass. A policy of
# jax.checkpoint that saves them has no sum to take again, and nothing to send again
# between devices, when it computes y anew.
MOMENTS = "norm_moments"


def _small(x: jax.Array, *operands: jax.Array | None) -> bool:
    """Whether the operands together broadcast to less than the shape of x."""
    shapes = [a.shape for a in operands if a is not None]
    return jnp.broadcast_shapes(*shapes) != x.shape


def _apply(x, m, scale, bias, where, epsilon, centered, dtype):
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
    y = _apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
    return y, opened(m, var)


def _standardize_jvp(r, epsilon, dtype, primals, tangents):
    x, scale, bias, where = primals
    m, var = measured(x, where, r, _numbers.statistics_dtype(x, dtype))
    m, var = named((m, var))
    y = _apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
    tangents = tangents_of(where, primals, tangents)
    tangent = functools.partial(_tangent, r, epsilon, dtype)
    # A checkpoint keeps for the backward pass just what the map is given: x in its own
    # dtype, the mask, the moments and the parameters. The barrier of prevent_cse keeps
    # XLA from sharing, and so storing, what forward and backward both compute.
    tangent = jax.checkpoint(tangent, prevent_cse=True)
    y_dot, *dots, var_dot, of_held = tangent(x, scale, bias, where, kept(m), *tangents)
    m_dot = opened_dot(moments_dot(m, *dots, of_held), var, var_dot)
    return (y, opened(m, var)), (y_dot, m_dot)


_standardize.defjvp(_standardize_jvp, symbolic_zeros=True)


class How(NamedTuple):
    """How the operations of a norm run; static.

    Attributes:
      r: over what the moments are taken, on one device.
      epsilon: added to the variance.
      dtype: of y.
      implementation: None, "xla" or "native".
    """

    r: Reduction
    epsilon: float
    dtype: Any
    implementation: str | None

    def batched(self) -> "How":
        """How, for operands with one axis more, the first."""
        axes, group_axes = (
            tuple(a + 1 for a in of) for of in (self.r.axes, self.r.group_axes)
        )
        return self._replace(r=self.r._replace(axes=axes, group_axes=group_axes))

    def count(self, shape: tuple[int, ...]) -> int:
        """How many values of x each moment is of."""
        in_group = math.prod(shape[a] for a in self.r.group_axes)
        in_group //= self.r.num_groups or 1
        return in_group * math.prod(shape[a] for a in self.r.axes)

    def statistics_dtype(self, x: Any) -> Any:
        """The dtype of the moments of x."""
        return _numbers.statistics_dtype(x, self.dtype)

    def results(self, x: Any) -> list:
        """Shapes and dtypes of y, the mean, its rest, and the variance twice."""
        shape = tuple(1 if a in self.r.axes else n for a, n in enumerate(x.shape))
        return [(x.shape, self.dtype), *[(shape, self.statistics_dtype(x))] * 4]


def _forward_body(how: How, x, scale, bias):
    m, var = measured(x, None, how.r, how.statistics_dtype(x))
    y = _apply(x, m, scale, bias, None, how.epsilon, how.r.centered, how.dtype)
    return y, m.mean, m.rest, m.var, var


def _forward_on_gpu(how: How, x, scale, bias):
    """The body, with y of rows from sums of its own.

    Where nothing else asks for the moments, XLA then reads x and writes y in one
    kernel, which it does of no form that stands in two roundings, or after a select.
    """
    y, *moments = _forward_body(how, x, scale, bias)
    trailing = tuple(range(x.ndim - len(how.r.axes), x.ndim))
    are_rows = sorted(how.r.axes) == [*trailing] and not how.r.group_axes
    if how.statistics_dtype(x) != jnp.float32 or not are_rows:
        return y, *moments
    single = x.astype(jnp.float32)
    with jax.enable_x64(True):
        far = x.astype(jnp.float64)
        if how.r.centered:
            far = far - far.mean(trailing, keepdims=True)
        var = jnp.square(far).mean(trailing, keepdims=True)
        rstd = lax.rsqrt(var + how.epsilon)
        if how.r.centered:
            y = (far * rstd).astype(jnp.float32)
        else:
            # Of the largest values 1 / std is no normal number, but 16 / std is.
            y = scaled(single * (16 * rstd).astype(jnp.float32), 1 / 16)
    if scale is not None:
        y = y * widened(scale, jnp.float32)
    if bias is not None:
        y = y + widened(bias, jnp.float32)
    return y.astype(how.dtype), *moments


def _forward_native(how: How, x, scale, bias):
    y, mean, rest, held = library.forward(how, x, scale, bias)
    if y is None:
        (y,) = _again_body(how, x, scale, bias, mean, rest, held)
    return y, mean, rest, held, var_of_values(held)


def _again_body(how: How, x, scale, bias, mean, rest, held):
    m = Kept(held, mean, rest, held)
    return (_apply(x, m, scale, bias, None, how.epsilon, how.r.centered, how.dtype),)


def _tangent_body(
    how: How, x, scale, bias, mean, rest, var, x_dot, scale_dot, bias_dot
):
    if not how.r.centered:
        mean = rest = jnp.zeros_like(var)
    m = Kept(jnp.full_like(var, how.count(x.shape)), mean, rest, var)
    given = (how.r, how.epsilon, how.dtype, x, scale, bias, None, m)
    dots = _tangent(*given, x_dot, scale_dot, bias_dot, None)
    y_dot, mean_dot, *_, var_dot, held_dot = dots
    return y_dot, mean_dot, jnp.zeros_like(rest), held_dot, var_dot


def _cotangent_native(how: How, *operands):
    """The formula of `_cotangent_body` where the library takes the sums alone.

        dx = scale * rstd * dy - rstd * (a + x_hat * c)

    with a and c the averages of scale * dy and of scale * dy * x_hat.
    """
    r, like_x = how.r, functools.partial(widened, dtype=jnp.float32)
    x, scale, bias, mean, rest, var, dy = operands[:7]
    if not r.centered:
        mean = rest = jnp.zeros_like(var)
    given = (x, scale, bias, mean, rest, var, dy)
    found = library.sums(how, *given)
    if found is None:
        return library.backward(how, *given)
    # As in `_cotangent_body`.
    x, scale, bias, mean, rest, var, dy = lax.optimization_barrier(given)
    m = Kept(var, mean, rest, var)
    of_units = rstd_of(var, how.epsilon)
    rstd = product(of_units, unit_of(var))
    by = rstd if scale is None else rstd * like_x(scale)
    c, a = (t if scale is None else t * like_x(scale) for t in found)
    if r.group_axes:
        parts = (_axes.split_groups(t, r.group_axes, r.num_groups) for t in (c, a))
        shape = var.shape
        c, a = (
            _axes.join_groups(t.sum(-1, keepdims=True), r.group_axes, shape)
            for t in parts
        )
    n = how.count(x.shape)
    dx = like_x(dy) * by - standardized(like_x(x), m, r.centered, of_units, 2) * (
        rstd * (c / n)
    )
    if r.centered:
        dx = dx - rstd * (a / n)
    of_parameters = (
        t.sum([i for i, k in enumerate(of.shape) if k == 1], keepdims=True)
        .reshape(of.shape)
        .astype(of.dtype)
        for t, of in zip(found, (scale, bias), strict=True)
        if of is not None
    )
    return dx.astype(x.dtype), *of_parameters


def _cotangent_body(how: How, *operands):
    # The barrier keeps XLA from sharing, and so storing, what forward and backward
    # both compute.
    *given, y_ct, mean_ct, rest_ct, held_ct, var_ct = lax.optimization_barrier(operands)
    cts = (y_ct, mean_ct, rest_ct, held_ct, var_ct)

    def tangent(*dots):
        results = _tangent_body(how, *given, *dots)
        return [dot for dot, ct in zip(results, cts, strict=True) if ct is not None]

    back = jax.linear_transpose(tangent, *given[:3])
    return [a for a in back([ct for ct in cts if ct is not None]) if a is not None]


_forward = Operation(
    "norm",
    _forward_body,
    lambda how, x, *_: how.results(x),
    Native(library.why_not, _forward_native),
    parameters=(1, 2),
    bodies={"cuda": _forward_on_gpu, "rocm": _forward_on_gpu},
)
_tangents = Operation(
    "norm_tangent",
    _tangent_body,
    lambda how, x, *_: how.results(x),
    parameters=(1, 2, 7, 8),
)
_cotangents = Operation(
    "norm_cotangent",
    _cotangent_body,
    lambda how, *of: [(a.shape, a.dtype) for a in of[:3] if a is not None],
    Native(library.why_not_backward, _cotangent_native),
)


_again = Operation(
    "norm_again",
    _again_body,
    lambda how, x, *_: how.results(x)[:1],
    parameters=(1, 2),
)
_forward.recomputation(MOMENTS, 3, _again)


@_forward.derivative
def _(how, operands, tangents):
    results = _forward(how, *operands)
    _, mean, rest, held, _ = results
    if not how.r.centered:  # the means are zero, and need not be kept
        mean = rest = None
    return results, _tangents(how, *operands, mean, rest, held, *tangents)


@_tangents.transposition
def _(how, operands, cts):
    *given, _, _, _ = operands
    if all(ct is None for ct in cts):
        cts = [jnp.zeros(given[0].shape, how.dtype), *cts[1:]]
    _, *of_moments = cts
    if how.implementation == "native" and any(ct is not None for ct in of_moments):
        # Kernels have no such cotangents, and no call has asked for them by name.
        how = how._replace(implementation=None)
    there = [a is not None for a in given[:3]]
    return [*[None] * 6, *spread(_cotangents(how, *given, *cts), there)]


@_cotangents.transposition
def _(how, operands, cts):
    given = operands[:6]
    dots = iter(cts)
    dots = (None if a is None else _or_zeros(next(dots), a) for a in given[:3])
    return [*[None] * 6, *_tangents(how, *given, *dots)]


def _or_zeros(a: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.zeros_like(like) if a is None else a


def _why_no_form(x, scale, bias, where, r: Reduction) -> str | None:
    """Why the operations are not for these operands, or None where they are."""
    operands = [a for a in (x, scale, bias) if a is not None]
    if where is not None:
        return "a mask or weights"
    if r.names:
        return "moments synced over named axes"
    if any(map(jnp.iscomplexobj, operands)):
        return "complex numbers"
    if not all(isinstance(n, int) for n in x.shape) or x.size == 0:
        return f"x.shape={x.shape}"
    if any(_axes.is_on_explicit_mesh(a) for a in operands):
        # Under vmap an axis that x lies over is not seen.
        return "arrays on an explicit mesh"
    return None


def _by_operations(x, scale, bias, r, epsilon, dtype, implementation):
    """`_standardize` by operations that have a form for each machine."""
    how = How(r, epsilon, jnp.dtype(dtype), implementation)
    y, mean, rest, held, var = _forward(how, x, scale, bias)
    n, dtype = how.count(x.shape), mean.dtype
    count = jnp.full(mean.shape, n, dtype)
    carry = jnp.full(mean.shape, n - int(dtype.type(n)), dtype)
    return y, opened(Moments(count, mean, held, carry, rest, squares=count), var)


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
        why_not = _why_no_form(x, scale, bias, where, r)
        if why_not is None:
            return _by_operations(x, scale, bias, r, epsilon, dtype, implementation)
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
        y = _apply(x, m, scale, bias, where, epsilon, r.centered, dtype)
        return y, opened(m, var)

    return _viewed(norm, x, scale, bias, where, view)


def named(tree: Any) -> Any:
    """Names moments that a norm keeps for its backward pass.

    By parts: of a complex array jax 0.10 cannot keep a named one.
    """

    def name(part):
        return checkpoint_name(part, MOMENTS)

    return jax.tree.map(lambda a: by_parts(name, a), tree)


def _tangent(
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
        if r.centered or bias is not None:
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
    return _apply(x, given, scale, bias, where, epsilon, True, dtype)
