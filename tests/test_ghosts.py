"""Ghost batches, and batches that come in pieces: the same numbers as one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contexts import mesh
from family import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from systems import SYSTEMS

import normjax
import normjax.linen

SHAPE = (8, 3, 2, 4)  # [N, S, T, C]


def data(masked=False):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], SHAPE) + jnp.arange(8.0)[:, None, None, None]
    scale, bias = (jax.random.normal(k, (4,)) + 1 for k in keys[1:3])
    where = jax.random.bernoulli(keys[3], 0.7, SHAPE) if masked else None
    return x, scale, bias, where


def one_by_one(x, scale, bias, where, size):
    """The ghosts as batches of their own, and their moments merged."""
    ys, total = [], None
    for i in range(0, x.shape[0], size):
        piece = None if where is None else where[i : i + size]
        y, m = normjax.batch_norm(x[i : i + size], scale, bias, where=piece)
        ys.append(y)
        total = m if total is None else total.merge(m)
    return jnp.concatenate(ys), total


def read(m):
    return m.count, m.mean, m.var


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("size", "masked"), [(1, False), (2, True), (4, False)])
def test_ghosts_are_batches_of_their_own(size, masked):
    """y, merged moments, gradients through both, and second order."""
    x, scale, bias, where = data(masked)

    def together(x, scale, bias):
        return normjax.batch_norm(x, scale, bias, where=where, virtual_batch_size=size)

    def apart(x, scale, bias):
        return one_by_one(x, scale, bias, where, size)

    def of(f):
        def loss(*a):
            y, m = f(*a)
            return jnp.sin(y * jnp.arange(4.0)).sum() + (m.mean * m.var).sum()

        @jax.jit
        def found(*primals):
            gradient = jax.grad(loss, (0, 1, 2))
            y, m = f(*primals)
            ones = jax.tree.map(jnp.ones_like, primals)
            return y, read(m), *jax.jvp(gradient, primals, ones)

        return found(x, scale, bias)

    # A ghost of six values that are near each other has a small variance to divide by.
    assert_close(of(together), of(apart), x.size, c=100)


def test_all_samples_in_one_ghost_are_the_batch():
    x, scale, bias, where = data(True)
    got = normjax.batch_norm(x, scale, bias, where=where, virtual_batch_size=8)
    want = normjax.batch_norm(x, scale, bias, where=where)
    assert_close((got[0], read(got[1])), (want[0], read(want[1])), x.size)


@pytest.mark.parametrize("feature_axis", [1, (0, 2)])
def test_ghosts_are_of_the_first_axis_that_is_no_feature(feature_axis):
    x = data()[0].transpose(1, 3, 0, 2) if feature_axis == 1 else data()[0]
    got, m = normjax.batch_norm(x, feature_axis=feature_axis, virtual_batch_size=1)
    axis = 0 if feature_axis == 1 else 1
    want = [
        normjax.batch_norm(jnp.take(x, jnp.array([i]), axis), feature_axis=feature_axis)
        for i in range(x.shape[axis])
    ]
    assert_close(got, jnp.concatenate([y for y, _ in want], axis), x.size)
    assert m.mean.shape == want[0][1].mean.shape


@pytest.mark.parametrize("masked", [False, True])
def test_ghosts_of_all_devices_make_the_moments(masked):
    """y by ghosts of one device; the moments returned are of all devices."""
    x, scale, bias, where = data(masked)
    where = jnp.ones(SHAPE, bool) if where is None else where

    @jax.jit
    def sharded(x, where):
        def f(x, where):
            y, m = normjax.batch_norm(
                x,
                scale,
                bias,
                where=where if masked else None,
                virtual_batch_size=2,
                axis_name="d",
            )
            return y, read(m)

        return jax.shard_map(
            f, mesh=mesh((4,), ("d",)), in_specs=P("d"), out_specs=(P("d"), P())
        )(x, where)

    want, m = one_by_one(x, scale, bias, where if masked else None, 2)
    assert_close(sharded(x, where), (want, read(m)), x.size)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_ghosts_of_a_sharded_batch_stay_on_their_devices(kind):
    """No collective at all but the merge of the moments."""
    x, scale, bias, _ = data()
    devices = mesh((4,), ("d",), kind)
    with jax.set_mesh(devices):
        x = jax.device_put(x, NamedSharding(devices, P("d")))

        def y_of(x):
            return normjax.batch_norm(x, scale, bias, virtual_batch_size=2)[0]

        text = jax.jit(y_of).lower(x).compile().as_text()
        assert "all-gather(" not in text and "all-reduce(" not in text
        want = one_by_one(data()[0], scale, bias, None, 2)[0]
        assert_close(np.asarray(jax.jit(y_of)(x)), np.asarray(want), x.size)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_modules_have_ghosts(system):
    x = data()[0]
    norm = system("BatchNorm", x, virtual_batch_size=2, momentum=0.5)
    ones = jnp.ones(4)
    want, m = one_by_one(x, ones, 0 * ones, None, 2)
    assert_close(norm(x, use_running_average=False), want, x.size)
    assert_close(norm.statistics["mean"], 0.5 * m.mean, x.size)
    assert_close(norm.statistics["var"], 0.5 + 0.5 * m.var, x.size)
    # By running statistics a batch of any size is normalized.
    assert norm(x[:3], use_running_average=True).shape == x[:3].shape


def test_ghosts_need_samples():
    with pytest.raises(ValueError) as error:
        normjax.batch_norm(jnp.ones(4), virtual_batch_size=2)
    assert str(error.value) == (
        "batch_norm: virtual_batch_size needs an axis of samples, that is not a feature"
        " axis. Got x.shape=(4,), feature axes (0,). Pass virtual_batch_size=None."
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            3,
            "batch_norm: virtual_batch_size must divide the number of samples. Got"
            " virtual_batch_size=3, x.shape=(8, 3, 2, 4). Nearest: 2 or 4.",
        ),
        (
            2.5,
            "batch_norm: virtual_batch_size must be an integer. Got"
            " virtual_batch_size=2.5. Pass virtual_batch_size=32, say.",
        ),
        (
            np.array([2]),
            "batch_norm: virtual_batch_size must be an integer. Got"
            " virtual_batch_size=array([2]). Pass virtual_batch_size=32, say.",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused(size, message):
    with pytest.raises((TypeError, ValueError)) as error:
        normjax.batch_norm(data()[0], virtual_batch_size=size)
    assert str(error.value) == message


def test_ghosts_across_the_devices_of_an_explicit_mesh_are_refused():
    devices = mesh((8,), ("d",), AxisType.Explicit)
    with jax.set_mesh(devices), pytest.raises(ValueError) as error:
        x = jax.device_put(jnp.ones((16, 3)), NamedSharding(devices, P("d")))
        normjax.batch_norm(x, virtual_batch_size=4)
    assert str(error.value) == (
        "batch_norm: virtual_batch_size must divide the samples of each device of an"
        " explicit mesh, which lets no axis be split across its pieces. Got"
        " virtual_batch_size=4, 2 samples on each of 8 pieces of the mesh. Pass a size"
        " that divides them, or shard x over an axis of AxisType.Auto."
    )


class Net(nn.Module):
    """Two layers with a norm each, so that micro-batches must meet twice."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(4)(x)
            norm = normjax.linen.BatchNorm(False, axis_name=self.axis_name)
            x = jnp.sin(norm(x))
        return x


@pytest.mark.usefixtures("float64")
def test_micro_batches_with_a_name_are_one_batch():
    """Loss, gradients and statistics of vmap(axis_name) are those of the big batch."""
    x = data()[0].reshape(8, 24)
    variables = Net().init(jax.random.key(0), x)
    params, statistics = variables["params"], variables["batch_stats"]

    def whole(params):
        y, new = Net().apply(
            {"params": params, "batch_stats": statistics}, x, mutable="batch_stats"
        )
        return jnp.square(y).mean(), new

    def in_pieces(params):
        def piece(x):
            y, new = Net("micro").apply(
                {"params": params, "batch_stats": statistics}, x, mutable="batch_stats"
            )
            return jnp.square(y).mean(), new

        # Of the statistics, which all pieces have alike, one.
        loss, new = jax.vmap(piece, axis_name="micro")(x.reshape(4, 2, 24))
        return loss.mean(), jax.tree.map(lambda a: a[0], new)

    got, want = (jax.grad(f, has_aux=True)(params) for f in (in_pieces, whole))
    assert_close(got, want, x.size)


def test_multi_steps_updates_statistics_with_every_piece_and_parameters_once():
    """The cheap form: optax averages the gradients, statistics see each piece."""
    x = data()[0].reshape(8, 24)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
    variables = Net().init(jax.random.key(0), x)
    state = optimizer.init(variables["params"])
    params, running = variables["params"], variables["batch_stats"]
    gradients, start = [], params
    for piece in x.reshape(4, 2, 24):

        def loss(params, piece=piece, running=running):
            y, new = Net().apply(
                {"params": params, "batch_stats": running}, piece, mutable="batch_stats"
            )
            return jnp.square(y).mean(), new["batch_stats"]

        before = running
        gradient, running = jax.grad(loss, has_aux=True)(params)
        gradients.append(gradient)
        assert not jnp.allclose(
            before["BatchNorm_0"]["mean"], running["BatchNorm_0"]["mean"]
        )
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    want = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 4, start, *gradients)
    assert_close(params, want, 4)
