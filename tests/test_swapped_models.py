"""Whole models: the library of the norms changes alone; a checkpoint of Flax loads."""

import functools

import flax.linen as nn
import flax.nnx
import flax.serialization
import jax
import numpy as np
import pytest

import normjax.linen
import normjax.nnx


class ResNetBlock(nn.Module):
    norms: object
    features: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        def norm(**fields):
            return self.norms.BatchNorm(not train, momentum=0.9, **fields)

        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = norm(scale_init=nn.initializers.constant(0.5))(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
            x = norm()(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    norms: object

    @nn.compact
    def __call__(self, x, train):  # [N, H, W, C]
        x = nn.relu(
            self.norms.BatchNorm(not train)(nn.Conv(4, (3, 3), use_bias=False)(x))
        )
        for features, strides in [(4, 1), (8, 2)]:
            x = ResNetBlock(self.norms, features, strides)(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    norms: object

    @nn.compact
    def __call__(self, x, train):  # [N, T, C]
        x = x + self.param("position", nn.initializers.normal(), x.shape[1:])[None]
        for _ in range(2):
            y = self.norms.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
            y = self.norms.RMSNorm()(x)
            x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(y)))
        return nn.Dense(3)(self.norms.LayerNorm(use_bias=False)(x))


class NnxNet(flax.nnx.Module):
    """Convolutions with batch norm, then attention between layer norms."""

    def __init__(self, norms, rngs):
        self.conv = flax.nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.batch_norm = norms.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.group_norm = norms.GroupNorm(8, num_groups=2, rngs=rngs)
        self.attention = flax.nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layer_norm = norms.LayerNorm(8, rngs=rngs)
        self.rms_norm = norms.RMSNorm(8, rngs=rngs)
        self.head = flax.nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):  # [N, H, W, C]
        x = flax.nnx.relu(self.batch_norm(self.conv(x)))
        x = x.reshape(-1, x.shape[-1])  # of Flax's group norm, the case that is right
        x = self.group_norm(x).reshape(4, -1, x.shape[-1])
        x = x + self.attention(self.layer_norm(x))
        return self.head(self.rms_norm(x).mean(1))


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want):
    """A few roundings for each of some twenty layers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(g, w, rtol=0, atol=200 * 1.2e-7 * size)


@pytest.mark.parametrize(
    ("model", "x"),
    [(ResNet, normal((4, 8, 8, 2)) * 3 + 1), (Transformer, normal((4, 5, 8)) + 2)],
    ids=["ResNet", "Transformer"],
)
def test_linen_model_with_its_norms_swapped(model, x):
    def step(module, variables, x):
        def loss(params, x):
            y, updates = module.apply(
                {**variables, "params": params}, x, True, mutable=["batch_stats"]
            )
            return (y**2).mean(), (y, updates)

        (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            variables["params"], x
        )
        return *aux, grads

    theirs, ours = model(nn), model(normjax.linen)
    of_theirs, of_ours = (
        jax.jit(functools.partial(step, module)) for module in (theirs, ours)
    )
    initialize = jax.jit(theirs.init, static_argnums=2)
    variables = initialize(jax.random.key(0), x, True)
    _, updates, _ = of_theirs(variables, x)  # statistics that moved
    checkpoint = flax.serialization.to_bytes({**variables, **updates})

    target = jax.jit(ours.init, static_argnums=2)(jax.random.key(1), x, True)
    loaded = flax.serialization.from_bytes(target, checkpoint)
    assert flax.serialization.to_bytes(loaded) == checkpoint
    close(of_ours(loaded, x + 0.5), of_theirs(loaded, x + 0.5))
    infer = [jax.jit(lambda v, m=m: m.apply(v, x, False)) for m in (ours, theirs)]
    close(*(f(loaded) for f in infer))


def test_nnx_model_with_its_norms_swapped():
    x = normal((4, 4, 4, 2)) * 3 + 1

    def loss(model, x):
        y = model(x)
        return (y**2).mean(), y

    @flax.nnx.jit
    def step(model, x):
        return flax.nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)

    theirs = NnxNet(flax.nnx, flax.nnx.Rngs(0))
    step(theirs, x)
    checkpoint = flax.serialization.msgpack_serialize(
        jax.device_get(flax.nnx.to_pure_dict(flax.nnx.state(theirs)))
    )
    ours = NnxNet(normjax.nnx, flax.nnx.Rngs(1))
    state = flax.nnx.state(ours)
    flax.nnx.replace_by_pure_dict(state, flax.serialization.msgpack_restore(checkpoint))
    flax.nnx.update(ours, state)

    found = []
    for model in (ours, theirs):
        (grads, dx), y = step(model, x + 0.5)
        statistics = flax.nnx.to_pure_dict(flax.nnx.state(model, flax.nnx.BatchStat))
        model.eval()
        found.append((flax.nnx.to_pure_dict(grads), dx, y, statistics, model(x)))
    close(*found)
