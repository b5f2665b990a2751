"""Every way in which a norm is run on devices, behind one signature.

A context runs ``local(sharded, replicated)`` on eight pieces of its sharded arguments,
split along axis 1, and returns what ``local`` returns: a pair of (sharded, replicated).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8


def mesh(shape: tuple[int, ...], names: tuple[str, ...], kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A context with named device axes.

    Attributes:
      run: (local, sharded, replicated) -> (sharded, replicated).
      names: the device axes to sync over.
      local_gradients: whether gradients of replicated values stay on their device, so
        that the caller adds them up.
    """

    run: Callable
    names: Any = "d"
    local_gradients: bool = True

    def collect(self, tree: Any) -> Any:
        """Adds up gradients of replicated values taken inside.

        By parts: XLA aborts the process at a psum of complex constant zeros (jax
        0.10.2 and 0.12), which the gradient of a bias that takes no part is.
        """

        def add_up(a):
            if jnp.iscomplexobj(a):
                return lax.complex(*lax.psum((a.real, a.imag), self.names))
            return lax.psum(a, self.names)

        return jax.tree.map(add_up, tree) if self.local_gradients else tree


def _pieces(tree):  # [N, S, ...] -> [N, 8, S / 8, ...]
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0], DEVICES, a.shape[1] // DEVICES, *a.shape[2:]),
        tree,
    )


def _whole(tree):
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:]), tree
    )


def _by_map(map_):
    def run(local, sharded, replicated):
        f = map_(local, axis_name="d", in_axes=(1, None), out_axes=(1, 0))
        sharded, replicated = f(_pieces(sharded), replicated)
        return _whole(sharded), jax.tree.map(lambda a: a[0], replicated)

    return run


def _by_shard_map(shape=(8,), names=("d",), over=None, **options):
    over = names if over is None else over

    def run(local, sharded, replicated):
        spec = P(None, over)
        f = jax.shard_map(
            local,
            mesh=mesh(shape, names),
            in_specs=(spec, P()),
            out_specs=(spec, P()),
            **options,
        )
        return f(sharded, replicated)

    return run


MAPPED = {
    "vmap": Mapped(_by_map(jax.vmap)),
    "pmap": Mapped(_by_map(jax.pmap)),
    "shard_map": Mapped(_by_shard_map(), local_gradients=False),
    "shard_map unchecked": Mapped(_by_shard_map(check_vma=False)),
    "two axes": Mapped(
        _by_shard_map((2, 4), ("a", "b")), ("a", "b"), local_gradients=False
    ),
    "two axes unchecked": Mapped(
        _by_shard_map((2, 4), ("a", "b"), check_vma=False), ("a", "b")
    ),
    "partial manual": Mapped(
        _by_shard_map((4, 2), ("a", "b"), over=("a",), axis_names={"a"}),
        "a",
        local_gradients=False,
    ),
}


def sharded(tree: Any, kind: AxisType) -> Any:
    """Places arrays on eight devices, split along axis 1."""
    placement = NamedSharding(mesh((8,), ("d",), kind), P(None, "d"))
    return jax.tree.map(lambda a: jax.device_put(a, placement), tree)
