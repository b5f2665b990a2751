"""Norms of nnx in linen models, and of linen in nnx models, by Flax's bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from family import assert_close
from flax import nnx
from test_errors import raises
from test_freeze import same_bits, trained

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (6, 4)) + 2


class Inner(nnx.Module):
    def __init__(self, features, *, rngs):
        self.linear = nnx.Linear(features, features, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(features, rngs=rngs)])
        self.last = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norms[0](self.linear(x)))


class Outer(nn.Module):
    """A linen model with an nnx part, and an nnx norm that is a part by itself."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="own")(x)
        x = nnx.bridge.to_linen(Inner, 4, name="inner")(x)
        return nnx.bridge.to_linen(nnx.RMSNorm, 4, name="rms")(x)


@pytest.fixture(scope="module")
def variables():
    return trained(nn.unbox(Outer().init(jax.random.key(0), X)))


def found(model, *args):
    return {"/".join(n.path): n.kind for n in tools.find_norms(model, *args)}


def test_norms_of_nnx_in_a_linen_model_are_found(variables):
    assert found(Outer(), X) == {
        "own": "BatchNorm",
        "inner/last": "LayerNorm",
        "inner/norms/0": "BatchNorm",
        "rms": "RMSNorm",
    }
    norms = tools.find_norms(Outer(), X)
    mask = tools.decay_mask(variables["params"], norms, biases=False)
    decays = [p for p, on in models.leaves(mask).items() if on]
    assert decays == [("inner", "linear", "kernel")]


def test_norms_of_nnx_in_a_linen_model_are_frozen(variables):
    def moved(model):
        _, stats = model.apply(variables, X, True, mutable=["batch_stats"])
        old, new = (models.leaves(v["batch_stats"]) for v in (variables, stats))
        return {"/".join(p[:-1]) for p in old if (old[p] != new[p]).any()}

    assert moved(Outer()) == {"own", "inner/norms/0"}
    assert moved(tools.freeze(Outer())) == set()
    part = tools.freeze(Outer(), "inner/*")
    assert moved(part) == {"own"}
    assert moved(tools.unfreeze(part, "inner/norms/0")) == {"own", "inner/norms/0"}
    y = part.apply(variables, X)
    inner = Inner(4, rngs=nnx.Rngs(0))
    nnx.update(inner, {"linear": variables["params"]["inner"]["linear"]})
    stats = variables["batch_stats"]["inner"]["norms"]
    assert y.shape == X.shape and set(stats) in ({0}, {"0"})


def test_norms_of_nnx_in_a_linen_model_are_replaced(variables):
    model = tools.replace(Outer(), "batch", "group", num_groups=2)
    model = tools.replace(model, "any", "rms", paths="inner/last")
    assert found(model, X) == {
        "own": "GroupNorm",
        "inner/last": "RMSNorm",
        "inner/norms/0": "GroupNorm",
        "rms": "RMSNorm",
    }
    converted, dropped = model.convert(variables, X)
    assert sorted(dropped) == [
        "batch_stats/inner/norms/0/mean",
        "batch_stats/inner/norms/0/var",
        "batch_stats/own/mean",
        "batch_stats/own/var",
        "params/inner/last/bias",
    ]
    same_bits(
        converted["params"]["inner"]["linear"], variables["params"]["inner"]["linear"]
    )

    class Written(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norms = nnx.List(
                [normjax.nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=rngs)]
            )
            self.last = normjax.nnx.RMSNorm(4, rngs=rngs)

        __call__ = Inner.__call__

    class WrittenSo(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = linen.GroupNorm(2, epsilon=1e-5, name="own")(x)
            x = nnx.bridge.to_linen(Written, name="inner")(x)
            return nnx.bridge.to_linen(nnx.RMSNorm, 4, name="rms")(x)

    assert_close(model.apply(converted, X), WrittenSo().apply(converted, X), 32)


def test_a_pattern_within_an_nnx_part_that_matches_nothing_is_refused(variables):
    with raises(
        ValueError,
        "freeze: paths must match batch norms of the model. Got paths='inner/last', and"
        ' the batch norms are: own, inner/norms/0. Pass one of these paths, or "*" for'
        " all.",
    ):
        tools.freeze(Outer(), "inner/last").apply(variables, X)


class Holder(nnx.Module):
    """An nnx model with a linen norm, and a linen model that holds norms."""

    def __init__(self, rngs):
        self.norm = nnx.bridge.ToNNX(nn.BatchNorm(True), rngs=rngs)
        self.dense = nnx.bridge.ToNNX(nn.Dense(4), rngs=rngs)
        self.net = nnx.bridge.ToNNX(nn.Sequential([nn.LayerNorm()]), rngs=rngs)
        self.own = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.own(self.net(self.dense(self.norm(x))))


@pytest.mark.parametrize("initialized", [False, True])
def test_linen_norms_in_an_nnx_model_are_found_or_told_of(initialized):
    model = Holder(nnx.Rngs(0))
    if initialized:
        model = nnx.bridge.lazy_init(model, X)
    with pytest.warns(
        UserWarning,
        match="^find_norms: the norms of a linen module in an nnx model show in a call"
        " of that module alone. Got Sequential at net. Pass the linen module and the"
        " arguments of its call to tools.find_norms as well.$",
    ):
        assert found(model) == {"norm": "BatchNorm", "own": "BatchNorm"}


def test_linen_norms_in_an_nnx_model_stay_as_they_are():
    model = nnx.bridge.lazy_init(Holder(nnx.Rngs(0)), X)
    with raises(
        TypeError,
        "freeze: a linen norm in an nnx model, by Flax's bridge, stays as it is. Got a"
        " BatchNorm at norm. Leave it out by paths, or replace it before ToNNX is given"
        " it.",
    ):
        tools.freeze(model)
    assert tools.freeze(model, "own").own.normalize_with == "running"
    written = nnx.bridge.ToNNX(tools.freeze(nn.BatchNorm(False)), rngs=nnx.Rngs(0))
    written = nnx.bridge.lazy_init(written, X)
    assert_close(written(X), X / jnp.sqrt(1 + 1e-5), 8)
