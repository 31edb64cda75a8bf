"""A comparison in print: on a terminal, as Markdown, LaTeX and CSV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orthokit.lab.comparison.comparison import Cell, Comparison
from orthokit.lab.comparison.inference import Blocked, Contrast, Difference
from orthokit.lab.comparison.metrics import Group, Metric
from orthokit.lab.comparison.tuning import RULE, VALIDATION, Choice, Trial
from orthokit.tables import to_csv as safe_csv

Line = list[str]
GROUPS: dict[Group, str] = {
    "result": "Result",
    "orthogonality": "Near-orthogonality",
    "robustness": "Robustness",
    "features": "Features",
    "cost": "Cost",
}
STYLES = {"better": "bold green", "worse": "bold red", "not resolved": "dim", "rises": "bold", "falls": "bold"}
BY_SEED = "p by seed (n)"
MARKS = {"better": "+", "worse": "-", "higher": "↑", "lower": "↓"}
"""Beside a mean that differs from the baseline's; only where that is resolved."""
COLUMNS = (
    "Under and over: layers that can be orthogonal, and those with more filters than weights per filter. Copies: pairs with "
    "|c| > .99. Robustness: accuracy, the mean over all strengths; of right: among images that are "
    "right unchanged, where that was measured. Features: penultimate."
)
CONTRAST = (
    "The gain averaged over all panels, each weighing the same, or its change each time what grows doubles (linear over the "
    "binary logarithm). Errors come from the seeds alone, with Satterthwaite's degrees of freedom. Each table is a family of its "
    "own: its p are adjusted after Holm over its lines. By seed: pairs within each panel, a seed one block in all of them; n "
    "counts seeds of a panel."
)
LEGEND = "Mean ± sd; + better, - worse, ↑ higher, ↓ lower than the baseline, where resolved."


def columns(comparison: Comparison) -> str:
    """What columns of the lab's runs are; nothing of others."""
    return COLUMNS if comparison.recorded else ""


def legend(comparison: Comparison) -> str:
    """Of tables with marks."""
    return f"{LEGEND} {columns(comparison)}".rstrip()


def p(value: float | None) -> str:
    """A p-value."""
    return "–" if value is None else "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0")


def by_seed(found: Blocked | None) -> str:
    """The p-value of a test with seeds as blocks, and how many seeds both arms have in a panel."""
    if found is None:
        return "–"
    ends = sorted({min(found.seeds), max(found.seeds)})
    return f"{p(found.p)} ({' to '.join(map(str, ends))})"


def interval(metric: Metric, ends: tuple[float, float] | None, sign: bool = False) -> str:
    """``[low, high]``."""
    return "–" if ends is None else f"[{metric.show(ends[0], sign)}, {metric.show(ends[1], sign)}]"


def mean(metric: Metric, cell: Cell | None) -> str:
    """``mean ± sd``."""
    if cell is None:
        return "–"
    spread = "" if cell.sample.sd is None else f" ± {metric.show(cell.sample.sd)}"
    return f"{metric.show(cell.sample.mean)}{spread}"


def primary(comparison: Comparison) -> tuple[Line, dict[str, list[Line]]]:
    """Headers, and the lines of each panel, of the table that verdicts are read from."""
    metric = comparison.primary
    headers = [
        "arm",
        "n",
        "mean ± sd",
        "95% interval",
        "difference",
        "95% interval",
        "Welch p",
        "Holm p",
        "Dunnett p",
        BY_SEED,
        "verdict",
    ]
    lines = {}
    for panel, arms in comparison.cells(metric).items():
        lines[panel] = [[arm, str(cell.sample.n), mean(metric, cell), *_tested(metric, cell)] for arm, cell in arms.items()]
    return headers, lines


def _tested(metric: Metric, cell: Cell) -> Line:
    own, found = interval(metric, cell.sample.interval), cell.difference
    if found is None:
        return [own, *["–"] * 7]
    ps = [p(found.welch), p(found.holm), p(found.dunnett), by_seed(found.blocked)]
    return [own, metric.show(found.mean, sign=True), interval(metric, found.interval, sign=True), *ps, cell.verdict]


def groups(comparison: Comparison) -> Iterator[tuple[str, list[Metric]]]:
    """Title and metrics of each group that there are numbers of."""
    for group, title in GROUPS.items():
        if metrics := [metric for metric in comparison.metrics if metric.group == group]:
            yield title, metrics


def secondary(comparison: Comparison) -> Iterator[tuple[str, Line, dict[str, list[Line]]]]:
    """Title, headers and lines of each panel, for each group of metrics besides the primary one."""
    for title, every in groups(comparison):
        metrics = [metric for metric in every if metric != comparison.primary]
        if not metrics:
            continue
        lines = {
            panel.name: [
                [arm, *(_marked(metric, comparison.cell(metric, panel.name, arm)) for metric in metrics)] for arm in panel.arms
            ]
            for panel in comparison.panels
        }
        yield title, ["arm", *(metric.heading for metric in metrics)], lines


def contrasts(comparison: Comparison) -> Iterator[tuple[str, Line, dict[str, list[Line]]]]:
    """Title, headers and lines of the primary question, if one is stated, and of what is asked of all panels at once."""
    metric = comparison.primary
    for asked in filter(None, [comparison.question, *comparison.contrasts]):
        lines = []
        for arm, each in asked.found.items():
            ends = metric.show(each.mean, sign=True), interval(metric, each.interval, sign=True)
            lines.append([arm, *ends, p(each.raw), by_seed(each.blocked), p(each.holm), asked.verdict(arm)])
        question = asked is comparison.question
        what = f"{asked.name[0].upper()}{asked.name[1:]}" if question else f"Against {comparison.baseline}: {asked.name}"
        headers = ["contrast" if question else "arm", asked.name.rpartition(": ")[2], "95% interval", "p", BY_SEED]
        yield f"{what} in {metric.heading}", [*headers, "Holm p", "verdict"], {asked.over: lines}


def chosen(comparison: Comparison) -> Iterator[tuple[str, Line, dict[str, list[Line]]]]:
    """Title, headers and lines of each panel, of how strengths were chosen, if they were."""
    if not comparison.choices:
        return
    strengths = sorted({trial.strength for choice in comparison.choices for trial in choice.trials})
    panels = dict.fromkeys(choice.panel for choice in comparison.choices)
    lines = {
        panel or comparison.panels[0].name: [_choice(choice, strengths) for choice in comparison.choices if choice.panel == panel]
        for panel in panels
    }
    headers = ["arm", "n", "chosen", "standard error", *(f"{strength:g}" for strength in strengths)]
    yield f"Strengths: {VALIDATION.heading}", headers, lines


def _choice(choice: Choice, strengths: Sequence[float]) -> Line:
    tried = {trial.strength: trial for trial in choice.trials}
    told = str(choice.chosen.sample.n), f"{choice.chosen.strength:g}", VALIDATION.show(choice.error)
    return [choice.arm, *told, *(_tried(choice, tried.get(each)) for each in strengths)]


def _tried(choice: Choice, trial: Trial | None) -> str:
    if trial is None:
        return ""
    if trial.diverged:
        return "diverged"
    return mean(VALIDATION, Cell(trial.sample)) + " *" * (trial is choice.chosen)


def _marked(metric: Metric, cell: Cell | None) -> str:
    mark = MARKS.get(cell.verdict, "") if cell else ""
    return f"{mean(metric, cell)} {mark}".rstrip()


class Shown:
    """The comparison on a terminal; where that is too narrow columns that matter less are left out."""

    def __init__(self, comparison: Comparison, *, secondary: bool = True) -> None:
        self.comparison, self.more = comparison, secondary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        comparison = self.comparison
        for flag in comparison.flags:
            yield Text.assemble(("! ", "bold red"), (flag, "red"))
        headers, lines = primary(comparison)
        drop = [6, 8, 9, 3, 5, 7, 1]  # Welch's, Dunnett's and the seeds' p, intervals, Holm's p, n: least needed first
        kept = list(range(len(headers)))
        for panel, rows in lines.items():
            title, less = f"{comparison.primary.heading}: {panel}", list(drop)
            while _wide(table := _drawn(title, headers, rows, kept), console, options) and less:
                kept = [place for place in kept if place != less[0]]
                less = less[1:]
            if _wide(table, console, options):
                table = _drawn(title, headers, rows, kept, fold=True)
            yield table
        yield from (Text(each) for each in comparison.verdicts())
        yield Text()
        for tables, words in (
            (contrasts(comparison), CONTRAST),
            (secondary(comparison) if self.more else (), legend(comparison)),
            (chosen(comparison), RULE),
        ):
            found = list(tables)
            for title, names, parts in found:
                for panel, rows in parts.items():
                    yield Wide(f"{title}: {panel}", names, rows)
            if found:
                yield Text(words, style="dim")
        yield from (Text(f"power: {each}") for each in comparison.power())
        yield Padding(Text("\n".join([comparison.explanation, *comparison.notes]), style="dim"), (1, 0, 0, 0))


def _wide(table: Table, console: Console, options: ConsoleOptions) -> bool:
    return console.measure(table, options=options.update(width=1000)).maximum > options.max_width


def _drawn(title: str | None, headers: Sequence[str], rows: Sequence[Line], kept: Sequence[int], *, fold: bool = False) -> Table:
    words = None if title is None else Text(title)
    table = Table(title=words, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place in kept:
        left = place == 0 or headers[place] == "verdict"
        table.add_column(headers[place], justify="left" if left else "right", no_wrap=place > 0 and not fold, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[place], style=STYLES.get(row[place], "")) for place in kept))
    return table


@dataclass(frozen=True)
class Wide:
    """A table on a terminal; several below each other where it is wider."""

    title: str
    headers: Line
    rows: list[Line]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        kept, title = [0], self.title or None
        for place in range(1, len(self.headers)):
            wider = _drawn(title, self.headers, self.rows, [*kept, place])
            if len(kept) > 1 and _wide(wider, console, options):
                yield _drawn(title, self.headers, self.rows, kept)
                kept, title = [0], None
            kept.append(place)
        yield _drawn(title, self.headers, self.rows, kept)


def markdown(comparison: Comparison, *, figures: Sequence[tuple[str, str]] = (), command: str | None = None) -> str:
    """As GitHub's Markdown.

    Args:
        comparison: what to write.
        figures: file and description of pictures to show.
        command: what made it.
    """
    parts = [f"# {_plain(comparison.title)}"]
    parts += [f"Made by `{command}`."] if command else []
    parts += [f"> **Caution.** {_plain(flag)}" for flag in comparison.flags]
    headers, lines = primary(comparison)
    parts += [f"## {comparison.primary.heading[0].upper()}{comparison.primary.heading[1:]}"]
    parts += [f"**{_plain(panel)}**\n\n{_pipes(headers, rows)}" for panel, rows in lines.items()]
    parts += ["\n".join(f"* {_plain(each)}" for each in comparison.verdicts())]
    parts += ["\n".join(f"* {_plain(each)}" for each in comparison.power()), _plain(comparison.explanation)]
    parts += [f"![{_plain(words)}]({file})" for file, words in figures]
    for tables, words in (
        (contrasts(comparison), [CONTRAST]),
        (secondary(comparison), [legend(comparison), *comparison.notes]),
        (chosen(comparison), [RULE]),
    ):
        found = list(tables)
        for title, names, each in found:
            parts += [f"## {_plain(title)}", *(f"**{_plain(panel)}**\n\n{_pipes(names, rows)}" for panel, rows in each.items())]
        parts += words if found else []
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """On one line, and no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _pipes(headers: Line, rows: Sequence[Line]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headers), "|---" + "|---:" * (len(headers) - 1) + "|", *map(line, rows)])


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "∞": r"$\infty$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "|": r"$|$",
    "<": "$<$",
    "[": "{[}",
    "\n": " ",
    ">": "$>$",
}


def latex(comparison: Comparison) -> str:
    r"""As LaTeX tables, which need ``\usepackage{booktabs}``: the primary metric, every group of the others, chosen strengths."""
    headers, lines = primary(comparison)
    tables = [(comparison.primary.heading, headers, lines), *contrasts(comparison), *secondary(comparison), *chosen(comparison)]
    cautions = "".join(f"% CAUTION: {' '.join(flag.split())}\n" for flag in comparison.flags)
    return f"{cautions}% {legend(comparison)}\n" + "\n".join(_tabular(comparison.title, *table) for table in tables)


def _tabular(title: str, caption: str, headers: Line, panels: dict[str, list[Line]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(SPECIAL.get(c, c) for c in cell) for cell in cells) + r" \\"

    body = []
    for panel, rows in panels.items():
        body += [r"\midrule", rf"\multicolumn{{{len(headers)}}}{{l}}{{{line([panel])[:-3]}}} \\", *map(line, rows)]
    words = line([f"{title}: {caption}"])[:-3]
    top = [r"\begin{table}", r"\centering", rf"\caption{{{words}}}", rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}"]
    return "\n".join([*top, r"\toprule", line(headers), *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def to_csv(comparison: Comparison) -> str:
    """A line for each metric, panel and arm, and for each strength that was tried, with unrounded numbers."""
    keys = ["metric", "panel", "arm", "n", "mean", "sd", "low", "high", "difference", "difference_low", "difference_high"]
    keys += ["p_welch", "p_holm", "p_dunnett", "verdict", "values", "p_blocked", "n_blocked"]
    return safe_csv(keys, [dict.fromkeys(keys) | row for row in _rows(comparison)])


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for metric in comparison.known:
        for panel, arms in comparison.cells(metric).items():
            for arm, cell in arms.items():
                yield {"metric": metric.key, "panel": panel, "arm": arm} | _raw(cell)
    for asked in filter(None, [comparison.question, *comparison.contrasts]):
        for arm, found in asked.found.items():
            row = {"metric": comparison.primary.key, "panel": asked.title, "arm": arm, "verdict": asked.verdict(arm)}
            yield _raw_difference(found) | {"p_welch": found.raw} | row
    for choice in comparison.choices:
        for trial in choice.trials:
            said = "diverged" if trial.diverged else "chosen" * (trial is choice.chosen)
            arm = f"{choice.arm}, strength={trial.strength:g}"
            tried = _raw(Cell(trial.sample, verdict=said)) if trial.sample.n else {"n": 0, "verdict": said}
            yield {"metric": VALIDATION.key, "panel": choice.panel, "arm": arm} | tried


def _raw(cell: Cell) -> dict[str, Any]:
    sample, found = cell.sample, cell.difference
    row: dict[str, Any] = {"n": sample.n, "mean": sample.mean, "sd": sample.sd, "verdict": cell.verdict}
    row |= dict(zip(("low", "high"), sample.interval or (None, None), strict=True))
    row["values"] = " ".join(f"{value:g}" for value in sample.values)
    return row if found is None else row | _raw_difference(found) | {"p_welch": found.welch, "p_dunnett": found.dunnett}


def _raw_difference(found: Difference | Contrast) -> dict[str, Any]:
    row: dict[str, Any] = {"difference": found.mean, "p_holm": found.holm}
    row |= dict(zip(("difference_low", "difference_high"), found.interval or (None, None), strict=True))
    if found.blocked is not None:
        row |= {"p_blocked": found.blocked.p, "n_blocked": " ".join(map(str, found.blocked.seeds))}
    return row
