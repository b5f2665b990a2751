"""How things are timed: the allocator, programs in turns, and their figures."""

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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
LEAST_ROUNDS = 5
SAMPLE = 1e-3  # seconds: shorter programs are called several times a sample


class Program(NamedTuple):
    """What is timed.

    Attributes:
      call: runs it and returns what it computes; it may return before that is there.
      temporary: bytes that it allocates beside its results; None where not known.
      trace_ms: what it took to trace and lower.
      compile_ms: what it took to compile.
    """

    call: Callable[[], Any]
    temporary: int | None = None
    trace_ms: float | None = None
    compile_ms: float | None = None


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def allocator() -> str:
    """Says which of the allocators this process runs with."""
    return next(k for k, v in ALLOCATORS.items() if v.items() <= os.environ.items())


def use_allocator(name: str) -> None:
    """Starts this process anew with an allocator, where it can."""
    if platform.libc_ver()[0] == "glibc" and allocator() != name:
        others = {k: v for k, v in os.environ.items() if k not in ALLOCATORS["keep"]}
        os.execve(sys.executable, sys.orig_argv, others | ALLOCATORS[name])


def compiled(function: Callable, *arguments: Any) -> Program:
    """Compiles a function of JAX for its arguments."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    return Program(
        lambda: program(*arguments),
        getattr(memory, "temp_size_in_bytes", None),
        1e3 * (traced - start),
        1e3 * (end - traced),
    )


def seconds(call: Callable, repeats: int = 1) -> float:
    """Times a call, to the end of its work."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def interleaved(
    calls: dict[str, Callable], rounds: int, allowance: float = float("inf")
) -> dict[str, list[float]]:
    """Times calls in turns; returns the seconds of each, round by round.

    Each round times every call once, in an order of its own, so that what slows the
    machine down for a while slows all, and nobody always comes after the same other.
    After `allowance` seconds no further round is begun, once there are a few.
    """
    once = [min(seconds(call) for _ in range(2)) for call in calls.values()]
    repeats = max(1, min(50, int(SAMPLE / max(once))))
    times = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.perf_counter() + allowance
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name], repeats))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(times: dict[str, list[float]], ours: str = "normjax") -> dict[str, dict]:
    """The time of ours over that of each other, round by round."""
    return {
        name: spread([a / b for a, b in zip(times[ours], theirs, strict=True)])
        for name, theirs in times.items()
        if name != ours
    }


def figures(program: Program, times: list[float]) -> dict[str, Any]:
    """All that was measured of a program, in milliseconds and bytes."""
    ms = spread([1e3 * t for t in times])
    return {
        "ms": ms["median"],
        "low": ms["low"],
        "high": ms["high"],
        "temporary": program.temporary,
        "trace_ms": program.trace_ms,
        "compile_ms": program.compile_ms,
    }
