"""Batch norms become part of the layers beside them, for inference."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax import _check, _module
from normjax.tools import feeds, models

LAYERS = ("Conv", "ConvTranspose", "Dense", "DenseGeneral", "Linear", "LinearGeneral")
_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold` did, and what it is worth on the inputs it was given.

    Attributes:
      folded: for each batch norm that is gone its path and the paths of the layers that
        do its work, with names separated by "/".
      kept: for each batch norm that stays its path and why it does.
      difference: the largest difference of an output from that of the model.
      relative: the same over the largest absolute output.
      speedup: the time of the model over that of the folded one, the median of calls in
        turns; None where they were not timed.

    Example:
      >>> from normjax import tools
      >>> report = tools.FoldReport({"bn": ("conv",)}, {}, 2e-7, 1e-7, 1.25)
      >>> print(report)
      1 of 1 batch norms folded; outputs differ by 2e-07, 1e-07 of the largest; 1.25
      times as fast
        bn is in conv
    """

    folded: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    difference: float
    relative: float
    speedup: float | None

    def __str__(self) -> str:
        """Writes it line by line."""
        total = len(self.folded) + len(self.kept)
        first = (
            f"{len(self.folded)} of {total} batch norms folded; outputs differ by"
            f" {self.difference:.2g}, {self.relative:.2g} of the largest"
        )
        if self.speedup is not None:
            first += f"; {self.speedup:.2f} times as fast"
        lines = [f"  {n} is in {', '.join(of)}" for n, of in self.folded.items()]
        lines += [f"  {n} stays: {why}" for n, why in self.kept.items()]
        return "\n".join([first, *lines])


class Folded(NamedTuple):
    """A model without its batch norms, and how it compares.

    Attributes:
      apply: called as the model was: for linen ``apply(variables, *inputs)``, as the
        model's own ``apply``; for nnx the folded module itself.
      variables: for linen those of the folded model; None for nnx.
      report: a `FoldReport`.

    Example:
      >>> from normjax import tools
      >>> tools.Folded._fields
      ('apply', 'variables', 'report')
    """

    apply: Any
    variables: Any
    report: FoldReport


def fold(
    model: Any,
    *inputs: Any,
    paths: Iterable[str] | None = None,
    strict: bool = False,
    seconds: float = 1.0,
    **kwargs: Any,
) -> Folded:
    """Folds batch norms into the layers before them, or after them where that is exact.

    A batch norm that normalizes by its running statistics is affine, ``s * x + t`` with

        s = scale / sqrt(var + epsilon),  t = bias - s * mean

    so a layer before it can do its work, ``(W s) x + s b + t``, and a layer after it,
    ``(s W) x + W t + b``, if that pads nothing with zeros. Which layer that is, is read
    from the program that the model traces to, and not from names: it must be a
    convolution, a transposed one or a dense layer of Flax's own, feed the norm alone,
    and have the parameters that the variables have. A layer within ``nn.scan``,
    ``nn.vmap`` or ``nn.remat`` is folded too, if its layers are stacked along the first
    axis. Sums are in float32, or float64 of such parameters.

    Args:
      model: a linen or nnx module; nnx in its mode of inference, ``model.eval()``.
      *inputs: for linen first its variables; then what the model is called with in
        inference, arrays with numbers that are typical of it.
      paths: the batch norms to fold, names separated by "/". None: all that can be.
      strict: whether a batch norm that cannot be folded is an error.
      seconds: for how long to time the model and the folded one; 0 not to.
      **kwargs: what else the model is called with, ``train=False``, say.

    Returns:
      A `Folded`. The model and its variables stay as they are. What cannot be folded is
      there as it was, and the report says why.

    Raises:
      TypeError: if model is neither a linen nor an nnx module.
      ValueError: if variables are missing, of other shapes than the model's, not finite
        or never updated; if nothing can be folded, or what must be cannot; or if the
        outputs differ by more than rounding explains.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen, tools
      >>> model = nn.Sequential([nn.Dense(3), linen.BatchNorm(True), nn.relu])
      >>> x = jax.random.normal(jax.random.key(0), (4, 2))
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables["batch_stats"]["layers_1"]["mean"] += 0.5
      >>> folded = tools.fold(model, variables, x)
      >>> y = folded.apply(folded.variables, x)
      >>> sorted(folded.variables), folded.report.folded
      (['params'], {'layers_1': ('layers_0',)})
    """
    linen = models.system_of("fold", model) == "linen"
    if linen:
        variables, inputs = _checked_variables(model, inputs, kwargs), inputs[1:]
        traced = feeds.of_linen(_is_chosen, model, variables, inputs, kwargs)
    else:
        traced = feeds.of_nnx(_is_chosen, model, inputs, kwargs)
    plan, kept = _planned(traced, paths, strict)
    weights = _Weights(traced)
    for step in plan:
        weights.fold(step)
    weights.finish()
    if linen:
        folded_variables = _linen_variables(variables, weights, plan)
        apply = _linen_apply(model, plan, set(weights.added))
        call = lambda v, *args, **kwargs: model.apply(v, *args, **kwargs)  # noqa: E731
        runs = [_program(call, variables), _program(apply, folded_variables)]
    else:
        folded_variables, apply = None, _nnx_model(model, weights, plan)
        runs = [_nnx_program(model), _nnx_program(apply)]
    measured = _measured(runs, inputs, kwargs, weights, seconds)
    done = {_word(s.path): tuple(map(_word, s.layers)) for s in plan}
    return Folded(apply, folded_variables, FoldReport(done, kept, *measured))


def _word(path: Sequence) -> str:
    return "/".join(map(str, path)) or "the model"


def _error(rule: str, got: str, todo: str) -> Exception:
    return _check.error(ValueError, "fold", rule, got, todo)


# What is there.


def _is_chosen(module: Any) -> bool:
    return _is_layer(module) or models.kind_of(module) == "BatchNorm"


def _is_layer(module: Any) -> bool:
    """Whether a module is a layer of Flax's own; a class made from one is not."""
    kind = type(module)
    return kind.__name__ in LAYERS and kind.__module__ in (
        "flax.linen.linear",
        "flax.nnx.nn.linear",
    )


def _checked_variables(model: Any, inputs: tuple, kwargs: dict) -> Any:
    """The variables of a linen model; refuses what it would not find in them."""
    import flax.linen as nn

    if not inputs or not isinstance(inputs[0], Mapping) or "params" not in inputs[0]:
        given = type(inputs[0]).__name__ if inputs else "nothing"
        if inputs and isinstance(inputs[0], Mapping):
            given = f"a mapping of {', '.join(map(repr, inputs[0])) or 'nothing'}"
        raise _error(
            "the variables of a linen model come after it",
            given,
            "Pass fold(model, {'params': ..., 'batch_stats': ...}, x)",
        )
    wanted = models.abstract_init(model, *inputs[1:], **kwargs)
    there = _shapes(nn.meta.unbox(inputs[0]))
    for path, shape in _shapes(nn.meta.unbox(wanted)).items():
        if there.get(path) != shape:
            found = f"of shape {there[path]}" if path in there else "missing"
            raise _error(
                "the variables must be those of the model",
                f"{path} {found}; the model has it, of shape {shape}",
                "Pass {'params': ..., 'batch_stats': ...} as its init or its last apply"
                " returned them",
            )
    return inputs[0]


def _shapes(variables: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and statistics, by path."""
    return {
        "/".join(map(_key, path)): tuple(jnp.shape(a))
        for path, a in jax.tree_util.tree_leaves_with_path(dict(variables))
        if _key(path[0]) in ("params", "batch_stats")
    }


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


# What to fold into what.


class _Step(NamedTuple):
    """A batch norm that is folded, and the layers into which it is."""

    path: _Path
    norm: feeds.Call
    layers: tuple[_Path, ...]
    after: bool
    past: "_Past"


def _planned(
    traced: feeds.Feeds, paths: Iterable[str] | None, strict: bool
) -> tuple[list[_Step], dict[str, str]]:
    """What to fold, and why the others stay."""
    beside = _Beside(traced)
    wanted = None if paths is None else list(paths)
    names = [_word(path) for path in beside.norms]
    for path in wanted or ():
        if path not in names:
            raise _error(
                "paths must name batch norms that the model calls",
                f"{path!r}; it calls {', '.join(names) or 'none'}",
                "Pass paths=None for all that can be folded",
            )
    plan, kept = [], {}
    for path in beside.norms:
        if wanted is not None and _word(path) not in wanted:
            kept[_word(path)] = "it is not among the paths to fold"
            continue
        found = beside.step(path)
        if isinstance(found, _Step):
            plan.append(found)
        elif strict or wanted is not None:
            raise _error(
                "folding must leave every output as it is",
                f"{_word(path)}, which cannot be folded: {found}",
                f"Leave {_word(path)} out of paths, and strict=False",
            )
        else:
            kept[_word(path)] = found
    if not plan:
        reasons = "; ".join(f"{path}: {why}" for path, why in kept.items())
        raise _error(
            "there must be a batch norm to fold",
            reasons or "a model that calls no batch norm",
            "Pass a model in inference, with batch norms right after layers",
        )
    return plan, kept


class _Beside:
    """The layers beside each batch norm, and what they are fit for."""

    def __init__(self, traced: feeds.Feeds):
        self.traced = traced
        self.norms: dict[_Path, list[int]] = {}
        self.layers: dict[_Path, list[int]] = {}
        for i, call in traced.calls.items():
            group = self.layers if _is_layer(call.module) else self.norms
            group.setdefault(call.path, []).append(i)
        self.users: dict[int | None, set[_Path]] = {}
        for i, call in traced.calls.items():
            for name in call.variables:
                self.users.setdefault(traced.leaf(i, name), set()).add(call.path)

    def step(self, path: _Path) -> _Step | str:
        """How to fold a batch norm, or why it stays."""
        numbers = self.norms[path]
        call = self.traced.calls[numbers[0]]
        past = _Past.of(call)
        why = next(filter(None, (self._not_affine(i, past) for i in numbers)), None)
        if why is not None:
            return why
        before = self._before(path)
        if not isinstance(before, str):
            return _Step(path, call, before, False, past)
        after = self._after(path)
        if not isinstance(after, str):
            return _Step(path, call, after, True, past)
        return f"{before}, and {after}"

    def _not_affine(self, number: int, past: "_Past") -> str | None:
        """Why a call of a batch norm is not one affine map for all inputs."""
        call = self.traced.calls[number]
        if type(call.module).__name__ != "BatchNorm":
            return f"{type(call.module).__name__} is a class of its own"
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
                return f"{name} of {_word(call.path)} is not stored as it is used"
            others = self.users[leaf] - {call.path}
            if others:
                one = _word(sorted(others)[0])
                return f"{name} of {_word(call.path)} is that of {one} too"
        return None

    def _source(self, label: Any) -> feeds.Call | None:
        """The call that a mark is of, if it is one."""
        return self.traced.calls[label.call] if isinstance(label, feeds.Mark) else None

    def _named(self, label: Any) -> str:
        call = self._source(label)
        return label if call is None else _word(call.path)

    def _before(self, path: _Path) -> tuple[_Path, ...] | str:
        """The layer before a batch norm, or why it cannot take its work."""
        sources = [s for i in self.norms[path] for s in self.traced.sources(i)]
        others = [s for s in sources if self._not_layer(s)]
        if others:
            return f"it follows {self._named(others[0])}, no layer"
        paths = {self._source(s).path for s in sources}  # type: ignore[union-attr]
        if len(paths) > 1:
            return f"it follows several layers, {', '.join(map(_word, sorted(paths)))}"
        (layer,) = paths
        for readers in (r for i in self.layers[layer] for r in self.traced.readers(i)):
            named = [self._named(r) for r in readers]
            if len(named) != 1 or named[0] != _word(path):
                return (
                    f"{_word(layer)} before it feeds {len(named)} readers,"
                    f" {', '.join(named)}"
                )
        return self._fit(path, layer, after=False) or (layer,)

    def _after(self, path: _Path) -> tuple[_Path, ...] | str:
        """The layers after a batch norm, or why they cannot do its work."""
        if _Past.of(self.traced.calls[self.norms[path][0]]).activation is not None:
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
            for source in (s for i in self.layers[layer] for s in self.traced.sources(i)):
                if self._named(source) != _word(path):
                    return f"{_word(layer)} after it follows {self._named(source)} too"
            if why := self._fit(path, layer, after=True):
                return why
        return tuple(layers)

    def _not_layer(self, label: Any) -> bool:
        call = self._source(label)
        return call is None or not _is_layer(call.module)

    def _fit(self, path: _Path, layer: _Path, after: bool) -> str | None:
        """Why a layer cannot do the work of a batch norm, if so."""
        numbers = self.layers[layer]
        norm_number = self.norms[path][0]
        norm, call = (self.traced.calls[i] for i in (norm_number, numbers[0]))
        name, module = _word(layer), call.module
        for field in ("dot_general", "conv_general_dilated"):
            own = getattr(module, field, None), getattr(module, f"{field}_cls", None)
            if any(o not in (None, getattr(lax, field)) for o in own):
                return f"{name} has a {field} of its own"
        for number in numbers:
            if why := self._computed(number):
                return why
        stacks = {
            self._stack(i, v)
            for i in (norm_number, *numbers)
            for v in self.traced.calls[i].variables
            if v != "count"
        }
        if len(stacks) > 1:
            return f"it and {name} are not stacked alike"
        dtypes = {v: self._leaf(norm_number, v).dtype for v in norm.variables}
        kernel = self._leaf(numbers[0], "kernel").dtype
        if any(_is_complex(d) for d in dtypes.values()) and not _is_complex(kernel):
            return f"it is complex, and {name} is real"
        geometry = _Geometry(call)
        return (
            geometry.why_not_after(norm) if after else geometry.why_not_before(norm)
        )

    def _leaf(self, number: int, name: str) -> Any:
        leaf = self.traced.leaf(number, name)
        assert leaf is not None  # of `_computed`
        return self.traced.leaves[leaf]

    def _stack(self, number: int, name: str) -> tuple[int, ...]:
        leaf = self._leaf(number, name)
        inner = len(self.traced.calls[number].variables[name])
        return leaf.shape[: leaf.ndim - inner]


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


class _Geometry:
    """Which axes of a layer's kernel are those of its inputs and outputs.

    Axes are counted from the end, since axes of a stack can come first.
    """

    def __init__(self, call: feeds.Call):
        self.call, self.module = call, call.module
        self.kind = type(call.module).__name__
        self.shape = call.variables["kernel"]
        self.groups = getattr(self.module, "feature_group_count", 1)
        self.batch = 0  # axes of the kernel that are the batch's
        self.inputs, self.outputs = (-2,), (-1,)
        self.contracted = (-1,)  # axes of x
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
        self.contracted = tuple(a % ndim - ndim for a in axes)
        self.batch = len(self.module.batch_axis if of_nnx else self.module.batch_dims)
        self.outputs = tuple(range(-n, 0))
        self.inputs = tuple(range(-n - len(axes), -n))

    def why_not_before(self, norm: feeds.Call) -> str | None:
        """Why the outputs of the layer cannot take what the norm does to them."""
        n = len(self.outputs)
        if min(_axes_of(norm)) < -n:
            return f"its axis is not that of the features of {_word(self.call.path)}"
        return None

    def why_not_after(self, norm: feeds.Call) -> str | None:
        """Why the inputs of the layer cannot."""
        axes, name = _axes_of(norm), _word(self.call.path)
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

    def of_outputs(self, a: jax.Array, norm: feeds.Call) -> tuple[jax.Array, jax.Array]:
        """What is along a norm's features, along a kernel and a bias."""
        axes = _axes_of(norm)
        n = len(self.outputs)
        stack = a.shape[: a.ndim - len(axes)]
        sizes = [norm.x.shape[i] if i in axes else 1 for i in range(-n, 0)]
        kernel = [1] * len(self.shape)
        for axis, size in zip(self.outputs, sizes, strict=True):
            kernel[axis] = size
        bias = [1] * self.batch + sizes
        return a.reshape((*stack, *kernel)), a.reshape((*stack, *bias))

    def of_inputs(self, a: jax.Array, norm: feeds.Call) -> jax.Array:
        """What is along a norm's features, along a kernel's inputs."""
        (axis,) = _axes_of(norm)
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
    """All the numbers in a field that can be one, a few, or pairs."""
    return {int(a) for a in np.asarray(value).ravel()}


def _axes_of(norm: feeds.Call) -> tuple[int, ...]:
    """The axes of a batch norm's features, counted from the end."""
    ndim = norm.x.ndim
    axes = _module.flax_axes("fold", norm.module.axis, ndim, "axis")
    return tuple(a - ndim for a in axes)


# The arithmetic.


class _Weights:
    """The variables of a model, of which some change while norms are folded."""

    def __init__(self, traced: feeds.Feeds):
        self.traced = traced
        self.leaves = list(traced.leaves)
        self.added: dict[_Path, jax.Array] = {}  # biases of layers that had none
        self.changed: dict[tuple[_Path, str], int] = {}
        self.numbers = {call.path: i for i, call in traced.calls.items()}

    def index(self, path: _Path, name: str) -> int:
        leaf = self.traced.leaf(self.numbers[path], name)
        assert leaf is not None  # of a step that is planned
        return leaf

    def _wide(self, path: _Path, name: str) -> jax.Array:
        a = jnp.asarray(self.leaves[self.index(path, name)])
        return a.astype(jnp.promote_types(a.dtype, jnp.float32))

    def fold(self, step: _Step) -> None:
        """Folds a batch norm."""
        with jax.numpy_dtype_promotion("standard"):
            factor, mean, bias = self._affine(step)
            for path in step.layers:
                if step.after:
                    self._fold_after(step, path, factor, bias - factor * mean)
                else:
                    self._fold_before(step, path, factor, mean, bias)

    def _affine(self, step: _Step) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factor, the mean that is taken off and the bias, along the features."""
        norm, path = step.norm, step.path
        features = [norm.x.shape[a] for a in _axes_of(norm)]
        found = {}
        for name in ("scale", "bias", "mean", "var"):
            if name in norm.variables:
                a = self._wide(path, name)
                _check_numbers(path, name, a)
                stack = a.shape[: a.ndim - len(norm.variables[name])]
                found[name] = a.reshape((*stack, *features))
        mean, var = found["mean"], found["var"]
        if _check.is_concrete(var) and not np.any(mean) and np.all(var == 1):
            raise _error(
                "running statistics must be updated before they are folded",
                f"mean 0 and var 1, those of the start, in {_word(path)}",
                "Train first, or pass the batch_stats of the trained model",
            )
        factor = found.get("scale", 1) * lax.rsqrt(var + norm.module.epsilon)
        return factor, mean, found.get("bias", jnp.zeros_like(mean))

    def _fold_before(
        self,
        step: _Step,
        path: _Path,
        factor: jax.Array,
        mean: jax.Array,
        shift: jax.Array,
    ) -> None:
        call = self.traced.calls[self.numbers[path]]
        geometry = _Geometry(call)
        kernel, bias = self._wide(path, "kernel"), self._bias(path, geometry)
        along = [geometry.of_outputs(a, step.norm) for a in (factor, mean, shift)]
        # The mean comes off the bias first: a bias near it loses no digits.
        bias = (bias - along[1][1]) * along[0][1] + along[2][1]
        self._write(path, geometry, kernel * along[0][0], bias)

    def _fold_after(
        self, step: _Step, path: _Path, factor: jax.Array, shift: jax.Array
    ) -> None:
        geometry = _Geometry(self.traced.calls[self.numbers[path]])
        kernel, bias = self._wide(path, "kernel"), self._bias(path, geometry)
        mask = getattr(geometry.module, "mask", None)
        seen = kernel if mask is None else kernel * mask
        of_inputs = geometry.of_inputs(shift, step.norm)
        bias = bias + jnp.sum(of_inputs * seen, axis=geometry.summed)
        kernel = kernel * geometry.of_inputs(factor, step.norm)
        self._write(path, geometry, kernel, bias)

    def _bias(self, path: _Path, geometry: _Geometry) -> jax.Array:
        if path in self.added:
            return self.added[path]
        if "bias" in geometry.call.variables:
            return self._wide(path, "bias")
        kernel = self._wide(path, "kernel")
        stack = kernel.shape[: kernel.ndim - len(geometry.shape)]
        return jnp.zeros((*stack, *geometry.bias_shape), kernel.dtype)

    def _write(
        self, path: _Path, geometry: _Geometry, kernel: jax.Array, bias: jax.Array
    ) -> None:
        dtype = self.traced.leaves[self.index(path, "kernel")].dtype
        new = {"kernel": kernel, "bias": bias}
        if "bias" not in geometry.call.variables:
            self.added[path] = new.pop("bias")
        for name, a in new.items():
            self.leaves[self.index(path, name)] = a
            self.changed[path, name] = self.index(path, name)

    def finish(self) -> None:
        """Returns to the dtypes of the variables, once all is folded."""
        for (path, name), i in self.changed.items():
            dtype = self.traced.leaves[i].dtype
            self.leaves[i] = self.leaves[i].astype(dtype)
            _check_numbers(path, f"the folded {name}", self.leaves[i])
        for path, a in self.added.items():
            dtype = self.traced.leaves[self.index(path, "kernel")].dtype
            self.added[path] = a.astype(dtype)
            _check_numbers(path, "the folded bias", self.added[path])


def _check_numbers(path: _Path, name: str, a: jax.Array) -> None:
    if not _check.is_concrete(a):
        return
    ok = np.isfinite(a)
    if name == "var":
        ok &= np.asarray(a) >= 0
    if not ok.all():
        raise _error(
            "what is folded must be finite, and no variance negative",
            f"{np.asarray(a)[~ok][0]} in {name} of {_word(path)}, of dtype {a.dtype}",
            "Look where it comes from: NaN in the training data, say, or half precision",
        )


# The folded model.


@dataclasses.dataclass(frozen=True)
class _Past:
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
    def of(cls, call: feeds.Call) -> "_Past":
        fields = {
            name: getattr(call.module, name, None)
            for name in ("dtype", "activation", "normalize_with", "update_statistics")
        }
        return cls(_word(call.path), call.x.dtype, call.y.dtype, **fields)

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
            raise _error(
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


def _linen_variables(variables: Any, weights: _Weights, plan: list[_Step]) -> Any:
    """The variables without those of the folded norms, and with the new biases."""
    keys = [
        tuple(k.key for k in path if hasattr(k, "key"))
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]
    changes: dict[tuple, Any] = {}
    for step in plan:
        for name in step.norm.variables:
            changes[keys[weights.index(step.path, name)]] = None
    for path, bias in weights.added.items():
        *place, _ = keys[weights.index(path, "kernel")]
        changes[(*place, "bias")] = bias
    tree = jax.tree.unflatten(jax.tree.structure(variables), weights.leaves)
    return _edited(tree, changes)


def _edited(tree: Any, changes: dict[tuple, Any]) -> Any:
    """A tree with values put in, or with None taken out; what is emptied goes too."""
    found = {}
    for key, value in tree.items():
        within = {p[1:]: v for p, v in changes.items() if p[0] == key}
        if within and () not in within:
            value = _edited(value, within) or None
        elif within:
            value = within[()]
        if value is not None:
            found[key] = value
    new = {p[0]: v for p, v in changes.items() if len(p) == 1 and v is not None}
    return type(tree)({**found, **new})


def _linen_apply(model: Any, plan: list[_Step], biased: set[_Path]) -> Callable:
    """The ``apply`` of the folded model."""
    pasts = {step.path: step.past for step in plan}

    def swap(module: Any) -> Any:
        if module.path in biased and _is_layer(module):
            return module.clone(use_bias=True, parent=module.scope.rewound())
        past = pasts.get(module.path)
        if past is None or models.kind_of(module) != "BatchNorm":
            return None

        def call(x: Any, use_running_average: bool | None = None, **others: Any) -> Any:
            if use_running_average is None:
                use_running_average = module.use_running_average
            return past(x, use_running_average, **others)

        return call

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        # A program within that was compiled before is not traced again, and that is
        # well: it was compiled for variables of this structure, in which no norm is.
        with models.substituted(swap):
            return model.apply(variables, *args, **kwargs)

    return apply


def _nnx_model(model: Any, weights: _Weights, plan: list[_Step]) -> Any:
    """A copy of an nnx model with other parameters, and without the folded norms."""
    from flax import nnx

    from normjax.tools.nnx_folded import FoldedNorm

    pasts = {step.path: step.past for step in plan}
    layers = {path for path, _ in weights.changed}

    def swap(path: tuple, module: Any) -> Any:
        path = tuple(map(str, path))
        if path in pasts:
            return FoldedNorm(pasts[path], module.use_running_average)
        if path in layers:  # of the copy, which is ours to change
            for name in ("kernel", "bias"):
                if (path, name) in weights.changed:
                    value = weights.leaves[weights.changed[path, name]]
                    getattr(module, name).set_value(value)
            if path in weights.added:
                module.bias = nnx.Param(weights.added[path])
                module.use_bias = True
        return None

    return models.nnx_replaced(model, swap)


# What it is worth.


def _program(apply: Callable, variables: Any) -> Callable:
    """Takes what a linen model is called with; returns the call, compiled."""

    def compiled(inputs: tuple, kwargs: dict) -> Callable[[], Any]:
        arrays, rebuilt = models.arrays_of((inputs, kwargs))

        def run(variables: Any, arrays: list) -> Any:
            args, kwargs = rebuilt(arrays)
            return apply(variables, *args, **kwargs)

        program = jax.jit(run).lower(variables, arrays).compile()
        return lambda: program(variables, arrays)

    return compiled


def _nnx_program(model: Any) -> Callable:
    from flax import nnx

    graphdef, state = nnx.split(model)
    return _program(lambda s, *a, **k: nnx.merge(graphdef, s)(*a, **k), state)


def _measured(
    runs: list, inputs: tuple, kwargs: dict, weights: _Weights, seconds: float
) -> tuple[float, float, float | None]:
    """The difference of the outputs, absolute and relative, and the speed-up."""
    calls = [run(inputs, kwargs) for run in runs]
    want, got = (jax.tree.leaves(call()) for call in calls)
    difference = relative = 0.0
    dtypes = [c.y.dtype for c in weights.traced.calls.values()]
    for w, g in zip(want, got, strict=True):
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            continue
        dtypes.append(w.dtype)
        w, g = (np.asarray(a.astype(_widest(a.dtype))) for a in (w, g))
        _check_outputs(w)
        far = float(np.max(np.abs(w - g), initial=0))
        difference = max(difference, far)
        largest = float(np.max(np.abs(w), initial=0))
        relative = max(relative, far / largest if largest else far)
    bound = math.sqrt(max(float(jnp.finfo(d).eps) for d in dtypes))
    if not relative <= bound:
        raise _error(
            "the folded model must have the outputs of the model",
            f"a difference of {relative:.2g} of the largest, where rounding makes"
            f" {bound:.2g} at most",
            "Leave a norm out of paths: a parameter may be read beside its layer, or a"
            " variance be near zero",
        )
    return difference, relative, _speedup(calls, seconds) if seconds else None


def _widest(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _check_outputs(y: np.ndarray) -> None:
    if not np.isfinite(y).all():
        raise _error(
            "the outputs of the model must be finite, to compare with",
            f"{y[~np.isfinite(y)][0]}",
            "Pass inputs that are typical of inference",
        )


def _speedup(calls: list[Callable], seconds: float) -> float:
    """The median of the ratios of times, of calls in turns."""
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 5:
        order = calls if len(ratios) % 2 else calls[::-1]
        taken = {}
        for call in order:
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[call] = time.perf_counter() - start
        ratios.append(taken[calls[0]] / taken[calls[1]])
    return statistics.median(ratios)
