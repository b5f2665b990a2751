"""Any mesh: data and model axes, features, space and parameters sharded over them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from family import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax

SHAPE = (8, 8, 2, 8)  # [N, S, T, C]
MESH = (4, 2), ("data", "model")
NORMS = {
    "batch": lambda *a, **k: normjax.batch_norm(*a, **k)[0],
    "layer": normjax.layer_norm,
    "rms": lambda x, scale, bias, **k: normjax.rms_norm(x, scale, **k) + bias,
    "group": functools.partial(normjax.group_norm, num_groups=2),
    "instance": normjax.instance_norm,
}
LAYOUTS = {
    "data": P("data"),
    "data and model": P(("data", "model")),
    "data, features over model": P("data", None, None, "model"),
    "data, sequence over model": P("data", "model"),
    "space over data, features over model": P(None, "data", None, "model"),
}


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    x = 2 * jax.random.normal(keys[0], SHAPE) + 1
    return x, *(jax.random.normal(k, (8,)) + 1 for k in keys[1:])


def results(norms, x, scale, bias):
    """For each norm y and the gradients of x, scale and bias."""

    def loss(norm, *a):
        y = NORMS[norm](*a)
        return jnp.sin(y).sum(), y

    found = {}
    for norm in norms:
        of = jax.value_and_grad(functools.partial(loss, norm), (0, 1, 2), has_aux=True)
        (_, y), gradients = of(x, scale, bias)
        found[norm] = (y, *gradients)
    return found


jitted = jax.jit(results, static_argnums=0)


def moved(text):
    """The most elements that a collective other than an all-reduce brings together."""
    found = [0]
    for line in text.splitlines():
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            shapes = re.findall(r"f\d+\[([\d,]*)\]", line.split(" = ")[1].split("(")[0])
            found += [math.prod(map(int, s.split(","))) for s in shapes if s]
    return max(found)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mesh_changes_no_digit_and_moves_no_x(layout, kind):
    """As on one device, each norm; parameters lie as the features do."""
    norms = tuple(NORMS)
    want = jax.tree.map(np.asarray, jitted(norms, *arguments()))
    spec = LAYOUTS[layout]
    of_features = P(spec[3]) if len(spec) == 4 else P()
    devices = mesh(*MESH, kind)
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(a, NamedSharding(devices, s))
            for a, s in zip(arguments(), (spec, of_features, of_features), strict=True)
        ]
        program = jitted.lower(norms, *placed).compile()
        got = jax.tree.map(np.asarray, program(*placed))
    assert_close(got, want, math.prod(SHAPE))
    # Moments and parameters may travel; not x, nor a device's piece of it.
    assert moved(program.as_text()) < math.prod(SHAPE) / devices.size


@pytest.mark.usefixtures("float64")
def test_parameters_sharded_over_the_data_axis_are_all_that_is_gathered():
    """Fully sharded data parallel: each device has a piece of scale and of bias."""
    norms = ("batch", "layer")
    want = jax.tree.map(np.asarray, jitted(norms, *arguments()))
    devices = mesh((8,), ("data",))
    split = NamedSharding(devices, P("data"))
    placed = [jax.device_put(a, split) for a in arguments()]
    program = (
        jax.jit(results, static_argnums=0, out_shardings=split)
        .lower(norms, *placed)
        .compile()
    )
    assert_close(jax.tree.map(np.asarray, program(*placed)), want, math.prod(SHAPE))
    assert moved(program.as_text()) <= 2 * 8  # scale and bias


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_axis_by_name_and_the_other_automatic(check_vma):
    """shard_map over data alone; the features lie over model, which is left to jit."""
    x, scale, bias = arguments()
    want = NORMS["batch"](x, scale, bias)
    devices = mesh(*MESH)
    with jax.set_mesh(devices):
        split = jax.shard_map(
            functools.partial(NORMS["batch"], axis_name="data"),
            mesh=devices,
            in_specs=(P("data"), P(), P()),
            out_specs=P("data"),
            axis_names={"data"},
            check_vma=check_vma,
        )
        place = functools.partial(NamedSharding, devices)
        x = jax.device_put(x, place(P("data", None, None, "model")))
        scale, bias = (jax.device_put(a, place(P("model"))) for a in (scale, bias))
        program = jax.jit(split).lower(x, scale, bias).compile()
        got = np.asarray(program(x, scale, bias))
    assert_close(got, np.asarray(want), math.prod(SHAPE))
    assert moved(program.as_text()) < math.prod(SHAPE) / 8


@pytest.mark.usefixtures("float64")
def test_a_mesh_axis_is_a_group_of_devices():
    """Synced over data alone, each slice along model is a batch of its own."""
    x, scale, bias = arguments()
    devices = mesh(*MESH)
    split = jax.shard_map(
        functools.partial(NORMS["batch"], axis_name="data"),
        mesh=devices,
        in_specs=(P(("model", "data")), P(), P()),
        out_specs=P(("model", "data")),
    )
    want = jnp.concatenate(
        [NORMS["batch"](half, scale, bias) for half in (x[:4], x[4:])]
    )
    assert_close(jax.jit(split)(x, scale, bias), want, math.prod(SHAPE))


def test_a_mesh_axis_that_is_not_there_is_named():
    x, *_ = arguments()
    devices = mesh(*MESH)
    with pytest.raises(ValueError) as error, jax.set_mesh(devices):
        normjax.batch_norm(x, axis_name="batch")
    assert str(error.value) == (
        "batch_norm: axis_name must name an axis of the pmap, shard_map or vmap around"
        " the call. Got axis_name='batch'; the mesh in use has ('data', 'model'). Call"
        " it inside one of those; under jit over sharded arrays leave axis_name=None,"
        " the statistics are synced without it."
    )
