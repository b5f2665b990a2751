"""Draws the picture of docs/statistics.md: a small network on the digits, looked at.

    python benchmarks/looks.py docs/looks.png

Batch norms with momentum 0.99, whose running statistics are late, on scikit-learn's
handwritten digits. Needs the extra `examples`.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from normjax import linen, tools

STEPS, EVERY, BATCH, RATE = 120, 10, 128, 0.1


class Net(nn.Module):
    """Three convolutions with batch norms, a layer norm and a head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [N, 8, 8, 1]
        for i, features in enumerate((16, 32, 32)):
            x = nn.Conv(features, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(linen.BatchNorm(not train, name=f"batch{i}")(x))
        x = linen.LayerNorm(name="layer")(x.mean((1, 2)))
        return nn.Dense(10, name="head")(x)


def main() -> None:
    """Trains, looks every few steps, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("png", type=pathlib.Path)
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1)  # 0 to 16
    model, optimizer = Net(), optax.sgd(RATE, momentum=0.9)
    variables = model.init(jax.random.key(0), images[:1], True)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables: dict, state: optax.OptState, x: jax.Array, y: jax.Array):
        def loss(params: dict):
            collections = {**variables, "params": params}
            logits, new = model.apply(collections, x, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, state, updates

    looks = {}
    for i in range(STEPS + 1):
        start = BATCH * i % (len(images) - BATCH)
        x, y = images[start : start + BATCH], labels[start : start + BATCH]
        if i % EVERY == 0:
            looks[i] = tools.look(model, variables, images[:BATCH], False)
        params = variables["params"]
        variables, state, updates = step(variables, state, x, y)
    rates = tools.effective_rates(params, updates, RATE)
    tools.plot(looks, rates, path=args.png)


if __name__ == "__main__":
    main()
