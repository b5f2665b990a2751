"""What every norm must survive: all that Flax and JAX do to a module.

One model holds all norms side by side, so that a test compiles one program, and what
differs is named by its path. It is compared with the same model of Flax's own modules.
"""

import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import tolerance
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P
from systems import NAMES

import normjax.linen
import normjax.nnx

FEATURES = 4
FIELDS = {"BatchNorm": {"momentum": 0.5}, "GroupNorm": {"num_groups": 2}}
KEY = jax.random.key(0)
each_norm = pytest.mark.parametrize("name", NAMES)


def normal(*shape, seed=1):
    """Far enough from mean 0 and variance 1 to see statistics move."""
    return 3 * jax.random.normal(jax.random.key(seed), shape) + 1


def fields_of(name, partition=None):
    """Fields with no scale of ones and no bias of zeros.

    With ``partition``, a name of a mesh axis, parameters are partitioned along it.
    """
    fields = {"use_fast_variance": False, **FIELDS.get(name, {})}
    for parameter in ("scale", "bias")[: 1 if name == "RMSNorm" else 2]:
        init = nn.initializers.normal(1.0)
        if partition is not None:
            init = nn.with_partitioning(init, (partition,))
        fields[f"{parameter}_init"] = init
    return fields


def assert_same(got, want, reduced=64):
    """Compares pytrees of one structure, naming the leaf that differs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got = jax.tree_util.tree_leaves_with_path(got)
    for (path, g), w in zip(got, jax.tree.leaves(want), strict=True):
        g, w, path = np.asarray(g), np.asarray(w), jax.tree_util.keystr(path)
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        atol = tolerance(reduced, g.dtype) * max(1.0, np.abs(w).max(initial=0))
        np.testing.assert_allclose(g, w, rtol=0, atol=atol, err_msg=path)


def described(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def member(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def total(ys):
    return sum(jnp.sin(y).sum() for y in jax.tree.leaves(ys))


def pickled(a):
    return pickle.loads(pickle.dumps(a))


def specs(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def batch_of_any_size(x):
    (b,) = export.symbolic_shape("b")
    return jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)


# Linen.


class Linen(nn.Module):
    """All norms on one input.

    Attributes:
      library: where the norms are from.
      train: whether batch norm normalizes by the batch.
      wrap: what is done to each class: a lifted transformation, a subclass.
      axis_name: device axis of batch norm.
      partition: mesh axis along which parameters are partitioned.
    """

    library: Any = normjax.linen
    train: bool = True
    wrap: Callable = lambda norm: norm
    axis_name: str | None = None
    partition: str | None = None

    @nn.compact
    def __call__(self, x):
        ys = {}
        for name in NAMES:
            fields = fields_of(name, self.partition)
            if name == "BatchNorm":
                fields["use_running_average"] = not self.train
                fields["axis_name"] = self.axis_name
            norm = self.wrap(getattr(self.library, name))
            ys[name] = norm(**fields, name=name)(x)
        return ys


def linen_step(model, variables, x):
    """What a step of training computes: outputs, updates and gradients."""

    def loss(params, x):
        y, updates = model.apply(
            {**variables, "params": params}, x, mutable=["batch_stats"]
        )
        return total(y), (y, updates)

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (dparams, dx), (y, updates) = gradient(variables["params"], x)
    return {"y": y, "updates": updates, "dparams": dparams, "dx": dx}


def linen_both(run, **fields):
    """Runs a test's function on the model of ours and on that of Flax."""
    return [run(Linen(lib, **fields)) for lib in (normjax.linen, nn)]


X = normal(4, 6, FEATURES)
our_step = jax.jit(functools.partial(linen_step, Linen()))
flax_step = jax.jit(functools.partial(linen_step, Linen(nn)))
# The variables and a step of Flax's model: what most tests begin and end with.
init = functools.cache(lambda: jax.jit(Linen(nn).init)(KEY, X))
linen_want = functools.cache(lambda: flax_step(init(), X))


def test_linen_step_is_flaxs():
    assert_same(our_step(init(), X), linen_want())


def test_linen_eval_shape_and_lazy_init_are_init():
    """Without an input there is as much to know: names, shapes, dtypes, values."""
    model = Linen()
    variables = jax.jit(model.init)(KEY, X)
    assert_same(variables, init())
    assert described(jax.eval_shape(model.init, KEY, X)) == described(variables)
    lazy = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert_same(lazy, variables)


def sowing(norm):
    class Sowing(norm):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow("intermediates", "twice", 2 * y)
            return y

    return Sowing


def test_linen_norm_that_sows_in_a_subclass():
    def run(model):
        apply = functools.partial(model.apply, mutable=["batch_stats", "intermediates"])
        return jax.jit(apply)(init(), X)

    ours, flaxs = linen_both(run, wrap=sowing)
    assert set(ours[1]["intermediates"]) == set(NAMES)
    assert_same(ours, flaxs)


def test_linen_intermediates_are_captured():
    def run(model):
        apply = functools.partial(
            model.apply,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return jax.jit(apply)(init(), X)

    ours, flaxs = linen_both(run)
    assert set(ours[1]["intermediates"]) == {*NAMES, "__call__"}
    assert_same(ours, flaxs)


def test_linen_methods_are_intercepted():
    """The same calls in the same order, with the arguments as they were written."""

    def run(model):
        calls = []

        def interceptor(call, args, kwargs, context):
            calls.append((type(context.module).__name__, context.method_name, kwargs))
            y = call(*args, **kwargs)
            return y if isinstance(y, dict) else y + len(calls)

        def apply(variables, x):
            with nn.intercept_methods(interceptor):
                return model.apply(variables, x, mutable=["batch_stats"])

        return jax.jit(apply)(init(), X), calls

    (ours, our_calls), (flaxs, flax_calls) = linen_both(run)
    assert [name for name, *_ in our_calls] == ["Linen", *NAMES]
    assert our_calls == flax_calls
    assert_same(ours, flaxs)


def test_linen_partitioned_parameters():
    """Boxed or not, with a mesh or without, and the boxes say where they belong."""
    model = Linen(partition="m")
    variables = jax.jit(model.init)(KEY, X)
    assert_same(nn.unbox(variables), init())
    want = jax.eval_shape(Linen(nn, partition="m").init, KEY, X)
    partitions = nn.get_partition_spec(variables)
    assert partitions == nn.get_partition_spec(want)
    assert partitions["params"]["BatchNorm"]["scale"] == P("m")

    step = jax.jit(functools.partial(linen_step, model))
    got = step(variables, X)
    assert jax.tree.structure(got["dparams"]) == jax.tree.structure(want["params"])
    assert_same(nn.unbox(got), linen_want())
    assert_same(step(nn.unbox(variables), X), linen_want())

    devices = mesh((4,), ("m",))
    shardings = nn.get_sharding(variables, devices)
    spread = jax.device_put(nn.unbox(variables), shardings)
    spread = nn.meta.replace_boxed(variables, spread)
    with jax.set_mesh(devices):
        got = jax.block_until_ready(step(spread, X))
    assert_same(nn.unbox(got), linen_want())


def test_linen_vmap_makes_ensembles():
    """Under ``nn.vmap`` each member has its parameters, statistics and gradients."""

    def ensemble(norm):
        return nn.vmap(
            norm,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )

    xs = jnp.stack([X, 2 * X - 1])
    model = Linen(wrap=ensemble)
    variables = jax.jit(model.init)(KEY, xs)
    want = jax.eval_shape(Linen(nn, wrap=ensemble).init, KEY, xs)
    assert described(variables) == described(want)
    assert not np.array_equal(*variables["params"]["BatchNorm"]["scale"])

    got = jax.jit(functools.partial(linen_step, model))(variables, xs)
    for i in range(2):
        assert_same(member(got, i), flax_step(member(variables, i), xs[i]))


def test_linen_vmap_syncs_over_its_axis():
    """A named axis of ``nn.vmap``: each half is normalized by the whole batch."""

    def run(model):
        halves = nn.vmap(
            Linen,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="d",
        )(**{f: getattr(model, f) for f in ("library", "axis_name")})
        return jax.jit(functools.partial(linen_step, halves))(
            init(), X.reshape(2, 2, *X.shape[1:])
        )

    ours, flaxs = linen_both(run, axis_name="d")
    assert_same(ours, flaxs)
    assert_same(ours["updates"], linen_want()["updates"])


class Body(nn.Module):
    """All norms in the body of a scan, adding up what they make of the carry."""

    library: Any = normjax.linen

    @nn.compact
    def __call__(self, x, more):
        ys = Linen(self.library, name="norms")(x if more is None else x + more)
        return sum(ys.values()), ys


def test_linen_scan_over_layers():
    """``nn.scan``: each layer has its parameters and its statistics."""
    over = {"params": 0, "batch_stats": 0}
    scan = nn.scan(Body, variable_axes=over, split_rngs={"params": True}, length=3)
    ours, flaxs = scan(), scan(nn)
    variables = jax.jit(ours.init)(KEY, X, None)
    assert described(variables) == described(jax.eval_shape(flaxs.init, KEY, X, None))

    def run(model):
        apply = functools.partial(model.apply, mutable=["batch_stats"])
        return jax.jit(apply)(variables, X, None)

    assert_same(run(ours), run(flaxs))


def test_linen_scan_over_time():
    """``nn.scan``: one set of statistics, updated by each step after the other."""
    scan = nn.scan(
        Body,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )
    variables = {k: {"norms": v} for k, v in init().items()}
    more = normal(3, *X.shape, seed=2)

    def run(model):
        apply = functools.partial(model.apply, mutable=["batch_stats"])
        return jax.jit(apply)(variables, X, more)

    ours, flaxs = run(scan()), run(scan(nn))
    assert_same(ours, flaxs)
    moved = ours[1]["batch_stats"]["norms"]["BatchNorm"]["mean"]
    assert (moved != init()["batch_stats"]["BatchNorm"]["mean"]).all()


def test_linen_remat_updates_once():
    """``nn.remat``: the same gradients; statistics move as if run once."""
    model = Linen(wrap=nn.remat)
    assert_same(jax.jit(functools.partial(linen_step, model))(init(), X), linen_want())


@each_norm
def test_linen_table_is_flaxs(name):
    def run(library):
        fields = fields_of(name)
        if name == "BatchNorm":
            fields["use_running_average"] = False
        norm = getattr(library, name)(**fields)
        return norm.tabulate(KEY, X), nn.tabulate(norm, KEY)(X)

    ours = run(normjax.linen)
    assert ours == run(nn)
    assert all(name in table and "params" in table for table in ours)


def test_linen_variables_are_donated():
    """Three steps, each in the buffers of the one before."""

    def step(model, variables, x):
        found = linen_step(model, variables, x)
        params = jax.tree.map(
            lambda p, d: p - 0.1 * d, variables["params"], found["dparams"]
        )
        return {"params": params, **found["updates"]}

    def run(model, **options):
        compiled = jax.jit(functools.partial(step, model), **options)
        variables = jax.tree.map(jnp.copy, init())
        for i in range(3):
            given, variables = variables, compiled(variables, X + i)
            if options:
                assert all(a.is_deleted() for a in jax.tree.leaves(given))
        return variables

    assert_same(run(Linen(), donate_argnums=0), run(Linen(nn)))


def test_linen_inference_is_exported():
    """For a batch of any size."""
    variables = {**init(), **linen_want()["updates"]}
    apply = jax.jit(Linen(train=False).apply)
    exported = export.export(apply)(specs(variables), batch_of_any_size(X))
    want = jax.jit(Linen(nn, train=False).apply)
    for x in (X, X[:2]):
        assert_same(exported.call(variables, x), want(variables, x))


def test_export_goes_through_bytes():
    pytest.importorskip("flatbuffers", reason="serialize() of jax.export needs it")
    apply = jax.jit(Linen(train=False).apply)
    exported = export.export(apply)(specs(init()), batch_of_any_size(X))
    exported = export.deserialize(exported.serialize())
    assert_same(exported.call(init(), X[:2]), apply(init(), X[:2]))


def test_linen_training_is_exported():
    """For a batch of any size: outputs, new statistics and gradients."""
    exported = export.export(our_step)(specs(init()), batch_of_any_size(X))
    for x in (X, X[:2]):
        assert_same(exported.call(init(), x), flax_step(init(), x))


@each_norm
def test_linen_module_is_pickled(name):
    fields = {} if name != "BatchNorm" else {"use_running_average": False}
    norm = getattr(normjax.linen, name)(**fields, **FIELDS.get(name, {}))
    again = pickled(norm)
    assert again == norm and hash(again) == hash(norm)
    assert type(again) is type(norm)
    ys = [m.apply(m.init(KEY, X), X, mutable=["batch_stats"]) for m in (norm, again)]
    jax.tree.map(np.testing.assert_array_equal, *ys)


class Shared(nn.Module):
    """Each norm called twice with the same parameters."""

    library: Any = normjax.linen

    def setup(self):
        self.norms = Linen(self.library)

    def __call__(self, x):
        return self.norms(x), self.norms(2 * x - 1)


def test_linen_shared_norm_updates_twice():
    def run(library):
        variables = {k: {"norms": v} for k, v in init().items()}
        return jax.jit(functools.partial(linen_step, Shared(library)))(variables, X)

    ours = run(normjax.linen)
    assert_same(ours, run(nn))
    first = linen_want()
    second = flax_step({**init(), **first["updates"]}, 2 * X - 1)
    assert_same(ours["y"], (first["y"], second["y"]))
    moved = ours["updates"]["batch_stats"]["norms"]
    assert_same({"batch_stats": moved}, second["updates"])


# NNX.


class Nnx(nnx.Module):
    """All norms on one input.

    Args:
      library: where the norms are from.
      rngs: random keys of the initializers.
      metadata: of the parameters.
      axis_name: device axis of batch norm.
      wrap: what is done to each class.
    """

    def __init__(
        self, library, rngs, metadata=None, axis_name=None, wrap=lambda norm: norm
    ):
        for name in NAMES:
            fields = fields_of(name)
            if metadata is not None:
                for key in [k for k in fields if k.endswith("_init")]:
                    fields[key.replace("_init", "_metadata")] = metadata
            if name == "BatchNorm":
                fields["axis_name"] = axis_name
            norm = wrap(getattr(library, name))
            setattr(self, name, norm(FEATURES, rngs=rngs, **fields))

    def __call__(self, x):
        return {name: getattr(self, name)(x) for name in NAMES}


def nnx_model(library=normjax.nnx, **fields):
    return Nnx(library, nnx.Rngs(0), **fields)


def pure(tree):
    return nnx.to_pure_dict(tree)


def state_of(model):
    return pure(nnx.state(model))


def nnx_step(model, x):
    """What a step of training computes; it moves the statistics of the model."""

    def loss(model, x):
        y = model(x)
        return total(y), y

    (dparams, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return {"y": y, "dparams": pure(dparams), "dx": dx}


def pure_step(graph, state, x):
    """A step as a function: nnx.split outside, nnx.merge inside."""
    model = nnx.merge(graph, state)
    found = nnx_step(model, x)
    return {**found, "state": nnx.state(model)}


jitted_step = nnx.jit(nnx_step)


@functools.cache
def nnx_want():
    """A step of the plain model of Flax."""
    model = nnx_model(nnx)
    return {**jitted_step(model, X), "state": state_of(model)}


def assert_trained(found, model):
    assert_same({**found, "state": state_of(model)}, nnx_want())


def test_nnx_grad_and_jit_are_flaxs():
    model = nnx_model()
    assert_trained(jitted_step(model, X), model)


def test_nnx_split_and_merge():
    """And nnx.update: a step as a pure function of the state, in JAX's own jit."""
    model = nnx_model()
    graph, params, rest = nnx.split(model, nnx.Param, nnx.BatchStat)
    flaxs = nnx.split(nnx_model(nnx), nnx.Param, nnx.BatchStat)
    for ours, theirs in zip((params, rest), flaxs[1:], strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    found = jax.jit(pure_step, static_argnums=0)(
        graph, nnx.merge_state(params, rest), X
    )
    nnx.update(model, found.pop("state"))
    assert_trained(found, model)


def test_nnx_view_shares_the_variables():
    """A view for inference beside the module that trains."""
    found = []
    for library in (normjax.nnx, nnx):
        model = nnx_model(library)
        view = nnx.view(model, use_running_average=True)
        assert view.BatchNorm.use_running_average
        assert not model.BatchNorm.use_running_average
        model(X)
        for name in NAMES:
            assert getattr(view, name).scale is getattr(model, name).scale
        found.append((view(X), state_of(view)))
        with pytest.raises(ValueError, match="Unused keys"):
            nnx.view(model, deterministic=True)
    assert_same(*found)


def test_nnx_train_and_eval_are_heard():
    found = []
    for library in (normjax.nnx, nnx):
        model = nnx_model(library)
        model(X)
        model.eval()
        found.append([model(X), state_of(model)])
        model.train()
        found[-1] += [model(X), state_of(model)]
    assert_same(*found)


def test_nnx_vmap_makes_ensembles():
    """Created, trained and told apart under ``nnx.vmap``."""

    def run(library):
        create = nnx.vmap(lambda rngs: Nnx(library, rngs))
        models = create(nnx.Rngs(0).split(2))
        before = jax.tree.map(jnp.copy, nnx.state(models))
        found = nnx.jit(nnx.vmap(nnx_step))(models, jnp.stack([X, 2 * X - 1]))
        return before, {**found, "state": state_of(models)}, models

    ours, flaxs = run(normjax.nnx), run(nnx)
    assert_same(ours[:2], flaxs[:2])
    graph, _ = nnx.split(ours[2])
    alone = nnx.merge(graph, member(ours[0], 1))
    found = jitted_step(alone, 2 * X - 1)
    assert_same({**found, "state": state_of(alone)}, member(ours[1], 1))


def test_nnx_scan_over_layers():
    """Each layer has its parameters and statistics, under ``nnx.scan``."""

    def run(library):
        create = nnx.vmap(lambda rngs: Nnx(library, rngs))
        layers = create(nnx.Rngs(0).split(3))

        @nnx.jit
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
        def forward(layer, x):
            ys = layer(x)
            return sum(ys.values()), ys

        return forward(layers, X), nnx.state(layers)

    assert_same(run(normjax.nnx), run(nnx))


def test_nnx_scan_over_time():
    """One set of statistics, carried from step to step by ``nnx.scan``."""
    xs = normal(3, *X.shape, seed=2)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def forward(model, x):
        return model, model(x)

    scanned, plain = nnx_model(), nnx_model(nnx)
    scanned, ys = forward(scanned, xs)
    want = [nnx.jit(operator.call)(plain, x) for x in xs]
    assert_same(ys, jax.tree.map(lambda *a: jnp.stack(a), *want))
    assert_same(state_of(scanned), state_of(plain))


def test_nnx_remat_updates_once():
    class Remat(Nnx):
        @nnx.remat
        def __call__(self, x):
            return super().__call__(x)

    model = Remat(normjax.nnx, nnx.Rngs(0))
    assert_trained(jitted_step(model, X), model)


def test_nnx_eval_shape_is_init():
    abstract = nnx.eval_shape(lambda: nnx_model())
    flaxs = nnx.eval_shape(lambda: nnx_model(nnx))
    assert described(state_of(abstract)) == described(state_of(flaxs))
    model = nnx.merge(nnx.graphdef(abstract), nnx.state(nnx_model()))
    assert_trained(jitted_step(model, X), model)


def test_nnx_parameters_have_their_metadata():
    """Flax's own, by its present name, and what it makes of it under a mesh."""
    found = []
    devices = mesh((4,), ("m",))
    for library in (normjax.nnx, nnx):
        make = functools.partial(
            nnx_model, library, metadata={"out_sharding": ("m",), "note": "kept"}
        )
        with jax.set_mesh(devices):
            model = nnx.jit(make)()
        specs = pure(nnx.get_partition_spec(nnx.state(model)))
        found.append((model, specs))
        assert specs["GroupNorm"]["bias"] == P("m")
        for name in NAMES:
            parameters = nnx.to_flat_state(nnx.state(getattr(model, name), nnx.Param))
            assert len(parameters) == 1 + (name != "RMSNorm")
            for _, parameter in parameters:
                assert parameter.get_metadata()["note"] == "kept"
                assert parameter.out_sharding == ("m",)
                assert parameter[...].sharding.spec == P("m")
    (ours, our_specs), (flaxs, flax_specs) = found
    assert our_specs == flax_specs
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(flaxs))
    with jax.set_mesh(devices):
        got = jax.block_until_ready(jitted_step(ours, X))
    assert_trained(got, ours)


@each_norm
def test_nnx_table_is_flaxs(name):
    def run(library):
        norm = getattr(library, name)(FEATURES, rngs=nnx.Rngs(0), **fields_of(name))
        return nnx.tabulate(norm, X)

    ours = run(normjax.nnx)
    assert ours == run(nnx)
    assert name in ours and "scale" in ours


def test_nnx_clone_is_apart():
    model = nnx_model()
    clone = nnx.clone(model)
    assert_trained(jitted_step(clone, X), clone)
    assert_same(state_of(model), state_of(nnx_model()))
    assert (model.BatchNorm.mean[...] == 0).all()


@each_norm
def test_nnx_module_is_pickled(name):
    norm = getattr(normjax.nnx, name)(FEATURES, rngs=nnx.Rngs(0), **fields_of(name))
    norm(X)
    again = pickled(norm)
    assert type(again) is type(norm)
    assert_same(state_of(again), state_of(norm))
    graph, state = nnx.split(norm)
    assert nnx.graphdef(again) == graph
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(state)
    np.testing.assert_array_equal(again(X), norm(X))
    assert_same(state_of(again), state_of(norm))


def test_nnx_variables_are_donated():
    """Three steps, each in the buffers of the one before."""

    def step(model, x):
        found = nnx_step(model, x)
        params = pure(nnx.state(model, nnx.Param))
        nnx.update(
            model, jax.tree.map(lambda p, d: p - 0.1 * d, params, found["dparams"])
        )

    def run(library, **options):
        compiled = nnx.jit(step, **options)
        model = nnx_model(library)
        for i in range(3):
            given = jax.tree.leaves(nnx.state(model))
            compiled(model, X + i)
            if options:
                assert all(a.is_deleted() for a in given)
        return state_of(model)

    assert_same(run(normjax.nnx, donate_argnums=0), run(nnx))


def test_nnx_inference_is_exported():
    """For a batch of any size."""
    model = nnx_model()
    jitted_step(model, X)
    model.eval()
    graph, state = nnx.split(model)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    state = pure(state)
    exported = export.export(apply)(specs(state), batch_of_any_size(X))
    for x in (X, X[:2]):
        assert_same(exported.call(state, x), model(x))


def test_nnx_training_is_exported():
    """For a batch of any size: outputs, new statistics and gradients."""
    graph, state = nnx.split(nnx_model())

    @jax.jit
    def step(values, x):
        nnx.replace_by_pure_dict(state, values)
        found = pure_step(graph, state, x)
        return {**found, "state": pure(found["state"])}

    values = pure(state)
    exported = export.export(step)(specs(values), batch_of_any_size(X))
    assert_same(exported.call(values, X), nnx_want())
    assert_same(exported.call(values, X[:2]), step(values, X[:2]))


def nnx_sowing(norm):
    class Sowing(norm):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "twice", 2 * y)
            return y

    return Sowing


def test_nnx_norm_that_sows_in_a_subclass():
    def run(library):
        model = nnx_model(library, wrap=nnx_sowing)
        return nnx.capture(model, nnx.Intermediate)(X)

    ours, flaxs = run(normjax.nnx), run(nnx)
    assert set(ours[1]) == set(NAMES)
    assert_same(ours, flaxs)


@pytest.mark.parametrize("way", ["tree", "references"])
def test_nnx_modules_as_trees(way):
    """A module as an argument of JAX's own transformations, by Flax's two ways."""
    if way == "tree":
        model = nnx_model()
        run = nnx.jit(operator.call, graph=False)
    else:
        with nnx.var_defaults(hijax=False, ref=True):
            model = nnx_model()
        run = jax.jit(operator.call)
    y = run(model, X)
    assert_same(y, nnx_want()["y"])
    assert_same(state_of(model), nnx_want()["state"])


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_nnx_state_on_eight_devices_is_that_on_one(way):
    """Outputs and statistics, the batch over devices and the state by nnx.split."""
    x = normal(16, 3, FEATURES, seed=3) + 5 * jnp.arange(16.0).reshape(16, 1, 1)
    one = nnx_model()
    want = nnx.jit(operator.call)(one, x)
    graph, state = nnx.split(nnx_model(axis_name="d"))

    def local(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model)

    if way == "pmap":
        run = jax.pmap(local, "d", in_axes=(None, 0), out_axes=(0, None))
        y, after = run(state, x.reshape(8, 2, *x.shape[1:]))
        y = jax.tree.map(lambda a: a.reshape(x.shape), y)
    else:
        run = jax.shard_map(
            local,
            mesh=mesh((8,), ("d",)),
            in_specs=(P(), P("d")),
            out_specs=(P("d"), P()),
        )
        y, after = jax.jit(run)(state, x)
    assert_same(jax.block_until_ready(y), want, reduced=x.size)
    assert_same(pure(after), state_of(one), reduced=x.size)


def test_nnx_norm_called_twice_updates_twice():
    def run(library):
        model = nnx_model(library)
        twice = nnx.jit(lambda model, x: (model(x), model(2 * x - 1)))
        return twice(model, X), state_of(model)

    ours = run(normjax.nnx)
    assert_same(ours, run(nnx))
    model = nnx_model()
    jitted_step(model, X)
    jitted_step(model, 2 * X - 1)
    assert_same(ours[1], state_of(model))


def test_nnx_norm_in_two_places_is_one():
    """A shared module: nnx.split keeps one set of variables."""

    class Two(nnx.Module):
        def __init__(self, library):
            self.first = nnx_model(library)
            self.second = self.first

        def __call__(self, x):
            return self.first(x), self.second(2 * x - 1)

    found = []
    for library in (normjax.nnx, nnx):
        graph, state = nnx.split(Two(library))
        model = nnx.merge(graph, state)
        assert model.first is model.second
        found.append((nnx.jit(operator.call)(model, X), nnx.state(model)))
    assert_same(*found)
