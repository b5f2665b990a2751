"""The family: every norm as a row of one table, and the formula in plain numpy terms.

A new norm adds its row here and inherits every suite that runs over `FAMILY`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax

EPSILON = 1e-5


def combined(*tables, one_of: int = 2) -> list:
    """Every combination of a row of each table, for parametrize.

    `make test` takes one of so many, in which each row is; the others are `further`.
    """
    found = []
    for rows in itertools.product(*map(enumerate, tables)):
        numbers, values = zip(*rows, strict=True)
        further = [pytest.mark.further] if sum(numbers) % one_of else []
        found.append(pytest.param(*values, marks=further))
    return found


def tolerance(reduced: int, dtype: Any = jnp.float64, c: float = 10.0) -> float:
    """Rounding errors of a sum of so many terms add up like their square root."""
    return c * float(jnp.finfo(dtype).eps) * max(reduced, 1) ** 0.5


def assert_close(got: Any, want: Any, reduced: int, c: float = 10.0) -> None:
    """Compares pytrees leaf by leaf, relative to the largest entry above 1."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.shape == w.shape and g.dtype == w.dtype, (g.shape, w.shape, g.dtype)
        size = max(1.0, float(np.max(np.abs(w), initial=0.0)))
        atol = tolerance(reduced, g.dtype, c) * size
        np.testing.assert_allclose(g, w, rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm on x of shape [N, S, T, C].

    Attributes:
      call: (x, scale, bias, where, axis_name, axis_index_groups) -> y; scale and bias
        are [C].
      axes: the axes that its formula reduces; with groups, beside the group's features.
      groups: number of groups, or None.
      centered: whether the mean is taken off.
    """

    call: Callable
    axes: tuple[int, ...]
    groups: int | None = None
    centered: bool = True


def _wide(v, over=1):
    """Lays [C] along the last axis, or along the last and so many of the second."""
    if v is None:
        return None
    return jnp.broadcast_to(v[None, None, None, :], (1, over, 1, v.shape[0]))


FAMILY = {
    "batch": Norm(
        lambda x, s, b, w, n=None, g=None: normjax.batch_norm(
            x, s, b, where=w, axis_name=n, axis_index_groups=g, epsilon=EPSILON
        )[0],
        axes=(0, 1, 2),
    ),
    "layer": Norm(
        lambda x, s, b, w, n=None, g=None: normjax.layer_norm(
            x,
            # With the moments these broadcast to all of x, as those of [C] do over
            # the last axis alone.
            _wide(s, x.shape[1]),
            _wide(b, x.shape[1]),
            axis=(1, 3),
            where=w,
            axis_name=n,
            axis_index_groups=g,
            epsilon=EPSILON,
        ),
        axes=(1, 3),
    ),
    "rms": Norm(
        lambda x, s, b, w, n=None, g=None: normjax.rms_norm(
            x,
            _wide(s, x.shape[1]),
            axis=(1, 3),
            where=w,
            axis_name=n,
            axis_index_groups=g,
            epsilon=EPSILON,
        ),
        axes=(1, 3),
        centered=False,
    ),
    "group": Norm(
        lambda x, s, b, w, n=None, g=None: normjax.group_norm(
            x,
            s,
            b,
            num_groups=2,
            where=w,
            axis_name=n,
            axis_index_groups=g,
            epsilon=EPSILON,
        ),
        axes=(1, 2),
        groups=2,
    ),
    "instance": Norm(
        lambda x, s, b, w, n=None, g=None: normjax.instance_norm(
            x, s, b, where=w, axis_name=n, axis_index_groups=g, epsilon=EPSILON
        ),
        axes=(1, 2),
    ),
}


def reference_moments(norm: Norm, x, where=None):
    """count, mean and var of the plain two-pass formula, broadcasting against x.

    What has weight 0 is not there, to derivatives either.
    """
    shape, axes = x.shape, norm.axes
    weights = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    counts, weights = weights.astype(bool), weights.astype(x.real.dtype)
    weights = jnp.where(counts, weights, jnp.zeros_like(weights))
    if norm.groups:
        view = (*shape[:-1], norm.groups, shape[-1] // norm.groups)
        x, weights, axes = x.reshape(view), weights.reshape(view), (*axes, len(shape))
    x = jnp.where(weights.astype(bool), x, jnp.zeros_like(x))
    count = weights.sum(axes, keepdims=True)
    n = jnp.where(count > 0, count, 1)
    mean = (weights.astype(x.dtype) * x).sum(axes, keepdims=True) / n.astype(x.dtype)
    if not norm.centered:
        mean = jnp.zeros_like(mean)
    spread = weights * ((x - mean) * (x - mean).conj()).real
    var = jnp.where(count > 0, spread.sum(axes, keepdims=True) / n, 1)
    if norm.groups:
        wide = (*var.shape[:-1], view[-1])
        count, mean, var = (
            jnp.broadcast_to(a, wide).reshape(*wide[:-2], shape[-1])
            for a in (count, mean, var)
        )
    return count, mean, var


def reference(norm: Norm, x, scale, bias, where=None):
    """The formula, differentiable by plain autodiff."""
    _, mean, var = reference_moments(norm, x, where)
    if where is not None:
        x = jnp.where(where.astype(bool), x, jnp.zeros_like(x))
    y = (x - mean) / jnp.sqrt(var + EPSILON).astype(x.dtype)
    y = y * _wide(scale)
    if norm.centered:
        y = y + _wide(bias)
    return y if where is None else jnp.where(where.astype(bool), y, jnp.zeros_like(y))
