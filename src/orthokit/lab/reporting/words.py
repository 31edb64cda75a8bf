"""Sentences about a comparison, which is numbers only: its answer, verdicts, what its seeds can resolve, how it was made."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from string import Template

from orthokit.lab.comparison.comparison import WORDS, Comparison, Contrasts, Resolution
from orthokit.lab.comparison.inference import ALPHA, POWER, Contrast, Difference
from orthokit.lab.comparison.metrics import Metric, metric_of
from orthokit.lab.runs.results import Result
from orthokit.penalties import SO, Disentangled
from orthokit.spec import penalty_of

__all__ = ["answer", "columns", "counts", "explanation", "label", "labels", "legend", "notes", "power", "verdicts"]

COLUMNS = (
    "Wide layers can be orthogonal; tall layers have more filters than weights per filter and cannot. Copies: pairs with "
    "|c| > .99. Robustness: accuracy, the mean over all strengths; of right: among the images that are right unchanged. "
    "Features: those of the penultimate layer."
)
CONTRAST = (
    "The gain averaged over all panels, each with the same weight, or its change each time what grows doubles (linear in the "
    "binary logarithm). Intervals reflect the seeds only, with Satterthwaite's degrees of freedom. Each table is a family of "
    "tests of its own: its p-values are adjusted after Holm over its lines. p by seed: differences within each panel, with a "
    "seed as one block in all panels; n counts the seeds of a panel."
)
LEGEND = "Mean ± sd; + better, - worse, ↑ higher, ↓ lower than the baseline, where resolved."
UNRESOLVED = "Not resolved: too few seeds to tell; there may still be a difference."
MEASURED = {
    "accuracy": "NLL and ECE ($bins bins of confidence, l1) are of all test images, in float32.",
    "attacks": (
        "Attacks act on the pixels of $count test images, with the normalisation inside the network, in float32. PGD: $steps "
        "steps, $path radii long together, from one random start. An image counts as fooled if a smaller radius, the start or "
        "any step fools the network."
    ),
    "noise": "Gaussian noise is added to $count test images: one draw, scaled to each standard deviation.",
    "corruptions": (
        "Eight corruptions of $count test images at severities 1 to 5, with the parameters of CIFAR-10-C. At 32x32 they are its "
        "corruptions but for the random draws."
    ),
    "features": (
        "Features are of all test images: effective rank of the centred features (Roy, Vetterli 2007), participation ratio of "
        "their covariance, mean |correlation| of two channels, NC1 (Papyan, Han, Donoho 2020, there of training images)."
    ),
}
"""Sentences on how a part of the evaluation was measured, with its settings."""
FITTED = (
    "Training accuracy and loss are means over the batches of the last epoch, as training saw them: augmented, while the weights "
    "changed, with label smoothing where the recipe has it. Test loss is in the precision of the run."
)
COST = "Cost was measured during training, beside whatever else the machine did; it is shown, not tested."
MANY = 4
"""An answer names no more arms than this of one verdict."""
UNEVEN = 1.5
"""Factor by which the speeds of an arm's runs may differ without a sentence."""


# Names


def labels(comparison: Comparison) -> dict[str, str]:
    """The name of each arm in print: as its author named it, with the penalty's options where two methods share a name."""
    first: dict[str, Result] = {}
    for arm, result in (pair for panel in comparison.panels if panel.recorded for pair in panel):
        first.setdefault(arm, result)
    return {arm: label(arm, first.get(arm)) for arm in comparison.arms}


def label(arm: str, result: Result | None) -> str:
    """The name of one arm in print: SO tells whether it is squared, the Welch form never shares its name with Welch's t."""
    try:
        regularizer = None if result is None else result.recipe.regularizer
        penalty = None if regularizer is None else penalty_of(regularizer.penalty)
    except Exception:  # a record may name options that this version lacks: the author's name stands
        return arm
    if isinstance(penalty, SO):
        symbol = "SO²" if penalty.squared else "SO"
        if arm.startswith(shown := repr(penalty)):
            options = repr(dataclasses.replace(penalty, squared=True)).removeprefix("SO").replace("()", "")
            return symbol + options + arm[len(shown) :]
        return re.sub(r"\bso\b( squared| unsquared)?", symbol, arm, count=1, flags=re.IGNORECASE)
    if isinstance(penalty, Disentangled) and penalty.form == "welch":
        return re.sub(r"^welch\b(?!-)", "Welch-bounded", arm, flags=re.IGNORECASE)
    return arm


def _in_panel(comparison: Comparison, panel: str) -> str:
    return f"{panel}: " if len(comparison.panels) > 1 else ""


def _points(metric: Metric) -> str:
    return f"{'points of ' * bool(metric.unit)}{metric.label}"


# Answers


def counts(comparison: Comparison) -> str:
    """Number of runs, panels, arms and seeds, in words."""
    runs = [len(results) for panel in comparison.panels for results in panel.arms.values()]
    seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    numbers = {"run": sum(runs), "panel": len(comparison.panels), "arm": len(comparison.arms)}
    words = [f"{count} {word}{'s' * (count != 1)}" for word, count in numbers.items()]
    return f"{', '.join(words)}, {seeds} seed{'s' * (seeds != '1')} an arm"


def answer(comparison: Comparison) -> str:
    """The verdicts in one sentence: on the primary question if one is stated, else on the mean of the panels."""
    names, metric = labels(comparison), comparison.primary
    if (stated := comparison.primary_answer) is not None:
        pairs = zip(comparison.primary_contrasts, stated.answers.items(), strict=True)
        parts = [
            f"{names[arm]} less {names[other]} is {metric.show(each.mean, sign=True)} ({stated.verdict(pair)})"
            for (arm, other), (pair, each) in pairs
        ]
        return f"In {_points(metric)}, over {stated.over}: {'; '.join(parts)}."
    if comparison.contrasts:
        mean, *trends = comparison.contrasts
        clauses = [f"On the mean of {mean.over}, {_grouped(comparison, mean.answers, mean.verdict)}"]
        clauses += [_trend(names, each) for each in trends]
        return "; ".join(clauses) + "."
    cells = {arm: cell for arms in comparison.cells(metric).values() for arm, cell in arms.items() if cell.difference}
    if len(comparison.panels) > 1 or not cells:
        return (
            "No arm can be compared with the baseline in all panels." if cells else "Nothing can be compared with the baseline."
        )
    effects = {arm: cell.difference for arm, cell in cells.items() if cell.difference}
    sentence = _grouped(comparison, effects, lambda arm: cells[arm].verdict)
    return f"{sentence.replace('no difference', 'No difference', 1) if sentence.startswith('no difference') else sentence}."


def _grouped(comparison: Comparison, effects: Mapping[str, Difference | Contrast], verdict: Callable[[str], str]) -> str:
    """The arms by verdict: which are better or worse than the baseline, and by how much."""
    names, show = labels(comparison), comparison.primary.show
    baseline, what = names[comparison.baseline], _points(comparison.primary)
    groups: dict[str, list[str]] = {}
    for arm in effects:
        groups.setdefault(verdict(arm), []).append(arm)
    unresolved, clauses = groups.pop("not resolved", []), []
    for word, arms in groups.items():
        shown = [f"{names[arm]} ({show(effects[arm].mean, sign=True)})" for arm in arms]
        if len(arms) > MANY:
            ends = [f"{names[arm]} ({show(effects[arm].mean, sign=True)})" for arm in _ends(arms, effects)]
            shown = [f"{len(arms)} arms, from {' to '.join(ends)},"]
        clauses.append(f"{_enumerated(shown)} {'is' if len(arms) == 1 else 'are'} {word} than {baseline} in {what}")
    if not clauses:
        return f"no difference from {baseline} in {what} is resolved"
    if unresolved:
        few = _enumerated([names[arm] for arm in unresolved]) if len(unresolved) <= MANY else f"the other {len(unresolved)}"
        clauses.append(f"{few} {'is' if len(unresolved) == 1 else 'are'} not resolved")
    return "; ".join(clauses)


def _ends(arms: Sequence[str], effects: Mapping[str, Difference | Contrast]) -> list[str]:
    """The arms with the least and with the largest effect."""
    ordered = sorted(arms, key=lambda arm: effects[arm].mean)
    return [ordered[0], ordered[-1]]


def _enumerated(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _trend(names: Mapping[str, str], asked: Contrasts) -> str:
    resolved = [f"that of {names[arm]} {asked.verdict(arm)}" for arm, each in asked.answers.items() if each.resolved]
    where = f"as {asked.over.replace(' from ', ' goes from ')}"
    return f"{where}, no change of the gain is resolved" if not resolved else f"{where}, of the gains {_enumerated(resolved)}"


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each pair, contrast and cell of the primary metric, with its interval and adjusted p."""
    names, sentences = labels(comparison), []
    if (stated := comparison.primary_answer) is not None:
        for (arm, other), (pair, each) in zip(comparison.primary_contrasts, stated.answers.items(), strict=True):
            sentences.append(f"{stated.title}: {_sentence(comparison, names[arm], stated.verdict(pair), each, names[other])}")
    baseline = names[comparison.baseline]
    for asked in comparison.contrasts:
        for arm, each in asked.answers.items():
            sentences.append(f"{asked.title}: {_sentence(comparison, names[arm], asked.verdict(arm), each, baseline)}")
    for panel, arms in comparison.cells(comparison.primary).items():
        for arm, cell in arms.items():
            if cell.difference is not None:
                sentence = _sentence(comparison, names[arm], cell.verdict, cell.difference, baseline)
                sentences.append(f"{_in_panel(comparison, panel)}{sentence}, n = {cell.sample.n}")
    return sentences


def _sentence(comparison: Comparison, arm: str, verdict: str, effect: Difference | Contrast, other: str) -> str:
    show = comparison.primary.show
    compared = f"is {verdict} than" if verdict in itertools.chain(*WORDS.values()) else f"{verdict} against"
    compared = f"{compared} {other}" if effect.resolved else f"against {other} is not resolved"
    between = "" if effect.interval is None else f" [{', '.join(show(end, sign=True) for end in effect.interval)}]"
    p = "no p of single or equal runs" if effect.holm is None else f"adjusted p = {effect.holm:.2g}"
    return f"{arm} {compared}: {show(effect.mean, sign=True)}{between} {_points(comparison.primary)}, {p}"


# What seeds can resolve


def power(comparison: Comparison) -> list[str]:
    """Sentences on what the present seeds can resolve in the primary metric, and how many seeds would resolve less."""
    return [_resolved(comparison, each) for each in comparison.resolutions()]


def _resolved(comparison: Comparison, each: Resolution) -> str:
    where = f"{each.name}: " if each.pair else _in_panel(comparison, each.name)
    if each.least is None:
        missing = (
            "two seeds that both arms share" if comparison.blocks else "two seeds of the baseline and of an arm, with a spread"
        )
        return f"{where}nothing is tested; it takes {missing}"
    unit, advice = " points" * bool(comparison.primary.unit), ""
    seeds = "these seeds as blocks" if each.seeds is None else f"{each.seeds} seeds an arm"
    if each.more:
        (half, some), (quarter, many) = each.more.items()
        advice = f" For {half:.3g}{unit} use {some:,} seeds, for {quarter:.3g} use {many:,}."
    return f"{where}with {seeds}, only gains above {each.least:.3g}{unit} would be detected {CHANCE}.{advice}"


CHANCE = "(4 times in 5)" if POWER == 0.8 else f"(with probability {POWER:.0%})"


# How it was made


def columns(comparison: Comparison) -> str:
    """Meaning of the columns of the lab's runs; empty for other results."""
    return COLUMNS if comparison.recorded else ""


def legend(comparison: Comparison) -> str:
    """The meaning of marks and columns in tables."""
    return f"{LEGEND} {columns(comparison)}".rstrip()


def notes(comparison: Comparison) -> list[str]:
    """Sentences on how everything besides accuracy was measured, and where the numbers are from."""
    if not comparison.recorded:
        return _sources(comparison)
    parts = dict.fromkeys(metric.part for metric in comparison.metrics if metric.part in MEASURED)
    results = [result for panel in comparison.panels for result in panel.results]
    first = {part: next(result.parts[part] for result in results if part in result.parts) for part in parts}
    fitted = [FITTED] if any(metric.path.startswith("train.") for metric in comparison.metrics) else []
    cost = [COST + _uneven(comparison)] if any(metric.group == "cost" for metric in comparison.metrics) else []
    measured = [Template(MEASURED[part]).safe_substitute(each | each["settings"]) for part, each in first.items()]
    return [*_sources(comparison), *fitted, *cost, *measured]


def _sources(comparison: Comparison) -> list[str]:
    if not comparison.sources:
        return []
    ways = {1: "more is better", -1: "less is better", 0: "neither is better (say so with --higher or --lower)"}
    directions = "; ".join(f"{metric.label}: {ways[metric.better]}" for metric in comparison.known)
    return [f"From {', '.join(comparison.sources)}. {directions}."]


def _uneven(comparison: Comparison) -> str:
    """A sentence, where runs of one arm had unequal speeds."""
    speeds = [cell.sample.values for arms in comparison.cells(metric_of("speed")).values() for cell in arms.values()]
    if (factor := max((max(each) / min(each) for each in speeds if min(each) > 0), default=1.0)) <= UNEVEN:
        return ""
    return f" Runs of one arm differ by up to a factor of {factor:.1f} in images/s: their machines or their load differed."


def explanation(comparison: Comparison) -> str:
    """Sentences on how the numbers were made."""
    test = "seeds as blocks" if comparison.blocks else "Welch's t"
    means, data = ("Last epoch, means", "images") if comparison.recorded else ("Means", "data")
    return (
        f"{means} of seeds. {1 - ALPHA:.0%} intervals are not adjusted: Student's t for means, {test} for differences. "
        f"Verdicts go by {test}: p < {ALPHA:g} after Holm. {UNRESOLVED} {_families(comparison)} Other p-values stand beside it "
        "and change no verdict. Dunnett's test covers the arms of a panel and assumes equal variances. p by seed takes seeds as "
        "blocks: in a panel arms and seeds without interaction, the error pooled over the arms (with two arms, the paired t); "
        "over panels Student's t of each seed's sum of differences. All of this is about other seeds on these "
        f"{data}, which are one draw.{_shared(comparison)}"
    )


def _families(comparison: Comparison) -> str:
    """Which tests are adjusted together."""
    tests = comparison.comparisons(comparison.primary)
    families = [f"cells ({tests}: an arm against {labels(comparison)[comparison.baseline]} in a panel)"]
    forms = "means ({}: an arm's difference over all panels)", "trends ({}: its change per doubling)"
    families += [form.format(len(asked.answers)) for form, asked in zip(forms, comparison.contrasts, strict=False)]
    if comparison.primary_answer is not None:
        families.append(f"the primary question ({len(comparison.primary_contrasts)}: pairs of arms over all panels)")
    start = "One family of tests" if len(families) == 1 else "Families of tests, each adjusted by itself"
    return f"{start}: {'; '.join(families)}. Every other metric has a family of cells of its own."


def _shared(comparison: Comparison) -> str:
    """A sentence on what runs of one seed have in common, where arms share seeds."""
    if comparison.shared is None:
        return ""
    correlation, p = comparison.shared
    used = "which verdicts make use of" if comparison.blocks else "which Welch's t makes no use of"
    return (
        f" Arms share seeds: beyond the means of arms, results of one seed correlate by {correlation:+.2f} (intraclass; F test "
        f"p = {p:.2g}), {used}."
    )
