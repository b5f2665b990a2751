"""Looks at a model's norms, effective rates, their pictures, and `inspect`."""

import dataclasses
import functools
import gc
import json
import math
import pathlib
import subprocess
import sys
import weakref
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from family import tolerance
from flax import nnx
from golden import write

import normjax.nnx
from normjax import linen, tools
from normjax.__main__ import main
from normjax.tools import plots

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(6, 5, 4)) * [1, 2, 3, 4] + [5, 0, -3, 1]).astype(np.float32)
GOLDEN = pathlib.Path(write.__file__).parent


def init(model, *args):
    return jax.jit(model.init)(jax.random.key(0), *args)


def close(got, want, n=X.size):
    want = np.asarray(want, np.float64)
    atol = tolerance(n, np.float32) * max(1.0, float(np.max(np.abs(want))))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# What a norm sees.


class Linen(nn.Module):
    """Batch norm of one library, then what has no running statistics."""

    of: object = linen
    use_running_average: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        x = self.of.BatchNorm(self.use_running_average, name="batch")(x, mask=mask)
        x = self.of.GroupNorm(num_groups=2, name="group")(x)
        return self.of.LayerNorm(name="layer", use_bias=False)(nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self, of, use_running_average=True):
        rngs = nnx.Rngs(0)
        self.batch = of.BatchNorm(4, use_running_average=use_running_average, rngs=rngs)
        self.group = of.GroupNorm(4, num_groups=2, rngs=rngs)
        self.layer = of.LayerNorm(4, use_bias=False, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self.group(self.batch(x, mask=mask))
        return self.layer(nnx.relu(x))


SCALE = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
BIAS = np.array([0.0, 1.0, 2.0, -60.0], np.float32)
MEAN = np.array([4.0, 0.0, -3.0, 2.0], np.float32)
VAR = np.array([1.0, 1.0, 4.0, 9.0], np.float32)


def seen_by(system, library):
    """Looks at the model with chosen parameters and statistics of its batch norm."""
    if system == "linen":
        model = Linen(library)
        variables = init(model, X)
        variables["params"]["batch"] = {"scale": SCALE, "bias": BIAS}
        variables["batch_stats"]["batch"] = {"mean": MEAN, "var": VAR}
        before = jax.tree.map(np.array, variables)
        looks = tools.look(model, variables, X)
        after = variables
    else:
        model = Nnx(library)
        for name, value in {
            "scale": SCALE,
            "bias": BIAS,
            "mean": MEAN,
            "var": VAR,
        }.items():
            getattr(model.batch, name)[...] = jnp.asarray(value)
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
        looks = tools.look(model, X)
        after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    return looks


LIBRARIES = {
    ("linen", "flax"): nn,
    ("linen", "normjax"): linen,
    ("nnx", "flax"): nnx,
    ("nnx", "normjax"): normjax.nnx,
}


@pytest.mark.parametrize("which", LIBRARIES, ids="-".join)
def test_figures_are_those_of_numpy_in_float64(which):
    batch, group, layer = seen_by(which[0], LIBRARIES[which])
    assert [one.name for one in (batch, group, layer)] == ["batch", "group", "layer"]
    assert [one.kind for one in (batch, group, layer)] == [
        "BatchNorm",
        "GroupNorm",
        "LayerNorm",
    ]
    assert [one.values for one in (batch, group, layer)] == [30.0, 10.0, 4.0]

    x = X.astype(np.float64)
    mean, var = x.mean((0, 1)), x.var((0, 1))
    y = SCALE * (x - MEAN) / np.sqrt(VAR.astype(np.float64) + 1e-5) + BIAS
    shift = (mean - MEAN) / np.sqrt(VAR + 1e-5)
    ratio = np.sqrt((var + 1e-5) / (VAR + 1e-5))
    want = {
        "mean": mean,
        "std": np.sqrt(var),
        "output_mean": y.mean((0, 1)),
        "output_std": y.std((0, 1)),
        "output_max": y.max((0, 1)),
        "running_mean": MEAN,
        "running_std": np.sqrt(VAR),
        "shift": shift,
        "ratio": ratio,
        "scale": SCALE,
        "bias": BIAS,
    }
    assert set(batch.channels) == set(want)
    for name, value in want.items():
        close(batch.channels[name], value)
    figures = {
        "mean": x.mean(),
        "std": x.std(),
        "output_mean": y.mean(),
        "output_std": y.std(),
        "shift": np.sqrt(np.mean(shift**2)),
        "ratio": np.exp(np.mean(np.log(ratio))),
        "scale": np.mean(np.abs(SCALE)),
        "still": 0.25,  # the scale that is 0
        "negative": 0.25,  # the bias of -60
    }
    for name, value in figures.items():
        close(getattr(batch, name), value)
    close(group.mean, y.mean())  # what one makes is what the next one takes
    close(group.channels["std"], y.std((0, 1)))
    assert layer.shift is layer.ratio is None and "bias" not in layer.channels
    assert layer.scale == 1.0


def test_what_is_masked_does_not_count():
    mask = np.arange(5)[None, :, None] < np.array([5, 1, 2, 0, 3, 4])[:, None, None]
    model = Linen(use_running_average=False)
    variables = init(model, X)
    ruined = np.where(mask, X, np.float32(np.nan))
    batch = tools.look(model, variables, ruined, mask)[0]
    real = X[np.broadcast_to(mask[..., 0], X.shape[:2])].astype(np.float64)
    assert batch.values == len(real) == mask.sum()
    close(batch.channels["mean"], real.mean(0))
    close(batch.channels["std"], real.std(0))
    close(batch.std, real.std())
    close(batch.output_std, 1.0)


class AllOfLinen(nn.Module):
    """Norms with fields that say what they reduce."""

    of: object

    @nn.compact
    def __call__(self, x):
        of, both = self.of, {"reduction_axes": (2, 3), "feature_axes": (2, 3)}
        x = of.InstanceNorm()(of.BatchNorm(False)(x))
        x = of.GroupNorm(num_groups=None, group_size=2)(x)
        return of.LayerNorm(**both)(of.RMSNorm()(x))


class AllOfNnx(nnx.Module):
    def __init__(self, of):
        rngs = nnx.Rngs(0)
        both = {"reduction_axes": (2, 3), "feature_axes": (2, 3)}
        self.norms = nnx.List(
            [
                of.BatchNorm(4, rngs=rngs),
                of.InstanceNorm(4, rngs=rngs),
                of.GroupNorm(4, num_groups=None, group_size=2, rngs=rngs),
                of.RMSNorm(4, rngs=rngs),
                of.LayerNorm(20, **both, rngs=rngs)
                if of is normjax.nnx
                else of.LayerNorm(4, reduction_axes=(2, 3), rngs=rngs),
            ]
        )

    def __call__(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


@pytest.mark.parametrize("which", LIBRARIES, ids="-".join)
def test_values_are_those_behind_each_statistic(which):
    x, of = jnp.ones((2, 3, 5, 4)), LIBRARIES[which]
    if which[0] == "linen":
        looks = tools.look(AllOfLinen(of), init(AllOfLinen(of), x), x)
    else:
        looks = tools.look(AllOfNnx(of), x)
    assert [one.values for one in looks] == [30.0, 15.0, 30.0, 4.0, 20.0]
    two_axes = which != ("nnx", "flax")
    assert len(looks[-1].channels["mean"]) == (20 if two_axes else 4)


def test_ghost_batches_have_their_own_size_and_unbiased_variances_their_own_ratio():
    fields = {"virtual_batch_size": 2, "running_variance": "unbiased"}
    norm = linen.BatchNorm(False, **fields)
    (seen,) = tools.look(norm, init(norm, X), X)
    assert seen.values == 10.0
    unbiased = X.astype(np.float64).var((0, 1), ddof=1)
    close(seen.channels["ratio"], np.sqrt((unbiased + 1e-5) / (1 + 1e-5)))


# Within transforms.


class Block(nn.Module):
    """Norms of both libraries."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(False, name="b")(nn.Dense(4, use_bias=False)(x))
        return linen.RMSNorm(name="a")(x)


class Stack(nn.Module):
    """Blocks one by one or in a scan, and an added residual."""

    axis: int | None = None
    how: object = nn.remat

    @nn.compact
    def __call__(self, x):
        if self.axis is None:
            for i in range(2):
                x = self.how(Block)(name=f"block{i}")(x)
        else:
            layers = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": self.axis, "batch_stats": self.axis},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = layers(self.how(Block)(name="block"), x, None)
        norm = linen.AddLayerNorm(name="last")
        return norm(norm(x, x)[0], x)[0]


def same(looks, others):
    assert len(looks) == len(others)
    for got, want in zip(looks, others, strict=True):
        assert (got.kind, got.values) == (want.kind, want.values)
        assert set(got.channels) == set(want.channels)
        for name, value in want.channels.items():
            close(got.channels[name], value)


@functools.cache
def one_by_one():
    """The blocks without a scan: their variables, and what is seen."""
    x = jnp.asarray(X[:, 0])
    variables = init(Stack(), x)
    return x, variables, tools.look(Stack(), variables, x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scan_is_seen_layer_by_layer(axis):
    """As the same blocks one by one are, in the order of their calls."""
    x, variables, want = one_by_one()
    names = [f"block{i}/{n}" for i in range(2) for n in "ba"]
    assert [one.name for one in want] == [*names, "last", "last#1"]
    close(want[-2].std, 2 * want[-3].output_std)  # of what was added

    blocks = {"params": {"last": variables["params"]["last"]}, "batch_stats": {}}
    for collection, of_blocks in blocks.items():
        of_blocks["block"] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves, axis),
            *(variables[collection][f"block{i}"] for i in range(2)),
        )
    looks = tools.look(Stack(axis), blocks, x)
    names = [f"block/{n}[{i}]" for i in range(2) for n in "ba"]
    assert [one.name for one in looks] == [*names, "last", "last#1"]
    same(looks, want)


JittedBlock = nn.jit(Block)  # one class keeps its programs; nn.jit anew has its own


def test_programs_of_nn_jit_are_not_mixed_up():
    """Those compiled before are not taken for ones with taps, nor the reverse."""
    x, variables, want = one_by_one()
    model = Stack(how=lambda _: JittedBlock)
    for mutable in (True, ["batch_stats"]):
        model.apply(variables, x, mutable=mutable)
    looks = tools.look(model, variables, x)
    # Blocks that share a program have their norms numbered by their place in it.
    same(*(sorted(of, key=lambda one: one.name) for of in (looks, want)))
    _, after = model.apply(variables, x, mutable=True)
    assert jax.tree.structure(after) == jax.tree.structure(variables)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.BatchNorm(4, rngs=rngs)
        self.a = normjax.nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.a(self.b(self.dense(x)))


def step(x, block):
    return block(x)


class NnxStack(nnx.Module):
    def __init__(self, how):
        self.how = how
        self.block = jax.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 2)
        )

    def __call__(self, x):
        if self.how == "scan":
            axes = (
                nnx.Carry,
                nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0, ...: None}),
            )
            return nnx.scan(step, in_axes=axes, out_axes=nnx.Carry)(x, self.block)
        graph, state = nnx.split(self.block)

        def body(x, state):
            return nnx.merge(graph, state)(x), None

        return jax.lax.scan(body, x, state)[0]


class NnxCalls(nnx.Module):
    """A block that is called twice, under a transform."""

    def __init__(self, how):
        self.block, self.how = NnxBlock(nnx.Rngs(0)), how

    def __call__(self, x):
        if self.how == "jax":
            return jax.checkpoint(lambda x: self.block.a(x))(x)
        call = self.how(lambda block, x: block(x))
        return call(self.block, call(self.block, x))


def test_nnx_is_seen_through_its_own_transforms():
    x = jnp.asarray(X[:, 0])
    model = NnxStack("scan")
    looks = tools.look(model, x)
    assert [one.name for one in looks] == [
        f"block/{n}[{i}]" for i in range(2) for n in "ba"
    ]
    kernels = np.asarray(model.block.dense.kernel[...], np.float64)
    biases = np.asarray(model.block.dense.bias[...], np.float64)
    y = np.asarray(x, np.float64)
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        y = y @ kernel + bias
        close(looks[2 * i].channels["mean"], y.mean(0))
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        close(looks[2 * i + 1].channels["std"], y.std(0))
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    twice = tools.look(NnxCalls(nnx.remat), x)
    assert [one.name for one in twice] == [
        "block/b",
        "block/a",
        "block/b#1",
        "block/a#1",
    ]


class Views(nn.Module):
    """Two views of each sample, and a norm that takes both as one batch."""

    @nn.compact
    def __call__(self, x):
        norm = nn.vmap(
            linen.BatchNorm,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            out_axes=1,
            axis_name="views",
        )
        return norm(False, axis_name="views", name="norm")(jnp.stack([x, 3 * x]))


class NnxViews(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, axis_name="views", rngs=nnx.Rngs(0))

    def __call__(self, x):
        axes = {"in_axes": (None, 0), "out_axes": 1, "axis_name": "views"}
        return nnx.vmap(lambda m, x: m(x), **axes)(self.norm, jnp.stack([x, 3 * x]))


@pytest.mark.parametrize("system", ["linen", "nnx"])
def test_a_norm_that_a_vmap_syncs_is_one_call_of_all_its_values(system):
    x, given = jnp.asarray(X[:, 0]), {}
    if system == "linen":
        model, stats = Views(), {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        variables = {"params": {"norm": params}, "batch_stats": {"norm": stats}}
        (seen,) = tools.look(model, variables, x)
        given = {"variables": variables}
    else:
        model = NnxViews()
        (seen,) = tools.look(model, x)
    both = np.concatenate([X[:, 0], 3 * X[:, 0]]).astype(np.float64)
    assert (seen.name, seen.values) == ("norm", 12.0)
    close(seen.channels["mean"], both.mean(0))
    close(seen.channels["std"], both.std(0))
    y = (both - both.mean(0)) / np.sqrt(both.var(0) + 1e-5)
    close(seen.channels["output_std"], y.std(0))
    close(seen.channels["output_max"], y.max(0))
    findings = {f.name: f.what for f in tools.doctor(model, x, **given).findings}
    assert "updated-twice" not in findings and "never-updated" in findings
    shift = np.abs(both.mean(0)).mean()
    assert f"means by {shift:.2g} deviations" in findings["train-eval-gap"]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda norm, x, _: (norm(x), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=2,
        )
        return layers(nn.LayerNorm(name="norm"), x, None)[0]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


HIDDEN = (
    "look: what a norm sees must have a way out of the transforms around it. Got {}. Let"
    ' nn.scan or nn.vmap have variable_axes for a collection, such as {{"intermediates":'
    " 0}}; take nnx.scan, nnx.vmap or nnx.remat in place of jax's."
)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (NnxStack("lax"), "block/a, block/b where nothing that is kept comes out"),
        (NnxCalls("jax"), "TraceContextError where their values go"),
        (Recurrent(), "ValueError where their values go"),
    ],
    ids=["lax.scan", "jax.checkpoint", "broadcast"],
)
def test_what_cannot_be_seen_is_refused(model, got):
    x = jnp.asarray(X[:, 0])
    args = (init(model, x), x) if isinstance(model, nn.Module) else (x,)
    with pytest.raises(ValueError) as error:
        tools.look(model, *args)
    assert str(error.value) == HIDDEN.format(got)


def test_models_that_fail_do_so_in_their_own_words():
    variables = init(Plain(), X)
    with pytest.raises(nn.module.errors.ScopeParamShapeError):
        tools.look(Plain(), variables, X[..., :3])
    with pytest.raises(ValueError) as error:
        tools.look(Plain(), variables, X)
    assert str(error.value) == (
        "look: the model must call a norm of flax or normjax. Got Plain, whose call"
        " reaches none. Pass the model that has them, and method= if it is not its"
        " __call__."
    )
    norm = linen.RMSNorm()
    with pytest.raises(TypeError) as error:
        tools.look(norm, init(norm, X), X.astype(np.complex64))
    assert str(error.value) == (
        "look: norms must have real inputs. Got x.dtype=complex64 in RMSNorm. Look at the"
        " real part and at the imaginary part in models of their own."
    )
    with pytest.raises(
        TypeError, match=r"^look: model must be a module of flax\.linen"
    ):
        tools.look({"params": {}}, X)


class Counted(nn.Module):
    sizes: list  # which makes it a module without a hash
    traces: ClassVar[list] = []

    @nn.compact
    def __call__(self, x):
        self.traces.append(x.shape)
        return nn.LayerNorm()(x)


def test_looking_again_compiles_nothing():
    model = Counted([4])
    variables = init(model, X)
    Counted.traces.clear()
    (first,) = tools.look(model, variables, X)
    (again,) = tools.look(model, variables, X + 1)
    assert Counted.traces == [X.shape]
    close(again.mean, first.mean + 1)


@dataclasses.dataclass
class Settings:
    """Of a model: a plain dataclass has no hash."""

    sizes: list
    size: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """It has a hash, but for what it holds."""

    sizes: list
    size: float = 1.0


class Configured(nnx.Module):
    traces: ClassVar[list] = []

    def __init__(self, config):
        self.config = config
        self.dense = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, options=None):
        self.traces.append(x.shape)
        size = (
            self.config["size"] if isinstance(self.config, dict) else self.config.size
        )
        return self.norm(self.dense(x * size))


def every_tool(model, *args):
    """Calls all tools that take a model of nnx with a batch norm; returns a look."""
    model(*args)
    assert tools.doctor(model, *args).norms == 1
    assert len(tools.find_norms(model)) == 1
    swept = tools.recalibrate(lambda m, b: m(*b), model, [args], progress=False)
    assert swept.variables.norm.mean[...].any()
    for other in ("same", "layer"):
        tools.replace(model, "batch", other)(*args)
    tools.unfreeze(tools.freeze(model))(*args)
    model.eval()
    assert tools.fold(model, *args, seconds=0).report.folded == {"norm": ("dense",)}
    return tools.look(model, *args)


@pytest.mark.parametrize("config", [Settings([4]), Frozen([4]), {"size": 1.0}])
def test_models_that_hold_what_has_no_hash_go_through_all_tools(config):
    model, x = Configured(config), jnp.asarray(X[:, 0])
    (seen,) = every_tool(model, x)
    close(seen.channels["mean"], (x @ model.dense.kernel[...]).mean(0))
    Configured.traces.clear()
    (again,) = tools.look(model, x)
    assert Configured.traces == [] and again.mean == seen.mean
    if isinstance(config, Settings):  # it has changed in place, and so has the program
        config.size = 3.0
        close(tools.look(model, x)[0].mean, 3 * seen.mean)


def test_arguments_without_a_hash_are_static():
    model, x = Configured(Frozen([4])), jnp.asarray(X[:, 0])
    looks = [tools.look(model, x, of) for of in (Settings([1]), Settings([1]), {1, 2})]
    assert len({one.mean for (one,) in looks}) == 1


class Asking(nn.Module):
    """It trains where statistics are mutable, and is another where parameters are."""

    lifted: object = staticmethod(lambda of: of)

    @nn.compact
    def __call__(self, x):
        return self.lifted(Inner)(name="inner")(nn.Dense(4, name="dense")(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        running = not self.is_mutable_collection("batch_stats")
        x = nn.BatchNorm(running, name="norm")(x)
        return x + 100 if self.is_mutable_collection("params") else x


LIFTED = [lambda of: of, nn.remat, nn.jit]


@pytest.mark.parametrize("lifted", LIFTED, ids=["plain", "remat", "jit"])
def test_models_that_ask_what_is_mutable_are_seen_as_apply_has_them(lifted):
    model, x = Asking(lifted), X[:, 0]
    variables = init(model, x)
    variables["batch_stats"]["inner"]["norm"]["var"] *= 4
    for mutable in (False, ["batch_stats"], False):
        (seen,) = tools.look(model, variables, x, mutable=mutable)
        y = model.apply(variables, x, mutable=mutable)
        close(seen.output_std, np.std(np.float64(y[0] if mutable else y)))


def test_a_look_is_printed_as_a_table():
    looks = tools.look(Linen(), init(Linen(), X), X)
    lines = str(looks).splitlines()
    assert repr(looks) == str(looks) and len(lines) == 4
    assert lines[0].split("  ")[0] == "norm" and lines[0].endswith("negative")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["batch", "BatchNorm", "30"],
        ["group", "GroupNorm", "10"],
        ["layer", "LayerNorm", "4"],
    ]
    figures = [looks[0].values, looks[0].mean, looks[0].std]
    assert lines[1].split()[2:5] == [f"{a:.3g}" for a in figures]
    assert len(set(map(len, lines))) == 1  # in columns
    assert "shift" not in str(looks[2]) and len(str(looks[2]).splitlines()) == 2


@pytest.mark.parametrize(("axis", "length"), [(1, 3), (-2, 3), (-2, 1)])
def test_layers_of_a_scan_are_told_apart_along_any_axis(axis, length):
    layers = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=length,
    )

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(4, name="dense")(x))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers(Block(name="block"), x, None)[0]

    variables = init(Stack(), X)
    seen = tools.look(Stack(), variables, X)
    assert [one.layer for one in seen] == list(range(length))
    kernels = np.moveaxis(variables["params"]["block"]["dense"]["kernel"], axis, 0)
    close(seen[0].channels["mean"], (X @ kernels[0]).mean((0, 1)))
    assert {one.channels["mean"].shape for one in seen} == {(4,)}


def test_a_look_leaves_no_model_behind():
    class Settings:
        """What a model holds."""

    class OfLinen(nn.Module):
        settings: Settings

        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(x)

    class OfNnx(nnx.Module):
        def __init__(self, settings):
            self.settings = settings
            self.norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    def left_behind(of):
        model = of(Settings())
        args = (init(model, X), X) if of is OfLinen else (X,)
        tools.look(model, *args)
        return weakref.ref(model.settings)

    left = [left_behind(OfLinen), left_behind(OfNnx)]
    gc.collect()
    assert [settings() for settings in left] == [None, None]


# Rates and scalars.


def test_rates_are_those_of_the_formula():
    rng = np.random.default_rng(1)
    w = {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": rng.normal(size=4)}}
    u = jax.tree.map(lambda a: 0.01 * rng.normal(size=a.shape), w)
    params, updates = (jax.tree.map(jnp.float32, tree) for tree in (w, u))
    (rate,) = tools.effective_rates(params, updates, learning_rate=0.1)
    w, u = w["conv"]["kernel"], u["conv"]["kernel"]
    weight, update = np.linalg.norm(w), np.linalg.norm(u)
    assert rate.path == ("conv", "kernel")
    close(
        rate[1:],
        [
            weight,
            update,
            update / weight,
            (w * u).sum() / (weight * update),
            0.1 / weight**2,
        ],
    )
    assert tools.effective_rates(params, updates)[0].effective is None


def test_a_gradient_step_is_at_a_right_angle_where_a_norm_follows():
    """And the weights turn by the effective rate times the gradient at size 1."""
    x = jnp.asarray(X[:, 0])
    model = nn.Sequential(
        [
            nn.Dense(4, use_bias=False),
            linen.BatchNorm(False, epsilon=1e-12),
            nn.tanh,
            nn.Dense(2),
        ]
    )
    variables = init(model, x)

    @jax.jit
    @jax.grad
    def gradient(params):
        y = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
        return (y**3).sum()

    def rates(size):
        params = dict(variables["params"])
        kernel = params["layers_0"]["kernel"]
        params["layers_0"] = {"kernel": size * kernel / jnp.linalg.norm(kernel)}
        updates = jax.tree.map(lambda g: -0.1 * g, gradient(params))
        return tools.effective_rates(params, updates, 0.1)

    (normed, free), (small, _) = rates(5.0), rates(1.0)
    close(normed.cosine, 0, 1000)
    assert abs(free.cosine) > 0.1
    # |u| / |w| = lr |g(w)| / |w|, and g(w) = g(w / |w|) / |w|.
    close(normed.relative / small.relative, normed.effective / small.effective, 1000)


def test_rates_of_nnx_have_the_paths_of_the_model():
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), nnx.Param)
    for tree in (state, nnx.to_pure_dict(state)):
        (rate,) = tools.effective_rates(tree, tree)
        assert rate.name == "layers/0/kernel"


def test_weights_of_nothing_have_no_rate():
    zero = {"w": jnp.zeros((2, 2))}
    (rate,) = tools.effective_rates(zero, zero, 0.1)
    assert (rate.weight, rate.update) == (0, 0)
    assert all(map(math.isnan, (rate.relative, rate.cosine, rate.effective)))


def test_trees_that_disagree_are_refused():
    w, other = {"a": {"w": jnp.ones((2, 3))}}, {"a": {"w": jnp.ones((3, 2))}}
    with pytest.raises(ValueError) as error:
        tools.effective_rates(w, other)
    assert str(error.value) == (
        "effective_rates: updates must be a tree like params. Got a/w of shape (2, 3) in"
        " params, (3, 2) in updates. Pass what optax's update returned for these params."
    )
    with pytest.raises(ValueError) as error:
        tools.effective_rates({"bias": jnp.ones(2)}, {"bias": jnp.ones(2)})
    assert str(error.value) == (
        "effective_rates: params must have an array of rank 2 or more, the weights of a"
        " layer. Got 1 arrays of lower rank. Pass the params of the whole model."
    )


def test_scalars_are_floats_by_name():
    _, _, looks = one_by_one()
    found = tools.scalars(looks, prefix="train/")
    assert {type(value) for value in found.values()} == {float}
    assert found["train/block0/b/shift"] == looks[0].shift
    assert found["train/last#1/output_std"] == looks[-1].output_std
    figures = {name.rsplit("/", 1)[1] for name in found if "/block0/a/" in name}
    assert figures == {
        *("values", "mean", "std", "output_mean", "output_std"),
        *("scale", "still", "negative"),
    }


# Pictures.


def titles(figure):
    return [
        axes.get_title(loc="left") for axes in figure.axes if axes.get_title("left")
    ]


def panel(figure, title):
    (axes,) = [a for a in figure.axes if a.get_title(loc="left") == title]
    return axes


def bars(axes):
    """Where the bars are, and from where to where they go."""
    lines = np.array(axes.collections[0].get_segments())
    assert (lines[:, 0, 0] == lines[:, 1, 0]).all()
    return lines[:, 0, 0], lines[:, 0, 1], lines[:, 1, 1]


def made_up(seed, size=3):
    """Looks of batch norms and a layer norm in turns, with figures of no model."""
    rng = np.random.default_rng(seed)
    looks = []
    for i in range(size):
        names = ["mean", "std", "output_mean", "output_std"]
        is_batch = i % 3 != 2
        names += ["shift", "ratio"] * is_batch
        channels = {name: rng.uniform(1, 2, 7) for name in names}
        figures = dict(zip(names[:4], rng.uniform(1, 2, 4).tolist(), strict=True))
        looks.append(
            tools.Look(
                path=(f"norm{i}",),
                kind="BatchNorm" if is_batch else "LayerNorm",
                layer=None,
                call=0,
                values=8.0,
                **figures,
                shift=1.0 if is_batch else None,
                ratio=1.0 if is_batch else None,
                scale=None,
                still=0.0,
                negative=0.0,
                channels=channels,
            )
        )
    return looks


BY_LAYER = ["Input of each norm", "Output of each norm"]
RUNNING = ["Batch mean against running mean", "Batch spread against running spread"]


@pytest.mark.parametrize("size", [3, 50])
def test_the_picture_has_what_was_seen(size):
    looks = made_up(0, size)
    figure = tools.plot(looks)
    assert titles(figure) == [*BY_LAYER, *RUNNING]
    for title, prefix in zip(BY_LAYER, ("", "output_"), strict=True):
        axes = panel(figure, title)
        mean, std = (
            np.array([getattr(one, prefix + f) for one in looks])
            for f in ("mean", "std")
        )
        for got, want in zip(
            bars(axes), (range(size), mean - std, mean + std), strict=True
        ):
            np.testing.assert_allclose(got, want)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), mean)
    batch = [i for i in range(size) if i % 3 != 2]
    for title, name in zip(RUNNING, ("shift", "ratio"), strict=True):
        axes = panel(figure, title)
        quantiles = np.array(
            [np.quantile(looks[i].channels[name], (0.05, 0.5, 0.95)) for i in batch]
        ).T
        at, low, high = bars(axes)
        np.testing.assert_allclose(at, batch)
        np.testing.assert_allclose([low, axes.lines[0].get_ydata(), high], quantiles)
    words = [t.get_text() for t in panel(figure, BY_LAYER[0]).get_xticklabels()]
    assert (words == ["norm0", "norm1", "norm2"]) == (size == 3)


@pytest.mark.parametrize("size", [3, 50])
def test_the_picture_of_steps_has_their_drift(size):
    history = {20: made_up(2, size), 0: made_up(0, size), 10: made_up(1, size)}
    figure = tools.plot(history)
    assert titles(figure) == [*BY_LAYER, *RUNNING, "Drift of the input"]
    axes = panel(figure, "Drift of the input")
    assert len(axes.lines) == size
    for i, line in enumerate(axes.lines):
        first = history[0][i].channels
        drift = [
            np.sqrt(
                np.mean(((h[i].channels["mean"] - first["mean"]) / first["std"]) ** 2)
            )
            for h in (history[0], history[10], history[20])
        ]
        np.testing.assert_allclose(line.get_ydata(), drift)
        assert list(line.get_xdata()) == [0, 10, 20]
    last = [one.mean for one in history[20]]
    np.testing.assert_allclose(panel(figure, BY_LAYER[0]).lines[0].get_ydata(), last)
    assert (axes.get_legend() is not None) == (size == 3)


def test_the_picture_has_the_rates():
    rates = [
        tools.Rate(("a",), 2.0, 0.1, 0.05, 0.0, 0.025),
        tools.Rate(("b",), 1.0, 0.0, 0.0, math.nan, 0.1),
        tools.Rate(("c",), 0.0, 0.0, math.nan, math.nan, math.nan),
    ]
    figure = tools.plot(made_up(0), rates)
    turn = panel(figure, "Turn of the weights by one step")
    assert [line.get_label() for line in turn.lines[1:]] == ["not moved", "not finite"]
    assert [line.get_xdata().tolist() for line in turn.lines] == [[0], [1], [2]]
    effective = panel(figure, "Effective learning rate")
    assert effective.lines[0].get_ydata().tolist() == [0.025, 0.1]
    without = [rate._replace(effective=None) for rate in rates]
    assert "Effective learning rate" not in titles(tools.plot(made_up(0), without))


def test_what_is_not_finite_is_told_without_a_warning():
    (seen,) = tools.look(
        nn.LayerNorm(), {"params": {"scale": SCALE, "bias": BIAS}}, X * np.inf
    )
    assert math.isnan(seen.std) and seen.name == "LayerNorm"
    tools.plot({0: [seen], 1: [seen]})
    (row,) = tools.norm_table(
        {"n": {"mean": np.array([np.nan, np.inf]), "var": VAR[:2]}}
    )
    assert row.flags[0] == "2 of 2 mean not finite"
    tools.plot_table([row])


def test_what_is_not_finite_is_marked():
    looks = made_up(0)
    looks[1] = looks[1]._replace(mean=math.nan)
    axes = panel(tools.plot(looks), "Input of each norm")
    (cross,) = [line for line in axes.lines if line.get_label() == "not finite"]
    assert cross.get_xdata().tolist() == [1]


def test_a_picture_is_written_whole_and_shown_without_pyplot(tmp_path):
    figure = tools.plot(made_up(0), path=tmp_path / "looks.png")
    assert [p.name for p in tmp_path.iterdir()] == ["looks.png"]
    png = (tmp_path / "looks.png").read_bytes()
    assert png[:4] == figure._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="Format 'what' is not supported"):
        tools.plot(made_up(0), path=tmp_path / "looks.what")
    with pytest.raises(FileNotFoundError) as error:
        tools.plot(made_up(0), path=tmp_path / "no" / "looks.png")
    assert str(error.value) == (
        "plot: path must be in a folder that is there. Got"
        f" path='{tmp_path}/no/looks.png'. Make the folder '{tmp_path}/no' first."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["looks.png"]


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    with pytest.raises(ValueError) as error:
        tools.plot([])
    assert str(error.value) == (
        "plot: there must be something to draw. Got nothing seen. Pass what look returned,"
        " or {step: what it returned}."
    )
    with pytest.raises(ValueError) as error:
        tools.plot({0: made_up(0), 5: made_up(0, 4)})
    assert str(error.value) == (
        "plot: all steps must have seen the same norms. Got norm3 in one of the steps 0"
        " and 5 alone. Look at one model in one way at all steps."
    )
    with pytest.raises(ValueError) as error:
        tools.plot_table([])
    assert str(error.value) == (
        "plot_table: there must be something to draw. Got no norms. Pass the rows that"
        " norm_table found in a checkpoint's variables."
    )
    plots._picture.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as error:
        tools.plot(made_up(0))
    assert str(error.value) == (
        "plot: matplotlib must be installed. Got import of matplotlib.figure halted; None"
        " in sys.modules. Type: pip install matplotlib."
    )


# Checkpoints.


def variables_of_a_checkpoint():
    """As a training loop saves them, with an optimizer that has the same names."""
    f = np.float32
    norm = {"scale": f([1, 0, 3]), "bias": f([0, 0.5, -1])}
    stats = {"mean": f([1, 2, 3]), "var": f([1, 4, 1e-7])}
    params = {
        "block_10": {"BatchNorm_0": norm, "Conv_0": {"kernel": np.ones((3, 3), f)}},
        "block_2": {"BatchNorm_0": norm},
        "LayerNorm_0": norm,
        "quantized": {"kernel": np.ones((3, 3), f), "scale": f([1, 2, 3])},
    }
    batch_stats = {
        "block_10": {"BatchNorm_0": stats},
        "block_2": {"BatchNorm_0": {"mean": np.zeros(3, f), "var": np.ones(3, f)}},
    }
    model = {"params": params, "batch_stats": batch_stats}
    return {"model": model, "opt_state": [{"mu": params}], "step": np.array(7)}


def test_the_table_has_the_norms_by_number():
    rows = tools.norm_table(variables_of_a_checkpoint())
    assert [("/".join(r.path), r.kind, r.features) for r in rows] == [
        ("model/LayerNorm_0", "LayerNorm", 3),
        ("model/block_2/BatchNorm_0", "BatchNorm", 3),
        ("model/block_10/BatchNorm_0", "BatchNorm", 3),
    ]
    layer, fresh, trained = rows
    assert trained.mean == (1.0, 2.0, 3.0) and trained.scale == (0.0, 1.0, 3.0)
    assert trained.var == pytest.approx((1e-7, 1.0, 4.0))
    assert trained.bias == (-1.0, 0.0, 0.5) and trained.updates is None
    assert layer.mean is layer.var is None
    assert trained.flags == ("1 of 3 variances below 1e-05", "1 of 3 scales 0")
    assert fresh.flags == ("never updated", "1 of 3 scales 0")
    assert layer.flags == ("1 of 3 scales 0",)


def test_the_table_flags_what_is_broken():
    half = {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}
    broken = {"mean": np.array([np.nan, 1]), "var": np.array([-1.0, 2])}
    counted = {"mean": np.ones(2), "var": np.ones(2), "count": np.array([3.0, 5.0])}
    rows = tools.norm_table({"a": half, "b": broken, "c": counted})
    assert [row.flags for row in rows] == [
        ("statistics in bfloat16",),
        ("1 of 2 mean not finite", "1 of 2 variances below 0"),
        (),
    ]
    assert rows[2].updates == 5.0
    with pytest.raises(ValueError) as error:
        tools.norm_table({"params": {"Dense_0": {"kernel": np.ones((2, 2))}}})
    assert str(error.value) == (
        "norm_table: there must be a norm: mean beside var, or scale with at most bias. Got"
        " none among 1 modules. Pass the variables, params and batch_stats."
    )
    with pytest.raises(ValueError) as error:
        tools.norm_table({"a": {"b": {"mean": np.ones(3), "var": np.ones(2)}}})
    assert str(error.value) == (
        "norm_table: mean and var of a batch norm must have one shape. Got those of a/b"
        " of shapes (3,) and (2,). Pass the statistics of one model."
    )


def test_nnx_and_linen_have_the_same_table():
    """A module's state, and what is left of its variables in a checkpoint."""
    model = Nnx(normjax.nnx)
    state = nnx.state(model)
    rows = tools.norm_table(nnx.to_pure_dict(state))
    assert [row.path for row in rows] == [("batch",), ("group",), ("layer",)]
    assert [row.kind for row in rows] == ["BatchNorm", "norm", "norm"]
    assert tools.norm_table(state) == rows
    assert tools.norm_table(model) == rows
    nested = jax.tree.map(lambda a: {"value": a}, nnx.to_pure_dict(state))
    assert tools.norm_table(nested) == rows


def test_a_table_of_an_nnx_model_leaves_its_random_numbers_out():
    """Beside a batch norm that counts its updates, as streams count their draws."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Dropout(0.5, rngs=rngs), normjax.nnx.BatchNorm(3, debias=True, rngs=rngs)
    )
    (row,) = tools.norm_table(model)
    assert (row.path, row.kind, row.updates) == (("layers", "1"), "BatchNorm", 0)


def test_a_linen_model_has_no_variables_for_a_table():
    with pytest.raises(TypeError) as error:
        tools.norm_table(nn.BatchNorm())
    assert str(error.value) == (
        "norm_table: variables must be a tree of arrays or an nnx model. Got a linen"
        " BatchNorm, which holds none. Pass what its init returned, trained."
    )


def test_inspect_prints_and_draws_a_checkpoint(tmp_path, capsys):
    place = tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, variables_of_a_checkpoint())
    rows = tools.norm_table(variables_of_a_checkpoint())

    assert main(["inspect", str(place), "--plot", str(tmp_path / "norms.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    by_name = {words[0]: words[1:] for words in lines if words}
    assert by_name["norm"] == "kind features mean var scale bias look into".split()
    assert (
        by_name["model/block_10/BatchNorm_0"]
        == (
            "BatchNorm 3 1…3 1e-07…4 0…3 -1…0.5 1 of 3 variances below 1e-05, 1 of 3 scales 0"
        ).split()
    )
    assert (tmp_path / "norms.png").read_bytes()[:4] == b"\x89PNG"

    assert main(["inspect", str(place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in found] == ["/".join(row.path) for row in rows]
    assert found[2]["mean"] == [1.0, 2.0, 3.0] and found[0]["mean"] is None

    assert main(["inspect", str(place), "--plot", str(tmp_path / "no" / "a.png")]) == 2
    printed = capsys.readouterr()
    assert "model/block_10/BatchNorm_0" in printed.out
    assert printed.err.startswith("plot_table: path must be in a folder that is there.")


def test_the_picture_of_a_checkpoint_has_its_ranges():
    rows = tools.norm_table(variables_of_a_checkpoint())
    figure = tools.plot_table(rows)
    assert titles(figure) == ["Running mean", "Running variance", "Scale", "Bias"]
    at, low, high = bars(panel(figure, "Running variance"))
    assert at.tolist() == [1, 2]
    np.testing.assert_allclose([low, high], [[1, 1e-7], [1, 4]], rtol=1e-6)
    assert panel(figure, "Bias").lines[0].get_ydata().tolist() == [0, 0, 0]


def test_the_command_runs_without_pyplot(tmp_path):
    place, picture = GOLDEN / "jax-0.10.2" / "nnx.orbax", tmp_path / "norms.png"
    command = [sys.executable, "-W", "error", "-X", "importtime", "-m", "normjax"]
    done = subprocess.run(
        [*command, "inspect", place, "--plot", picture],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "InstanceNorm" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "matplotlib.colorbar" in imported and "matplotlib.pyplot" not in imported
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("checkpoint: there must be")
