"""Errors of the house, raised at the public door before any tracing work.

Every message has one form: *function: the rule. Got the facts. What to do.*
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def error(
    kind: type[Exception], name: str, rule: str, got: str, todo: str
) -> Exception:
    """Returns the exception ``kind`` with a message in the house form."""
    return kind(f"{name}: {rule}. Got {got}. {todo}.")


def is_concrete(value: Any) -> bool:
    """Whether ``value`` can be read now: a number or an array, not a tracer."""
    return not isinstance(value, jax.core.Tracer)


def floating(name: str, x: Any) -> jax.Array:
    """Returns ``x`` as an array; refuses what has no moments."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise error(
            TypeError,
            name,
            "complex input is not supported yet",
            f"x.dtype={x.dtype}",
            "Normalize the real and imaginary parts apart",
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise error(
            TypeError,
            name,
            "x must be floating, because its mean and its normalized values are"
            " not integers",
            f"x.dtype={x.dtype}",
            "Pass x.astype(jnp.float32)",
        )
    if x.ndim == 0:
        raise error(
            ValueError,
            name,
            "x must have at least one axis",
            "x.shape=()",
            "Pass x[None]",
        )
    return x


def output_dtype(name: str, dtype: Any, x: jax.Array) -> Any:
    """Returns the dtype of y: ``dtype``, or that of x where it is None."""
    if dtype is None:
        return x.dtype
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise error(
            TypeError,
            name,
            "dtype, the dtype of y, must be floating",
            f"dtype={dtype}",
            "Pass dtype=None for the dtype of x",
        )
    return dtype


def epsilon(name: str, value: Any, dtype: Any) -> float:
    """Returns ``value`` as a float that is above zero in ``dtype``."""
    if not isinstance(value, numbers.Real) and not is_concrete(value):
        raise error(
            TypeError,
            name,
            "epsilon is part of the compiled program and must be a number",
            "a traced value",
            "Pass a Python float, or name the argument in static_argnames",
        )
    value = float(value)
    if not value >= 0 or not np.isfinite(value):
        raise error(
            ValueError,
            name,
            "epsilon must be a number above zero",
            f"epsilon={value}",
            "Pass epsilon=1e-6, say",
        )
    smallest = jnp.finfo(dtype).tiny
    if value < smallest:
        raise error(
            ValueError,
            name,
            f"epsilon must be above zero in the dtype of the statistics, {dtype}",
            f"epsilon={value}, and the smallest normal {dtype} is {smallest:.3g}",
            "Pass epsilon=1e-6, say",
        )
    return value


def momentum(name: str, value: Any) -> Any:
    """Checks ``value`` where it is concrete; it is the part of the OLD value."""
    if is_concrete(value) and not np.all(
        (np.asarray(value) >= 0) & (np.asarray(value) <= 1)
    ):
        raise error(
            ValueError,
            name,
            "momentum is the part of the old value that is kept and must lie in [0, 1]",
            f"momentum={value}",
            "PyTorch's momentum m is momentum=1 - m here",
        )
    return value


def where(
    name: str, mask: Any, shape: tuple[int, ...], what: str = "where"
) -> jax.Array | None:
    """Returns the boolean mask, called ``what``, as an array of the rank of x."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise error(
            TypeError,
            name,
            f"{what} must be boolean, True where a value counts",
            f"{what}.dtype={mask.dtype}",
            f"Pass {what}.astype(bool) or a comparison; weights are not supported yet",
        )
    if 0 < mask.ndim == len(shape) - 1:
        raise error(
            ValueError,
            name,
            f"{what} must not have one axis less than x, because then it is not clear"
            " which axis is missing",
            f"{what}.shape={mask.shape}, x.shape={shape}",
            f"Pass {what}[..., None] if the features are the last axis",
        )
    if mask.ndim > len(shape) or any(
        m not in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False)
    ):
        raise error(
            ValueError,
            name,
            f"{what} must broadcast to x",
            f"{what}.shape={mask.shape}, x.shape={shape}",
            f"Pass a {what} whose axes, from the last, are 1 or those of x",
        )
    return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)


def axis_names(name: str, axis_name: Any, axis_index_groups: Any) -> tuple:
    """Returns the device axes as a tuple; refuses one that is bound nowhere."""
    if axis_index_groups is not None:
        raise error(
            NotImplementedError,
            name,
            "sub-groups of devices are not supported yet",
            f"axis_index_groups={axis_index_groups}",
            "Split the mesh into two axes and name the inner one in axis_name",
        )
    if axis_name is None:
        return ()
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    for n in names:
        try:
            lax.axis_size(n)
        except NameError:
            mesh = jax.sharding.get_abstract_mesh().axis_names
            raise error(
                ValueError,
                name,
                "axis_name must name an axis of the pmap, shard_map or vmap around"
                " the call",
                f"axis_name={n!r}; the mesh in use has {mesh or 'no axes'}",
                "Call it inside one of those; under jit over sharded arrays leave"
                " axis_name=None, the statistics are synced without it",
            ) from None
    if len(set(names)) != len(names):
        raise error(
            ValueError,
            name,
            "axis_name must name each axis once",
            f"axis_name={axis_name!r}",
            "Leave out the second one",
        )
    return names
