"""The one shape that all norms have: ``[N, S, G, K]``.

Moments are for each (n, g), taken over S and K; parameters lie along (G, K).

    norm                        N         S                 G         K
    layer, rms                  rows      1                 1         C
    the same, of groups         rows      1                 groups    C / groups
    batch                       1         batch x space     C         1
    batch, of ghosts            ghosts    samples x space   C         1
    instance                    batch     space             C         1
    group                       batch     space             groups    C / groups
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Form(NamedTuple):
    """An array in canonical form.

    Attributes:
      shape: ``(N, S, G, K)``.
      parameters: how many rows of parameters there are, P: each is for N / P
        neighbours.
    """

    shape: tuple[int, int, int, int]
    parameters: int

    def x(self, a: jax.Array) -> jax.Array:
        """An array of the shape of x, in canonical form."""
        return a.reshape(self.shape)

    def moments(self, a: jax.Array) -> jax.Array:
        """Moments as they broadcast against x, as ``[N, G]``."""
        n, _, g, _ = self.shape
        # Channels of a group all have its moments.
        return a.reshape(n, g, -1)[..., 0] if a.size != n * g else a.reshape(n, g)

    def from_moments(self, a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Moments ``[N, G]`` as they broadcast against x."""
        if a.size != math.prod(shape):
            a = jnp.broadcast_to(a[..., None], (*a.shape, self.shape[3]))
        return a.reshape(shape)

    def of_parameters(self, a: jax.Array) -> jax.Array:
        """Parameters, which broadcast against x, as ``[P, G, K]``."""
        _, _, g, k = self.shape
        return jnp.broadcast_to(a.reshape(-1, g, k), (self.parameters, g, k))

    def from_parameters(self, ct: jax.Array, a: jax.Array) -> jax.Array:
        """A cotangent ``[P, G, K]`` of parameters a, in their shape and dtype."""
        if ct.size != a.size:
            ct = ct.sum(0)
        return ct.reshape(a.shape).astype(a.dtype)


def of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    group_axes: tuple[int, ...],
    num_groups: int,
    parameters: list[tuple[int, ...]],
) -> Form | None:
    """Returns the canonical form of x, or None where x would have to be transposed.

    Args:
      shape: of x.
      axes: of x, that are summed over.
      group_axes: feature axes whose moments are merged within groups, or ().
      num_groups: into how many.
      parameters: shapes of scale and bias, which broadcast to x.
    """
    long = [a for a in group_axes if shape[a] > 1]
    if math.prod(shape) == 0 or long != sorted(long):
        return None  # groups are of features in the order of their axes
    kinds = [
        ("grouped" if a in group_axes else "reduced" if a in axes else "kept", a)
        for a, size in enumerate(shape)
        if size > 1
    ]
    n, s = _run(kinds, "kept"), _run(kinds, "reduced")
    g, k = _run(kinds, "grouped" if group_axes else "kept"), _run(kinds, "reduced")
    if kinds or (group_axes and k):
        return None
    if not group_axes and not g:
        has = [any(p[a] > 1 for p in parameters) for a in range(len(shape))]
        if s:  # rows: what has parameters is K, and without any all of it
            first = _first(s, has, 0 if not parameters else len(s))
            s, k = s[:first], s[first:]
        else:  # each value is alone in its reduction: what has parameters is G
            first = _first(n, has, len(n))
            n, g = n[:first], n[first:]
    rows = _rows([[p[a] for a in n] for p in parameters])
    for p in parameters:
        if any(p[a] != shape[a] for a in (*g, *k)) or any(p[a] > 1 for a in s):
            return None
    if rows is None:
        return None
    of_n, of_s, of_g, of_k = (
        math.prod(shape[a] for a in along) for along in (n, s, g, k)
    )
    if group_axes:
        of_g, of_k = num_groups, of_g // num_groups
    return Form((of_n, of_s, of_g, of_k), rows)


def _first(axes: list[int], has: list[bool], default: int) -> int:
    """The place of the first of some axes that has parameters."""
    return next((i for i, a in enumerate(axes) if has[a]), default)


def _rows(sizes: list[list[int]]) -> int | None:
    """How many rows of parameters there are, from their sizes along the axes of N.

    A row must be for neighbours, and all parameters must have as many, or one.
    """
    lie = [[n > 1 for n in of] for of in sizes]
    rows = {math.prod(of) for of in sizes} - {1}
    if len(rows) > 1 or any(along != sorted(along, reverse=True) for along in lie):
        return None
    return max(rows, default=1)


def _run(kinds: list[tuple[str, int]], kind: str) -> list[int]:
    """Takes the axes of one kind from the front of a list."""
    run = []
    while kinds and kinds[0][0] == kind:
        run.append(kinds.pop(0)[1])
    return run
