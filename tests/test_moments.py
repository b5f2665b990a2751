"""Moments: taken, merged, streamed, and merged across devices."""

import functools
import itertools

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MAPPED, mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import normjax
from normjax import _devices, _measure

OVER = _devices.Reduction((0, 1))

pytestmark = pytest.mark.usefixtures("strict")


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_moments(got, want, reduced):
    """Compares what users read, as far as a mean rounded to float32 allows."""
    fields = ("count", "mean", "var")
    far = 1 + float(jnp.max(jnp.abs(want.mean) / jnp.sqrt(want.var), initial=0.0))
    got, want = ([getattr(m, f) for f in fields] for m in (got, want))
    family.assert_close(got, want, reduced, c=3 * far)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_moments_are_at_least_float32_and_keep_the_axes(dtype, float64):
    x = normal((5, 3, 4), dtype=dtype)
    m = normjax.moments(x, (0, -1))
    wide = np.asarray(x.astype(jnp.float64))
    for field, want in [
        ("count", np.full((1, 3, 1), 20.0)),
        ("mean", wide.mean((0, 2), keepdims=True)),
        ("var", wide.var((0, 2), keepdims=True)),
    ]:
        got = getattr(m, field)
        assert got.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "complex64"])
def test_what_counts_nothing_has_mean_0_and_variance_1(dtype, float64):
    where = jnp.asarray([[True, False], [True, False]])
    x = jnp.asarray([[1, jnp.nan], [3, jnp.inf]], dtype)
    for mask in (where, where.astype(jnp.float32)):
        m = normjax.moments(x, 0, where=mask)
        np.testing.assert_array_equal(m.count, [[2, 0]])
        np.testing.assert_array_equal(m.mean, [[2, 0]])
        np.testing.assert_array_equal(m.var, [[1, 1]])


def test_moments_of_plain_numbers_count_nothing_beside():
    m = normjax.Moments(4.0, 1.0, 2.0)
    both = m.merge(m)
    assert (both.count, both.mean, both.var) == (8, 1, 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 12), min_size=0, max_size=4), seed=st.integers(0, 9)
)
def test_merge_ignores_how_values_are_split_and_in_what_order(cuts, seed):
    x = normal((12, 3), seed) * 5 + 100 * seed
    edges = [0, *sorted(cuts), 12]
    pieces = [normjax.moments(x[a:b], 0) for a, b in itertools.pairwise(edges)]
    want = normjax.moments(x, 0)
    assert_moments(functools.reduce(lambda a, b: a.merge(b), pieces), want, 12)
    assert_moments(functools.reduce(lambda a, b: b.merge(a), pieces[::-1]), want, 12)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *pieces)
    together = normjax.merge(stacked, 0)
    assert_moments(jax.tree.map(lambda a: a[0], together), want, 12)


def test_count_zero_is_the_identity_of_merge():
    m = normjax.moments(normal((7, 3)) + 1e4, 0)
    nothing = normjax.moments(jnp.zeros((0, 3)), 0)
    for merged in (m.merge(nothing), nothing.merge(m)):
        np.testing.assert_array_equal(merged.count, m.count)
        np.testing.assert_allclose(merged.mean, m.mean, rtol=1e-7)
        np.testing.assert_allclose(merged.var, m.var, rtol=1e-6)
    both = nothing.merge(nothing)
    assert (both.count == 0).all() and (both.mean == 0).all() and (both.var == 1).all()


def test_merge_is_exact_for_a_constant():
    """Shares of a third do not add up to one in binary; the mean must not show it."""
    m = normjax.moments(jnp.full((1, 3), 7.0), 0)
    merged = normjax.merge(m, 1)
    assert merged.mean == 7 and merged.var == 0


def test_merge_of_far_apart_means_keeps_its_digits():
    x = normal((8, 1000)) + 1e4 * jnp.arange(8.0)[:, None]
    merged = normjax.merge(normjax.moments(x, 1), 0)
    want = np.asarray(x, np.float64)
    np.testing.assert_allclose(merged.mean[0, 0], want.mean(), rtol=2e-7)
    np.testing.assert_allclose(merged.var[0, 0], want.var(), rtol=1e-6)


def test_a_long_stream_keeps_its_count_exactly():
    """float32 alone stops at 2**24: adding 1 to it changes nothing."""
    one = normjax.Moments(jnp.ones(()), jnp.zeros(()), jnp.zeros(()))
    long = normjax.Moments(jnp.float32(2**24), jnp.zeros(()), jnp.zeros(()))
    assert long.count + one.count == long.count

    def step(m, _):
        return m.merge(jax.tree.map(jnp.asarray, one)), None

    start = jax.tree.map(jnp.asarray, long.merge(one))
    stream, _ = jax.jit(lambda m: jax.lax.scan(step, m, length=999))(start)
    assert int(stream.count) + int(stream.carry) == 2**24 + 1000


def test_a_long_stream_does_not_drift():
    """Past 2**24 values, where counts no longer fit: mean and var must not move."""
    batch = normjax.Moments(jnp.ones(()), jnp.full((), 5.0), jnp.ones(()))
    start = normjax.Moments(jnp.float32(2**24 - 9), jnp.full((), 5.0), jnp.ones(()))
    stream = jax.jit(
        lambda m: jax.lax.scan(lambda m, _: (m.merge(batch), None), m, length=65536)[0]
    )(start)
    assert int(stream.count) + int(stream.carry) == 2**24 - 9 + 65536
    assert abs(stream.carry) <= 1
    np.testing.assert_allclose([stream.mean, stream.var], [5, 1], rtol=1e-6)


def test_moments_built_by_hand_may_have_a_scalar_count():
    m = normjax.Moments(jnp.float32(1), jnp.zeros(2), jnp.ones(2))
    n = normjax.Moments(jnp.float32(3), jnp.full(2, 4.0), jnp.ones(2))
    merged = m.merge(n)
    np.testing.assert_allclose(merged.mean, [3, 3])
    np.testing.assert_allclose(merged.var, [4, 4])


@pytest.mark.parametrize("counts", [[2**24 + 1, 2**24 + 3], [16777217] * 9, [5, 2**30]])
def test_merge_along_an_axis_adds_counts_exactly(counts):
    high = jnp.asarray(counts, jnp.float32)
    low = jnp.asarray([c - int(np.float32(c)) for c in counts], jnp.float32)
    m = normjax.merge(normjax.Moments(high, high * 0, high * 0, low), 0)
    assert int(m.count[0]) + int(m.carry[0]) == sum(counts)


def test_counts_of_large_arrays_are_exact():
    shape = jax.ShapeDtypeStruct((2**12 + 1, 2**13, 1), jnp.float32)
    where = jax.ShapeDtypeStruct((2**12 + 1, 2**13, 1), bool)
    count, carry = _measure._count(shape, None, OVER, jnp.float32)
    total = (2**12 + 1) * 2**13
    assert int(count[0, 0, 0]) + int(carry[0, 0, 0]) == total
    count, carry = jax.jit(
        lambda: _measure._count(shape, jnp.ones(where.shape, bool), OVER, jnp.float32)
    )()
    assert int(count[0, 0, 0]) + int(carry[0, 0, 0]) == total


def test_moments_count_by_mask_in_any_form():
    x = normal((4, 6))
    where = jnp.arange(4)[:, None] < 3
    for mask in (where, jnp.broadcast_to(where, x.shape)):
        m = normjax.moments(x, (0, 1), where=mask)
        assert m.count == 18
        np.testing.assert_allclose(m.mean[0, 0], np.asarray(x[:3]).mean(), rtol=1e-5)


def test_count_of_weights_is_their_sum():
    x, w = normal((4, 6)), jnp.array([0.5, 0.0, 2.0, 0.25])[:, None]
    m = normjax.moments(x, 0, where=w)
    wide = np.asarray(x, np.float64)
    mean = np.average(wide, axis=0, weights=np.asarray(w)[:, 0])
    np.testing.assert_array_equal(m.count, np.full((1, 6), 2.75))
    np.testing.assert_allclose(m.mean[0], mean, rtol=1e-5)
    var = np.average((wide - mean) ** 2, axis=0, weights=np.asarray(w)[:, 0])
    np.testing.assert_allclose(m.var[0], var, rtol=1e-5)
    half = normjax.moments(x[:2], 0, where=w[:2])
    merged = half.merge(normjax.moments(x[2:], 0, where=w[2:]))
    np.testing.assert_allclose(merged.var, m.var, rtol=1e-5)


@pytest.mark.parametrize("split", [[16], [1, 5, 10], [1] * 16])
def test_unbiased_variance_of_weights_ignores_their_scale(split):
    """That of reliability weights, and n / (n - 1) where all are alike."""
    x, w = normal((16, 3)) * 3 + 2, jax.nn.softmax(normal((16, 1), 5))
    wide, v = np.asarray(x, np.float64), np.asarray(w, np.float64)
    off = wide - (v * wide).sum(0) / v.sum()
    total = v.sum() - (v**2).sum() / v.sum()
    want = (v * off**2).sum(0) / total
    for scale in (1.0, 1e-6, 1e6):
        edges = np.cumsum([0, *split])
        pieces = [
            normjax.moments(x[a:b], 0, where=w[a:b] * scale)
            for a, b in itertools.pairwise(edges)
        ]
        m = functools.reduce(lambda a, b: a.merge(b), pieces)
        np.testing.assert_allclose(m.unbiased_var[0], want, rtol=5e-6)
    alike = normjax.moments(x, 0, where=jnp.full((16, 1), 0.3)).unbiased_var
    np.testing.assert_allclose(alike[0], wide.var(0, ddof=1), rtol=2e-6)
    np.testing.assert_allclose(normjax.moments(x, 0).unbiased_var, alike, rtol=2e-6)
    for one in (None, w[:1], jnp.full((1, 1), 1e-3)):
        assert jnp.isnan(normjax.moments(x[:1], 0, where=one).unbiased_var).all()


def test_what_counted_nothing_may_be_anything():
    m = normjax.moments(normal((7, 3)), 0)
    zeros = jnp.zeros((1, 3))
    nothing = normjax.Moments(zeros, zeros + jnp.nan, zeros + jnp.inf)
    for merged in (m.merge(nothing), nothing.merge(m)):
        np.testing.assert_allclose(merged.mean, m.mean, rtol=1e-6)
        np.testing.assert_allclose(merged.var, m.var, rtol=1e-6)
    both = nothing.merge(nothing)
    assert (both.count == 0).all() and (both.mean == 0).all() and (both.var == 1).all()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_stream_of_values_is_what_they_are_together(size, offset):
    """One value at a time, too: rounding must not have a side that it favours."""
    x = normal((20_001 // size, size, 64)) + offset

    def step(m, x):
        return m.merge(normjax.moments(x, 0)), None

    start = normjax.Moments.empty((1, 64))
    stream, _ = jax.jit(lambda x: jax.lax.scan(step, start, x))(x)
    wide = np.asarray(x, np.float64).reshape(-1, 64)
    off = np.asarray(stream.var, np.float64)[0] / wide.var(0) - 1
    assert np.abs(off).max() < 2e-6 and abs(off.mean()) < 2e-7
    mean = np.asarray(stream.mean, np.float64) + np.asarray(stream.rest, np.float64)
    np.testing.assert_allclose(mean[0], wide.mean(0), atol=1e-7 * (1 + offset * 1e-3))


def test_counts_neither_wrap_nor_stop():
    """Past 2**31 of them, by a mask that is broadcast; and past 2**24 in a program."""
    shape = (2**16, 2**16 - 1, 2)  # of an array that is never made
    n = shape[0] * shape[1]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    for mask in (None, jnp.ones((1, 1, 2), bool)):
        count, carry = (
            _measure._count(x, mask, OVER, jnp.float32)
            if mask is None
            else jax.jit(lambda m: _measure._count(x, m, OVER, jnp.float32))(mask)
        )
        total = np.asarray(count, np.float64) + np.asarray(carry, np.float64)
        np.testing.assert_array_equal(total, np.full((1, 1, 2), float(n)))


def test_moments_of_complex_values():
    x = normal((50, 3), dtype=jnp.complex64) + (1e4 + 2e4j)
    m = normjax.moments(x, 0)
    assert (m.count.dtype, m.mean.dtype, m.var.dtype) == (
        "float32",
        "complex64",
        "float32",
    )
    wide = np.asarray(x, np.complex128)
    np.testing.assert_allclose(m.mean + m.rest, wide.mean(0)[None], rtol=1e-7)
    np.testing.assert_allclose(m.var, wide.var(0)[None], rtol=2e-6)
    running = normjax.RunningMoments.init((1, 3), jnp.complex64).update(m)
    np.testing.assert_array_equal(running.read().mean, m.mean)
    merged = normjax.moments(x[:20], 0).merge(normjax.moments(x[20:], 0))
    np.testing.assert_allclose(merged.var, m.var, rtol=2e-6)


# Across devices.


def eighths(where):
    """Weights that every dtype adds up exactly, 0 where the mask is False."""
    of_8 = jax.random.randint(jax.random.key(4), where.shape, 1, 9)
    return jnp.where(where, of_8.astype(jnp.float32) / 8, jnp.zeros(where.shape))


def across(context, x, where, axis=(0, 1, 2), groups=None):
    """The moments of all devices; with groups those of each device, stacked."""
    c = MAPPED[context]

    def local(split, _):
        x, where = split
        m = normjax.moments(
            x, axis, where=where, axis_name=c.names, axis_index_groups=groups
        )
        if groups is None:
            return (), m
        size = sum(map(len, groups))
        mine = jnp.arange(size) == jax.lax.axis_index(c.names)
        mine = mine.reshape(size, *(1 for _ in m.shape))
        alone = jax.tree.map(lambda a: jnp.where(mine, a, jnp.zeros_like(a)), m)
        return (), jax.lax.psum((alone.count, alone.mean, alone.var), c.names)

    # pmap lines its axes up wrongly where an argument has no leaves, hence the 0.
    return jax.jit(lambda x, w: c.run(local, (x, w), jnp.zeros(()))[1])(x, where)


@pytest.mark.parametrize(
    ("context", "mask", "bytes_"),
    family.combined(
        MAPPED, ["plain", "masked", "weighted"], [_devices.ONE_ALL_REDUCE_BYTES, 0]
    ),
)
def test_sync_ignores_how_the_batch_is_split(context, mask, bytes_, monkeypatch):
    """With device means 100 std apart, in one all-reduce and in two."""
    monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", bytes_)
    x = (
        normal((6, 16, 2, 3))
        + 100 * jnp.repeat(jnp.arange(8.0), 2)[None, :, None, None]
    )
    where = None
    if mask != "plain":
        where = jax.random.bernoulli(jax.random.key(3), 0.6, (6, 16, 1, 3))
        where = where.at[:, 6:8].set(False)
        x = jnp.where(where, x, jnp.nan)
    if mask == "weighted":
        where = eighths(where)
    want = normjax.moments(x, (0, 1, 2), where=where)
    got = across(context, x, where)
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_allclose(got.mean, want.mean, rtol=3e-7)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-6)


@pytest.mark.parametrize(
    ("context", "kind", "how"),
    family.combined(
        [c for c in MAPPED if c != "partial manual"],
        ["plain", "masked", "complex and weighted"],
        ["one all-reduce", "two", "apart"],
        one_of=3,
    ),
)
def test_sync_of_sub_groups_is_that_of_each_alone(context, kind, how, monkeypatch):
    """Of unequal sizes; where jax itself raises too; NaN stays in its own group."""
    if how == "two":
        monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", 0)
    groups = [[0, 3, 5], [1], [2, 4, 6, 7]]
    if how == "apart":
        groups = [[0, 3], [1, 6], [2, 4], [7, 5]]
    x = normal((6, 16, 3), dtype=jnp.complex64 if "complex" in kind else jnp.float32)
    x = x + 100 * jnp.repeat(jnp.arange(8.0, dtype=x.dtype), 2)[None, :, None]
    x = x.at[0, 2].set(jnp.nan)  # device 1, a group of its own
    where = None
    if kind != "plain":
        where = jax.random.bernoulli(jax.random.key(3), 0.6, (6, 16, 1))
        where = where.at[:, 6:8].set(False).at[0, 2].set(True)
    if "weighted" in kind:
        where = eighths(where)
    count, mean, var = across(context, x, where, (0, 1), groups)
    assert jnp.isnan(mean[1]).all() and jnp.isfinite(mean[0]).all()
    for group in groups:
        rows = np.concatenate([[2 * i, 2 * i + 1] for i in group])
        counts = None if where is None else where[:, rows]
        want = normjax.moments(x[:, rows], (0, 1), where=counts)
        for device in group:
            np.testing.assert_array_equal(count[device], want.count)
            np.testing.assert_allclose(mean[device], want.mean, rtol=3e-7)
            np.testing.assert_allclose(var[device], want.var, rtol=2e-6)


def test_sync_of_uncentered_moments_is_exact():
    x = normal((6, 16, 2, 3))
    call = functools.partial(normjax.rms_norm, axis=(1, 3))
    f = jax.shard_map(
        functools.partial(call, axis_name="d"),
        mesh=mesh((8,), ("d",)),
        in_specs=P(None, "d"),
        out_specs=P(None, "d"),
    )
    np.testing.assert_allclose(jax.jit(f)(x), call(x), atol=1e-6)


def test_sync_counts_exactly_beyond_float32():
    high, low = jnp.full((8, 1), 2.0**24), jnp.ones((8, 1))

    def local(high, low):
        m = normjax.Moments(high, high * 0, high * 0, low)
        r = _devices.Reduction((0,), names=("d",))
        return _devices.across_devices(m, r, "mask")

    m = jax.vmap(local, axis_name="d", out_axes=None)(high, low)
    assert int(m.count[0]) + int(m.carry[0]) == 8 * (2**24 + 1)


# Running moments.


def test_reading_after_one_update_gives_exactly_that_update():
    _, m = normjax.batch_norm(normal((9, 3)) * 1e3 + 0.1)
    read = normjax.RunningMoments.init((3,)).update(m, momentum=0.99).read()
    for field in ("count", "mean", "var"):
        np.testing.assert_array_equal(getattr(read, field), getattr(m, field))


def test_running_moments_are_the_weighted_average_of_their_updates():
    updates = [normjax.batch_norm(normal((9, 3), i))[1] for i in range(5)]
    momenta = [0.9, 0.5, 1.0, 0.0, 0.7]
    running = normjax.RunningMoments.init((3,))
    weights = np.zeros(0)
    for m, momentum in zip(updates, momenta, strict=True):
        running = running.update(m, momentum=momentum)
        weights = np.append(weights * momentum, 1 - momentum)
    for field in ("mean", "var"):
        values = np.stack([getattr(m, field) for m in updates])
        want = (weights[:, None] * values).sum(0) / weights.sum()
        np.testing.assert_allclose(getattr(running.read(), field), want, rtol=1e-5)
    np.testing.assert_allclose(running.weight, weights.sum(), rtol=1e-6)


def test_running_moments_do_not_move_where_nothing_was_counted():
    _, m = normjax.batch_norm(normal((9, 3)))
    running = normjax.RunningMoments.init((3,)).update(m)
    where = jnp.array([True, False, True])[None]
    x = jnp.where(where, normal((9, 3), 1), jnp.nan)
    after = running.update(normjax.batch_norm(x, where=where)[1], momentum=0.5)
    moved = after.mean != running.mean
    np.testing.assert_array_equal(moved, [True, False, True])
    assert jnp.isfinite(after.mean).all() and jnp.isfinite(after.var).all()
    empty = running.update(normjax.batch_norm(jnp.zeros((0, 3)))[1], momentum=0.0)
    jax.tree.map(np.testing.assert_array_equal, empty, running)


def test_running_moments_work_in_a_jitted_scan_with_a_traced_momentum():
    xs, momenta = normal((4, 9, 3)), jnp.array([0.9, 0.8, 0.7, 0.6])

    def step(running, batch):
        x, momentum = batch
        return running.update(normjax.batch_norm(x)[1], momentum=momentum), None

    start = normjax.RunningMoments.init((3,))
    scanned, _ = jax.jit(lambda s: jax.lax.scan(step, s, (xs, momenta)))(start)
    eager = start
    for batch in zip(xs, momenta, strict=True):
        eager, _ = step(eager, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned, eager
    )
    assert start.weight.max() == 0


def test_two_collectives_correct_the_rounding_of_the_mean(monkeypatch):
    """The variance about a rounded mean is 4e-5 too large, at mean / std = 1e5."""
    monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", 0)
    x = normal((8, 37, 5)) + 1e5
    take = functools.partial(normjax.moments, axis=0, axis_name="d")
    m = jax.jit(jax.vmap(take, axis_name="d"))(x)
    wide = np.asarray(x, np.float64).reshape(-1, 5)
    mean = np.asarray(m.mean, np.float64) + np.asarray(m.rest, np.float64)
    np.testing.assert_allclose(mean[:, 0] - wide.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(m.var[:, 0], [wide.var(0)] * 8, rtol=2e-6)


@pytest.mark.parametrize("bytes_", [_devices.ONE_ALL_REDUCE_BYTES, 0])
def test_where_no_device_counts_anything_the_variance_is_1(bytes_, monkeypatch):
    monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", bytes_)
    where = jnp.zeros((8, 4, 3), bool).at[:, :, 0].set(True)
    take = functools.partial(normjax.moments, axis=0, axis_name="d")
    f = jax.jit(jax.vmap(lambda x, w: take(x, where=w), axis_name="d"))
    m = f(normal((8, 4, 3)), where)
    np.testing.assert_array_equal(m.count[:, 0], [[32, 0, 0]] * 8)
    assert (m.mean[..., 1:] == 0).all() and (m.var[..., 1:] == 1).all()


def test_moments_alike_stay_what_they_are_in_a_stream():
    """Shares of two counts do not add up to 1, and what they miss is made up for."""
    counts = np.random.default_rng(0).integers(1, 99, (4096, 64)).astype(np.float32)

    def step(m, count):
        zero = jnp.zeros_like(count)
        return m.merge(normjax.Moments(count, zero, zero + 2)), None

    m, _ = jax.lax.scan(step, normjax.Moments.empty((64,)), counts)
    np.testing.assert_array_equal(m.count, counts.sum(0))
    np.testing.assert_allclose(m.var, 2, rtol=4 * np.finfo(np.float32).eps)
