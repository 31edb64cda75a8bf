"""Figures of a comparison as SVG, each for one question: as wide as a page, and readable at a width of 380 pixels.

An arm keeps its colour in all of them; the baseline is grey, and nothing else is. Rows and lines have their names beside them.
Drawing a comparison again gives the same bytes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from orthokit.lab.comparison.comparability import Panel
from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.comparison.metrics import Metric, curve, metric_of
from orthokit.lab.comparison.tuning import VALIDATION
from orthokit.lab.reporting.drawing import (
    Curves,
    Drawing,
    Mark,
    arm_colours,
    bands,
    capital,
    charts,
    curves_of,
    dodge,
    end_label,
    finished,
    grid,
    heading,
    log_axis,
    mark_of,
    names,
    of_panel,
    rows,
    spread_words,
    wrapped,
)
from orthokit.lab.runs.results import Result
from orthokit.plots import own_style

__all__ = ["LABELS", "best", "few", "figures"]

Draw = Callable[[], Drawing | None]
CURVES = 4
"""Most panels with curves; of more, the first, the middle and the last are drawn."""
FILLED = "filled where resolved, hollow where not"
SIDES = {"wide layers": "under", "tall layers": "over"}
"""Which layers, and under which key an epoch has their mean |cosine|."""
LABELS = {
    "fgsm": "L∞ strength, in 1/255",
    "pgd": "L∞ strength, in 1/255",
    "pgd_l2": "L2 strength",
    "noise": "standard deviation",
}
"""Axis label of the strengths of a metric's curve."""


def figures(comparison: Comparison, kinds: Sequence[str] | None = None) -> dict[str, Drawing]:
    """All that there are numbers for. A name is a metric's group, a dash, what is drawn and, if there are more, the panel.

    Args:
        comparison: what they show.
        kinds: draw only figures of these names, whatever the panel, such as ``"orthogonality-training"``.
    """
    with own_style():
        return {
            name: drawing
            for name, draw in _all(comparison)
            if (kinds is None or any(_is_of(kind, name) for kind in kinds)) and (drawing := draw()) is not None
        }


def best(comparison: Comparison, most: int = 4) -> dict[str, Drawing]:
    """The figures that say most, the best one first: one of each kind."""
    kinds = ["result-contrasts", "result-differences", f"orthogonality-{comparison.primary.key}", "orthogonality-training"]
    chosen: dict[str, Drawing] = {}
    with own_style():
        every = dict(_all(comparison))
        for kind in dict.fromkeys([next(iter(every)), *kinds, "tuning"]):
            some = ((name, draw()) for name, draw in every.items() if _is_of(kind, name))
            chosen |= next(({name: drawing} for name, drawing in some if drawing is not None), {})
            if len(chosen) == most:
                break
    return chosen


def _is_of(kind: str, name: str) -> bool:
    return name == kind or name.startswith(f"{kind}-")


def _all(comparison: Comparison) -> Iterator[tuple[str, Draw]]:
    panels, primary, metrics = comparison.panels, comparison.primary, {metric.key: metric for metric in comparison.metrics}
    some = few(panels)
    ends = _ends(panel.name for panel in panels)
    means = (f"result-{primary.key}", partial(_by_panel, comparison, primary))
    differences = ("result-differences", partial(_differences, comparison))
    yield from (differences, means) if len(panels) == 1 else (means, differences)
    yield "result-contrasts", partial(_contrasts, comparison)
    for panel in panels:
        yield f"orthogonality-training{ends[panel.name]}", partial(_training, comparison, panel)
    for panel in panels:
        yield f"orthogonality-{primary.key}{ends[panel.name]}", partial(_trade, comparison, panel)
    for key in LABELS:
        for panel in some if key in metrics else ():
            yield f"robustness-{key}{ends[panel.name]}", partial(_strengths, comparison, panel, metrics[key])
    for name, draw in (("severity", _severities), ("kinds", _kinds)):
        for panel in some if "corruptions" in metrics else ():
            yield f"robustness-{name}{ends[panel.name]}", partial(draw, comparison, panel)
    for key in [key for key, metric in metrics.items() if metric.group == "robustness" and some is not panels]:
        yield f"robustness-{key}", partial(_by_panel, comparison, metrics[key])
    for panel in some if "features" not in comparison.excluded else ():
        yield f"features-rank{ends[panel.name]}", partial(_ranks, comparison, panel)
    for key in ("share", "speed"):
        if key in metrics:
            yield f"cost-{key}", partial(_by_panel, comparison, metrics[key])
    for name, end in _ends(choice.panel for choice in comparison.choices).items():
        yield f"tuning{end}", partial(_tried, comparison, name)


def _ends(panels: Iterable[str]) -> dict[str, str]:
    """Names that tell the figures of different panels apart."""
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
    by_depth = len(panels) > 2 and len(set(depths)) == len(depths) and all(set(p.values) == {"network.depth"} for p in panels)
    where = " by depth" if by_depth else " by panel" if len(panels) > 1 else ""
    caption = f"{capital(metric.label)}{where}: {spread_words(cell for arms in cells.values() for cell in arms.values())}."
    labels = names(comparison)
    means = {
        f"{panel}, {labels[arm]}" if len(panels) > 1 else labels[arm]: metric.show(cell.sample.mean)
        for panel, arms in cells.items()
        for arm, cell in arms.items()
    }
    values = np.array([value for arms in cells.values() for cell in arms.values() for value in cell.sample.values])
    log = metric.group == "orthogonality" and 0 < 100 * values.min() < values.max()
    if by_depth:
        return finished(_lines_by_depth(comparison, metric, panels, values if log else None), caption, means)
    colours = arm_colours(comparison)
    marks = {panel: {labels[arm]: mark_of(colours[arm], cell) for arm, cell in arms.items()} for panel, arms in cells.items()}
    facets = marks if len(comparison.panels) > 1 else {"": next(iter(marks.values()))}
    figure = rows(facets, title=capital(metric.heading), log=list(facets) if log else ())
    if log:
        figure.axes[0].set_xlim(0.7 * values.min(), 1.4 * values.max())  # an interval may reach below 0
    return finished(figure, caption, means)


def _lines_by_depth(comparison: Comparison, metric: Metric, panels: Sequence[Panel], log: Any) -> Any:
    """A line for each arm through its means, with intervals and seeds beside each other."""
    cells, colours, labels = comparison.cells(metric), arm_colours(comparison), names(comparison, 18)
    there = [arm for arm in comparison.arms if any(arm in cells[panel.name] for panel in panels)]
    figure, axes = charts(comparison, there, title=capital(metric.heading))
    for _, arms, axis in axes:
        for arm in arms:
            shift = dodge(arms, arm)
            some = [(place + shift, cells[panel.name][arm]) for place, panel in enumerate(panels) if arm in cells[panel.name]]
            xs, means = [x for x, _ in some], [cell.sample.mean for _, cell in some]
            axis.plot(xs, means, color=colours[arm], marker="o")
            for x, cell in some:
                beside, seeds = x + 0.25 / len(arms), cell.sample.values
                if len(seeds) > 1:
                    look = {"color": colours[arm], "alpha": 0.35, "markeredgewidth": 0}
                    axis.plot([beside] * len(seeds), seeds, "o", markersize=4, **look)
                if cell.sample.interval is not None:
                    axis.vlines(x, *cell.sample.interval, color=colours[arm], linewidth=1.4)
            end_label(axis, xs[-1], means[-1], labels[arm], colours[arm])
        if log is not None:
            log_axis(axis.yaxis, [log])
            axis.set_ylim(0.7 * log.min(), 1.4 * log.max())  # an interval may reach below 0
        axis.set_xticks(range(len(panels)), [str(panel.depth) for panel in panels])
        axis.set_xlim(-0.5, len(panels) - 0.5)
    axes[-1][2].set_xlabel("depth (evenly spaced)")
    return figure


def _differences(comparison: Comparison) -> Drawing | None:
    """The primary metric less the baseline's, with its interval."""
    metric, colours, labels = comparison.primary, arm_colours(comparison), names(comparison)
    several, cells = len(comparison.panels) > 1, comparison.cells(comparison.primary)
    effects = {
        (panel, arm): (cell.difference, cell.verdict)
        for panel, arms in cells.items()
        for arm, cell in arms.items()
        if cell.difference is not None
    }
    if not effects:
        return None
    single = len({arm for _, arm in effects}) == 1
    facets: dict[str, dict[str, Mark]] = {}
    for (panel, arm), (effect, _) in effects.items():
        facet, row = (labels[arm], panel) if single and several else (panel if several else "", labels[arm])
        facets.setdefault(facet, {})[row] = mark_of(colours[arm], effect)
    title = f"{capital(metric.label)} less that of {labels[comparison.baseline]}{', points' * bool(metric.unit)}"
    numbers = {
        f"{panel}, {labels[arm]}" if several else labels[arm]: f"{metric.show(effect.mean, sign=True)} ({verdict})"
        for (panel, arm), (effect, verdict) in effects.items()
    }
    interval = "95% interval of seeds as blocks" if comparison.blocks else "Welch's 95% interval"
    caption = f"Differences from {labels[comparison.baseline]}, with {interval}, not adjusted: {FILLED}."
    return finished(rows(facets, title=title, zero=True), caption, numbers)


def _contrasts(comparison: Comparison) -> Drawing | None:
    """Figure of the mean over all panels, a row for each arm."""
    if not (asked := comparison.contrasts):
        return None
    metric, colours, labels = comparison.primary, arm_colours(comparison), names(comparison)
    points = ", points" * bool(metric.unit)
    facets = {
        f"{each.name}{points}, {each.over}": {labels[arm]: mark_of(colours[arm], effect) for arm, effect in each.answers.items()}
        for each in asked
    }
    what = f"{metric.label} against {labels[comparison.baseline]}, all panels at once"
    figure = rows(facets, title=capital(what), zero=True, shared=False)
    numbers = {
        f"{each.name}, {labels[arm]}": f"{metric.show(effect.mean, sign=True)} ({each.verdict(arm)})"
        for each in asked
        for arm, effect in each.answers.items()
    }
    return finished(figure, f"{capital(what)}, with 95% intervals, not adjusted: {FILLED}.", numbers)


def _training(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Near-orthogonality by epoch."""

    def read(side: str) -> Callable[[Result], Mapping[Any, float]]:
        return lambda result: {row["epoch"]: row[side] for row in result.history if (row.get(side) or 0) > 0}

    sides = {word: curves for word, key in SIDES.items() if (curves := curves_of(panel, read(key)))}
    title = f"Mean |cosine| of two filters{of_panel(comparison, panel)}"
    if not sides:
        return None
    figure, axes = charts(comparison, {arm for curves in sides.values() for arm in curves}, list(sides), title=title)
    for side, arms, axis in axes:
        curves = sides[side]
        bands(axis, curves, [arm for arm in arms if arm in curves], comparison)
        log_axis(axis.yaxis, [values for _, values in curves.values()])
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1][2].set_xlabel("epoch")
    labels = names(comparison)
    last = {
        f"{side}, {labels[arm]}": f"{values[:, -1].mean():.2g} at last"
        for side, curves in sides.items()
        for arm, (_, values) in curves.items()
    }
    caption = (
        f"Mean |cosine| between filters through training{of_panel(comparison, panel)}: mean of seeds, band from least to most."
    )
    return finished(figure, caption, last)


def _trade(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Near-orthogonality and the primary metric side by side, a row for each arm, the most orthogonal one first."""
    across, up = metric_of("under_cos"), comparison.primary
    xs, ys = (comparison.cells(metric).get(panel.name, {}) for metric in (across, up))
    arms = [arm for arm in panel.arms if arm in xs and arm in ys and min(xs[arm].sample.values) > 0]
    if not arms:
        return None
    arms.sort(key=lambda arm: xs[arm].sample.mean)
    colours, labels = arm_colours(comparison), names(comparison)
    least = 0.7 * min(min(xs[arm].sample.values) for arm in arms)  # an interval may reach below 0
    left, right = ({labels[arm]: mark_of(colours[arm], cells[arm]) for arm in arms} for cells in (xs, ys))
    for name, mark in left.items():
        if mark.interval is not None:
            left[name] = mark._replace(interval=(max(least, mark.interval[0]), mark.interval[1]))
    title = f"Near-orthogonality and {up.label}{of_panel(comparison, panel)}"
    same = across.heading == up.heading
    facets = {across.heading: left} if same else {across.heading: left, up.heading: right}
    figure = rows(facets, title=title, log=[across.heading], shared=False)
    if comparison.baseline in arms and not same:
        figure.axes[1].axvline(ys[comparison.baseline].sample.mean, color=colours[comparison.baseline], linestyle="--", lw=1.2)
    points = {labels[arm]: f"{across.show(xs[arm].sample.mean)} and {up.show(ys[arm].sample.mean)}" for arm in arms}
    caption = f"{title}, the most orthogonal arm first: {spread_words(ys[arm] for arm in arms)}."
    return finished(figure, caption, points)


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
    curves = curves_of(panel, read)
    if not curves:
        return None
    title = f"Accuracy {what}{of_panel(comparison, panel)}"
    figure, axes = charts(comparison, curves, title=f"{title}, %")
    ticks = list(dict.fromkeys(x for xs, _ in curves.values() for x in xs))
    for _, arms, axis in axes:
        bands(axis, curves, arms, comparison)
        if log:
            axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}".removeprefix("0") for x in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylim(0, None)
    axes[-1][2].set_xlabel(label)
    labels = names(comparison)
    ends = {labels[arm]: f"{values[:, 0].mean():.1f} to {values[:, -1].mean():.1f}" for arm, (_, values) in curves.items()}
    return finished(figure, f"{title}: mean of seeds, band from least to most.", ends)


def _kinds(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Accuracy by the kind of corruption."""

    def read(result: Result) -> Mapping[Any, float]:
        accuracy = result.parts.get("corruptions", {}).get("accuracy", {})
        return {kind.replace("_", " "): 100 * float(np.mean(values)) for kind, values in accuracy.items()}

    curves = curves_of(panel, read)
    if not curves:
        return None
    colours, labels = arm_colours(comparison), names(comparison)
    facets: dict[str, dict[str, Mark]] = {}
    for arm, (kinds, values) in curves.items():
        for kind, of_seeds in zip(kinds, values.T, strict=True):
            facets.setdefault(kind, {})[labels[arm]] = Mark(colours[arm], float(of_seeds.mean()), seeds=of_seeds.tolist())
    title = f"Accuracy by the kind of corruption{of_panel(comparison, panel)}"
    means = {labels[arm]: f"{values.mean():.1f} on average" for arm, (_, values) in curves.items()}
    return finished(rows(facets, title=f"{title}, %"), f"{title}: mean of severities and seeds, these faint.", means)


def _ranks(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Effective rank of features, stage by stage."""

    def read(result: Result) -> Mapping[Any, float]:
        part = result.parts.get("features", {})
        stages = {**part.get("stages", {}), "penultimate": part.get("penultimate", {})}
        return {
            name: stage["effective_rank"] / stage["features"]
            for name, stage in stages.items()
            if stage.get("features") and stage.get("effective_rank") is not None
        }

    curves = curves_of(panel, read)
    if not curves:
        return None
    stages = list(dict.fromkeys(name for xs, _ in curves.values() for name in xs))
    placed: Curves = {arm: ([stages.index(name) for name in xs], values) for arm, (xs, values) in curves.items()}
    where = of_panel(comparison, panel)
    figure, axes = charts(comparison, curves, title=f"Effective rank of features over their number{where}")
    for _, arms, axis in axes:
        bands(axis, placed, arms, comparison)
        axis.set_xticks(range(len(stages)), [wrapped(stage, 12, 2) for stage in stages])
        axis.set_ylim(0, None)
    labels = names(comparison)
    last = {labels[arm]: f"{values[:, -1].mean():.2f} in {xs[-1]}" for arm, (xs, values) in curves.items()}
    caption = f"Effective rank of features over their number{where}: mean of seeds, band from least to most."
    return finished(figure, caption, last)


def _tried(comparison: Comparison, panel: str) -> Drawing | None:
    """Validation accuracy by the strengths that were tried."""
    choices = {each.arm: each for each in comparison.choices if each.panel == panel and each.arm in comparison.arms}
    if not choices:
        return None
    several = len({choice.panel for choice in comparison.choices}) > 1
    where = f", {panel}" if several else ""
    colours, labels = arm_colours(comparison), names(comparison, 22)
    figure, axes = grid(len(choices), 2.1)
    for axis, (arm, choice) in zip(axes, choices.items(), strict=True):
        x, y = [trial.strength for trial in choice.able], [trial.sample.mean for trial in choice.able]
        axis.errorbar(x, y, choice.error, color=colours[arm], marker="o", markersize=5, elinewidth=1.2)
        axis.plot([choice.chosen.strength], [choice.chosen.sample.mean], "o", color=colours[arm], markersize=12)
        axis.set_title(labels[arm])
        axis.grid(axis="y")
        axis.tick_params(axis="x", labelbottom=True)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        log_axis(axis.xaxis, [np.array([trial.strength for trial in each.trials]) for each in choices.values()], 4)
        axis.xaxis.set_minor_locator(NullLocator())
    heading(figure, f"{capital(VALIDATION.heading)}, by strength{where}")
    chosen = {labels[arm]: f"{choice.chosen.strength:g}" for arm, choice in choices.items()}
    caption = f"Validation accuracy by strength{where}: mean of the tuning seeds, standard error; large: chosen."
    return finished(figure, caption, chosen)


def few(panels: Sequence[Panel]) -> Sequence[Panel]:
    """Those that curves are drawn of."""
    return panels if len(panels) <= CURVES else (panels[0], panels[len(panels) // 2], panels[-1])
