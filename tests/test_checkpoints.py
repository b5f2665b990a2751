"""Checkpoints: those of Flax's modules load into ours, and ours into Flax's.

The files under golden are of Flax's own modules, trained for a few steps, with what
they then compute. golden/write.py writes them.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from family import tolerance
from flax import linen, nnx
from flax.serialization import from_bytes, msgpack_restore, to_bytes
from golden import write

import normjax.linen
import normjax.nnx

GOLDEN = pathlib.Path(write.__file__).parent
VERSIONS = ["jax-0.10.2", "jax-0.12.0.1"]
each_version = pytest.mark.parametrize("version", VERSIONS)
COUNTING = [{"debias": True}, {"momentum": None}]
counting = pytest.mark.parametrize("fields", COUNTING, ids=["debias", "cumulative"])
with np.load(GOLDEN / VERSIONS[0] / "expected.npz") as _file:
    X = jnp.asarray(_file["x"])

linen_step = jax.jit(write.linen_step, static_argnums=0)
nnx_step = nnx.jit(write.nnx_step)


@functools.cache
def linen_model(library=normjax.linen, **fields):
    """The model, and variables that no checkpoint has."""
    model = write.Linen(library, tuple(fields.items()))
    return model, jax.jit(model.init, static_argnums=2)(jax.random.key(7), X, True)


def nnx_model(library=normjax.nnx, **fields):
    return write.Nnx(library, **fields)


def nnx_target(**fields):
    """A state to restore into, with none of the values of a checkpoint."""
    return jax.tree.map(lambda a: a - 9, nnx.state(nnx_model(**fields)))


def restored(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def saved(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def described(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert described(got) == described(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_same(got, want):
    """Compares leaves by path: outputs, statistics and gradients."""
    got = write.flat(got)
    assert set(got) == set(want)
    for path, w in want.items():
        assert (got[path].shape, got[path].dtype) == (w.shape, w.dtype), path
        atol = tolerance(X.size, w.dtype) * max(1.0, np.abs(w).max())
        np.testing.assert_allclose(got[path], w, rtol=0, atol=atol, err_msg=path)


def expected(version, system):
    """What Flax's modules computed, by path."""
    with np.load(GOLDEN / version / "expected.npz") as file:
        np.testing.assert_array_equal(file["x"], X)
        prefix = f"/{system}"
        return {k[len(prefix) :]: file[k] for k in file if k.startswith(prefix)}


def whole(*parts):
    """Matches a whole message; what jit adds to it begins on a new line."""
    return rf"^{re.escape(' '.join(parts))}(\n|$)"


def test_the_files_are_of_what_write_makes():
    np.testing.assert_allclose(X, write.batch(9), rtol=1e-6)


# Of Flax, into ours.


@each_version
def test_linen_msgpack_of_flax_loads(version):
    model, target = linen_model()
    state = (GOLDEN / version / "linen.msgpack").read_bytes()
    variables = from_bytes(target, state)
    assert described(variables) == described(target)
    assert_same(linen_step(model, variables, X), expected(version, "linen"))
    assert_equal(*map(msgpack_restore, (to_bytes(variables), state)))


@each_version
def test_linen_orbax_of_flax_loads(version):
    model, target = linen_model()
    variables = restored(GOLDEN / version / "linen.orbax", target)
    assert described(variables) == described(target)
    assert_same(linen_step(model, variables, X), expected(version, "linen"))
    state = (GOLDEN / version / "linen.msgpack").read_bytes()
    assert_equal(variables, from_bytes(target, state))


@each_version
@pytest.mark.parametrize("way", ["update", "merge"])
def test_nnx_orbax_of_flax_loads(version, way):
    model = nnx_model()
    state = restored(GOLDEN / version / "nnx.orbax", nnx_target())
    if way == "update":
        nnx.update(model, state)
    else:
        model = nnx.merge(nnx.graphdef(model), state)
    assert_same(nnx_step(model, X), expected(version, "nnx"))


def test_golden_files_name_no_place():
    """They hold no absolute path of where they were written."""
    files = [p for p in GOLDEN.glob("*/*.orbax/**/*") if p.is_file()]
    assert len(files) > 3 * len(VERSIONS)
    for path in files:
        assert not re.search(rb"(^|[\s\"])/\w+/", path.read_bytes()), path


# Ours, into Flax's.


def trained_linen(**fields):
    model, variables = linen_model(**fields)
    found = linen_step(model, variables, X)
    return model, {"params": variables["params"], "batch_stats": found["stats"]}


@pytest.mark.parametrize("way", ["msgpack", "orbax"])
def test_linen_checkpoint_of_ours_loads_into_flax(way, tmp_path):
    ours, variables = trained_linen()
    flaxs, target = linen_model(linen)
    target = jax.tree.map(lambda a: a - 9, target)
    if way == "msgpack":
        (tmp_path / "linen").write_bytes(to_bytes(variables))
        loaded = from_bytes(target, (tmp_path / "linen").read_bytes())
    else:
        loaded = restored(saved(tmp_path / "linen", variables), target)
    assert_equal(loaded, variables)
    want = write.flat(linen_step(flaxs, loaded, X))
    assert_same(linen_step(ours, variables, X), want)


def test_nnx_checkpoint_of_ours_loads_into_flax(tmp_path):
    ours, flaxs = nnx_model(), nnx_model(nnx)
    nnx.update(ours, nnx_step(ours, 2 * X)["stats"])
    path = saved(tmp_path / "nnx", nnx.state(ours))
    target = jax.tree.map(lambda a: a - 9, nnx.state(flaxs))
    loaded = restored(path, target)
    assert_equal(loaded, nnx.state(ours))
    nnx.update(flaxs, loaded)
    assert_same(nnx_step(ours, X), write.flat(nnx_step(flaxs, X)))


# The count of updates, which Flax's have not.


@counting
def test_linen_count_is_kept(fields, tmp_path):
    """Training goes on after a checkpoint as if there had been none."""
    model, variables = trained_linen(**fields)
    path = saved(tmp_path / "linen", variables)
    loaded = restored(path, linen_model(**fields)[1])
    again = from_bytes(linen_model(**fields)[1], to_bytes(variables))
    assert_equal(loaded, variables)
    assert_equal(again, variables)
    assert (loaded["batch_stats"]["BatchNorm"]["count"] == 1).all()
    assert_equal(linen_step(model, loaded, X), linen_step(model, variables, X))


@counting
def test_nnx_count_is_kept(fields, tmp_path):
    """Training goes on after a checkpoint as if there had been none."""
    model, again = nnx_model(**fields), nnx_model(**fields)
    nnx.jit(lambda model: model(2 * X))(model)
    path = saved(tmp_path / "nnx", nnx.state(model))
    nnx.update(again, restored(path, nnx_target(**fields)))
    assert (again.BatchNorm.count[...] == 1).all()
    assert_equal(nnx_step(again, X), nnx_step(model, X))


@counting
@pytest.mark.parametrize("train", [True, False])
def test_linen_checkpoint_without_a_count_is_refused(fields, train):
    """Until it gets one, as the error says."""
    state = (GOLDEN / VERSIONS[0] / "linen.msgpack").read_bytes()
    variables = msgpack_restore(state)
    model, _ = linen_model(**fields)
    message = whole(
        "BatchNorm: momentum=None and debias=True need the number of updates so far.",
        "Got batch_stats/BatchNorm/mean and no batch_stats/BatchNorm/count.",
        "Add batch_stats/BatchNorm/count =",
        "jnp.full((4,), updates_so_far, jnp.float32),",
        "or set momentum and debias=False.",
    )
    with pytest.raises(ValueError, match=message):
        model.apply(variables, X, train, mutable=["batch_stats"])

    old = dict(variables["batch_stats"]["BatchNorm"])
    variables["batch_stats"]["BatchNorm"]["count"] = jnp.full((4,), 3, jnp.float32)
    y, updates = model.apply(variables, X, train, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    new = updates["batch_stats"]["BatchNorm"]
    assert (new["count"] == 3 + train).all()
    assert np.array_equal(new["mean"], old["mean"]) is not train


@counting
def test_nnx_checkpoint_without_a_count(fields):
    """Refused where something can know: to be restored, merged, or called."""
    path = GOLDEN / VERSIONS[0] / "nnx.orbax"
    state = restored(path, nnx_target())
    model = nnx_model(**fields)
    with pytest.raises(ValueError, match=r"BatchNorm\.count"):
        restored(path, nnx_target(**fields))
    with pytest.raises(ValueError, match="number of leaves"):
        nnx.merge(nnx.graphdef(model), state)

    nnx.update(model, state)
    message = whole(
        "BatchNorm: running statistics must be updated before they normalize, and",
        "counted before they are updated further. Got a count of 0 updates in",
        "batch_stats, and a mean and var that are not those of the start.",
        "Train first, or, if mean and var come from a checkpoint without a count,",
        "set batch_stats/count to its number of updates.",
    )
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(ValueError, match=message):
            model(X)
    model.BatchNorm.count[...] = jnp.full((4,), 3.0)
    want = expected(VERSIONS[0], "nnx")["/inference"]
    assert_same({"y": nnx.jit(lambda model: model(X))(model)}, {"/y": want})


# Statistics of another size.

SIZES = whole(
    "BatchNorm: batch_stats must have the shape of the features.",
    "Got mean of shape (5,), var of shape (5,), features (4,).",
    "Pass the batch_stats of this model.",
)


@pytest.mark.parametrize("train", [True, False])
def test_linen_statistics_of_another_size_are_refused(train):
    """Flax's from_bytes lets them through: the call does not."""
    model, target = linen_model()
    five = jax.tree.map(lambda a: jnp.ones((5,), a.dtype), target["batch_stats"])
    state = to_bytes({**target, "batch_stats": five})
    variables = from_bytes(target, state)
    with pytest.raises(ValueError, match=SIZES):
        model.apply(variables, X, train, mutable=["batch_stats"])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("way", ["update", "merge"])
def test_nnx_statistics_of_another_size_are_refused(way, train):
    """Neither nnx.update nor nnx.merge looks at shapes: the call does."""
    norm = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    other = normjax.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    if way == "update":
        nnx.update(norm, nnx.state(other, nnx.BatchStat))
    else:
        graph, params, _ = nnx.split(norm, nnx.Param, nnx.BatchStat)
        norm = nnx.merge(graph, params, nnx.state(other, nnx.BatchStat))
    with pytest.raises(ValueError, match=SIZES):
        norm(X, use_running_average=not train)
    with pytest.raises(ValueError, match=SIZES):
        nnx.jit(lambda norm, x: norm(x, use_running_average=not train))(norm, X)


def test_nnx_parameters_of_another_size_are_refused():
    norm = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    nnx.update(norm, nnx.state(normjax.nnx.BatchNorm(5, rngs=nnx.Rngs(0)), nnx.Param))
    message = whole(
        "BatchNorm: scale must have shape (4,), to lie along axes (2,) of x, or the",
        "rank of x and broadcast to it.",
        "Got scale.shape=(5,), x.shape=(4, 3, 4).",
        "Reshape scale, or pass the axes that it lies along.",
    )
    with pytest.raises(ValueError, match=message):
        norm(X)
