"""Pictures of what norms see and of what a checkpoint holds, with matplotlib.

Figures are made without pyplot: nothing global changes, and none stays open.
"""

import functools
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from normjax import _check
from normjax.tools.looks import Look, Rate
from normjax.tools.tables import Row

# Colours that readers without red or green tell apart (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _RED, _PINK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
)
_CYCLE = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, "#56B4E9", "#000000")
_MARKS = "os^Dv*P"
# Up to so many layers are named; more are numbered.
_NAMED = 12
_SIZE = (4.5, 2.7)  # inches of a panel; 100 dots each


def plot(
    seen: Sequence[Look] | Mapping[int, Sequence[Look]],
    rates: Sequence[Rate] | None = None,
    *,
    path: str | os.PathLike | None = None,
) -> Any:
    """Draws what the norms of a model see, by layer.

    Panels: mean and spread of each norm's input and output; for batch norms the batch's
    statistics against the running ones, channel by channel; for several steps how far
    each norm's input has drifted; with ``rates`` how far a step turns the weights.

    Args:
      seen: what `look` returned, or {step: what it returned there}, of which the last
        step is drawn by layer.
      rates: what `effective_rates` returned.
      path: where to write the picture too, by its ending as PNG, SVG or PDF.

    Returns:
      A ``matplotlib.figure.Figure``, which a notebook shows.

    Raises:
      ImportError: if matplotlib is not installed.
      FileNotFoundError: if path is in a folder that is not there.
      ValueError: if there is nothing to draw, or the steps saw different norms.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax import tools
      >>> norm = nnx.LayerNorm(2, rngs=nnx.Rngs(0))
      >>> figure = tools.plot(tools.look(norm, jnp.array([[1.0, 3.0]])))
      >>> [axes.get_title(loc="left") for axes in figure.axes]
      ['Input of each norm', 'Output of each norm']
    """
    history = dict(sorted(seen.items())) if isinstance(seen, Mapping) else {0: seen}
    _check_history(history)
    step, looks = list(history.items())[-1]
    names = [one.name for one in looks]

    def spread(which: str) -> Callable:
        means = [getattr(one, f"{which}mean") for one in looks]
        stds = [getattr(one, f"{which}std") for one in looks]
        return lambda axes: _spread(axes, names, means, stds)

    panels = [
        ("Input of each norm", spread("")),
        ("Output of each norm", spread("output_")),
    ]
    if any("shift" in one.channels for one in looks):
        panels += [
            ("Batch mean against running mean", lambda a: _shift(a, names, looks)),
            ("Batch spread against running spread", lambda a: _ratio(a, names, looks)),
        ]
    if len(history) > 1:
        panels.append(("Drift of the input", lambda a: _drift(a, history)))
    if rates:
        panels.append(("Turn of the weights by one step", lambda a: _turn(a, rates)))
        if any(rate.effective is not None for rate in rates):
            panels.append(("Effective learning rate", lambda a: _effective(a, rates)))
    title = f"Step {step}" if isinstance(seen, Mapping) else None
    return _figure("plot", panels, title, path)


def plot_table(rows: Sequence[Row], *, path: str | os.PathLike | None = None) -> Any:
    """Draws the table of a checkpoint's norms: what `norm_table` returns.

    Panels, of those arrays that are there: running mean, running variance, scale and
    bias by layer, from the smallest to the largest with the median.

    Args:
      rows: what `norm_table` returned.
      path: where to write the picture too, by its ending as PNG, SVG or PDF.

    Returns:
      A ``matplotlib.figure.Figure``, which a notebook shows.

    Raises:
      ImportError: if matplotlib is not installed.
      FileNotFoundError: if path is in a folder that is not there.
      ValueError: if there are no rows.

    Example:
      >>> import numpy as np
      >>> from normjax import tools
      >>> norm = {"scale": np.ones(3), "bias": np.zeros(3)}
      >>> figure = tools.plot_table(tools.norm_table({"params": {"LayerNorm_0": norm}}))
      >>> [axes.get_title(loc="left") for axes in figure.axes]
      ['Scale', 'Bias']
    """
    titles = {
        "mean": "Running mean",
        "var": "Running variance",
        "scale": "Scale",
        "bias": "Bias",
    }
    names = [row.name for row in rows]

    def ranges(which: str) -> Callable:
        return lambda axes: _ranges(axes, names, rows, which)

    panels = [
        (title, ranges(which))
        for which, title in titles.items()
        if any(getattr(row, which) is not None for row in rows)
    ]
    return _figure("plot_table", panels, None, path)


def _check_history(history: dict[int, Sequence[Look]]) -> None:
    """Refuses steps that saw different norms."""
    if not history or not any(history.values()):
        raise _check.error(
            ValueError,
            "plot",
            "there must be something to draw",
            "nothing seen",
            "Pass what look returned, or {step: what it returned}",
        )
    (first, looks), *others = history.items()
    names = {one.name for one in looks}
    for step, other in others:
        if differ := names ^ {one.name for one in other}:
            raise _check.error(
                ValueError,
                "plot",
                "all steps must have seen the same norms",
                f"{min(differ)} in one of the steps {first} and {step} alone",
                "Look at one model in one way at all steps",
            )


@np.errstate(all="ignore")  # what is not finite is told, and not warned of
def _figure(name: str, panels: list, title: str | None, path: Any) -> Any:
    """Lays out panels, (title, what draws it), in two columns, and writes them."""
    if not panels:
        raise _check.error(
            ValueError,
            name,
            "there must be something to draw",
            "no norms",
            "Pass the rows that norm_table found in a checkpoint's variables",
        )
    rows, columns = (len(panels) + 1) // 2, 2
    size = (columns * _SIZE[0], rows * _SIZE[1] + 0.3)
    figure = _picture(name)(figsize=size, dpi=100, layout="constrained")
    for i, (heading, draw) in enumerate(panels):
        alone = i == len(panels) - 1 and i % 2 == 0  # takes the whole last row
        axes = figure.add_subplot(rows, columns, (i + 1, i + 1 + alone))
        draw(axes)
        axes.set_title(heading, loc="left", fontsize=10, fontweight="bold")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    if path is not None:
        _write(name, figure, pathlib.Path(path))
    return figure


@functools.cache
def _picture(name: str) -> Any:
    """The class of matplotlib's figures that a notebook shows without pyplot, too."""
    figure = _check.needed(name, "matplotlib", "matplotlib.figure").Figure
    return type("Figure", (figure,), {"_repr_png_": _png})


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _write(name: str, figure: Any, path: pathlib.Path) -> None:
    """Writes a picture whole, or not at all."""
    if not path.parent.is_dir():
        raise _check.error(
            FileNotFoundError,
            name,
            "path must be in a folder that is there",
            f"path={str(path)!r}",
            f"Make the folder {str(path.parent)!r} first",
        )
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        figure.savefig(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _bars(axes: Any, names: list, low: Any, high: Any, middle: Any, at: Any) -> None:
    """A bar from low to high with a dot in it at each place; a cross where not finite.

    ``names`` are those of all places; ``at`` says which ones the bars are of.
    """
    width = min(7.0, max(1.5, 160 / len(names)))
    axes.vlines(at, low, high, color=_BLUE, alpha=0.35, linewidth=width)
    axes.plot(at, middle, "o", color="black", markersize=min(4, 1 + width / 2))
    finite = np.isfinite([low, high, middle]).all(0)
    if not finite.all():
        _cross(axes, np.asarray(at)[~finite])
    _layers(axes, names)


def _cross(axes: Any, at: Any, label: str = "not finite") -> None:
    """Marks layers that have no place on the scale, at the foot."""
    axes.plot(
        at,
        [0.03] * len(at),
        "X",
        color=_RED,
        transform=axes.get_xaxis_transform(),
        label=label,
        clip_on=False,
    )
    axes.legend(fontsize=7, frameon=False)


def _logarithmic(axes: Any, values: Any, factor: float) -> None:
    """A logarithmic scale where values above zero differ by more than a factor."""
    finite = np.asarray(values)[np.isfinite(values)]
    if finite.size and finite.max() > factor * finite.min() > 0:
        axes.set_yscale("log", subs=())
        if finite.max() < 100 * finite.min():
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")


def _linear_near_zero(axes: Any, sizes: Any) -> None:
    """A scale that is logarithmic beyond the usual size, if some are far beyond it."""
    finite = np.asarray(sizes)[np.isfinite(sizes)]
    if finite.size and 0 < np.median(finite) < finite.max() / 10:
        axes.set_yscale("symlog", linthresh=float(np.median(finite)))


def _layers(axes: Any, names: list[str], what: str = "norm") -> None:
    """Names the layers along x where they are few, or numbers them."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    if len(names) > _NAMED:
        axes.set_xlabel(f"{what}, by number from 0", fontsize=8)
        return
    short = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right")


def _short(name: str) -> str:
    """The end of a long name, which tells more than its start."""
    return name if len(name) <= 22 else "…" + name[-21:]


def _spread(axes: Any, names: list, means: list, stds: list) -> None:
    mean, std = np.array(means), np.array(stds)
    _bars(axes, names, mean - std, mean + std, mean, range(len(names)))
    axes.set_ylabel("mean ± standard deviation", fontsize=8)
    axes.axhline(0, color="0.6", linewidth=0.8)
    _linear_near_zero(axes, np.abs(mean) + std)


def _quantiles(looks: Sequence[Look], which: str) -> np.ndarray:
    """The 5, 50 and 95 % quantiles over channels by layer; NaN for what has none."""
    nothing = np.full(1, np.nan)
    rows = [one.channels.get(which, nothing) for one in looks]
    return np.array([np.quantile(row, (0.05, 0.5, 0.95)) for row in rows]).T


def _shift(axes: Any, names: list, looks: Sequence[Look]) -> None:
    low, middle, high = _quantiles(looks, "shift")
    _of_batch_norms(axes, names, looks, low, high, middle)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("difference, running std\n90 % of channels", fontsize=8)


def _ratio(axes: Any, names: list, looks: Sequence[Look]) -> None:
    low, middle, high = _quantiles(looks, "ratio")
    _of_batch_norms(axes, names, looks, low, high, middle)
    axes.axhline(1, color="0.3", linewidth=0.8)
    _logarithmic(axes, [low, high], 3)
    axes.set_ylabel("batch std / running std\n90 % of channels", fontsize=8)


def _of_batch_norms(axes, names, looks, low, high, middle) -> None:
    """Bars of the batch norms alone, at the places that they have among all norms."""
    at = [i for i, one in enumerate(looks) if "shift" in one.channels]
    _bars(axes, names, low[at], high[at], middle[at], at)


def drift(history: Mapping[int, Sequence[Look]]) -> dict[str, np.ndarray]:
    """How far each norm's input has moved since the first step, in its spreads then.

    The root mean square over the channels of ``(mean - first mean) / first std``;
    channels that did not vary at the first step are left out.
    """
    moved: dict[str, list[float]] = {}
    first = {one.name: one.channels for one in next(iter(history.values()))}
    for looks in history.values():
        for one in looks:
            mean, std = first[one.name]["mean"], first[one.name]["std"]
            varied = std > 0
            z = (one.channels["mean"] - mean)[varied] / std[varied]
            size = float(np.sqrt(np.mean(z**2))) if varied.any() else np.nan
            moved.setdefault(one.name, []).append(size)
    return {name: np.array(values) for name, values in moved.items()}


def _drift(axes: Any, history: dict[int, Sequence[Look]]) -> None:
    lines = drift(history)
    few = len(lines) <= len(_CYCLE)
    colours = _CYCLE if few else _by_depth(axes, len(lines))
    for i, (name, values) in enumerate(lines.items()):
        mark = {"marker": _MARKS[i], "markersize": 4} if few else {"linewidth": 1}
        axes.plot(list(history), values, color=colours[i], label=_short(name), **mark)
    _linear_near_zero(axes, np.stack(list(lines.values()))[:, 1:])
    if few:  # beside the lines, which leave no corner free for sure
        axes.legend(
            fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    axes.set_xlabel("step", fontsize=8)
    first = next(iter(history))
    axes.set_ylabel(f"from step {first}, its std then", fontsize=8)


def _by_depth(axes: Any, size: int) -> Any:
    """A colour for each of many layers, with the bar that tells which."""
    colormaps = _check.needed("plot", "matplotlib", "matplotlib").colormaps
    cm = _check.needed("plot", "matplotlib", "matplotlib.cm")
    colors = _check.needed("plot", "matplotlib", "matplotlib.colors")
    scale = cm.ScalarMappable(colors.Normalize(0, size - 1), colormaps["viridis"])
    bar = axes.figure.colorbar(scale, ax=axes)
    bar.set_label("norm, by number", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return [scale.to_rgba(i) for i in range(size)]


def _turn(axes: Any, rates: Sequence[Rate]) -> None:
    _dots(axes, rates, [rate.relative for rate in rates])
    axes.set_ylabel("|update| / |weights|", fontsize=8)


def _effective(axes: Any, rates: Sequence[Rate]) -> None:
    _dots(axes, rates, [rate.effective for rate in rates])
    axes.set_ylabel("learning rate / |weights|²", fontsize=8)


def _dots(axes: Any, rates: Sequence[Rate], values: list) -> None:
    """A dot for each array of weights."""
    y = np.array([np.nan if v is None else v for v in values])
    at = np.arange(len(y))
    moved = np.isfinite(y) & (y > 0)
    axes.plot(at[moved], y[moved], "o", color=_BLUE, markersize=min(5, 1 + 80 / len(y)))
    _logarithmic(axes, y[moved], 3)
    for which, label in ((y == 0, "not moved"), (~np.isfinite(y), "not finite")):
        if which.any():
            _cross(axes, at[which], label)
    _layers(axes, [rate.name for rate in rates], "weights")


def _ranges(axes: Any, names: list, rows: Sequence[Row], which: str) -> None:
    """Bars from smallest to largest, of the rows that have such an array."""
    of = [getattr(row, which) for row in rows]
    at = [i for i, found in enumerate(of) if found is not None]
    low, middle, high = np.array([of[i] for i in at], float).T
    _bars(axes, names, low, high, middle, at)
    axes.set_ylabel("smallest, median, largest", fontsize=8)
    if which == "var":
        _logarithmic(axes, [low, high], 10)
