"""What folding the batch norms of a ResNet-18 is worth on a CPU, and what XLA does.

    python benchmarks/fold.py
    python benchmarks/fold.py --quick

The model and the folded one are timed in turns: as one program that takes the variables
as arguments, as one with the variables as constants, and operation by operation without
jit. Beside the time that a clock shows stands that of the processor, which does not
depend on who else is at work on the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import timing

from normjax import linen, tools

# The shape of x, with how many rounds: ImageNet's images and CIFAR's.
SHAPES = {(1, 224, 224, 3): 40, (1, 32, 32, 3): 100, (32, 224, 224, 3): 3}
QUICK = {(1, 32, 32, 3): 10}


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        """Adds to x, or to a projection of it."""
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(linen.BatchNorm(True)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = linen.BatchNorm(True)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
            x = linen.BatchNorm(True)(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """A ResNet-18 in inference, https://arxiv.org/abs/1512.03385."""

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 1000]."""
        small = x.shape[1] <= 32
        kernel, strides = ((3, 3), 1) if small else ((7, 7), 2)
        x = nn.Conv(64, kernel, strides, use_bias=False)(x)
        x = nn.relu(linen.BatchNorm(True)(x))
        if not small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, features in enumerate((64, 128, 256, 512)):
            x = Block(features, 1 if i == 0 else 2)(x)
            x = Block(features, 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def drawn(model: nn.Module, x: jax.Array) -> Any:
    """Variables of the size of trained ones."""
    rng = np.random.default_rng(0)

    def one(path, a):
        name = jax.tree_util.keystr(path[-1:])
        if "kernel" in name:
            fan_in = np.prod(a.shape[:-1])
            return jnp.asarray(rng.normal(0, fan_in**-0.5, a.shape), a.dtype)
        if "var" in name or "scale" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        return jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(one, shapes)


def in_turns(calls: dict[str, Callable], rounds: int) -> dict[str, list]:
    """The seconds of each call, round by round: of the clock, and of the processor."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list] = {name: [] for name in calls}
    for i in range(rounds):
        for name in sorted(calls, reverse=bool(i % 2)):
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name]())
            end = time.perf_counter(), time.process_time()
            times[name].append((end[0] - start[0], end[1] - start[1]))
    return times


def ratio(slow: list, fast: list, of: int) -> float:
    """The median of the ratios of times, round by round."""
    return statistics.median(a[of] / b[of] for a, b in zip(slow, fast, strict=True))


def contents(program: Any) -> str:
    """How many fusions, convolutions and reciprocal roots a program has."""
    text = program.as_text()
    words = (" fusion(", " convolution(", " rsqrt(")
    return " / ".join(str(text.count(word)) for word in words)


def measure(shape: tuple[int, ...], rounds: int) -> tuple[str, list[list[str]]]:
    """Measures one shape; returns the report of the fold, and rows of the table."""
    model, x = ResNet18(), jax.random.normal(jax.random.key(1), shape)
    variables = drawn(model, x)
    folded = tools.fold(model, variables, x, seconds=0)
    both = {"model": (model.apply, variables), "folded": folded[:2]}
    calls, rows, programs = {}, [], {}
    for name, (apply, of) in both.items():
        given = jax.jit(apply).lower(of, x).compile()
        known = jax.jit(lambda x, f=apply, v=of: f(v, x)).lower(x).compile()
        calls[name, "arguments"] = lambda p=given, v=of: p(v, x)
        calls[name, "constants"] = lambda p=known: p(x)
        programs |= {(name, "arguments"): given, (name, "constants"): known}
        if shape[0] == 1:
            calls[name, "no jit"] = lambda f=apply, v=of: f(v, x)
    times = in_turns(calls, rounds)
    for how in dict.fromkeys(how for _, how in calls):
        slow, fast = times["model", how], times["folded", how]
        row = [f"{list(shape)}", how]
        for of in (slow, fast):
            row.append(f"{1e3 * statistics.median(t[0] for t in of):.1f}")
        row += [f"{ratio(slow, fast, of):.2f}" for of in (0, 1)]
        for name in both:
            program = programs.get((name, how))
            row.append(contents(program) if program else "")
        rows.append(row)
    return str(folded.report).splitlines()[0], rows


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images, few rounds")
    args = parser.parse_args()
    print(cases.versions("jax", "flax"), f"{len(timing.cores())} cores", sep=", ")
    rows = []
    for shape, rounds in (QUICK if args.quick else SHAPES).items():
        line, found = measure(shape, rounds)
        print(f"- {list(shape)}: {line}")
        rows += found
    header = ["x", "variables", "model, ms", "folded, ms", "speed-up", "of processor"]
    header += [f"{n}: fusions / convolutions / rsqrt" for n in ("model", "folded")]
    print(cases.table(header, rows))


if __name__ == "__main__":
    timing.use_allocator("keep")
    main()
