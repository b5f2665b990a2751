"""Frozen statistics: an affine layer, which nothing updates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import assert_close
from flax import nnx
from test_errors import raises

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (6, 3)) + 2


class Block(nn.Module):
    """Flax's batch norm, normjax's, and a layer norm; the call says how."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x)
        x = nn.BatchNorm(name="theirs")(x, not train)
        x = linen.BatchNorm(name="ours", axis_name="d", missing_axis="ignore")(
            x, use_running_average=not train
        )
        return nn.LayerNorm(name="layer")(jnp.tanh(x))


class Model(nn.Module):
    """A block by itself, and a stack of them by scan and remat."""

    @nn.compact
    def __call__(self, x, train):
        x = Block(name="encoder")(x, train)
        blocks = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        block = nn.remat(Block, static_argnums=2)(name="scanned")
        return blocks(block, x, None)[0]


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(3, rngs=rngs), normjax.nnx.BatchNorm(3, rngs=rngs)]
        )
        self.again = self.norms[0]

    def __call__(self, x):
        for norm in (*self.norms, self.again):
            x = jnp.tanh(norm(self.dense(x)))
        return x


def trained(variables):
    """Statistics and parameters that are not those of the start."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), variables
    )


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def variables():
    return trained(models.abstract_init(Model(), X, train=False))


def loss(model, variables, train):
    """The loss, and the statistics that the model returns."""
    y, updates = model.apply(variables, X, train, mutable=["batch_stats"])
    return (y * jnp.arange(3.0)).sum(), updates["batch_stats"]


def gradients(model, variables, train):
    def f(params):
        return loss(model, {**variables, "params": params}, train)

    return jax.jit(jax.value_and_grad(f, has_aux=True))(variables["params"])


def moved(model, variables):
    """The norms whose statistics a step of training moves."""
    stats = jax.jit(lambda v: loss(model, v, True)[1])(variables)
    return {
        f"{block}/{name}"
        for block, norms in stats.items()
        for name, of in norms.items()
        if (of["mean"] != variables["batch_stats"][block][name]["mean"]).all()
    }


def test_frozen_statistics_stay_in_scan_remat_jit_and_grad(variables):
    """Training is then what inference is, with its gradients, bit for bit."""
    frozen = tools.freeze(Model())
    (value, stats), grads = gradients(frozen, variables, True)
    same_bits(stats, variables["batch_stats"])
    (want, _), want_grads = gradients(frozen, variables, False)
    same_bits((value, grads), (want, want_grads))


def test_only_what_matches_is_frozen_and_unfrozen(variables):
    everything = {
        f"{b}/{n}" for b in ("encoder", "scanned") for n in ("ours", "theirs")
    }
    assert moved(Model(), variables) == everything
    part = tools.freeze(Model(), ["encoder", "sc*/ours"])
    assert moved(part, variables) == {"scanned/theirs"}
    less = tools.unfreeze(part, "*/theirs")
    with raises(
        ValueError,
        "unfreeze: paths must match frozen batch norms of the model. Got"
        " paths='scanned/theirs', and the frozen batch norms are: encoder/theirs,"
        ' encoder/ours, scanned/ours. Pass one of these paths, or "*" for all.',
    ):
        moved(tools.unfreeze(part, "scanned/theirs"), variables)
    assert moved(less, variables) == {"scanned/theirs", "encoder/theirs"}
    assert moved(tools.unfreeze(less), variables) == everything


def affine(x, scale, bias, mean, var):
    rstd = 1 / jnp.sqrt(var + 1e-5)
    return x * (scale * rstd) + (bias - mean * scale * rstd)


@pytest.mark.parametrize(
    ("library", "dims"), [(nn, 1), (linen, 2)], ids=["flax", "normjax"]
)
def test_gradients_are_those_of_an_affine_layer(float64, library, dims):
    """Of x, scale and bias, to rounding in float64, written by hand and by autodiff."""
    x = jax.random.normal(jax.random.key(3), (5, *[2] * (dims - 1), 4)) * 3 + 7
    norm = library.BatchNorm(param_dtype=jnp.float64, dtype=jnp.float64)
    variables = norm.init(jax.random.key(0), x, use_running_average=False)
    variables = trained(jax.tree.map(lambda a: a.astype(jnp.float64), variables))
    stats, params = variables["batch_stats"], variables["params"]
    dy = jax.random.normal(jax.random.key(4), x.shape)
    frozen = tools.freeze(norm)

    def of_frozen(x, params):
        return frozen.apply(
            {"params": params, "batch_stats": stats},
            x,
            use_running_average=False,
            mutable=["batch_stats"],
        )[0]

    def by_hand(x, params):
        return affine(x, params["scale"], params["bias"], **stats)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(f, x, params, dy):
        y, transposed = jax.vjp(f, x, params)
        return y, transposed(dy)

    got = with_gradients(of_frozen, x, params, dy)
    want = with_gradients(by_hand, x, params, dy)
    rstd = 1 / jnp.sqrt(stats["var"] + 1e-5)
    over = tuple(range(x.ndim - 1))
    formulas = (
        dy * params["scale"] * rstd,
        {
            "scale": (dy * (x - stats["mean"]) * rstd).sum(over),
            "bias": dy.sum(over),
        },
    )
    for expected in (want, (want[0], formulas)):
        assert_close(got, expected, x.size)


def test_gradients_are_those_of_inference_bit_for_bit():
    norm = linen.BatchNorm()
    variables = trained(norm.init(jax.random.key(0), X, use_running_average=True))

    def f(apply, x, variables, **keywords):
        y = apply(variables, x, mutable=["batch_stats"], **keywords)[0]
        return jnp.sin(y).sum()

    def grads(apply, **keywords):
        def of(x, params):
            return f(apply, x, {**variables, "params": params}, **keywords)

        return jax.jit(jax.grad(of, (0, 1)))(X, variables["params"])

    same_bits(
        grads(tools.freeze(norm).apply, use_running_average=False),
        grads(norm.apply, use_running_average=True),
    )


# NNX.


def test_frozen_statistics_of_nnx_stay_whatever_train_sets():
    model = OfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    frozen = tools.freeze(model)
    frozen.train()
    assert frozen.again is frozen.norms[0]

    @nnx.jit
    def step(model, x):
        return nnx.grad(lambda m: jnp.sin(m(x)).sum())(model)

    grads = step(frozen, X)
    same_bits(nnx.state(frozen), before)
    same_bits(nnx.state(model), before)
    model.eval()
    want = step(tools.replace(model, "batch", "same"), X)
    same_bits(grads, want)
    frozen.dense.kernel[...] = 0 * frozen.dense.kernel[...]
    assert model.dense.kernel[...].any()  # a copy


def test_unfrozen_nnx_follows_its_batches_again():
    frozen = tools.freeze(OfNnx(nnx.Rngs(0)))
    frozen(X)
    assert not frozen.again.mean[...].any()
    part = tools.unfreeze(frozen, "norms/1")
    part(X)
    assert part.norms[1].mean[...].any() and not part.again.mean[...].any()
    tools.unfreeze(part)(X)
    with raises(
        ValueError,
        "unfreeze: paths must match frozen batch norms of the model. Got"
        " paths='norms/1', and the frozen batch norms are: again. Pass one of these"
        ' paths, or "*" for all.',
    ):
        tools.unfreeze(part, "norms/1")


@pytest.mark.parametrize(
    "fields",
    [
        {"normalize_with": "running", "update_statistics": True},
        {"normalize_with": "batch"},
        {"use_running_average": True},
        {},
    ],
)
def test_what_is_unfrozen_is_what_it_was(fields):
    model = linen.BatchNorm(**({"use_running_average": False} | fields))
    variables = trained(model.init(jax.random.key(0), X))
    again = tools.unfreeze(tools.freeze(tools.freeze(model)))
    want = model.apply(variables, X, mutable=["batch_stats"])
    same_bits(again.apply(variables, X, mutable=["batch_stats"]), want)

    of_nnx = normjax.nnx.BatchNorm(3, **fields, rngs=nnx.Rngs(0))
    again = tools.replace(tools.freeze(of_nnx), "batch", "same", momentum=0.5)
    again = tools.unfreeze(tools.freeze(again))
    names = ("normalize_with", "update_statistics", "use_running_average")
    for name in names:
        assert getattr(again, name) == getattr(of_nnx, name)
    assert again.momentum == 0.5


def test_what_the_model_itself_has_frozen_is_unfrozen():
    fields = {"normalize_with": "running", "update_statistics": False}
    model = linen.BatchNorm(False, **fields)
    variables = model.init(jax.random.key(0), X)
    free = tools.unfreeze(tools.freeze(model))
    _, updates = free.apply(variables, X, mutable=["batch_stats"])
    assert updates["batch_stats"]["mean"].all()
    of_nnx = normjax.nnx.BatchNorm(3, **fields, rngs=nnx.Rngs(0))
    free = tools.unfreeze(tools.freeze(of_nnx))
    assert free.normalize_with is None and free.update_statistics is None


# What is refused.


def test_a_pattern_without_a_norm_is_refused(variables):
    norms = [f"{b}/{n}" for b in ("encoder", "scanned") for n in "ab"]
    there = ", ".join(norms).replace("/a", "/theirs").replace("/b", "/ours")
    message = (
        "freeze: paths must match batch norms of the model. Got paths='decoder/*', and"
        f' the batch norms are: {there}. Pass one of these paths, or "*" for all.'
    )
    frozen = tools.freeze(Model(), ["encoder", "decoder/*"])
    with raises(ValueError, message):
        jax.eval_shape(lambda: frozen.apply(variables, X, False))
    with raises(ValueError, message):
        models.abstract_init(frozen, X, False)


def test_a_model_without_batch_norm_is_refused():
    message = (
        "freeze: paths must match batch norms of the model. Got paths='*', and the"
        " batch norms are: none, only norms of LayerNorm. Look at what tools.find_norms"
        " finds in the model."
    )
    with raises(ValueError, message):
        models.abstract_init(tools.freeze(nn.LayerNorm()), X)
    with raises(ValueError, message):
        tools.freeze(nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    with raises(ValueError, message.replace(", only norms of LayerNorm", "")):
        models.abstract_init(tools.freeze(nn.Dense(2)), X)


def test_what_is_no_pattern_or_no_model_is_refused():
    with raises(
        TypeError,
        "freeze: paths must be a pattern of paths, or several. Got paths=3. Pass"
        ' "encoder/*", say.',
    ):
        tools.freeze(Model(), 3)
    for model, paths in ((Model(), []), (OfNnx(nnx.Rngs(0)), ())):
        with raises(
            ValueError,
            f"freeze: paths must have one pattern at least. Got paths={paths}. Pass"
            ' "*" for all, or leave it out for none.',
        ):
            tools.freeze(model, paths)
    with raises(
        TypeError,
        "freeze: model must be a module of flax.linen or flax.nnx. Got dict. Pass the"
        " model itself, not its variables or its apply.",
    ):
        tools.freeze({"params": {}})
