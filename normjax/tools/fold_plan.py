"""Which batch norms can be folded, into which layers, and why the others cannot."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import _check, _module
from normjax.tools.feeds import Call, Feeds, Mark
from normjax.tools.models import kind_of

LAYERS = ("Conv", "ConvTranspose", "Dense", "DenseGeneral", "Linear", "LinearGeneral")
LIBRARIES = (
    "flax.linen.linear",
    "flax.linen.normalization",
    "flax.nnx.nn.linear",
    "flax.nnx.nn.normalization",
    "normjax.linen",
    "normjax.nnx",
)
Path = tuple[str, ...]


def word(path: Sequence) -> str:
    """Writes a path."""
    return "/".join(map(str, path)) or "the model"


def error(rule: str, got: str, todo: str) -> Exception:
    """The house error of `fold`."""
    return _check.error(ValueError, "fold", rule, got, todo)


def is_chosen(module: Any) -> bool:
    return is_layer(module) or kind_of(module) == "BatchNorm"


def is_layer(module: Any) -> bool:
    """Whether a module is a layer of Flax's own; a class made from one is not."""
    kind = type(module)
    return kind.__name__ in LAYERS and kind.__module__ in LIBRARIES


def is_own(module: Any) -> bool:
    """Whether a batch norm is Flax's own or normjax's."""
    return type(module).__name__ == "BatchNorm" and type(module).__module__ in LIBRARIES


@dataclasses.dataclass(frozen=True)
class Past:
    """What stands where a batch norm was: its dtype and its activation remain."""

    path: str
    takes: Any
    returns: Any
    dtype: Any
    activation: Callable[[jax.Array], jax.Array] | None
    normalize_with: str | None
    update_statistics: bool | None
    running_variance: str = "biased"

    @classmethod
    def of(cls, call: Call) -> "Past":
        fields: Any = {
            name: getattr(call.module, name, None)
            for name in ("dtype", "activation", "normalize_with", "update_statistics")
        }
        return cls(word(call.path), call.x.dtype, call.y.dtype, **fields)

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        momentum: Any = None,
    ) -> jax.Array:
        with_running, update = _module.switches(self, use_running_average)
        if not with_running or update or mask is not None:
            raise error(
                "a folded batch norm is the affine map of its running statistics",
                f"a call of {self.path} "
                + ("with a mask" if with_running and not update else "while training"),
                "Train, and mask, the model that was not folded",
            )
        dtype = self.dtype
        if dtype is None:
            same = x.dtype == self.takes
            dtype = self.returns if same else jnp.promote_types(x.dtype, self.returns)
        x = x.astype(dtype)
        return x if self.activation is None else self.activation(x)


class Step(NamedTuple):
    """A batch norm that is folded, and the layers into which it is."""

    path: Path
    norm: Call
    layers: tuple[Path, ...]
    after: bool
    past: Past


def planned(
    traced: Feeds, paths: str | Iterable[str] | None, strict: bool
) -> tuple[list[Step], dict[str, str]]:
    """What to fold, and why the others stay."""
    beside = _Beside(traced)
    paths = [paths] if isinstance(paths, str) else paths
    wanted = None if paths is None else list(paths)
    names = [word(path) for path in beside.norms]
    for name in wanted or ():
        if name not in names:
            raise error(
                "paths must name batch norms that the model calls",
                f"{name!r}; it calls {', '.join(names) or 'none'}",
                "Pass paths=None for all that can be folded",
            )
    plan, kept = [], {}
    for path in beside.norms:
        if wanted is not None and word(path) not in wanted:
            kept[word(path)] = "it is not among the paths to fold"
            continue
        found = beside.step(path)
        if isinstance(found, Step):
            plan.append(found)
        elif strict or wanted is not None:
            raise error(
                "folding must leave every output as it is",
                f"{word(path)}, which cannot be folded: {found}",
                f"Leave {word(path)} out of paths, and strict=False",
            )
        else:
            kept[word(path)] = found
    if not plan:
        reasons = "; ".join(f"{path}: {why}" for path, why in kept.items())
        raise error(
            "there must be a batch norm to fold",
            reasons or "a model that calls no batch norm",
            "Pass a model in inference, with batch norms right after layers",
        )
    return plan, kept


class _Beside:
    """The layers beside each batch norm, and what they are fit for."""

    def __init__(self, traced: Feeds):
        self.traced = traced
        self.norms: dict[Path, list[int]] = {}
        self.layers: dict[Path, list[int]] = {}
        for i, call in traced.calls.items():
            group = self.layers if is_layer(call.module) else self.norms
            group.setdefault(call.path, []).append(i)
        self.users: dict[int | None, set[Path]] = {}
        for i, call in traced.calls.items():
            for name in call.variables:
                self.users.setdefault(traced.leaf(i, name), set()).add(call.path)

    def step(self, path: Path) -> Step | str:
        """How to fold a batch norm, or why it stays."""
        numbers = self.norms[path]
        call = self.traced.calls[numbers[0]]
        past = Past.of(call)
        why = next(filter(None, (self._not_affine(i, past) for i in numbers)), None)
        if why is not None:
            return why
        if len({axes_of(self.traced.calls[i]) for i in numbers}) > 1:
            return "its axis is another one for inputs of another rank"
        before = self._before(path)
        if not isinstance(before, str):
            return Step(path, call, before, False, past)
        after = self._after(path)
        if not isinstance(after, str):
            return Step(path, call, after, True, past)
        return f"{before}, and {after}"

    def _not_affine(self, number: int, past: Past) -> str | None:
        """Why a call of a batch norm is not one affine map for all inputs."""
        call = self.traced.calls[number]
        if not is_own(call.module):
            return f"{type(call.module).__name__} is a class of its own"
        if own := _own_function(call.module):
            return f"it has a {own} of its own"
        average = call.options.get("use_running_average")
        if average is None:
            average = call.module.use_running_average
        with_running, update = _module.switches(past, average)
        if not with_running:
            return "it normalizes by the statistics of the batch"
        if update:
            return "it updates its statistics"
        if call.options.get("mask") is not None:
            return "it has a mask, under which its output is zero"
        return self._computed(number)

    def _computed(self, number: int) -> str | None:
        """Why the variables of a call cannot be written, if so."""
        call = self.traced.calls[number]
        for name in call.variables:
            leaf = self.traced.leaf(number, name)
            if leaf is None:
                return f"{name} of {word(call.path)} is not stored as it is used"
            others = self.users[leaf] - {call.path}
            if others:
                one = word(sorted(others)[0])
                return f"{name} of {word(call.path)} is that of {one} too"
            if beside := self.traced.beside(leaf, call.path):
                by = ", ".join(sorted(set(map(self._named, beside))))
                return f"{name} of {word(call.path)} is read beside it, by {by}"
        return None

    def _source(self, label: Any) -> Call | None:
        """The call that a mark is of, if it is one."""
        return self.traced.calls[label.call] if isinstance(label, Mark) else None

    def _named(self, label: Any) -> str:
        call = self._source(label)
        if call is not None:
            return word(call.path)
        return label if isinstance(label, str) else "a variable"

    def _before(self, path: Path) -> tuple[Path, ...] | str:
        """The layer before a batch norm, or why it cannot take its work."""
        sources = [s for i in self.norms[path] for s in self.traced.sources(i)]
        others = [s for s in sources if self._not_layer(s)]
        if others:
            return f"it follows {self._named(others[0])}, no layer"
        paths = {self._source(s).path for s in sources}  # type: ignore[union-attr]
        if len(paths) > 1:
            return f"it follows several layers, {', '.join(map(word, sorted(paths)))}"
        (layer,) = paths
        for readers in (r for i in self.layers[layer] for r in self.traced.readers(i)):
            named = [self._named(r) for r in readers]
            if named != [word(path)]:
                return f"{word(layer)} before it feeds {', '.join(named) or 'nobody'}"
        return self._fit(path, layer, after=False) or (layer,)

    def _after(self, path: Path) -> tuple[Path, ...] | str:
        """The layers after a batch norm, or why they cannot do its work."""
        if Past.of(self.traced.calls[self.norms[path][0]]).activation is not None:
            return "its activation comes before what follows"
        readers = [
            r for i in self.norms[path] for rs in self.traced.readers(i) for r in rs
        ]
        others = [r for r in readers if self._not_layer(r)]
        if others or not readers:
            who = self._named(others[0]) if others else "nobody"
            return f"it feeds {who}, no layer"
        layers = sorted({self._source(r).path for r in readers})  # type: ignore[union-attr]
        for layer in layers:
            for source in (
                s for i in self.layers[layer] for s in self.traced.sources(i)
            ):
                if self._named(source) != word(path):
                    return f"{word(layer)} after it follows {self._named(source)} too"
            if why := self._fit(path, layer, after=True):
                return why
        return tuple(layers)

    def _not_layer(self, label: Any) -> bool:
        call = self._source(label)
        return call is None or not is_layer(call.module)

    def _fit(self, path: Path, layer: Path, after: bool) -> str | None:
        """Why a layer cannot do the work of a batch norm, if so."""
        numbers = self.layers[layer]
        norm_number = self.norms[path][0]
        norm, call = (self.traced.calls[i] for i in (norm_number, numbers[0]))
        name, module = word(layer), call.module
        if own := _own_function(module):
            return f"{name} has a {own} of its own"
        for number in numbers:
            if why := self._computed(number):
                return why
        stacks = {
            self._stack(i, v)
            for i in (norm_number, *numbers)
            for v in self.traced.calls[i].variables
            if v not in ("count", "skipped")
        }
        if len(stacks) > 1:
            return f"it and {name} are not stacked alike"
        dtypes = {v: self._leaf(norm_number, v).dtype for v in norm.variables}
        kernel = self._leaf(numbers[0], "kernel").dtype
        if any(_is_complex(d) for d in dtypes.values()) and not _is_complex(kernel):
            return f"it is complex, and {name} is real"
        geometry = Geometry(call)
        summed = {Geometry(self.traced.calls[i]).contracted for i in numbers}
        if len(summed) > 1:
            return f"{name} sums over another axis for inputs of another rank"
        return geometry.why_not_after(norm) if after else geometry.why_not_before(norm)

    def _leaf(self, number: int, name: str) -> Any:
        leaf = self.traced.leaf(number, name)
        assert leaf is not None  # of `_computed`
        return self.traced.leaves[leaf]

    def _stack(self, number: int, name: str) -> tuple[int, ...]:
        leaf = self._leaf(number, name)
        inner = len(self.traced.calls[number].variables[name])
        return leaf.shape[: leaf.ndim - inner]


def _own_function(module: Any) -> str | None:
    """The field in which a module has a function of its own to compute with, if any."""
    defaults = inspect.signature(type(module).__init__).parameters
    for field in ("dot_general", "conv_general_dilated", "promote_dtype"):
        for name in (field, f"{field}_cls"):
            usual = name in defaults and defaults[name].default
            own = getattr(module, name, None)
            if own not in (None, usual, getattr(lax, field, None)):
                return field
    return None


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


class Geometry:
    """Which axes of a layer's kernel are those of its inputs and outputs.

    Axes are counted from the end, since axes of a stack can come first.
    """

    def __init__(self, call: Call):
        self.call, self.module = call, call.module
        self.kind = type(call.module).__name__
        self.shape = call.variables["kernel"]
        self.groups = getattr(self.module, "feature_group_count", 1)
        self.batch = 0  # axes of the kernel that are the batch's
        self.inputs: tuple[int, ...] = (-2,)
        self.outputs: tuple[int, ...] = (-1,)
        self.contracted: tuple[int, ...] = (-1,)  # axes of x
        if getattr(self.module, "transpose_kernel", False):
            self.inputs, self.outputs = (-1,), (-2,)
        if self.kind in ("DenseGeneral", "LinearGeneral"):
            self._of_general()

    def _of_general(self) -> None:
        of_nnx = self.kind == "LinearGeneral"
        features = self.module.out_features if of_nnx else self.module.features
        n = len(features) if isinstance(features, (tuple, list)) else 1
        ndim, axis = self.call.x.ndim, self.module.axis
        axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
        self.contracted = tuple(sorted(a % ndim - ndim for a in axes))  # as Flax does
        self.batch = len(self.module.batch_axis if of_nnx else self.module.batch_dims)
        self.outputs = tuple(range(-n, 0))
        self.inputs = tuple(range(-n - len(axes), -n))

    def why_not_before(self, norm: Call) -> str | None:
        """Why the outputs of the layer cannot take what the norm does to them."""
        n = len(self.outputs)
        if min(axes_of(norm)) < -n:
            return f"its axis is not that of the features of {word(self.call.path)}"
        return None

    def why_not_after(self, norm: Call) -> str | None:
        """Why the inputs of the layer cannot."""
        axes, name = axes_of(norm), word(self.call.path)
        if len(axes) > 1 or axes[0] not in self.contracted:
            return f"{name} after it sums over other axes than its features"
        if self.kind == "ConvTranspose" or self._pads_with_zeros():
            return f"{name} after it pads with zeros, which it would shift"
        return None

    def _pads_with_zeros(self) -> bool:
        if self.kind != "Conv":
            return False
        if _numbers(self.module.input_dilation or 1) != {1}:
            return True
        padding = self.module.padding
        if isinstance(padding, str):
            one = _numbers(self.module.kernel_size) == {1}
            return padding not in ("VALID", "CIRCULAR", "REFLECT") and not one
        return _numbers(padding) != {0}

    def of_outputs(self, a: jax.Array, norm: Call) -> tuple[jax.Array, jax.Array]:
        """What is along a norm's features, along a kernel and a bias."""
        axes = axes_of(norm)
        n = len(self.outputs)
        stack = a.shape[: a.ndim - len(axes)]
        sizes = [norm.x.shape[i] if i in axes else 1 for i in range(-n, 0)]
        kernel = [1] * len(self.shape)
        for axis, size in zip(self.outputs, sizes, strict=True):
            kernel[axis] = size
        bias = [1] * self.batch + sizes
        return a.reshape((*stack, *kernel)), a.reshape((*stack, *bias))

    def of_inputs(self, a: jax.Array, norm: Call) -> jax.Array:
        """What is along a norm's features, along a kernel's inputs."""
        (axis,) = axes_of(norm)
        stack, shape = a.shape[:-1], [1] * len(self.shape)
        if self.groups > 1:  # each group of outputs has inputs of its own
            of_group, outputs = self.shape[-2], self.shape[-1]
            a = a.reshape((*stack, self.groups, of_group))
            a = jnp.repeat(a, outputs // self.groups, axis=-2).swapaxes(-1, -2)
            shape[-2:] = of_group, outputs
        else:
            shape[self.inputs[self.contracted.index(axis)]] = a.shape[-1]
        return a.reshape((*stack, *shape))

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Of the bias that the layer has, or would have."""
        return (*self.shape[: self.batch], *(self.shape[o] for o in self.outputs))

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the kernel that outputs are sums over."""
        n = len(self.shape)
        of_outputs = {o % n for o in self.outputs} | set(range(self.batch))
        return tuple(a - n for a in range(n) if a not in of_outputs)


def _numbers(value: Any) -> set[int]:
    """All the numbers in a field that can be one, a few, pairs, or some of both."""
    return {int(a) for one in jax.tree.leaves(value) for a in np.ravel(one)}


def axes_of(norm: Call) -> tuple[int, ...]:
    """The axes of a batch norm's features, counted from the end."""
    ndim = norm.x.ndim
    axes = _module.flax_axes("fold", norm.module.axis, ndim, "axis")
    return tuple(a - ndim for a in axes)
