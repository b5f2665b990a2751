"""State: given by others, changed later, written to bytes and exported."""

import functools
import pickle
import subprocess
import sys

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import tolerance
from flax import serialization
from flax.training import train_state
from jax import export, lax
from systems import NAMES

import normjax
import normjax.linen
import normjax.nnx
from normjax import tools

X = 3 * jax.random.normal(jax.random.key(0), (16, 4)) + 2
BAD = X.at[3, 1:].set(jnp.nan)


def moments(x):
    return normjax.batch_norm(x)[1]


def close(got, want, size=16):
    got, want = np.asarray(got), np.asarray(want)
    atol = tolerance(size, np.float32) * max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def nnx_norm(**fields):
    return normjax.nnx.BatchNorm(4, rngs=flax.nnx.Rngs(0), **fields)


# State that is given as NumPy arrays.


def nnx_call(name, module, x):
    return module(x, x)[0] if name.startswith("Add") else module(x)


@pytest.mark.parametrize("name", normjax.nnx.__all__)
@pytest.mark.parametrize("jitted", [False, True])
def test_arrays_of_others_are_never_written_to(name, jitted):
    """Two nnx models of one restored state; the state, too, stays what it was."""
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    if name == "BatchNorm":
        fields = {"momentum": None, "skip_nonfinite": True}
    first, second = (
        getattr(normjax.nnx, name)(4, rngs=flax.nnx.Rngs(0), **fields) for _ in range(2)
    )
    state = flax.nnx.to_pure_dict(flax.nnx.state(first))
    restored = serialization.msgpack_restore(serialization.msgpack_serialize(state))
    kept = jax.tree.map(np.copy, restored)
    for module in (first, second):
        flax.nnx.update(module, restored)
    before = jax.tree.map(np.copy, flax.nnx.to_pure_dict(flax.nnx.state(second)))
    assert all(type(a) is np.ndarray for a in jax.tree.leaves(restored))
    call = functools.partial(nnx_call, name)
    call = flax.nnx.jit(call) if jitted else call
    for _ in range(2):
        call(first, X)
    jax.tree.map(np.testing.assert_array_equal, restored, kept)
    after = flax.nnx.to_pure_dict(flax.nnx.state(second))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if name == "BatchNorm":
        assert (first.count[...] == 2).all()
        close(first.mean[...], X.mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_others_are_never_written_to_by_linen(name):
    fields = {"num_groups": 2} if name == "GroupNorm" else {}
    norm = getattr(normjax.linen, name)(**fields)
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    variables = norm.init(jax.random.key(0), X, **running)
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    kept = jax.tree.map(np.copy, restored)
    leaves = jax.tree.leaves(restored)
    assert all(type(a) is np.ndarray for a in leaves)
    for a in leaves:
        a.flags.writeable = False
    norm.apply(restored, X, mutable=["batch_stats"], **running)
    jax.tree.map(np.testing.assert_array_equal, restored, kept)


# Fields of nnx modules that are set after construction.


@pytest.mark.parametrize(
    ("field", "value", "added"),
    [
        ("momentum", None, "count"),
        ("debias", True, "count"),
        ("skip_nonfinite", True, "skipped"),
    ],
)
@pytest.mark.parametrize("where", ["before", "outside jit", "inside jit"])
def test_a_field_set_later_is_as_if_it_were_set_at_once(field, value, added, where):
    norm, want = nnx_norm(momentum=0.5), nnx_norm(**{"momentum": 0.5, field: value})

    def step(norm, x):
        if where == "inside jit":
            setattr(norm, field, value)
        return norm(x)

    if where != "inside jit":
        setattr(norm, field, value)
        assert getattr(norm, added)[...].shape == (4,)
    step = step if where == "before" else flax.nnx.jit(step)
    for x in (X, 3 * X):
        np.testing.assert_array_equal(step(norm, x), want(x))
    found, wanted = (
        flax.nnx.to_pure_dict(flax.nnx.state(m, flax.nnx.BatchStat))
        for m in (norm, want)
    )
    assert found.keys() == wanted.keys() >= {added}
    jax.tree.map(close, found, wanted)
    assert getattr(norm, field) is value


def test_fields_set_later_on_a_whole_model_and_on_stacks():
    model = flax.nnx.Sequential(nnx_norm(), nnx_norm())
    model.set_attributes(flax.nnx.BatchNorm, momentum=None, raise_if_not_found=False)
    model.set_attributes(normjax.nnx.BatchNorm, momentum=None)
    model(X)
    assert all((layer.count[...] == 1).all() for layer in model.layers)

    @flax.nnx.vmap(in_axes=0)
    def stacked(key):
        return normjax.nnx.BatchNorm(4, rngs=flax.nnx.Rngs(key))

    stack = stacked(jax.random.split(jax.random.key(0), 3))
    stack.momentum = None
    assert stack.count[...].shape == (3, 4)
    call = flax.nnx.vmap(lambda m, x: m(x), in_axes=(0, None))
    call(stack, X)
    assert (stack.count[...] == 1).all()


def test_a_trained_norm_that_is_to_count_says_what_to_do():
    norm = nnx_norm()
    norm(X)
    norm.momentum = None
    with pytest.raises(ValueError, match="set batch_stats/count to its number of upd"):
        norm(X)
    norm.count[...] = 1.0
    norm(X)
    assert (norm.count[...] == 2).all()


def test_a_count_that_is_not_asked_for_any_more_goes_on():
    """So that to ask for it again is right."""
    norm = nnx_norm(momentum=None)
    norm.momentum = 0.5
    norm.eval()
    norm(X)  # never updated, as of any norm that does not count
    norm.train()
    norm(X)
    close(norm.mean[...], 0.5 * X.mean(0))
    assert (norm.count[...] == 1).all()


@pytest.mark.parametrize("parameter", ["scale", "bias"])
@pytest.mark.parametrize("there", [True, False])
def test_whether_there_are_parameters_is_not_said_later(parameter, there):
    field = f"use_{parameter}"
    norm = nnx_norm(**{field: there})
    setattr(norm, field, there)
    with pytest.raises(ValueError) as caught:
        setattr(norm, field, not there)
    new = "None" if there else "nnx.Param(jnp.ones((4,)))"
    assert str(caught.value) == (
        f"BatchNorm: {field} says at construction whether there is a {parameter}. Got"
        f" {field}={not there}, set later. Set norm.{parameter} = {new}."
    )
    assert getattr(norm, field) is there
    value = None if there else flax.nnx.Param(jnp.ones((4,)))
    setattr(norm, parameter, value)
    assert norm(X).shape == X.shape


def test_groups_set_later_follow_one_another():
    def made(**fields):
        return normjax.nnx.GroupNorm(4, rngs=flax.nnx.Rngs(0), **fields)

    norm = made(num_groups=4)
    norm.group_size = 2
    assert norm.num_groups == 2
    np.testing.assert_array_equal(norm(X), made(num_groups=2)(X))
    norm.num_groups = 1
    assert norm.group_size == 4
    np.testing.assert_array_equal(flax.nnx.jit(lambda m, x: m(x))(norm, X), norm(X))
    for field in ("num_groups", "group_size"):
        with pytest.raises(ValueError, match=f"^GroupNorm: {field} must divide"):
            setattr(norm, field, 3)
    assert (norm.num_groups, norm.group_size) == (1, 4)


def test_lists_set_later_are_no_state():
    x = X.reshape(4, 4, 4)
    norm = normjax.nnx.LayerNorm(4, rngs=flax.nnx.Rngs(0))
    norm.reduction_axes = [1, 2]
    hash(flax.nnx.graphdef(norm))  # by which what is compiled is known
    want = normjax.nnx.LayerNorm(4, reduction_axes=(1, 2), rngs=flax.nnx.Rngs(0))
    for call in (lambda m, x: m(x), flax.nnx.jit(lambda m, x: m(x))):
        np.testing.assert_array_equal(call(norm, x), call(want, x))


# Written to bytes.


def running_of(x):
    return normjax.RunningMoments.init((4,)).update(moments(x), skip_nonfinite=True)


@pytest.mark.parametrize("made", [moments, running_of], ids=["Moments", "Running"])
def test_moments_go_through_flax_serialization(made):
    value, other = made(X), made(2 * X)
    names = {"count", "mean", "var"}
    assert names <= serialization.to_state_dict(value).keys()
    tree = {"a": [value, jnp.ones(2)]}
    restored = serialization.from_bytes(
        {"a": [other, jnp.zeros(2)]}, serialization.to_bytes(tree)
    )
    assert type(restored["a"][0]) is type(value)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)


def test_a_train_state_with_running_moments():
    class State(train_state.TrainState):
        running: normjax.RunningMoments

    params, running = {"w": jnp.ones(2)}, running_of(X)
    optimizer = optax.sgd(0.1)
    state = State.create(apply_fn=None, params=params, tx=optimizer, running=running)
    other = state.replace(running=normjax.RunningMoments.init((4,)))
    restored = serialization.from_bytes(other, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, restored.running, state.running)
    close(restored.running.update(moments(X)).read().mean, X.mean(0))


def test_a_state_dict_of_another_thing():
    running = running_of(X)
    state = serialization.to_state_dict(running)
    of_four = {k: state[k] for k in ("count", "mean", "var", "weight")}
    restored = serialization.from_state_dict(running_of(2 * X), of_four)
    close(restored.mean, running.mean)
    assert (restored.skipped == 0).all()
    del of_four["weight"]
    with pytest.raises(ValueError) as caught:
        serialization.from_state_dict(running, {**of_four, "scale": 1})
    assert str(caught.value) == (
        "RunningMoments: a state dict must have the fields count, mean, var, weight."
        " Got missing: ['weight'], unknown: ['scale']. Pass the state dict of"
        " RunningMoments."
    )
    for other in (None, 3, np.ones(4)):
        with pytest.raises(ValueError, match=f"Got a {type(other).__name__}. Pass the"):
            serialization.from_state_dict({"a": moments(X)}, {"a": other})


def test_running_moments_of_four_fields():
    """As they were before there was a fifth: by hand, pickled, mapped, in a scan."""
    running = normjax.RunningMoments(*(jnp.ones(4) for _ in range(4)))
    assert running.skipped.shape == (4,)
    lax.scan(lambda r, m: (r.update(m), None), running, jax.vmap(moments)(X[None]))
    old = pickle.loads(pickle.dumps(running))
    del old.__dict__["skipped"]
    close(old.update(moments(X), 0.5).mean, 1 + (X.mean(0) - 1) * 0.5 / 1)
    skipped = old.update(moments(BAD), skip_nonfinite=True).skipped
    np.testing.assert_array_equal(skipped, [0, 1, 1, 1])


@pytest.mark.parametrize("when", ["before", "after", "unpickled"])
def test_flax_may_be_imported_before_and_after(when):
    """In a process of its own, since here it has been."""
    modules = ["normjax", "flax.serialization"]
    make = "import normjax; running = normjax.RunningMoments.init((2,))"
    if when == "unpickled":
        value = pickle.dumps(normjax.RunningMoments.init((2,)))
        make = f"import pickle; running = pickle.loads({value!r})"
        modules = modules[1:]
    imports = ", ".join(modules[:: -1 if when == "before" else 1])
    code = f"""
import {imports}
import flax.serialization as s
{make}
assert s.from_bytes(running, s.to_bytes(running)).mean.shape == (2,)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_exported_functions_of_moments_go_through_bytes():
    pytest.importorskip("flatbuffers", reason="serialize() of jax.export needs it")
    running, m = running_of(X), moments(2 * X)
    step = jax.jit(lambda r, m: (r.update(m), m.merge(m)))
    exported = export.export(step)(running, m)
    got = export.deserialize(exported.serialize()).call(running, m)
    jax.tree.map(close, got, step(running, m))
    assert [type(a) for a in got] == [normjax.RunningMoments, normjax.Moments]


# Exported with a batch of a size that is left open.


def exported(f, size, *arrays, **options):
    (n,) = export.symbolic_shape(size, **options)
    specs = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in arrays]
    return export.export(jax.jit(f))(*specs)


def ghosts(x, where=None):
    def f(x):
        y, m = normjax.batch_norm(x, where=where, virtual_batch_size=4)
        return y, m.count, m.mean, m.var

    def loss(x):
        y, count, mean, var = f(x)
        return jnp.sin(y).sum() + (mean * var).sum() / count.sum()

    return f(x), jax.grad(loss)(x)


@pytest.mark.parametrize(
    ("size", "constraints", "masked"),
    [("4*b", (), True), ("8*b", (), False), ("b", ("mod(b, 4) == 0",), False)],
)
def test_ghosts_of_a_batch_that_is_left_open(size, constraints, masked):
    """Values, moments of all, and gradients, for several sizes of the batch."""
    arguments = (X[:, None], jnp.arange(16)[:, None, None] % 5 > 0)[: 1 + masked]
    f = exported(ghosts, size, *arguments, constraints=constraints)
    for n in (8, 16):
        some = [a[:n] for a in arguments]
        jax.tree.map(close, f.call(*some), jax.jit(ghosts)(*some))


@pytest.mark.parametrize("size", ["b", "2*b", "b + 1", "4*b + 2"])
def test_ghosts_of_a_batch_of_which_nothing_is_said(size):
    with pytest.raises(ValueError) as caught:
        exported(ghosts, size, X)
    assert str(caught.value).startswith(
        "batch_norm: virtual_batch_size must divide the number of samples, whatever it"
        f" is. Got virtual_batch_size=4, x.shape=({size}, 4). Write 4*n for the size in"
        " jax.export.symbolic_shape, or pass it constraints=('mod("
        f"{size}, 4) == 0',)."
    )


def test_groups_of_features_that_are_left_open():
    (n,) = export.symbolic_shape("2*c")
    f = export.export(jax.jit(lambda x: normjax.group_norm(x, num_groups=2)))
    got = f(jax.ShapeDtypeStruct((16, n), X.dtype)).call(X)
    close(got, normjax.group_norm(X, num_groups=2))
    with pytest.raises(ValueError, match="num_groups must divide the number of featu"):
        f(jax.ShapeDtypeStruct((16, *export.symbolic_shape("c")), X.dtype))


def test_modules_with_ghosts_of_a_batch_that_is_left_open():
    fields = {"virtual_batch_size": 4, "momentum": None, "skip_nonfinite": True}
    norm = normjax.linen.BatchNorm(False, **fields)
    variables = norm.init(jax.random.key(0), X)

    def linen(x):
        y, new = norm.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    graph, state = flax.nnx.split(nnx_norm(**fields))

    def nnx(x):
        norm = flax.nnx.merge(graph, state, copy=True)
        y = norm(x)
        found = flax.nnx.state(norm, flax.nnx.BatchStat)
        return y, flax.nnx.to_pure_dict(found)

    for f in (linen, nnx):
        jax.tree.map(close, exported(f, "4*b", X).call(X), f(X))


# The tools.


def test_tools_know_what_was_left_out():
    """A counter beside a mean and a var is neither averaged, merged nor converted."""
    norm = normjax.linen.BatchNorm(False, skip_nonfinite=True)
    variables = norm.init(jax.random.key(0), X)
    _, updates = norm.apply(variables, BAD, mutable=["batch_stats"])
    variables = {**variables, **updates}
    skipped = variables["batch_stats"]["skipped"]
    np.testing.assert_array_equal(skipped, [0, 1, 1, 1])

    for to, back in (
        (tools.to_torch, tools.from_torch),
        (tools.to_keras, tools.from_keras),
    ):
        weights = to({"batch_stats": variables["batch_stats"]})
        assert len(weights) == 2
        found = back(weights, {"batch_stats": variables["batch_stats"]})
        assert (found["batch_stats"]["skipped"] == 0).all()
        np.testing.assert_array_equal(
            found["batch_stats"]["mean"], variables["batch_stats"]["mean"]
        )

    average = tools.RunningVariables.init(variables)
    for n in (1, 2):
        later = {**variables["batch_stats"], "skipped": n * skipped}
        average = average.update({**variables, "batch_stats": later})
    np.testing.assert_array_equal(average.read()["batch_stats"]["skipped"], 2 * skipped)

    stacked = jax.tree.map(lambda a: jnp.stack([a, 3 * a]), variables["batch_stats"])
    merged = tools.merge_replicas(stacked)
    np.testing.assert_array_equal(merged["skipped"], [3 * skipped, 3 * skipped])


def test_tools_keep_what_was_left_out():
    """Recalibrated, replaced and frozen, a norm still says what it left out."""
    norm = nnx_norm(skip_nonfinite=True)
    norm(BAD)
    found = tools.recalibrate(lambda m, x: m(x), norm, [X], progress=False).variables
    for new in (found, tools.replace(norm, "batch", "frozen"), tools.freeze(norm)):
        np.testing.assert_array_equal(new.skipped[...], [0, 1, 1, 1])
    model = flax.nnx.Sequential(flax.nnx.Linear(4, 4, rngs=flax.nnx.Rngs(0)), norm)
    model.eval()
    assert tools.fold(model, X).report.folded


@pytest.mark.parametrize("library", [flax.nnx, normjax.nnx], ids=["flax", "normjax"])
def test_tools_write_to_no_array_of_others(library):
    """Nor does what they return, of Flax's norms too, which write where they stand."""
    rngs = flax.nnx.Rngs(0)
    norm = library.BatchNorm(4, momentum=0.5, rngs=rngs)
    model = flax.nnx.Sequential(norm, library.LayerNorm(4, rngs=rngs))
    model(X)
    state = jax.tree.map(np.array, flax.nnx.to_pure_dict(flax.nnx.state(model)))
    flax.nnx.update(model, state)
    kept = jax.tree.map(np.copy, state)

    report = tools.doctor(model, X, step=lambda m: m(X), steps=1)
    assert not {f.name for f in report.findings} & {"update-dropped", "never-updated"}
    tools.look(model, X)
    found = tools.recalibrate(lambda m, x: m(x), model, [X], progress=False).variables
    close(found.layers[0].mean[...], X.mean(0))
    for new in (
        found,
        tools.replace(model, "layer", "rms"),
        tools.replace(model, "batch", "batch"),
        tools.freeze(model),
    ):
        new(X)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
