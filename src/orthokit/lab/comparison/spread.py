"""The spread of results from seed to seed, by which new runs can be planned."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orthokit.lab.comparison.inference import Sample, pooled_sd
from orthokit.lab.comparison.metrics import Metric, metric_of
from orthokit.lab.comparison.sheet import COLUMN, lines_of
from orthokit.lab.runs import collect

__all__ = ["Spread", "spreads", "typical"]


@dataclass(frozen=True)
class Spread:
    """The standard deviation of seeds of one network and its data, pooled over the arms."""

    where: str
    runs: int
    arms: int
    sd: float


def spreads(paths: Sequence[Path], metric: str | None = None) -> tuple[str, list[Spread]]:
    """The metric's heading, and how it varies in each panel below folders of runs, or in CSV files.

    Args:
        paths: folders that hold runs or the results of studies, or CSV files as ``orthokit compare`` reads them.
        metric: a key of ``orthokit.lab.comparison.metrics.METRICS`` (test accuracy by default), or a column
            (the first one by default).

    Raises:
        FileNotFoundError: a path leads nowhere.
        ValueError: no arm has two runs with the metric, or a file is damaged.
    """
    sheets = [path for path in paths if path.suffix.lower() == ".csv"]
    if sheets and len(sheets) < len(paths):
        raise ValueError("give CSV files, or folders of runs, not both at once")
    heading, values = _of_sheets(sheets, metric) if sheets else _of_runs(paths, metric_of(metric or "accuracy"))
    rows = []
    for panel in dict.fromkeys(name for name, _ in values):
        samples = [Sample(tuple(each)) for (name, _), each in values.items() if name == panel and len(each) > 1]
        if sd := pooled_sd(samples):
            rows.append(Spread(panel, sum(sample.n for sample in samples), len(samples), sd))
    if not rows:
        raise ValueError(f"no arm has two runs that differ in {heading} in {', '.join(map(str, paths))}")
    return heading, rows


Values = dict[tuple[str, str], list[float]]
"""Panel and arm -> a value for each seed."""


def _of_sheets(paths: Sequence[Path], metric: str | None) -> tuple[str, Values]:
    _, names, lines = lines_of(paths)
    name = metric or names[0]
    if name not in names:
        raise ValueError(f"no column {name!r} with a metric; there are {', '.join(names)}")
    values: Values = {}
    for line in lines:
        values.setdefault((", ".join(line.panel) or line.row.source.stem, line.arm), []).extend(line.row.numbers(COLUMN + name))
    return name, values


def _of_runs(paths: Sequence[Path], metric: Metric) -> tuple[str, Values]:
    values: Values = {}
    for run in collect.read(paths)[0]:
        data, train = run.recipe.data, run.recipe.train
        network = " ".join(map(str, run.recipe.to_dict()["network"].values()))
        panel = f"{run.source.parents[2].name}, {network}, {train.epochs} epochs of {data.train or 'all'} images of {data.name}"
        if (value := metric.read(run)) is not None:
            values.setdefault((panel, str(run.source.parents[1])), []).append(value)
    return metric.heading, values


def typical(rows: Sequence[Spread]) -> float:
    """The median standard deviation over panels."""
    return statistics.median(each.sd for each in rows)
