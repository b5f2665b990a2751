"""Values whose squares their dtype cannot hold, or hardly: every norm and context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MAPPED
from family import FAMILY

import normjax
from normjax import _devices, _measure, _moments, _numbers

pytestmark = pytest.mark.usefixtures("strict")

# Powers of two, so that the values of each are those of the first times a number.
SIZES = {
    "float32": [2.0**62, 2.0**63, 2.0**64, 2.0**100, 2.0**124],
    "bfloat16": [2.0**64, 2.0**124],
    "complex64": [2.0**64, 2.0**123],
    "float64": [2.0**511, 2.0**512, 2.0**1000, 2.0**1020],
}
# In which norms the other dtypes are looked at too: each compiles anew.
WIDER = [("layer", "plain"), ("group", "weighted")]


def data(dtype, shape=(3, 8, 4, 6), seed=0):
    """Values up to 8 in each dtype, with room for the largest sizes above."""
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * 1.5 + 0.5
    x = jnp.clip(x, -7, 7).astype(jnp.bfloat16)
    if dtype == "complex64":
        return jax.lax.complex(x.astype(jnp.float32), x[::-1].astype(jnp.float32))
    return x.astype(dtype)


def masks(kind, shape=(3, 8, 1, 6)):
    if kind == "plain":
        return None
    where = jax.random.bernoulli(jax.random.key(3), 0.7, shape).at[:, 4].set(False)
    return where if kind == "masked" else where.astype(jnp.float32) / 4


def wide(a):
    return np.asarray(a, np.complex128 if jnp.iscomplexobj(a) else np.float64)


def close(got, want, tolerance):
    """Each relative to the largest that is wanted."""
    got, want = wide(got), wide(want)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def scaled(a, size):
    return _numbers.scaled(a, size)


@pytest.mark.parametrize("kind", ["plain", "masked", "weighted"])
@pytest.mark.parametrize("norm", FAMILY)
def test_norms_of_large_values_are_those_of_small_ones(norm, kind, float64):
    """y is the same, and the gradient of x by so much smaller, at every size."""
    row = FAMILY[norm]
    for dtype, sizes in SIZES.items():
        if dtype != "float32" and (norm, kind) not in WIDER:
            continue
        x, where = data(dtype), masks(kind)
        if where is not None:
            x = jnp.where(where.astype(bool), x, jnp.full_like(x, jnp.nan))
        info = jnp.finfo(dtype)
        scale = jnp.linspace(0.5, 2, 6, dtype=info.dtype)

        @jax.jit
        def both(x, scale=scale, where=where):
            y, pullback = jax.vjp(lambda x: row.call(x, scale, None, where), x)
            return y, pullback(y * y)[0]

        # Where epsilon is nothing beside the variance at any size.
        start = 2.0**20
        y, dx = both(scaled(x, start))
        for size in sizes:
            large, of_large = both(scaled(x, size))
            close(large, y, 8 * float(info.eps))
            assert np.isfinite(wide(of_large)).all()
            if np.abs(wide(dx)).max() * start / size > float(info.tiny) / info.eps:
                close(wide(of_large) * (size / start), dx, 100 * float(info.eps))


@pytest.mark.parametrize("bytes_", [_devices.ONE_ALL_REDUCE_BYTES, 0])
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_synced_norms_of_large_values_are_those_of_the_whole(norm, bytes_, monkeypatch):
    """With a device whose values are small, and two whose means are far apart."""
    monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", bytes_)
    row = FAMILY[norm]
    start, size = 2.0**20, 2.0**120
    x = data("float32", (2, 16, 1, 6))
    x = x.at[:, :2].multiply(2.0**-70).at[:, 2:4].add(60).at[:, 4:6].add(-60)
    for context in MAPPED:
        c = MAPPED[context]

        @jax.jit
        def f(x, c=c):
            def local(x, _):
                return row.call(x, None, None, None, c.names), jnp.zeros(())

            return c.run(local, x, jnp.zeros(()))[0]

        close(f(x * size), f(x * start), 1e-6)
    jax.clear_caches()  # of what was traced with the other limit


def test_a_variance_of_float64_beyond_float32_normalizes_float32():
    x = data("float32", (64, 3))
    with jax.enable_x64(True):
        m = normjax.moments(jnp.asarray(x, jnp.float64), 0)
        large = normjax.Moments(m.count, m.mean * 2.0**120, m.var * 2.0**240)
        small = normjax.Moments(m.count, m.mean * 2.0**20, m.var * 2.0**40)
        got, want = (
            normjax.normalize(x * size, of, epsilon=1e-5)
            for size, of in ((2.0**120, large), (2.0**20, small))
        )
    assert got.dtype == jnp.float32
    close(got, want, 1e-6)


def test_a_gradient_leaves_moments_as_users_see_them():
    """Of masked values too, whose variance is beyond their dtype."""
    x, where = data("float32") * 2.0**100, masks("masked")

    def loss(x):
        y, m = normjax.batch_norm(x, where=where)
        return y.sum(), m

    (_, got), _ = jax.value_and_grad(loss, has_aux=True)(x)
    _, want = loss(x)
    assert (got.var == jnp.inf).all()
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_moments_and_what_merges_are_right_up_to_the_largest_value():
    x = data("float32", (64, 3))
    top = float(jnp.finfo(jnp.float32).max)
    for size in (1.0, 2.0**60, 2.0**62, 2.0**124):
        m = normjax.moments(x * size, 0)
        want = wide(x) * size
        close(m.mean, want.mean(0)[None], 1e-6)
        parts = [normjax.moments(x[i : i + 16] * size, 0) for i in range(0, 64, 16)]
        merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
        stacked = normjax.merge(jax.tree.map(lambda *a: jnp.stack(a), *parts), 0)
        for other in (m, merged, jax.tree.map(lambda a: a[0], stacked)):
            close(other.mean, want.mean(0)[None], 1e-6)
            if size < 2.0**62:
                close(other.var, want.var(0)[None], 2e-6)
            elif size > 2.0**64:
                assert (other.var == jnp.inf).all()

        def of_parts(x):
            return normjax.merge(normjax.moments(x.reshape(4, 16, 3), 1), 0)

        for f in (lambda x: normjax.moments(x, 0), of_parts):
            gradient = jax.grad(lambda x, f=f: f(x).var.sum())(x * size)
            close(gradient, 2 * (want - want.mean(0)) / 64, 2e-6)
            # A second merge goes on with what var does not hold.
            again = jax.grad(lambda x, f=f: f(x).merge(f(x)).var.sum())(x * size)
            close(again, 2 * (want - want.mean(0)) / 64, 2e-6)
        running = normjax.RunningMoments.init((1, 3)).update(m, momentum=0.9)
        close(running.read().mean, want.mean(0)[None], 1e-6)
    for value in (top, -top):
        m = normjax.moments(jnp.full((7, 1), value), 0)
        assert m.mean == value and m.var == 0
        assert (normjax.layer_norm(jnp.full((1, 7), value)) == 0).all()
    y = normjax.layer_norm(jnp.array([[top, top, top, -top]]))
    close(y, wide([[1, 1, 1, -3]]) / 3**0.5, 1e-6)


def test_large_values_have_their_gradients_through_merged_moments():
    """Of y, through a variance that only a unit holds, merged once and twice."""
    x, w = data("float32", (4, 16, 3)), data("float32", (4, 16, 3), 1)

    def once(x):
        return normjax.merge(normjax.moments(x, 1), 0)

    def twice(x):
        return once(x[:1]).merge(once(x[1:3])).merge(once(x[3:]))

    for merged in (once, twice):

        @jax.jit
        @jax.grad
        def gradient(x, merged=merged):
            return (normjax.normalize(x, merged(x), epsilon=1e-5) * w).sum()

        start, size = 2.0**20, 2.0**100
        close(gradient(x * size) * (size / start), gradient(x * start), 4e-6)


def test_a_variance_that_only_the_whole_cannot_hold_is_merged_in_a_unit():
    """Neither a piece nor the distance of its mean is too large, their sum is."""
    top, far = np.float32(3.3e38), np.float32(4e18)
    ones = jnp.ones(2)
    m = normjax.merge(
        normjax.Moments(ones, far * jnp.array([1.0, -1.0]), top * ones), 0
    )
    assert m.var == jnp.inf
    std = np.sqrt(wide(top) + wide(far) ** 2)
    x = jnp.array([std, -3 * std], jnp.float32)
    close(normjax.normalize(x, m, epsilon=1e-5), [1, -3], 1e-6)
    once = normjax.Moments(*(a[:1] for a in (ones, far * ones, top * ones)))
    other = normjax.Moments(once.count, -once.mean, once.var)
    close(normjax.normalize(x, once.merge(other), epsilon=1e-5), [1, -3], 1e-6)


def test_ghosts_of_large_values_have_the_moments_of_the_whole_batch():
    """Synced, too, where the moments of ghosts are merged before those of devices."""
    x = data("float32", (8, 8, 3)) * 2.0**120
    c = MAPPED["shard_map"]

    @jax.jit
    def ghosts(x):
        def local(x, _):
            y, m = normjax.batch_norm(x, virtual_batch_size=2, axis_name=c.names)
            return y, (m.mean, m.var)

        return c.run(local, x, jnp.zeros(()))[1]

    mean, var = ghosts(x)
    close(mean, wide(x).mean((0, 1)), 1e-6)
    assert (var == jnp.inf).all()
    of_mean = jax.grad(lambda x: ghosts(x)[0].sum())(x)
    close(of_mean, np.full(x.shape, 1 / 64), 1e-6)
    of_var = jax.grad(lambda x: ghosts(x)[1].sum())(x)
    close(of_var, 2 * (wide(x) - wide(x).mean((0, 1))) / 64, 2e-6)


def test_a_distance_of_small_weight_may_be_beyond_the_root_of_the_dtype():
    """Where the variance is held, the derivative by its weight is, too."""
    x = jnp.array([1e21, 1.0, -3.0, 2.0])
    w = jnp.array([1e-10, 1.0, 2.0, 1.0])
    gradient = jax.grad(lambda w: (normjax.layer_norm(x, where=w) ** 3).sum())(w)
    with jax.enable_x64(True):
        x, w = jnp.asarray(wide(x)), jnp.asarray(wide(w))
        want = jax.grad(lambda w: (normjax.layer_norm(x, where=w) ** 3).sum())(w)
    np.testing.assert_allclose(gradient, want, rtol=1e-5)


def test_where_nothing_counts_a_mean_that_is_far_leaves_no_trace():
    """The distance of padding from it, over a small std, is infinite, times dy of 0."""
    x = jnp.array([[3e38, 3e38, jnp.inf]])
    where = jnp.array([[True, True, False]])
    m = normjax.moments(x, 1, where=where)

    def loss(scale):
        return normjax.normalize(x, m, scale, epsilon=1e-5, where=where).sum()

    for scale in (jnp.ones(3), jnp.ones((1, 3))):
        assert (jax.grad(loss)(scale) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("kind", ["plain", "masked", "weighted"])
def test_sums_in_float64_and_in_units_give_the_same_moments(kind, dtype):
    """What a CPU, a GPU and others do, and all as float64 has it."""
    where = masks(kind)
    r = _devices.Reduction((0, 1, 2))

    @jax.jit
    def all_(x, where):
        return (
            _measure._in_double(x, where, r, passes=2),
            _measure._in_double(x, where, r, passes=1),
            _measure._in_dtype(x, where, r, jnp.float32),
            _measure._in_dtype(x, where, r, jnp.float32, sampled=where is None),
        )

    for size in (2.0**-50, 1.0, 2.0**50, 2.0**66, 2.0**122):
        for shift in (0, 6):
            x = data(dtype)
            x = scaled(x + jnp.asarray(shift, x.dtype), size)
            x = _numbers.counted(x, where)
            weights = (
                np.ones(x.shape)
                if where is None
                else np.broadcast_to(np.asarray(where, np.float64), x.shape)
            )
            n = weights.sum((0, 1, 2), keepdims=True)
            mean = (weights * wide(x)).sum((0, 1, 2), keepdims=True) / n
            off = np.abs(wide(x) - mean)
            var = (weights * off**2).sum((0, 1, 2), keepdims=True) / n
            forms = all_(x, where)
            # From the mean of a sample, all of the way to the mean is rounded.
            for m, of_mean in zip(forms, (2e-7, 2e-7, 2e-7, 1e-6), strict=True):
                close(m.count, n, 1e-6)
                close(m.squares, (weights**2).sum((0, 1, 2), keepdims=True), 1e-6)
                close(wide(m.mean) + wide(m.rest), mean, of_mean)
                unit = wide(_moments.unit_of(m.var))
                close(np.abs(wide(m.var)) / unit**2, var, 2e-6)
            assert len({bytes(np.asarray(m.var < 0)) for m in forms}) == 1


@pytest.mark.parametrize("size", [1e-10, 0.1, 7.0, 1e6, 3e38])
def test_values_all_alike_have_a_variance_of_zero_on_a_gpu_too(size):
    """Where one pass leaves rounding alone; one that differs is seen."""
    x = jnp.full((1000, 3), size).at[0, 1].multiply(1 - 2.0**-9)
    r = _devices.Reduction((0,))
    m = jax.jit(lambda x: _measure._in_double(x, None, r, passes=1))(x)
    var = np.abs(wide(m.var)) / wide(_moments.unit_of(m.var)) ** 2
    assert var[0, 0] == var[0, 2] == 0
    close(var[:, 1], wide(x)[:, 1].var(0, keepdims=True), 1e-5)
    close(wide(m.mean) + wide(m.rest), wide(x).mean(0, keepdims=True), 2e-7)


def test_small_values_are_normalized_beside_epsilon():
    """Down to the smallest normal numbers; a platform may take smaller ones for 0."""
    x = data("float32", (4, 6))
    for size in (1e-10, 1e-18, 1e-30, 2.0**-120):
        small = x * jnp.float32(size)
        want = wide(small) - wide(small).mean(-1, keepdims=True)
        want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
        close(normjax.layer_norm(small, epsilon=1e-6), want, 3e-6)
        of_rms = wide(small) / np.sqrt(
            (wide(small) ** 2).mean(-1, keepdims=True) + 1e-6
        )
        close(normjax.rms_norm(small, epsilon=1e-6), of_rms, 3e-6)


def test_a_batch_in_which_one_row_is_large_leaves_the_others_as_they_are():
    x = data("float32", (4, 8))
    alone = normjax.layer_norm(x)
    beside = normjax.layer_norm(x.at[1].multiply(2.0**120))
    np.testing.assert_array_equal(beside[2:], alone[2:])
    bad = normjax.layer_norm(x.at[1, 0].set(jnp.inf))
    assert jnp.isnan(bad[1]).any() and (bad[2:] == alone[2:]).all()


@pytest.mark.parametrize("ghosts", [None, 2])
def test_nan_that_does_not_count_is_no_fault_to_debug_nans(ghosts):
    """Outside of jit, where JAX looks at each result, too."""
    where = np.arange(4)[None, :, None] < 3
    x = jnp.asarray(np.where(where, np.ones((4, 4, 1), np.float32), np.nan))
    with jax.debug_nans(True):
        y, m = normjax.batch_norm(x, where=where, virtual_batch_size=ghosts)
        assert (y == 0).all() and (m.mean == 1).all()
        for norm in (normjax.layer_norm, normjax.rms_norm):
            assert jnp.isfinite(norm(x, axis=1, where=where)).all()
        assert (normjax.moments(x, 1, where=where).mean == 1).all()
        assert (normjax.group_norm(x, num_groups=1, where=where) == 0).all()
