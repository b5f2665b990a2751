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
    sizes = range(len(shape))
    lies = [any(p[a] > 1 for p in parameters) for a in sizes]
    # What an axis is: N and G are not reduced, S and K are; K and G have parameters.
    kinds = []
    for a in sizes:
        if shape[a] == 1:
            continue
        if a in group_axes:
            kinds.append(("C", a))
        else:
            kinds.append(("r" if a in axes else "k", a))
    n = _run(kinds, "k")
    middle = _run(kinds, "r")
    last = _run(kinds, "C" if group_axes else "k")
    tail = _run(kinds, "r")
    if kinds or (group_axes and tail):
        return None
    if not group_axes and not last:
        # Rows: what has parameters is K, and without any all of it.
        has = [a for a in middle if lies[a]]
        first = middle.index(has[0]) if has else (0 if not parameters else len(middle))
        middle, tail = middle[:first], middle[first:]
        if not middle and not tail:
            # Each value is alone in its reduction: what has parameters is G.
            first = next((i for i, a in enumerate(n) if lies[a]), len(n))
            n, last = n[:first], n[first:]
    size = {
        name: math.prod(shape[a] for a in group)
        for name, group in (("n", n), ("s", middle), ("g", last), ("k", tail))
    }
    if group_axes:
        size["g"], size["k"] = num_groups, size["g"] // num_groups
    along = {*last, *tail}
    rows = 1
    for p in parameters:
        if any(p[a] != shape[a] for a in along) or any(p[a] > 1 for a in middle):
            return None
        led = [p[a] > 1 for a in n]
        if led != sorted(led, reverse=True):
            return None
        own = math.prod(p[a] for a in n)
        if rows > 1 and own not in (1, rows):
            return None
        rows = max(rows, own)
    return Form((size["n"], size["s"], size["g"], size["k"]), rows)


def _run(kinds: list[tuple[str, int]], kind: str) -> list[int]:
    """Takes the axes of one kind from the front of a list."""
    run = []
    while kinds and kinds[0][0] == kind:
        run.append(kinds.pop(0)[1])
    return run
