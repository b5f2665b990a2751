"""Running statistics: what moves them, what does not, and where they are kept."""

import dataclasses

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MAPPED
from family import tolerance
from jax import lax
from systems import SYSTEMS

import normjax
import normjax.linen
import normjax.nnx
from normjax import _devices, tools
from normjax._running import blend

both = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
X = 3 * jax.random.normal(jax.random.key(0), (16, 4)) + 2
# A batch that is finite in the first channel alone: its mean is infinite in the second,
# in the third there is none, and in the last something is NaN.
BAD = X.at[3, 1].set(jnp.inf).at[3, 2].set(jnp.inf).at[4, 2].set(-jnp.inf)
BAD = BAD.at[5, 3].set(jnp.nan)


def moments(x):
    return normjax.batch_norm(x)[1]


def close(got, want, size=16):
    got, want = np.asarray(got), np.asarray(want)
    atol = tolerance(size, np.float32) * max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def nnx_norm(**fields):
    return normjax.nnx.BatchNorm(4, rngs=flax.nnx.Rngs(0), **fields)


# Updates that are not finite.


@both
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{"momentum": 0.5}, {"momentum": None}, {"momentum": 0.5, "debias": True}],
    ids=str,
)
def test_bad_updates_are_left_out_by_channel(system, fields, jitted):
    """As if the channel had missed the batch: its count, too."""
    norm = system("BatchNorm", X, skip_nonfinite=True, **fields)
    clean = system("BatchNorm", X, **fields)
    for x in (BAD, X, BAD, 2 * X):
        norm(x, jitted=jitted, use_running_average=False)
    for x in (X, 2 * X):
        clean(x, use_running_average=False)
    found, want = norm.statistics, clean.statistics
    np.testing.assert_array_equal(found.pop("skipped"), [0, 2, 2, 2])
    assert found.keys() == want.keys()
    for name in want:
        close(found[name][1:], want[name][1:])
    if "count" in want:
        np.testing.assert_array_equal(found["count"], [4, 2, 2, 2])
    assert np.isfinite(found["mean"][0]) and np.isfinite(found["var"][0])


@both
def test_a_bad_batch_ruins_its_channels_where_nothing_is_said(system):
    """As in Flax, and for good; no count is there that a checkpoint would miss."""
    norm = system("BatchNorm", X, momentum=0.5)
    flaxs = system("BatchNorm", X, system.flaxs, momentum=0.5)
    for of in (norm, flaxs):
        for x in (BAD, X):
            of(x, use_running_average=False)
        assert of.statistics.keys() == {"mean", "var"}
        assert np.isfinite(of.statistics["var"][0])
        assert np.isnan(of.statistics["var"][1:]).all()


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("size", [150.0, 200.0, 300.0])
def test_what_the_dtype_of_the_statistics_cannot_hold_is_left_out(size, variance):
    """A variance that is infinite in float16, if only as it is made unbiased."""
    x = jnp.array([[-size], [size]])
    norm = normjax.linen.BatchNorm(
        False,
        param_dtype=jnp.float16,
        force_float32_reductions=False,
        running_variance=variance,
        skip_nonfinite=True,
    )
    variables = norm.init(jax.random.key(0), x)
    _, updates = norm.apply(variables, x, mutable=["batch_stats"])
    found = updates["batch_stats"]
    left_out = size**2 * (2 if variance == "unbiased" else 1) > 65504
    assert found["skipped"] == left_out and np.isfinite(found["var"])
    assert (found["var"] == 1) == left_out


@both
def test_what_is_masked_is_neither_counted_nor_left_out(system):
    norm = system("BatchNorm", X, momentum=0.5, skip_nonfinite=True)
    mask = jnp.array([[True, False, True, True]])
    norm(BAD, use_running_average=False, mask=mask)
    np.testing.assert_array_equal(norm.statistics["skipped"], [0, 0, 1, 1])
    assert norm.statistics["mean"][1] == 0


@both
def test_bad_updates_of_complex_values(system):
    """NaN in the imaginary part of one channel, infinity in the real one of another."""
    x = X * (1 + 2j)
    bad = x.at[3, 1].set(complex(1, np.nan)).at[3, 2].set(complex(np.inf, 0))
    norm = system("BatchNorm", x, momentum=0.5, skip_nonfinite=True)
    for batch in (bad, x):
        norm(batch, use_running_average=False)
    found = norm.statistics
    np.testing.assert_array_equal(found["skipped"], [0, 1, 1, 0])
    parts = jnp.array([0.75, 0.5, 0.5, 0.75])
    for part in (jnp.real, jnp.imag):
        close(part(found["mean"])[1:], (parts * part(x.mean(0)))[1:], 64)


@both
def test_bad_updates_under_vmap(system):
    """Each member of an ensemble leaves out its own."""
    norm = system("BatchNorm", X, momentum=0.5, skip_nonfinite=True)
    start = norm.statistics

    def step(x):
        norm.statistics = start
        norm(x, use_running_average=False)
        return norm.statistics

    def of_nnx(x):
        of = nnx_norm(momentum=0.5, skip_nonfinite=True)
        of(x)
        return {k: v[...] for k, v in flax.nnx.state(of, flax.nnx.BatchStat).items()}

    step = of_nnx if system is SYSTEMS["nnx"] else step
    found = jax.vmap(step)(jnp.stack([BAD, X]))
    np.testing.assert_array_equal(found["skipped"], [[0, 1, 1, 1], [0, 0, 0, 0]])
    assert np.isfinite(found["mean"]).all() and np.isfinite(found["var"]).all()
    close(found["mean"][1], 0.5 * X.mean(0))


def test_bad_updates_within_a_scan_of_steps():
    norm = normjax.linen.BatchNorm(False, momentum=None, skip_nonfinite=True)
    variables = norm.init(jax.random.key(0), X)

    def step(statistics, x):
        _, new = norm.apply(
            {**variables, "batch_stats": statistics}, x, mutable=["batch_stats"]
        )
        return new["batch_stats"], None

    batches = jnp.stack([BAD, X, BAD])
    found, _ = jax.jit(lambda s, xs: lax.scan(step, s, xs))(
        variables["batch_stats"], batches
    )
    np.testing.assert_array_equal(found["skipped"], [0, 2, 2, 2])
    np.testing.assert_array_equal(found["count"], [3, 1, 1, 1])
    close(found["mean"][1:], X.mean(0)[1:])

    def update(running, x):
        return running.update(moments(x), skip_nonfinite=True), None

    running, _ = lax.scan(update, normjax.RunningMoments.init((4,)), batches)
    np.testing.assert_array_equal(running.skipped, [0, 2, 2, 2])
    close(running.read().var[1:], X.var(0)[1:])


GROUPS = {
    "all": None,
    "halves": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "unequal": [[0, 2, 5], [1], [3, 4, 6, 7]],
}


FORMS = [
    *(("vmap", bytes_, groups, False) for bytes_ in (True, False) for groups in GROUPS),
    *(("shard_map", True, groups, False) for groups in GROUPS),
    ("shard_map", True, "all", True),
    ("shard_map", False, "halves", True),
    ("vmap", True, "unequal", True),
    ("pmap", True, "all", True),
    ("two axes", False, "all", False),
    ("vmap", True, "halves", "weights"),
    ("shard_map", False, "all", "weights"),
]


@pytest.mark.parametrize(("context", "one", "groups", "masked"), FORMS)
def test_bad_updates_are_left_out_on_all_devices(
    context, one, groups, masked, monkeypatch
):
    """Whatever one device has, all that sync with it leave out the same."""
    if not one:  # all-reduce of rows
        monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", 0)
    context, members = MAPPED[context], GROUPS[groups]
    x = X.reshape(2, 8, 4)
    # Infinite on one device, infinite and less than that on two, NaN on another.
    x = x.at[0, 2, 1].set(jnp.inf).at[0, 2, 2].set(jnp.inf).at[0, 5, 2].set(-jnp.inf)
    x = x.at[0, 6, 3].set(jnp.nan)
    mask = jnp.ones((2, 8, 1), bool).at[1, ::2].set(False).at[:, 4].set(False)
    norm = normjax.linen.BatchNorm(
        False,
        momentum=0.5,
        skip_nonfinite=True,
        mask_is_weight=masked == "weights",
        axis_name=context.names,
        axis_index_groups=members,
    )
    variables = norm.init(jax.random.key(0), x)

    def local(sharded, variables):
        x, mask = sharded
        mask = 0.5 * mask if masked == "weights" else mask
        _, new = norm.apply(
            variables, x, mask=mask if masked else None, mutable=["batch_stats"]
        )
        return jax.tree.map(lambda a: a[None, None], new["batch_stats"]), None

    def run(*arguments):
        return context.run(local, *arguments)

    run = run if context is MAPPED["pmap"] else jax.jit(run)
    found, _ = run((x, mask), variables)
    for group in members or [list(range(8))]:
        ours = x[:, jnp.array(group)]
        counts = mask[:, jnp.array(group)] & jnp.ones(4, bool)
        ours = jnp.where(counts, ours, 0) if masked else ours
        bad = ~jnp.isfinite(ours).all((0, 1))
        seen = counts.any() | (not masked)
        for device in group:
            for name in ("mean", "var"):
                a = found[name][0, device]
                np.testing.assert_array_equal(a, found[name][0, group[0]])
                assert np.isfinite(a).all()
                assert ((a == variables["batch_stats"][name]) == (bad | ~seen)).all()
            np.testing.assert_array_equal(found["skipped"][0, device], bad)


@pytest.mark.parametrize("context", ["one", "sharded"])
def test_bad_updates_of_running_moments(context):
    """Eager, and over a sharded batch, where the compiler syncs."""
    x = BAD
    if context == "sharded":
        devices = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
        spec = jax.sharding.PartitionSpec("d")
        x = jax.device_put(x, jax.sharding.NamedSharding(devices, spec))
    step = jax.jit(lambda r, x: r.update(moments(x), 0.5, skip_nonfinite=True))
    running = normjax.RunningMoments.init((4,))
    for batch in (X, x):
        running = step(running, batch)
    np.testing.assert_array_equal(running.skipped, [0, 1, 1, 1])
    close(running.read().mean[1:], X.mean(0)[1:])
    close(running.weight, [0.75, 0.5, 0.5, 0.5])
    ruined = running.update(moments(BAD), 0.5)
    assert np.isnan(ruined.var[1:]).all() and (ruined.skipped == running.skipped).all()


def test_a_count_that_is_nan_is_not_taken_for_none():
    """It ruins what it touches, as other values that are NaN do, or it is left out."""
    running = normjax.RunningMoments.init((4,)).update(moments(X), 0.5)
    m = moments(2 * X)
    m = dataclasses.replace(m, count=m.count.at[1].set(jnp.nan))
    assert np.isnan(running.update(m, 0.5).count[1])
    after = running.update(m, 0.5, skip_nonfinite=True)
    np.testing.assert_array_equal(after.skipped, [0, 1, 0, 0])
    close(after.mean[1], X.mean(0)[1])


@both
def test_a_count_that_is_not_finite_is_left_out(system):
    """Of weights that add up to more than float32 holds."""
    weights = jnp.full((16, 1), 3e38)
    fields = {"mask_is_weight": True, "skip_nonfinite": True}
    norm = system("BatchNorm", X, **fields)
    norm(X, mask=weights, use_running_average=False)
    assert np.isfinite(norm.statistics["mean"]).all()
    assert (norm.statistics["skipped"] == 1).all()


def test_a_checkpoint_that_does_not_say_what_was_left_out():
    old = normjax.linen.BatchNorm(False).init(jax.random.key(0), X)
    norm = normjax.linen.BatchNorm(False, skip_nonfinite=True)
    with pytest.raises(ValueError) as caught:
        norm.apply(old, X, mutable=["batch_stats"])
    assert str(caught.value) == (
        "BatchNorm: skip_nonfinite=True needs the number of updates left out so far."
        " Got batch_stats/mean and no batch_stats/skipped. Add batch_stats/skipped ="
        " jnp.zeros((4,), jnp.float32), or set skip_nonfinite=False."
    )
    old["batch_stats"]["skipped"] = jnp.zeros((4,), jnp.float32)
    norm.apply(old, BAD, mutable=["batch_stats"])


def test_a_ruined_channel_is_mended_by_reset_or_by_recalibration():
    """Both ways that the docs say."""
    norm = nnx_norm(momentum=0.5)
    norm(BAD)
    found = tools.recalibrate(lambda m, x: m(x), norm, [X], progress=False)
    close(found.variables.mean[...], X.mean(0))
    ruined = ~jnp.isfinite(norm.mean[...] + norm.var[...])
    norm.mean[...] = jnp.where(ruined, 0.0, norm.mean[...])
    norm.var[...] = jnp.where(ruined, 1.0, norm.var[...])
    norm.skip_nonfinite = True
    for _ in range(30):
        norm(X)
    close(norm.var[...], X.var(0))


@both
@pytest.mark.parametrize("momentum", [0.5, 1 - 1e-9])
def test_what_is_infinite_stays_so(system, momentum):
    """By Flax's arithmetic; and what counted nothing leaves it as it is."""
    start = {"mean": jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0])}
    start["var"] = jnp.array([jnp.inf, 2.0, jnp.nan, jnp.inf])
    norm = system("BatchNorm", X, momentum=momentum)
    norm.statistics = start
    norm(X, use_running_average=False, mask=jnp.zeros((16, 1), bool))
    for name, want in start.items():
        np.testing.assert_array_equal(norm.statistics[name], want)
    norm(X, use_running_average=False)
    found = norm.statistics
    np.testing.assert_array_equal(found["mean"][:3], start["mean"][:3])
    np.testing.assert_array_equal(found["var"][2:], start["var"][2:])
    np.testing.assert_array_equal(found["var"][0], start["var"][0])


# Nothing counted, and values that are taken.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_counted_moves_nothing_whatever_it_is(value):
    running = normjax.RunningMoments.init((2,)).update(moments(X[:, :2]))
    nothing = normjax.Moments(jnp.zeros(2), jnp.full(2, value), jnp.full(2, value))
    for update in (running.update, jax.jit(running.update)):
        after = update(nothing)
        for name in ("count", "mean", "var", "weight", "skipped"):
            np.testing.assert_array_equal(getattr(after, name), getattr(running, name))


@pytest.mark.parametrize("momentum", [1 - 1e-9, np.float64(1 - 1e-12)])
@pytest.mark.parametrize("jitted", [False, True])
def test_momentum_nearer_to_1_than_float32_can_tell(momentum, jitted):
    """The first update is what is read, however small its part is."""

    def step(running, x):
        return running.update(moments(x), momentum)

    running = (jax.jit(step) if jitted else step)(normjax.RunningMoments.init((4,)), X)
    close(running.read().mean, X.mean(0))
    close(running.weight * 1e9, np.full(4, (1 - momentum) * 1e9))
    close(step(running, 3 * X).read().mean, 2 * X.mean(0))


@both
def test_debiased_momentum_nearer_to_1_than_float32_can_tell(system):
    norm = system("BatchNorm", X, momentum=1 - 1e-9, debias=True)
    for x in (X, 3 * X):
        norm(x, use_running_average=False)
    close(norm.statistics["mean"], 2 * X.mean(0))


@pytest.mark.usefixtures("optimized")
def test_parts_that_float32_cannot_take_from_1_make_no_drift():
    """1 - part is rounded; what it loses would add 2e-8 of the mean at each update."""
    part, updates = 1 / 12_000_000, 300_000
    noise = 10 * jax.random.normal(jax.random.key(0), (1000, 64))
    noise = noise - noise.mean(0)

    def step(old, i):
        return blend(old, 1 + noise[i % 1000], part, jnp.ones(64, bool)), None

    found, _ = jax.jit(lambda i: lax.scan(step, jnp.ones(64), i))(jnp.arange(updates))
    assert abs(found.mean() - 1) < 5e-4  # and not 7e-3


def test_momentum_of_another_shape():
    running = normjax.RunningMoments.init((4,))
    m = moments(X)
    by_channel = running.update(m, np.array([0.0, 0.5, 0.9, 1.0]))
    close(by_channel.weight, [1, 0.5, 0.1, 0])
    for momentum in (jnp.full((3, 1), 0.5), np.full((1, 4), 0.5), jnp.full(2, 0.5)):
        for update in (running.update, jax.jit(running.update)):
            with pytest.raises(ValueError) as caught:
                update(m, momentum)
            assert str(caught.value) == (
                "RunningMoments.update: momentum must be one number, or one for each"
                f" channel. Got momentum of shape {momentum.shape}, statistics of shape"
                " (4,). Pass a float, or an array of shape (4,)."
            )
    table = normjax.RunningMoments.init((2, 3))
    of_table = normjax.Moments(*(jnp.ones((2, 3)) for _ in range(3)))
    assert table.update(of_table, jnp.full((2, 1), 0.5)).mean.shape == (2, 3)
    for shape in ((3, 3), (2, 2)):
        with pytest.raises(ValueError, match="momentum must be one number"):
            table.update(of_table, jnp.full(shape, 0.5))


@both
def test_momentum_of_another_shape_in_a_call(system):
    norm = system("BatchNorm", X)
    before = norm.statistics
    norm(X, use_running_average=False, momentum=jnp.full(4, 0.5))
    close(norm.statistics["mean"], 0.5 * X.mean(0))
    norm.statistics = before
    with pytest.raises(ValueError, match=r"^BatchNorm: momentum must be one number"):
        norm(X, use_running_average=False, momentum=jnp.full((3, 1), 0.5))
    close(norm.statistics["mean"], before["mean"])


@pytest.mark.usefixtures("float64")
def test_running_moments_of_more_digits_keep_them():
    """Updates of float32 do not take the digits of running moments of float64."""
    running = normjax.RunningMoments.init((4,), jnp.float64)
    x = X.astype(jnp.float64)
    running = running.update(moments(x), 0.5)
    after = running.update(moments(x.astype(jnp.float32)), 1 - 1e-12)
    np.testing.assert_allclose(after.mean, running.mean, rtol=1e-11)


# Counts.


@both
def test_a_count_that_float32_ends_stands_still(system):
    """2**24 updates: the next has 2**-24 of the average, less than its rounding."""
    norm = system("BatchNorm", X, momentum=None)
    most = 2.0**24
    start = {"mean": X.mean(0), "var": X.var(0), "count": jnp.full(4, most)}
    norm.statistics = start
    for _ in range(3):
        norm(2 * X, use_running_average=False)
    np.testing.assert_array_equal(norm.statistics["count"], np.full(4, most))
    want = {"mean": (most + 6) / (most + 3), "var": (most + 12) / (most + 3)}
    for name, factor in want.items():
        close(norm.statistics[name], np.asarray(start[name], np.float64) * factor)


@both
def test_parts_of_a_cumulative_average_are_right_to_the_end(system):
    """1 / t of the new one: at 12 million updates 1 - 1 / t is off by 28 % of 1 / t."""
    t = 12_000_000.0
    norm = system("BatchNorm", X, momentum=None)
    start = {"mean": jnp.zeros(4), "var": jnp.zeros(4), "count": jnp.full(4, t - 1)}
    norm.statistics = start
    norm(X, use_running_average=False)
    np.testing.assert_allclose(norm.statistics["mean"] * t, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.statistics["var"] * t, X.var(0), rtol=1e-5)


def with_counts(system, counts, **fields):
    """A norm that has the statistics of X, and counts in a dtype of their own."""
    norm = system("BatchNorm", X, **fields)
    values = {"mean": X.mean(0), "var": X.var(0), **counts}
    if system is SYSTEMS["nnx"]:
        for name, value in values.items():
            getattr(norm.module, name).set_value(value)
    else:
        norm.statistics = values
    return norm


@both
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_a_count_of_integers_goes_on_and_does_not_wrap(system, dtype):
    """It is what a checkpoint has; float32 would stand still from 2**24 on."""
    counts = np.array([2**24, 2**31 - 2, jnp.iinfo(dtype).max, 0], dtype)
    norm = with_counts(system, {"count": jnp.asarray(counts)}, momentum=None)
    for _ in range(2):
        norm(X + 1, use_running_average=False)
    found = norm.statistics["count"]
    assert found.dtype == dtype
    want = np.minimum(counts.astype(np.int64) + 2, jnp.iinfo(dtype).max)
    np.testing.assert_array_equal(found, want)
    close(norm.statistics["mean"], X.mean(0) + np.array([0, 0, 0, 1]))


@both
@pytest.mark.parametrize("name", ["count", "skipped"])
def test_counts_of_a_model_that_was_cast_as_a_whole(system, name):
    """To bfloat16, which ends at 256: good for inference, and not to train on."""
    counts = {"count": jnp.full(4, 9.0), "skipped": jnp.zeros(4)}
    counts[name] = counts[name].astype(jnp.bfloat16)
    norm = with_counts(system, counts, momentum=None, skip_nonfinite=True)
    norm(X, use_running_average=True)
    with pytest.raises(ValueError) as caught:
        norm(X, use_running_average=False)
    assert str(caught.value) == (
        f"BatchNorm: batch_stats/{name} must be at least float32, or an integer. Got"
        " bfloat16, which counts no further than 256. Pass batch_stats with"
        f" {name}.astype(jnp.float32)."
    )


def test_no_features_are_features():
    _, m = normjax.batch_norm(jnp.zeros((3, 0)))
    running = normjax.RunningMoments.init((0,)).update(m, momentum=0.9)
    assert running.read().var.shape == (0,)
