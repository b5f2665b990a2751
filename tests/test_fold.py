"""Folding: the same outputs without the norm, or a reason why the norm stays."""

import functools
import importlib

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import tolerance
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

fold = importlib.import_module("normjax.tools.fold")  # which a function hides

C = 4
LAYERS = {
    "conv1d": lambda of: of("Conv", 6, (3,), use_bias=False),
    "conv2d": lambda of: of("Conv", 6, (3, 3), strides=2, use_bias=False),
    "conv3d": lambda of: of("Conv", 6, (2, 2, 2)),
    "dilated": lambda of: of(
        "Conv", 6, (3,), kernel_dilation=2, input_dilation=2, padding=1
    ),
    "grouped": lambda of: of("Conv", 6, (3, 3), feature_group_count=2),
    "depthwise": lambda of: of("Conv", 8, (3,), feature_group_count=C, use_bias=False),
    "masked": lambda of: of("Conv", 6, (3,), mask=MASK),
    "transposed": lambda of: of("ConvTranspose", 6, (3, 3), strides=(2, 2)),
    "transposed kernel": lambda of: of(
        "ConvTranspose", 6, (3,), transpose_kernel=True, use_bias=False
    ),
    "dense": lambda of: of("Dense", 6),
    "dense, no bias": lambda of: of("Dense", 6, use_bias=False),
    "general": lambda of: of("DenseGeneral", (3, 2), axis=(-2, -1), use_bias=False),
}
# What pads nothing with zeros, and so has the same sum at every place.
AFTER = {
    "valid": lambda of: of("Conv", 6, (3,), padding="VALID", use_bias=False),
    "circular": lambda of: of("Conv", 6, (3, 3), padding="CIRCULAR"),
    "one by one": lambda of: of("Conv", 6, (1, 1), strides=2),
    "no padding": lambda of: of("Conv", 6, (3,), padding=[(0, 0)], mask=MASK),
    "mixed padding": lambda of: of("Conv", 6, (3, 3), padding=((0, 0), 0)),
    "grouped": lambda of: of(
        "Conv", 6, (2,), feature_group_count=2, padding=0, use_bias=False
    ),
    "dense": lambda of: of("Dense", 6),
    "general": lambda of: of("DenseGeneral", (3, 2), axis=(-1, -2), use_bias=False),
}
MASK = np.arange(3 * C * 6).reshape(3, C, 6) % 3 > 0
SPATIAL = {"conv1d": 1, "conv3d": 3, "dilated": 1, "depthwise": 1, "masked": 1}
SPATIAL |= {"transposed kernel": 1, "valid": 1, "no padding": 1}


def input_of(name, after):
    space = 1 if after and name == "grouped" else SPATIAL.get(name, 2)
    shape = (2, *(5, 4, 3)[:space], C)
    return jax.random.normal(jax.random.key(len(name)), shape, jnp.float_)


def trained(shapes, seed=0):
    """Variables as after training: no statistic is 0 or 1 any more."""
    rng = np.random.default_rng(seed)

    def one(path, a):
        if a.dtype == bool:
            return a
        positive = "var" in jax.tree_util.keystr(path)
        drawn = rng.uniform(0.2, 2, a.shape) if positive else rng.normal(size=a.shape)
        return jnp.asarray(drawn, a.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def of_linen(model, *inputs):
    return trained(jax.eval_shape(model.init, jax.random.key(0), *inputs))


class OfLinen(nn.Module):
    """Each layer with a batch norm before or after it, on an input of its own."""

    after: bool
    dtype: str

    @nn.compact
    def __call__(self, xs):
        def of(kind, *args, **kwargs):
            return getattr(nn, kind)(*args, **kwargs, param_dtype=self.dtype)

        ys = {}
        for i, (name, layer) in enumerate((AFTER if self.after else LAYERS).items()):
            library = linen if i % 2 else nn
            axis = (-2, -1) if name == "general" and not self.after else -1
            norm = library.BatchNorm(
                True, axis, param_dtype=self.dtype, force_float32_reductions=False
            )
            both = [norm, layer(of)] if self.after else [layer(of), norm]
            ys[name] = nn.Sequential(both)(xs[name])
        return ys


class OfNnx(nnx.Module):
    """The same of nnx."""

    def __init__(self, after, dtype, rngs):
        zeros = nnx.initializers.zeros
        options = {"param_dtype": dtype, "rngs": rngs}

        def of(kind, features, *args, **kwargs):
            kind = {"Dense": "Linear", "DenseGeneral": "LinearGeneral"}.get(kind, kind)
            size = (C, 4) if kwargs.get("axis") == (-1, -2) else C
            size = (4, C) if kwargs.get("axis") == (-2, -1) else size
            if "mask" in kwargs:
                kwargs["mask"] = jnp.asarray(kwargs["mask"])
            kwargs = {"kernel_init": zeros, **kwargs, **options}
            return getattr(nnx, kind)(size, features, *args, **kwargs)

        self.branches = nnx.Dict({})
        for i, (name, layer) in enumerate((AFTER if after else LAYERS).items()):
            library = normjax.nnx if i % 2 else nnx
            layer, norm = layer(of), functools.partial(library.BatchNorm, **options)
            if after:
                both = [norm(C), layer]
            else:
                features = getattr(layer, "out_features", 6)
                several = isinstance(features, tuple)
                norm = norm(2, axis=-1) if several else norm(features)
                both = [layer, norm]
            self.branches[name] = nnx.Sequential(*both)
        self.eval()

    def __call__(self, xs):
        return {name: branch(xs[name]) for name, branch in self.branches.items()}


def zoo(system, after, dtype):
    names = AFTER if after else LAYERS
    xs = {n: input_of(n, after).astype(dtype) for n in names}
    if system == "linen":
        model = OfLinen(after, dtype)
        return xs, (model, of_linen(model, xs))
    model = OfNnx(after, dtype, nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    return xs, (model,)


def called(model, *inputs):
    """Calls an nnx module, a linen module with variables, or what is folded."""
    run, variables = (*model, None)[:2]
    if variables is None:
        return run(*inputs)
    return getattr(run, "apply", run)(variables, *inputs)


def arrays_of(model):
    """Copies of the arrays of a model."""
    tree = nnx.state(model[0]) if isinstance(model[0], nnx.Module) else model[1]
    return jax.tree.map(np.array, nnx.to_pure_dict(tree) if len(model) == 1 else tree)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("system", "dtype"), [("linen", "float64"), ("nnx", "float32")]
)
def test_every_layer_does_the_work_of_its_norm(system, after, dtype, float64):
    xs, model = zoo(system, after, dtype)
    before = arrays_of(model)
    folded = tools.fold(*model, xs, seconds=0)
    assert len(folded.report.folded) == len(xs)
    assert folded.report.kept == {}
    traced = [
        jax.jit(lambda xs, m=m: called(m, xs)).trace(xs)
        for m in (model, (folded.apply, folded.variables))
    ]
    assert ["rsqrt" in str(t.jaxpr) for t in traced] == [True, False]
    want, got = (t.lower().compile()(xs) for t in traced)
    for name in want:
        error = jnp.abs(got[name] - want[name]).max() / jnp.abs(want[name]).max()
        assert error < tolerance(27 * C, dtype, 50), name
        assert got[name].dtype == want[name].dtype == dtype
    assert folded.report.relative < {"float32": 1e-5, "float64": 1e-12}[dtype]
    jax.tree.map(np.testing.assert_array_equal, arrays_of(model), before)


def test_the_folded_parameters_are_those_of_the_formula():
    model = nn.Sequential([nn.Dense(3, use_bias=False), linen.BatchNorm(True)])
    x = jax.random.normal(jax.random.key(0), (5, 2))
    variables = of_linen(model, x)
    kernel = np.asarray(variables["params"]["layers_0"]["kernel"], np.float64)
    scale, bias, mean, var = (
        np.asarray(variables[c]["layers_1"][n], np.float64)
        for c, n in [
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        ]
    )
    before = jax.tree.map(np.array, variables)
    folded = tools.fold(model, variables, x, seconds=0)
    (got,) = folded.variables["params"].values()
    assert list(folded.variables) == ["params"]
    factor = scale / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(got["kernel"], kernel * factor, rtol=1e-6)
    np.testing.assert_allclose(got["bias"], bias - mean * factor, rtol=1e-6, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_layers_of_one_feature_are_folded(system):
    x = np.random.default_rng(0).normal(size=(4, 1)).astype(np.float32)
    if system == "linen":
        several = nn.DenseGeneral((1, 2), name="several")
        norm = nn.BatchNorm(True, axis=(-2, -1))
        model = nn.Sequential([nn.Dense(1), nn.BatchNorm(True), several, norm])
        folded = tools.fold(model, of_linen(model, x), x, seconds=0)
    else:
        model = nnx.Sequential(
            nnx.Linear(1, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        )
        nnx.update(model, trained(nnx.state(model)))
        model.eval()
        folded = tools.fold(model, x, seconds=0)
    assert not folded.report.kept
    assert folded.report.relative < tolerance(1, "float32", 50)


# Who feeds whom.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Conv(C, (3,), use_bias=False, name="a")(x)
        return nn.relu(nn.BatchNorm(True, name="b")(x))


class Lifted(nn.Module):
    """Layers in a scan, replicas, a remat, a program of their own."""

    @nn.compact
    def __call__(self, x):
        def stacked(axis, name):
            return nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": axis, "batch_stats": axis},
                split_rngs={"params": True},
                length=3,
            )(nn.remat(Block)(name=name), x, None)[0]

        def replicas(axis, name):
            return nn.vmap(
                Block,
                variable_axes={"params": axis, "batch_stats": axis},
                split_rngs={"params": True},
                axis_size=3,
                in_axes=None,
            )(name=name)(x)

        x = stacked(0, "first") + stacked(1, "second")
        x = x + replicas(0, "third").sum(0) + replicas(1, "fourth").sum(0)
        return nn.jit(Block)(name="fifth")(x)


def test_layers_within_transformations_are_folded():
    x = jax.random.normal(jax.random.key(0), (2, 5, C))
    model = Lifted()
    variables = of_linen(model, x)
    model.apply(variables, x)  # which compiles programs within, without marks
    folded = tools.fold(model, variables, x, seconds=0)
    assert set(folded.report.folded) == {"first/b", "third/b", "fifth/b"}
    assert folded.report.kept == {
        f"{name}/b": f"bias of {name}/b is not stored as it is used"
        for name in ("second", "fourth")
    }
    bias = folded.variables["params"]["first"]["a"]["bias"]
    assert bias.shape == (3, C)
    assert folded.report.relative < 1e-5


class Before(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.BatchNorm(True, name="b")(x)
        return nn.Dense(C, use_bias=False, name="a")(x), None


def test_norms_before_layers_of_a_scan_are_folded():
    x = jax.random.normal(jax.random.key(0), (2, C))
    axes = {"params": 0, "batch_stats": 0}
    lifted = nn.scan(Before, axes, split_rngs={"params": True}, length=C)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="s")(x, None)[0]

    folded = tools.fold(Model(), of_linen(Model(), x), x, seconds=0)
    assert set(folded.report.folded) == {"s/b"}
    assert folded.variables["params"]["s"]["a"]["bias"].shape == (C, C)
    assert folded.report.relative < 1e-5


class Kept(nn.Module):
    """Batch norms of which one can be folded, and why each of the others cannot."""

    @nn.compact
    def __call__(self, x, train=False):
        def layer(name, kind=nn.Dense, **fields):
            return kind(C, name=name, **fields)

        def norm(name, kind=linen.BatchNorm, **fields):
            return kind(**{"use_running_average": not train, **fields}, name=name)

        given, x = x, norm("good")(layer("lone")(x))
        x = x + norm("of_input")(given) + norm("of_variable")(self.param("p", ones, C))
        y = layer("two")(x)
        x = y + norm("two_readers")(y)
        x = norm("relu_between")(nn.relu(layer("before_relu")(x)))
        x = norm("of_batch", normalize_with="batch")(layer("c")(x + 0))
        x = norm("updates", update_statistics=True)(layer("d")(x))
        x = norm("masked")(layer("e")(x), mask=jnp.ones((1, 1, C), bool))
        x = norm("other_axis", axis=1)(layer("f")(x))
        x = norm("subclass", Special)(layer("g")(x))
        x = nn.WeightNorm(layer("h"))(x)
        x = norm("computed")(x)
        x = norm("own_product")(layer("i", dot_general=product)(x))
        x = norm("padded")(nn.relu(x))
        x = nn.Conv(C, (3,), name="pads")(x)
        x = norm("activates", activation=nn.relu)(nn.relu(x))
        x = norm("of_input_dilated")(nn.relu(layer("j")(x)))
        x = nn.Conv(C, (1,), input_dilation=2, padding=0, name="spreads")(x)
        shared = layer("shared")
        x, y = shared(x), shared(x + 1)
        return norm("one_of_two")(x) + y


class Special(linen.BatchNorm):
    """What it does is its own."""


def product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def ones(_, features):
    return jnp.ones((1, features))


KEPT = {
    "of_input": "it follows the model's input, no layer, and it feeds `add`, no layer",
    "of_variable": "it follows a variable, no layer, and it feeds `broadcast_in_dim`,"
    " no layer",
    "two_readers": "two before it feeds two_readers, `add`, and it feeds"
    " `add`, no layer",
    "relu_between": "it follows `max`, no layer, and it feeds `add`, no layer",
    "of_batch": "it normalizes by the statistics of the batch",
    "updates": "it updates its statistics",
    "masked": "it has a mask, under which its output is zero",
    "other_axis": "its axis is not that of the features of f, and g after it sums over"
    " other axes than its features",
    "subclass": "Special is a class of its own",
    "computed": "kernel of h is not stored as it is used, and i has a dot_general of"
    " its own",
    "own_product": "i has a dot_general of its own, and it feeds `max`, no layer",
    "padded": "it follows `max`, no layer, and pads after it pads with zeros, which it"
    " would shift",
    "activates": "it follows `max`, no layer, and its activation comes before what"
    " follows",
    "of_input_dilated": "it follows `max`, no layer, and spreads after it pads with"
    " zeros, which it would shift",
    "one_of_two": "shared before it feeds `add`, and it feeds `add`, no layer",
}


@pytest.fixture(scope="module")
def kept():
    x = jax.random.normal(jax.random.key(0), (2, 4, C))
    model = Kept()
    return model, of_linen(model, x), x


def test_what_would_be_wrong_to_fold_stays_and_says_why(kept):
    model, variables, x = kept
    folded = tools.fold(model, variables, x, seconds=0)
    assert folded.report.folded == {"good": ("lone",)}
    assert folded.report.kept == KEPT
    assert folded.report.relative < 1e-5
    assert set(folded.variables["batch_stats"]) == set(KEPT)


class Ranks(nn.Module):
    """An axis that is counted from the front, of inputs of two ranks."""

    @nn.compact
    def __call__(self, x, y):
        dense, norm = nn.Dense(C), nn.BatchNorm(True, axis=1)
        return norm(dense(x)), norm(dense(y))


class Twice(nn.Module):
    model: nn.Module

    def __call__(self, x, y):
        return self.model(x), self.model(y)


def doubled(arrays, *, dtype=None, inexact=True):
    return tuple(a if a is None else 2 * a for a in arrays)


def test_norms_that_are_no_map_of_a_layer_s_features_stay():
    x, y = np.ones((3, C), np.float32), np.ones((3, C, C), np.float32)
    message = error_of(Ranks(), of_linen(Ranks(), x, y), x, y)
    why = "its axis is another one for inputs of another rank"
    assert f"Got BatchNorm_0: {why}. Pass" in message
    general = nn.Sequential([nn.BatchNorm(True), nn.DenseGeneral(C, axis=1)])
    twice = Twice(general)
    why = "layers_1 sums over another axis for inputs of another rank"
    assert f"{why}. Pass" in error_of(twice, of_linen(twice, x, y), x, y)
    for layer, norm, why in [
        (doubled, None, "layers/0 has a promote_dtype of its own, and it feeds"),
        (None, doubled, "it has a promote_dtype of its own. Pass"),
    ]:
        own = [{"promote_dtype": of} if of else {} for of in (layer, norm)]
        model = nnx.Sequential(
            nnx.Linear(C, C, rngs=nnx.Rngs(0), **own[0]),
            nnx.BatchNorm(C, rngs=nnx.Rngs(0), **own[1]),
        )
        model.eval()
        assert f"Got layers/1: {why}" in error_of(model, x)


def test_norms_of_integers_are_folded():
    x = np.arange(3 * C).reshape(3, C)
    model = nn.Sequential([nn.BatchNorm(True), nn.Dense(3)])
    folded = tools.fold(model, of_linen(model, x), x, seconds=0)
    assert folded.report.folded == {"layers_0": ("layers_1",)}


class Beside(nn.Module):
    """Variables that are read beside their layers and norms, all but those of good."""

    @nn.compact
    def __call__(self, x):
        def of(name):
            dense = nn.Dense(C, name=name)
            norm = linen.BatchNorm(True, name=f"n_{name}")
            return norm(dense(x)), dense.variables["params"]["kernel"], norm.variables

        good, kernel, _ = of("good")
        _ = jnp.sum(kernel)  # of which nothing comes
        product, kernel, _ = of("product")
        product = jnp.argmax(product @ kernel, -1)
        branch, kernel, _ = of("branch")
        branch = jax.lax.cond(x[0, 0] > 1e9, lambda x: x @ kernel, lambda x: branch, x)
        loop, kernel, _ = of("loop")
        loop, _ = jax.lax.scan(lambda y, _: (y @ kernel, None), loop, length=2)
        carry, kernel, _ = of("carry")
        y, _ = jax.lax.scan(lambda c, _: (c[::-1], None), (carry, kernel), length=2)
        read = (
            of("mean")[2]["batch_stats"]["mean"],
            2 * of("scale")[2]["params"]["scale"],
        )
        return good, product, branch, loop, y, read


READ = {
    "product": "kernel of product is read beside it, by `dot_general`",
    "branch": "kernel of branch is read beside it, by `cond`",
    "loop": "kernel of loop is read beside it, by `dot_general`",
    "carry": "kernel of carry is read beside it, by `scan`",
    "mean": "mean of n_mean is read beside it, by the model's output",
    "scale": "scale of n_scale is read beside it, by `mul`",
}


def test_what_is_read_beside_its_layer_or_norm_stays():
    x = np.random.default_rng(0).normal(size=(C, C)).astype(np.float32)
    folded = tools.fold(Beside(), of_linen(Beside(), x), x, seconds=0)
    assert folded.report.folded == {"n_good": ("good",)}
    kept = {name: why.split(", and")[0] for name, why in folded.report.kept.items()}
    assert kept == {f"n_{name}": why for name, why in READ.items()}


class TiedOfNnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(C, C, rngs=rngs)
        self.norm = nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x)) @ self.linear.kernel[...].T


def test_what_is_read_beside_its_layer_stays_in_nnx_too():
    assert error_of(TiedOfNnx(nnx.Rngs(0)), np.ones((2, C), np.float32)) == (
        "fold: there must be a batch norm to fold. Got norm: kernel of linear is read"
        " beside it, by `transpose`, and it feeds `dot_general`, no layer. Pass a model"
        " in inference, with batch norms right after layers."
    )


# What is asked for and cannot be done, and what is broken.


class Small(nn.Module):
    """A dense layer and a norm, of any fields."""

    norm: nn.Module
    dense: nn.Module = nn.Dense(C)

    def __call__(self, x, **kwargs):
        return self.norm(self.dense(x), **kwargs)


@pytest.fixture(scope="module")
def small():
    x = np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)
    model = Small(linen.BatchNorm(True))
    return model, of_linen(model, x), x


def changed(variables, path, change):
    """Other variables, in which one array is another."""
    *names, last = path.split("/")
    new = jax.tree.map(lambda a: a, variables)
    of = new
    for name in names:
        of = of[name]
    of[last] = change(of[last])
    return new


def error_of(*args, **kwargs):
    with pytest.raises((TypeError, ValueError)) as error:
        tools.fold(*args, seconds=0, **kwargs)
    return str(error.value)


def test_what_is_asked_for_must_be_possible(kept):
    for name, asked in [
        ("of_input", {"strict": True}),
        ("two_readers", {"paths": ["good", "two_readers"]}),
    ]:
        assert error_of(*kept, **asked) == (
            f"fold: folding must leave every output as it is. Got {name}, which cannot"
            f" be folded: {KEPT[name]}. Leave {name} out of paths, and strict=False."
        )
    assert error_of(*kept, paths="lone") == (
        "fold: paths must name batch norms that the model calls. Got 'lone'; it calls"
        f" good, {', '.join(KEPT)}. Pass paths=None for all that can be folded."
    )


def test_there_must_be_something_to_fold(small):
    _, variables, x = small
    rule = "fold: there must be a batch norm to fold. Got "
    todo = " Pass a model in inference, with batch norms right after layers."
    training = Small(linen.BatchNorm(False))
    assert error_of(training, variables, x) == (
        f"{rule}norm: it normalizes by the statistics of the batch.{todo}"
    )
    dense = nn.Dense(C)
    assert error_of(dense, of_linen(dense, x), x) == (
        f"{rule}a model that calls no batch norm.{todo}"
    )
    of_nnx = nnx.Sequential(
        nnx.Linear(C, C, rngs=nnx.Rngs(0)), nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    )
    assert error_of(of_nnx, x) == (
        f"{rule}layers/1: it normalizes by the statistics of the batch.{todo}"
    )


def test_variables_must_be_those_of_the_model(small):
    model, variables, x = small
    rule = "fold: the variables must be those of the model, as it is called. Got "
    todo = (
        " Pass {'params': ..., 'batch_stats': ...} as its init or its last apply"
        " returned them."
    )
    assert error_of(model, {"params": variables["params"]}, x) == (
        f"{rule}batch_stats/norm/mean missing; in the model it is of shape (4,).{todo}"
    )
    other = changed(variables, "params/dense/kernel", lambda a: a[1:])
    assert error_of(model, other, x) == (
        f"{rule}params/dense/kernel of shape (3, 4); in the model it is of shape"
        f" (4, 4).{todo}"
    )
    ghost = {**variables["batch_stats"], "ghost": {"mean": np.ones(2)}}
    assert error_of(model, {**variables, "batch_stats": ghost}, x) == (
        f"{rule}batch_stats/ghost/mean of shape (2,); in the model it is missing.{todo}"
    )
    rule = "fold: the variables of a linen model come after it. Got "
    todo = " Pass fold(model, {'params': ..., 'batch_stats': ...}, x)."
    assert error_of(model, x) == f"{rule}ndarray.{todo}"
    assert error_of(model) == f"{rule}nothing.{todo}"
    assert error_of(model, variables["params"], x) == (
        f"{rule}a mapping of 'dense', 'norm'.{todo}"
    )
    assert error_of(variables, x) == (
        "fold: model must be a module of flax.linen or flax.nnx. Got dict. Pass the"
        " model itself, not its variables or its apply."
    )


def test_numbers_must_be_those_of_a_trained_model(small):
    model, variables, x = small
    rule = "fold: what is folded must be finite, and no variance negative. Got "
    todo = " Look where it comes from: NaN in the training data, half precision, say."
    for path, value, got in [
        ("batch_stats/norm/mean", np.nan, "nan in mean of norm"),
        ("batch_stats/norm/var", -1.0, "-1.0 in var of norm"),
        ("params/norm/scale", np.inf, "inf in scale of norm"),
        ("params/dense/kernel", np.nan, "nan in the folded kernel of dense"),
        ("params/dense/bias", np.nan, "nan in the folded bias of dense"),
    ]:
        broken = changed(variables, path, lambda a, v=value: a.at[..., 0].set(v))
        assert error_of(model, broken, x) == f"{rule}{got}.{todo}"
    half = changed(variables, "params/dense/kernel", lambda a: abs(a).astype("float16"))
    half = changed(half, "params/norm/scale", lambda a: abs(a) * 1e6)
    got = "inf in the folded kernel of dense"
    assert error_of(model, half, x) == f"{rule}{got}.{todo}"
    fresh = model.init(jax.random.key(0), x)
    assert error_of(model, fresh, x) == (
        "fold: running statistics must be updated before they are folded. Got mean 0"
        " and var 1, those of the start, in norm. Train first, or pass the batch_stats"
        " of the trained model."
    )
    assert error_of(model, variables, x * np.nan) == (
        "fold: the outputs of the model must have no NaN, to compare with. Got NaN in"
        " an output of shape (3, 4). Pass inputs that are typical of inference."
    )


class Heads(nn.Module):
    """Outputs of many kinds, of one norm, beside a parameter of little precision."""

    of: tuple = ("float", "masked", "class", "idle", "name")

    @nn.compact
    def __call__(self, x):
        y = linen.BatchNorm(True)(nn.Dense(C)(x))
        idle = self.param("idle", nn.initializers.zeros, (1,), jnp.bfloat16)
        masked = jnp.where(y > 0, y, -jnp.inf)
        ys = {"masked": masked, "class": y.argmax(-1), "idle": idle, "name": "heads"}
        return {name: {**ys, "float": y}[name] for name in self.of}


def test_outputs_that_are_infinite_or_not_floating_are_compared():
    x = np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)
    variables = of_linen(Heads(), x)
    report = tools.fold(Heads(), variables, x, seconds=0).report
    assert report.relative < tolerance(C, "float32", 50)
    # The layer rounds all that the norm would see, and the folded layer none of it.
    far = changed(variables, "batch_stats/BatchNorm_0/mean", lambda a: a + 1e8)
    far = changed(far, "params/Dense_0/bias", lambda a: a + 1e8)
    for of, got in [
        ("float", "of 1.8 of the largest"),
        ("masked", "of inf of the largest"),
        ("class", "in 1 of the entries of an output of int32"),
    ]:
        assert error_of(Heads((of,)), far, x) == (
            "fold: the folded model must have the outputs of the model. Got a"
            f" difference {got}, where rounding makes 0.00035 at most. Leave a norm out"
            " of paths: a variance may be near zero, or a mean far from it."
        )


class Flagged(nn.Module):
    """Calls of it that differ by a flag, a method, or what is given."""

    def setup(self):
        self.dense, self.norm = nn.Dense(C), linen.BatchNorm(True)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x, train, shift=None, raw=False):
        y = self.dense(x)
        y = y if raw else self.norm(y)
        y = self.dropout(y, deterministic=not train)
        return y if shift is None else y + shift

    def features(self, x):
        return self.dense(x)


def test_a_folded_model_is_called_as_it_was_folded():
    x = np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)
    model = Flagged()
    variables = trained(models.abstract_init(model, x, False))
    rngs = {"dropout": jax.random.key(0)}
    flag = np.bool_(False)
    folded = tools.fold(model, variables, x, train=flag, rngs=rngs, seconds=0)

    def call(*args, **kwargs):
        return folded.apply(folded.variables, *args, **kwargs)

    want = model.apply(variables, x[:2], False)
    for got in [
        call(x[:2], False),
        call(train=False, x=x[:2], rngs=None),
        call(x[:2], False, None, raw=False, method="__call__"),
        call(x[:2], False, method=Flagged.__call__, mutable=["batch_stats"])[0],
        jax.jit(lambda x: call(x, train=False))(x[:2]),
    ]:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for args, kwargs, got in [
        ((x, True), {}, f"train: True; it was folded with {flag!r}"),
        ((x, False), {"raw": True}, "raw: True; it was folded with False"),
        ((x, False, x), {}, "shift: an array; it was folded with None"),
        (({"a": x}, False), {}, "x: nothing; it was folded with an array"),
        (
            (x,),
            {"method": "features"},
            "method: Flagged.features; it was folded with Flagged.__call__",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call(*args, **kwargs)
        assert str(error.value) == (
            "fold: a folded model must be called as it was folded, but for the values"
            f" of arrays. Got {got}. Fold it with that too, or call the model that was"
            " not folded."
        )


def test_a_replaced_model_is_folded_too(small):
    model = nn.Sequential([nn.Dense(C), nn.BatchNorm(True), nn.LayerNorm()])
    variables, x = of_linen(model, small[-1]), small[-1]
    replaced = tools.replace(model, "layer", "same")
    folded = tools.fold(replaced, variables, x, seconds=0)
    assert folded.report.folded == {"layers_1": ("layers_0",)}
    assert folded.apply(folded.variables, x).shape == x.shape


def test_a_folded_norm_does_not_train():
    x = np.ones((2, C), np.float32)
    model = OneLayer(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    folded = tools.fold(model, x, seconds=0).apply
    todo = " Train, and mask, the model that was not folded."
    for options, got in [
        ({"use_running_average": False}, "while training"),
        ({"mask": x > 0}, "with a mask"),
    ]:
        with pytest.raises(ValueError) as error:
            folded.norm(x, **options)
        assert str(error.value) == (
            "fold: a folded batch norm is the affine map of its running statistics. Got"
            f" a call of norm {got}.{todo}"
        )
    folded.train()
    with pytest.raises(ValueError, match=f"norm while training.{todo}"):
        folded(x)
    assert not nnx.state(folded, nnx.BatchStat)


# What the folded model keeps.


def test_dtypes_activations_boxes_and_the_kind_of_tree_stay(small):
    x = small[-1]
    axes = nn.with_partitioning(nn.initializers.zeros, (None, "d"))
    model = Small(
        linen.BatchNorm(True, dtype=jnp.float32, activation=nn.silu, momentum=None),
        nn.Dense(C, kernel_init=axes, dtype=jnp.bfloat16, use_bias=False),
    )
    variables = flax.core.freeze({**of_linen(model, x), "cache": {"step": jnp.ones(2)}})
    folded = tools.fold(model, variables, x, seconds=0)
    assert type(folded.variables) is flax.core.FrozenDict
    dense = folded.variables["params"]["dense"]
    assert dense["kernel"].names == (None, "d") and dense["bias"].shape == (C,)
    assert set(folded.variables) == {"params", "cache"}
    y = folded.apply(folded.variables, x)
    assert y.dtype == jnp.float32
    assert 0 < folded.report.relative < 0.05  # bfloat16 is rounded before or after


def test_sharded_kernels_stay_sharded():
    devices = mesh((4,), ("d",))
    x = np.ones((2, C), np.float32)
    model = Small(linen.BatchNorm(True))
    variables = of_linen(model, x)
    sharding = NamedSharding(devices, P(None, "d"))
    whole = jax.device_put(variables, NamedSharding(devices, P()))
    parted = changed(
        whole, "params/dense/kernel", lambda a: jax.device_put(a, sharding)
    )
    folded = tools.fold(model, parted, x, seconds=0)
    kernel = folded.variables["params"]["dense"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharding, 2)
    alone = tools.fold(model, variables, x, seconds=0).variables
    jax.tree.map(np.testing.assert_array_equal, folded.variables, alone)


def test_only_the_paths_that_are_named_are_folded():
    x = np.ones((2, C), np.float32)
    norm = functools.partial(linen.BatchNorm, True)
    model = nn.Sequential([nn.Dense(C), norm(), nn.relu, nn.Dense(C), norm()])
    variables = of_linen(model, x)
    folded = tools.fold(model, variables, x, paths=["layers_4"], seconds=1e-3)
    assert folded.report.folded == {"layers_4": ("layers_3",)}
    assert folded.report.kept == {"layers_1": "it is not among the paths to fold"}
    assert folded.report.speedup > 0
    assert str(folded.report).splitlines()[1:] == [
        "  layers_4 is in layers_3",
        "  layers_1 stays: it is not among the paths to fold",
    ]


class Siamese(nnx.Module):
    """Layers that are called twice, are stacked, have one kernel, are in two places."""

    def __init__(self, rngs):
        def linear():
            return nnx.Linear(C, C, rngs=rngs)

        def norm():
            return nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

        self.twin = nnx.Sequential(linear(), norm())
        self.same = self.twin
        self.one, self.other = linear(), linear()
        self.other.kernel = self.one.kernel
        self.norms = nnx.List([norm(), norm()])
        self.stack = nnx.vmap(OneLayer)(rngs.split(3))

    def __call__(self, x):
        x = self.twin(x) + self.same(x + 1)
        x = self.norms[0](self.one(x)) + self.norms[1](self.other(x))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def layers(layer, x):
            return layer(x)

        return nnx.jit(lambda layer, x: layer(x))(self.twin, layers(self.stack, x))


class OneLayer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(C, C, use_bias=False, rngs=rngs)
        self.norm = normjax.nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.linear(x)))


def test_nnx_layers_are_folded_where_they_are_the_norms_alone():
    x = np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)
    model = Siamese(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    folded = tools.fold(model, x, seconds=0)
    assert folded.report.folded == {
        "same/layers/1": ("same/layers/0",),
        "stack/norm": ("stack/linear",),
    }
    assert folded.report.kept == {
        "norms/0": "kernel of one is that of other too, and it feeds `add`, no layer",
        "norms/1": "kernel of other is that of one too, and it feeds `add`, no layer",
    }
    assert folded.report.relative < 1e-5
    assert folded.apply.twin is folded.apply.same
    assert folded.apply.stack.linear.bias.shape == (3, C)
    assert tools.find_norms(model) and len(tools.find_norms(folded.apply)) == 2


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_complex_norms_need_complex_layers(dtype):
    x = np.exp(1j * np.arange(2 * C)).astype(np.complex64).reshape(2, C)
    model = Small(linen.BatchNorm(True), nn.Dense(C, param_dtype=dtype))
    variables = of_linen(model, x)
    variables["batch_stats"]["norm"]["mean"] += 1j
    if dtype == "float32":
        assert error_of(model, variables, x) == (
            "fold: there must be a batch norm to fold. Got norm: it is complex, and"
            " dense is real, and it feeds the model's output, no layer. Pass a model in"
            " inference, with batch norms right after layers."
        )
    else:
        folded = tools.fold(model, variables, x, seconds=0)
        assert folded.report.relative < 1e-6


class Asking(nn.Module):
    """It trains where its statistics are mutable."""

    @nn.compact
    def __call__(self, x):
        running = not self.is_mutable_collection("batch_stats")
        return nn.BatchNorm(running, name="norm")(nn.Dense(4, name="dense")(x))


def test_a_model_that_asks_what_is_mutable_is_folded_as_apply_has_it():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    variables = Asking().init(jax.random.key(0), x)
    variables["batch_stats"]["norm"]["mean"] += 1
    folded = tools.fold(Asking(), variables, x, seconds=0)
    assert folded.report.folded == {"norm": ("dense",)}
    want = Asking().apply(variables, x)
    np.testing.assert_allclose(folded.apply(folded.variables, x), want, atol=1e-5)
    with pytest.raises(
        ValueError, match="norm: it normalizes by the statistics of the"
    ):
        tools.fold(Asking(), variables, x, mutable=["batch_stats"], seconds=0)


def test_the_speedup_is_the_time_of_the_model_over_that_of_the_folded_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fold.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def call():
            now[0] += seconds

        return call

    assert fold._speedup([takes(3.0), takes(1.0)], 0.0) == 3.0
