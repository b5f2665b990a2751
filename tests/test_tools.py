"""The tools: batches of any size, and replicas that should be equal."""

import functools
from collections import defaultdict

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import assert_close
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
from normjax import tools
from normjax.nnx import BatchNorm

# Batches.


@pytest.mark.parametrize("n", [0, 3, 5])
def test_a_padded_batch_has_the_statistics_of_what_is_real(n):
    rng = np.random.default_rng(n)
    batch = {"x": rng.normal(size=(n, 4, 2)).astype(np.float32), "y": np.arange(n)}
    padded, mask = tools.pad_batch(batch, 5)
    assert padded["x"].shape == (5, 4, 2) and padded["y"].shape == (5,)
    assert padded["x"].dtype == np.float32 and type(padded["x"]) is np.ndarray
    assert mask.tolist() == [i < n for i in range(5)]
    y, m = normjax.batch_norm(padded["x"], where=mask[:, None, None])
    want, real = normjax.batch_norm(batch["x"])
    assert_close((y[:n], m.mean, m.var), (want, real.mean, real.var), 20)
    assert not y[n:].any()


def test_arrays_of_jax_stay_on_their_device():
    padded, _ = tools.pad_batch(jnp.ones((2, 3)), 4)
    assert isinstance(padded, jax.Array) and padded.sum() == 6


def test_hosts_with_their_own_sizes_have_the_statistics_of_all():
    """Eight hosts, one with nothing: as of the samples one after another."""
    sizes = [3, 0, 4, 1, 2, 4, 4, 3]
    rng = np.random.default_rng(0)
    pieces = [
        rng.normal(i, 2, size=(n, 5)).astype(np.float32) for i, n in enumerate(sizes)
    ]
    padded, masks = zip(*(tools.pad_batch(p, 4) for p in pieces), strict=True)

    def f(x, mask):
        m = normjax.batch_norm(x, where=mask[:, None], axis_name="d")[1]
        return m.count, m.mean, m.var

    split = jax.shard_map(f, mesh=mesh((8,), ("d",)), in_specs=P("d"), out_specs=P())
    got = split(np.concatenate(padded), np.concatenate(masks))
    m = normjax.batch_norm(np.concatenate(pieces))[1]
    assert_close(got, (m.count, m.mean, m.var), sum(sizes))


@pytest.mark.parametrize(
    ("batch", "size", "message"),
    [
        (
            {"x": np.ones((2, 3)), "y": np.ones(3)},
            4,
            "pad_batch: all arrays of a batch must have as many samples. Got 2 in ['x'],"
            " 3 in ['y']. Take both from the same samples.",
        ),
        (
            np.ones((5, 3)),
            4,
            "pad_batch: a batch must not have more samples than it is padded to. Got 5"
            " samples, size=4. Pass size=5 or more, the same on all hosts.",
        ),
        (
            {"x": np.ones(3), "epoch": 2},
            4,
            "pad_batch: a batch is a tree of arrays whose first axis is that of the"
            " samples. Got ['epoch'] of shape (). Leave out of the batch what is not of"
            " samples.",
        ),
        (
            {},
            4,
            "pad_batch: a batch is a tree of arrays whose first axis is that of the"
            " samples. Got no arrays. Leave out of the batch what is not of samples.",
        ),
    ],
)
def test_batches_that_disagree_are_refused(batch, size, message):
    with pytest.raises(ValueError) as error:
        tools.pad_batch(batch, size)
    assert str(error.value) == message


def test_a_batch_of_keys_is_padded():
    keys = jax.random.split(jax.random.key(0), 3)
    padded, mask = tools.pad_batch({"key": keys}, 4)
    assert padded["key"].dtype == keys.dtype and mask.sum() == 3
    assert (padded["key"][:3] == keys).all()


@pytest.mark.parametrize("size", [4.0, "4", True])
def test_a_size_that_is_no_integer_is_refused(size):
    with pytest.raises(TypeError) as error:
        tools.pad_batch(np.ones(3), size)
    assert str(error.value) == (
        "pad_batch: size must be an integer, the number of samples that is wanted. Got"
        f" size={size!r}. Pass the size of the largest batch of all hosts."
    )


def test_a_global_batch_may_hold_keys():
    keys = jax.random.split(jax.random.key(0), 8)
    sharding = NamedSharding(mesh((8,), ("d",)), P("d"))
    whole = tools.global_batch({"key": keys, "x": np.ones((8, 2))}, sharding)
    assert whole["key"].sharding.is_equivalent_to(sharding, 1)
    assert whole["key"].dtype == keys.dtype and (whole["key"] == keys).all()


def test_what_is_not_of_samples_is_refused_in_a_global_batch():
    sharding = NamedSharding(mesh((8,), ("d",)), P("d"))
    with pytest.raises(ValueError) as error:
        tools.global_batch({"x": np.ones(8), "epoch": 2}, sharding)
    assert str(error.value) == (
        "global_batch: a batch is a tree of arrays whose first axis is that of the"
        " samples. Got ['epoch'] of shape (). Leave out of the batch what is not of"
        " samples."
    )


# Replicas.

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "complex64"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "complex128", "int64"])
def test_a_checksum_sees_every_bit_and_place(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        a = jnp.asarray(rng.integers(0, 2, 24).reshape(2, 12), dtype)
        before = int(tools.checksum(a)[0])
        assert int(tools.checksum(jnp.array(a))[0]) == before
        for i in range(12):
            other = a.at[1, i].set(~a[1, i] if dtype == "bool" else a[1, i] + 1)
            assert int(tools.checksum(other)[0]) != before
        assert int(tools.checksum(jnp.roll(a, 1))[0]) != before


SLIPS = {
    "its sign": jnp.negative,
    "a sum for a mean, over 8 devices": lambda a: 8 * a,
    "half of it": lambda a: a / 2,
    "halves that change places": lambda a: jnp.roll(a, a.size // 2),
    "its first two, of opposite signs": lambda a: a.at[:2].set(a[1::-1]),
    "the other constant": lambda a: jnp.ones_like(a) - a,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("slip", SLIPS)
def test_a_checksum_sees_what_goes_wrong_everywhere_at_once(slip, dtype):
    """Sums of the words times their places would not: of 2n places it is 0 mod 2n."""
    with jax.enable_x64(True):
        a = jnp.asarray(np.random.default_rng(0).normal(size=512), dtype)
        a = a.at[1].set(-a[0])
        if slip == "the other constant":
            a = jnp.zeros_like(a)
        other = SLIPS[slip](a)
        assert other.dtype == a.dtype and (other != a).any()
        assert int(tools.checksum(other)[0]) != int(tools.checksum(a)[0])


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3fn", "float4_e2m1fn"])
def test_a_checksum_takes_narrow_dtypes(dtype):
    one, zero = tools.checksum([jnp.ones(3, dtype), jnp.zeros(3, dtype)])
    assert int(one) != int(zero)


def test_a_checksum_takes_keys_nan_and_nothing():
    tree = {"key": jax.random.key(3), "nan": jnp.full(2, jnp.nan), "none": None}
    assert tools.checksum(tree).shape == (2,)
    assert (tools.checksum(tree) == tools.checksum(tree)).all()
    assert tools.checksum({}).shape == (0,)


def placed(a, spec, shape=(4, 2), changed=()):
    """A global array whose pieces on some devices are not what they should be."""
    sharding = NamedSharding(mesh(shape, ("d", "m")[: len(shape)]), spec)
    pieces = []
    for device, index in sharding.devices_indices_map(a.shape).items():
        piece = np.array(a[index])
        if device.id in changed:
            piece.flat[-1] += 1
        pieces.append(jax.device_put(piece, device))
    return jax.make_array_from_single_device_arrays(a.shape, sharding, pieces)


A = np.arange(32, dtype=np.float32).reshape(8, 4)


@pytest.mark.parametrize("spec", [P(), P("m")], ids=str)
def test_a_replica_that_drifts_is_named(spec):
    tree = {"fine": placed(A, P()), "mean": placed(A, spec, changed=[5])}
    (drift,) = tools.find_drift(tree)
    assert (drift.path, [d.id for d in drift.devices], drift.of) == ("['mean']", [5], 8)
    assert str(drift) == f"['mean'] differs on {drift.devices[0]}, of 8 devices"


def test_of_two_replicas_the_second_is_named():
    """The four pieces along d are on two devices each, (0, 1), (2, 3) and so on."""
    (drift,) = tools.find_drift([placed(A, P("d"), changed=[4])])
    assert [d.id for d in drift.devices] == [5]


def test_nothing_is_found_where_nothing_drifts():
    tree = {"a": placed(A, P()), "b": placed(A, P("d", "m"), changed=[2])}
    assert tools.find_drift(tree) == [] == tools.find_drift({})


def test_arrays_that_wait_in_the_memory_of_the_host_are_compared():
    there = placed(A, P(), changed=[5])
    tree = jax.device_put([there], there.sharding.with_memory_kind("pinned_host"))
    (drift,) = tools.find_drift(tree)
    assert [d.id for d in drift.devices] == [5]


def test_it_is_one_collective():
    tree = [placed(A, P()), placed(A, P("m")), placed(A[0], P())]
    program = tools.replicas._gathered(
        tree[0].sharding.mesh, tuple(a.sharding for a in tree)
    )
    text = program.lower(tree).compile().as_text()
    assert text.count(" all-reduce(") == 1 and " all-gather(" not in text


def test_stacked_replicas_are_compared():
    stacked = {"mean": jnp.zeros((8, 3)).at[6, 1].set(1e-7), "var": jnp.ones((8, 3))}
    (drift,) = tools.find_drift(stacked, stacked=True)
    assert drift == tools.Drift("['mean']", (6,), 8)
    assert tools.find_drift([jnp.zeros((0, 3))], stacked=True) == []


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_what_numpy_holds_beyond_the_digits_of_jax_is_compared(dtype):
    a = np.full((3, 4), 1, dtype)
    a[2, 1] += 2**40 if dtype == "int64" else 1e-12
    (drift,) = tools.find_drift([a], stacked=True)
    assert drift.devices == (2,)
    assert (tools.checksum(a[0]) == tools.checksum(a[1])).all()
    assert (tools.checksum(a[0]) != tools.checksum(a[2])).all()


def test_stacked_replicas_are_compiled_once():
    tree = {"mean": jnp.zeros((8, 5))}
    tools.find_drift(tree, stacked=True)
    before = tools.replicas._checksums._cache_size()
    tools.find_drift(jax.tree.map(lambda a: a + 1, tree), stacked=True)
    assert tools.replicas._checksums._cache_size() == before > 0


def statistics():
    """Of replicas that never synced, and of their data together."""
    rng = np.random.default_rng(0)
    x = rng.normal(np.arange(8)[:, None, None], 2, size=(8, 16, 3)).astype(np.float32)
    of_each = {"mean": jnp.asarray(x.mean(1)), "var": jnp.asarray(x.var(1))}
    whole = x.reshape(-1, 3)
    return of_each, {"mean": whole.mean(0), "var": whole.var(0)}


@pytest.mark.parametrize("how", ["stacked", "pmap", "shard_map"])
def test_replicas_merge_to_the_statistics_of_all_their_data(how):
    of_each, want = statistics()
    tree = {"Net": {"BatchNorm_0": of_each}}
    assert tools.find_drift(tree, stacked=True)
    if how == "stacked":
        merged = tools.merge_replicas(tree)
    elif how == "pmap":
        merged = jax.pmap(
            functools.partial(tools.merge_replicas, axis_name="d"), axis_name="d"
        )(tree)
    else:
        merged = jax.shard_map(
            functools.partial(tools.merge_replicas, axis_name="d"),
            mesh=mesh((8,), ("d",)),
            in_specs=P("d"),
            out_specs=P("d"),
            check_vma=False,
        )(tree)
    assert tools.find_drift(merged, stacked=True) == []
    got = {k: v[3] for k, v in merged["Net"]["BatchNorm_0"].items()}
    want = {k: jnp.asarray(v) for k, v in want.items()}
    assert_close(got, want, 128)
    # What pmean makes of the variances is far from it.
    assert (of_each["var"].mean(0) < 0.6 * want["var"]).all()


def test_what_is_no_statistic_stays_as_it_is():
    of_each, _ = statistics()
    tree = flax.core.freeze(
        {"a": {**of_each, "count": jnp.full((8, 3), 7.0)}, "ema": jnp.arange(8.0)}
    )
    merged = tools.merge_replicas(tree)
    assert type(merged) is type(tree)
    assert (merged["a"]["count"] == 7).all() and (merged["ema"] == tree["ema"]).all()


def test_statistics_are_merged_in_lists_and_tuples_too_and_counts_are_one():
    of_each, want = statistics()
    of_each["count"] = jnp.arange(8.0)[:, None]
    tree = {"first": of_each, "others": [of_each, (3, of_each)]}
    merged = tools.merge_replicas(tree)
    assert merged["others"][1][0] == 3
    norms = [merged["first"], merged["others"][0], merged["others"][1][1]]
    assert tools.find_drift(norms, stacked=True) == []
    for got in norms:
        np.testing.assert_allclose(got["var"][3], want["var"], rtol=1e-5)
        assert (got["count"] == 7).all()


def test_merged_replicas_are_in_the_boxes_that_they_were_in():
    """Those of nnx, mappings that make their own values, and fields that are None."""
    of_each, want = statistics()
    norms = nnx.vmap(lambda _: BatchNorm(3, rngs=nnx.Rngs(0)))(jnp.ones(8))
    norms.mean[...], norms.var[...] = of_each["mean"], of_each["var"]
    state = nnx.state(norms, nnx.BatchStat)
    mapping = defaultdict(dict, norm={**of_each, "count": None}, other={"mean": None})
    for tree, path in ((state, ()), (mapping, ("norm",))):
        merged = tools.merge_replicas(tree)
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        assert type(merged) is type(tree)
        for key in path:
            merged, tree = merged[key], tree[key]
        (got,) = jax.tree.leaves(merged["var"])
        np.testing.assert_allclose(got[3], want["var"], rtol=1e-5)
        (before,) = jax.tree.leaves(tree["var"])
        np.testing.assert_array_equal(before, of_each["var"])


@pytest.mark.usefixtures("float64")
def test_replicas_merge_in_the_wider_dtype_of_mean_and_var():
    mean = 1 / jnp.arange(3.0, 11.0)[:, None]
    merged = tools.merge_replicas({"mean": mean, "var": jnp.ones((8, 1), jnp.float32)})
    np.testing.assert_allclose(merged["mean"], mean.mean(), rtol=1e-15)
    assert merged["var"].dtype == jnp.float32


BAD = [
    (
        lambda: tools.merge_replicas({**statistics()[0], "count": jnp.arange(4.0)}),
        "merge_replicas: stacked arrays must have as many replicas along their first"
        " axis. Got (8,) in mean, (8,) in var, (4,) in count. Pass the trees of pmap"
        " whole, and nothing else.",
    ),
    (
        lambda: tools.merge_replicas({"a": {**statistics()[0], "count": 3}}),
        "merge_replicas: stacked arrays must have as many replicas along their first"
        " axis. Got (8,) in a/mean, (8,) in a/var, () in a/count. Pass the trees of pmap"
        " whole, and nothing else.",
    ),
    (
        lambda: tools.merge_replicas(
            [statistics()[0], {k: a[:4] for k, a in statistics()[0].items()}]
        ),
        "merge_replicas: stacked arrays must have as many replicas along their first"
        " axis. Got (8,) in 0/mean, (8,) in 0/var, (4,) in 1/mean, (4,) in 1/var. Pass"
        " the trees of pmap whole, and nothing else.",
    ),
    (
        lambda: tools.merge_replicas({"mean": jnp.float32(0), "var": jnp.float32(1)}),
        "merge_replicas: stacked arrays must have as many replicas along their first"
        " axis. Got () in mean, () in var. Pass the trees of pmap whole, and nothing"
        " else.",
    ),
    (
        lambda: tools.find_drift(placed(A, P(("d", "m")))),
        "find_drift: something must be on several devices, to be compared. Got the array"
        " and all others in pieces of their own on each of 8 devices. Pass stacked=True for what"
        " pmap returns, whose first axis is that of the replicas, or leave out what is"
        " sharded over all devices.",
    ),
    (
        lambda: tools.merge_replicas({"mean": jnp.ones(8, int), "var": jnp.ones(8)}),
        "merge_replicas: mean and var must be floating. Got the tree: mean of int32, var"
        " of float32. Pass statistics as a norm keeps them.",
    ),
    (
        lambda: tools.find_drift({"a": np.ones(3)}),
        "find_drift: arrays must lie on a mesh, so that there are replicas to compare."
        " Got ['a'] of ndarray. Put it there with jax.device_put(array,"
        " NamedSharding(mesh, P())), or pass stacked=True for arrays [replicas, ...].",
    ),
    (
        lambda: tools.find_drift({"a": placed(A, P()), "b": placed(A, P(), (8,))}),
        "find_drift: all arrays must lie on one mesh. Got ['a'] on (('d', 4), ('m', 2))"
        " (Auto, Auto) of devices [0, 1, 2, 3, 4, 5, 6, 7], ['b'] on (('d', 8),) (Auto)"
        " of devices [0, 1, 2, 3, 4, 5, 6, 7]. Call it once for each mesh.",
    ),
    (
        lambda: tools.find_drift([jnp.ones((8, 2)), jnp.ones((4, 2))], stacked=True),
        "find_drift: stacked arrays must have as many replicas along their first axis."
        " Got (8,) in [0], (4,) in [1]. Pass the trees of pmap whole, and nothing else.",
    ),
    (
        lambda: tools.merge_replicas({"a": {"mean": jnp.ones((8, 3))}}),
        "merge_replicas: statistics must have a mean beside a var somewhere. Got a tree"
        " of PyTreeDef({'a': {'mean': *}}). Pass variables['batch_stats'], say.",
    ),
    (
        lambda: tools.merge_replicas(
            {"a": {"mean": jnp.ones((8, 3)), "var": jnp.ones((4, 3))}}
        ),
        "merge_replicas: mean and var must have one shape, with the replicas first where"
        " there is no axis_name. Got a: mean of shape (8, 3), var of shape (4, 3). Pass"
        " the statistics of one model, of all its replicas.",
    ),
    (
        lambda: tools.merge_replicas(statistics()[0], axis_name="nowhere"),
        "merge_replicas: axis_name must name an axis of the pmap, shard_map or vmap"
        " around the call. Got axis_name='nowhere'; the mesh in use has no axes. Call"
        " it inside one of those; under jit over sharded arrays leave axis_name=None, the"
        " statistics are synced without it.",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_replicas_are_named(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("changed", [0, 7])
def test_the_usual_replica_is_that_of_most_and_not_the_first(changed):
    (drift,) = tools.find_drift([placed(A, P(), changed=[changed])])
    assert [d.id for d in drift.devices] == [changed]
