"""A table of layers with totals: what ``report`` and ``plan`` return. Prints itself; goes to a dict, CSV and JSON."""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from orthokit.checks import printable

__all__ = ["Column", "Row", "Table", "to_csv"]

Row = dict[str, Any]
FOLDED = 32
"""Width from which the first column is folded before another column is left out."""


@dataclass(frozen=True)
class Column:
    """A column: the rows' key, a header, and how to show a value. ``shown=False`` keeps it to the dict, CSV and JSON."""

    key: str
    header: str
    format: str = ".3g"
    shown: bool = True

    def show(self, value: Any) -> str:
        """``value`` as text that is safe to show; a dash where there is none."""
        return "–" if value is None else printable(format(value, self.format))


@dataclass(frozen=True)
class Table:
    """Rows (one per layer) and totals. In a narrow terminal the last columns are left out of the print, which says so.

    Attributes:
        title: printed above.
        columns: in order; the first names the row.
        rows: one dictionary per layer. A value that does not apply is None.
        totals: dictionaries with some of the same keys, by an identifier; ``label`` is what is printed in its place.
        notes: lines printed below.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    totals: dict[str, Row]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """``{"layers": [...], "totals": {...}}`` with plain Python values."""
        return {"layers": [dict(row) for row in self.rows], "totals": {name: dict(row) for name, row in self.totals.items()}}

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The dictionary as JSON; NaN and infinity, which JSON lacks, become null. Written to ``path`` if given."""
        return _write(json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """One line per layer, every column; see :func:`to_csv`. Written to ``path`` if given."""
        return _write(to_csv([column.key for column in self.columns], self.rows), path)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row per layer and every column.

        Raises:
            ModuleNotFoundError: pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from None
        return pandas.DataFrame(list(self.rows), columns=[column.key for column in self.columns])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable | Text]:
        every = [*self.rows, *self.totals.values()]
        columns = [c for c in self.columns if c.shown and any(row.get(c.key) is not None for row in every)]
        left_out, wide = list[str](), options.update(width=1000)
        while len(columns) > 2 and Measurement.get(console, wide, self._drawing(columns, FOLDED)).maximum > options.max_width:
            left_out.insert(0, columns.pop().header)
        yield self._drawing(columns)
        yield from (Text(printable(note)) for note in self.notes)
        if left_out:
            names = printable(", ".join(left_out))
            yield Text(f"not shown at this width: {names}; a wider terminal, to_dict() or --format json has them")

    def _drawing(self, columns: list[Column], first: int | None = None) -> RichTable:
        """The table for rich; ``first`` limits the width of the first column, which is folded where it is longer."""
        table = RichTable(title=Text(printable(self.title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            most = None if index else first
            table.add_column(
                Text(printable(column.header)),
                justify="right" if index else "left",
                no_wrap=bool(index),
                overflow="fold",
                max_width=most,
            )
        for index, row in enumerate(self.rows, 1):
            table.add_row(*(Text(c.show(row.get(c.key))) for c in columns), end_section=index == len(self.rows))
        for name, row in self.totals.items():
            values = (c.show(row[c.key]) if c.key in row else "" for c in columns[1:])
            table.add_row(*map(Text, (printable(row.get("label", name)), *values)), style="bold")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        width = shutil.get_terminal_size((110, 24)).columns
        Console(file=text, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def to_csv(keys: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Rows as CSV that a spreadsheet can open: text is printable, and no cell of text is a formula.

    Text that begins as a formula does, with ``= + - @``, gets an apostrophe in front unless it consists of numbers.

    >>> to_csv(["layer", "cosine"], [{"layer": "=1+1", "cosine": -0.5}, {"layer": "conv", "cosine": None}])
    "layer,cosine\n'=1+1,-0.5\nconv,\n"
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value, lines=True).replace("\n", " ")
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) and not all(map(_is_number, text.split())) else text


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str, path: str | PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
