"""What XLA makes of it: collectives in the program, bytes kept for backward."""

import functools
import re

import family
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import AxisType, mesh
from family import FAMILY
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
from normjax import _devices

SHAPE = (16, 6, 5, 8)


def operations(f, *arguments):
    """How many all-reduces and all-gathers the compiled program has."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    return {
        name: len(re.findall(rf" {name}(?:-start)?\(", text))
        for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    }


def only(all_reduces):
    return {
        "all-reduce": all_reduces,
        "all-gather": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }


COUNTS = {"plain": None, "masked": bool, "weighted": jnp.float32}
counts = pytest.mark.parametrize("counts", COUNTS)


def arguments(counts, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), SHAPE, dtype)
    kind = COUNTS[counts]
    where = None if kind is None else jnp.ones((16, 6, 1, 1), kind)
    return x, jnp.ones(8), jnp.zeros(8), where


def by_name(f, way):
    """f over eight devices along the batch, with the axis named d."""
    if way == "pmap":
        return jax.pmap(f, axis_name="d", in_axes=(0, None, None, 0))
    return jax.shard_map(
        f,
        mesh=mesh((8,), ("d",)),
        in_specs=(P("d"), P(), P(), P("d")),
        out_specs=P("d"),
        check_vma=way == "shard_map",
    )


WAYS = ["shard_map", "unchecked", "pmap"]


@pytest.mark.parametrize(
    ("way", "groups", "counts"),
    family.combined(WAYS, [None, [[0, 1, 2], [3], [4, 5, 6, 7]]], COUNTS),
)
def test_named_sync_is_one_all_reduce_forward_and_one_backward(way, groups, counts):
    x, scale, bias, where = arguments(counts)

    def forward(x, scale, bias, where):
        return normjax.batch_norm(
            x, scale, bias, where=where, axis_name="d", axis_index_groups=groups
        )[0]

    def gradients(*a):
        def loss(x, scale, bias):
            return (jnp.sin(forward(x, scale, bias, a[3]))).sum()

        dx, *of_parameters = jax.grad(loss, (0, 1, 2))(*a[:3])
        # Each device's own part comes out, as the caller of a pmap would add them up.
        return dx, [jnp.broadcast_to(g, (1, *g.shape)) for g in of_parameters]

    if way == "pmap":
        x, where = jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), (x, where))
    inputs = x, scale, bias, where
    assert operations(by_name(forward, way), *inputs) == only(1)
    assert operations(by_name(gradients, way), *inputs) == only(2)


@pytest.mark.parametrize(("way", "counts"), family.combined(WAYS, COUNTS))
def test_sub_groups_of_one_size_sync_among_themselves_alone(way, counts):
    """One all-gather of the moments of four devices, and one sum for a gradient."""
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    x, _, _, where = arguments(counts)

    def forward(x, scale, bias, where):
        return normjax.batch_norm(
            x, where=where, axis_name="d", axis_index_groups=groups
        )[0]

    def gradient(*a):
        return jax.grad(lambda x: jnp.sin(forward(x, *a[1:])).sum())(a[0])

    if way == "pmap":
        x, where = jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), (x, where))
    for f, wanted in (
        (forward, ["all-gather"]),
        (gradient, ["all-gather", "reduce-scatter"]),
    ):
        program = jax.jit(by_name(f, way)).lower(x, None, None, where).compile()
        found = re.findall(r" (\S+)\(.* replica_groups=(\S+), ", program.as_text())
        assert sorted(found) == [(w, "{{0,2,4,6},{1,3,5,7}}") for w in wanted]


# The mean, in two parts, and the variance of 8 channels: a row for each of 8 devices.
ALL_ROWS = 8 * 3 * 8 * 4


@pytest.mark.parametrize(("limit", "all_reduces"), [(ALL_ROWS, 1), (ALL_ROWS - 1, 2)])
def test_large_moments_sync_in_two_all_reduces(limit, all_reduces, monkeypatch):
    monkeypatch.setattr(_devices, "ONE_ALL_REDUCE_BYTES", limit)
    jax.clear_caches()  # of what was traced with the other limit
    x, scale, bias, _ = arguments("plain")

    def forward(x, scale, bias, where):
        return normjax.batch_norm(x, scale, bias, axis_name="d")[0]

    got = operations(by_name(forward, "shard_map"), x, scale, bias, None)
    jax.clear_caches()
    assert got == only(all_reduces)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@counts
def test_sharded_batch_is_at_most_two_all_reduces_forward_and_one_back(kind, counts):
    devices = mesh((8,), ("d",), kind)
    split = NamedSharding(devices, P("d"))
    with jax.set_mesh(devices):
        x, scale, bias, where = arguments(counts)
        x, where = jax.tree.map(lambda a: jax.device_put(a, split), (x, where))

        def forward(x, scale, bias, where):
            return normjax.batch_norm(x, scale, bias, where=where)[0]

        def loss(x, scale, bias, where):
            return jnp.sin(forward(x, scale, bias, where)).sum()

        found = operations(forward, x, scale, bias, where)
        # A mask's counts are summed beside the values, in the same all-reduce.
        assert found == only(found["all-reduce"]) and found["all-reduce"] <= 2
        gradients = jax.grad(loss, (0, 1, 2))
        found = operations(gradients, x, scale, bias, where)
        assert found == only(found["all-reduce"]) and found["all-reduce"] <= 3


@pytest.mark.parametrize("norm", [n for n in FAMILY if n != "batch"])
def test_norms_within_a_sample_need_no_collective(norm):
    split = NamedSharding(mesh((8,), ("d",)), P("d"))
    x, scale, bias, _ = arguments("plain")
    x = jax.device_put(x, split)
    forward = functools.partial(FAMILY[norm].call, w=None)
    assert operations(lambda x, s, b: forward(x, s, b), x, scale, bias) == only(0)
    found = operations(jax.grad(lambda x: jnp.sin(forward(x, scale, bias)).sum()), x)
    assert found == only(0)


@counts
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("norm", FAMILY)
def test_backward_keeps_x_the_mask_the_moments_and_the_parameters(norm, dtype, counts):
    x, scale, bias, where = arguments(counts, dtype)
    row = FAMILY[norm]

    def pullback(x, scale, bias):
        return jax.vjp(lambda *a: row.call(*a, where), x, scale, bias)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, x, scale, bias))
    wide = jnp.promote_types(dtype, jnp.float32)
    count, mean, _ = family.reference_moments(row, x.astype(wide))
    moments = 2 * count.nbytes + 2 * mean.nbytes  # count, var, the mean in two parts
    mask = 0 if where is None else where.nbytes
    # The family lays the scale of these two along the second axis too.
    scales = x.shape[1] if norm in ("layer", "rms") else 1
    allowed = x.nbytes + mask + moments + scales * scale.nbytes
    assert sum(a.size * a.dtype.itemsize for a in kept) <= allowed
    assert [a.dtype for a in kept if a.shape == x.shape] == [x.dtype]


def test_layer_norm_in_bfloat16_keeps_a_quarter_of_what_flax_keeps():
    x = jnp.ones((1024, 1024), jnp.bfloat16)
    scale, bias = jnp.ones(1024), jnp.zeros(1024)

    def kept(f):
        found = jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], x, scale, bias)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(found))

    def theirs(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}}
        return flax.linen.LayerNorm(dtype=jnp.bfloat16).apply(variables, x)

    assert kept(normjax.layer_norm) <= 1.02 * x.nbytes
    assert kept(theirs) >= 4 * x.nbytes


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_all_norms_lower_for_accelerators_that_are_not_here(platform):
    """Forward and backward, in bfloat16, as one program."""
    x, scale, bias, _ = arguments("plain", jnp.bfloat16)

    def losses(x, scale, bias):
        ys = [norm.call(x, scale, bias, None) for norm in FAMILY.values()]
        return sum(jnp.sin(y.astype(jnp.float32)).sum() for y in ys)

    gradients = jax.jit(jax.grad(losses, (0, 1, 2)))
    exported = jax.export.export(gradients, platforms=[platform])(x, scale, bias)
    assert exported.platforms == (platform,)
    assert exported.mlir_module().count("stablehlo.reduce") > len(FAMILY)


# What a call costs before it runs.


def programs(f):
    """How many programs a call outside of jit compiles."""
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        f()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


@pytest.mark.parametrize(
    "name", ["moments", "Moments.merge", "merge", "update", "normalize", *FAMILY]
)
def test_a_call_outside_of_jit_is_one_program(name):
    # Sizes of no other test, so that none is compiled yet.
    x, ones = (
        jax.device_put(np.ones(shape, np.float32))
        for shape in ((7, 2, 3, 22), (1, 1, 1, 22))
    )
    m, n = (normjax.Moments(*[ones] * 7) for _ in "mn")
    running = normjax.RunningMoments(*[ones] * 4)
    calls = {
        "moments": lambda: normjax.moments(x, (0, 1, 2)),
        "Moments.merge": lambda: m.merge(n),
        "merge": lambda: normjax.merge(m, -1),
        "update": lambda: running.update(m),
        "normalize": lambda: normjax.normalize(x, m, epsilon=1e-5),
    }
    calls |= {k: lambda k=k: FAMILY[k].call(x, None, None, None) for k in FAMILY}
    # Batch norm then lays its moments along the features alone.
    assert programs(calls[name]) == 1 + (name == "batch")
    assert programs(calls[name]) == 0


@counts
@pytest.mark.parametrize("norm", FAMILY)
def test_no_function_of_jax_numpy_stays_a_call_in_a_norm(norm, counts):
    """As `jnp.where` does. Operators, which jax inlines at once, are not seen here."""
    x, scale, bias, where = arguments(counts)

    def loss(x, scale, bias):
        return FAMILY[norm].call(x, scale, bias, where).sum()

    def calls(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "jit":
                yield equation.params["name"]
            for inner in jaxprs_in_params(equation.params):
                yield from calls(inner)

    for f in (loss, jax.grad(loss, (0, 1, 2))):
        names = {*calls(jax.make_jaxpr(f)(x, scale, bias).jaxpr)}
        assert names <= {"standardize", "_measured"}  # where jax inlines late
