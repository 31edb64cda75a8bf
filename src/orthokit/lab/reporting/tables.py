"""The tables of a comparison, each made once; a terminal, Markdown, LaTeX and pages print the same ones.

A row is identified by ``panel`` and ``arm``; what is printed in their place is a label. Values keep their numbers and know how to
print themselves in the format of their column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orthokit.lab.comparison.comparison import Cell, Comparison, Contrasts
from orthokit.lab.comparison.inference import Blocked, Contrast, Difference
from orthokit.lab.comparison.metrics import Group, Metric
from orthokit.lab.comparison.tuning import RULE, VALIDATION, Choice, Trial
from orthokit.lab.reporting import words
from orthokit.tables import Column, Row, Table

__all__ = ["GROUPS", "Effect", "Ends", "Name", "P", "Spread", "Tried", "numbers", "sections", "tables", "verdict_of"]

GROUPS: dict[Group, str] = {
    "result": "Result",
    "orthogonality": "Near-orthogonality",
    "robustness": "Robustness",
    "features": "Features",
    "cost": "Cost",
}
MARKS = {"better": "+", "worse": "-", "higher": "↑", "lower": "↓"}
"""Beside a mean that differs from the baseline's, only where that is resolved."""
TEXT = "s"
"""The format of columns with words; they are set flush left."""


# Values


class Name(str):
    """An identifier that prints a label in its place."""

    __slots__ = ("label",)
    label: str

    def __new__(cls, identifier: str, label: str) -> "Name":
        """The identifier as a string, and its label."""
        name = super().__new__(cls, identifier)
        name.label = label
        return name

    def __format__(self, spec: str) -> str:
        return self.label


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its standard deviation: ``66.4 ± 0.5``, and a mark if its difference is resolved."""

    mean: float
    sd: float | None
    verdict: str = ""

    def __format__(self, spec: str) -> str:
        spread = "" if self.sd is None else f" ± {self.sd:{spec}}"
        return f"{self.mean:{spec}}{spread} {MARKS.get(self.verdict, '')}".rstrip()


@dataclass(frozen=True)
class Ends:
    """An interval: ``[low, high]``."""

    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"[{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class P:
    """A p-value with four decimals; by seed, with the number of seeds that both arms have in a panel."""

    value: float
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, test: "float | Blocked | None") -> "P | None":
        """None stays None."""
        return None if test is None else cls(test.p, test.seeds) if isinstance(test, Blocked) else cls(test)

    def __format__(self, spec: str) -> str:
        shown = "<.0001" if self.value < 1e-4 else f"{self.value:.4f}".lstrip("0")
        return shown + (f" ({' to '.join(map(str, sorted({min(self.seeds), max(self.seeds)})))})" if self.seeds else "")


@dataclass(frozen=True)
class Effect:
    """A difference from the baseline with its verdict: ``+1.30 better``."""

    mean: float
    verdict: str

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} {self.verdict}"


@dataclass(frozen=True)
class Tried:
    """The validation accuracy of a strength, whether a run of it diverged, and whether it was chosen."""

    trial: Trial
    chosen: bool

    def __format__(self, spec: str) -> str:
        if self.trial.diverged:
            return "diverged"
        return f"{Spread(self.trial.sample.mean, self.trial.sample.sd):{spec}}{' *' * self.chosen}"


def verdict_of(value: Any) -> str:
    """The verdict of a cell, by which it is coloured; empty for other values."""
    verdict = value if isinstance(value, str) else getattr(value, "verdict", "")
    return verdict if verdict in COLOURED else ""


COLOURED = (*MARKS, "rises", "falls", "not resolved")


# Tables


def tables(comparison: Comparison) -> dict[str, Table]:
    """Every table of a comparison that there are numbers for, in the order of print.

    Keys: ``verdicts`` (arms by panels), ``primary`` (the metric that verdicts go by, with every test), ``question`` (the stated
    pairs), ``mean`` and ``trend`` (over all panels), one for each group of the other metrics in ``GROUPS``, ``strengths``.
    """
    made = dict(_all(comparison))
    return {key: table for key, table in made.items() if table.rows}


def _all(comparison: Comparison) -> Iterator[tuple[str, Table]]:
    yield "verdicts", _verdicts(comparison)
    yield "primary", _primary(comparison)
    for key, asked in zip(("question", "mean", "trend"), (comparison.primary_answer, *comparison.contrasts), strict=False):
        if asked is not None:
            yield key, _contrasts(comparison, asked)
    for group, title in GROUPS.items():
        metrics = [m for m in comparison.metrics if m.group == group and m != comparison.primary]
        if metrics:
            yield group, _group(comparison, title, metrics)
    if comparison.choices:
        yield "strengths", _strengths(comparison)


def sections(table: Table) -> list[tuple[str, list[Row]]]:
    """The rows of each panel, in order."""
    panels: dict[str, list[Row]] = {}
    for row in table.rows:
        panels.setdefault(str(row.get("panel", "")), []).append(row)
    return list(panels.items())


def _names(comparison: Comparison) -> dict[str, Name]:
    return {arm: Name(arm, label) for arm, label in words.labels(comparison).items()}


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _verdicts(comparison: Comparison) -> Table:
    """Arms by panels: difference and verdict."""
    metric, names = comparison.primary, _names(comparison)
    mean = comparison.contrasts[0] if comparison.contrasts else None
    cells = comparison.cells(metric)
    columns = [Column("arm", "arm", TEXT)]
    columns += [] if mean is None else [Column("mean", f"mean of {mean.over}", "+" + metric.format)]
    columns += [Column(f"in {panel}", panel, "+" + metric.format) for panel in cells]
    rows = []
    for arm in comparison.arms:
        row: Row = {"panel": "", "arm": names[arm]}
        if mean is not None and arm in mean.answers:
            row["mean"] = Effect(mean.answers[arm].mean, mean.verdict(arm))
        for panel, arms in cells.items():
            if arm in arms and (difference := arms[arm].difference) is not None:
                row[f"in {panel}"] = Effect(difference.mean, arms[arm].verdict)
        rows += [row] if len(row) > 2 else []
    what = f"{_capital(metric.label)}: difference from {names[comparison.baseline].label}{', points' * bool(metric.unit)}"
    return Table(what, tuple(columns), tuple(rows), {}, (words.UNRESOLVED,))


def _primary(comparison: Comparison) -> Table:
    """The table that verdicts are read from."""
    metric, names = comparison.primary, _names(comparison)
    plain, signed = metric.format, "+" + metric.format
    columns = (
        Column("arm", "arm", TEXT),
        Column("verdict", "verdict", TEXT),
        Column("difference", "difference", signed),
        Column("interval", "95% interval", signed),
        Column("spread", "mean ± sd", plain),
        Column("n", "n", "d"),
        Column("holm", "p (Holm)", ""),
        Column("own_interval", "95% interval of the mean", plain),
        Column("welch", "p (Welch's t)", ""),
        Column("dunnett", "p (Dunnett)", ""),
        Column("by_seed", "p by seed (n)", ""),
    )
    rows = []
    for panel, arms in comparison.cells(metric).items():
        for arm, cell in arms.items():
            ends = cell.sample.interval
            row = {"panel": panel, "arm": names[arm], "n": cell.sample.n, "spread": Spread(cell.sample.mean, cell.sample.sd)}
            row |= {"own_interval": None if ends is None else Ends(*ends), "verdict": cell.verdict or None}
            if arm == comparison.baseline:
                row["verdict"] = "baseline"
            rows.append(row | (_effect(cell.difference) if cell.difference else {}))
    return Table(_capital(metric.heading), columns, tuple(rows), {}, (words.UNRESOLVED,))


def _effect(effect: Difference | Contrast) -> Row:
    row: Row = {"difference": effect.mean, "interval": None if effect.interval is None else Ends(*effect.interval)}
    row |= {"holm": P.of(effect.holm), "by_seed": P.of(effect.blocked)}
    if isinstance(effect, Contrast):
        return row | {"welch": P.of(effect.raw)}
    return row | {"welch": P.of(effect.welch), "dunnett": P.of(effect.dunnett)}


def _contrasts(comparison: Comparison, asked: Contrasts) -> Table:
    """The primary question, or what is asked of all panels at once."""
    metric, names = comparison.primary, _names(comparison)
    labels = dict(names)
    if question := asked is comparison.primary_answer:
        pairs = zip(asked.answers, comparison.primary_contrasts, strict=True)
        labels = {pair: Name(pair, f"{names[arm].label} - {names[other].label}") for pair, (arm, other) in pairs}
    signed = "+" + metric.format
    columns = (
        Column("arm", "contrast" if question else "arm", TEXT),
        Column("verdict", "verdict", TEXT),
        Column("difference", asked.name.rpartition(": ")[2], signed),
        Column("interval", "95% interval", signed),
        Column("holm", "p (Holm)", ""),
        Column("welch", "p (Welch's t)", ""),
        Column("by_seed", "p by seed (n)", ""),
    )
    rows = [
        {"panel": asked.over, "arm": labels[arm], "verdict": asked.verdict(arm)} | _effect(each)
        for arm, each in asked.answers.items()
    ]
    what = _capital(asked.name) if question else f"Against {names[comparison.baseline].label}: {asked.name}"
    return Table(f"{what} in {metric.heading}", columns, tuple(rows), {}, (words.CONTRAST,))


def _group(comparison: Comparison, title: str, metrics: Sequence[Metric]) -> Table:
    """A group of metrics besides the primary one."""
    names = _names(comparison)
    columns = Column("arm", "arm", TEXT), *(Column(metric.key, metric.heading, metric.format) for metric in metrics)
    rows = []
    for panel in comparison.panels:
        for arm in panel.arms:
            cells = {metric.key: comparison.cell(metric, panel.name, arm) for metric in metrics}
            spreads = {
                key: None
                if cell is None
                else Spread(cell.sample.mean, cell.sample.sd, cell.verdict if cell.verdict in MARKS else "")
                for key, cell in cells.items()
            }
            rows.append({**spreads, "panel": panel.name, "arm": names[arm]})
    return Table(title, columns, tuple(rows), {}, (words.legend(comparison),))


def _strengths(comparison: Comparison) -> Table:
    """Table of how the strengths of a study's arms were chosen."""
    names = _names(comparison)
    strengths = sorted({trial.strength for choice in comparison.choices for trial in choice.trials})
    columns = [Column("arm", "arm", TEXT), Column("chosen", "chosen", "g"), Column("n", "n", "d")]
    columns += [Column("error", "standard error", VALIDATION.format)]
    columns += [Column(f"{strength:g}", f"{strength:g}", VALIDATION.format) for strength in strengths]
    rows = [_choice(choice, choice.panel or comparison.panels[0].name, names.get(choice.arm)) for choice in comparison.choices]
    return Table(f"Strengths: {VALIDATION.heading}", tuple(columns), tuple(rows), {}, (RULE,))


def _choice(choice: Choice, panel: str, name: Name | None) -> Row:
    row: Row = {"panel": panel, "arm": name or choice.arm, "n": choice.chosen.sample.n}
    row |= {"chosen": choice.chosen.strength, "error": choice.error}
    return row | {f"{trial.strength:g}": Tried(trial, trial is choice.chosen) for trial in choice.trials}


# All numbers

KEYS = ["metric", "panel", "arm", "n", "mean", "sd", "low", "high", "difference", "difference_low", "difference_high"]
KEYS += ["p_welch", "p_holm", "p_dunnett", "verdict", "values", "p_blocked", "n_blocked"]


def numbers(comparison: Comparison) -> Table:
    """Every number, not rounded: a row for each metric, panel and arm, each contrast, and each strength that was tried."""
    rows = tuple(dict.fromkeys(KEYS) | row for row in _numbers(comparison))
    return Table(comparison.title, tuple(Column(key, key, "") for key in KEYS), rows, {})


def _numbers(comparison: Comparison) -> Iterator[Row]:
    for metric in comparison.known:
        for panel, arms in comparison.cells(metric).items():
            for arm, cell in arms.items():
                yield {"metric": metric.key, "panel": panel, "arm": arm} | _raw(cell)
    for asked in filter(None, [comparison.primary_answer, *comparison.contrasts]):
        for arm, answer in asked.answers.items():
            row = {"metric": comparison.primary.key, "panel": asked.title, "arm": arm, "verdict": asked.verdict(arm)}
            yield _raw_effect(answer) | {"p_welch": answer.raw} | row
    for choice in comparison.choices:
        for trial in choice.trials:
            verdict = "diverged" if trial.diverged else "chosen" * (trial is choice.chosen)
            arm = f"{choice.arm}, strength={trial.strength:g}"
            result = _raw(Cell(trial.sample, verdict=verdict)) if trial.sample.n else {"n": 0, "verdict": verdict}
            yield {"metric": VALIDATION.key, "panel": choice.panel, "arm": arm} | result


def _raw(cell: Cell) -> Row:
    sample, difference = cell.sample, cell.difference
    row: Row = {"n": sample.n, "mean": sample.mean, "sd": sample.sd, "verdict": cell.verdict}
    row |= dict(zip(("low", "high"), sample.interval or (None, None), strict=True))
    row["values"] = " ".join(repr(float(value)) for value in sample.values)
    if difference is None:
        return row
    return row | _raw_effect(difference) | {"p_welch": difference.welch, "p_dunnett": difference.dunnett}


def _raw_effect(effect: Difference | Contrast) -> Row:
    row: Row = {"difference": effect.mean, "p_holm": effect.holm}
    row |= dict(zip(("difference_low", "difference_high"), effect.interval or (None, None), strict=True))
    if effect.blocked is not None:
        row |= {"p_blocked": effect.blocked.p, "n_blocked": " ".join(map(str, effect.blocked.seeds))}
    return row
