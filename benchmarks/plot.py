"""Draws what run.py wrote: the ratio to each peer by case, and a roofline.

    python benchmarks/plot.py speed.json speed.png

Needs matplotlib, which the extra `examples` has.
"""

import argparse
import json
import pathlib

SHOWN = ("forward", "both", "step")
MARKS = {"forward": "o", "both": "s", "inference": "^", "backward": "v"}


def _ratios(axis, rows):
    """One line for each case and pass, one dot for each peer."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    for i, name in enumerate(names):
        at = [(y, row["ratios"].get(name)) for y, row in enumerate(rows)]
        at = [(y, ratio) for y, ratio in at if ratio]
        medians = [ratio["median"] for _, ratio in at]
        below = [ratio["median"] - ratio["low"] for _, ratio in at]
        above = [ratio["high"] - ratio["median"] for _, ratio in at]
        axis.errorbar(
            medians,
            [y + 0.6 * (i / len(names) - 0.5) for y, _ in at],
            xerr=[below, above],
            fmt="o",
            markersize=3,
            linewidth=0.7,
            color=f"C{i}",
            label=name,
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ticks = [0.1, 0.25, 0.5, 1, 2, 4]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    labels = [f"{row['case']} {row['dtype']}, {row['pass']}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=6)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_xlabel("time of normjax over that of the peer: left of 1 it is faster")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _roofline(axis, rows):
    """Least bytes against the bytes moved a second, beneath a copy's."""
    rows = [row for row in rows if "copy" in row["of"]]
    copies = sorted((r["x_bytes"] / 1e6, r["of"]["copy"]["gb_s"]) for r in rows)
    axis.plot(*zip(*copies, strict=True), ".", color="gray", label="a copy of x")
    for i, norm in enumerate(dict.fromkeys(row["norm"] for row in rows)):
        for what, mark in MARKS.items():
            mine = [r for r in rows if (r["norm"], r["pass"]) == (norm, what)]
            if mine:
                axis.plot(
                    [r["x_bytes"] / 1e6 for r in mine],
                    [r["of"]["normjax"]["gb_s"] for r in mine],
                    mark,
                    markersize=4,
                    color=f"C{i}",
                    label=f"{norm}, {what}",
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("x, MB")
    axis.set_ylabel("least bytes over time, GB/s")
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))


def draw(report: dict, path: pathlib.Path) -> None:
    """Draws a report of run.py into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in report["rows"] if row["pass"] in SHOWN]
    height = 2 + 0.22 * len(shown)
    figure, axes = pyplot.subplots(
        2, figsize=(9, height + 5), height_ratios=[height, 4], layout="constrained"
    )
    _ratios(axes[0], shown)
    if any("copy" in row["of"] for row in report["rows"]):
        _roofline(axes[1], report["rows"])
    figure.suptitle(report["about"].replace("; ", "\n", 1), fontsize=6)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_compiled(report: dict, path: pathlib.Path) -> None:
    """Draws a report of compiled.py into a PNG: bytes over Flax's, of TPUs cycles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in report["rows"] if row["group"] in ("main", "more")]
    names, modes = (
        list(dict.fromkeys(row[key] for row in shown)) for key in ("target", "mode")
    )
    labels = list(dict.fromkeys(f"{row['case']}, {row['dtype']}" for row in shown))
    figure, axes = pyplot.subplots(
        1,
        len(names),
        figsize=(3 + 3 * len(names), 2 + 0.2 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, target in zip(axes[0], names, strict=True):
        what = "bytes" if target == "H100" else "cycles"
        for mode, mark in zip(modes, "osv", strict=True):
            rows = [r for r in shown if (r["target"], r["mode"]) == (target, mode)]
            rows = [row for row in rows if row["of"]["flax"][what]]
            axis.plot(
                [r["of"]["normjax"][what] / r["of"]["flax"][what] for r in rows],
                [labels.index(f"{row['case']}, {row['dtype']}") for row in rows],
                mark,
                markersize=4,
                label=mode,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        ticks = [0.125, 0.25, 0.5, 1, 2, 4]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.3)
        estimated = "" if what == "bytes" else "estimated "
        axis.set_title(f"{target}: {estimated}{what} over Flax's", fontsize=8)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=6)
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(report["about"], fontsize=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Reads the JSON and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=pathlib.Path)
    parser.add_argument("png", type=pathlib.Path)
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png)


if __name__ == "__main__":
    main()
