"""An nnx model, whose batch norms merge what they see."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors
from flax import nnx as flax_nnx

from normjax import _check, _module, nnx
from normjax.tools.merging import (
    Merged,
    Path,
    Sweep,
    check_called,
    fields_of,
    is_mapped,
    values_per_sample,
)
from normjax.tools.models import (
    Norm,
    kind_of,
    nnx_copy,
    nnx_modules,
    nnx_replaced,
)
from normjax.tools.replace_nnx import called_as, known_fields
from normjax.tools.replace_rules import is_own

NAME = "recalibrate"


class MergedStat(flax_nnx.BatchStat):
    """What a norm merges, beside its statistics."""


class BatchNorm(nnx.BatchNorm):
    """Stands in for a batch norm: merges its moments, and leaves its statistics."""

    merged: MergedStat
    note: Callable[[], None]

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        momentum: Any = None,
    ) -> jax.Array:
        """Normalizes ``x``, by the statistics that ``normalize_with`` says."""
        self.note()
        x = _check.inexact("BatchNorm", x)
        axes = _module.flax_axes("BatchNorm", self.axis, x.ndim, "axis")
        running = _module.Statistics(self.mean[...], self.var[...])
        arguments = self._arguments(x, axes, mask, *running[:2])
        y, m = _module.batch_norm(
            x,
            _module.along(running, [x.shape[a] for a in axes]),
            self.normalize_with == "running",
            True,
            feature_axis=axes,
            virtual_batch_size=self.virtual_batch_size,
            **arguments,
        )
        per_sample = values_per_sample(x.shape, axes)
        self.merged.set_value(self.merged.get_value().add(m, per_sample))
        return y


def _stand_in(norm: Any, path: Path, normalize_with: str, number: int) -> BatchNorm:
    """A norm with the fields and the variables of another one."""
    names = set(inspect.signature(nnx.BatchNorm.__init__).parameters)
    own: Any = BatchNorm
    if is_own(norm):
        words = tuple(map(str, path))
        fields = known_fields(NAME, Norm(words, "BatchNorm", norm))
        fields |= {"normalize_with": normalize_with, "missing_axis": "ignore"}
        called: Any = type(norm)
        own = called_as(BatchNorm, called, NAME, words)
    else:
        fields = fields_of(NAME, path, norm, names, normalize_with)
    of = own(**fields, rngs=flax_nnx.Rngs(0))
    for name in ("scale", "bias", "mean", "var"):
        setattr(of, name, getattr(norm, name, None))
    of.merged = MergedStat(Merged.empty(norm.mean[...], number))
    return of


def sweep_of(call: Callable, model: Any, normalize_with: str, number: int) -> Sweep:
    """Makes a sweep of an nnx model, given as it is and with what calls it."""
    called: dict[Path, Any] = {}
    old: dict[Path, _module.Statistics] = {}

    def swap(path: Path, norm: Any) -> Any:
        if kind_of(norm) != "BatchNorm":
            return None
        count = getattr(norm, "count", None)
        variables = (norm.mean, norm.var, count)
        old[path] = _module.Statistics(
            *(None if v is None else v[...] for v in variables)
        )
        of = _stand_in(norm, path, normalize_with, number)
        of.note = lambda: called.setdefault(path, norm)
        return of

    copy = nnx_replaced(model, swap, NAME)
    random_state = flax_nnx.RngState
    split: Any = flax_nnx.split(copy, MergedStat, random_state, ...)
    graph, merged, random, others = split

    def step(merged: Any, random: Any, fixed: Any, batch: Any) -> tuple[Any, Any]:
        model = flax_nnx.merge(graph, merged, random, fixed)
        try:
            call(model, batch)
        except (ValueError, errors.TraceContextError) as wrong:
            # Of Flax, where what a norm merges cannot leave a transform.
            if not any(
                word in str(wrong) for word in (MergedStat.__name__, "'merged'")
            ):
                raise
            path = list(called)[-1] if called else ()
            raise is_mapped(NAME, path, "moments that cannot leave it") from wrong
        check_called(NAME, old, called)
        changed: Any = flax_nnx.state(model, MergedStat, random_state)
        return changed

    def by_path(merged: Any) -> dict[Path, Merged]:
        flat = flax_nnx.to_flat_state(merged)
        return {path[:-1]: variable.get_value() for path, variable in flat}

    def rebuilt(new: Mapping[Path, _module.Statistics]) -> Any:
        copy = nnx_copy(model)
        for path, norm in nnx_modules(copy):
            if path in new and kind_of(norm) == "BatchNorm":
                for name, value in new[path]._asdict().items():
                    if value is not None:
                        getattr(norm, name).set_value(value)
        return copy

    return Sweep(
        context=contextlib.nullcontext,
        old=old,
        merged=merged,
        rest=random,
        fixed=others,
        step=step,
        by_path=by_path,
        called=called,
        rebuilt=rebuilt,
    )
