"""The one derivative, in float64 against plain autodiff on one device, everywhere."""

import functools
import itertools
import math
from typing import NamedTuple

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import DEVICES, MAPPED, AxisType, mesh, sharded
from family import FAMILY
from jax import lax

import normjax

pytestmark = pytest.mark.usefixtures("float64", "strict")

SHAPE = (3, 16, 2, 4)  # [N, S, T, C]; contexts split S into eight
KINDS = ["plain", "masked", "complex and weighted"]
# Where all five would take long to compile: with a mean and without, parameters along
# one axis and along all, and moments of features that merge to those of groups.
OF_EACH_WAY = ("batch", "rms", "group")
GROUPS = {  # by devices; those of one size have collectives of their own
    "grouped": {8: [[0, 3, 5], [1], [2, 4, 6, 7]], 4: [[0, 2, 3], [1]]},
    "evenly grouped": {8: [[0, 2, 7, 5], [1, 3, 4, 6]], 4: [[0, 3], [2, 1]]},
}


def data(kind: str):
    """A point, its direction, a mask, weights of y: all split; parameters and theirs.

    The point is x, and with it the weights where there are some.
    """
    keys = iter(jax.random.split(jax.random.key(0), 20))
    complex_ = kind == "complex and weighted"

    def normal(shape, complex_=complex_):
        a = jax.random.normal(next(keys), shape)
        return lax.complex(a, jax.random.normal(next(keys), shape)) if complex_ else a

    x = 2 * normal(SHAPE) + 3
    point, direction, where = {"x": x}, {"x": normal(SHAPE)}, None
    if kind != "plain":
        # Uneven, the third device's piece empty, and NaN where nothing counts.
        where = jax.random.bernoulli(next(keys), 0.7, (3, 16, 1, 4))
        where = where.at[:, 4:6].set(False)
        point["x"] = jnp.where(where, x, jnp.nan)
    if kind == "complex and weighted" or kind in GROUPS:
        weights = jax.random.uniform(next(keys), where.shape, minval=0.1, maxval=2.0)
        point["weights"] = jnp.where(where, weights, 0.0)
        direction["weights"] = normal(where.shape, False)
        where = None
    wy = normal(SHAPE)
    parameters = tuple(normal((4,)) + 1 for _ in range(2))
    directions = tuple(normal((4,)) for _ in range(2))
    return (point, direction, where, wy), (parameters, directions)


def bent(a):
    """A real number that depends on all of an array, in no simple way."""
    if jnp.iscomplexobj(a):
        return (jnp.sin(a.real) + jnp.cos(2 * a.imag)).sum()
    return jnp.sin(a).sum()


def losses(apply, wy, where, share):
    """A loss of each norm, which no symmetry makes flat: (point, parameters) -> scalar.

    The losses of all devices add up to the whole one. The moments of batch norm take
    part, a ``share`` on each device, since every device has them all.
    """

    def loss(name, point, parameters):
        where_ = point.get("weights", where)
        y, m = apply(name, point["x"], *parameters, where_)
        total = bent(y * wy)
        if m is not None:
            count, mean, var = m
            of_moments = jnp.cos(var / 9) * count / 99 + jnp.sin(count / 99)
            total = total + share * (bent(mean) + of_moments.sum())
        return total

    return {name: functools.partial(loss, name) for name in FAMILY}


def apply_normjax(names, groups=None):
    def apply(name, x, scale, bias, where):
        if name != "batch":
            return FAMILY[name].call(x, scale, bias, where, names, groups), None
        y, m = normjax.batch_norm(
            x,
            scale,
            bias,
            where=where,
            axis_name=names,
            axis_index_groups=groups,
            epsilon=family.EPSILON,
        )
        return y, (m.count, m.mean, m.var)

    return apply


def apply_reference(name, x, scale, bias, where):
    y = family.reference(FAMILY[name], x, scale, bias, where)
    if name != "batch":
        return y, None
    m = family.reference_moments(FAMILY[name], x, where)
    return y, tuple(a[0, 0, 0] for a in m)


def of_groups(groups, wy):
    """The loss of each norm where sub-groups of devices are batches of their own."""
    size = sum(map(len, groups))
    pieces = np.arange(SHAPE[1]).reshape(size, -1)

    def loss(name, point, parameters):
        total = 0.0
        for group in groups:
            rows = pieces[group].reshape(-1)
            one = losses(apply_reference, wy[:, rows], None, len(group) / size)[name]
            mine = functools.partial(jnp.take, indices=rows, axis=1)
            total += one(jax.tree.map(mine, point), parameters)
        return total

    return {name: functools.partial(loss, name) for name in FAMILY}


def norms(kind: str) -> tuple[str, ...]:
    return tuple(FAMILY) if kind == "masked" else OF_EACH_WAY


class Case(NamedTuple):
    """Of which kind the data is, and which norms one program has."""

    kind: str
    norms: tuple[str, ...]


def derivatives(
    loss, x, dx, parameters, directions, kind, collect=lambda t: t, share=1.0
):
    """First and second order, forward and reverse, as (split, whole) results.

    Compiling takes the time, so reverse over reverse is taken of one kind, as the
    transpose of what forward over reverse is there, and a gradient that is not a part
    of the second order of another.
    """

    def gradient(x, parameters):
        gx, gp = jax.grad(loss, (0, 1))(x, parameters)
        return gx, collect(gp)

    def of_gradient(gx, gp):
        split = sum(bent(g) for g in jax.tree.leaves(gx))
        return split + share * sum(bent(g / 9) for g in gp)

    point, direction = (x, parameters), (dx, directions)
    forward = jax.jvp(loss, point, direction)[1]
    if kind == "masked":
        (gx, gp), along = jax.linearize(gradient, *point)
        hx, hp = along(*direction)
    else:
        (gx, gp), (hx, hp) = jax.jvp(gradient, point, direction)
    if kind == "plain":
        gx, gp = gradient(*point)
    split = {"grad": gx, "forward over reverse": hx}
    whole = {"grad": gp, "forward over reverse": hp, "forward": forward}
    if kind == "masked":
        back = jax.linear_transpose(along, *direction)
        rx, rp = back(jax.grad(of_gradient, (0, 1))(gx, gp))
        split["reverse over reverse"] = rx
        whole["reverse over reverse"] = collect(rp)
    return split, whole


def of_all(case: Case):
    """`derivatives` of each norm, as {norm: split}, {norm: whole}."""

    def every(losses, x, dx, parameters, directions, **options):
        found = {
            name: derivatives(
                losses[name], x, dx, parameters, directions, case.kind, **options
            )
            for name in case.norms
        }
        return tuple({n: pair[i] for n, pair in found.items()} for i in (0, 1))

    return every


@functools.cache
def expected(kind: str, devices: int = 1):
    (point, direction, where, wy), (parameters, directions) = data(kind)
    counts = point.get("weights", where)
    if counts is not None:
        x = point["x"]
        point["x"] = jnp.where(counts.astype(bool), x, jnp.zeros_like(x))
    if kind in GROUPS:
        every = of_groups(GROUPS[kind][devices], wy)
    else:
        every = losses(apply_reference, wy, where, 1.0)
    whole = jax.jit(functools.partial(of_all(Case(kind, norms(kind))), every))
    return jax.device_get(whole(point, direction, parameters, directions))


def on_one_device(case, wrap=lambda f: f):
    (x, dx, where, wy), (parameters, directions) = data(case.kind)
    found = {n: wrap(f) for n, f in losses(apply_normjax(None), wy, where, 1.0).items()}
    return jax.jit(functools.partial(of_all(case), found))(
        x, dx, parameters, directions
    )


def devices_of(context):
    return 4 if "partial manual" in context else DEVICES


def groups_of(context, kind):
    return GROUPS[kind][devices_of(context)] if kind in GROUPS else None


def inside(context, case):
    """Everything taken inside the context, by each device."""
    c = MAPPED[context]
    size, groups = devices_of(context), groups_of(context, case.kind)

    def local(split, whole):
        (x, dx, where, wy), (parameters, directions) = split, whole
        every = losses(apply_normjax(c.names, groups), wy, where, 1 / size)
        split, whole = of_all(case)(
            every, x, dx, parameters, directions, collect=c.collect, share=1 / size
        )
        for name in whole:
            whole[name]["forward"] = lax.psum(whole[name]["forward"], c.names)
        return split, whole

    return jax.jit(functools.partial(c.run, local))(*data(case.kind))


def outside(context, case):
    """Only the loss inside the context, all derivatives around it."""
    c = MAPPED[context]
    size, groups = devices_of(context), groups_of(context, case.kind)
    (x, dx, where, wy), (parameters, directions) = data(case.kind)

    def loss(name, x, parameters):
        def local(split, parameters):
            x, where, wy = split
            one = losses(apply_normjax(c.names, groups), wy, where, 1 / size)[name]
            return (), lax.psum(one(x, parameters), c.names)

        return c.run(local, (x, where, wy), parameters)[1]

    every = {n: functools.partial(loss, n) for n in FAMILY}
    return jax.jit(functools.partial(of_all(case), every))(
        x, dx, parameters, directions
    )


def by_sharding(axis_type, case):
    """No named axes: jit over sharded arrays."""
    split, (parameters, directions) = data(case.kind)
    with jax.set_mesh(mesh((8,), ("d",), axis_type)):
        x, dx, where, wy = sharded(split, axis_type)
        every = losses(apply_normjax(None), wy, where, 1.0)
        return jax.jit(functools.partial(of_all(case), every))(
            x, dx, parameters, directions
        )


def ensemble(case):
    """Two members by vmap, each with its own x and parameters; the second is kept."""
    (x, dx, where, wy), (parameters, directions) = data(case.kind)
    every = losses(apply_normjax(None), wy, where, 1.0)
    two = jax.tree.map(
        lambda a: jnp.stack([2 * a + 1, a]), (x, dx, parameters, directions)
    )
    found = jax.jit(jax.vmap(functools.partial(of_all(case), every)))(*two)
    return jax.tree.map(lambda a: a[1], found)


def ensemble_of_shards(case):
    """Members by vmap inside shard_map, where the sync is along the other axis."""
    c, groups = MAPPED["shard_map"], groups_of("shard_map", case.kind)

    def local(split, whole):
        (x, dx, where, wy), (parameters, directions) = split, whole
        every = losses(apply_normjax(c.names, groups), wy, where, 1 / DEVICES)
        member = functools.partial(of_all(case), every, share=1 / DEVICES)
        two = jax.tree.map(
            lambda a: jnp.stack([2 * a + 1, a]), (x, dx, parameters, directions)
        )
        split, whole = jax.tree.map(lambda a: a[1], jax.vmap(member)(*two))
        for name in whole:
            whole[name]["forward"] = lax.psum(whole[name]["forward"], c.names)
        return split, whole

    return jax.jit(functools.partial(c.run, local))(*data(case.kind))


def in_scan(loss):
    """The loss as the sum of three equal steps of a scan."""

    def scanned(x, parameters):
        def step(total, weight):
            return total + weight * loss(x, parameters), None

        weights = jnp.full((3,), 1 / 3)
        return lax.scan(step, jnp.zeros(()), weights)[0]

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


APART = [
    "inside shard_map",
    "outside pmap",
    "inside two axes unchecked",
    "outside partial manual",
    "ensemble of shards",
]
NAMED = [c for c in CONTEXTS if "side" in c or "shards" in c]
EVERY = [
    *itertools.product(CONTEXTS, KINDS),
    *itertools.product(NAMED, ["grouped"]),
    *itertools.product(APART, ["evenly grouped"]),
]
# Each context with one kind, so that inside and outside of one differ in theirs.
SOME = {
    *zip(CONTEXTS, itertools.cycle(KINDS), strict=False),
    *itertools.product(APART, ["grouped"]),
    *itertools.product(APART[:2], ["evenly grouped"]),
}


def cases():
    """Of each context in `SOME` one norm, in turn; all others are `further`."""
    for context, kind in EVERY:
        all_, turn = norms(kind), list(CONTEXTS).index(context)
        first = (all_[turn % len(all_)],)
        rest = tuple(name for name in all_ if name not in first)
        if (context, kind) in SOME:
            yield pytest.param(context, Case(kind, first), id=f"{context}-{kind}")
        else:
            rest = all_
        id_ = f"{context}-{kind}-{'-'.join(rest)}"
        yield pytest.param(context, Case(kind, rest), marks=pytest.mark.further, id=id_)


@pytest.mark.parametrize(("context", "case"), [*cases()])
def test_derivatives_are_those_of_autodiff_on_one_device(context, case):
    """The norms of a case in one program."""
    found = jax.device_get(CONTEXTS[context](case))
    of = devices_of(context) if case.kind in GROUPS else 1
    want = expected(case.kind, of)
    for norm in case.norms:
        for part in ("split", "whole"):
            got = found[part == "whole"][norm]
            for what, of_what in want[part == "whole"][norm].items():
                # Batch norm reduces 96 values, the loss all of x.
                reduced = math.prod(SHAPE) if what == "forward" else 96
                try:
                    family.assert_close(got[what], of_what, reduced)
                except AssertionError as error:
                    error.add_note(f"{norm} norm, {what}, {part} arguments")
                    raise


@pytest.mark.parametrize(("kind", "norm"), family.combined(KINDS, FAMILY))
def test_normalize_by_own_moments_has_the_gradient_of_standardize(norm, kind):
    """The two doors meet: the rule equals plain autodiff through `moments`."""
    (point, direction, where, wy), (parameters, directions) = data(kind)
    row = FAMILY[norm]

    def two_doors(x, scale, bias, where):
        if row.groups or not row.centered:
            m = normjax.Moments(*family.reference_moments(row, x, where))
        else:
            m = normjax.moments(x, row.axes, where=where)
        bias = bias if row.centered else None
        return normjax.normalize(x, m, scale, bias, epsilon=family.EPSILON, where=where)

    def one_door(x, scale, bias, where):
        return row.call(x, scale, bias, where)

    def found(f):
        def loss(point, parameters):
            counts = point.get("weights", where)
            return bent(f(point["x"], *parameters, counts) * wy)

        gradient = jax.grad(loss, (0, 1))
        at, along = (point, parameters), (direction, directions)
        return jax.jit(lambda: jax.jvp(gradient, at, along))()

    family.assert_close(found(one_door), found(two_doors), reduced=96)


def test_third_order_is_that_of_autodiff():
    (point, direction, _, wy), (parameters, _) = data("plain")
    x, dx, wy = (a[:2, :4] for a in (point["x"], direction["x"], wy))

    def third(apply):
        def along(t):
            return (
                jnp.sin(apply("batch", x + t * dx, *parameters, None)[0]) * wy
            ).sum()

        return jax.jit(jax.grad(jax.grad(jax.grad(along))))(jnp.zeros((), x.dtype))

    got, want = third(apply_normjax(None)), third(apply_reference)
    family.assert_close(got, want, reduced=x.size)


def test_hessian_and_per_example_gradients():
    (point, _, _, wy), (parameters, _) = data("plain")
    x, wy = point["x"][:, :2, 0], wy[:, :2, 0]  # [N, S, C]

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


def plain_moments(x, w=1.0):
    w = jnp.broadcast_to(w, x.shape)

    def mean(a):
        return (w * a).sum((0, 1), keepdims=True) / w.sum((0, 1), keepdims=True)

    return mean(x), mean(jnp.square(x - mean(x)))


ZERO_VARIANCE = {
    "moments": (
        lambda x: normjax.moments(x, (0, 1)).var,
        lambda x: plain_moments(x)[1],
    ),
    "normalize": (
        lambda x: normjax.normalize(
            x, normjax.moments(x, (0, 1)), epsilon=family.EPSILON
        ),
        lambda x: (
            (x - plain_moments(x)[0]) / jnp.sqrt(plain_moments(x)[1] + family.EPSILON)
        ),
    ),
    "merge": (
        lambda x: normjax.merge(normjax.moments(x, 1), 0).var,
        lambda x: plain_moments(x)[1],
    ),
    "two merged": (
        lambda x: (
            normjax.moments(x[:2], (0, 1)).merge(normjax.moments(x[2:], (0, 1))).var
        ),
        lambda x: plain_moments(x)[1],
    ),
    "weighted": (
        lambda x: normjax.moments(x, (0, 1), where=jnp.square(x) + 1).var,
        lambda x: plain_moments(x, jnp.square(x) + 1)[1],
    ),
}


@pytest.mark.parametrize("name", ZERO_VARIANCE)
def test_derivatives_at_zero_variance_are_those_of_the_formula(name, float64):
    """To the third order: where a clamp has a tie, it halves them."""
    ours, formula = ZERO_VARIANCE[name]
    keys = jax.random.split(jax.random.key(5), 4)
    # Of 16 values, so that the mean of the plain formula is exact.
    x, *ways = (jax.random.normal(k, (4, 4, 3), jnp.float64) for k in keys)
    # One channel of variance 0, and one of zeros.
    x = x.at[..., 0].set(3.0).at[..., 1].set(0.0)

    def along(f, orders):
        def g(x):
            return (jnp.sin(f(x)) + f(x)).sum()

        for way in ways[:orders]:
            g = functools.partial(lambda g, way, x: jax.jvp(g, (x,), (way,))[1], g, way)
        return g

    for orders in (1, 2):  # and once more in reverse
        got, want = (
            jax.jit(jax.value_and_grad(along(f, orders)))(x) for f in (ours, formula)
        )
        for g, w in zip(got, want, strict=True):
            size = float(jnp.abs(w).max())
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-10 * max(size, 1))
