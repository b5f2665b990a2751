"""Numbers: dtypes of statistics, products of real and complex, sums that are exact.

In `jax.lax`, since each operation of `jax.numpy` is a traced function of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax import _axes


def exact_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a + b as rounded, and what the rounding left over (Knuth)."""
    total = lax.add(a, b)
    part = lax.sub(total, a)
    lost = lax.add(lax.sub(a, lax.sub(total, part)), lax.sub(b, part))
    return total, lost


def statistics_dtype(x: jax.Array, dtype: Any = None) -> Any:
    """The dtype statistics accumulate in: float32 or what x or y have beyond it.

    Real. The mean of complex x has the complex dtype of this precision.
    """
    dtypes = [jnp.float32, x.dtype, x.dtype if dtype is None else dtype]
    return max((jnp.finfo(d).dtype for d in dtypes), key=lambda d: d.itemsize)


def number(value: float, like: jax.Array) -> np.ndarray:
    """A number in the dtype of an array, with which `jax.lax` combines it."""
    return np.asarray(value, like.dtype)


def widened(a: jax.Array, dtype: Any) -> jax.Array:
    """Returns ``a`` in a dtype of statistics, or the complex one of its precision."""
    if jnp.iscomplexobj(a):
        dtype = jnp.complex64 if dtype == jnp.float32 else jnp.complex128
    return lax.convert_element_type(a, dtype)


def by_parts(f: Callable, a: jax.Array) -> jax.Array:
    """Applies ``f`` to the real and the imaginary part, if there are two."""
    return lax.complex(f(a.real), f(a.imag)) if jnp.iscomplexobj(a) else f(a)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a * b``, where either may be complex and none is made so for it."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(b):
        return lax.mul(a, b)
    a, b = (a, b) if jnp.iscomplexobj(a) else (b, a)
    return by_parts(lambda part: lax.mul(part, b), a)


def scaled(a: jax.Array, factor: float) -> jax.Array:
    """``a`` times a number, in its dtype."""
    return by_parts(lambda part: lax.mul(part, number(factor, part)), a)


def added(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a + b``, where either may be complex."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(b):
        return lax.add(a, b)
    a, b = (a, b) if jnp.iscomplexobj(a) else (b, a)
    return lax.add(a, lax.convert_element_type(b, a.dtype))


def aligned(a: jax.Array, b: jax.Array) -> jax.Array:
    """``Re(conj(a) * b)``, what the square is to a product: real, linear in both."""
    if jnp.iscomplexobj(a):
        return a.real * b.real + a.imag * b.imag
    return lax.mul(a, b)


def squared(a: jax.Array) -> jax.Array:
    """``|a|**2``."""
    return aligned(a, a) if jnp.iscomplexobj(a) else lax.square(a)


def own(a: jax.Array, copy: int) -> jax.Array:
    """Gives a consumer its own copy of a small array, numbered from 1 among them.

    XLA on a CPU stores an expression that two consumers share, though it has the size
    of x and costs less to compute again. With a copy of the small operand for each, the
    expressions differ, and nothing of the size of x is stored. A copy of 1 / std also
    keeps its square root from being taken anew for each value, and the sums before it
    out of the loop that writes y. Elsewhere a barrier could split a fusion: in programs
    for other machines, wherever they are compiled, it is the array itself.
    """
    return _OWN.bind(a, copy=copy)


def _owned(a: jax.Array, *, copy: int) -> jax.Array:
    """`own` on a CPU."""
    # XLA merges barriers of the same operands.
    a, _ = lax.optimization_barrier((a, np.int32(copy)))
    if a.shape[-1] == 1:
        return a
    # What makes an array that lies along the last axis would be computed anew for each
    # value there, in spite of the barrier. Divisions are what XLA leaves out of loops.
    ones = lax.optimization_barrier(jnp.ones(a.shape, jnp.finfo(a.dtype).dtype))
    return by_parts(lambda part: lax.div(part, ones), a)


def _batched(arrays, dims, copy: int):
    (a,), (d,) = arrays, dims
    return _OWN.bind(jnp.moveaxis(a, d, 0), copy=copy), 0


_OWN = Primitive("own")
_OWN.def_impl(lambda a, copy: a)
_OWN.def_abstract_eval(lambda a, copy: a)
ad.deflinear2(_OWN, lambda ct, a, copy: [ct])
batching.primitive_batchers[_OWN] = _batched
mlir.register_lowering(_OWN, lambda ctx, a, copy: [a])
mlir.register_lowering(
    _OWN, mlir.lower_fun(_owned, multiple_results=False), platform="cpu"
)


def counted(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zeroes what does not count, so that NaN there leaves no trace."""
    if where is None:
        return x
    if where.dtype != jnp.bool_:
        where = lax.gt(where, number(0, where))
    return selected(_axes.sharded_like(where, x), x, jnp.zeros_like(x))


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
    nothing = is_zero(count)
    count = lax.add(count, nothing)
    quotient = by_parts(lambda part: lax.div(part, count), total)
    if not empty:
        return quotient
    return lax.add(quotient, lax.mul(nothing, number(empty, nothing)))


def inverse(a: jax.Array) -> jax.Array:
    """``1 / a``."""
    return lax.div(number(1, a), a)


def is_zero(count: jax.Array) -> jax.Array:
    """1 where a count is 0, and 0 elsewhere, in its dtype."""
    return lax.convert_element_type(lax.eq(count, number(0, count)), count.dtype)


def hidden(numbers: list[float], dtype: Any) -> tuple:
    """Numbers whose values XLA does not see, and so does not square of its own accord.

    It takes ``(a * c)**2`` for ``a**2 * c**2``, which their dtype cannot hold.
    """
    return tuple(lax.optimization_barrier([jnp.asarray(n, dtype) for n in numbers]))


def times_square(a: jax.Array, factor: jax.Array) -> jax.Array:
    """``a * factor**2``, where the dtype cannot hold the square.

    XLA would multiply or divide by the square of its own accord.
    """
    return lax.mul(lax.optimization_barrier(lax.mul(a, factor)), factor)


def fixed(a: jax.Array) -> jax.Array:
    """Rounds a small array to one bit less than its dtype has.

    All its uses then see the same number. Else XLA may compute a mean, a product, anew
    in each fusion that uses it, and contract it there with the sum that follows.
    """
    info = jnp.finfo(a.dtype)
    return by_parts(lambda p: lax.reduce_precision(p, info.nexp, info.nmant - 1), a)


def alone(a: jax.Array, rows: jax.Array) -> jax.Array:
    """Zeroes all but the rows that are marked."""
    return selected(rows, a, jnp.zeros_like(a))


def selected(where: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a`` where a mask is True, else ``b`` of the shape of ``a``; both broadcast."""
    if where.shape != a.shape:
        if any(_axes.lies_over(where)) or any(_axes.lies_over(a)):
            return jnp.where(where, a, b)
        shape = jnp.broadcast_shapes(where.shape, a.shape)
        where, a, b = (jnp.broadcast_to(v, shape) for v in (where, a, b))
    return lax.select(where, a, b)


def is_inf(a: jax.Array) -> jax.Array:
    """Whether a real number is infinite."""
    return lax.eq(lax.abs(a), number(np.inf, a))
