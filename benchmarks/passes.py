"""What one pass over memory costs: the sums that moments are made of, one by one.

    python benchmarks/passes.py
    python benchmarks/passes.py --norm group

A norm of unsafe variance needs the sums of x and of x**2 and a pass that writes y; one
in two passes the sum of (x - m)**2 instead; the safe one the sum of x - m beside. What
these add up to is the least that a form of the norm can take with XLA's own loops.
"""

import argparse
import math
import statistics

import cases
import jax
import jax.numpy as jnp
import peers
import timing

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


def view(case: cases.Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and axes of sums that are contiguous; a group's are by channel."""
    axes = tuple(a for a in case.axes if a < len(case.shape))
    first, last = min(axes), max(axes) + 1
    before, after = case.shape[:first], case.shape[last:]
    middle = math.prod(case.shape[first:last])
    return (*before, middle, *after), (first,)


def measure(case: cases.Case, rounds: int) -> list[str]:
    """Times the passes, and Flax's forward, in turns; returns a row of the table."""
    x = jax.random.normal(jax.random.key(0), case.shape)
    shape, axes = view(case)
    flat = x.reshape(shape)
    m = jnp.mean(flat, axes, keepdims=True)
    params = {"scale": jnp.ones(case.features), "bias": jnp.zeros(case.features)}
    running = {"mean": params["bias"], "var": params["scale"]}
    running = running if case.norm == "batch" else {}
    forward = peers.PEERS["flax"].build(case, x.dtype)
    functions = passes(axes) | {
        "flax": lambda z, m: forward(params, running, z.reshape(x.shape), True)
    }
    calls = {name: timing.compiled(f, flat, m).call for name, f in functions.items()}
    times = timing.interleaved(calls, rounds)
    took = {name: statistics.median(seconds) for name, seconds in times.items()}
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
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    timing.use_allocator(args.allocator)
    rows = [
        measure(case, args.rounds)
        for case in cases.SPEED
        if case.norm in (args.norm or norms) and not case.small
    ]
    header = ["case", *(f"{name}, ms" for name in [*passes(()), "flax forward"])]
    header += [f"least of {name} / flax" for name in FORMS]
    about = cases.versions("jax", "flax") + f"; float32, {args.rounds} rounds"
    print(
        f"{about}; allocator: {timing.allocator()}",
        cases.table(header, rows),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
