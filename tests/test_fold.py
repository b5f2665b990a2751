"""Folding: the same outputs without the norm, or a reason why the norm stays."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import tolerance
from flax import nnx

import normjax.nnx
from normjax import linen, tools

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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_every_layer_does_the_work_of_its_norm(
    system, after, dtype, float64, quick_compile
):
    xs, model = zoo(system, after, dtype)
    before = arrays_of(model)
    folded = tools.fold(*model, xs, seconds=0)
    assert len(folded.report.folded) == len(xs)
    assert folded.report.kept == {}
    want, got = (
        jax.jit(lambda xs, m=m: called(m, xs))(xs)
        for m in (model, (folded.apply, folded.variables))
    )
    for name in want:
        error = jnp.abs(got[name] - want[name]).max() / jnp.abs(want[name]).max()
        assert error < tolerance(27 * C, dtype, 50), name
        assert got[name].dtype == want[name].dtype == dtype
    assert folded.report.relative < {"float32": 1e-5, "float64": 1e-12}[dtype]
    program = jax.make_jaxpr(lambda xs: called((folded.apply, folded.variables), xs))
    assert "rsqrt" not in str(program(xs))
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
