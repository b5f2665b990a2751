"""A linen model, whose batch norms merge what they see."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from normjax import _check, _module, linen
from normjax.tools.merging import (
    Merged,
    Path,
    Sweep,
    check_called,
    fields_of,
    values_per_sample,
)
from normjax.tools.models import kind_of, substituted
from normjax.tools.replace_linen import known

NAME = "recalibrate"
MERGED = "merged"  # the variable beside mean and var


class BatchNorm(linen.BatchNorm):
    """Stands in for a batch norm: merges its moments, and leaves its statistics."""

    @nn.compact
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        momentum: Any = None,
    ) -> jax.Array:
        """Normalizes ``x``, by the statistics that ``normalize_with`` says."""
        if not self.is_mutable_collection("batch_stats"):
            raise _no_updates("an apply in which batch_stats is not mutable")
        x = _check.inexact("BatchNorm", x)
        axes = _module.flax_axes("BatchNorm", self.axis, x.ndim, "axis")
        variables = linen._statistics(self, x, axes)
        y, m = _module.batch_norm(
            x,
            _module.Statistics(variables["mean"].value, variables["var"].value),
            self.normalize_with == "running",
            True,
            feature_axis=axes,
            virtual_batch_size=self.virtual_batch_size,
            **linen._arguments(self, x, axes, mask),
        )
        merged: Any = self.variable("batch_stats", MERGED)
        merged.value = merged.value.add(m, values_per_sample(x.shape, axes))
        return y


def _no_updates(got: str) -> Exception:
    return _check.error(
        TypeError,
        NAME,
        "apply must return (outputs, updates), with batch_stats among the updates",
        got,
        'Return model.apply(variables, batch, mutable=["batch_stats"])',
    )


def _found(tree: Any, name: str, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What stands under a name wherever mean and var do, with the paths."""
    if not isinstance(tree, Mapping):
        return
    if "mean" in tree and "var" in tree and not isinstance(tree["mean"], Mapping):
        yield path, tree.get(name)
    for key, value in tree.items():
        yield from _found(value, name, (*path, key))


def _with(tree: Any, changes: Mapping[Path, Mapping], path: Path = ()) -> Any:
    """The tree with more, or with other, entries at some of its paths."""
    if not isinstance(tree, Mapping):
        return tree
    same_kind: Any = type(tree)
    below = {k: _with(v, changes, (*path, k)) for k, v in tree.items()}
    return same_kind({**below, **changes.get(path, {})})


def sweep_of(
    apply: Callable, variables: Any, normalize_with: str, number: int
) -> Sweep:
    """Makes a sweep of a linen model, given as its apply and its variables."""
    collection = variables.get("batch_stats", {})
    old = {
        path: _module.Statistics(
            *(dict(_found(collection, name))[path] for name in ("mean", "var", "count"))
        )
        for path, _ in _found(collection, "mean")
    }
    called: dict[Path, Any] = {}
    others: set[Path] = set()  # of modules whose mean and var are their own matter

    def swap(module: Any) -> Any:
        if kind_of(module) != "BatchNorm":
            others.add(module.path)
            return None
        names = set(linen.BatchNorm.__dataclass_fields__) - {"parent", "name"}
        fields = fields_of(NAME, module.path, module, names, normalize_with)
        if module.path not in old:
            raise _module.missing_statistics(module.path, "mean")
        called[module.path] = module
        return BatchNorm(**fields, parent=module.scope.rewound())

    def step(merged: dict, rest: Any, variables: Any, batch: Any) -> tuple[dict, Any]:
        given = {(): {"batch_stats": _with(variables["batch_stats"], beside(merged))}}
        returned = apply(_with(variables, given), batch)
        check_called(NAME, old, called, others)
        updates = returned[1] if isinstance(returned, tuple) else None
        if not isinstance(updates, Mapping):
            raise _no_updates(f"a result of type {type(returned).__name__}")
        found = dict(_found(updates.get("batch_stats"), MERGED))
        if not all(isinstance(found.get(path), Merged) for path in merged):
            raise _no_updates(f"updates of {sorted(updates)}, without all of them")
        return {path: found[path] for path in merged}, rest

    def beside(merged: Mapping[Path, Merged]) -> dict:
        return {path: {MERGED: m} for path, m in merged.items()}

    def rebuilt(new: Mapping[Path, Any]) -> Any:
        changes = {
            path: {k: a for k, a in s._asdict().items() if a is not None}
            for path, s in new.items()
        }
        return _with(variables, {(): {"batch_stats": _with(collection, changes)}})

    return Sweep(
        context=lambda: substituted(swap, first=known),
        old=old,
        merged={path: Merged.empty(s.mean, number) for path, s in old.items()},
        rest=(),
        fixed=variables,
        step=step,
        by_path=lambda merged: merged,
        called=called,
        rebuilt=rebuilt,
    )
