"""Variables of Flax models from those of PyTorch, Keras, Haiku and Equinox, and back.

One mechanism for all: `_places` says of each array of a Flax model what the other
library calls it and how its axes lie there; `_filled` goes one way, `_taken` the other.
What a library has of its own, its names, the order of its axes, is a row of the tables.
"""

import functools
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check
from normjax.tools.files import array_of, check_mapping

Names = Mapping[str, str] | Callable[[str], str] | None

# The axes of kernels: k all of space, i in (of a group), o out. "~": it is turned
# around in space, as the gradient of a convolution has it. The keys are what `layouts`
# may say.
_DENSE = "io"
_FLAX = {
    "conv": "kio",
    "depthwise": "kio",
    "conv_transpose": "kio",
    "conv_transpose_kernel": "koi~",  # of transpose_kernel=True
}
# Kernels of DenseGeneral, [in, heads, head] and [heads, head, out], say.
_TO_HEADS, _FROM_HEADS = "dense_to_heads", "dense_from_heads"
# What Flax's attention calls its layers, of which the last one leads from the heads.
_ATTENTION = ("query", "key", "value", "out")
# What norms of old checkpoints call their parameters, TensorFlow's say.
_OLD = {"scale": "gamma", "bias": "beta"}


class _Library(NamedTuple):
    """How a library names and lays what Flax has.

    Attributes:
      separator: between the parts of a path.
      within: what stands before each part of a path.
      leaf: (the leaf in Flax, all leaves of its module) to its name; None: it has none.
      dense: axes of a kernel.
      conv: axes of a kernel.
      transposed: axes of the kernel of a transposed convolution.
      ones: whether vectors may have axes of size 1 besides.
      depthwise: whether the kernel of a depthwise convolution, [*K, 1, C * M] in Flax,
        is [*K, C, M].
      heads: whether the kernels and biases of DenseGeneral have all their axes.
    """

    separator: str
    within: str
    leaf: Callable[[str, set[str]], str | None]
    dense: str
    conv: str
    transposed: str
    ones: bool = False
    depthwise: bool = False
    heads: bool = False


def _torch_leaf(leaf: str, leaves: set[str]) -> str:
    names = {
        **dict.fromkeys(("kernel", "embedding", "scale"), "weight"),
        "mean": "running_mean",
        "var": "running_var",
        "count": "num_batches_tracked",
    }
    return names.get(leaf, leaf)


def _keras_leaf(leaf: str, leaves: set[str]) -> str | None:
    order = ("kernel", "embedding", "scale", "bias", "mean", "var")
    if leaf == "count":
        return None
    if leaf not in order:
        return leaf
    return f"vars/{sum(other in leaves for other in order[: order.index(leaf)])}"


def _haiku_leaf(leaf: str, leaves: set[str]) -> str:
    names = {
        "kernel": "w",
        "embedding": "embeddings",
        "bias": "b" if "kernel" in leaves else "offset",
        "mean": "~/mean_ema/average",
        "var": "~/var_ema/average",
        "count": "~/mean_ema/counter",
    }
    return names.get(leaf, leaf)


def _equinox_leaf(leaf: str, leaves: set[str]) -> str:
    return leaf if leaf in ("mean", "var", "count") else _torch_leaf(leaf, leaves)


_TORCH = _Library(".", "", _torch_leaf, "oi", "oik", "iok~")
_KERAS = _Library(
    "/", "layers/", _keras_leaf, "io", "kio", "koi~", depthwise=True, heads=True
)
_HAIKU = _Library("/", "", _haiku_leaf, "io", "kio", "koi", ones=True)
_EQUINOX = _Library(".", "", _equinox_leaf, "oi", "oik", "oik", ones=True)


class _Place(NamedTuple):
    """Where one array stands on both sides.

    Attributes:
      path: in the variables.
      module: path of its module, without the collection.
      leaf: its name in the module.
      theirs: its name on the other side; None where it has none.
      axes: those of a kernel, in Flax and on the other side; None: as they are.
      shape: in Flax.
      flat: of a DenseGeneral the shape that a Dense layer would have; else ``shape``.
      dtype: in Flax.
      alike: whether an array of one shape may be had in another, of two shapes.
    """

    path: str
    module: str
    leaf: str
    theirs: str | None
    axes: tuple[str, str] | None
    shape: tuple[int, ...]
    flat: tuple[int, ...]
    dtype: Any
    alike: Callable[[tuple, tuple], bool]


def _places(
    name: str, library: _Library, variables: Any, names: Names, layouts: Any
) -> list[_Place]:
    """Where each array of the variables stands on both sides, in their order."""
    found = jax.tree_util.tree_leaves_with_path(variables)
    parts = [_parts(path) for path, _ in found]
    for p, (_, a) in zip(parts, found, strict=True):
        numbers = hasattr(a, "shape") and isinstance(getattr(a, "dtype", 0), np.dtype)
        if not numbers:  # a key of random numbers has a dtype of JAX's own
            raise _no_array(name, "/".join(p), a)
    collections = isinstance(variables, Mapping) and (
        "params" in variables or "batch_stats" in variables
    )
    inner = [p[1:] if collections else p for p in parts]
    leaves: dict[str, set[str]] = {}
    for p in inner:
        leaves.setdefault("/".join(p[:-1]), set()).add(p[-1])
    kernels = {
        "/".join(p[:-1]): tuple(a.shape)
        for p, (_, a) in zip(inner, found, strict=True)
        if p[-1] == "kernel" and len(a.shape) > 1
    }
    biases = {
        "/".join(p[:-1]): len(a.shape)
        for p, (_, a) in zip(inner, found, strict=True)
        if p[-1] == "bias"
    }
    layouts = dict(layouts or {})
    _check_names_of(name, names, leaves)
    _check_layouts(
        name, layouts, {m: s for m, s in kernels.items() if len(s) > 2}, biases
    )
    inputs = {} if library.heads else _input_axes(kernels, biases, layouts)
    places: dict[Any, _Place] = {}
    for p, q, (_, a) in zip(parts, inner, found, strict=True):
        module, leaf = "/".join(q[:-1]), q[-1]
        theirs = _their_name(library, module, leaf, leaves[module], names)
        axes, alike = None, _one_vector if library.ones else operator.eq
        flat = shape = tuple(a.shape)
        if module in inputs and leaf in ("kernel", "bias"):
            n = inputs[module] if leaf == "kernel" else 0
            flat = tuple(math.prod(s) for s in (shape[:n], shape[n:]) if s)
            axes = (_DENSE, library.dense) if leaf == "kernel" else None
        elif leaf == "kernel" and module in kernels:
            layout = layouts.get(module) or _layout_by_names(module, theirs, a.shape)
            axes = _axes_of(library, layout, len(a.shape))
            split = library.depthwise and layout == "depthwise"
            alike = _one_depthwise if split else operator.eq
        path = "/".join(p)
        if theirs in places:
            raise _check.error(
                ValueError,
                name,
                "two arrays of the variables must not have one name on the other side",
                f"{places[theirs].path} and {path}, which both would be {theirs!r}",
                "Give them different names",
            )
        places[path if theirs is None else theirs] = _Place(
            path, module, leaf, theirs, axes, shape, flat, a.dtype, alike
        )
    return list(places.values())


def _input_axes(
    kernels: Mapping[str, tuple], biases: Mapping[str, int], layouts: Mapping[str, str]
) -> dict[str, int]:
    """How many axes of a kernel are its input's, of each DenseGeneral among modules.

    It is one by its bias, which has the axes of the output, by the names of Flax's
    attention, or by layouts.
    """
    found = {}
    for module, shape in kernels.items():
        parent, _, last = module.rpartition("/")
        siblings = [f"{parent}/{other}".lstrip("/") for other in _ATTENTION]
        if len(shape) < 3:
            continue
        if module in layouts:
            n = {_TO_HEADS: 1, _FROM_HEADS: len(shape) - 1}.get(layouts[module])
        elif biases.get(module, 1) > 1:
            n = len(shape) - biases[module]
        elif module in siblings and all(len(kernels.get(m, ())) == 3 for m in siblings):
            n = 2 if last == "out" else 1
        else:
            n = None
        if n is not None:
            found[module] = n
    return found


def _no_array(name: str, path: str, value: Any) -> Exception:
    return _check.error(
        TypeError,
        name,
        "variables must be arrays",
        f"{path}, a {type(value).__name__}",
        "Pass the variables themselves, and leave out of them what is no array: with"
        " nnx, pass nnx.state(model, (nnx.Param, nnx.BatchStat))",
    )


def _parts(path: Any) -> list[str]:
    """The parts of a path, without the box around an array, an nnx.Variable say."""
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1] if path[-1].name == "value" else path
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _check_names_of(name: str, names: Names, leaves: dict[str, set[str]]) -> None:
    """Refuses names of what is not in the variables."""
    if names is None or callable(names):
        return
    known = {""} | {f"{m}/{leaf}".strip("/") for m in leaves for leaf in leaves[m]}
    for module in leaves:
        parts = module.split("/")
        known |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
    unknown = sorted(set(names) - known)
    if unknown:
        raise _check.error(
            ValueError,
            name,
            "each of names must be of a module or an array of the variables",
            f"{_some(unknown)} in names; modules are {_some(sorted(leaves))}",
            "Leave it out, or write the path without its collection",
        )


def _check_layouts(
    name: str,
    layouts: dict[str, str],
    convolutions: dict[str, tuple[int, ...]],
    biases: dict[str, int],
) -> None:
    """Refuses layouts of what has no such kernel, and others than there are."""
    words = (*_FLAX, _TO_HEADS, _FROM_HEADS)
    outputs = {
        (m, layout): len(convolutions.get(m, ())) - 1 if layout == _TO_HEADS else 1
        for m, layout in layouts.items()
    }
    wrong = {
        m: layout
        for m, layout in layouts.items()
        if m not in convolutions
        or layout not in words
        or (layout == "depthwise" and convolutions[m][-2] != 1)
        or biases.get(m, outputs[m, layout]) != outputs[m, layout]
    }
    if wrong:
        raise _check.error(
            ValueError,
            name,
            f"layouts are {', '.join(map(repr, words))}, of modules with the kernel of"
            " a convolution or of a DenseGeneral",
            f"{wrong}; such modules are {_some(sorted(convolutions)) or 'none'}",
            "'depthwise' is of a kernel [*K, 1, C * M], 'conv_transpose' of a"
            " ConvTranspose, 'conv_transpose_kernel' of one with transpose_kernel=True,"
            " 'dense_to_heads' of [in, *heads], 'dense_from_heads' of [*heads, out]",
        )


def _some(names: Iterable[Any], most: int = 6) -> str:
    names = [repr(n) for n in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _their_name(
    library: _Library, module: str, leaf: str, leaves: set[str], names: Names
) -> str | None:
    """The name of an array on the other side, by the mapping, else by rule."""
    parts = module.split("/") if module else []
    prefix = ""
    if callable(names):
        prefix, parts = names(module), []
    elif names is not None:
        whole = "/".join((*parts, leaf))
        if whole in names and whole not in ("", module):
            return names[whole]
        for n in range(len(parts), -1, -1):
            if "/".join(parts[:n]) in names:
                prefix, parts = names["/".join(parts[:n])], parts[n:]
                break
    last = library.leaf(leaf, leaves)
    if leaf == "skipped" and {"mean", "var"} <= leaves:  # no other library counts them
        last = None
    if last is None:
        return None
    rest = [f"{library.within}{part}" for part in parts]
    return library.separator.join(part for part in (prefix, *rest, last) if part)


def _layout_by_names(module: str, theirs: str | None, shape: tuple[int, ...]) -> str:
    """What the names on both sides say a kernel is of."""
    if "ConvTranspose" in module.split("/")[-1]:
        return "conv_transpose"
    # layers/depthwise_conv2d_1/vars/0: Keras's files name layers by their class.
    of = (theirs or "").removesuffix("/vars/0").split("/")[-1]
    split = "depthwise" in of and len(shape) > 2 and shape[-2] == 1
    return "depthwise" if split else "conv"


def _axes_of(library: _Library, layout: str, ndim: int) -> tuple[str, str]:
    """The axes of a kernel, in Flax and on the other side."""
    if ndim == 2:
        return _DENSE, library.dense
    transposed = layout.startswith("conv_transpose")
    return _FLAX[layout], library.transposed if transposed else library.conv


def _rearranged(a: np.ndarray, source: str, target: str) -> np.ndarray:
    """A kernel with other axes, turned around in space where just one side is."""
    space = [f"k{n}" for n in range(a.ndim - 2)]

    def axes(order):
        letters = order.rstrip("~")
        return [x for c in letters for x in (space if c == "k" else [c])]

    before, after = axes(source), axes(target)
    a = np.transpose(a, [before.index(x) for x in after])
    if source.endswith("~") != target.endswith("~"):
        a = np.flip(a, tuple(n for n, x in enumerate(after) if x in space))
    return a


def _one_vector(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether both are of a vector, one of them with axes of size 1 beside it."""
    return 1 in (len(a), len(b)) and [n for n in a if n != 1] == [
        n for n in b if n != 1
    ]


def _one_depthwise(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one is [*K, 1, C * M] and the other [*K, C, M]."""
    same_space = len(a) == len(b) and a[:-2] == b[:-2]
    return same_space and math.prod(a[-2:]) == math.prod(b[-2:])


def _their_shape(place: _Place) -> tuple[int, ...]:
    if place.axes is None:
        return place.flat
    # Of an array that takes no memory.
    return _rearranged(np.broadcast_to(np.zeros(()), place.flat), *place.axes).shape


def _check_names(name: str, places: list[_Place], theirs: Collection[str]) -> None:
    """Refuses what is left over, on either side."""
    missing = [p for p in places if p.theirs is not None and p.theirs not in theirs]
    left = sorted(set(theirs) - {p.theirs for p in places})
    if not missing and not left:
        return
    here = _some(f"{p.path} -> {p.theirs}" for p in missing)
    facts = [f"not on the other side: {here}"] if missing else []
    facts += [f"not in the variables: {_some(left)}"] if left else []
    raise _check.error(
        ValueError,
        name,
        "every array must have its place on both sides",
        "; ".join(facts),
        "Pass names={'path of a module here': 'its name there'}, and leave out what the"
        " other model has not",
    )


def _check_shapes(name: str, faults: list[str]) -> None:
    if faults:
        raise _check.error(
            ValueError,
            name,
            "shapes must agree",
            "; ".join(faults[:6]) + (f"; {len(faults) - 6} more" * (len(faults) > 6)),
            "Take both sides from the same model, or say in layouts which kernels are"
            " those of other layers",
        )


def _filled(
    name: str,
    places: list[_Place],
    weights: Mapping[str, Any],
    variables: Any,
    factors: Mapping[str, float] | None = None,
    count: Any = None,
) -> Any:
    """The variables with the arrays of the weights in their places."""
    _check_names(name, places, weights.keys())
    arrays, faults = [], []
    for place in places:
        a = count if place.leaf == "count" else 0
        if place.theirs is not None:
            a = array_of(name, "weights", place.theirs, weights[place.theirs])
        a = np.asarray(a)
        is_one = place.leaf == "count" or place.theirs is None
        wanted = () if is_one else _their_shape(place)
        if a.shape != wanted and not place.alike(a.shape, wanted):
            faults.append(
                f"{place.path} of shape {place.shape}, {place.theirs!r} of shape"
                f" {a.shape}" + (f" for {wanted}" * (wanted != place.shape))
            )
            continue
        a = a.reshape(wanted)
        arrays.append(_as_ours(name, place, a, (factors or {}).get(place.path)))
    _check_shapes(name, faults)
    return jax.tree.unflatten(jax.tree.structure(variables), arrays)


def _as_ours(name: str, place: _Place, a: np.ndarray, factor: Any) -> jax.Array:
    got = f"{place.path} of {place.dtype}, {place.theirs!r} of {a.dtype}"
    if place.leaf == "count" or place.theirs is None:
        _check_updates(name, place, a)
        a = np.broadcast_to(a.astype(place.dtype), place.shape)
    else:
        if place.axes is not None:
            a = _rearranged(a, *reversed(place.axes))
        a = _cast(name, got, a, place.dtype, factor).reshape(place.shape)
    # A copy: memory that another library may write to is not a JAX array's.
    result = jnp.array(a, copy=True)
    if result.dtype != place.dtype:
        raise _check.error(
            TypeError,
            name,
            "JAX must be able to hold the dtypes of the variables",
            f"{place.path} of {place.dtype}, which becomes {result.dtype}",
            "Set jax.config.update('jax_enable_x64', True), or pass narrower variables",
        )
    return result


def _check_updates(name: str, place: _Place, count: np.ndarray) -> None:
    """Refuses a count of updates that is none, and one that would become another."""
    number = count.dtype.kind in "iuf" and count >= 0
    if not number or count.astype(place.dtype).astype(np.float64) != count:
        raise _check.error(
            ValueError,
            name,
            "a count of updates must be a whole number from 0 on, which its dtype can"
            " hold",
            f"{count} for {place.path} of {place.dtype}",
            "Set it to the nearest such number",
        )


def _cast(name: str, got: str, a: np.ndarray, dtype: Any, factor: Any = None) -> Any:
    """An array, times the factor, in a dtype of its kind that has room for it."""
    if _kind(a.dtype) != _kind(dtype):
        raise _check.error(
            TypeError,
            name,
            "dtypes must be of one kind",
            got,
            "Convert it first: quantized weights need their scale",
        )
    if factor is not None:
        a = a.astype(np.float64) * factor
    if a.dtype == dtype:
        return a
    with np.errstate(all="ignore"):
        cast = a.astype(dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            same = (cast.astype(a.dtype) == a) & ((cast < 0) == (a < 0))
        else:
            same = np.isfinite(cast) == np.isfinite(a)
    if not same.all():
        raise _check.error(
            ValueError,
            name,
            "numbers must be within the range of the dtype that they become",
            f"{got}: {a[~same][0]}",
            "Take a wider dtype on the side that they go to",
        )
    return cast


def _kind(dtype: Any) -> Any:
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)
    return next((k for k in kinds if jnp.issubdtype(dtype, k)), dtype)


def _taken(
    name: str,
    places: list[_Place],
    variables: Any,
    like: Mapping[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of the variables, as the other library has them, by its names."""
    if like is not None:
        _check_names(name, places, like.keys())
    found: dict[str, np.ndarray] = {}
    faults = []
    for place, value in zip(places, jax.tree.leaves(variables), strict=True):
        if place.theirs is None:
            continue
        a = _as_theirs(name, place, value, (factors or {}).get(place.path))
        if like is not None:
            shape = tuple(np.shape(like[place.theirs]))
            if a.shape != shape and not place.alike(a.shape, shape):
                faults.append(
                    f"{place.path} of shape {place.shape}, which would be {a.shape},"
                    f" {place.theirs!r} of shape {shape}"
                )
                continue
            a = a.reshape(shape)
            dtype = getattr(like[place.theirs], "dtype", None)
            if isinstance(dtype, np.dtype) and place.leaf != "count":
                got = f"{place.path} of {a.dtype}, {place.theirs!r} of {dtype}"
                _cast(name, got, a, dtype)
        found[place.theirs] = np.array(a, order="C", copy=True)
    _check_shapes(name, faults)
    return found


def _as_theirs(name: str, place: _Place, value: Any, factor: Any) -> np.ndarray:
    if isinstance(value, jax.ShapeDtypeStruct):
        raise _no_array(name, place.path, value)
    a = np.asarray(value)
    if place.leaf == "count":
        if a.size and (a != a.flat[0]).any():
            raise _check.error(
                ValueError,
                name,
                "all features must have been updated as often, for one count of them",
                f"{place.path} from {a.min()} to {a.max()}",
                "Set it to one number",
            )
        return np.asarray(a.flat[0] if a.size else 0, np.int64)
    a = a.reshape(place.flat)
    if place.axes is not None:
        a = _rearranged(a, *place.axes)
    return a if factor is None else (a.astype(np.float64) / factor).astype(a.dtype)


def _bessel(name: str, places: list[_Place], values: Any) -> dict[str, float]:
    """The factors that make an unbiased variance biased, (n - 1) / n, by path."""
    variances = {p.module: p.path for p in places if p.leaf == "var"}
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        values = dict.fromkeys(variances, values)
    wrong = {m: n for m, n in values.items() if m not in variances or not n > 1}
    if wrong:
        raise _check.error(
            ValueError,
            name,
            "values_per_statistic must be above 1, of modules with a running variance",
            f"{wrong}; modules are {_some(variances)}",
            "Pass N * H * W of the batches that the statistics were taken from",
        )
    return {variances[m]: (n - 1) / n for m, n in values.items()}


def from_torch(
    weights: Mapping[str, Any],
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    values_per_statistic: Any = None,
) -> Any:
    """Fills the variables of a Flax model from a state dict of PyTorch.

    The settings of a norm are not in a state dict; ``tools.preset("torch",
    "BatchNorm")`` has PyTorch's defaults. PyTorch's momentum is one minus ours. Its
    running variance is unbiased, and is taken as it is unless ``values_per_statistic``
    is given. ``num_batches_tracked`` goes to ``count``, where the norm has one, and is
    left out elsewhere. A norm's ``gamma`` and ``beta`` of old checkpoints are taken for
    its ``weight`` and ``bias``. A Dense layer that reads a flattened image reads it in
    the order ``[C, H, W]`` in PyTorch: flatten ``jnp.moveaxis(x, -1, 1)`` in Flax.

    Args:
      weights: a state dict: arrays, or tensors on the CPU, by name, as `read_weights`
        returns them.
      variables: of the Flax model: linen's collections, or the State or pure dictionary
        of nnx; arrays or ShapeDtypeStructs. They say the structure, shapes and dtypes.
      names: from paths of modules here, ``"encoder/conv"``, to those there,
        ``"encoder.0"``, or a function of the path; the longest path that fits counts,
        and what follows it keeps its name. A path of one array names that array. None:
        the same path, with dots.
      layouts: what kernels of three and more axes are of, by module: "conv",
        "depthwise", "conv_transpose", or "conv_transpose_kernel" for Flax's
        ``transpose_kernel=True``; "dense_to_heads" for a DenseGeneral's ``[in, heads,
        head]``, "dense_from_heads" for ``[heads, head, out]``. Of those not named,
        ``ConvTranspose`` in the name decides, and ``depthwise`` in that of Keras; a
        bias of two axes says a DenseGeneral, and so do ``query``, ``key``, ``value``
        and ``out`` side by side.
      values_per_statistic: how many values each batch variance was of, ``N * H * W``:
        one number, or one by module. The running variance times ``(n - 1) / n`` is the
        biased one. None: it is taken as it is.

    Returns:
      New variables, JAX arrays. Where dtypes are equal, `to_torch` gives the same bits
      back, unless variances were changed.

    Raises:
      ValueError: if an array is left over on either side, shapes disagree, a number is
        too large for its new dtype, or ``names``, ``layouts`` or
        ``values_per_statistic`` name what is not there.
      TypeError: if integers would become floating, or complex ones real; if weights are
        not arrays by name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import numpy as np
      >>> from normjax import linen, tools
      >>> norm = linen.BatchNorm(**tools.preset("torch", "BatchNorm"))
      >>> variables = norm.init(jax.random.key(0), jnp.ones((4, 2)), True)
      >>> weights = {"weight": np.ones(2), "bias": np.zeros(2),
      ...     "running_mean": np.ones(2), "running_var": np.full(2, 4.0),
      ...     "num_batches_tracked": np.array(7)}
      >>> tools.from_torch(weights, variables)["batch_stats"]["var"]
      Array([4., 4.], dtype=float32)
    """
    places = _places("from_torch", _TORCH, variables, names, layouts)
    factors = _bessel("from_torch", places, values_per_statistic)
    check_mapping("from_torch", "weights", weights)
    counted = {p.theirs for p in places}
    uncounted = {
        key
        for key in weights
        if key.endswith("num_batches_tracked")
        and key not in counted
        and key.replace("num_batches_tracked", "running_mean") in weights
    }
    weights = {k: v for k, v in weights.items() if k not in uncounted}
    places = _with_old_names(places, weights)
    return _filled("from_torch", places, weights, variables, factors)


def _with_old_names(places: list[_Place], theirs: Collection[str]) -> list[_Place]:
    """Places, of which a norm has ``gamma`` and ``beta`` where the other side does."""
    norms = {place.module for place in places if place.leaf == "scale"}
    new = []
    for place in places:
        if place.module in norms and place.leaf in _OLD and place.theirs not in theirs:
            module, dot, _ = (place.theirs or "").rpartition(".")
            old = f"{module}{dot}{_OLD[place.leaf]}"
            place = place._replace(theirs=old) if old in theirs else place
        new.append(place)
    return new


def to_torch(
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    values_per_statistic: Any = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the variables of a Flax model as a state dict of PyTorch.

    What `from_torch` says holds the other way. Norms without ``count`` give no
    ``num_batches_tracked``; ``load_state_dict`` then starts it at 0.

    Args:
      variables: of the Flax model, arrays.
      names: as in `from_torch`.
      layouts: as in `from_torch`.
      values_per_statistic: as in `from_torch`; the running variance is divided by
        ``(n - 1) / n``.
      like: a state dict whose names and shapes the result must have; None: any.

    Returns:
      Arrays by name, in the dtypes of the variables; ``num_batches_tracked`` int64. For
      ``load_state_dict``, ``torch.from_numpy`` each, or write them with
      `write_weights`.

    Raises:
      ValueError: as `from_torch` does; if the features of a norm have different counts.
      TypeError: if variables are not arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"fc": {"kernel": jnp.ones((2, 3))}}}
      >>> {k: a.shape for k, a in tools.to_torch(variables).items()}
      {'fc.weight': (3, 2)}
    """
    places = _places("to_torch", _TORCH, variables, names, layouts)
    factors = _bessel("to_torch", places, values_per_statistic)
    if like is not None:
        check_mapping("to_torch", "like", like)
        counts = {p.theirs for p in places if p.leaf == "count"}
        counted = [k for k in like if k.endswith("num_batches_tracked")]
        like = {k: v for k, v in like.items() if k in counts or k not in counted}
        places = _with_old_names(places, like)
    return _taken("to_torch", places, variables, like, factors)


# Of a Keras model, what a file holds besides its weights.
_NOT_WEIGHTS = "optimizer/"


def from_keras(
    weights: Mapping[str, Any],
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    count: int | None = None,
) -> Any:
    """Fills the variables of a Flax model from the weights of a Keras 3 model.

    In a file of Keras the n-th array of a layer is ``vars/n``: kernel or embeddings,
    then bias; gamma, beta, moving_mean and moving_variance of a batch norm, of which
    those that are there count. Momentum and the biased variance are as in Flax; epsilon
    is 1e-3 (``tools.preset("keras", "BatchNorm")``). The state of optimizers and of
    random seeds is left out.

    Args:
      weights: arrays by path in the file, as `read_weights` returns them.
      variables: as in `from_torch`.
      names: as in `from_torch`, to paths in the file: ``{"conv": "layers/conv2d"}``.
        None: the same path, with ``layers/`` before each part of it.
      layouts: as in `from_torch`.
      count: updates so far, for norms that count them, since Keras does not.

    Returns:
      New variables, JAX arrays. Where dtypes are equal, `to_keras` gives the same bits
      back.

    Raises:
      ValueError: as `from_torch` does; if a norm has a count and ``count`` is None.
      TypeError: if integers would become floating, or complex ones real.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from normjax import tools
      >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> variables = {"params": {"dense": dense}}
      >>> weights = {"layers/dense/vars/0": np.zeros((2, 3)),
      ...            "layers/dense/vars/1": np.array([1.0, 2.0, 3.0])}
      >>> tools.from_keras(weights, variables)["params"]["dense"]["bias"]
      Array([1., 2., 3.], dtype=float32)
    """
    places = _places("from_keras", _KERAS, variables, names, layouts)
    _check_count("from_keras", places, count)
    return _filled(
        "from_keras",
        places,
        _keras_weights("from_keras", "weights", weights),
        variables,
        count=count,
    )


def to_keras(
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the variables of a Flax model as the weights of a Keras 3 model.

    What `from_keras` says holds the other way. ``count`` is left out, since Keras has
    none. For Keras, write them with `write_weights` to a ``.weights.h5``, and call
    ``model.load_weights``.

    Args:
      variables: of the Flax model, arrays.
      names: as in `from_keras`.
      layouts: as in `from_torch`.
      like: weights whose names and shapes the result must have, those of the Keras
        model; of a DepthwiseConv it says the shape. None: any.

    Returns:
      Arrays by path in the file, in the dtypes of the variables.

    Raises:
      ValueError: as `from_keras` does.
      TypeError: if variables are not arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> tools.to_keras({"params": {"dense": {"kernel": jnp.ones((2, 3))}}}).keys()
      dict_keys(['layers/dense/vars/0'])
    """
    places = _places("to_keras", _KERAS, variables, names, layouts)
    like = None if like is None else _keras_weights("to_keras", "like", like)
    return _taken("to_keras", places, variables, like)


def _keras_weights(name: str, field: str, weights: Any) -> dict[str, Any]:
    check_mapping(name, field, weights)
    return {
        k: v
        for k, v in weights.items()
        if not k.startswith(_NOT_WEIGHTS) and "/seed_generator/" not in f"/{k}"
    }


def _check_count(name: str, places: list[_Place], count: Any) -> None:
    counted = [p.path for p in places if p.leaf == "count" and p.theirs is None]
    if counted and count is None:
        raise _check.error(
            ValueError,
            name,
            "a norm with a count needs the number of updates so far, which is not among"
            " the weights",
            f"{_some(counted)}, count=None",
            "Pass count",
        )


def from_haiku(
    weights: tuple[Any, Any],
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
) -> Any:
    """Fills the variables of a Flax model from those of a Haiku model.

    Of the running statistics the debiased ``average`` is taken, and ``counter`` to
    ``count`` where the norm has one (``debias=True``, which Haiku always does);
    ``hidden`` follows from both. Haiku's ``decay_rate`` is our momentum, its variance
    is biased. Haiku's ``[1, 1, 1, C]`` is our ``[C]``.

    Args:
      weights: (params, state) of the Haiku model; state may be empty.
      variables: as in `from_torch`.
      names: as in `from_torch`, to names of Haiku's modules: ``{"bn": "net/~/bn"}``.
        None: the same path.
      layouts: as in `from_torch`.

    Returns:
      New variables, JAX arrays. Where dtypes are equal, `to_haiku` gives the same bits
      back, but for ``hidden``, which it computes.

    Raises:
      ValueError: as `from_torch` does; if a mean and its variance were updated
        unequally often.
      TypeError: if integers would become floating, or complex ones real.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"linear": {"kernel": jnp.ones((2, 3))}}}
      >>> params = {"linear": {"w": jnp.full((2, 3), 5.0)}}
      >>> tools.from_haiku((params, {}), variables)["params"]["linear"]["kernel"][0]
      Array([5., 5., 5.], dtype=float32)
    """
    places = _places("from_haiku", _HAIKU, variables, names, layouts)
    flat = _haiku_flat(weights, places, "from_haiku")
    return _filled("from_haiku", places, flat, variables)


def to_haiku(
    variables: Any,
    like: tuple[Any, Any],
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    momentum: float | None = None,
) -> tuple[dict, dict]:
    """Returns the variables of a Flax model as those of a Haiku model.

    What `from_haiku` says holds the other way. ``hidden`` is ``average * (1 -
    momentum**counter)``. Where a norm has no count, its statistics are taken as
    settled: ``counter`` is so high that nothing is debiased, and ``hidden`` is
      ``average``.

    Args:
      variables: of the Flax model, arrays.
      like: (params, state) of the Haiku model, whose names, shapes and dtypes the
        result has; arrays or ShapeDtypeStructs.
      names: as in `from_haiku`.
      layouts: as in `from_torch`.
      momentum: the part of the OLD statistics that is kept, ``decay_rate`` in Haiku;
        needed where there are running statistics.

    Returns:
      (params, state), dictionaries of JAX arrays.

    Raises:
      ValueError: as `from_haiku` does; if ``momentum`` is needed and None.
      TypeError: if variables are not arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"linear": {"kernel": jnp.ones((2, 1))}}}
      >>> like = {"linear": {"w": jnp.zeros((2, 1))}}, {}
      >>> params, state = tools.to_haiku(variables, like)
      >>> params["linear"]["w"].sum()
      Array(2., dtype=float32)
    """
    places = _places("to_haiku", _HAIKU, variables, names, layouts)
    flat = _taken("to_haiku", places, variables, _haiku_flat(like, places, "to_haiku"))
    params, state = like
    averages = [m for m in state if m.rpartition("/")[2] in ("mean_ema", "var_ema")]
    _check_momentum("to_haiku", averages, momentum)
    for module in averages:
        average = flat[f"{module}/average"]
        counted = f"{module.replace('var_ema', 'mean_ema')}/counter"
        counter = flat.get(counted, np.asarray(_settled(momentum)))
        one = average.dtype.type(1)
        power = np.power(average.dtype.type(momentum), counter, dtype=average.dtype)
        flat[f"{module}/hidden"] = average * (one - power)
        flat[f"{module}/counter"] = counter

    def filled(tree):
        return {
            module: {
                leaf: jnp.array(flat[f"{module}/{leaf}"], a.dtype)
                for leaf, a in leaves.items()
            }
            for module, leaves in tree.items()
        }

    return filled(params), filled(state)


def _haiku_flat(weights: Any, places: list[_Place], name: str) -> dict[str, Any]:
    """Params and state by module/leaf, without what follows from the rest."""
    _check_pair(name, weights, "(params, state)", "{}")
    for tree in weights:
        for module, leaves in check_mapping(name, "params and state", tree).items():
            check_mapping(name, f"params and state at {module!r}", leaves)
    flat = {
        f"{module}/{leaf}": a
        for tree in weights
        for module, leaves in tree.items()
        for leaf, a in leaves.items()
    }
    named = {p.theirs for p in places if p.theirs is not None}
    kept = dict(flat)
    for key in flat:
        module, _, leaf = key.rpartition("/")
        if module.endswith(("/mean_ema", "/var_ema")) and f"{module}/average" in flat:
            if leaf == "hidden" or (leaf == "counter" and key not in named):
                del kept[key]
    for key in named & set(kept):
        twin = key.replace("/mean_ema/counter", "/var_ema/counter")
        pair = kept[key], flat.get(twin)
        concrete = not any(isinstance(a, jax.ShapeDtypeStruct) for a in pair)
        if twin != key and name == "from_haiku" and concrete and pair[0] != pair[1]:
            raise _check.error(
                ValueError,
                name,
                "mean and variance must have been updated as often",
                f"{key!r} {pair[0]}, {twin!r} {pair[1]}",
                "Pass the state of one model",
            )
    return kept


def _check_pair(name: str, pair: Any, two: str, empty: str) -> None:
    if type(pair) not in (tuple, list) or len(pair) != 2:
        raise _check.error(
            TypeError,
            name,
            f"the model on the other side is given as {two}",
            f"a {type(pair).__name__}",
            f"Pass {two}, with {empty} for a state that it has not",
        )


def _check_momentum(name: str, norms: Any, momentum: float | None) -> None:
    if norms and (momentum is None or not 0 <= momentum < 1):
        raise _check.error(
            ValueError,
            name,
            "running statistics need the momentum they are kept with, in [0, 1)",
            f"momentum={momentum}, {_some(norms)}",
            "Pass the part of the OLD value that is kept, Haiku's decay_rate",
        )


def _settled(momentum: Any) -> int:
    """So many updates that 1 - momentum**n is 1 in float64."""
    return 1 + math.ceil(-40 / math.log(momentum)) if momentum > 0 else 1


def from_equinox(
    weights: tuple[Any, Any],
    variables: Any,
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
    count: int | None = None,
) -> Any:
    """Fills the variables of a Flax model from the arrays of an Equinox module.

    The running statistics are those that Equinox normalizes by: of ``mode="batch"`` the
    hidden ones over ``1 - momentum**counter``, and ``counter`` goes to ``count`` where
    the norm has one. Momentum is as in Flax, epsilon 1e-5, the variance biased.
    Equinox's bias ``[O, 1, 1]`` of a convolution is our ``[O]``.

    Args:
      weights: (module, state), as ``eqx.nn.make_with_state`` returns them; state may be
        None where there is no batch norm.
      variables: as in `from_torch`.
      names: as in `from_torch`, to paths of attributes: ``{"fc": "layers.2"}``. None:
        the same path, with dots.
      layouts: as in `from_torch`.
      count: updates so far, for norms that count them, of ``mode="ema"``, which does
        not.

    Returns:
      New variables, JAX arrays. Where dtypes are equal, `to_equinox` gives the same
      bits back, but for the hidden statistics of ``mode="batch"``, which it computes.

    Raises:
      ValueError: as `from_torch` does; if there is a batch norm and no state.
      TypeError: if integers would become floating, or complex ones real.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"fc": {"kernel": jnp.ones((2, 3))}}}
      >>> module = {"fc": {"weight": jnp.zeros((3, 2))}}  # or an eqx.Module
      >>> tools.from_equinox((module, None), variables)["params"]["fc"]["kernel"].sum()
      Array(0., dtype=float32)
    """
    places = _places("from_equinox", _EQUINOX, variables, names, layouts)
    _check_pair("from_equinox", weights, "(module, state)", "None")
    flat, _ = _equinox_flat("from_equinox", *weights, places)
    unknown = {p.theirs for p in places if p.leaf == "count"} - flat.keys()
    places = [p._replace(theirs=None) if p.theirs in unknown else p for p in places]
    _check_count("from_equinox", places, count)
    return _filled("from_equinox", places, flat, variables, count=count)


def to_equinox(
    variables: Any,
    like: tuple[Any, Any],
    *,
    names: Names = None,
    layouts: Mapping[str, str] | None = None,
) -> tuple[Any, Any]:
    """Returns an Equinox module, and its state, with the variables of a Flax model.

    What `from_equinox` says holds the other way. Where a norm has no count, its
    statistics are taken as settled: ``counter`` is so high that nothing is debiased.

    Args:
      variables: of the Flax model, arrays.
      like: (module, state) of Equinox, whose structure, shapes and dtypes the result
        has.
      names: as in `from_equinox`.
      layouts: as in `from_torch`.

    Returns:
      (module, state); ``like`` stays as it is.

    Raises:
      ValueError: as `from_equinox` does.
      TypeError: if variables are not arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"fc": {"kernel": jnp.ones((2, 3))}}}
      >>> module = {"fc": {"weight": jnp.zeros((3, 2))}}  # or an eqx.Module
      >>> tools.to_equinox(variables, (module, None))[0]["fc"]["weight"].sum()
      Array(6., dtype=float32)
    """
    places = _places("to_equinox", _EQUINOX, variables, names, layouts)
    _check_pair("to_equinox", like, "(module, state)", "None")
    there, norms = _equinox_flat("to_equinox", *like, places)
    uncounted = {p.theirs for p in places if p.leaf == "count"} - there.keys()
    places = [p._replace(theirs=None) if p.theirs in uncounted else p for p in places]
    flat = _taken("to_equinox", places, variables, there)
    module, state = like

    def new(path, a):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.array(flat[name], a.dtype) if _is_array(a) else a

    filled = jax.tree_util.tree_map_with_path(new, module)
    if state is not None:  # State.set spoils the state it is called on
        state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    for name, norm in norms.items():
        index = norm.ema_state_index if norm.mode == "ema" else norm.batch_state_index
        statistics = [
            jnp.asarray(flat[f"{name}.{k}"], old.dtype)
            for k, old in zip(("mean", "var"), state.get(index), strict=True)
        ]
        if norm.mode == "ema":
            state = state.set(norm.ema_first_time_index, jnp.array(False))
        else:
            counter = int(flat.get(f"{name}.count", _settled(norm.momentum)))
            # Equinox wants it weakly typed, or not, as it was.
            counter = 0 * state.get(norm.batch_counter) + counter
            statistics = [a * _debiased(norm, counter) for a in statistics]
            state = state.set(norm.batch_counter, counter)
        state = state.set(index, tuple(statistics))
    return filled, state


def _is_array(a: Any) -> bool:
    return isinstance(a, (jax.Array, np.ndarray))


def _debiased(norm: Any, counter: jax.Array) -> jax.Array:
    return jnp.where(counter == 0, 1, 1 - norm.momentum**counter)


def _equinox_flat(
    name: str, module: Any, state: Any, places: list[_Place]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by path, running statistics among them, and the batch norms by path."""
    equinox = sys.modules.get("equinox")  # without which no module is one of it

    def is_norm(m):
        return equinox is not None and isinstance(m, equinox.nn.BatchNorm)

    def by_path(is_leaf, keep):
        found = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_leaf)
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        return {name(path): leaf for path, leaf in found if keep(leaf)}

    norms, flat = by_path(is_norm, is_norm), by_path(None, _is_array)
    if norms and state is None:
        raise _check.error(
            ValueError,
            name,
            "batch norms keep their statistics in a state",
            f"{_some(norms)}, state=None",
            "Pass (module, state), as eqx.nn.make_with_state(Model)(...) returns them",
        )
    named = {p.theirs for p in places}
    for path, norm in norms.items():
        if norm.mode == "ema":
            mean, var = state.get(norm.ema_state_index)
        else:
            counter = state.get(norm.batch_counter)
            part = _debiased(norm, counter)
            mean, var = (a / part for a in state.get(norm.batch_state_index))
            if f"{path}.count" in named:
                flat[f"{path}.count"] = counter
        flat |= {f"{path}.mean": mean, f"{path}.var": var}
    return flat, norms
