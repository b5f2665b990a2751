"""Linen and nnx behind one signature, so that a test of modules runs on both."""

import functools
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp

import normjax.linen
import normjax.nnx

# The modules that Flax has too.
NAMES = [n for n in normjax.linen.__all__ if not n.startswith("Add")]


class Linen:
    """A linen module with its variables.

    Attributes:
      module: the module.
      variables: its variables; a call replaces its statistics.
    """

    ours, flaxs = normjax.linen, flax.linen

    def __init__(self, name: str, x: Any, library: Any = None, **fields: Any):
        self.module = getattr(library or self.ours, name)(**fields)
        said = {"use_running_average", "normalize_with"} & {
            k for k, v in fields.items() if v is not None
        }
        ask = name == "BatchNorm" and not said
        arguments = {"use_running_average": False} if ask else {}
        self.variables = dict(self.module.init(jax.random.key(0), x, **arguments))

    @functools.cached_property
    def _apply(self):
        return jax.jit(
            functools.partial(self.module.apply, mutable=["batch_stats"]),
            static_argnames="use_running_average",
        )

    def __call__(self, x: Any, jitted: bool = False, **arguments: Any) -> jax.Array:
        apply = self._apply if jitted else self._apply.__wrapped__
        y, updates = apply(self.variables, x, **arguments)
        self.variables |= updates
        return y

    @property
    def statistics(self) -> dict[str, jax.Array]:
        return dict(self.variables["batch_stats"])

    @statistics.setter
    def statistics(self, values: dict[str, jax.Array]) -> None:
        self.variables["batch_stats"] = values


class Nnx:
    """An nnx module.

    Attributes:
      module: the module.
    """

    ours, flaxs = normjax.nnx, flax.nnx

    def __init__(self, name: str, x: Any, library: Any = None, **fields: Any):
        axis = fields.get("axis", fields.get("feature_axes", -1))
        make = getattr(library or self.ours, name)
        self.module = make(jnp.shape(x)[axis], rngs=flax.nnx.Rngs(0), **fields)

    def __call__(self, x: Any, jitted: bool = False, **arguments: Any) -> jax.Array:
        if not jitted:
            return self.module(x, **arguments)
        call = flax.nnx.jit(
            lambda module, x, arguments, running: module(x, **running, **arguments),
            static_argnums=3,
        )
        running = arguments.pop("use_running_average", None)
        running = flax.core.freeze({"use_running_average": running} if running else {})
        return call(self.module, x, arguments, running)

    @property
    def statistics(self) -> dict[str, jax.Array]:
        state = flax.nnx.state(self.module, flax.nnx.BatchStat)
        return {k: v[...] for k, v in state.items()}

    @statistics.setter
    def statistics(self, values: dict[str, jax.Array]) -> None:
        for name, value in values.items():
            getattr(self.module, name)[...] = value


SYSTEMS = {"linen": Linen, "nnx": Nnx}
