"""Arguments that are no arrays: each is taken as NumPy takes it, or refused whole."""

import datetime
import decimal
import fractions
import inspect
import re
import types

import contexts
import family
import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType

import normjax
from normjax import linen, nnx

X = jnp.asarray([[0.0, 1.0], [2.0, 5.0]])
TWO = jnp.ones(2)
GIVEN = normjax.Moments(TWO, TWO, TWO)
KEY = jax.random.key(0)


class Index:
    """An integer to Python, that is none."""

    def __index__(self):
        return 1


class Array:
    """An array to NumPy, that is none."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray([1.0, 2.0], np.float32)


class Refusing:
    """Whose conversion fails, as that of a tensor on another device does."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not here")


MASKED = {
    "masked array": np.ma.array([1.0, 2.0], mask=[False, True]),
    "masked x": np.ma.array(np.asarray(X), mask=[[False, True]] * 2),
    "masked constant": np.ma.masked,
    "list of masked arrays": [np.ma.array([1.0, 2.0], mask=[False, True])] * 2,
}
# What is no array of numbers, nor anything else that an argument may be.
REFUSED = MASKED | {
    "string": "12",
    "no letters": "",
    "bytes": b"ab",
    "object": object(),
    "module": types,
    "dict": {"a": 1.0},
    "set": {1.0},
    "iterator": iter([1.0, 2.0]),
    "ragged list": [[1.0, 2.0], [3.0]],
    "list of None": [None, 1.0],
    "list of strings": ["a", "b"],
    "tuple of strings": ("a", "b"),
    "datetime": datetime.datetime(2020, 1, 1),
    "datetime64": np.asarray(["2020-01-01", "2021-01-01"], "datetime64[D]"),
    "timedelta64": np.timedelta64(1, "D"),
    "structured array": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "array of objects": np.asarray([1.0, 2.0], object),
    "array of strings": np.asarray(["a", "b"]),
    "long double": np.arange(2, dtype=np.longdouble),
    "complex long double": np.arange(2, dtype=np.clongdouble),
    "float0": np.zeros(2, jax.dtypes.float0),
    "refusing": Refusing(),
    "shape": jax.ShapeDtypeStruct((2, 2), jnp.float32),
    "keys": jax.random.split(KEY, 2),
    "ref": jax.new_ref(X),
    "ellipsis": ...,
    "decimal": decimal.Decimal("0.5"),
}
# What some arguments take.
OTHERS = {
    "None": None,
    "type": float,
    "True": True,
    "one": 1,
    "half": 0.5,
    "fraction": fractions.Fraction(1, 2),
    "large integer": 10**400,
    "NaN": float("nan"),
    "complex": 1j,
    "index": Index(),
    "array-like": Array(),
    "empty list": [],
    "list of integers": [0, 1],
    "list of arrays": [np.ones(2), jnp.ones(2)],
    "tuple": (1.0, 2.0),
    "nested tuple": ((0, 1),),
    "range": range(2),
    "big-endian": np.asarray([1.0, 2.0], ">f4"),
    "big-endian x": np.asarray(X).astype(">f8"),
    "big-endian scalar": np.asarray(0.5, ">f4"),
    "matrix": np.ones((2, 2)).view(np.matrix),
    "masked integers": np.ma.array([0, 1], mask=[False, True]),
    "booleans": np.asarray([True, False]),
    "complex array": np.asarray([1j, 2.0]),
    "float8": jnp.ones(2, jnp.float8_e4m3fn),
    "float8 x": jnp.ones((2, 2), jnp.float8_e4m3fn),
    "int4": jnp.ones(2, jnp.int4),
    "array": jnp.ones(3),
    "moments": GIVEN,
    "variable": flax_nnx.Param(jnp.ones(2)),
    "keys": REFUSED["keys"],
}


COMMON = {
    "where": None,
    "axis_name": None,
    "axis_index_groups": None,
    "dtype": None,
    "activation": None,
    "implementation": None,
    "epsilon": 1e-5,
}
AFFINE = {"scale": TWO, "bias": TWO}
FUNCTIONS = {
    "batch_norm": (
        normjax.batch_norm,
        {"x": X, **AFFINE, "feature_axis": -1, "moments": None, **COMMON}
        | {"virtual_batch_size": None},
    ),
    "layer_norm": (normjax.layer_norm, {"x": X, **AFFINE, "axis": -1, **COMMON}),
    "rms_norm": (normjax.rms_norm, {"x": X, "scale": TWO, "axis": -1, **COMMON}),
    "group_norm": (
        normjax.group_norm,
        {"x": X, **AFFINE, "num_groups": 1, "axis": None, "feature_axis": -1, **COMMON},
    ),
    "instance_norm": (
        normjax.instance_norm,
        {"x": X[None], **AFFINE, "axis": None, "feature_axis": -1, **COMMON},
    ),
    "add_layer_norm": (
        normjax.add_layer_norm,
        {"x": X, "residual": X, **AFFINE, "axis": -1, **COMMON},
    ),
    "add_rms_norm": (
        normjax.add_rms_norm,
        {"x": X, "residual": X, "scale": TWO, "axis": -1, **COMMON},
    ),
    "moments": (
        normjax.moments,
        {"x": X, "axis": 0}
        | {k: None for k in ("where", "axis_name", "axis_index_groups")},
    ),
    "normalize": (
        normjax.normalize,
        {"x": X, "moments": GIVEN, **AFFINE, "epsilon": 1e-5, "feature_axis": -1}
        | {"where": None, "dtype": None},
    ),
    "merge": (normjax.merge, {"m": GIVEN, "axis": 0}),
    "Moments.merge": (GIVEN.merge, {"other": GIVEN}),
    "Moments.empty": (normjax.Moments.empty, {"shape": (2,), "dtype": jnp.float32}),
    "RunningMoments.init": (
        normjax.RunningMoments.init,
        {"shape": (2,), "dtype": jnp.float32},
    ),
    "RunningMoments.update": (
        normjax.RunningMoments.init((2,)).update,
        {"m": GIVEN, "momentum": 0.9, "skip_nonfinite": False},
    ),
}


def with_moments(call):
    def f(**fields):
        return call(normjax.Moments(**fields))

    return f


OF_MOMENTS = {
    "merge": with_moments(lambda m: normjax.merge(m, 0)),
    "Moments.merge": with_moments(GIVEN.merge),
    "normalize": with_moments(lambda m: normjax.normalize(X, m, epsilon=1e-5)),
    "batch_norm": with_moments(lambda m: normjax.batch_norm(X, moments=m)),
    "RunningMoments.update": with_moments(normjax.RunningMoments.init((2,)).update),
}
FIELDS = {"count": TWO, "mean": TWO, "var": TWO}


def of_devices(call, good):
    """A norm of so many devices, as vmap knows them."""

    def f(axis_index_groups):
        given = {**good, "axis_name": "d", "axis_index_groups": axis_index_groups}
        return jax.vmap(lambda x: call(**{**given, "x": x}), axis_name="d")(X[None])

    return f


def of_linen(kind, x, **fields):
    module = getattr(linen, kind)(**fields)
    given = {"x": x}
    if kind.startswith("Add"):
        given["residual"] = x
    if kind == "BatchNorm":
        given["use_running_average"] = False
    variables = module.init(KEY, **given)

    def f(**call):
        return module.apply(variables, **call, mutable=["batch_stats"])

    return f


def of_nnx(kind, x, **fields):
    def f(**call):
        # A module of its own, since a call may change its statistics.
        module = getattr(nnx, kind)(2, **fields, rngs=flax_nnx.Rngs(0))
        return module(**call)

    return f


def modules():
    for kind in linen.__all__:
        fields = {"num_groups": 1} if kind == "GroupNorm" else {}
        call = {"x": X[None] if kind == "InstanceNorm" else X, "mask": None}
        if kind.startswith("Add"):
            call["residual"] = X
        if kind == "BatchNorm":
            call |= {"use_running_average": False, "momentum": 0.9}
        for library, of in (("linen", of_linen), ("nnx", of_nnx)):
            yield f"{library}.{kind}", of, kind, fields, call


def forms():
    """Every door with one argument of its own, as (name, argument, call, good)."""
    for name, (call, good) in FUNCTIONS.items():
        for argument in good:
            yield name, argument, call, good
        if "axis_index_groups" in good:
            devices = of_devices(call, good)
            yield name, "axis_index_groups", devices, {"axis_index_groups": None}
    for name, call in OF_MOMENTS.items():
        for field in FIELDS:
            yield name, field, call, FIELDS
    full = {**FIELDS, "carry": TWO, "rest": TWO}
    for field in ("carry", "rest"):
        yield "merge", field, OF_MOMENTS["merge"], full
    for name, of, kind, fields, good in modules():
        call = of(kind, good["x"], **fields)
        for argument in good:
            yield name, argument, call, good


FORMS = list(forms())


def house(name, message):
    """Whether a message says: function: the rule. Got the facts. What to do."""
    own = name.split(".")[-1] if name.startswith(("linen", "nnx")) else name
    function = own.removeprefix("Add").removesuffix("Norm").lower() + "_norm"
    form = rf"({own}|{own.removeprefix('Add')}|{function}): [a-zA-Z].+\. Got .+\. .+\."
    return re.fullmatch(form, message, re.DOTALL) is not None


def what_is_said(name, call, arguments):
    """The error of a call, None where it returns."""
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        assert house(name, str(error)), str(error)
        return error
    return None


def test_there_are_as_many_doors_as_arguments():
    """An argument that comes to be has to come into the table."""
    for name, (call, good) in FUNCTIONS.items():
        assert set(inspect.signature(call).parameters) == set(good), name


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f[0]}-{f[1]}")
def test_what_has_no_numbers_is_refused(form):
    name, argument, call, good = form
    call(**good)
    for kind, value in REFUSED.items():
        error = what_is_said(name, call, {**good, argument: value})
        assert error is not None, kind
        assert argument in str(error), kind


# Flax's own error says which parameter of which module is of another shape.
OF_OTHER_FEATURES = {"empty list", "array"}


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f[0]}-{f[1]}")
def test_what_may_be_taken_is_taken_or_refused_whole(form):
    """Traced, which takes no compiler; what the function calls is not looked at."""
    name, argument, call, good = form

    def calls():
        for kind, value in OTHERS.items():
            linen_x = name.startswith("linen") and argument == "x"
            if linen_x and kind in OF_OTHER_FEATURES:
                continue
            if argument == "activation" and callable(value):
                continue
            what_is_said(name, call, {**good, argument: value})

    jax.eval_shape(calls)


def swapped(a):
    """The same numbers in the other byte order, as a file may have them."""
    a = np.asarray(a)
    return a.astype(a.dtype.newbyteorder(">"))


def listed(a):
    return np.asarray(a).tolist()


class Tensor:
    """An array of another library: NumPy can read it."""

    def __init__(self, a):
        self.a = np.asarray(a)

    def __array__(self, dtype=None, copy=None):
        return self.a


ARRAYS = {"x": X, "residual": X + 1, "scale": TWO * 3, "bias": TWO / 2, "m": GIVEN}
ARRAYS |= {"where": jnp.asarray([[0.5, 1.0], [1.0, 2.0]]), "momentum": TWO * 0.25}
ARRAYS |= {"moments": normjax.Moments(TWO * 4, TWO, TWO * 2)}
ARRAYS |= {"other": normjax.Moments(TWO * 4, TWO * 5, TWO * 2)}
CONVERTED = {"big-endian": swapped, "lists": listed, "array-likes": Tensor}


@pytest.mark.parametrize("convert", CONVERTED.values(), ids=CONVERTED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_holds_the_numbers_is_all_the_same(name, convert):
    call, good = FUNCTIONS[name]
    given = {k: a for k, a in ARRAYS.items() if k in good}
    if name == "instance_norm":
        given |= {"x": X[None], "where": ARRAYS["where"][None]}
    fields = ("count", "mean", "var")

    def converted(a):
        if isinstance(a, normjax.Moments):
            return normjax.Moments(*(convert(getattr(a, k)) for k in fields))
        return convert(a)

    got = call(**{**good, **{k: converted(a) for k, a in given.items()}})
    want = call(**{**good, **given})
    if name == "batch_norm":  # which returns the moments that it was given, as they are
        got, want = got[0], want[0]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_modules_read_arrays_in_any_byte_order(library):
    of = {"linen": of_linen, "nnx": of_nnx}[library]
    call = of("BatchNorm", X, mask_is_weight=True)
    given = {"x": X, "mask": ARRAYS["where"], "momentum": ARRAYS["momentum"]}
    got = call(use_running_average=False, **{k: swapped(a) for k, a in given.items()})
    want = call(use_running_average=False, **given)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


AN_AXIS = [(n, a) for n, a, _, good in FORMS if a in ("axis", "feature_axis")]


@pytest.mark.parametrize(
    "axis", [Index(), np.int8(1), np.asarray(1, ">i4"), jnp.asarray(1), [np.uint8(1)]]
)
@pytest.mark.parametrize(("name", "argument"), AN_AXIS)
def test_an_axis_is_what_python_takes_for_an_integer(name, argument, axis):
    call, good = FUNCTIONS[name]
    if name == "merge":
        good = {"m": normjax.moments(X, 0), "axis": 1}
    if name == "group_norm" and argument == "axis":
        good = {**good, "feature_axis": 0}
    got, want = (call(**{**good, argument: a}) for a in (axis, 1))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


def test_sizes_and_shapes_are_what_python_takes_for_integers():
    got = normjax.group_norm(X, num_groups=Index())
    np.testing.assert_array_equal(got, normjax.group_norm(X, num_groups=1))
    got, _ = normjax.batch_norm(X, virtual_batch_size=Index())
    np.testing.assert_array_equal(got, normjax.batch_norm(X, virtual_batch_size=1)[0])
    assert normjax.Moments.empty([Index(), np.int8(2)]).shape == (1, 2)
    assert normjax.RunningMoments.init(Index()).mean.shape == (1,)


def test_counts_may_be_whole_numbers():
    whole, parts = (
        ([3, 4], [0.0, 1.0], [1.0, 2.0]),
        ([3.0, 4.0], [0.0, 1.0], [1.0, 2.0]),
    )
    got, want = (
        normjax.merge(normjax.Moments(*fields), 0) for fields in (whole, parts)
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
        assert g.dtype == jnp.float32


def test_a_stream_of_complex_values_starts_with_real_counts():
    z = jnp.asarray([[1.0 + 2.0j], [3.0 - 1.0j], [0.5j]])

    def step(m, row):
        return m.merge(normjax.moments(row, 0)), None

    m, _ = jax.lax.scan(step, normjax.Moments.empty((1,), jnp.complex64), z)
    want = normjax.moments(z, 0)
    np.testing.assert_allclose(m.mean, want.mean[0], rtol=1e-6)
    np.testing.assert_allclose(m.var, want.var[0], rtol=1e-6)
    assert m.count.dtype == m.var.dtype == jnp.float32


# Epsilon.

EPSILONS = {
    name: (call, {k: v for k, v in good.items() if k != "epsilon"})
    for name, (call, good) in FUNCTIONS.items()
    if "epsilon" in good
}
EPSILONS["group_norm of groups"] = (normjax.group_norm, {"x": X, "num_groups": 2})
EPSILONS["batch_norm of ghosts"] = (
    normjax.batch_norm,
    {"x": X, "virtual_batch_size": 1},
)
EPSILONS["batch_norm by moments"] = (normjax.batch_norm, {"x": X, "moments": GIVEN})
EPSILONS["layer_norm activated"] = (
    normjax.layer_norm,
    {"x": X, "activation": jax.nn.silu},
)
EPSILONS["layer_norm of weights"] = (
    normjax.layer_norm,
    {"x": X, "where": ARRAYS["where"]},
)
wide = pytest.mark.parametrize("name", EPSILONS)


def loss_of(name, dtype=jnp.float64):
    call, good = EPSILONS[name]
    good = jax.tree.map(
        lambda a: a.astype(dtype) if isinstance(a, jax.Array) else a, good
    )
    weights = jnp.cos(jnp.arange(4, dtype=dtype)).reshape(2, 2)

    def loss(x, epsilon):
        leaves = jax.tree.leaves(call(**{**good, "x": x, "epsilon": epsilon}))
        return sum((jnp.sin(a) * weights[: a.shape[-1]]).sum() for a in leaves)

    x = good["x"]
    return loss, x


@wide
def test_a_traced_epsilon_gives_what_a_number_gives(name, float64):
    loss, x = loss_of(name)
    want = jax.value_and_grad(loss)(x, 0.3)
    got = jax.jit(jax.value_and_grad(loss))(x, 0.3)
    family.assert_close(got, want, 4)


def test_a_traced_epsilon_gives_the_second_derivatives_too(float64):
    loss, x = loss_of("layer_norm of weights")
    got = jax.jit(jax.hessian(loss))(x, 0.3)
    family.assert_close(got, jax.hessian(loss)(x, 0.3), 4, c=100)


@wide
def test_a_traced_epsilon_has_a_derivative(name, float64):
    loss, x = loss_of(name)
    h = 1e-6
    want = (loss(x, 0.3 + h) - loss(x, 0.3 - h)) / (2 * h)
    got = jax.grad(loss, argnums=1)(x, 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


FLAX = {
    "BatchNorm": {"use_running_average": False},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
}


FLAGS = ["False", {}, jnp.ones(2)]
FUNCTION = [None, 3, 1.0, "ones", jnp.ones(4)]
BAD_FIELDS = {
    **dict.fromkeys(
        "use_bias use_scale mask_is_weight debias skip_nonfinite update_statistics"
        " force_float32_reductions".split(),
        FLAGS,
    ),
    **dict.fromkeys(("scale_init", "bias_init", "promote_dtype"), FUNCTION),
    "param_dtype": ["float99", jnp.int32, bool, 3],
    "dtype": ["float99", jnp.int32, 3],
    "num_features": [None, "4", 4.0, -1, True, (4,)],
    "group_size": ["2", 0, 1.5, 3],
    "implementation": ["cuda", 3, ["xla"]],
    "scale_metadata": [None, 3],
    "bias_metadata": [None, 3],
}


# What modules have beyond Flax's changes nothing until it is asked for.
OFF = {
    "activation": None,
    "axis_index_groups": None,
    "axis_name": None,
    "debias": False,
    "implementation": None,
    "mask_is_weight": False,
    "missing_axis": "raise",
    "running_variance": "biased",
    "skip_nonfinite": False,
    "virtual_batch_size": None,
}


@pytest.mark.parametrize("kind", linen.__all__)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_defaults_are_flaxs_and_all_else_is_off(library, kind):
    module = getattr({"linen": linen, "nnx": nnx}[library], kind)
    defaults = {
        k: p.default for k, p in inspect.signature(module.__init__).parameters.items()
    }
    known = defaults.keys() & OFF
    assert known >= {"activation", "axis_name", "missing_axis", "mask_is_weight"}
    assert {k: defaults[k] for k in known} == {k: OFF[k] for k in known}
    of_flax = {"linen": flax_linen, "nnx": flax_nnx}[library]
    theirs = getattr(of_flax, kind, None)  # it has no norms that add first
    if theirs is not None:
        for k, p in inspect.signature(theirs.__init__).parameters.items():
            if isinstance(p.default, (bool, int, float, str)):
                assert defaults[k] == p.default, k


@pytest.mark.parametrize("kind", FLAX)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_fields_of_another_kind_are_refused(library, kind):
    """At construction or in the first call, before a parameter is made by them."""
    module = getattr({"linen": linen, "nnx": nnx}[library], kind)
    known = set(inspect.signature(module.__init__).parameters)
    x = jnp.ones((2, 3, 4))

    def call(num_features=4, **fields):
        fields = FLAX[kind] | fields
        if "group_size" in fields:
            fields["num_groups"] = None
        if library == "linen":
            return module(**fields).init(KEY, x)
        return module(num_features, **fields, rngs=flax_nnx.Rngs(0))(x)

    def call_all():
        call()
        call(**{k: None for k in ("use_bias", "param_dtype") if k in known})
        tried = 0
        for field in known & set(BAD_FIELDS):
            for value in BAD_FIELDS[field]:
                error = what_is_said(kind, call, {field: value})
                assert error is not None and field in str(error), (field, value)
                tried += 1
        return tried

    tried = []
    jax.eval_shape(lambda: tried.append(call_all()))
    assert tried[0] > 20


@pytest.mark.parametrize("kind", FLAX)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_modules_take_the_epsilons_that_flax_takes(library, kind):
    """As a jit argument, as a scalar of JAX made in jit, and outside of it."""
    x = jnp.sin(jnp.arange(24.0)).reshape(2, 3, 4)

    def of(modules):
        def f(x, epsilon):
            if library == "linen":
                module = getattr(modules, kind)(epsilon=epsilon, **FLAX[kind])
                return module.init_with_output(KEY, x)[0]
            rngs = flax_nnx.Rngs(0)
            return getattr(modules, kind)(4, epsilon=epsilon, **FLAX[kind], rngs=rngs)(
                x
            )

        def loss(x, epsilon):
            return jnp.sin(f(x, epsilon)).sum()

        inside = jax.jit(lambda x: f(x, jnp.float32(0.3)))(x)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, 0.3), inside, f(x, 0.3)

    ours, theirs = {"linen": (linen, flax_linen), "nnx": (nnx, flax_nnx)}[library]
    family.assert_close(of(ours), of(theirs), 12)


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm"])
def test_an_epsilon_may_be_a_parameter(kind):
    x = jnp.sin(jnp.arange(24.0)).reshape(2, 3, 4)

    def gradient(modules):
        epsilon = flax_nnx.Param(jnp.float32(0.3))
        module = getattr(modules, kind)(4, epsilon=epsilon, rngs=flax_nnx.Rngs(0))
        of = flax_nnx.grad(lambda module: jnp.sin(module(x)).sum())
        return jax.tree.leaves(flax_nnx.jit(of)(module)["epsilon"])

    family.assert_close(gradient(nnx), gradient(flax_nnx), 12)


@pytest.mark.parametrize(
    "epsilon",
    [
        jnp.float32(0.5),
        np.float16(0.5),
        np.asarray(0.5),
        swapped(0.5),
        fractions.Fraction(1, 2),
        Tensor(0.5),
        flax_nnx.Param(jnp.float32(0.5)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_epsilon_of_any_type_is_a_number_where_it_can_be_read(epsilon):
    want = jax.make_jaxpr(lambda: normjax.layer_norm(X, epsilon=0.5))()
    got = jax.make_jaxpr(lambda: normjax.layer_norm(X, epsilon=epsilon))()
    assert str(got) == str(want)


def test_many_epsilons_at_once():
    epsilons = jnp.asarray([1e-6, 0.5, 2.0])
    got = jax.vmap(lambda e: normjax.rms_norm(X, epsilon=e))(epsilons)
    want = jnp.stack([normjax.rms_norm(X, epsilon=float(e)) for e in epsilons])
    family.assert_close(got, want, 2)


def test_a_traced_epsilon_keeps_no_more_for_the_backward_pass():
    x = jnp.ones((256, 128), jnp.bfloat16)

    def pullback(x, epsilon):
        return jax.vjp(lambda *a: normjax.rms_norm(a[0], epsilon=a[1]), x, epsilon)[1]

    kept = jax.tree.leaves(jax.jit(pullback)(x, 1e-5))
    assert sum(a.nbytes for a in kept) <= x.nbytes + 10 * 4 * len(x)


@pytest.mark.parametrize("context", ["vmap", "shard_map", "partial manual"])
def test_a_traced_epsilon_goes_over_devices(context, float64):
    """Against the whole batch on one device, with the gradients inside."""
    mapped = contexts.MAPPED[context]
    x = jnp.sin(jnp.arange(2 * 8 * 3.0)).reshape(2, 8, 3)
    given = (jnp.arange(1.0, 4.0), jnp.asarray(0.3))

    def loss(x, scale, epsilon, names=None):
        y, m = normjax.batch_norm(x, scale, epsilon=epsilon, axis_name=names)
        return jnp.sin(y).sum(), m.var

    def local(x, given):
        def of(x, given):
            return loss(x, *given, names=mapped.names)

        (_, var), (dx, rest) = jax.value_and_grad(of, (0, 1), has_aux=True)(x, given)
        return dx, (mapped.collect(rest), var)

    got = jax.jit(lambda x, given: mapped.run(local, x, given))(x, given)
    (_, var), (dx, *rest) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, *given)
    family.assert_close(got, (dx, (tuple(rest), var)), 16)


def test_a_traced_epsilon_goes_over_an_explicit_mesh():
    x = jnp.sin(jnp.arange(2 * 8 * 4.0)).reshape(2, 8, 4)
    placed = contexts.sharded(x, AxisType.Explicit)

    def f(x, epsilon):
        y = normjax.group_norm(x, num_groups=2, epsilon=epsilon)
        return jnp.sin(y).sum()

    with jax.set_mesh(contexts.mesh((8,), ("d",), AxisType.Explicit)):
        got = jax.jit(jax.value_and_grad(f, (0, 1)))(placed, 0.3)
    family.assert_close(got, jax.value_and_grad(f, (0, 1))(x, 0.3), 16)
