"""Bad input: every error says the rule, the facts and what to do, and harms nothing."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from flax import nnx as flax_nnx
from jax.sharding import PartitionSpec as P

import normjax
from normjax import linen, nnx

x = jnp.zeros((2, 8, 8, 32))
FUNCTIONS = {
    "batch_norm": normjax.batch_norm,
    "layer_norm": normjax.layer_norm,
    "rms_norm": normjax.rms_norm,
    "group_norm": lambda x, *a, **k: normjax.group_norm(x, *a, num_groups=2, **k),
    "instance_norm": normjax.instance_norm,
    "moments": lambda x, **k: normjax.moments(x, 0, **k),
    "normalize": lambda x, **k: normjax.normalize(x, GIVEN, **{"epsilon": 1e-6, **k}),
}
GIVEN = normjax.Moments(jnp.ones(32), jnp.zeros(32), jnp.ones(32))
every = pytest.mark.parametrize("name", FUNCTIONS)
WITH_EPSILON = [n for n in FUNCTIONS if n != "moments"]
WITH_NAMES = [n for n in FUNCTIONS if n != "normalize"]


@contextlib.contextmanager
def raises(kind, message):
    """Compares the whole message, without the notes that jax adds."""
    with pytest.raises(kind) as caught:
        yield
    assert str(caught.value) == message


@every
def test_rank_zero(name):
    message = "x must have at least one axis. Got x.shape=(). Pass x[None]."
    with raises(ValueError, f"{name}: {message}"):
        FUNCTIONS[name](jnp.float32(1))


@every
@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_x_that_is_not_floating(name, dtype):
    message = (
        "x must be floating, because its mean and its normalized values are not"
        f" integers. Got x.dtype={dtype}. Pass x.astype(jnp.float32)."
    )
    with raises(TypeError, f"{name}: {message}"):
        FUNCTIONS[name](x.astype(dtype))


@pytest.mark.parametrize("name", WITH_EPSILON)
def test_complex_x_with_a_real_y(name):
    message = (
        f"{name}: y must be complex, since x is. Got x.dtype=complex64, dtype of y"
        " bfloat16. Pass dtype=jnp.complex64, or the real part alone."
    )
    with raises(TypeError, message):
        FUNCTIONS[name](x.astype(jnp.complex64), dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", WITH_EPSILON)
def test_complex_scale_with_a_real_y(name):
    message = (
        f"{name}: y must be complex, since scale is. Got scale.dtype=complex64, dtype of"
        " y float32. Pass dtype=jnp.complex64, or the real part alone."
    )
    with raises(TypeError, message):
        FUNCTIONS[name](x, scale=jnp.ones(32, jnp.complex64))


def test_real_running_moments_with_complex_values():
    message = (
        "RunningMoments.update: running moments of complex values must be complex. Got"
        " moments.mean.dtype=complex64, running mean.dtype=float32. Start with"
        " RunningMoments.init(shape, jnp.complex64)."
    )
    _, m = normjax.batch_norm(x.astype(jnp.complex64))
    with raises(TypeError, message):
        normjax.RunningMoments.init((32,)).update(m)


@pytest.mark.parametrize(
    "name", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
)
@pytest.mark.parametrize("shape", [(31,), (1,), (8, 32), (2, 8, 8, 16), (), (32, 1)])
def test_scale_that_fits_neither_rule(name, shape):
    message = (
        f"{name}: scale must have shape (32,), to lie along axes (3,) of x, or the rank"
        f" of x and broadcast to it. Got scale.shape={shape}, x.shape=(2, 8, 8, 32)."
        " Reshape scale, or pass the axes that it lies along."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, jnp.ones(shape))


def test_bias_that_fits_neither_rule():
    message = (
        "layer_norm: bias must have shape (8, 32), to lie along axes (2, 3) of x, or the"
        " rank of x and broadcast to it. Got bias.shape=(32,), x.shape=(2, 8, 8, 32)."
        " Reshape bias, or pass the axes that it lies along."
    )
    with raises(ValueError, message):
        normjax.layer_norm(x, None, jnp.ones(32), axis=(2, 3))


def test_scale_that_is_not_floating():
    message = (
        "batch_norm: scale must be floating or complex. Got scale.dtype=int32. Pass"
        " scale.astype(jnp.float32)."
    )
    with raises(TypeError, message):
        normjax.batch_norm(x, jnp.ones(32, jnp.int32))


@pytest.mark.parametrize(
    ("groups", "nearest"), [(6, "4 or 8"), (0, "1"), (64, "32"), (-1, "1")]
)
def test_groups_that_do_not_divide(groups, nearest):
    message = (
        "group_norm: num_groups must divide the number of features. Got"
        f" num_groups={groups}, x.shape=(2, 8, 8, 32). Nearest: {nearest}."
    )
    with raises(ValueError, message):
        normjax.group_norm(x, num_groups=groups)


def test_groups_that_are_no_integer():
    message = (
        "group_norm: num_groups must be an integer. Got num_groups=2.0. Pass"
        " num_groups=32, say."
    )
    with raises(TypeError, message):
        normjax.group_norm(x, num_groups=2.0)


AXIS = {
    "layer_norm": "axis",
    "rms_norm": "axis",
    "batch_norm": "feature_axis",
    "group_norm": "feature_axis",
    "instance_norm": "feature_axis",
    "normalize": "feature_axis",
}


@pytest.mark.parametrize("name", AXIS)
@pytest.mark.parametrize("axis", [4, -5, (0, 9)])
def test_axes_out_of_range(name, axis):
    what = AXIS[name]
    message = (
        f"{name}: {what} must lie in [-4, 4), since x has 4 axes. Got {what}={axis}."
        f" Pass {what}=-1, say."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, **{what: axis})


@pytest.mark.parametrize("name", AXIS)
def test_axes_given_twice(name):
    what = AXIS[name]
    message = (
        f"{name}: {what} must name each axis once. Got {what}=(3, -1) for 4 axes. Pass"
        f" {what}=(3,)."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, **{what: (3, -1)})


@pytest.mark.parametrize("name", AXIS)
def test_axes_that_are_no_integers(name):
    what = AXIS[name]
    message = (
        f"{name}: {what} must be an integer or several. Got {what}=1.0. Pass {what}=-1,"
        " say."
    )
    with raises(TypeError, message):
        FUNCTIONS[name](x, **{what: 1.0})


@pytest.mark.parametrize("name", ["group_norm", "instance_norm"])
def test_reduced_and_feature_axes_in_conflict(name):
    message = (
        f"{name}: axis, the axes reduced, must not contain a feature axis. Got"
        " axis=(1, 3), feature axes (3,) of 4. Pass axis=(1,)."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, axis=(1, 3))


@pytest.mark.parametrize("name", WITH_EPSILON)
@pytest.mark.parametrize("epsilon", [-1e-6, float("nan"), float("inf")])
def test_epsilon_that_is_no_size(name, epsilon):
    message = (
        f"{name}: epsilon must be a number above zero. Got epsilon={epsilon}. Pass"
        " epsilon=1e-6, say."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, epsilon=epsilon)


@pytest.mark.parametrize("name", WITH_EPSILON)
@pytest.mark.parametrize("epsilon", [0, 0.0, 1e-60])
def test_epsilon_that_is_zero_in_the_dtype_of_the_statistics(name, epsilon):
    message = (
        f"{name}: epsilon must be above zero in the dtype of the statistics, float32."
        f" Got epsilon={float(epsilon)}, and the smallest normal float32 is 1.18e-38."
        " Pass epsilon=1e-6, say."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, epsilon=epsilon)


def test_epsilon_may_be_smaller_in_float64(float64):
    wide = jnp.arange(4.0, dtype=jnp.float64)
    assert jnp.isfinite(normjax.layer_norm(wide, epsilon=1e-60)).all()


@pytest.mark.parametrize("name", WITH_EPSILON)
def test_epsilon_that_is_infinite_in_the_dtype_of_the_statistics(name):
    """In float32 it made y zero."""
    message = (
        f"{name}: epsilon must be finite in the dtype of the statistics, float32. Got"
        " epsilon=1e+39, and the largest float32 is 3.4e+38. Pass epsilon=1e-6, say."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, epsilon=1e39)


@pytest.mark.parametrize("name", WITH_EPSILON)
@pytest.mark.parametrize(
    ("epsilon", "got"),
    [
        (True, "epsilon=True"),
        (np.True_, "epsilon=np.True_"),
        ("1e-5", "epsilon='1e-5'"),
        (1e-5j, "epsilon=1e-05j"),
        (object(), "epsilon of type object"),
    ],
)
def test_epsilon_that_is_no_number(name, epsilon, got):
    message = f"{name}: epsilon must be a number above zero. Got {got}. Pass epsilon=1e-6, say."
    with raises(TypeError, message):
        FUNCTIONS[name](x, epsilon=epsilon)


def test_epsilon_that_is_left_to_the_dtype():
    message = (
        "rms_norm: epsilon must be a number above zero. Got epsilon=None. Pass"
        " jnp.finfo(jnp.float32).eps, PyTorch's None for up to float32."
    )
    with raises(TypeError, message):
        normjax.rms_norm(x, epsilon=None)
    normjax.rms_norm(x, epsilon=jnp.finfo(jnp.float32).eps)


def test_epsilon_of_each_feature():
    message = (
        "rms_norm: epsilon must be one number, for all features. Got epsilon.shape=(32,)."
        " Pass epsilon=1e-6, say."
    )
    with raises(TypeError, message):
        normjax.rms_norm(x, epsilon=jnp.full(32, 1e-6))
    with raises(TypeError, message):
        jax.jit(lambda e: normjax.rms_norm(x, epsilon=e))(jnp.full(32, 1e-6))


@pytest.mark.parametrize("momentum", [True, "0.9", None, 0.9j])
def test_momentum_that_is_no_number(momentum):
    message = (
        "RunningMoments.update: momentum is the part of the old value that is kept and"
        f" must lie in [0, 1]. Got momentum={momentum!r}. Pass momentum=0.99, say."
    )
    with raises(TypeError, message):
        normjax.RunningMoments.init((32,)).update(GIVEN, momentum=momentum)


@pytest.mark.parametrize("momentum", [True, "0.9"])
@pytest.mark.parametrize("call", [False, True])
def test_momentum_of_a_module_that_is_no_number(momentum, call):
    message = (
        "BatchNorm: momentum is the part of the old value that is kept and must lie in"
        f" [0, 1]. Got momentum={momentum!r}. Pass momentum=0.99, say."
    )
    norm = linen.BatchNorm(False, **({} if call else {"momentum": momentum}))
    variables = norm.init(jax.random.key(0), x)
    with raises(TypeError, message):
        given = {"momentum": momentum} if call else {}
        norm.apply(variables, x, **given, mutable=["batch_stats"])


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_its_range(momentum):
    running = normjax.RunningMoments.init((32,))
    message = (
        "momentum is the part of the old value that is kept and must lie in [0, 1]. Got"
        f" momentum={momentum}. PyTorch's momentum m is momentum=1 - m here."
    )
    with raises(ValueError, f"RunningMoments.update: {message}"):
        running.update(GIVEN, momentum=momentum)
    norm = linen.BatchNorm(use_running_average=False, momentum=momentum)
    variables = norm.init(jax.random.key(0), x)
    with raises(ValueError, f"BatchNorm: {message}"):
        norm.apply(variables, x, mutable=["batch_stats"])


@every
@pytest.mark.parametrize("shape", [(3, 8, 8, 32), (8, 31), (1, 2, 8, 8, 32)])
def test_where_that_does_not_broadcast(name, shape):
    message = (
        f"{name}: where must broadcast to x. Got where.shape={shape}, x.shape=(2, 8, 8,"
        " 32). Pass a where whose axes, from the last, are 1 or those of x."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, where=jnp.ones(shape, bool))


@every
def test_where_with_one_axis_less_than_x(name):
    message = (
        f"{name}: where must not have one axis less than x, because then it is not clear"
        " which axis is missing. Got where.shape=(8, 8, 32), x.shape=(2, 8, 8, 32). Pass"
        " where[..., None] if the features are the last axis."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, where=jnp.ones((8, 8, 32), bool))


@every
@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_where_that_is_neither_boolean_nor_floating(name, dtype):
    message = (
        f"{name}: where must be boolean, True where a value counts, or floating, the"
        f" weight with which it counts. Got where.dtype={dtype}. Pass"
        " where.astype(bool) or where.astype(jnp.float32)."
    )
    with raises(TypeError, message):
        FUNCTIONS[name](x, where=jnp.ones(x.shape, dtype))


@every
@pytest.mark.parametrize("worst", [-0.5, float("nan"), float("inf")])
def test_weights_that_are_negative_or_not_finite(name, worst):
    message = (
        f"{name}: weights must be finite and not negative. Got where with {worst} in it."
        " Pass jnp.clip(where, 0), or leave values out with weight 0."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, where=jnp.ones(x.shape).at[0, 1].set(worst))


def not_bound(name, axis, axes):
    return (
        f"{name}: axis_name must name an axis of the pmap, shard_map or vmap around the"
        f" call. Got axis_name='{axis}'; the mesh in use has {axes}. Call it inside one"
        " of those; under jit over sharded arrays leave axis_name=None, the statistics"
        " are synced without it."
    )


@pytest.mark.parametrize("name", WITH_NAMES)
def test_axis_name_that_is_bound_nowhere(name):
    with raises(ValueError, not_bound(name, "data", "no axes")):
        FUNCTIONS[name](x, axis_name="data")


@pytest.mark.parametrize("name", WITH_NAMES)
def test_axis_name_that_the_mesh_does_not_have(name):
    def local(x):
        FUNCTIONS[name](x, axis_name=("rows", "data"))

    devices = mesh((2, 4), ("rows", "columns"))
    with raises(ValueError, not_bound(name, "data", "('rows', 'columns')")):
        jax.shard_map(local, mesh=devices, in_specs=P("rows"), out_specs=P())(x)


@pytest.mark.parametrize("axis_name", [0, True, {"d"}, {"d": 1}])
def test_axis_name_that_is_no_name(axis_name):
    message = (
        "batch_norm: axis_name must be the name of a device axis, or a tuple of names."
        f" Got axis_name={axis_name!r}. Pass axis_name='data', say."
    )
    with raises(TypeError, message):
        jax.vmap(lambda x: normjax.batch_norm(x, axis_name=axis_name), axis_name="d")(x)


def test_axis_name_given_twice():
    message = (
        "batch_norm: axis_name must name each axis once. Got axis_name=('d', 'd'). Leave"
        " out the second one."
    )
    with raises(ValueError, message):
        jax.vmap(lambda x: normjax.batch_norm(x, axis_name=("d", "d")), axis_name="d")(
            x
        )


@pytest.mark.parametrize(
    ("groups", "faults"),
    [
        ([[0, 1], [2]], "missing: [3]"),
        ([[0, 1], [1, 2, 3]], "twice: [1]"),
        ([[0, 1, 2, 3], [4]], "not there: [4]"),
        ([[0, 0], [7]], "missing: [1, 2, 3], twice: [0], not there: [7]"),
    ],
)
@pytest.mark.parametrize("name", WITH_NAMES)
def test_sub_groups_that_do_not_divide_the_devices(name, groups, faults):
    message = (
        f"{name}: axis_index_groups must name each device of axis_name once, and no group"
        f" be empty. Got axis_index_groups={groups} for 4 devices, {faults}. Pass"
        " [[0, 1], [2, 3]], say."
    )

    def local(x):
        FUNCTIONS[name](x, axis_name="d", axis_index_groups=groups)

    with raises(ValueError, message):
        jax.vmap(local, axis_name="d")(x[0, :4, None])


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], 4, [[0.9, 1.0], [2, 3]]])
def test_sub_groups_that_are_no_lists_of_numbers(groups):
    message = (
        "batch_norm: axis_index_groups must be lists of device numbers, or None. Got"
        f" axis_index_groups={groups}. Pass [[0, 1], [2, 3]], say."
    )

    def local(x):
        normjax.batch_norm(x, axis_name="d", axis_index_groups=groups)

    with raises(TypeError, message):
        jax.vmap(local, axis_name="d")(x[0, :4, None])


def test_sub_groups_of_one_device():
    """What it says to type must itself be right."""
    message = (
        "batch_norm: axis_index_groups must name each device of axis_name once, and no"
        " group be empty. Got axis_index_groups=[[0, 1]] for 1 devices, not there: [1]."
        " Pass [[0]], say."
    )

    def local(x, groups):
        return normjax.batch_norm(x, axis_name="d", axis_index_groups=groups)[0]

    with raises(ValueError, message):
        jax.vmap(lambda x: local(x, [[0, 1]]), axis_name="d")(x[:1])
    jax.vmap(lambda x: local(x, [[0]]), axis_name="d")(x[:1])


def test_sub_group_that_is_empty():
    message = (
        "batch_norm: axis_index_groups must name each device of axis_name once, and no"
        " group be empty. Got axis_index_groups=[[0, 1], []] for 2 devices. Pass [[0],"
        " [1]], say."
    )

    def local(x):
        normjax.batch_norm(x, axis_name="d", axis_index_groups=[[0, 1], []])

    with raises(ValueError, message):
        jax.vmap(local, axis_name="d")(x)


@pytest.mark.parametrize("name", WITH_NAMES)
def test_sub_groups_of_no_axis(name):
    message = (
        f"{name}: axis_index_groups divides the devices of axis_name, which is missing."
        " Got axis_index_groups=[[0, 1]], axis_name=None. Pass the axis_name of the"
        " pmap, shard_map or vmap around the call."
    )
    with raises(ValueError, message):
        FUNCTIONS[name](x, axis_index_groups=[[0, 1]])


@pytest.mark.parametrize("name", WITH_EPSILON)
def test_dtype_of_y_that_is_not_floating(name):
    message = (
        f"{name}: dtype, the dtype of y, must be floating or complex. Got dtype=int32. Pass"
        " dtype=None for the dtype of x."
    )
    with raises(TypeError, message):
        FUNCTIONS[name](x, dtype=jnp.int32)


def test_running_moments_read_before_any_update():
    message = (
        "RunningMoments.read: running moments must be updated before they are read. Got"
        " no update yet. Call running = running.update(m) with the moments that"
        " batch_norm returns."
    )
    with raises(ValueError, message):
        normjax.RunningMoments.init((3,)).read()


def test_running_moments_of_another_shape():
    message = (
        "RunningMoments.update: moments must have the shape of the running moments. Got"
        " moments of shape (1, 32), running moments of shape (32,). Pass what batch_norm"
        " returns, or drop the axes of size 1 that moments keeps."
    )
    with raises(ValueError, message):
        normjax.RunningMoments.init((32,)).update(normjax.moments(jnp.ones((4, 32)), 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_running_moments_of_low_precision(dtype):
    message = (
        "RunningMoments.init: statistics need at least float32. Got"
        f" dtype={dtype}. Leave dtype out."
    )
    with raises(TypeError, message):
        normjax.RunningMoments.init((3,), dtype)


def test_merge_of_moments_of_two_shapes():
    message = (
        "Moments.merge: both moments must have one shape. Got shapes (32,) and (3,)."
        " Take both over the same axes."
    )
    with raises(ValueError, message):
        GIVEN.merge(jax.tree.map(lambda a: a[:3], normjax.batch_norm(x)[1]))


def test_moments_that_do_not_fit_x():
    message = (
        "normalize: moments.mean must have shape (32,), to lie along axes (3,) of x, or"
        " the rank of x and broadcast to it. Got moments.mean.shape=(3,), x.shape=(2, 8,"
        " 8, 32). Reshape moments.mean, or pass the axes that it lies along."
    )
    with raises(ValueError, message):
        normjax.normalize(x, normjax.batch_norm(jnp.ones((2, 3)))[1], epsilon=1e-5)


def test_merge_along_more_than_one_axis():
    message = "merge: axis must be one. Got axis=(0, 1). Call it once for each."
    with raises(ValueError, message):
        normjax.merge(normjax.moments(x, 0), (0, 1))


@pytest.mark.parametrize("field", ["count", "var", "carry"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("normalize", lambda m: normjax.normalize(x, m, epsilon=1e-5)),
        ("batch_norm", lambda m: normjax.batch_norm(x, moments=m)),
        ("Moments.merge", lambda m: m.merge(GIVEN)),
        ("RunningMoments.update", normjax.RunningMoments.init((32,)).update),
        ("merge", lambda m: normjax.merge(m, 0)),
    ],
)
def test_moments_with_a_complex_field_that_is_real(name, call, field):
    what = f"{'m' if name == 'merge' else 'moments'}.{field}"
    m = dataclasses.replace(GIVEN, **{field: jnp.ones(32, jnp.complex64)})
    message = (
        f"{name}: {what} must be real. Got {what}.dtype=complex64. Pass {what}.real."
    )
    with raises(TypeError, message):
        call(m)


def test_moments_with_a_complex_rest_of_a_real_mean():
    message = (
        "normalize: moments.rest must be real, as the mean is. Got"
        " moments.rest.dtype=complex64, moments.mean.dtype=float32. Pass"
        " moments.rest.real."
    )
    with raises(TypeError, message):
        m = dataclasses.replace(GIVEN, rest=jnp.zeros(32, jnp.complex64))
        normjax.normalize(x, m, epsilon=1e-5)


def test_moments_with_a_mean_of_integers():
    message = (
        "normalize: moments.mean must be floating or complex. Got"
        " moments.mean.dtype=int32. Pass moments.mean.astype(jnp.float32)."
    )
    with raises(TypeError, message):
        m = normjax.Moments(jnp.ones(32), jnp.zeros(32, jnp.int32), jnp.ones(32))
        normjax.normalize(x, m, epsilon=1e-5)


def test_moments_whose_fields_do_not_fit_each_other():
    message = (
        "merge: m.var must broadcast to m.mean. Got m.var.shape=(3,), m.mean.shape=(32,)."
        " Pass a m.var whose axes, from the last, are 1 or those of m.mean."
    )
    with raises(ValueError, message):
        normjax.merge(dataclasses.replace(GIVEN, var=jnp.ones(3)), 0)


def test_running_moments_given_for_moments():
    running = normjax.RunningMoments.init((32,)).update(GIVEN)
    message = (
        "batch_norm: moments must be Moments. Got moments of type RunningMoments. Pass"
        " what moments or batch_norm returns; of running moments, what read() does."
    )
    with raises(TypeError, message):
        normjax.batch_norm(x, moments=running)
    normjax.batch_norm(x, moments=running.read())


@pytest.mark.parametrize("shape", [(2, -1), 10**30])
def test_running_moments_of_no_size(shape):
    message = (
        "RunningMoments.init: shape must have sizes that are not negative, and fit 64"
        f" bits. Got shape={shape}. Pass the shape of the features."
    )
    with raises(ValueError, message):
        normjax.RunningMoments.init(shape)


def test_moments_of_low_precision():
    message = (
        "Moments.empty: statistics need at least float32. Got dtype=float16. Leave dtype"
        " out."
    )
    with raises(TypeError, message):
        normjax.Moments.empty((3,), jnp.float16)


# Arguments that are no arrays; test_arguments.py has all of them, at every door.

NO_ARRAYS = [
    (None, "x=None", "Pass an array of JAX or NumPy"),
    ("text", "x='text'", "Pass an array of JAX or NumPy"),
    (object(), "x of type object", "Pass an array of JAX or NumPy"),
    ({"a": 1.0}, "x={'a': 1.0}", "Pass an array of JAX or NumPy"),
    ([[1.0], [1.0, 2.0]], "x=[[1.0], [1.0, 2.0]]", "Pass an array of JAX or NumPy"),
    (
        np.zeros(2, [("a", "f4"), ("b", "i4")]),
        "x.dtype=[('a', '<f4'), ('b', '<i4')], x.shape=(2,)",
        "Pass one of its fields, x['a']",
    ),
    (
        np.ones(2, np.longdouble),
        f"x.dtype={np.dtype(np.longdouble)}, x.shape=(2,)",
        "Pass x.astype(np.float64)",
    ),
    (
        np.ones(2, np.clongdouble),
        f"x.dtype={np.dtype(np.clongdouble)}, x.shape=(2,)",
        "Pass x.astype(np.complex128)",
    ),
    (
        np.zeros(2, object),
        "x.dtype=object, x.shape=(2,)",
        "Pass x.astype(np.float64)",
    ),
    (
        np.zeros(2, "datetime64[D]"),
        "x.dtype=datetime64[D], x.shape=(2,)",
        "Pass an array of JAX or NumPy",
    ),
    (
        jax.ShapeDtypeStruct((2,), jnp.float32),
        "x=ShapeDtypeStruct(shape=(2,), dtype=float32)",
        "It has no values: call the function by jax.eval_shape",
    ),
    (jax.new_ref(jnp.ones(2)), "x, a reference to an array", "Pass x[...]"),
    (
        jax.random.key(0),
        "x.dtype=key<fry>, x.shape=()",
        "Pass an array of JAX or NumPy",
    ),
]


@pytest.mark.parametrize(("value", "got", "todo"), NO_ARRAYS)
def test_x_that_is_no_array(value, got, todo):
    message = f"layer_norm: x must be an array of numbers. Got {got}. {todo}."
    with raises(TypeError, message):
        normjax.layer_norm(value)


def test_ref_within_jit():
    message = (
        "layer_norm: x must be an array of numbers. Got x, a reference to an array."
        " Pass x[...]."
    )
    with raises(TypeError, message):
        jax.jit(normjax.layer_norm)(jax.new_ref(jnp.ones(2)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_x(name):
    message = (
        f"{name}: x must not be a masked array, because its mask would be lost. Got x of"
        " type MaskedArray. Pass x.data, and ~np.ma.getmaskarray(x) as where, or as the"
        " mask of a module."
    )
    masked = np.ma.masked_less(np.asarray(x) + np.arange(32.0), 3)
    with raises(TypeError, message):
        FUNCTIONS[name](masked)
    y = FUNCTIONS[name](masked.data, where=~np.ma.getmaskarray(masked))
    assert not np.asarray(jax.tree.leaves(y)[0])[..., :3].any()


def test_masked_scale():
    message = (
        "layer_norm: scale must not be a masked array, because its mask would be lost. Got"
        " scale of type MaskedArray. Pass scale.filled() with a value that says what is"
        " meant."
    )
    with raises(TypeError, message):
        normjax.layer_norm(x, np.ma.array(np.ones(32), mask=np.arange(32) == 0))


def test_residual_of_integers():
    message = (
        "add_layer_norm: residual must be floating, because its mean and its normalized"
        " values are not integers. Got residual.dtype=int32. Pass"
        " residual.astype(jnp.float32)."
    )
    with raises(TypeError, message):
        normjax.add_layer_norm(x, x.astype(jnp.int32))


def test_errors_name_the_function_that_was_called():
    message = (
        "add_layer_norm: scale must be floating or complex. Got scale.dtype=int32. Pass"
        " scale.astype(jnp.float32)."
    )
    with raises(TypeError, message):
        normjax.add_layer_norm(x, x, jnp.ones(32, jnp.int32))
    with raises(TypeError, message.replace("add_layer_norm", "batch_norm")):
        normjax.batch_norm(x, jnp.ones(32, jnp.int32), moments=GIVEN)


@pytest.mark.parametrize(
    ("dtype", "got"),
    [
        ("float31", "dtype='float31'"),
        (">f4", "dtype='>f4'"),
        (np.longdouble, "dtype=<class 'numpy.longdouble'>"),
        (True, "dtype=True"),
        (("f4", "f4"), "dtype=('f4', 'f4')"),
        (jnp.ones(2), "dtype.dtype=float32, dtype.shape=(2,)"),
    ],
)
def test_dtype_that_is_none_of_jax(dtype, got):
    message = (
        f"layer_norm: dtype must be one that JAX has. Got {got}. Pass dtype=jnp.float32,"
        " say."
    )
    with raises(TypeError, message):
        normjax.layer_norm(x, dtype=dtype)
    with raises(TypeError, message.replace("layer_norm", "LayerNorm")):
        nnx.LayerNorm(32, dtype=dtype, rngs=flax_nnx.Rngs(0))(x)


@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_activation_that_leaves_no_floating_result(dtype):
    message = (
        "layer_norm: activation must return what y is, floating or complex. Got a result"
        f" of dtype {dtype}. Apply what returns {dtype} to what the norm returns."
    )
    with raises(TypeError, message):
        normjax.layer_norm(x, activation=lambda y: y.astype(dtype))


def test_activation_that_returns_no_array():
    message = (
        "layer_norm: what activation returns must be an array of numbers. Got what"
        " activation returns=None. Pass an array of JAX or NumPy."
    )
    with raises(TypeError, message):
        normjax.layer_norm(x, activation=lambda y: None)


# Modules.


def test_training_switch_that_is_traced():
    message = (
        "BatchNorm: use_running_average is part of the compiled program and must be True"
        " or False. Got a traced value. Pass a bool, or name the argument in"
        " static_argnames."
    )
    norm = linen.BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    with raises(TypeError, message):
        jax.jit(lambda train: norm.apply(variables, x, ~train))(True)


def test_training_switch_that_is_a_word():
    message = (
        "BatchNorm: use_running_average is part of the compiled program and must be True"
        " or False. Got use_running_average='eval'. Pass a bool, or name the argument in"
        " static_argnames."
    )
    with raises(TypeError, message):
        linen.BatchNorm(use_running_average="eval").init(jax.random.key(0), x)


def test_field_that_is_no_choice():
    message = (
        "LayerNorm: missing_axis must be one of 'raise', 'ignore'. Got"
        " missing_axis.dtype=float32, missing_axis.shape=(2,). Pass missing_axis='ignore',"
        " say."
    )
    with raises(ValueError, message):
        linen.LayerNorm(missing_axis=jnp.ones(2)).init(jax.random.key(0), x)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_x_of_eight_bits_without_a_dtype_of_y(kind):
    message = (
        "LayerNorm: x must be of a dtype that JAX promotes with the others. Got x of"
        " float8_e4m3fn, others of float32. Pass dtype=jnp.bfloat16, say, to the module."
    )
    narrow = jnp.ones((2, 4), jnp.float8_e4m3fn)

    def call(**fields):
        if kind == "linen":
            module = linen.LayerNorm(**fields)
            return module.init_with_output(jax.random.key(0), narrow)[0]
        return nnx.LayerNorm(4, **fields, rngs=flax_nnx.Rngs(0))(narrow)

    with raises(TypeError, message):
        call()
    assert call(dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_mask_of_a_module_with_one_axis_less_than_x():
    message = (
        "LayerNorm: mask must not have one axis less than x, because then it is not clear"
        " which axis is missing. Got mask.shape=(2, 8, 8), x.shape=(2, 8, 8, 32). Pass"
        " mask[..., None] if the features are the last axis."
    )
    with raises(ValueError, message):
        linen.LayerNorm().init(jax.random.key(0), x, mask=jnp.ones((2, 8, 8)))


def test_group_norm_module_with_both_sizes_or_none():
    message = (
        "GroupNorm: exactly one of num_groups and group_size must be set. Got"
        " num_groups={}, group_size={}. To set group_size, pass num_groups=None, since"
        " its default is 32."
    )
    for groups, size in [(32, 4), (None, None)]:
        with raises(ValueError, message.format(groups, size)):
            linen.GroupNorm(groups, size).init(jax.random.key(0), x)


def test_group_norm_module_with_a_size_that_does_not_divide():
    message = (
        "GroupNorm: group_size must divide the number of features. Got group_size=5,"
        " x.shape=(2, 8, 8, 32). Pass num_groups=None and a group_size that divides 32."
    )
    with raises(ValueError, message):
        linen.GroupNorm(None, 5).init(jax.random.key(0), x)


def test_group_norm_module_that_does_not_reduce_the_features():
    message = (
        "GroupNorm: reduction_axes must include the last axis, that of the features. Got"
        " reduction_axes=(1, 2) for 4 axes. Pass reduction_axes=(1, 2, 3)."
    )
    with raises(ValueError, message):
        linen.GroupNorm(2, reduction_axes=(1, 2)).init(jax.random.key(0), x)


def test_instance_norm_module_whose_features_are_the_batch():
    message = (
        "InstanceNorm: The channel axes cannot include the leading dimension as this is"
        " assumed to be the batch axis. Got feature_axes=(0, 3) for 4 axes. Move the"
        " batch to the front, or call normjax.instance_norm with axis."
    )
    with raises(ValueError, message):
        linen.InstanceNorm(feature_axes=(0, 3)).init(jax.random.key(0), x)


@pytest.mark.parametrize("running", [False, True])
def test_batch_stats_of_another_model(running):
    norm = linen.BatchNorm(use_running_average=running)
    variables = norm.init(jax.random.key(0), x)
    variables["batch_stats"] = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    message = (
        "BatchNorm: batch_stats must have the shape of the features. Got mean of shape"
        " (3,), var of shape (3,), features (32,). Pass the batch_stats of this model."
    )
    with raises(ValueError, message):
        norm.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
def test_batch_stats_that_are_not_passed(running, mutable):
    norm = linen.BatchNorm(use_running_average=running)
    params = norm.init(jax.random.key(0), x)["params"]
    message = (
        "BatchNorm: apply needs the running statistics, or they would start from 0 and 1"
        " again at every call. Got no batch_stats/mean in the variables. Pass"
        ' {"params": params, "batch_stats": batch_stats}, with the batch_stats that init'
        " or the last apply returned."
    )
    with raises(ValueError, message):
        norm.apply({"params": params}, x, mutable=mutable)
