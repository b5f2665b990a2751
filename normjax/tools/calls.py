"""What the norms of a model are called with, and what comes of it.

A model is called with its own modules, and all batch norms among them are made to
normalize by running statistics where that is asked for. What is measured leaves a
model, however it is compiled, scanned or vmapped, as statistics do: beside ``mean`` and
``var``, by names of its own.
"""

import contextlib
import contextvars
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from normjax import _axes, _check, _module, _norms
from normjax.tools import models
from normjax.tools.replace_linen import known

UPDATES, MEAN, VAR = "doctor_updates", "doctor_mean", "doctor_var"
# Of batch norms of a user's own which have no such field. It is not reported.
UNSAID = {"epsilon": 1e-5}
# The layers of Flax that add a bias of their own last.
_LAYERS = (
    *("Dense", "DenseGeneral", "Linear", "LinearGeneral", "Einsum"),
    *("Conv", "ConvLocal", "ConvTranspose"),
)


class Call(NamedTuple):
    """One call of a norm, as it was traced.

    Attributes:
      shape: of x.
      masked: whether a mask came with it.
      running: whether it normalizes by running statistics, as module and call say.
      updates: whether it updates running statistics.
      meant: whether the norm itself is set to that, and not by what it is called with,
        nor by a field that a call of the model may have made so.
      ghosts: how many samples each of its statistics is of; None for all.
      after: the layer whose bias it takes off with the mean of x: x is what that layer
        returns, which nothing reads but norms that take it off; else None.
    """

    shape: tuple[int, ...]
    masked: bool
    running: bool = False
    updates: bool = False
    meant: bool = False
    ghosts: int | None = None
    after: tuple[str, ...] | None = None


class Watch:
    """Notes the norms that are called while it is on.

    Attributes:
      mode: "batch": batch norms normalize as the model says, but by themselves on each
        device around it, and moments are measured; "resampled": the same, but by the
        moments of samples that count by ``weights``; "running": by running statistics,
        whatever the model says; "own": as it says.
      seen: the calls of each norm, by path; those of a loop's body once.
      found: the kind of each norm, and the module bound to no variables; of linen.
      weights: ``[samples]``, how often each sample counts; None for once.
    """

    def __init__(self, mode: str, weights: Any = None):
        self.mode, self.weights = mode, weights
        self.seen: dict[tuple[str, ...], list[Call]] = {}
        self.found: dict[tuple[str, ...], tuple[str, Any]] = {}
        # By id, with the array itself, so that its id is not another's meanwhile.
        self._biased: dict[int, tuple[Any, tuple]] = {}

    def layer(self, path: tuple, y: Any) -> Any:
        """Notes the output of a layer that has added a bias, and marks it."""
        if self.mode == "batch":
            y = checkpoint_name(y, _BIASED + "/".join(path))
        self._biased[id(y)] = (y, path)
        return y

    def norm(self, path: tuple, kind: str, module: Any, x: Any, call: Call) -> Any:
        """Notes a call of a norm; returns x, marked if what is in its mean is lost."""
        _, after = self._biased.get(id(x), (None, None))
        if after is not None and self.mode == "batch" and not call.running:
            if _takes_off(kind, module, len(call.shape)):
                x = checkpoint_name(x, _TAKEN_OFF)
                call = call._replace(after=after)
        found = self.seen.setdefault(path, [])
        if call not in found:
            found.append(call)
        return x


# The names of values in a program: what a layer returns, and what a norm takes of it.
_BIASED, _TAKEN_OFF = "normjax.doctor.biased/", "normjax.doctor.taken_off"


def _takes_off(kind: str, module: Any, ndim: int) -> bool:
    """Whether a norm takes off a bias of each feature, with the mean."""
    said = models.axes_of(kind, module)
    if kind == "BatchNorm":
        axes = _module.flax_axes("doctor", said, ndim, "axis")
    elif kind == "InstanceNorm":
        axes = _module.flax_features(said, ndim)
    else:
        return False
    return {axis % ndim for axis in axes} == {ndim - 1}


def _read_otherwise(program: Any) -> set[str]:
    """The layers whose output something reads beside norms that take its bias off."""
    biased: dict[int, str] = {}
    others = set()

    def among(values: Any) -> set[str]:
        return {biased[id(v)] for v in values if id(v) in biased}

    for equation in program.eqns:
        name = equation.params.get("name")
        if equation.primitive.name == "name" and name.startswith(_BIASED):
            biased[id(equation.outvars[0])] = name.removeprefix(_BIASED)
        if equation.primitive.name != "name" or name != _TAKEN_OFF:
            others |= among(equation.invars)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            within = getattr(parameter, "jaxpr", parameter)
            if hasattr(within, "eqns"):
                others |= _read_otherwise(within)
    return others | among(program.outvars)


class _Variables(NamedTuple):
    """How to reach the statistics of a batch norm, and to call it, in linen or nnx."""

    get: Callable[[str], Any]
    put: Callable[[str, Any], None]
    call: Callable[[jax.Array, bool], jax.Array]


def _batch_norm(
    watch: Watch, module: Any, reach: _Variables, x: Any, mask: Any, noted: Call
) -> jax.Array:
    """Calls a batch norm in the watch's mode, and stores what was measured."""
    if watch.mode == "resampled" and not noted.running:
        names = ("mean", "var")
        old = [reach.get(name) for name in names]
        m = _moments_of(module, x, mask, watch.weights)
        for name, new, a in zip(names, (m.mean, m.var), old, strict=True):
            reach.put(name, new.reshape(jnp.shape(a)))
        y = reach.call(x, True)
        for name, a in zip(names, old, strict=True):
            reach.put(name, a)
        return y
    if watch.mode == "batch":
        m = _moments_of(module, x, mask)
        for name, value in ((MEAN, m.mean), (VAR, m.var)):
            place = reach.get(name)
            reach.put(name, value.reshape(place.shape).astype(place.dtype))
    reach.put(UPDATES, reach.get(UPDATES) + noted.updates)
    return reach.call(x, noted.running or watch.mode == "running")


def _moments_of(module: Any, x: jax.Array, mask: Any, weights: Any = None) -> Any:
    """The moments of a batch norm's input, whose samples count by weights."""
    axes = _module.flax_axes("BatchNorm", module.axis, x.ndim, "axis")
    is_weight = getattr(module, "mask_is_weight", False)
    where = _module.flax_mask("BatchNorm", mask, x.shape, is_weight)
    # What a sample has made several of has them one after the other.
    if weights is not None and 0 not in axes and not len(x) % len(weights):
        each = jnp.repeat(weights, len(x) // len(weights))
        each = _axes.sharded_like(each.reshape(-1, *[1] * (x.ndim - 1)), x)
        where = each if where is None else where * each
    devices = models.devices_of(module)
    return _norms.batch_norm(x, feature_axis=axes, where=where, **devices)[1]


def _noted(
    module: Any,
    use_running_average: bool | None,
    x: Any,
    mask: Any,
    meant: bool = False,
) -> Call:
    """The call of a batch norm, by what module and call say."""
    running, updates = use_running_average, not use_running_average
    meant = meant or getattr(module, "normalize_with", None) is not None
    if hasattr(module, "update_statistics"):
        running, updates = _module.switches(module, use_running_average)
    return Call(
        jnp.shape(x),
        mask is not None,
        bool(running),
        bool(updates),
        meant,
        getattr(module, "virtual_batch_size", None),
    )


def _noted_norm(
    watch: Watch,
    place: tuple[tuple, str, Any],
    own: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a norm without running statistics, and notes it."""
    name = models.operand(own, args, kwargs)  # a class of a user's own may call it z
    x = args[0] if name is None else kwargs[name]
    x = watch.norm(*place, x, Call(jnp.shape(x), kwargs.get("mask") is not None))
    if name is None:
        return own(x, *args[1:], **kwargs)
    return own(**{**kwargs, name: x})


def _layers(library: str) -> tuple:
    there = sys.modules[library]
    return tuple(getattr(there, name) for name in _LAYERS if hasattr(there, name))


def _switched(module: Any) -> dict[str, Any]:
    """Fields of a batch norm that is told which statistics normalize.

    They are of the named axes that are there.
    """
    switches = {name: None for name in ("normalize_with", "update_statistics")}
    fields = {**switches, **models.devices_of(module)}
    return {name: a for name, a in fields.items() if hasattr(module, name)}


# Linen.


def _linen_swap(watch: Watch) -> Callable:
    layers = _layers("flax.linen")

    def swap(module: Any) -> Callable | None:
        kind = models.kind_of(module)
        if kind is not None:
            watch.found.setdefault(module.path, (kind, module.clone(parent=None)))
        elif not isinstance(module, layers) or not module.use_bias:
            return None
        else:
            return lambda *args, **kwargs: watch.layer(
                module.path, module(*args, **kwargs)
            )
        if kind == "BatchNorm":
            return functools.partial(_linen_batch_norm, watch, module)

        def call(*args: Any, **kwargs: Any) -> Any:
            place = module.path, kind, module
            return _noted_norm(watch, place, module, *args, **kwargs)

        return call

    return swap


def _linen_batch_norm(
    watch: Watch, module: Any, x: Any, use_running_average: Any = None, **kwargs: Any
) -> jax.Array:
    import flax.linen as nn

    both = (module.use_running_average, use_running_average)
    if both != (None, None) or getattr(module, "normalize_with", None) is None:
        running = nn.merge_param("use_running_average", *both)
    else:
        running = None
    x, mask = jnp.asarray(x), kwargs.get("mask")
    noted = _noted(module, running, x, mask)
    x = watch.norm(module.path, "BatchNorm", module, x, noted)
    if not module.has_variable("batch_stats", "mean"):
        raise _check.error(
            ValueError,
            "doctor",
            "the statistics of a batch norm must be among the variables",
            f"no batch_stats/{'/'.join((*module.path, 'mean'))}",
            'Pass variables={"params": params, "batch_stats": batch_stats}',
        )

    def get(name: str) -> Any:
        return module.get_variable("batch_stats", name)

    def call(x: jax.Array, with_running: bool) -> jax.Array:
        if watch.mode == "own":
            return module(x, use_running_average, **kwargs)
        changed = {"use_running_average": None, **_switched(module)}
        other = module.clone(parent=module.scope.rewound(), **changed)
        return other(x, use_running_average=with_running, **kwargs)

    put = functools.partial(module.put_variable, "batch_stats")
    return _batch_norm(watch, module, _Variables(get, put, call), x, mask, noted)


@contextlib.contextmanager
def watching_linen(mode: str, weights: Any = None) -> Iterator[Watch]:
    """Watches the linen models that are called within it."""
    watch = Watch(mode, weights)
    first = functools.partial(known, **UNSAID)
    with models.substituted(_linen_swap(watch), first=first):
        yield watch


# A program that was compiled before is not traced again, and nothing would be seen. So
# each watch sees trees and modules of a structure of their own, with a number in it.
_numbers = itertools.count()


def with_places(statistics: Any) -> Any:
    """Linen's ``batch_stats`` with a place for what is measured at each batch norm."""
    number = next(_numbers)

    def placed(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        tree = {k: placed(v) for k, v in tree.items()}
        if {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], Mapping):
            tree |= _places(tree["mean"], tree["var"])
            tree[f"doctor_{number}"] = {}
        return tree

    return placed(statistics)


def _places(mean: Any, var: Any) -> dict[str, jax.Array]:
    wide = jnp.promote_types(jnp.result_type(mean), jnp.float32)
    return {
        UPDATES: jnp.zeros(jnp.shape(var), jnp.float32),
        MEAN: jnp.zeros(jnp.shape(mean), wide),
        VAR: jnp.zeros(jnp.shape(var), jnp.float32),
    }


# Nnx.

_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar(
    "watch", default=None
)


@contextlib.contextmanager
def watching_nnx(mode: str, weights: Any = None) -> Iterator[Watch]:
    """Watches the models of ``watched`` that are called within it."""
    watch = Watch(mode, weights)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def watched(model: Any) -> Any:
    """A copy of an nnx model whose norms and layers tell a watch of their calls.

    It is set to train, unless some of its batch norms are: then what is set to evaluate
    beside them is meant so, a teacher say.
    """
    from flax import nnx

    model = models.nnx_copy(model)
    norms = [m for _, m in models.nnx_modules(model) if _is_batch_norm(m)]
    if not any(_updates(m) for m in norms):
        model.train()
    layers = _layers("flax.nnx")
    for path, module in list(models.nnx_modules(model)):
        kind = models.kind_of(module)
        if kind is None and not isinstance(module, layers):
            continue
        module.doctor_path = tuple(map(str, path))
        if kind == "BatchNorm":
            for name, value in _places(module.mean[...], module.var[...]).items():
                setattr(module, name, nnx.BatchStat(value))
        module.doctor_number = 0
        of: Any = type(module)
        module.__class__ = _telling(of, kind)
    _renumber(model)
    return model


def _is_batch_norm(module: Any) -> bool:
    return models.kind_of(module) == "BatchNorm"


def _updates(norm: Any) -> bool:
    """Whether a batch norm of nnx updates its statistics, as it is set."""
    given = getattr(norm, "update_statistics", None)
    return not norm.use_running_average if given is None else given


def _renumber(model: Any) -> None:
    number = next(_numbers)
    for _, module in models.nnx_modules(model):
        if hasattr(module, "doctor_number"):
            module.doctor_number = number


@functools.cache
def _telling(of: Any, kind: str | None) -> type:
    """The class ``of`` with a ``__call__`` that tells a watch."""
    called = {None: _nnx_layer, "BatchNorm": _nnx_batch_norm}.get(kind, _nnx_norm)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(of.__call__, self)
        watch = _watch.get()
        if watch is None:  # a step may have kept the copy that it was given
            return own(*args, **kwargs)
        return called(watch, self, own, *args, **kwargs)

    return type(of.__name__, (of,), {"__call__": call})


def _nnx_layer(
    watch: Watch, module: Any, own: Callable, *args: Any, **kwargs: Any
) -> Any:
    y = own(*args, **kwargs)
    return y if module.bias is None else watch.layer(module.doctor_path, y)


def _nnx_norm(
    watch: Watch, module: Any, own: Callable, *args: Any, **kwargs: Any
) -> Any:
    place = module.doctor_path, models.kind_of(module) or "", module
    return _noted_norm(watch, place, own, *args, **kwargs)


def _nnx_batch_norm(
    watch: Watch,
    module: Any,
    own: Callable,
    x: Any,
    use_running_average: Any = None,
    **kwargs: Any,
) -> jax.Array:
    running, meant = use_running_average, use_running_average is None
    if meant:  # by train() or eval()
        running = module.use_running_average
    x, mask = jnp.asarray(x), kwargs.get("mask")
    noted = _noted(module, running, x, mask, meant)
    x = watch.norm(module.doctor_path, "BatchNorm", module, x, noted)

    def get(name: str) -> Any:
        variable = getattr(module, name, None)
        return None if variable is None else variable[...]

    def put(name: str, value: Any) -> None:
        getattr(module, name).set_value(value)

    def call(x: jax.Array, with_running: bool) -> jax.Array:
        if watch.mode == "own":
            return own(x, use_running_average, **kwargs)
        changed = _switched(module)
        before = {name: getattr(module, name) for name in changed}
        vars(module).update(changed)
        try:
            return own(x, use_running_average=with_running, **kwargs)
        finally:
            vars(module).update(before)

    return _batch_norm(watch, module, _Variables(get, put, call), x, mask, noted)


# One call under batch and one under running statistics.


class Measured(NamedTuple):
    """What came of a call of a model, as of training.

    Attributes:
      seen: the calls of each norm, by path.
      found: the kind and the module of each, of linen.
      statistics: the tree of statistics, with what was measured beside them.
      samples: how many there are in the batch.
      gaps: the differences of outputs under batch and under running statistics, over
        the spread of each; of the outputs that are floating and have the axis of the
        batch.
      noise: returns how large these are by chance; see `_resampled`.
      finite: whether no output is NaN or infinite, under both. Minus infinity may be
        what a mask makes of logits.
      slopes: the gradient of some sum of all outputs in each parameter, under running
        statistics; None where no output is floating.
    """

    seen: dict[tuple[str, ...], list[Call]]
    found: dict[tuple[str, ...], tuple[str, Any]]
    statistics: Any
    samples: int
    gaps: np.ndarray
    noise: Callable[[], np.ndarray]
    finite: bool
    slopes: Any


def measure(
    model: Any, variables: Any, args: tuple, kwargs: dict, mutable: Any = None
) -> Measured:
    """Calls a model with batch statistics, and with running ones, in one program.

    ``mutable`` is what a linen model is told of; None: all that its variables have, but
    for parameters.
    """
    if models.system_of("doctor", model) == "linen":
        params, rest, call = _linen_parts(model, variables, mutable)
    else:
        params, rest, call = _nnx_parts(model)
    watches: dict[str, Watch] = {}

    def outputs(mode: str, *parts: Any, weights: Any = None) -> tuple:
        y, statistics, watches[mode] = call(mode, weights, *parts)
        floats = [jnp.asarray(a) for a in jax.tree.leaves(y)]
        return [a for a in floats if jnp.issubdtype(a.dtype, jnp.inexact)], statistics

    def program(params: Any, *others: Any) -> tuple:
        batch, statistics = outputs("batch", params, *others)
        if not batch:
            return statistics, [], True, None
        running, pull = jax.vjp(lambda p: outputs("running", p, *others)[0], params)
        # Weights that no symmetry of a model makes cancel.
        weights = [
            jnp.cos(jnp.arange(1.0, y.size + 1)).reshape(y.shape).astype(y.dtype)
            for y in running
        ]
        finite = [(jnp.isfinite(a) | (a == -jnp.inf)).all() for a in (*batch, *running)]
        gaps = _gaps(batch, running, samples)
        return statistics, gaps, jnp.stack(finite).all(), pull(weights)[0]

    lengths = [jnp.shape(a)[0] for a in jax.tree.leaves((args, kwargs)) if jnp.ndim(a)]
    samples = max(1, *lengths[:1])  # the batch of data comes first
    arrays, rebuilt = models.arrays_of((params, rest, args, kwargs))
    run = jax.jit(lambda arrays: program(*rebuilt(arrays))).trace(arrays)
    statistics, gaps, finite, slopes = run.lower().compile()(arrays)
    batch, last = watches["batch"], [*watches.values()][-1]
    if set(batch.seen) != set(last.seen):
        raise _check.error(
            RuntimeError,
            "doctor",
            "the model must be traced anew, so that its norms are seen",
            "parts of it that were compiled before",
            "Call jax.clear_caches() first",
        )
    otherwise = _read_otherwise(run.jaxpr.jaxpr)
    for found in batch.seen.values():
        for i, c in enumerate(found):
            if c.after is not None and "/".join(c.after) in otherwise:
                found[i] = c._replace(after=None)

    def resampled(arrays: list, weights: jax.Array) -> list[jax.Array]:
        return outputs("resampled", *rebuilt(arrays), weights=weights)[0]

    each = [c.ghosts for found in batch.seen.values() for c in found if c.ghosts]
    noise = functools.partial(_resampled, resampled, arrays, samples, [*each, samples])
    return Measured(
        batch.seen,
        batch.found,
        statistics,
        samples,
        np.asarray(gaps, np.float64),
        noise,
        bool(finite),
        slopes,
    )


RESAMPLES = 16


def _resampled(
    outputs: Callable, arrays: list, samples: int, sizes: list[int]
) -> np.ndarray:
    """How far outputs are off by chance under the statistics of a batch.

    By draws of m of its n samples: with n/m = n/size + 1, statistics of a draw are as
    far from those of the batch as those of ``size`` samples are from those of all data.

    Args:
      outputs: takes the arrays and how often each sample counts.
      arrays: of the call.
      samples: how many there are.
      sizes: of how many samples statistics are; the least one counts.

    Returns:
      The median over the draws of the gap of each output.
    """
    program = jax.jit(outputs)
    whole = program(arrays, jnp.ones(samples))
    size = min(sizes)
    drawn = np.arange(samples) < max(1, samples * size // (samples + size))
    rng = np.random.default_rng(0)
    gaps = [
        _gaps(whole, program(arrays, jnp.float32(rng.permutation(drawn))), samples)
        for _ in range(RESAMPLES)
    ]
    return np.median(np.asarray(jax.device_get(gaps), np.float64), 0)


def _gaps(batch: list, running: list, samples: int) -> list[jax.Array]:
    """The gaps of those outputs that have the axis of the batch."""
    return [
        _gap(b, r)
        for b, r in zip(batch, running, strict=True)
        if b.ndim and len(b) and len(b) % samples == 0
    ]


def _gap(batch: jax.Array, running: jax.Array) -> jax.Array:
    """The root mean square of what differs, over that of the spread over the batch."""
    there = jnp.isfinite(batch) & jnp.isfinite(running)
    batch, running = (jnp.where(there, a, 0) for a in (batch, running))
    centered = batch - batch.mean(0) if len(batch) > 1 else batch
    off, spread = ((jnp.abs(a) ** 2).mean() for a in (batch - running, centered))
    of = jnp.where(spread > 0, spread, jnp.inf)  # what is always the same shows nothing
    return jnp.sqrt(off / of).astype(jnp.float32)


def _anew(tree: Any) -> Any:
    """A tree whose variables of nnx may change at the level of tracing that is here."""
    return jax.tree.map(lambda a: a, tree)


def _linen_parts(model: Any, variables: Any, mutable: Any) -> tuple[Any, Any, Callable]:
    from flax.core import DenyList

    rest = dict(variables)
    params = rest.pop("params", {})
    told = ["batch_stats", *rest] if mutable is None else mutable

    def call(mode, weights, params, rest, args, kwargs):
        rest = {**rest, "batch_stats": with_places(rest.get("batch_stats", {}))}
        args, kwargs = _anew((args, kwargs))
        rngs = kwargs.pop("rngs", {})
        if not isinstance(rngs, Mapping):  # one key, as apply takes it
            rngs = {"params": rngs}
        # Any name of a stream falls back on that of params.
        rngs = {"params": jax.random.key(0), **rngs}
        with watching_linen(mode, weights) as watch, models.told_mutable(told):
            y, updated = model.apply(
                {"params": params, **rest},
                *args,
                rngs=rngs,
                mutable=DenyList("params"),
                **kwargs,
            )
        return y, updated.get("batch_stats", {}), watch

    return params, rest, call


def _nnx_parts(model: Any) -> tuple[Any, Any, Callable]:
    from flax import nnx

    of: Any = nnx.split(watched(model), nnx.Param, ...)
    graph, params, rest = of

    def call(mode, weights, params, rest, args, kwargs):
        params, rest, args, kwargs = _anew((params, rest, args, kwargs))
        merged = nnx.merge(graph, params, rest)
        _renumber(merged)
        with watching_nnx(mode, weights) as watch:
            y = merged(*args, **kwargs)
        return y, nnx.state(merged, nnx.BatchStat), watch

    return params, rest, call


def stepped(step: Callable, model: Any, variables: Any) -> tuple[dict, Any, Any]:
    """Takes one training step: the calls of norms, and statistics before and after.

    The count of their updates is beside the statistics.
    """
    if models.system_of("doctor", model) == "nnx":
        from flax import nnx

        copy = watched(model)
        # Of NumPy arrays, too, which a step may write to.
        before = jax.device_get(jax.tree.map(jnp.copy, nnx.state(copy, nnx.BatchStat)))
        with watching_nnx("own") as watch:
            step(copy)
        return watch.seen, before, nnx.state(copy, nnx.BatchStat)
    given = {**variables, "batch_stats": with_places(variables.get("batch_stats", {}))}
    before = jax.device_get(given["batch_stats"])
    # A step may give up what it is given to the compiler: it is given a copy.
    with watching_linen("own") as watch:
        after = step(jax.tree.map(jnp.copy, given))
    if not isinstance(after, Mapping) or "batch_stats" not in after:
        got = type(after).__name__
        raise _check.error(
            TypeError,
            "doctor",
            "step must return the variables after it, as it is given those before it",
            f"{got} of {sorted(after)}" if isinstance(after, Mapping) else got,
            'Return {"params": params, "batch_stats": batch_stats}',
        )
    return watch.seen, before, after["batch_stats"]
