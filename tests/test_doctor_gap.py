"""The doctor finds outputs that lag in training and inference, and no chance ones."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from normjax import tools

PARTS, SEEDS, BATCH, IMAGES = (20, 20, 20, 20, 30), 2, 96, 64


class ResNet(nn.Module):
    """Residual blocks, whose norms each lag a little."""

    @nn.compact
    def __call__(self, x, train):
        def layer(x, width, stride=1):
            x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.98)(x)

        x = nn.silu(layer(x, 8))
        for _ in range(2):
            x = nn.silu(x + layer(nn.silu(layer(x, 8)), 8))
        x = nn.silu(layer(x, 16, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Several(nn.Module):
    """Many of them beside each other, each with outputs of its own."""

    models: int

    @nn.compact
    def __call__(self, x, train):
        of = nn.vmap(
            ResNet,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.models,
        )
        return list(of(name="each")(x, train))


@functools.cache
def digits():
    """Images to train on, and others, with their labels."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = jnp.asarray(data.images[order, ..., None] / 16, jnp.float32)
    y = jnp.asarray(data.target[order])
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


@functools.cache
def trained():
    """Variables of each training after each of its parts, stacked."""
    (x, y), _ = digits()
    model, tx = ResNet(), optax.sgd(0.05, 0.9, nesterov=True)
    batches = np.random.default_rng(1).integers(len(x), size=(sum(PARTS), BATCH))

    @jax.jit
    def step(variables, state, chosen):
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, new = model.apply(given, x[chosen], True, mutable=["batch_stats"])
            of = optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen])
            return of.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, state

    found = []
    init = jax.jit(lambda key: model.init(key, x[:2], True))
    for seed in range(SEEDS):
        variables = init(jax.random.key(seed))
        state = tx.init(variables["params"])
        for part in np.split(batches, np.cumsum(PARTS)[:-1]):
            for chosen in part:
                variables, state = step(variables, state, chosen)
            found.append(variables)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@functools.cache
def recalibrated():
    """The same, with statistics of the data."""
    (x, _), _ = digits()
    model = Several(len(PARTS) * SEEDS)
    variables = {k: {"each": of} for k, of in trained().items()}

    def apply(variables, x):
        return model.apply(variables, x, True, mutable=["batch_stats"])

    batches = np.split(x[: 14 * BATCH], 14)
    found = tools.recalibrate(apply, variables, batches, progress=False).variables
    return model, {k: of["each"] for k, of in found.items()}


@jax.jit
def accuracy(variables):
    _, (x, y) = digits()
    return (ResNet().apply(variables, x, False).argmax(-1) == y).mean()


def found(model, variables):
    """What the doctor finds of the outputs, for images that are held out."""
    _, (x, _) = digits()
    report = tools.doctor(model, x[:IMAGES], True, variables=variables)
    return [f for f in report.findings if f.name == "train-eval-gap"]


def test_norms_that_each_lag_a_little_are_found_by_the_outputs():
    """After all steps no norm is off by more than chance; the model is of no use."""
    for i in range(len(PARTS) - 1, len(PARTS) * SEEDS, len(PARTS)):
        lagging, well = (
            jax.tree.map(lambda a, i=i: a[i], of)
            for of in (trained(), recalibrated()[1])
        )
        assert accuracy(lagging) < 0.75 < 0.95 < accuracy(well)
        (finding,) = found(ResNet(), lagging)
        size, chance = map(int, re.findall(r"(\d+)%", finding.what))
        assert size > 60 and 5 < chance < 20
        assert f"(of {IMAGES} samples by chance {chance}%)" in finding.what


def test_outputs_of_ten_calibrated_models_differ_by_chance():
    model, variables = recalibrated()
    assert model.models == 10
    assert found(model, {k: {"each": of} for k, of in variables.items()}) == []
