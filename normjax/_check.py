"""Errors of the house, raised at the public door before any tracing work.

Every message has one form: *function: the rule. Got the facts. What to do.*
"""

import importlib
import numbers
import operator
from collections.abc import Hashable
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


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer that can be read now, and no truth value."""
    try:
        operator.index(value)
    except TypeError:  # that of a tracer, too
        return False
    return not isinstance(value, bool)


def is_bound(axis_name: Any) -> bool:
    """Whether ``axis_name`` names a device axis here."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def choice(module: Any, field: str, choices: tuple) -> None:
    """Refuses a value of a module's field that is not among the choices."""
    value = getattr(module, field)
    if value not in choices:
        raise error(
            ValueError,
            type(module).__name__,
            f"{field} must be one of {', '.join(map(repr, choices))}",
            f"{field}={value!r}",
            f"Pass {field}={choices[-1]!r}, say",
        )


def inexact(name: str, x: Any) -> jax.Array:
    """Returns ``x`` as an array, real or complex; refuses what has no moments."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
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


def output_dtype(name: str, dtype: Any, operands: dict[str, Any]) -> Any:
    """Returns the dtype of y: ``dtype``, or that of the operand x where it is None.

    It must be complex where an operand is: an imaginary part must have its place.
    """
    dtype = (
        operands["x"].dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    )
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise error(
            TypeError,
            name,
            "dtype, the dtype of y, must be floating or complex",
            f"dtype={dtype}",
            "Pass dtype=None for the dtype of x",
        )
    if jnp.issubdtype(dtype, jnp.floating):
        for what, a in operands.items():
            if a is not None and jnp.iscomplexobj(a):
                raise error(
                    TypeError,
                    name,
                    f"y must be complex, since {what} is",
                    f"{what}.dtype={a.dtype}, dtype of y {dtype}",
                    "Pass dtype=jnp.complex64, or the real part alone",
                )
    return dtype


def activated(name: str, activation: Any, y: jax.Array) -> jax.Array:
    """Returns ``activation(y)``; refuses what does not work element by element."""
    if not callable(activation):
        raise error(
            TypeError,
            name,
            "activation must be a function of y",
            f"activation={activation!r}",
            "Pass jax.nn.silu, say",
        )
    z = activation(y)
    if jnp.shape(z) != y.shape:
        raise error(
            ValueError,
            name,
            "activation must work element by element, and return the shape of y",
            f"a result of shape {jnp.shape(z)}, y.shape={y.shape}",
            "Apply what changes the shape to what the norm returns",
        )
    return z


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
    """Returns the mask or the weights, called ``what``, as an array of the rank of x.

    Raises where numpy's way to line it up with x is not the only one, or fails.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise error(
            TypeError,
            name,
            f"{what} must be boolean, True where a value counts, or floating, the"
            " weight with which it counts",
            f"{what}.dtype={mask.dtype}",
            f"Pass {what}.astype(bool) or {what}.astype(jnp.float32)",
        )
    here = is_concrete(mask) and mask.is_fully_addressable
    if mask.dtype != jnp.bool_ and here:
        values = np.asarray(mask)
        for worst in (np.min(values, initial=0.0), np.max(values, initial=0.0)):
            if not 0 <= worst < np.inf:
                raise error(
                    ValueError,
                    name,
                    "weights must be finite and not negative",
                    f"{what} with {worst} in it",
                    f"Pass jnp.clip({what}, 0), or leave values out with weight 0",
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


def devices(name: str, axis_name: Any, axis_index_groups: Any) -> tuple[tuple, tuple]:
    """Returns the device axes and their sub-groups as tuples.

    Refuses an axis that is bound nowhere, and groups that do not divide the devices.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise error(
                ValueError,
                name,
                "axis_index_groups divides the devices of axis_name, which is missing",
                f"axis_index_groups={axis_index_groups}, axis_name=None",
                "Pass the axis_name of the pmap, shard_map or vmap around the call",
            )
        return (), ()
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    for n in names:
        device_axis(name, n)
    if len(set(names)) != len(names):
        raise error(
            ValueError,
            name,
            "axis_name must name each axis once",
            f"axis_name={axis_name!r}",
            "Leave out the second one",
        )
    if axis_index_groups is None:
        return names, ()
    return names, groups(name, axis_index_groups, lax.axis_size(names))


def device_axis(name: str, axis_name: Any) -> None:
    """Refuses what is no axis over which devices can be synced here."""
    if isinstance(axis_name, int) or not isinstance(axis_name, Hashable):
        raise error(
            TypeError,
            name,
            "axis_name must be the name of a device axis, or a tuple of names",
            f"axis_name={axis_name!r}",
            "Pass axis_name='data', say",
        )
    mesh = jax.sharding.get_abstract_mesh()
    if not is_bound(axis_name):
        facts = f"the mesh in use has {mesh.axis_names or 'no axes'}"
        todo = (
            "Call it inside one of those; under jit over sharded arrays leave"
            " axis_name=None, the statistics are synced without it"
        )
        if mesh.manual_axes and axis_name in mesh.axis_names:
            facts = f"the shard_map around the call has {mesh.manual_axes}"
            todo = (
                "Add it to the axis_names of the shard_map, or leave it out: over axes"
                " that are the compiler's, the statistics are synced without it"
            )
        raise error(
            ValueError,
            name,
            "axis_name must name an axis of the pmap, shard_map or vmap around the"
            " call",
            f"axis_name={axis_name!r}; {facts}",
            todo,
        )
    if mesh.manual_axes and axis_name not in mesh.manual_axes:
        try:
            lax.psum(jnp.zeros(()), axis_name)
        except AssertionError:  # JAX has no other word for it
            raise error(
                ValueError,
                name,
                "an axis of vmap must not be synced within a shard_map that checks what"
                " varies, which JAX cannot",
                f"axis_name={axis_name!r} within a shard_map of {mesh.manual_axes}",
                "Pass check_vma=False to the shard_map",
            ) from None


def groups(name: str, axis_index_groups: Any, size: int) -> tuple[tuple[int, ...], ...]:
    """Returns sub-groups as tuples; each of ``size`` devices must be in just one."""
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    todo = f"Pass {[half for half in halves if half]}, say"
    try:
        found = tuple(tuple(map(operator.index, group)) for group in axis_index_groups)
    except TypeError:
        raise error(
            TypeError,
            name,
            "axis_index_groups must be lists of device numbers, or None",
            f"axis_index_groups={axis_index_groups!r}",
            todo,
        ) from None
    members = [i for group in found for i in group]
    if sorted(members) != list(range(size)) or not all(found):
        missing = sorted(set(range(size)) - set(members))
        twice = sorted({i for i in members if members.count(i) > 1})
        outside = sorted(set(members) - set(range(size)))
        faults = {"missing": missing, "twice": twice, "not there": outside}
        facts = "".join(f", {what}: {i}" for what, i in faults.items() if i)
        raise error(
            ValueError,
            name,
            "axis_index_groups must name each device of axis_name once, and no group"
            " be empty",
            f"axis_index_groups={[list(g) for g in found]} for {size} devices{facts}",
            todo,
        )
    return found


def needed(name: str, package: str, module: str) -> Any:
    """Imports a module of a package that ``name`` alone needs."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise error(
            ImportError,
            name,
            f"{package} must be installed",
            str(missing),
            f"Type: pip install {package}",
        ) from missing
