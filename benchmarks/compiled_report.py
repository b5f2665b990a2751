"""Tables and comparisons of what compiled.py found.

    python benchmarks/compiled_report.py docs/compiled.json docs/compiled.md
    python benchmarks/compiled_report.py docs/compiled.json docs/compiled.png

The first writes the tables into the page, below its mark; the second draws (plot.py).
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

import cases
import programs

MARK = "<!-- What follows is written by benchmarks/compiled_report.py. -->\n"
# What must not grow, and by how much it may: in parts of the old figure, and of x.
# Bytes, kernels and collectives are counts of one program. The rest are plans of a
# compiler: where arrays lie, and how a kernel is cut into blocks, may move a little
# with the order of instructions that mean the same.
SLACK = {
    "bytes": (0, 0),
    "kernels": (0, 0),
    "collectives": (0, 0),
    "kept": (0, 0),
    "temporaries": (0.01, 0.01),
    "cycles": (0.01, 0),
}


def dumped(report: dict) -> str:
    """Writes a report as JSON, a row a line."""
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    about = json.dumps(report["about"])
    return f'{{"about": {about},\n"rows": [\n{rows}\n]}}\n'


def _key(row: dict) -> tuple[str, ...]:
    return row["target"], row["case"], row["dtype"], row["mode"]


def merged(old: dict, new: dict) -> dict:
    """The old report with the rows of the new one in place of its own.

    Raises:
      ValueError: if other versions compiled it.
    """
    if old["about"] != new["about"]:
        raise ValueError(
            "compiled.py: --json adds to a report of the same versions. Got "
            f"{old['about']}; here are {new['about']}. Remove the file first."
        )
    rows = {_key(row): row for row in [*old["rows"], *new["rows"]]}
    return new | {"rows": list(rows.values())}


class Compared(NamedTuple):
    """How a report stands to an older one.

    Attributes:
      worse: lines of figures that grew by more than their slack.
      better: lines of figures that shrank by more.
      same: how many figures did neither.
    """

    worse: list[str]
    better: list[str]
    same: int


def compare(old: dict, new: dict) -> Compared:
    """Compares normjax's figures in the rows that both reports have.

    Raises:
      ValueError: if they have none.
    """
    before = {_key(row): row for row in old["rows"]}
    shared = [row for row in new["rows"] if _key(row) in before]
    if not shared:
        raise ValueError(
            "compiled.py: --compare needs a report that has some of the cases that "
            f"were compiled. Got {len(before)} rows, none of them of these. Write one "
            "with --json."
        )
    found = Compared([], [], 0)
    for row in shared:
        was, now = (r["of"]["normjax"] for r in (before[_key(row)], row))
        for name, (of_old, of_x) in SLACK.items():
            if name not in was or name not in now:
                continue
            slack = of_old * was[name] + of_x * row.get("x_bytes", 0)
            line = f"{', '.join(_key(row))}: {name} {now[name]:,}, were {was[name]:,}"
            if now[name] > was[name] + slack:
                found.worse.append(line)
            elif now[name] < was[name] - slack:
                found.better.append(line)
            else:
                found = found._replace(same=found.same + 1)
    return found


def compared_text(compared: Compared, old: dict, new: dict, name: str) -> str:
    """Writes how a report stands to an older one of this name."""
    lines = []
    if old["about"] != new["about"]:
        lines += [f"\ncompiled by {new['about']};\n{name} by {old['about']}"]
    for title in ("better", "worse"):
        of = getattr(compared, title)
        lines += [f"\n{title} than in {name}: {len(of) or 'nothing'}"]
        lines += [f"- {line}" for line in of]
    return "\n".join([*lines, f"\nthe same: {compared.same} figures"])


def host_text(rows: list[dict], hosted: list[dict]) -> str:
    """Names where normjax is another program if code is told that a CPU is there."""
    mine = {_key(row): row["of"]["normjax"] for row in rows}
    lines = []
    for row in hosted:
        here, there = row["of"]["normjax"], mine[_key(row)]
        if differing := [n for n in SLACK if here.get(n) != there.get(n)]:
            of = (f"{n} {here[n]:,} for {there[n]:,}" for n in differing)
            lines.append(f"- {', '.join(_key(row))}: {', '.join(of)}")
    title = f"\nother where jax.default_backend() is cpu: {len(lines)} of {len(hosted)}"
    return "\n".join([title, *lines])


def _of(peer: str, name: str) -> Callable[[dict], float]:
    return lambda row: row["of"].get(peer, {}).get(name, 0)


def _ratios(
    rows: list[dict], name: str, over: Callable[[dict], float]
) -> tuple[str, str]:
    """Of ratios over rows the geometric mean and the largest, and how many exceed 1.

    A hundredth more does not count.
    """
    found = [_of("normjax", name)(row) / over(row) for row in rows if over(row)]
    if not any(found):
        return "–", "–"
    mean = f"{statistics.geometric_mean(found):.2f} ({max(found):.2f})"
    return mean, f"{sum(ratio > 1.01 for ratio in found)} of {len(found)}"


GROUPS = {
    "main": "models",
    "more": "fused, masked",
    "shapes": "other models",
    "small": "small",
    "synced": "synced",
}


def summary(report: dict) -> str:
    """Geometric means over groups of cases, the largest ratio in brackets."""
    header = ["target", "cases", "mode", "bytes / least", "bytes / Flax's", "more"]
    header += ["/ its safe", "kept / Flax's", "cycles / Flax's", "more", "/ its safe"]
    parts = {}
    for row in report["rows"]:
        if row["group"] in GROUPS:
            key = row["target"], row["group"], row["mode"]
            parts.setdefault(key, []).append(row)
    lines = []
    for (target, group, mode), rows in parts.items():
        least = _ratios(rows, "bytes", lambda r: r["x_bytes"] * r["least"])
        line = [target, GROUPS[group], mode, least[0]]
        for name in ("bytes", "cycles"):
            line += _ratios(rows, name, _of("flax", name))
            line.append(_ratios(rows, name, _of("flax, safe", name))[0])
            if name == "bytes":
                line.append(_ratios(rows, "kept", _of("flax", "kept"))[0])
        lines.append(line)
    return cases.table(header, lines)


def _each(row: dict, form: Callable[[dict], str]) -> str:
    return " / ".join(
        form(row["of"][p]) if p in row["of"] else "–" for p in programs.PEERS
    )


def _moved(row: dict) -> str:
    """Bytes over those of x, and what copies of arguments add where that is seen."""

    def form(of):
        moved, copied = (of[name] / row["x_bytes"] for name in ("bytes", "copied"))
        return f"{moved:.1f}" + (f" + {copied:.1f}" if copied >= 0.05 else "")

    return _each(row, form)


def _counts(row: dict, name: str, unit: float = 1, form: str = ",.0f") -> str:
    return _each(row, lambda of: format(of.get(name, 0) / unit, form))


def detail(rows: list[dict]) -> str:
    """The table of one target: a line for each case, dtype and mode."""
    cycles = any(of["cycles"] for row in rows for of in row["of"].values())
    header = ["case", "dtype", "mode", "least", "bytes / x"]
    header += ["off chip / x"] * cycles + ["kernels", "collectives"]
    header += ["temporaries, MiB", "kept / x"] + ["cycles, thousands"] * cycles
    lines = []
    for row in rows:
        line = [row["case"], row["dtype"], row["mode"], str(row["least"]), _moved(row)]
        line += [_counts(row, "off_chip", row["x_bytes"], ".1f")] if cycles else []
        line.append(_counts(row, "kernels"))
        together = any(of["collectives"] for of in row["of"].values())
        line.append(_counts(row, "collectives") if together else "–")
        line.append(_counts(row, "temporaries", 2**20, ".2f"))
        kept = row["mode"] == "training"
        line.append(_counts(row, "kept", row["x_bytes"], ".1f") if kept else "–")
        line += [_counts(row, "cycles", 1e3, ",.1f")] if cycles else []
        lines.append(line)
    return cases.table(header, lines)


def steps(rows: list[dict]) -> str:
    """The table of whole steps."""
    header = ["target", "step", "GB moved", "/ Flax's", "kernels", "/ Flax's"]
    header += ["temporaries, MiB", "/ Flax's", "cycles, millions", "/ Flax's"]
    units = {"bytes": 1e9, "kernels": 1, "temporaries": 2**20, "cycles": 1e6}
    lines = []
    for row in rows:
        ours, flax = row["of"]["normjax"], row["of"]["flax"]
        line = [row["target"], row["case"]]
        for name, unit in units.items():
            known = ours[name] and flax[name]
            line.append(f"{ours[name] / unit:,.4g}" if known else "–")
            line.append(f"{ours[name] / flax[name]:.2f}" if known else "–")
        lines.append(line)
    return cases.table(header, lines)


def text(report: dict) -> str:
    """Writes a report as tables in Markdown, each under a heading."""
    parts = [report["about"], "## Means\n", summary(report)]
    whole = [row for row in report["rows"] if row["mode"] == "step"]
    if whole:
        parts += ["## Whole steps\n", steps(whole)]
    for target in dict.fromkeys(row["target"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["target"] == target]
        rows = [row for row in rows if row["mode"] != "step"]
        if rows:
            parts += [f"## {target}\n", detail(rows)]
    return "\n\n".join(parts).replace("\n\n\n", "\n\n")


def main() -> None:
    """Reads the JSON, and writes the page's tables or the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=pathlib.Path)
    parser.add_argument(
        "into", type=pathlib.Path, help="a .md with the mark, or a .png"
    )
    args = parser.parse_args()
    report = json.loads(args.json.read_text())
    if args.into.suffix == ".png":
        import plot

        plot.draw_compiled(report, args.into)
        return
    prose, mark, _ = args.into.read_text().partition(MARK)
    if not mark:
        parser.error(f"the page must have the mark. Got {args.into}. Add: {MARK}")
    args.into.write_text(f"{prose}{mark}\n{text(report)}\n")


if __name__ == "__main__":
    main()
