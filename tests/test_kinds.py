"""Norms of classes of a user's own: reported, or registered and treated as such."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import assert_close
from flax import nnx
from test_errors import raises
from test_freeze import same_bits, trained

from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (6, 4)) + 2
MASK = jnp.arange(6)[:, None] < 4


class MaskedBatchNorm(nn.Module):
    """As speech models write it: over valid frames, in training and in inference."""

    momentum: float = 0.9
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, mask, train):
        c = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, c)
        var = self.variable("batch_stats", "var", jnp.ones, c)
        scale = self.param("scale", nn.initializers.ones, c)
        bias = self.param("bias", nn.initializers.zeros, c)
        m, v = mean.value, var.value
        if train:
            w = jnp.broadcast_to(mask, x.shape) / mask.sum()
            m = (w * x).sum(0)
            v = (w * (x - m) ** 2).sum(0)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        return ((x - m) / jnp.sqrt(v + self.epsilon) * scale + bias) * mask


class RenormBatchNorm(nn.Module):
    """As RL has it: told by a field, under a name of its own, and a count of steps."""

    use_running_average: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        steps = self.variable("batch_stats", "steps", jnp.zeros, ())
        m, v = mean.value, var.value
        if not self.use_running_average:
            m, v = x.mean(0), x.var(0)
            if not self.is_initializing():
                mean.value, steps.value = m, steps.value + 1
        return (x - m) / jnp.sqrt(v + self.epsilon)


class T5Norm(nn.Module):
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * scale


class Own(nn.Module):
    """All norms of it are the user's."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        x = MaskedBatchNorm(name="masked")(x, MASK, train=train)
        x = RenormBatchNorm(not train, name="renorm")(x)
        return T5Norm(name="t5")(x)


class Half(nn.Module):
    """One norm of it is Flax's."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Own(name="own")(x, train)
        return nn.BatchNorm(name="flax")(x, not train)


KINDS = {MaskedBatchNorm: "BatchNorm", RenormBatchNorm: "BatchNorm", T5Norm: "RMSNorm"}


class OwnOfNnx(nnx.Module):
    """The first two of these in nnx, one told by its call and one by train()."""

    def __init__(self, rngs):
        self.called = NnxBatchNorm(4)
        self.told = nnx.data([ToldBatchNorm(4)])
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, train=True):
        return self.told[0](self.linear(self.called(x, deterministic=not train)))


class NnxBatchNorm(nnx.Module):
    def __init__(self, num_features, epsilon=1e-5):
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.scale = nnx.Param(jnp.ones(num_features))
        self.epsilon = epsilon

    def __call__(self, x, deterministic):
        m, v = self.mean[...], self.var[...]
        if not deterministic:
            m, v = x.mean(0), x.var(0)
            self.mean.set_value(m)
        return (x - m) / jnp.sqrt(v + self.epsilon) * self.scale[...]


class ToldBatchNorm(NnxBatchNorm):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.use_running_average = False

    def __call__(self, x):
        return super().__call__(x, self.use_running_average)


NNX_KINDS = {NnxBatchNorm: "BatchNorm"}


def left(name, places, kinds):
    """What is warned of."""
    return pytest.warns(
        UserWarning,
        match=f"^{name}: norms are those of Flax's classes, of normjax's, and of the"
        f" classes in kinds. Got {places}, which looks like a norm and is left as it"
        f" is. Pass kinds={kinds}, or None in place of a kind for a class that is"
        r" none\.$",
    )


@pytest.fixture(scope="module")
def variables():
    return trained(models.abstract_init(Half(), X))


def found(model, *args, **kwargs):
    norms = tools.find_norms(model, *args, **kwargs)
    return {"/".join(n.path): n.kind for n in norms}


# Found.


def test_what_looks_like_a_norm_is_told_of_and_registered_it_is_one():
    with left(
        "find_norms",
        "MaskedBatchNorm at own/masked, RenormBatchNorm at own/renorm, T5Norm at"
        " own/t5",
        '{MaskedBatchNorm: "BatchNorm", RenormBatchNorm: "BatchNorm", T5Norm:'
        ' "RMSNorm"}',
    ):
        assert found(Half(), X) == {"flax": "BatchNorm"}
    assert found(Half(), X, kinds=KINDS) == {
        "own/masked": "BatchNorm",
        "own/renorm": "BatchNorm",
        "own/t5": "RMSNorm",
        "flax": "BatchNorm",
    }
    assert found(Half(), X, kinds=dict.fromkeys(KINDS)) == {"flax": "BatchNorm"}
    model = OwnOfNnx(nnx.Rngs(0))
    with left(
        "find_norms",
        r"NnxBatchNorm at called, ToldBatchNorm at told/0",
        '{NnxBatchNorm: "BatchNorm", ToldBatchNorm: "BatchNorm"}',
    ):
        assert found(model) == {}
    assert found(model, kinds=NNX_KINDS) == dict.fromkeys(
        ["called", "told/0"], "BatchNorm"
    )


def test_what_a_class_resembles_is_seen_by_its_variables():
    """By names of classes and shapes; layers and what only holds norms are none."""

    class Normalizer(nn.Module):  # of inputs, which no name tells
        @nn.compact
        def __call__(self, x):
            stats = [
                self.variable("batch_stats", n, jnp.ones, 4).value
                for n in ("mean", "var")
            ]
            return x * sum(stats)

    class NormedDense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (4, 4))

    class NormBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.LayerNorm()(NormedDense()(Scaled()(x)))

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, (4,))

    class Stack(nn.Module):  # whose parameters have an axis of layers, too
        @nn.compact
        def __call__(self, x):
            layers = nn.vmap(
                OwnLayerNorm, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return layers(name="norm")(x)

    class OwnLayerNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("beta", nn.initializers.ones, (4,))

    class MyGroupNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("g", nn.initializers.ones, (4,))

    model = nn.Sequential([Normalizer(), NormBlock(), nn.remat(MyGroupNorm)(), Stack()])
    with left(
        "find_norms",
        "Normalizer at layers_0, MyGroupNorm at layers_2, OwnLayerNorm at"
        " layers_3/norm",
        '{MyGroupNorm: "GroupNorm", Normalizer: "BatchNorm", OwnLayerNorm:'
        ' "LayerNorm"}',
    ):
        assert found(model, X) == {"layers_1/LayerNorm_0": "LayerNorm"}


@pytest.mark.parametrize(
    ("error", "kinds", "message"),
    [
        (
            TypeError,
            {"MyNorm": "LayerNorm"},
            "kinds must be a dictionary from classes to the norms that they are. Got"
            " kinds={'MyNorm': 'LayerNorm'}.",
        ),
        (
            TypeError,
            [T5Norm],
            "kinds must be a dictionary from classes to the norms that they are. Got"
            f" kinds=[{T5Norm!r}].",
        ),
        (
            ValueError,
            {T5Norm: "rms"},
            "each of kinds must be one of BatchNorm, LayerNorm, RMSNorm, GroupNorm,"
            " InstanceNorm, or None for no norm. Got 'rms'.",
        ),
    ],
)
def test_kinds_are_classes_and_words(error, kinds, message):
    calls = {
        "find_norms": lambda: tools.find_norms(Own(), X, kinds=kinds),
        "freeze": lambda: tools.freeze(Own(), kinds=kinds),
        "unfreeze": lambda: tools.unfreeze(Own(), kinds=kinds),
        "replace": lambda: tools.replace(Own(), "batch", "none", kinds=kinds),
    }
    for name, call in calls.items():
        todo = 'Pass kinds={MyNorm: "LayerNorm"}, say.'
        with raises(error, f"{name}: {message} {todo}"):
            call()


# Frozen.


def statistics(model, variables):
    """The paths of the norms whose statistics a step of training moves."""
    _, moved = model.apply(variables, X, True, mutable=["batch_stats"])
    old, new = (models.leaves(v["batch_stats"]) for v in (variables, moved))
    return {"/".join(p[:-1]) for p in old if (old[p] != new[p]).any()}


def test_a_model_of_own_norms_is_not_frozen_without_a_word(variables):
    variables = {c: v["own"] for c, v in variables.items()}
    with raises(
        ValueError,
        "freeze: paths must match batch norms of the model. Got paths='*', and the"
        " batch norms are: none, but MaskedBatchNorm at masked, RenormBatchNorm at"
        ' renorm, which looks like one. Pass kinds={MaskedBatchNorm: "BatchNorm",'
        ' RenormBatchNorm: "BatchNorm"}.',
    ):
        tools.freeze(Own()).apply(variables, X, True, mutable=["batch_stats"])
    with raises(
        ValueError,
        "replace: paths must match layer norms of the model. Got paths='*', and the"
        " layer norms are: none. Look at what tools.find_norms finds in the model.",
    ):
        models.abstract_init(tools.replace(Own(), "layer", "none"), X)
    with raises(
        ValueError,
        "freeze: paths must match batch norms of the model. Got paths='*', and the"
        " batch norms are: none, but NnxBatchNorm at called, ToldBatchNorm at told/0,"
        ' which looks like one. Pass kinds={NnxBatchNorm: "BatchNorm", ToldBatchNorm:'
        ' "BatchNorm"}.',
    ):
        tools.freeze(OwnOfNnx(nnx.Rngs(0)))


def test_what_is_left_of_a_model_that_is_half_frozen_is_told(variables):
    half = tools.freeze(Half())
    places = "MaskedBatchNorm at own/masked, RenormBatchNorm at own/renorm"
    kinds = '{MaskedBatchNorm: "BatchNorm", RenormBatchNorm: "BatchNorm"}'
    with left("freeze", places, kinds):
        assert statistics(half, variables) == {"own/masked", "own/renorm"}
    with left("freeze", places, kinds):
        models.abstract_init(half, X)
    kinds = {MaskedBatchNorm: "BatchNorm"}
    part = tools.freeze(Half(), ["flax", "own/masked"], kinds=kinds)
    assert statistics(part, variables) == {"own/renorm"}


def test_registered_norms_are_frozen_as_they_are(variables):
    """With their epsilon and their mask, and bit for bit as in inference."""
    frozen = tools.freeze(Half(), kinds=KINDS)
    want = Half().apply(variables, X, False)
    got, moved = frozen.apply(variables, X, True, mutable=["batch_stats"])
    assert_close(got, want, 8)
    same_bits(moved["batch_stats"], variables["batch_stats"])
    assert statistics(tools.unfreeze(frozen, "own"), variables) == {
        "own/masked",
        "own/renorm",
    }
    assert found(frozen, X, kinds=KINDS) == found(Half(), X, kinds=KINDS)
    assert models.abstract_init(frozen, X) == models.abstract_init(Half(), X)


def test_registered_norms_of_nnx_are_frozen_and_unfrozen():
    model = OwnOfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    frozen = tools.freeze(model, kinds=NNX_KINDS)
    before = nnx.state(frozen, nnx.BatchStat)
    model.told[0].use_running_average = True
    want = model(X, train=False)
    model.told[0].use_running_average = False
    frozen.train()
    same_bits(frozen(X, train=True), want)
    assert_close(nnx.jit(lambda m, x: m(x, train=True))(frozen, X), want, 8)
    same_bits(nnx.state(frozen, nnx.BatchStat), before)
    assert not frozen.told[0].use_running_average
    thawed = tools.unfreeze(frozen, kinds=NNX_KINDS)
    assert type(thawed.called) is NnxBatchNorm
    same_bits(thawed(X), model(X))
    assert (thawed.called.mean[...] == X.mean(0)).all()
    assert found(frozen, kinds=NNX_KINDS) == found(model, kinds=NNX_KINDS)


# Replaced.


def test_registered_norms_become_those_of_normjax():
    model = Own()
    variables = trained(models.abstract_init(model, X))
    same = tools.replace(model, "rms", "same", kinds=KINDS)
    assert_close(same.apply(variables, X), model.apply(variables, X), 8)
    (norm,) = (n for n in tools.find_norms(same, X, kinds=KINDS) if n.path == ("t5",))
    assert type(norm.module) is linen.RMSNorm and norm.module.epsilon == 1e-6
    layer = tools.replace(model, "rms", "layer", kinds=KINDS)
    converted, dropped = layer.convert(variables, X)
    assert dropped == [] and set(converted["params"]["t5"]) == {"scale"}
    group = tools.replace(
        model, "batch", "group", paths="masked", kinds=KINDS, num_groups=2
    )
    converted, dropped = group.convert(variables, X)
    assert dropped == ["batch_stats/masked/mean", "batch_stats/masked/var"]
    of = tools.find_norms(group, X, kinds=KINDS)[0].module
    assert (of.num_groups, of.epsilon) == (2, 1e-3)


def test_a_mask_is_not_dropped_and_a_flag_of_training_is_understood(variables):
    """The new norm is called with the mask, and in the mode that the call says."""
    same = tools.replace(Half(), "batch", "same", paths="own/masked", kinds=KINDS)
    want, moved = Half().apply(variables, X, True, mutable=["batch_stats"])
    got, stats = same.apply(variables, X, True, mutable=["batch_stats"])
    assert_close(got, want, 32)
    assert_close(stats["batch_stats"]["own"], moved["batch_stats"]["own"], 32)
    assert_close(same.apply(variables, X), Half().apply(variables, X), 8)
    dense = tools.replace(
        Half(), "batch", lambda n: nn.Dense(4), paths="own/masked", kinds=KINDS
    )
    with raises(
        ValueError,
        "replace: what comes in place of a norm that is called with a mask must take"
        " it. Got mask for own/masked, and Dense without it. Give it an argument"
        " mask=None.",
    ):
        models.abstract_init(dense, X)


def test_registered_norms_of_nnx_become_those_of_normjax():
    model = OwnOfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    group = tools.replace(model, "batch", "group", num_groups=2, kinds=NNX_KINDS)
    assert found(group) == dict.fromkeys(["called", "told/0"], "GroupNorm")
    same_bits(group.called.scale[...], model.called.scale[...])
    assert group.called.bias is None and group.called.epsilon == 1e-5
    assert group(X).shape == X.shape
    assert tools.find_dropped(model, group) == [
        f"{norm}/{name}" for norm in ("called", "told/0") for name in ("mean", "var")
    ]
    same = tools.replace(model, "batch", "same", momentum=0.5, kinds=NNX_KINDS)
    model.told[0].use_running_average = same.told[0].use_running_average = True
    assert_close(same(X, train=False), model(X, train=False), 8)
    same(X, train=True)
    assert (same.called.mean[...] != model.called.mean[...]).all()


def test_what_a_class_does_not_say_is_asked_for():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, valid):
            return self.param("scale", nn.initializers.ones, (4,)) * x * valid

    class Uses(nn.Module):
        def setup(self):
            self.norm = Plain()

        def __call__(self, x):
            return self.norm(x, jnp.ones(()))

    for kind, rule, message in (
        (
            "RMSNorm",
            ("rms", "same"),
            "replace: a norm of your own must have the field epsilon, for the new norm."
            " Got a Plain without it at norm. Pass epsilon= to tools.replace.",
        ),
        (
            "BatchNorm",
            ("batch", "frozen"),
            "replace: a field or an argument of a batch norm of your own must say which"
            " statistics it uses: use_running_average, deterministic, train, training,"
            " is_training. Got a Plain at norm, which is called with x, valid. Leave it"
            " out by paths, or pass tools.replace a function that makes a module.",
        ),
    ):
        with raises(ValueError, message):
            models.abstract_init(tools.replace(Uses(), *rule, kinds={Plain: kind}), X)
    with raises(
        ValueError,
        "replace: what comes in place of a norm that is called with a valid must take"
        " it. Got valid for norm, and RMSNorm without it. Give it an argument"
        " valid=None.",
    ):
        kinds = {Plain: "RMSNorm"}
        other = tools.replace(Uses(), "rms", "same", epsilon=1e-6, kinds=kinds)
        models.abstract_init(other, X)


class Plain(nn.Module):
    """With the names that other libraries have."""

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight


class Scaled(nn.Module):
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + self.eps)


class NnxPlain(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(4))
        self.eps = 1e-3

    def __call__(self, hidden_states):
        return hidden_states * self.weight[...]


def test_other_names_of_epsilon_are_read_and_of_parameters_refused():
    """A weight would be lost without a word."""
    kinds = {Plain: "RMSNorm", Scaled: "RMSNorm", NnxPlain: "RMSNorm"}
    same = tools.replace(nn.Sequential([Scaled()]), "rms", "same", kinds=kinds)
    assert_close(same.apply({}, X), Scaled().apply({}, X), 8)
    message = (
        "replace: the parameters of a norm of your own must be scale and bias, as those"
        " of the new norm. Got weight of a {} at {}. Leave it out by paths, or pass"
        " tools.replace a function that makes a module."
    )
    model = nn.Sequential([Plain()])
    variables = model.init(jax.random.key(0), X)
    with raises(ValueError, message.format("Plain", "layers_0")):
        tools.replace(model, "rms", "same", kinds=kinds).apply(variables, X)
    with raises(ValueError, message.format("NnxPlain", "a")):
        tools.replace(nnx.Dict(a=NnxPlain()), "rms", "layer", kinds=kinds)
    norms = tools.find_norms(model, X, kinds=kinds)
    mask = tools.decay_mask(variables["params"], norms)
    assert mask == {"layers_0": {"weight": False}}


# Of decay.


def test_weight_decay_leaves_registered_norms_out(variables):
    norms = tools.find_norms(Half(), X, kinds=KINDS)
    mask = tools.decay_mask(variables["params"], norms, biases=False)
    assert mask == {
        "own": {
            "dense": {"kernel": True, "bias": False},
            "masked": {"scale": False, "bias": False},
            "t5": {"scale": False},
        },
        "flax": {"scale": False, "bias": False},
    }
    of = tools.labels(variables["params"], {"norm": norms})
    assert of["own"]["t5"]["scale"] == "norm"
    model = OwnOfNnx(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    mask = tools.decay_mask(params, tools.find_norms(model, kinds=NNX_KINDS))
    assert [*map(bool, jax.tree.leaves(mask))].count(False) == 2
    np.testing.assert_equal(len(jax.tree.leaves(mask)), 4)


# Looked at, checked, recalibrated and folded.


def test_a_look_sees_registered_norms(variables):
    def looked(**kinds):
        looks = tools.look(Half(), variables, X, True, mutable=["batch_stats"], **kinds)
        return {one.name: one for one in looks}

    assert set(looked()) == {"flax"}
    seen = looked(kinds=KINDS)
    assert {n: one.kind for n, one in seen.items()} == found(Half(), X, kinds=KINDS)
    assert set(looked()) == {"flax"}
    h = nn.Dense(4).apply({"params": variables["params"]["own"]["dense"]}, X)
    assert_close(seen["own/masked"].channels["mean"], h.mean(0), 8)
    assert seen["own/masked"].channels["running_mean"].shape == (4,)
    model = OwnOfNnx(nnx.Rngs(0))
    names = [one.name for one in tools.look(model, X, kinds=NNX_KINDS)]
    assert names == ["called", "told/0"]


BATCHES = [X, X[:4] + 1]


def test_registered_norms_are_recalibrated():
    """Over what their masks count, and in nnx as well."""
    kinds = {MaskedBatchNorm: "BatchNorm"}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return MaskedBatchNorm(name="norm")(x, MASK[: len(x)], train)

    variables = Net().init(jax.random.key(0), X, False)

    def apply(variables, x):
        return Net().apply(variables, x, True, mutable=["batch_stats"])

    sweep = tools.recalibrate(apply, variables, BATCHES, progress=False, kinds=kinds)
    valid = jnp.concatenate([X[:4], X[:4] + 1])
    stats = sweep.variables["batch_stats"]["norm"]
    assert_close((stats["mean"], stats["var"]), (valid.mean(0), valid.var(0)), 32)
    model = OwnOfNnx(nnx.Rngs(0))
    sweep = tools.recalibrate(
        lambda m, x: m(x, train=True), model, BATCHES, progress=False, kinds=NNX_KINDS
    )
    got = sweep.variables
    whole = jnp.concatenate(BATCHES)
    assert type(got.called) is NnxBatchNorm and type(got.told[0]) is ToldBatchNorm
    assert_close(got.called.mean[...], whole.mean(0), 32)
    assert_close(got.called.var[...], whole.var(0), 32)
    # Its mean is 0 but for rounding, of what comes normalized to it.
    assert (got.told[0].var[...] != model.told[0].var[...]).all()


class Foldable(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        x = RenormBatchNorm(not train, name="renorm")(x)
        return nn.Dense(2, name="head")(x)


def test_registered_norms_are_folded():
    variables = trained(models.abstract_init(Foldable(), X))
    folded = tools.fold(Foldable(), variables, X, seconds=0, kinds=KINDS)
    assert folded.report.folded == {"renorm": ("dense",)}
    got = folded.apply(folded.variables, X)
    assert_close(got, Foldable().apply(variables, X), 32)
    model = OwnOfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    model.told[0].use_running_average = True
    folded = tools.fold(model, X, train=False, seconds=0, kinds=NNX_KINDS)
    assert set(folded.report.folded) == {"called/norm", "told/0/norm"}
    assert_close(folded.apply(X, train=False), model(X, train=False), 32)


def test_a_norm_of_flax_beside_registered_ones_is_folded_as_ever():
    class Beside(OwnOfNnx):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.flax = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.flax(self.linear(self.called(x, deterministic=True)))

    model = Beside(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    folded = tools.fold(model, X, seconds=0, kinds=NNX_KINDS)
    assert folded.report.folded["flax"] == ("linear",)


def test_the_doctor_examines_registered_norms():
    """A bias that a norm takes off, and an optimizer that decays it."""
    variables = Foldable().init(jax.random.key(0), X)

    def named(**kinds):
        report = tools.doctor(
            Foldable(), X, True, variables=variables, steps=0, **kinds
        )
        assert report.norms == 1  # which its statistics show
        return {(f.name, f.path) for f in report.findings}

    assert named() == set()
    assert named(kinds=KINDS) == {
        ("bias-before-norm", "renorm"),
        ("few-values", "renorm"),
    }
    model = OwnOfNnx(nnx.Rngs(0))
    report = tools.doctor(model, X, kinds=NNX_KINDS, steps=0)
    assert report.norms == 2
    found = {(f.name, f.path) for f in report.findings}
    assert ("bias-before-norm", "told/0/norm") in found


class BareLayerNorm(nn.Module):
    """Without any field of Flax's, and its input is called otherwise."""

    @nn.compact
    def __call__(self, inputs):
        scale = self.param("scale", nn.initializers.ones, inputs.shape[-1:])
        x = inputs - inputs.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


class BareGroupNorm(BareLayerNorm):
    ngroups: int = 2


class BareInstanceNorm(BareLayerNorm):
    """Of no field either."""


class BareBatchNorm(nn.Module):
    """It says neither its epsilon nor its momentum."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        m, v = (x.mean(0), x.var(0)) if train else (mean.value, var.value)
        if train and not self.is_initializing():
            mean.value, var.value = m, v
        return (x - m) / jnp.sqrt(v + 1e-3)


BARE = {
    BareLayerNorm: "LayerNorm",
    BareGroupNorm: "GroupNorm",
    BareInstanceNorm: "InstanceNorm",
    BareBatchNorm: "BatchNorm",
}


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = BareBatchNorm(name="batch")(nn.Dense(4, name="dense")(x), train)
        x = BareLayerNorm(name="layer")(inputs=x)
        x = x.reshape(3, 2, 4)
        x = BareGroupNorm(name="group")(x)
        return BareInstanceNorm(name="instance")(inputs=nn.Dense(4, name="more")(x))


class BareOfNnx(nnx.Module):
    """Layer and batch norms of nnx without any field of Flax's."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.batch = BareNnxBatchNorm(4)
        self.layer = BareNnxLayerNorm(4)

    def __call__(self, x, train=True):
        return self.layer(inputs=self.batch(self.linear(x), deterministic=not train))


class BareNnxLayerNorm(nnx.Module):
    def __init__(self, num_features):
        self.scale = nnx.Param(jnp.ones(num_features))

    def __call__(self, inputs):
        x = inputs - inputs.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale


class BareNnxBatchNorm(NnxBatchNorm):
    def __init__(self, num_features):
        super().__init__(num_features)
        del self.epsilon

    def __call__(self, x, deterministic):
        m, v = self.mean[...], self.var[...]
        if not deterministic:
            m, v = x.mean(0), x.var(0)
        return (x - m) / jnp.sqrt(v + 1e-3)


NNX_BARE = {BareNnxBatchNorm: "BatchNorm", BareNnxLayerNorm: "LayerNorm"}


def test_the_doctor_skips_what_needs_a_field_that_a_class_has_not():
    """Every kind, and nothing is said of a default that nobody passed."""
    model = Bare()
    variables = model.init(jax.random.key(0), X)
    stats = {"mean": jnp.ones(4), "var": jnp.full(4, 1e-12)}
    variables["batch_stats"]["batch"] = stats
    given = {"variables": variables, "kinds": BARE, "steps": 2}
    report = tools.doctor(model, X, True, **given)
    assert report.norms == 4
    found = {(f.name, f.path) for f in report.findings}
    assert ("bias-before-norm", "batch") in found
    assert ("bias-before-norm", "instance") in found
    assert "momentum-too-slow" not in {name for name, _ in found}
    assert report.skipped["momentum-too-slow"] == (
        "the class has no field momentum, of batch"
    )
    assert report.skipped["extreme-variance"] == (
        "the class has no field epsilon, of batch"
    )
    said = report.skipped["group-of-one"]
    assert "the class has no field num_groups, of group" in said
    assert not any("epsilon" in f.what for f in report.findings)


@pytest.mark.parametrize("of", [BareLayerNorm, BareGroupNorm, BareInstanceNorm])
def test_the_doctor_takes_the_axes_of_its_kind_for_a_class_without(of):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return of(name="norm")(nn.Dense(4)(x).reshape(3, 2, 4))

    variables = Net().init(jax.random.key(0), X)
    report = tools.doctor(Net(), X, variables=variables, kinds={of: BARE[of]}, steps=2)
    assert report.norms == 1
    assert ("group-of-one" in report.skipped) == (of is BareGroupNorm)


def test_the_doctor_skips_fields_that_classes_of_nnx_have_not():
    model = BareOfNnx(nnx.Rngs(0))
    report = tools.doctor(model, X, kinds=NNX_BARE, steps=2)
    assert report.norms == 2
    assert ("bias-before-norm", "batch/norm") in {
        (f.name, f.path) for f in report.findings
    }
    assert report.skipped["momentum-too-slow"] == (
        "the class has no field momentum, of batch/norm"
    )


def test_a_negative_variance_needs_no_epsilon():
    model = Bare()
    variables = model.init(jax.random.key(0), X)
    variables["batch_stats"]["batch"]["var"] = -jnp.ones(4)
    report = tools.doctor(model, X, True, variables=variables, kinds=BARE)
    assert [f.path for f in report.findings if f.name == "extreme-variance"] == [
        "batch"
    ]


def test_a_look_sees_norms_whose_input_has_another_name():
    """The groups that a class hides are nothing to count by."""
    model = Bare()
    looks = tools.look(model, model.init(jax.random.key(0), X), X, kinds=BARE)
    values = {one.name: one.values for one in looks}
    assert values["layer"] == 4 and values["instance"] == 2
    assert np.isnan(values["group"])
    looks = tools.look(BareOfNnx(nnx.Rngs(0)), X, kinds=NNX_BARE)
    assert [one.values for one in looks if one.name == "layer"] == [4]
