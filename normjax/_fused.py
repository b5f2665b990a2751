"""Norms together with what goes before them: the addition of a residual."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normjax import _check, _norms
from normjax._types import (
    ArrayLike,
    Axes,
    AxisNames,
    DTypeLike,
    Groups,
    Implementation,
    Scalar,
)


def total(name: str, x: Any, residual: Any) -> jax.Array:
    """Returns x + residual, of one shape."""
    x = _check.inexact(name, x)
    residual = _check.inexact(name, residual, "residual")
    if x.shape != residual.shape:
        raise _check.error(
            ValueError,
            name,
            "residual must have the shape of x",
            f"residual.shape={residual.shape}, x.shape={x.shape}",
            "Broadcast the one that is smaller",
        )
    _check.promotion(name, "Pass x.astype(residual.dtype)", x, residual)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.add(x, residual)


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
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
) -> tuple[jax.Array, jax.Array]:
    """Adds a residual, and normalizes the sum: a step of a pre-norm transformer.

    ``h = x + residual``, ``y = layer_norm(h)``. The sum is what the norm keeps for its
    backward pass.

    Args:
      x: ``[..., C]``, floating or complex: what a block returned.
      residual: of the shape of ``x``: what it is added to.
      scale: as in `layer_norm`.
      bias: as in `layer_norm`.
      axis: as in `layer_norm`.
      epsilon: as in `layer_norm`.
      where: as in `layer_norm`; the sum is taken everywhere.
      axis_name: as in `layer_norm`.
      axis_index_groups: as in `layer_norm`.
      dtype: of ``y``; None for that of the sum.
      activation: as in `layer_norm`.
      implementation: as in `layer_norm`.

    Returns:
      y, and the sum, the residual of the next block.

    Raises:
      TypeError: as `layer_norm`.
      ValueError: as `layer_norm`, or if the shapes of x and residual differ.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> x, residual = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]])
      >>> y, h = normjax.add_layer_norm(x, residual)
      >>> y.round(3), h
      (Array([[-1.,  1.]], dtype=float32), Array([[1., 3.]], dtype=float32))
    """
    h = total("add_layer_norm", x, residual)
    y = _norms.over_axes(
        "add_layer_norm",
        h,
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
    return y, h


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
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
) -> tuple[jax.Array, jax.Array]:
    """Adds a residual, and normalizes the sum: a step of a decoder.

    ``h = x + residual``, ``y = rms_norm(h)``; see `add_layer_norm`.

    Args:
      x: ``[..., C]``, floating or complex: what a block returned.
      residual: of the shape of ``x``: what it is added to.
      scale: as in `rms_norm`.
      axis: as in `rms_norm`.
      epsilon: as in `rms_norm`.
      where: as in `rms_norm`; the sum is taken everywhere.
      axis_name: as in `rms_norm`.
      axis_index_groups: as in `rms_norm`.
      dtype: of ``y``; None for that of the sum.
      activation: as in `rms_norm`.
      implementation: as in `rms_norm`.

    Returns:
      y, and the sum, the residual of the next block.

    Raises:
      TypeError: as `rms_norm`.
      ValueError: as `rms_norm`, or if the shapes of x and residual differ.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> y, h = normjax.add_rms_norm(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, -2.0]]))
      >>> y.round(3), h
      (Array([[ 1., -1.]], dtype=float32), Array([[ 2., -2.]], dtype=float32))
    """
    h = total("add_rms_norm", x, residual)
    y = _norms.over_axes(
        "add_rms_norm",
        h,
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
    return y, h
