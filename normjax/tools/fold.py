"""Batch norms become part of the layers beside them, for inference."""

import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.tools.feeds import Feeds, of_linen, of_nnx
from normjax.tools.fold_plan import (
    Geometry,
    Path,
    Step,
    axes_of,
    error,
    is_chosen,
    is_layer,
    planned,
    word,
)
from normjax.tools.models import (
    abstract_init,
    arrays_of,
    check_concrete,
    is_array,
    kind_of,
    nnx_replaced,
    path_of,
    substituted,
    system_of,
    told_mutable,
    with_statistics,
)
from normjax.tools.replace import with_known


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold` did, and what it is worth on the inputs it was given.

    Attributes:
      folded: for each batch norm that is gone its path and the paths of the layers that
        do its work, with names separated by "/".
      kept: for each batch norm that stays its path and why it does.
      difference: the largest difference of an output from that of the model; of one of
        integers or booleans the share of its entries that are other ones.
      relative: the same over the largest absolute output that is finite.
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
        model's own ``apply``, but it refuses another method, other flags and other
        arguments than it was folded with; for nnx the folded module itself.
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
    paths: str | Iterable[str] | None = None,
    strict: bool = False,
    seconds: float = 1.0,
    kinds: Mapping[type, str | None] | None = None,
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
      paths: the batch norm to fold, or several, names separated by "/". None: all that
        can be.
      strict: whether a batch norm that cannot be folded is an error.
      seconds: for how long to time the model and the folded one; 0 not to.
      kinds: which norms classes of your own are, as of `find_norms`. Such a batch norm
        computes what normjax's computes, with the fields that it has.
      **kwargs: what else the model is called with, ``train=False``, say; for linen
        ``method``, ``rngs`` and ``mutable`` too.

    Returns:
      A `Folded`. The model and its variables stay as they are. What cannot be folded is
      there as it was, and the report says why.

    Raises:
      TypeError: if model is neither a linen nor an nnx module.
      ValueError: if variables are missing, too many, of other shapes than the model's,
        not finite or never updated; if nothing can be folded, or what must be cannot;
        or if the outputs differ by more than rounding explains.

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
    linen = system_of("fold", model) == "linen"
    check_concrete("fold", (inputs, kwargs))
    if linen:
        mutable = kwargs.pop("mutable", False)
        variables, inputs = _checked_variables(model, inputs, kwargs), inputs[1:]
        model = with_known("fold", model, kinds)
        traced = of_linen(is_chosen, model, variables, inputs, kwargs, mutable)
    else:
        model = with_known("fold", model, kinds)
        traced = of_nnx(is_chosen, model, inputs, kwargs)
    plan, kept = planned(traced, paths, strict)
    weights = _Weights(traced)
    for step in plan:
        weights.fold(step)
    weights.finish()
    if linen:
        folded_variables = _linen_variables(variables, weights, plan)
        flags = _flags(model, inputs, kwargs)
        apply = _linen_apply(model, plan, set(weights.added), flags)
        runs = [
            _linen_program(model.apply, variables, mutable),
            _linen_program(apply, folded_variables, mutable),
        ]
    else:
        folded_variables, apply = None, _nnx_model(model, weights, plan)
        runs = [_nnx_program(model), _nnx_program(apply)]
    measured = _measured(runs, inputs, kwargs, weights.rounding(plan), seconds)
    done = {word(s.path): tuple(map(word, s.layers)) for s in plan}
    return Folded(apply, folded_variables, FoldReport(done, kept, *measured))


# What is there.


def _checked_variables(model: Any, inputs: tuple, kwargs: dict) -> Any:
    """The variables of a linen model; refuses what it would not find in them."""
    import flax.linen as nn

    if not inputs or not isinstance(inputs[0], Mapping) or "params" not in inputs[0]:
        given = type(inputs[0]).__name__ if inputs else "nothing"
        if inputs and isinstance(inputs[0], Mapping):
            given = f"a mapping of {', '.join(map(repr, inputs[0])) or 'nothing'}"
        raise error(
            "the variables of a linen model come after it",
            given,
            "Pass fold(model, {'params': ..., 'batch_stats': ...}, x)",
        )
    wanted = abstract_init(model, *inputs[1:], **_of_call(kwargs))
    there, own = (_shapes(nn.meta.unbox(v)) for v in (inputs[0], wanted))
    for path in {**own, **there}:
        if own.get(path) != there.get(path):
            given, has = (
                f"of shape {shapes[path]}" if path in shapes else "missing"
                for shapes in (there, own)
            )
            raise error(
                "the variables must be those of the model, as it is called",
                f"{path} {given}; in the model it is {has}",
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


# The arithmetic.


class _Weights:
    """The arrays of a model's variables, of which some change as norms are folded.

    Attributes:
      leaves: all of them.
      changed: which of them are other ones now, by layer and name.
      added: the biases of layers that had none.
    """

    def __init__(self, traced: Feeds):
        self._traced = traced
        self._numbers = {call.path: i for i, call in traced.calls.items()}
        self.leaves = list(traced.leaves)
        self.changed: dict[tuple[Path, str], int] = {}
        self.added: dict[Path, jax.Array] = {}

    def index(self, path: Path, name: str) -> int:
        """Which of the leaves a variable is."""
        leaf = self._traced.leaf(self._numbers[path], name)
        assert leaf is not None  # of a step that is planned
        return leaf

    def fold(self, step: Step) -> None:
        """Folds a batch norm."""
        with jax.numpy_dtype_promotion("standard"):
            factor, mean, bias = self._affine(step)
            for path in step.layers:
                if step.after:
                    self._fold_after(step, path, factor, bias - factor * mean)
                else:
                    self._fold_before(step, path, factor, mean, bias)

    def finish(self) -> None:
        """Returns to the dtypes of the variables, once all is folded."""
        for (path, name), i in self.changed.items():
            self.leaves[i] = self._finished(path, name, self.leaves[i])
        for path, a in self.added.items():
            self.added[path] = self._finished(path, "bias", a)

    def _finished(self, path: Path, name: str, a: jax.Array) -> jax.Array:
        of = "kernel" if path in self.added else name  # a new bias is of its dtype
        a = a.astype(self._traced.leaves[self.index(path, of)].dtype)
        _check_numbers(path, f"the folded {name}", a)
        return a

    def _value(self, path: Path, name: str, dtype: Any = jnp.float32) -> jax.Array:
        """A variable, in ``dtype`` or a wider one."""
        a = jnp.asarray(self.leaves[self.index(path, name)])
        return a.astype(jnp.promote_types(a.dtype, dtype))

    def _affine(self, step: Step) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factor, the mean that is taken off and the bias, along the features."""
        norm, path = step.norm, step.path
        features = [norm.x.shape[a] for a in axes_of(norm)]
        dtype = jnp.promote_types(jnp.finfo(norm.y.dtype).dtype, jnp.float32)
        found = {}
        for name in ("scale", "bias", "mean", "var"):
            if name in norm.variables:
                a = self._value(path, name, dtype)
                _check_numbers(path, name, a)
                stack = a.shape[: a.ndim - len(norm.variables[name])]
                found[name] = a.reshape((*stack, *features))
        mean, var = found["mean"], found["var"]
        if not mean.any() and (var == 1).all():
            raise error(
                "running statistics must be updated before they are folded",
                f"mean 0 and var 1, those of the start, in {word(path)}",
                "Train first, or pass the batch_stats of the trained model",
            )
        factor = found.get("scale", 1) * lax.rsqrt(var + norm.module.epsilon)
        return factor, mean, found.get("bias", jnp.zeros_like(mean))

    def _fold_before(
        self,
        step: Step,
        path: Path,
        factor: jax.Array,
        mean: jax.Array,
        shift: jax.Array,
    ) -> None:
        geometry, kernel, bias = self._layer(path)
        along = [geometry.of_outputs(a, step.norm) for a in (factor, mean, shift)]
        # The mean comes off the bias first: a bias near it loses no digits.
        bias = (bias - along[1][1]) * along[0][1] + along[2][1]
        self._write(path, kernel * along[0][0], bias)

    def _fold_after(
        self, step: Step, path: Path, factor: jax.Array, shift: jax.Array
    ) -> None:
        geometry, kernel, bias = self._layer(path)
        mask = getattr(geometry.module, "mask", None)
        seen = kernel if mask is None else kernel * mask
        of_shift = geometry.of_inputs(shift, step.norm)
        bias = bias + jnp.sum(of_shift * seen, axis=geometry.summed)
        self._write(path, kernel * geometry.of_inputs(factor, step.norm), bias)

    def _layer(self, path: Path) -> tuple[Geometry, jax.Array, jax.Array]:
        """A layer with its kernel and its bias, which is zero where it has none."""
        geometry = Geometry(self._traced.calls[self._numbers[path]])
        kernel = self._value(path, "kernel")
        if "bias" in geometry.call.variables:
            return geometry, kernel, self._value(path, "bias")
        stack = kernel.shape[: kernel.ndim - len(geometry.shape)]
        zero = jnp.zeros((*stack, *geometry.bias_shape), kernel.dtype)
        return geometry, kernel, self.added.get(path, zero)

    def _write(self, path: Path, kernel: jax.Array, bias: jax.Array) -> None:
        new = {"kernel": kernel, "bias": bias}
        if "bias" not in self._traced.calls[self._numbers[path]].variables:
            self.added[path] = new.pop("bias")
        for name, a in new.items():
            i = self.changed[path, name] = self.index(path, name)
            self.leaves[i] = a

    def rounding(self, plan: list[Step]) -> float:
        """The coarsest rounding of what is computed, or of what is folded."""
        paths = {path for step in plan for path in (step.path, *step.layers)}
        dtypes = set()
        for call in self._traced.calls.values():
            dtypes.add(call.y.dtype)
            if call.path in paths:
                leaves = [self.index(call.path, name) for name in call.variables]
                dtypes |= {self._traced.leaves[leaf].dtype for leaf in leaves}
        floating = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
        return max(float(jnp.finfo(d).eps) for d in floating)


def _check_numbers(path: Path, name: str, a: jax.Array) -> None:
    ok = jnp.isfinite(a)
    if name == "var":
        ok &= a >= 0
    if not ok.all():
        raise error(
            "what is folded must be finite, and no variance negative",
            f"{np.asarray(a)[~np.asarray(ok)][0]} in {name} of {word(path)}",
            "Look where it comes from: NaN in the training data, half precision, say",
        )


# The folded model.


def _linen_variables(variables: Any, weights: _Weights, plan: list[Step]) -> Any:
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


def _linen_apply(
    model: Any, plan: list[Step], biased: set[Path], flags: dict[str, Any]
) -> Callable:
    """The ``apply`` of the folded model."""
    pasts = {step.path: step.past for step in plan}

    def swap(module: Any) -> Any:
        if module.path in biased and is_layer(module):
            return module.clone(use_bias=True, parent=module.scope.rewound())
        past = pasts.get(module.path)
        if past is None or kind_of(module) != "BatchNorm":
            return None

        def call(x: Any, use_running_average: bool | None = None, **others: Any) -> Any:
            if use_running_average is None:
                use_running_average = module.use_running_average
            return past(x, use_running_average, **others)

        return call

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        _check_flags(flags, _flags(model, args, kwargs))
        # A program within that was compiled before is not traced again, and that is
        # well: it was compiled for variables of this structure, in which no norm is.
        with substituted(swap):
            return model.apply(variables, *args, **kwargs)

    return apply


class _Word:
    """Stands for what has no value of its own in a call."""

    def __init__(self, word: str):
        self.word = word

    def __repr__(self) -> str:
        return self.word


_ARRAY, _NOTHING = _Word("an array"), _Word("nothing")
_OF_APPLY = ("rngs", "mutable", "capture_intermediates")  # the model gets none of them


def _of_call(kwargs: dict) -> dict:
    return {name: a for name, a in kwargs.items() if name not in _OF_APPLY}


def _flags(model: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a linen model is called with, by name; any array counts as one."""
    kwargs = _of_call(kwargs)
    while not callable(model):  # a model replaced
        model = model.model
    method = kwargs.pop("method", None) or "__call__"
    if isinstance(method, str):
        method = getattr(type(model), method)
    method = getattr(method, "__func__", method)
    bound = inspect.signature(method).bind(model, *args, **kwargs)
    bound.apply_defaults()
    _, *given = bound.arguments.items()
    leaves = jax.tree_util.tree_leaves_with_path(dict(given), lambda a: a is None)
    flags = {"/".join(path_of(p)): _ARRAY if is_array(a) else a for p, a in leaves}
    return {"method": method, **flags}


def _check_flags(folded: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuses a call that may be of another program than the one that was folded."""
    for name in {**folded, **given}:
        old, new = (flags.get(name, _NOTHING) for flags in (folded, given))
        if new is not old and new != old:
            old, new = (getattr(a, "__qualname__", repr(a)) for a in (old, new))
            raise error(
                "a folded model must be called as it was folded, but for the values of"
                " arrays",
                f"{name}: {new}; it was folded with {old}",
                "Fold it with that too, or call the model that was not folded",
            )


def _nnx_model(model: Any, weights: _Weights, plan: list[Step]) -> Any:
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

    return nnx_replaced(model, swap)


# What it is worth.


def _program(apply: Callable, variables: Any) -> Callable:
    """Takes what a linen model is called with; returns the call, compiled."""

    def compiled(inputs: tuple, kwargs: dict) -> Callable[[], Any]:
        arrays, rebuilt = arrays_of((inputs, kwargs))

        def run(variables: Any, arrays: list) -> Any:
            args, kwargs = rebuilt(arrays)
            return arrays_of(apply(variables, *args, **kwargs))[0]

        program = jax.jit(run).lower(variables, arrays).compile()
        return lambda: program(variables, arrays)

    return compiled


def _linen_program(apply: Callable, variables: Any, mutable: Any) -> Callable:
    written = with_statistics(mutable)

    def call(variables: Any, *args: Any, **kwargs: Any) -> Any:
        # A norm that stays may write its statistics.
        with told_mutable(mutable):
            return apply(variables, *args, mutable=written, **kwargs)[0]

    return _program(call, variables)


def _nnx_program(model: Any) -> Callable:
    from flax import nnx

    graphdef, state = nnx.split(model)
    return _program(lambda s, *a, **k: nnx.merge(graphdef, s)(*a, **k), state)


def _measured(
    runs: list, inputs: tuple, kwargs: dict, rounding: float, seconds: float
) -> tuple[float, float, float | None]:
    """The difference of the outputs, absolute and relative, and the speed-up."""
    calls = [run(inputs, kwargs) for run in runs]
    difference = relative = 0.0
    for want, got in zip(*(call() for call in calls), strict=True):
        floating = jnp.issubdtype(want.dtype, jnp.inexact)
        far, of_largest = (_distance if floating else _share)(want, got)
        own = float(jnp.finfo(want.dtype).eps) if floating else 0.0
        most = math.sqrt(max(rounding, own))
        if not of_largest <= most:  # NaN is no less
            what = f"of {of_largest:.2g} of the largest"
            if not floating:
                what = (
                    f"in {of_largest:.2g} of the entries of an output of {want.dtype}"
                )
            raise error(
                "the folded model must have the outputs of the model",
                f"a difference {what}, where rounding makes {most:.2g} at most",
                "Leave a norm out of paths: a variance may be near zero, or a mean far"
                " from it",
            )
        difference, relative = max(difference, far), max(relative, of_largest)
    return difference, relative, _speedup(calls, seconds) if seconds else None


def _distance(want: jax.Array, got: jax.Array) -> tuple[float, float]:
    """The largest difference of an output, and that over its largest finite number."""
    wide = jnp.promote_types(want.dtype, jnp.float32)
    a, b = (np.asarray(y.astype(wide)) for y in (want, got))
    if np.isnan(a).any():
        raise error(
            "the outputs of the model must have no NaN, to compare with",
            f"NaN in an output of shape {a.shape}",
            "Pass inputs that are typical of inference",
        )
    finite = np.isfinite(a)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        off = np.where(finite, np.abs(a - b), np.where(a == b, 0, np.inf))
    far = float(np.max(off, initial=0))
    largest = float(np.max(np.abs(a), initial=0, where=finite))
    return far, far / largest if largest else far


def _share(want: jax.Array, got: jax.Array) -> tuple[float, float]:
    """Which part of an output that is not floating is another."""
    share = float((want != got).sum()) / max(want.size, 1)
    return share, share


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
