"""Parts of a comparison's figures: colours and names of arms, rows, lines with their names, and the finished SVG."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from orthokit.lab.comparison.comparability import Panel
from orthokit.lab.comparison.comparison import Cell, Comparison
from orthokit.lab.comparison.inference import Contrast, Difference
from orthokit.lab.reporting.words import labels
from orthokit.lab.runs.results import Result
from orthokit.palette import ARMS, BASELINE, GROUND, SOFT, pen
from orthokit.plots import WIDTH, lay_out, svg

__all__ = [
    "Curves",
    "Drawing",
    "Mark",
    "arm_colours",
    "bands",
    "capital",
    "charts",
    "curves_of",
    "dodge",
    "end_label",
    "finished",
    "grid",
    "groups",
    "heading",
    "log_axis",
    "mark_of",
    "names",
    "of_panel",
    "rows",
    "short",
    "shortened",
    "spread_words",
    "wrapped",
]

COLUMNS = 3
"""Axes side by side, at most."""
BESIDE = 1.04
"""Where the name of a line begins, as a part of the width of the axes."""

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


class Mark(NamedTuple):
    """A row of :func:`rows`: a mean, hollow where nothing is resolved, its interval, and the seeds."""

    colour: str
    mean: float
    interval: tuple[float, float] | None = None
    seeds: Sequence[float] = ()
    filled: bool = True


# Arms


def groups(comparison: Comparison, arms: Iterable[str]) -> list[list[str]]:
    """Arms in groups of equal size that have a colour each, the baseline in all of them; its own alone if there is no other."""
    chosen, (baseline, *others) = set(arms), comparison.arms
    size = _size(others)
    parts = [[arm for arm in others[k : k + size] if arm in chosen] for k in range(0, len(others), size)]
    first = [baseline] * (baseline in chosen)
    return [[*first, *part] for part in parts if part] or [first]


def arm_colours(comparison: Comparison) -> dict[str, str]:
    """The colour of each arm in all figures: grey for the baseline; others share one only if they never share an axis."""
    baseline, *others = comparison.arms
    size = _size(others)
    return {baseline: BASELINE} | {arm: ARMS[place % size] for place, arm in enumerate(others)}


def _size(others: Sequence[str]) -> int:
    return -(-len(others) // -(-len(others) // len(ARMS))) if others else 1


def names(comparison: Comparison, most: int = 60) -> dict[str, str]:
    """The label of each arm, no longer than ``most`` and none twice."""
    known = labels(comparison)
    fitting = shortened([known[arm] for arm in comparison.arms], most)
    return dict(zip(comparison.arms, fitting, strict=True))


# Figures of rows


def rows(
    facets: Mapping[str, Mapping[str, Mark]],
    *,
    title: str,
    zero: bool = False,
    log: Sequence[str] = (),
    shared: bool = True,
) -> Any:
    """A figure of axes side by side, in each of them a row for each name.

    Args:
        facets: title of an axis -> name of a row -> what stands there. Every axis has all names.
        title: above all.
        zero: whether there is a line at zero.
        log: axes that are logarithmic.
        shared: whether the axes have one scale.
    """
    order = list(dict.fromkeys(name for facet in facets.values() for name in facet))
    ticks = [wrapped(name, 20, 3) for name in order]
    lines = sum(tick.count("\n") + 1 for tick in ticks)
    heights = np.array([tick.count("\n") + 1 + 0.3 for tick in ticks])
    places = dict(zip(order, np.cumsum(heights) - heights / 2, strict=True))
    figure, axes = grid(len(facets), 0.24 * lines + 0.08 * len(order) + 0.6, sharex=shared)
    for axis, (name, facet) in zip(axes, facets.items(), strict=True):
        if zero:
            axis.axvline(0, color=SOFT, linewidth=1.4)
        for row, mark in facet.items():
            _row(axis, places[row], mark)
        if name in log:
            log_axis(axis.xaxis, [np.array([mark.mean, *mark.seeds]) for mark in facet.values()], 4)
            axis.xaxis.set_minor_locator(NullLocator())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(6 - min(len(axes), COLUMNS)))
        axis.set_title(wrapped(name, 64 // min(len(facets), COLUMNS), 2))
        axis.set_yticks([*places.values()], ticks)
        axis.set_ylim(heights.sum(), 0)
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelbottom=True)
        axis.spines["left"].set_visible(False)
    heading(figure, title)
    return figure


def _row(axis: Any, y: float, mark: Mark) -> None:
    if len(mark.seeds) > 1:
        axis.plot(mark.seeds, [y] * len(mark.seeds), "o", color=mark.colour, markersize=4.5, alpha=0.35, markeredgewidth=0)
    if mark.interval is not None:
        axis.plot(mark.interval, [y] * 2, color=mark.colour)
    look = {"markerfacecolor": mark.colour if mark.filled else GROUND, "markeredgewidth": 1.8}
    axis.plot([mark.mean], [y], "o", color=mark.colour, markersize=9, **look)


def mark_of(colour: str, effect: Difference | Contrast | Cell) -> Mark:
    """The row of an effect, or of a cell's mean."""
    if isinstance(effect, Cell):
        return Mark(colour, effect.sample.mean, effect.sample.interval, effect.sample.values)
    return Mark(colour, effect.mean, effect.interval, filled=effect.resolved)


def grid(count: int, height: float, *, sharex: bool = True) -> tuple[Any, list[Any]]:
    """A figure of so many axes, each ``height`` inches high; never more than a few side by side."""
    columns = next(n for n in (COLUMNS, 2, 1) if count >= n) if count != 4 else 2
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + max(1.2, height) * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=True).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


# Figures of lines


def charts(
    comparison: Comparison, arms: Iterable[str], parts: Sequence[str] = ("",), *, title: str
) -> tuple[Any, list[tuple[str, list[str], Any]]]:
    """A figure of axes below each other for lines with their names: for each part, and for each group of arms.

    Returns:
        the figure, and of each axis its part, its arms and itself.
    """
    asked = [(part, group) for part in parts for group in groups(comparison, arms)]
    figure = Figure(figsize=(WIDTH, 0.5 + (2.7 if len(asked) > 1 else 3.6) * len(asked)), layout="constrained")
    axes = figure.subplots(len(asked), 1, sharex=True, squeeze=False)[:, 0]
    first: dict[str, Any] = {}
    for axis, (part, _) in zip(axes, asked, strict=True):
        if (twin := first.setdefault(part, axis)) is not axis:
            axis.sharey(twin)
        axis.set_title(part)
        axis.grid(axis="y")
        axis.tick_params(axis="x", labelbottom=True)
    heading(figure, title)
    return figure, [(part, group, axis) for axis, (part, group) in zip(axes, asked, strict=True)]


def bands(axis: Any, curves: Curves, arms: Sequence[str], comparison: Comparison) -> None:
    """The mean of each arm's seeds with its name, in a band from the least to the largest."""
    colours, known = arm_colours(comparison), names(comparison, 18)
    for arm in arms:
        xs, values = curves[arm]
        axis.fill_between(xs, values.min(0), values.max(0), color=colours[arm], alpha=0.13, linewidth=0)
        axis.plot(xs, values.mean(0), color=colours[arm], marker="o" if len(xs) < 8 else "", markersize=5)
        end_label(axis, xs[-1], values[:, -1].mean(), known[arm], colours[arm])


class _Tie(Line2D):
    """The line between a curve's right end and its name. An arrow of matplotlib takes longer than all else in a figure."""

    def __init__(self, axis: Any, name: Any, colour: str) -> None:
        look = {"color": colour, "linewidth": 1, "solid_capstyle": "round", "zorder": name.get_zorder()}
        super().__init__([], [], transform=axis.transAxes, **look)
        self.name = name

    def draw_to(self, height: float) -> None:
        """Move the name to a height, a part of that of the axes, and lead there, with 3 points of space at either end."""
        axis = self.name.axes
        self.name.set_position((BESIDE, height))
        ends = np.array([axis.transData.transform(self.name.xy), axis.transAxes.transform((BESIDE, height))])
        space = 3 / 72 * axis.figure.dpi * (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
        self.set_data(*axis.transAxes.inverted().transform(ends + np.array([space, -space])).T)


def end_label(axis: Any, x: float, y: float, text: str, colour: str) -> None:
    """Name a line at its right end; :func:`finished` moves names apart."""
    look = {"color": pen(colour), "va": "center", "annotation_clip": False}
    name = axis.annotate(text, (x, y), (BESIDE, 0.5), textcoords="axes fraction", **look)
    tie = axis.add_artist(_Tie(axis, name, colour))
    tie.set(clip_on=False, in_layout=False)


def _move_apart(axis: Any) -> None:
    """The names of lines: each as near to its line's end as the others allow."""
    if not (ties := [each for each in axis.lines if isinstance(each, _Tie)]):
        return
    axis.get_ylim()  # decides about the limits, unless somebody has
    ends = [float(axis.transAxes.inverted().transform(axis.transData.transform(tie.name.xy))[1]) for tie in ties]
    order = np.argsort(ends, kind="stable")
    points = axis.get_window_extent().height / axis.figure.dpi * 72
    steps = min(1.25 * ties[0].name.get_fontsize() / points, 1 / len(ties)) * np.arange(len(ties))
    heights = isotonic_regression(np.array(ends)[order] - steps).x.clip(0, 1 - steps[-1]) + steps
    for k, height in zip(order, heights, strict=True):
        ties[k].draw_to(float(height))


def curves_of(panel: Panel, read: Callable[[Result], Mapping[Any, float]]) -> Curves:
    """The values that ``read`` finds in every seed of an arm; arms without are left out."""
    curves: Curves = {}
    for arm, results in panel.arms.items():
        of_seeds = [read(result) for result in results]
        if xs := [x for x in of_seeds[0] if all(x in each for each in of_seeds)]:
            curves[arm] = xs, np.array([[each[x] for x in xs] for each in of_seeds], float)
    return curves


def dodge(arms: Sequence[str], arm: str) -> float:
    """Offset of an arm from its place."""
    return min(0.6, 0.1 * len(arms)) * ((list(arms).index(arm) + 0.5) / len(arms) - 0.5)


def log_axis(axis: Any, values: Sequence[NDArray[np.float64]], most: int | None = None) -> None:
    """A logarithmic axis with plain numbers, ``most`` at most, and more of them where the values span little."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 50 else (1,), numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


# Words


def heading(figure: Any, text: str) -> None:
    """Write a figure's title above it."""
    figure.suptitle(wrapped(text, 62, 2), x=0.008, ha="left", fontsize="medium", fontweight="bold")


def of_panel(comparison: Comparison, panel: Panel | str) -> str:
    """Which panel a figure is of, where there are several."""
    name = panel if isinstance(panel, str) else panel.name
    return f", {name}" if len(comparison.panels) > 1 else ""


def spread_words(cells: Iterable[Cell]) -> str:
    """Spread around a mean."""
    return "mean with 95% interval, seeds faint" if any(cell.sample.n > 1 for cell in cells) else "single runs"


def capital(text: str) -> str:
    """``text`` as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def short(text: str, most: int) -> str:
    """``text`` without its middle, where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def shortened(texts: Sequence[str], most: int) -> list[str]:
    """Texts that fit and still differ."""
    shorter = [short(text, most) for text in texts]
    if len(set(shorter)) == len(shorter):
        return shorter
    return [f"{place}: {short(text, most - 4)}" for place, text in enumerate(texts, 1)]


def wrapped(text: str, width: int, lines: int) -> str:
    """``text`` on a few lines, broken where a name has a joint, or where a word is too long for a line."""
    made = [""]
    for word in re.split(r"(?<=[\s=_])|(?=\()", text):
        rest = word
        while len(made[-1] + rest.rstrip()) > width:
            room = width - len(made[-1]) if len(word) > width else 0
            made[-1], rest = made[-1] + rest[:room], rest[room:]
            made.append("")
        made[-1] += rest
    made = [line.strip() for line in made]
    return "\n".join(made if len(made) <= lines else [*made[: lines - 1], short(" ".join(made[lines - 1 :]), width)])


def finished(figure: Any, caption: str, numbers: Mapping[str, str], most: int = 10) -> Drawing:
    """The finished figure; ``numbers`` go into its alternative text."""
    for axis in figure.axes:
        _move_apart(axis)  # about where they will be, so that the layout has room for them
        for each in (axis.xaxis, axis.yaxis):
            if not each.get_label_text():
                each.set_label_coords(0, 0)  # there is none; where it would be by itself takes time to find out
    lay_out(figure)
    for axis in figure.axes:
        _move_apart(axis)
    some = "; ".join(f"{name} {number}" for name, number in list(numbers.items())[:most])
    some += "; …" * (len(numbers) > most)
    return Drawing(caption, f"{caption} {some}", svg(figure, caption, some))
