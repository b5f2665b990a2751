"""The norms of a checkpoint, by the names and shapes of its arrays alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from normjax import _check
from normjax.tools import checkpoints, models

_ARRAYS = ("mean", "var", "count", "scale", "bias")
_NAME = re.compile(r"(batch|layer|rms|group|instance)_?norm", re.IGNORECASE)
_KINDS = {
    "batch": "BatchNorm",
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "group": "GroupNorm",
    "instance": "InstanceNorm",
}
# The epsilon of batch norms: a smaller variance hardly normalizes.
_EPSILON = 1e-5

Range = tuple[float, float, float]


class Row(NamedTuple):
    """A norm of a checkpoint, as far as its arrays tell.

    Attributes:
      path: names from the top of the variables, without those of collections.
      kind: "BatchNorm" where there are running statistics, else what the name says,
        "LayerNorm" and so on, or "norm" where it says nothing.
      features: how many channels; of a stack of layers all of them.
      mean: the smallest, the median and the largest of the running mean; None where
        there is none, as in the others.
      var: of the running variance.
      scale: of the scale.
      bias: of the bias.
      updates: how many the running statistics had, where that is kept.
      flags: what to look into, in words: not finite, never updated, variances below the
        epsilon of batch norms or below zero, a scale of 0, half precision.

    Example:
      >>> import numpy as np
      >>> from normjax import tools
      >>> stats = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
      >>> (row,) = tools.norm_table({"batch_stats": stats})
      >>> row.kind, row.features, row.flags
      ('BatchNorm', 3, ('never updated',))
    """

    path: tuple[str, ...]
    kind: str
    features: int
    mean: Range | None
    var: Range | None
    scale: Range | None
    bias: Range | None
    updates: float | None
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The path in one word; the kind for a norm that is all there is."""
        return "/".join(self.path) or self.kind


def norm_table(variables: Any) -> list[Row]:
    """Tells the norms of variables by their names alone, with no call of a model.

    A norm is what has a ``mean`` beside a ``var``, or a ``scale`` with nothing but a
    ``bias`` beside it. Collections ``params`` and ``batch_stats`` are read as one,
    wherever in the tree they are; what an optimizer keeps is left out.

    Args:
      variables: linen's variables, in boxes of partitioning too, an nnx model, its
        state or pure dictionary, or a checkpoint that has them somewhere within it;
        arrays that numpy can read.

    Returns:
      One `Row` for each norm, sorted by path, numbers in names by their size.

    Raises:
      TypeError: if variables is a linen model, which holds none.
      ValueError: if there is no norm in it, or a mean and a var of two shapes.

    Example:
      >>> import numpy as np
      >>> from normjax import tools
      >>> params = {"LayerNorm_0": {"scale": np.array([1.0, 3.0, 2.0])}}
      >>> (row,) = tools.norm_table({"params": params})
      >>> row.path, row.kind, row.scale
      (('LayerNorm_0',), 'LayerNorm', (1.0, 2.0, 3.0))
    """
    nodes: dict[tuple, dict[str, np.ndarray]] = {}
    kernels = set()
    if models.is_linen(variables):
        raise _check.error(
            TypeError,
            "norm_table",
            "variables must be a tree of arrays or an nnx model",
            f"a linen {type(variables).__name__}, which holds none",
            "Pass what its init returned, trained",
        )
    tree = models.variables_of(variables)
    leaves = checkpoints.without_optimizer(dict(_arrays(tree, ())))
    for path, value in leaves.items():
        *node, name = path
        where = tuple(n for n in node if n not in ("params", "batch_stats"))
        if name in _ARRAYS and _is_number(value):
            nodes.setdefault(where, {})[name] = np.asarray(value)
        else:
            kernels.add(where)
    for path, arrays in nodes.items():
        shapes = [a.shape for name, a in arrays.items() if name in ("mean", "var")]
        if len(set(shapes)) > 1:
            raise _check.error(
                ValueError,
                "norm_table",
                "mean and var of a batch norm must have one shape",
                f"those of {'/'.join(path) or 'BatchNorm'} of shapes"
                f" {' and '.join(map(str, shapes))}",
                "Pass the statistics of one model",
            )
    rows = [
        _row(path, arrays)
        for path, arrays in nodes.items()
        if {"mean", "var"} <= set(arrays)
        or ({"mean", "var", "scale"} & set(arrays) == {"scale"} and path not in kernels)
    ]
    if not rows:
        raise _check.error(
            ValueError,
            "norm_table",
            "there must be a norm: mean beside var, or scale with at most bias",
            f"none among {len(nodes) + len(kernels)} modules",
            "Pass the variables, params and batch_stats",
        )
    return sorted(rows, key=lambda row: [_numbers(name) for name in row.path])


def _arrays(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple, Any]]:
    """The leaves of a tree with the names that lead to them."""
    if hasattr(tree, "replace_boxed"):  # a box of Flax around one array
        (tree,) = jax.tree.leaves(tree) or (None,)
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            # Beneath a variable of nnx there is its value.
            own = () if name == "value" and path else (str(name),)
            yield from _arrays(value, path + own)
    elif path and tree is not None:
        yield path, tree


def _is_number(value: Any) -> bool:
    return (
        hasattr(value, "dtype")
        and np.issubdtype(_wide(value).dtype, np.inexact)
        and np.size(value) > 0
    )


def _wide(value: Any) -> np.ndarray:
    """Half precision, which numpy has no name for, as float32; complex by size."""
    a = np.asarray(value)
    if np.iscomplexobj(a):
        return np.abs(a)
    return a.astype(np.float32) if a.dtype.itemsize == 2 else a


@np.errstate(all="ignore")  # what is not finite is told, and not warned of
def _row(path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Row:
    wide = {name: _wide(a) for name, a in arrays.items()}
    named = _NAME.findall("/".join(path))
    kind = _KINDS[named[-1].lower()] if named else "norm"
    return Row(
        path,
        "BatchNorm" if "mean" in arrays else kind,
        max(a.size for a in wide.values()),
        **{k: _range(wide.get(k)) for k in ("mean", "var", "scale", "bias")},
        updates=float(wide["count"].max()) if "count" in wide else None,
        flags=tuple(_flags(arrays, wide)),
    )


def _range(a: np.ndarray | None) -> Range | None:
    if a is None:
        return None
    return float(np.min(a)), float(np.median(a)), float(np.max(a))


def _flags(arrays: dict[str, np.ndarray], wide: dict[str, np.ndarray]) -> Iterator[str]:
    """What to look into, in words."""
    for name, a in wide.items():
        if bad := int(np.sum(~np.isfinite(a))):
            yield f"{bad} of {a.size} {name} not finite"
    if "var" in wide:
        var = wide["var"]
        if not wide["mean"].any() and (var == 1).all():
            yield "never updated"
        if below := int(np.sum(var < 0)):
            yield f"{below} of {var.size} variances below 0"
        if small := int(np.sum((var >= 0) & (var < _EPSILON))):
            yield f"{small} of {var.size} variances below {_EPSILON:g}"
        if arrays["var"].dtype.itemsize < 4:
            yield f"statistics in {arrays['var'].dtype}"
    if "scale" in wide and (none := int(np.sum(wide["scale"] == 0))):
        yield f"{none} of {wide['scale'].size} scales 0"


def _numbers(name: str) -> list:
    """A key that sorts names with numbers in them by the numbers: 2 before 10."""
    return [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", name)]


def rich_table(rows: Sequence[Row]) -> Any:
    """The rows as a table of rich, ranges from smallest to largest, no empty column."""
    rich = [_check.needed("inspect", "rich", f"rich.{m}") for m in ("table", "box")]
    table = rich[0].Table(box=rich[1].SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = {
        "norm": [row.name for row in rows],
        "kind": [row.kind for row in rows],
        "features": [str(row.features) for row in rows],
        **{
            name: [_words(getattr(row, name)) for row in rows]
            for name in ("mean", "var", "scale", "bias")
        },
        "updates": ["" if u is None else f"{u:g}" for u in (r.updates for r in rows)],
        "look into": [", ".join(row.flags) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    for name in columns:
        text = name in ("norm", "kind", "look into")
        style = "red" if name == "look into" else None
        table.add_column(name, justify="left" if text else "right", style=style)
    text = _check.needed("inspect", "rich", "rich.text").Text
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(text, cells))
    return table


def _words(r: Range | None) -> str:
    if r is None:
        return ""
    low, _, high = r
    return f"{low:.3g}" if low == high else f"{low:.3g}…{high:.3g}"
