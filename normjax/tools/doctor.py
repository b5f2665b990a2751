"""A model's norms looked over for what goes wrong with them, and what to type."""

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check
from normjax.tools import calls, checkpoints, checks, models
from normjax.tools.checks import Case, Finding, Patient
from normjax.tools.kinds import registered_kinds, takes_kinds
from normjax.tools.replace import with_known
from normjax.tools.replace_linen import Replaced


class Report(NamedTuple):
    """What `doctor` found, and what it could not look for.

    Attributes:
      findings: the faults, by kind.
      skipped: why a check was not made, or not of all norms, by the name of its fault.
      norms: how many norms were looked at.

    Example:
      >>> from normjax import tools
      >>> report = tools.Report((), {"norm-decayed": "needs optimizer="}, 2)
      >>> print(report)
      2 norms, 0 findings
      not checked norm-decayed: needs optimizer=
      >>> report.failed()
      False
    """

    findings: tuple[Finding, ...]
    skipped: dict[str, str]
    norms: int

    def failed(self, strict: bool = False) -> bool:
        """Whether there is an error among the findings; if strict, or a warning.

        Args:
          strict: whether a warning fails, too.

        Example:
          >>> from normjax import tools
          >>> tools.Report((), {}, 1).failed(strict=True)
          False
        """
        return any(strict or f.severity == "error" for f in self.findings)

    def __str__(self) -> str:
        """Says it in plain lines."""
        lines = [self._title(), *map(str, self.findings)]
        return "\n".join([*lines, *self._unchecked()])

    def _unchecked(self) -> list[str]:
        """What was not checked, in one line for each reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        return [f"not checked {', '.join(k)}: {why}" for why, k in reasons.items()]

    def _title(self) -> str:
        numbers = {"norm": self.norms, "finding": len(self.findings)}
        return ", ".join(f"{n} {k}{'s' * (n != 1)}" for k, n in numbers.items())

    def show(self) -> None:
        """Prints it, as a table where rich is installed.

        Example:
          >>> from normjax import tools
          >>> tools.Report((), {}, 1).show()
          1 norm, 0 findings
        """
        if not self.findings or importlib.util.find_spec("rich") is None:
            print(self)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("finding", "what", "what to type", title=self._title())
        for f in self.findings:
            style = {"error": "red", "warning": "yellow"}[f.severity]
            first = Text(f.name, style).append(f"\n{f.path or 'the model'}", "bold")
            table.add_row(first, Text(f.what), Text(f.todo), end_section=True)
        console = Console()
        console.print(table)
        for line in self._unchecked():
            console.print(Text(line, "dim"))


@takes_kinds
def doctor(
    model: Any,
    *args: Any,
    kinds: Mapping[type, str | None] | None = None,
    variables: Any = None,
    optimizer: Any = None,
    steps: int | None = None,
    momentum: float | None = None,
    step: Callable | None = None,
    stacked: bool = False,
    **kwargs: Any,
) -> Report:
    """Looks for what goes wrong with norms, and says what to type against it.

    A model is called twice in one compiled program, once as its arguments have it and
    once with running statistics in all batch norms; and 17 times more where outputs
    differ much, to learn what of it is chance. What it is given is never changed.
    The faults are in a table of the documentation, and a report names the checks that
    could not be made.

    Args:
      model: a linen or nnx module; or variables alone: of linen, an nnx state, or what
        a checkpoint holds, in which norms are known by a mean beside a var, or by a
        scale with at most a bias.
      *args: arguments of the model's call while training, a batch of data first. An nnx
        model is set to train, unless some of its batch norms are. None: what needs a
        call is not checked.
      variables: for linen: the variables.
      optimizer: an optax transformation or an ``nnx.Optimizer``, which is asked what it
        does to parameters of norms whose gradients are zero.
      steps: how many training steps there were.
      momentum: of the batch norms, the part of the OLD value, where ``model`` is
        variables alone.
      step: takes one training step, and is called once: for linen with variables, of
        which it returns those after it, with some entries of the doctor's own among
        their statistics; for nnx with a copy of the model, which it changes.
      stacked: whether ``model`` is variables whose arrays have the replicas along their
        first axis, as ``pmap`` returns them.
      kinds: which norms classes of your own are, as of `find_norms`. Such a batch norm
        is taken to compute what normjax's computes, with the fields that it has; what
        needs a field that it has not, is not checked.
      **kwargs: arguments of the model's call, by name; for linen also ``rngs``,
        ``method`` and ``mutable``, as its apply has them while training. What the model
        asks is mutable is that alone; without it, all its variables but ``params``.

    Returns:
      The report: findings, each with a name, the path, the facts and what to type.

    Raises:
      TypeError: if model is neither a module nor a tree, or an argument does not go
        with it.
      ValueError: if there is no norm, a batch norm's statistics are missing, or the
        batch is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> norm = {"mean": jnp.zeros(2), "var": jnp.array([1.0, jnp.nan])}
      >>> report = tools.doctor({"batch_stats": {"norm": norm}})
      >>> [(f.name, f.path, f.what) for f in report.findings]
      [('not-finite', 'norm', 'var is NaN or infinite in 1 of 2 channels (1)')]
    """
    _check.momentum("doctor", 0.0 if momentum is None else momentum)
    if steps is not None and steps < 0:
        raise _check.error(
            ValueError,
            "doctor",
            "steps, how many there were, must not be negative",
            f"steps={steps}",
            "Leave it out where it is not known",
        )
    if step is not None and not callable(step):
        raise _refused(
            "step must be a function that takes one training step",
            f"{type(step).__name__}",
            "Pass an argument of the model's that has this name by its place",
        )
    models.check_concrete("doctor", (args, kwargs, variables))
    given = {"momentum": momentum, "steps": steps, "optimizer": optimizer}
    if _is_module(model):
        if models.system_of("doctor", model) == "nnx":
            kinds = dict(registered_kinds())
            model = with_known("doctor", model, kinds, **calls.UNSAID)
        case = _of_model(model, args, kwargs, variables, step, stacked, given)
    else:
        case = _of_tree(model, args, kwargs, variables, step, stacked, given)
    findings, skipped = [], {}
    frozen = ", ".join(n.path for n in case.norms if n.frozen)
    for name, (need, check) in checks.CHECKS.items():
        if why := case.lacks(need):
            skipped[name] = why
            continue
        found = dict.fromkeys(check(case))  # what all replicas have is said once
        findings += [f for f in found if isinstance(f, Finding)]
        said = [why for why in found if isinstance(why, str)]
        unreached = [n.path for n in case.norms if not n.calls]
        if need in ("call", "outputs", "gradients") and unreached:
            said.append(f"the call does not reach {', '.join(unreached)}")
        if need in ("call", "outputs", "steps") and frozen:
            said.append(f"the call has running statistics normalize in {frozen}")
        if said:
            skipped[name] = "; ".join(said)
    return Report(tuple(findings), skipped, len({n.place for n in case.norms}))


# What is known.


def _is_module(model: Any) -> bool:
    of = [getattr(sys.modules.get(f"flax.{s}"), "Module", ()) for s in ("linen", "nnx")]
    return isinstance(model, tuple(of)) or isinstance(model, Replaced)


def _refused(rule: str, got: str, todo: str) -> Exception:
    return _check.error(TypeError, "doctor", rule, got, todo)


def _of_model(
    model: Any,
    args: tuple,
    kwargs: dict,
    variables: Any,
    step: Callable | None,
    stacked: bool,
    given: dict,
) -> Case:
    system = models.system_of("doctor", model)
    if stacked or given["momentum"] is not None:
        raise _refused(
            "stacked and momentum go with variables alone",
            f"stacked={stacked}, momentum={given['momentum']} and a model",
            "Leave them out, or pass the variables in place of the model",
        )
    if (system == "linen") != (variables is not None):
        raise _refused(
            "a linen model needs its variables, and an nnx model has them",
            f"a model of {system}, variables of {type(variables).__name__}",
            "Pass variables=model.init(...), trained, or leave them out for nnx",
        )
    mutable = None
    if system == "linen":
        kwargs = dict(kwargs)
        mutable = kwargs.pop("mutable", None)
    if system == "linen" and "capture_intermediates" in kwargs:
        raise _refused(
            "the arguments must be those of the model's call, with rngs, method and"
            " mutable of its apply",
            "capture_intermediates",
            "Leave it out: nothing reads what it keeps",
        )
    if system == "linen" and not (args or kwargs):
        raise _refused(
            "a linen model is known by a call",
            "no arguments of it",
            "Pass those of its call while training, or the variables alone",
        )
    _finite_batch((args, kwargs))
    if system == "linen":
        variables, params, statistics = _linen_variables(variables)
    else:
        params, statistics = _nnx_variables(model)
    arrays = models.flat(params) | models.flat(statistics)
    stored = _in_tree(models.flat(statistics))
    _check_shapes(stored)
    measured, found = None, {}
    if args or kwargs:
        measured = calls.measure(model, variables, args, kwargs, mutable)
        found = measured.found
    if system == "nnx":
        found = {n.path: (n.kind, n.module) for n in models.find_norms(model)}
    norms = [
        Patient(path, *of, _of_path(arrays, path)) for path, of in found.items()
    ] + [norm for norm in stored if norm.place not in found]
    _check_some(norms, type(model).__name__)
    case = Case(norms, system, arrays, params, **given)
    if measured is not None:
        case.padding = _padding((args, kwargs))
        _enter(case, measured)
    if step is not None:
        _step(case, step, model, variables)
    return case


def _linen_variables(variables: Any) -> tuple[dict, Any, Any]:
    """The variables without boxes, their params and their statistics."""
    from flax.core import meta, unfreeze

    if not isinstance(variables, Mapping):
        raise _refused(
            "variables must be the dictionary that init returns",
            f"{type(variables).__name__}",
            'Pass {"params": params, "batch_stats": batch_stats}',
        )
    variables = dict(unfreeze(meta.unbox(variables)))
    return variables, variables.get("params", {}), variables.get("batch_stats", {})


def _nnx_variables(model: Any) -> tuple[Any, Any]:
    from flax import nnx

    return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


_OF_A_NORM = ("mean", "var", "count", "scale", "bias")


def _of_path(
    arrays: dict, path: tuple[str, ...], names: tuple[str, ...] = _OF_A_NORM
) -> dict[str, np.ndarray]:
    """The arrays of a path by name, on the host."""
    found = {name: arrays[*path, name] for name in names if (*path, name) in arrays}
    return {name: np.asarray(a) for name, a in jax.device_get(found).items()}


def _check_some(norms: list[Patient], got: str) -> None:
    if not norms:
        raise _check.error(
            ValueError,
            "doctor",
            "there must be a norm to look at",
            got,
            "Pass the model with a call that reaches its norms, or its variables whole,"
            " params and batch_stats",
        )


def _check_shapes(norms: list[Patient]) -> None:
    for norm in norms:
        shapes = {k: norm.values[k].shape for k in ("mean", "var") if k in norm.values}
        if len(set(shapes.values())) > 1:
            raise _check.error(
                ValueError,
                "doctor",
                "mean and var of a batch norm must have one shape",
                f"{norm.path}/mean of shape {shapes['mean']}, {norm.path}/var of shape"
                f" {shapes['var']}",
                "Pass the statistics of one model",
            )


def _enter(case: Case, measured: calls.Measured) -> None:
    """Enters what was seen and measured in a call."""
    statistics = models.flat(measured.statistics)
    slopes = models.flat(measured.slopes)
    case.called, case.finite = True, measured.finite
    case.samples, case.gaps = measured.samples, measured.gaps
    case.noise = measured.noise
    case.differentiated = measured.slopes is not None
    for norm in case.norms:
        if norm.place not in measured.seen:
            continue
        norm.calls = measured.seen[norm.place]
        norm.slopes = _of_path(slopes, norm.place, ("scale", "bias"))
        names = (calls.MEAN, calls.VAR, calls.UPDATES)
        if found := _of_path(statistics, norm.place, names):
            norm.batch = {"mean": found[calls.MEAN], "var": found[calls.VAR]}
            norm.updates = int(found[calls.UPDATES].max(initial=0))


def _step(case: Case, step: Callable, model: Any, variables: Any) -> None:
    """Takes a step, and enters what it left and how often it updated."""
    seen, before, after = calls.stepped(step, model, variables)
    before, after = models.flat(before), models.flat(after)
    for norm in case.norms:
        path = norm.place
        old, new = (_of_path(a, path, ("mean", "var")) for a in (before, after))
        if path not in seen or len(new) < 2:
            continue
        norm.stepped = seen[path]
        tried = any(call.updates for call in seen[path])
        if all(np.array_equal(old[k], new[k], equal_nan=True) for k in old):
            norm.after_step = "left" if tried else "same"
        if (*path, calls.UPDATES) in after:
            updates = np.asarray(after[*path, calls.UPDATES])
            norm.updates = int(updates.max(initial=0))


def _of_tree(
    tree: Any,
    args: tuple,
    kwargs: dict,
    variables: Any,
    step: Callable | None,
    stacked: bool,
    given: dict,
) -> Case:
    if not isinstance(tree, Mapping):
        raise _refused(
            "model must be a module of flax.linen or flax.nnx, or a tree of variables",
            f"{type(tree).__name__}",
            "Pass the model itself, its variables, or nnx.state(model)",
        )
    if args or kwargs or variables is not None or step is not None:
        raise _refused(
            "a tree of variables cannot be called",
            "a tree, and with it what goes with a model",
            "Pass the model in its place, with variables= for linen",
        )
    arrays = models.flat(tree)
    params = tree.get("params")
    norms = _in_tree(arrays)
    nothing = "no mean beside a var, no scale with at most a bias"
    _check_some(norms, f"{type(tree).__name__} of {sorted(tree)}, and {nothing}")
    _check_shapes(norms)
    if stacked:
        norms = [
            dataclasses.replace(n, values={k: a[i] for k, a in n.values.items()})
            for n in norms
            for i in range(min(len(a) for a in n.values.values()))
        ]
    return Case(norms, None, arrays, params, stacked=stacked, **given)


def _in_tree(arrays: dict) -> list[Patient]:
    """The norms of a tree, by the names of its arrays, which is all there is."""
    nodes: dict[tuple, dict] = {}
    for path, a in checkpoints.without_optimizer(arrays).items():
        if path and np.ndim(a) > 0:
            nodes.setdefault(path[:-1], {})[path[-1]] = np.asarray(jax.device_get(a))
    stats = {k: of for k, of in nodes.items() if {"mean", "var"} <= set(of)}
    others = {k: of for k, of in nodes.items() if "scale" in of and set(of) <= _AFFINE}
    norms = []
    for path, of in stats.items():
        other, place = _counterpart(path, of, others)
        norms.append(Patient(place, "BatchNorm", None, of | others.pop(other, {})))
    for path, of in others.items():
        place = tuple(name for name in path if name != "params")
        norms.append(Patient(place, None, None, of))
    return norms


_AFFINE = {"scale", "bias"}


def _counterpart(path: tuple, of: dict, others: dict) -> tuple[Any, tuple]:
    """The path of the scale and bias of statistics, and what is common to both.

    After "params" it goes on as the statistics' does after the name of their
    collection, which may be any; and of several it is the one that begins alike.
    """
    found = []
    for other, values in others.items():
        after = other[other.index("params") + 1 :] if "params" in other else None
        if after is None or values["scale"].shape != of["mean"].shape:
            continue
        if path[len(path) - len(after) :] == after != path:
            both = zip(path, other, strict=False)
            alike = [a for a, _ in itertools.takewhile(lambda ab: ab[0] == ab[1], both)]
            found.append((len(alike), len(after), other, (*alike, *after)))
    if not found:
        return None, tuple(name for name in path if name != "batch_stats")
    *_, other, place = max(found)
    return other, place


def _finite_batch(tree: Any) -> None:
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.inexact):
            continue
        if not np.isfinite(np.asarray(a)).all():
            raise _check.error(
                ValueError,
                "doctor",
                "the batch must be finite, so that what is not comes from the model",
                f"NaN or infinity in the argument {_argument(path)}",
                "Pass a batch of clean data",
            )


def _argument(path: tuple) -> str:
    """The name of an argument in (args, kwargs): its number, or its name."""
    _, name, *rest = path
    return f"{getattr(name, 'key', getattr(name, 'idx', None))}" + "".join(
        map(str, rest)
    )


def _padding(tree: Any) -> dict[str, tuple]:
    """Padding in arguments: zeros at the end, of samples and of positions.

    Samples at the end that are all zero, in all arguments together; or, in arrays
    [N, T] of integers and [N, T, C] of floats, positions at the end that are all zero,
    while none before is, not equally many in all samples, and two or more in some. Of
    tokens that means that 0, where it is one, is a word like others: it comes anywhere.
    """
    arrays = [a for a in jax.tree.leaves(tree) if _is_data(a)]
    batch = next((len(a) for a in arrays if a.ndim > 1), 0)
    there = [(a, np.asarray(a) != 0) for a in arrays if len(a) == batch]
    if not batch:
        return {}
    found: dict[str, tuple] = {}
    ends = [_zeros_at_end(of.reshape(1, batch, -1).any(-1))[0] for _, of in there]
    n = int(min(ends))
    if 0 < n < batch:
        found["samples"] = (n, (batch,))
    for a, of in there:
        if a.ndim != (2 if np.issubdtype(a.dtype, np.integer) else 3):
            continue
        of = of.reshape(*a.shape[:2], -1).any(-1)[: batch - n]
        at_end = _zeros_at_end(of)
        padded = len(set(at_end)) > 1 and max(at_end) > 1
        if padded and at_end.sum() == (~of).sum():
            found["positions"] = (int(at_end.sum()), a.shape[:2])
    return found


def _is_data(a: Any) -> bool:
    """Whether something is an array with an axis of samples; no random key is."""
    numeric = hasattr(a, "dtype") and (
        a.dtype == bool or jnp.issubdtype(a.dtype, jnp.number)
    )
    return numeric and np.ndim(a) > 0


def _zeros_at_end(there: np.ndarray) -> np.ndarray:
    """How many there are of what is False at the end of each row."""
    return np.cumprod(~there[:, ::-1], axis=1).sum(1)
