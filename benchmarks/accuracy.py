"""How far the norms are from a float64 reference, and flax and torch beside them.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --norm layer --norm rms
    python benchmarks/accuracy.py --write docs/accuracy.md

Prints a page in Markdown with a table for each norm, and exits with 1 if normjax misses
a bar. torch is in it where it is installed. Takes about half a minute on two cores.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax

try:
    import torch
except ImportError:
    torch = None

DEVICES = 8
EPS = 2.0**-23
ROUNDING = 1e-6  # errors up to this are rounding, and none is worse than another
METRICS = ("var", "y", "dx", "dscale", "hvp")

INTRODUCTION = """\
# Accuracy

Written by `python benchmarks/accuracy.py --write docs/accuracy.md`.

The largest errors, in float32, against a float64 reference that starts from the same
float32 inputs. `data` is the mean of normal data with standard deviation 1; an outlier
is the first value of each set that is normalized. `var` is the relative error of the
variance (for rms norm of the mean square, taken from y, since nobody gives it out). y,
dx and dscale (the gradients of `sum(w * y)` for random w) and hvp (a Hessian-vector
product of `sum(w * y**2) / 2`) are relative to the largest magnitude. On eight devices
each set that is normalized is divided over all of them.

The bar for y, dx, dscale and hvp is 3e-6 + 3 eps |mean| / std: what a mean rounded to
float32 costs. For var it is 2e-6, and 1e-4 at 1e5. An error beyond it is bold. A dash
is what the library does not give out. `flax, safe variance` is
`use_fast_variance=False`."""


class Data(NamedTuple):
    """Normal data of standard deviation 1; the first value of each set an outlier."""

    mean: float
    outlier: float | None = None


DATA = {
    "1": Data(1),
    "10": Data(10),
    "100": Data(100),
    "1e3": Data(1e3),
    "1e4": Data(1e4),
    "1e5": Data(1e5),
    "1e3, one value 0": Data(1e3, 0.0),
    "1, one value 1e4": Data(1, 1e4),
}


class Arrays(NamedTuple):
    """The inputs of one row: x, parameters, random weights and a random direction."""

    x: Any
    scale: Any
    bias: Any
    weights: Any
    direction: Any


def _view(case: cases.Case, a: np.ndarray) -> np.ndarray:
    """Splits the features into (groups, members), where there are groups."""
    if not case.num_groups:
        return a
    return a.reshape(*a.shape[:-1], case.num_groups, -1)


@functools.lru_cache(maxsize=2)
def arrays(norm: str, data: str) -> Arrays:
    """Draws the inputs of a case, in float32."""
    case, (mean, outlier) = cases.ACCURACY[norm], DATA[data]
    rng = np.random.default_rng(0)
    x = _view(case, rng.standard_normal(case.shape) + mean)
    if outlier is not None:
        first = [slice(1) if a in case.axes else slice(None) for a in range(x.ndim)]
        x[tuple(first)] = outlier
    features = case.shape[-1]
    drawn = Arrays(
        x=x.reshape(case.shape),
        scale=rng.uniform(0.5, 1.5, features),
        bias=np.zeros(features) if norm == "rms" else rng.uniform(-1, 1, features),
        weights=rng.standard_normal(case.shape),
        direction=rng.standard_normal(case.shape),
    )
    return Arrays(*(a.astype(np.float32) for a in drawn))


@functools.lru_cache(maxsize=2)
def reference(norm: str, data: str) -> dict[str, Any]:
    """Computes the exact values from the float32 inputs, in float64 and by hand.

    dx and dscale are the gradients of sum(w * y), hvp is the derivative along v of the
    gradient in x of sum(w * y**2) / 2.
    """
    case = cases.ACCURACY[norm]
    x, scale, bias, w, v = (
        _view(case, a.astype(np.float64)) for a in arrays(norm, data)
    )

    def mean(a):
        return a.mean(case.axes, keepdims=True)

    def center(a):
        return a if norm == "rms" else a - mean(a)

    var = mean(center(x) ** 2)
    r = 1 / np.sqrt(var + case.epsilon)
    x_hat = center(x) * r
    y = scale * x_hat + bias

    def project(g):
        return center(g) - x_hat * mean(x_hat * g)

    # x_hat_dot = r * project(v)   r_dot = -r**2 * c   c = <x_hat * v>
    c = mean(x_hat * v)
    x_hat_dot = r * project(v)
    g, g_dot = scale * w * y, scale**2 * w * x_hat_dot
    hvp = r * (
        -r * c * project(g)
        + project(g_dot)
        - x_hat_dot * mean(x_hat * g)
        - x_hat * mean(x_hat_dot * g)
    )
    ratio = 0.0 if norm == "rms" else float(np.max(np.abs(mean(x)) / np.sqrt(var)))
    return {
        "ratio": ratio,
        "var": var,
        "y": y.reshape(case.shape),
        "dx": (r * project(scale * w)).reshape(case.shape),
        "dscale": (w * x_hat).reshape(-1, case.shape[-1]).sum(0),
        "hvp": hvp.reshape(case.shape),
    }


def bar(norm: str, data: str) -> dict[str, float]:
    """The largest errors that normjax may make.

    A mean rounded to float32 is off by up to eps / 2 of it, so y is off by up to
    eps / 2 * |mean| / std, and so is all that is computed from it.
    """
    ratio = reference(norm, data)["ratio"]
    allowed = 3e-6 + 3 * EPS * ratio
    return {"var": 2e-6 if ratio < 5e4 else 1e-4} | dict.fromkeys(METRICS[1:], allowed)


def errors(norm: str, data: str, who: str = "normjax") -> dict[str, float]:
    """Measures the largest errors of ``who``, one of `CONTENDERS`.

    Errors of var are relative, those of the others relative to the largest magnitude.
    A metric that ``who`` does not give out is left out.
    """
    exact, case = reference(norm, data), cases.ACCURACY[norm]
    found = CONTENDERS[who](case)(arrays(norm, data))
    if norm == "rms":  # nobody gives out the mean square: it is what y was divided by
        a = arrays(norm, data)
        x, y = np.float64(a.x), np.float64(found["y"]) / a.scale
        divisor = (x * x).sum(-1, keepdims=True) / (x * y).sum(-1, keepdims=True)
        found["var"] = divisor**2 - case.epsilon
    result = {}
    for metric in METRICS:
        if metric in found:
            want = exact[metric]
            size = np.abs(want) if metric == "var" else np.abs(want).max()
            got = np.asarray(found[metric], np.float64).reshape(want.shape)
            result[metric] = float(np.max(np.abs(got - want) / size))
    return result


def _of_jax(f: Callable) -> Callable:
    """Compiles what is measured of ``f(x, scale, bias) -> y, var or None``."""

    def measure(a: Arrays) -> dict[str, jax.Array]:
        y, var = f(a.x, a.scale, a.bias)

        def first(x, scale):
            return (a.weights * f(x, scale, a.bias)[0]).sum()

        def second(x):
            return (a.weights * jnp.square(f(x, a.scale, a.bias)[0])).sum() / 2

        dx, dscale = jax.grad(first, (0, 1))(a.x, a.scale)
        hvp = jax.jvp(jax.grad(second), (a.x,), (a.direction,))[1]
        found = {"y": y, "dx": dx, "dscale": dscale, "hvp": hvp}
        return found if var is None else found | {"var": var}

    return jax.jit(measure)


def _normjax(case: cases.Case, axis_name: str | None = None) -> Callable:
    """The norm of a case, as f(x, scale, bias) -> y, var.

    Where a norm does not return var, it is taken as the norm takes it.
    """

    def f(x, scale, bias):
        options = {"epsilon": case.epsilon, "axis_name": axis_name}
        if case.norm == "batch":
            y, m = normjax.batch_norm(x, scale, bias, **options)
            return y, m.var
        if case.norm == "rms":
            return normjax.rms_norm(x, scale, **options), None
        if case.norm == "group":
            options["num_groups"] = case.num_groups
        y = getattr(normjax, f"{case.norm}_norm")(x, scale, bias, **options)
        axes = tuple(a for a in case.axes if a < x.ndim)
        m = normjax.moments(x, axes, axis_name=axis_name)
        if case.norm == "group":
            m = normjax.merge(jax.tree.map(functools.partial(_view, case), m), -1)
        return y, m.var

    return f


def _one_device(case: cases.Case) -> Callable:
    return _of_jax(_normjax(case))


def _specs(case: cases.Case) -> Arrays:
    """How arrays lie on the devices: divided along the first axis that is reduced."""
    divided = case.axes[0]
    of_x = PartitionSpec(*("d" if a == divided else None for a in range(divided + 1)))
    last = divided == len(case.shape) - 1
    of_features = PartitionSpec("d") if last else PartitionSpec()
    return Arrays(of_x, of_features, of_features, of_x, of_x)


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (DEVICES,), ("d",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )


def _by_axis_name(case: cases.Case) -> Callable:
    specs = _specs(case)
    f = _normjax(case, "d")
    outputs = (specs.x, None if case.norm == "rms" else PartitionSpec())
    return _of_jax(
        jax.shard_map(f, mesh=_mesh(), in_specs=specs[:3], out_specs=outputs)
    )


def _by_jit(case: cases.Case) -> Callable:
    mesh, specs = _mesh(), _specs(case)
    measure = _of_jax(_normjax(case))

    def placed(a: Arrays) -> dict[str, jax.Array]:
        shardings = [NamedSharding(mesh, s) for s in specs]
        return measure(Arrays(*map(jax.device_put, a, shardings)))

    return placed


def _flax(case: cases.Case, use_fast_variance: bool = True) -> Callable:
    fields = case.fields | {"use_fast_variance": use_fast_variance}
    if case.norm == "batch":
        fields |= {"momentum": 0.0}  # batch_stats hold the batch's own
    module = getattr(nn, case.module)(epsilon=case.epsilon, **fields)
    features = case.shape[-1]
    running = {"mean": jnp.zeros(features), "var": jnp.ones(features)}

    def f(x, scale, bias):
        params = {"scale": scale} | ({} if case.norm == "rms" else {"bias": bias})
        if case.norm != "batch":
            return module.apply({"params": params}, x), None
        variables = {"params": params, "batch_stats": running}
        y, new = module.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]["var"]

    return _of_jax(f)


def _torch_norm(case: cases.Case, x: Any, scale: Any, bias: Any) -> tuple[Any, Any]:
    """The norm of torch; features are its second axis, or the last of rows."""
    f, features, epsilon = torch.nn.functional, case.shape[-1], case.epsilon
    if case.norm == "layer":
        return f.layer_norm(x, [features], scale, bias, epsilon), None
    if case.norm == "rms":
        return f.rms_norm(x, [features], scale, epsilon), None
    if case.norm == "group":
        return f.group_norm(x, case.num_groups, scale, bias, epsilon), None
    if case.norm == "instance":
        return f.instance_norm(x, weight=scale, bias=bias, eps=epsilon), None
    mean, var = torch.zeros(features), torch.ones(features)
    y = f.batch_norm(x, mean, var, scale, bias, True, 1.0, epsilon)
    count = x.numel() // features
    return y, var * ((count - 1) / count)  # running_var is the unbiased one


def _torch(case: cases.Case) -> Callable:
    def into(a: np.ndarray) -> Any:
        a = a if a.ndim < 4 else a.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.array(a, order="C"))

    def out(a: Any) -> np.ndarray:
        a = a.detach().numpy()
        return a if a.ndim < 4 else a.transpose(0, 2, 3, 1)

    def measure(a: Arrays) -> dict[str, np.ndarray]:
        x, scale, bias, w, v = map(into, a)
        x.requires_grad_()
        scale.requires_grad_()
        y, var = _torch_norm(case, x, scale, bias)
        dx, dscale = torch.autograd.grad((w * y).sum(), [x, scale], retain_graph=True)
        loss = (w * y.square()).sum() / 2
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (hvp,) = torch.autograd.grad((gradient * v).sum(), x)
        found = {"y": y, "dx": dx, "dscale": dscale, "hvp": hvp}
        found |= {} if var is None else {"var": var}
        return {name: out(value) for name, value in found.items()}

    return measure


# Each takes a case and returns a function of `Arrays`, compiled once.
CONTENDERS: dict[str, Callable] = {
    "normjax": functools.cache(_one_device),
    "normjax, 8 devices, axis_name": functools.cache(_by_axis_name),
    "normjax, 8 devices, jit": functools.cache(_by_jit),
    "flax": functools.cache(_flax),
    "flax, safe variance": functools.cache(
        functools.partial(_flax, use_fast_variance=False)
    ),
} | ({} if torch is None else {"torch": _torch})
OURS = [who for who in CONTENDERS if who.startswith("normjax")]


class Row(NamedTuple):
    """What was measured of one contender on one data set."""

    norm: str
    data: str
    who: str
    errors: dict[str, float]


def measure(norms: list[str]) -> list[Row]:
    """Measures every contender on all data."""
    return [
        Row(norm, data, who, errors(norm, data, who))
        for norm in norms
        for data in DATA
        for who in CONTENDERS
    ]


def missed(rows: list[Row]) -> list[str]:
    """Lists where normjax misses a bar."""
    return [
        f"{row.norm}, {row.data}: {metric} of {row.who} {error:.1e}, bar {most:.1e}"
        for row in rows
        if row.who in OURS
        for metric, error in row.errors.items()
        if not error <= (most := bar(row.norm, row.data)[metric])
    ]


def worse(rows: list[Row]) -> list[str]:
    """Lists where normjax is further off than torch, by more than rounding."""
    torches = {(r.norm, r.data): r.errors for r in rows if r.who == "torch"}
    return [
        f"{row.norm}, {row.data}: {metric} of {row.who} {error:.1e}, torch {theirs:.1e}"
        for row in rows
        if row.who in OURS
        for metric, theirs in torches.get((row.norm, row.data), {}).items()
        if (error := row.errors[metric]) > max(theirs, ROUNDING)
    ]


def listed(what: str, lines: list[str]) -> str:
    """Writes a list in Markdown, or that there is nothing to list."""
    if not lines:
        return f"{what}: nowhere."
    return "\n".join([f"{what}:", "", *(f"- {line}" for line in lines)])


def section(norm: str, rows: list[Row]) -> str:
    """Writes the table of a norm; an error beyond the bar is bold."""
    case = cases.ACCURACY[norm]
    title = f"## {norm} norm, {list(case.shape)}"
    if case.num_groups:
        title += f", {case.num_groups} groups"
    lines = []
    for row in rows:
        most = bar(norm, row.data)
        cells = [row.data, f"{most['y']:.0e}", row.who]
        for metric in METRICS:
            if (error := row.errors.get(metric)) is None:
                cells.append("–")
            else:
                beyond = "" if error <= most[metric] else "**"
                cells.append(f"{beyond}{error:.1e}{beyond}")
        lines.append(cells)
    return f"{title}\n\n" + cases.table(["data", "bar", "of", *METRICS], lines)


def report(rows: list[Row]) -> str:
    """Writes all that was measured, as a page in Markdown."""
    norms = dict.fromkeys(row.norm for row in rows)
    parts = [
        INTRODUCTION,
        cases.versions("jax", "flax", "torch", "numpy") + ".",
        listed("normjax misses a bar", missed(rows)),
        *([listed("normjax is worse than torch", worse(rows))] if torch else []),
        *(section(n, [row for row in rows if row.norm == n]) for n in norms),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints the page, and returns 1 if normjax misses a bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(cases.ACCURACY)
    parser.add_argument("--norm", action="append", choices=names, help="default: all")
    parser.add_argument("--write", type=pathlib.Path, help="also write the page there")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = measure(args.norm or names)
    page = report(rows)
    print(page, end="")
    if args.write:
        args.write.write_text(page)
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
