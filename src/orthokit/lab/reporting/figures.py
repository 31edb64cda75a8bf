"""Figures of a comparison as SVG, each for one question, readable at a width of 360 pixels.

An arm keeps its colour, marker and line in all of them; the baseline is grey. Drawing a comparison again gives the same bytes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from orthokit.lab.comparison.comparability import Panel
from orthokit.lab.comparison.comparison import Cell, Comparison
from orthokit.lab.comparison.metrics import Metric, curve, metric_of
from orthokit.lab.comparison.tuning import VALIDATION
from orthokit.lab.reporting.drawing import (
    LINES,
    STYLE,
    WIDTH,
    Drawing,
    bands,
    bare,
    capital,
    curves_of,
    dodge,
    effect_row,
    finished,
    log_axis,
    looks,
    mean_mark,
    name_ticks,
    of_panel,
    panel_title,
    seed_marks,
    sheet,
    short,
    spread_words,
    wrapped,
)
from orthokit.lab.runs.results import Result

__all__ = ["arm_colours", "best", "few", "figures"]

CURVES = 4
"""Of more panels than these, curves are drawn of the first, the middle and the last."""
ROWS = 14
"""More differences than these are drawn in a figure for each panel."""
LABELS = {
    "fgsm": "L∞ strength, in 1/255",
    "pgd": "L∞ strength, in 1/255",
    "pgd_l2": "L2 strength",
    "noise": "standard deviation",
}
"""Of the strengths of a metric's curve."""


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
    figure, look = sheet(comparison, arms)
    axis = figure.subplots()
    for arm in arms:
        there = [(place, cells[panel.name][arm]) for place, panel in enumerate(panels) if arm in cells[panel.name]]
        shift = dodge(arms, arm)
        if by_depth:
            axis.plot(
                [place + shift for place, _ in there],
                [cell.sample.mean for _, cell in there],
                **look[arm] | {"marker": ""},
                lw=0.8,
            )
        for place, cell in there:
            if cell.sample.n > 1:
                seed_marks(axis, [place + shift + 0.2 / len(arms)] * cell.sample.n, cell.sample.values, look[arm])
            mean_mark(axis, place + shift, cell, look[arm])
    name_ticks(axis, [str(depth) for depth in depths] if by_depth else [panel.name for panel in panels])
    axis.set(xlim=(-0.5, len(panels) - 0.5), ylabel=metric.heading)
    values = np.array([value for each in cells.values() for cell in each.values() for value in cell.sample.values])
    if metric.group == "orthogonality" and 0 < 100 * values.min() < values.max():
        log_axis(axis.yaxis, [values])
        axis.set_ylim(0.7 * values.min(), 1.4 * values.max())  # an interval may reach below 0
    axis.grid(visible=False, axis="x")
    for place in range(1, len(panels)):
        axis.axvline(place - 0.5, color="#e8e8e8", linewidth=0.6)
    if by_depth:
        axis.set_xlabel("depth (evenly spaced)")
    where = "by depth" if by_depth else "by panel" if len(panels) > 1 else ""
    what = " ".join(filter(None, [capital(metric.label), where]))
    means = {
        f"{panel.name}, {arm}" if len(panels) > 1 else arm: metric.show(cell.sample.mean)
        for panel in panels
        for arm, cell in cells[panel.name].items()
    }
    return finished(figure, f"{what}: {spread_words(cell for panel in panels for cell in cells[panel.name].values())}.", means)


def _rows(comparison: Comparison, panels: Sequence[Panel]) -> int:
    cells = comparison.cells(comparison.primary)
    return sum(cell.difference is not None for panel in panels for cell in cells.get(panel.name, {}).values())


def _differences(comparison: Comparison, panels: Sequence[Panel]) -> Drawing | None:
    """The primary metric less the baseline's, with its interval."""
    metric, cells = comparison.primary, comparison.cells(comparison.primary)
    every = [cell.difference for arms in cells.values() for cell in arms.values() if cell.difference is not None]
    if not _rows(comparison, panels):
        return None
    look = looks(comparison.arms)
    rows: list[tuple[str, str, str, Cell | None]] = []
    for name in (panel.name for panel in panels):
        found = {arm: cell for arm, cell in cells.get(name, {}).items() if cell.difference is not None}
        rows += [(wrapped(name, 22, 2), name, "", None)] if len(comparison.panels) > 1 and found else []
        rows += [(wrapped(arm, 22, 4), name, arm, cell) for arm, cell in found.items()]
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
        effect_row(axis, places[-1], each, look[arm])
        said[f"{panel}, {arm}" if len(panels) > 1 else arm] = f"{metric.show(each.mean, sign=True)} ({cell.verdict})"
    ends = [0.0, *(end for each in every for end in (each.interval or [each.mean]) if np.isfinite(end))]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    axis.set(xlim=(min(ends) - room, max(ends) + room), ylim=(y, 0))
    axis.set_yticks(places, [label for label, *_ in rows], fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    bare(axis)
    for tick, (_, _, arm, _) in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if arm else "bold")
    label = f"{metric.label} less that of {short(comparison.baseline, 30)}{', points' * bool(metric.unit)}"
    figure.supxlabel(wrapped(label, 52, 2), fontsize=9)
    of = f", {panels[0].name}" if len(panels) == 1 < len(comparison.panels) else ""
    interval = "95% interval of seeds as blocks" if comparison.blocks else "Welch's 95% interval"
    caption = f"Differences from the baseline{of}, with {interval}, not adjusted: filled where resolved, hollow where not."
    return finished(figure, caption, said)


def _contrasts(comparison: Comparison) -> Drawing | None:
    """What is asked of all panels at once, a row for each arm."""
    if not (asked := comparison.contrasts):
        return None
    metric, look, arms = comparison.primary, looks(comparison.arms), list(asked[0].answers)
    figure = Figure(figsize=(WIDTH, max(2.3, 1 + 0.24 * len(arms))), layout="constrained")
    axes = figure.subplots(1, len(asked), sharey=True, squeeze=False)[0]
    said: dict[str, str] = {}
    for axis, each in zip(axes, asked, strict=True):
        axis.axvline(0, color="#444444", linewidth=0.9)
        for place, (arm, found) in enumerate(each.answers.items()):
            effect_row(axis, place, found, look[arm])
            said[f"{each.name}, {arm}"] = f"{metric.show(found.mean, sign=True)} ({each.verdict(arm)})"
        bare(axis)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(wrapped(f"{each.name}{', points' * bool(metric.unit)}", 44 // len(asked), 2))
        axis.set_title(wrapped(each.over, 44 // len(asked), 2), fontweight="normal")
    axes[0].set(ylim=(len(arms) - 0.5, -0.5))
    axes[0].set_yticks(range(len(arms)), [wrapped(arm, 18, 2) for arm in arms], fontsize=8)
    what = f"{metric.label} against {short(comparison.baseline, 30)}, all panels at once"
    return finished(figure, f"{capital(what)}, with 95% intervals, not adjusted: filled where resolved, hollow where not.", said)


def _training(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Near-orthogonality by epoch."""

    def read(side: str) -> Callable[[Result], Mapping[Any, float]]:
        return lambda result: {row["epoch"]: row[side] for row in result.history if (row.get(side) or 0) > 0}

    sides = {f"{side}-determined": curves for side in ("under", "over") if (curves := curves_of(panel, read(side)))}
    arms = [arm for arm in comparison.arms if any(arm in curves for curves in sides.values())]
    if not arms:
        return None
    figure, look = sheet(comparison, arms)
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, sides.items(), strict=True):
        bands(axis, curves, look, markers=False)
        axis.set_title(name, fontweight="normal")
        axis.set_xlabel("epoch")
        log_axis(axis.yaxis, [values for _, values in curves.values()])
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_ylabel("mean |c|")
    panel_title(figure, comparison, panel)
    last = {
        f"{name}, {arm}": f"{values[:, -1].mean():.2g} at last"
        for name, curves in sides.items()
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
    look, labels = looks(comparison.arms), [wrapped(arm, 18, 2) for arm in arms]
    figure = Figure(figsize=(WIDTH, max(2.3, 0.9 + 0.24 * len(arms))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    least = 0.7 * min(min(xs[arm].sample.values) for arm in arms)  # an interval may reach below 0
    for axis, cells in ((left, xs), (right, ys)):
        for place, arm in enumerate(arms):
            sample = cells[arm].sample
            seed_marks(axis, sample.values, [place] * sample.n, look[arm])
            if sample.interval is not None:
                low, high = sample.interval
                axis.hlines(place, max(least, low) if axis is left else low, high, color=look[arm]["color"], linewidth=1)
            style = look[arm] | {"linestyle": "", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.5}
            axis.plot([sample.mean], [place], **style, zorder=4)
        bare(axis)
    if comparison.baseline in arms:
        right.axvline(ys[comparison.baseline].sample.mean, color="#999999", linewidth=0.8, linestyle=LINES[1])
    log_axis(left.xaxis, [np.array(xs[arm].sample.values) for arm in arms])
    left.xaxis.set_minor_locator(NullLocator())
    left.set(ylim=(len(arms) - 0.5, -0.5), xlabel=across.heading)
    left.set_yticks(range(len(arms)), labels, fontsize=8)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set(xlabel=up.heading)
    panel_title(figure, comparison, panel)
    points = {arm: f"{across.show(xs[arm].sample.mean)} and {up.show(ys[arm].sample.mean)}" for arm in arms}
    caption = (
        f"Near-orthogonality and {up.label}{of_panel(comparison, panel)}, the most orthogonal arm first: "
        f"{spread_words(ys[arm] for arm in arms)}."
    )
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
    figure, look = sheet(comparison, list(curves))
    axis = figure.subplots()
    bands(axis, curves, look)
    if log:
        axis.set_xscale("log")
    ticks = list(dict.fromkeys(x for xs, _ in curves.values() for x in xs))
    axis.set_xticks(ticks, [f"{x:g}".removeprefix("0") for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=label, ylabel="accuracy, %", ylim=(0, None))
    panel_title(figure, comparison, panel)
    ends = {arm: f"{values[:, 0].mean():.1f} to {values[:, -1].mean():.1f}" for arm, (_, values) in curves.items()}
    return finished(figure, f"Accuracy {what}{of_panel(comparison, panel)}: mean of seeds, band from least to most.", ends)


def _kinds(comparison: Comparison, panel: Panel) -> Drawing | None:
    """Accuracy by the kind of corruption."""

    def read(result: Result) -> Mapping[Any, float]:
        found = result.parts.get("corruptions", {}).get("accuracy", {})
        return {kind.replace("_", " "): 100 * float(np.mean(values)) for kind, values in found.items()}

    curves = curves_of(panel, read)
    if not curves:
        return None
    kinds = list(dict.fromkeys(kind for xs, _ in curves.values() for kind in xs))
    figure, look = sheet(comparison, list(curves), height=max(2.6, 0.7 + len(kinds) * (0.1 + 0.05 * len(curves))))
    axis = figure.subplots()
    for arm, (xs, values) in curves.items():
        y = [kinds.index(kind) + dodge(list(curves), arm) for kind in xs]
        axis.plot(values.mean(0), y, **look[arm] | {"linestyle": "", "markersize": 4})
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set(ylim=(len(kinds) - 0.5, -0.5), xlabel="accuracy, %")
    axis.grid(visible=False, axis="y")
    for place in range(1, len(kinds)):
        axis.axhline(place - 0.5, color="#e8e8e8", linewidth=0.6)
    panel_title(figure, comparison, panel)
    means = {arm: f"{values.mean():.1f} on average" for arm, (_, values) in curves.items()}
    return finished(
        figure, f"Accuracy by the kind of corruption{of_panel(comparison, panel)}: mean of severities and seeds.", means
    )


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

    curves = curves_of(panel, read)
    if not curves:
        return None
    stages = list(dict.fromkeys(name for xs, _ in curves.values() for name in xs))
    figure, look = sheet(comparison, list(curves))
    axis = figure.subplots()
    for arm, (xs, values) in curves.items():
        x = [stages.index(name) + dodge(list(curves), arm) / 2 for name in xs]
        for row in values:
            seed_marks(axis, x, row.tolist(), look[arm])
        axis.plot(x, values.mean(0), **look[arm], markeredgecolor="white", markeredgewidth=0.5)
    name_ticks(axis, stages)
    axis.set(ylabel="effective rank / features", xlim=(-0.5, len(stages) - 0.5), ylim=(0, None))
    axis.grid(visible=False, axis="x")
    panel_title(figure, comparison, panel)
    last = {arm: f"{values[:, -1].mean():.2f} in {xs[-1]}" for arm, (xs, values) in curves.items()}
    caption = f"Effective rank of features as a part of their number{of_panel(comparison, panel)}: mean of seeds, these faint."
    return finished(figure, caption, last)


def _tried(comparison: Comparison, panel: str) -> Drawing | None:
    """Validation accuracy by the strengths that were tried."""
    choices = {each.arm: each for each in comparison.choices if each.panel == panel and each.arm in comparison.arms}
    if not choices:
        return None
    figure, look = sheet(comparison, list(choices))
    axis = figure.subplots()
    for arm, choice in choices.items():
        aside = 10 ** (0.3 * dodge(list(choices), arm))
        x, y = [aside * trial.strength for trial in choice.able], [trial.sample.mean for trial in choice.able]
        axis.errorbar(x, y, choice.error, **look[arm] | {"markersize": 3.5}, elinewidth=0.8)
        marked = look[arm] | {"linestyle": "", "markersize": 8, "markeredgecolor": "white"}
        axis.plot([aside * choice.chosen.strength], [choice.chosen.sample.mean], **marked, zorder=4)
    log_axis(axis.xaxis, [np.array([trial.strength for trial in choice.trials]) for choice in choices.values()])
    axis.set(xlabel="strength", ylabel=VALIDATION.heading)
    several = len({choice.panel for choice in comparison.choices}) > 1
    if several:
        figure.suptitle(short(panel, 50), x=0.01, ha="left", fontsize=9, fontweight="bold")
    said = {arm: f"{choice.chosen.strength:g}" for arm, choice in choices.items()}
    of = f", {panel}" if several else ""
    return finished(
        figure, f"Validation accuracy by strength{of}: mean of the tuning seeds, standard error; large: chosen.", said
    )


def few(panels: Sequence[Panel]) -> Sequence[Panel]:
    """Those that curves are drawn of."""
    return panels if len(panels) <= CURVES else (panels[0], panels[len(panels) // 2], panels[-1])


def arm_colours(comparison: Comparison) -> dict[str, str]:
    """The colour of each arm in all figures."""
    return {arm: look["color"] for arm, look in looks(comparison.arms).items()}


def best(names: Iterable[str], comparison: Comparison, most: int = 4) -> list[str]:
    """The figures that say most, the best one first: one of each kind, those of single panels only where there is no other."""
    first = "result-" + ("differences" if len(comparison.panels) == 1 else comparison.primary.key)
    kinds = [first, "result-contrasts", "result-differences", f"orthogonality-{comparison.primary.key}", "orthogonality-training"]
    known = list(names)
    chosen = [next((name for name in known if name == kind or name.startswith(f"{kind}-")), "") for kind in [*kinds, "tuning"]]
    return list(dict.fromkeys(filter(None, chosen)))[:most]
