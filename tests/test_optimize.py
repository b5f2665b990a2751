"""What an optimizer is told about norms, by real steps; averages of variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import assert_close
from flax import nnx
from flax.serialization import to_state_dict
from test_errors import raises
from test_freeze import same_bits, trained

import normjax.nnx
from normjax import linen, tools
from normjax.tools import models

X = jax.random.normal(jax.random.key(1), (6, 3)) + 2


class Model(nn.Module):
    """Norms by names that say nothing, and a layer by one that says too much."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="LayerNorm")(x)
        x = nn.BatchNorm(False, name="a")(x)
        x = linen.RMSNorm(name="b", use_scale=False)(x)
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(linen.LayerNorm(name="c"), x, None)[0]


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.LayerNorm = nnx.Linear(3, 4, rngs=rngs)
        self.a = nnx.BatchNorm(4, rngs=rngs)
        self.c = nnx.List([normjax.nnx.LayerNorm(4, rngs=rngs), nnx.Dropout(0.5)])
        self.again = self.c[0]

    def __call__(self, x):
        return self.c[0](self.a(self.LayerNorm(x)))


@pytest.fixture(scope="module")
def params():
    return trained(models.abstract_init(Model(), X))["params"]


@pytest.fixture(scope="module")
def norms():
    return tools.find_norms(Model(), X)


NORMS = {"a": {"scale": False, "bias": False}, "c": {"scale": False, "bias": False}}


def test_the_mask_is_found_by_modules_and_not_by_names(params, norms):
    dense = {"LayerNorm": {"kernel": True, "bias": True}}
    assert tools.decay_mask(params, norms) == {**NORMS, **dense}
    dense["LayerNorm"]["bias"] = False
    assert tools.decay_mask(params, norms, biases=False) == {**NORMS, **dense}


def test_the_mask_is_that_of_parameters_without_their_boxes(params, norms):
    def boxed(tree):
        return jax.tree.map(lambda a: nn.Partitioned(a, (None,) * a.ndim), tree)

    for biases in (True, False):
        want = tools.decay_mask(params, norms, biases=biases)
        mask = tools.decay_mask(boxed(params), norms, biases=biases)
        assert nn.unbox(mask) == want


def partitioned(init):
    return nn.with_partitioning(init, ("model",))


class Boxed(nn.Module):
    """As models of many devices have their parameters, by two kinds of boxes."""

    @nn.compact
    def __call__(self, x):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        x = nn.Dense(3, bias_init=partitioned(zeros), name="dense")(x)
        x = nn.BatchNorm(False, scale_init=partitioned(ones), name="batch")(x)
        bias = nn.with_logical_partitioning(zeros, ("model",))
        scale = partitioned(ones)
        return linen.LayerNorm(scale_init=scale, bias_init=bias, name="layer")(x)


def test_boxed_variables_are_read_as_those_without_and_as_files_of_them():
    variables = trained(Boxed().init(jax.random.key(0), X))
    plain = nn.unbox(variables)
    rows = tools.norm_table(variables)
    assert rows == tools.norm_table(plain)
    assert [(r.name, r.kind) for r in rows] == [
        ("batch", "BatchNorm"),
        ("layer", "norm"),
    ]
    assert all(row.scale and row.bias for row in rows)
    assert tools.norm_table(to_state_dict(variables)) == rows
    norms = tools.find_norms(Boxed(), X)

    def masked(variables):
        mask = tools.decay_mask(variables["params"], norms, biases=False)
        return {"/".join(p): a for p, a in models.flat(mask).items()}

    want = masked(plain)
    assert [path for path, decays in want.items() if decays] == ["dense/kernel"]
    assert masked(variables) == masked(to_state_dict(variables)) == want


def test_sharded_variables_of_nnx_are_read_as_those_without():
    """Whose names of mesh axes are beside the value."""
    ones = nnx.initializers.ones_init()
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        init = nnx.with_partitioning(ones, ("model",))
        model = nnx.Dict(
            dense=nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
            norm=nnx.BatchNorm(4, scale_init=init, rngs=nnx.Rngs(0)),
        )
    state = nnx.state(model)
    (row,) = tools.norm_table(state)
    assert (row.name, row.scale) == ("norm", (1.0, 1.0, 1.0))
    assert tools.norm_table(nnx.to_pure_dict(state)) == [row]
    params = nnx.state(model, nnx.Param)
    mask = tools.decay_mask(params, tools.find_norms(model), biases=False)
    decays = [path for path, on in models.flat(mask).items() if on]
    assert decays == [("dense", "kernel")]


def test_adamw_leaves_norms_without_decay(params, norms):
    """One step: exactly that without decay for norms, and with it for all else."""

    def stepped(**options):
        optimizer = optax.adamw(0.1, **options)
        grads = jax.tree.map(jnp.sin, params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    got = stepped(weight_decay=0.5, mask=tools.decay_mask(params, norms))
    without, everywhere = stepped(weight_decay=0.0), stepped(weight_decay=0.5)
    for name, of in got.items():
        same_bits(of, (everywhere if name == "LayerNorm" else without)[name])
    assert (everywhere["a"]["scale"] != without["a"]["scale"]).all()


def test_multi_transform_freezes_exactly(params, norms):
    """By norms and by patterns, of which the first that matches counts."""
    groups = {"slow": "LayerNorm/b*", "frozen": norms, "never": ["LayerNorm", "a"]}
    labels = tools.labels(params, groups)
    assert labels == {
        "LayerNorm": {"kernel": "never", "bias": "slow"},
        "a": {"scale": "frozen", "bias": "frozen"},
        "c": {"scale": "frozen", "bias": "frozen"},
    }
    labels = tools.labels(params, {"frozen": norms})
    transforms = {"frozen": optax.set_to_zero(), "other": optax.adamw(0.1)}
    optimizer = optax.multi_transform(transforms, labels)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    got = optax.apply_updates(params, updates)
    same_bits({k: got[k] for k in "ac"}, {k: params[k] for k in "ac"})
    assert (got["LayerNorm"]["kernel"] != params["LayerNorm"]["kernel"]).all()


def test_an_optimizer_of_nnx_takes_both():
    model = OfNnx(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model)))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    params = nnx.state(model, nnx.Param)
    norms = tools.find_norms(model)
    mask = tools.decay_mask(params, norms)
    assert mask["LayerNorm"] == {"kernel": True, "bias": True}
    assert jax.tree.leaves(mask).count(True) == 2
    decay = optax.add_decayed_weights(-0.5, mask)
    grads = jax.tree.map(jnp.zeros_like, params)
    nnx.Optimizer(model, decay, wrt=nnx.Param).update(model, grads)
    want = before["LayerNorm"]["kernel"] * 0.5
    same_bits(model.LayerNorm.kernel[...], want)
    same_bits(model.a.scale[...], before["a"]["scale"][...])

    labels = tools.labels(params, {"frozen": [n for n in norms if n.kind[0] == "B"]})
    transforms = {"frozen": optax.set_to_zero(), "other": optax.adam(0.1)}
    optimizer = optax.multi_transform(transforms, labels)
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    same_bits(model.a.scale[...], before["a"]["scale"][...])
    assert (model.c[0].scale[...] != before["again"]["scale"][...]).all()


def test_what_the_optimizer_cannot_be_told_is_refused(params, norms):
    with raises(
        ValueError,
        "decay_mask: norms must be those of the model. Got none. Pass"
        " tools.find_norms(model, ...), of a model that has some.",
    ):
        tools.decay_mask(params, [])
    there = "LayerNorm/bias, LayerNorm/kernel, a/bias, a/scale, c/bias, c/scale"
    todo = (
        'Pass variables["params"] or nnx.state(model, nnx.Param) of this model, and'
        " patterns of their paths."
    )
    with raises(
        ValueError,
        "labels: params must have parameters at encoder/*. Got those at"
        f" {there}. {todo}",
    ):
        tools.labels(params, {"frozen": ["a", "encoder/*"]})
    with raises(
        ValueError,
        "decay_mask: params must have parameters at a. Got those at"
        f" {', '.join('params/' + p for p in there.split(', '))}. {todo}",
    ):
        tools.decay_mask({"params": params}, norms)
    with raises(
        TypeError,
        "labels: paths must be a pattern of paths, or several. Got paths=3. Pass"
        ' "encoder/*", say.',
    ):
        tools.labels(params, {"frozen": 3})
    with raises(
        ValueError,
        'labels: paths must have one pattern at least. Got paths=(). Pass "*" for all,'
        " or leave it out for none.",
    ):
        tools.labels(params, {"frozen": ()})


# Averages.


def drawn(variables, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), variables
    )


def test_the_average_is_that_of_weights_and_statistics(float64):
    norm = linen.BatchNorm(False, debias=True, param_dtype=jnp.float64)
    variables = norm.init(jax.random.key(0), X)
    running = tools.RunningVariables.init(variables)
    update = jax.jit(tools.RunningVariables.update)
    history = [drawn(variables, seed) for seed in range(4)]
    for step, of in enumerate(history):
        running = update(running, of, momentum=0.75)
        weights = 0.75 ** np.arange(step, -1, -1)
        want = jax.tree.map(
            lambda *a, w=weights: np.average(a, axis=0, weights=w).astype(a[0].dtype),
            *history[: step + 1],
        )
        want["batch_stats"]["count"] = of["batch_stats"]["count"]  # of the last
        got = running.read()
        assert_close(got, want, 4)
        if not step:
            same_bits(got, of)


def test_half_precision_is_averaged_in_float32_and_what_is_no_number_is_not():
    start, end = (
        {
            "scale": jnp.full(3, v, jnp.bfloat16),
            "steps": jnp.array(int(v)),
            "key": jax.random.key(int(v)),
        }
        for v in (1.0, 2.0)
    )
    running = tools.RunningVariables.init(start).update(start)
    for _ in range(150):  # bfloat16 itself would stop at 1.96
        running = running.update(end, momentum=0.9)
    assert running.values["scale"].dtype == jnp.float32
    got = running.read()
    assert got.pop("key") == end.pop("key")
    same_bits(got, end)


def test_the_state_of_nnx_is_averaged_and_goes_back():
    model = OfNnx(nnx.Rngs(0))
    first = trained(nnx.state(model))
    second = jax.tree.map(lambda a: 3 * a if a.dtype == jnp.float32 else a, first)
    running = tools.RunningVariables.init(nnx.state(model))
    for of in (first, second):
        nnx.update(model, of)
        running = running.update(nnx.state(model), momentum=0.0)
    nnx.update(model, running.read())
    same_bits(nnx.state(model), second)
    counts = normjax.nnx.BatchNorm(3, debias=True, rngs=nnx.Rngs(0))
    running = tools.RunningVariables.init(nnx.state(counts))
    for _ in range(2):
        counts(X)
        running = running.update(nnx.state(counts), momentum=0.5)
    same_bits(running.read()["count"][...], jnp.full(3, 2.0))


def test_what_is_no_average_is_refused():
    running = tools.RunningVariables.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    with raises(
        ValueError,
        "RunningVariables.read: there must be an update before there is an average. Got"
        " none so far. Call update with the variables of a step.",
    ):
        running.read()
    todo = "Pass the whole tree each time, or begin anew with RunningVariables.init."
    rule = (
        "RunningVariables.update: variables must be those that the average began with."
        " Got"
    )
    with raises(
        ValueError, f"{rule} b of shape (3,) in the average, (2,) given. {todo}"
    ):
        running.update({"a": jnp.ones(2), "b": jnp.ones(2)})
    with raises(
        ValueError, f"{rule} b of shape (3,) in the average, none given. {todo}"
    ):
        running.update({"a": jnp.ones(2)})
    with raises(ValueError, f"{rule} c, not in the average. {todo}"):
        running.update({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(2)})
    with raises(
        ValueError,
        "RunningVariables.update: momentum is the part of the old value that is kept and"
        " must lie in [0, 1]. Got momentum=1.5. PyTorch's momentum m is momentum=1 - m"
        " here.",
    ):
        running.update({"a": jnp.ones(2), "b": jnp.ones(3)}, momentum=1.5)
