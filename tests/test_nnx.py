"""The nnx modules: Flax's own in arguments, state, outputs and gradients."""

import inspect

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import combined
from jax.sharding import PartitionSpec as P
from systems import NAMES, Nnx

from normjax import linen, nnx

CASES = [
    ("BatchNorm", {}),
    ("BatchNorm", {"use_running_average": True}),
    ("BatchNorm", {"axis": 1, "momentum": 0.5, "epsilon": 1e-3}),
    ("BatchNorm", {"use_scale": False, "dtype": jnp.bfloat16}),
    ("BatchNorm", {"param_dtype": jnp.bfloat16, "promote_dtype": "identity"}),
    ("LayerNorm", {}),
    ("LayerNorm", {"use_bias": False}),
    ("LayerNorm", {"reduction_axes": (1, 2)}),
    ("LayerNorm", {"reduction_axes": (1, 2, 3), "feature_axes": 1}),
    ("LayerNorm", {"dtype": jnp.bfloat16}),
    ("RMSNorm", {}),
    ("RMSNorm", {"reduction_axes": (-1, -2), "dtype": jnp.float16}),
    ("RMSNorm", {"use_scale": False, "promote_dtype": "identity"}),
    ("GroupNorm", {"num_groups": 3}),
    ("GroupNorm", {"num_groups": None, "group_size": 2}),
    ("InstanceNorm", {}),
    ("InstanceNorm", {"feature_axes": 1, "epsilon": 1e-3}),
]


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Beyond Flax, in every module.
EVERYWHERE = {"missing_axis", "mask_is_weight", "activation", "implementation"}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_flaxs(name):
    """Those of Flax first, in order, by kind and default; then what is beyond Flax."""
    for method in ("__init__", "__call__"):
        ours, theirs = (
            [
                (p.name, p.kind, p.default)
                for p in inspect.signature(getattr(c, method)).parameters.values()
            ]
            for c in (getattr(nnx, name), getattr(flax.nnx, name))
        )
        initializers = {"scale_init", "bias_init"}  # functions made anew at each call
        for (n, kind, default), want in zip(ours, theirs, strict=False):
            assert (n, kind) == want[:2]
            assert n in initializers or default == want[2], n
        beyond = {n for n, *_ in ours[len(theirs) :]}
        assert (
            beyond
            == {
                ("__init__", True): {
                    *(
                        "normalize_with",
                        "update_statistics",
                        "debias",
                        "running_variance",
                        "virtual_batch_size",
                        "skip_nonfinite",
                    ),
                    *EVERYWHERE,
                },
                ("__init__", False): EVERYWHERE,
                ("__call__", True): {"momentum"},
                ("__call__", False): set(),
            }[method, name == "BatchNorm"]
        )


def made(library, name, x, fields):
    axis = fields.get("axis", fields.get("feature_axes", -1))
    fields = {**fields, "scale_init": flax.nnx.initializers.normal()}
    if name != "RMSNorm":
        fields["bias_init"] = flax.nnx.initializers.normal()
    if fields.get("promote_dtype") == "identity":
        fields["promote_dtype"] = lambda operands, **_: operands
    make = getattr(library, name)
    return make(x.shape[axis], rngs=flax.nnx.Rngs(3), **fields)


@pytest.mark.parametrize(("case", "dtype"), combined(CASES, ["float32", "bfloat16"]))
def test_module_is_flaxs(case, dtype):
    """State by path, type, shape and dtype; outputs, gradients and new statistics."""
    name, fields = case
    x = (3 * normal((4, 4, 4, 6)) + 1).astype(dtype)
    if name == "GroupNorm":  # Flax's own is right for one axis of space alone
        x = x[:, 0, 0]

    def loss(module, x):
        y = module(x)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    found = []
    for library in (nnx, flax.nnx):
        module = made(library, name, x, fields)
        before = flax.nnx.to_pure_dict(flax.nnx.state(module))
        types = jax.tree.map(
            type,
            flax.nnx.state(module),
            is_leaf=lambda v: isinstance(v, flax.nnx.Variable),
        )
        step = flax.nnx.jit(
            flax.nnx.grad(loss, argnums=(0, 1), has_aux=True), graph=True
        )
        (grads, dx), y = step(module, x)
        after = flax.nnx.to_pure_dict(flax.nnx.state(module))
        found.append((before, flax.nnx.to_pure_dict(grads), dx, y, after))
        assert all(issubclass(t, flax.nnx.Variable) for t in jax.tree.leaves(types))
    described = jax.tree.map(lambda a: (a.shape, a.dtype), found)
    assert described[0] == described[1]
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    coarse = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(found))
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in found), strict=True):
        a, b = a.astype("float32"), b.astype("float32")
        size = max(1, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=(4 * coarse + 1e-5) * size)


@pytest.mark.parametrize("name", NAMES)
def test_nnx_is_linen(name):
    """One function under both: bit for bit, with a mask too."""
    x, mask = normal((4, 5, 6)), jax.random.bernoulli(jax.random.key(1), 0.6, (4, 5, 1))
    fields = {"num_groups": 3} if name == "GroupNorm" else {}
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    module = getattr(linen, name)(**fields)
    variables = module.init(jax.random.key(0), x, **running)
    want, updates = module.apply(
        variables, x, mask=mask, mutable=["batch_stats"], **running
    )
    ours = Nnx(name, x, **fields)
    np.testing.assert_array_equal(ours(x, mask=mask, **running), want)
    if name == "BatchNorm":
        jax.tree.map(
            np.testing.assert_array_equal, ours.statistics, dict(updates["batch_stats"])
        )


@pytest.mark.parametrize("axes", [(1, -1), (-1,), (0, 2, -1), None])
def test_group_norm_is_right_for_any_reduction_axes(axes):
    """Flax's repeats its moments along axis 1, which is wrong or crashes."""
    x = normal((4, 5, 3, 6)) + jnp.arange(4.0)[:, None, None, None]
    norm = nnx.GroupNorm(6, num_groups=2, reduction_axes=axes, rngs=flax.nnx.Rngs(0))
    view = np.asarray(x, np.float64).reshape(4, 5, 3, 2, 3)
    over = (*(() if axes is None else axes[:-1]), 4) if axes else (1, 2, 4)
    want = (view - view.mean(over, keepdims=True)) / np.sqrt(
        view.var(over, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(norm(x), want.reshape(x.shape), atol=1e-5)


def test_unbatched_group_norm_is_one_sample():
    x = normal((7, 6))
    norm = nnx.GroupNorm(6, num_groups=2, reduction_axes=(0, -1), rngs=flax.nnx.Rngs(0))
    whole = nnx.GroupNorm(6, num_groups=2, rngs=flax.nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), whole(x[None])[0], atol=1e-6)


def test_several_feature_axes_share_one_long_vector():
    """As in Flax, the parameters are ``[num_features]``, whatever axes own them."""
    x = normal((3, 4, 2, 5))
    for library in (nnx, flax.nnx):
        norm = library.BatchNorm(10, axis=(2, 3), rngs=flax.nnx.Rngs(0))
        norm.scale[...] = jnp.arange(10.0)
        if library is nnx:
            y, mean = norm(x), norm.mean[...]
    flat = flax.nnx.BatchNorm(10, rngs=flax.nnx.Rngs(0))
    flat.scale[...] = jnp.arange(10.0)
    want = flat(x.reshape(3, 4, 10))
    np.testing.assert_allclose(y.reshape(3, 4, 10), want, atol=1e-5)
    np.testing.assert_allclose(mean, flat.mean[...], atol=1e-6)


def test_running_mean_of_complex_x_is_complex():
    """Flax's drops the imaginary part, with a warning."""
    x = normal((16, 3), dtype=jnp.complex64) + (1 + 2j)
    norm = nnx.BatchNorm(3, momentum=0.5, rngs=flax.nnx.Rngs(0))
    step = flax.nnx.jit(lambda norm, x: norm(x))
    for _ in range(2):
        y = step(norm, x)
    assert y.dtype == norm.mean[...].dtype == jnp.complex64
    np.testing.assert_allclose(norm.mean[...], 0.75 * x.mean(0), rtol=1e-5)
    assert norm.var[...].dtype == jnp.float32
    norm.eval()
    want = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5)
    np.testing.assert_allclose(norm(x), want, rtol=1e-5)


def test_train_and_eval_set_what_normalizes():
    model = flax.nnx.Sequential(nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)))
    x = normal((8, 3)) + 4
    model.eval()
    np.testing.assert_allclose(model(x), x / jnp.sqrt(1 + 1e-5), atol=1e-6)
    model.train()
    assert abs(model(x).mean()) < 1e-6


def test_view_sets_the_switches():
    norm = nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    frozen = flax.nnx.view(norm, normalize_with="running", update_statistics=False)
    x = normal((8, 3)) + 4
    np.testing.assert_allclose(frozen(x), x / jnp.sqrt(1 + 1e-5), atol=1e-6)
    assert (norm.mean[...] == 0).all() and norm.normalize_with is None
    with pytest.raises(ValueError, match="Unused keys"):
        flax.nnx.view(norm, momentum=0.5)
    assert "update_statistics" in flax.nnx.view_info(norm)


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("name", nnx.__all__)
def test_number_of_features_that_x_does_not_have(name, parameters):
    """Without parameters, too: a group norm has promised groups of a size."""
    fields = {"num_groups": 4} if name == "GroupNorm" else {}
    for field in ("use_scale", "use_bias")[: 1 if "RMS" in name else 2]:
        fields[field] = parameters
    norm = getattr(nnx, name)(8, rngs=flax.nnx.Rngs(0), **fields)
    x = normal((4, 5, 16))
    residual = (x,) if name.startswith("Add") else ()
    with pytest.raises(ValueError) as caught:
        norm(x, *residual)
    assert str(caught.value) == (
        f"{name}: num_features must be the number of features of x. Got num_features=8,"
        " x.shape=(4, 5, 16) with 16 features along axes (2,). Pass num_features=16, or"
        " x as the module was made for."
    )
    norm(x[..., :8], *(r[..., :8] for r in residual))


def test_features_that_were_pruned_with_all_their_arrays():
    """The arrays say what a module is for, and not a number that nobody changed."""
    norm = nnx.BatchNorm(8, rngs=flax.nnx.Rngs(0))
    for name in ("scale", "bias", "mean", "var"):
        variable = getattr(norm, name)
        variable.set_value(variable[...][:5])
    assert norm(normal((4, 5))).shape == (4, 5)
    with pytest.raises(ValueError, match=r"^BatchNorm: num_features must be"):
        norm(normal((4, 6)))


@pytest.mark.parametrize("parameters", [True, False])
def test_features_that_are_divided_over_devices(parameters):
    """Each device has a piece of them, and of the parameters, if there are any."""
    norm = nnx.LayerNorm(
        8,
        use_scale=parameters,
        use_bias=parameters,
        axis_name="d",
        rngs=flax.nnx.Rngs(0),
    )
    graph, state = flax.nnx.split(norm)
    x = normal((4, 8))

    def piece(state, x):
        return flax.nnx.merge(graph, state)(x)

    pieces = jax.shard_map(
        piece,
        mesh=mesh((4,), ("d",)),
        in_specs=(P("d"), P(None, "d")),
        out_specs=P(None, "d"),
    )
    want = nnx.LayerNorm(8, rngs=flax.nnx.Rngs(0))(x)
    np.testing.assert_allclose(pieces(state, x), want, atol=1e-5)


@pytest.mark.parametrize("groups", [(32, 4), (None, None), (5, None), (None, 4)])
def test_groups_that_do_not_fit(groups):
    num_groups, group_size = groups
    with pytest.raises(ValueError, match=r"^GroupNorm: .*(must be set|must divide)"):
        nnx.GroupNorm(6, num_groups, group_size, rngs=flax.nnx.Rngs(0))


def test_running_statistics_have_no_gradient():
    """They are state, and what follows from it in a later step is no function of x."""
    norm = nnx.BatchNorm(4, momentum=0.5, rngs=flax.nnx.Rngs(0))
    graph, state = flax.nnx.split(norm)

    def later(x):
        norm = flax.nnx.merge(graph, state, copy=True)
        norm(x)
        return (norm.mean[...] + norm.var[...]).sum()

    assert (jax.grad(later)(normal((8, 4))) == 0).all()
