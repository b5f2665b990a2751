"""Conversion: outputs are the other library's, and round trips keep every bit."""

import copy
import functools
import importlib.util
import inspect
import os

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import tolerance
from golden import write_weights
from test_examples import load

from normjax import linen, tools

os.environ.setdefault("KERAS_BACKEND", "jax")
EXAMPLE = load("convert_resnet18")


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"compares with {package}, which is not installed",
    )


def random(tree, seed=0):
    """The tree with numbers of its own in every array; variances are above 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree
    )


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.dtype == w.dtype and g.shape == w.shape
        assert g.tobytes() == w.tobytes()


def assert_equal_outputs(got, want, terms=300):
    """To rounding, relative to the largest."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    atol = tolerance(terms, np.float32) * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def channels_first(x):
    return np.moveaxis(x, -1, 1)


X1, X2, X3 = (
    np.sin(np.arange(8.0 * np.prod(space)), dtype=np.float32).reshape(2, *space, 4)
    for space in [(6,), (6, 5), (6, 5, 4)]
)
UP = {"strides": (2, 2), "padding": "VALID"}
PLAIN, FLIPPED = {"": "conv_transpose"}, {"": "conv_transpose_kernel"}

# Layers of Flax by name, each with its input, and what layouts must say of it.
LAYERS = {
    "conv1": (nn.Conv(3, (3,), padding="VALID"), X1, None),
    "conv2": (nn.Conv(3, (3, 2), padding="VALID"), X2, None),
    "conv3": (nn.Conv(3, (3, 2, 1), padding="VALID"), X3, None),
    "grouped": (nn.Conv(6, (3, 2), padding="VALID", feature_group_count=2), X2, None),
    "depthwise": (
        nn.Conv(8, (3, 2), padding="VALID", feature_group_count=4),
        X2,
        {"": "depthwise"},
    ),
    "transposed": (nn.ConvTranspose(3, (3, 2), **UP), X2, PLAIN),
    "square": (nn.ConvTranspose(4, (3, 2), **UP), X2, PLAIN),
    "transpose_kernel": (
        nn.ConvTranspose(4, (3, 2), transpose_kernel=True, **UP),
        X2,
        FLIPPED,
    ),
    "dense": (nn.Dense(3), X1, None),
    "no bias": (nn.Dense(3, use_bias=False), X1, None),
    "embedding": (nn.Embed(7, 3), np.array([[1, 6], [0, 3]]), None),
    "batch": (linen.BatchNorm(True, epsilon=1e-5), X2, None),
    "layer": (linen.LayerNorm(epsilon=1e-5), X1, None),
    "rms": (linen.RMSNorm(epsilon=1e-5), X1, None),
    "group": (linen.GroupNorm(2, epsilon=1e-5), X2, None),
    "instance": (linen.InstanceNorm(epsilon=1e-5), X2, None),
}


@functools.cache
def flax_layer(name):
    """Its variables, input, layouts and output."""
    layer, x, layouts = LAYERS[name]
    variables = random(jax.eval_shape(layer.init, jax.random.key(0), x))
    return variables, x, layouts, np.asarray(layer.apply(variables, x))


def torch_layer(name):
    from torch import nn

    return {
        "conv1": lambda: nn.Conv1d(4, 3, 3),
        "conv2": lambda: nn.Conv2d(4, 3, (3, 2)),
        "conv3": lambda: nn.Conv3d(4, 3, (3, 2, 1)),
        "grouped": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
        "depthwise": lambda: nn.Conv2d(4, 8, (3, 2), groups=4),
        "transposed": lambda: nn.ConvTranspose2d(4, 3, (3, 2), 2),
        "square": lambda: nn.ConvTranspose2d(4, 4, (3, 2), 2),
        "transpose_kernel": lambda: nn.ConvTranspose2d(4, 4, (3, 2), 2),
        "dense": lambda: nn.Linear(4, 3),
        "no bias": lambda: nn.Linear(4, 3, bias=False),
        "embedding": lambda: nn.Embedding(7, 3),
        "batch": lambda: nn.BatchNorm2d(4),
        "layer": lambda: nn.LayerNorm(4),
        "rms": lambda: nn.RMSNorm(4, eps=1e-5),
        "group": lambda: nn.GroupNorm(2, 4),
        "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    }[name]().eval()


def of_torch(name):
    """The weights of ours in a layer of torch, as it has them, and its output."""
    import torch

    variables, x, layouts, _ = flax_layer(name)
    theirs = torch_layer(name)
    weights = tools.to_torch(variables, layouts=layouts, like=theirs.state_dict())
    theirs.load_state_dict({k: torch.from_numpy(a) for k, a in weights.items()})
    last = name in ("dense", "no bias", "embedding", "layer", "rms")
    with torch.no_grad():
        y = theirs(torch.from_numpy(x if last else channels_first(x).copy())).numpy()
    weights = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return weights, y if last else np.moveaxis(y, 1, -1)


@needs("torch")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_torch_gives_torchs_outputs(name):
    variables, _, layouts, want = flax_layer(name)
    weights, y = of_torch(name)
    assert_equal_outputs(y, want)
    assert_same_bits(tools.from_torch(weights, variables, layouts=layouts), variables)


def keras_layer(name):
    from keras import layers

    up = {"strides": 2, "padding": "valid"}
    return {
        "conv1": lambda: layers.Conv1D(3, 3),
        "conv2": lambda: layers.Conv2D(3, (3, 2)),
        "conv3": lambda: layers.Conv3D(3, (3, 2, 1)),
        "grouped": lambda: layers.Conv2D(6, (3, 2), groups=2),
        "depthwise": lambda: layers.DepthwiseConv2D((3, 2), depth_multiplier=2),
        "transposed": lambda: layers.Conv2DTranspose(3, (3, 2), **up),
        "square": lambda: layers.Conv2DTranspose(4, (3, 2), **up),
        "transpose_kernel": lambda: layers.Conv2DTranspose(4, (3, 2), **up),
        "dense": lambda: layers.Dense(3),
        "no bias": lambda: layers.Dense(3, use_bias=False),
        "embedding": lambda: layers.Embedding(7, 3),
        "batch": lambda: layers.BatchNormalization(epsilon=1e-5),
        "layer": lambda: layers.LayerNormalization(epsilon=1e-5),
        "rms": lambda: layers.RMSNormalization(epsilon=1e-5),
        "group": lambda: layers.GroupNormalization(2, epsilon=1e-5),
        "instance": lambda: layers.GroupNormalization(-1, epsilon=1e-5),
    }[name]()


@needs("keras")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_keras_gives_keras_outputs(name):
    variables, x, layouts, want = flax_layer(name)
    theirs = keras_layer(name)
    theirs.build(x.shape)
    like = {f"vars/{n}": np.asarray(w.value) for n, w in enumerate(theirs.weights)}
    weights = tools.to_keras(variables, layouts=layouts, like=like)
    for n, weight in enumerate(theirs.weights):
        weight.assign(weights[f"vars/{n}"])
    assert_equal_outputs(theirs(x), want)
    assert_same_bits(tools.from_keras(weights, variables, layouts=layouts), variables)


def haiku_layer(name, x):
    import haiku as hk

    up = {"stride": 2, "padding": "VALID"}
    valid = {"padding": "VALID"}
    scaled = {"create_scale": True, "create_offset": True}
    return {
        "conv1": lambda: hk.Conv1D(3, 3, **valid, name="m"),
        "conv2": lambda: hk.Conv2D(3, (3, 2), **valid, name="m"),
        "conv3": lambda: hk.Conv3D(3, (3, 2, 1), **valid, name="m"),
        "grouped": lambda: hk.Conv2D(
            6, (3, 2), feature_group_count=2, **valid, name="m"
        ),
        "depthwise": lambda: hk.DepthwiseConv2D(2, (3, 2), **valid, name="m"),
        "transposed": lambda: hk.Conv2DTranspose(3, (3, 2), **up, name="m"),
        "square": lambda: hk.Conv2DTranspose(4, (3, 2), **up, name="m"),
        "transpose_kernel": lambda: hk.Conv2DTranspose(4, (3, 2), **up, name="m"),
        "dense": lambda: hk.Linear(3, name="m"),
        "no bias": lambda: hk.Linear(3, with_bias=False, name="m"),
        "embedding": lambda: hk.Embed(7, 3, name="m"),
        "layer": lambda: hk.LayerNorm(-1, **scaled, name="m"),
        "rms": lambda: hk.RMSNorm(-1, name="m"),
        "group": lambda: hk.GroupNorm(2, name="m"),
        "instance": lambda: hk.InstanceNorm(**scaled, name="m"),
    }[name]()(x)


OF_HAIKU = [name for name in LAYERS if name != "batch"]


def of_haiku(name):
    """The same of Haiku."""
    import haiku as hk

    variables, x, layouts, _ = flax_layer(name)
    theirs = hk.without_apply_rng(hk.transform(lambda x: haiku_layer(name, x)))
    like = jax.eval_shape(theirs.init, jax.random.key(0), x), {}
    params, _ = tools.to_haiku(variables, like, names={"": "m"}, layouts=layouts)
    return params["m"], theirs.apply(params, x)


@needs("haiku")
@pytest.mark.parametrize("name", OF_HAIKU)
def test_a_layer_of_haiku_gives_haikus_outputs(name):
    variables, _, layouts, want = flax_layer(name)
    weights, y = of_haiku(name)
    assert_equal_outputs(y, want)
    theirs = {"m": weights}, {}
    back = tools.from_haiku(theirs, variables, names={"": "m"}, layouts=layouts)
    assert_same_bits(back, variables)


def equinox_layer(name):
    from equinox import nn

    key = {"key": jax.random.key(0)}
    return {
        "conv2": lambda: nn.Conv2d(4, 3, (3, 2), **key),
        "grouped": lambda: nn.Conv2d(4, 6, (3, 2), groups=2, **key),
        "transposed": lambda: nn.ConvTranspose2d(4, 3, (3, 2), 2, **key),
        "square": lambda: nn.ConvTranspose2d(4, 4, (3, 2), 2, **key),
        "group": lambda: nn.GroupNorm(2, 4),
    }[name]()


OF_EQUINOX = ["conv2", "grouped", "transposed", "square", "group"]


def of_equinox(name):
    """The same of Equinox."""
    variables, x, layouts, _ = flax_layer(name)
    like = equinox_layer(name), None
    theirs, _ = tools.to_equinox(variables, like, layouts=layouts)
    y = jax.vmap(theirs)(channels_first(x))
    weights = {"weight": theirs.weight, "bias": theirs.bias}
    return weights, np.moveaxis(np.asarray(y), 1, -1)


@needs("equinox")
@pytest.mark.parametrize("name", OF_EQUINOX)
def test_a_layer_of_equinox_gives_equinoxs_outputs(name):
    variables, _, layouts, want = flax_layer(name)
    weights, y = of_equinox(name)
    assert_equal_outputs(y, want)
    back = tools.from_equinox((weights, None), variables, layouts=layouts)
    assert_same_bits(back, variables)


# The same where those libraries are not installed: what they gave, from a file.

OF = {
    "torch": (of_torch, list(LAYERS)),
    "haiku": (of_haiku, OF_HAIKU),
    "equinox": (of_equinox, OF_EQUINOX),
}


@pytest.mark.parametrize(
    ("library", "name"), [(library, n) for library, (_, ns) in OF.items() for n in ns]
)
def test_a_layer_gives_the_outputs_that_the_library_gave(library, name):
    with np.load(write_weights.LAYERS) as golden:
        prefix = f"{library}/{name}/"
        found = {k: golden[k] for k in golden.files if k.startswith(prefix)}
    weights = {k.removeprefix(prefix): a for k, a in found.items()}
    y = weights.pop("y")
    variables, x, layouts, _ = flax_layer(name)
    how = {"layouts": layouts}
    if library == "haiku":
        weights, how["names"] = ({"m": weights}, {}), {"": "m"}
    if library == "equinox":
        weights = weights, None
    ours = getattr(tools, f"from_{library}")(weights, variables, **how)
    assert_equal_outputs(jax.jit(LAYERS[name][0].apply)(ours, x), y)


@pytest.mark.parametrize("library", ["torch", "keras"])
@pytest.mark.parametrize("name", LAYERS)
def test_round_trips_keep_every_bit(library, name):
    variables, _, layouts, _ = flax_layer(name)
    there, back = (getattr(tools, f"{way}_{library}") for way in ("to", "from"))
    weights = there(variables, layouts=layouts)
    again = back(weights, variables, layouts=layouts)
    assert_same_bits(again, variables)
    assert_same_bits(there(again, layouts=layouts), weights)


# Whole models.


def test_resnet18_of_torch_gives_torchs_outputs(capsys):
    """From the golden file; the bar is 1e-5."""
    assert EXAMPLE.main([]) < 1e-5
    assert capsys.readouterr().out.splitlines()[:2] == [
        "122 arrays converted, 11875 numbers",
        "and back: the same bits",
    ]


def test_a_state_dict_of_ones_own_converts(tmp_path, capsys):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(write_weights.SAFETENSORS.read_bytes())
    assert EXAMPLE.main([str(path)]) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("largest logits of a grey image: classes [")


@needs("torch")
def test_resnet18_of_torch_gives_torchs_outputs_at_full_width():
    import torch

    theirs = write_weights.torch_resnet18()
    assert len(theirs.state_dict()) == 122
    x = np.random.default_rng(0).uniform(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(channels_first(x).copy())).numpy()
    model, variables = EXAMPLE.converted(theirs.state_dict())
    got = jax.jit(lambda v: model.apply(v, x, False))(variables)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    back = tools.to_torch(variables, names=EXAMPLE.torch_name, like=theirs.state_dict())
    for key, a in back.items():
        assert_same_bits(a, theirs.state_dict()[key].numpy())
    assert len(back) == 122 - 20  # the counts of 20 norms


class KerasModel(nn.Module):
    """What golden/write_weights.py has in Keras."""

    @nn.compact
    def __call__(self, x):
        fields = tools.preset("keras", "BatchNorm")
        x = nn.Conv(4, (3, 3), name="conv2d")(x)
        x = linen.BatchNorm(True, **fields, name="batch_normalization")(x)
        depthwise = {"padding": "VALID", "feature_group_count": 4}
        x = nn.Conv(8, (3, 3), **depthwise, name="depthwise_conv2d")(x)
        x = nn.relu(x)
        fields |= {"use_scale": False}
        x = linen.BatchNorm(True, **fields, name="batch_normalization_1")(x)
        x = nn.ConvTranspose(5, (3, 2), **UP, name="conv2d_transpose")(x)
        fields = tools.preset("keras", "LayerNorm")
        x = linen.LayerNorm(**fields, name="layer_normalization")(nn.relu(x))
        grouped = {"padding": "VALID", "feature_group_count": 5}
        x = nn.Conv(10, (3, 3), **grouped, name="conv2d_1")(x)
        fields = tools.preset("keras", "GroupNorm")
        x = linen.GroupNorm(2, **fields, name="group_normalization")(x)
        return nn.Dense(3, name="dense")(x.mean((1, 2)))


KERAS_LAYOUTS = {"conv2d_transpose": "conv_transpose"}


def keras_golden():
    weights = tools.read_weights(write_weights.KERAS)
    golden = np.load(write_weights.FOLDER / "keras.npz")
    x = golden["x"].astype(np.float32) / 255
    like = jax.eval_shape(KerasModel().init, jax.random.key(0), x)
    return weights, like, x, golden["y"]


def test_a_keras_file_gives_keras_outputs():
    weights, like, x, y = keras_golden()
    variables = tools.from_keras(weights, like, layouts=KERAS_LAYOUTS)
    assert_equal_outputs(jax.jit(KerasModel().apply)(variables, x), y)
    back = tools.to_keras(variables, layouts=KERAS_LAYOUTS, like=weights)
    assert_same_bits(back, weights)


@needs("keras")
def test_keras_loads_what_we_write(tmp_path):
    weights, like, *_ = keras_golden()
    path, model = tmp_path / "model.weights.h5", write_weights.keras_model()
    variables = random(like, 5)
    back = tools.to_keras(variables, layouts=KERAS_LAYOUTS, like=weights)
    tools.write_weights(path, back)
    model.load_weights(path)
    for layer in model.layers:
        for n, weight in enumerate(layer.weights):
            assert_same_bits(weight.value, back[f"layers/{layer.name}/vars/{n}"])


class Norm(nn.Module):
    """A dense layer and a batch norm."""

    fields: tuple = ()

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        return linen.BatchNorm(not train, **dict(self.fields), name="bn")(x)


X = np.random.default_rng(3).normal(2, 3, size=(3, 16, 5)).astype(np.float32)


def norm_variables(**fields):
    model = Norm(tuple(fields.items()))
    return model, random(jax.eval_shape(model.init, jax.random.key(0), X[0]))


@needs("haiku")
@pytest.mark.parametrize("debias", [True, False])
def test_batch_norm_of_haiku_goes_on_where_it_was(debias):
    import haiku as hk

    def f(x, train):
        x = hk.Linear(4, name="dense")(x)
        return hk.BatchNorm(True, True, 0.9, name="bn")(x, train)

    theirs = hk.without_apply_rng(hk.transform_with_state(f))
    params, state = theirs.init(jax.random.key(0), X[0], True)
    params = random(params)
    for x in X[:2]:
        _, state = theirs.apply(params, state, x, True)
    model, like = norm_variables(momentum=0.9, debias=debias)
    ours = tools.from_haiku((params, state), like)
    want, _ = theirs.apply(params, state, X[2], False)
    assert_equal_outputs(model.apply(ours, X[2]), want)
    back = tools.to_haiku(ours, (params, state), momentum=0.9)
    assert_same_bits(tools.from_haiku(back, like), ours)
    y, _ = theirs.apply(*back, X[2], False)
    assert_equal_outputs(y, want)
    if debias:  # one update further, on either side
        _, state = theirs.apply(params, state, X[2], True)
        _, updates = model.apply(ours, X[2], True, mutable=["batch_stats"])
        after = tools.from_haiku((params, state), like)["batch_stats"]
        jax.tree.map(assert_equal_outputs, updates["batch_stats"], after)
        assert back[1]["bn/~/mean_ema"]["counter"] == 2
        hidden, rebuilt = (s["bn/~/var_ema"]["hidden"] for s in (state, back[1]))
        _, again = theirs.apply(*back, X[2], True)
        assert_equal_outputs(again["bn/~/var_ema"]["hidden"], hidden)
        assert not np.array_equal(rebuilt, hidden)


@needs("equinox")
@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("debias", [True, False])
def test_batch_norm_of_equinox_goes_both_ways(mode, debias):
    import equinox as eqx

    class Model(eqx.Module):
        dense: eqx.nn.Linear
        bn: eqx.nn.BatchNorm

        def __init__(self):
            self.dense = eqx.nn.Linear(5, 4, key=jax.random.key(0))
            self.bn = eqx.nn.BatchNorm(4, "n", momentum=0.9, mode=mode)

        def __call__(self, x, state):
            return self.bn(self.dense(x), state)

    def batch(module, state, x):
        f = jax.vmap(module, axis_name="n", in_axes=(0, None), out_axes=(0, None))
        return f(x, state)

    module, state = eqx.nn.make_with_state(Model)()
    for x in X[:2]:
        _, state = batch(module, state, x)
    model, like = norm_variables(momentum=0.9, debias=debias)
    ours = tools.from_equinox(
        (module, state), like, count=2 if mode == "ema" and debias else None
    )
    if debias:
        assert (ours["batch_stats"]["bn"]["count"] == 2).all()
    inference = eqx.nn.inference_mode(module)
    want, _ = batch(inference, state, X[2])
    assert_equal_outputs(model.apply(ours, X[2]), want)
    before = jax.tree.leaves((module, state))
    changed = random(ours, 4)
    if debias:
        changed["batch_stats"]["bn"]["count"] = jnp.full(4, 3.0)
    filled, after = tools.to_equinox(changed, (module, state))
    got, _ = batch(eqx.nn.inference_mode(filled), after, X[2])
    assert_equal_outputs(got, model.apply(changed, X[2]))
    assert_same_bits(jax.tree.leaves((module, state)), before)  # as they were
    back = tools.from_equinox((filled, after), like, count=3 if debias else None)
    if debias and mode == "batch":  # divided by what it was multiplied with
        jax.tree.map(assert_equal_outputs, back, changed)
    else:
        assert_same_bits(back, changed)


@needs("torch")
def test_statistics_of_torch_after_training_and_further_updates_are_the_same():
    """num_batches_tracked and a cumulative average go on where they were."""
    import torch

    theirs = torch.nn.BatchNorm1d(4, momentum=None)
    x = torch.from_numpy(X[..., :4].copy())
    for batch in x[:2]:
        theirs(batch)
    fields = tools.preset("torch", "BatchNorm") | {"momentum": None}
    model = linen.BatchNorm(**fields)
    like = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.ones((2, 4)), use_running_average=True
        )
    )
    ours = tools.from_torch(theirs.state_dict(), like)
    assert (ours["batch_stats"]["count"] == 2).all()
    back = tools.to_torch(ours, like=theirs.state_dict())
    assert back["num_batches_tracked"].dtype == np.int64
    assert_same_bits(back, {k: v.numpy() for k, v in theirs.state_dict().items()})
    theirs(x[2])
    _, updates = model.apply(
        ours, x[2].numpy(), use_running_average=False, mutable=["batch_stats"]
    )
    after = tools.from_torch(theirs.state_dict(), like)["batch_stats"]
    jax.tree.map(assert_equal_outputs, updates["batch_stats"], after)


# Settings.

WEIGHTS = {
    "dense.weight": np.arange(20, dtype=np.float32).reshape(4, 5),
    "dense.bias": np.zeros(4, np.float32),
    "bn.weight": np.ones(4, np.float32),
    "bn.bias": np.zeros(4, np.float32),
    "bn.running_mean": np.ones(4, np.float32),
    "bn.running_var": np.full(4, 2.0, np.float32),
    "bn.num_batches_tracked": np.array(7),
}


def test_bessels_correction_is_taken_off_and_put_back():
    _, like = norm_variables()
    for values in (16, {"bn": 16}):
        ours = tools.from_torch(WEIGHTS, like, values_per_statistic=values)
        assert_equal_outputs(ours["batch_stats"]["bn"]["var"], np.full(4, 2 * 15 / 16))
        back = tools.to_torch(ours, values_per_statistic=values)
        assert_equal_outputs(back["bn.running_var"], WEIGHTS["bn.running_var"])
    as_it_is = tools.from_torch(WEIGHTS, like)["batch_stats"]["bn"]["var"]
    assert (as_it_is == 2).all()


def test_dtypes_are_those_of_the_variables_and_the_structure_is_theirs():
    _, like = norm_variables(debias=True, param_dtype=jnp.bfloat16)
    for tree in (like, flax.core.freeze(like), jax.eval_shape(lambda: like)):
        ours = tools.from_torch(WEIGHTS, tree)
        assert jax.tree.structure(ours) == jax.tree.structure(tree)
        for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(tree), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert isinstance(got, jax.Array)
    assert ours["params"]["bn"]["scale"].dtype == jnp.bfloat16
    back = tools.to_torch(ours)
    assert back["bn.weight"].dtype == jnp.bfloat16 and back["bn.weight"].flags.writeable


@needs("torch")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["meta", "nested"])
def test_tensors_that_are_no_arrays_are_refused(kind):
    import torch

    make, got = {
        "meta": (lambda: torch.ones(4, device="meta"), "on meta"),
        "nested": (
            lambda: torch.nested.nested_tensor([torch.ones(4)]),
            "on cpu, nested",
        ),
    }[kind]
    with pytest.raises(ValueError) as error:
        tools.from_torch(without(**{"bn.bias": make()}), LIKE)
    assert str(error.value) == (
        "from_torch: tensors must be dense, on the CPU, and of a dtype that numpy has."
        f" Got weights: 'bn.bias' of torch.float32, torch.strided, {got}. Save"
        " tensor.cpu(), dense, in such a dtype."
    )


@needs("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tensors_of_any_dtype_convert(dtype, float64):
    import torch

    layer = torch.nn.Linear(3, 2, dtype=getattr(torch, dtype))
    like = {"params": {"kernel": jnp.zeros((3, 2), dtype), "bias": jnp.zeros(2, dtype)}}
    ours = tools.from_torch(layer.state_dict(), like)
    want = layer.weight.detach().double().numpy().T
    assert (np.asarray(ours["params"]["kernel"], np.float64) == want).all()


def test_nothing_that_is_passed_in_changes_or_is_shared():
    weights, (_, like) = copy.deepcopy(WEIGHTS), norm_variables(debias=True)
    before = jax.tree.map(np.array, like)
    ours = tools.from_torch(weights, like)
    back = tools.to_torch(ours)
    for tree in (weights, back):
        for a in tree.values():
            a[...] = 9
    assert_same_bits(like, before)
    assert_same_bits(tools.to_torch(ours), WEIGHTS)


@pytest.mark.parametrize("kind", ["state", "pure", "shapes"])
def test_models_of_nnx_convert(kind):
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    import normjax.nnx

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(5, 4, rngs=nnx.Rngs(0))])
            self.bn = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    model, numbers = Model(), (nnx.Param, nnx.BatchStat)
    state = nnx.state(model, numbers)
    like = {
        "state": state,
        "pure": nnx.to_pure_dict(state),
        "shapes": nnx.eval_shape(lambda: nnx.state(Model(), numbers)),
    }[kind]
    weights = {k.replace("dense", "layers.0"): v for k, v in WEIGHTS.items()}
    ours = tools.from_torch(weights, like)
    assert jax.tree.structure(ours) == jax.tree.structure(like)
    nnx.update(model, ours)
    assert (model.layers[0].kernel[...] == WEIGHTS["dense.weight"].T).all()
    assert (model.bn.var[...] == 2).all()
    back = tools.to_torch(ours)
    assert_same_bits(back, {k: v for k, v in weights.items() if "tracked" not in k})
    names = {"layers/0": "head", "bn/scale": "gamma"}
    renamed = set(tools.to_torch(ours, names=names))
    assert {"head.weight", "gamma", "bn.bias"} < renamed


def test_other_arrays_keep_their_names_and_are_taken_as_they_are():
    variables = {"params": {"token": jnp.ones((1, 2)), "block": {"gain": jnp.ones(3)}}}
    weights = tools.to_torch(variables)
    assert set(weights) == {"token", "block.gain"}
    assert_same_bits(tools.from_torch(weights, variables), variables)


def test_a_kernel_is_what_its_module_is_called_and_layouts_say():
    kernel = {"kernel": jnp.ones((3, 2, 4, 5))}  # [*K, in, out]
    variables = {"params": {"up": kernel, "ConvTranspose_0": kernel}}
    shapes = {k: a.shape for k, a in tools.to_torch(variables).items()}
    assert shapes == {"up.weight": (5, 4, 3, 2), "ConvTranspose_0.weight": (4, 5, 3, 2)}
    layouts = {"up": "conv_transpose", "ConvTranspose_0": "conv_transpose_kernel"}
    weights = tools.to_torch(variables, layouts=layouts)
    shapes = {k: a.shape for k, a in weights.items()}
    assert shapes == {"up.weight": (4, 5, 3, 2), "ConvTranspose_0.weight": (5, 4, 3, 2)}
    assert_same_bits(tools.from_torch(weights, variables, layouts=layouts), variables)


def test_names_by_a_function_and_by_the_longest_prefix():
    leaf = {"kernel": jnp.ones((2, 3))}
    variables = {"params": {"a": {"b": {"c": leaf}, "d": leaf}, "e": leaf}}
    mapped = tools.to_torch(variables, names={"a": "x.y", "a/b": "z", "": "top"})
    assert set(mapped) == {"z.c.weight", "x.y.d.weight", "top.e.weight"}
    called = tools.to_torch(variables, names=lambda path: path.upper())
    assert set(called) == {"A/B/C.weight", "A/D.weight", "E.weight"}
    assert set(tools.to_keras(variables, names={"a": "inner"})) == {
        "inner/layers/b/layers/c/vars/0",
        "inner/layers/d/vars/0",
        "layers/e/vars/0",
    }


# Attention, whose kernels have an axis of heads.

HEADS = 2
TOKENS = np.sin(np.arange(2 * 5 * 8.0, dtype=np.float32)).reshape(2, 5, 8)


@functools.cache
def attention(bias=True, fields=()):
    """Flax's attention, its variables and output."""
    layer = nn.MultiHeadDotProductAttention(HEADS, use_bias=bias, **dict(fields))
    variables = random(jax.eval_shape(layer.init, jax.random.key(0), TOKENS))
    return variables, np.asarray(layer.apply(variables, TOKENS))


def packed(weights):
    """The weights as torch's attention has them, q, k and v in one array."""
    out = {
        f"out_proj.{leaf}": weights[f"out.{leaf}"]
        for leaf in ("weight", "bias")
        if f"out.{leaf}" in weights
    }
    for leaf in ("weight", "bias"):
        if f"query.{leaf}" in weights:
            of = [weights[f"{name}.{leaf}"] for name in ("query", "key", "value")]
            out[f"in_proj_{leaf}"] = np.concatenate(of)
    return out


@needs("torch")
@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_torch_converts(bias):
    """By its names alone, without biases too, and bit for bit."""
    import torch

    variables, want = attention(bias)
    weights = tools.to_torch(variables)
    assert {a.shape for k, a in weights.items() if "weight" in k} == {(8, 8)}
    assert {a.shape for k, a in weights.items() if "bias" in k} <= {(8,)}
    theirs = torch.nn.MultiheadAttention(8, HEADS, bias=bias, batch_first=True)
    state = {k: torch.from_numpy(a) for k, a in packed(weights).items()}
    theirs.load_state_dict(state)
    x = torch.from_numpy(TOKENS)
    with torch.no_grad():
        y = theirs.eval()(x, x, x)[0].numpy()
    assert_equal_outputs(y, want)
    assert_same_bits(tools.from_torch(weights, variables), variables)


@needs("keras")
def test_attention_of_keras_converts():
    """Which has the axes of heads itself, and a name of its own for the last layer."""
    import keras

    variables, want = attention()
    i = keras.Input((5, 8))
    mha = keras.layers.MultiHeadAttention(HEADS, 4, name="mha")
    model = keras.Model(i, mha(i, i))
    names = tools.keras_names(model)
    names["mha/out"] = names.pop("mha/attention_output")
    inner = {c: {"mha": v} for c, v in variables.items()}
    weights = tools.to_keras(inner, names=names)
    for name in ("query", "key", "value", "output"):
        layer = getattr(mha, f"{name}_dense")
        path = names[f"mha/{'out' if name == 'output' else name}"]
        layer.set_weights([weights[f"{path}/vars/{n}"] for n in range(2)])
    assert_equal_outputs(model(TOKENS), want)
    assert_same_bits(tools.from_keras(weights, inner, names=names), inner)


@needs("equinox")
def test_attention_of_equinox_converts():
    import equinox as eqx

    variables, want = attention()
    use = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    theirs = eqx.nn.MultiheadAttention(HEADS, 8, key=jax.random.key(0), **use)
    names = {n: f"{n}_proj" for n in ("query", "key", "value")} | {"out": "output_proj"}
    filled, _ = tools.to_equinox(variables, (theirs, None), names=names)
    assert_equal_outputs(jax.vmap(lambda x: filled(x, x, x))(TOKENS), want)
    back = tools.from_equinox((filled, None), variables, names=names)
    assert_same_bits(back, variables)


@needs("haiku")
def test_attention_of_haiku_converts():
    import haiku as hk

    variables, want = attention()

    def call(x):
        init = hk.initializers.Constant(0)
        return hk.MultiHeadAttention(HEADS, 4, w_init=init, name="mha")(x, x, x)

    f = hk.without_apply_rng(hk.transform(call))
    like = f.init(jax.random.key(0), TOKENS), {}
    names = {n: f"mha/~_linear_projection/{n}" for n in ("query", "key", "value")}
    names["out"] = "mha/linear"
    if "mha/~_linear_projection/query" not in like[0]:
        names = {n: f"mha/{n}" for n in ("query", "key", "value")} | {
            "out": "mha/linear"
        }
    params, _ = tools.to_haiku(variables, like, names=names)
    assert_equal_outputs(f.apply(params, TOKENS), want)
    assert_same_bits(tools.from_haiku((params, {}), variables, names=names), variables)


def test_kernels_of_heads_are_known_by_bias_by_names_or_by_layouts():
    """And by nothing else: the same shape may be a convolution's."""

    def shapes(layouts=None, **modules):
        variables = {
            "params": {
                module: {
                    k: jnp.arange(float(np.prod(s))).reshape(s) for k, s in of.items()
                }
                for module, of in modules.items()
            }
        }
        weights = tools.to_torch(variables, layouts=layouts)
        back = tools.from_torch(weights, variables, layouts=layouts)
        assert_same_bits(back, variables)
        return {k: a.shape for k, a in weights.items()}

    to, of = {"kernel": (6, 2, 3)}, {"kernel": (2, 3, 5)}
    assert shapes(proj={**to, "bias": (2, 3)}) == {
        "proj.weight": (6, 6),
        "proj.bias": (6,),
    }
    assert shapes(proj=to) == {"proj.weight": (3, 2, 6)}  # of a convolution
    assert shapes({"proj": "dense_to_heads"}, proj=to) == {"proj.weight": (6, 6)}
    assert shapes({"proj": "dense_from_heads"}, proj=of) == {"proj.weight": (5, 6)}
    assert shapes(query=to, key=to, value=to, out=of)["out.weight"] == (5, 6)
    assert shapes({"out": "conv"}, query=to, key=to, value=to, out=of) == {
        **dict.fromkeys(("query.weight", "key.weight", "value.weight"), (6, 6)),
        "out.weight": (5, 3, 2),
    }
    assert shapes(query=to, key=to, value=to)["query.weight"] == (3, 2, 6)
    beside = shapes(query=to, key=to, value=to, out=of, local=to)
    assert beside["local.weight"] == (3, 2, 6)
    many = {"kernel": (4, 2, 3, 2, 5), "bias": (2, 5)}
    assert shapes(many=many)["many.weight"] == (10, 24)
    for layout in ("dense_from_heads", "depthwise", "heads"):
        with pytest.raises(ValueError) as error:
            shapes({"proj": layout}, proj={**to, "bias": (2, 3)})
        assert str(error.value) == (
            f"to_torch: {LAYOUTS}. Got {{'proj': {layout!r}}}; such modules are 'proj'."
            f" {LAYOUTS_ARE}"
        )


def test_models_of_nnx_with_attention_convert():
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    model = nnx.MultiHeadAttention(HEADS, 8, decode=False, rngs=nnx.Rngs(0))
    variables, want = attention()
    weights = tools.to_torch(variables)
    nnx.update(model, tools.from_torch(weights, nnx.state(model, nnx.Param)))
    assert_equal_outputs(model(TOKENS), want)


# Names of other days.


def test_gamma_and_beta_of_old_checkpoints_are_scale_and_bias():
    renamed = {"bn.weight": "bn.gamma", "bn.bias": "bn.beta"}
    old = {renamed.get(k, k): a for k, a in WEIGHTS.items()}
    assert_same_bits(tools.from_torch(old, LIKE), tools.from_torch(WEIGHTS, LIKE))
    assert set(tools.to_torch(LIKE, like=old)) == {k for k in old if "tracked" not in k}
    names = {"bn/scale": "g", "bn": "bn"}
    named = {"g" if k == "bn.gamma" else k: a for k, a in old.items()}
    ours = tools.from_torch(named, LIKE, names=names)
    assert_same_bits(ours, tools.from_torch(WEIGHTS, LIKE))


def test_a_gamma_that_is_no_norms_keeps_its_name():
    """Of a scale of layers, and of a model in which both are."""
    variables = {
        "params": {"layer": {"gamma": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    }
    weights = {"layer.gamma": np.zeros(3), "norm.gamma": np.full(3, 2.0)}
    ours = tools.from_torch(weights, variables)["params"]
    assert (ours["layer"]["gamma"] == 0).all() and (ours["norm"]["scale"] == 2).all()
    dense = {"params": {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    with pytest.raises(ValueError, match=r"'params/fc/bias -> fc\.bias'.*'fc\.beta'"):
        tools.from_torch({"fc.weight": np.ones((2, 2)), "fc.beta": np.ones(2)}, dense)


# Names of Keras.


def keras_model(named=True):
    """Layers in lists, in models within, shared, and without weights."""
    import keras

    layers = keras.layers

    class Part(keras.Model):
        def __init__(self):
            super().__init__(name="part")
            self.stem = layers.Dense(4, name="stem")
            self.parts = [layers.Dense(4, name="last"), layers.LayerNormalization()]

        def call(self, x):
            for layer in (self.stem, *self.parts):
                x = layer(x)
            return x

    x = i = keras.Input((3,))
    shared = layers.Dense(4, name="shared")
    bn = layers.BatchNormalization(name="bn" if named else "shared2")
    inner = keras.Sequential([layers.Dense(4, name="fc"), bn], name="block")
    x = shared(layers.ReLU()(shared(layers.Dense(4, name="first")(x))))
    return keras.Model(i, Part()(inner(x)))


@needs("keras")
@needs("h5py")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_names_are_those_that_the_file_has(tmp_path):
    model = keras_model()
    names = tools.keras_names(model)
    norm = next(k for k in names if "layer_normalization" in k)
    assert names == {
        "first": "layers/dense",
        "shared": "layers/dense_1",
        "block/fc": "layers/sequential/layers/dense",
        "block/bn": "layers/sequential/layers/batch_normalization",
        "part/stem": "layers/part/layers/dense",
        "part/last": "layers/part/layers/dense_1",
        norm: "layers/part/layers/layer_normalization",
    }
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    weights = tools.read_weights(path)

    def layer(inputs):
        return {"kernel": jnp.zeros((inputs, 4)), "bias": jnp.zeros(4)}

    vector = {"scale": jnp.zeros(4), "bias": jnp.zeros(4)}
    variables = {
        "params": {
            "first": layer(3),
            "shared": layer(4),
            "block": {"fc": layer(4), "bn": vector},
            "part": {"stem": layer(4), "last": layer(4), norm.split("/")[1]: vector},
        },
        "batch_stats": {"block": {"bn": {"mean": jnp.zeros(4), "var": jnp.zeros(4)}}},
    }
    ours = tools.from_keras(weights, variables, names=names)
    kernel = model.get_layer("block").get_layer("fc").kernel
    assert (ours["params"]["block"]["fc"]["kernel"] == jnp.asarray(kernel)).all()
    assert_same_bits(tools.to_keras(ours, names=names, like=weights), weights)


@needs("keras")
@needs("h5py")
def test_models_of_keras_without_names_are_refused():
    import keras

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = keras.layers.Dense(2, name="fc")
            self.two = keras.layers.Dense(2, name="fc")

        def call(self, x):
            return self.two(self.one(x))

    model = Two()
    for wrong in (model, {"params": {}}):
        with pytest.raises(TypeError) as error:
            tools.keras_names(wrong)
        assert str(error.value) == (
            "keras_names: model must be a model of Keras 3 that has been built. Got"
            f" {type(wrong).__name__}. Pass the keras.Model itself, after"
            " model.build(...) or a call."
        )
    model(np.ones((1, 2)))
    with pytest.raises(ValueError) as error:
        tools.keras_names(model)
    assert str(error.value) == (
        "keras_names: layers with weights must have different names. Got 'fc' at"
        " 'layers/dense' and at 'layers/dense_1'. Give them names: keras.layers.Dense(8,"
        " name=...)."
    )


# Faults. Both sides are named.


def without(*keys, **more):
    return {k: v for k, v in WEIGHTS.items() if k not in keys} | more


PLACES = "every array must have its place on both sides"
NAMES = (
    "Pass names={'path of a module here': 'its name there'}, and leave out what the other"
    " model has not."
)
SHAPES = (
    "Take both sides from the same model, or say in layouts which kernels are those of"
    " other layers."
)
LAYOUTS = (
    "layouts are 'conv', 'depthwise', 'conv_transpose', 'conv_transpose_kernel',"
    " 'dense_to_heads', 'dense_from_heads', of modules with the kernel of a convolution"
    " or of a DenseGeneral"
)
LAYOUTS_ARE = (
    "'depthwise' is of a kernel [*K, 1, C * M], 'conv_transpose' of a ConvTranspose,"
    " 'conv_transpose_kernel' of one with transpose_kernel=True, 'dense_to_heads' of"
    " [in, *heads], 'dense_from_heads' of [*heads, out]."
)
KIND = "Convert it first: quantized weights need their scale."
RANGE = "numbers must be within the range of the dtype that they become"
WIDER = "Take a wider dtype on the side that they go to."
NO_ARRAY = (
    "Pass the variables themselves, and leave out of them what is no array: with nnx,"
    " pass nnx.state(model, (nnx.Param, nnx.BatchStat))."
)
MAPPING = "must be a mapping whose keys are names"
STATE_DICT = "Pass read_weights(path) or model.state_dict(), say, with names alone."
LIKE = norm_variables()[1]
COUNTED = norm_variables(debias=True)[1]


def put(path, value):
    """LIKE with one array changed."""
    tree = flax.traverse_util.flatten_dict(COUNTED, sep="/")
    return flax.traverse_util.unflatten_dict(tree | {path: value}, sep="/")


def conv(*shape):
    return {"params": {"c": {"kernel": jnp.ones(shape)}}}


def kernel(dtype):
    return {"params": {"l": {"kernel": jnp.ones((2, 2), dtype)}}}


def taken(f, *args, **fields):
    return lambda: f(*args, **fields)


BAD = {
    "a missing layer": (
        taken(tools.from_torch, without("dense.weight", "dense.bias"), LIKE),
        f"from_torch: {PLACES}. Got not on the other side: 'params/dense/bias ->"
        f" dense.bias', 'params/dense/kernel -> dense.weight'. {NAMES}",
    ),
    "an extra layer": (
        taken(tools.from_torch, without(**{"fc.weight": np.ones((2, 2))}), LIKE),
        f"from_torch: {PLACES}. Got not in the variables: 'fc.weight'. {NAMES}",
    ),
    "a count of no norm": (
        taken(
            tools.from_torch, without(**{"x.num_batches_tracked": np.array(1)}), LIKE
        ),
        f"from_torch: {PLACES}. Got not in the variables: 'x.num_batches_tracked'."
        f" {NAMES}",
    ),
    "other names": (
        taken(tools.from_torch, WEIGHTS, LIKE, names={"dense": "fc"}),
        f"from_torch: {PLACES}. Got not on the other side: 'params/dense/bias ->"
        " fc.bias', 'params/dense/kernel -> fc.weight'; not in the variables:"
        f" 'dense.bias', 'dense.weight'. {NAMES}",
    ),
    "many": (
        taken(tools.from_torch, {f"{n}.weight": 1 for n in range(8)}, {}),
        f"from_torch: {PLACES}. Got not in the variables: '0.weight', '1.weight',"
        f" '2.weight', '3.weight', '4.weight', '5.weight' and 2 more. {NAMES}",
    ),
    "names left over": (
        taken(tools.from_torch, WEIGHTS, LIKE, names={"dense": "dense", "fc": "fc"}),
        "from_torch: each of names must be of a module or an array of the variables. Got"
        " 'fc' in names; modules are 'bn', 'dense'. Leave it out, or write the path"
        " without its collection.",
    ),
    "layouts left over": (
        taken(tools.from_torch, WEIGHTS, LIKE, layouts={"dense": "conv"}),
        f"from_torch: {LAYOUTS}. Got {{'dense': 'conv'}}; such modules are none."
        f" {LAYOUTS_ARE}",
    ),
    "a layout": (
        taken(
            tools.to_torch,
            {"params": {"up": {"kernel": jnp.ones((3, 2, 2))}}},
            layouts={"up": "flipped"},
        ),
        f"to_torch: {LAYOUTS}. Got {{'up': 'flipped'}}; such modules are 'up'."
        f" {LAYOUTS_ARE}",
    ),
    "a depthwise layout": (
        taken(tools.to_keras, conv(3, 8, 1), layouts={"c": "depthwise"}),
        f"to_keras: {LAYOUTS}. Got {{'c': 'depthwise'}}; such modules are 'c'."
        f" {LAYOUTS_ARE}",
    ),
    "a convolution of Haiku turned": (
        taken(tools.from_haiku, ({"c": {"w": np.ones((3, 8, 1))}}, {}), conv(3, 1, 8)),
        "from_haiku: shapes must agree. Got params/c/kernel of shape (3, 1, 8), 'c/w' of"
        f" shape (3, 8, 1). {SHAPES}",
    ),
    "a convolution of Keras turned": (
        taken(tools.from_keras, {"layers/c/vars/0": np.ones((3, 8, 1))}, conv(3, 1, 8)),
        "from_keras: shapes must agree. Got params/c/kernel of shape (3, 1, 8),"
        f" 'layers/c/vars/0' of shape (3, 8, 1). {SHAPES}",
    ),
    "a convolution of Keras turned the other way": (
        taken(
            tools.to_keras,
            conv(3, 8, 1),
            like={"layers/depthwise_conv1d/vars/0": np.ones((3, 1, 8))},
            names={"c": "layers/depthwise_conv1d"},
        ),
        "to_keras: shapes must agree. Got params/c/kernel of shape (3, 8, 1), which would"
        " be (3, 8, 1), 'layers/depthwise_conv1d/vars/0' of shape (3, 1, 8)."
        f" {SHAPES}",
    ),
    "an embedding turned": (
        taken(
            tools.from_haiku,
            ({"e": {"embeddings": np.ones((1, 5))}}, {}),
            {"params": {"e": {"embedding": jnp.ones((5, 1))}}},
        ),
        "from_haiku: shapes must agree. Got params/e/embedding of shape (5, 1),"
        f" 'e/embeddings' of shape (1, 5). {SHAPES}",
    ),
    "integers to Haiku": (
        taken(tools.to_haiku, kernel(jnp.int8), ({"l": {"w": jnp.ones((2, 2))}}, {})),
        "to_haiku: dtypes must be of one kind. Got params/l/kernel of int8, 'l/w' of"
        f" float32. {KIND}",
    ),
    "complex numbers to Equinox": (
        taken(
            tools.to_equinox,
            kernel(jnp.complex64),
            ({"l": {"weight": jnp.ones((2, 2))}}, None),
        ),
        "to_equinox: dtypes must be of one kind. Got params/l/kernel of complex64,"
        f" 'l.weight' of float32. {KIND}",
    ),
    "too large to Haiku": (
        taken(
            tools.to_haiku,
            jax.tree.map(lambda a: 1e6 * a, kernel(jnp.float32)),
            ({"l": {"w": jnp.ones((2, 2), jnp.float16)}}, {}),
        ),
        f"to_haiku: {RANGE}. Got params/l/kernel of float32, 'l/w' of float16:"
        f" 1000000.0. {WIDER}",
    ),
    "too large": (
        taken(
            tools.from_torch,
            {"l.weight": np.array([[1, np.inf], [np.nan, -7e4]])},
            kernel(jnp.float16),
        ),
        f"from_torch: {RANGE}. Got params/l/kernel of float16, 'l.weight' of float64:"
        f" -70000.0. {WIDER}",
    ),
    "too large an integer": (
        taken(
            tools.from_torch,
            {"l.weight": np.array([[1, 127], [-128, 128]])},
            kernel(jnp.int8),
        ),
        f"from_torch: {RANGE}. Got params/l/kernel of int8, 'l.weight' of int64: 128."
        f" {WIDER}",
    ),
    "no array": (
        taken(tools.to_torch, {"params": {"dense": {"kernel": "x"}}}),
        "to_torch: variables must be arrays. Got params/dense/kernel, a str."
        f" {NO_ARRAY}",
    ),
    "a key of random numbers": (
        taken(tools.to_torch, {"rngs": {"key": jax.random.key(0)}}),
        f"to_torch: variables must be arrays. Got rngs/key, a PRNGKeyArray. {NO_ARRAY}",
    ),
    "a path": (
        taken(tools.from_torch, "a.pt", LIKE),
        f"from_torch: weights {MAPPING}. Got a str. {STATE_DICT}",
    ),
    "a key that is no name": (
        taken(tools.from_keras, {1: np.ones(2)}, LIKE),
        f"from_keras: weights {MAPPING}. Got the key 1. {STATE_DICT}",
    ),
    "like of no names": (
        taken(tools.to_torch, LIKE, like=[]),
        f"to_torch: like {MAPPING}. Got a list. {STATE_DICT}",
    ),
    "params alone": (
        taken(tools.from_haiku, {"l": {"w": np.ones((2, 2))}}, LIKE),
        "from_haiku: the model on the other side is given as (params, state). Got a"
        " dict. Pass (params, state), with {} for a state that it has not.",
    ),
    "flat params": (
        taken(tools.to_haiku, LIKE, ({"l/w": np.ones((2, 2))}, {})),
        f"to_haiku: params and state at 'l/w' {MAPPING}. Got a ndarray. {STATE_DICT}",
    ),
    "a module alone": (
        taken(tools.from_equinox, {"l": {"weight": np.ones((2, 2))}}, LIKE),
        "from_equinox: the model on the other side is given as (module, state). Got a"
        " dict. Pass (module, state), with None for a state that it has not.",
    ),
    "64 bits": (
        taken(tools.from_torch, {"w": np.ones(1)}, {"params": {"w": np.ones(1)}}),
        "from_torch: JAX must be able to hold the dtypes of the variables. Got params/w"
        " of float64, which becomes float32. Set jax.config.update('jax_enable_x64',"
        " True), or pass narrower variables.",
    ),
    "two of one name": (
        taken(tools.to_torch, LIKE, names={"dense": "x", "bn": "x"}),
        "to_torch: two arrays of the variables must not have one name on the other side."
        " Got params/bn/bias and params/dense/bias, which both would be 'x.bias'. Give"
        " them different names.",
    ),
    "shapes": (
        taken(tools.from_torch, without(**{"dense.weight": np.ones((5, 4))}), LIKE),
        "from_torch: shapes must agree. Got params/dense/kernel of shape (5, 4),"
        f" 'dense.weight' of shape (5, 4) for (4, 5). {SHAPES}",
    ),
    "shapes of vectors": (
        taken(tools.from_torch, without(**{"bn.bias": np.ones((4, 1))}), LIKE),
        "from_torch: shapes must agree. Got params/bn/bias of shape (4,), 'bn.bias' of"
        f" shape (4, 1). {SHAPES}",
    ),
    "shapes the other way": (
        taken(tools.to_torch, LIKE, like=without(**{"dense.weight": np.ones((5, 4))})),
        "to_torch: shapes must agree. Got params/dense/kernel of shape (5, 4), which"
        f" would be (4, 5), 'dense.weight' of shape (5, 4). {SHAPES}",
    ),
    "missing the other way": (
        taken(tools.to_torch, LIKE, like=without("bn.bias")),
        f"to_torch: {PLACES}. Got not on the other side: 'params/bn/bias -> bn.bias'."
        f" {NAMES}",
    ),
    "integers": (
        taken(tools.from_torch, without(**{"bn.bias": np.ones(4, np.int8)}), LIKE),
        "from_torch: dtypes must be of one kind. Got params/bn/bias of float32,"
        " 'bn.bias' of int8. Convert it first: quantized weights need their scale.",
    ),
    "shapes for arrays": (
        taken(tools.to_torch, jax.eval_shape(lambda: LIKE)),
        "to_torch: variables must be arrays. Got batch_stats/bn/mean, a"
        f" ShapeDtypeStruct. {NO_ARRAY}",
    ),
    "one value": (
        taken(tools.from_torch, WEIGHTS, LIKE, values_per_statistic=1),
        "from_torch: values_per_statistic must be above 1, of modules with a running"
        " variance. Got {'bn': 1}; modules are 'bn'. Pass N * H * W of the batches that"
        " the statistics were taken from.",
    ),
    "values of no norm": (
        taken(tools.from_torch, WEIGHTS, LIKE, values_per_statistic={"dense": 9}),
        "from_torch: values_per_statistic must be above 1, of modules with a running"
        " variance. Got {'dense': 9}; modules are 'bn'. Pass N * H * W of the batches"
        " that the statistics were taken from.",
    ),
    "counts": (
        taken(tools.to_torch, put("batch_stats/bn/count", jnp.arange(4.0))),
        "to_torch: all features must have been updated as often, for one count of them."
        " Got batch_stats/bn/count from 0.0 to 3.0. Set it to one number.",
    ),
    "no count": (
        taken(tools.from_keras, {}, COUNTED),
        "from_keras: a norm with a count needs the number of updates so far, which is"
        " not among the weights. Got 'batch_stats/bn/count', count=None. Pass count.",
    ),
    "no momentum": (
        lambda: tools.to_haiku(LIKE, haiku_like()),
        "to_haiku: running statistics need the momentum they are kept with, in [0, 1)."
        " Got momentum=None, 'bn/~/mean_ema', 'bn/~/var_ema'. Pass the part of the OLD"
        " value that is kept, Haiku's decay_rate.",
    ),
    "unequal counters": (
        lambda: tools.from_haiku(haiku_like(counters=(2, 3)), COUNTED),
        "from_haiku: mean and variance must have been updated as often. Got"
        " 'bn/~/mean_ema/counter' 2, 'bn/~/var_ema/counter' 3. Pass the state of one"
        " model.",
    ),
}


def haiku_like(counters=(2, 2)):
    wide = np.ones((1, 4), np.float32)
    params = {
        "dense": {"w": np.ones((5, 4), np.float32), "b": wide[0]},
        "bn": {"scale": wide, "offset": wide},
    }
    state = {
        f"bn/~/{name}": {"average": wide, "hidden": wide, "counter": np.array(counter)}
        for name, counter in zip(("mean_ema", "var_ema"), counters, strict=True)
    }
    return params, state


@pytest.mark.parametrize("fault", BAD)
def test_what_does_not_fit_is_named_on_both_sides(fault):
    call, message = BAD[fault]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "count", [np.array(3.7), np.array(-5), np.array(True), np.array(2**24 + 1)]
)
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ValueError) as error:
        tools.from_torch(without(**{"bn.num_batches_tracked": count}), COUNTED)
    assert str(error.value) == (
        "from_torch: a count of updates must be a whole number from 0 on, which its dtype"
        f" can hold. Got {count} for batch_stats/bn/count of float32. Set it to the"
        " nearest such number."
    )


def test_a_depthwise_kernel_of_keras_is_known_by_its_name_or_by_layouts():
    ours = {"params": {"c": {"kernel": jnp.arange(24.0).reshape(3, 1, 8)}}}
    path = "layers/depthwise_conv1d_2/vars/0"
    like = {path: np.ones((3, 4, 2))}
    weights = tools.to_keras(ours, names={"c": path[:-7]}, like=like)
    assert (weights[path].reshape(3, 1, 8) == ours["params"]["c"]["kernel"]).all()
    back = tools.from_keras(
        {"layers/c/vars/0": weights[path]}, ours, layouts={"c": "depthwise"}
    )
    assert_same_bits(back, ours)


@needs("equinox")
def test_an_equinox_norm_needs_its_state():
    import equinox as eqx

    module, _ = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "n", mode="ema")
    with pytest.raises(ValueError) as error:
        tools.from_equinox(({"bn": module}, None), LIKE)
    assert str(error.value) == (
        "from_equinox: batch norms keep their statistics in a state. Got 'bn',"
        " state=None. Pass (module, state), as eqx.nn.make_with_state(Model)(...) returns"
        " them."
    )


# Presets: two updates and inference, as in the other library with its own defaults.

NORMS = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
XS = np.random.default_rng(0).normal(1, 2, (3, 4, 6, 8)).astype(np.float32)
XS *= 0.02  # so that epsilon matters


def preset_run(library, norm):
    """Outputs of inference after two updates, and the running statistics."""
    fields = tools.preset(library, norm)
    if norm == "GroupNorm":
        fields["num_groups"] = 4
    if library == "haiku" and norm == "BatchNorm":
        fields["momentum"] = 0.8  # it has no default
    module = getattr(linen, norm)(**fields)
    if norm != "BatchNorm":
        variables = module.init(jax.random.key(0), XS[0])
        return module.apply(variables, XS[2]), {}
    variables = module.init(jax.random.key(0), XS[0], True)
    for x in XS[:2]:
        _, updates = module.apply(variables, x, False, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return module.apply(variables, XS[2], True), variables["batch_stats"]


@needs("torch")
@pytest.mark.parametrize("norm", NORMS)
def test_preset_of_torch(norm):
    import torch

    xs = torch.from_numpy(np.moveaxis(XS, -1, 2).copy())  # [3, N, C, S]
    theirs = {
        "BatchNorm": lambda: torch.nn.BatchNorm1d(8),
        "LayerNorm": lambda: torch.nn.LayerNorm(8),
        "RMSNorm": lambda: torch.nn.RMSNorm(8),
        "GroupNorm": lambda: torch.nn.GroupNorm(4, 8),
        "InstanceNorm": lambda: torch.nn.InstanceNorm1d(8),
    }[norm]()
    for x in xs[:2]:
        theirs(x) if norm == "BatchNorm" else None
    last = norm in ("LayerNorm", "RMSNorm")
    with torch.no_grad():
        y = theirs.eval()(xs[2].movedim(1, -1) if last else xs[2])
    got, statistics = preset_run("torch", norm)
    assert_equal_outputs(got, (y if last else y.movedim(1, -1)).numpy())
    if norm == "BatchNorm":
        assert_equal_outputs(statistics["mean"], theirs.running_mean.numpy())
        assert_equal_outputs(statistics["var"], theirs.running_var.numpy())
        assert tools.preset("torch", norm)["momentum"] == 1 - theirs.momentum


@needs("keras")
@pytest.mark.parametrize("norm", NORMS)
def test_preset_of_keras(norm):
    from keras import layers

    theirs = {
        "BatchNorm": lambda: layers.BatchNormalization(),
        "LayerNorm": lambda: layers.LayerNormalization(),
        "RMSNorm": lambda: layers.RMSNormalization(),
        "GroupNorm": lambda: layers.GroupNormalization(4),
        "InstanceNorm": lambda: layers.GroupNormalization(-1),
    }[norm]()
    for x in XS[:2]:
        theirs(x, training=True) if norm == "BatchNorm" else None
    y = theirs(XS[2])
    got, statistics = preset_run("keras", norm)
    assert_equal_outputs(got, y)
    if norm == "BatchNorm":
        assert_equal_outputs(statistics["mean"], theirs.moving_mean.value)
        assert_equal_outputs(statistics["var"], theirs.moving_variance.value)
        assert tools.preset("keras", norm)["momentum"] == theirs.momentum


@needs("haiku")
@pytest.mark.parametrize("norm", NORMS)
def test_preset_of_haiku(norm):
    import haiku as hk

    scaled = {"create_scale": True, "create_offset": True}

    def f(x, train):
        if norm == "BatchNorm":
            return hk.BatchNorm(**scaled, decay_rate=0.8)(x, train)
        return {
            "LayerNorm": lambda: hk.LayerNorm(-1, **scaled),
            "RMSNorm": lambda: hk.RMSNorm(-1),
            "GroupNorm": lambda: hk.GroupNorm(4),
            "InstanceNorm": lambda: hk.InstanceNorm(**scaled),
        }[norm]()(x)

    theirs = hk.without_apply_rng(hk.transform_with_state(f))
    params, state = theirs.init(jax.random.key(0), XS[0], True)
    for x in XS[:2]:
        _, state = theirs.apply(params, state, x, True)
    y, _ = theirs.apply(params, state, XS[2], False)
    got, statistics = preset_run("haiku", norm)
    assert_equal_outputs(got, y)
    if norm == "BatchNorm":
        for name in ("mean", "var"):
            average = state[f"batch_norm/~/{name}_ema"]["average"].ravel()
            assert_equal_outputs(statistics[name], average)


@pytest.mark.parametrize("norm", NORMS)
def test_preset_of_flax_is_flaxs_defaults(norm):
    theirs = inspect.signature(getattr(nn, norm)).parameters
    ours = inspect.signature(getattr(linen, norm)).parameters
    for name, value in tools.preset("flax", norm).items():
        assert value == (theirs if name in theirs else ours)[name].default


@pytest.mark.parametrize("library", ["flax", "torch", "keras", "haiku"])
@pytest.mark.parametrize("norm", NORMS)
def test_presets_are_fields_of_both_modules(library, norm):
    fields = tools.preset(library, norm)
    getattr(linen, norm)(**fields)
    nnx = pytest.importorskip("normjax.nnx", exc_type=Exception)
    assert set(fields) <= set(inspect.signature(getattr(nnx, norm).__init__).parameters)


@pytest.mark.parametrize("library", ["equinox", ["torch"]])
def test_a_preset_of_something_else_is_refused(library):
    with pytest.raises(ValueError) as error:
        tools.preset(library, "BatchNorm")
    assert str(error.value) == (
        "preset: library must be one of flax, torch, keras, haiku, and norm one of"
        " BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm. Got"
        f" library={library!r}, norm='BatchNorm'. Pass library='torch', norm='BatchNorm', say."
    )


@pytest.mark.parametrize(
    ("library", "batch", "others"),
    [
        ("flax", (0.99, 1e-5, "biased", False), (1e-6, 1e-6, 1e-6, 1e-6)),
        ("torch", (0.9, 1e-5, "unbiased", False), (1e-5, 2.0**-23, 1e-5, 1e-5)),
        ("keras", (0.99, 1e-3, "biased", False), (1e-3, 1e-6, 1e-3, 1e-3)),
        ("haiku", (None, 1e-5, "biased", True), (1e-5, 1e-5, 1e-5, 1e-5)),
    ],
)
def test_presets_have_the_numbers_of_each_librarys_documentation(
    library, batch, others
):
    """Where the libraries are not installed, too."""
    of = tools.preset(library, "BatchNorm")
    names = ("momentum", "epsilon", "running_variance", "debias")
    assert tuple(of.get(name) for name in names) == batch
    norms = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
    assert tuple(tools.preset(library, n)["epsilon"] for n in norms) == others
