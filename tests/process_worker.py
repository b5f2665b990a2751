"""One of several processes that train a small network together; see test_processes.

    python tests/process_worker.py ADDRESS PROCESSES NUMBER DEVICES OUT

Each process has samples of its own, as many as it has, padded to one size. What they
train is compared with one process that has them all.
"""

import pathlib
import sys
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
from normjax import linen, tools

WAYS = ("jit", "shard_map", "pmap")
SIZES = {2: (7, 5), 4: (3, 0, 5, 4)}  # samples of each process
FEATURES, STEPS = 6, 3
PADDED = 8  # a multiple of the devices of a process
TX = optax.sgd(0.1, momentum=0.9)


class Net(nn.Module):
    """Two layers with batch norm, a third with layer norm."""

    dtype: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask):
        fields = {"dtype": self.dtype, "param_dtype": self.dtype}
        for _ in range(2):
            x = nn.Dense(FEATURES, **fields)(x)
            norm = linen.BatchNorm(
                False,
                momentum=0.9,
                axis_name=self.axis_name,
                force_float32_reductions=False,
                **fields,
            )
            x = nn.gelu(norm(x, mask=mask[:, None]))
        return linen.LayerNorm(**fields)(nn.Dense(FEATURES, **fields)(x))


def samples(process, processes, dtype):
    """What a process has: each feature of each process around a mean of its own."""
    rng = np.random.default_rng(process)
    n = SIZES[processes][process]
    return rng.normal(10.0 * process, 1 + process, (n, FEATURES)).astype(dtype)


def start(dtype):
    x, mask = jnp.ones((2, FEATURES), dtype), jnp.ones(2, bool)
    variables = Net(dtype).init(jax.random.key(0), x, mask)
    return variables["params"], variables["batch_stats"], TX.init(variables["params"])


def step(net, reduce, state, x, mask):
    """A step of SGD, of a part of the batch where `reduce` adds up all parts."""
    params, statistics, moments = state

    def loss_of(params):
        y, new = net.apply(
            {"params": params, "batch_stats": statistics},
            x,
            mask,
            mutable="batch_stats",
        )
        error = jnp.where(mask[:, None], jnp.square(y - jnp.sin(x)), 0).sum()
        return error / reduce(mask.sum()), new["batch_stats"]

    (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    loss, gradients = reduce(loss), reduce(gradients)
    updates, moments = TX.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), statistics, moments), loss, gradients


def outcome(state, losses, gradients):
    """What is compared: of the gradients those of the last step."""
    return {
        "losses": losses,
        "gradients": gradients,
        "params": state[0],
        "statistics": state[1],
    }


def alone(processes, dtype):
    """Trains in one process, with the samples of all."""
    parts = [samples(i, processes, dtype) for i in range(processes)]
    x = jnp.asarray(np.concatenate(parts))
    mask, state, losses = jnp.ones(len(x), bool), start(dtype), []
    one = jax.jit(lambda state: step(Net(dtype), lambda a: a, state, x, mask))
    for _ in range(STEPS):
        state, loss, gradients = one(state)
        losses.append(loss)
    return outcome(state, losses, gradients)


def together(way, process, processes, dtype):
    """Trains with the other processes; returns the same on all of them."""
    x, mask = tools.pad_batch(samples(process, processes, dtype), PADDED)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    state, losses = start(dtype), []

    def psum(tree):
        return jax.tree.map(lambda a: jax.lax.psum(a, "data"), tree)

    if way == "pmap":
        local = jax.local_device_count()
        x, mask = (a.reshape(local, -1, *a.shape[1:]) for a in (x, mask))
        state = jax.tree.map(lambda a: jnp.stack([a] * local), state)

        def of_parts(state, x, mask):
            return step(Net(dtype, "data"), psum, state, x, mask)

        one = jax.pmap(of_parts, axis_name="data")
    else:
        split, same = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        x, mask = tools.global_batch((x, mask), split)
        state = jax.device_put(state, same)

        def of_all(state, x, mask):
            return step(Net(dtype), lambda a: a, state, x, mask)

        def of_part(state, x, mask):
            return step(Net(dtype, "data"), psum, state, x, mask)

        if way == "shard_map":
            parts = (P(), P("data"), P("data"))
            of_all = jax.shard_map(
                of_part, mesh=mesh, in_specs=parts, out_specs=P(), check_vma=False
            )
        one = jax.jit(of_all, out_shardings=same)
    for _ in range(STEPS):
        # Steps that wait for each other: jax 0.10 hangs where they queue up.
        state, loss, gradients = jax.block_until_ready(one(state, x, mask))
        losses.append(loss)
    drift = (
        tools.find_drift(state[:2], stacked=True)
        if way == "pmap"
        else (tools.find_drift(state[:2]))
    )
    assert not drift, [str(d) for d in drift]

    def mine(a):
        return np.asarray(a.addressable_data(0)).reshape(a.shape[way == "pmap" :])

    return jax.tree.map(mine, outcome(state, losses, gradients))


def drifting(process):
    """What each process finds, where the second has something else than the others."""
    local = jax.local_device_count()
    step = jax.pmap(lambda x: x + (process == 1))
    tree = {"mean": step(jnp.zeros((local, 3))), "var": jnp.ones((local, 3))}
    return "\n".join(map(str, tools.find_drift(tree, stacked=True)))


def disagree(process):
    """What a process is told, where one has a sample more, or another order."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    x, names = np.zeros((PADDED, FEATURES), np.float32), ["x", "y"]
    longer = {"x": np.zeros((PADDED + (process == 1), FEATURES), np.float32)}
    turned = OrderedDict.fromkeys(names[::-1] if process == 1 else names, x)
    told = []
    for batch in (longer, turned):
        try:
            tools.global_batch(batch, NamedSharding(mesh, P("data")))
        except ValueError as error:
            told.append(str(error))
    return "\n".join(told)


def outside_of_jit(process):
    """What a process gets of keys, and of moments of a batch with weights."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    local = jax.local_device_count()
    keys = jax.random.split(jax.random.key(process), local)
    own = {"key": keys, "x": process + jnp.ones((local, 1)), "weight": jnp.ones(local)}
    batch = tools.global_batch(own, NamedSharding(mesh, P("data")))
    shards = [s.data for s in batch["key"].addressable_shards]
    assert all((a == b).all() for a, b in zip(shards, keys[:, None], strict=True))
    m = normjax.moments(batch["x"], 0, where=batch["weight"][:, None])
    return f"{float(m.count[0, 0])} of mean {float(m.mean[0, 0])}"


def flat(tree):
    """A tree as a dictionary of arrays, as np.savez wants it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in leaves}


def main() -> None:
    address, processes, process, devices, out = sys.argv[1:]
    processes, process = int(processes), int(process)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, processes, process, initialization_timeout=60)
    assert jax.device_count() == processes * int(devices)
    for dtype in ("float64", "float32"):
        for way in WAYS:
            np.savez(
                f"{out}/{way}-{dtype}-{process}.npz",
                **flat(together(way, process, processes, dtype)),
            )
    for tell in (drifting, disagree, outside_of_jit):
        pathlib.Path(f"{out}/{tell.__name__}-{process}.txt").write_text(tell(process))
    print("done", flush=True)


if __name__ == "__main__":
    main()
