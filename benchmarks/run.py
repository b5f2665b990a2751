"""How long the norms take, beside those of flax, and what memory they need.

    python benchmarks/run.py
    python benchmarks/run.py --quick --norm layer
    python benchmarks/run.py --dtype bfloat16 --json speed.json
    python benchmarks/run.py --allocator default

Both libraries run as Flax modules with Flax's defaults, jitted, in turns: each round
times every one of them once, and the ratio is the median over the rounds of the ratio
within a round. So what slows the machine down for a while slows both. `both` is the
forward pass together with the gradients of x and of the parameters. Timings say whether
a bar is missed, and never fail.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cases
import flax.linen
import jax
import jax.numpy as jnp

import normjax.linen

# Fresh pages for large arrays take longer than a norm does. glibc keeps the memory,
# for every library alike, when told so before the process starts. The two thresholds
# reach its main arena alone: the arenas of other threads hold 64 MiB at most and hand
# back what is larger all the same, so that it takes a single arena to keep all.
_THRESHOLDS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
ALLOCATORS = {
    "keep": _THRESHOLDS | {"MALLOC_ARENA_MAX": "1"},
    "thresholds": _THRESHOLDS,
    "default": {},
}
LIBRARIES = {"flax": flax.linen, "normjax": normjax.linen}
BARS = {  # normjax's time over flax's
    ("layer", "both"): 0.5,
    ("rms", "both"): 0.5,
    ("group", "forward"): 0.35,
    ("batch", "both"): 1.0,
}
IMPORT_BAR = 0.1  # seconds
IMPORT = "import time, jax; t = time.perf_counter(); import normjax; "
IMPORT += "print(time.perf_counter() - t)"


def allocator() -> str:
    """Says which of the allocators this process runs with."""
    return next(k for k, v in ALLOCATORS.items() if v.items() <= os.environ.items())


def use_allocator(name: str) -> None:
    """Starts this process anew with an allocator, where it can."""
    if platform.libc_ver()[0] == "glibc" and allocator() != name:
        others = {k: v for k, v in os.environ.items() if k not in ALLOCATORS["keep"]}
        os.execve(sys.executable, sys.orig_argv, others | ALLOCATORS[name])


def module_of(library: Any, case: cases.Case, dtype: Any) -> Any:
    """Returns the module of a library for a case, with Flax's defaults."""
    return getattr(library, case.module)(dtype=dtype, **case.fields)


def functions(module: Any) -> dict[str, Callable]:
    """What is timed of a module, as functions of (variables, x, cotangent of y)."""

    def forward(variables, x, dy):
        return module.apply(variables, x, mutable=["batch_stats"])

    def both(variables, x, dy):
        def of(params, x):
            return forward(variables | {"params": params}, x, dy)

        y, pull, updates = jax.vjp(of, variables["params"], x, has_aux=True)
        return y, pull(dy), updates

    return {"forward": forward, "both": both}


def seconds(program: Callable, arguments: tuple) -> float:
    """Times one call, to the end of its work."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def interleaved(programs: dict[str, Callable], arguments: tuple, rounds: int) -> dict:
    """Times programs in turns; returns the seconds of each, round by round."""
    times = {name: [] for name in programs}
    for program in programs.values():
        seconds(program, arguments)
    for i in range(rounds):
        for name in sorted(programs, reverse=bool(i % 2)):
            times[name].append(seconds(programs[name], arguments))
    return times


def measure(case: cases.Case, dtype: Any, rounds: int) -> list[dict]:
    """Measures a case, forward and both, and returns a row of figures for each."""
    x_key, dy_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, case.shape, dtype)
    dy = jax.random.normal(dy_key, case.shape, dtype)
    modules = {name: module_of(of, case, dtype) for name, of in LIBRARIES.items()}
    variables = modules["flax"].init(jax.random.key(0), x)
    arguments, rows = (variables, x, dy), []
    for what in ("forward", "both"):
        programs = {
            name: jax.jit(functions(module)[what]).lower(*arguments).compile()
            for name, module in modules.items()
        }
        times = interleaved(programs, arguments, rounds)
        ratios = [a / b for a, b in zip(times["normjax"], times["flax"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        row = {"norm": case.norm, "shape": case.shape, "what": what}
        row |= {"ratio": ratio, "low": low, "high": high}
        for name, program in programs.items():
            temporary = program.memory_analysis().temp_size_in_bytes
            row[f"{name}_ms"] = 1e3 * statistics.median(times[name])
            row[f"{name}_temporary"] = temporary / x.nbytes
        rows.append(row)
    return rows


def import_seconds(rounds: int) -> float:
    """How long normjax takes to import where jax is imported already."""
    command = [sys.executable, "-c", IMPORT]
    root = pathlib.Path(normjax.__file__).parents[1]
    run = (
        subprocess.run(command, capture_output=True, check=True, text=True, cwd=root)
        for _ in range(rounds)
    )
    return statistics.median(float(done.stdout) for done in run)


def verdict(value: float, bar: float | None) -> str:
    """Says how a figure stands to its bar."""
    if bar is None:
        return ""
    return f"{bar}, {'MISSED' if value > bar else 'passed'}"


def cells(row: dict) -> list[str]:
    """Writes a row of figures as cells of the table."""
    return [
        f"{row['norm']} {list(row['shape'])}",
        row["what"],
        f"{row['flax_ms']:.2f}",
        f"{row['normjax_ms']:.2f}",
        f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        verdict(row["ratio"], BARS.get((row["norm"], row["what"]))),
        f"{row['flax_temporary']:.2f}",
        f"{row['normjax_temporary']:.2f}",
    ]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    norms = sorted({case.norm for case in cases.SPEED})
    parser.add_argument("--norm", action="append", choices=norms, help="default: all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--allocator",
        default="keep",
        choices=ALLOCATORS,
        help="keep all memory; set glibc's two thresholds; or set nothing",
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="7 rounds")
    parser.add_argument("--json", type=pathlib.Path, help="also write figures there")
    return parser.parse_args()


def main() -> None:
    """Measures, prints a table, and writes the figures where they are asked for."""
    args = parse()
    use_allocator(args.allocator)
    rounds = 7 if args.quick else args.rounds
    about = cases.versions("jax", "flax") + f"; {args.dtype}, {rounds} rounds"
    about += f"; allocator: {allocator()}"
    rows = []
    for case in cases.SPEED:
        if not args.norm or case.norm in args.norm:
            rows += measure(case, jnp.dtype(args.dtype), rounds)
    took = import_seconds(7)
    ratio, memory = "normjax / flax (quartiles)", "temporaries / x: "
    header = ["case", "pass", "flax ms", "normjax ms", ratio, "bar"]
    header += [memory + "flax", "normjax"]
    print(about, cases.table(header, [cells(row) for row in rows]), sep="\n\n")
    print(f"\nimport normjax after jax: {took:.3f} s (bar {verdict(took, IMPORT_BAR)})")
    if args.json:
        figures = {"about": about, "import_seconds": took, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
