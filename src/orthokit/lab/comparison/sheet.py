"""Comparisons of results from anywhere, in CSV files with a line for each run.

.. code-block:: text

    arm,seed,network,accuracy,loss
    none,0,ResNet-8,66.2,0.98
    strict,0,ResNet-8,66.9,0.96

``arm`` and ``seed`` must be there. Runs that differ in ``panel`` or ``network``, or in the columns ``by``, are compared
separately. Every other column is a metric. An empty cell is a missing value. Intervals, verdicts, power and pages are those of
the lab's runs.
"""

import csv
import io
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from orthokit.checks import did_you_mean, printable
from orthokit.lab.comparison.comparability import Panel, gaps, missing_numbers
from orthokit.lab.comparison.comparison import Blocks, Comparison
from orthokit.lab.comparison.inference import Sample, pooled_sd
from orthokit.lab.comparison.metrics import METRICS, Metric
from orthokit.lab.comparison.panels import baseline_of, pair_of
from orthokit.lab.runs.results import Row

__all__ = ["COLUMN", "Line", "compare_lines", "direction", "lines_of"]

KEYS = ("arm", "seed")
PANELS = ("panel", "network")
COLUMN = "column."
"""Beginning of a column's path, by which no column is taken for a number that the lab records, such as ``train.loss``."""
MORE = {
    "accuracy",
    "acc",
    "auc",
    "auroc",
    "f1",
    "map",
    "miou",
    "iou",
    "bleu",
    "psnr",
    "ssim",
    "score",
    "precision",
    "recall",
    "r2",
}
LESS = {"loss", "error", "err", "nll", "ece", "mse", "rmse", "mae", "perplexity", "ppl", "fid", "wer", "cer"}
"""Words in the name of a metric by which more, or less, of it is better."""


@dataclass(frozen=True)
class Line:
    """A run, and the line of the file that holds it."""

    where: str
    arm: str
    panel: tuple[str, ...]
    row: Row


def lines_of(paths: Sequence[Path], by: Sequence[str] = ()) -> tuple[list[str], list[str], list[Line]]:
    """The columns that tell panels apart, the metrics, and the runs of CSV files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing or stands twice, a value is not a number, a run stands twice, or there is no run.
    """
    panels, metrics = list[str](), dict[str, None]()
    lines: list[Line] = []
    firsts: dict[tuple[tuple[str, ...], str, int], str] = {}
    for index, path in enumerate(paths):
        panel_columns, columns, rows = _table(path, by)
        panels = panels if index else panel_columns
        if panel_columns != panels:
            ours, theirs = (" and ".join(names) or "none" for names in (panel_columns, panels))
            raise ValueError(
                f"{path} and {paths[0]} tell panels apart by different columns, {ours} and {theirs}; give both the same columns"
            )
        metrics |= dict.fromkeys(columns)
        for where, cells in rows:
            line = _line(where, cells, panels, columns, path)
            key = line.panel, line.arm, line.row.seed
            if (first := firsts.setdefault(key, where)) != where:
                raise ValueError(f"{where}: {', '.join([line.arm, *line.panel])}, seed {line.row.seed} stands in {first} already")
            lines.append(line)
    if not lines:
        raise ValueError(f"{', '.join(map(str, paths))}: a header, and no runs below it")
    return panels, list(metrics), lines


def _table(path: Path, by: Sequence[str]) -> tuple[list[str], list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The columns of a file that tell panels apart, the metrics, and the lines as text."""
    try:
        text = path.read_text("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = [row for row in _numbered_rows(text, delimiter) if any(map(str.strip, row[1]))]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; give a CSV file, or folders of runs") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error})") from None
    if not rows:
        raise ValueError(f"{path} is empty; it needs a header with arm, seed and the names of metrics")
    names = [printable(name.strip()) for name in rows[0][1]]
    names = [name.lower() if name.lower() in (*KEYS, *PANELS) else name for name in names]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} stands there twice; rename one of them")
    if missing := [key for key in KEYS if key not in names]:
        raise ValueError(f"{path} needs a column {missing[0]!r}{did_you_mean(missing[0], names)}")
    if unknown := [key for key in by if key not in names]:
        raise ValueError(f"{path} has no column {unknown[0]!r} to tell panels apart{did_you_mean(unknown[0], names)}")
    panels = list(dict.fromkeys(by)) or [name for name in PANELS if name in names]
    metrics = [name for name in names if name and name not in (*KEYS, *panels)]
    if not metrics:
        raise ValueError(f"{path} has no column with a metric, such as accuracy; it has {', '.join(filter(None, names))}")

    def below() -> Iterator[tuple[str, dict[str, str]]]:
        for number, cells in rows[1:]:
            where = f"{path}, line {number}"
            if len(cells) != len(names):
                raise ValueError(f"{where} has {len(cells)} cells, but the header has {len(names)}")
            yield where, {name: printable(cell.strip()) for name, cell in zip(names, cells, strict=True) if name}

    return panels, metrics, below()


def _numbered_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for row in reader:
        yield reader.line_num, row


def _line(where: str, cells: dict[str, str], panels: Sequence[str], metrics: Sequence[str], path: Path) -> Line:
    if empty := [name for name in ("arm", *panels) if not cells[name]]:
        raise ValueError(f"{where}: {empty[0]} is empty")
    seed = _number(cells["seed"])
    if seed is None or not seed.is_integer():
        raise ValueError(f"{where}: seed must be a whole number; got {cells['seed']!r}")
    values = {}
    for name in metrics:
        if cells[name]:
            if (value := _number(cells[name])) is None:
                raise ValueError(
                    f"{where}: {name} must be a number; got {cells[name]!r}; leave the cell empty if there is no value, or "
                    f"say --by {name} if this column tells panels apart"
                )
            values[COLUMN + name] = value
    return Line(where, cells["arm"], tuple(cells[name] for name in panels), Row.of(path, int(seed), values))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def direction(name: str, higher: Collection[str] = (), lower: Collection[str] = ()) -> Literal[-1, 0, 1]:
    """Whether more (1) or less (-1) of a metric is better, as told or by its name; 0 where its name does not say.

    >>> from orthokit.lab.comparison.sheet import direction
    >>> direction("top-1 accuracy"), direction("val_loss"), direction("sparsity"), direction("sparsity", higher=["sparsity"])
    (1, -1, 0, 1)
    """
    if name in higher or name in lower:
        return 1 if name in higher else -1
    betters = [metric.better for metric in METRICS if name.lower() in (metric.key, metric.label.lower())]
    words = set(re.findall(r"[a-z]+\d*", name.lower()))
    return betters[0] if betters else -1 if words & LESS else 1 if words & MORE else 0


def compare_lines(
    paths: Sequence[Path],
    *,
    title: str = "comparison",
    question: str = "",
    by: Sequence[str] = (),
    baseline: str | None = None,
    metric: str | None = None,
    higher: Sequence[str] = (),
    lower: Sequence[str] = (),
    blocks: Blocks | None = None,
    contrasts: Sequence[str] = (),
) -> Comparison:
    """The comparison of the runs in CSV files.

    Args:
        paths: the files; see the top of this module.
        title: printed above tables and pages.
        question: the question that the comparison is to answer, in one sentence.
        by: columns that tell panels apart; by default ``panel`` and ``network``, where they are there.
        baseline: an arm; by default the one called ``none`` or ``baseline``.
        metric: the column that verdicts go by; by default the first one.
        higher: columns of which more is better, where their name does not say so.
        lower: columns of which less is better.
        blocks: see :func:`orthokit.lab.comparison.comparison.compare`.
        contrasts: see there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the files are not of this form, or there is nothing to compare.
    """
    panels, names, lines = lines_of(paths, by)
    for name in (*higher, *lower, *([metric] if metric else [])):
        if name not in names:
            raise ValueError(f"no column {name!r} with a metric{did_you_mean(name, names)}")
    if both := set(higher) & set(lower):
        raise ValueError(f"more and less of {min(both)} cannot both be better; name it once, with --higher or --lower")
    arms = list(dict.fromkeys(line.arm for line in lines))
    if len(arms) < 2:
        raise ValueError(f"there is only one arm, {arms[0]}; the column arm must hold two or more")
    baseline = baseline_of(baseline, arms)
    order = [baseline, *(arm for arm in arms if arm != baseline)]
    keys = list(dict.fromkeys(line.panel for line in lines))
    if all(isinstance(_plain(value), float | int) for key in keys for value in key):
        keys.sort(key=lambda key: [float(value) for value in key])
    groups = []
    for key in keys:
        runs = {arm: sorted((x.row for x in lines if (x.arm, x.panel) == (arm, key)), key=lambda r: r.seed) for arm in order}
        words = [
            f"{name}={value}" if len(panels) > 1 or _plain(value) != value else value
            for name, value in zip(panels, key, strict=True)
        ]
        values = {name: _plain(value) for name, value in zip(panels, key, strict=True)} if len(keys) > 1 else {}
        groups.append(Panel(", ".join(words) or "all runs", values, {arm: tuple(rows) for arm, rows in runs.items() if rows}))
    metrics = [_metric(name, direction(name, higher, lower), groups) for name in names]
    primary = metrics[names.index(metric)] if metric else metrics[0]
    comparison = Comparison(
        printable(title),
        baseline,
        tuple(groups),
        factor=(),
        primary=primary,
        flags=(*(each for panel in groups for each in gaps(panel, baseline)), *missing_numbers(groups, metrics)),
        known=tuple(metrics),
        sources=tuple(printable(path.name) for path in paths),
        question=printable(question),
        blocks=blocks,
        primary_contrasts=tuple(pair_of(each, order) for each in contrasts),
    )
    if not comparison.cells(primary):
        raise ValueError(f"no run has a finite number of {primary.label}")
    return comparison


def _plain(value: str) -> float | int | str:
    number = _number(value)
    return value if number is None or not math.isfinite(number) else int(number) if number.is_integer() else number


def _metric(name: str, better: Literal[-1, 0, 1], panels: Sequence[Panel]) -> Metric:
    """A metric with as many decimals as two digits of the standard deviation of seeds need."""
    metric = Metric(name, name, "result", better, COLUMN + name)
    values = [[metric.read(row) for row in rows] for panel in panels for rows in panel.arms.values()]
    sd = pooled_sd([Sample(tuple(value for value in numbers if value is not None)) for numbers in values])
    decimals = 1 - math.floor(math.log10(sd)) if sd else 2
    return replace(metric, format=f".{max(decimals, 0)}f" if decimals < 9 else ".3g")
