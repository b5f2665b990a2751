"""The doctor finds each fault in a model that has it, and none in one that has not."""

import concurrent.futures
import functools
import importlib
import threading
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contexts import mesh
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.nnx
from normjax import linen, tools
from normjax.tools import calls

MASK = np.arange(16)[:, None, None] < 14
X = np.random.default_rng(0).normal(size=(16, 6, 4)).astype(np.float32) * MASK
FEW = 2  # samples of 6 positions


class Linen(nn.Module):
    """Norms by the names of the faults that they have unless the model is sound."""

    sound: bool

    @nn.compact
    def __call__(self, x, train):
        sound = self.sound
        norm = functools.partial(
            linen.BatchNorm, use_running_average=not train, momentum=0.8
        )
        x = norm(name="mask")(x, mask=MASK if sound else None)
        x = nn.Dense(4, use_bias=not sound, name="dense")(x)
        x = norm(name="bias", debias=True)(x, mask=MASK)
        first = norm(name="twice")
        second = norm(name="second") if sound else first
        x = second(first(x, mask=MASK), mask=MASK)
        x = norm(name="slow", momentum=0.8 if sound else 0.99)(x, mask=MASK)
        kept = {} if sound else {"param_dtype": jnp.bfloat16}
        x = norm(name="half", force_float32_reductions=sound, **kept)(x, mask=MASK)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        y = linen.GroupNorm(2 if sound else 4, name="one")(x[:, 0].astype(jnp.float32))
        n = 16 if sound else FEW
        few = norm(name="few", debias=True)(x[:n], mask=MASK[:n])
        alive = np.array([1, 1, 1, sound], np.float32)
        constant = norm(name="constant")(x * alive, mask=MASK)
        z = nn.relu(norm(name="dead", debias=True)(x, mask=MASK))
        return nn.Dense(2)(z), y, few, constant


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, sound, rngs):
        norm = functools.partial(normjax.nnx.BatchNorm, 4, momentum=0.8, rngs=rngs)
        self.sound = sound
        self.mask, self.bias, self.half = norm(), norm(debias=True), norm()
        self.dense = nnx.Linear(4, 4, use_bias=not sound, rngs=rngs)
        self.twice, self.slow = norm(), norm(momentum=0.8 if sound else 0.99)
        self.second = norm() if sound else self.twice
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.one = normjax.nnx.GroupNorm(4, 2 if sound else 4, rngs=rngs)
        self.few, self.constant, self.dead = (
            norm(debias=True),
            norm(),
            norm(debias=True),
        )
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.mask(x, mask=MASK if self.sound else None)
        x = self.bias(self.dense(x), mask=MASK)
        x = self.second(self.twice(x, mask=MASK), mask=MASK)
        x = self.half(self.slow(x, mask=MASK), mask=MASK)
        y = self.one(self.dropout(x)[:, 0])
        n = 16 if self.sound else FEW
        few = self.few(x[:n], mask=MASK[:n])
        alive = np.array([1, 1, 1, self.sound], np.float32)
        constant = self.constant(x * alive, mask=MASK)
        return self.head(nnx.relu(self.dead(x, mask=MASK))), y, few, constant


PATHS = {"mask", "bias", "twice", "slow", "half", "one", "few", "constant", "dead"}


def unmasked(params):
    """False for the parameters of norms."""
    return jax.tree.map_with_path(
        lambda path, _: not PATHS.union({"second"}) & {p.key for p in path[:1]}, params
    )


def optimizer(sound):
    return optax.adamw(1e-3, mask=unmasked if sound else None)


@jax.jit
def linen_variables(key):
    """Of both models, after one step."""
    found = {}
    for sound in (True, False):
        model = Linen(sound)
        given = model.init(key, X, False)
        rngs = {"dropout": key}
        _, stats = model.apply(given, X, True, mutable=["batch_stats"], rngs=rngs)
        found[sound] = {"params": given["params"], **stats}
    return found


@nnx.jit
def nnx_models(key):
    """Both, after one step."""
    models = {sound: Nnx(sound, nnx.Rngs(key)) for sound in (True, False)}
    for model in models.values():
        model(X)
    return models[True], models[False]


BIAS = np.array([-100.0, 0, 0, 0], np.float32)


@functools.cache
def of_linen():
    found = linen_variables(jax.random.key(0))
    found[False]["params"]["dead"]["bias"] = BIAS
    return found


@functools.cache
def of_nnx():
    sound, faulty = nnx_models(jax.random.key(0))
    faulty.dead.bias[...] = jnp.asarray(BIAS)
    for variable in (faulty.half.mean, faulty.half.var):
        variable.set_value(variable[...].astype(jnp.bfloat16))
    sound.eval()
    faulty.eval()
    return {True: sound, False: faulty}


@functools.cache
def report(system, sound):
    given = {"optimizer": optimizer(sound), "steps": 20}
    if system == "nnx":
        return tools.doctor(of_nnx()[sound], X, **given)
    variables = of_linen()[sound]
    before = jax.tree.map(np.array, variables)
    found = tools.doctor(Linen(sound), X, train=True, variables=variables, **given)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    return found


FAULTS = {
    ("updated-twice", "twice"): "its statistics are updated 2 times in one step",
    (
        "half-precision",
        "half",
    ): "mean is kept in bfloat16, var is kept in bfloat16; with"
    " momentum 0.8 a batch that is less than 2% off changes nothing",
    ("momentum-too-slow", "slow"): "after 20 steps of momentum 0.99 its statistics are"
    " still 82% those of the start, 0 and 1",
    ("few-values", "few"): "12 values for each mean and var, x of shape (2, 6, 4)",
    ("bias-before-norm", "bias"): "the bias of dense right before it changes nothing,"
    " since the mean is taken off",
    ("group-of-one", "one"): "one value for each mean, x of shape (16, 4): what it"
    " returns is the bias alone",
    (
        "mask-unused",
        "mask",
    ): "2 samples at the end of the batch are all zero, padding it"
    " seems, and count in its moments",
    (
        "dead-channels",
        "dead",
    ): "no gradient of an output reaches 1 of 4 channels (0), on this batch",
    (
        "dead-channels",
        "constant",
    ): "x is constant over the batch in 1 of 4 channels (3), on this batch",
} | {
    ("norm-decayed", path): "the optimizer moves scale and bias where their gradients"
    " are zero"
    for path in PATHS
}
each_system = pytest.mark.parametrize("system", ["linen", "nnx"])


@each_system
def test_a_sound_model_has_no_finding(system):
    assert report(system, True).findings == ()
    assert list(report(system, True).skipped) == ["replicas-differ"]


@each_system
def test_a_faulty_model_has_each_finding_and_no_other(system):
    found = {
        # A module in two places of an nnx model has the path of the last.
        (f.name, f.path.replace("second", "twice")): f.what
        for f in report(system, False).findings
    }
    assert found == FAULTS


class Digits(nn.Module):
    """A small network as one would write it, with norms of Flax and of normjax."""

    @nn.compact
    def __call__(self, x, train):
        running = {"use_running_average": not train, "momentum": 0.8}
        x = nn.relu(nn.BatchNorm(**running)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(linen.BatchNorm(**running)(nn.Dense(8, use_bias=False)(x)))
        x = nn.relu(nn.GroupNorm(2)(nn.Dense(8)(x)))
        x = linen.GroupNorm(2)(x).mean((1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(2)(nn.LayerNorm()(nn.Dense(8)(linen.RMSNorm()(x))))


class NnxDigits(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs),
                nnx.Linear(8, 8, use_bias=False, rngs=rngs),
                nnx.Linear(8, 8, rngs=rngs),
            ]
        )
        self.norms = nnx.List(
            [
                nnx.BatchNorm(8, momentum=0.8, rngs=rngs),
                normjax.nnx.BatchNorm(8, momentum=0.8, rngs=rngs),
                nnx.GroupNorm(8, 2, rngs=rngs),
            ]
        )
        self.group = normjax.nnx.GroupNorm(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.layer = nnx.LayerNorm(8, rngs=rngs)
        self.rms = normjax.nnx.RMSNorm(8, rngs=rngs)
        self.hidden, self.head = (nnx.Linear(8, n, rngs=rngs) for n in (8, 2))

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        x = self.dropout(self.group(x).mean((1, 2)))
        return self.head(self.layer(self.hidden(self.rms(x))))


def images(n):
    """Images of two kinds, bars upright and lying, in noise."""
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 6, 6, 1)) + 1
    x[labels == 0, :, 2:4] += 2
    x[labels == 1, 2:4] += 2
    return x.astype(np.float32), labels


IMAGES, LABELS = images(32)
TX = optax.sgd(0.1)


def test_a_trained_linen_model_is_healthy():
    model = Digits()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), IMAGES, False)

    def loss(params, stats, key):
        y, updated = model.apply(
            {"params": params, "batch_stats": stats},
            IMAGES,
            True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        of = optax.softmax_cross_entropy_with_integer_labels(y, LABELS)
        return of.mean(), updated["batch_stats"]

    @jax.jit
    def step(variables, key=None):
        key = jax.random.key(0) if key is None else key
        params, stats = variables["params"], variables["batch_stats"]
        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, key)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return {"params": params, "batch_stats": stats}

    for i in range(20):
        variables = step(variables, jax.random.key(i))
    report = tools.doctor(
        model, IMAGES, True, variables=variables, optimizer=TX, steps=20, step=step
    )
    assert report.findings == (), str(report)
    assert list(report.skipped) == ["replicas-differ"]
    assert (report.norms, report.failed(strict=True)) == (6, False)


def test_a_trained_nnx_model_is_healthy():
    model = nnx.jit(lambda: NnxDigits(nnx.Rngs(0)))()

    def loss(model):
        of = optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), LABELS)
        return of.mean()

    @nnx.jit
    def step(model):
        grads = nnx.grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

    for _ in range(20):
        step(model)
    before = tools.checksum(nnx.state(model))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    report = tools.doctor(model, IMAGES, optimizer=optimizer, steps=20, step=step)
    assert report.findings == (), str(report)
    assert list(report.skipped) == ["replicas-differ"]
    assert (tools.checksum(nnx.state(model)) == before).all()


# Statistics that steps leave behind.


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train, name="norm")(x)


@functools.cache
def normed():
    model = Normed()
    return model, model.init(jax.random.key(0), X, False)


def named(report):
    return {(f.name, f.path) for f in report.findings}


def linen_step(keeps, train, variables):
    model, _ = normed()
    _, updated = model.apply(variables, X, train, mutable=["batch_stats"])
    return {**variables, **(updated if keeps else {})}


def test_a_linen_step_that_drops_statistics_is_found():
    model, variables = normed()
    evaluating = functools.partial(linen_step, True, False)
    report = tools.doctor(model, X, True, variables=variables, step=evaluating)
    assert named(report) == {("never-updated", "norm"), ("mask-unused", "norm")}
    dropping = jax.jit(functools.partial(linen_step, False, True))
    trained = linen_step(True, True, variables)
    for _ in range(2):  # the second time it has been compiled
        report = tools.doctor(model, X, True, variables=trained, step=dropping)
        assert named(report) == {("update-dropped", "norm"), ("mask-unused", "norm")}


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_an_nnx_step_under_plain_jit_is_found(jit):
    def step(model):
        model(X)

    step = jit(step)
    report = tools.doctor(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), step=step, steps=0)
    ours = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert named(report) == named(tools.doctor(ours, step=step, steps=0))
    if jit is nnx.jit:
        assert named(report) == set()
        return
    (finding,) = report.findings
    assert str(finding) == (
        "error update-dropped the model: a step updates mean and var, and they are as"
        " before after it. Wrap the step in nnx.jit, not in jax.jit."
    )


def tree(**leaves):
    norm = {"mean": np.ones(3), "var": np.full(3, 2.0), **leaves}
    params = {k: norm.pop(k) for k in ("scale", "bias") if k in norm}
    return {"params": {"a": {"n": params}}, "batch_stats": {"a": {"n": norm}}}


START = {"mean": np.zeros(3), "var": np.ones(3)}
AT = "in 1 of 3 channels (1)"


@pytest.mark.parametrize(
    ("leaves", "steps", "name", "what"),
    [
        (START, None, "never-updated", "mean is 0 and var is 1 in all channels, as at"
         " the start"),
        (START | {"count": np.zeros(3)}, 3, "never-updated", "mean is 0 and var is 1 in"
         " all channels, as at the start"),
        (START | {"scale": np.arange(3.0)}, None, "update-dropped", "mean is 0 and var"
         " is 1 as at the start, while scale or bias has moved"),
        ({"mean": np.array([1, np.inf, 1])}, None, "not-finite", "mean is NaN or infinite"
         f" {AT}"),
        ({"scale": np.array([1, np.nan, 1])}, None, "not-finite", "scale is NaN or"
         f" infinite {AT}"),
        ({"var": np.array([1, 1e-9, 1])}, None, "extreme-variance", "the running var is"
         f" below 1e-07, far below epsilon=1e-05 {AT}: 1.0e-09 to 1.0e-09"),
        ({"var": np.array([1, 1e9, 1])}, None, "extreme-variance", "the running var is"
         f" above 1e+08 {AT}: 1.0e+09 to 1.0e+09"),
        ({"var": np.array([1, -1.0, 1])}, None, "extreme-variance", "the running var is"
         f" negative {AT}: -1.0e+00 to -1.0e+00"),
        ({"var": np.ones(3, jnp.bfloat16)}, None, "half-precision", "var is kept in"
         " bfloat16; with momentum 0.9 a batch that is less than 4% off changes nothing"),
        ({}, 5, "momentum-too-slow", "after 5 steps of momentum 0.9 its statistics are"
         " still 59% those of the start, 0 and 1"),
    ],
)  # fmt: skip
def test_a_fault_of_a_tree_is_found_and_none_in_a_sound_one(leaves, steps, name, what):
    (finding,) = [
        f
        for f in tools.doctor(tree(**leaves), steps=steps, momentum=0.9).findings
        if f.name != "momentum-too-slow" or not leaves
    ]
    assert (finding.name, finding.path, finding.what) == (name, "a/n", what)
    sound = {"scale": np.arange(3.0), "bias": np.zeros(3)}
    assert tools.doctor(tree(**sound), steps=30, momentum=0.9).findings == ()


@pytest.mark.parametrize("scale", [np.ones(3), np.arange(3.0)])
def test_a_model_before_its_first_step_is_sound(scale):
    assert tools.doctor(tree(**START, scale=scale), steps=0).findings == ()


OF = tree(scale=np.arange(3.0), bias=np.ones(3))
MOMENTS = jax.tree.map(np.zeros_like, OF["params"])


@pytest.mark.parametrize(
    "kept",
    [
        {"opt_state": {"0": {"mu": {"a": {"scale": np.full(3, np.nan)}}}}},
        {"optimizer": {"0": {"mu": {"params": MOMENTS}}}},
        {"opt": {"0": {"trace": MOMENTS}}},
        {"state": {"0": {"mu": {"n": MOMENTS["a"]}, "nu": {"n": MOMENTS["a"]}}}},
    ],
)
def test_an_optimizers_moments_are_no_statistics(kept):
    report = tools.doctor(OF | kept)
    assert (report.findings, report.norms) == ((), 1)


@pytest.mark.parametrize("name", ["mu", "nu", "trace", "opt", "opt_state"])
def test_a_module_may_have_the_name_of_a_moment(name):
    """As the head of a variational autoencoder, beside one of the same arrays."""
    bad = tree(var=np.full(3, np.nan))["batch_stats"]["a"]
    params, stats = OF["params"]["a"], OF["batch_stats"]["a"]
    given = {
        "params": {name: params, "logvar": params},
        "batch_stats": {name: bad, "logvar": stats},
    }
    report = tools.doctor(given)
    assert named(report) == {("not-finite", f"{name}/n")} and report.norms == 2
    if not name.startswith("opt"):
        assert named(tools.doctor({name: bad, "logvar": stats})) == named(report)


@pytest.mark.parametrize("collection", ["batch_stats", "stats"])
def test_statistics_and_parameters_of_a_norm_are_one(collection):
    """Whatever the collection is called, and with averages of parameters beside it."""
    norm = {"scale": np.array([1.0, np.nan]), "bias": np.zeros(2)}
    scales = {"a": {"n": norm}, "b": {"n": {"scale": np.ones(2)}}}
    stats = {"mean": np.ones(2), "var": np.full(2, np.inf)}
    given = {"params": scales, collection: {"a": {"n": stats}}}
    for more in ({}, {"ema": {"a": {"n": {"scale": np.ones(2)}}}}):
        report = tools.doctor(given | more)
        assert report.norms == 2 + len(more)
        assert [(f.path, f.what[:5]) for f in report.findings] == [
            ("a/n", "var i"),
            ("a/n", "scale"),
        ]
    twice = {"new": {"s": given}, "old": {"s": given}}
    report = tools.doctor(twice)
    assert report.norms == 4
    assert {f.path for f in report.findings} == {"new/s/a/n", "old/s/a/n"}
    deeper = {"params": scales, "state": {collection: given[collection]}}
    assert tools.doctor(deeper).norms == 2


def test_an_nnx_state_is_a_tree():
    norm = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm, nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    report = tools.doctor(nnx.state(model))
    assert named(report) == {("never-updated", "layers/0")} and report.norms == 2


# Replicas.


@pytest.mark.parametrize("stacked", [True, False])
def test_replicas_that_differ_are_found(stacked):
    def given(drifts):
        var = np.ones((8, 3), np.float32)
        var[6] += drifts
        mean = np.ones((8, 3), np.float32)
        if not stacked:
            sharding = NamedSharding(mesh((8,), ("d",)), P())
            mean, var = (
                jax.make_array_from_single_device_arrays(
                    (3,), sharding, list(map(jax.device_put, a, jax.devices()))
                )
                for a in (mean, var)
            )
        return {"batch_stats": {"n": {"mean": mean, "var": var}}}

    (finding,) = tools.doctor(given(1), stacked=stacked).findings
    device = 6 if stacked else jax.devices()[6]
    assert (finding.name, finding.path, finding.what) == (
        "replicas-differ",
        "batch_stats/n/var",
        f"not the same on all of 8 devices; it differs on {device}",
    )
    report = tools.doctor(given(0), stacked=stacked)
    assert report.findings == () and "replicas-differ" not in report.skipped


def test_all_replicas_are_looked_at():
    of = tree(var=np.array([1.0, np.nan, 1]), scale=np.ones(3))
    given = jax.tree.map(lambda *a: np.stack(a), tree(scale=np.ones(3)), of)
    report = tools.doctor(given, stacked=True, steps=1, momentum=0.9)
    assert [(f.name, f.path) for f in report.findings] == [
        ("replicas-differ", "batch_stats/a/n/var"),
        ("not-finite", "a/n"),
        ("momentum-too-slow", "a/n"),
    ]
    assert report.norms == 1


class Words(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.one = (nnx.BatchNorm(2, rngs=rngs) for _ in range(2))
        self.sign = normjax.nnx.RMSNorm(1, rngs=rngs)
        self.unused = nnx.LayerNorm(2, rngs=rngs)

    def __call__(self, tokens):
        x = jnp.cos(tokens[..., None] + jnp.arange(2.0))
        y = self.norm(x), self.one(x[:1, 0]), self.sign(x[..., :1])
        return jax.tree.map(lambda a: jnp.log(-1 - a**2), y)


def test_other_faults_of_a_call_are_found():
    tokens = np.array([[5, 3, 0, 0], [2, 0, 0, 0], [4, 4, 4, 1]])
    report = tools.doctor(Words(nnx.Rngs(0)), tokens, steps=0)
    found = {(f.name, f.path): (f.severity, f.what) for f in report.findings}
    assert found == {
        ("not-finite", ""): (
            "error",
            "an output is NaN or plus infinity, while what its norms hold is finite",
        ),
        ("few-values", "norm"): (
            "warning",
            "12 values for each mean and var, x of shape (3, 4, 2)",
        ),
        ("few-values", "one"): (
            "error",
            "1 value for each mean and var, x of shape (1, 2): what it returns is its"
            " bias",
        ),
        ("group-of-one", "sign"): (
            "error",
            "one value for each mean, x of shape (3, 4, 1): what it returns is the sign"
            " of x",
        ),
        ("mask-unused", "norm"): (
            "warning",
            "5 positions at the end of the batch are all zero, padding it seems, and"
            " count in its moments",
        ),
    }
    assert report.skipped["mask-unused"] == "the call does not reach unused"


def test_statistics_that_a_call_does_not_reach_are_named():
    model, variables = normed()
    other = {"other": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    stats = linen_step(True, True, variables)["batch_stats"] | other
    report = tools.doctor(model, X, True, variables={**variables, "batch_stats": stats})
    assert ("never-updated", "other") in named(report) and report.norms == 2
    assert report.skipped["few-values"] == "the call does not reach other"


# Norms on their running statistics, and layers that others read, too.


class Biased(nn.Module):
    """A layer with a bias, and a norm of what it returns."""

    norm: nn.Module
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4, name="dense")(x)
        y = self.norm(h)
        return y + h if self.residual else y


class Teacher(nnx.Module):
    def __init__(self, norm, *more):
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm, self.more = norm, nnx.List(more)

    def __call__(self, x):
        for layer in (self.dense, self.norm, *self.more):
            x = layer(x)
        return x


def teacher(frozen):
    """A trained norm that is frozen, or in a part of a model that is set to evaluate."""
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.full(4, 0.1)
    if frozen:
        return tools.freeze(Teacher(norm))
    norm.eval()
    counted = normjax.nnx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0))
    return Teacher(norm, nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1)), counted)


FROZEN = [
    linen.BatchNorm(normalize_with="running", update_statistics=False, name="norm"),
    nn.BatchNorm(use_running_average=True, name="norm"),
]


def trained(model, x=X):
    """Its variables, the statistics of its norm not those of the start."""
    variables = model.init(jax.random.key(0), x)
    variables["batch_stats"]["norm"]["mean"] = jnp.full(4, 0.1)
    return variables


@pytest.mark.parametrize("norm", FROZEN)
@pytest.mark.parametrize("n", [1, 2])
def test_a_frozen_norm_of_linen_is_not_taken_to_train(norm, n):
    model, x = Biased(norm), X[:n, 0]
    variables = trained(model)
    assert calls.measure(model, variables, (x,), {}).gaps == [0]
    report = tools.doctor(model, x, variables=variables, steps=100)
    assert report.findings == ()
    frozen = "the call has running statistics normalize in norm"
    names = ("few-values", "bias-before-norm", "momentum-too-slow", "train-eval-gap")
    assert [report.skipped[k] for k in names] == [frozen] * 4


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_of_nnx_is_not_taken_to_train(frozen):
    report = tools.doctor(teacher(frozen), X[:, 0], steps=100)
    found = (
        set() if frozen else {("never-updated", "more/1"), ("mask-unused", "more/1")}
    )
    assert {f for f in named(report) if f[0] != "train-eval-gap"} == found
    assert report.skipped["few-values"].endswith("normalize in norm")


def test_an_nnx_model_that_evaluates_is_called_to_train():
    model = teacher(False)
    model.eval()
    assert ("bias-before-norm", "norm") in named(tools.doctor(model, X[:, 0]))


@pytest.mark.parametrize("rule", ["freeze", "layer"])
def test_a_model_with_other_norms_in_place_is_looked_at(rule):
    model = Biased(nn.BatchNorm(use_running_average=False, name="norm"))
    variables = trained(model)
    if rule == "freeze":
        other = tools.freeze(model)
    else:
        other = tools.replace(model, "batch", "layer")
        variables, _ = other.convert(variables, X)
    report = tools.doctor(other, X[:2, 0], variables=variables, steps=100)
    assert (report.findings, report.norms) == ((), 1)


@pytest.mark.parametrize("residual", [False, True])
def test_a_bias_that_something_else_reads_changes_something(residual):
    model = Biased(nn.BatchNorm(use_running_average=False, name="norm"), residual)
    report = tools.doctor(model, X, variables=trained(model))
    assert (("bias-before-norm", "norm") in named(report)) is not residual


def test_a_mean_that_two_norms_take_off_takes_the_bias_off():
    class Two(nn.Module):
        other: nn.Module

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(4)(x)
            return nn.InstanceNorm(name="norm")(h), self.other(h)

    def found(other):
        model = Two(other)
        variables = model.init(jax.random.key(0), X)
        report = tools.doctor(model, X, variables=variables, steps=0)
        return {f.path for f in report.findings if f.name == "bias-before-norm"}

    assert found(linen.InstanceNorm(name="other")) == {"norm", "other"}
    assert found(nn.LayerNorm(name="other")) == set()


class Flagged(nn.Module):
    """A norm that is passed the flag of training, and some that are not."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="first")(x)
        for i in range(2):
            x = nn.BatchNorm(use_running_average=True, name=f"left{i}")(x)
        return nn.Dense(2)(x)


class NnxFlagged(nnx.Module):
    def __init__(self):
        self.first, self.left = (nnx.BatchNorm(4, rngs=nnx.Rngs(0)) for _ in "12")

    def __call__(self, x, train=False):
        x = self.first(x, use_running_average=not train)
        return self.left(x, use_running_average=True)


@pytest.mark.parametrize("trained", [False, True])
@each_system
def test_a_flag_that_some_norms_are_not_passed_is_found(system, trained):
    """Whether their statistics are those of the start, or pretrained."""
    if system == "linen":
        model = Flagged()
        variables = model.init(jax.random.key(0), X[:, 0])
        stats = variables["batch_stats"]
        given, some = {"variables": variables}, ["left0", "left1"]
    else:
        model = NnxFlagged()
        stats = {k: getattr(model, k) for k in ("first", "left")}
        given, some = {}, ["left"]
    for name, of in stats.items():
        if trained or name == "first":
            mean = jnp.full(4, 0.1)
            of.update(mean=mean) if system == "linen" else of.mean.set_value(mean)
    report = tools.doctor(model, X[:, 0], train=True, **given)
    assert {name for name, _ in named(report)} <= {"modes-differ", "mask-unused"}
    (finding,) = [f for f in report.findings if f.name == "modes-differ"]
    assert (finding.path, finding.severity) == (some[0], "warning")
    assert finding.what == (
        f"some norms infer while others train, {len(some)} of {len(some) + 1}:"
        f" {', '.join(some)}"
    )
    assert "updates" not in finding.todo and "flag" in finding.todo


def test_norms_that_a_step_leaves_out_are_found():
    variables = Flagged().init(jax.random.key(0), X[:, 0])

    def step(variables):
        rest = {"mutable": ["batch_stats"]}
        return {**variables, **Flagged().apply(variables, X[:, 0], True, **rest)[1]}

    given = {"variables": variables, "steps": 0}
    report = tools.doctor(Flagged(), X[:, 0], False, step=step, **given)
    assert "modes-differ" not in {name for name, _ in named(report)}
    model = NnxFlagged()
    report = tools.doctor(model, step=lambda m: m(X[:, 0], True), steps=0)
    assert named(report) == {("modes-differ", "left")}


def test_norms_that_are_set_to_infer_are_meant_to():
    for model in (teacher(True), teacher(False)):
        report = tools.doctor(model, X[:, 0], steps=0)
        assert "modes-differ" not in {name for name, _ in named(report)}
    model = tools.freeze(Flagged(), "left*")
    variables = Flagged().init(jax.random.key(0), X[:, 0])
    report = tools.doctor(model, X[:, 0], True, variables=variables, steps=0)
    assert named(report) == {("mask-unused", "first")}


# What a call is given.


class Called(nnx.Module):
    """It writes what it is called with."""

    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs, cache=None):
        x = self.norm(x)
        if cache is not None:
            cache[...] += x.sum()
        return self.dropout(x, rngs=rngs)


@pytest.mark.parametrize("cached", [False, True])
def test_objects_of_nnx_are_arguments_and_stay_as_they_are(cached):
    cache = nnx.Variable(jnp.zeros(())) if cached else None
    rngs = nnx.Rngs(dropout=0)
    for args, kwargs in [((rngs, cache), {}), ((), {"rngs": rngs, "cache": cache})]:
        report = tools.doctor(Called(), SAMPLES, *args, steps=0, **kwargs)
        assert report.findings == (), str(report)
        assert len(tools.look(Called(), SAMPLES, *args, **kwargs)) == 1
    assert rngs.dropout.count[...] == 0 and (cache is None or cache[...] == 0)


class Dropped(nn.Module):
    """It needs a stream of its own, and keeps what it is asked to."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4)(x))
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        self.put_variable("kept", "x", x)
        return x + 100 * noise if self.has_rng("noise") else x


def test_rngs_and_mutable_mean_in_all_tools_what_apply_has():
    model, x = Dropped(), X[:14, 0]
    key = jax.random.key(0)
    keys = {"params": key, "noise": key}
    variables = model.init(keys, x)
    mutable = ["batch_stats", "kept"]
    given = {"rngs": {"noise": key}, "mutable": mutable}
    assert len(tools.look(model, variables, x, **given)) == 1
    assert [n.path for n in tools.find_norms(model, x, **given)] == [("norm",)]
    grouped = tools.replace(model, "batch", "group", num_groups=2)
    converted, _ = grouped.convert(variables, x, **given)
    assert set(converted) == {"params", "kept"}
    for more in (given, {"rngs": {"noise": key}}, {"rngs": key}):
        report = tools.doctor(model, x, variables=variables, steps=0, **more)
        assert "not-finite" not in {name for name, _ in named(report)}
    variables["batch_stats"]["norm"]["mean"] += 1
    folded = tools.fold(model, variables, x, False, seconds=0, **given)
    assert list(folded.report.folded) == ["norm"]


@pytest.mark.parametrize("name", ["mean", "var"])
def test_a_channel_that_a_batch_has_ruined_can_be_mended_in_two_ways(name):
    ruined = {name: np.array([1, np.nan, 1])}
    (finding,) = tools.doctor(tree(**ruined)).findings
    assert finding.todo == (
        "Recompute the statistics with tools.recalibrate, or set mean to 0 and var to 1"
        " in these channels and train on; skip_nonfinite=True, of normjax's BatchNorm"
        " and of RunningMoments.update, leaves such updates out"
    )
    model, variables = normed()
    given = {**START, **ruined}
    given = {k: np.resize(a, 4).astype(np.float32) for k, a in given.items()}
    ill = {**variables, "batch_stats": {"norm": given}}

    def apply(variables, x):
        return model.apply(variables, x, True, mutable=["batch_stats"])

    mended = tools.recalibrate(apply, ill, [X[:14]], progress=False).variables
    for of, finds in ((ill, True), (mended, False)):
        report = tools.doctor(model, X[:14], True, variables=of)
        assert (("not-finite", "norm") in named(report)) is finds


def test_dead_channels_wait_until_statistics_have_moved():
    """Until then it is their start that kills, and what follows lives in training."""
    far = SAMPLES * 0.1 - np.float32([8, -8, -8, -8])

    class Rectified(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.BatchNorm(use_running_average=False, name="norm")(x)
            return nn.Dense(2)(nn.relu(y))

    model = Rectified()
    variables = model.init(jax.random.key(0), far)
    moved = {"mean": far.mean(0), "var": far.var(0)}
    for share, waits in ((0.02, True), (1.0, False)):
        stats = {k: share * a + (1 - share) * START[k][0] for k, a in moved.items()}
        given = {**variables, "batch_stats": {"norm": stats}}
        report = tools.doctor(model, far, variables=given)
        assert "dead-channels" not in {name for name, _ in named(report)}
        why = report.skipped.get("dead-channels")
        assert why == (
            "running statistics have hardly moved from their start, 0 and 1, so that it"
            " is not known of norm"
            if waits
            else None
        )


# Outputs and gradients that are as they should be.


class Head(nn.Module):
    """A norm, and outputs made of what it returns, and of its mean."""

    outputs: Callable

    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return self.outputs(nn.LayerNorm(name="layer")(y), x - y)


def looked_at(outputs, x, steps=None, **stats):
    model = Head(outputs)
    params = model.init(jax.random.key(0), x)["params"]
    given = {"mean": np.zeros(4), "var": np.ones(4)} | stats
    variables = {"params": params, "batch_stats": {"norm": given}}
    return tools.doctor(model, x, variables=variables, steps=steps)


SAMPLES = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
CALIBRATED = {"mean": SAMPLES.mean(0), "var": SAMPLES.var(0)}


@pytest.mark.parametrize(
    "outputs",
    [
        lambda y, off: y * 0,  # a head of zeros
        lambda y, off: jnp.round(y),
        lambda y, off: jax.lax.stop_gradient(y),
        lambda y, off: jnp.where(y > 0, -jnp.inf, y),  # logits of a mask
        lambda y, off: (y, off.mean()),  # a loss beside them, small by chance
    ],
)
def test_outputs_that_are_meant_so_have_no_finding(outputs):
    report = looked_at(outputs, SAMPLES[:32], **CALIBRATED)
    assert report.findings == (), str(report)


@pytest.mark.parametrize("outputs", [lambda y, off: off.mean(), lambda y, off: off[:3]])
def test_outputs_without_the_batchs_axis_are_not_compared(outputs):
    report = looked_at(outputs, SAMPLES, **CALIBRATED)
    assert report.findings == () and report.skipped["train-eval-gap"] == (
        "needs the model, arguments of its call, and an output that is floating and has"
        " the axis of the batch"
    )
    assert "dead-channels" not in report.skipped


def test_calibrated_statistics_differ_from_a_batchs_by_chance():
    """The gap of 8 samples is large; statistics that are wrong are found in them."""
    few = SAMPLES[:8]

    def found(**stats):
        report = looked_at(lambda y, off: off * 9, few, **stats)
        return ("train-eval-gap", "norm") in named(report)

    assert not found(**CALIBRATED)
    assert found(mean=CALIBRATED["mean"] + 3, var=CALIBRATED["var"])
    assert found(mean=CALIBRATED["mean"], var=CALIBRATED["var"] * 100)


@pytest.mark.parametrize(("errors", "is_found"), [(2, False), (4, True)])
def test_a_mean_is_off_by_chance_up_to_three_standard_errors(errors, is_found):
    few = SAMPLES[:8]
    mean = few.mean(0) + errors * few.std(0) / 8**0.5
    report = looked_at(lambda y, off: off * 9, few, mean=mean, var=few.var(0))
    assert (("train-eval-gap", "norm") in named(report)) == is_found


def test_before_the_first_step_initialization_is_no_fault():
    half = np.array([0.0, 0, 1, 1], np.float32)
    outputs = functools.partial(lambda y, off: (y * half, off))
    report = looked_at(outputs, SAMPLES * half + 9, steps=0)
    assert report.findings == ()
    new = "before the first step it is the initialization that shows"
    assert [k for k, why in report.skipped.items() if why == new] == [
        "dead-channels",
        "train-eval-gap",
    ]
    later = {f[0] for f in named(looked_at(outputs, SAMPLES * half + 9, **CALIBRATED))}
    assert later == {"dead-channels", "train-eval-gap"}


# How a model is compiled.


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        devices = {"axis_name": "d", "missing_axis": "ignore"}
        x = linen.BatchNorm(use_running_average=False, name="norm", **devices)(x)
        return nn.LayerNorm(name="layer")(x), None


class Compiled(nn.Module):
    over: str

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        split = {"params": True}
        if self.over == "scan":
            of = nn.scan(Inside, variable_axes=axes, split_rngs=split, length=3)
        elif self.over == "carry":  # one norm, called three times
            carry = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
            of = nn.scan(Inside, **carry, split_rngs={"params": False}, length=3)
        else:
            of = nn.jit(Inside)
        return of(name="in")(x, None)[0]


def inside_of(shape, x):
    of = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (*shape, *a.shape)),
        Inside().init(jax.random.key(0), x, None),
    )
    return {collection: {"in": tree} for collection, tree in of.items()}


@pytest.mark.parametrize("over", ["scan", "jit", "carry"])
def test_norms_within_compiled_parts_are_seen(over):
    model = Compiled(over)
    variables = inside_of((3,) if over == "scan" else (), X)
    variables["batch_stats"]["in"]["norm"]["mean"] += 5 * np.eye(4, dtype=np.float32)[3]
    if over == "jit":
        jax.jit(lambda v: model.apply(v, X, mutable=["batch_stats"]))(variables)
    report = tools.doctor(model, X, variables=variables)
    found = {("train-eval-gap", "in/norm"), ("mask-unused", "in/norm")}
    if over == "carry":
        found |= {("updated-twice", "in/norm")}
        assert "updated 3 times" in str(report)
    assert named(report) == found
    assert report.skipped["few-values"] == (
        "how many devices sync is not known here, of in/norm"
    )
    assert set(report.skipped) == {
        *("few-values", "replicas-differ", "momentum-too-slow", "norm-decayed")
    }


class Waiting(nnx.Module):
    """Norms that are called while another thread calls its own."""

    def __init__(self, norms, barrier):
        self.norms = nnx.List(
            [nnx.LayerNorm(4, rngs=nnx.Rngs(0)) for _ in range(norms)]
        )
        self.barrier = barrier

    def __call__(self, x):
        self.barrier.wait(60)
        for norm in self.norms:
            x = norm(x)
        self.barrier.wait(60)
        return x


def test_threads_do_not_see_each_others_norms():
    barrier = threading.Barrier(2)

    def skipped(norms):
        return tools.doctor(Waiting(norms, barrier), X, steps=0).skipped

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(skipped, (1, 3)))
    assert [of.get("mask-unused") for of in found] == [None, None]


# Weight decay.

PARAMS = {"dense": {"kernel": np.ones((3, 3), np.float32)}}
PARAMS |= {"n": {k: np.ones(3, np.float32) for k in ("scale", "bias")}}
KERNELS = {"dense": {"kernel": True}, "n": {"scale": False, "bias": False}}
LATE = optax.linear_schedule(0.0, 1e-3, 100, 10)


@pytest.mark.parametrize(
    ("tx", "decays"),
    [
        (optax.adamw(1e-3), True),
        (optax.adamw(LATE), True),
        (optax.MultiSteps(optax.adamw(1e-3), 8), True),
        (optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9)), True),
        (optax.lamb(1e-3, weight_decay=0.1), True),
        (optax.adamw(1e-3, mask=KERNELS), False),
        (
            optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)),
            False,
        ),
        (optax.adam(1e-3), False),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
        (optax.contrib.prodigy(), False),  # updates are NaN
        (optax.contrib.schedule_free_adamw(1e-3), False),  # updates are rounding
        (
            optax.multi_transform(
                {"norm": optax.adamw(LATE), "rest": optax.adamw(1e-3)},
                {"dense": "rest", "n": "norm"},
            ),
            True,
        ),
    ],
)
def test_weight_decay_of_norms_is_found_in_any_chain(tx, decays):
    stats = {"n": {"mean": np.ones(3), "var": np.ones(3)}}
    report = tools.doctor({"params": PARAMS, "batch_stats": stats}, optimizer=tx)
    assert named(report) == ({("norm-decayed", "n")} if decays else set())
    assert "norm-decayed" not in report.skipped


def test_an_optimizer_that_needs_more_is_not_asked():
    tx = optax.chain(optax.adamw(1e-3), optax.contrib.reduce_on_plateau())
    report = tools.doctor({"params": PARAMS}, optimizer=tx)
    assert report.findings == ()
    assert report.skipped["norm-decayed"].startswith(
        "the optimizer does not take gradients and parameters alone: TypeError: "
    )


# Padding.


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([[5, 3, 0, 0], [2, 0, 0, 0], [4, 4, 4, 1]], {"positions": (5, (3, 4))}),
        ([[5, 3, 1, 0], [2, 9, 2, 0], [4, 4, 4, 0]], {}),  # all alike: no padding
        ([[5, 3], [2, 1], [0, 0]], {"samples": (1, (3,))}),
        ([[0, 3], [0, 1]], {}),
        ([[5, 3, 0, 0], [2, 0, 3, 0], [4, 4, 4, 1]], {}),  # 0 is a word like others
        ([[5, 3, 2, 0], [2, 1, 3, 7], [4, 4, 4, 1]], {}),  # one 0 may be by chance
    ],
)
def test_padding_is_known_by_zeros_at_the_end(tokens, found):
    tokens = np.array(tokens)
    labels, ok = np.zeros(3), np.zeros((3, 4), bool)
    assert tools_padding(((tokens, labels, ok), {"train": True})) == found
    floats = np.tile(tokens[..., None].astype(np.float32), 2)
    key = jax.random.split(jax.random.key(0), 3)
    assert tools_padding(((floats,), {"key": key})) == found


def test_samples_are_padding_where_all_inputs_are_zero():
    x = np.array([[1.0, 2], [3, 4], [0, 0]])
    other = np.ones((2, 5))  # of another length
    for label, found in [(0, {"samples": (1, (3,))}), (1, {})]:
        labels = np.array([[1], [0], [label]])
        assert tools_padding(((x, labels, other), {})) == found
        assert tools_padding(((labels[:, 0], x), {})) == found


def test_rows_of_images_are_no_positions():
    class Rows(nn.Module):
        channels: bool

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="norm")(
                x[..., None] if self.channels else x
            )

    x = np.array(X[:14])
    x[3:8, 4:] = 0
    for channels in (True, False):
        model = Rows(channels)
        variables = model.init(jax.random.key(0), x)
        report = tools.doctor(model, x, variables=variables, steps=0)
        found = {("mask-unused", "norm")}
        assert named(report) == (set() if channels else found)


def tools_padding(arguments):
    return importlib.import_module("normjax.tools.doctor")._padding(arguments)


# What it says, and how.


def test_a_report_is_printed_as_a_table_or_in_lines(capsys, monkeypatch):
    report = tools.doctor(tree(**START))
    report.show()
    table = capsys.readouterr().out
    assert "what to type" in table and "never-updated" in table
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report.show()
    assert capsys.readouterr().out == f"{report}\n"
    lines = str(report).splitlines()
    assert lines[:2] == [
        "1 norm, 1 finding",
        "error never-updated a/n: mean is 0 and var is 1 in all channels, as at the"
        ' start. Keep updates["batch_stats"] of model.apply(..., mutable=["batch_stats"])'
        " in linen; wrap steps in nnx.jit, not jax.jit, in nnx.",
    ]
    assert lines[2] == (
        "not checked modes-differ, updated-twice, few-values, bias-before-norm,"
        " group-of-one, mask-unused: needs the model, and the arguments of its call while training"
    )


BAD = [
    (
        lambda: tools.doctor(
            normed()[0], X, variables=normed()[1], capture_intermediates=True
        ),
        "doctor: the arguments must be those of the model's call, with rngs, method and"
        " mutable of its apply. Got capture_intermediates. Leave it out: nothing reads"
        " what it keeps.",
    ),
    (
        lambda: tools.doctor(normed()[0], X, variables=normed()[1], step=3),
        "doctor: step must be a function that takes one training step. Got int. Pass an"
        " argument of the model's that has this name by its place.",
    ),
    (
        lambda: tools.doctor({"dense": {"kernel": np.ones((2, 2))}}),
        "doctor: there must be a norm to look at. Got dict of ['dense'], and no mean"
        " beside a var, no scale with at most a bias. Pass the model with a call that"
        " reaches its norms, or its variables whole, params and batch_stats.",
    ),
    (
        lambda: tools.doctor(nn.Dropout(0.5), X, True, variables={}),
        "doctor: there must be a norm to look at. Got Dropout. Pass the model with a call"
        " that reaches its norms, or its variables whole, params and batch_stats.",
    ),
    (
        lambda: tools.doctor(np.ones(3)),
        "doctor: model must be a module of flax.linen or flax.nnx, or a tree of"
        " variables. Got ndarray. Pass the model itself, its variables, or"
        " nnx.state(model).",
    ),
    (
        lambda: tools.doctor(tree(), X),
        "doctor: a tree of variables cannot be called. Got a tree, and with it what goes"
        " with a model. Pass the model in its place, with variables= for linen.",
    ),
    (
        lambda: tools.doctor(tree(var=np.ones(2))),
        "doctor: mean and var of a batch norm must have one shape. Got a/n/mean of shape"
        " (3,), a/n/var of shape (2,). Pass the statistics of one model.",
    ),
    (
        lambda: tools.doctor(normed()[0], X, True, variables={"params": {}}),
        "doctor: the statistics of a batch norm must be among the variables. Got no"
        ' batch_stats/norm/mean. Pass variables={"params": params, "batch_stats":'
        " batch_stats}.",
    ),
    (
        lambda: tools.doctor(normed()[0], X, True),
        "doctor: a linen model needs its variables, and an nnx model has them. Got a"
        " model of linen, variables of NoneType. Pass variables=model.init(...),"
        " trained, or leave them out for nnx.",
    ),
    (
        lambda: tools.doctor(normed()[0], variables=normed()[1]),
        "doctor: a linen model is known by a call. Got no arguments of it. Pass those of"
        " its call while training, or the variables alone.",
    ),
    (
        lambda: tools.doctor(normed()[0], X, True, variables=[1]),
        "doctor: variables must be the dictionary that init returns. Got list. Pass"
        ' {"params": params, "batch_stats": batch_stats}.',
    ),
    (
        lambda: tools.doctor(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), X, momentum=0.9),
        "doctor: stacked and momentum go with variables alone. Got stacked=False,"
        " momentum=0.9 and a model. Leave them out, or pass the variables in place of"
        " the model.",
    ),
    (
        lambda: tools.doctor(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), X * np.nan),
        "doctor: the batch must be finite, so that what is not comes from the model. Got"
        " NaN or infinity in the argument 0. Pass a batch of clean data.",
    ),
    (
        lambda: tools.doctor(
            nnx.LayerNorm(4, rngs=nnx.Rngs(0)), x={"image": X / np.float32(0)}
        ),
        "doctor: the batch must be finite, so that what is not comes from the model. Got"
        " NaN or infinity in the argument x['image']. Pass a batch of clean data.",
    ),
    (
        lambda: tools.doctor(
            normed()[0], X, True, variables=normed()[1], step=lambda v: v["params"]
        ),
        "doctor: step must return the variables after it, as it is given those before"
        ' it. Got dict of [\'norm\']. Return {"params": params, "batch_stats":'
        " batch_stats}.",
    ),
    (
        lambda: tools.doctor(tree(), momentum=1.1),
        "doctor: momentum is the part of the old value that is kept and must lie in"
        " [0, 1]. Got momentum=1.1. PyTorch's momentum m is momentum=1 - m here.",
    ),
    (
        lambda: tools.doctor(tree(), steps=-1),
        "doctor: steps, how many there were, must not be negative. Got steps=-1. Leave"
        " it out where it is not known.",
    ),
    (
        lambda: tools.doctor(tree(scale=np.ones(3)), optimizer="adamw"),
        "doctor: optimizer must be an optax transformation or an nnx.Optimizer. Got str."
        " Pass optax.adamw(...), say.",
    ),
]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_looked_at_is_named(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == message


class EachLinen(nn.Module):
    """A layer and every kind of norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        for norm in (nn.BatchNorm(False), nn.LayerNorm(), nn.RMSNorm()):
            x = norm(x) * 2 + 1
        return nn.GroupNorm(3)(x[:, None])


class EachNnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 6, rngs=rngs)
        of = nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm
        self.norms = nnx.List([norm(6, rngs=rngs) for norm in of])
        self.group = nnx.GroupNorm(6, num_groups=3, rngs=rngs)

    def __call__(self, x):
        x = self.layer(x)
        for norm in self.norms:
            x = norm(x) * 2 + 1
        return self.group(x[:, None])


@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_a_watched_model_computes_what_the_model_does(system):
    x = jax.random.normal(jax.random.key(0), (8, 4)) + 1
    if system == "linen":
        variables = EachLinen().init(jax.random.key(1), x)
        given = {
            **variables,
            "batch_stats": calls.with_places(variables["batch_stats"]),
        }
        want, _ = EachLinen().apply(variables, x, mutable="batch_stats")
        with calls.watching_linen("batch") as watch:
            got, _ = EachLinen().apply(given, x, mutable="batch_stats")
    else:
        model = EachNnx(nnx.Rngs(0))
        copy = calls.watched(model)
        want = model(x)
        with calls.watching_nnx("batch") as watch:
            got = copy(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    if system == "nnx":  # also where a step has kept it, and calls it later
        np.testing.assert_allclose(copy(x), want, atol=1e-5)
    assert len(watch.seen) == 4
    assert {len(found) for found in watch.seen.values()} == {1}
