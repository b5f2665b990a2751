"""Norms with what stands beside them: activations, residuals, and what is kept."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import assert_close
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from systems import NAMES, Linen, Nnx

import normjax
import normjax.linen
import normjax.nnx

SHAPE = (3, 8, 2, 4)  # [N, S, T, C]
ACTIVATIONS = [jax.nn.relu, jax.nn.softplus]  # softplus(0) is not 0


def given(x):
    like_feature = functools.partial(jnp.full, x.shape[-1])
    return normjax.Moments(like_feature(9.0), like_feature(1.0), like_feature(4.0))


CALLS = {
    "batch": lambda *a, **k: normjax.batch_norm(*a, **k)[0],
    "given": lambda x, *a, **k: normjax.batch_norm(x, *a, moments=given(x), **k)[0],
    "layer": normjax.layer_norm,
    "rms": lambda x, scale, bias, **k: normjax.rms_norm(x, scale, **k),
    "group": functools.partial(normjax.group_norm, num_groups=2),
    "instance": normjax.instance_norm,
}
each_norm = pytest.mark.parametrize("norm", CALLS)


def arguments(seed=0):
    """Draws x, scale, bias and a mask with NaN under it."""
    keys = jax.random.split(jax.random.key(seed), 4)
    where = jax.random.bernoulli(keys[3], 0.7, (3, 8, 1, 4))
    x = 2 * jax.random.normal(keys[0], SHAPE) + 1
    scale, bias = (jax.random.normal(k, (4,)) + 1 for k in keys[1:3])
    return jnp.where(where, x, jnp.nan), scale, bias, where


def masked(activation, y, where):
    return jnp.where(where, activation(jnp.where(where, y, 0)), 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
@each_norm
def test_an_activated_norm_is_the_norm_and_the_activation(norm, activation):
    """y, its gradients, forward mode and a Hessian-vector product; zero at the mask."""
    x, scale, bias, where = arguments()
    wy = jax.random.normal(jax.random.key(7), SHAPE)

    def of(apply):
        def loss(x, scale, bias):
            return (jnp.sin(apply(x, scale, bias)) * wy).sum()

        primals = (x, scale, bias)
        ones = jax.tree.map(jnp.ones_like, primals)
        gradient = jax.grad(loss, (0, 1, 2))
        return apply(*primals), *jax.jvp(gradient, primals, ones)

    got = of(lambda *a: CALLS[norm](*a, where=where, activation=activation))
    want = of(lambda *a: masked(activation, CALLS[norm](*a, where=where), where))
    assert_close(got, want, x.size)
    assert not np.asarray(got[0])[~np.broadcast_to(where, SHAPE)].any()


@each_norm
def test_it_is_the_same_in_half_precision_and_under_vmap(norm):
    x, scale, bias, _ = (jnp.nan_to_num(a) for a in arguments())
    x = x.astype(jnp.bfloat16)
    got, want = (
        jax.jit(jax.vmap(f, (0, None, None)))(jnp.stack([x, x + 1]), scale, bias)
        for f in (
            lambda *a: CALLS[norm](*a, activation=jax.nn.silu),
            lambda *a: jax.nn.silu(CALLS[norm](*a)),
        )
    )
    assert got.dtype == want.dtype == jnp.bfloat16
    # silu itself may be fused in one and rounded between in the other.
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=0
    )


def kept(f, *primals):
    """The bytes that f keeps for its backward pass, the primals' own among them."""
    jaxpr = jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[1])(*primals).jaxpr
    arrays = {v: v.aval for v in jaxpr.outvars if not hasattr(v, "val")}
    return sum(a.size * a.dtype.itemsize for a in arrays.values())


@each_norm
def test_an_activated_norm_keeps_no_more_than_the_norm(norm):
    x, scale, bias, _ = (jnp.nan_to_num(a) for a in arguments())
    x, scale, bias = (jnp.tile(a, 64) for a in (x, scale, bias))
    plain = kept(lambda *a: CALLS[norm](*a), x, scale, bias)
    of_gelu = kept(lambda *a: jax.nn.gelu(CALLS[norm](*a)), x, scale, bias)
    fused = kept(lambda *a: CALLS[norm](*a, activation=jax.nn.gelu), x, scale, bias)
    # Small arrays may be kept under two names: as the norm's, and as the activation's.
    assert fused < plain + x.nbytes / 2
    assert of_gelu >= plain + x.nbytes


def collectives(f, *arguments):
    """How many all-reduces the program has before XLA finds some of them alike."""
    return len(
        re.findall("stablehlo.all_reduce", jax.jit(f).lower(*arguments).as_text())
    )


def sums(f, *arguments):
    """How many sums over axes the program has before XLA finds some of them alike."""
    return jax.jit(f).lower(*arguments).as_text().count("stablehlo.reduce(")


def test_an_activated_synced_norm_sends_no_more():
    """One all-reduce forward and one backward: y again is not the moments again."""
    x, scale, bias, _ = (jnp.nan_to_num(a) for a in arguments())
    split = functools.partial(
        jax.shard_map,
        mesh=mesh((8,), ("d",)),
        in_specs=(P(None, "d"), P(), P()),
        out_specs=P(None, "d"),
        check_vma=False,
    )

    def norm(x, scale, bias):
        return normjax.batch_norm(
            x, scale, bias, axis_name="d", activation=jax.nn.silu
        )[0]

    def gradient(*a):
        return jax.grad(lambda x: jnp.sin(norm(x, *a[1:])).sum())(a[0])

    assert collectives(split(norm), x, scale, bias) == 1
    assert collectives(split(gradient), x, scale, bias) == 2
    want = jax.nn.silu(CALLS["batch"](x, scale, bias))
    assert_close(jax.jit(split(norm))(x, scale, bias), want, x.size)


@pytest.mark.parametrize("system", [Linen, Nnx])
@pytest.mark.parametrize("name", NAMES)
def test_modules_activate(system, name):
    x = jnp.nan_to_num(arguments()[0])
    fields = {"GroupNorm": {"num_groups": 2}}.get(name, {})
    if name == "BatchNorm":
        fields = {"use_running_average": False}
    got = system(name, x, activation=jax.nn.gelu, **fields)
    want = system(name, x, **fields)
    assert_close(got(x), jax.nn.gelu(want(x)), 1)
    if name == "BatchNorm":  # the statistics are those of the norm alone
        assert_close(got.statistics, want.statistics, 1)


ADDED = {
    "layer": (normjax.add_layer_norm, normjax.layer_norm),
    "rms": (lambda x, r, s, b, **k: normjax.add_rms_norm(x, r, s, **k), CALLS["rms"]),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", ADDED)
def test_an_added_norm_is_the_sum_and_its_norm(norm):
    fused, plain = ADDED[norm]
    x, scale, bias, where = arguments()
    residual = jax.random.normal(jax.random.key(3), SHAPE)

    def separate(x, residual, scale, bias, **fields):
        h = x + residual
        return plain(h, scale, bias, **fields), h

    def of(f):
        def loss(*a):
            y, h = f(*a, where=where, activation=jax.nn.silu)
            return (jnp.sin(y)).sum() + jnp.where(where, jnp.cos(h), 0).sum()

        primals = (x, residual, scale, bias)
        gradient = jax.grad(loss, (0, 1, 2, 3))
        ones = jax.tree.map(jnp.ones_like, primals)
        return f(*primals, where=where), *jax.jvp(gradient, primals, ones)

    assert_close(of(fused), of(separate), x.size)


@pytest.mark.parametrize("norm", ADDED)
def test_the_sum_has_the_dtype_of_a_sum(norm):
    x, scale, bias, _ = arguments()
    y, h = ADDED[norm][0](x.astype(jnp.bfloat16), x, scale, bias)
    assert h.dtype == y.dtype == jnp.float32
    y, h = ADDED[norm][0](x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), scale, bias)
    assert h.dtype == y.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_add(name):
    """With the variables of the norm alone, in linen and in nnx."""
    x, *_ = arguments()
    x = jnp.nan_to_num(x)
    residual = jnp.flip(x, 1)
    init = nn.initializers.normal()
    module = getattr(normjax.linen, f"Add{name}")(scale_init=init)
    variables = module.init(jax.random.key(0), x, residual)
    alone = getattr(normjax.linen, name)(scale_init=init)
    want = alone.init(jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(want)
    y, h = module.apply(variables, x, residual)
    assert_close((y, h), (alone.apply(variables, x + residual), x + residual), 1)

    of_nnx = getattr(normjax.nnx, f"Add{name}")(4, rngs=nnx.Rngs(0))
    of_nnx.scale[...] = variables["params"]["scale"]
    assert_close(of_nnx(x, residual), (y, h), 1)


class Block(nn.Module):
    """What a policy finds in a network."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(x.shape[-1], (3, 3))(x)
        y = nn.relu(normjax.linen.BatchNorm(use_running_average=False)(y))
        y = nn.Conv(x.shape[-1], (3, 3))(y)
        y = nn.gelu(normjax.linen.GroupNorm(2)(y))
        y = nn.Dense(x.shape[-1])(y)
        return x + nn.silu(normjax.linen.LayerNorm()(y))


def test_the_policy_keeps_less_and_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 8))
    block = Block()
    variables = block.init(jax.random.key(1), x)

    def apply(x, params):
        return block.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    again = jax.checkpoint(apply, policy=normjax.remat_policy)

    def gradients(f):
        def loss(x, params):
            y, updates = f(x, params)
            return jnp.sin(y).sum(), updates

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, variables["params"])

    assert_close(gradients(again), gradients(apply), x.size)

    def bytes_of(f):
        return kept(lambda *a: f(*a)[0], x, variables["params"]) / x.nbytes

    # x, and what two convolutions and a matrix product return; some of it twice, as
    # the norm's own and as the policy's. Beside these: y, the mask of relu, its result,
    # the input of gelu and what its derivative wants, and so on.
    assert bytes_of(again) < 7.5 < 12 < bytes_of(apply)


def test_the_policy_sums_and_sends_nothing_twice():
    """As many sums and all-reduces with it as without."""
    x, scale, bias, _ = (jnp.nan_to_num(a) for a in arguments())

    def block(x, scale, bias):
        y = normjax.batch_norm(x, scale, bias, axis_name="d")[0]
        return jnp.sin(y) * x

    def gradient(f):
        def of(*a):
            return jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1, 2))(*a)

        return jax.shard_map(
            of,
            mesh=mesh((8,), ("d",)),
            in_specs=(P(None, "d"), P(), P()),
            out_specs=(P(), (P(None, "d"), P(), P())),
            check_vma=False,
        )

    again = gradient(jax.checkpoint(block, policy=normjax.remat_policy))
    everything = gradient(jax.checkpoint(block))
    a = (x, scale, bias)
    assert collectives(again, *a) == collectives(gradient(block), *a) == 2
    assert collectives(everything, *a) == 3
    assert sums(again, *a) == sums(gradient(block), *a) < sums(everything, *a)


def largest(x):
    """A reduction by a function of one's own, of cheap operations."""
    return jax.lax.reduce(x, 0.0, lambda a, b: jnp.maximum(abs(a), abs(b)), (1,))


@pytest.mark.parametrize(
    ("f", "keeps"),
    [
        (lambda x: x @ x, True),
        (lambda x: jnp.tanh(x) + 1, False),
        (lambda x: jax.nn.relu(x), False),
        (lambda x: jax.nn.logsumexp(x, -1, keepdims=True) * x, True),
        (lambda x: jnp.sort(x, -1), True),
        (lambda x: x * largest(jax.lax.stop_gradient(x))[:, None], True),
    ],
    ids=["product", "elementwise", "relu", "sum", "sort", "reduction"],
)
def test_the_policy_keeps_what_is_costly(f, keeps):
    """Beside its argument, which is there anyway."""
    x = jax.random.normal(jax.random.key(0), (16, 16))

    def twice(x):  # the second sine wants what f returns
        return jnp.sin(jnp.sin(f(x)))

    jaxpr = jax.make_jaxpr(
        lambda x: jax.vjp(jax.checkpoint(twice, policy=normjax.remat_policy), x)[1]
    )(x).jaxpr
    found = {v for v in jaxpr.outvars if not hasattr(v, "val")} - set(jaxpr.invars)
    assert bool(found) == keeps


BAD = [
    (
        lambda x: normjax.layer_norm(x, activation="relu"),
        "layer_norm: activation must be a function of y. Got activation='relu'. Pass"
        " jax.nn.silu, say.",
    ),
    (
        lambda x: normjax.batch_norm(x, activation=jnp.sum),
        "batch_norm: activation must work element by element, and return the shape of"
        " y. Got a result of shape (), y.shape=(3, 8, 2, 4). Apply what changes the"
        " shape to what the norm returns.",
    ),
    (
        lambda x: normjax.add_rms_norm(x, x[:1]),
        "add_rms_norm: residual must have the shape of x. Got residual.shape=(1, 8, 2,"
        " 4), x.shape=(3, 8, 2, 4). Broadcast the one that is smaller.",
    ),
    (
        lambda x: normjax.add_layer_norm(x, x.astype(int)),
        "add_layer_norm: residual must be floating, because its mean and its normalized"
        " values are not integers. Got residual.dtype=int32. Pass"
        " residual.astype(jnp.float32).",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_neighbours_are_named(call, message):
    x = jnp.nan_to_num(arguments()[0])
    with pytest.raises((TypeError, ValueError)) as error:
        call(x)
    assert str(error.value) == message


@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
def test_an_activation_of_complex_values_is_differentiated(norm):
    """jax 0.10 cannot keep a complex array by its name."""
    x = jax.lax.complex(*jax.random.normal(jax.random.key(0), (2, 4, 6)))
    f = {
        "batch": lambda x, **k: normjax.batch_norm(x, **k)[0],
        "layer": normjax.layer_norm,
        "rms": normjax.rms_norm,
    }[norm]

    def loss(call):
        return lambda x: (jnp.abs(call(x)) ** 2).sum()

    got = jax.jit(jax.grad(loss(lambda x: f(x, activation=jnp.sin))))(x)
    want = jax.jit(jax.grad(loss(lambda x: jnp.sin(f(x)))))(x)
    np.testing.assert_allclose(got, want, atol=1e-5)


X3 = jnp.linspace(0.1, 0.9, 8).reshape(2, 4)
CHEAP = {
    "abs add and bitcast_convert_type broadcast_in_dim ceil clamp": lambda x: (
        abs(x) + x,
        (x > 0) & (x < 1),
        lax.bitcast_convert_type(x, jnp.int32),
        jnp.broadcast_to(x[0], (3, 4)),
        lax.ceil(x),
        lax.clamp(0.0, x, 1.0),
    ),
    "complex conj real imag convert_element_type copy cos div eq": lambda x: (
        lax.real(lax.conj(lax.complex(x, x))),
        lax.imag(lax.complex(x, x)),
        x.astype(jnp.int32),
        lax.copy_p.bind(x),
        lax.cos(x) / x,
        x == 0.5,
    ),
    "erf exp exp2 expm1 floor ge gt integer_pow iota is_finite le": lambda x: (
        lax.erf(x) + lax.exp(x) + lax.exp2(x) + lax.expm1(x) + lax.floor(x),
        (x >= 0, x > 0, x <= 0, lax.is_finite(x)),
        lax.integer_pow(x, 3) + lax.iota(jnp.float32, 4),
    ),
    "log log1p logistic lt max min mul ne neg not or pad pow": lambda x: (
        lax.log(x) * lax.log1p(x) * lax.logistic(-x),
        lax.max(x, x) + lax.min(x, x),
        ~((x < 0) | (x != 0)),
        lax.pad(x, 0.0, [(0, 1, 0), (0, 0, 0)]),
        lax.pow(x, x),
    ),
    "reduce_precision rem reshape rev round rsqrt select_n sign sin": lambda x: (
        lax.reduce_precision(x, 8, 10),
        lax.rem(x, x),
        x.reshape(4, 2),
        lax.rev(x, (0,)),
        lax.round(x),
        lax.rsqrt(x) * lax.sign(x) * lax.sin(x),
        lax.select(x > 0, x, x),
    ),
    "concatenate slice split sqrt square squeeze sub tanh transpose xor": lambda x: (
        lax.concatenate([x, x], 0),
        lax.slice(x, (0, 0), (1, 2)),
        lax.split(x, (1, 1)),
        lax.sqrt(x) - lax.square(x),
        lax.squeeze(x[:1], (0,)),
        lax.tanh(x).T,
        (x > 0) ^ (x < 1),
    ),
    "optimization_barrier stop_gradient": lambda x: (
        lax.optimization_barrier(x),
        lax.stop_gradient(x),
    ),
}


@pytest.mark.parametrize("names", CHEAP)
def test_operations_on_single_elements_and_of_shape_are_computed_again(names):
    eqns = jax.make_jaxpr(CHEAP[names])(X3).jaxpr.eqns
    found = {e.primitive.name: e for e in eqns}
    # What stop_gradient is to JAX is no operation of its own.
    assert set(names.split()) - {"stop_gradient"} <= found.keys()
    for name in set(names.split()) & found.keys():
        eqn = found[name]
        avals = [v.aval for v in eqn.invars]
        assert not normjax.remat_policy(eqn.primitive, *avals, **eqn.params), name
