"""Norms replaced by others: as if the model had been written with those."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MAPPED
from family import assert_close
from flax import nnx
from test_errors import raises
from test_freeze import same_bits, trained

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (2, 5, 4)) + 2


def block(norm):
    """A block with two norms made by ``norm``, as a linen module."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = norm(name="a")(nn.Dense(4)(x))
            return norm(name="b")(jnp.tanh(x))

    return Block


class Kinds(nn.Module):
    """Every kind of norm, called as models call them."""

    library: object = nn

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = nn.Dense(4)(x)
        x = self.library.BatchNorm(name="batch")(x, not train, mask=mask)
        x = self.library.LayerNorm(name="layer", epsilon=1e-3)(x, mask=mask)
        x = self.library.RMSNorm(name="rms")(x)
        x = self.library.GroupNorm(2, name="group")(x)
        return self.library.InstanceNorm(name="instance")(x)


class Jitted(nn.Module):
    """Parts that are alike, and compiled once."""

    @nn.compact
    def __call__(self, x):
        return JittedPart(name="one")(x), JittedPart(name="two")(x)


@nn.jit
class JittedPart(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm")(x)


class Stacked(nn.Module):
    of: type

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(nn.remat(self.of)(name="blocks"), x, None)[0]


def kinds(norms):
    return {"/".join(n.path): n.kind for n in norms}


# Linen.


def test_the_replaced_model_is_the_one_written_so_in_scan_remat_jit_and_grad():
    training = functools.partial(nn.BatchNorm, use_running_average=False)
    model = Stacked(block(training))
    written = Stacked(block(functools.partial(linen.GroupNorm, 2, epsilon=1e-5)))
    grouped = tools.replace(model, "batch", "group", num_groups=2)
    variables = trained(models.abstract_init(model, X))
    converted, dropped = grouped.convert(variables, X)
    assert dropped == [
        f"batch_stats/blocks/{norm}/{name}" for norm in "ab" for name in ("mean", "var")
    ]
    same_bits(converted, {"params": variables["params"]})
    shapes = models.abstract_init(written, X)
    assert models.abstract_init(grouped, X) == shapes

    def step(model):
        def loss(variables):
            return (model.apply(variables, X) * jnp.arange(4.0)).sum()

        return jax.jit(jax.value_and_grad(loss))(converted)

    same_bits(step(grouped), step(written))


def test_flax_is_replaced_by_the_same_of_normjax():
    variables = trained(models.abstract_init(Kinds(), X))
    same = tools.replace(Kinds(), "any", "same")
    mask = jnp.arange(5)[:, None] < 4

    def run(model):
        return jax.jit(
            lambda v: model.apply(v, X, True, mask=mask, mutable=["batch_stats"])
        )(variables)

    same_bits(run(same), run(Kinds(linen)))
    found = tools.find_norms(same, X)
    assert kinds(found) == kinds(tools.find_norms(Kinds(), X))
    assert all(type(n.module).__module__ == "normjax.linen" for n in found)
    assert same.convert(variables, X) == (variables, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch", "group"),
        ("batch", "instance"),
        ("batch", "layer"),
        ("batch", "rms"),
        ("layer", "rms"),
        ("layer", "group"),
        ("rms", "layer"),
        ("group", "instance"),
        ("instance", "rms"),
    ],
)
def test_every_kind_becomes_what_it_can(old, new):
    """With the parameters that both have, and called with what each takes."""
    fields = {"num_groups": 2} if new == "group" else {}
    model = tools.replace(Kinds(linen), old, new, **fields)
    variables = trained(models.abstract_init(Kinds(), X))
    converted, dropped = model.convert(variables, X)
    kind = "RMSNorm" if new == "rms" else f"{new.capitalize()}Norm"
    found = {"/".join(n.path): n for n in tools.find_norms(model, X)}
    assert kinds(found.values()) == {
        **kinds(tools.find_norms(Kinds(), X)),
        old: kind,
    }
    module = next(n.module for n in tools.find_norms(Kinds(), X) if n.path == (old,))
    assert found[old].module.epsilon == module.epsilon
    shapes = models.abstract_init(model, X)
    assert shapes == jax.eval_shape(lambda: converted)
    carried = {"scale"} if "rms" in (old, new) else {"scale", "bias"}
    want = {k: variables["params"][old][k] for k in carried}
    same_bits(converted["params"][old], want)
    lost = {f"params/{old}/bias"} if new == "rms" else set()
    lost |= {f"batch_stats/batch/{k}" for k in ("mean", "var") if old == "batch"}
    assert set(dropped) == lost


def test_all_norms_at_once_become_layer_norms_or_none():
    variables = trained(models.abstract_init(Kinds(), X))
    layers = tools.replace(Kinds(), "any", "layer")
    assert set(kinds(tools.find_norms(layers, X)).values()) == {"LayerNorm"}
    assert layers.apply(layers.convert(variables, X)[0], X).shape == X.shape
    none = tools.replace(Kinds(), "any", "none")
    converted, _ = none.convert(variables, X)
    assert tools.find_norms(none, X) == [] and list(converted["params"]) == ["Dense_0"]
    dense = {"params": converted["params"]["Dense_0"]}
    same_bits(none.apply(converted, X, True), nn.Dense(4).apply(dense, X))


def test_rules_follow_one_another_by_path_and_kind():
    model = tools.replace(Kinds(), "batch", "layer")
    model = tools.replace(model, "layer", "rms", paths=["lay*", "batch"])
    model = tools.replace(model, "instance", lambda norm: nn.Dense(3))
    model = tools.replace(model, "group", lambda norm: None)
    model = tools.replace(model, "rms", lambda norm: jnp.tanh, paths="rms")
    assert kinds(tools.find_norms(model, X)) == {
        "batch": "RMSNorm",
        "layer": "RMSNorm",
        "group": "GroupNorm",
    }
    variables = trained(models.abstract_init(Kinds(), X))
    converted, dropped = model.convert(variables, X)
    assert converted["params"]["instance"]["kernel"].shape == (4, 3)  # initialized
    assert converted["params"]["instance"]["bias"].shape == (3,)
    assert {d for d in dropped if "instance" in d} == {
        "params/instance/scale",
        "params/instance/bias",
    }
    assert model.apply(converted, X).shape == (2, 5, 3)


def test_a_module_of_modules_comes_in_place_of_a_norm():
    for new in (
        nn.Sequential([linen.LayerNorm(), nn.Dense(4)]),
        lambda norm: nn.Sequential([linen.LayerNorm(), nn.Dense(4)]),
    ):
        replaced = tools.replace(Kinds(linen), "rms", new)
        shapes = models.abstract_init(replaced, X)["params"]["rms"]
        assert {k: set(v) for k, v in shapes.items()} == {
            "layers_0": {"scale", "bias"},
            "layers_1": {"kernel", "bias"},
        }


def test_what_was_compiled_for_the_model_is_not_what_is_replaced():
    variables = Jitted().init(jax.random.key(0), X)
    want = Jitted().apply(variables, X)
    none = tools.replace(Jitted(), "any", "none")
    for _ in range(2):
        same_bits(none.apply(variables, X), (X, X))
        same_bits(Jitted().apply(variables, X), want)
    for one in (
        tools.replace(Jitted(), "any", "none", paths="two"),
        tools.replace(Jitted(), "any", lambda norm: None),
    ):
        with raises(
            ValueError,
            "replace: within nn.jit, which compiles equal modules once for all their"
            " paths, norms must be replaced alike. Got one/norm within nn.jit, and paths"
            ' or a function that tell norms apart. Pass paths="*" and no function, or'
            " take nn.jit out of the model and put jax.jit around apply.",
        ):
            one.apply(variables, X)


def test_a_substitution_around_sees_the_norms_that_there_are_now():
    """As a tool would that measures statistics, frozen ones too."""
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), X)
    seen = []

    def measured(module):
        seen.append((type(module), module.normalize_with))
        return linen.BatchNorm(False, momentum=0.0, parent=module.scope.rewound())

    with models.substituted(measured):
        apply = tools.freeze(model).apply
        _, updates = apply(variables, X, mutable=["batch_stats"])
    assert seen == [(linen.BatchNorm, "running")]
    assert_close(updates["batch_stats"]["mean"], X.mean((0, 1)), 10)


def test_added_residuals_stay_added():
    class Adds(nn.Module):
        @nn.compact
        def __call__(self, x, h):
            return linen.AddLayerNorm(name="norm", activation=jnp.tanh)(x, residual=h)

    x, h = X, X[::-1]
    variables = trained(models.abstract_init(Adds(), x, h))
    rms = tools.replace(Adds(), "layer", "rms")
    converted, _ = rms.convert(variables, x, h)
    want = linen.AddRMSNorm(activation=jnp.tanh).apply(
        {"params": converted["params"]["norm"]}, x, h
    )
    same_bits(rms.apply(converted, x, h), want)
    none = tools.replace(Adds(), "layer", "none")
    same_bits(none.apply({}, x, h), (jnp.tanh(x + h), x + h))
    group = tools.replace(Adds(), "layer", "group", num_groups=2)
    with raises(
        ValueError,
        "replace: a norm that adds a residual first can become 'layer', 'rms' or 'none',"
        " and not 'group'. Got an AddLayerNorm at norm. Leave it out by paths, or pass a"
        " function that makes a module.",
    ):
        group.apply(variables, x, h)


@pytest.mark.parametrize("context", ["vmap", "pmap", "shard_map"])
def test_a_synced_norm_has_the_statistics_of_all_devices(context):
    """The model is written for one device, and replaced for eight."""
    of = MAPPED[context]
    x = jax.random.normal(jax.random.key(5), (2, 16, 4)) * jnp.arange(1, 17)[:, None]
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(False, name="norm")])
    synced = tools.replace(model, "batch", "synced", axis_name=of.names)
    variables = model.init(jax.random.key(0), x)

    def local(x, variables):
        return synced.apply(variables, x, mutable=["batch_stats"])

    got = jax.jit(functools.partial(of.run, local))(x, variables)
    whole = tools.replace(model, "batch", "same")
    assert_close(got, whole.apply(variables, x, mutable=["batch_stats"]), 32)


# NNX.


class OfNnx(nnx.Module):
    def __init__(self, rngs, library=nnx):
        self.batch = library.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([library.LayerNorm(4, epsilon=1e-3, rngs=rngs)])
        self.plain = nnx.data({"rms": (library.RMSNorm(4, rngs=rngs), 3)})
        self.group = library.GroupNorm(4, 2, rngs=rngs)
        self.again = self.layers[0]

    def __call__(self, x):
        x = self.batch(x, use_running_average=True)
        for norm in (*self.layers, self.plain["rms"][0], self.group, self.again):
            x = norm(x)
        return x


@pytest.fixture
def of_nnx():
    model = OfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    return model


def test_nnx_of_flax_is_replaced_by_the_same_of_normjax(of_nnx):
    before = nnx.state(of_nnx)
    same = tools.replace(of_nnx, "any", "same")
    same_bits(nnx.state(same), before)
    ours = OfNnx(nnx.Rngs(0), normjax.nnx)
    nnx.update(ours, before)
    same_bits(same(X), ours(X))
    assert same.again is same.layers[0] and same.again.epsilon == 1e-3
    assert tools.find_dropped(of_nnx, same) == []
    same.batch.mean[...] = jnp.zeros(4)
    assert of_nnx.batch.mean[...].any()  # a copy


@pytest.mark.parametrize("new", ["group", "instance", "layer", "rms"])
def test_nnx_batch_norm_becomes_another_that_may_be_called_alike(of_nnx, new):
    fields = {"num_groups": 2} if new == "group" else {}
    other = tools.replace(of_nnx, "batch", new, **fields)
    assert kinds(tools.find_norms(other))["batch"] == type(other.batch).__name__
    assert other(X).shape == X.shape
    same_bits(other.batch.scale[...], of_nnx.batch.scale[...])
    assert other.batch.epsilon == of_nnx.batch.epsilon
    lost = ["batch/bias", "batch/mean", "batch/var"][0 if new == "rms" else 1 :]
    assert tools.find_dropped(of_nnx, other) == lost
    written = getattr(normjax.nnx, type(other.batch).__name__)
    args = (2,) if new == "group" else ()
    written = written(4, *args, epsilon=1e-5, rngs=nnx.Rngs(0))
    nnx.update(written, nnx.state(other.batch))
    same_bits(other.batch(X, True), written(X))
    again = tools.replace(other, "any", "same")
    same_bits(again.batch(X, use_running_average=True), written(X))


def test_nnx_norms_are_left_out_everywhere_and_made_by_functions(of_nnx):
    none = tools.replace(of_nnx, "any", "none")
    same_bits(none(X), X)
    assert not jax.tree.leaves(nnx.state(none)) and not tools.find_norms(none)
    added = tools.replace(normjax.nnx.AddRMSNorm(4, rngs=nnx.Rngs(0)), "rms", "none")
    same_bits(added(X, X), (X + X, X + X))
    dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    other = tools.replace(
        of_nnx, "any", lambda n: dense if n.kind == "RMSNorm" else None
    )
    assert other.plain["rms"] == (dense, 3)
    assert type(other.batch) is nnx.BatchNorm
    rms = tools.replace(of_nnx, "layer", "rms", paths="again")
    assert rms.layers[0] is rms.again and rms.again.epsilon == 1e-3
    added = normjax.nnx.AddLayerNorm(4, rngs=nnx.Rngs(0))
    assert type(tools.replace(added, "layer", "rms")) is normjax.nnx.AddRMSNorm


class Stack(nnx.Module):
    """Batch norms stacked by vmap, called by scan and remat."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return nnx.BatchNorm(4, rngs=rngs)

        self.norm = stacked(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def over(x, norm):
            return jnp.tanh(norm(x))

        return over(x, self.norm)


def test_nnx_norms_are_replaced_and_frozen_in_a_stack():
    model = Stack(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    before = nnx.to_pure_dict(nnx.state(model))
    group = tools.replace(model, "batch", "group", num_groups=2)
    want = X
    for i in range(2):
        params = {k: before["norm"][k][i] for k in ("scale", "bias")}
        norm = linen.GroupNorm(2, epsilon=1e-5)
        want = jnp.tanh(norm.apply({"params": params}, want))
    call = nnx.jit(lambda model, x: model(x))
    assert_close(call(group, X), want, 5)
    frozen = tools.freeze(model)
    call(frozen, X)
    same_bits(nnx.to_pure_dict(nnx.state(frozen)), before)
    call(tools.unfreeze(frozen), X)
    with raises(
        ValueError,
        "replace: a new norm in a stack can only have variables that the old one has."
        " Got scale of shape (2, 4), bias of shape (2, 4), mean of shape (2, 4), var"
        " of shape (2, 4), count of shape (4,) for norm. Replace the norms before they"
        " are stacked, or leave such fields out.",
    ):
        tools.replace(model, "batch", "same", debias=True)


def test_nnx_batch_norm_is_synced():
    model = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    synced = tools.replace(model, "batch", "synced", axis_name="d")
    x = jax.random.normal(jax.random.key(5), (2, 16, 4)) * jnp.arange(1, 17)[:, None]
    graph, state = nnx.split(synced)

    def local(x, state):
        model = nnx.merge(graph, state)
        y = model(x)
        return y, nnx.state(model)

    got, state = jax.jit(functools.partial(MAPPED["shard_map"].run, local))(x, state)
    whole = tools.replace(model, "batch", "same")
    want = whole(x)
    assert_close(
        (got, jax.tree.leaves(state)), (want, jax.tree.leaves(nnx.state(whole))), 32
    )


# What is refused.


class Own(nn.BatchNorm):
    def __call__(self, x):
        return super().__call__(x, True) + 1


class OwnNnx(nnx.LayerNorm):
    def __call__(self, x):
        return super().__call__(x) + 1


WORDS = "'batch', 'layer', 'rms', 'group', 'instance'"


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (
            ("batchnorm", "group"),
            {},
            f"replace: old must be one of {WORDS}, 'any'. Got old='batchnorm'. Pass"
            " old='batch', say.",
        ),
        (
            ("batch", "ghost"),
            {},
            f"replace: new must be one of {WORDS}, 'synced', 'frozen', 'none', 'same', a"
            " module or a function. Got new='ghost'. Pass new='batch', say.",
        ),
        (
            ("layer", "frozen"),
            {},
            "replace: only a batch norm has running statistics, and a call that says"
            " whether to use them, so that it can become 'frozen'. Got old='layer'. Pass"
            ' old="batch".',
        ),
        (
            ("batch", "synced"),
            {},
            "replace: a synced batch norm needs the name of the device axes. Got no"
            ' axis_name. Pass axis_name="batch", or what the pmap or shard_map around'
            " the call has; under jit over sharded arrays statistics are synced without"
            " it.",
        ),
        (
            ("batch", "none"),
            {"epsilon": 1.0},
            "replace: fields are those of norms that this function makes. Got epsilon for"
            " new='none'. Leave them out.",
        ),
        (
            ("layer", "rms"),
            {"use_bias": True},
            "replace: fields must be those of RMSNorm. Got use_bias for layer. Pass some"
            " of FIELDS.",
        ),
        (
            ("batch", "group"),
            {"num_groups": 3},
            "replace: num_groups must divide the features of every norm. Got"
            " num_groups=3, and features 4 at batch. Pass num_groups=2, which divides all"
            " that are replaced, or replace them by paths, each with its own.",
        ),
        (
            ("batch", "group"),
            {},
            "replace: num_groups must divide the features of every norm. Got"
            " num_groups=32, and features 4 at batch. Pass num_groups=4, which divides all"
            " that are replaced, or replace them by paths, each with its own.",
        ),
        (
            ("batch", "group"),
            {"group_size": 3},
            "replace: group_size must divide the features of every norm. Got"
            " group_size=3, and features 4 at batch. Pass group_size=2, which divides all"
            " that are replaced, or replace them by paths, each with its own.",
        ),
        (
            ("layer", "rms"),
            {"paths": ["layer", "body/*"]},
            "replace: paths must match layer norms of the model. Got paths='body/*', and"
            ' the layer norms are: layer. Pass one of these paths, or "*" for all.',
        ),
    ],
)
@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_what_makes_no_sense_is_refused(system, arguments, fields, message):
    known = {
        "linen": [*linen.RMSNorm.__dataclass_fields__],
        "nnx": [*normjax.nnx.RMSNorm.__init__.__kwdefaults__],
    }[system]
    known = [f for f in known if f not in ("parent", "name")]
    message = message.replace("FIELDS", ", ".join(known))
    with raises(ValueError, message):
        if system == "linen":
            models.abstract_init(tools.replace(Kinds(), *arguments, **fields), X)
        else:
            rngs = nnx.Rngs(0)
            norms = {
                "batch": nnx.BatchNorm(4, rngs=rngs),
                "layer": nnx.LayerNorm(4, rngs=rngs),
            }
            tools.replace(nnx.Dict(norms), *arguments, **fields)


def test_what_normjax_would_do_otherwise_is_refused():
    message = (
        "replace: a norm with a __call__ of its own does what no norm of normjax would do"
        " in its place. Got a {}, which is a {}, at the model itself. Leave it out by"
        " paths, or pass a function that makes a module."
    )
    with raises(ValueError, message.format("Own", "BatchNorm")):
        models.abstract_init(tools.replace(Own(), "batch", "same"), X)
    with raises(ValueError, message.format("OwnNnx", "LayerNorm")):
        tools.replace(OwnNnx(4, rngs=nnx.Rngs(0)), "layer", "rms")
    message = (
        "replace: a group norm has its features last. Got features along 1 in the"
        " BatchNorm at the model itself. Say axis=-1 in the model where they are last,"
        " or pass a function that makes a module."
    )
    with raises(ValueError, message):
        first = tools.replace(nn.BatchNorm(False, axis=1), "batch", "group")
        models.abstract_init(first, X)
    with raises(
        ValueError,
        "replace: what comes in place of a norm that is called with a mask must take it."
        " Got mask for batch, and Dense without it. Give it an argument mask=None.",
    ):
        masked = tools.replace(Kinds(), "batch", nn.Dense(4))
        models.abstract_init(masked, X, True, mask=X > 0)


@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_groups_that_divide_no_features_are_told_of_all_norms_at_once(system):
    """Before anything changes, and with what would divide them all."""
    sizes = {"a": 4, "b": 12, "c": 16}

    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, size in sizes.items():
                x = nn.BatchNorm(True, name=name)(nn.Dense(size)(x))
            return x

    message = (
        "replace: num_groups must divide the features of every norm. Got num_groups={},"
        " and features {}. Pass num_groups=4, which divides all that are replaced, or"
        " replace them by paths, each with its own."
    )
    model = Three()
    if system == "nnx":
        rngs = nnx.Rngs(0)
        model = nnx.Dict(
            {n: nnx.BatchNorm(size, rngs=rngs) for n, size in sizes.items()}
        )

    def replaced(**options):
        other = tools.replace(model, "batch", "group", **options)
        if system == "linen":
            models.abstract_init(other, X)
        return other

    for number, features in (
        (32, "4 at a, 12 at b, 16 at c"),
        (8, "4 at a, 12 at b"),
        (6, "4 at a, 16 at c"),
    ):
        with raises(ValueError, message.format(number, features)):
            replaced(num_groups=number)
    with raises(
        TypeError,
        "replace: num_groups must be an integer. Got num_groups='4'. Pass num_groups=8,"
        " say.",
    ):
        replaced(num_groups="4")
    replaced(num_groups=4)
    replaced(num_groups=8, paths="c")
    if system == "nnx":
        assert all(type(norm) is nnx.BatchNorm for norm in model.values())


def test_what_is_no_module_is_refused():
    with raises(
        TypeError,
        "replace: what comes in place of a norm must be a linen module or a function of"
        " x. Got int for batch. Return None to leave a norm as it is.",
    ):
        models.abstract_init(tools.replace(Kinds(), "batch", lambda norm: 3), X)
    message = (
        "replace: what comes in place of a norm must be an nnx module of its own, made"
        " by a function of the norm. Got {} for the model itself. Return None to leave a"
        " norm as it is."
    )
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    with raises(TypeError, message.format("LayerNorm")):
        tools.replace(norm, "layer", norm)
    with raises(TypeError, message.format("Dense")):
        tools.replace(norm, "layer", nn.Dense(4))
    with raises(TypeError, message.format("function")):
        tools.replace(norm, "layer", lambda norm: lambda x: x)


def test_variables_of_another_model_are_refused():
    variables = Kinds().init(jax.random.key(0), X)
    rms = tools.replace(Kinds(), "layer", "rms")
    before = jax.tree.map(np.asarray, variables)
    with raises(
        ValueError,
        "convert: variables must be those of the model. Got none at params/layer/bias."
        " Pass what the model's init or its training returned, whole.",
    ):
        params = {k: v for k, v in variables["params"].items() if k != "layer"}
        rms.convert({**variables, "params": params}, X)
    with raises(
        ValueError,
        "convert: a variable that is carried over must have the shape of the new norm's."
        " Got params/layer/scale of shape (3,), in the new norm (4,). Pass the variables"
        " of this model, and a new norm with parameters like those of the old one.",
    ):
        layer = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
        rms.convert({**variables, "params": {**variables["params"], "layer": layer}}, X)
    same_bits(variables, before)


def test_a_norm_that_a_call_does_not_reach_is_no_fault():
    class Heads(nn.Module):
        def setup(self):
            self.one, self.two = nn.LayerNorm(), nn.LayerNorm()

        def __call__(self, x):
            return self.two(self.one(x))

        def first(self, x):
            return self.one(x)

    variables = Heads().init(jax.random.key(0), X)
    rms = tools.replace(Heads(), "layer", "rms", paths="two")
    same_bits(
        rms.apply(variables, X, method="first"),
        Heads().apply(variables, X, method="first"),
    )
    with raises(
        ValueError,
        "replace: paths must match layer norms of the model. Got paths='three', and the"
        ' layer norms are: one. Pass one of these paths, or "*" for all.',
    ):
        none = tools.replace(Heads(), "layer", "rms", paths="three")
        none.apply(variables, X, method="first")


def test_a_layer_with_a_bias_is_no_norm_that_a_call_does_not_reach():
    class Layers(nn.Module):
        def setup(self):
            self.dense, self.batch, self.layer = nn.Dense(4), Batch(), nn.LayerNorm()

        def __call__(self, x):
            return self.layer(self.batch(self.dense(x)))

        def first(self, x):
            return self.dense(x)

    Batch = functools.partial(nn.BatchNorm, True)
    variables = Layers().init(jax.random.key(0), X)
    wrong = {"batch": ("dense", "layer"), "layer": ("dense", "batch")}
    for old, others in wrong.items():
        tools.replace(Layers(), old, "none", paths=old).apply(
            variables, X, method="first"
        )
        for path in others:
            other = tools.replace(Layers(), old, "none", paths=[old, path])
            with raises(
                ValueError,
                f"replace: paths must match {old} norms of the model. Got"
                f" paths='{path}', and the {old} norms are: none. Look at what"
                " tools.find_norms finds in the model.",
            ):
                other.apply(variables, X, method="first")


@pytest.mark.parametrize("new", ["layer", "group", "instance", "rms"])
def test_device_axes_of_a_batch_norm_are_not_carried_over(new):
    """They divide the batch, over which no other norm reduces."""
    model = nn.Sequential(
        [nn.BatchNorm(False, axis_name="d", axis_index_groups=[[0, 1]], name="norm")]
    )
    fields = {"num_groups": 2} if new == "group" else {}
    other = tools.replace(model, "batch", new, **fields)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    (norm,) = tools.find_norms(other, x)
    assert norm.module.axis_name is None and norm.module.axis_index_groups is None
    other.apply(other.init(jax.random.key(1), x), x)  # and outside of devices it runs
