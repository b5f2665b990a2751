"""The native library of kernels for CPUs: whether it is there and serves, its calls."""

import ctypes
import functools
import hashlib
import math
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax.kernels import canonical

_FOLDER = pathlib.Path(__file__).parent / "native"
_LIBRARY = _FOLDER / "libnormjax.so"
_UNBUILT = _FOLDER / "unbuilt.txt"
_TARGETS = ("normjax_forward", "normjax_moments", "normjax_backward", "normjax_sums")
# More values than these are out of the caches near a core when they were read once: of
# one set of moments for each channel, whose sums wait for all cores, and of several.
_LARGE = {"one": 2**16, "several": 2**20}
_VERSION = "normjax_api_version"
_DTYPES = ("float32", "bfloat16", "float16")
# Without one, an operand that is None.
_NONE: tuple[int, ...] = (0,)


@functools.cache
def missing() -> str | None:
    """Why there is no native library in this process, or None where there is one.

    One that is there and does not load is reported once, as a warning.
    """
    if not _LIBRARY.exists():
        if _UNBUILT.exists():
            return f"it was not built: {_UNBUILT.read_text().strip()}"
        return "it was not built"
    try:
        _check_whole(_LIBRARY)
        library = ctypes.CDLL(str(_LIBRARY))
        _check_interface(tuple((ctypes.c_int32 * 2).in_dll(library, _VERSION)))
        for target in _TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except Exception as e:
        reason = f"it does not load: {e}"
        warnings.warn(
            f"normjax: the native library is not used, since {reason}. XLA's form is"
            " used instead. Install normjax again to build the library for this"
            " machine.",
            RuntimeWarning,
        )
        return reason
    return None


def _check_whole(path: pathlib.Path) -> None:
    """Refuses a library that is not the one that was built, cut short, say.

    The system's loader would end the process.
    """
    built = path.with_suffix(".sha256").read_text().strip()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != built:
        raise ValueError(f"{path} is not the file that was built, and may be damaged")


def _check_interface(built_for: tuple[int, int]) -> None:
    """Refuses a library that was built for a newer interface of XLA than there is.

    Registering its handlers would leave JAX without CPUs.
    """
    header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    number = re.compile(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)")
    here = {name: int(n) for name, n in number.findall(header.read_text())}
    major, minor = here["MAJOR"], here["MINOR"]
    if built_for[0] != major or built_for[1] > minor:
        raise ValueError(
            f"it is built for XLA's interface {built_for[0]}.{built_for[1]}, and this"
            f" jaxlib has {major}.{minor}"
        )


def form_of(how: Any, x: Any, scale: Any, bias: Any) -> canonical.Form | None:
    """The canonical form of x and its parameters, or None."""
    r = how.r
    parameters = [a.shape for a in (scale, bias) if a is not None]
    return canonical.of(x.shape, r.axes, r.group_axes, r.num_groups, parameters)


def _form(how: Any, *operands: Any) -> canonical.Form:
    """`form_of` operands that are served."""
    form = form_of(how, *operands)
    assert form is not None
    return form


def why_not(how: Any, x: Any, scale: Any, bias: Any, *others: Any) -> str | None:
    """Why the library does not serve operands, or None where it does."""
    if (reason := missing()) is not None:
        return f"normjax's native library is missing: {reason}"
    operands = [a for a in (x, scale, bias, *others) if a is not None]
    strange = {str(a.dtype) for a in operands if str(a.dtype) not in _DTYPES}
    if strange or str(how.dtype) not in _DTYPES:
        strange = strange or {str(how.dtype)}
        return f"kernels are for {', '.join(_DTYPES)}, not for {', '.join(strange)}"
    if not all(isinstance(n, int) for a in operands for n in a.shape):
        return "shapes are not known"
    if form_of(how, x, scale, bias) is None:
        return f"x of shape {x.shape} would have to be transposed"
    return None


def why_not_backward(how: Any, *operands: Any) -> str | None:
    """`why_not`, of a backward pass: no moment may have a cotangent."""
    *given, y_ct, mean_ct, rest_ct, held_ct, var_ct = operands
    if y_ct is None or any(a is not None for a in (mean_ct, rest_ct, held_ct, var_ct)):
        return "moments have cotangents"
    if (reason := why_not(how, *given, y_ct)) is not None:
        return reason
    if how.implementation is None and leaves_arrays(how, *given[:3]):
        # By themselves the kernels are faster. In a network XLA runs its own loops
        # beside the convolutions of the same layer, and a step takes less.
        return "XLA overlaps its form with what else a backward pass does"
    return None


def leaves_arrays(how: Any, x: Any, scale: Any, bias: Any) -> bool:
    """Whether the library takes sums alone, and leaves arrays of the size of x to XLA.

    They are read anew from memory, and XLA reads them together with the activation
    before or after the norm, and lays out what it writes as the next operation wants.
    The sums of each channel then have the shape of the moments.
    """
    form = _form(how, x, scale, bias)
    n, s, g, k = form.shape
    large = _LARGE["one" if n == form.parameters else "several"]
    return s > 1 and s * g * k > large and math.prod(_shape(how, x)) == n * g * k


def moments(how: Any, x, scale, bias) -> tuple:
    """Mean, rest and variance, as they broadcast against x."""
    form = _form(how, x, scale, bias)
    call = jax.ffi.ffi_call("normjax_moments", _of_moments(form))
    found = call(form.x(x), centered=np.bool_(how.r.centered))
    return tuple(form.from_moments(m, _shape(how, x)) for m in found)


def forward(how: Any, x, scale, bias) -> tuple:
    """y, and mean, rest and variance as they broadcast against x."""
    form = _form(how, x, scale, bias)
    of_y = jax.ShapeDtypeStruct(form.shape, how.dtype)
    call = jax.ffi.ffi_call("normjax_forward", [of_y, *_of_moments(form)])
    parameters = (_parameters(form, a) for a in (scale, bias))
    y, *found = call(form.x(x), *parameters, **_attributes(how))
    shape = _shape(how, x)
    return y.reshape(x.shape), *(form.from_moments(m, shape) for m in found)


def sums(how: Any, x, scale, bias, m: Any, dy) -> tuple:
    """The sums of dy * x_hat and of dy of each channel, which broadcast against x.

    For each sample, or whatever has moments of its own.
    """
    form = _form(how, x, scale, bias)
    n, _, g, k = form.shape
    of_sums = jax.ShapeDtypeStruct((n, g, k), jnp.float32)
    call = jax.ffi.ffi_call("normjax_sums", [of_sums] * 2)
    given = (form.moments(a) for a in (m.mean, m.rest, m.var))
    found = call(form.x(x), *given, form.x(dy), **_attributes(how))
    return tuple(a.reshape(_shape(how, x)) for a in found)


def backward(how: Any, x, scale, bias, m: Any, dy) -> list:
    """The cotangents of x, and of scale and bias where they are there."""
    form = _form(how, x, scale, bias)
    _, _, g, k = form.shape
    of_both = (form.parameters, g, k)
    shapes = [_NONE if a is None else of_both for a in (scale, bias)]
    results = [
        jax.ShapeDtypeStruct(form.shape, x.dtype),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    ]
    call = jax.ffi.ffi_call("normjax_backward", results)
    given = (form.moments(a) for a in (m.mean, m.rest, m.var))
    dx, *of_parameters = call(
        form.x(x),
        _parameters(form, scale),
        *given,
        form.x(dy),
        has_bias=np.bool_(bias is not None),
        **_attributes(how),
    )
    of = zip(of_parameters, (scale, bias), strict=True)
    cotangents = [form.from_parameters(ct, a) for ct, a in of if a is not None]
    return [dx.reshape(x.shape), *cotangents]


def _shape(how: Any, x: Any) -> tuple[int, ...]:
    """The shape of moments that broadcast against x."""
    _, (shape, _), *_ = how.results(x)
    return shape


def _of_moments(form: canonical.Form) -> list:
    n, _, g, _ = form.shape
    return [jax.ShapeDtypeStruct((n, g), jnp.float32)] * 3


def _attributes(how: Any) -> dict[str, Any]:
    return {
        "epsilon": np.float64(how.epsilon),
        "centered": np.bool_(how.r.centered),
    }


def _parameters(form: canonical.Form, a: jax.Array | None) -> jax.Array:
    return jnp.zeros(_NONE, jnp.float32) if a is None else form.of_parameters(a)


# At import, since a program that was compiled in another process may call the library.
missing()
