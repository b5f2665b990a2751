"""What the compilers for a GPU and for TPUs make of the norms; nothing is run or timed.

    make compiled
    make compiled COMPILED=--quick
    make compiled COMPILED="--target H100 --norm layer"
    make compiled COMPILED="--quick --compare docs/compiled.json"
    make compiled COMPILED="--quick --host"
    make compiled COMPILED="--json docs/compiled.json"

Every norm is compiled for devices that are not there (targets.py), beside Flax's with
its fast and its safe variance: forward, training and backward (programs.py). Read from
the program (hlo.py) are the bytes that its kernels move, its kernels and collectives;
told by the compiler are its temporaries and, for a TPU, estimated cycles. Training also
has the bytes that are kept for the backward pass. Whole steps are compiled with
normjax's norms and with Flax's.

These are properties of a program, the same at every run, so a figure that got worse
than in another report fails: `--compare` then exits with 1. Where that is meant, write
the report anew with `--json`.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import compiled_report
import hlo
import jax.numpy as jnp
import programs
import targets

DTYPES = ("bfloat16", "float32")
# The versions that a program depends on.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax")
# All cases where compiling takes a second, fewer where it takes three.
CASES = {
    "H100": ("main", "more", "shapes", "small", "synced"),
    "v5e": ("main", "more", "small", "synced"),
    "v6e": ("main", "synced"),
}
# The compiler for a TPU takes minutes for four convolutions, and for a ViT-B.
STEPS = {
    "H100": tuple(programs.NETWORKS),
    "v5e": ("ViT-B", "decoder block", "U-Net block"),
}
QUICK = ("H100", "v5e")


class Plan(NamedTuple):
    """What is compiled for one target.

    Attributes:
      cases: cases and the names of their dtypes.
      peers: of programs.PEERS.
      steps: of programs.NETWORKS.
    """

    cases: list[tuple[programs.Case, str]]
    peers: tuple[str, ...] = programs.PEERS
    steps: tuple[str, ...] = ()


def planned(
    name: str,
    quick: bool = False,
    norms: list[str] | None = None,
    steps: list[str] | None = None,
) -> Plan:
    """What is compiled for the target of this name.

    Args:
      name: of targets.NAMES.
      quick: a shape of some norms in bfloat16, beside Flax's default alone.
      norms: these alone, without steps that are not named.
      steps: these alone, without norms that are not named; neither names all.

    Returns:
      The plan.
    """
    if quick:
        found = [(case, "bfloat16") for case in programs.QUICK]
    else:
        mine = [case for group in CASES[name] for case in programs.CASES[group]]
        found = [(case, dtype) for dtype in DTYPES for case in mine]
    whole = () if quick else STEPS.get(name, ())
    if norms or steps:
        found = [(case, dtype) for case, dtype in found if case.norm in (norms or ())]
        whole = [step for step in whole if step in (steps or ())]
    peers = programs.PEERS[:2] if quick else programs.PEERS
    return Plan(found, peers, tuple(whole))


def figures(program: Any, kept: int | None = None) -> dict[str, int]:
    """What is known of a compiled program: hlo.Figures, temporaries, bytes kept."""
    found = hlo.figures(program.as_text())._asdict()
    found["temporaries"] = program.memory_analysis().temp_size_in_bytes
    return found if kept is None else found | {"kept": kept}


def _norm(
    target: targets.Target, case: programs.Case, dtype: str, peer: str
) -> dict[str, dict[str, int]]:
    """The figures of a peer's norm by mode; empty if it has none."""
    f = programs.function(peer, case, jnp.dtype(dtype), target.devices)
    if f is None:
        return {}
    inputs = programs.inputs_of(case, jnp.dtype(dtype), target.devices)
    made = programs.compiled(f, inputs)
    try:
        return {mode: figures(program, kept) for mode, program, kept in made}
    except Exception as error:
        error.add_note(f"{peer}, {case.name}, {dtype}, for {target.name}")
        raise


def _step(target: targets.Target, name: str, peer: str) -> dict[str, int]:
    program = programs.step(peer, name, target.platform, target.devices[0])
    return figures(program)


def measure(target: targets.Target, plan: Plan, threads: int) -> list[dict]:
    """Compiles all that is planned for a target, several programs at a time.

    Returns:
      A row for each case, dtype and mode: `of` has the figures by peer, `x_bytes` the
      size of x on each device, `least` what must move in units of it.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        norms = {
            (case, dtype, peer): pool.submit(_norm, target, case, dtype, peer)
            for case, dtype in plan.cases
            for peer in plan.peers
        }
        steps = {
            (name, peer): pool.submit(_step, target, name, peer)
            for name in plan.steps
            for peer in plan.peers
            if peer != "flax, safe"
        }
        for done in concurrent.futures.as_completed([*norms.values(), *steps.values()]):
            if done.exception():
                pool.shutdown(cancel_futures=True)
                raise done.exception()
            print(".", end="", file=sys.stderr, flush=True)
    rows = []
    for case, dtype in plan.cases:
        found = {peer: norms[case, dtype, peer].result() for peer in plan.peers}
        for mode in programs.MODES:
            row = {"target": target.name, "case": case.name, "dtype": dtype}
            row |= {"mode": mode, "norm": case.norm, "group": case.group}
            row |= {"x_bytes": case.x_bytes(dtype), "least": case.least(mode)}
            row["of"] = {peer: of[mode] for peer, of in found.items() if of}
            rows.append(row)
    for name in plan.steps:
        row = {"target": target.name, "case": name, "dtype": "bfloat16", "mode": "step"}
        of = {peer: s.result() for (n, peer), s in steps.items() if n == name}
        rows.append(row | {"norm": "", "group": "step", "of": of})
    return rows


def host_rows(target: targets.Target, plan: Plan, threads: int) -> list[dict]:
    """Rows of normjax as it is compiled where code that asks is told of a CPU."""
    with targets.told("cpu"):
        return measure(target, plan._replace(peers=("normjax",), steps=()), threads)


def about() -> str:
    """Names the versions of `PACKAGES` that are here."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", action="append", choices=targets.NAMES, help="for these alone"
    )
    every = {case.norm for group in programs.CASES.values() for case in group}
    for option, choices in {"--norm": every, "--step": programs.NETWORKS}.items():
        parser.add_argument(
            option,
            action="append",
            choices=sorted(choices),
            help="these alone, and what other options name",
        )
    parser.add_argument(
        "--quick", action="store_true", help="few cases, without the steps and v6e"
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="also compile normjax as where jax.default_backend() is cpu, and name "
        "the figures that differ; by default it says what the target is",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        help="also write figures there, in place of those of the same cases",
    )
    parser.add_argument(
        "--compare",
        type=pathlib.Path,
        help="name what got worse or better than there; exit with 1 if any is worse",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints tables, writes and compares; returns the exit status."""
    args = parse(argv)
    start = time.perf_counter()
    old = json.loads(args.compare.read_text()) if args.compare else None
    rows, hosted = [], []
    for name in args.target or (QUICK if args.quick else targets.NAMES):
        target = targets.target(name)
        plan = planned(name, args.quick, args.norm, args.step)
        with targets.told(target.platform):
            rows += measure(target, plan, args.threads)
        if args.host:
            hosted += host_rows(target, plan, args.threads)
    print(file=sys.stderr)
    if not rows:
        raise ValueError(
            "compiled.py: the options must leave something to compile. Got "
            f"{' '.join(argv or sys.argv[1:])}. Leave out --quick, or name more."
        )
    new = {"about": about(), "rows": rows}
    print(compiled_report.text(new))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if args.json:
        whole = new
        if args.json.exists():
            whole = compiled_report.merged(json.loads(args.json.read_text()), new)
        args.json.write_text(compiled_report.dumped(whole))
    if args.host:
        print(compiled_report.host_text(rows, hosted))
    if old is None:
        return 0
    compared = compiled_report.compare(old, new)
    print(compiled_report.compared_text(compared, old, new, str(args.compare)))
    return 1 if compared.worse else 0


if __name__ == "__main__":
    targets.use_cpu()
    sys.exit(main())
