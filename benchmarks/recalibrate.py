"""A sweep of recalibration beside the model's own forward pass in training mode.

    python benchmarks/recalibrate.py
    python benchmarks/recalibrate.py --quick

A ResNet-18 and a network of 1x1 convolutions, in which the norms weigh most, with batch
norms of Flax and of normjax. In turns, in one process: the step of a sweep, and the
compiled call that returns outputs and updated statistics. Beside the speed, the bytes
that each allocates beside its arguments and results.
"""

import argparse
from typing import Any

import cases
import flax.linen as nn
import jax
import timing

import normjax.linen
from normjax.tools.recalibrate import _program, _sweep_of

BAR = 0.9


class Pointwise(nn.Module):
    """Eight 1x1 convolutions, each with its norm."""

    library: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 10]."""
        for _ in range(8):
            x = nn.relu(self.library.BatchNorm(False)(nn.Conv(64, (1, 1))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class ResNet18(nn.Module):
    """A ResNet-18 for images of 32 by 32, https://arxiv.org/abs/1512.03385."""

    library: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 10]."""

        def layer(x, width, size, stride=1):
            x = nn.Conv(width, (size, size), stride, use_bias=False)(x)
            return self.library.BatchNorm(False)(x)

        x = nn.relu(layer(x, 64, 3))
        for i, width in enumerate((64, 128, 256, 512)):
            for stride in (2 if i else 1, 1):
                y = layer(nn.relu(layer(x, width, 3, stride)), width, 3)
                x = layer(x, width, 1, stride) if x.shape != y.shape else x
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


LIBRARIES = {"flax": nn, "normjax": normjax.linen}
MODELS = {
    "ResNet-18": (ResNet18, (32, 32, 32, 3)),
    "ResNet-18, large batch": (ResNet18, (128, 32, 32, 3)),
    "1x1 convolutions": (Pointwise, (64, 32, 32, 3)),
}
QUICK = ("1x1 convolutions",)


def programs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, timing.Program]:
    """The model's forward pass in training mode, and a step of a sweep of it."""
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def apply(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    sweep = _sweep_of(apply, variables, "batch")
    merged = sweep.merged
    with sweep.context():
        step = _program(sweep).lower(merged, sweep.rest, variables, x).compile()

    def sweep_on():
        nonlocal merged
        merged, _, finite = step(merged, sweep.rest, variables, x)
        return merged, finite

    memory = step.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    of_sweep = timing.Program(sweep_on, temporary)
    return {"forward": timing.compiled(apply, variables, x), "sweep": of_sweep}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, fewer rounds")
    args = parser.parse_args()
    rows = []
    for title in QUICK if args.quick else MODELS:
        model, shape = MODELS[title]
        for name, library in LIBRARIES.items():
            of = programs(model(library), shape)
            calls = {what: program.call for what, program in of.items()}
            times = timing.interleaved(calls, 7 if args.quick else 31, 60.0)
            ratio = timing.ratios(times, "forward")["sweep"]
            ms = {what: 1e3 * timing.spread(t)["median"] for what, t in times.items()}
            rows.append(
                [f"{title} {list(shape)}", name, f"{ms['forward']:.1f}"]
                + [f"{ms['sweep']:.1f}", f"{ratio['median']:.2f}"]
                + [f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
                + [f"{(of[w].temporary or 0) / 2**20:.2f}" for w in calls]
            )
    print(cases.versions("jax", "flax"), end="\n\n")
    header = ["model", "norms of", "forward, ms", "sweep, ms", "throughput"]
    header += ["quartiles", "temporaries: forward, MiB", "sweep, MiB"]
    print(cases.table(header, rows))
    print(f"\nThroughput: that of the sweep over that of the forward; bar {BAR}.")


if __name__ == "__main__":
    timing.use_allocator("keep")
    main()
