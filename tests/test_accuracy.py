"""The accuracy table of docs/accuracy.md: its bars, on the rows that are hardest."""

import math

import accuracy
import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from jax.sharding import NamedSharding, PartitionSpec

import normjax
from normjax import _devices, _measure, _moments

HARD = ["100", "1e5", "1e3, one value 0", "1, one value 1e4"]


@pytest.mark.parametrize(
    ("norm", "data", "who"), family.combined(family.FAMILY, HARD, accuracy.OURS)
)
def test_errors_stay_below_the_bar(norm, data, who):
    found, bars = accuracy.errors(norm, data, who), accuracy.bar(norm, data)
    missed = {m: (e, bars[m]) for m, e in found.items() if not e <= bars[m]}
    assert not missed


of_cpu = _measure._in_double
# What a GPU computes, and what a TPU does, of sharded arrays and of whole ones.
FORMS = {
    "one pass": lambda x, where, r: of_cpu(x, where, r, passes=1),
    "in float32": lambda x, where, r: _measure._in_dtype(x, where, r, jnp.float32),
    "of a sample": lambda x, where, r: _measure._in_dtype(
        x, where, r, jnp.float32, sampled=where is None
    ),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def another_form(request, monkeypatch):
    """Has a CPU compute moments as another platform does."""
    asked = []

    def form(x, where, r, passes):
        asked.append(passes)
        return request.param(x, where, r)

    monkeypatch.setattr(_measure, "_in_double", form)
    normjax.set_implementation("xla")
    jax.clear_caches()
    yield
    assert asked
    normjax.set_implementation(None)
    jax.clear_caches()


@pytest.mark.usefixtures("another_form")
@pytest.mark.parametrize(("norm", "data"), family.combined(["batch", "layer"], HARD))
def test_errors_stay_below_the_bar_as_other_platforms_compute(norm, data):
    found, bars = accuracy.errors(norm, data), accuracy.bar(norm, data)
    missed = {m: (e, bars[m]) for m, e in found.items() if not e <= bars[m]}
    assert not missed


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((8, 768), (1,)),
        ((8, 4096), (1,)),
        ((32, 14, 14, 4), (0, 1, 2)),
        ((64, 8), (0,)),
    ],
)
@pytest.mark.parametrize("far", [1e2, 1e4, 3e38])
def test_a_sample_that_is_far_from_the_rest_costs_few_digits(shape, axes, far):
    """The worst of data, for distances from the mean of a sample."""
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    seen = np.asarray(_measure._sample(jnp.asarray(numbers), axes))
    fraction = seen.size / numbers.size
    assert 1 / 33 <= fraction < 1 / 3
    x = np.random.default_rng(0).normal(size=shape)
    x.flat[seen.ravel()] += far
    if far > 1e37:  # as far as float32 goes, on either side
        x = np.where(x > 1e37, far, -far)
    x = x.astype(np.float32)
    r = _devices.Reduction(axes)
    m = jax.jit(lambda x: _measure._in_dtype(x, None, r, jnp.float32, sampled=True))(x)
    wide = x.astype(np.float64)
    want = wide.var(axes, keepdims=True)
    var = np.abs(np.asarray(m.var, np.float64))
    errors = var / np.asarray(_moments.unit_of(m.var), np.float64) ** 2 / want - 1
    assert np.abs(errors).max() < 4 * np.finfo(np.float32).eps / fraction
    mean = np.asarray(m.mean, np.float64) + np.asarray(m.rest, np.float64)
    off = (mean - wide.mean(axes, keepdims=True)) / np.sqrt(want)
    assert np.abs(off).max() < 3e-6


def test_the_bar_finds_what_flax_loses():
    found, bars = accuracy.errors("layer", "1e3", "flax"), accuracy.bar("layer", "1e3")
    assert found["y"] > 100 * bars["y"]


def lowered_for_a_tpu(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def test_a_sample_is_of_what_is_at_hand_and_counts():
    """Of divided axes it could take collectives; one of padding tells nothing."""
    x = jnp.ones((64, 2, 8))
    assert "stablehlo.slice" in lowered_for_a_tpu(normjax.batch_norm, x)
    over = NamedSharding(mesh((8,), ("d",)), PartitionSpec("d"))
    divided = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over)
    assert "stablehlo.slice" not in lowered_for_a_tpu(normjax.batch_norm, divided)
    assert "stablehlo.slice" not in lowered_for_a_tpu(normjax.layer_norm, divided)
    images = jax.ShapeDtypeStruct((64, 4, 4, 8), x.dtype, sharding=over)
    assert "stablehlo.slice" in lowered_for_a_tpu(normjax.batch_norm, images)

    def masked(x):
        return normjax.batch_norm(x, where=x > 0)

    assert "stablehlo.slice" not in lowered_for_a_tpu(masked, x)

    def synced(x):
        return normjax.moments(x, (0, 1), axis_name="d").var

    of = {"mesh": mesh((8,), ("d",)), "in_specs": over.spec, "out_specs": over.spec}
    assert "stablehlo.slice" in lowered_for_a_tpu(jax.shard_map(synced, **of), x)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((4, 3), ()),
        ((4, 1), (1,)),
        ((1, 1, 1, 3), (1, 2)),
        ((0, 3), (0,)),
        ((0, 768), (1,)),
        ((4, 0), (0,)),
        (("b", 768), (1,)),
        (("b", 8, 4, 3), (1, 2)),
    ],
)
def test_of_few_values_or_none_there_is_a_program_for_a_tpu(shape, axes):
    def f(x):
        return normjax.moments(x, axes).var if axes else normjax.instance_norm(x)

    one, spec = mesh((1,), ("d",)), PartitionSpec()
    f = jax.shard_map(f, mesh=one, in_specs=spec, out_specs=spec)
    if "b" in shape:
        shape = (*jax.export.symbolic_shape("b"), *shape[1:])
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        exported = jax.export.export(jax.jit(f), platforms=["cpu", "tpu"])(x)
        assert exported.platforms == ("cpu", "tpu")
    else:
        assert "func.func public @main" in lowered_for_a_tpu(f, jnp.ones(shape))
        assert jax.jit(f)(jnp.ones(shape)).size == math.prod(
            1 if a in axes else n for a, n in enumerate(shape)
        )
