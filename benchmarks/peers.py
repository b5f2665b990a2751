"""Norms of other libraries, all behind one signature.

A peer is a function of a case and a dtype that returns

    f(params, running, x, train) -> y, running

with params {"scale", "bias"} (rms norm: {"scale"}) and running {"mean", "var"} (batch
norm; else {}), all of shape [C], in float32. Every library is told the same epsilon,
and the same momentum in its own sense. None is for a norm that the library lacks. A
peer whose package is missing is in `ABSENT` with the reason, and a benchmark says so.
"""

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import flax.linen
import jax
import jax.numpy as jnp

import normjax.linen

MOMENTUM = 0.9  # the part of the old value
os.environ.setdefault("KERAS_BACKEND", "jax")
# Threads of torch that wait actively take the cores from whoever is timed next, and on
# a shared machine from each other: 8 ms for a norm of 0.7 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Peer(NamedTuple):
    """A library.

    Attributes:
      build: takes a case and a dtype, returns f as above, or None.
      channels_first: whether features are the second axis of x in batch, group and
        instance norm, as the library has it; x is laid out so before it is timed.
      kind: "jax", or "torch".
    """

    build: Callable[[cases.Case, Any], Callable | None]
    channels_first: bool = False
    kind: str = "jax"


def _linen(library: Any, case: cases.Case, dtype: Any, **more: Any) -> Callable:
    fields = {"dtype": dtype, "epsilon": case.epsilon, **more}
    if case.norm == "batch":
        fields["momentum"] = MOMENTUM
    elif case.num_groups:
        fields["num_groups"] = case.num_groups
    module = getattr(library, case.module)(**fields)

    def f(params, running, x, train):
        if case.norm != "batch":
            return module.apply({"params": params}, x), running
        variables = {"params": params, "batch_stats": running}
        if not train:
            return module.apply(variables, x, use_running_average=True), running
        y, new = module.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
        return y, new["batch_stats"]

    return f


def _nnx(case: cases.Case, dtype: Any) -> Callable:
    from flax import nnx

    fields = {"dtype": dtype, "epsilon": case.epsilon, "rngs": nnx.Rngs(0)}
    if case.norm == "batch":
        fields["momentum"] = MOMENTUM
    elif case.num_groups:
        fields["num_groups"] = case.num_groups
    graph, state = nnx.split(getattr(nnx, case.module)(case.features, **fields))

    def f(params, running, x, train):
        new = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(new, params | running)
        module = nnx.merge(graph, new)
        if case.norm != "batch":
            return module(x), running
        y = module(x, use_running_average=not train)
        return y, {"mean": module.mean[...], "var": module.var[...]}

    return f


def _haiku(case: cases.Case, dtype: Any) -> Callable:
    import haiku as hk

    epsilon = {"eps": case.epsilon}
    affine = {"create_scale": True, "create_offset": True} | epsilon

    def call(x, train):
        if case.norm == "batch":
            return hk.BatchNorm(decay_rate=MOMENTUM, **affine)(x, is_training=train)
        if case.norm == "layer":
            return hk.LayerNorm(axis=-1, param_axis=-1, **affine)(x)
        if case.norm == "rms":
            return hk.RMSNorm(axis=-1, **epsilon)(x)
        if case.norm == "group":
            return hk.GroupNorm(case.num_groups, **affine)(x)
        return hk.InstanceNorm(**affine)(x)

    pure = hk.transform_with_state(call)
    x = jax.ShapeDtypeStruct(case.shape, dtype)
    init = functools.partial(pure.init, jax.random.key(0), train=True)
    parameters, state = jax.eval_shape(init, x)

    def f(params, running, x, train):
        ours = {"scale": "scale", "offset": "bias"}
        variables = {
            module: {
                name: params[ours[name]].reshape(a.shape) for name, a in own.items()
            }
            for module, own in parameters.items()
        }
        if case.norm != "batch":
            return pure.apply(variables, {}, None, x, train)[0].astype(dtype), running
        averages = {
            module: {
                name: jnp.zeros((), a.dtype)
                if name == "counter"
                else running["mean" if "mean" in module else "var"].reshape(a.shape)
                for name, a in own.items()
            }
            for module, own in state.items()
        }
        y, new = pure.apply(variables, averages, None, x, train)
        new = {
            "mean" if "mean" in module else "var": own["average"].reshape(-1)
            for module, own in new.items()
        }
        return y.astype(dtype), new

    return f


def _equinox(case: cases.Case, dtype: Any) -> Callable:
    import equinox as eqx

    features, epsilon = case.features, {"eps": case.epsilon}
    with_parameters = functools.partial(eqx.tree_at, is_leaf=lambda a: a is None)

    def given(layer, params):
        layer = with_parameters(lambda m: m.weight, layer, params["scale"])
        if "bias" not in params:
            return layer
        return with_parameters(lambda m: m.bias, layer, params["bias"])

    if case.norm == "batch":
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            features, "batch", momentum=MOMENTUM, mode="batch", **epsilon
        )

        def f(params, running, x, train):
            # A counter of 0 reads the running statistics as they are.
            # A state can be used once, so each call has its own.
            moments = (running["mean"], running["var"])
            own = jax.tree.map(lambda a: a, state)
            before = own.set(layer.batch_state_index, moments)
            y, after = jax.vmap(
                functools.partial(given(layer, params), inference=not train),
                axis_name="batch",
                in_axes=(0, None),
                out_axes=(0, None),
            )(x, before)
            mean, var = after.get(layer.batch_state_index)
            return y.astype(dtype), {"mean": mean, "var": var}

        return f
    if case.norm == "layer":
        layer = eqx.nn.LayerNorm(features, **epsilon)
    elif case.norm == "rms":
        layer = eqx.nn.RMSNorm(features, use_bias=False, **epsilon)
    else:
        groups = case.num_groups or features
        layer = eqx.nn.GroupNorm(groups, features, **epsilon)
    # Layer and rms norm take a vector, the others a sample.
    over = len(case.shape) - 1 if case.norm in ("layer", "rms") else 1

    def f(params, running, x, train):
        call = given(layer, params)
        for _ in range(over):
            call = jax.vmap(call)
        return call(x).astype(dtype), running

    return f


def _keras(case: cases.Case, dtype: Any) -> Callable:
    import keras

    policy = "mixed_bfloat16" if dtype == jnp.bfloat16 else "float32"
    options = {"epsilon": case.epsilon, "dtype": policy}
    if case.norm == "batch":
        layer = keras.layers.BatchNormalization(momentum=MOMENTUM, **options)
    elif case.norm == "layer":
        layer = keras.layers.LayerNormalization(**options)
    elif case.norm == "rms":
        layer = keras.layers.RMSNormalization(**options)
    else:
        groups = case.num_groups or case.features
        layer = keras.layers.GroupNormalization(groups, **options)
    layer.build(case.shape)
    ours = {"gamma": "scale", "scale": "scale", "beta": "bias"}

    def f(params, running, x, train):
        trained = [params[ours[v.name]] for v in layer.trainable_variables]
        options = {"training": train} if case.norm == "batch" else {}
        moving = [running["mean"], running["var"]] if running else []
        y, moving = layer.stateless_call(trained, moving, x, **options)
        new = {"mean": moving[0], "var": moving[1]} if running else running
        return y.astype(dtype), new

    return f


def _jax(case: cases.Case, dtype: Any) -> Callable | None:
    if case.norm == "rms":
        return None
    standardize = functools.partial(jax.nn.standardize, epsilon=case.epsilon)

    def f(params, running, x, train):
        if case.norm == "batch" and not train:
            z = standardize(x, mean=running["mean"], variance=running["var"])
        elif case.num_groups:
            split = x.reshape(*x.shape[:-1], case.num_groups, -1)
            axes = (*range(1, x.ndim - 1), x.ndim)
            z = standardize(split, axis=axes).reshape(x.shape)
        else:
            z = standardize(x, axis=case.axes)
        y = z * params["scale"] + params["bias"]
        # It gives out no moments, so there are no running ones.
        return y.astype(dtype), running

    return f


def _tokamax(case: cases.Case, dtype: Any) -> Callable | None:
    if case.norm not in ("layer", "rms"):
        return None
    import tokamax

    def f(params, running, x, train):
        y = tokamax.layer_norm(
            x,
            params["scale"],
            params.get("bias"),
            axis=-1,
            epsilon=case.epsilon,
            subtract_mean=case.norm == "layer",
        )
        return y, running

    return f


def _torch(case: cases.Case, dtype: Any) -> Callable:
    import torch

    norms, epsilon = torch.nn.functional, case.epsilon

    def f(params, running, x, train):
        scale, bias = params["scale"], params.get("bias")
        if case.norm == "layer":
            return norms.layer_norm(x, [case.features], scale, bias, epsilon), running
        if case.norm == "rms":
            return norms.rms_norm(x, [case.features], scale, epsilon), running
        if case.norm == "group":
            return norms.group_norm(x, case.num_groups, scale, bias, epsilon), running
        if case.norm == "instance":
            return norms.instance_norm(x, None, None, scale, bias, eps=epsilon), running
        moments = (running["mean"], running["var"])
        # Updates the running statistics where they are; torch's momentum is the new
        # value's part.
        y = norms.batch_norm(x, *moments, scale, bias, train, 1 - MOMENTUM, epsilon)
        return y, running

    return f


def _torch_compiled(case: cases.Case, dtype: Any) -> Callable:
    import torch

    torch.compiler.reset()  # it gives up on what it has compiled for several cases
    return torch.compile(_torch(case, dtype), dynamic=False)


def _missing(package: str) -> str:
    """Why a package cannot be imported, or nothing."""
    try:
        importlib.import_module(package)
    except Exception as error:  # one that is broken must not end the others
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _absent(name: str) -> str:
    """Why a peer cannot run here, or nothing."""
    if name == "tokamax" and jax.default_backend() != "gpu":
        return "needs a GPU"
    packages = {"nnx": "flax.nnx", "jax.nn": "jax", "torch compiled": "torch"}
    if why := _missing(packages.get(name, name)):
        return why
    compiler = any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"]))
    if name == "torch compiled" and not compiler:
        return "no C++ compiler"
    return ""


_ALL = {
    "flax": Peer(functools.partial(_linen, flax.linen)),
    "nnx": Peer(_nnx),
    "haiku": Peer(_haiku),
    "equinox": Peer(_equinox, channels_first=True),
    "keras": Peer(_keras),
    "jax.nn": Peer(_jax),
    "tokamax": Peer(_tokamax),
    "torch": Peer(_torch, channels_first=True, kind="torch"),
    "torch compiled": Peer(_torch_compiled, channels_first=True, kind="torch"),
}
NAMES = list(_ALL)
PACKAGES = ("flax", "dm-haiku", "equinox", "keras", "tokamax", "torch")
ABSENT = {name: why for name in _ALL if (why := _absent(name))}
PEERS = {name: peer for name, peer in _ALL.items() if name not in ABSENT}
NORMJAX = Peer(functools.partial(_linen, normjax.linen))
# With native kernels wherever they serve, and not only where they are the default.
NATIVE = Peer(functools.partial(_linen, normjax.linen, implementation="native"))


def laid_out(peer: Peer, case: cases.Case, x: jax.Array) -> jax.Array:
    """Moves the features of x to where the peer has them."""
    if peer.channels_first and case.norm not in ("layer", "rms") and x.ndim > 2:
        return jnp.moveaxis(x, -1, 1) + 0  # a copy, laid out so in memory
    return x


def laid_back(peer: Peer, case: cases.Case, y: jax.Array) -> jax.Array:
    """Undoes `laid_out`."""
    if peer.channels_first and case.norm not in ("layer", "rms") and y.ndim > 2:
        return jnp.moveaxis(y, 1, -1)
    return y
