"""The norms of a model are found by what they are, and others put in their place."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx import graphlib

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (8, 4)) + 3


class Block(nn.Module):
    """Flax's batch norm and normjax's, by names that say nothing."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=False, name="a")(x)
        return linen.BatchNorm(use_running_average=False, name="b")(x)


class Shared(nn.Module):
    def setup(self):
        self.block = Block()
        self.twice = linen.RMSNorm()
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x, train):
        assert isinstance(train, bool)
        x = self.dropout(self.block(x), deterministic=not train)
        return self.twice(self.twice(x))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(nn.remat(Block)(name="block"), x, None)
        y, _ = linen.AddLayerNorm(name="last")(x, x)
        return y


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)]
        )
        self.again = self.layers[1]
        self.heads = nnx.Dict({"a": normjax.nnx.GroupNorm(4, 2, rngs=rngs)})

    def __call__(self, x):
        return self.heads["a"](self.again(self.layers[1](self.layers[0](x))))


def found(*arguments):
    return {"/".join(n.path): n.kind for n in tools.find_norms(*arguments)}


def test_norms_are_found_by_what_they_are():
    assert found(Shared(), X, True) == {
        "block/a": "BatchNorm",
        "block/b": "BatchNorm",
        "twice": "RMSNorm",
    }
    of_shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert found(Scanned(), of_shapes) == {
        "block/a": "BatchNorm",
        "block/b": "BatchNorm",
        "last": "LayerNorm",
    }
    assert found(OfNnx(nnx.Rngs(0))) == {"heads/a": "GroupNorm", "again": "BatchNorm"}


def test_the_path_is_that_of_the_variables():
    shapes = jax.eval_shape(Scanned().init, jax.random.key(0), X)
    for norm in tools.find_norms(Scanned(), X):
        of = shapes["params"]
        for name in norm.path:
            of = of[name]
        assert set(of) == {"scale", "bias"}


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError) as error:
        tools.find_norms({"params": {}}, X)
    assert str(error.value) == (
        "find_norms: model must be a module of flax.linen or flax.nnx. Got dict. Pass"
        " the model itself, not its variables or its apply."
    )


def test_a_linen_model_without_the_arguments_of_its_call_is_refused():
    for model in (Shared(), tools.freeze(Shared())):
        with pytest.raises(TypeError) as error:
            tools.find_norms(model)
        assert str(error.value) == (
            "find_norms: a linen model is called once, to see which norms that reaches."
            " Got no arguments, and Shared needs x, train. Pass them after the model,"
            " arrays or jax.ShapeDtypeStruct."
        )


def last_batch(module):
    """A batch norm that keeps nothing of the old statistics."""
    if models.kind_of(module) == "BatchNorm":
        return linen.BatchNorm(False, momentum=0, parent=module.scope.rewound())
    return None


def test_another_module_finds_the_same_variables():
    """Within a scan and a remat too, where what it writes comes out as the model's."""
    variables = Scanned().init(jax.random.key(0), X)
    with models.substituted(last_batch) as swapped:
        y, of = Scanned().apply(variables, X, mutable=["batch_stats"])
    assert set(swapped) == {("block", "a"), ("block", "b")}
    want, updated = Scanned().apply(variables, X, mutable=["batch_stats"])
    assert jnp.allclose(y, want, atol=1e-5)
    for name in ("a", "b"):
        got, moved = (u["batch_stats"]["block"][name]["mean"] for u in (of, updated))
        assert got.shape == (3, 4)
        assert jnp.allclose(got * 0.01, moved, rtol=1e-5, atol=1e-7)


def test_a_program_compiled_before_is_not_swapped_and_says_so():
    variables = Scanned().init(jax.random.key(0), X)
    call = jax.jit(lambda v: Scanned().apply(v, X, mutable=["batch_stats"]))
    call(variables)
    with models.substituted(last_batch) as swapped:
        call(variables)
    assert swapped == []


def test_a_copy_of_an_nnx_model_has_the_others_in_all_places():
    model = OfNnx(nnx.Rngs(0))
    other = normjax.nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))

    def swap(path, module):
        return other if models.kind_of(module) == "BatchNorm" else None

    copy = models.nnx_replaced(model, swap)
    assert copy.again is copy.layers[1] is other
    assert model.again is model.layers[1] is not other
    assert copy.layers[0] is not model.layers[0]
    assert models.nnx_replaced(model.again, swap) is other
    copy(X)
    assert not model.again.mean[...].any()
    assert other.mean[...].any()


class Holder(nnx.Pytree):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    norm: nnx.BatchNorm


class Slot:
    """A node of nnx's graph that is neither a Pytree nor a pytree of JAX."""

    def __init__(self, norm):
        self.norm = norm


graphlib.register_graph_node_type(
    Slot,
    lambda slot: ((("norm", slot.norm),), None),
    lambda slot, key, value: setattr(slot, key, value),
    lambda slot, key: delattr(slot, key),
    lambda _: Slot(None),
    lambda slot: delattr(slot, "norm"),
    lambda slot, items: slot.__init__(dict(items)["norm"]),
)


class Held(nnx.Module):
    def __init__(self, of):
        self.of = nnx.data(of)

    def __call__(self, x):
        return self.of.norm(x)


def test_norms_are_replaced_in_whatever_holds_them():
    for of in (Holder(nnx.Rngs(0)), Pair(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))):
        model = Held(of)
        assert found(model) == {"of/norm": "BatchNorm"}
        frozen = tools.freeze(model)
        frozen(X)
        assert not frozen.of.norm.mean[...].any()
        sweep = tools.recalibrate(lambda m, x: m(x), model, [X], progress=False)
        mean = sweep.variables.of.norm.mean[...]
        assert jnp.allclose(mean, X.mean(0), rtol=1e-5)
        assert not model.of.norm.mean[...].any()
    with pytest.raises(TypeError) as error:
        tools.freeze(Held(Slot(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))))
    assert str(error.value) == (
        "freeze: what holds a norm must be an nnx.Pytree, such as an nnx.Module, or a"
        " pytree in one. Got BatchNorm at of/norm in something else. Let its class"
        " inherit from nnx.Pytree."
    )


@pytest.mark.parametrize("declines", [False, True])
def test_a_substitution_sees_what_those_within_it_have_made(declines):
    variables = jax.eval_shape(Scanned().init, jax.random.key(0), X)
    variables = jax.tree.map(lambda a: jnp.ones(a.shape), variables)
    seen = []

    def outer(module):
        seen.append((module.path, getattr(module, "epsilon", None)))
        return last_batch(module)

    def inner(module):
        if declines or models.kind_of(module) != "BatchNorm":
            return None
        return linen.BatchNorm(False, epsilon=1.0, parent=module.scope.rewound())

    def call():
        return Scanned().apply(variables, X, mutable=["batch_stats"])

    with models.substituted(outer) as of_outer, models.substituted(inner) as of_inner:
        jax.eval_shape(call)
    assert set(of_outer) == {("block", "a"), ("block", "b")}
    assert set(of_inner) == (set() if declines else set(of_outer))
    epsilons = {epsilon for path, epsilon in seen if path in of_outer}
    assert epsilons == {1e-5 if declines else 1.0}
