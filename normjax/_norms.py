"""Batch, layer, rms, group and instance norm: choose axes, call standardize."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from normjax import _axes, _check, _devices, _measure, _moments, _numbers
from normjax._devices import Reduction
from normjax._formula import MOMENTS
from normjax._moments import Moments
from normjax._normalize import (
    View,
    normalized,
    standardize,
    standardize_traced,
)
from normjax._types import (
    ArrayLike,
    Axes,
    AxisNames,
    DTypeLike,
    Groups,
    Implementation,
    Scalar,
)
from normjax.kernels import choice


def _computed_again(norm: Callable) -> Callable:
    """Computes y again for the backward pass, from x and the moments, kept by name."""
    policy = jax.checkpoint_policies.save_only_these_names(MOMENTS)
    return jax.checkpoint(norm, policy=policy)


def _activated(name: str, norm: Callable, activation: Callable | None) -> Callable:
    """Returns ``norm(where, *operands) -> y, moments`` with y activated."""
    if activation is None:
        return norm

    def f(where, *operands):
        y, m = norm(where, *operands)
        return _numbers.counted(_check.activated(name, activation, y), where), m

    return _computed_again(f)


def _norm(
    name,
    x,
    scale,
    bias,
    along,
    r,
    *,
    epsilon,
    where,
    dtype,
    activation,
    implementation,
    view=None,
):
    """Checks what all norms have in common, and standardizes.

    The reduction is of x in the view, and so are the axes of the moments returned.
    """
    where = _check.where(name, where, x.shape)
    scale = _axes.lay(name, "scale", scale, along, x.shape)
    bias = _axes.lay(name, "bias", bias, along, x.shape)
    operands = {"x": x, "scale": scale, "bias": bias}
    dtype = _check.output_dtype(name, dtype, operands)
    epsilon = _check.epsilon(name, epsilon, _numbers.statistics_dtype(x, dtype))
    implementation = choice.chosen(name, implementation)
    view = view or View()
    # XLA of jax 0.10 on a CPU sums several times slower past an axis of size 1. One
    # that lies over an explicit mesh stays: its gradient would not lie there again.
    lying = [_axes.lies_over(a) for a in (x, scale, bias, where) if a is not None]
    shape = view.ghosts(x.shape, x.shape)
    units = tuple(
        a
        for a, n in enumerate(shape)
        if n == 1
        and a not in r.group_axes
        and not any(spec[a - (a > view.batch and bool(view.size))] for spec in lying)
    )
    if len(units) == len(shape):
        units = ()
    kept = _axes.others(units, len(shape))
    r = r._replace(
        axes=tuple(kept.index(a) for a in r.axes if a in kept),
        group_axes=tuple(kept.index(a) for a in r.group_axes),
    )
    view = view._replace(units=units)

    def norm(where, x, scale, bias):
        return standardize(
            x, scale, bias, where, r, epsilon, dtype, view, implementation
        )

    def traced(where, x, scale, bias):
        return standardize_traced(x, scale, bias, where, epsilon, r, dtype, view)

    if not _check.is_concrete(epsilon):
        if implementation == "native":
            raise choice.refused(implementation, "a traced epsilon")
        norm = _computed_again(traced)
    return _activated(name, norm, activation)(where, x, scale, bias)


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: Scalar = 1e-5,
    where: ArrayLike | None = None,
    moments: Moments | None = None,
    virtual_batch_size: int | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature over the batch and space.

    ``y = scale * (x - mean) / sqrt(var + epsilon) + bias`` with the moments over all
    axes but ``feature_axis``: batch normalization, https://arxiv.org/abs/1502.03167.
    With ``axis_name`` the moments are those of the batch of all devices together.

    Args:
      x: ``[N, ..., C]``, floating or complex.
      scale: ``[C]``, or of the rank of ``x`` and broadcasting to it, or None.
      bias: as ``scale``.
      feature_axis: the axes, one or several, that own the parameters.
      epsilon: added to the variance; above zero. A traced one has a derivative, too,
        and is not checked.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. ``y`` is zero where nothing counts, and not
        multiplied by a weight elsewhere.
      moments: moments ``[C]`` to normalize by instead of those of ``x``: those of
        `RunningMoments.read`, say. They count as independent of ``x``.
      virtual_batch_size: how many neighbours along the batch, the first axis that is
        not a feature axis, are normalized by moments of their own: ghost batches,
        https://arxiv.org/abs/1705.08741. The moments returned are those of all of them,
        and of all devices of ``axis_name``. None: the whole batch together. It says
        nothing where ``moments`` are given.
      axis_name: device axes, one or several, to sync the moments over, weighted by
        count. Under jit over sharded arrays they are synced without it.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      dtype: of ``y``; None for that of ``x``. Statistics are at least float32 always.
      activation: applied to ``y``, element by element, ``jax.nn.silu``, say. What it is
        applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `set_implementation`. Ignored if
        ``moments`` are given.

    Returns:
      y, of the shape of ``x``, and the `Moments` of what normalized it, ``[C]``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if axes, shapes, weights, epsilon, axis names or sub-groups of devices
        do not fit, or ``virtual_batch_size`` does not divide the batch.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> y, m = normjax.batch_norm(x, jnp.ones(2), jnp.zeros(2))
      >>> m.mean, m.var
      (Array([2., 4.], dtype=float32), Array([1., 4.], dtype=float32))
    """
    name = "batch_norm"
    x = _check.inexact(name, x)
    along = _axes.canonical(name, feature_axis, x.ndim, "feature_axis")
    # With moments given there are none to sync, so no device axis has to exist.
    if moments is not None:
        axis_name = axis_index_groups = None
    names, groups = _check.devices(name, axis_name, axis_index_groups)
    if moments is not None:

        def given(where, x, scale, bias):
            y = normalized(
                name,
                x,
                moments,
                scale,
                bias,
                epsilon=epsilon,
                feature_axis=along,
                where=where,
                dtype=dtype,
            )
            return y, moments

        where = _check.where(name, where, x.shape)
        return _activated(name, given, activation)(where, x, scale, bias)
    common = {
        "epsilon": epsilon,
        "dtype": dtype,
        "activation": activation,
        "implementation": implementation,
    }
    r = Reduction(_axes.others(along, x.ndim), names=names, groups=groups)
    if virtual_batch_size is not None:
        return _ghosts(
            name, x, scale, bias, along, r, virtual_batch_size, where, **common
        )
    y, m = _norm(name, x, scale, bias, along, r, where=where, **common)
    return y, jax.tree.map(lambda a: _axes.features_of(a, along), m)


def _ghosts(name, x, scale, bias, along, r, size, where, **common):
    """`batch_norm` of ghost batches: an axis more, that is not reduced."""
    if len(along) == x.ndim:
        raise _check.error(
            ValueError,
            name,
            "virtual_batch_size needs an axis of samples, that is not a feature axis",
            f"x.shape={x.shape}, feature axes {along}",
            "Pass virtual_batch_size=None",
        )
    batch, *_ = _axes.others(along, x.ndim)
    where = _check.where(name, where, x.shape)
    size = _axes.divisor(name, "virtual_batch_size", size, (batch,), "samples", x.shape)

    pieces = _axes.pieces(x, batch)
    if x.shape[batch] // pieces % size:
        raise _check.error(
            ValueError,
            name,
            "virtual_batch_size must divide the samples of each device of an explicit"
            " mesh, which lets no axis be split across its pieces",
            f"virtual_batch_size={size}, {x.shape[batch] // pieces} samples on each of"
            f" {pieces} pieces of the mesh",
            "Pass a size that divides them, or shard x over an axis of AxisType.Auto",
        )

    features = tuple(a + (a > batch) for a in along)
    over = Reduction(_axes.others((batch, *features), x.ndim + 1))
    view = View(batch, size)
    y, m = _norm(name, x, scale, bias, along, over, where=where, view=view, **common)
    # Merged from those of the ghosts, without a pass over x more, and with a derivative
    # of their own, since a chain of merges would pass through variances that are inf.
    m = _moments.merged(_moments.closed(jax.lax.stop_gradient(m)), batch)
    m = jax.tree.map(lambda a: jnp.squeeze(a, batch), m)
    if r.names:
        m = _devices.across_devices(m, r, _devices.counts_of(where))
    m = _moments.opened(*_measure.known(x, where, m, r))
    return y, jax.tree.map(lambda a: _axes.features_of(a, along), m)


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: Scalar = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalizes each sample over its features.

    ``y = scale * (x - mean) / sqrt(var + epsilon) + bias`` with the moments over
    ``axis``: layer normalization, https://arxiv.org/abs/1607.06450.

    Args:
      x: ``[..., C]``, floating or complex.
      scale: of the shape of ``x`` along ``axis``, or of the rank of ``x`` and
        broadcasting to it, or None.
      bias: as ``scale``.
      axis: the axes reduced, one or several.
      epsilon: added to the variance; above zero. A traced one has a derivative, too,
        and is not checked.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. ``y`` is zero where nothing counts, and not
        multiplied by a weight elsewhere.
      axis_name: device axes over which ``axis`` is divided, if it is.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      dtype: of ``y``; None for that of ``x``. Statistics are at least float32 always.
      activation: applied to ``y``, element by element, ``jax.nn.silu``, say. What it is
        applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `set_implementation`.

    Returns:
      y, of the shape of ``x``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if axes, shapes, weights, epsilon, axis names or sub-groups of devices
        do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> normjax.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.ones(2)).round(3)
      Array([[0., 2.]], dtype=float32)
    """
    return over_axes(
        "layer_norm",
        x,
        scale,
        bias,
        axis=axis,
        epsilon=epsilon,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
    )


def over_axes(
    name, x, scale, bias, *, axis, axis_name, axis_index_groups, centered=True, **common
) -> jax.Array:
    """`layer_norm` or `rms_norm`, for the function ``name`` that errors are to name."""
    x = _check.inexact(name, x)
    along = _axes.canonical(name, axis, x.ndim)
    names, groups = _check.devices(name, axis_name, axis_index_groups)
    r = Reduction(along, names=names, groups=groups, centered=centered)
    return _norm(name, x, scale, bias, along, r, **common)[0]


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: Scalar = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Divides each sample by the root of the mean square of its features.

    ``y = scale * x / sqrt(mean(x**2) + epsilon)``: root mean square layer
    normalization, https://arxiv.org/abs/1910.07467.

    Args:
      x: ``[..., C]``, floating or complex.
      scale: of the shape of ``x`` along ``axis``, or of the rank of ``x`` and
        broadcasting to it, or None.
      axis: the axes reduced, one or several.
      epsilon: added to the mean square; above zero. A traced one has a derivative, too,
        and is not checked.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. ``y`` is zero where nothing counts, and not
        multiplied by a weight elsewhere.
      axis_name: device axes over which ``axis`` is divided, if it is.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      dtype: of ``y``; None for that of ``x``. Statistics are at least float32 always.
      activation: applied to ``y``, element by element, ``jax.nn.silu``, say. What it is
        applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `set_implementation`.

    Returns:
      y, of the shape of ``x``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if axes, shapes, weights, epsilon, axis names or sub-groups of devices
        do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> normjax.rms_norm(jnp.array([[1.0, -1.0]]), jnp.array([1.0, 2.0])).round(3)
      Array([[ 1., -2.]], dtype=float32)
    """
    return over_axes(
        "rms_norm",
        x,
        scale,
        None,
        centered=False,
        axis=axis,
        epsilon=epsilon,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
    )


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int,
    axis: Axes | None = None,
    feature_axis: Axes = -1,
    epsilon: Scalar = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalizes each sample over space and over groups of its features.

    ``y = scale * (x - mean) / sqrt(var + epsilon) + bias`` with the moments of each
    group of ``C / num_groups`` neighbouring features: group normalization,
    https://arxiv.org/abs/1803.08494.

    Args:
      x: ``[N, ..., C]``, floating or complex.
      scale: ``[C]``, or of the rank of ``x`` and broadcasting to it, or None.
      bias: as ``scale``.
      num_groups: how many groups; divides the number of features.
      axis: the axes of space, reduced whole. None: all but the
        first axis that is not a feature axis, the batch.
      feature_axis: the axes, one or several, that own the parameters.
      epsilon: added to the variance; above zero. A traced one has a derivative, too,
        and is not checked.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. ``y`` is zero where nothing counts, and not
        multiplied by a weight elsewhere.
      axis_name: device axes over which space or features are divided, if they are;
        ``num_groups`` are the groups of one device.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      dtype: of ``y``; None for that of ``x``. Statistics are at least float32 always.
      activation: applied to ``y``, element by element, ``jax.nn.silu``, say. What it is
        applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `set_implementation`.

    Returns:
      y, of the shape of ``x``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if ``num_groups`` does not divide, or axes, shapes, weights, epsilon,
        axis names or sub-groups of devices do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> normjax.group_norm(jnp.array([[1.0, 3.0, 2.0, 6.0]]), num_groups=2).round(3)
      Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    name = "group_norm"
    x = _check.inexact(name, x)
    along = _axes.canonical(name, feature_axis, x.ndim, "feature_axis")
    num_groups = _axes.divisor(
        name, "num_groups", num_groups, along, "features", x.shape
    )
    names, groups = _check.devices(name, axis_name, axis_index_groups)
    space = _axes.space(name, axis, along, x.ndim)
    r = Reduction(space, along, num_groups, names, groups)
    return _norm(
        name,
        x,
        scale,
        bias,
        along,
        r,
        epsilon=epsilon,
        where=where,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
    )[0]


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes | None = None,
    feature_axis: Axes = -1,
    epsilon: Scalar = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalizes each feature of each sample over space.

    ``y = scale * (x - mean) / sqrt(var + epsilon) + bias`` with the moments over all
    axes but the batch and ``feature_axis``: instance normalization,
    https://arxiv.org/abs/1607.08022.

    Args:
      x: ``[N, ..., C]``, floating or complex.
      scale: ``[C]``, or of the rank of ``x`` and broadcasting to it, or None.
      bias: as ``scale``.
      axis: the axes of space, reduced. None: all but the
        first axis that is not a feature axis, the batch.
      feature_axis: the axes, one or several, that own the parameters.
      epsilon: added to the variance; above zero. A traced one has a derivative, too,
        and is not checked.
      where: broadcasts to ``x``: boolean, which values count, or floating, the weight,
        not negative, with which each does. ``y`` is zero where nothing counts, and not
        multiplied by a weight elsewhere.
      axis_name: device axes over which space is divided, if it is.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      dtype: of ``y``; None for that of ``x``. Statistics are at least float32 always.
      activation: applied to ``y``, element by element, ``jax.nn.silu``, say. What it is
        applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `set_implementation`.

    Returns:
      y, of the shape of ``x``.

    Raises:
      TypeError: if an argument is not of its kind: no array of numbers, no number, no
        name; an integer; or complex where y is not.
      ValueError: if axes, shapes, weights, epsilon, axis names or sub-groups of devices
        do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # [N, S, C]
      >>> normjax.instance_norm(x).round(3)
      Array([[[-1., -1.],
              [ 1.,  1.]]], dtype=float32)
    """
    name = "instance_norm"
    x = _check.inexact(name, x)
    along = _axes.canonical(name, feature_axis, x.ndim, "feature_axis")
    names, groups = _check.devices(name, axis_name, axis_index_groups)
    r = Reduction(_axes.space(name, axis, along, x.ndim), names=names, groups=groups)
    return _norm(
        name,
        x,
        scale,
        bias,
        along,
        r,
        epsilon=epsilon,
        where=where,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
    )[0]
