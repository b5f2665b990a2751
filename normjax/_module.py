"""What the linen and the nnx modules share: from fields to arguments of a function."""

from typing import Any

import jax
import jax.numpy as jnp

from normjax import _axes, _check
from normjax._moments import Moments
from normjax._running import blend


def flax_axes(name: str, axes: _axes.Axes, ndim: int, what: str) -> tuple[int, ...]:
    """Returns axes as Flax reads them: counted from the front, sorted."""
    return tuple(sorted(_axes.canonical(name, axes, ndim, what)))


def flax_dtype(dtype: Any, *arrays: jax.Array | None) -> Any:
    """Returns the dtype of y by Flax's rule: that of x with the parameters."""
    if dtype is not None:
        return dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(a for a in arrays if a is not None))


def flax_mask(name: str, mask: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns a mask of any dtype as a boolean one, which is how linen reads it."""
    if mask is None:
        return None
    return _check.where(name, jnp.asarray(mask).astype(bool), shape, "mask")


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
    if group_size < 1 or shape[-1] % group_size:
        raise _check.error(
            ValueError,
            "GroupNorm",
            "group_size must divide the number of features",
            f"group_size={group_size}, x.shape={shape}",
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


def given(running: tuple[jax.Array, jax.Array]) -> Moments:
    """Returns the running mean and variance as moments to normalize by."""
    mean, var = running
    return Moments(jnp.ones_like(var), mean, var)


def update(
    old: tuple[jax.Array, jax.Array], m: Moments, momentum: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the running mean and variance after a batch of moments m.

    ``momentum * old + (1 - momentum) * new``, as in Flax; nothing moves where nothing
    was counted.
    """
    _check.momentum("BatchNorm", momentum)
    mean, var = old
    return blend(mean, m.mean, momentum, m.count), blend(var, m.var, momentum, m.count)


def check_statistics(old: tuple[jax.Array, jax.Array], features: list[int]) -> None:
    """Refuses running statistics of another shape than the features have."""
    shapes = [jnp.shape(a) for a in old]
    if shapes != [tuple(features)] * 2:
        raise _check.error(
            ValueError,
            "BatchNorm",
            "batch_stats must have the shape of the features",
            f"mean and var of shapes {shapes[0]} and {shapes[1]}, features"
            f" {tuple(features)}",
            "Pass the batch_stats of this model",
        )


def missing_statistics(path: tuple[str, ...]) -> Exception:
    """The error for statistics that would start anew at every call, unnoticed."""
    return _check.error(
        ValueError,
        "BatchNorm",
        "apply needs the running statistics, or they would start from 0 and 1 again at"
        " every call",
        f"no batch_stats/{'/'.join((*path, 'mean'))} in the variables",
        'Pass {"params": params, "batch_stats": batch_stats}, with the batch_stats that'
        " init or the last apply returned",
    )
