"""The linen modules: what flax.linen's are, and the state that batch norm keeps."""

import functools
import inspect

import flax
import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contexts import AxisType, mesh
from family import combined
from jax.sharding import PartitionSpec as P

from normjax import linen

MODULES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
REQUIRED = {
    "BatchNorm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
}
CASES = [
    *[(n, REQUIRED.get(n, {})) for n in MODULES],
    ("BatchNorm", {"use_running_average": True}),
    ("BatchNorm", {"use_running_average": False, "axis": 1, "momentum": 0.9}),
    ("BatchNorm", {"use_running_average": False, "axis": (1, -1)}),
    ("BatchNorm", {"use_running_average": False, "use_bias": False}),
    ("BatchNorm", {"use_running_average": False, "use_scale": False}),
    ("LayerNorm", {"reduction_axes": (1, 2), "feature_axes": (1, 3)}),
    ("LayerNorm", {"reduction_axes": (1, 2, 3), "feature_axes": -1}),
    ("LayerNorm", {"dtype": jnp.bfloat16}),
    ("LayerNorm", {"param_dtype": jnp.bfloat16}),
    ("RMSNorm", {"reduction_axes": (-1, -2), "dtype": jnp.float16}),
    ("RMSNorm", {"use_scale": False}),
    ("GroupNorm", {"num_groups": None, "group_size": 3}),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": (0, 2, 3)}),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": (-2, -1)}),
    ("InstanceNorm", {"feature_axes": (1, 3)}),
    ("InstanceNorm", {"use_fast_variance": False, "epsilon": 1e-3}),
]


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def described(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.parametrize("name", MODULES)
def test_fields_and_arguments_are_flaxs(name):
    """Those of Flax first, in order; what is beyond Flax comes after them."""
    ours, theirs = getattr(linen, name), getattr(flax_linen, name)
    fields, theirs_fields = (
        [f for f in c.__dataclass_fields__ if f not in ("parent", "name")]
        for c in (ours, theirs)
    )
    assert fields[: len(theirs_fields)] == theirs_fields
    for field in theirs_fields:
        default = theirs.__dataclass_fields__[field].default
        assert ours.__dataclass_fields__[field].default == default
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(c).parameters.values()]
        for c in (ours.__call__, theirs.__call__)
    )
    beyond = [("momentum", inspect.Parameter.KEYWORD_ONLY, None)]
    assert ours == theirs + (beyond if name == "BatchNorm" else [])


@pytest.mark.parametrize(
    ("case", "dtype"), combined(CASES, ["float32", "bfloat16", "float16"], one_of=3)
)
def test_module_is_flaxs(case, dtype):
    """Variables by name, shape and dtype; outputs, gradients and new statistics."""
    name, fields = case
    x = (3 * normal((3, 4, 5, 6)) + 1).astype(dtype)
    fields = {**fields, "bias_init": flax_linen.initializers.normal()}
    if name == "RMSNorm":
        del fields["bias_init"]
    fields["scale_init"] = flax_linen.initializers.normal()
    found = []
    for library in (linen, flax_linen):
        module = getattr(library, name)(**fields)
        variables = module.init(jax.random.key(0), x)

        def loss(variables, x, module=module):
            y, updates = module.apply(variables, x, mutable=["batch_stats"])
            return (jnp.sin(y.astype(jnp.float32))).sum(), (y, updates)

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        found.append((variables, *gradient(variables, x)))
    ours, theirs = found
    assert described(ours) == described(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    coarse = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(ours))
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in found), strict=True):
        a, b = a.astype("float32"), b.astype("float32")
        size = max(1, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=(4 * coarse + 1e-5) * size)


@pytest.mark.parametrize("value", [True, False])
def test_a_mask_of_one_value_is_for_all(value):
    """Of one axis less too, where it lines up with all of them alike."""
    x, module = normal((3, 4, 5)), linen.LayerNorm(use_scale=False, use_bias=False)
    y = module.apply({}, x, mask=jnp.full((1, 1), value))
    np.testing.assert_allclose(y, module.apply({}, x) * value, atol=1e-6)


@pytest.mark.parametrize(("name", "fields"), CASES[:5])
def test_masked_module_is_flaxs_where_the_mask_is_true(name, fields):
    x = normal((3, 4, 5, 6))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, x.shape)
    ys = []
    for library in (linen, flax_linen):
        module = getattr(library, name)(**fields, use_fast_variance=False)
        variables = module.init(jax.random.key(0), x)
        # Linen reads a mask of any dtype as boolean.
        ys.append(
            module.apply(
                variables, x, mask=mask.astype(jnp.int32), mutable=["batch_stats"]
            )
        )
    np.testing.assert_allclose(ys[0][0][mask], ys[1][0][mask], atol=1e-5)
    assert (ys[0][0][~mask] == 0).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ys[0][1], ys[1][1]
    )


def test_checkpoint_of_flax_loads():
    """A msgpack of the whole state of a flax model, into a model of ours and back."""

    def model(library):
        class Model(flax_linen.Module):
            @flax_linen.compact
            def __call__(self, x, train):
                x = library.BatchNorm(use_running_average=not train)(x)
                x = library.LayerNorm()(flax_linen.Dense(8)(x))
                return library.GroupNorm(2)(library.RMSNorm()(x))

        return Model()

    x = normal((5, 8)) * 3
    theirs = model(flax_linen)
    state = theirs.init(jax.random.key(0), x, True)
    _, updates = theirs.apply(state, x, True, mutable=["batch_stats"])
    state = flax.serialization.to_bytes({**state, **updates})
    ours = model(linen)
    target = ours.init(jax.random.key(1), x, True)
    loaded = flax.serialization.from_bytes(target, state)
    want = theirs.apply(flax.serialization.from_bytes(target, state), x, False)
    np.testing.assert_allclose(ours.apply(loaded, x, False), want, atol=1e-5)
    assert flax.serialization.to_bytes(loaded) == state


# Statistics.


def test_statistics_keep_the_dtype_they_are_stored_in():
    norm = linen.BatchNorm(
        False, param_dtype=jnp.bfloat16, force_float32_reductions=False
    )
    x = normal((64, 3), dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    _, after = norm.apply(variables, x, mutable=["batch_stats"])
    assert described(after["batch_stats"]) == described(variables["batch_stats"])
    assert after["batch_stats"]["mean"].dtype == jnp.bfloat16


def test_initializing_does_not_update_and_needs_no_axis():
    norm = linen.BatchNorm(use_running_average=False, axis_name="nowhere")
    stats = norm.init(jax.random.key(0), normal((5, 3)) + 9)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], jnp.zeros(3))
    np.testing.assert_array_equal(stats["var"], jnp.ones(3))


def test_inference_needs_no_axis():
    """Trained over devices, evaluated on one."""
    x = normal((5, 3))
    norm = linen.BatchNorm(use_running_average=True, axis_name="nowhere")
    variables = norm.init(jax.random.key(0), x)
    want = linen.BatchNorm(True).apply(variables, x)
    np.testing.assert_array_equal(norm.apply(variables, x), want)


def test_use_running_average_must_be_said_once():
    x = normal((5, 3))
    variables = linen.BatchNorm(True).init(jax.random.key(0), x)
    y = linen.BatchNorm().apply(variables, x, use_running_average=True)
    np.testing.assert_array_equal(y, linen.BatchNorm(True).apply(variables, x))
    with pytest.raises(ValueError, match="use_running_average"):
        linen.BatchNorm(True).apply(variables, x, use_running_average=True)


def test_inference_leaves_the_statistics_as_they_are():
    x = normal((5, 3))
    norm = linen.BatchNorm()
    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    _, after = norm.apply(
        variables, x, use_running_average=True, mutable=["batch_stats"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"]
    )


@pytest.mark.parametrize("kind", ["masked", "empty", "one channel masked"])
def test_statistics_are_not_damaged_by_masked_or_empty_input(kind):
    x, mask = jnp.full((5, 3), jnp.nan), jnp.zeros((5, 1), bool)
    if kind == "empty":
        x, mask = jnp.zeros((0, 3)), None
    if kind == "one channel masked":
        mask = jnp.array([[True, False, True]])
        x = jnp.where(mask, normal((5, 3)), jnp.nan)
    norm = linen.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    _, after = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    before, after = variables["batch_stats"], after["batch_stats"]
    still = slice(1, 2) if kind == "one channel masked" else slice(None)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(after[name][still], before[name][still])
        assert jnp.isfinite(after[name]).all()


# Around the modules.


class Residual(flax_linen.Module):
    """A block with every norm, to be put under a lifted transformation."""

    axis_name: str | None = None

    @flax_linen.compact
    def __call__(self, x, _=None):
        y = linen.BatchNorm(
            use_running_average=False, axis_name=self.axis_name, momentum=0.5
        )(x)
        y = linen.LayerNorm()(flax_linen.Dense(x.shape[-1])(y))
        y = linen.RMSNorm()(y) + linen.GroupNorm(2)(x[:, None])[:, 0]
        return x + y, None


def test_scanned_blocks_keep_statistics_of_their_own():
    x = normal((6, 4))
    scanned = flax_linen.scan(
        Residual,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = scanned.init(jax.random.key(0), x)
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 4)
    (y, _), updates = jax.jit(
        functools.partial(scanned.apply, mutable=["batch_stats"])
    )(variables, x)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        (x, _), update = Residual().apply(one, x, mutable=["batch_stats"])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5),
            updates,
            update,
        )
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_remat_updates_statistics_once_and_keeps_the_gradient():
    x = normal((6, 4))

    def step(block, variables):
        def loss(params):
            (y, _), updates = block.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return (y**3).sum(), updates

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    plain = Residual()
    variables = plain.init(jax.random.key(0), x)
    want, got = step(plain, variables), step(flax_linen.remat(Residual)(), variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_ensemble_by_vmap_is_each_member_alone():
    x = normal((2, 6, 4))
    block = Residual()
    variables = jax.vmap(block.init, in_axes=(0, None))(
        jax.random.split(jax.random.key(0)), x[0]
    )
    apply = functools.partial(block.apply, mutable=["batch_stats"])
    together = jax.jit(jax.vmap(apply))(variables, x)
    for i in range(2):
        alone = apply(jax.tree.map(lambda a, i=i: a[i], variables), x[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5),
            together,
            alone,
        )


def training_steps(way, x, target):
    """Three steps of SGD on a block, the batch over eight devices in one way."""
    axis = None if way in ("one device", "jit") else "d"
    block, one = Residual(axis), Residual()
    variables = one.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.05)

    def step(state, x, target):
        params, stats, moving = state

        def loss(params):
            (y, _), updates = block.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            error = jnp.mean((y - target) ** 2)
            # Checked shard_map sums gradients by itself: the mean goes on the loss.
            mean = jax.lax.pmean(error, "d") if way == "shard_map" else error
            return mean, updates["batch_stats"]

        (error, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        if way in ("pmap", "unchecked"):
            error, grads = jax.lax.pmean((error, grads), "d")
        updates, moving = optimizer.update(grads, moving)
        return (optax.apply_updates(params, updates), stats, moving), error

    params = variables["params"]
    state = (params, variables["batch_stats"], optimizer.init(params))
    if way == "jit":
        x, target = (
            jax.device_put(a, jax.NamedSharding(mesh((8,), ("d",)), P("d")))
            for a in (x, target)
        )
    if way in ("one device", "jit"):
        run = jax.jit(step)
    elif way == "pmap":
        x, target = (a.reshape(8, -1, *a.shape[1:]) for a in (x, target))
        run = jax.pmap(step, axis_name="d", in_axes=(None, 0, 0), out_axes=None)
    else:
        run = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh((8,), ("d",)),
                in_specs=(P(), P("d"), P("d")),
                out_specs=P(),
                check_vma=way == "shard_map",
            )
        )
    losses = []
    for _ in range(3):
        state, error = jax.block_until_ready(run(state, x, target))
        losses.append(float(error))
    return losses, jax.device_get(state)


@pytest.mark.parametrize("way", ["pmap", "shard_map", "unchecked", "jit"])
def test_training_on_eight_devices_is_training_on_one(way):
    x = normal((16, 4)) + 5 * jnp.repeat(jnp.arange(8.0), 2)[:, None]
    target = normal((16, 4), 1)
    want, got = training_steps("one device", x, target), training_steps(way, x, target)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


@pytest.mark.parametrize(
    ("kind", "masked"), combined([AxisType.Auto, AxisType.Explicit], [False, True])
)
def test_sharded_channels(kind, masked):
    """Channels split over devices: every module, and its gradient."""
    x, mask = normal((3, 16, 8)), None
    if masked:
        mask = jax.random.bernoulli(jax.random.key(1), 0.7, (3, 16, 1))
    for name in MODULES:
        module = getattr(linen, name)(**REQUIRED.get(name, {}))
        variables = module.init(jax.random.key(0), x)

        def loss(x, module=module, variables=variables):
            y, _ = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return (jnp.sin(y) * jnp.arange(8.0)).sum()

        want = jax.jit(jax.value_and_grad(loss))(x)
        devices = mesh((8,), ("d",), kind)
        with jax.set_mesh(devices):
            split = jax.device_put(x, jax.NamedSharding(devices, P(None, None, "d")))
            got = jax.jit(jax.value_and_grad(loss))(split)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        np.testing.assert_allclose(got[1], want[1], atol=1e-5)
