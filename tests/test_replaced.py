"""A linen model with other norms in it is used as the model is."""

import copy
import pickle
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import assert_close
from flax.training.train_state import TrainState
from test_errors import raises
from test_freeze import same_bits, trained

from normjax import linen, tools
from normjax.tools import models

T = typing.TypeVar("T")
X = jax.random.normal(jax.random.key(1), (6, 3)) + 2


class Part(nn.Module):
    """One of two batch norms, in a part that is made in setup."""

    width: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width)(x)
        return jnp.tanh(nn.BatchNorm(name="norm")(x, not train))


class Model(nn.Module):
    """What models have: fields, properties, helpers, methods, parts in containers."""

    part: nn.Module
    dtype: object = jnp.float32
    sizes: tuple = (3, 3)

    def setup(self):
        self.norm = nn.BatchNorm()
        self.parts = [Part(), {"last": Part()}]
        self.head = nn.Dense(2)

    @property
    def depth(self):
        return len(self.sizes)

    @nn.nowrap
    def scaled(self, factor):
        return self.clone(sizes=tuple(factor * s for s in self.sizes))

    def encode(self, x, train=False):
        x = self.norm(self.part(x.astype(self.dtype), train), not train)
        return self.parts[1]["last"](self.parts[0](x, train), train)

    def __call__(self, x, train=False):
        return self.head(self.encode(x, train))


MODEL = Model(Part())


@pytest.fixture(scope="module")
def variables():
    return trained(models.abstract_init(MODEL, X))


# Each of these, of the frozen model in training, is what the model gives in inference.
CALLS = {
    "apply": lambda m, v: m.apply(v, X, True),
    "by name": lambda m, v: headed(v, m.apply(v, X, True, method="encode")),
    "its method": lambda m, v: headed(v, m.apply(v, X, True, method=m.encode)),
    "the model's": lambda m, v: headed(v, m.apply(v, X, True, method=MODEL.encode)),
    "the class's": lambda m, v: headed(v, m.apply(v, X, True, method=Model.encode)),
    "a function": lambda m, v: m.apply(v, X, method=lambda m, x: m(x, True)),
    "of parts": lambda m, v: m.apply(v, X, method=by_parts),
    "bind": lambda m, v: m.bind(v)(X, True),
    "bound parts": lambda m, v: by_parts(m.bind(v), X),
    "unbind": lambda m, v: (lambda m, v: m.apply(v, X, True))(*m.bind(v).unbind()),
    "clone": lambda m, v: m.clone().apply(v, X, True),
    "copy": lambda m, v: m.copy(sizes=(4, 4)).apply(v, X, True),
    "a helper": lambda m, v: m.scaled(2).apply(v, X, True),
    "copied": lambda m, v: copy.copy(m).apply(v, X, True),
    "deeply": lambda m, v: copy.deepcopy(m).apply(v, X, True),
    "pickled": lambda m, v: pickle.loads(pickle.dumps(m)).apply(v, X, True),
    "jit": lambda m, v: jax.jit(m.apply, static_argnums=2)(v, X, True),
    "static": lambda m, v: static(m, v),
    "nn.apply": lambda m, v: nn.apply(lambda m, x: m(x, True), m)(v, X),
    "nn.apply of parts": lambda m, v: nn.apply(by_parts, m)(v, X),
    "sequential": lambda m, v: inside(nn.Sequential([m]), "layers_0", v),
    "a field": lambda m, v: inside(Holds(m), "model", v),
    "made within": lambda m, v: inside(Makes(), "model", v),
    "made in a call": lambda m, v: inside(Calls(), "Model_0", v),
    "nn.jit": lambda m, v: nn.jit(type(m), static_argnums=2)(m.part).apply(v, X, True),
    "remat": lambda m, v: nn.remat(type(m), static_argnums=2)(m.part).apply(v, X, True),
    "TrainState": lambda m, v: state_of(m, v).apply_fn(v, X, True),
}


def headed(variables, h):
    return MODEL.apply(variables, h, method=lambda m, h: m.head(h))


def by_parts(model, x):
    x = model.norm(model.part(x, True), False)
    return model.head(model.parts[1]["last"](model.parts[0](x, True), True))


def static(model, variables):
    """As a static argument of jit: equal models are compiled once."""
    traces = []

    def f(model, variables):
        traces.append(model)
        return model.apply(variables, X, True)

    of = jax.jit(f, static_argnums=0)
    y, again = of(model, variables), of(tools.freeze(Model(Part())), variables)
    assert len(traces) == 1 and (y == again).all()
    return y


def inside(whole, name, variables):
    inner = {c: {name: v} for c, v in variables.items()}
    return whole.apply(inner, X, True)


class Holds(nn.Module):
    model: nn.Module

    def __call__(self, x, train):
        return self.model(x, train)


class Makes(nn.Module):
    def setup(self):
        self.model = tools.freeze(Model(Part()))

    def __call__(self, x, train):
        return self.model(x, train)


class Calls(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return tools.freeze(Model(Part(parent=None)))(x, train)


def state_of(model, variables):
    return TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1)
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_frozen_model_is_called_in_all_ways_that_the_model_is(call, variables):
    got = CALLS[call](tools.freeze(MODEL), variables)
    assert_close(got, MODEL.apply(variables, X, False), 8)
    assert jnp.abs(got - MODEL.apply(variables, X, True, mutable=True)[0]).max() > 0.01


def test_its_attributes_are_those_of_the_model():
    """Those of Flax's ImageNet script, `model.dtype`, too."""
    frozen = tools.freeze(Model(Part(), dtype=jnp.bfloat16))
    assert isinstance(frozen, Model) and type(frozen).__name__ == "Model"
    assert (frozen.dtype, frozen.sizes, frozen.depth) == (jnp.bfloat16, (3, 3), 2)
    assert frozen.part == Part() and frozen.name is None and frozen.parent is None
    assert repr(frozen) == repr(Model(Part(), dtype=jnp.bfloat16))
    assert frozen.clone(sizes=(1,)).sizes == (1,)
    with pytest.raises(AttributeError, match="no attribute"):
        frozen.model  # noqa: B018


def test_equal_replacements_of_equal_models_are_equal():
    def replaced(**fields):
        return tools.replace(Model(Part()), "batch", "group", **fields)

    one, other = replaced(num_groups=1), replaced(num_groups=3)
    assert one == replaced(num_groups=1) and hash(one) == hash(replaced(num_groups=1))
    assert one != other and one != Model(Part()) and Model(Part()) != one
    assert one != one.clone(sizes=(1,))
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


def test_it_is_initialized_and_tabulated_with_the_norms_it_has():
    grouped = tools.replace(MODEL, "batch", "group", num_groups=3)
    want = models.abstract_init(grouped, X)
    assert set(want) == {"params"}
    key = jax.random.key(0)
    ways = [
        grouped.lazy_init(key, jax.ShapeDtypeStruct(X.shape, X.dtype)),
        grouped.init_with_output(key, X)[1],
        jax.jit(grouped.init)(key, X),
        nn.init(lambda m, x: m(x), grouped)(key, X),
    ]
    for variables in ways:
        assert jax.eval_shape(lambda v=variables: v) == want
    table = grouped.tabulate(key, X, console_kwargs={"width": 200})
    assert "params" in table and "batch_stats" not in table


def test_parts_taken_out_of_a_bound_model_are_replaced_at_their_paths(variables):
    frozen = tools.freeze(MODEL, ["parts_1_last", "norm"])
    part, of = frozen.bind(variables).parts[1]["last"].unbind()
    assert isinstance(part, Part) and part != Part()
    same = Part().apply(of, X, False)
    assert_close(part.apply(of, X, True), same, 8)
    thawed = tools.unfreeze(part, "norm")
    want = Part().apply(of, X, True, mutable=True)
    same_bits(thawed.apply(of, X, True, mutable=True), want)
    other, of = frozen.bind(variables).parts[0].unbind()
    _, moved = other.apply(of, X, True, mutable=True)
    old, new = (v["batch_stats"]["norm"]["mean"] for v in (of, moved))
    assert (old != new).all()
    again, same = frozen.bind(variables).unbind()
    same_bits(same, variables)
    got, want = (m.apply(same, X, True, mutable=True) for m in (again, frozen))
    same_bits(got, want)


def test_a_part_of_another_model_is_replaced_by_its_own_paths(variables):
    """Of two parts alike one is frozen, and the pattern is that of the part."""

    class Two(nn.Module):
        one: nn.Module
        two: nn.Module

        def __call__(self, x):
            return self.one(x, True) + self.two(x, True)

    two = Two(tools.freeze(Model(Part()), "part"), Model(Part()))
    both = {c: {"one": v, "two": v} for c, v in variables.items()}
    _, moved = two.apply(both, X, mutable=["batch_stats"])
    old = variables["batch_stats"]
    for name, stats in moved["batch_stats"].items():
        same = stats["part"]["norm"]["mean"] == old["part"]["norm"]["mean"]
        assert bool(same.all()) == (name == "one")
        assert (stats["norm"]["mean"] != old["norm"]["mean"]).all()
    norms = {n.path: n.module for n in tools.find_norms(two, X)}
    assert norms["one", "part", "norm"].normalize_with == "running"
    assert type(norms["two", "part", "norm"]) is nn.BatchNorm
    wrong = Two(tools.freeze(Model(Part()), "one/part"), Model(Part()))
    with raises(
        ValueError,
        "freeze: paths must match batch norms of the model. Got paths='one/part', and"
        " the batch norms are: part/norm, norm, parts_0/norm, parts_1_last/norm. Pass"
        ' one of these paths, or "*" for all.',
    ):
        wrong.apply(both, X, mutable=["batch_stats"])


class Coder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.BatchNorm(False), nn.BatchNorm(False)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.encoder(x[:, :2])

    def decode(self, x):
        return self.decoder(x)


def test_methods_of_a_part_are_initialized_one_after_another():
    """Of which the first does not reach what a pattern is about."""

    class Uses(nn.Module):
        coder: nn.Module

        def __call__(self, x):
            return self.coder.decode(self.coder.encode(x))

    variables = Uses(tools.freeze(Coder(), "decoder")).init(jax.random.key(0), X)
    model = Uses(tools.freeze(Coder(), "decoder"))
    _, moved = model.apply(variables, X, mutable=["batch_stats"])
    stats = moved["batch_stats"]["coder"]
    assert not stats["decoder"]["mean"].any() and stats["encoder"]["mean"].any()


def test_groups_of_one_call_are_no_fault_of_the_next():
    grouped = tools.replace(Coder(), "batch", "group", num_groups=3)
    variables = {"params": {"decoder": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}}
    with raises(
        ValueError,
        "replace: num_groups must divide the features of every norm. Got num_groups=3,"
        " and features 2 at encoder. Pass num_groups=2, which divides all that are"
        " replaced, or replace them by paths, each with its own.",
    ):
        grouped.apply(variables, X, method="encode")
    assert grouped.apply(variables, X, method="decode").shape == X.shape


def test_a_model_of_a_replaced_model_is_replaced_once(variables):
    """A function of the norm is asked of what the inner rule has made, once."""
    seen = []

    def ask(norm):
        seen.append((norm.path, type(norm.module)))

    inner = tools.replace(MODEL, "batch", "group", num_groups=3)
    outer = tools.replace(nn.Sequential([inner]), "any", ask)
    models.abstract_init(outer, X)
    paths = [("norm",), ("part", "norm"), ("parts_0", "norm"), ("parts_1_last", "norm")]
    assert sorted(set(seen)) == [(("layers_0", *p), linen.GroupNorm) for p in paths]
    assert len(seen) == len(paths)


def test_fields_without_a_hash_are_kept_as_those_of_the_model_are():
    """Of the model and of the rule: nothing else asks for a hash."""

    class Wide(nn.Module):
        table: object

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(True)(x) + self.table

    model = Wide(np.ones(3))
    replaced = tools.replace(
        model, "batch", "layer", scale_init=nn.initializers.ones, feature_axes=[-1]
    )
    again = tools.replace(replaced, "layer", lambda norm: None)
    variables = again.init(jax.random.key(0), X)
    assert again.apply(variables, X).shape == X.shape
    assert again.clone().table is model.table
    groups = tools.replace(model, "batch", "same", axis_index_groups=[np.arange(2)])
    assert isinstance(groups, Wide)


def test_classes_of_every_making_are_replaced():
    """By keyword alone, with an equality of their own, of type variables, bridged."""

    class Keyword(nn.Module, kw_only=True):
        eps: float

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(False, epsilon=self.eps)(x)

    class Equal(Keyword):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 7

    class Generic(nn.Module, typing.Generic[T]):
        @nn.compact
        def __call__(self, x):
            return Keyword(eps=1e-3)(x)

    for model in (Keyword(eps=1e-3), Equal(eps=1e-3), Generic[int]()):
        frozen = tools.freeze(model)
        variables = trained(models.abstract_init(frozen, X))
        y, moved = frozen.apply(variables, X, mutable=["batch_stats"])
        same_bits(moved["batch_stats"], variables["batch_stats"])
        assert y.shape == X.shape and type(frozen.clone()) is type(frozen)
    assert Equal(eps=1.0) == tools.freeze(Equal(eps=2.0))
    assert hash(tools.freeze(Equal(eps=2.0))) == 7


def test_a_teacher_and_its_frozen_student_share_what_setup_has_made(variables):
    """A model that another module has bound already is replaced where it is."""

    class Both(nn.Module):
        def setup(self):
            self.model = Model(Part())
            self.frozen = tools.freeze(self.model)

        def __call__(self, x):
            return self.model(x, True), self.frozen(x, True)

    inner = {c: {"model": v} for c, v in variables.items()}
    (trained_y, frozen_y), _ = Both().apply(inner, X, mutable=["batch_stats"])
    want = MODEL.apply(variables, X, True, mutable=["batch_stats"])[0]
    assert_close(trained_y, want, 8)
    assert jnp.abs(frozen_y - want).max() > 0.01


def test_names_of_the_model_come_before_those_of_the_tool():
    class Converts(nn.Module):
        rules: int = 3

        def convert(self, x):
            return 2 * x

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(True)(self.convert(x))

    model = tools.replace(Converts(), "batch", "layer")
    assert model.rules == 3
    variables = Converts().init(jax.random.key(0), X)
    assert (model.apply(variables, X, method="convert") == 2 * X).all()
    converted, dropped = tools.Replaced.convert(model, variables, X)
    assert set(converted) == {"params"} and len(dropped) == 2
