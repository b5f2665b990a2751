"""The five norms as functions: formula, identities, shapes, dtypes, masks, edges."""

import functools

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import EPSILON, FAMILY, combined
from hypothesis import given, settings
from hypothesis import strategies as st

import normjax

pytestmark = pytest.mark.usefixtures("strict")

few = settings(max_examples=5, deadline=None, derandomize=True)
norms = pytest.mark.parametrize("norm", FAMILY)
centered = pytest.mark.parametrize("norm", [n for n in FAMILY if FAMILY[n].centered])


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def parameters(n, dtype=jnp.float32):
    return normal((n,), 1, dtype) + 1, normal((n,), 2, dtype)


def weights(shape, seed=5):
    """Weights from 0.1 to 2, some of them 0."""
    keys = jax.random.split(jax.random.key(seed))
    w = jax.random.uniform(keys[0], shape, minval=0.1, maxval=2)
    return jnp.where(jax.random.bernoulli(keys[1], 0.7, shape), w, jnp.zeros_like(w))


# The formula.


@norms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_norm_is_its_formula_in_every_dtype(norm, dtype, float64):
    x = normal((3, 4, 2, 6), dtype=dtype) * 3 + 1
    scale, bias = parameters(6, dtype)
    y = FAMILY[norm].call(x, scale, bias, None)
    assert y.dtype == x.dtype
    wide = (a.astype(jnp.float64) for a in (x, scale, bias))
    want = family.reference(FAMILY[norm], *wide)
    # y is computed in the dtype of the statistics and rounded once.
    error = np.abs(np.asarray(y.astype(jnp.float64) - want)).max()
    assert error <= family.tolerance(1, dtype, c=1) * np.abs(want).max() + (
        family.tolerance(24, max(dtype, "float32")) if dtype != "float64" else 1e-14
    )


@norms
@few
@given(data=st.data())
def test_norm_is_its_formula_under_any_mask_that_broadcasts(norm, data):
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([2, 4])))
    kept = data.draw(st.tuples(*[st.booleans()] * 4))
    mask_shape = tuple(n if k else 1 for n, k in zip(shape, kept, strict=True))
    seed = data.draw(st.integers(0, 99))
    where = jax.random.bernoulli(jax.random.key(seed), 0.6, mask_shape)
    x, (scale, bias) = normal(shape, seed + 1), parameters(shape[-1])

    @jax.jit  # one program for each shape, and not one for each operation
    def both(x, scale, bias, where):
        y = FAMILY[norm].call(jnp.where(where, x, jnp.nan), scale, bias, where)
        return y, family.reference(FAMILY[norm], x, scale, bias, where)

    y, want = both(x, scale, bias, where)
    # Few values may lie close together, and epsilon then is most of the variance.
    np.testing.assert_allclose(y, want, atol=2e-4)
    wide = np.broadcast_to(where, shape)
    assert (np.asarray(y)[~wide] == 0).all()


@norms
@few
@given(rank=st.integers(1, 5), at=st.integers(-5, 4), seed=st.integers(0, 9))
def test_features_may_lie_on_any_axis(norm, rank, at, seed):
    at = at % rank - (rank if at < 0 else 0)
    x = normal((2, 3, 2, 4)[4 - rank :] if rank < 5 else (2, 1, 3, 2, 4), seed)
    scale, bias = parameters(4)
    f = {
        "batch": lambda x, a: normjax.batch_norm(x, scale, bias, feature_axis=a)[0],
        "layer": lambda x, a: normjax.layer_norm(x, scale, bias, axis=a),
        "rms": lambda x, a: normjax.rms_norm(x, scale, axis=a),
        "group": lambda x, a: normjax.group_norm(
            x, scale, bias, num_groups=2, feature_axis=a
        ),
        "instance": lambda x, a: normjax.instance_norm(x, scale, bias, feature_axis=a),
    }[norm]
    got = jnp.moveaxis(f(jnp.moveaxis(x, -1, at), at), at, -1)
    np.testing.assert_allclose(got, f(x, -1), atol=1e-5)


def test_several_feature_axes_are_one_long_feature_axis():
    x = normal((3, 5, 2, 6))
    scale, bias = normal((2, 6), 1), normal((2, 6), 2)
    flat = x.reshape(3, 5, 12)
    for f in (
        lambda x, s, b, a: normjax.batch_norm(x, s, b, feature_axis=a)[0],
        lambda x, s, b, a: normjax.layer_norm(x, s, b, axis=a),
        lambda x, s, b, a: normjax.instance_norm(x, s, b, feature_axis=a),
        lambda x, s, b, a: normjax.group_norm(x, s, b, num_groups=4, feature_axis=a),
    ):
        want = f(flat, scale.reshape(12), bias.reshape(12), -1).reshape(x.shape)
        np.testing.assert_allclose(f(x, scale, bias, (2, 3)), want, atol=1e-5)
        crossed = f(x.swapaxes(2, 3), scale, bias, (3, 2)).swapaxes(2, 3)
        np.testing.assert_allclose(crossed, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3)])
def test_parameters_along_all_axes_lie_as_x_does(shape):
    x, scale = normal(shape), normal(shape, 1)
    want = normjax.layer_norm(x, axis=(1, 0)) * scale
    got = normjax.layer_norm(x, scale, axis=(1, 0))
    np.testing.assert_allclose(got, want, atol=1e-6)
    m = normjax.Moments(*(jnp.full(shape, v) for v in (1.0, 0.0, 1.0)))
    got, _ = normjax.batch_norm(x, scale, moments=m, feature_axis=(1, 0), epsilon=1e-9)
    np.testing.assert_allclose(got, x * scale, atol=1e-6)


def test_parameters_of_the_rank_of_x_adapt_by_sample():
    x, scale = normal((3, 5, 4)), normal((3, 1, 4), 1)
    want = normjax.instance_norm(x) * scale
    np.testing.assert_allclose(normjax.instance_norm(x, scale), want, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "shape", "masked"),
    combined(FAMILY, [(1, 4, 2, 6), (3, 1, 2, 6), (1, 4, 1, 6)], [False, True]),
)
def test_axes_of_size_one_change_nothing(norm, shape, masked):
    """They are left out inside; values, gradients and moments are those of float64."""
    x, (scale, bias) = normal(shape) * 3 + 1, parameters(6)
    where = jax.random.bernoulli(jax.random.key(7), 0.7, shape) if masked else None

    def loss(f, *args):
        y = f(*args, where)
        return (jnp.sin(y) * normal(shape, 9)).sum(), y

    (ours, y), (theirs, want) = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(
            x, scale, bias
        )
        for f in (
            FAMILY[norm].call,
            functools.partial(family.reference, FAMILY[norm]),
        )
    )
    # A set may be of few values, whose variance is small, or of one, whose is 0.
    np.testing.assert_allclose(y, want, atol=2e-4)
    for a, b in zip(ours, theirs, strict=True):
        size = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=2e-4 * size)


# Weights and complex values.


@pytest.mark.parametrize(
    ("norm", "dtype", "weighted"),
    combined(FAMILY, ["complex64", "complex128", "float32", "bfloat16"], [False, True]),
)
def test_weighted_and_complex_norm_is_its_formula(norm, dtype, weighted, float64):
    x = normal((3, 4, 2, 6), dtype=dtype) * 3 + 1
    scale, bias = parameters(6, dtype)
    where = weights((3, 4, 1, 6)) if weighted else None
    y = FAMILY[norm].call(x, scale, bias, where)
    assert y.dtype == x.dtype
    wide = jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64
    operands = (a.astype(wide) for a in (x, scale, bias))
    where = None if where is None else where.astype(jnp.float64)
    want = family.reference(FAMILY[norm], *operands, where)
    error = np.abs(np.asarray(y.astype(wide) - want)).max()
    size = np.abs(want).max()
    # Of weights of float32 the sums are of no more digits than those of y.
    own = family.tolerance(1, dtype, c=1) if dtype == "bfloat16" else 0
    assert error <= (own + family.tolerance(24, jnp.finfo(dtype).dtype)) * size


@norms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scale_of_the_weights_does_not_matter(norm, dtype):
    x, w = normal((3, 4, 2, 6)), weights((3, 4, 1, 1)).astype(dtype)
    y, z = (FAMILY[norm].call(x, None, None, c * w) for c in (1, 4))
    np.testing.assert_allclose(y, z, atol=family.tolerance(24, jnp.float32))
    boolean = FAMILY[norm].call(x, None, None, jnp.ones_like(w, dtype=bool))
    ones = FAMILY[norm].call(x, None, None, jnp.ones_like(w))
    np.testing.assert_allclose(ones, boolean, atol=family.tolerance(24, jnp.float32))


@norms
def test_whole_weights_are_copies_of_rows(norm):
    """Of the second axis, which every norm but batch norm of one sample reduces."""
    x, (scale, bias) = normal((1, 4, 2, 6)), parameters(6)
    times = np.array([2, 0, 1, 3])
    copies = np.repeat(np.arange(4), times)
    w = jnp.asarray(times, jnp.float32)[None, :, None, None]
    y = FAMILY[norm].call(x, scale, bias, w)
    want = FAMILY[norm].call(x[:, copies], scale, bias, None)
    tolerance = family.tolerance(36, jnp.float32) * float(jnp.abs(want).max())
    np.testing.assert_allclose(y[:, copies], want, atol=tolerance)
    assert (y[:, 1] == 0).all()


@norms
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_value_of_weight_zero_leaves_no_trace(norm, bad):
    x, (scale, bias), w = normal((3, 4, 2, 6)), parameters(6), weights((3, 4, 1, 6))

    def loss(x, scale, bias, w):
        return jnp.sin(FAMILY[norm].call(x, scale, bias, w)).sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    want = gradient(jnp.where(w > 0, x, jnp.zeros_like(x)), scale, bias, w)
    got = gradient(jnp.where(w > 0, x, jnp.full_like(x, bad)), scale, bias, w)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    dx, dw = got[1][0], got[1][3]
    assert (jnp.where(w > 0, jnp.zeros_like(dx), dx) == 0).all()
    assert (jnp.where(w > 0, jnp.zeros_like(dw), dw) == 0).all()
    assert (jnp.where(w > 0, dw, jnp.ones_like(dw)) != 0).any()


@norms
def test_weights_of_all_zero_give_zeros_and_finite_gradients(norm):
    x, (scale, bias), w = normal((3, 4, 2, 6)), parameters(6), jnp.zeros((3, 4, 1, 1))

    def loss(x, scale, bias, w):
        y = FAMILY[norm].call(x, scale, bias, w)
        return jnp.sin(y).sum(), y

    grads, y = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, scale, bias, w)
    assert (y == 0).all()
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, jnp.zeros_like(a)), grads)


@norms
def test_a_turn_of_complex_x_turns_y(norm):
    x, turn = normal((3, 4, 2, 6), dtype=jnp.complex64), jnp.exp(jnp.complex64(0.7j))
    y = FAMILY[norm].call(x, None, None, None)
    z = FAMILY[norm].call(turn * x, None, None, None)
    np.testing.assert_allclose(z, turn * y, atol=family.tolerance(24, jnp.float32) * 3)
    real = FAMILY[norm].call(x.real, None, None, None)
    as_complex = FAMILY[norm].call(x.real.astype(x.dtype), None, None, None)
    np.testing.assert_allclose(as_complex.real, real, atol=1e-6)
    assert (as_complex.imag == 0).all()


def test_complex_scale_of_real_x_makes_y_complex_where_it_may():
    x, scale = normal((3, 6)), normal((6,), 1, jnp.complex64)
    y = normjax.layer_norm(x, scale, dtype=jnp.complex64)
    want = normjax.layer_norm(x).astype(y.dtype) * scale[None]
    assert y.dtype == jnp.complex64
    np.testing.assert_allclose(y, want, atol=family.tolerance(6, jnp.float32))


@norms
def test_dtype_is_that_of_y_alone(norm):
    x = normal((3, 4, 2, 6)) + 1000
    call = {
        "batch": lambda **k: normjax.batch_norm(x, **k)[0],
        "layer": lambda **k: normjax.layer_norm(x, **k),
        "rms": lambda **k: normjax.rms_norm(x, **k),
        "group": lambda **k: normjax.group_norm(x, num_groups=2, **k),
        "instance": lambda **k: normjax.instance_norm(x, **k),
    }[norm]
    y = call(dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, call().astype(jnp.bfloat16))


def test_float64_output_of_float32_input_is_computed_in_float64(float64):
    x = normal((4, 8)) + 1000
    want = normjax.layer_norm(x.astype(jnp.float64))
    np.testing.assert_array_equal(normjax.layer_norm(x, dtype=jnp.float64), want)


# The identities of the table.


def test_group_norm_of_one_feature_a_group_is_instance_norm():
    x, (s, b) = normal((3, 4, 2, 6)), parameters(6)
    got = normjax.group_norm(x, s, b, num_groups=6)
    np.testing.assert_allclose(got, normjax.instance_norm(x, s, b), atol=1e-6)


def test_group_norm_of_one_group_is_layer_norm_over_all_but_the_batch():
    x = normal((3, 4, 2, 6))
    got = normjax.group_norm(x, num_groups=1)
    np.testing.assert_allclose(got, normjax.layer_norm(x, axis=(1, 2, 3)), atol=2e-6)


def test_batch_norm_of_one_sample_is_instance_norm():
    x, (s, b) = normal((1, 4, 2, 6)), parameters(6)
    got = normjax.batch_norm(x, s, b, epsilon=1e-6)[0]
    np.testing.assert_allclose(got, normjax.instance_norm(x, s, b), atol=1e-6)


def test_rms_norm_is_layer_norm_on_data_of_zero_mean():
    x = normal((3, 8))
    x = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(normjax.rms_norm(x), normjax.layer_norm(x), atol=1e-6)


def test_masked_batch_norm_is_that_of_the_compacted_batch():
    x, where = normal((9, 6)), jnp.arange(9)[:, None] % 3 > 0
    y, m = normjax.batch_norm(jnp.where(where, x, jnp.inf), where=where)
    kept = np.flatnonzero(where[:, 0])
    want, want_m = normjax.batch_norm(x[kept])
    np.testing.assert_allclose(y[kept], want, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), m, want_m)


@centered
def test_scale_and_shift_of_x_do_not_matter(norm, float64):
    x = normal((3, 4, 2, 6), dtype="float64")
    call = FAMILY[norm].call
    spread = 1e5  # epsilon then is nothing beside the variance
    want = call(spread * x, None, None, None)
    np.testing.assert_allclose(
        call(7 * spread * x + 5, None, None, None), want, atol=1e-12
    )


@norms
def test_gradient_is_orthogonal_to_one_and_to_x_hat(norm, float64):
    x = 1e5 * normal((3, 4, 2, 6), dtype="float64")
    row, w = FAMILY[norm], normal((3, 4, 2, 6), 5, "float64")
    dx = jax.grad(lambda x: (row.call(x, None, None, None) * w).sum())(x)
    x_hat = row.call(x, None, None, None)
    whole = (3, 4, 2, 2, 3) if row.groups else x.shape
    axes = (*row.axes, 4) if row.groups else row.axes
    size = jnp.abs(dx).max()
    if row.centered:
        assert jnp.abs(dx.reshape(whole).sum(axes)).max() < 1e-12 * size
    assert jnp.abs((dx * x_hat).reshape(whole).sum(axes)).max() < 1e-9 * size


# Given moments.


def test_batch_norm_by_given_moments_is_normalize_and_returns_them():
    x, (s, b) = normal((6, 4)), parameters(4)
    m = normjax.batch_norm(normal((9, 4), 3))[1]
    y, same = normjax.batch_norm(x, s, b, moments=m)
    assert same is m
    np.testing.assert_array_equal(y, normjax.normalize(x, m, s, b, epsilon=1e-5))
    want = (x - m.mean[None]) / jnp.sqrt(m.var[None] + 1e-5) * s[None] + b[None]
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_given_moments_do_not_depend_on_x():
    x, (s, _) = normal((6, 4)), parameters(4)
    m = normjax.batch_norm(x)[1]
    dx = jax.grad(lambda x: normjax.batch_norm(x, s, moments=m)[0].sum())(x)
    want = jnp.broadcast_to((s / jnp.sqrt(m.var + 1e-5))[None], x.shape)
    np.testing.assert_allclose(dx, want, rtol=1e-5)


def test_normalize_is_zero_under_the_mask_in_inference_too():
    x, where = normal((6, 4)), jnp.arange(6)[:, None] < 4
    m = normjax.batch_norm(x)[1]
    bias = jnp.ones(4)
    y, _ = normjax.batch_norm(
        jnp.where(where, x, jnp.nan), None, bias, where=where, moments=m
    )
    assert (y[4:] == 0).all() and jnp.isfinite(y).all()


# What is defined at the edges.


@norms
def test_everything_masked_gives_zeros_and_finite_gradients(norm):
    x, (s, b) = jnp.full((3, 4, 2, 6), jnp.nan), parameters(6)
    where = jnp.zeros((1, 1, 1, 1), bool)

    def f(x, s, b):
        return FAMILY[norm].call(x, s, b, where)

    assert (f(x, s, b) == 0).all()
    grads = jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))(x, s, b)
    assert all((g == 0).all() for g in grads)


@norms
@pytest.mark.parametrize("shape", [(0, 4, 2, 6), (3, 0, 2, 6)])
def test_an_empty_array_is_normalized_to_an_empty_one(norm, shape):
    x, (s, b) = jnp.zeros(shape), parameters(6)
    assert FAMILY[norm].call(x, s, b, None).shape == shape
    grads = jax.grad(lambda *a: FAMILY[norm].call(*a, None).sum(), (0, 1, 2))(x, s, b)
    assert grads[0].shape == shape and all(jnp.isfinite(g).all() for g in grads)


def test_an_empty_batch_has_count_zero_mean_zero_var_one():
    _, m = normjax.batch_norm(jnp.zeros((0, 3)))
    assert (m.count == 0).all() and (m.mean == 0).all() and (m.var == 1).all()


def test_a_batch_of_one_has_no_variance_and_gives_the_bias():
    s, b = parameters(3)
    y, m = normjax.batch_norm(normal((1, 3)) * 100, s, b)
    assert (m.var == 0).all() and (m.count == 1).all()
    np.testing.assert_array_equal(y, b[None])


@centered
def test_a_constant_channel_gives_the_bias_and_a_finite_gradient(norm):
    x, (s, b) = jnp.full((3, 4, 2, 6), 7.0), parameters(6)
    y = FAMILY[norm].call(x, s, b, None)
    np.testing.assert_array_equal(y, jnp.broadcast_to(b[None, None, None], x.shape))
    dx = jax.grad(lambda x: (FAMILY[norm].call(x, s, b, None) ** 2).sum())(x)
    assert jnp.isfinite(dx).all()


@norms
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_bad_value_spoils_only_the_moments_it_belongs_to(norm, bad):
    x, (s, b) = normal((3, 4, 2, 6)), parameters(6)
    y = FAMILY[norm].call(x.at[1, 2, 1, 4].set(bad), s, b, None)
    # The values that share moments with it: those that feel it.
    touched = jax.grad(lambda x: FAMILY[norm].call(x, s, b, None)[1, 2, 1, 4] ** 2)(x)
    untouched = np.asarray(touched == 0)
    clean = FAMILY[norm].call(x, s, b, None)
    assert untouched.any() and not untouched.all()
    np.testing.assert_array_equal(y[untouched], clean[untouched])
    assert not np.isfinite(y[~untouched]).all()


@norms
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_value_under_the_mask_leaves_no_trace(norm, bad):
    x, (s, b) = normal((3, 4, 2, 6)), parameters(6)
    where = jnp.ones(x.shape, bool).at[1, 2].set(False)
    w = normal(x.shape, 7)

    def loss(x, s, b):
        return (FAMILY[norm].call(x, s, b, where) * w).sum()

    dirty = jnp.where(where, x, bad)
    clean = jax.value_and_grad(loss, (0, 1, 2))(jnp.where(where, x, 0.0), s, b)
    found = jax.value_and_grad(loss, (0, 1, 2))(dirty, s, b)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@norms
@pytest.mark.parametrize("size", [1e15, 1e-15])
def test_huge_and_tiny_values_are_normalized(norm, size):
    x = normal((3, 4, 2, 6))
    y = FAMILY[norm].call(x * size, None, None, None)
    assert jnp.isfinite(y).all()
    if size > 1:
        want = FAMILY[norm].call(x * 1e4, None, None, None)
        np.testing.assert_allclose(y, want, atol=1e-5)
    else:  # epsilon rules: y = (x - mean) / sqrt(epsilon)
        assert jnp.abs(y).max() < 4 * size / family.EPSILON**0.5
        assert (y != 0).any()
    dx = jax.grad(lambda x: (FAMILY[norm].call(x, None, None, None) ** 3).sum())(
        x * size
    )
    assert jnp.isfinite(dx).all()


@norms
def test_float16_near_overflow_is_normalized(norm):
    x = normal((3, 4, 2, 6))
    x = (x / jnp.abs(x).max() * 60000).astype(jnp.float16)
    y = FAMILY[norm].call(x, None, None, None)
    want = FAMILY[norm].call(x.astype(jnp.float32), None, None, None)
    np.testing.assert_array_equal(y, want.astype(jnp.float16))


@norms
def test_functions_take_numpy_arrays_and_work_under_jit_and_vmap(norm):
    x, (s, b) = normal((2, 3, 4, 2, 6)), parameters(6)
    call = FAMILY[norm].call
    each = jnp.stack([call(np.asarray(a), s, b, None) for a in x])
    mapped = jax.jit(jax.vmap(lambda a: call(a, s, b, None)))(x)
    np.testing.assert_allclose(mapped, each, atol=1e-6)


def test_normalize_uses_both_parts_of_the_mean():
    """At mean / std = 1e5 float32 alone holds a mean to 4e-3 of the deviation."""
    x = normal((64, 5)) + 1e5
    y = normjax.normalize(x, normjax.moments(x, 0), epsilon=EPSILON)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)
    atol = family.tolerance(64, jnp.float32) * np.abs(want).max()
    np.testing.assert_allclose(y, want, rtol=0, atol=atol)
