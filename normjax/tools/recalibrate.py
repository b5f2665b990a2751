"""Population statistics: those of all the data, instead of an average over time."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from normjax import _check, _module, _moments, _numbers
from normjax.tools.kinds import takes_kinds
from normjax.tools.looks import aligned
from normjax.tools.merging import Merged, Path, Sweep, is_mapped
from normjax.tools.models import check_concrete, variables_of

_NAME = "recalibrate"
_sweeps = itertools.count(1)


class Moved(NamedTuple):
    """How far the running statistics of a norm moved.

    Attributes:
      path: names from the model down to the norm.
      values: how many values were counted for a feature; the fewest of all features.
      shift: how far the means moved, in standard deviations of the new statistics; the
        root mean square over the features.
      most: that of the feature whose mean moved most.
      ratio: the new standard deviations over the old ones: the least and the largest.

    Example:
      >>> from normjax import tools
      >>> str(tools.Moved(("block", "norm"), 4096, 0.25, 1.5, (0.5, 2.0)))
      'block/norm: means moved by 0.25 std, at most 1.5; std 0.5 to 2 times the old'
    """

    path: tuple
    values: int
    shift: float
    most: float
    ratio: tuple[float, float]

    def __str__(self) -> str:
        """Says it in words."""
        low, high = self.ratio
        return (
            f"{_joined(self.path)}: means moved by {self.shift:.3g} std, at most"
            f" {self.most:.3g}; std {low:.3g} to {high:.3g} times the old"
        )


class Recalibrated(NamedTuple):
    """What `recalibrate` returns.

    Attributes:
      variables: as they came in, with other running statistics; for nnx the model.
      moved: for each norm, in the order of the calls, how far its statistics moved.

    Example:
      >>> from normjax import tools
      >>> moved = tools.Moved(("norm",), 8, 0.25, 1.5, (0.5, 2.0))
      >>> print(tools.Recalibrated({}, [moved]).table())
      norm  values a feature  shift of the mean, std  at most  ratio of std
      norm                 8                    0.25      1.5      0.5 to 2
    """

    variables: Any
    moved: list[Moved]

    def table(self) -> str:
        """Returns a table of what moved, a line for each norm.

        Example:
          >>> from normjax import tools
          >>> print(tools.Recalibrated({}, []).table())
          norm  values a feature  shift of the mean, std  at most  ratio of std
        """
        title = "shift of the mean, std"
        rows = [["norm", "values a feature", title, "at most", "ratio of std"]]
        for m in self.moved:
            floats = [f"{a:.3g}" for a in (m.shift, m.most, *m.ratio)]
            ratio = " to ".join(floats[2:])
            rows.append([_joined(m.path), str(m.values), *floats[:2], ratio])
        return aligned(rows)


@takes_kinds
def recalibrate(
    apply: Callable,
    variables: Any,
    batches: Iterable,
    *,
    prior: float | None = None,
    normalize_with: Literal["batch", "running"] = "batch",
    progress: bool = True,
    kinds: Mapping[type, str | None] | None = None,
) -> Recalibrated:
    """Replaces the running statistics of a model by those of data, in one sweep.

    The moments of all batches are merged, exactly: over the sizes ``n_b`` of batches of
    any sizes, or what their masks count,

        mean = sum(n_b * mean_b) / n
        var  = sum(n_b * (var_b + (mean_b - mean)**2)) / n

    as if the values that each norm saw had been there at once: precise batch norm,
    https://arxiv.org/abs/2105.07576. For weights that the statistics do not follow:
    after an average of weights (EMA, SWA), quantization, fine-tuning, a short training.

    With ``prior``, for data of another domain (https://arxiv.org/abs/2006.16971), the
    old statistics count as so many samples, against n that the norm saw:

        mean = (prior * old_mean + n * mean) / (prior + n)
        var  = (prior * old_var + n * var) / (prior + n)

    None leaves nothing of the old ones (https://arxiv.org/abs/1603.04779).

    Args:
      apply: for linen ``apply(variables, batch) -> (outputs, updates)``, as
        ``model.apply(variables, batch, mutable=["batch_stats"])`` returns them; for nnx
        ``call(model, batch)``. Every batch norm of Flax or normjax in it is part of the
        sweep, whether called to train or not. It is compiled, once for each shape.
      variables: the variables ``{"params": ..., "batch_stats": ...}``, or for nnx the
        model. They do not change.
      batches: what ``apply`` takes, one after the other: arrays of any sizes, on one
        device or sharded over a mesh.
      prior: how many samples the old statistics count as. None: they do not count.
      normalize_with: by which statistics norms normalize on the way: "batch", that of
        each batch, or "running", the old ones.
      progress: whether to show a progress bar, where tqdm is installed.
      kinds: which norms classes of your own are, as of `find_norms`. Such a batch norm
        is taken to compute what normjax's computes, with the fields that it has.

    Returns:
      The variables with new statistics, of the same structure, dtypes and shardings;
      and by norm, how far they moved. ``batch_stats/count`` becomes the number of
      batches, added to the old one where there is a prior.

    Raises:
      TypeError: if apply does not return updates, is compiled for its arguments
        already, or calls a subclass of batch norm with a call of its own; or variables
        or batches are none, or traced.
      ValueError: if there are no running statistics, no batches, or nothing in them
        counts; a norm is not called, sees values that are not finite, or is mapped by
        ``vmap`` where its statistics are not.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import linen, tools
      >>> model = linen.BatchNorm(use_running_average=False)
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[8.0]])]
      >>> variables = {
      ...     "params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
      ...     "batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)},
      ... }
      >>> def apply(variables, x):
      ...     return model.apply(variables, x, mutable=["batch_stats"])
      >>> found = tools.recalibrate(apply, variables, batches, progress=False)
      >>> found.variables["batch_stats"]["mean"]
      Array([4.], dtype=float32)
      >>> found.variables["batch_stats"]["var"].round(1)
      Array([8.7], dtype=float32)
    """
    _check_arguments(apply, batches, prior, normalize_with)
    check_concrete(_NAME, variables_of(variables))
    sweep = _sweep_of(apply, variables, normalize_with)
    if prior or normalize_with == "running":
        _check_old(sweep)
    merged = _swept(sweep, batches, progress)
    return _settled(sweep, merged, prior)


def _check_arguments(apply: Any, batches: Any, prior: Any, normalize_with: Any) -> None:
    """Refuses what cannot be meant."""
    if isinstance(apply, jax.stages.Compiled):
        raise _check.error(
            TypeError,
            _NAME,
            "apply is traced with other batch norms in it, and must not be compiled for"
            " its arguments already",
            "what lower(...).compile() returns",
            "Pass the function that was compiled",
        )
    if isinstance(batches, Mapping | str | bytes) or hasattr(batches, "dtype"):
        raise _check.error(
            TypeError,
            _NAME,
            "batches must be an iterable of batches",
            f"a single {type(batches).__name__}",
            "Pass [batch]",
        )
    if prior is not None and not (prior >= 0 and math.isfinite(prior)):
        raise _check.error(
            ValueError,
            _NAME,
            "prior is a number of samples, 0 or more",
            f"prior={prior}",
            "Pass prior=16, say, or None",
        )
    if normalize_with not in ("batch", "running"):
        raise _check.error(
            ValueError,
            _NAME,
            'normalize_with must be "batch" or "running"',
            f"normalize_with={normalize_with!r}",
            'Leave it out for "batch"',
        )


def _sweep_of(apply: Callable, variables: Any, normalize_with: str) -> Sweep:
    """Makes a sweep of a model of either system."""
    number = next(_sweeps)
    if isinstance(variables, Mapping):
        from normjax.tools.sweep_linen import sweep_of as of_linen

        sweep = of_linen(apply, variables, normalize_with, number)
        got = f"variables of {sorted(variables)}"
    else:
        from normjax.tools.models import system_of

        if system_of(_NAME, variables) == "linen":
            raise _check.error(
                TypeError,
                _NAME,
                "a linen model is given as its apply and its variables",
                f"a {type(variables).__name__}",
                'Pass {"params": params, "batch_stats": batch_stats}',
            )
        from normjax.tools.sweep_nnx import sweep_of as of_nnx

        sweep = of_nnx(apply, variables, normalize_with, number)
        got = f"a {type(variables).__name__} without a BatchNorm"
    if not sweep.old:
        raise _check.error(
            ValueError,
            _NAME,
            "there must be running statistics, a mean beside a var in batch_stats",
            got,
            "Pass the variables of a model with batch norms, batch_stats among them",
        )
    return sweep


def _check_old(sweep: Sweep) -> None:
    """Refuses old statistics that are to have a part, and are not finite."""
    for path, old in sweep.old.items():
        for name in ("mean", "var"):
            if not bool(jnp.isfinite(getattr(old, name)).all()):
                raise _check.error(
                    ValueError,
                    _NAME,
                    'statistics must be finite for a prior or normalize_with="running"',
                    f"NaN or infinity in {_joined((*path, name))}",
                    "Recalibrate without either first",
                )


_END = object()


def _swept(sweep: Sweep, batches: Iterable, progress: bool) -> dict[Path, Merged]:
    """Runs through the batches once; returns what was merged, by path."""
    left = iter(_shown(batches, progress))
    batch = next(left, _END)
    if batch is _END:
        raise _check.error(
            ValueError,
            _NAME,
            "batches must have one batch at least",
            "none",
            "Pass a new iterator, if this one was used before",
        )

    merged, shardings = _placed(sweep.merged, batch)
    program = _program(sweep, shardings)
    rest, number = sweep.rest, 0
    while batch is not _END:
        _check_batch(batch, number)
        with sweep.context():  # which is not that of what makes the batches
            merged, rest, finite = program(merged, rest, sweep.fixed, batch)
        # The next batch is fetched while the device works on this one.
        following = next(left, _END)
        _check_finite(sweep, np.asarray(finite), number, batch)
        batch, number = following, number + 1
    return sweep.by_path(merged)


def _check_batch(batch: Any, number: int) -> None:
    """Refuses a batch with what no compiled program takes."""
    check_concrete(_NAME, batch)
    for path, a in jax.tree_util.tree_leaves_with_path(batch):
        try:
            jax.typeof(a)
        except TypeError as wrong:
            raise _check.error(
                TypeError,
                _NAME,
                "batches must be of arrays and numbers, which are traced",
                f"a value of type {type(a).__name__} in"
                f" {jax.tree_util.keystr(path) or 'place'} of batch {number}, counted"
                " from 0",
                "Leave it out of the batches, or let apply have it from elsewhere",
            ) from wrong


def _program(sweep: Sweep, shardings: Any = None) -> Callable:
    """A step that says, too, which of the norms have merged finite values alone."""

    def step(merged: Any, rest: Any, fixed: Any, batch: Any) -> tuple:
        merged, rest = sweep.step(merged, rest, fixed, batch)
        for path, m in sweep.by_path(merged).items():
            if m.mean.shape != jnp.shape(sweep.old[path].mean):
                raise is_mapped(_NAME, path, f"moments of shape {m.mean.shape}")
        finite = [
            jnp.isfinite(m.mean + m.var + m.count).all()
            for m in sweep.by_path(merged).values()
        ]
        return merged, rest, jnp.stack(finite)

    # What is merged is donated, and so takes no memory twice.
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _shown(batches: Iterable, progress: bool) -> Iterable:
    """The batches, with a progress bar where that is wanted and tqdm is there."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return batches
    return tqdm(batches, desc=_NAME, unit="batch")


def _placed(merged: Any, batch: Any) -> tuple[Any, Any]:
    """What is to be merged, and where the results of a step stay.

    On the mesh of the statistics, or else of the batch, if there is one: the program
    is then compiled once.
    """
    shardings = [getattr(a, "sharding", None) for a in jax.tree.leaves((merged, batch))]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    if not meshes:
        return merged, None
    on_all = NamedSharding(meshes[0], PartitionSpec())
    kept = jax.tree.map(
        lambda a: a.sharding if isinstance(a.sharding, NamedSharding) else on_all,
        merged,
    )
    return jax.device_put(merged, kept), (kept, None, on_all)


def _check_finite(sweep: Sweep, finite: np.ndarray, number: int, batch: Any) -> None:
    """Refuses a batch after which what is merged is not finite."""
    if finite.all():
        return
    bad = {p for p, ok in zip(sweep.old, finite, strict=True) if not ok}
    first = next(path for path in sweep.called if path in bad)
    where = [
        jax.tree_util.keystr(path) or "it"
        for path, a in jax.tree_util.tree_leaves_with_path(batch)
        if jnp.issubdtype(jnp.result_type(a), jnp.inexact)
        and not bool(jnp.isfinite(a).all())
    ]
    found = f"NaN or infinity in {', '.join(where)}" if where else "finite itself"
    raise _check.error(
        ValueError,
        _NAME,
        "what a norm is given must be finite, where it counts",
        f"batch {number}, counted from 0, {found}; the first norm that is not given"
        f" finite values is {_joined(first)}",
        "Leave that batch out, or mask it; nothing has changed"
        if where
        else "Look at the weights before that norm; nothing has changed",
    )


def _settled(
    sweep: Sweep, merged: dict[Path, Merged], prior: float | None
) -> Recalibrated:
    """Turns what was merged into statistics and a report."""
    paths = [path for path in sweep.called if path in sweep.old]
    for path in paths:
        if not np.asarray(merged[path].count).any():
            raise _check.error(
                ValueError,
                _NAME,
                "batches must have values that count for each norm",
                f"{_joined(path)}, whose masks left out everything",
                "Pass masks that are True where a value counts",
            )
    new, moved = {}, []
    for path in paths:
        norm, old = sweep.called[path], sweep.old[path]
        variance = getattr(norm, "running_variance", "biased")
        found, (values, *floats) = _statistics(
            merged[path], old, prior or None, epsilon=norm.epsilon, variance=variance
        )
        new[path] = jax.tree.map(_like, found, old)
        shift, most, low, high = map(float, floats)
        moved.append(Moved(path, int(values), shift, most, (low, high)))
    return Recalibrated(sweep.rebuilt(new), moved)


@functools.partial(jax.jit, static_argnames=("epsilon", "variance"))
def _statistics(
    merged: Merged,
    old: _module.Statistics,
    prior: jax.Array | None,
    *,
    epsilon: float,
    variance: str,
) -> tuple[_module.Statistics, tuple]:
    """The new statistics of a norm, and how far they are from the old ones.

    What never counted stays as it is.
    """
    dtype = merged.var.dtype
    old_mean = _numbers.widened(old.mean, dtype)
    old_var, updates = old.var.astype(dtype), merged.updates
    mean, var = merged.mean + merged.mean_rest, merged.var + merged.var_rest
    known = merged.count > 0
    known_var = known
    if variance == "unbiased":  # of a single value there is none
        moments = _moments.Moments(merged.count, mean, var, squares=merged.squares)
        var, known_var = _moments.unbiased(moments)
    if prior is not None:
        prior = prior.astype(dtype)
        share = prior / (prior + merged.samples)
        mean = _numbers.product(share, old_mean) + _numbers.product(1 - share, mean)
        var = share * old_var + (1 - share) * var
        if old.count is not None:
            updates = updates + old.count.astype(dtype)
    mean = jnp.where(known, mean, old_mean)
    var = jnp.where(known_var, var, old_var)
    count = old.count
    if count is not None:
        count = jnp.where(known, updates, count.astype(dtype)).astype(count.dtype)
    std, old_std = jnp.sqrt(var + epsilon), jnp.sqrt(old_var + epsilon)
    shift, ratio = jnp.abs(mean - old_mean) / std, std / old_std
    report = (
        merged.count.min(),
        jnp.sqrt(jnp.square(shift).mean()),
        shift.max(),
        ratio.min(),
        ratio.max(),
    )
    new = _module.Statistics(
        mean.astype(old.mean.dtype), var.astype(old.var.dtype), count
    )
    return new, report


def _like(new: jax.Array, old: Any) -> Any:
    """Puts an array where the old one is."""
    if not isinstance(old, jax.Array):
        return np.array(new)  # which may be written to
    if not old.committed:  # goes where others want it
        return jnp.asarray(np.asarray(new))
    return jax.device_put(new, old.sharding)


def _joined(path: Path) -> str:
    return "/".join(map(str, path)) or "the model itself"
