"""Draws calls of norms and compares them with a reference in extended precision.

    python tests/fuzz_norms.py --minutes 60 --seed 1     # make fuzz
    python tests/fuzz_norms.py --seed 1 --only 123       # one call again

A call is drawn from its seed and number alone, so that the printed line repeats it: a
norm as function or module, axes, mask or weights, dtypes, scale and bias, a context of
devices. It is compiled once, and run on several kinds of data. y, the moments and the
gradients are compared with the formula and its derivative in NumPy's long double.
Tolerances are rounding errors: see `Bounds`.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from typing import Any

if __name__ == "__main__":  # under pytest, conftest.py has said so
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import normjax
import normjax.linen
import normjax.nnx

DEVICES = 8
FLOATS = ("float32", "float32", "bfloat16", "float16", "float64", "complex64")
CONTEXTS = ("one", "one", "one", "vmap", "pmap", "shard_map")
# `merge` takes the moments of pieces and merges them, in a tree, a stream or at once.
FUNCTIONS = ("batch", "layer", "rms", "group", "instance", "add", "moments", "merge")
MODULES = ("batch", "layer", "rms", "group", "instance")
ACTIVATIONS = {"silu": jax.nn.silu, "tanh": jnp.tanh}
DATA = (
    "normal",
    "far",
    "outlier",
    "constant",
    "zeros",
    "huge",
    "largest",
    "tiny",
    "mixed",
    "one NaN",
)
LONG = np.longdouble


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, as drawn; axes are those of the x of one device."""

    door: str  # "function", "linen" or "nnx"
    norm: str
    shape: tuple[int, ...]
    dtype: str
    axis: tuple[int, ...]  # reduced whole
    features: tuple[int, ...]  # that own scale and bias
    num_groups: int  # of the features, 0 for none
    ghosts: int | None  # virtual_batch_size
    where: str  # "none", "mask" or "weights"
    where_shape: tuple[int, ...]
    scale: tuple[int, ...] | None  # its shape
    bias: tuple[int, ...] | None
    parameter: str  # dtype of scale and bias
    out: str | None  # dtype of y
    epsilon: float
    activation: str | None
    context: str
    devices: int
    groups: tuple[tuple[int, ...], ...] | None
    order: str  # in which pieces merge
    unbiased: bool  # a module's running variance
    data: tuple[str, ...]

    @property
    def centered(self) -> bool:
        return self.norm not in ("rms", "add")

    def __str__(self):
        fields = dataclasses.asdict(self).items()
        plain = (None, 0, False, "none", "one")
        return " ".join(f"{k}={v}" for k, v in fields if v not in plain)


def _chance(rng, p):
    return bool(rng.random() < p)


def _one_of(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def _some(rng, axes, least=1):
    """Some of the axes, at least so many, in any order."""
    n = int(rng.integers(least, len(axes) + 1)) if len(axes) > least else len(axes)
    return tuple(int(a) for a in rng.permutation(list(axes))[:n])


def _thinner(rng, shape, p=0.5):
    """A shape that broadcasts to this one."""
    return tuple(1 if _chance(rng, p) else n for n in shape)


def draw(seed: int, number: int) -> Case:
    """Draws a call from its seed and number alone."""
    rng = np.random.default_rng((seed, number))
    door = _one_of(rng, ("function", "function", "linen", "nnx"))
    norm = _one_of(rng, FUNCTIONS if door == "function" else MODULES)
    rank = int(rng.integers(1, 7))
    if norm in ("group", "instance"):  # one axis of samples, one of features
        rank = max(rank, 2)
    largest = {1: 40, 2: 12, 3: 6, 4: 4, 5: 3, 6: 3}[rank]
    shape = [int(n) for n in rng.integers(1, largest + 1, rank)]
    every = tuple(range(rank))

    num_groups, ghosts = 0, None
    if norm == "batch":
        features = _some(rng, every) if _chance(rng, 0.5) else (rank - 1,)
        if len(features) == rank > 1 and _chance(rng, 0.9):
            features = features[1:]
        axis = tuple(a for a in every if a not in features)
        if axis and _chance(rng, 0.3):
            ghosts = int(rng.integers(1, 4))
            shape[axis[0]] = ghosts * int(rng.integers(1, 4))
    elif norm in ("group", "instance"):
        features = _some(rng, every[1:]) if _chance(rng, 0.3) else (rank - 1,)
        if door != "function" and norm == "group":
            features = (rank - 1,)
        others = [a for a in every[1:] if a not in features]
        axis = tuple(others)
        if door == "function" and others and _chance(rng, 0.3):
            axis = _some(rng, others)
        if norm == "group":
            num_groups = int(rng.integers(1, 4))
            shape[features[0]] = num_groups * int(rng.integers(1, 4))
    else:
        axis = _some(rng, every)
        features = axis
        if door != "function" and _chance(rng, 0.3):
            features = _some(rng, every)
    if door != "function":  # Flax sorts axes
        axis, features = tuple(sorted(axis)), tuple(sorted(features))
    shape = tuple(shape)

    where = _one_of(rng, ("none", "mask", "weights"))
    where_shape = _thinner(rng, shape, 0.3)
    dtype = _one_of(rng, FLOATS)
    own = tuple(shape[a] for a in features)
    like_x = door == "function" and (len(features) == rank or norm == "merge")

    def parameter():
        if _chance(rng, 0.3):
            return None
        if door == "function" and (like_x or _chance(rng, 0.3)):
            return _thinner(rng, shape)
        return own

    scale, bias = parameter(), parameter()
    if norm in ("rms", "add"):
        bias = None
    if norm == "moments":
        scale = bias = None
    parameter = dtype if _chance(rng, 0.5) else "float32"
    if parameter == "complex64" and _chance(rng, 0.5):
        parameter = "float32"
    out = None
    if dtype != "complex64" and _chance(rng, 0.2):
        out = _one_of(rng, ("float32", "bfloat16", "float16"))
    context = _one_of(rng, CONTEXTS)
    devices = DEVICES
    if context == "vmap":
        devices = int(rng.integers(2, DEVICES + 1))
    groups = None
    if context != "one" and _chance(rng, 0.3):
        of = rng.permutation(devices)
        cut = int(rng.integers(1, devices))
        groups = (tuple(int(i) for i in of[:cut]), tuple(int(i) for i in of[cut:]))
    return Case(
        door=door,
        norm=norm,
        shape=shape,
        dtype=dtype,
        axis=axis,
        features=features,
        num_groups=num_groups,
        ghosts=ghosts,
        where=where,
        where_shape=where_shape,
        scale=scale,
        bias=bias,
        parameter=parameter,
        out=out,
        epsilon=_one_of(rng, (1e-6, 1e-5, 1e-3, 1e-12)),
        activation=_one_of(rng, (None, None, None, *ACTIVATIONS)),
        context=context,
        devices=1 if context == "one" else devices,
        groups=groups,
        order=_one_of(rng, ("tree", "stream", "at once")),
        unbiased=_chance(rng, 0.5),
        data=("normal", *(_one_of(rng, DATA[1:]) for _ in range(3))),
    )


# The data.


def _of(dtype):
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _info(dtype):
    return ml_dtypes.finfo(_of(dtype))


def _values(rng, kind, shape, dtype):
    """Real values of a kind, in float64, that the dtype holds."""
    info = _info(dtype)
    big, small = float(info.max), float(info.tiny)
    x = rng.standard_normal(shape)
    if kind == "far":
        return x + rng.choice([-1, 1]) * 10 ** rng.uniform(1, 5)
    if kind == "outlier" and x.size:
        x.flat[rng.integers(x.size)] *= 1e4
    if kind == "constant":
        return np.full(shape, rng.choice([0.1, 1 / 3, -7e5]))
    if kind == "zeros":
        return np.zeros(shape)
    if kind == "huge":  # whose squares are not held
        return x * big**0.8
    if kind == "largest":
        return rng.choice([-1, 1, 0.5], shape) * big
    if kind == "tiny":
        return x * small
    if kind == "mixed":
        return x * 10 ** rng.uniform(0.8 * math.log10(small), 0.8 * math.log10(big))
    return x


def data(case: Case, kind: str, seed: int, number: int) -> dict:
    """The arrays of a call: x, scale, bias, where, and the cotangent of y."""
    rng = np.random.default_rng((seed, number, DATA.index(kind)))
    shape = (case.devices, *case.shape)
    is_complex = case.dtype == "complex64"
    x = _values(rng, kind, shape, case.dtype)
    if is_complex:
        x = x + 1j * _values(rng, kind, shape, case.dtype)
    where = None
    if case.where != "none":
        counts = rng.random((case.devices, *case.where_shape)) < rng.choice([0.3, 0.8])
        if _chance(rng, 0.3):  # a device that counts nothing
            counts[rng.integers(case.devices)] = False
        where = counts
        if case.where == "weights":
            weights = 10 ** rng.uniform(-2, 2, counts.shape)
            where = (counts * weights).astype(np.float32)
        padding = np.broadcast_to(~counts, shape)
        bad = rng.choice([0.0, np.nan, np.inf, -np.inf], shape)
        x = np.where(padding, bad, x)
    if kind == "one NaN" and x.size:
        x.flat[rng.integers(x.size)] = np.nan

    def parameter(shape):
        if shape is None:
            return None
        v = rng.uniform(-2, 2, shape)
        if case.parameter == "complex64":
            v = v + 1j * rng.uniform(-2, 2, shape)
        return v.astype(_of(case.parameter))

    def cotangent():
        dy = rng.standard_normal(shape)
        dy = dy + 1j * rng.standard_normal(shape) if is_complex else dy
        dy = np.where(np.abs(dy) > 4, 0, dy)
        # Of a dtype's values: XLA rounds float64 to float16 twice, by way of float32.
        return dy.astype(expected_dtype(case)).astype(dy.dtype)

    with np.errstate(over="ignore"):
        x = x.astype(_of(case.dtype))
    return {
        "x": x,
        "scale": parameter(case.scale),
        "bias": parameter(case.bias),
        "where": where,
        "dy": cotangent(),
    }


# The call.


def local(case: Case):
    """The call on one device: (x, scale, bias, where) -> a dictionary of results."""
    activation = ACTIVATIONS.get(case.activation)
    common = {
        "epsilon": case.epsilon,
        "dtype": None if case.out is None else jnp.dtype(case.out),
        "activation": activation,
        "axis_name": None if case.context == "one" else "d",
        "axis_index_groups": case.groups and [list(g) for g in case.groups],
    }
    if case.door != "function":
        return functools.partial(_module, case, common)
    return functools.partial(_function, case, common)


def _function(case, common, x, scale, bias, where):
    n, named = case.norm, {k: common[k] for k in ("axis_name", "axis_index_groups")}
    if n == "batch":
        y, m = normjax.batch_norm(
            x,
            scale,
            bias,
            feature_axis=case.features,
            where=where,
            virtual_batch_size=case.ghosts,
            **common,
        )
        return {"y": y, "moments": m}
    if n == "layer":
        y = normjax.layer_norm(x, scale, bias, axis=case.axis, where=where, **common)
        return {"y": y}
    if n == "rms":
        y = normjax.rms_norm(x, scale, axis=case.axis, where=where, **common)
        return {"y": y}
    if n == "add":
        zero = jnp.zeros_like(x)
        y, _ = normjax.add_rms_norm(
            x, zero, scale, axis=case.axis, where=where, **common
        )
        return {"y": y}
    if n == "group":
        y = normjax.group_norm(
            x,
            scale,
            bias,
            num_groups=case.num_groups,
            axis=case.axis,
            feature_axis=case.features,
            where=where,
            **common,
        )
        return {"y": y}
    if n == "instance":
        y = normjax.instance_norm(
            x,
            scale,
            bias,
            axis=case.axis,
            feature_axis=case.features,
            where=where,
            **common,
        )
        return {"y": y}
    if n == "moments":
        return {"moments": normjax.moments(x, case.axis, where=where, **named)}
    m = _merged(case, named, x, where)
    y = normjax.normalize(
        x, m, scale, bias, epsilon=case.epsilon, where=where, dtype=common["dtype"]
    )
    if common["activation"] is not None:
        y = common["activation"](y)
        y = y if where is None else jnp.where(where > 0, y, jnp.zeros_like(y))
    return {"y": y, "moments": m}


def _merged(case, named, x, where):
    """Moments of pieces of x, along the first axis that is reduced, merged."""
    along, size = case.axis[0], x.shape[case.axis[0]]
    cuts = sorted({0, size, size // 3, size // 2})
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        w = where
        if w is not None and w.shape[along] == size:
            w = jax.lax.slice_in_dim(w, start, stop, axis=along)
        piece = jax.lax.slice_in_dim(x, start, stop, axis=along)
        pieces.append(normjax.moments(piece, case.axis, where=w, **named))
    if case.order == "stream":
        of = jnp.finfo(pieces[0].var.dtype).dtype
        m = normjax.Moments.empty(pieces[0].shape, of)
        if jnp.iscomplexobj(x):
            m = dataclasses.replace(
                m, mean=m.mean.astype(x.dtype), rest=m.rest.astype(x.dtype)
            )
        for piece in pieces:
            m = m.merge(piece)
        return m
    if case.order == "tree":
        return functools.reduce(lambda a, b: b.merge(a), pieces)
    stacked = jax.tree.map(lambda *a: jnp.concatenate(a, along), *pieces)
    return normjax.merge(stacked, along)


def _module(case, common, x, scale, bias, where):
    """The same as a module, its running statistics after one update from 0 and 1."""
    fields = {
        **common,
        "mask_is_weight": case.where == "weights",
        "use_scale": scale is not None,
        "missing_axis": "ignore",
    }
    if case.norm not in ("rms",):
        fields["use_bias"] = bias is not None
    if case.norm == "batch":
        fields |= {
            "axis": case.features,
            "use_running_average": False,
            "momentum": 0.75,
            "virtual_batch_size": case.ghosts,
            "running_variance": "unbiased" if case.unbiased else "biased",
        }
    elif case.norm in ("layer", "rms"):
        fields |= {"reduction_axes": case.axis, "feature_axes": case.features}
    elif case.norm == "group":
        fields |= {"num_groups": case.num_groups}
    else:
        fields |= {"feature_axes": case.features}
    cls = {
        "batch": "BatchNorm",
        "layer": "LayerNorm",
        "rms": "RMSNorm",
        "group": "GroupNorm",
        "instance": "InstanceNorm",
    }[case.norm]
    own = [x.shape[a] for a in case.features]
    real = jnp.finfo(x.dtype).dtype
    if case.door == "linen":
        norm = getattr(normjax.linen, cls)(**fields)
        variables = {"params": {"scale": scale, "bias": bias}}
        variables["params"] = {
            k: v for k, v in variables["params"].items() if v is not None
        }
        if case.norm != "batch":
            return {"y": norm.apply(variables, x, mask=where)}
        of = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
        variables["batch_stats"] = {
            "mean": jnp.zeros(own, of),
            "var": jnp.ones(own, jnp.float32),
        }
        y, after = norm.apply(variables, x, mask=where, mutable=["batch_stats"])
        running = after["batch_stats"]
        return {"y": y, "running": (running["mean"], running["var"])}
    del real
    for name, v in (("scale", scale), ("bias", bias)):
        if v is not None:
            fields[f"{name}_init"] = lambda key, shape, dtype, v=v: v.reshape(shape)
    module = getattr(normjax.nnx, cls)(math.prod(own), **fields, rngs=nnx.Rngs(0))
    y = module(x, mask=where)
    if case.norm != "batch":
        return {"y": y}
    return {
        "y": y,
        "running": tuple(v[...].reshape(own) for v in (module.mean, module.var)),
    }


def mapped(case: Case):
    """The call on all devices: x and where have an axis of devices in front."""
    f = local(case)
    if case.context == "one":

        def alone(x, scale, bias, where):
            y = f(x[0], scale, bias, None if where is None else where[0])
            return jax.tree.map(lambda a: a[None], y)

        return alone
    if case.context in ("vmap", "pmap"):
        map_ = jax.vmap if case.context == "vmap" else jax.pmap
        return map_(
            f, axis_name="d", in_axes=(0, None, None, 0), axis_size=case.devices
        )
    mesh = jax.make_mesh(
        (case.devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    def piece(x, scale, bias, where):
        y = f(x[0], scale, bias, None if where is None else where[0])
        return jax.tree.map(lambda a: a[None], y)

    specs = (P("d"), P(), P(), P("d"))
    return jax.shard_map(piece, mesh=mesh, in_specs=specs, out_specs=P("d"))


def _aligned(a, b):
    """The real inner product, in the wider dtype."""
    if jnp.iscomplexobj(a):
        return (a.real * b.real + a.imag * b.imag).sum()
    return (a * b).sum()


def compiled(case: Case):
    """Compiles the call with its gradients: (arrays, cotangents) -> a dictionary."""
    f = mapped(case)

    def loss(arguments, cotangents):
        r = f(*(arguments[k] for k in ("x", "scale", "bias", "where")))
        total = jnp.zeros((), jnp.float32)
        parts = {"y": r.get("y")}
        if "moments" in r:
            parts |= {"mean": r["moments"].mean, "var": r["moments"].var}
        for name, value in parts.items():
            if value is not None:
                dy = cotangents[name].astype(value.dtype)
                total = total + _aligned(value, dy).astype(jnp.float32)
        return total, r

    def run(arguments, cotangents):
        inexact = {
            k: v
            for k, v in arguments.items()
            if v is not None and jnp.issubdtype(v.dtype, jnp.inexact)
        }
        rest = {k: v for k, v in arguments.items() if k not in inexact}
        grad = jax.grad(lambda a: loss({**a, **rest}, cotangents), has_aux=True)
        gradients, r = grad(inexact)
        return {**r, "gradients": gradients}

    return run if case.context == "pmap" else jax.jit(run)


# The reference.


def labels(case: Case) -> np.ndarray:
    """The number of the set of values that each value of x is normalized with."""
    return _labels(case, case.ghosts)


def _labels(case, ghosts):
    shape = (case.devices, *case.shape)
    index = np.indices(shape)
    keys = []
    device = np.zeros(shape, int)
    if case.groups is not None:
        of = {i: g for g, group in enumerate(case.groups) for i in group}
        device = np.vectorize(of.get)(index[0])
    if ghosts:  # which are of one device
        device = index[0]
    keys.append(device)
    for a, n in enumerate(case.shape):
        i = index[a + 1]
        if a in case.axis:
            if ghosts and a == case.axis[0]:
                keys.append(i // ghosts)
        elif case.num_groups and a in case.features:
            continue
        else:
            keys.append(i)
        del n
    if case.num_groups:
        sizes = [case.shape[a] for a in case.features]
        flat = np.ravel_multi_index([index[a + 1] for a in case.features], sizes)
        keys.append(flat // (math.prod(sizes) // case.num_groups))
    _, ids = np.unique(np.stack([k.ravel() for k in keys]), axis=1, return_inverse=True)
    return ids.reshape(shape)


def long(a):
    """An array in long double, real or complex."""
    a = np.asarray(a)
    if np.iscomplexobj(a):
        return a.astype(np.clongdouble)
    if a.dtype == LONG:
        return a
    return a.astype(np.float64).astype(LONG)


class Sums:
    """Sums and maxima over sets of values, laid back at each value."""

    def __init__(self, ids):
        self.ids, self.sets = ids, int(ids.max(initial=-1)) + 1

    def total(self, a):
        a = np.broadcast_to(a, self.ids.shape)
        out = np.zeros(self.sets, a.dtype)
        np.add.at(out, self.ids.ravel(), a.ravel())
        return out[self.ids]

    def largest(self, a):
        out = np.zeros(self.sets, LONG)
        a = np.broadcast_to(a, self.ids.shape)
        np.maximum.at(out, self.ids.ravel(), a.ravel())
        return out[self.ids]


@dataclasses.dataclass
class Statistics:
    """Of each set, laid at each value of x."""

    weights: Any
    x: Any
    count: Any
    mean: Any
    var: Any
    off: Any  # x - mean, 0 where nothing counts


def statistics(case: Case, ids, x, where) -> tuple[Sums, Statistics]:
    sums = Sums(ids)
    w = np.ones(ids.shape, LONG)
    if where is not None:
        w = np.broadcast_to(long(where), ids.shape).astype(LONG)
    x = np.where(w > 0, x, 0)
    count = sums.total(w)
    n = np.where(count > 0, count, 1)
    mean = sums.total(w * x) / n
    if not case.centered:
        mean = mean * 0
    off = np.where(w > 0, x - mean, 0)
    if case.centered:  # of values that are all one, their mean is that, rounding or not
        one = sums.largest(np.abs(off)) <= 8 * np.finfo(LONG).eps * sums.largest(abs(x))
        off = np.where(one, 0, off)
    var = np.where(count > 0, sums.total(w * np.abs(off) ** 2) / n, 1)
    return sums, Statistics(w, x, n * (count > 0), mean, var, off)


def _laid(case, v):
    """A parameter, laid as x of all devices."""
    if v is None:
        return None
    v = long(v)
    own = tuple(case.shape[a] for a in case.features)
    if v.shape == own and len(own) < len(case.shape):
        order = np.argsort(case.features)
        v = v.transpose(order).reshape(
            [n if a in case.features else 1 for a, n in enumerate(case.shape)]
        )
    elif case.door != "function":
        v = v.reshape(
            [n if a in case.features else 1 for a, n in enumerate(case.shape)]
        )
    return np.broadcast_to(v, (case.devices, *case.shape))


def _summed(case, a, like):
    """The gradient of a parameter of this shape from that of it laid as x."""
    a = a.sum(0)
    own = tuple(case.shape[c] for c in case.features)
    if (like == own and len(own) < len(case.shape)) or case.door != "function":
        a = a.sum(tuple(c for c in range(a.ndim) if c not in case.features))
        order = sorted(range(len(own)), key=lambda i: case.features[i])
        return a.transpose(np.argsort(order))
    narrow = tuple(i for i, n in enumerate(like) if n == 1)
    return a.sum(narrow, keepdims=True)


def _rounded(case, a, like, dtype):
    """What a gradient loses in its dtype: once on each device, and in their sum."""
    parts = sum(np.abs(_summed(case, a[d : d + 1], like)) for d in range(len(a)))
    return (1 if len(a) == 1 else 4) * float(_info(dtype).eps) * parts


def activated(name, y):
    """An activation and its derivative."""
    if name is None:
        return y, np.ones_like(y)
    if name == "tanh":
        z = np.tanh(y)
        return z, 1 - z * z
    s = 1 / (1 + np.exp(-y))
    return y * s, s + y * s * (1 - s)


def expected_dtype(case: Case) -> np.dtype:
    if case.out is not None:
        return _of(case.out)
    if case.door == "function":
        return _of(case.dtype)
    with jax.numpy_dtype_promotion("standard"):
        parts = [case.dtype] + [case.parameter] * (case.scale is not None)
        parts += [case.parameter] * (case.bias is not None)
        # Flax promotes with the running statistics, too.
        parts += ["float32"] * (case.door == "nnx" and case.norm == "batch")
        return np.dtype(jnp.result_type(*(jnp.dtype(p) for p in parts)))


def check(case: Case, arrays: dict, cotangents: dict, got: dict) -> list:
    """Compares results with the reference: a list of (what, error / tolerance)."""
    with np.errstate(all="ignore"):
        return list(_compare(case, arrays, cotangents, got))


def _compare(case, arrays, cotangents, got):
    x = long(arrays["x"])
    sums, s = statistics(case, labels(case), x, arrays["where"])
    scale, bias = _laid(case, arrays["scale"]), _laid(case, arrays["bias"])
    out = expected_dtype(case)
    widest = max(
        (np.finfo(np.float32), _info(case.dtype), _info(out)), key=lambda i: i.bits
    )
    eps, floor = float(widest.eps), 4 * float(widest.tiny)
    eps_out, eps_x = float(_info(out).eps), float(_info(case.dtype).eps)
    floor_x = max(floor, float(_info(case.dtype).tiny))
    rstd = 1 / np.sqrt(s.var + LONG(case.epsilon))
    counts = s.weights > 0
    x_hat = np.where(counts, s.off * rstd, 0)
    S = np.ones_like(rstd) if scale is None else np.abs(scale)
    # What rounding of the mean does to a value, and what rounding of the rest does.
    size = sums.largest(np.abs(s.x))
    # Where a set was counted nothing there is none.
    unit = 25 * eps + 3 * eps * size * rstd
    X = np.maximum(1, sums.largest(np.abs(x_hat)))

    def compare(what, value, want, tolerance, of):
        value, limit = long(value), float(_info(of).max)
        want, tolerance = np.asarray(want), np.asarray(tolerance)
        if value.shape != want.shape:
            yield f"{what} has shape {value.shape}, not {want.shape}", math.inf
            return
        held = np.maximum(np.abs(want.real), np.abs(want.imag)) + tolerance < limit
        held |= np.isnan(want)
        error = np.abs(value - want)
        error = np.where(np.isnan(value) & np.isnan(want), 0, error)
        error = np.where(np.isnan(error), np.inf, error)
        tolerance = np.where(np.isnan(want), 1, tolerance)
        bad = held & ~(error <= tolerance)
        if bad.any():
            i = np.unravel_index(
                np.argmax(np.where(bad, error / tolerance, 0)), bad.shape
            )
            yield (
                f"{what} is {np.asarray(value)[i]:.9g}, not {want[i]:.9g}",
                float((error / tolerance)[i]),
            )

    # The moments that are returned, of all ghosts together.
    whole_sums, whole = sums, s
    if case.ghosts:
        whole_sums, whole = statistics(case, _labels(case, None), x, arrays["where"])
    whole_size = whole_sums.largest(np.abs(whole.x))
    spread = whole_sums.largest(np.abs(whole.off))
    var_tolerance = 2 * 25 * eps * whole.var + (eps * whole_size) ** 2 + floor
    if eps > 1e-10:
        var_tolerance = 2e-6 * whole.var + (eps * whole_size) ** 2 + floor
    mean_tolerance = 4 * eps * whole_size + floor

    def picked(a):
        """Of each set one, in the shape of moments."""
        first = tuple(slice(0, 1) if i in case.axis else slice(None) for i in every)
        a = np.broadcast_to(a, whole.var.shape)[(slice(None), *first)]
        if case.norm == "batch":
            order = [i + 1 for i in every if i in case.axis]
            a = a.transpose(0, *order, *(i + 1 for i in case.features))
            a = a.reshape(case.devices, *(case.shape[i] for i in case.features))
        return a

    every = range(len(case.shape))
    stat = np.dtype("float64" if eps < 1e-10 else "float32")
    if "moments" in got:
        m = got["moments"]
        yield from compare(
            "count",
            long(m.count) + long(m.carry),
            picked(whole.count),
            picked(whole.count) * eps * (case.where == "weights") * 8,
            stat,
        )
        yield from compare(
            "mean", m.mean, picked(whole.mean), picked(mean_tolerance), stat
        )
        both = long(m.mean) + long(m.rest)
        exact = 8 * eps * (spread + eps * whole_size) + floor
        exact = exact + 64 * np.finfo(LONG).eps * whole_size  # of the reference
        yield from compare("mean + rest", both, picked(whole.mean), picked(exact), stat)
        yield from compare("var", m.var, picked(whole.var), picked(var_tolerance), stat)
    if "running" in got:
        mean, var = got["running"]
        part = np.where(whole.count > 0, LONG(0.25), LONG(0))
        want, w = whole.var, part
        if case.unbiased and case.where != "weights":
            n = whole.count
            want = want * n / np.where(n > 1, n - 1, 1)
            w = np.where(n > 1, part, 0)
        # A variance that its dtype cannot hold is inf, and so is an average with it.
        want = np.where(want > _info(stat).max, np.inf, want)
        if not (case.unbiased and case.where == "weights"):
            of = np.dtype("float32")
            yield from compare(
                "running mean",
                mean,
                picked(part * whole.mean),
                picked(mean_tolerance + 1e-7 * abs(whole.mean) + 1e-37),
                of,
            )
            ratio = np.where(whole.var > 0, want / whole.var, 1)
            yield from compare(
                "running var",
                var,
                picked(1 - w + np.where(w > 0, w * want, 0)),
                picked(3e-7 + 3e-7 * want + ratio * var_tolerance),
                of,
            )

    # And the sizes of what is added up for each, for rounding.
    moment = {k: np.zeros((), LONG) for k in ("mean", "var")}
    sizes = dict(moment)
    if "moments" in got:
        for k in moment:
            is_complex = k == "mean" and np.iscomplexobj(cotangents[k])
            of = long(cotangents[k].astype(_of(case.dtype) if is_complex else stat))
            moment[k] = _spread(case, of, case.features)
            sizes[k] = _spread(case, np.abs(of), case.features)
    g = np.zeros(x.shape, LONG)
    g_error = np.zeros(x.shape, LONG)
    if "y" in got:
        before = x_hat if scale is None else x_hat * scale
        before = before if bias is None else before + bias
        y, slope = activated(case.activation, before)
        b = 0 if bias is None else np.abs(bias)
        y_tolerance = S * unit * X + 2 * eps * b + eps_out * np.abs(before) + floor
        y_tolerance = y_tolerance + float(_info(out).tiny)
        steep = np.maximum(1, np.abs(slope))  # complex ones have poles
        inside = y_tolerance
        if case.activation:
            y_tolerance = 2 * steep * inside + 8 * eps_out * (1 + np.abs(y)) * steep
        y, y_tolerance = np.where(counts, y, 0), np.where(counts, y_tolerance, 0)
        if np.asarray(got["y"]).dtype != out:
            yield f"y has dtype {got['y'].dtype}, not {out}", math.inf
        yield from compare("y", got["y"], y, y_tolerance, out)
        dy = np.where(counts, long(cotangents["y"].astype(out)), 0)
        if case.activation:
            g_error = np.abs(dy) * steep * (1 + np.abs(y)) * (2 * inside + 16 * eps_out)
        g = dy * np.conj(slope)
        g = np.where(counts, g, 0)

    # The derivative. `g` is that of the loss by y, as its real and imaginary part.
    gradients = got["gradients"]
    if np.iscomplexobj(arrays["x"]):
        gradients = {k: np.conj(v) for k, v in gradients.items()}
    noise = np.abs(g) * unit + g_error
    if bias is not None:
        want, tol = g, eps * 25 * np.abs(g) + g_error
        if not np.iscomplexobj(arrays["bias"]):
            want = want.real
        of = arrays["bias"].dtype
        tol = _summed(case, tol, case.bias) + _rounded(case, want, case.bias, of)
        want, tol = _summed(case, want, case.bias), tol + floor
        yield from compare("dbias", gradients["bias"], want, tol, of)
    if scale is not None:
        want, tol = g * np.conj(x_hat), noise * X
        if not np.iscomplexobj(arrays["scale"]):
            want = want.real
        of = arrays["scale"].dtype
        tol = _summed(case, tol, case.scale) + _rounded(case, want, case.scale, of)
        want, tol = _summed(case, want, case.scale), tol + floor
        yield from compare("dscale", gradients["scale"], want, tol, of)
    g_hat = g if scale is None else g * np.conj(scale)
    n = np.where(s.count > 0, s.count, 1)
    whole_n = np.where(whole.count > 0, whole.count, 1)
    of_mean = -sums.total(rstd * g_hat) if case.centered else 0 * rstd
    of_var = -(rstd**2) / 2 * sums.total((np.conj(g_hat) * x_hat).real)
    parts = (
        rstd * g_hat,
        s.weights / n * (of_mean + 2 * of_var * s.off),
        whole.weights / whole_n * (moment["mean"] + 2 * moment["var"] * whole.off)
        if "moments" in got
        else np.zeros_like(rstd),  # also where the moments are NaN
    )
    dx = np.where(counts, sum(parts), 0)
    total = sums.total(S * noise)
    tol = rstd * (S * noise + s.weights / n * total * (1 + np.abs(x_hat) * X))
    tol = tol + whole.weights / whole_n * (
        25 * eps * sizes["mean"]
        + 2 * sizes["var"] * (25 * eps * spread + 3 * eps * whole_size)
    )
    # Moments that are taken apart from y have a gradient of their own, in x's dtype.
    is_apart = case.norm == "merge" or (case.ghosts and "moments" in got)
    apart = sum(map(np.abs, parts)) if is_apart else np.abs(dx)
    # What is near the smallest numbers, 1 / std too, a platform may take for 0.
    tol = tol + eps_x * apart + floor_x * (1 + S * np.abs(g))
    # Backwards the count divides the sums, then the weight and x_hat multiply what it
    # leaves, which may be so.
    tol = tol + floor * np.maximum(1, s.weights) * (case.centered + np.abs(x_hat))
    if case.norm == "merge":  # and may each be beyond it
        tol = np.where(2 * apart < float(_info(case.dtype).max), tol, np.inf)
    if case.norm in ("merge", "batch"):
        # The derivative of a variance that is inf by the mean of a piece, or the std.
        beyond = 4 * sizes["var"] * spread >= float(np.finfo(stat).max)
        tol = np.where(beyond, np.inf, tol)
    all_g = sums.total(S * (np.abs(g) + g_error))
    tol = tol + floor_x * s.weights / n * all_g * (1 + np.abs(x_hat) * X)
    yield from compare("dx", gradients["x"], dx, np.where(counts, tol, 0), case.dtype)
    if case.where == "weights":
        dw = (np.conj(of_mean) * s.off).real + of_var * (np.abs(s.off) ** 2 - s.var)
        dw = dw / n
        apart = np.abs(dw)  # as above
        if "moments" in got:
            of_whole = (np.conj(moment["mean"]) * whole.off).real
            of_whole = of_whole + moment["var"] * (np.abs(whole.off) ** 2 - whole.var)
            dw = dw + of_whole / whole_n
            apart = apart + np.abs(of_whole / whole_n)
        far, wide = sums.largest(np.abs(s.off)), spread + floor
        tol = (
            X * total * (1 + rstd * far + (rstd * far) ** 2) / n
            + (
                sizes["mean"] * (25 * eps * wide + 3 * eps * whole_size)
                + sizes["var"]
                * (wide + eps * whole_size)
                * (25 * eps * wide + 3 * eps * whole_size)
            )
            / whole_n
        )
        # That of a variance that is inf by a weight may be beyond the dtype on its way.
        beyond = (whole.var > float(np.finfo(stat).max) / 4) & (sizes["var"] > 0)
        tol = np.where(beyond, np.inf, tol)
        tol = tol + 2 * float(np.finfo(np.float32).eps) * apart
        dw, tol = np.where(counts, dw, 0), np.where(counts, tol, 0)
        like = (case.devices, *case.where_shape)
        narrow = tuple(i for i, m in enumerate(like) if m == 1)
        dw, tol = (a.sum(narrow, keepdims=True) for a in (dw, tol))
        tol = tol + float(np.finfo(np.float32).eps) * np.abs(dw) + floor
        yield from compare("dwhere", gradients["where"], dw, tol, "float32")


def _spread(case, a, features):
    """A cotangent in the shape of moments, laid at each value of x."""
    if case.norm == "batch":
        order = sorted(range(len(features)), key=lambda i: features[i])
        a = a.transpose(0, *(i + 1 for i in order))
        a = a.reshape(
            [
                case.devices,
                *(n if i in features else 1 for i, n in enumerate(case.shape)),
            ]
        )
    whole = np.broadcast_to(a, (case.devices, *case.shape))
    # The moments of all devices of a group are one: their cotangents add up.
    if case.context == "one":
        return whole
    groups = case.groups or (tuple(range(case.devices)),)
    out = np.zeros(whole.shape, whole.dtype)
    for group in groups:
        out[list(group)] = whole[list(group)].sum(0)
    return out


def moment_cotangents(case: Case, seed: int, number: int) -> dict:
    """Cotangents of the moments that a call returns, none for others."""
    rng = np.random.default_rng((seed, number, 1000))
    if case.norm == "batch":
        shape = [case.devices, *(case.shape[a] for a in case.features)]
    else:
        shape = [
            case.devices,
            *(1 if a in case.axis else n for a, n in enumerate(case.shape)),
        ]
    mean, var = rng.standard_normal(shape), rng.standard_normal(shape)
    if case.dtype == "complex64":
        mean = mean + 1j * rng.standard_normal(shape)
    return {"mean": mean, "var": var}


def run(case: Case, seed: int, number: int, kinds=DATA) -> list:
    """Runs a call on its kinds of data: a list of (kind, what, error / tolerance)."""
    found = []
    with jax.enable_x64(case.dtype == "float64"):
        call = compiled(case)
        for kind in [k for k in DATA if k in case.data and k in kinds]:
            arrays = data(case, kind, seed, number)
            dy = arrays.pop("dy")
            cotangents = {"y": dy, **moment_cotangents(case, seed, number)}
            # JAX is given what a case's dtypes hold; float64 stays so under x64 alone.
            given = {k: v.astype(_narrow(case, v)) for k, v in cotangents.items()}
            got = jax.tree.map(np.asarray, call(arrays, given))
            found += [(kind, *f) for f in check(case, arrays, given, got)]
    return found


def higher(case: Case, seed: int, number: int) -> list:
    """Second and third derivatives, beside those of the plain formula, in float64."""
    context = "vmap" if case.context == "pmap" else case.context
    case = dataclasses.replace(
        case,
        dtype="float64",
        parameter="float64",
        out=None,
        epsilon=1e-3,
        context=context,
        data=("normal", "constant", "zeros"),
    )
    rng, found = np.random.default_rng((seed, number, 2000)), []
    ids, whole = labels(case), _labels(case, None)
    returns_moments = case.norm in ("moments", "merge")
    returns_moments |= case.norm == "batch" and case.door == "function"
    names = ["x", "scale", "bias"] + ["where"] * (case.where == "weights")

    def formula(x, scale, bias, where):
        """y, mean and var by sums over sets."""
        w = jnp.ones(ids.shape) if where is None else jnp.broadcast_to(where, ids.shape)
        counts = w > 0
        w = jnp.where(counts, w.astype(x.dtype), 0)
        x = jnp.where(counts, x, 0)

        def of(ids):
            def total(a):
                sums = jax.ops.segment_sum(a.ravel(), ids.ravel(), int(ids.max()) + 1)
                return sums[ids]

            count = total(w)
            n = jnp.where(count > 0, count, 1)
            mean = total(w * x) / n * case.centered
            return mean, jnp.where(count > 0, total(w * (x - mean) ** 2) / n, 1)

        mean, var = of(ids)
        y = (x - mean) / jnp.sqrt(var + case.epsilon)
        y = y if scale is None else y * _laid_as_x(case, scale)
        y = y if bias is None else y + _laid_as_x(case, bias)
        y = y if case.activation is None else ACTIVATIONS[case.activation](y)
        return (jnp.where(counts, y, 0), *of(whole))

    of_moments = moment_cotangents(case, seed, number)
    laid = {k: _first(case, v) for k, v in of_moments.items()}

    with jax.enable_x64(True):
        f = mapped(case)

        def ours(moved, rest, dy):
            arguments = moved | rest
            r = f(*(arguments[k] for k in ("x", "scale", "bias", "where")))
            total = _aligned(r["y"], dy) if "y" in r else 0.0
            if "moments" in r:
                total += _aligned(r["moments"].mean, of_moments["mean"])
                total += _aligned(r["moments"].var, of_moments["var"])
            return total

        def plain(moved, rest, dy):
            y, mean, var = formula(**moved, **rest)
            total = _aligned(y, dy) if case.norm != "moments" else 0.0
            if returns_moments:
                total += _aligned(mean, laid["mean"]) + _aligned(var, laid["var"])
            return total

        def orders(loss):
            def both(moved, rest, dy, along):
                grad = jax.grad(lambda a: loss(a, rest, dy))

                def hvp(a):
                    return jax.jvp(grad, (a,), (along,))[1]

                return hvp(moved), jax.jvp(hvp, (moved,), (along,))[1]

            return jax.jit(both)

        both = orders(ours), orders(plain)
        for kind in case.data:
            arrays = data(case, kind, seed, number)
            dy = arrays.pop("dy")
            # A mean that is well known; of constants, one that the formula has exactly.
            arrays["x"] = np.clip(arrays["x"], -4, 4)
            if kind == "constant":
                arrays["x"] = np.round(arrays["x"] * 64) / 64
            if case.where == "weights":  # whose inverse is not large, to any power
                arrays["where"] = np.where(arrays["where"] > 0, rng.uniform(0.5, 2), 0)
            moved = {k: arrays[k] for k in names if arrays[k] is not None}
            rest = {k: v for k, v in arrays.items() if k not in moved}
            along = {k: rng.standard_normal(v.shape) for k, v in moved.items()}
            results = (
                jax.tree.map(np.asarray, f(moved, rest, dy, along)) for f in both
            )
            for order, got, want in zip((2, 3), *results, strict=True):
                # What is 0 by symmetry is a sum of terms of the others' size, rounded.
                sizes = {k: float(np.abs(a).max(initial=0.0)) for k, a in want.items()}
                for name in moved:
                    limit = 1e-9 * max(1.0, sizes[name]) + 1e-13 * max(sizes.values())
                    off = np.abs(got[name] - want[name])
                    i = np.unravel_index(np.argmax(off), off.shape)
                    if not off[i] <= limit:
                        what = f"derivative {order} by {name}"
                        what += f" is {got[name][i]:.9g}, not {want[name][i]:.9g}"
                        found.append((kind, what, float(off[i] / limit)))
    return found


def _laid_as_x(case, v):
    """`_laid` for JAX."""
    own = tuple(case.shape[a] for a in case.features)
    lies = v.shape == own and len(own) < len(case.shape)
    if lies or case.door != "function":
        v = v.transpose(np.argsort(case.features)) if lies else v
        v = v.reshape(
            [n if a in case.features else 1 for a, n in enumerate(case.shape)]
        )
    return v[None]


def _first(case, a):
    """A cotangent of moments, at the first value of x that each belongs to."""
    if case.norm == "batch":
        order = sorted(range(len(case.features)), key=lambda i: case.features[i])
        a = a.transpose(0, *(i + 1 for i in order))
        a = a.reshape(
            [
                case.devices,
                *(n if i in case.features else 1 for i, n in enumerate(case.shape)),
            ]
        )
    out = np.zeros((case.devices, *case.shape))
    out[tuple(slice(0, n) for n in a.shape)] = a
    return out


def stream(seed: int, number: int) -> list:
    """A stream of moments, and of running moments, beside their formula."""
    rng = np.random.default_rng((seed, number))
    pieces, channels = int(10 ** rng.uniform(1, 4.3)), 64
    mean = rng.choice([0, 1]) * 10 ** rng.uniform(-1, 4)
    x = (rng.standard_normal((pieces, 2, channels)) + mean).astype(np.float32)
    counts = rng.random(x.shape) < rng.choice([1.0, 0.5, 0.1])
    counts[:, 0] |= (rng.random(x.shape[:1]) < 0.9)[:, None]
    x = np.where(counts, x, np.nan).astype(np.float32)
    momenta = rng.uniform(0.3, 1, pieces).astype(np.float32)

    @jax.jit
    def run(x, counts, momenta):
        def step(carry, a):
            whole, running = carry
            m = normjax.moments(a[0], 0, where=a[1])
            m = jax.tree.map(lambda a: a[0], m)
            return (whole.merge(m), running.update(m, a[2])), m

        start = (
            normjax.Moments.empty((channels,)),
            normjax.RunningMoments.init((channels,)),
        )
        (whole, running), each = jax.lax.scan(step, start, (x, counts, momenta))
        return whole, running, normjax.merge(each, 0), each

    whole, running, at_once, each = jax.tree.map(np.asarray, run(x, counts, momenta))
    w, values = counts.astype(LONG), np.where(counts, x, 0).astype(LONG)
    n = w.sum((0, 1))
    want = (w * values).sum((0, 1)) / n
    var = (w * (values - want) ** 2).sum((0, 1)) / n
    found, eps = [], float(np.finfo(np.float32).eps)

    def compare(what, got, want, tolerance):
        off = float(np.max(np.abs(long(got) - want) / tolerance))
        if not off <= 1:
            found.append((f"{pieces} pieces", f"{what} is off", off))

    for how, m in (("stream", whole), ("at once", at_once)):
        m = jax.tree.map(lambda a: a.reshape(-1), m)
        compare(f"count {how}", long(m.count) + long(m.carry), n, 0.5)
        compare(f"mean {how}", m.mean, want, 4 * eps * (abs(want) + np.sqrt(var)))
        limit = 2e-6 + (eps * abs(want)) ** 2 / var
        compare(f"var {how}", m.var, var, limit * var * 4)
        # Errors of channels are independent, unless there is a bias.
        bias = np.mean(long(m.var) / var - 1)
        compare(f"bias of var {how}", bias, 0, limit.max())
    parts = momenta.astype(LONG)[:, None]
    total, sums = np.zeros(channels, LONG), np.zeros((2, channels), LONG)
    for i in range(pieces):
        some = long(each.count[i]) > 0
        part = np.where(some, 1 - parts[i], 0)
        total = (1 - part) * total + part
        values = np.stack([long(each.mean[i]), long(each.var[i])])
        sums = (1 - part) * sums + part * np.where(some, values, 0)
    sums = sums / np.where(total > 0, total, 1)
    size = abs(want) + np.sqrt(var)
    compare("running mean", running.mean, sums[0], 40 * eps * size)
    compare("running var", running.var, sums[1], 40 * eps * (var + (eps * size) ** 2))
    return found


def _narrow(case, v):
    if np.iscomplexobj(v):
        return np.complex64
    return np.float64 if case.dtype == "float64" else np.float32


def fuzz(seed, numbers, kinds=DATA, say=print, until=math.inf) -> tuple[int, dict]:
    """Runs calls by number; says each that fails. Returns how many ran, and faults."""
    count, faults = 0, collections.Counter()
    for number in numbers:
        if time.monotonic() > until:
            break
        case = draw(seed, number)
        count += 1
        try:
            found = run(case, seed, number, kinds)
            if number % 8 == 0:
                found += higher(case, seed, number)
            if number % 64 == 1:
                found += stream(seed, number)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            found = [("any data", f"raised {text[:200]}", math.inf)]
        for kind, what, off in found:
            faults[f"{kind}: {what.split(' is ')[0][:60]}"] += 1
            say(f"{kind}: {what} ({off:.3g} tolerances)")
        if found:
            say(f"  python tests/fuzz_norms.py --seed {seed} --only {number}  # {case}")
        if count % 200 == 0:
            jax.clear_caches()  # each call is compiled once
    return count, faults


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--count", type=int, help="stop after so many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    parser.add_argument("--data", nargs="*", default=DATA, choices=DATA)
    options = parser.parse_args(arguments)
    if options.minutes is None and options.count is None:
        options.count = 100
    numbers = itertools.count() if options.count is None else range(options.count)
    if options.only is not None:
        numbers = [options.only]
    until = math.inf
    if options.minutes is not None:
        until = time.monotonic() + 60 * options.minutes
    count, faults = fuzz(options.seed, numbers, options.data, until=until)
    print(f"{count} calls of seed {options.seed}, {sum(faults.values())} faults")
    for fault, times in faults.most_common():
        print(f"  {times:5d}  {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sys.exit(main())
