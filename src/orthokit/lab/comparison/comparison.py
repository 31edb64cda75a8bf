"""Comparisons: arms against a baseline, in panels of equal networks and data, from what finished runs left.

An *arm* is what the runs of one value of the declared factor have in common (by default the factor is ``regularizer``), a *panel*
what is compared within: runs of equal ``network`` and ``data.name``. Within a panel the arms must differ in the factor alone.
Results are those of the last epoch.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import Template
from typing import Literal, TypeVar

from orthokit.lab.comparison.comparability import Panel, flags, incomparable, refusals, repeated, under
from orthokit.lab.comparison.inference import (
    ALPHA,
    POWER,
    Contrast,
    Difference,
    Sample,
    blocked,
    contrast,
    detectable,
    differences,
    holm,
    intraclass,
    paired,
    per_doubling,
    pooled_sd,
    seeds_needed,
)
from orthokit.lab.comparison.metrics import COST, FITTED, MEASURED, METRICS, Metric, metric_of
from orthokit.lab.comparison.panels import arms_of, baseline_of, pair_of, panels_of, sortable
from orthokit.lab.comparison.tuning import Choice
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.results import Result

Key = TypeVar("Key", bound=Hashable)
Tested = TypeVar("Tested", Difference, Contrast)
Blocks = Literal["seed"]
"""What runs of different arms may share that a test sets apart from their error."""
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
    blocks: Blocks | None = None
    """Whether verdicts go by a test with seeds as blocks, and not by Welch's."""
    primary_contrasts: tuple[tuple[str, str], ...] = ()
    """The primary question, stated before the runs: pairs of arms, whose difference over all panels is tested."""
    known: tuple[Metric, ...] = METRICS
    """What may have been measured."""
    remarks: tuple[str, ...] = ()
    """Notes on where the numbers are from."""

    @cached_property
    def arms(self) -> list[str]:
        """Of all panels, the baseline first."""
        return list(dict.fromkeys([self.baseline, *(arm for panel in self.panels for arm in panel.arms)]))

    @property
    def recorded(self) -> bool:
        """Whether its runs are the lab's."""
        return all(panel.recorded for panel in self.panels)

    @cached_property
    def metrics(self) -> list[Metric]:
        """Those that there are numbers of."""
        return [metric for metric in self.known if self.cells(metric)]

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
                by_seed = blocked(_by_seed(panel, samples), self.baseline)
                for arm, each in differences(samples, self.baseline).items():
                    found[panel.name, arm] = self._ruled(replace(each, blocked=by_seed.get(arm)))
        adjusted = _adjusted({key: self._p(each) for key, each in found.items()})
        for (name, arm), each in found.items():
            each = replace(each, holm=adjusted.get((name, arm)))
            cells[name][arm] = Cell(cells[name][arm].sample, each, _verdict(each, WORDS[metric.better]))
        return cells

    def _ruled(self, found: Tested) -> Tested:
        """Mean and interval are those of the test that verdicts go by."""
        if self.blocks is None:
            return found
        by_seed = found.blocked
        return replace(found, interval=None) if by_seed is None else replace(found, mean=by_seed.mean, interval=by_seed.interval)

    def _p(self, found: Difference | Contrast) -> float | None:
        """Of the test that verdicts go by."""
        if self.blocks is not None:
            return None if found.blocked is None else found.blocked.p
        return found.welch if isinstance(found, Difference) else found.raw

    def cell(self, metric: Metric, panel: str, arm: str) -> Cell | None:
        """One cell, if there is."""
        return self.cells(metric).get(panel, {}).get(arm)

    def comparisons(self, metric: Metric) -> int:
        """How many tests the adjustment of a metric is over."""
        every = [cell.difference for arms in self.cells(metric).values() for cell in arms.values()]
        return sum(each is not None and self._p(each) is not None for each in every)

    def _titled(self, panel: str) -> str:
        return f"{panel}: " if len(self.panels) > 1 else ""

    def told(self) -> dict[str, list[tuple[str, str]]]:
        """The primary question's answer, and the primary metric's result, of all panels at once and of each.

        Returns:
            Verdict and sentence of each contrast or arm.
        """
        said: dict[str, list[tuple[str, str]]] = {}
        if (asked := self.question) is not None:
            for (arm, other), (name, each) in zip(self.primary_contrasts, asked.found.items(), strict=True):
                said.setdefault(asked.title, []).append(self._told(arm, asked.verdict(name), each, other))
        for asked in self.contrasts:
            for arm, each in asked.found.items():
                said.setdefault(asked.title, []).append(self._told(arm, asked.verdict(arm), each))
        for panel, arms in self.cells(self.primary).items():
            for arm, cell in arms.items():
                if cell.difference is not None:
                    verdict, sentence = self._told(arm, cell.verdict, cell.difference)
                    said.setdefault(panel, []).append((verdict, f"{sentence}, n = {cell.sample.n}"))
        return said

    def _told(self, arm: str, verdict: str, found: Difference | Contrast, other: str | None = None) -> tuple[str, str]:
        show, other = self.primary.show, other or self.baseline
        told = f"is {verdict} than" if verdict in itertools.chain(*WORDS.values()) else f"{verdict} against"
        told = f"{told} {other}" if found.resolved else f"against {other} is not resolved"
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
        whole, count = self._whole, len(self.panels)
        if count < 2 or self.baseline not in whole:
            return []

        def tested(weights: Sequence[float]) -> dict[str, Contrast]:
            found = {arm: self._contrast(weights, arm, self.baseline) for arm in whole if arm != self.baseline}
            adjusted = _adjusted({arm: self._p(each) for arm, each in found.items()})
            return {arm: replace(each, holm=adjusted.get(arm)) for arm, each in found.items()}

        alike = tested([1 / count] * count)
        asked = [Contrasts("mean difference", self._everywhere, WORDS[self.primary.better], alike)]
        if self.grows is not None:
            numbers = [panel.values[self.grows] for panel in self.panels]
            over = f"{self.grows} from {numbers[0]} to {numbers[-1]}"
            asked.append(Contrasts("change per doubling", over, ("rises", "falls"), tested(per_doubling(numbers))))
        return asked if asked[0].found else []

    @cached_property
    def _whole(self) -> list[str]:
        """Arms that have the primary metric in every panel."""
        cells = self.cells(self.primary)
        return [arm for arm in self.arms if all(arm in cells.get(panel.name, {}) for panel in self.panels)]

    @property
    def _everywhere(self) -> str:
        count = len(self.panels)
        return "both panels" if count == 2 else f"all {count} panels" if count > 2 else self.panels[0].name

    def _contrast(self, weights: Sequence[float], arm: str, other: str) -> Contrast:
        """An arm less another one over all panels, in the primary metric, not yet adjusted."""
        both = [[self.cells(self.primary)[panel.name][name].sample for panel in self.panels] for name in (arm, other)]
        found = contrast(weights, *both)
        pairs = []
        for panel, *samples in zip(self.panels, *both, strict=True):
            one, two = _by_seed(panel, dict(zip((arm, other), samples, strict=True))).values()
            pairs.append({seed: value - two[seed] for seed, value in one.items() if seed in two})
        return self._ruled(replace(found, blocked=paired(weights, pairs)))

    @cached_property
    def question(self) -> Contrasts | None:
        """What the primary question's pairs of arms answer, adjusted over them; None where none is stated or runs lack."""
        pairs, count = self.primary_contrasts, len(self.panels)
        if not pairs or any(arm not in self._whole for pair in pairs for arm in pair):
            return None
        found = {f"{arm} - {other}": self._contrast([1 / count] * count, arm, other) for arm, other in pairs}
        raw = {name: self._p(each) for name, each in found.items()}
        adjusted = holm([1.0 if p is None else p for p in raw.values()])  # what is not tested yet counts among the family
        found = {
            name: replace(each, holm=None if raw[name] is None else p)
            for (name, each), p in zip(found.items(), adjusted, strict=True)
        }
        name = "primary question: mean difference" if count > 1 else "primary question: difference"
        return Contrasts(name, self._everywhere, WORDS[self.primary.better], found)

    def power(self) -> list[str]:
        """What the present seeds could have resolved in the primary metric, and how many seeds would resolve less."""
        said, show, count = [], self.primary.show, self.comparisons(self.primary)
        for name, each in self.question.found.items() if self.question and self.blocks else ():
            if each.blocked is not None:
                least = each.blocked.detectable(len(self.primary_contrasts))
                said.append(f"primary question: {name}: a difference of {show(least)} is resolved with probability {POWER:.0%}")
        for panel, arms in self.cells(self.primary).items():
            if self.blocks is not None:
                by_seed = [cell.difference.blocked for cell in arms.values() if cell.difference and cell.difference.blocked]
                least = max((each.detectable(count) for each in by_seed), default=0.0)
                told = f"seeds as blocks resolve a difference of {show(least)} with probability {POWER:.0%}"
                said.append(f"{self._titled(panel)}{told if by_seed else 'nothing is tested: arms share no two seeds'}")
                continue
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
        fitted = [FITTED] if any(metric.path.startswith("train.") for metric in self.metrics) else []
        cost = [COST + self._uneven()] if any(metric.group == "cost" for metric in self.metrics) else []
        said = {part: Template(MEASURED[part]).safe_substitute(each | each["settings"]) for part, each in first.items()}
        return [*self.remarks, *fitted, *cost, *said.values()]

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
        test = "seeds as blocks" if self.blocks else "Welch's t"
        means, data = ("Last epoch, means", "images") if self.recorded else ("Means", "data")
        return (
            f"{means} of seeds. {1 - ALPHA:.0%} intervals are not adjusted: Student's of means, of differences by {test}. "
            f"Verdicts go by {test}: p < {ALPHA:g} after Holm. {self._families()} Other p stand beside it and move no verdict. "
            "Dunnett's test, over the arms of a panel, assumes equal variances. The p by seed takes seeds as blocks: in a panel, "
            "arms by seeds without interaction, the error pooled over the arms (of two arms, the paired t); over panels, "
            f"Student's t of each seed's sum of pairs. All of it is about other seeds on these {data}, which are one draw."
            f"{self._shared()}"
        )

    def _families(self) -> str:
        """Which tests are adjusted together."""
        families = [f"cells ({self.comparisons(self.primary)}: an arm against {self.baseline} in a panel)"]
        words = "means ({}: an arm's difference over all panels)", "trends ({}: its change per doubling)"
        families += [words.format(len(asked.found)) for words, asked in zip(words, self.contrasts, strict=False)]
        if self.question is not None:
            families.append(f"the primary question ({len(self.primary_contrasts)}: pairs of arms over all panels)")
        told = "One family of tests" if len(families) == 1 else "Families of tests, each adjusted by itself"
        return f"{told}: {'; '.join(families)}. Every other metric has a family of cells of its own."

    def _shared(self) -> str:
        """A sentence on what runs of one seed have in common, where arms share seeds."""
        cells = self.cells(self.primary)
        read = [
            list(_by_seed(panel, {arm: cell.sample for arm, cell in cells.get(panel.name, {}).items()}).values())
            for panel in self.panels
        ]
        shared = [sorted(set.intersection(*map(set, each))) if each else [] for each in read]
        found = intraclass([[[values[s] for s in seeds] for values in each] for each, seeds in zip(read, shared, strict=True)])
        if found is None:
            return ""
        used = "which verdicts make use of" if self.blocks else "which Welch's t makes no use of"
        return (
            f" Arms share seeds: beyond the means of arms, results of one seed correlate by {found[0]:+.2f} (intraclass; F test "
            f"p = {found[1]:.2g}), {used}."
        )


def _by_seed(panel: Panel, samples: Mapping[str, Sample]) -> dict[str, dict[int, float]]:
    """The values of a panel's arms by seed."""
    return {
        arm: dict(zip((result.seed for result in panel.arms[arm]), sample.values, strict=True)) for arm, sample in samples.items()
    }


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
    blocks: Blocks | None = None,
    contrasts: Sequence[str] = (),
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
        metric: what verdicts go by, a key of ``orthokit.lab.comparison.metrics.METRICS``.
        blocks: ``"seed"``: verdicts go by a test with seeds as blocks, and not by Welch's; state it before the runs.
        contrasts: the primary question, such as ``"strict - none"``: differences of two arms, averaged over all panels and
            adjusted after Holm over these alone.
        anyway: flag what is else refused.
        flagged: what is known to be amiss, such as what :func:`orthokit.lab.runs.results.read` tells.

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
    arms = arms_of(results, flat, factor)
    names = panels_of(results, flat, [key for each in flat for key in each if under(key, by) and not under(key, factor)])
    baseline = baseline_of(baseline, arms, results)
    grouped: dict[str, dict[str, list[Result]]] = {}
    for (name, _), arm, result in zip(names, arms, results, strict=True):
        grouped.setdefault(name, {}).setdefault(arm, []).append(result)
    values, order = dict(names), dict.fromkeys([baseline, *arms])
    panels = tuple(
        Panel(name, values[name], {a: tuple(sorted(grouped[name][a], key=lambda r: r.seed)) for a in order if a in grouped[name]})
        for name in sorted(grouped, key=lambda name: [sortable(value) for value in values[name].values()])
    )
    if len(order) < 2:
        only = f"there is only one arm, {baseline}; give runs that differ in {' or '.join(factor)}"
        raise ValueError("; ".join([only, *flagged]))
    refused = [*repeated(results), *(each for panel in panels for each in refusals(panel, factor))]
    if refused and not anyway:
        raise ValueError("; ".join(refused))
    excluded, left_out = incomparable(panels)
    told = [*refused, *flagged, *(each for panel in panels for each in flags(panel, baseline)), *left_out]
    pairs = tuple(pair_of(each, order) for each in contrasts)
    comparison = Comparison(
        title,
        baseline,
        panels,
        tuple(factor),
        primary,
        tuple(dict.fromkeys(told)),
        tuple(excluded),
        blocks=blocks,
        primary_contrasts=pairs,
    )
    if not comparison.cells(primary):
        raise ValueError(
            f"no run has the {primary.label}" + (f"; orthokit evaluate --parts {primary.part}" if primary.part else "")
        )
    return comparison
