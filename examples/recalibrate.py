"""Ruins the statistics of a trained network, mends them, and adapts it to bad images.

    python examples/recalibrate.py

A small convolutional network learns scikit-learn's handwritten digits. Its statistics
are then kept in three ways: over a long training, over 50 steps with a momentum that is
far too slow for them, and by one sweep of recalibration. Then the test images are
corrupted, and the network adapts without labels: its statistics first, by
recalibration, and then the scales and biases of its norms, by tent. Some 20 s on two
CPU cores.
"""

import argparse
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from normjax import linen, tools

STEPS = 300  # of training
BATCH_SIZE = 64
LEARNING_RATE = 0.05
WIDTHS = (16, 32, 64)
LONG, SLOW = (0.99, 600), (0.999, 50)  # momentum, and the steps of it
TENT_STEPS, TENT_RATE = 20, 0.02
SEED = 0


class Net(nn.Module):
    """Three convolutions, each with its norm."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns logits [N, 10] for images [N, 8, 8, 1]."""
        for i, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), 2 if i else 1, use_bias=False)(x)
            x = nn.relu(linen.BatchNorm(not train, momentum=self.momentum)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Data(NamedTuple):
    """Images [N, 8, 8, 1] in [0, 1] and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Data, Data]:
    """Returns 1078 images to train on and 719 to test, the same ones always."""
    found = load_digits()
    images = (found.images[..., None] / 16).astype(np.float32)
    split = train_test_split(
        images, found.target, test_size=0.4, stratify=found.target, random_state=0
    )
    return Data(split[0], split[2]), Data(split[1], split[3])


def batches(data: Data, steps: int) -> Any:
    """Batches drawn at random, so many."""
    rng = np.random.default_rng(SEED)
    for _ in range(steps):
        chosen = rng.choice(len(data.labels), BATCH_SIZE, replace=False)
        yield Data(data.images[chosen], data.labels[chosen])


def in_order(images: np.ndarray) -> list[np.ndarray]:
    """All of the images once, in batches; the last one is smaller."""
    return np.split(images, range(BATCH_SIZE, len(images), BATCH_SIZE))


def train(data: Data, steps: int) -> dict:
    """Returns variables after so many steps of SGD."""
    init = jax.jit(functools.partial(Net().init, train=False))
    variables = init(jax.random.key(SEED), data.images[:1])
    optimizer = optax.sgd(LEARNING_RATE, 0.9)

    @jax.jit
    def step(variables, state, batch):
        def loss_of(params):
            logits, updates = Net().apply(
                {**variables, "params": params},
                batch.images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, batch.labels).mean(), updates

        grads, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
        changes, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, state

    state = optimizer.init(variables["params"])
    for batch in batches(data, steps):
        variables, state = jax.block_until_ready(step(variables, state, batch))
    return variables


def averaged(variables: dict, data: Data, momentum: float, steps: int) -> dict:
    """The statistics anew, from 0 and 1, as so many steps of training keep them."""
    model = Net(momentum)
    fresh = model.init(jax.random.key(SEED), data.images[:1], train=False)
    variables = {**variables, "batch_stats": fresh["batch_stats"]}

    @jax.jit
    def step(variables, images):
        _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return {**variables, **updates}

    for batch in batches(data, steps):
        variables = jax.block_until_ready(step(variables, batch.images))
    return variables


def apply(variables: dict, images: np.ndarray) -> Any:
    """What is recalibrated: outputs, and the updates of batch_stats."""
    return Net().apply(variables, images, train=False, mutable=["batch_stats"])


def tent(variables: dict, images: np.ndarray, steps: int) -> dict:
    """Steps of tent: surer predictions, by the scales and biases of the norms alone."""
    norms = tools.find_norms(Net(), images, train=True)
    params = variables["params"]
    optimizer = tools.tent(optax.sgd(TENT_RATE, 0.9), params, norms)

    @jax.jit
    def step(params, state):
        def loss_of(params):  # normalizes by the batch, whose updates are left
            logits, _ = Net().apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return tools.entropy(logits).mean()

        changes, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = jax.block_until_ready(step(params, state))
    return {**variables, "params": params}


def corrupted(images: np.ndarray) -> dict[str, np.ndarray]:
    """The images as other cameras would have taken them."""
    rng = np.random.default_rng(SEED)
    noise = rng.normal(size=images.shape).astype(np.float32)
    return {
        "low contrast": 0.3 * images + 0.5,
        "noise": images + 0.3 * noise,
        "haze": np.clip(images + 0.6, 0, 1),
    }


@jax.jit
def _correct(variables: dict, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    logits = Net().apply(variables, images, train=False)
    return (logits.argmax(-1) == labels).mean()


def accuracy(variables: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """The part of the images that is classified right."""
    return float(_correct(variables, images, labels))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, ruins, mends and adapts; returns the accuracies by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    args = parser.parse_args(argv)
    training, test = digits()
    trained = train(training, args.steps)

    long = averaged(trained, training, *LONG)
    ruined = averaged(trained, training, *SLOW)
    mended = tools.recalibrate(apply, ruined, in_order(training.images))
    found = {
        f"statistics of {LONG[1]} steps, momentum {LONG[0]}": long,
        f"ruined: of {SLOW[1]} steps, momentum {SLOW[0]}": ruined,
        "recalibrated": mended.variables,
    }
    accuracies = {k: accuracy(v, *test) for k, v in found.items()}
    print("\nAccuracy on the test images")
    for name, value in accuracies.items():
        print(f"  {name:38} {value:.2%}")
    print(f"\nHow far recalibration moved the statistics\n{mended.table()}\n")

    print("Accuracy on corrupted test images   as trained  recalibrated  and tent")
    for name, images in corrupted(test.images).items():
        adapted = tools.recalibrate(apply, mended.variables, [images], progress=False)
        surer = tent(adapted.variables, images, TENT_STEPS)
        surer = tools.recalibrate(apply, surer, [images], progress=False)
        of = (mended.variables, adapted.variables, surer.variables)
        values = [accuracy(v, images, test.labels) for v in of]
        print(f"  {name:33} {values[0]:>10.2%} {values[1]:>13.2%} {values[2]:>9.2%}")
        names = (name, f"{name}, recalibrated", f"{name}, tent")
        accuracies |= dict(zip(names, values, strict=True))
    return accuracies


if __name__ == "__main__":
    main()
