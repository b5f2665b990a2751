"""Any mesh: data and model axes, features, space and parameters sharded over them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import assert_close, combined
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax

SHAPE = (8, 8, 2, 8)  # [N, S, T, C]
MESH = (4, 2), ("data", "model")
NORMS = {
    "batch": lambda *a, **k: normjax.batch_norm(*a, **k)[0],
    "layer": normjax.layer_norm,
    "rms": lambda x, scale, bias, **k: normjax.rms_norm(x, scale, **k) + bias,
    "group": functools.partial(normjax.group_norm, num_groups=2),
    "instance": normjax.instance_norm,
}
LAYOUTS = {
    "data": P("data"),
    "data and model": P(("data", "model")),
    "data, features over model": P("data", None, None, "model"),
    "data, sequence over model": P("data", "model"),
    "space over data, features over model": P(None, "data", None, "model"),
}


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    x = 2 * jax.random.normal(keys[0], SHAPE) + 1
    return x, *(jax.random.normal(k, (8,)) + 1 for k in keys[1:])


def results(norms, x, scale, bias):
    """For each norm y and the gradients of x, scale and bias."""

    def loss(norm, *a):
        y = NORMS[norm](*a)
        return jnp.sin(y).sum(), y

    found = {}
    for norm in norms:
        of = jax.value_and_grad(functools.partial(loss, norm), (0, 1, 2), has_aux=True)
        (_, y), gradients = of(x, scale, bias)
        found[norm] = (y, *gradients)
    return found


jitted = jax.jit(results, static_argnums=0)


KINDS = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"


def moves(text):
    """The elements of each array that a collective brings to a device."""
    found = []
    for line in text.splitlines():
        head, *rest = re.split(rf" (?:{KINDS})(?:-start)?\(", line)
        if rest:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", head.split(" = ")[1])
            found += [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
    return found


def moved(text):
    return max(moves(text), default=0)


def test_what_moves_is_seen():
    """An array is found in whichever collective, alone and in a tuple."""
    devices = mesh((8,), ("d",))
    x = jnp.ones((8, 16, 3))

    def text(f, out):
        one = jax.shard_map(f, mesh=devices, in_specs=P("d"), out_specs=out)
        return jax.jit(one).lower(x).compile().as_text()

    def exchanged(a):
        return lax.all_to_all(a, "d", split_axis=1, concat_axis=0, tiled=True)

    def summed(a):
        return lax.psum(jnp.zeros((8, 16, 3)).at[lax.axis_index("d")].set(a[0]), "d")

    assert moved(text(exchanged, P(None, "d"))) >= 2 * 3
    assert moved(text(summed, P())) == x.size
    assert moved(text(lambda a: a + 1, P("d"))) == 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("layout", "kind"), combined(LAYOUTS, [AxisType.Auto, AxisType.Explicit])
)
def test_a_mesh_changes_no_digit_and_moves_no_x(layout, kind):
    """As on one device, each norm; parameters lie as the features do."""
    norms = tuple(NORMS)
    want = jax.tree.map(np.asarray, jitted(norms, *arguments()))
    spec = LAYOUTS[layout]
    of_features = P(spec[3]) if len(spec) == 4 else P()
    devices = mesh(*MESH, kind)
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(a, NamedSharding(devices, s))
            for a, s in zip(arguments(), (spec, of_features, of_features), strict=True)
        ]
        program = jitted.lower(norms, *placed).compile()
        got = jax.tree.map(np.asarray, program(*placed))
    assert_close(got, want, math.prod(SHAPE))
    # Moments and parameters may travel; not x, nor a device's piece of it.
    assert moved(program.as_text()) < math.prod(SHAPE) / devices.size


@pytest.mark.usefixtures("float64")
def test_parameters_sharded_over_the_data_axis_are_all_that_is_gathered():
    """Fully sharded data parallel: each device has a piece of scale and of bias."""
    norms = ("batch", "layer")
    want = jax.tree.map(np.asarray, jitted(norms, *arguments()))
    devices = mesh((8,), ("data",))
    split = NamedSharding(devices, P("data"))
    placed = [jax.device_put(a, split) for a in arguments()]
    program = (
        jax.jit(results, static_argnums=0, out_shardings=split)
        .lower(norms, *placed)
        .compile()
    )
    assert_close(jax.tree.map(np.asarray, program(*placed)), want, math.prod(SHAPE))
    assert moved(program.as_text()) <= 2 * 8  # scale and bias


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_axis_by_name_and_the_other_automatic(check_vma):
    """shard_map over data alone; the features lie over model, which is left to jit."""
    x, scale, bias = arguments()
    want = NORMS["batch"](x, scale, bias)
    devices = mesh(*MESH)
    with jax.set_mesh(devices):
        split = jax.shard_map(
            functools.partial(NORMS["batch"], axis_name="data"),
            mesh=devices,
            in_specs=(P("data"), P(), P()),
            out_specs=P("data"),
            axis_names={"data"},
            check_vma=check_vma,
        )
        place = functools.partial(NamedSharding, devices)
        x = jax.device_put(x, place(P("data", None, None, "model")))
        scale, bias = (jax.device_put(a, place(P("model"))) for a in (scale, bias))
        program = jax.jit(split).lower(x, scale, bias).compile()
        got = np.asarray(program(x, scale, bias))
    assert_close(got, np.asarray(want), math.prod(SHAPE))
    assert moved(program.as_text()) < math.prod(SHAPE) / 8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("ghosts", "kind"), combined([None, 1], [AxisType.Auto, AxisType.Explicit])
)
def test_masks_and_gradients_by_name_with_the_features_over_the_other(kind, ghosts):
    x, *_ = arguments()
    where = jnp.ones((len(x), 1, 1, 1), bool).at[1:3].set(False)
    devices = mesh(*MESH, kind)

    def gradient(x, where, axis_name=None):
        def loss(x):
            y, _ = normjax.batch_norm(
                x, where=where, axis_name=axis_name, virtual_batch_size=ghosts
            )
            return jnp.sin(y).sum()

        return jax.grad(loss)(x)

    want = gradient(x, where)
    with jax.set_mesh(devices):
        lies = NamedSharding(devices, P("data", None, None, "model"))
        placed = jax.device_put(x, lies)
        counted = jax.device_put(where, NamedSharding(devices, P("data")))

        def compiled(f):
            data = P("data")
            split = jax.shard_map(f, in_specs=data, out_specs=data, axis_names={"data"})
            return jax.jit(split).lower(placed, counted).compile()

        program = compiled(functools.partial(gradient, axis_name="data"))
        got = np.asarray(program(placed, counted))
        # XLA itself gathers what comes into and out of such a shard_map, or does not.
        bare = compiled(lambda x, where: jnp.where(where, jnp.sin(x), 0.0))
    assert_close(got, np.asarray(want), math.prod(SHAPE))
    large, of_bare = (
        [n for n in moves(p.as_text()) if n >= math.prod(SHAPE) / 8]
        for p in (program, bare)
    )
    assert large == of_bare


@pytest.mark.usefixtures("float64")
def test_an_axis_of_size_1_lies_over_an_explicit_mesh_as_it_did():
    """Over a mesh axis of one device, as in a trial run: so do y and its gradients."""
    norms = ("batch", "layer")
    x, scale, bias = arguments()
    x = x[:, :1]
    scale = scale * jnp.ones_like(x)  # of the rank of x, and lies as x does
    want = jax.tree.map(np.asarray, jitted(norms, x, scale, bias))
    devices = mesh((8, 1), ("data", "model"), AxisType.Explicit)
    lies = NamedSharding(devices, P("data", "model"))
    with jax.set_mesh(devices):
        x, scale = jax.device_put((x, scale), lies)
        got = jitted(norms, x, scale, bias)
        for y, dx, dscale, _ in got.values():
            assert (
                jax.typeof(y) == jax.typeof(dx) == jax.typeof(dscale) == jax.typeof(x)
            )
    assert_close(jax.tree.map(np.asarray, got), want, math.prod(x.shape))


@pytest.mark.usefixtures("float64")
def test_no_mesh_needs_to_be_in_use_for_arrays_that_lie_on_an_explicit_one():
    x, scale, bias = arguments()
    want = jitted(tuple(NORMS), x, scale, bias)["group"]
    devices = mesh(*MESH, AxisType.Explicit)
    placed = jax.device_put(x, NamedSharding(devices, P("data", None, None, "model")))
    got = jitted(("group",), placed, scale, bias)["group"]
    assert_close(*jax.tree.map(np.asarray, (got, want)), math.prod(SHAPE))
    m = normjax.moments(placed, 0, where=jnp.ones((8, 1, 1, 1), bool))
    assert m.count.sharding == m.mean.sharding
    alone = normjax.moments(x, 0)
    assert_close(*jax.tree.map(np.asarray, (m.var, alone.var)), len(x))


@pytest.mark.usefixtures("float64")
def test_moments_merge_over_an_explicit_mesh():
    """A stream that starts with nothing, of batches with a mask and without."""
    x = arguments()[0].reshape(2, -1, 8)
    where = jnp.arange(x.shape[1])[:, None] < 9

    @jax.jit
    def stream(batches, start):
        def step(m, x):
            m = m.merge(normjax.moments(x, 0))
            return m.merge(normjax.moments(x, 0, where=where)), None

        return lax.scan(step, start, batches)[0]

    empty = normjax.Moments.empty((1, 8), jnp.float64)
    want = jax.tree.map(np.asarray, stream(x, empty))
    devices = mesh((8,), ("model",), AxisType.Explicit)
    with jax.set_mesh(devices):
        x = jax.device_put(x, NamedSharding(devices, P(None, None, "model")))
        lying = jax.device_put(empty, NamedSharding(devices, P(None, "model")))
        for start in (jax.device_put(empty, P()), lying):
            got = stream(x, start)
            assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, start)
            assert_close(jax.tree.map(np.asarray, got), want, x.size)


SUB_GROUPS = [((0, 2), (3, 1)), ((0,), (3, 1, 2))]


@functools.partial(jax.jit, static_argnums=1)
def gradient_of_groups(x, groups):
    """As if the devices of each group, a fourth of the batch each, were alone."""

    def loss(x):
        parts = x.reshape(4, 2, *SHAPE[1:])
        of_groups = [
            normjax.batch_norm(jnp.concatenate([parts[i] for i in group]))[0]
            for group in groups
        ]
        return sum(jnp.sin(y).sum() for y in of_groups)

    return jax.grad(loss)(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", SUB_GROUPS)
def test_sub_groups_by_name_with_the_features_over_the_other(groups, kind):
    x = arguments()[0]
    want = np.asarray(gradient_of_groups(x, groups))

    def local(x):
        def loss(x):
            y, _ = normjax.batch_norm(x, axis_name="data", axis_index_groups=groups)
            return jnp.sin(y).sum()

        return jax.grad(loss)(x)

    devices = mesh(*MESH, kind)
    with jax.set_mesh(devices):
        data = P("data")
        split = jax.shard_map(local, in_specs=data, out_specs=data, axis_names={"data"})
        lies = NamedSharding(devices, P("data", None, None, "model"))
        got = np.asarray(jax.jit(split)(jax.device_put(x, lies)))
    assert_close(got, want, math.prod(SHAPE))


@pytest.mark.usefixtures("float64")
def test_a_mesh_axis_is_a_group_of_devices():
    """Synced over data alone, each slice along model is a batch of its own."""
    x, scale, bias = arguments()
    devices = mesh(*MESH)
    split = jax.shard_map(
        functools.partial(NORMS["batch"], axis_name="data"),
        mesh=devices,
        in_specs=(P(("model", "data")), P(), P()),
        out_specs=P(("model", "data")),
    )
    want = jnp.concatenate(
        [NORMS["batch"](half, scale, bias) for half in (x[:4], x[4:])]
    )
    assert_close(jax.jit(split)(x, scale, bias), want, math.prod(SHAPE))


def test_a_mesh_axis_that_is_not_there_is_named():
    x, *_ = arguments()
    devices = mesh(*MESH)
    with pytest.raises(ValueError) as error, jax.set_mesh(devices):
        normjax.batch_norm(x, axis_name="batch")
    assert str(error.value) == (
        "batch_norm: axis_name must name an axis of the pmap, shard_map or vmap around"
        " the call. Got axis_name='batch'; the mesh in use has ('data', 'model'). Call"
        " it inside one of those; under jit over sharded arrays leave axis_name=None,"
        " the statistics are synced without it."
    )


def test_a_mesh_axis_that_shard_map_leaves_to_the_compiler_is_named():
    x, *_ = arguments()
    split = jax.shard_map(
        functools.partial(normjax.layer_norm, axis_name="model"),
        mesh=mesh(*MESH),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(ValueError) as error:
        jax.jit(split)(x)
    assert str(error.value) == (
        "layer_norm: axis_name must name an axis of the pmap, shard_map or vmap around"
        " the call. Got axis_name='model'; the shard_map around the call has ('data',)."
        " Add it to the axis_names of the shard_map, or leave it out: over axes that"
        " are the compiler's, the statistics are synced without it."
    )


def test_an_axis_of_vmap_where_shard_map_checks_what_varies_is_refused():
    x, *_ = arguments()

    @functools.partial(jax.jit, static_argnums=1)
    def forward(x, check_vma):
        def norm(x):
            return normjax.batch_norm(x, axis_name=("data", "micro"))[0]

        split = jax.shard_map(
            jax.vmap(norm, axis_name="micro"),
            mesh=mesh(*MESH),
            in_specs=P(None, "data"),
            out_specs=P(None, "data"),
            check_vma=check_vma,
        )
        return split(x.reshape(2, 4, *SHAPE[1:])).reshape(SHAPE)

    with pytest.raises(ValueError) as error:
        forward(x, True)
    assert str(error.value) == (
        "batch_norm: an axis of vmap must not be synced within a shard_map that checks"
        " what varies, which JAX cannot. Got axis_name='micro' within a shard_map of"
        " ('data', 'model'). Pass check_vma=False to the shard_map."
    )
    assert_close(forward(x, False), normjax.batch_norm(x)[0], math.prod(SHAPE))


@pytest.mark.usefixtures("float64")
def test_groups_of_two_feature_axes_lie_on_an_explicit_mesh():
    """With a batch that is sharded, and without an axis of space."""
    devices = mesh(*MESH, AxisType.Explicit)
    x = jax.random.normal(jax.random.key(0), (4, 2, 8, 2))

    def results(x):
        def loss(x):
            y = normjax.group_norm(x, feature_axis=(1, 2), num_groups=4)
            return jnp.sin(y).sum(), y

        (_, y), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx

    want = jax.jit(results)(x)
    with jax.set_mesh(devices):
        for spec in (P("data"), P(("data",), None, None, "model")):
            got = jax.jit(results)(jax.device_put(x, NamedSharding(devices, spec)))
            assert_close(got, want, 8)


@pytest.mark.usefixtures("float64")
def test_ghosts_with_a_mask_that_lies_otherwise_on_an_explicit_mesh():
    devices = mesh(*MESH, AxisType.Explicit)
    x = jax.random.normal(jax.random.key(0), (16, 4, 6))
    where = jax.random.bernoulli(jax.random.key(1), 0.7, (16, 4, 1))

    def results(x, where):
        return normjax.batch_norm(x, where=where, virtual_batch_size=4)

    want = jax.jit(results)(x, where)
    with jax.set_mesh(devices):
        x = jax.device_put(x, NamedSharding(devices, P("data")))
        for spec in (P(), P("model"), P(("data", "model")), P(None, "data")):
            laid = jax.device_put(where, NamedSharding(devices, spec))
            assert_close(jax.jit(results)(x, laid), want, 64)
