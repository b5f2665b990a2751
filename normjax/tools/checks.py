"""What goes wrong with norms: a check for each fault, by its name."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from normjax import _axes, _check, _module
from normjax.tools import models, replicas

# Where a figure becomes a finding. Those of no bound of their own are conventions.
START_LEFT = 0.05  # part of their start, 0 and 1, that is left in the statistics
VALUES = 16  # of one statistic: the mean of fewer is off by a quarter deviation
GAP = 0.35  # of an output's spread: outputs under batch and running statistics
OFF = 3.0  # by chance no statistics of n samples are so many times 1 / sqrt(n) off
NOISE = 2.5  # times that of a draw of the batch's samples: a gap that is not by chance
MOVED = 0.1  # of the way from their start to the batch's: statistics that hardly moved
NEAR_ZERO = 0.01  # of epsilon: a channel whose output is its bias, but for a tenth
HUGE = 1e8  # of a variance: values of ten thousands
PROBES = 1024  # updates of an optimizer: those that accumulate or warm up come to act
ROUNDING = 64 * float(np.finfo(np.float64).eps)  # of a parameter, in one update


class Finding(NamedTuple):
    """A fault of one norm.

    Attributes:
      name: of the kind of fault; it stays what it is.
      path: of the norm in the model, with slashes; empty for the model itself.
      what: the facts.
      todo: what to type against it.
      severity: "error" where results are wrong; "warning" where they may be poor.

    Example:
      >>> from normjax import tools
      >>> str(tools.Finding("not-finite", "norm", "var is NaN", "Train anew", "error"))
      'error not-finite norm: var is NaN. Train anew.'
    """

    name: str
    path: str
    what: str
    todo: str
    severity: str

    def __str__(self) -> str:
        """Says it in one line."""
        where = self.path or "the model"
        return f"{self.severity} {self.name} {where}: {self.what}. {self.todo}."


@dataclasses.dataclass
class Patient:
    """A norm and what is known of it; arrays are on the host.

    Attributes:
      place: its path in the model.
      kind: as of `Norm`; None where it is not known.
      module: its fields; None where there is but a tree.
      values: its mean, var, count, scale and bias, those it has.
      calls: how a call of the model called it.
      stepped: how a step did.
      batch: the mean and var of the batch in that call.
      updates: of its statistics in a step, or else in a call; None where unknown.
      after_step: "left", if a step called it to be updated and left its statistics,
        "same", if it left them otherwise; None where it did not, or is unknown.
      slopes: the gradients of its scale and bias, in the sum of all outputs.
    """

    place: tuple[str, ...]
    kind: str | None
    module: Any
    values: dict[str, np.ndarray]
    calls: list[Any] = dataclasses.field(default_factory=list)
    stepped: list[Any] = dataclasses.field(default_factory=list)
    batch: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    updates: int | None = None
    after_step: str | None = None
    slopes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its path with slashes."""
        return "/".join(self.place)

    @property
    def frozen(self) -> bool:
        """Whether it normalizes by its running statistics wherever it is called."""
        return bool(self.calls) and all(c.running for c in self.calls)

    @property
    def updated(self) -> bool:
        """Whether its statistics are updated; a call that is not known may do it."""
        if self.calls:
            return any(c.updates for c in self.calls)
        return _field(self, "update_statistics") is not False


@dataclasses.dataclass
class Case:
    """All that is known of a model.

    Attributes:
      norms: its norms.
      system: "linen" or "nnx"; None where there is but a tree.
      arrays: of parameters and statistics, by path.
      params: as an optimizer takes them.
      optimizer: an optax transformation.
      steps: how many there were.
      momentum: of all batch norms of a tree.
      stacked: whether arrays have the replicas first.
      called: whether the model was called.
      samples: how many there are in the batch.
      gaps: between outputs under batch and under running statistics, over their spread;
        none where no output is floating and has the axis of the batch.
      noise: returns how large these are by chance.
      differentiated: whether gradients are known, of outputs that are floating.
      finite: whether outputs are, or minus infinity.
      padding: "samples" or "positions", to how many are padding and the axes they are
        on.
    """

    norms: list[Patient]
    system: str | None
    arrays: dict[tuple[str, ...], Any]
    params: Any = None
    optimizer: Any = None
    steps: int | None = None
    momentum: float | None = None
    stacked: bool = False
    called: bool = False
    samples: int = 0
    gaps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    noise: Callable[[], np.ndarray] | None = None
    differentiated: bool = False
    finite: bool = True
    padding: dict[str, tuple] = dataclasses.field(default_factory=dict)

    @property
    def running(self) -> list[Patient]:
        """The norms with finite running statistics."""
        return [n for n in self.norms if _finite(n, "mean") and _finite(n, "var")]

    def lacks(self, need: str) -> str | None:
        """What to pass for what a check needs; None where it is there."""
        momentum = self.system is not None or self.momentum is not None
        statistics = self.system or any("mean" in n.values for n in self.norms)
        there = {
            "nothing": True,
            "statistics": statistics,
            "call": self.called,
            "outputs": self.gaps.size > 0,
            "gradients": self.differentiated,
            "updates": self.called or any(n.updates is not None for n in self.norms),
            "optimizer": self.optimizer is not None and self.params is not None,
            "steps": self.steps is not None and momentum,
            "devices": self.stacked or any(map(_on_mesh, self.arrays.values())),
        }
        return None if there[need] else _NEEDS[need]


_NEEDS = {
    "statistics": "there is no mean beside a var in the tree",
    "call": "needs the model, and the arguments of its call while training",
    "outputs": "needs the model, arguments of its call, and an output that is floating"
    " and has the axis of the batch",
    "gradients": "needs the model, arguments of its call, and a floating output",
    "updates": "needs the model, and the arguments of its call while training",
    "optimizer": "needs optimizer=, the optax transformation, and the params",
    "steps": "needs steps=, of the training so far, and for a tree momentum=",
    "devices": "needs arrays on a mesh of several devices, or stacked=True",
}
_Check = Callable[[Case], Iterator[Finding | str]]
CHECKS: dict[str, tuple[str, _Check]] = {}


def _check_for(name: str, need: str) -> Callable[[_Check], _Check]:
    """Enters a check for the fault of that name; it yields findings.

    A string that it yields is why it could not look at all norms.
    """

    def entered(check: _Check) -> _Check:
        CHECKS[name] = (need, check)
        return check

    return entered


# Words.


def _channels(which: np.ndarray) -> str:
    """Which channels, of how many."""
    places = [i[0] if len(i) == 1 else tuple(map(int, i)) for i in np.argwhere(which)]
    some = ", ".join(map(str, places[:5])) + ", ..." * (len(places) > 5)
    return f"{len(places)} of {which.size} channels ({some})"


def _finite(norm: Patient, name: str) -> bool:
    return name in norm.values and bool(np.isfinite(_wide(norm.values[name])).all())


def _all_finite(batch: dict[str, np.ndarray]) -> bool:
    return bool(batch) and all(np.isfinite(a).all() for a in batch.values())


def _wide(a: np.ndarray) -> np.ndarray:
    return a if np.iscomplexobj(a) else a.astype(np.float64)


def _field(norm: Patient, name: str, default: Any = None) -> Any:
    return getattr(norm.module, name, default)


def _momentum(case: Case, norm: Patient) -> float | None:
    if norm.module is None:
        return case.momentum
    return None if _is_unsaid(norm, "momentum") else _field(norm, "momentum")


def _is_unsaid(norm: Patient, name: str) -> bool:
    """Whether the class of a user's own has no such field: no default speaks for it."""
    return name in _field(norm, "_normjax_unsaid", ())


def reduced(norm: Patient, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of x that a norm takes the moments over, without groups of features."""
    ndim, said = len(shape), models.axes_of(norm.kind, norm.module)
    match norm.kind:
        case "BatchNorm":
            axes = _module.flax_axes("doctor", said, ndim, "axis")
            return _axes.others(axes, ndim)
        case "GroupNorm":
            space = _module.flax_space(said, ndim)
            return tuple(range(1, ndim - 1)) if space is None else space
        case "InstanceNorm":
            axes = _module.flax_features(said, ndim)
            return _axes.others((0, *axes), ndim)
    return _module.flax_axes("doctor", said, ndim, "reduction_axes")


def _hides_groups(norm: Patient) -> bool:
    """Whether a group norm, of a class of a user's own, does not say its groups."""
    return norm.kind == "GroupNorm" and models.groups_of(norm.module, 1) is None


def _values(norm: Patient, shape: tuple[int, ...]) -> int:
    """How many values a norm that does not hide its groups takes one mean of."""
    n = math.prod(shape[a] for a in reduced(norm, shape))
    if norm.kind == "GroupNorm":
        n *= shape[-1] // (models.groups_of(norm.module, shape[-1]) or 1)
    if ghosts := _field(norm, "virtual_batch_size"):
        n = n * ghosts // shape[0]
    return n


_KEEP = {
    "linen": 'While training, y, updates = model.apply(variables, x, mutable=["batch_s'
    'tats"]), and keep updates["batch_stats"]',
    "nnx": "Call model.train() before the steps, and wrap them in nnx.jit",
}
_KEEP_EITHER = (
    'Keep updates["batch_stats"] of model.apply(..., mutable=["batch_stats"]) in linen;'
    " wrap steps in nnx.jit, not jax.jit, in nnx"
)
_RETURN = {
    "linen": 'Return updates["batch_stats"] from the step, and pass them to the next',
    "nnx": "Wrap the step in nnx.jit, not in jax.jit",
}
# One batch that is not finite ruins a channel for good, whatever comes after it.
_MEND = (
    "Recompute the statistics with tools.recalibrate, or set mean to 0 and var to 1 in"
    " these channels and train on; skip_nonfinite=True, of normjax's BatchNorm and of"
    " RunningMoments.update, leaves such updates out"
)
_DEBUG = 'jax.config.update("jax_debug_nans", True) names the operation it comes from'


# The checks.


def _at_start(norm: Patient) -> bool:
    """Whether the statistics are those a norm is created with."""
    mean, var, count = (norm.values.get(k) for k in ("mean", "var", "count"))
    if count is not None and np.any(count):
        return False
    return not np.any(mean) and bool(np.all(var == 1))


def _trained(norm: Patient) -> bool:
    """Whether scale or bias are not what any initializer of one constant makes."""
    scale, bias = norm.values.get("scale"), norm.values.get("bias")
    moved = scale is not None and len(np.unique(scale)) > 1
    return moved or (bias is not None and bool(np.any(bias)))


@_check_for("modes-differ", "updates")
def _modes(case: Case) -> Iterator[Finding | str]:
    infer = _left_out(case)
    if infer:
        of = sum(n.kind == "BatchNorm" for n in case.norms)
        yield Finding(
            "modes-differ",
            infer[0],
            f"some norms infer while others train, {len(infer)} of {of}:"
            f" {', '.join(infer[:5])}" + ", ..." * (len(infer) > 5),
            "Pass the flag that says whether to train on to them; where they are meant"
            " to stay as they are, tools.freeze says so",
            "warning",
        )


def _left_out(case: Case) -> list[str]:
    """The batch norms that a call has infer, while it has others train."""
    calls = {n.path: n.calls or n.stepped for n in case.norms if n.kind == "BatchNorm"}
    if not any(call.updates for of in calls.values() for call in of):
        return []
    return [
        path
        for path, of in calls.items()
        if of and all(c.running and not c.updates and not c.meant for c in of)
    ]


@_check_for("never-updated", "statistics")
def _never_updated(case: Case) -> Iterator[Finding | str]:
    others = _left_out(case)  # of which it is said why
    for norm in case.running:
        if norm.path in others:
            continue
        if _at_start(norm) and case.steps != 0 and not _dropped(norm, case.steps):
            yield Finding(
                "never-updated",
                norm.path,
                "mean is 0 and var is 1 in all channels, as at the start",
                _KEEP.get(case.system or "", _KEEP_EITHER),
                "error",
            )


@_check_for("update-dropped", "statistics")
def _update_dropped(case: Case) -> Iterator[Finding | str]:
    for norm in case.running:
        if what := _dropped(norm, case.steps):
            todo = _RETURN.get(case.system or "", _KEEP_EITHER)
            yield Finding("update-dropped", norm.path, what, todo, "error")


def _dropped(norm: Patient, steps: int | None) -> str:
    """What shows that updates of the statistics were lost; empty if nothing does."""
    if norm.after_step == "left":
        return "a step updates mean and var, and they are as before after it"
    new = norm.after_step is not None or steps == 0
    if not new and _at_start(norm) and _trained(norm):
        return "mean is 0 and var is 1 as at the start, while scale or bias has moved"
    return ""


@_check_for("updated-twice", "updates")
def _updated_twice(case: Case) -> Iterator[Finding | str]:
    quiet = []
    for norm in case.norms:
        if norm.kind != "BatchNorm" or norm.updates is None:
            continue
        if norm.updates > 1:
            yield Finding(
                "updated-twice",
                norm.path,
                f"its statistics are updated {norm.updates} times in one step",
                "Give each place that calls it a norm of its own, or call it once",
                "error",
            )
        elif (
            not norm.updates
            and norm.after_step != "left"
            and _field(norm, "update_statistics") is not False
        ):
            quiet.append(norm.path)
    if quiet:
        yield f"no statistics are updated by the call, of {', '.join(quiet)}"


@_check_for("replicas-differ", "devices")
def _replicas(case: Case) -> Iterator[Finding | str]:
    groups: dict[Any, dict[str, Any]] = {}  # by mesh
    for path, a in case.arrays.items():
        if case.stacked or _on_mesh(a):
            mesh = None if case.stacked else a.sharding.mesh
            groups.setdefault(mesh, {})["/".join(path)] = a
    drifts = [
        drift
        for group in groups.values()
        if case.stacked or any(replicas.is_replicated(a) for a in group.values())
        for drift in replicas.find_drift(group, stacked=case.stacked)
    ]
    for drift in drifts:
        where = ", ".join(map(str, drift.devices))
        yield Finding(
            "replicas-differ",
            drift.path[2:-2],
            f"not the same on all of {drift.of} devices; it differs on {where}",
            "Sync it: axis_name= of the norm under pmap and shard_map;"
            " tools.merge_replicas(batch_stats) makes one of what there is",
            "error",
        )


def _on_mesh(a: Any) -> bool:
    sharding = getattr(a, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.size > 1


@_check_for("not-finite", "nothing")
def _not_finite(case: Case) -> Iterator[Finding | str]:
    clean = True
    for norm in case.norms:
        batch = {f"the batch {k}": a for k, a in norm.batch.items()}
        for name, a in {**norm.values, **batch}.items():
            bad = ~np.isfinite(_wide(a))
            if not bad.any():
                continue
            clean = False
            yield Finding(
                "not-finite",
                norm.path,
                f"{name} is NaN or infinite in {_channels(bad)}",
                _MEND
                if name in ("mean", "var")
                else f"Go back to a checkpoint before it; {_DEBUG}",
                "error",
            )
    if clean and not case.finite:
        yield Finding(
            "not-finite",
            "",
            "an output is NaN or plus infinity, while what its norms hold is finite",
            _DEBUG,
            "error",
        )


@_check_for("extreme-variance", "statistics")
def _variance(case: Case) -> Iterator[Finding | str]:
    unsaid = []
    for norm in case.running:
        var = _wide(norm.values["var"])
        epsilon = _field(norm, "epsilon", 1e-5)
        if _is_unsaid(norm, "epsilon"):
            unsaid.append(norm.path)
            epsilon = 0.0  # below which no variance is small
        # The start of 1, taken off again, leaves a rounding error.
        negative = var < -4 * np.finfo(np.float32).eps
        small = ~negative & (var < NEAR_ZERO * epsilon)
        kinds = [
            (negative, "negative", "error", "Recompute the statistics over data anew"),
            (
                small,
                f"below {NEAR_ZERO * epsilon:.0e}, far below epsilon={epsilon:.0e}",
                "warning",
                "Look at what comes before: a channel that is constant could be left"
                " out",
            ),
            (
                var > HUGE,
                f"above {HUGE:.0e}",
                "warning",
                "Scale the input, or lower the learning rate of the layer before",
            ),
        ]
        for which, word, severity, todo in kinds:
            if which.any():
                ends = f"{var[which].min():.1e} to {var[which].max():.1e}"
                what = f"the running var is {word} in {_channels(which)}: {ends}"
                yield Finding("extreme-variance", norm.path, what, todo, severity)
    if unsaid:
        yield f"the class has no field epsilon, of {', '.join(unsaid)}"


_NEW = "before the first step it is the initialization that shows"


@_check_for("dead-channels", "gradients")
def _dead_channels(case: Case) -> Iterator[Finding | str]:
    if case.steps == 0:
        yield _NEW
        return
    early = {n.path for n in case.running if _hardly_moved(n)}
    waiting = []
    for norm in case.norms:
        # A norm without statistics is behind, or before, one that has some.
        waits = norm.path in early or ("mean" not in norm.values and bool(early))
        found = [f"{what} {_channels(of)}" for what, of in _without_life(norm)]
        if found and waits:
            waiting.append(norm.path)
        else:
            yield from (_no_life(norm, what) for what in found)
    if waiting:
        yield (
            "running statistics have hardly moved from their start, 0 and 1, so that it"
            f" is not known of {', '.join(waiting)}"
        )


def _without_life(norm: Patient) -> Iterator[tuple[str, np.ndarray]]:
    """What is the matter with channels, and which they are."""
    if _all_finite(norm.batch) and not norm.frozen:
        mean, var = norm.batch["mean"], norm.batch["var"]
        # What the rounding of a mean makes of values that are all the same.
        constant = var <= (np.finfo(np.float32).eps * np.abs(mean)) ** 2
        if constant.any() and _each(norm, constant) >= VALUES:
            yield "x is constant over the batch in", constant
    if norm.slopes:
        dead = np.all([a == 0 for a in norm.slopes.values()], axis=0)
        # Of none: what comes after it has no gradient, by design or as a whole.
        if dead.any() and not dead.all() and _each(norm, dead) >= VALUES:
            yield "no gradient of an output reaches", dead


def _hardly_moved(norm: Patient) -> bool:
    """Whether running statistics are near their start, 0 and 1, and a batch's are not.

    They lag then, and what a model makes of them is not what it was trained for.
    """
    if not _all_finite(norm.batch) or norm.frozen:
        return False
    if "count" in norm.values:  # nothing is left of the start
        return not norm.values["count"].any()
    epsilon = _field(norm, "epsilon", 1e-5)

    def from_start(of: dict[str, np.ndarray]) -> float:
        mean, var = np.abs(of["mean"]), _wide(of["var"])
        spread = norm.batch["var"] + epsilon
        return float((mean**2 / spread).mean() + (((var - 1) / spread) ** 2).mean())

    return from_start(norm.values) < MOVED**2 * from_start(norm.batch)


def _each(norm: Patient, channels: np.ndarray) -> int:
    """How many values of x there are of each channel, in all calls."""
    return sum(math.prod(c.shape) for c in norm.calls) // channels.size


def _no_life(norm: Patient, what: str) -> Finding:
    return Finding(
        "dead-channels",
        norm.path,
        what + ", on this batch",
        "Try a lower learning rate, no weight decay on the norm, or jax.nn.leaky_relu"
        " in place of relu",
        "warning",
    )


@_check_for("train-eval-gap", "outputs")
def _train_eval(case: Case) -> Iterator[Finding | str]:
    if case.steps == 0:
        yield _NEW
        return
    norms = [n for n in case.running if _all_finite(n.batch) and not n.frozen]
    off = {n.path: _off(n) for n in norms}
    if not norms or not (case.gaps > GAP).any():
        return
    # By how much of one norm, or else of the outputs, in which the little of each norm
    # adds up: neither is by chance.
    is_off = any(max(off[n.path]) > OFF / math.sqrt(_samples(n)) for n in norms)
    noise = np.full(case.gaps.shape, np.inf)
    if case.samples > 1 and case.noise is not None:
        noise = case.noise()
    gaps = np.where(is_off | (case.gaps > NOISE * noise), case.gaps, 0)
    most = int(gaps.argmax())
    if not gaps[most] > GAP:
        return
    worst = max(off, key=lambda path: sum(off[path]))
    mean, ratio = off[worst]
    by_chance = f" (of {case.samples} samples by chance {noise[most]:.0%})"
    yield Finding(
        "train-eval-gap",
        worst,
        f"outputs under batch and under running statistics differ by {gaps[most]:.0%}"
        f" of their spread{by_chance if case.samples > 1 else ''}; most at this norm:"
        f" means by {mean:.2g} deviations, deviations by a factor of"
        f" {math.exp(ratio):.2g}",
        "Recompute the running statistics with tools.recalibrate, over training data;"
        " for data of another kind, over those",
        "warning",
    )


def _samples(norm: Patient) -> int:
    """Of how many samples statistics are; the values of one are alike."""
    return max(
        call.shape[0] if 0 in reduced(norm, call.shape) else _values(norm, call.shape)
        for call in norm.calls
    )


def _off(norm: Patient) -> tuple[float, float]:
    """How far batch and running statistics are apart, in the mean of channels.

    The means in deviations, and the log of the deviations' ratio.
    """
    epsilon = _field(norm, "epsilon", 1e-5)
    mean, var = norm.values["mean"], _wide(norm.values["var"]).clip(0)
    of_mean, of_var = norm.batch["mean"], norm.batch["var"]
    means = np.abs(of_mean - mean) / np.sqrt(var + epsilon)
    ratios = np.abs(np.log((of_var + epsilon) / (var + epsilon))) / 2
    return float(means.mean()), float(ratios.mean())


@_check_for("momentum-too-slow", "steps")
def _slow(case: Case) -> Iterator[Finding | str]:
    assert case.steps is not None
    unsaid = [n.path for n in case.norms if _is_unsaid(n, "momentum")]
    if unsaid:
        yield f"the class has no field momentum, of {', '.join(unsaid)}"
    for norm in case.norms:
        momentum = _momentum(case, norm) if norm.kind == "BatchNorm" else None
        if momentum is None or "count" in norm.values or not norm.updated:
            continue  # of the start nothing is left where updates are counted
        left = momentum**case.steps
        if case.steps > 0 and left > START_LEFT:
            best = START_LEFT ** (1 / case.steps)
            yield Finding(
                "momentum-too-slow",
                norm.path,
                f"after {case.steps} steps of momentum {momentum:g} its statistics are"
                f" still {left:.0%} those of the start, 0 and 1",
                f"Pass momentum={math.floor(best * 100) / 100:g} or less, or"
                " debias=True of normjax",
                "warning",
            )


@_check_for("few-values", "call")
def _few(case: Case) -> Iterator[Finding | str]:
    synced = []
    for norm in case.norms:
        shapes = [c.shape for c in norm.calls if not c.running]
        if norm.kind != "BatchNorm" or not shapes:
            continue
        if _field(norm, "axis_name") is not None:
            synced.append(norm.path)
            continue
        shape = min(shapes, key=lambda s: _values(norm, s))
        n = _values(norm, shape)
        if n < VALUES:
            yield Finding(
                "few-values",
                norm.path,
                f"{n} value{'s' * (n != 1)} for each mean and var, x of shape {shape}"
                + (": what it returns is its bias" if n == 1 else ""),
                f"Use batches of {VALUES} values or more, sync devices with axis_name=,"
                " or take GroupNorm",
                "error" if n == 1 else "warning",
            )
    if synced:
        yield f"how many devices sync is not known here, of {', '.join(synced)}"


@_check_for("bias-before-norm", "call")
def _bias(case: Case) -> Iterator[Finding | str]:
    for norm in case.norms:
        for layer in dict.fromkeys(c.after for c in norm.calls if c.after):
            yield Finding(
                "bias-before-norm",
                norm.path,
                f"the bias of {'/'.join(layer)} right before it changes nothing, since"
                " the mean is taken off",
                f"Pass use_bias=False to {'/'.join(layer)}",
                "warning",
            )


@_check_for("norm-decayed", "optimizer")
def _decay(case: Case) -> Iterator[Finding | str]:
    places = {(*n.place, k) for n in case.norms for k in ("scale", "bias")}
    decayed = _decayed(_transformation(case.optimizer), case.params, places)
    if isinstance(decayed, str):
        yield decayed
        return
    for norm in case.norms:
        names = [k for k in ("scale", "bias") if (*norm.place, k) in decayed]
        if names:
            yield Finding(
                "norm-decayed",
                norm.path,
                f"the optimizer moves {' and '.join(names)} where their gradients are"
                " zero",
                "Pass mask=tools.decay_mask(params, tools.find_norms(...)) to what"
                " decays weights",
                "warning",
            )


def _transformation(optimizer: Any) -> Any:
    tx = getattr(optimizer, "tx", optimizer)
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise _check.error(
            TypeError,
            "doctor",
            "optimizer must be an optax transformation or an nnx.Optimizer",
            f"{type(optimizer).__name__}",
            "Pass optax.adamw(...), say",
        )
    return tx


def _decayed(tx: Any, params: Any, places: set) -> set[tuple[str, ...]] | str:
    """Which parameters of some places an optimizer moves, whose gradients are zero.

    Or why it cannot be asked.

    Moves that are the same for parameters of 0 and of 1 are of noise, not of decay; and
    some optimizers divide by gradients. The arrays are small ones of the same rank:
    what counts are their places and ranks. In float64 no decay is as small as rounding.
    """

    def filled(value: float) -> Any:
        small = [
            jnp.full([min(n, 2) for n in jnp.shape(a)], value, _wide_dtype(a))
            for a in jax.tree.leaves(params)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), small)

    def update(state: Any, p: Any) -> tuple[Any, Any]:
        moves, new = tx.update(filled(0), state, p)
        return moves, jax.tree.map(_as, new, state)

    def probed(carry: tuple) -> tuple:
        i, states, moved = carry
        both = [update(s, filled(v)) for v, s in enumerate(states)]
        moves = [models.flat(of) for of, _ in both]
        moved = {
            path: before | _differ(moves[0][path], moves[1][path])
            for path, before in moved.items()
        }
        return i + 1, [state for _, state in both], moved

    def goes_on(carry: tuple) -> jax.Array:
        i, _, moved = carry
        return (i < PROBES) & ~jnp.stack([*moved.values()]).all()

    with jax.enable_x64(True):
        try:
            states = [jax.tree.map(jnp.asarray, tx.init(filled(v))) for v in (0, 1)]
            moved = {k: jnp.bool_(False) for k in models.flat(params) if k in places}
            if not moved:
                return set()
            run = jax.jit(lambda *carry: jax.lax.while_loop(goes_on, probed, carry))
            _, _, moved = run(0, states, moved)
        # Whatever it is made of may raise anything.
        except Exception as fault:
            said = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
            return f"the optimizer does not take gradients and parameters alone: {said}"
    return {path for path, of in moved.items() if of}


def _wide_dtype(a: Any) -> Any:
    dtype = jnp.result_type(a)
    return jnp.promote_types(dtype, jnp.float64) if _is_inexact(dtype) else dtype


def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _as(new: Any, old: Any) -> Any:
    """A state in the dtype that it had, as a loop needs it."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def _differ(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether moves differ by more than the rounding of parameters of 1."""
    return (jnp.isfinite(a) & jnp.isfinite(b) & (jnp.abs(a - b) > ROUNDING)).any()


@_check_for("half-precision", "statistics")
def _half(case: Case) -> Iterator[Finding | str]:
    for norm in case.norms:
        dtypes = {k: norm.values[k].dtype for k in ("mean", "var") if k in norm.values}
        half = {k: d for k, d in dtypes.items() if d.itemsize < 4}
        if not half:
            continue
        what = ", ".join(f"{k} is kept in {d}" for k, d in half.items())
        momentum = _momentum(case, norm)
        if momentum is not None and momentum < 1:
            eps = max(float(jnp.finfo(d).eps) for d in half.values())
            what += (
                f"; with momentum {momentum:g} a batch that is less than"
                f" {eps / 2 / (1 - momentum):.0%} off changes nothing"
            )
        yield Finding(
            "half-precision",
            norm.path,
            what,
            "Keep them in float32: force_float32_reductions=True, and no cast of"
            " batch_stats with the weights",
            "error",
        )


@_check_for("group-of-one", "call")
def _one(case: Case) -> Iterator[Finding | str]:
    hidden = [n.path for n in case.norms if n.calls and _hides_groups(n)]
    if hidden:
        yield f"the class has no field num_groups, of {', '.join(hidden)}"
    for norm in case.norms:
        if norm.kind in (None, "BatchNorm") or norm.path in hidden:
            continue  # few-values
        for shape in {call.shape for call in norm.calls}:
            if _values(norm, shape) == 1:
                only = "sign of x" if norm.kind == "RMSNorm" else "bias alone"
                yield Finding(
                    "group-of-one",
                    norm.path,
                    f"one value for each mean, x of shape {shape}: what it returns is"
                    f" the {only}",
                    "Take fewer groups, or normalize where there is space or more"
                    " features",
                    "error",
                )


@_check_for("mask-unused", "call")
def _mask(case: Case) -> Iterator[Finding | str]:
    for norm in case.norms:
        plain = [c for c in norm.calls if not c.masked and (c.updates or not c.running)]
        for call in dict.fromkeys(plain):
            axes = reduced(norm, call.shape)
            for axis, (what, (n, shape)) in enumerate(
                (k, case.padding.get(k, (0, None))) for k in ("samples", "positions")
            ):
                if what == "positions" and len(call.shape) != 3:
                    continue  # of [N, T, C] alone: images are [N, H, W, C]
                if n and axis in axes and call.shape[: axis + 1] == shape:
                    yield Finding(
                        "mask-unused",
                        norm.path,
                        f"{n} {what} at the end of the batch are all zero, padding it"
                        " seems, and count in its moments",
                        "Pass mask=, True where values are real, to the norm's call;"
                        " tools.pad_batch returns one",
                        "warning",
                    )
