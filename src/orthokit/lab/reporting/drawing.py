"""What the figures of a comparison are made of: looks of arms, axes, rows, labels, and the finished SVG."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from orthokit.lab.comparison.comparability import Panel
from orthokit.lab.comparison.comparison import Cell, Comparison
from orthokit.lab.comparison.inference import Contrast, Difference
from orthokit.lab.runs.results import Result
from orthokit.plots import COLOURS

__all__ = [
    "LINES",
    "STYLE",
    "WIDTH",
    "Drawing",
    "bands",
    "bare",
    "capital",
    "curves_of",
    "dodge",
    "effect_row",
    "finished",
    "log_axis",
    "looks",
    "mean_mark",
    "name_ticks",
    "of_panel",
    "panel_title",
    "seed_marks",
    "sheet",
    "short",
    "shortened",
    "spread_words",
    "wrapped",
]

WIDTH = 4.2
"""Inches, of every figure."""
MARKERS = "osD^vPX"
LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1.2)))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orthokit",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "xtick.color": "#666666",
    "xtick.labelcolor": "#222222",
    "ytick.color": "#666666",
    "ytick.labelcolor": "#222222",
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
}

Curves = dict[str, tuple[list[Any], NDArray[np.float64]]]
"""Arm -> where there are values, and the values, a row for each seed."""


class Drawing(NamedTuple):
    """A figure."""

    caption: str
    alt: str
    """In words, for those who do not see it."""
    svg: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        sides = {side: float(points) for side, points in re.findall(r'\b(width|height)="([\d.]+)pt"', self.svg)}
        return round(sides["width"] * 96 / 72), round(sides["height"] * 96 / 72)


def looks(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each arm, the baseline first."""
    cycles = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {arm: {key: cycle[place % len(cycle)] for key, cycle in cycles.items()} for place, arm in enumerate(arms)}


def sheet(comparison: Comparison, arms: Sequence[str], height: float = 2.75) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A figure with a legend of ``arms`` below, and how arms look."""
    look, names = looks(comparison.arms), shortened(arms)
    columns = max(1, min(len(arms), 60 // (max(map(len, names.values())) + 6)))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(WIDTH, height + 0.17 * rows), layout="constrained")
    figure.legend(
        [Line2D([], [], **look[arm]) for arm in arms],
        [names[arm] for arm in arms],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=2.4,
        labelspacing=0.35,
        columnspacing=1.2,
        borderpad=0.1,
    )
    return figure, look


def curves_of(panel: Panel, read: Callable[[Result], Mapping[Any, float]]) -> Curves:
    """The values that ``read`` finds in every seed of an arm; arms without are left out."""
    curves: Curves = {}
    for arm, results in panel.arms.items():
        found = [read(result) for result in results]
        if xs := [x for x in found[0] if all(x in each for each in found)]:
            curves[arm] = xs, np.array([[each[x] for x in xs] for each in found], float)
    return curves


def effect_row(axis: Any, y: float, found: Difference | Contrast, look: dict[str, Any]) -> None:
    """A row of its interval and mean, filled where resolved."""
    style = look | {"linestyle": "-", "markerfacecolor": look["color"] if found.resolved else "white"}
    axis.plot(found.interval or [found.mean] * 2, [y] * 2, color=style["color"], linewidth=1.5)
    axis.plot([found.mean], [y], **style | {"markersize": 6})


def bare(axis: Any) -> None:
    """An axis whose rows have names and no lines."""
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def bands(axis: Any, curves: Curves, look: dict[str, dict[str, Any]], markers: bool = True) -> None:
    for arm, (xs, values) in curves.items():
        axis.fill_between(xs, values.min(0), values.max(0), color=look[arm]["color"], alpha=0.13, linewidth=0)
        axis.plot(xs, values.mean(0), **look[arm] | ({"markersize": 3.5} if markers or len(xs) == 1 else {"marker": ""}))


def mean_mark(axis: Any, x: float, cell: Cell, look: dict[str, Any]) -> None:
    if cell.sample.interval is not None:
        axis.vlines(x, *cell.sample.interval, color=look["color"], linewidth=1)
    axis.plot([x], [cell.sample.mean], **look | {"linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.5}, zorder=4)


def seed_marks(axis: Any, xs: Sequence[float], ys: Sequence[float], look: dict[str, Any]) -> None:
    axis.plot(xs, ys, linestyle="", marker="o", markersize=3, color=look["color"], alpha=0.35, markeredgewidth=0)


def dodge(arms: Sequence[str], arm: str) -> float:
    """How far beside its place an arm is drawn."""
    return min(0.72, 0.12 * len(arms)) * ((list(arms).index(arm) + 0.5) / len(arms) - 0.5)


def log_axis(axis: Any, values: Sequence[NDArray[np.float64]]) -> None:
    """A logarithmic axis with plain numbers, more of them where the values span little."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 50 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Names below an axis, side by side, or aslant where a word would not fit."""
    width, places = 44 // len(names), range(len(names))
    if all(len(word) <= width for name in names for word in name.split()):
        axis.set_xticks(places, [wrapped(name, width, 3) for name in names])
    else:
        axis.set_xticks(places, [short(name, 24) for name in names], rotation=30, ha="right", rotation_mode="anchor", fontsize=8)


def panel_title(figure: Any, comparison: Comparison, panel: Panel) -> None:
    if len(comparison.panels) > 1:
        figure.suptitle(short(panel.name, 50), x=0.01, ha="left", fontsize=9, fontweight="bold")


def of_panel(comparison: Comparison, panel: Panel) -> str:
    return f", {panel.name}" if len(comparison.panels) > 1 else ""


def spread_words(cells: Iterable[Cell]) -> str:
    return "mean with 95% interval, seeds faint" if any(cell.sample.n > 1 for cell in cells) else "single runs"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def short(text: str, most: int) -> str:
    """``text`` without its middle, where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def shortened(names: Sequence[str], most: int = 56) -> dict[str, str]:
    """Names that fit a legend and still differ."""
    shorter = {name: short(name, most) for name in names}
    if len(set(shorter.values())) == len(shorter):
        return shorter
    return {name: f"{place}: {short(name, most - 4)}" for place, name in enumerate(names, 1)}


def wrapped(text: str, width: int, lines: int) -> str:
    """``text`` on a few lines, broken where a name has a joint."""
    found = [""]
    for whole in re.split(r"(?<=[\s=_])|(?=\()", text):
        for piece in (whole[k : k + width] for k in range(0, len(whole), width)):
            found += [""] * (len(found[-1] + piece.rstrip()) > width)
            found[-1] += piece
    found = [line.strip() for line in found]
    return "\n".join(found if len(found) <= lines else [*found[: lines - 1], short(" ".join(found[lines - 1 :]), width)])


def finished(figure: Any, caption: str, numbers: Mapping[str, str], most: int = 10) -> Drawing:
    """The finished figure; ``numbers`` go into its alternative text."""
    file = io.StringIO()
    figure.draw_without_rendering()  # the layout depends on the ticks' labels, and these on the size it gives to the axes
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    some = "; ".join(f"{name} {number}" for name, number in list(numbers.items())[:most])
    # A hundredth of a point is fine enough; more digits (outside of text) and indentation are a third of the file.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), file.getvalue())
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return Drawing(caption, f"{caption} {some}{'; …' * (len(numbers) > most)}", svg)
