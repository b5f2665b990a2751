"""Errors of the house, raised at the public door before any tracing work.

Every message has one form: *function: the rule. Got the facts. What to do.*
"""

import importlib
import math
import numbers
import operator
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


def may_be_integers(value: Any) -> bool:
    """Whether ``value`` is no array, or one of integers."""
    return jnp.issubdtype(getattr(value, "dtype", jnp.int32), jnp.integer)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer that can be read now, and no truth value."""
    if not may_be_integers(value):
        return False
    try:
        operator.index(value)
    except TypeError:  # that of a tracer, too
        return False
    return not isinstance(value, bool)


def shown(what: str, value: Any) -> str:
    """Says what an argument, called ``what``, is: its value, if a few words can."""
    if isinstance(value, jax.Ref):
        return f"{what}, a reference to an array"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        few = is_concrete(value) and value.size <= 8
        if not few or getattr(value.dtype, "kind", "") not in ("b", "i", "u"):
            return f"{what}.dtype={value.dtype}, {what}.shape={value.shape}"
    words = repr(value)
    if len(words) > 60 or "\n" in words or " at 0x" in words:
        return f"{what} of type {type(value).__name__}"
    return f"{what}={words}"


def array(name: str, what: str, value: Any) -> jax.Array:
    """Returns an argument, called ``what``, as an array of numbers.

    That may be what `jnp.asarray` takes, or an array of NumPy's in any byte order.
    Refuses the rest: what has no numbers, or more than its numbers.
    """
    if isinstance(value, jax.Array) and _has_numbers(value):
        return value
    if any(isinstance(v, np.ma.MaskedArray) for v in _leaves(value)):
        raise _masked(name, what, value)
    cause: Exception | None = None
    # JAX would take a ref for an array, and NumPy a letter in a list for a dtype.
    if not isinstance(value, jax.Ref) and not _has_letters(value):
        try:
            a = jnp.asarray(_native(value))
            if _has_numbers(a):
                return a
        except jax.errors.JaxRuntimeError:  # there is no room for it, say
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError) as e:
            cause = e
    raise error(
        TypeError,
        name,
        f"{what} must be an array of numbers",
        shown(what, value),
        _instead(what, value),
    ) from cause


def _masked(name: str, what: str, value: Any) -> Exception:
    """The error for a masked array of NumPy's."""
    todo = f"Pass {what}.filled() with a value that says what is meant"
    if what in ("x", "residual"):
        todo = (
            f"Pass {what}.data, and ~np.ma.getmaskarray({what}) as where, or as the"
            " mask of a module"
        )
    return error(
        TypeError,
        name,
        f"{what} must not be a masked array, because its mask would be lost",
        f"{what} of type {type(value).__name__}",
        todo,
    )


def _has_numbers(a: jax.Array) -> bool:
    """Whether an array is not one of keys, or of the derivatives by an integer."""
    return a.dtype == jnp.bool_ or jnp.issubdtype(a.dtype, jnp.number)


def has_known_dtype(value: Any) -> bool:
    """Whether a value has a dtype of numbers, as JAX has it."""
    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype) or isinstance(value, np.ma.MaskedArray):
        return False
    if not dtype.isnative or dtype in (np.longdouble, np.clongdouble):
        return False
    return dtype.kind != "m" and jnp.issubdtype(dtype, jnp.number)  # a time to NumPy


def _leaves(value: Any) -> list:
    """Returns what lists in lists hold."""
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for v in value for leaf in _leaves(v)]


def _has_letters(value: Any) -> bool:
    return any(isinstance(v, (str, bytes)) for v in _leaves(value))


def _native(value: Any) -> Any:
    """Returns arrays of NumPy, also in lists, in the byte order of this machine."""
    if isinstance(value, (list, tuple)):
        return [_native(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def _instead(what: str, value: Any) -> str:
    """What to pass instead of a value that is no array of numbers."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return "It has no values: call the function by jax.eval_shape"
    if isinstance(value, jax.Ref):
        return f"Pass {what}[...]"
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.names:
            return f"Pass one of its fields, {what}[{value.dtype.names[0]!r}]"
        if value.dtype.kind in "fcO":
            wide = "complex128" if value.dtype.kind == "c" else "float64"
            return f"Pass {what}.astype(np.{wide})"
    return "Pass an array of JAX or NumPy"


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
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise error(
            ValueError,
            type(module).__name__,
            f"{field} must be one of {', '.join(map(repr, choices))}",
            shown(field, value),
            f"Pass {field}={choices[-1]!r}, say",
        )


def flag(name: str, what: str, value: Any) -> bool:
    """Returns a switch, called ``what``, as True or False."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if is_integer(value):
        return operator.index(value) != 0
    if is_concrete(value) and isinstance(value, (jax.Array, np.ndarray)):
        if value.dtype == jnp.bool_ and value.shape == ():
            return bool(value)
    raise error(
        TypeError,
        name,
        f"{what} is part of the compiled program and must be True or False",
        shown(what, value) if is_concrete(value) else "a traced value",
        "Pass a bool, or name the argument in static_argnames",
    )


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype of numbers is one that JAX promotes with no other."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.finfo(dtype).bits < 16
    return jnp.iinfo(dtype).bits < 8


def inexact(name: str, x: Any, what: str = "x") -> jax.Array:
    """Returns ``x`` as an array, real or complex; refuses what has no moments."""
    x = array(name, what, x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise error(
            TypeError,
            name,
            f"{what} must be floating, because its mean and its normalized values are"
            " not integers",
            f"{what}.dtype={x.dtype}",
            f"Pass {what}.astype(jnp.float32)",
        )
    if x.ndim == 0:
        raise error(
            ValueError,
            name,
            f"{what} must have at least one axis",
            f"{what}.shape=()",
            f"Pass {what}[None]",
        )
    return x


def array_dtype(name: str, value: Any, what: str = "dtype") -> Any:
    """Returns a dtype as JAX has it here, of 32 bits where it has no 64."""
    cause = None
    # NumPy only warns where it reads the dtype that an array has, or some lists.
    is_type = isinstance(value, (type, np.dtype))
    if is_type or not (hasattr(value, "dtype") or isinstance(value, (list, tuple))):
        try:
            found = np.dtype(value)
            if found.isnative and found not in (np.longdouble, np.clongdouble):
                return jax.dtypes.canonicalize_dtype(found)
        except (TypeError, ValueError) as e:
            cause = e
    raise error(
        TypeError,
        name,
        f"{what} must be one that JAX has",
        shown(what, value),
        f"Pass {what}=jnp.float32, say",
    ) from cause


def inexact_dtype(name: str, what: str, value: Any) -> Any:
    """Returns a dtype, of real or complex numbers, that parameters may have."""
    found = array_dtype(name, value, what)
    if not jnp.issubdtype(found, jnp.inexact):
        raise error(
            TypeError,
            name,
            f"{what} must be floating or complex",
            f"{what}={found}",
            f"Pass {what}=jnp.float32, say",
        )
    return found


def statistics_dtype(name: str, value: Any) -> Any:
    """Returns the dtype of statistics, real or complex; they need digits."""
    found = array_dtype(name, value)
    if not jnp.issubdtype(found, jnp.inexact) or jnp.finfo(found).bits < 32:
        raise error(
            TypeError,
            name,
            "statistics need at least float32",
            f"dtype={found}",
            "Leave dtype out",
        )
    return found


def statistic(name: str, field: str, of: str, value: Any) -> jax.Array:
    """Returns a field of the moments ``of``: a mean may be complex, a count whole."""
    what = f"{of}.{field}"
    a = array(name, what, value)
    real = field not in ("mean", "rest")
    counts = field in ("count", "carry", "squares")
    if counts and jnp.issubdtype(a.dtype, jnp.integer):
        a = a.astype(jnp.float32)
    if real and jnp.iscomplexobj(a):
        raise error(
            TypeError,
            name,
            f"{what} must be real",
            f"{what}.dtype={a.dtype}",
            f"Pass {what}.real",
        )
    if not jnp.issubdtype(a.dtype, jnp.inexact) or is_narrow(a.dtype):
        raise error(
            TypeError,
            name,
            f"{what} must be floating" + ("" if real else " or complex"),
            f"{what}.dtype={a.dtype}",
            f"Pass {what}.astype(jnp.float32)",
        )
    return a


def broadcasts(name: str, what: str, shape: tuple, to: str, target: tuple) -> None:
    """Refuses a shape that does not broadcast to another one."""
    pairs = zip(shape[::-1], target[::-1], strict=False)
    if len(shape) > len(target) or any(n not in (1, m) for n, m in pairs):
        raise error(
            ValueError,
            name,
            f"{what} must broadcast to {to}",
            f"{what}.shape={shape}, {to}.shape={target}",
            f"Pass a {what} whose axes, from the last, are 1 or those of {to}",
        )


def promotion(name: str, todo: str, *arrays: jax.Array | None) -> None:
    """Refuses operands, x first, whose dtypes JAX does not promote with each other."""
    dtypes = dict.fromkeys(a.dtype for a in arrays if a is not None)
    if len(dtypes) > 1 and any(map(is_narrow, dtypes)):
        raise error(
            TypeError,
            name,
            "x must be of a dtype that JAX promotes with the others",
            f"x of {', others of '.join(map(str, dtypes))}",
            todo,
        )


def output_dtype(name: str, dtype: Any, operands: dict[str, Any]) -> Any:
    """Returns the dtype of y: ``dtype``, or that of the operand x where it is None.

    It must be complex where an operand is: an imaginary part must have its place.
    """
    dtype = operands["x"].dtype if dtype is None else array_dtype(name, dtype)
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
    z = array(name, "what activation returns", activation(y))
    if z.shape != y.shape:
        raise error(
            ValueError,
            name,
            "activation must work element by element, and return the shape of y",
            f"a result of shape {z.shape}, y.shape={y.shape}",
            "Apply what changes the shape to what the norm returns",
        )
    if not jnp.issubdtype(z.dtype, jnp.inexact):
        raise error(
            TypeError,
            name,
            "activation must return what y is, floating or complex",
            f"a result of dtype {z.dtype}",
            f"Apply what returns {z.dtype} to what the norm returns",
        )
    return z


def number(name: str, what: str, value: Any, rule: str, todo: str) -> Any:
    """Returns a real number: a Python one as it is, others as arrays.

    ``rule`` is what it must be, and ``todo`` what to do where it is not.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.generic)):
        return float(value)
    fault = error(TypeError, name, rule, shown(what, value), todo)
    if isinstance(value, (bool, str, type(None))):
        raise fault
    with jax.ensure_compile_time_eval():  # what is concrete stays so under jit
        try:
            a = array(name, what, value)
        except TypeError as cause:
            raise fault from cause
    if a.dtype == jnp.bool_ or jnp.iscomplexobj(a):
        raise fault
    return a.astype(jnp.float32) if is_narrow(a.dtype) else a


def epsilon(name: str, value: Any, dtype: Any) -> Any:
    """Returns ``value`` as a float that is above zero in ``dtype``, or as it is traced.

    A traced one is not seen to be above zero.
    """
    todo = "Pass epsilon=1e-6, say"
    if value is None:
        todo = "Pass jnp.finfo(jnp.float32).eps, PyTorch's None for up to float32"
    value = number(name, "epsilon", value, "epsilon must be a number above zero", todo)
    if jnp.shape(value) != ():
        raise error(
            TypeError,
            name,
            "epsilon must be one number, for all features",
            f"epsilon.shape={value.shape}",
            todo,
        )
    if not is_concrete(value):
        return value
    try:
        value = float(value)
    except OverflowError:  # of an integer of many digits
        value = math.inf
    if not 0 <= value < math.inf:
        raise error(
            ValueError,
            name,
            "epsilon must be a number above zero",
            f"epsilon={value}",
            todo,
        )
    info = jnp.finfo(dtype)
    if value < float(info.tiny):
        raise error(
            ValueError,
            name,
            f"epsilon must be above zero in the dtype of the statistics, {dtype}",
            f"epsilon={value}, and the smallest normal {dtype} is {info.tiny:.3g}",
            todo,
        )
    if value > float(info.max):
        raise error(
            ValueError,
            name,
            f"epsilon must be finite in the dtype of the statistics, {dtype}",
            f"epsilon={value}, and the largest {dtype} is {info.max:.3g}",
            todo,
        )
    return value


def momentum(name: str, value: Any) -> Any:
    """Checks ``value`` where it is concrete; it is the part of the OLD value."""
    rule = "momentum is the part of the old value that is kept and must lie in [0, 1]"
    todo = "PyTorch's momentum m is momentum=1 - m here"
    value = number(name, "momentum", value, rule, "Pass momentum=0.99, say")
    if is_concrete(value) and not np.all(
        (np.asarray(value) >= 0) & (np.asarray(value) <= 1)
    ):
        raise error(ValueError, name, rule, f"momentum={value}", todo)
    return value


def where(
    name: str, mask: Any, shape: tuple[int, ...], what: str = "where"
) -> jax.Array | None:
    """Returns the mask or the weights, called ``what``, as an array of the rank of x.

    Raises where numpy's way to line it up with x is not the only one, or fails.
    """
    if mask is None:
        return None
    mask = array(name, what, mask)
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
    broadcasts(name, what, mask.shape, "x", shape)
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


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def device_axis(name: str, axis_name: Any) -> None:
    """Refuses what is no axis over which devices can be synced here."""
    if isinstance(axis_name, (int, tuple)) or not _is_hashable(axis_name):
        raise error(
            TypeError,
            name,
            "axis_name must be the name of a device axis, or a tuple of names",
            shown("axis_name", axis_name),
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
    lists: Any = axis_index_groups if may_be_integers(axis_index_groups) else None
    try:
        found = tuple(tuple(map(operator.index, group)) for group in lists)
    except TypeError:
        raise error(
            TypeError,
            name,
            "axis_index_groups must be lists of device numbers, or None",
            shown("axis_index_groups", axis_index_groups),
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
