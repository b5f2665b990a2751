"""What one pass over memory costs: the sums that moments are made of, one by one.

    python benchmarks/passes.py
    python benchmarks/passes.py --norm group
    python benchmarks/passes.py --forms

A norm of unsafe variance needs the sums of x and of x**2 and a pass that writes y; one
in two passes the sum of (x - m)**2 instead; the safe one the sum of x - m beside. What
these add up to is the least that a form of the norm can take with XLA's own loops.
With --forms it is whole forward passes that are timed: those that were tried, and the
three sums that normjax takes.
"""

import argparse
import functools
import math
import statistics

import cases
import jax
import jax.numpy as jnp
import peers
import timing
from jax import lax

FORMS = {
    "unsafe": ["sum x", "sum x²", "write y"],
    "two passes": ["sum x", "sum (x-m)²", "write y"],
    "safe": ["sum x", "sum (x-m)", "sum (x-m)²", "write y"],
}


def passes(axes: tuple[int, ...]) -> dict:
    """The passes, as functions of x and of m, which broadcasts against x."""
    return {
        "sum x": lambda x, m: x.sum(axes),
        "sum x²": lambda x, m: (x * x).sum(axes),
        "sum (x-m)": lambda x, m: (x - m).sum(axes),
        "sum (x-m)²": lambda x, m: jnp.square(x - m).sum(axes),
        "write y": lambda x, m: (x - m) * m,
    }


def forms(axes: tuple[int, ...]) -> dict:
    """Forward passes, as functions of x and of m, which broadcasts against x."""
    own = lax.optimization_barrier
    (axis,) = axes

    def total(a):
        return a.sum(axes, keepdims=True)

    def scaled(distance, var):
        return distance * own(lax.rsqrt(var + 1e-6))

    def unsafe(x, m):  # sums of x and x²
        n, mean = x.shape[axis], total(x) / x.shape[axis]
        return scaled(x - mean, total(x * x) / n - mean * mean)

    def variadic(x, m):  # the same in one reduction of two sums
        zero = jnp.zeros((), x.dtype)
        sums = lax.reduce(
            (x, x * x), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes
        )
        mean, square = (jnp.expand_dims(s, axes) / x.shape[axis] for s in sums)
        return scaled(x - mean, square - mean * mean)

    def two_passes(x, m):  # and the distances from the mean squared
        mean = own(total(x) / x.shape[axis])
        var = total(jnp.square(x - mean)) / x.shape[axis]
        return scaled(x - own(mean), var)

    def shared(x, m):  # distances stored once, for both of their sums and for y
        mean = own(total(x) / x.shape[axis])
        distance = own(x - mean)
        rest = total(distance) / x.shape[axis]
        var = total(jnp.square(distance)) / x.shape[axis] - jnp.square(rest)
        return scaled(distance - rest, var)

    def in_eighths(a):  # partial sums, added up as whole arrays
        least = a.shape[axis] // 8
        while a.shape[axis] % 2 == 0 and a.shape[axis] > least:
            first, second = jnp.split(a, 2, axis)
            a = first + second
        return total(a)

    def safe(total, x, m):  # the mean, what its rounding left over, the variance
        mean = own(total(x) / x.shape[axis])
        rest = total(x - mean) / x.shape[axis]
        mean_ = own(mean)
        var = total(jnp.square(x - mean_)) / x.shape[axis] - jnp.square(rest)
        return scaled((x - own(mean_)) - own(rest), var)

    def shifted(x, m):  # the median of three values in place of the first sum
        ends = (0, x.shape[axis] // 2, x.shape[axis] - 1)
        a, b, c = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in ends)
        near = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
        near = own(near)
        rest = total(x - near) / x.shape[axis]
        mean = own(near + rest)
        rest = own((near - mean) + rest)
        var = total(jnp.square(x - mean)) / x.shape[axis] - jnp.square(rest)
        return scaled((x - own(mean)) - rest, var)

    return {
        "unsafe": unsafe,
        "unsafe, one reduction": variadic,
        "two passes": two_passes,
        "safe, three sums": functools.partial(safe, total),
        "safe, distances stored": shared,
        "safe, in eighths": functools.partial(safe, in_eighths),
        "safe, shifted by a median": shifted,
    }


def view(case: cases.Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and axes of sums that are contiguous; a group's are by channel."""
    axes = tuple(a for a in case.axes if a < len(case.shape))
    first, last = min(axes), max(axes) + 1
    before, after = case.shape[:first], case.shape[last:]
    middle = math.prod(case.shape[first:last])
    return (*before, middle, *after), (first,)


def measure(case: cases.Case, rounds: int, whole: bool) -> list[str]:
    """Times passes or forms, and Flax's forward, in turns; returns a row of a table."""
    x = jax.random.normal(jax.random.key(0), case.shape)
    shape, axes = view(case)
    flat = x.reshape(shape)
    m = jnp.mean(flat, axes, keepdims=True)
    params = {"scale": jnp.ones(case.features), "bias": jnp.zeros(case.features)}
    running = {"mean": params["bias"], "var": params["scale"]}
    running = running if case.norm == "batch" else {}
    forward = peers.PEERS["flax"].build(case, x.dtype)
    functions = (forms if whole else passes)(axes) | {
        "flax": lambda z, m: forward(params, running, z.reshape(x.shape), True)
    }
    calls = {name: timing.compiled(f, flat, m).call for name, f in functions.items()}
    times = timing.interleaved(calls, rounds)
    took = {name: statistics.median(seconds) for name, seconds in times.items()}
    if whole:
        return [
            f"{case.norm} {list(case.shape)}",
            *(f"{took[n] / took['flax']:.2f}" for n in functions if n != "flax"),
            f"{1e3 * took['flax']:.2f}",
        ]
    least = [sum(took[n] for n in names) / took["flax"] for names in FORMS.values()]
    return [
        f"{case.norm} {list(case.shape)}",
        *(f"{1e3 * took[name]:.2f}" for name in functions),
        *(f"{ratio:.2f}" for ratio in least),
    ]


def main() -> None:
    """Measures and prints a table, in milliseconds and in units of Flax's forward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    norms = sorted({case.norm for case in cases.SPEED} - {"rms"})
    parser.add_argument("--norm", action="append", choices=norms, help="default: all")
    parser.add_argument("--allocator", default="keep", choices=timing.ALLOCATORS)
    parser.add_argument("--forms", action="store_true", help="whole forward passes")
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    timing.use_allocator(args.allocator)
    rows = [
        measure(case, args.rounds, args.forms)
        for case in cases.SPEED
        if case.norm in (args.norm or norms) and not case.small
    ]
    header = ["case", *(f"{name}, ms" for name in [*passes(()), "flax forward"])]
    header += [f"least of {name} / flax" for name in FORMS]
    if args.forms:
        header = ["case, time over flax's forward", *forms((0,)), "flax forward, ms"]
    about = cases.versions("jax", "flax") + f"; float32, {args.rounds} rounds"
    print(
        f"{about}; allocator: {timing.allocator()}",
        cases.table(header, rows),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
