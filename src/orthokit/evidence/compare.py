"""Comparisons: arms against a baseline, in panels of equal networks and data, from what finished runs left.

An *arm* is what the runs of one value of the declared factor have in common (by default the factor is ``regularizer``), a *panel*
what is compared within: runs of equal ``network`` and ``data.name``. Within a panel the arms must differ in the factor alone.
Results are those of the last epoch.
"""

import itertools
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import Template
from typing import Any, TypeVar

from orthokit.config import penalty_of
from orthokit.evidence.fairness import Panel, flags, incomparable, plain, refusals, repeated, under
from orthokit.evidence.results import COST, MEASURED, METRICS, Metric, Result, metric_of
from orthokit.evidence.statistics import (
    ALPHA,
    POWER,
    Contrast,
    Difference,
    Sample,
    contrast,
    detectable,
    differences,
    holm,
    intraclass,
    per_doubling,
    pooled_sd,
    seeds_needed,
)
from orthokit.evidence.tuning import Choice
from orthokit.lab.recipe import Recipe

Key = TypeVar("Key", bound=Hashable)
FACTOR = ("regularizer",)
PANELS = ("network", "data.name")
WORDS = {1: ("better", "worse"), 0: ("higher", "lower"), -1: ("worse", "better")}
"""Of differences above 0, and below, by what is better of a metric."""
UNEVEN = 1.5
"""Factor by which the speeds of an arm's runs may differ without a word."""


@dataclass(frozen=True)
class Cell:
    """A metric of an arm in a panel."""

    sample: Sample
    difference: Difference | None = None
    """From the baseline; None of the baseline itself, and where there is none."""
    verdict: str = ""
    """``better``, ``worse`` or ``not resolved``; ``higher`` or ``lower`` where neither is a merit; empty without a difference."""


@dataclass(frozen=True)
class Contrasts:
    """A question that is put to all panels at once, and what each arm answers."""

    name: str
    over: str
    """Which panels."""
    words: tuple[str, str]
    """For what is above 0, and below."""
    found: dict[str, Contrast]

    @property
    def title(self) -> str:
        """What is asked, and of which panels."""
        return f"{self.name}, {self.over}"

    def verdict(self, arm: str) -> str:
        """In a word, or ``not resolved``."""
        return _verdict(self.found[arm], self.words)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Arms against a baseline, in one or more panels."""

    title: str
    baseline: str
    panels: tuple[Panel, ...]
    factor: tuple[str, ...] = FACTOR
    primary: Metric = METRICS[0]
    """What verdicts go by; all others are secondary."""
    flags: tuple[str, ...] = ()
    """What a reader must know before believing any of it."""
    excluded: tuple[str, ...] = ()
    """Parts of evaluations that do not compare."""
    choices: tuple[Choice, ...] = ()
    """How the strengths of a study's arms were chosen."""

    @cached_property
    def arms(self) -> list[str]:
        """Of all panels, the baseline first."""
        return list(dict.fromkeys([self.baseline, *(arm for panel in self.panels for arm in panel.arms)]))

    @cached_property
    def metrics(self) -> list[Metric]:
        """Those that there are numbers of."""
        return [metric for metric in METRICS if self.cells(metric)]

    def cells(self, metric: Metric) -> dict[str, dict[str, Cell]]:
        """Panel -> arm -> cell of a metric; p-values are adjusted over all of them. Arms without numbers are left out."""
        if metric.key not in self._cells:
            self._cells[metric.key] = {} if metric.part in self.excluded else self._compared(metric)
        return self._cells[metric.key]

    @cached_property
    def _cells(self) -> dict[str, dict[str, dict[str, Cell]]]:
        return {}

    def _compared(self, metric: Metric) -> dict[str, dict[str, Cell]]:
        cells: dict[str, dict[str, Cell]] = {}
        found: dict[tuple[str, str], Difference] = {}
        for panel in self.panels:
            read = {arm: [metric.read(result) for result in results] for arm, results in panel.arms.items()}
            samples = {
                arm: Sample(tuple(v for v in values if v is not None)) for arm, values in read.items() if None not in values
            }
            if samples:
                cells[panel.name] = {arm: Cell(sample) for arm, sample in samples.items()}
            if self.baseline in samples and metric.group != "cost":  # machines and their load differ
                found |= {(panel.name, arm): each for arm, each in differences(samples, self.baseline).items()}
        adjusted = _adjusted({key: each.welch for key, each in found.items()})
        for (name, arm), each in found.items():
            each = replace(each, holm=adjusted.get((name, arm)))
            cells[name][arm] = Cell(cells[name][arm].sample, each, _verdict(each, WORDS[metric.better]))
        return cells

    def cell(self, metric: Metric, panel: str, arm: str) -> Cell | None:
        """One cell, if there is."""
        return self.cells(metric).get(panel, {}).get(arm)

    def comparisons(self, metric: Metric) -> int:
        """How many tests the adjustment of a metric is over."""
        every = [cell.difference for arms in self.cells(metric).values() for cell in arms.values()]
        return sum(each is not None and each.welch is not None for each in every)

    def _titled(self, panel: str) -> str:
        return f"{panel}: " if len(self.panels) > 1 else ""

    def told(self) -> dict[str, list[tuple[str, str]]]:
        """The primary metric's result, of all panels at once and of each: verdict and sentence of each arm."""
        said: dict[str, list[tuple[str, str]]] = {}
        for asked in self.contrasts:
            for arm, each in asked.found.items():
                said.setdefault(asked.title, []).append(self._told(arm, asked.verdict(arm), each))
        for panel, arms in self.cells(self.primary).items():
            for arm, cell in arms.items():
                if cell.difference is not None:
                    verdict, sentence = self._told(arm, cell.verdict, cell.difference)
                    said.setdefault(panel, []).append((verdict, f"{sentence}, n = {cell.sample.n}"))
        return said

    def _told(self, arm: str, verdict: str, found: Difference | Contrast) -> tuple[str, str]:
        show = self.primary.show
        told = f"is {verdict} than" if verdict in itertools.chain(*WORDS.values()) else f"{verdict} against"
        told = f"{told} {self.baseline}" if found.resolved else f"against {self.baseline} is not resolved"
        between = "" if found.interval is None else f" [{', '.join(show(end, sign=True) for end in found.interval)}]"
        p = "no p of single or equal runs" if found.holm is None else f"adjusted p = {found.holm:.2g}"
        what = f"{'points of ' * bool(self.primary.unit)}{self.primary.label}"
        return verdict, f"{arm} {told}: {show(found.mean, sign=True)}{between} {what}, {p}"

    def verdicts(self) -> list[str]:
        """The sentences of :meth:`told`, with their panel where there are several."""
        return [f"{self._titled(panel)}{sentence}" for panel, each in self.told().items() for _, sentence in each]

    @cached_property
    def grows(self) -> str | None:
        """The one key that tells panels apart, if it is a number, above 0, and there are three or more."""
        keys = {key for panel in self.panels for key in panel.values}
        numbers = [value for panel in self.panels for value in panel.values.values()]
        if len(keys) != 1 or len(set(numbers)) < 3 or not all(type(value) in (int, float) and value > 0 for value in numbers):
            return None
        return keys.pop()

    @cached_property
    def contrasts(self) -> list[Contrasts]:
        """Of the primary metric: over all panels and, where these grow, per doubling."""
        cells, names = self.cells(self.primary), [panel.name for panel in self.panels]
        whole = [arm for arm in self.arms if all(arm in cells.get(name, {}) for name in names)]
        if len(names) < 2 or self.baseline not in whole:
            return []
        samples = {arm: [cells[name][arm].sample for name in names] for arm in whole}

        def tested(weights: Sequence[float]) -> dict[str, Contrast]:
            found = {
                arm: contrast(weights, each, samples[self.baseline]) for arm, each in samples.items() if arm != self.baseline
            }
            adjusted = _adjusted({arm: each.raw for arm, each in found.items()})
            return {arm: replace(each, holm=adjusted.get(arm)) for arm, each in found.items()}

        alike = tested([1 / len(names)] * len(names))
        panels = "both panels" if len(names) == 2 else f"all {len(names)} panels"
        asked = [Contrasts("mean difference", panels, WORDS[self.primary.better], alike)]
        if self.grows is not None:
            numbers = [panel.values[self.grows] for panel in self.panels]
            over = f"{self.grows} from {numbers[0]} to {numbers[-1]}"
            asked.append(Contrasts("change per doubling", over, ("rises", "falls"), tested(per_doubling(numbers))))
        return asked if asked[0].found else []

    def power(self) -> list[str]:
        """What the present seeds could have resolved in the primary metric, and how many seeds would resolve less."""
        said, show, count = [], self.primary.show, self.comparisons(self.primary)
        for panel, arms in self.cells(self.primary).items():
            samples = [cell.sample for cell in arms.values() if cell.sample.n > 1]
            sd, n = pooled_sd(samples), min((sample.n for sample in samples), default=0)
            if not sd or not any(cell.difference and cell.difference.welch is not None for cell in arms.values()):
                said.append(f"{self._titled(panel)}nothing is tested: it takes two seeds, that differ, of baseline and arm")
                continue
            least = detectable(n, sd, comparisons=count)
            more = [f"{show(part)} needs {seeds_needed(part, sd, comparisons=count):,}" for part in (least / 2, least / 4)]
            said.append(
                f"{self._titled(panel)}{n} seeds an arm, whose sd is {show(sd)}, resolve a difference of {show(least)} with "
                f"probability {POWER:.0%}; seeds an arm for less: {', '.join(more)}"
            )
        return said

    @property
    def notes(self) -> list[str]:
        """How what is not accuracy alone was measured."""
        shown = dict.fromkeys(metric.part for metric in self.metrics if metric.part in MEASURED)
        results = [result for panel in self.panels for result in panel.results]
        first = {part: next(result.parts[part] for result in results if part in result.parts) for part in shown}
        cost = [COST + self._uneven()] if any(metric.group == "cost" for metric in self.metrics) else []
        said = {part: Template(MEASURED[part]).safe_substitute(each | each["settings"]) for part, each in first.items()}
        return [*cost, *said.values()]

    def _uneven(self) -> str:
        """A sentence, where runs of one arm had unequal speeds."""
        speeds = [cell.sample.values for arms in self.cells(metric_of("speed")).values() for cell in arms.values()]
        if (factor := max((max(each) / min(each) for each in speeds if min(each) > 0), default=1.0)) <= UNEVEN:
            return ""
        return (
            f" Runs of one arm differ by up to a factor of {factor:.1f} in images/s: their machines did, or had other work too."
        )

    @property
    def explanation(self) -> str:
        """How the figures were made, in words."""
        return (
            f"Last epoch, means of seeds. {1 - ALPHA:.0%} intervals, not adjusted: Student's of means, Welch's of differences. "
            f"p is of Welch's t against {self.baseline}, adjusted after Holm over {self.comparisons(self.primary)} comparisons; "
            f"verdicts need p < {ALPHA:g}. Beside it Dunnett's test over the arms of each panel, which assumes equal variances. "
            f"Every metric is adjusted by itself.{self._shared()}"
        )

    def _shared(self) -> str:
        """A sentence on what runs of one seed have in common, where arms share seeds."""
        found = intraclass([self._by_seed(panel) for panel in self.panels])
        if found is None:
            return ""
        return (
            f" Arms share seeds: beyond the means of arms, results of one seed correlate by {found[0]:+.2f} (intraclass; F test "
            f"p = {found[1]:.2g}), which no test here makes use of."
        )

    def _by_seed(self, panel: Panel) -> list[list[float]]:
        """The primary metric of a panel's arms on the seeds that they share."""
        read = [
            dict(zip((result.seed for result in panel.arms[arm]), cell.sample.values, strict=True))
            for arm, cell in self.cells(self.primary).get(panel.name, {}).items()
        ]
        shared = sorted(set.intersection(*map(set, read))) if read else []
        return [[values[seed] for seed in shared] for values in read]


def _adjusted(raw: Mapping[Key, float | None]) -> dict[Key, float]:
    """The p-values that there are, after Holm."""
    tested = {key: p for key, p in raw.items() if p is not None}
    return dict(zip(tested, holm(list(tested.values())), strict=True))


def _verdict(found: Difference | Contrast, words: tuple[str, str]) -> str:
    return words[found.mean < 0] if found.resolved else "not resolved"


def compare(
    results: Sequence[Result],
    *,
    title: str = "comparison",
    factor: Sequence[str] = FACTOR,
    by: Sequence[str] = PANELS,
    baseline: str | None = None,
    metric: str = "accuracy",
    anyway: bool = False,
    flagged: Sequence[str] = (),
) -> Comparison:
    """Group results into panels and arms, and see whether they may be compared.

    Args:
        results: of finished runs.
        title: of tables and pages.
        factor: keys or sections of the recipe in which arms differ.
        by: keys or sections that tell panels apart.
        baseline: an arm's name; by default the arm without a regularizer.
        metric: what verdicts go by, a key of ``orthokit.evidence.results.METRICS``.
        anyway: flag what is else refused.
        flagged: what is known to be amiss, such as what :func:`orthokit.evidence.results.read` tells.

    Raises:
        ValueError: arms of a panel differ in more than the factor, or in their images; a seed counts twice; there is no such key,
            baseline or metric, or nothing to compare.
    """
    primary = metric_of(metric)
    if primary.group == "cost":
        raise ValueError(f"{metric} is no metric for verdicts: {COST}")
    if unknown := [key for key in (*factor, *by) if key.split(".")[0] not in Recipe.model_fields]:
        raise ValueError(f"{unknown[0]} is no key of a recipe; factors and panels are, such as regularizer or train.epochs")
    flat = [result.flat for result in results]
    if unknown := [key for key in (*factor, *by) if "." in key and not any(under(each, [key]) for one in flat for each in one)]:
        raise ValueError(f"no run has the key {unknown[0]}")
    arms = _arms(results, flat, factor)
    names = _panels(results, flat, [key for each in flat for key in each if under(key, by) and not under(key, factor)])
    baseline = _baseline(baseline, arms, results)
    grouped: dict[str, dict[str, list[Result]]] = {}
    for (name, _), arm, result in zip(names, arms, results, strict=True):
        grouped.setdefault(name, {}).setdefault(arm, []).append(result)
    values, order = dict(names), dict.fromkeys([baseline, *arms])
    panels = tuple(
        Panel(name, values[name], {a: tuple(sorted(grouped[name][a], key=lambda r: r.seed)) for a in order if a in grouped[name]})
        for name in sorted(grouped, key=lambda name: [_sortable(value) for value in values[name].values()])
    )
    if len(order) < 2:
        raise ValueError(f"there is only one arm, {baseline}; give runs that differ in {' or '.join(factor)}")
    refused = [*repeated(results), *(each for panel in panels for each in refusals(panel, factor))]
    if refused and not anyway:
        raise ValueError("; ".join(refused))
    excluded, left_out = incomparable(panels)
    told = [*refused, *flagged, *(each for panel in panels for each in flags(panel, baseline)), *left_out]
    comparison = Comparison(title, baseline, panels, tuple(factor), primary, tuple(dict.fromkeys(told)), tuple(excluded))
    if not comparison.cells(primary):
        raise ValueError(
            f"no run has the {primary.label}" + (f"; orthokit evaluate --parts {primary.part}" if primary.part else "")
        )
    return comparison


def _sortable(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _varying(parts: Sequence[dict[str, str]], keys: Sequence[str]) -> list[str]:
    return [key for key in dict.fromkeys(keys) if len({part.get(key) for part in parts}) > 1]


def _short(key: str, part: dict[str, str]) -> str:
    return f"{key.split('.', 1)[-1]}={plain(part.get(key))}"


def _arms(results: Sequence[Result], flat: Sequence[dict[str, str]], factor: Sequence[str]) -> list[str]:
    """The arm of each result: a study's own name, or what tells it apart."""
    penalties = any(key.split(".")[0] == "regularizer" for key in factor)
    keys = _varying(flat, [key for each in flat for key in each if under(key, factor) and not under(key, ["regularizer"])])
    return [
        result.summary["study"].get("arm")
        or ", ".join([*([_penalty(result.recipe)] if penalties else []), *(_short(key, part) for key in keys)])
        for result, part in zip(results, flat, strict=True)
    ]


def _penalty(recipe: Recipe) -> str:
    if (said := recipe.regularizer) is None:
        return "none"
    strength = said.strength if isinstance(said.strength, dict) else repr(said.strength)
    shown = ", ".join(f"{key}={value}" for key, value in strength.items()) if isinstance(strength, dict) else strength
    more = {key: getattr(said, key) for key in ("where", "scale", "decay")}
    default = {"where": "convs", "scale": None, "decay": True}
    return ", ".join([repr(penalty_of(said.penalty)), shown, *(f"{k}={v}" for k, v in more.items() if v != default[k])])


def _panels(results: Sequence[Result], flat: Sequence[dict[str, str]], keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The panel of each result, and its values of the keys that vary: a study's own name, or these."""
    varying = _varying(flat, keys)
    found = []
    for result, part in zip(results, flat, strict=True):
        words = [_short(key, part) for key in varying] or [plain(part["network.kind"]), "on", plain(part["data.name"])]
        name = result.summary["study"].get("panel") or (", " if varying else " ").join(words)
        found.append((name, {key: json.loads(part[key]) if key in part else None for key in varying}))
    return found


def _baseline(wanted: str | None, arms: Sequence[str], results: Sequence[Result]) -> str:
    known = ", ".join(map(repr, dict.fromkeys(arms)))
    if wanted is not None:
        if wanted not in arms:
            raise ValueError(f"no arm {wanted!r} to be the baseline; there are {known}")
        return wanted
    bare = dict.fromkeys(arm for arm, result in zip(arms, results, strict=True) if result.recipe.regularizer is None)
    if len(bare) != 1:
        raise ValueError(f"which arm is the baseline? name it with --baseline; there are {known}")
    return next(iter(bare))
