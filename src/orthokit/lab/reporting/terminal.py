"""A comparison on a terminal, from the tables and words that every other form uses."""

from collections.abc import Iterator, Sequence
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.reporting import words
from orthokit.lab.reporting.tables import GROUPS, TEXT, sections, tables, verdict_of
from orthokit.tables import Column, Table

__all__ = ["Shown", "Wide"]

STYLES = {"better": "bold green", "worse": "bold red", "not resolved": "dim", "rises": "bold", "falls": "bold"}


class Shown:
    """The comparison: cautions, answer, tables and sentences. ``secondary=False`` leaves out what verdicts do not go by."""

    def __init__(self, comparison: Comparison, *, secondary: bool = True) -> None:
        self.comparison, self.secondary = comparison, secondary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        comparison = self.comparison
        yield Text(comparison.title, style="bold")
        for flag in comparison.flags:
            yield Text.assemble(("! ", "bold red"), (flag, "red"))
        yield from (Text(line) for line in (comparison.question, words.answer(comparison)) if line)
        made = tables(comparison)
        shown = {key: table for key, table in made.items() if self.secondary or key not in GROUPS}
        if len(comparison.panels) == 1:
            shown.pop("verdicts", None)  # the primary table of one panel shows the same
        notes: list[str] = []
        for key, table in shown.items():
            yield Text()
            yield Wide(table)
            if key == "primary":
                yield from (Text(sentence) for sentence in words.verdicts(comparison))
            notes += table.notes
        yield from (Text(f"power: {sentence}") for sentence in words.power(comparison))
        below = [*dict.fromkeys(notes), words.explanation(comparison), *words.notes(comparison)]
        yield Padding(Text("\n".join(below), style="dim"), (1, 0, 0, 0))


class Wide:
    """A table; in a terminal that is too narrow, several below each other."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        first, *others = self.table.columns
        part: list[Column] = [first]
        title: str | None = self.table.title
        for column in others:
            if len(part) > 1 and _wide(_drawn(self.table, [*part, column], title), console, options):
                yield self._fitting(part, title, console, options)
                part, title = [first], None
            part.append(column)
        yield self._fitting(part, title, console, options)

    def _fitting(self, columns: Sequence[Column], title: str | None, console: Console, options: ConsoleOptions) -> RichTable:
        drawn = _drawn(self.table, columns, title)
        return _drawn(self.table, columns, title, fold=True) if _wide(drawn, console, options) else drawn


def _wide(table: RichTable, console: Console, options: ConsoleOptions) -> bool:
    return console.measure(table, options=options.update(width=1000)).maximum > options.max_width


def _drawn(table: Table, columns: Sequence[Column], title: str | None, *, fold: bool = False) -> RichTable:
    """Some columns of a table; a line with its name opens each panel, unless there is only one, which stands in the title."""
    panels = sections(table)
    named = [panel for panel, _ in panels if panel]
    if title is not None and len(named) == 1:
        title = f"{title}: {named[0]}"
    drawn = RichTable(
        title=None if title is None else Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if column.format == TEXT else "right"
        drawn.add_column(Text(column.header), justify=justify, no_wrap=index > 0 and not fold, overflow="fold")
    for panel, rows in panels:
        if len(named) > 1:
            drawn.add_row(Text(panel, style="bold"))
        for row in rows:
            values = [row.get(column.key) for column in columns]
            cells = [
                Text(column.show(value), style=STYLES.get(verdict_of(value), ""))
                for column, value in zip(columns, values, strict=True)
            ]
            drawn.add_row(*cells, end_section=row is rows[-1] and len(named) > 1)
    return drawn
