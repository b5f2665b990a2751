"""What batch norm can be told beyond Flax, in linen and in nnx alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from jax.sharding import PartitionSpec as P
from systems import NAMES, SYSTEMS

import normjax

both = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


def batches(count, shape=(16, 3), seed=0):
    """Batches that differ in mean and in size, far enough from 0 and 1."""
    keys = jax.random.split(jax.random.key(seed), count)
    return [
        (i + 1.0) * jax.random.normal(k, (shape[0] + i, *shape[1:])) + 3 * i + 2
        for i, k in enumerate(keys)
    ]


def close(got, want, size=64):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        scale = max(1.0, np.abs(w).max(initial=0))
        atol = 10 * np.finfo(np.float32).eps * size**0.5 * scale
        np.testing.assert_allclose(g, w, rtol=0, atol=atol)


def normalized(x, mean, var, epsilon=1e-5):
    return (x - mean) / np.sqrt(var + epsilon)


def moments(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), x.var(0)


# Which statistics normalize, and whether they are updated.


@both
@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("with_", [None, "batch", "running"])
@pytest.mark.parametrize("use_running_average", [True, False])
def test_two_switches_are_apart(system, use_running_average, with_, update):
    (x,) = batches(1)
    norm = system(
        "BatchNorm", x, normalize_with=with_, update_statistics=update, momentum=0.5
    )
    old = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 5.0, 6.0])}
    norm.statistics = old
    y = norm(x, use_running_average=use_running_average)

    running = use_running_average if with_ is None else with_ == "running"
    mean, var = moments(x)
    close(y, normalized(x, *((old["mean"], old["var"]) if running else (mean, var))))
    updated = not use_running_average if update is None else update
    new = {"mean": 0.5 * old["mean"] + 0.5 * mean, "var": 0.5 * old["var"] + 0.5 * var}
    close(norm.statistics, new if updated else old)


@both
def test_normalize_with_alone_says_both(system):
    """It needs no use_running_average beside it."""
    (x,) = batches(1)
    for with_ in ("batch", "running"):
        fields = {} if system is SYSTEMS["linen"] else {"use_running_average": None}
        norm = system("BatchNorm", x, normalize_with=with_, **fields)
        before = norm.statistics
        y = norm(x)
        if with_ == "batch":
            close(y, normalized(x, *moments(x)))
            assert (norm.statistics["mean"] != before["mean"]).all()
        else:
            close(y, normalized(x, 0.0, 1.0))
            close(norm.statistics, before)


@both
def test_frozen_fine_tuning_has_the_gradient_of_an_affine_layer(system):
    """By the two switches alone, whatever the model's code says of training."""
    x, other = batches(2)
    fields = {"normalize_with": "running", "update_statistics": False}
    norm = system("BatchNorm", x, **fields)
    mean, var = (jnp.asarray(a, jnp.float32) for a in moments(other))
    norm.statistics = {"mean": mean, "var": var}
    got = jax.grad(lambda x: jnp.sin(norm(x, use_running_average=False)).sum())(x)

    def affine(x):
        rstd = jax.lax.rsqrt(var + 1e-5)
        return jnp.sin(x * rstd - mean * rstd).sum()

    close(got, jax.grad(affine)(x))
    close(norm.statistics, {"mean": mean, "var": var})


# Momentum.


@both
def test_momentum_of_one_call(system):
    xs = batches(3)
    norm = system("BatchNorm", xs[0], momentum=0.9)
    want = {"mean": np.zeros(3), "var": np.ones(3)}
    for x, momentum in zip(xs, [0.5, None, jnp.float32(0.25)], strict=True):
        norm(x, use_running_average=False, momentum=momentum)
        keep = 0.9 if momentum is None else float(momentum)
        for name, new in zip(("mean", "var"), moments(x), strict=True):
            want[name] = keep * want[name] + (1 - keep) * new
    close(norm.statistics, want)


@both
@pytest.mark.parametrize("jitted", [False, True])
def test_momentum_may_be_traced(system, jitted):
    (x,) = batches(1)
    norm = system("BatchNorm", x)
    norm(x, jitted=jitted, momentum=jnp.float32(0.25), use_running_average=False)
    mean, var = moments(x)
    close(norm.statistics, {"mean": 0.75 * mean, "var": 0.25 + 0.75 * var})


@both
def test_cumulative_average_is_the_mean_of_all_updates(system):
    xs = batches(4)
    norm = system("BatchNorm", xs[0], momentum=None)
    for t in range(1, 5):
        norm(xs[t - 1], use_running_average=False)
        mean, var = (np.mean(a, 0) for a in zip(*map(moments, xs[:t]), strict=True))
        close(norm.statistics, {"count": np.full(3, t), "mean": mean, "var": var})
    y = norm(xs[0], use_running_average=True)
    close(y, normalized(xs[0], mean, var))


@both
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1 - 2.0**-20])
def test_debiased_average_forgets_its_start(system, momentum):
    """After t updates: their average with weights momentum**(t - i), adding up to 1."""
    xs = batches(4)
    norm = system("BatchNorm", xs[0], momentum=momentum, debias=True)
    for t in range(1, 5):
        norm(xs[t - 1], use_running_average=False)
        weights = np.power(momentum, np.arange(t)[::-1], dtype=np.float64)
        mean, var = (
            np.average(a, axis=0, weights=weights)
            for a in zip(*map(moments, xs[:t]), strict=True)
        )
        close(norm.statistics, {"count": np.full(3, t), "mean": mean, "var": var})


@both
@pytest.mark.parametrize("momentum", [0.8, 0.9, 0.95])
def test_the_first_debiased_update_leaves_nothing_of_the_start(system, momentum):
    """Not even a rounding error of it, which is 1 where the variance is 1e-8."""
    x = 1e-4 * batches(1)[0]
    norm = system("BatchNorm", x, momentum=momentum, debias=True)
    norm(x, use_running_average=False)
    want = moments(x)[1]
    np.testing.assert_allclose(norm.statistics["var"], want, rtol=1e-5)


@both
def test_debiased_average_is_that_of_running_moments(system):
    xs = batches(3)
    norm = system("BatchNorm", xs[0], momentum=0.8, debias=True)
    running = normjax.RunningMoments.init((3,))
    for x in xs:
        norm(x, use_running_average=False)
        running = running.update(normjax.batch_norm(x)[1], momentum=0.8)
    found = norm.statistics
    close((found["mean"], found["var"]), (running.read().mean, running.read().var))


@both
@pytest.mark.parametrize("fields", [{"momentum": None}, {"debias": True}])
def test_channels_count_their_own_updates(system, fields):
    """A channel that was masked has missed an update, and nothing else."""
    first, second = batches(2)
    norm = system("BatchNorm", first, **fields)
    mask = jnp.array([[True, False, True]])
    norm(first, use_running_average=False, mask=mask)
    np.testing.assert_array_equal(norm.statistics["count"], [1, 0, 1])
    assert (norm.statistics["mean"][1], norm.statistics["var"][1]) == (0, 1)
    norm(second, use_running_average=False)
    np.testing.assert_array_equal(norm.statistics["count"], [2, 1, 2])
    mean, var = moments(second)
    close(norm.statistics["mean"][1], mean[1])
    close(norm.statistics["var"][1], var[1])


@both
def test_momentum_of_one_moves_nothing(system):
    (x,) = batches(1)
    for fields in ({}, {"debias": True}):
        norm = system("BatchNorm", x, momentum=1.0, **fields)
        norm(x, use_running_average=False)
        close([norm.statistics[k] for k in ("mean", "var")], [np.zeros(3), np.ones(3)])


# The running variance.


@both
@pytest.mark.parametrize("mask", [None, "boolean", "weights"])
def test_unbiased_running_variance(system, mask):
    """n / (n - 1) of the biased one; with weights n is sum(w)**2 / sum(w**2)."""
    (x,) = batches(1)
    weights = {
        None: jnp.ones(16),
        "boolean": (jnp.arange(16) < 10).astype(jnp.float32),
        "weights": 1.0 + (jnp.arange(16) % 3),
    }[mask]
    norm = system(
        "BatchNorm",
        x,
        momentum=0.0,
        running_variance="unbiased",
        mask_is_weight=mask == "weights",
    )
    y = norm(
        x, use_running_average=False, mask=None if mask is None else weights[:, None]
    )
    repeated = np.repeat(np.asarray(x, np.float64), np.asarray(weights, int), axis=0)
    w = np.asarray(weights, np.float64)
    n = w.sum() ** 2 / (w**2).sum()
    want = {"mean": repeated.mean(0), "var": repeated.var(0) * n / (n - 1)}
    close(norm.statistics, want)
    biased = normalized(x, repeated.mean(0), repeated.var(0))
    close(y, biased * np.asarray(weights > 0)[:, None])


@both
def test_unbiased_variance_of_one_value_does_not_move(system):
    norm = system(
        "BatchNorm", jnp.ones((1, 3)), momentum=0.0, running_variance="unbiased"
    )
    norm(jnp.full((1, 3), 7.0), use_running_average=False)
    close(norm.statistics, {"mean": np.full(3, 7.0), "var": np.ones(3)})


# Devices.


@both
@pytest.mark.parametrize("name", NAMES)
def test_missing_axis_that_is_ignored_is_one_device(system, name):
    x = batches(1, (4, 5, 6))[0]
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    fields |= {"axis_name": "d", "axis_index_groups": [[0, 1], [2]]}
    norm = system(name, x, missing_axis="ignore", **fields)
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    y = norm(x, **running)
    alone = system(name, x, **({"num_groups": 2} if name == "GroupNorm" else {}))
    np.testing.assert_array_equal(y, alone(x, **running))


@both
def test_one_definition_serves_one_device_and_many(system):
    x = batches(1, (16, 3))[0]
    fields = {"axis_name": ("d", "e"), "missing_axis": "ignore", "momentum": 0.5}

    def step(x, statistics):
        norm = system("BatchNorm", x, **fields)
        norm.statistics = statistics
        return norm(x, use_running_average=False), norm.statistics

    start = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    want = step(x, start)
    spread = jax.shard_map(
        step, mesh=mesh((8,), ("d",)), in_specs=(P("d"), P()), out_specs=(P("d"), P())
    )
    close(jax.jit(spread)(x, start), want)


@both
def test_sub_groups_of_several_axes_need_all_of_them(system):
    """Their numbers count the devices of all, one that is missing among them."""
    groups = [[0, 1], [2, 3]]
    fields = {"axis_index_groups": groups, "missing_axis": "ignore"}

    def step(x):
        norm = system("BatchNorm", x, axis_name=("d", "e"), **fields)
        return norm(x, use_running_average=False)

    x = batches(1, (8, 3))[0].reshape(4, 2, 3)
    with pytest.raises(ValueError, match="axis_name='e'; the mesh in use has no axes"):
        jax.vmap(step, axis_name="d")(x)


@both
def test_sub_groups_of_devices_are_batches_of_their_own(system):
    groups = [[0, 2, 5], [1], [3, 4, 6, 7]]
    x = batches(1, (16, 3))[0].reshape(8, 2, 3)
    x = x + jnp.arange(8.0)[:, None, None] ** 2

    def step(x):
        norm = system(
            "BatchNorm", x, axis_name="d", axis_index_groups=groups, momentum=0.0
        )
        return norm(x, use_running_average=False), norm.statistics

    ys, statistics = jax.jit(jax.vmap(step, axis_name="d"))(x)
    for group in groups:
        rows = x[np.array(group)].reshape(-1, 3)
        mean, var = moments(rows)
        close(ys[np.array(group)].reshape(-1, 3), normalized(rows, mean, var))
        for device in group:
            close(statistics["mean"][device], mean)
            close(statistics["var"][device], var)


# Masks and weights.


@both
@pytest.mark.parametrize("name", NAMES)
def test_mask_is_weight_weighs_and_else_does_not(system, name):
    """Whole weights are so many copies; read as boolean they only say what counts."""
    x = batches(1, (4, 5, 6))[0]
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    weights = jnp.array([0, 1, 2, 1, 3])[None, :, None]
    if name in ("LayerNorm", "RMSNorm"):
        fields |= {"reduction_axes": 1}
    else:
        x, weights = x[:1], weights[:1]  # batch norm: copies are then of one row too
    copies = np.repeat(np.arange(5), np.array([0, 1, 2, 1, 3]))
    got = system(name, x, mask_is_weight=True, **fields)(x, mask=weights, **running)
    want = system(name, x, **fields)(x[:, copies], **running)
    close(got[:, copies], want)
    assert (got[:, 0] == 0).all()
    plain = system(name, x, **fields)(x, mask=weights, **running)
    boolean = system(name, x, **fields)(x, mask=weights > 0, **running)
    np.testing.assert_array_equal(plain, boolean)
    assert np.abs(plain - got).max() > 0.05


@both
def test_mask_of_one_axis_less_lines_up_where_there_is_one_way(system):
    x = batches(1, (10, 5))[0]
    x = x[:10]
    mask = jnp.array([True, False, True, True, False])
    norm = functools.partial(system("LayerNorm", x), x)
    np.testing.assert_array_equal(norm(mask=mask), norm(mask=mask[None]))
    with pytest.raises(ValueError, match="one axis less"):
        norm(mask=jnp.ones(10, bool))
    square = system("LayerNorm", x[:5])
    with pytest.raises(ValueError, match="one axis less"):
        square(x[:5], mask=mask)


# Bad input.


@both
@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"normalize_with": "batches"}, "None, 'batch', 'running'"),
        ({"running_variance": True}, "'biased', 'unbiased'"),
        ({"missing_axis": None}, "'raise', 'ignore'"),
    ],
)
def test_field_that_is_none_of_its_choices(system, fields, choices):
    ((field, value),) = fields.items()
    last = choices.split(", ")[-1]
    with pytest.raises(ValueError) as caught:
        norm = system("BatchNorm", jnp.ones((4, 3)), **fields)
        norm(jnp.ones((4, 3)), use_running_average=False)
    assert str(caught.value) == (
        f"BatchNorm: {field} must be one of {choices}. Got {field}={value!r}. Pass"
        f" {field}={last}, say."
    )


@both
def test_momentum_for_a_cumulative_average(system):
    norm = system("BatchNorm", jnp.ones((4, 3)), momentum=None)
    before = norm.statistics
    with pytest.raises(ValueError) as caught:
        norm(jnp.ones((4, 3)), use_running_average=False, momentum=0.9)
    assert str(caught.value) == (
        "BatchNorm: a cumulative average has no momentum. Got momentum=0.9 in the call,"
        " momentum=None in the module. Leave it out of the call, or give the module a"
        " momentum."
    )
    close(norm.statistics, before)


@both
@pytest.mark.parametrize("fields", [{"momentum": None}, {"debias": True}])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("update", [None, True])
def test_running_statistics_whose_updates_were_not_counted(
    system, fields, loaded, update
):
    """They would normalize as they started, or be lost at the next update."""
    x = batches(1)[0]
    norm = system("BatchNorm", x, update_statistics=update, **fields)
    found = ""
    if loaded:
        norm.statistics |= {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0)}
        found = ", and a mean and var that are not those of the start"
    before = norm.statistics
    for use_running_average in [True, False] if loaded else [True]:
        with pytest.raises(ValueError) as caught:
            norm(x, use_running_average=use_running_average)
        assert str(caught.value) == (
            "BatchNorm: running statistics must be updated before they normalize, and"
            " counted before they are updated further. Got a count of 0 updates in"
            f" batch_stats{found}. Train first, or, if mean and var come from a"
            " checkpoint without a count, set batch_stats/count to its number of"
            " updates."
        )
        close(norm.statistics, before)
    norm.statistics = before | {"count": jnp.full(3, 9.0)}
    norm(x, use_running_average=False)
    assert (norm.statistics["count"] == 10).all()


@both
def test_neither_switch_nor_argument(system):
    x = jnp.ones((4, 3))
    if system is SYSTEMS["nnx"]:
        norm = system("BatchNorm", x, use_running_average=None)
    else:
        norm = system("BatchNorm", x)
    with pytest.raises(ValueError) as caught:
        norm(x)
    assert str(caught.value) == (
        "BatchNorm: either use_running_average or normalize_with must be set. Got"
        " use_running_average=None and normalize_with=None. Pass use_running_average="
        "not train, to the module or to the call."
    )


@both
def test_negative_weights_leave_the_statistics_as_they_are(system):
    x = batches(1)[0]
    norm = system("BatchNorm", x, mask_is_weight=True)
    before = norm.statistics
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        norm(x, mask=-jnp.ones((16, 1)), use_running_average=False)
    close(norm.statistics, before)


@both
@pytest.mark.parametrize("name", NAMES)
def test_sub_groups_of_no_axis(system, name):
    x = jnp.ones((4, 5, 6))
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    norm = system(name, x, axis_index_groups=[[0, 1]], **fields)
    with pytest.raises(ValueError, match="divides the devices of axis_name"):
        norm(x, **running)


@both
def test_missing_axes_beside_sub_groups_are_all_missing_or_an_error(system):
    """Sub-groups number the devices of all axes, and say nothing without one."""
    x = batches(1, (16, 3))[0]
    fields = {
        "axis_name": ("d", "e"),
        "axis_index_groups": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "missing_axis": "ignore",
    }
    norm = system("BatchNorm", x, **fields)
    plain = system("BatchNorm", x)
    close(norm(x, use_running_average=False), plain(x, use_running_average=False))

    def step(x):
        return system("BatchNorm", x, **fields)(x, use_running_average=False)

    rule = r"^batch_norm: axis_name must name an axis of the .* Got axis_name='e'"
    with pytest.raises(ValueError, match=rule):
        jax.vmap(step, axis_name="d")(x.reshape(8, 2, 3))
