"""Operations and their native form: what serves where, and that all forms are one."""

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
from normjax import _operations, linen, nnx
from normjax.kernels import canonical, choice, library

missing = library.missing()
needs_native = pytest.mark.skipif(
    missing is not None, reason=f"there are no native kernels here: {missing}"
)
KEY = jax.random.key(0)
X = 3 * jax.random.normal(KEY, (4, 6, 8)) + 2
SCALE = jnp.linspace(0.5, 2.0, 8)
BIAS = jnp.linspace(-1.0, 1.0, 8)


@pytest.fixture(autouse=True)
def program():
    """Whatever the environment chooses for all norms."""
    before = choice.program()
    normjax.set_implementation(None)
    yield
    normjax.set_implementation(before)


def batch_norm(*args, **options):
    return normjax.batch_norm(*args, **options)[0]


NORMS = {
    "layer": normjax.layer_norm,
    "rms": lambda x, s, b, **options: normjax.rms_norm(x, s, **options),
    "batch": batch_norm,
    "ghost": functools.partial(batch_norm, virtual_batch_size=2),
    "group": functools.partial(normjax.group_norm, num_groups=4),
    "instance": normjax.instance_norm,
    "layer of space": lambda x, s, b, **options: normjax.layer_norm(
        x, s[None, None], b[None, None], axis=(1, 2), **options
    ),
    "without parameters": lambda x, s, b, **options: normjax.layer_norm(x, **options),
    "without bias": lambda x, s, b, **options: normjax.layer_norm(x, s, **options),
}
EVERY = [pytest.param(norm, id=name) for name, norm in NORMS.items()]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def loss(norm, implementation, x, scale, bias):
    y = norm(x, scale, bias, implementation=implementation).astype(jnp.float32)
    return (y * jnp.sin(3 * x.astype(jnp.float32)) + y**2 / 5).sum()


def gradients(norm, implementation):
    return jax.grad(functools.partial(loss, norm, implementation), (0, 1, 2))


@functools.partial(jax.jit, static_argnums=0)
def _exact(norm, x, scale, bias):
    def exact(x, scale, bias):
        y = norm(x, scale, bias, implementation="xla")
        return (y * jnp.sin(3 * x) + y**2 / 5).sum(), y

    return jax.value_and_grad(exact, (0, 1, 2), has_aux=True)(x, scale, bias)


def in_float64(norm, x, scale, bias):
    """y and the gradients in float64, of what the operands are in their dtypes."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, scale, bias)]
        (_, y), dots = jax.device_get(_exact(norm, *wide))
    return y, *dots


def assert_near(got, want, dtype, c=4.0):
    got = np.asarray(got, np.float64)
    size = max(1.0, np.abs(want).max())
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got, want, rtol=eps, atol=c * eps * size)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", EVERY)
def test_native_norms_are_the_formula_in_float64(norm, dtype):
    x = X.astype(dtype)
    want, *_ = in_float64(norm, x, SCALE, BIAS)
    y = norm(x, SCALE, BIAS, implementation="native")
    assert y.dtype == dtype
    assert_near(y, want, dtype, c=2.0)
    # A loss in float32, of a y that is not rounded to a narrower dtype.
    full = functools.partial(norm, dtype=jnp.float32)
    want = in_float64(norm, x, SCALE, BIAS)[1:]
    got = jax.jit(gradients(full, "native"))(x, SCALE, BIAS)
    for g, w, of in zip(got, want, (dtype, jnp.float32, jnp.float32), strict=True):
        assert g.dtype == of
        assert_near(g, w, of, c=20.0)


@needs_native
@pytest.mark.parametrize("shape", [(3, 7), (5, 1), (1, 5), (2, 3, 5, 1), (67, 33)])
@pytest.mark.parametrize("name", ["layer", "rms", "batch", "instance"])
def test_native_norms_of_odd_shapes(name, shape):
    if name == "instance" and len(shape) == 2:
        shape = (shape[0], 3, shape[1])
    x = jax.random.normal(KEY, shape) * 2 - 5
    scale, bias = jnp.linspace(1, 2, shape[-1]), jnp.linspace(0, 1, shape[-1])
    want_y, *want = in_float64(NORMS[name], x, scale, bias)
    norm = functools.partial(NORMS[name], implementation="native")
    assert_near(norm(x, scale, bias), want_y, jnp.float32, c=20.0)
    # Of one value, or two, what is rounded is multiplied by the root of 1 / epsilon.
    got = jax.jit(gradients(NORMS[name], "native"))(x, scale, bias)
    few = shape[-1] == 1
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, jnp.float32, c=1e3 if few else 200.0)


def hessians(f, x):
    dot = jnp.cos(x)
    return {
        "forward": jax.jvp(f, (x,), (dot,))[1],
        "forward over reverse": jax.jvp(jax.grad(f), (x,), (dot,))[1],
        "reverse over forward": jax.grad(lambda x: jax.jvp(f, (x,), (dot,))[1])(x),
        "reverse over reverse": jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), dot))(x),
        "linear": jax.linear_transpose(jax.linearize(jax.grad(f), x)[1], x)(dot)[0],
    }


@needs_native
@pytest.mark.parametrize("norm", EVERY)
def test_native_derivatives_of_any_order_are_those_of_the_body(norm):
    def of(implementation):
        f = functools.partial(loss, norm, implementation)
        return jax.jit(lambda: hessians(lambda x: f(x, SCALE, BIAS), X))()

    family.assert_close(of("native"), of("xla"), X.size, c=20.0)


def ensemble(norm, implementation, axes):
    """Gradients of several, mapped and unmapped operands together."""
    stacks = (
        jnp.stack([X, 2 * X - 1, X * X]),
        *([a, -a, a + 1] for a in (SCALE, BIAS)),
    )
    stacks = [jnp.stack([*a]) for a in stacks]
    operands = [s if a == 0 else s[0] for s, a in zip(stacks, axes, strict=True)]
    f = functools.partial(loss, norm, implementation)
    inner = jax.vmap(jax.grad(f, (0, 1, 2)), axes)(*operands)
    outer = jax.grad(lambda *a: jax.vmap(f, axes)(*a).sum(), (0, 1, 2))(*operands)
    dots = jax.jvp(jax.vmap(f, axes), operands, [jnp.sin(a) for a in operands])
    return inner, outer, dots


@needs_native
@pytest.mark.parametrize(
    "axes", [(0, 0, 0), (0, None, None), (0, 0, None), (None, 0, 0)], ids=str
)
@pytest.mark.parametrize("norm", EVERY[:6:2])
def test_ensembles(norm, axes):
    def of(implementation):
        return jax.jit(functools.partial(ensemble, norm, implementation, axes))()

    family.assert_close(of("native"), of("xla"), 4 * X.size, c=20.0)


def test_parameters_that_two_nested_maps_have_are_theirs():
    def f(implementation):
        one = functools.partial(loss, normjax.layer_norm, implementation)
        many = jax.vmap(jax.vmap(jax.grad(one, (0, 1, 2)), (0, 0, None)), (0, None, 0))
        x = jnp.stack([X, X + 1])
        return jax.jit(many)(x, jnp.outer(jnp.arange(1, 5), SCALE), X[0, :2])

    family.assert_close(f(None), f("xla"), X.size, c=20.0)


# What is native where. --------------------------------------------------------------


def calls(f, *operands, compiled=True):
    """How many native calls forward and backward a program has."""
    lowered = jax.jit(f).lower(*operands)
    text = lowered.compile().as_text() if compiled else lowered.as_text()
    targets = ("normjax_forward", "normjax_backward")
    return tuple(text.count(f'"{t}"') or text.count(f"@{t}(") for t in targets)


def both(f, *operands):
    return calls(jax.value_and_grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1)), *operands)


def layer(x, scale):
    return normjax.layer_norm(x, scale)


def over_devices(f, **options):
    specs = {"in_specs": (P("d"), P()), "out_specs": P("d")}
    return jax.shard_map(f, mesh=mesh((8,), ("d",)), **specs, **options)


MANY = jnp.tile(X, (2, 1, 1))
LARGE = jnp.ones((4, 512, 1024))  # more than a cache holds
WHERE_IT_SERVES = {
    "jit": lambda: both(layer, X, SCALE),
    "vmap": lambda: both(jax.vmap(layer, (0, None)), X, SCALE),
    "vmap of parameters": lambda: both(
        jax.vmap(layer), X, jnp.tile(SCALE, (X.shape[0], 1))
    ),
    "shard_map": lambda: both(over_devices(layer), MANY, SCALE),
    "shard_map unchecked": lambda: both(
        over_devices(layer, check_vma=False), MANY, SCALE
    ),
    "pmap": lambda: both(jax.pmap(layer, in_axes=(0, None)), MANY, SCALE),
    "scan": lambda: both(
        lambda x, s: jax.lax.scan(lambda c, x: (c, layer(x, s)), 0, x)[1], X, SCALE
    ),
    "an activation": lambda: both(
        lambda x, s: normjax.layer_norm(x, s, activation=jax.nn.silu), X, SCALE
    ),
    "ghosts": lambda: both(
        lambda x, s: batch_norm(x, s, virtual_batch_size=2), X, SCALE
    ),
    "linen": lambda: both(
        lambda x, s: linen.LayerNorm().apply({"params": {"scale": s, "bias": s}}, x),
        X,
        SCALE,
    ),
    "bfloat16": lambda: both(layer, X.astype(jnp.bfloat16), SCALE),
    "an output that is wider": lambda: both(
        lambda x, s: normjax.layer_norm(x, s, dtype=jnp.float32),
        X.astype(jnp.float16),
        SCALE,
    ),
}


@needs_native
@pytest.mark.parametrize("case", WHERE_IT_SERVES)
def test_native_kernels_run_where_the_arrays_are_whole(case):
    assert WHERE_IT_SERVES[case]() == (1, 1)


def of_automatic_sharding():
    x = jax.device_put(MANY, NamedSharding(mesh((8,), ("d",)), P("d")))
    f = jax.jit(jax.grad(lambda x, s: (layer(x, s) ** 2).sum(), (0, 1)))
    text = f.lower(x, SCALE).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text
    return both(layer, x, SCALE)


def of_explicit_sharding():
    over = mesh((8,), ("d",), AxisType.Explicit)
    with jax.set_mesh(over):
        x = jax.device_put(MANY, NamedSharding(over, P("d")))
        return both(layer, x, SCALE)


def of_partial_manual():
    f = jax.shard_map(
        layer,
        mesh=mesh((4, 2), ("a", "b")),
        in_specs=(P("a"), P()),
        out_specs=P("a"),
        axis_names={"a"},
    )
    return both(f, MANY, SCALE)


def of_export():
    f = jax.jit(jax.grad(lambda x: (layer(x, SCALE) ** 2).sum()))
    text = export.export(f)(X).mlir_module()
    assert "normjax_forward" not in text and "normjax_backward" not in text
    return 0, 0


def of_machines():
    f = jax.jit(jax.grad(lambda x: (layer(x, SCALE) ** 2).sum())).trace(X)
    for platforms in (("cuda",), ("tpu",), ("cpu", "cuda")):
        text = f.lower(lowering_platforms=platforms).as_text()
        assert "normjax_forward" not in text and "normjax_backward" not in text
    return 0, 0


WHERE_IT_DOES_NOT = {
    "automatic sharding": of_automatic_sharding,
    "explicit sharding": of_explicit_sharding,
    "partial manual": of_partial_manual,
    "export": of_export,
    "other machines": of_machines,
    "implementation xla": lambda: both(
        lambda x, s: normjax.layer_norm(x, s, implementation="xla"), X, SCALE
    ),
    "mask": lambda: both(lambda x, s: normjax.layer_norm(x, s, where=X > 0), X, SCALE),
    "features first": lambda: both(
        lambda x, s: normjax.instance_norm(x, s, feature_axis=1),
        X.transpose(0, 2, 1),
        SCALE,
    ),
    "complex": lambda: both(lambda x, s: jnp.abs(layer(x + 1j, s)), X, SCALE),
    "synced": lambda: both(
        jax.vmap(
            lambda x, s: batch_norm(x, s, axis_name="d"), (0, None), axis_name="d"
        ),
        X,
        SCALE,
    ),
}


@needs_native
@pytest.mark.parametrize("case", WHERE_IT_DOES_NOT)
def test_elsewhere_the_body_runs(case):
    assert WHERE_IT_DOES_NOT[case]() == (0, 0)


@needs_native
def test_columns_beyond_the_caches_leave_y_to_xla():
    """It reads x for y together with what follows, and stores no y of its own."""

    def f(x, scale):
        return jax.nn.relu(batch_norm(x, scale))

    program = jax.jit(f).lower(LARGE, jnp.ones(1024)).compile()
    assert '"normjax_moments"' in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < LARGE.nbytes / 8
    x = jax.random.normal(KEY, LARGE.shape) - 3
    scale, bias = jnp.linspace(1, 2, 1024), jnp.linspace(0, 1, 1024)
    got = batch_norm(x, scale, bias, implementation="native")
    want = batch_norm(x, scale, bias, implementation="xla")
    assert_near(got, np.asarray(want), jnp.float32, c=20.0)
    square = jax.grad(lambda x: (f(x, scale) ** 2).sum())
    # Backward a call that names nothing leaves their sums to XLA, too.
    text = jax.jit(square).lower(x).compile().as_text()
    assert '"normjax_moments"' in text and '"normjax_sums"' not in text
    got = square(x)
    want = jax.grad(
        lambda x: (jax.nn.relu(batch_norm(x, scale, implementation="xla")) ** 2).sum()
    )(x)
    assert_near(got, np.asarray(want), jnp.float32, c=20.0)


@needs_native
def test_cotangents_of_moments_take_the_body_backward(float64):
    def f(x, scale):
        y, m = normjax.batch_norm(x, scale)
        return y.sum() + (m.var * jnp.arange(8.0)).sum() + m.mean[0]

    x = X.astype(jnp.float32)
    assert calls(jax.grad(f), x, SCALE.astype(jnp.float32)) == (1, 0)
    want = jax.grad(f)(x.astype(jnp.float64), SCALE.astype(jnp.float64))
    assert_near(jax.grad(f)(x, SCALE), np.asarray(want), jnp.float32)


@needs_native
def test_moments_are_those_of_the_body():
    far = X * 1e-3 + 100
    got = normjax.batch_norm(far, implementation="native")[1]
    want = normjax.batch_norm(far, implementation="xla")[1]
    for name in ("count", "carry", "squares", "mean"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.var, want.var, rtol=3e-7)
    np.testing.assert_allclose(got.rest, want.rest, atol=1e-9)


@needs_native
@pytest.mark.parametrize("name", ["layer", "rms", "batch", "group", "instance"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_what_it_is_reduced_with(name, value):
    x = X.at[1, 2, 3].set(value)
    norm = NORMS[name]
    got, want = (
        [f(x, SCALE, BIAS) for f in (functools.partial(norm, implementation=i),)]
        + list(gradients(norm, i)(x, SCALE, BIAS))
        for i in ("native", "xla")
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isnan(g), np.isnan(w))
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-38])
@pytest.mark.parametrize("name", ["layer", "rms", "batch", "group", "instance"])
def test_the_range_is_that_of_the_dtype(name, size):
    """Of the largest values squares overflow, and of the smallest vanish."""
    x = jnp.sin(jnp.arange(192.0) * 1.7).reshape(4, 6, 8) * size
    norm = functools.partial(NORMS[name], epsilon=1e-30)
    want, *dots = in_float64(norm, x, SCALE, BIAS)

    def f(x, scale, bias):
        y = norm(x, scale, bias, implementation="native")
        return (y * jnp.sin(3 * X) + y**2 / 5).sum()

    def exact(x, scale, bias):
        y = norm(x, scale, bias, implementation="xla")
        return (y * np.sin(3 * np.asarray(X, np.float64)) + y**2 / 5).sum()

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, SCALE, BIAS)]
        dots = jax.device_get(jax.jit(jax.grad(exact, (0, 1, 2)))(*wide))
    assert_near(norm(x, SCALE, BIAS, implementation="native"), want, jnp.float32)
    got = jax.jit(jax.grad(f, (0, 1, 2)))(x, SCALE, BIAS)
    # Of huge values dx is below the smallest normal number, and may be zero.
    tiny = float(np.finfo(np.float32).tiny)
    for g, w in zip(got, dots, strict=True):
        top = np.abs(w).max()
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-5 * top + 2 * tiny)


# Names. -----------------------------------------------------------------------------


def test_an_implementation_that_can_not_serve_says_why():
    ask = functools.partial(normjax.layer_norm, implementation="native")
    for call, why in {
        "mask": (lambda: ask(X, where=X > 0), "a mask or weights"),
        "complex": (lambda: ask(X + 1j), "complex"),
        "epsilon": (lambda: jax.jit(lambda e: ask(X, epsilon=e))(1e-3), "epsilon"),
        "empty": (lambda: ask(X[:0]), "shape"),
        "machine": (
            lambda: jax.jit(ask).trace(X).lower(lowering_platforms=("tpu",)),
            "a program for tpu",
        ),
    }.values():
        with pytest.raises(ValueError, match=why):
            call()
    with pytest.raises(ValueError, match="'xla' or 'native', or None"):
        normjax.layer_norm(X, implementation="pallas")
    with pytest.raises(ValueError, match="'xla' or 'native', or None"):
        linen.RMSNorm(implementation="cuda").init(KEY, X)


@needs_native
def test_an_implementation_says_why_shapes_and_dtypes_do_not_serve(float64):
    ask = functools.partial(normjax.instance_norm, implementation="native")
    with pytest.raises(ValueError, match="transposed"):
        ask(X, SCALE[:6], feature_axis=1)
    with pytest.raises(ValueError, match="not for float64"):
        ask(X.astype(jnp.float64))


@needs_native
def test_a_program_chooses_for_all_norms_that_name_none():
    normjax.set_implementation("xla")
    assert both(lambda x, s: normjax.rms_norm(x, s), X, SCALE) == (0, 0)
    named = functools.partial(normjax.rms_norm, implementation="native")
    assert both(named, X, SCALE) == (1, 1)
    normjax.set_implementation("native")
    # What the kernels do not serve is no error of a call that asked for nothing.
    normjax.layer_norm(X, where=X > 0)
    assert both(lambda x, s: normjax.rms_norm(x, s), X, SCALE) == (1, 1)
    with pytest.raises(ValueError, match="set_implementation: implementation must be"):
        normjax.set_implementation("fast")


def run(code, env=(), package=None):
    """Runs code in a process of its own; returns what it prints."""
    path = {"PYTHONPATH": str(package)} if package else {}
    env = {"NORMJAX_IMPLEMENTATION": "", **path, **dict(env)}
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": package}
    done = subprocess.run(command, env=env, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


ONE = """
import jax, jax.numpy as jnp, normjax
text = jax.jit(normjax.layer_norm).lower(jnp.ones((2, 3))).as_text()
print("native" if "normjax_forward" in text else "body")
print(float(normjax.layer_norm(jnp.array([[1.0, 3.0]])).sum()))
"""


@needs_native
def test_the_environment_chooses_too():
    assert "body" in run(ONE, {"NORMJAX_IMPLEMENTATION": "xla"})
    assert "native" in run(ONE, {"NORMJAX_IMPLEMENTATION": "native"})
    with pytest.raises(AssertionError, match="NORMJAX_IMPLEMENTATION: implementation"):
        run(ONE, {"NORMJAX_IMPLEMENTATION": "nativ"})


@needs_native
@pytest.mark.parametrize("damage", ["truncated", "of another kind", "absent"])
def test_a_library_that_does_not_load_is_said_once_and_not_used(damage, tmp_path):
    package = pathlib.Path(normjax.__file__).parent
    shutil.copytree(package, tmp_path / "normjax")
    lib = tmp_path / "normjax/kernels/native/libnormjax.so"
    if damage == "truncated":
        lib.write_bytes(lib.read_bytes()[:1000])
    elif damage == "of another kind":
        lib.write_bytes(b"MZ" + lib.read_bytes()[2:])
        found = hashlib.sha256(lib.read_bytes()).hexdigest()
        lib.with_suffix(".sha256").write_text(found)
    else:
        lib.unlink()
    said = run(ONE + ONE, package=tmp_path)
    assert "body" in said and "native\n" not in said
    assert said.count("RuntimeWarning") == (damage != "absent")


# The canonical form. ----------------------------------------------------------------


@needs_native
def test_a_library_for_a_newer_interface_of_xla_is_refused():
    library._check_interface((0, 1))
    for newer in ((0, 999), (1, 0)):
        with pytest.raises(ValueError, match="built for XLA's interface"):
            library._check_interface(newer)


def form(shape, axes, *parameters, group_axes=(), groups=0):
    return canonical.of(shape, axes, group_axes, groups, list(parameters))


def test_every_norm_has_one_form():
    c = (1, 1, 1, 8)
    assert form((4, 5, 6, 8), (3,), c, c) == ((120, 1, 1, 8), 1)
    assert form((4, 5, 6, 8), (3,)) == ((120, 1, 1, 8), 1)
    assert form((4, 5, 6, 8), (0, 1, 2), c, c) == ((1, 120, 8, 1), 1)
    assert form((4, 5, 6, 8), (1, 2), c) == ((4, 30, 8, 1), 1)
    assert form((4, 5, 6, 8), (1, 2, 3), c) == ((4, 30, 1, 8), 1)
    assert form((4, 5, 6, 8), (1, 2, 3)) == ((4, 1, 1, 240), 1)
    grouped = {"group_axes": (3,), "groups": 2}
    assert form((4, 5, 6, 8), (1, 2), c, **grouped) == ((4, 30, 2, 4), 1)
    assert form((4, 5, 6, 8), (), c, **grouped) == ((120, 1, 2, 4), 1)
    # Of ensembles: parameters for each member, and one for all.
    assert form((3, 4, 8), (2,), (3, 1, 8), (1, 1, 8)) == ((12, 1, 1, 8), 3)
    assert form((3, 4, 8), (1,), (3, 1, 8)) == ((3, 4, 8, 1), 3)
    assert form((1, 8), (1,), (1, 8)) == ((1, 1, 1, 8), 1)
    # Reductions of one value.
    assert form((5, 1), (1,), (1, 1)) == ((5, 1, 1, 1), 1)
    assert form((4, 1, 1, 8), (1, 2), c) == ((4, 1, 8, 1), 1)
    assert form((1, 8), (0,), (1, 8)) == ((1, 1, 8, 1), 1)


def test_what_would_be_transposed_has_none():
    assert form((4, 8, 6), (2,), (1, 8, 1)) is None
    assert form((4, 8, 6), (0, 2), (1, 8, 1)) is None
    assert form((4, 5, 8), (1,), (1, 5, 8)) is None
    assert form((3, 4, 8), (2,), (1, 4, 8)) is None
    assert form((4, 8, 5), (2,), (1, 8, 1), group_axes=(1,), groups=2) is None
    assert form((0, 8), (1,), (1, 8)) is None


def test_nnx_modules_pass_their_implementation_on():
    from flax import nnx as flax_nnx

    module = nnx.LayerNorm(8, implementation="native", rngs=flax_nnx.Rngs(0))
    with pytest.raises(ValueError, match="a mask or weights"):
        module(X, mask=X > 0)


@needs_native
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["batch", "group", "instance", "ghost"])
def test_sums_alone_give_what_whole_kernels_give(name, dtype, monkeypatch):
    """As of large columns, on small ones."""
    norm, x = functools.partial(NORMS[name], dtype=jnp.float32), X.astype(dtype)
    axes = (0, None, 0)

    def found():
        one = gradients(norm, "native")
        two = jnp.stack([x, x * 2]), SCALE, jnp.stack([BIAS] * 2)
        many = jax.jit(jax.vmap(one, axes))(*two)
        y = jax.jit(functools.partial(norm, implementation="native"))(x, SCALE, BIAS)
        return jax.device_get((y, jax.jit(one)(x, SCALE, BIAS), many))

    whole = found()
    monkeypatch.setattr(library, "_LARGE", {"one": 0, "several": 0})
    f = functools.partial(loss, norm, "native")
    text = jax.jit(jax.grad(f)).lower(x, SCALE, BIAS).compile().as_text()
    assert '"normjax_sums"' in text and '"normjax_moments"' in text
    alone = found()
    for a, w in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        assert_near(a, np.asarray(w, np.float64), a.dtype, c=20.0)

    def cubed(x, implementation):
        return (NORMS[name](x, None, None, implementation=implementation) ** 3).sum()

    back = jax.jit(jax.grad(cubed), static_argnums=1)
    for size in (1e30, 1e-30):  # squares that overflow, and that vanish
        with jax.enable_x64(True):
            x = jnp.asarray(np.asarray(X, np.float64) * size)
            want = jax.device_get(back(x, "xla"))
        got = back((X * size).astype(jnp.float32), "native")
        atol = 1e-4 * np.abs(want).max() + float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@needs_native
@pytest.mark.parametrize("of", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["layer", "batch", "group"])
def test_parameters_of_their_own_dtype(name, of):
    scale, bias = SCALE.astype(of), BIAS.astype(of)
    dots = tuple(
        jnp.cos(a.astype(jnp.float32)).astype(a.dtype) for a in (X, scale, bias)
    )

    def found(implementation):
        norm = functools.partial(NORMS[name], dtype=jnp.float32)
        f = functools.partial(loss, norm, implementation)
        gradient = jax.grad(f, (0, 1, 2))(X, scale, bias)
        return gradient, jax.jvp(f, (X, scale, bias), dots)[1]

    got, want = jax.jit(lambda: found("native"))(), jax.jit(lambda: found("xla"))()
    exact = in_float64(NORMS[name], X, scale, bias)[1:]
    for g, w, dtype in zip(got[0], exact, (jnp.float32, of, of), strict=True):
        assert g.dtype == dtype
        assert_near(g, w, dtype, c=20.0)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    slope = sum(
        (d.astype(jnp.float32) * e).sum() for d, e in zip(dots, exact, strict=True)
    )
    np.testing.assert_allclose(got[1], slope, rtol=1e-3)


@needs_native
def test_groups_of_features_in_another_order():
    """Groups are cut from the features in the order of their axes."""
    x = jnp.sin(jnp.arange(3 * 7 * 4 * 12.0)).reshape(3, 7, 4, 12)
    norm = functools.partial(normjax.group_norm, num_groups=6, feature_axis=(3, 2))
    want = norm(x, implementation="xla")
    assert_near(norm(x), np.asarray(want), jnp.float32, c=20.0)
    moved = norm(x.transpose(0, 1, 3, 2), feature_axis=(2, 3)).transpose(0, 1, 3, 2)
    assert_near(moved, np.asarray(want), jnp.float32, c=20.0)
    assert form(x.shape, (1,), group_axes=(3, 2), groups=6) is None


@needs_native
@pytest.mark.parametrize(("shape", "axis"), [((300, 300), 0), ((2, 16, 64, 130), 1)])
def test_rms_norm_over_large_columns(shape, axis, monkeypatch):
    monkeypatch.setattr(library, "_LARGE", {"one": 0, "several": 0})
    x = jax.random.normal(KEY, shape) + 1

    def f(implementation):
        norm = functools.partial(normjax.rms_norm, implementation=implementation)
        return jax.grad(lambda x: (norm(x, axis=axis) ** 3).sum())(x)

    family.assert_close(f("native"), f("xla"), x.size)


def test_ensembles_on_an_explicit_mesh():
    over = mesh((4, 2), ("a", "b"), AxisType.Explicit)
    x, place = X, NamedSharding(over, P("a"))
    scales = jnp.outer(jnp.arange(1.0, 5.0), SCALE)

    def f(x, scales, bias):
        norm = jax.vmap(normjax.layer_norm, (0, 0, None))
        return jnp.sin(norm(x, scales, bias)).sum()

    want = jax.grad(f, (0, 1, 2))(x, scales, BIAS)
    with jax.set_mesh(over):
        lying = [jax.device_put(a, place) for a in (x, scales)]
        got = jax.jit(jax.grad(f, (0, 1, 2)))(*lying, BIAS)
        one = jax.grad(
            lambda x: jax.vmap(lambda x: normjax.rms_norm(x, SCALE))(x).sum()
        )
        assert jax.jit(one)(lying[0]).shape == x.shape
    family.assert_close(jax.device_get(got), jax.device_get(want), X.size, c=20.0)


def test_debug_nans_names_the_operation():
    x = X.at[0, 0, 0].set(jnp.inf)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        normjax.layer_norm(x)
    with jax.debug_nans(True):
        normjax.layer_norm(X)


def test_policies_by_other_words_keep_the_moments():
    policies = jax.checkpoint_policies
    words = {"offload_src": "device", "offload_dst": "pinned_host"}
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["norm_moments"],
        names_which_can_be_offloaded=[],
        **words,
    )

    def f(x):
        return jnp.sin(normjax.layer_norm(jnp.cos(x))).sum()

    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(X))
    assert text.count("= norm_again[") == 1 and text.count("= norm[") == 1
    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(f)))(X))
    assert text.count("= norm_again[") == 0 and text.count("= norm[") == 2


WRITES = """
import pickle, jax, jax.numpy as jnp, normjax
from jax.experimental import serialize_executable
compiled = jax.jit(normjax.layer_norm).lower(jnp.ones((2, 3))).compile()
pickle.dump(serialize_executable.serialize(compiled), open("program", "wb"))
"""
READS = """
import pickle, jax.numpy as jnp, normjax
from jax.experimental import serialize_executable
program = serialize_executable.deserialize_and_load(*pickle.load(open("program", "rb")))
print(program(jnp.ones((2, 3))).sum())
"""


@needs_native
def test_a_compiled_program_runs_in_another_process(tmp_path):
    package = pathlib.Path(normjax.__file__).parent
    shutil.copytree(package, tmp_path / "normjax")
    run(WRITES, package=tmp_path)
    assert "0.0" in run(READS, package=tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", EVERY)
def test_the_body_for_gpus_is_the_formula(norm, dtype, monkeypatch):
    """Run on a CPU, which has no other way to see what a GPU is given."""
    asked = []

    def on_gpu(how, *operands):
        asked.append(how)
        return _operations._forward_on_gpu(how, *operands)

    monkeypatch.setattr(_operations._forward, "_body", on_gpu)
    options = {"implementation": "xla", "dtype": jnp.float32}
    f = jax.jit(lambda x: norm(x, SCALE, BIAS, **options))
    for x in (X, X * 1e30, X * 1e-30, X * 0 + 7, X + 1e4):
        x = x.astype(dtype)
        if not jnp.isfinite(x).all():  # beyond float16
            continue
        got = f(x)
        want = in_float64(norm, x, SCALE, BIAS)[0]
        assert_near(got, want, jnp.float32, c=20.0)
    assert asked


def test_the_body_for_gpus_leaves_groups_of_features_to_the_other(monkeypatch):
    monkeypatch.setattr(_operations._forward, "_body", _operations._forward_on_gpu)
    norm = functools.partial(normjax.group_norm, num_groups=2)
    want = in_float64(norm, X[0], SCALE, BIAS)[0]
    got = jax.jit(functools.partial(norm, implementation="xla"))(X[0], SCALE, BIAS)
    assert_near(got, want, jnp.float32)
    assert np.ptp(got) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["instance", "group", "ghost", "batch"])
def test_the_backward_body_for_gpus_is_that_of_the_formula(name, dtype, monkeypatch):
    """Also where a sample, or a position, has a scale of its own."""
    sums = []

    def from_sums(how, *operands):
        sums.append(how)
        return of_sums(how, *operands)

    of_sums = _operations._from_sums
    monkeypatch.setattr(_operations, "_from_sums", from_sums)
    monkeypatch.setattr(_operations._cotangents, "_body", _operations._cotangent_on_gpu)
    x = (jax.random.normal(KEY, (4, 5, 32, 8)) * 2 + 3).astype(dtype)
    norm = functools.partial(NORMS[name], dtype=jnp.float32)
    scales = [(8,), (4, 1, 1, 8), (1, 5, 32, 8)]
    for shape in scales[: 1 if name in ("batch", "ghost") else 3]:
        scale = jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
        want = in_float64(norm, x, scale, scale - 1)[1:]
        got = jax.jit(gradients(norm, "xla"))(x, scale, scale - 1)
        for g, w, of in zip(got, want, (dtype, jnp.float32, jnp.float32), strict=True):
            assert g.shape == w.shape and g.dtype == of
            assert_near(g, w, of, c=40.0)
    assert len(sums) == {"batch": 0, "ghost": 1}.get(name, 2)
