"""The one derivative, in float64 against plain autodiff on one device, everywhere."""

import functools

import family
import jax
import jax.numpy as jnp
import pytest
from contexts import DEVICES, MAPPED, AxisType, mesh, sharded
from family import FAMILY
from jax import lax

import normjax

pytestmark = pytest.mark.usefixtures("float64", "strict")

SHAPE = (3, 16, 2, 4)  # [N, S, T, C]; contexts split S into eight
MASKS = ["plain", "masked"]


def data(masked: bool):
    """x, where, a direction of x and weights of y: all split; parameters and theirs."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    x = 2 * jax.random.normal(next(keys), SHAPE) + 3
    where = None
    if masked:
        # Uneven, the third device's piece empty, and NaN where nothing counts.
        where = jax.random.bernoulli(next(keys), 0.7, (3, 16, 1, 4))
        where = where.at[:, 4:6].set(False)
        x = jnp.where(where, x, jnp.nan)
    dx, wy = jax.random.normal(next(keys), SHAPE), jax.random.normal(next(keys), SHAPE)
    parameters = tuple(jax.random.normal(next(keys), (4,)) + 1 for _ in range(2))
    directions = tuple(jax.random.normal(next(keys), (4,)) for _ in range(2))
    return (x, where, dx, wy), (parameters, directions)


def losses(apply, wy, where, share):
    """A loss of each norm, which no symmetry makes flat: (x, parameters) -> scalar.

    The losses of all devices add up to the whole one. The moments of batch norm take
    part, a ``share`` on each device, since every device has them all.
    """

    def loss(name, x, parameters):
        y, m = apply(name, x, *parameters, where)
        total = (jnp.sin(y) * wy).sum()
        if m is not None:
            count, mean, var = m
            total = (
                total + share * (jnp.sin(mean) + jnp.cos(var / 9) * count / 99).sum()
            )
        return total

    return {name: functools.partial(loss, name) for name in FAMILY}


def apply_normjax(names):
    def apply(name, x, scale, bias, where):
        if name != "batch":
            return FAMILY[name].call(x, scale, bias, where, names), None
        y, m = normjax.batch_norm(
            x, scale, bias, where=where, axis_name=names, epsilon=family.EPSILON
        )
        return y, (m.count, m.mean, m.var)

    return apply


def apply_reference(name, x, scale, bias, where):
    y = family.reference(FAMILY[name], x, scale, bias, where)
    if name != "batch":
        return y, None
    m = family.reference_moments(FAMILY[name], x, where)
    return y, tuple(a[0, 0, 0] for a in m)


def derivatives(loss, x, dx, parameters, directions, collect=lambda t: t, share=1.0):
    """First and second order, forward and reverse, as (split, whole) results."""

    def gradient(x, parameters):
        gx, gp = jax.grad(loss, (0, 1))(x, parameters)
        return gx, collect(gp)

    def of_gradient(x, parameters):
        gx, gp = gradient(x, parameters)
        return jnp.sin(gx).sum() + share * sum(jnp.sin(g / 9).sum() for g in gp)

    point, direction = (x, parameters), (dx, directions)
    forward = jax.jvp(loss, point, direction)[1]
    gx, gp = gradient(*point)
    hx, hp = jax.jvp(gradient, point, direction)[1]
    rx, rp = jax.grad(of_gradient, (0, 1))(*point)
    return {"grad": gx, "forward over reverse": hx, "reverse over reverse": rx}, {
        "grad": gp,
        "forward over reverse": hp,
        "reverse over reverse": collect(rp),
        "forward": forward,
    }


def of_all(make_losses, x, dx, parameters, directions, **options):
    """`derivatives` of every norm, as {norm: split}, {norm: whole}."""
    found = {
        name: derivatives(loss, x, dx, parameters, directions, **options)
        for name, loss in make_losses.items()
    }
    return {n: s for n, (s, _) in found.items()}, {n: w for n, (_, w) in found.items()}


@functools.cache
def expected(masked: bool):
    (x, where, dx, wy), (parameters, directions) = data(masked)
    clean = x if where is None else jnp.where(where, x, jnp.zeros_like(x))
    whole = jax.jit(functools.partial(of_all, losses(apply_reference, wy, where, 1.0)))
    return jax.device_get(whole(clean, dx, parameters, directions))


def on_one_device(masked, wrap=lambda f: f):
    (x, where, dx, wy), (parameters, directions) = data(masked)
    found = {n: wrap(f) for n, f in losses(apply_normjax(None), wy, where, 1.0).items()}
    return jax.jit(functools.partial(of_all, found))(x, dx, parameters, directions)


def inside(context, masked):
    """Everything taken inside the context, by each device."""
    c = MAPPED[context]
    size = 4 if context == "partial manual" else DEVICES

    def local(split, whole):
        (x, where, dx, wy), (parameters, directions) = split, whole
        every = losses(apply_normjax(c.names), wy, where, 1 / size)
        split, whole = of_all(
            every, x, dx, parameters, directions, collect=c.collect, share=1 / size
        )
        for name in whole:
            whole[name]["forward"] = lax.psum(whole[name]["forward"], c.names)
        return split, whole

    return jax.jit(functools.partial(c.run, local))(*data(masked))


def outside(context, masked):
    """Only the loss inside the context, all derivatives around it."""
    c = MAPPED[context]
    size = 4 if context == "partial manual" else DEVICES
    (x, where, dx, wy), (parameters, directions) = data(masked)

    def loss(name, x, parameters):
        def local(split, parameters):
            x, where, wy = split
            one = losses(apply_normjax(c.names), wy, where, 1 / size)[name]
            return (), lax.psum(one(x, parameters), c.names)

        return c.run(local, (x, where, wy), parameters)[1]

    every = {n: functools.partial(loss, n) for n in FAMILY}
    return jax.jit(functools.partial(of_all, every))(x, dx, parameters, directions)


def by_sharding(kind, masked):
    """No named axes: jit over sharded arrays."""
    split, (parameters, directions) = data(masked)
    with jax.set_mesh(mesh((8,), ("d",), kind)):
        x, where, dx, wy = sharded(split, kind)
        every = losses(apply_normjax(None), wy, where, 1.0)
        return jax.jit(functools.partial(of_all, every))(x, dx, parameters, directions)


def ensemble(masked):
    """Two members by vmap, each with its own x and parameters; the second is kept."""
    (x, where, dx, wy), (parameters, directions) = data(masked)
    every = losses(apply_normjax(None), wy, where, 1.0)
    two = jax.tree.map(
        lambda a: jnp.stack([2 * a + 1, a]), (x, dx, parameters, directions)
    )
    found = jax.jit(jax.vmap(functools.partial(of_all, every)))(*two)
    return jax.tree.map(lambda a: a[1], found)


def ensemble_of_shards(masked):
    """Members by vmap inside shard_map, where the sync is along the other axis."""
    c = MAPPED["shard_map"]

    def local(split, whole):
        (x, where, dx, wy), (parameters, directions) = split, whole
        every = losses(apply_normjax(c.names), wy, where, 1 / DEVICES)
        member = functools.partial(of_all, every, share=1 / DEVICES)
        two = jax.tree.map(
            lambda a: jnp.stack([2 * a + 1, a]), (x, dx, parameters, directions)
        )
        split, whole = jax.tree.map(lambda a: a[1], jax.vmap(member)(*two))
        for name in whole:
            whole[name]["forward"] = lax.psum(whole[name]["forward"], c.names)
        return split, whole

    return jax.jit(functools.partial(c.run, local))(*data(masked))


def in_scan(loss):
    """The loss as the sum of three equal steps of a scan."""

    def scanned(x, parameters):
        def step(total, weight):
            return total + weight * loss(x, parameters), None

        weights = jnp.full((3,), 1 / 3, x.dtype)
        return lax.scan(step, jnp.zeros((), x.dtype), weights)[0]

    return scanned


def remat(policy):
    return functools.partial(jax.checkpoint, policy=policy)


CONTEXTS = {
    "one device": on_one_device,
    "scan": functools.partial(on_one_device, wrap=in_scan),
    "remat nothing": functools.partial(
        on_one_device, wrap=remat(jax.checkpoint_policies.nothing_saveable)
    ),
    "remat everything": functools.partial(
        on_one_device, wrap=remat(jax.checkpoint_policies.everything_saveable)
    ),
    "ensemble": ensemble,
    "ensemble of shards": ensemble_of_shards,
    "automatic sharding": functools.partial(by_sharding, AxisType.Auto),
    "explicit sharding": functools.partial(by_sharding, AxisType.Explicit),
    **{f"inside {c}": functools.partial(inside, c) for c in MAPPED},
    **{f"outside {c}": functools.partial(outside, c) for c in MAPPED},
}


@pytest.fixture
def quick_compile():
    """Compiling is what costs here; the arithmetic is the same without its best."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_derivatives_are_those_of_autodiff_on_one_device(context, mask):
    """All norms in one program, since compiling it is what takes the time."""
    masked = mask == "masked"
    found, want = jax.device_get(CONTEXTS[context](masked)), expected(masked)
    for norm in FAMILY:
        for part in ("split", "whole"):
            got = found[part == "whole"][norm]
            for what, of_what in want[part == "whole"][norm].items():
                try:
                    family.assert_close(got[what], of_what, reduced=96)
                except AssertionError as error:
                    error.add_note(f"{norm} norm, {what}, {part} arguments")
                    raise


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm", FAMILY)
def test_normalize_by_own_moments_has_the_gradient_of_standardize(norm, mask):
    """The two doors meet: the rule equals plain autodiff through `moments`."""
    (x, where, dx, wy), (parameters, directions) = data(mask == "masked")
    row = FAMILY[norm]

    def two_doors(x, scale, bias):
        if row.groups or not row.centered:
            m = normjax.Moments(*family.reference_moments(row, x, where))
        else:
            m = normjax.moments(x, row.axes, where=where)
        bias = bias if row.centered else None
        return normjax.normalize(x, m, scale, bias, epsilon=family.EPSILON, where=where)

    def one_door(x, scale, bias):
        return row.call(x, scale, bias, where)

    def found(f):
        def loss(x, parameters):
            return (jnp.sin(f(x, *parameters)) * wy).sum()

        gradient = jax.grad(loss, (0, 1))
        point, direction = (x, parameters), (dx, directions)
        return jax.jit(lambda: jax.jvp(gradient, point, direction))()

    family.assert_close(found(two_doors), found(one_door), reduced=96)


def test_third_order_is_that_of_autodiff():
    (x, _, dx, wy), (parameters, _) = data(False)
    x, dx, wy = x[:2, :4], dx[:2, :4], wy[:2, :4]

    def third(apply):
        def along(t):
            return (
                jnp.sin(apply("batch", x + t * dx, *parameters, None)[0]) * wy
            ).sum()

        return jax.jit(jax.grad(jax.grad(jax.grad(along))))(jnp.zeros((), x.dtype))

    got, want = third(apply_normjax(None)), third(apply_reference)
    family.assert_close(got, want, reduced=x.size)


def test_hessian_and_per_example_gradients():
    (x, _, _, wy), (parameters, _) = data(False)
    x, wy = x[:, :2, 0], wy[:, :2, 0]  # [N, S, C]

    def loss(x, wy, apply):
        return (jnp.sin(apply(x, *parameters)) * wy).sum()

    def plain(x, scale, bias):
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
            x.var(-1, keepdims=True) + jnp.asarray(family.EPSILON, x.dtype)
        )
        return y * scale[None] + bias[None]

    def ours(x, scale, bias):
        return normjax.layer_norm(x, scale, bias, epsilon=family.EPSILON)

    for of in (jax.hessian, lambda f: jax.jacfwd(jax.jacrev(f)), jax.grad):
        got, want = (
            jax.jit(jax.vmap(of(functools.partial(loss, apply=f))))(x, wy)
            for f in (ours, plain)
        )
        family.assert_close(got, want, reduced=4)
