"""Norms as operations that have a form for each machine: see `kernels.operation`.

They are for arrays without a mask, of real numbers, with moments of one device.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax import _axes
from normjax._devices import Reduction, average
from normjax._formula import MOMENTS, apply, tangent
from normjax._measure import Kept, measured, standardized
from normjax._moments import Moments, opened, rstd_of, unit_of, var_of_values
from normjax._numbers import product, scaled, statistics_dtype, widened
from normjax.kernels import library
from normjax.kernels.operation import Native, Operation, spread


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

    def here(self, whole: bool) -> "How":
        """How, in a program whose arrays lie whole on its device, or do not."""
        return self._replace(r=self.r._replace(whole=whole))

    def statistics_dtype(self, x: Any) -> Any:
        """The dtype of the moments of x."""
        return statistics_dtype(x, self.dtype)

    def results(self, x: Any) -> list:
        """Shapes and dtypes of y, the mean, its rest, and the variance twice."""
        shape = tuple(1 if a in self.r.axes else n for a, n in enumerate(x.shape))
        return [(x.shape, self.dtype), *[(shape, self.statistics_dtype(x))] * 4]


def _forward_body(how: How, x, scale, bias):
    m, var = measured(x, None, how.r, how.statistics_dtype(x))
    y = apply(x, m, scale, bias, None, how.epsilon, how.r.centered, how.dtype)
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
    if library.leaves_arrays(how, x, scale, bias):
        mean, rest, held = library.moments(how, x, scale, bias)
        (y,) = _again_body(how, x, scale, bias, mean, rest, held)
    else:
        y, mean, rest, held = library.forward(how, x, scale, bias)
    return y, mean, rest, held, var_of_values(held)


def _again_body(how: How, x, scale, bias, mean, rest, held):
    m = Kept(held, mean, rest, held)
    return (apply(x, m, scale, bias, None, how.epsilon, how.r.centered, how.dtype),)


def _kept(how: How, x, mean, rest, var) -> Kept:
    """What is kept of moments; the means of an uncentered norm, zeros, are not."""
    if not how.r.centered:
        mean = rest = jnp.zeros_like(var)
    return Kept(jnp.full_like(var, how.r.size(x.shape)), mean, rest, var)


def _tangent_body(
    how: How, x, scale, bias, mean, rest, var, x_dot, scale_dot, bias_dot
):
    m = _kept(how, x, mean, rest, var)
    given = (how.r, how.epsilon, how.dtype, x, scale, bias, None, m)
    dots = tangent(*given, x_dot, scale_dot, bias_dot, None)
    y_dot, mean_dot, *_, var_dot, held_dot = dots
    return y_dot, mean_dot, jnp.zeros_like(var), held_dot, var_dot


def _cotangent_native(how: How, x, scale, bias, mean, rest, var, dy, *_):
    m = _kept(how, x, mean, rest, var)
    if library.leaves_arrays(how, x, scale, bias):
        found = library.sums(how, x, scale, bias, m, dy)
        return _from_sums(how, x, scale, bias, m, dy, found)
    return library.backward(how, x, scale, bias, m, dy)


def _cotangent_on_gpu(how: How, *operands):
    """The body, with sums of the columns of samples in two steps.

    A sum over all of a column is the work of few threads, so that XLA stores dy * x_hat
    first, in float32. Many short sums it fuses with the product that they add up. The
    columns of a whole batch it cuts into pieces by itself. Where `jit` divides the axis
    that is cut, the short sums cross the devices, which are more than the long ones.
    """
    x, scale, bias, mean, rest, var, dy, *of_moments = operands
    axes, shape = how.r.axes, x.shape
    *_, last = [a for a in axes if shape[a] > 1] or [0]
    pieces = [n for n in range(16, 257) if shape[last] % n == 0]
    samples = (n for a, n in enumerate(shape[:-1]) if a not in axes)
    are_columns = x.ndim - 1 not in axes and math.prod(samples) > 1
    alike = all(a is None or all(a.shape[i] == 1 for i in axes) for a in (scale, bias))
    alone = dy is not None and all(ct is None for ct in of_moments)
    is_single = how.statistics_dtype(x) == jnp.float32
    if not (pieces and are_columns and alike and alone and is_single):
        return _cotangent_body(how, *operands)
    # As in `_cotangent_body`.
    x, mean, rest, var = lax.optimization_barrier((x, mean, rest, var))
    m = _kept(how, x, mean, rest, var)
    wide, wide_dy = (widened(a, jnp.float32) for a in (x, dy))
    x_hat = standardized(wide, m, how.r.centered, rstd_of(m.var, how.epsilon), 1)

    def total(a):
        cut = shape[last] // pieces[-1], pieces[-1]
        short = a.reshape(*shape[:last], *cut, *shape[last + 1 :]).sum(last + 1)
        return lax.optimization_barrier(short).sum(axes, keepdims=True)

    found = total(wide_dy * x_hat), total(wide_dy)
    return _from_sums(how, x, scale, bias, m, dy, found)


def _from_sums(how: How, x, scale, bias, m: Kept, dy, found):
    """The cotangents from the sums of dy * x_hat and of dy of each channel.

        dx = scale * rstd * dy - rstd * (a + x_hat * c)

    with a and c the averages of scale * dy and of scale * dy * x_hat.
    """
    # So that dx is another kernel, and nothing that it shares with the sums is stored.
    x, m, dy = lax.optimization_barrier((x, m, dy))
    r, (x_dtype, x, dy) = how.r, (x.dtype, *(widened(a, jnp.float32) for a in (x, dy)))
    of_units = rstd_of(m.var, how.epsilon)
    rstd = by = product(of_units, unit_of(m.var))
    c, a = found
    if scale is not None:
        wide = widened(scale, jnp.float32)
        by, c, a = by * wide, c * wide, a * wide
    c, a = average([c, a], m.count, r)
    dx = dy * by - standardized(x, m, r.centered, of_units, 2) * (rstd * c)
    if r.centered:
        dx = dx - rstd * a
    of_parameters = (
        t.sum([i for i, n in enumerate(of.shape) if n == 1], keepdims=True)
        .reshape(of.shape)
        .astype(of.dtype)
        for t, of in zip(found, (scale, bias), strict=True)
        if of is not None
    )
    return dx.astype(x_dtype), *of_parameters


def _cotangent_body(how: How, *operands):
    # The barrier keeps XLA from sharing, and so storing, what forward and backward
    # both compute. What makes the cotangents may share a kernel with their sums.
    *given, y_ct, mean_ct, rest_ct, held_ct, var_ct = operands
    given = lax.optimization_barrier(given)
    cts = (y_ct, mean_ct, rest_ct, held_ct, var_ct)

    def linear(*dots):
        results = _tangent_body(how, *given, *dots)
        return [dot for dot, ct in zip(results, cts, strict=True) if ct is not None]

    back = jax.linear_transpose(linear, *given[:3])
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
    bodies={"cuda": _cotangent_on_gpu, "rocm": _cotangent_on_gpu},
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


def why_no_form(x, scale, bias, where, r: Reduction) -> str | None:
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


def by_operations(x, scale, bias, r, epsilon, dtype, implementation):
    """A norm by operations that have a form for each machine."""
    how = How(r, epsilon, jnp.dtype(dtype), implementation)
    y, mean, rest, held, var = _forward(how, x, scale, bias)
    n, dtype = how.r.size(x.shape), mean.dtype
    count = jnp.full(mean.shape, n, dtype)
    carry = jnp.full(mean.shape, n - int(dtype.type(n)), dtype)
    return y, opened(Moments(count, mean, held, carry, rest, squares=count), var)
