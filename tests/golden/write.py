"""Writes the checkpoints that test_checkpoints.py reads, with Flax's own modules.

Run in the environment of each version whose checkpoints are to load:

    python tests/golden/write.py
"""

import pathlib
import shutil
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

HERE = pathlib.Path(__file__).parent
FEATURES = 4
NAMES = ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"]
FIELDS = {name: {"use_fast_variance": False} for name in NAMES}
FIELDS["BatchNorm"]["momentum"] = 0.5
FIELDS["GroupNorm"]["num_groups"] = 2


class Linen(nn.Module):
    """Every norm after the other, with a dense layer in front.

    Attributes:
      library: where the norms are from.
      fields: more fields of batch norm.
    """

    library: object
    fields: tuple = ()

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(FEATURES, name="dense")(x)
        for name in NAMES:
            fields = FIELDS[name]
            if name == "BatchNorm":
                fields = {**fields, **dict(self.fields)}
                fields["use_running_average"] = not train
            x = getattr(self.library, name)(**fields, name=name)(x) + x
        return x


class Nnx(nnx.Module):
    """The same model in nnx."""

    def __init__(self, library, **fields):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        for name in NAMES:
            more = {**FIELDS[name], **(fields if name == "BatchNorm" else {})}
            setattr(self, name, getattr(library, name)(FEATURES, rngs=rngs, **more))

    def __call__(self, x):
        x = self.dense(x)
        for name in NAMES:
            x = getattr(self, name)(x) + x
        return x


def loss_of(y):
    return jnp.mean(jnp.sin(y) * jnp.arange(1.0, 1 + FEATURES))


def linen_step(model, variables, x):
    """Outputs of inference and training, what was updated, and gradients."""

    def loss(params):
        y, updates = model.apply(
            {**variables, "params": params}, x, True, mutable=["batch_stats"]
        )
        return loss_of(y), (y, updates["batch_stats"])

    grads, (y, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    inference = model.apply(variables, x, False)
    return {"inference": inference, "training": y, "stats": stats, "grads": grads}


def nnx_step(model, x):
    """The same; the model is left as it was."""
    trained = nnx.clone(model)

    def loss(trained):
        y = trained(x)
        return loss_of(y), y

    grads, y = nnx.grad(loss, has_aux=True)(trained)
    return {
        "inference": nnx.view(model, use_running_average=True)(x),
        "training": y,
        "stats": nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat)),
        "grads": nnx.to_pure_dict(grads),
    }


def flat(tree, prefix=""):
    """Leaves by path, as npz wants them."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {
        path: leaf
        for k, v in tree.items()
        for path, leaf in flat(v, f"{prefix}/{k}").items()
    }


def batch(seed):
    return 3 * jax.random.normal(jax.random.key(seed), (4, 3, FEATURES)) + 1


def save(path, tree):
    """Writes an orbax checkpoint, without the path that it stands under."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    (path / "commit_success.txt").unlink(missing_ok=True)


def main():
    folder = HERE / f"jax-{jax.__version__}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    model = Linen(nn)
    variables = model.init(jax.random.key(0), batch(0), True)
    for i in range(3):
        found = linen_step(model, variables, batch(i))
        params = jax.tree.map(
            lambda p, d: p - 0.3 * d, variables["params"], found["grads"]
        )
        variables = {"params": params, "batch_stats": found["stats"]}
    expected = {"linen": linen_step(model, variables, batch(9))}
    (folder / "linen.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    save(folder / "linen.orbax", variables)

    model = Nnx(nnx)
    for i in range(3):
        found = nnx_step(model, batch(i))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        params = jax.tree.map(lambda p, d: p - 0.3 * d, params, found["grads"])
        nnx.update(model, params)
        nnx.update(model, found["stats"])
    expected["nnx"] = nnx_step(model, batch(9))
    save(folder / "nnx.orbax", nnx.state(model))

    np.savez_compressed(folder / "expected.npz", x=batch(9), **flat(expected))
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder.name}: {size / 1024:.0f} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
