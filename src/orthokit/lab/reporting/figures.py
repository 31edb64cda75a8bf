"""Figures of a comparison as SVG, each for one question, readable at a width of 360 pixels.

An arm keeps its colour, marker and line in all of them; the baseline is grey. Drawing a comparison again gives the same bytes.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from orthokit.lab.comparison.comparability import Panel
from orthokit.lab.comparison.comparison import Cell, Comparison
from orthokit.lab.comparison.inference import Contrast, Difference
from orthokit.lab.comparison.metrics import Metric, curve, metric_of
from orthokit.lab.comparison.tuning import VALIDATION
from orthokit.lab.runs.results import Result
from orthokit.plots import COLOURS

WIDTH = 4.2
"""Inches, of every figure."""
CURVES = 4
"""Of more panels than these, curves are drawn of the first, the middle and the last."""
ROWS = 14
"""More differences than these are drawn in a figure for each panel."""
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

LABELS = {
    "fgsm": "L∞ strength, in 1/255",
    "pgd": "L∞ strength, in 1/255",
    "pgd_l2": "L2 strength",
    "noise": "standard deviation",
}
"""Of the strengths of a metric's curve."""

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


def figures(comparison: Comparison) -> dict[str, Drawing]:
    """All that there are numbers for. A name is a metric's group, a dash, what is drawn and, if there are more, the panel."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        return {name: drawing for name, drawing in _all(comparison) if drawing is not None}


def _all(comparison: Comparison) -> Iterator[tuple[str, Drawing | None]]:
    panels, primary, metrics = comparison.panels, comparison.primary, {metric.key: metric for metric in comparison.metrics}
    some = few(panels)
    ends = _ends(panel.name for panel in panels)
    yield f"result-{primary.key}", _by_panel(comparison, primary)
    for end, those in [("", panels)] if _rows(comparison, panels) <= ROWS else [(ends[p.name], (p,)) for p in panels]:
        yield f"result-differences{end}", _differences(comparison, those)
    yield "result-contrasts", _contrasts(comparison)
    for panel in panels:
        yield f"orthogonality-training{ends[panel.name]}", _training(comparison, panel)
    for panel in panels:
        yield f"orthogonality-{primary.key}{ends[panel.name]}", _trade(comparison, panel)
    for key in LABELS:
        for panel in some if key in metrics else ():
            yield f"robustness-{key}{ends[panel.name]}", _strengths(comparison, panel, metrics[key])
    for name, draw in (("severity", _severities), ("kinds", _kinds)):
        for panel in some if "corruptions" in metrics else ():
            yield f"robustness-{name}{ends[panel.name]}", draw(comparison, panel)
    for key in [key for key, metric in metrics.items() if metric.group == "robustness" and some is not panels]:
        yield f"robustness-{key}", _by_panel(comparison, metrics[key])
    for panel in some if "features" not in comparison.excluded else ():
        yield f"features-rank{ends[panel.name]}", _ranks(comparison, panel)
    for key in ("share", "speed"):
        yield f"cost-{key}", _by_panel(comparison, metrics[key]) if key in metrics else None
    for name, end in _ends(choice.panel for choice in comparison.choices).items():
        yield f"tuning{end}", _tried(comparison, name)


def _ends(panels: Iterable[str]) -> dict[str, str]:
    """What tells the figures of different panels apart."""
    names = list(dict.fromkeys(panels))
    ends = {name: f"-{_slug(name)}" if len(names) > 1 else "" for name in names}
    if len(set(ends.values())) < len(ends):
        ends = {name: f"{end}-{place}" for place, (name, end) in enumerate(ends.items())}
    return ends


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=]+", "_", text).strip("_")


# The figures


def _by_panel(comparison: Comparison, metric: Metric) -> Drawing:
    """A metric of every arm, panel by panel: mean, interval and seeds."""
    cells = comparison.cells(metric)
    panels = [panel for panel in comparison.panels if panel.name in cells]
    depths = [panel.depth for panel in panels]
    by_depth = len(panels) > 1 and len(set(depths)) == len(depths) and all(set(p.values) == {"network.depth"} for p in panels)
    arms = [arm for arm in comparison.arms if any(arm in cells[panel.name] for panel in panels)]
    figure, look = _sheet(comparison, arms)
    axis = figure.subplots()
    for arm in arms:
        there = [(place, cells[panel.name][arm]) for place, panel in enumerate(panels) if arm in cells[panel.name]]
        shift = _dodge(arms, arm)
        if by_depth:
            axis.plot(
                [place + shift for place, _ in there],
                [cell.sample.mean for _, cell in there],
                **look[arm] | {"marker": ""},
                lw=0.8,
            )
        for place, cell in there:
            if cell.sample.n > 1:
                _faint(axis, [place + shift + 0.2 / len(arms)] * cell.sample.n, cell.sample.values, look[arm])
            _mean(axis, place + shift, cell, look[arm])
    _ticks(axis, [str(depth) for depth in depths] if by_depth else [panel.name for panel in panels])
    axis.set(xlim=(-0.5, len(panels) - 0.5), ylabel=metric.heading)
    values = np.array([value for each in cells.values() for cell in each.values() for value in cell.sample.values])
    if metric.group == "orthogonality" and 0 < 100 * values.min() < values.max():
        _log(axis.yaxis, [values])
        axis.set_ylim(0.7 * values.min(), 1.4 * values.max())  # an interval may reach below 0
    axis.grid(visible=False, axis="x")
    for place in range(1, len(panels)):
        axis.axvline(place - 0.5, color="#e8e8e8", linewidth=0.6)
    if by_depth:
        axis.set_xlabel("depth (evenly spaced)")
    where = "by depth" if by_depth else "by panel" if len(panels) > 1 else ""
    what = " ".join(filter(None, [_capital(metric.label), where]))
    means = {
        f"{panel.name}, {arm}" if len(panels) > 1 else arm: metric.show(cell.sample.mean)
        for panel in panels
        for arm, cell in cells[panel.name].items()
    }
    return _drawn(figure, f"{what}: {_spread(cell for panel in panels for cell in cells[panel.name].values())}.", means)


def _rows(comparison: Comparison, panels: Sequence[Panel]) -> int:
    cells = comparison.cells(comparison.primary)
    return sum(cell.difference is not None for panel in panels for cell in cells.get(panel.name, {}).values())


def _differences(comparison: Comparison, panels: Sequence[Panel]) -> Drawing | None:
    """The primary metric less the baseline's, with its interval."""
    metric, cells = comparison.primary, comparison.cells(comparison.primary)
    every = [cell.difference for arms in cells.values() for cell in arms.values() if cell.difference is not None]
    if not _rows(comparison, panels):
        return None
    look = _looks(comparison.arms)
    rows: list[tuple[str, str, str, Cell | None]] = []
    for name in (panel.name for panel in panels):
        found = {arm: cell for arm, cell in cells.get(name, {}).items() if cell.difference is not None}
        rows += [(_wrapped(name, 22, 2), name, "", None)] if len(comparison.panels) > 1 and found else []
        rows += [(_wrapped(arm, 22, 4), name, arm, cell) for arm, cell in found.items()]
    lines = sum(label.count("\n") + 1 for label, *_ in rows)
    figure = Figure(figsize=(WIDTH, max(2.4, 0.9 + 0.16 * lines + 0.05 * len(rows))), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#444444", linewidth=0.9)
    said: dict[str, str] = {}
    places: list[float] = []
    y = 0.0
    for label, panel, arm, cell in rows:
        height = label.count("\n") + 1 + 0.3
        places.append(y + height / 2)
        y += height
        if cell is None or (each := cell.difference) is None:
            continue
        _tested(axis, places[-1], each, look[arm])
        said[f"{panel}, {arm}" if len(panels) > 1 else arm] = f"{metric.show(each.mean, sign=True)} ({cell.verdict})"
    ends = [0.0, *(end for each in every for end in (each.interval or [each.mean]) if np.isfinite(end))]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    axis.set(xlim=(min(ends) - room, max(ends) + room), ylim=(y, 0))
    axis.set_yticks(places, [label for label, *_ in rows], fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    _bare(axis)
    for tick, (_, _, arm, _) in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if arm else "bold")
    label = f"{metric.label} less that of {_short(comparison.baseline, 30)}{', points' * bool(metric.unit)}"
    figure.supxlabel(_wrapped(label, 52, 2), fontsize=9)
    of = f", {panels[0].name}" if len(panels) == 1 < len(comparison.panels) else ""
    interval = "95% interval of seeds as blocks" if comparison.blocks else "Welch's 95% interval"
    caption = f"Differences from the baseline{of}, with {interval}, not adjusted: filled where resolved, hollow where not."
    return _drawn(figure, caption, said)


def _contrasts(comparison: Comparison) -> Drawing | None:
    """What is asked of all panels at once, a row for each arm."""
    if not (asked := comparison.contrasts):
        return None
    metric, look, arms = comparison.primary, _looks(comparison.arms), list(asked[0].found)
    figure = Figure(figsize=(WIDTH, max(2.3, 1 + 0.24 * len(arms))), layout="constrained")
    axes = figure.subplots(1, len(asked), sharey=True, squeeze=False)[0]
    said: dict[str, str] = {}
    for axis, each in zip(axes, asked, strict=True):
        axis.axvline(0, color="#444444", linewidth=0.9)
        for place, (arm, found) in enumerate(each.found.items()):
            _tested(axis, place, found, look[arm])
            said[f"{each.name}, {arm}"] = f"{metric.show(found.mean, sign=True)} ({each.verdict(arm)})"
        _bare(axis)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(_wrapped(f"{each.name}{', points' * bool(metric.unit)}", 44 // len(asked), 2))
        axis.set_title(_wrapped(each.over, 44 // len(asked), 2), fontweight="normal")
    axes[0].set(ylim=(len(arms) - 0.5, -0.5))
    axes[0].set_yticks(range(len(arms)), [_wrapped(arm, 18, 2) for arm in arms], fontsize=8)
    what = f"{metric.label} against {_short(comparison.baseline, 30)}, all panels at once"
    return _drawn(figure, f"{_capital(what)}, with 95% intervals, not adjusted: filled where resolved, hollow where not.", said)


def _training(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Near-orthogonality by epoch."""

    def read(side: str) -> Callable[[Result], Mapping[Any, float]]:
        return lambda result: {row["epoch"]: row[side] for row in result.history if (row.get(side) or 0) > 0}

    sides = {f"{side}-determined": curves for side in ("under", "over") if (curves := _curves(panel, read(side)))}
    arms = [arm for arm in comparison.arms if any(arm in curves for curves in sides.values())]
    if not arms:
        return None
    figure, look = _sheet(comparison, arms)
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, sides.items(), strict=True):
        _lines(axis, curves, look, markers=False)
        axis.set_title(name, fontweight="normal")
        axis.set_xlabel("epoch")
        _log(axis.yaxis, [values for _, values in curves.values()])
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_ylabel("mean |c|")
    _title(figure, comparison, panel)
    last = {
        f"{name}, {arm}": f"{values[:, -1].mean():.2g} at last"
        for name, curves in sides.items()
        for arm, (_, values) in curves.items()
    }
    caption = f"Mean |cosine| between filters through training{_of(comparison, panel)}: mean of seeds, band from least to most."
    return _drawn(figure, caption, last)


def _trade(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Near-orthogonality and the primary metric side by side, a row for each arm, the most orthogonal one first."""
    across, up = metric_of("under_cos"), comparison.primary
    xs, ys = (comparison.cells(metric).get(panel.name, {}) for metric in (across, up))
    arms = [arm for arm in panel.arms if arm in xs and arm in ys and min(xs[arm].sample.values) > 0]
    if not arms:
        return None
    arms.sort(key=lambda arm: xs[arm].sample.mean)
    look, labels = _looks(comparison.arms), [_wrapped(arm, 18, 2) for arm in arms]
    figure = Figure(figsize=(WIDTH, max(2.3, 0.9 + 0.24 * len(arms))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    least = 0.7 * min(min(xs[arm].sample.values) for arm in arms)  # an interval may reach below 0
    for axis, cells in ((left, xs), (right, ys)):
        for place, arm in enumerate(arms):
            sample = cells[arm].sample
            _faint(axis, sample.values, [place] * sample.n, look[arm])
            if sample.interval is not None:
                low, high = sample.interval
                axis.hlines(place, max(least, low) if axis is left else low, high, color=look[arm]["color"], linewidth=1)
            style = look[arm] | {"linestyle": "", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.5}
            axis.plot([sample.mean], [place], **style, zorder=4)
        _bare(axis)
    if comparison.baseline in arms:
        right.axvline(ys[comparison.baseline].sample.mean, color="#999999", linewidth=0.8, linestyle=LINES[1])
    _log(left.xaxis, [np.array(xs[arm].sample.values) for arm in arms])
    left.xaxis.set_minor_locator(NullLocator())
    left.set(ylim=(len(arms) - 0.5, -0.5), xlabel=across.heading)
    left.set_yticks(range(len(arms)), labels, fontsize=8)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set(xlabel=up.heading)
    _title(figure, comparison, panel)
    points = {arm: f"{across.show(xs[arm].sample.mean)} and {up.show(ys[arm].sample.mean)}" for arm in arms}
    caption = (
        f"Near-orthogonality and {up.label}{_of(comparison, panel)}, the most orthogonal arm first: "
        f"{_spread(ys[arm] for arm in arms)}."
    )
    return _drawn(figure, caption, points)


def _strengths(comparison: Comparison, panel: Panel, metric: Metric) -> Drawing | None:
    """Accuracy by the strength of an attack or of noise."""

    def read(result: Result) -> Mapping[Any, float]:
        return {strength: 100 * accuracy for strength, accuracy in curve(metric.key, result).items()}

    what = f"under {metric.label} by its strength"
    return _accuracies(comparison, panel, read, what, LABELS[metric.key], log=metric.part == "attacks")


def _severities(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Accuracy by the severity of corruptions."""

    def read(result: Result) -> Mapping[Any, float]:
        kinds = list(result.parts.get("corruptions", {}).get("accuracy", {}).values())
        return {k: 100 * float(np.mean(each)) for k, each in enumerate(zip(*kinds, strict=False), 1)}

    return _accuracies(comparison, panel, read, "under corruptions by severity, mean of their kinds", "severity", log=False)


def _accuracies(
    comparison: Comparison, panel: Panel, read: Callable[[Result], Mapping[Any, float]], what: str, label: str, *, log: bool
) -> Drawing | None:
    curves = _curves(panel, read)
    if not curves:
        return None
    figure, look = _sheet(comparison, list(curves))
    axis = figure.subplots()
    _lines(axis, curves, look)
    if log:
        axis.set_xscale("log")
    ticks = list(dict.fromkeys(x for xs, _ in curves.values() for x in xs))
    axis.set_xticks(ticks, [f"{x:g}".removeprefix("0") for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=label, ylabel="accuracy, %", ylim=(0, None))
    _title(figure, comparison, panel)
    ends = {arm: f"{values[:, 0].mean():.1f} to {values[:, -1].mean():.1f}" for arm, (_, values) in curves.items()}
    return _drawn(figure, f"Accuracy {what}{_of(comparison, panel)}: mean of seeds, band from least to most.", ends)


def _kinds(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Accuracy by the kind of corruption."""

    def read(result: Result) -> Mapping[Any, float]:
        found = result.parts.get("corruptions", {}).get("accuracy", {})
        return {kind.replace("_", " "): 100 * float(np.mean(values)) for kind, values in found.items()}

    curves = _curves(panel, read)
    if not curves:
        return None
    kinds = list(dict.fromkeys(kind for xs, _ in curves.values() for kind in xs))
    figure, look = _sheet(comparison, list(curves), height=max(2.6, 0.7 + len(kinds) * (0.1 + 0.05 * len(curves))))
    axis = figure.subplots()
    for arm, (xs, values) in curves.items():
        y = [kinds.index(kind) + _dodge(list(curves), arm) for kind in xs]
        axis.plot(values.mean(0), y, **look[arm] | {"linestyle": "", "markersize": 4})
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set(ylim=(len(kinds) - 0.5, -0.5), xlabel="accuracy, %")
    axis.grid(visible=False, axis="y")
    for place in range(1, len(kinds)):
        axis.axhline(place - 0.5, color="#e8e8e8", linewidth=0.6)
    _title(figure, comparison, panel)
    means = {arm: f"{values.mean():.1f} on average" for arm, (_, values) in curves.items()}
    return _drawn(figure, f"Accuracy by the kind of corruption{_of(comparison, panel)}: mean of severities and seeds.", means)


def _ranks(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Effective rank of features, stage by stage."""

    def read(result: Result) -> Mapping[Any, float]:
        part = result.parts.get("features", {})
        stages = {**part.get("stages", {}), "penultimate": part.get("penultimate", {})}
        return {
            name: found["effective_rank"] / found["features"]
            for name, found in stages.items()
            if found.get("features") and found.get("effective_rank") is not None
        }

    curves = _curves(panel, read)
    if not curves:
        return None
    stages = list(dict.fromkeys(name for xs, _ in curves.values() for name in xs))
    figure, look = _sheet(comparison, list(curves))
    axis = figure.subplots()
    for arm, (xs, values) in curves.items():
        x = [stages.index(name) + _dodge(list(curves), arm) / 2 for name in xs]
        for row in values:
            _faint(axis, x, row.tolist(), look[arm])
        axis.plot(x, values.mean(0), **look[arm], markeredgecolor="white", markeredgewidth=0.5)
    _ticks(axis, stages)
    axis.set(ylabel="effective rank / features", xlim=(-0.5, len(stages) - 0.5), ylim=(0, None))
    axis.grid(visible=False, axis="x")
    _title(figure, comparison, panel)
    last = {arm: f"{values[:, -1].mean():.2f} in {xs[-1]}" for arm, (xs, values) in curves.items()}
    caption = f"Effective rank of features as a part of their number{_of(comparison, panel)}: mean of seeds, these faint."
    return _drawn(figure, caption, last)


def _tried(comparison: Comparison, panel: str) -> Drawing | None:
    """Validation accuracy by the strengths that were tried."""
    choices = {each.arm: each for each in comparison.choices if each.panel == panel and each.arm in comparison.arms}
    if not choices:
        return None
    figure, look = _sheet(comparison, list(choices))
    axis = figure.subplots()
    for arm, choice in choices.items():
        aside = 10 ** (0.3 * _dodge(list(choices), arm))
        x, y = [aside * trial.strength for trial in choice.able], [trial.sample.mean for trial in choice.able]
        axis.errorbar(x, y, choice.error, **look[arm] | {"markersize": 3.5}, elinewidth=0.8)
        marked = look[arm] | {"linestyle": "", "markersize": 8, "markeredgecolor": "white"}
        axis.plot([aside * choice.chosen.strength], [choice.chosen.sample.mean], **marked, zorder=4)
    _log(axis.xaxis, [np.array([trial.strength for trial in choice.trials]) for choice in choices.values()])
    axis.set(xlabel="strength", ylabel=VALIDATION.heading)
    several = len({choice.panel for choice in comparison.choices}) > 1
    if several:
        figure.suptitle(_short(panel, 50), x=0.01, ha="left", fontsize=9, fontweight="bold")
    said = {arm: f"{choice.chosen.strength:g}" for arm, choice in choices.items()}
    of = f", {panel}" if several else ""
    return _drawn(figure, f"Validation accuracy by strength{of}: mean of the tuning seeds, standard error; large: chosen.", said)


# What they are made of


def _looks(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each arm, the baseline first."""
    cycles = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {arm: {key: cycle[place % len(cycle)] for key, cycle in cycles.items()} for place, arm in enumerate(arms)}


def _sheet(comparison: Comparison, arms: Sequence[str], height: float = 2.75) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A figure with a legend of ``arms`` below, and how arms look."""
    look, names = _looks(comparison.arms), _shortened(arms)
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


def _curves(panel: Panel, read: Callable[[Result], Mapping[Any, float]]) -> Curves:
    """The values that ``read`` finds in every seed of an arm; arms without are left out."""
    curves: Curves = {}
    for arm, results in panel.arms.items():
        found = [read(result) for result in results]
        if xs := [x for x in found[0] if all(x in each for each in found)]:
            curves[arm] = xs, np.array([[each[x] for x in xs] for each in found], float)
    return curves


def _tested(axis: Any, y: float, found: Difference | Contrast, look: dict[str, Any]) -> None:
    """A row of its interval and mean, filled where resolved."""
    style = look | {"linestyle": "-", "markerfacecolor": look["color"] if found.resolved else "white"}
    axis.plot(found.interval or [found.mean] * 2, [y] * 2, color=style["color"], linewidth=1.5)
    axis.plot([found.mean], [y], **style | {"markersize": 6})


def _bare(axis: Any) -> None:
    """An axis whose rows have names and no lines."""
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def _lines(axis: Any, curves: Curves, look: dict[str, dict[str, Any]], markers: bool = True) -> None:
    for arm, (xs, values) in curves.items():
        axis.fill_between(xs, values.min(0), values.max(0), color=look[arm]["color"], alpha=0.13, linewidth=0)
        axis.plot(xs, values.mean(0), **look[arm] | ({"markersize": 3.5} if markers or len(xs) == 1 else {"marker": ""}))


def _mean(axis: Any, x: float, cell: Cell, look: dict[str, Any]) -> None:
    if cell.sample.interval is not None:
        axis.vlines(x, *cell.sample.interval, color=look["color"], linewidth=1)
    axis.plot([x], [cell.sample.mean], **look | {"linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.5}, zorder=4)


def _faint(axis: Any, xs: Sequence[float], ys: Sequence[float], look: dict[str, Any]) -> None:
    axis.plot(xs, ys, linestyle="", marker="o", markersize=3, color=look["color"], alpha=0.35, markeredgewidth=0)


def _dodge(arms: Sequence[str], arm: str) -> float:
    """How far beside its place an arm is drawn."""
    return min(0.72, 0.12 * len(arms)) * ((list(arms).index(arm) + 0.5) / len(arms) - 0.5)


def _log(axis: Any, values: Sequence[NDArray[np.float64]]) -> None:
    """A logarithmic axis with plain numbers, more of them where the values span little."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 50 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


def _ticks(axis: Any, names: Sequence[str]) -> None:
    """Names below an axis, side by side, or aslant where a word would not fit."""
    width, places = 44 // len(names), range(len(names))
    if all(len(word) <= width for name in names for word in name.split()):
        axis.set_xticks(places, [_wrapped(name, width, 3) for name in names])
    else:
        axis.set_xticks(places, [_short(name, 24) for name in names], rotation=30, ha="right", rotation_mode="anchor", fontsize=8)


def _title(figure: Any, comparison: Comparison, panel: Panel) -> None:
    if len(comparison.panels) > 1:
        figure.suptitle(_short(panel.name, 50), x=0.01, ha="left", fontsize=9, fontweight="bold")


def _of(comparison: Comparison, panel: Panel) -> str:
    return f", {panel.name}" if len(comparison.panels) > 1 else ""


def few(panels: Sequence[Panel]) -> Sequence[Panel]:
    """Those that curves are drawn of."""
    return panels if len(panels) <= CURVES else (panels[0], panels[len(panels) // 2], panels[-1])


def _spread(cells: Iterable[Cell]) -> str:
    return "mean with 95% interval, seeds faint" if any(cell.sample.n > 1 for cell in cells) else "single runs"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(text: str, most: int) -> str:
    """``text`` without its middle, where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _shortened(names: Sequence[str], most: int = 56) -> dict[str, str]:
    """Names that fit a legend and still differ."""
    short = {name: _short(name, most) for name in names}
    if len(set(short.values())) == len(short):
        return short
    return {name: f"{place}: {_short(name, most - 4)}" for place, name in enumerate(names, 1)}


def _wrapped(text: str, width: int, lines: int) -> str:
    """``text`` on a few lines, broken where a name has a joint."""
    found = [""]
    for whole in re.split(r"(?<=[\s=_])|(?=\()", text):
        for piece in (whole[k : k + width] for k in range(0, len(whole), width)):
            found += [""] * (len(found[-1] + piece.rstrip()) > width)
            found[-1] += piece
    found = [line.strip() for line in found]
    return "\n".join(found if len(found) <= lines else [*found[: lines - 1], _short(" ".join(found[lines - 1 :]), width)])


def _drawn(figure: Any, caption: str, numbers: Mapping[str, str], most: int = 10) -> Drawing:
    """The finished figure; ``numbers`` go into its alternative text."""
    file = io.StringIO()
    figure.draw_without_rendering()  # the layout depends on the ticks' labels, and these on the size it gives to the axes
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    some = "; ".join(f"{name} {number}" for name, number in list(numbers.items())[:most])
    # A hundredth of a point is fine enough; more digits (outside of text) and indentation are a third of the file.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), file.getvalue())
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return Drawing(caption, f"{caption} {some}{'; …' * (len(numbers) > most)}", svg)
