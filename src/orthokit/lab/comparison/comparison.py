"""Comparisons: arms against a baseline, in panels of equal networks and data, from the results of finished runs.

An *arm* is all runs with one value of the declared factor (by default ``regularizer``). A *panel* is all runs that are compared
with each other: those of equal ``network`` and ``data.name``. Within a panel the arms must differ in the factor alone.
Results are those of the last epoch.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeVar

from orthokit.checks import printable
from orthokit.lab.comparison.comparability import Panel, flags, incomparable_parts, refusals, repetitions, under
from orthokit.lab.comparison.inference import (
    Contrast,
    Difference,
    Sample,
    blocked_differences,
    contrast,
    detectable,
    differences,
    holm,
    intraclass,
    paired_contrast,
    per_doubling,
    pooled_sd,
    seeds_needed,
)
from orthokit.lab.comparison.metrics import METRICS, Metric, metric_of
from orthokit.lab.comparison.panels import arms_of, baseline_of, pair_of, panels_of, sortable
from orthokit.lab.comparison.tuning import Choice
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.results import Result

__all__ = ["FACTOR", "PANELS", "WORDS", "Blocks", "Cell", "Comparison", "Contrasts", "Resolution", "compare"]

Key = TypeVar("Key", bound=Hashable)
Effect = TypeVar("Effect", Difference, Contrast)
Blocks = Literal["seed"]
"""A property that runs of different arms share, and that a test keeps apart from their error."""
FACTOR = ("regularizer",)
PANELS = ("network", "data.name")
WORDS = {1: ("better", "worse"), 0: ("higher", "lower"), -1: ("worse", "better")}
"""Words for differences above 0, and below, by whether more or less of a metric is better."""


@dataclass(frozen=True)
class Cell:
    """A metric of an arm in a panel."""

    sample: Sample
    difference: Difference | None = None
    """The difference from the baseline; None for the baseline itself, and where there is no baseline."""
    verdict: str = ""
    """``better``, ``worse`` or ``not resolved``; ``higher`` or ``lower`` where neither is a merit; empty without a difference."""


@dataclass(frozen=True)
class Contrasts:
    """A question that is put to all panels at once, and the answer of each arm."""

    name: str
    over: str
    """The panels, in words."""
    words: tuple[str, str]
    """Words for differences above 0, and below."""
    answers: dict[str, Contrast]
    """Answers by arm, or by pair of arms."""

    @property
    def title(self) -> str:
        """The question and its panels, as ``numbers.csv`` has them."""
        return f"{self.name}, {self.over}"

    def verdict(self, arm: str) -> str:
        """One of ``words``, or ``not resolved``."""
        return _verdict(self.answers[arm], self.words)


@dataclass(frozen=True)
class Resolution:
    """The least gain that seeds resolve with probability ``POWER``, in a panel or between a stated pair of arms."""

    name: str
    """The panel, or the pair."""
    least: float | None
    """The gain; None where nothing is tested."""
    seeds: int | None = None
    """The fewest seeds of an arm; None where seeds are blocks."""
    more: Mapping[float, int] = field(default_factory=dict)
    """Seeds an arm that would resolve a half, and a quarter, of the least gain."""
    pair: bool = False
    """Whether this is a pair of the primary question."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Arms against a baseline, in one or more panels."""

    title: str
    baseline: str
    panels: tuple[Panel, ...]
    factor: tuple[str, ...] = FACTOR
    primary: Metric = METRICS[0]
    """The metric that verdicts go by; all others are secondary."""
    flags: tuple[str, ...] = ()
    """Sentences that a reader must know before believing the comparison."""
    excluded: tuple[str, ...] = ()
    """Parts of evaluations that do not compare."""
    choices: tuple[Choice, ...] = ()
    """The choices of the strengths of a study's arms."""
    blocks: Blocks | None = None
    """Whether verdicts go by a test with seeds as blocks, and not by Welch's."""
    primary_contrasts: tuple[tuple[str, str], ...] = ()
    """The primary question, stated before the runs: pairs of arms, whose difference over all panels is tested."""
    known: tuple[Metric, ...] = METRICS
    """The metrics that may have been measured."""
    sources: tuple[str, ...] = ()
    """Files that the numbers are from, where they are not runs of the lab."""
    question: str = ""
    """The question, in one sentence; printed above the answer."""

    @cached_property
    def arms(self) -> list[str]:
        """The arms of all panels, the baseline first."""
        return list(dict.fromkeys([self.baseline, *(arm for panel in self.panels for arm in panel.arms)]))

    @property
    def recorded(self) -> bool:
        """Whether all runs are the lab's."""
        return all(panel.recorded for panel in self.panels)

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metrics that there are numbers of."""
        return [metric for metric in self.known if self.cells(metric)]

    def cells(self, metric: Metric) -> dict[str, dict[str, Cell]]:
        """Panel -> arm -> cell of a metric; p-values are adjusted over all of them. Arms without numbers are left out."""
        if metric.key not in self._cells:
            self._cells[metric.key] = {} if metric.part in self.excluded else self._cells_of(metric)
        return self._cells[metric.key]

    @cached_property
    def _cells(self) -> dict[str, dict[str, dict[str, Cell]]]:
        return {}

    def _cells_of(self, metric: Metric) -> dict[str, dict[str, Cell]]:
        cells: dict[str, dict[str, Cell]] = {}
        raw: dict[tuple[str, str], Difference] = {}
        for panel in self.panels:
            numbers = {arm: [metric.read(result) for result in results] for arm, results in panel.arms.items()}
            samples = {
                arm: Sample(tuple(v for v in values if v is not None)) for arm, values in numbers.items() if None not in values
            }
            if samples:
                cells[panel.name] = {arm: Cell(sample) for arm, sample in samples.items()}
            if self.baseline in samples and metric.group != "cost":  # machines and their load differ
                by_seed = blocked_differences(_by_seed(panel, samples), self.baseline)
                for arm, each in differences(samples, self.baseline).items():
                    raw[panel.name, arm] = self._by_rule(replace(each, blocked=by_seed.get(arm)))
        p_values = _adjust({key: self._p(each) for key, each in raw.items()})
        for (name, arm), each in raw.items():
            each = replace(each, holm=p_values.get((name, arm)))
            cells[name][arm] = Cell(cells[name][arm].sample, each, _verdict(each, WORDS[metric.better]))
        return cells

    def _by_rule(self, effect: Effect) -> Effect:
        """The effect with mean and interval of the test that verdicts go by."""
        if self.blocks is None:
            return effect
        if (by_seed := effect.blocked) is None:
            return replace(effect, interval=None)
        return replace(effect, mean=by_seed.mean, interval=by_seed.interval)

    def _p(self, effect: Difference | Contrast) -> float | None:
        """The p of the test that verdicts go by, not yet adjusted."""
        if self.blocks is not None:
            return None if effect.blocked is None else effect.blocked.p
        return effect.welch if isinstance(effect, Difference) else effect.raw

    def cell(self, metric: Metric, panel: str, arm: str) -> Cell | None:
        """One cell, or None."""
        return self.cells(metric).get(panel, {}).get(arm)

    def comparisons(self, metric: Metric) -> int:
        """The number of tests that the adjustment of a metric is over."""
        every = [cell.difference for arms in self.cells(metric).values() for cell in arms.values()]
        return sum(each is not None and self._p(each) is not None for each in every)

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
        """Contrasts of the primary metric: over all panels and, where these grow, per doubling."""
        whole, count = self._whole, len(self.panels)
        if count < 2 or self.baseline not in whole:
            return []

        def test(weights: Sequence[float]) -> dict[str, Contrast]:
            raw = {arm: self._contrast(weights, arm, self.baseline) for arm in whole if arm != self.baseline}
            p_values = _adjust({arm: self._p(each) for arm, each in raw.items()})
            return {arm: replace(each, holm=p_values.get(arm)) for arm, each in raw.items()}

        alike = test([1 / count] * count)
        questions = [Contrasts("mean difference", self._everywhere, WORDS[self.primary.better], alike)]
        if self.grows is not None:
            numbers = [panel.values[self.grows] for panel in self.panels]
            over = f"{self.grows} from {numbers[0]} to {numbers[-1]}"
            questions.append(Contrasts("change per doubling", over, ("rises", "falls"), test(per_doubling(numbers))))
        return questions if questions[0].answers else []

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
        pairs = []
        for panel, *samples in zip(self.panels, *both, strict=True):
            one, two = _by_seed(panel, dict(zip((arm, other), samples, strict=True))).values()
            pairs.append({seed: value - two[seed] for seed, value in one.items() if seed in two})
        return self._by_rule(replace(contrast(weights, *both), blocked=paired_contrast(weights, pairs)))

    @cached_property
    def primary_answer(self) -> Contrasts | None:
        """The answers to the primary question, adjusted over its pairs of arms; None where none is stated or runs are missing."""
        pairs, count = self.primary_contrasts, len(self.panels)
        if not pairs or any(arm not in self._whole for pair in pairs for arm in pair):
            return None
        effects = {f"{arm} - {other}": self._contrast([1 / count] * count, arm, other) for arm, other in pairs}
        raw = {pair: self._p(each) for pair, each in effects.items()}
        p_values = holm([1.0 if p is None else p for p in raw.values()])  # a pair that is not tested yet counts in the family
        answers = {
            pair: replace(each, holm=None if raw[pair] is None else p)
            for (pair, each), p in zip(effects.items(), p_values, strict=True)
        }
        name = "primary question: mean difference" if count > 1 else "primary question: difference"
        return Contrasts(name, self._everywhere, WORDS[self.primary.better], answers)

    def resolutions(self) -> list[Resolution]:
        """The least gains that the present seeds resolve: in each panel and, where seeds are blocks, between each stated pair."""
        count, rows = self.comparisons(self.primary), []
        for pair, each in self.primary_answer.answers.items() if self.primary_answer and self.blocks else ():
            if each.blocked is not None:
                rows.append(Resolution(pair, each.blocked.detectable(len(self.primary_contrasts)), pair=True))
        return rows + [self._resolution(panel, list(arms.values()), count) for panel, arms in self.cells(self.primary).items()]

    def _resolution(self, panel: str, cells: Sequence[Cell], count: int) -> Resolution:
        """The least gain that the seeds of a panel resolve, each of ``count`` tests at the strictest step of Holm's procedure."""
        if self.blocks is not None:
            by_seed = [cell.difference.blocked for cell in cells if cell.difference and cell.difference.blocked]
            return Resolution(panel, max((each.detectable(count) for each in by_seed), default=None))
        samples = [cell.sample for cell in cells if cell.sample.n > 1]
        sd, n = pooled_sd(samples), min((sample.n for sample in samples), default=0)
        if not sd or not any(cell.difference and cell.difference.welch is not None for cell in cells):
            return Resolution(panel, None)
        least = detectable(n, sd, comparisons=count)
        more = {part: seeds_needed(part, sd, comparisons=count) for part in (least / 2, least / 4)}
        return Resolution(panel, least, n, more)

    @cached_property
    def shared(self) -> tuple[float, float] | None:
        """The correlation of one seed's results beyond the means of arms, in the primary metric, and the p of its F test.

        None where arms share no seeds; see :func:`orthokit.lab.comparison.inference.intraclass`.
        """
        cells = self.cells(self.primary)
        values = [
            list(_by_seed(panel, {arm: cell.sample for arm, cell in cells.get(panel.name, {}).items()}).values())
            for panel in self.panels
        ]
        seeds = [sorted(set.intersection(*map(set, each))) if each else [] for each in values]
        blocks = zip(values, seeds, strict=True)
        return intraclass([[[by_seed[seed] for seed in common] for by_seed in arms] for arms, common in blocks])


def _by_seed(panel: Panel, samples: Mapping[str, Sample]) -> dict[str, dict[int, float]]:
    """The values of a panel's arms by seed."""
    return {
        arm: dict(zip((result.seed for result in panel.arms[arm]), sample.values, strict=True)) for arm, sample in samples.items()
    }


def _adjust(raw: Mapping[Key, float | None]) -> dict[Key, float]:
    """The p-values that are not None, adjusted after Holm."""
    p_values = {key: p for key, p in raw.items() if p is not None}
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _verdict(effect: Difference | Contrast, words: tuple[str, str]) -> str:
    return words[effect.mean < 0] if effect.resolved else "not resolved"


def compare(
    results: Sequence[Result],
    *,
    title: str = "comparison",
    question: str = "",
    factor: Sequence[str] = FACTOR,
    by: Sequence[str] = PANELS,
    baseline: str | None = None,
    metric: str = "accuracy",
    blocks: Blocks | None = None,
    contrasts: Sequence[str] = (),
    anyway: bool = False,
    flagged: Sequence[str] = (),
) -> Comparison:
    """Compare the arms of finished runs with a baseline, in panels of equal network and data.

    .. code-block:: python

        from orthokit.lab.comparison.comparison import compare
        from orthokit.lab.reporting import page, tables, words
        from orthokit.lab.runs import collect

        runs, flagged = collect.read([Path("runs")])
        comparison = compare(runs, flagged=flagged, title="SO against none")
        cell = comparison.cell(comparison.primary, comparison.panels[0].name, comparison.arms[1])
        print(cell.difference.mean, cell.difference.interval, cell.verdict)
        print(words.answer(comparison))
        frame = tables.numbers(comparison).to_pandas()
        html = page.page(comparison)

    Results in CSV files: :func:`orthokit.lab.comparison.sheet.compare_lines`.

    Args:
        results: the last epochs of finished runs.
        title: printed above tables and pages.
        question: the question that the comparison is to answer, in one sentence.
        factor: keys or sections of the recipe in which arms may differ.
        by: keys or sections of the recipe that tell panels apart.
        baseline: an arm's name; by default the only arm called none or baseline, or the only one without a regularizer.
        metric: the metric that verdicts go by, a key of ``orthokit.lab.comparison.metrics.METRICS``.
        blocks: ``"seed"`` for verdicts by a test with seeds as blocks instead of Welch's t; state it before the runs.
        contrasts: the primary question, such as ``"strict - none"``: differences of two arms, averaged over all panels and
            adjusted after Holm over these alone.
        anyway: whether to flag comparisons that are refused otherwise.
        flagged: further sentences to flag, such as those of :func:`orthokit.lab.runs.collect.read`.

    Raises:
        ValueError: arms of a panel differ in more than the factor, or in their images; a seed counts twice; there is no such key,
            baseline or metric, or nothing to compare.
    """
    primary = metric_of(metric)
    if primary.group == "cost":
        raise ValueError(
            f"verdicts cannot go by {metric}: cost depends on what else the machine did; choose a metric such as accuracy"
        )
    if unknown := [key for key in (*factor, *by) if key.split(".")[0] not in Recipe.model_fields]:
        raise ValueError(
            f"unknown recipe key {unknown[0]!r}; --factor and --by take recipe keys such as regularizer or train.epochs"
        )
    flat = [result.flat for result in results]
    if unknown := [key for key in (*factor, *by) if "." in key and not any(under(each, [key]) for one in flat for each in one)]:
        raise ValueError(f"no recipe of these runs has the key {unknown[0]!r}; --factor and --by take keys that a recipe sets")
    arms = arms_of(results, flat, factor)
    names = panels_of(results, flat, [key for each in flat for key in each if under(key, by) and not under(key, factor)])
    bare = [arm for arm, result in zip(arms, results, strict=True) if result.recipe.regularizer is None]
    baseline = baseline_of(baseline, arms, bare)
    by_panel: dict[str, dict[str, list[Result]]] = {}
    for (name, _), arm, result in zip(names, arms, results, strict=True):
        by_panel.setdefault(name, {}).setdefault(arm, []).append(result)
    values, order = dict(names), dict.fromkeys([baseline, *arms])
    panels = tuple(
        Panel(
            name, values[name], {a: tuple(sorted(by_panel[name][a], key=lambda r: r.seed)) for a in order if a in by_panel[name]}
        )
        for name in sorted(by_panel, key=lambda name: [sortable(value) for value in values[name].values()])
    )
    if len(order) < 2:
        only = f"there is only one arm, {baseline}; give runs that differ in {' or '.join(factor)}"
        raise ValueError("; ".join([only, *flagged]))
    reasons = [*repetitions(results), *(each for panel in panels for each in refusals(panel, factor))]
    if reasons and not anyway:
        raise ValueError("; ".join(reasons))
    excluded, left_out = incomparable_parts(panels)
    cautions = [*reasons, *flagged, *(each for panel in panels for each in flags(panel, baseline)), *left_out]
    pairs = tuple(pair_of(each, order) for each in contrasts)
    comparison = Comparison(
        printable(title),
        baseline,
        panels,
        tuple(factor),
        primary,
        tuple(dict.fromkeys(printable(each, lines=True) for each in cautions)),
        tuple(excluded),
        blocks=blocks,
        primary_contrasts=pairs,
        question=printable(question),
    )
    if not comparison.cells(primary):
        advice = f"; measure it with orthokit evaluate --parts {primary.part}" if primary.part else ""
        raise ValueError(f"no run has a finite {primary.label}{advice}")
    return comparison
