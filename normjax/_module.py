"""What the linen and the nnx modules share: from fields to arguments of a function."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _axes, _check, _norms
from normjax._moments import Moments, unbiased
from normjax._running import are_finite, blend, is_counted, one_more, part_of_new

_FLAGS = (
    "use_scale use_bias debias skip_nonfinite mask_is_weight update_statistics"
    " force_float32_reductions"
).split()
_MAPPING = ("a dictionary", lambda v: isinstance(v, Mapping), "{}")
# What a field must be, whether it is, and an example.
_KINDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "scale_init": ("a function", callable, "jax.nn.initializers.ones"),
    "bias_init": ("a function", callable, "jax.nn.initializers.zeros"),
    "promote_dtype": ("a function", callable, "flax.nnx.nn.dtypes.promote_dtype"),
    "scale_metadata": _MAPPING,
    "bias_metadata": _MAPPING,
    "num_features": (
        "an integer, the number of features of x",
        lambda v: _check.is_integer(v) and v >= 0,
        "x.shape[-1]",
    ),
}


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Refuses fields that are not of their kind, before anything is created by them.

    A flag that is None is False, as in Flax. The fields that a function's argument is
    made of are checked there.
    """
    for field in _FLAGS:
        if fields.get(field) is not None:
            _check.flag(name, field, fields[field])
    for field in ("dtype", "param_dtype"):
        if fields.get(field) is not None:
            _check.inexact_dtype(name, field, fields[field])
    for field, (kind, fits, example) in _KINDS.items():
        if field in fields and not fits(fields[field]):
            raise _check.error(
                TypeError,
                name,
                f"{field} must be {kind}",
                _check.shown(field, fields[field]),
                f"Pass {field}={example}, say",
            )


def flax_axes(name: str, axes: _axes.Axes, ndim: int, what: str) -> tuple[int, ...]:
    """Returns axes as Flax reads them: counted from the front, sorted."""
    return tuple(sorted(_axes.canonical(name, axes, ndim, what)))


def flax_dtype(name: str, dtype: Any, *arrays: jax.Array | None) -> Any:
    """Returns the dtype of y by Flax's rule: that of x with the parameters."""
    if dtype is not None:
        return dtype
    _check.promotion(name, "Pass dtype=jnp.bfloat16, say, to the module", *arrays)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(a for a in arrays if a is not None))


def flax_mask(
    name: str, mask: Any, shape: tuple[int, ...], is_weight: bool = False
) -> jax.Array | None:
    """Returns a mask of any dtype as a boolean one, which is how linen reads it.

    A mask of one axis less than x lines up as in numpy, as in Flax, unless it could be
    meant to line up with the first axes.
    """
    if mask is None:
        return None
    mask = _check.array(name, "mask", mask)
    if not is_weight:
        mask = mask.astype(bool)
    elif jnp.issubdtype(mask.dtype, jnp.integer):
        mask = mask.astype(jnp.float32)
    first = zip(mask.shape, shape, strict=False)
    if mask.ndim == len(shape) - 1 and (
        mask.size == 1 or any(n not in (1, m) for n, m in first)
    ):
        mask = mask[None]
    return _check.where(name, mask, shape, "mask")


def devices(module: Any, initializing: bool = False) -> dict[str, Any]:
    """Returns the arguments axis_name and axis_index_groups of a norm.

    A named axis need not exist while the module is initialized, or where it says that
    one that is missing is to be ignored.
    """
    _check.choice(module, "missing_axis", ("raise", "ignore"))
    names, groups = module.axis_name, module.axis_index_groups
    if initializing:
        names = groups = None
    elif names is not None and module.missing_axis == "ignore":
        names = names if isinstance(names, (tuple, list)) else (names,)
        bound = tuple(n for n in names if _check.is_bound(n))
        if not bound:
            names = groups = None
        elif groups is None:
            names = bound
    return {"axis_name": names, "axis_index_groups": groups}


def flax_groups(
    num_groups: int | None, group_size: int | None, shape: tuple[int, ...]
) -> Any:
    """Returns the number of groups from the one field of two that is set."""
    if (num_groups is None) == (group_size is None):
        raise _check.error(
            ValueError,
            "GroupNorm",
            "exactly one of num_groups and group_size must be set",
            f"num_groups={num_groups}, group_size={group_size}",
            "To set group_size, pass num_groups=None, since its default is 32",
        )
    if group_size is None:
        return num_groups
    fits = _check.is_integer(group_size) and group_size > 0
    if not fits or shape[-1] % group_size:
        raise _check.error(
            ValueError,
            "GroupNorm",
            "group_size must divide the number of features",
            f"{_check.shown('group_size', group_size)}, x.shape={shape}",
            f"Pass num_groups=None and a group_size that divides {shape[-1]}",
        )
    return shape[-1] // group_size


def flax_space(reduction_axes: _axes.Axes | None, ndim: int) -> tuple[int, ...] | None:
    """Returns GroupNorm's reduced axes without that of the features, the last."""
    if reduction_axes is None:
        return None
    axes = flax_axes("GroupNorm", reduction_axes, ndim, "reduction_axes")
    if axes[-1:] != (ndim - 1,):
        raise _check.error(
            ValueError,
            "GroupNorm",
            "reduction_axes must include the last axis, that of the features",
            f"reduction_axes={reduction_axes} for {ndim} axes",
            f"Pass reduction_axes={(*axes, ndim - 1)}",
        )
    return axes[:-1]


def flax_features(feature_axes: _axes.Axes, ndim: int) -> tuple[int, ...]:
    """Returns InstanceNorm's feature axes, which leave the first to the batch."""
    axes = flax_axes("InstanceNorm", feature_axes, ndim, "feature_axes")
    if 0 in axes:
        raise _check.error(
            ValueError,
            "InstanceNorm",
            "The channel axes cannot include the leading dimension as this is assumed"
            " to be the batch axis",
            f"feature_axes={feature_axes} for {ndim} axes",
            "Move the batch to the front, or call normjax.instance_norm with axis",
        )
    return axes


class Statistics(NamedTuple):
    """The running statistics of a batch norm, along its features.

    Attributes:
      mean: running mean.
      var: running variance.
      count: how many updates counted a value; None where the module needs no count.
      skipped: how many were left out; None where the module leaves none out.
    """

    mean: Any
    var: Any
    count: Any = None
    skipped: Any = None


def counters(module: Any) -> list[str]:
    """What the fields of the module add to the mean and the var of ``batch_stats``.

    They are created in float32, like all of that collection, and stay in the dtype that
    they are given in: one of integers counts on past 2**24.
    """
    needed = {
        "count": module.momentum is None or module.debias,
        "skipped": module.skip_nonfinite,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def switches(module: Any, use_running_average: bool | None) -> tuple[bool, bool]:
    """Returns whether to normalize by the running statistics, and to update them."""
    _check.choice(module, "normalize_with", (None, "batch", "running"))
    _check.choice(module, "running_variance", ("biased", "unbiased"))
    if module.normalize_with is not None:
        with_running = module.normalize_with == "running"
        if use_running_average is None:
            use_running_average = with_running
    elif use_running_average is None:
        raise _check.error(
            ValueError,
            "BatchNorm",
            "either use_running_average or normalize_with must be set",
            "use_running_average=None and normalize_with=None",
            "Pass use_running_average=not train, to the module or to the call",
        )
    else:
        with_running = use_running_average = _check.flag(
            "BatchNorm", "use_running_average", use_running_average
        )
    update = module.update_statistics
    return with_running, not use_running_average if update is None else update


def batch_norm(
    x: Any, running: Statistics, with_running: bool, update: bool, **arguments: Any
) -> tuple[jax.Array, Moments]:
    """Normalizes x by its own or by running statistics; returns also those to add."""
    if not with_running:
        return _norms.batch_norm(x, **arguments)
    moments = Moments(jnp.ones_like(running.var), running.mean, running.var)
    y, m = _norms.batch_norm(x, moments=moments, **arguments)
    return y, _norms.batch_norm(x, **arguments)[1] if update else m


def check_updated(running: Statistics, with_running: bool) -> None:
    """Refuses running statistics whose updates were not counted, where that matters.

    That is where they normalize, or where the first update would replace them.
    """
    if running.count is None or not all(map(_check.is_concrete, running)):
        return
    mean, var, count = map(np.asarray, running[:3])
    if count.any():
        return
    found = bool((mean != 0).any() or (var != 1).any())
    if with_running or found:
        raise _check.error(
            ValueError,
            "BatchNorm",
            "running statistics must be updated before they normalize, and counted"
            " before they are updated further",
            "a count of 0 updates in batch_stats"
            + (", and a mean and var that are not those of the start" * found),
            "Train first, or, if mean and var come from a checkpoint without a count,"
            " set batch_stats/count to its number of updates",
        )


def update(module: Any, old: Statistics, m: Moments, momentum: Any) -> Statistics:
    """Returns the running statistics after a batch of moments m.

    ``momentum * old + (1 - momentum) * new``, as in Flax. After t updates that is

        momentum=None   1 / t of each: the cumulative average
        debias=True     (1 - momentum) / (1 - momentum**t) of the new one, so that what
                        they started from has no part (https://arxiv.org/abs/1412.6980)

    Nothing moves where nothing was counted, or with ``skip_nonfinite`` nothing finite.
    """
    if momentum is None:
        momentum = module.momentum
    elif module.momentum is None:
        raise _check.error(
            ValueError,
            "BatchNorm",
            "a cumulative average has no momentum",
            f"momentum={momentum} in the call, momentum=None in the module",
            "Leave it out of the call, or give the module a momentum",
        )
    check_can_count(old)
    var, measured = m.var, m.count
    if module.running_variance == "unbiased":
        # Of a single value there is none, and what it would update stays as it is.
        var, there = unbiased(m)
        measured = m.count * there.astype(m.count.dtype)
    counted, skipped = is_counted(m.count), old.skipped
    if module.skip_nonfinite:
        finite = are_finite(dataclasses.replace(m, var=var), old.mean, old.var)
        skipped = one_more(skipped, counted & ~finite)
        counted = counted & finite
    count = None if old.count is None else one_more(old.count, counted)
    part = _part(module, momentum, count, old.var.shape, m.count.dtype)
    return Statistics(
        blend(old.mean, m.mean, part, counted),
        blend(old.var, var, part, counted & is_counted(measured)),
        count,
        skipped,
    )


def _part(module: Any, momentum: Any, count: Any, shape: tuple, dtype: Any) -> Any:
    """The new moments' part of the running statistics, after ``count`` updates."""
    t: Any = None if count is None else jnp.maximum(count, 1).astype(dtype)
    if momentum is None:
        return 1 / t
    part = part_of_new("BatchNorm", momentum, shape, dtype)
    if not module.debias:
        return part
    # 1 - momentum**t, without cancellation where momentum is near 1.
    total = -jnp.expm1(t * jnp.log1p(-part))
    later = part / jnp.where(total > 0, total, 1)
    # Not a rounding error of the start, which may be far above small variances.
    return jnp.where((t == 1) & (total > 0), jnp.ones_like(later), later)


def along(running: Statistics, features: Sequence[int]) -> Statistics:
    """Lays statistics of nnx, one long vector, along the features."""
    if all(a is None or a.size == math.prod(features) for a in running):
        running = Statistics(
            *(a if a is None else a.reshape(features) for a in running)
        )
    check_statistics(running, features)
    return running


def frozen(value: Any) -> Any:
    """Returns a field with its lists as tuples, as nnx wants what is no state."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return value


def check_features(
    module: Any, shape: tuple[int, ...], axes: Sequence[int], *statistics: Any
) -> None:
    """Refuses x of other features than an nnx module was made for.

    Arrays that were replaced together, of pruned features, say, or pieces of them on
    one device, say more than the field.
    """
    features = math.prod(shape[a] for a in axes)
    arrays = [getattr(module, name, None) for name in ("scale", "bias")]
    sizes = {math.prod(a.shape) for a in (*arrays, *statistics) if a is not None}
    if features == module.num_features or sizes == {features}:
        return
    mapped = module.axis_name or jax.sharding.get_abstract_mesh().manual_axes
    if not sizes and mapped and features and module.num_features % features == 0:
        return
    raise _check.error(
        ValueError,
        type(module).__name__,
        "num_features must be the number of features of x",
        f"num_features={module.num_features}, x.shape={shape} with {features} features"
        f" along axes {tuple(axes)}",
        f"Pass num_features={features}, or x as the module was made for",
    )


def set_too_late(module: Any, field: str, value: Any) -> Exception:
    """The error for a field that only says at construction what is created."""
    parameter = field.removeprefix("use_")
    variable = f"nnx.Param(jnp.ones(({module.num_features},)))" if value else "None"
    return _check.error(
        ValueError,
        type(module).__name__,
        f"{field} says at construction whether there is a {parameter}",
        f"{field}={value}, set later",
        f"Set norm.{parameter} = {variable}",
    )


def check_statistics(old: Statistics, features: Sequence[int]) -> None:
    """Refuses running statistics of another shape than the features have."""
    shapes = {k: jnp.shape(a) for k, a in old._asdict().items() if a is not None}
    if any(shape != tuple(features) for shape in shapes.values()):
        raise _check.error(
            ValueError,
            "BatchNorm",
            "batch_stats must have the shape of the features",
            ", ".join(f"{k} of shape {shape}" for k, shape in shapes.items())
            + f", features {tuple(features)}",
            "Pass the batch_stats of this model",
        )


def check_can_count(old: Statistics) -> None:
    """Refuses counters, of a model cast as a whole, that soon would stand still."""
    for name in ("count", "skipped"):
        counter = getattr(old, name)
        if counter is None or jnp.issubdtype(counter.dtype, jnp.integer):
            continue
        most = round(2 / float(jnp.finfo(counter.dtype).eps))
        if most < 2**24:
            raise _check.error(
                ValueError,
                "BatchNorm",
                f"batch_stats/{name} must be at least float32, or an integer",
                f"{counter.dtype}, which counts no further than {most}",
                f"Pass batch_stats with {name}.astype(jnp.float32)",
            )


def missing_statistics(path: tuple[str, ...], name: str) -> Exception:
    """The error for statistics that would start anew at every call, unnoticed."""
    return _check.error(
        ValueError,
        "BatchNorm",
        "apply needs the running statistics, or they would start from 0 and 1 again at"
        " every call",
        f"no batch_stats/{'/'.join((*path, name))} in the variables",
        'Pass {"params": params, "batch_stats": batch_stats}, with the batch_stats that'
        " init or the last apply returned",
    )


def missing_counter(
    path: tuple[str, ...], counter: str, features: Sequence[int]
) -> Exception:
    """The error for statistics of a checkpoint without a counter that is needed."""
    name, shape = "/".join((*path, counter)), tuple(features)
    rule, values, otherwise = {
        "count": (
            "momentum=None and debias=True need the number of updates so far",
            f"jnp.full({shape}, updates_so_far, jnp.float32)",
            "momentum and debias=False",
        ),
        "skipped": (
            "skip_nonfinite=True needs the number of updates left out so far",
            f"jnp.zeros({shape}, jnp.float32)",
            "skip_nonfinite=False",
        ),
    }[counter]
    return _check.error(
        ValueError,
        "BatchNorm",
        rule,
        f"batch_stats/{'/'.join((*path, 'mean'))} and no batch_stats/{name}",
        f"Add batch_stats/{name} = {values}, or set {otherwise}",
    )
