"""A comparison as Markdown and LaTeX, from the tables and words that every other form uses."""

import re
from collections.abc import Mapping, Sequence

from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.reporting import words
from orthokit.lab.reporting.tables import TEXT, sections, tables
from orthokit.tables import Column, Row, Table

__all__ = ["latex", "markdown"]


def markdown(
    comparison: Comparison,
    *,
    figures: Sequence[tuple[str, ...]] = (),
    command: str | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The comparison as GitHub's Markdown: question, answer, tables, figures, and how it was made.

    Args:
        comparison: what to write.
        figures: file and description of each picture to show, and what to print below it if anything; the best one first.
        command: the command that makes it again.
        links: name and address of what belongs to it.
    """
    made = tables(comparison)
    parts = [f"# {_plain(comparison.title)}"]
    parts += [f"**Question.** {_plain(comparison.question)}"] if comparison.question else []
    parts += [f"**Answer.** {_plain(words.answer(comparison))}"]
    parts += [f"> **Caution.** {_plain(flag)}" for flag in comparison.flags]
    parts += [_footing(comparison, command, links or {})]
    first, *others = ["\n\n".join(_picture(*figure)) for figure in figures] or [""]
    parts += [first] if first else []
    if len(comparison.panels) > 1 and (table := made.get("verdicts")) is not None:
        parts += [f"## {_plain(table.title)}", _pipes(table), *table.notes]
    made.pop("verdicts", None)
    notes: dict[str, None] = {}
    for key, table in made.items():
        parts += [f"## {_heading(table)}", _pipes(table)]
        notes |= dict.fromkeys(table.notes)
        if key == "primary":
            parts += ["\n".join(f"* {_plain(_sentence(each))}" for each in words.power(comparison)), *others]
    below = [*notes, words.explanation(comparison), *words.notes(comparison)]
    return "\n\n".join([*parts, "## How it was made", *map(_plain, below)]) + "\n"


def _footing(comparison: Comparison, command: str | None, links: Mapping[str, str]) -> str:
    """Number of runs, the command that makes the page again, and the files that belong to it."""
    parts = [f"{words.counts(comparison)}; the baseline is {_plain(words.labels(comparison)[comparison.baseline])}."]
    parts += [f"Made by `{command}`."] if command else []
    parts += [" · ".join(f"[{name}]({address})" for name, address in links.items())] if links else []
    return " ".join(parts)


def _picture(file: str, text: str, *below: str) -> list[str]:
    return [f"![{_plain(text)}]({file})", *(f"*{_plain(line)}*" for line in below)]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _heading(table: Table) -> str:
    panels = [panel for panel, _ in sections(table) if panel]
    return _plain(f"{table.title}: {panels[0]}" if len(panels) == 1 else table.title)


def _plain(text: str) -> str:
    """``text`` on one line, in which nothing begins a tag, a link, a picture, code or a formula."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))
    return re.sub(r"[\\`$]|(?<=\])[(\[]", r"\\\g<0>", text)


def _pipes(table: Table) -> str:
    """A table of pipes; where there are several panels, each of them is named in its first row."""
    several = len(sections(table)) > 1
    columns = [Column("panel", "panel", TEXT), *table.columns] if several else list(table.columns)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [line([column.header for column in columns])]
    lines += ["|" + "|".join("---" if column.format == TEXT else "---:" for column in columns) + "|"]
    for panel, rows in sections(table):
        for row in rows:
            named: Row = row | {"panel": f"**{panel}**" if row is rows[0] else ""}
            lines.append(line([column.show(named.get(column.key)) for column in columns]))
    return "\n".join(lines)


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "²": "$^2$",
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
    r"""Every table of a comparison as LaTeX, which needs ``\usepackage{booktabs}``."""
    cautions = "".join(f"% CAUTION: {' '.join(flag.split())}\n" for flag in comparison.flags)
    made = [_tabular(comparison.title, table) for table in tables(comparison).values()]
    return f"{cautions}% {words.legend(comparison)}\n" + "\n".join(made)


def _tabular(title: str, table: Table) -> str:
    columns = table.columns

    def escaped(text: str) -> str:
        return "".join(SPECIAL.get(c, c) for c in text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    body = []
    for panel, rows in sections(table):
        body += [r"\midrule"]
        body += [rf"\multicolumn{{{len(columns)}}}{{l}}{{{escaped(panel)}}} \\"] if panel else []
        body += [line([column.show(row.get(column.key)) for column in columns]) for row in rows]
    form = "".join("l" if column.format == TEXT else "r" for column in columns)
    top = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(f'{title}: {table.title}')}}}", rf"\begin{{tabular}}{{{form}}}"]
    header = line([column.header for column in columns])
    return "\n".join([*top, r"\toprule", header, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
