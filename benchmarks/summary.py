"""One table from the runs on a CPU and from the programs for a GPU and for TPUs.

    python benchmarks/summary.py docs/speed.json docs/compiled.json

Geometric means of normjax over Flax, by norm, over the shapes of models: of time on a
CPU in float32, of bytes moved on an H100, and of the cycles that the compilers for TPUs
estimate. Below 1, normjax takes less.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Iterable

import cases

NORMS = ("layer", "rms", "batch", "group", "instance")
# What is compared on each target, and the modes of compiled.py.
TARGETS = {"H100": "bytes", "v5e": "cycles", "v6e": "cycles"}
MODES = ("forward", "training", "backward")


def mean(found: Iterable[float | None]) -> str:
    """The geometric mean of what was found, or a dash."""
    known = [ratio for ratio in found if ratio]
    return f"{statistics.geometric_mean(known):.2f}" if known else "–"


def timed(speed: dict, norm: str, what: str, peer: str) -> str:
    """Time over a peer's, on the CPU."""
    return mean(
        row["ratios"].get(peer, {}).get("median")
        for row in speed["rows"]
        if (row["norm"], row["pass"], row["dtype"]) == (norm, what, "float32")
        and not row.get("small")
    )


def compiled(programs: dict, norm: str, target: str, mode: str) -> str:
    """What a target's compiler makes of a norm, over Flax's."""
    figure = TARGETS[target]
    return mean(
        row["of"]["normjax"][figure] / row["of"]["flax"][figure]
        for row in programs["rows"]
        if (row.get("norm"), row["target"], row["mode"]) == (norm, target, mode)
        and row["group"] == "main"
    )


def main(arguments: list[str]) -> None:
    """Prints two tables in Markdown."""
    speed, programs = (json.loads(pathlib.Path(a).read_text()) for a in arguments)
    header = ["time on the CPU over", *NORMS]
    rows = [
        [f"{peer}'s, {name}", *(timed(speed, norm, what, peer) for norm in NORMS)]
        for peer in ("flax", "torch")
        for what, name in (("forward", "forward"), ("both", "forward and backward"))
    ]
    print(cases.table(header, rows), end="\n\n")
    header = ["over Flax's", *NORMS]
    rows = [
        [
            f"{target}, {figure}, {mode}",
            *(compiled(programs, norm, target, mode) for norm in NORMS),
        ]
        for target, figure in TARGETS.items()
        for mode in MODES
    ]
    print(cases.table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
