"""Faults of flax.linen: each check passes here and fails when pointed at Flax."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import AxisType, mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from normjax import linen


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def statistics_far_from_zero(library):
    x = normal((4096, 4)) + 1e4
    norm = library.BatchNorm(use_running_average=False, momentum=0.0)
    variables = norm.init(jax.random.key(0), x)
    _, after = norm.apply(variables, x, mutable=["batch_stats"])
    want = np.asarray(x, np.float64).var(0)
    np.testing.assert_allclose(after["batch_stats"]["var"], want, rtol=1e-5)


def rows_far_from_zero(library):
    x = normal((64, 768)) + 3000
    y, _ = library.LayerNorm().init_with_output(jax.random.key(0), x)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(y, want, atol=2e-3)


def synced(library, x, mask):
    """Running mean after one update that replaces it, over eight devices."""
    norm = library.BatchNorm(use_running_average=False, momentum=0.0, axis_name="d")
    variables = norm.init(jax.random.key(0), x)

    def local(x, mask):
        _, after = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return after["batch_stats"]["mean"]

    f = jax.shard_map(
        local, mesh=mesh((8,), ("d",)), in_specs=(P("d"), P("d")), out_specs=P()
    )
    return jax.jit(f)(x, mask)


def masked_sync_weighs_devices_by_count(library):
    x = normal((32, 3)) + jnp.arange(32.0)[:, None]
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (32, 1)).at[::4].set(True)
    want = np.asarray(x)[np.flatnonzero(mask[:, 0])].mean(0)
    np.testing.assert_allclose(synced(library, x, mask), want, rtol=1e-5)


def masked_sync_with_an_empty_device(library):
    x, mask = normal((32, 3)), (jnp.arange(32) < 28)[:, None]
    want = np.asarray(x)[:28].mean(0)
    np.testing.assert_allclose(synced(library, x, mask), want, rtol=1e-5, atol=1e-6)


def nan_in_the_padding_stays_out_of_the_gradient(library):
    mask = (jnp.arange(8) < 6)[:, None]
    x = jnp.where(mask, normal((8, 3)), jnp.nan)
    norm = library.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x, mask=mask)

    def loss(params):
        y, _ = norm.apply(
            {**variables, "params": params}, x, mask=mask, mutable=["batch_stats"]
        )
        return jnp.where(mask, y, 0).sum()

    gradients = jax.grad(loss)(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def empty_batch_leaves_the_statistics_alone(library):
    norm = library.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), jnp.ones((4, 3)))
    _, after = norm.apply(variables, jnp.zeros((0, 3)), mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"]
    )


def group_norm_takes_a_mask_that_broadcasts_over_features(library):
    x, mask = normal((2, 6, 4)), (jnp.arange(6) < 4)[None, :, None]
    norm = library.GroupNorm(2)
    y, variables = norm.init_with_output(jax.random.key(0), x, mask=mask)
    want = norm.apply(variables, x[:, :4])
    np.testing.assert_allclose(y[:, :4], want, atol=1e-5)


def group_norm_takes_channels_that_an_explicit_mesh_shards(library):
    devices = mesh((8,), ("d",), AxisType.Explicit)
    norm, x = library.GroupNorm(4), normal((2, 6, 16))
    y, variables = norm.init_with_output(jax.random.key(0), x)
    with jax.set_mesh(devices):
        split = jax.device_put(x, NamedSharding(devices, P(None, None, "d")))
        got = jax.jit(norm.apply)(variables, split)
    np.testing.assert_allclose(got, y, atol=1e-5)


def statistics_do_not_restart_without_a_word(library):
    x = normal((8, 3)) + 5
    norm = library.BatchNorm(use_running_average=False, momentum=0.5)
    params = norm.init(jax.random.key(0), x)["params"]
    try:
        _, after = norm.apply({"params": params}, x, mutable=["batch_stats"])
        _, after = norm.apply({"params": params}, x, mutable=["batch_stats"])
    except ValueError:
        return  # not without a word
    # Two updates by halves leave a quarter of the start, which is zero.
    want = 0.75 * x.mean(0)
    np.testing.assert_allclose(after["batch_stats"]["mean"], want, rtol=1e-5)


# Each with what Flax says or does.
OFF = "Not equal to tolerance"
CHECKS = {
    statistics_far_from_zero: OFF,
    rows_far_from_zero: OFF,
    masked_sync_weighs_devices_by_count: OFF,
    masked_sync_with_an_empty_device: OFF,
    nan_in_the_padding_stays_out_of_the_gradient: "assert False",
    empty_batch_leaves_the_statistics_alone: "Arrays are not equal",
    group_norm_takes_a_mask_that_broadcasts_over_features: "cannot reshape",
    group_norm_takes_channels_that_an_explicit_mesh_shards: "not supported",
    statistics_do_not_restart_without_a_word: OFF,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_here(check):
    check(linen)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_check_finds_the_fault_in_flax(check):
    with pytest.raises(Exception, match=CHECKS[check]):
        check(flax.linen)
