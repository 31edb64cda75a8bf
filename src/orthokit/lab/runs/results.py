"""Results of finished runs, read from folders."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from orthokit.lab.recipes.recipe import Recipe, flatten
from orthokit.lab.runs.summary import DamagedError, Epoch, Evaluation, Summary, read_lines
from orthokit.lab.runs.summary import read as read_record

__all__ = ["RECORD", "Result", "Row", "digest", "digest_of", "history_of", "numbers_at", "read_one", "read_summary", "result_of"]

RECORD = "evaluation.json"
"""The file in a run's folder with what ``orthokit evaluate`` has measured."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run as a comparison reads it: ``summary.json``, ``evaluation.json`` and a few columns of ``metrics.jsonl``."""

    source: Path
    summary: dict[str, Any]
    recipe: Recipe
    parts: dict[str, Any]
    history: tuple[dict[str, Any], ...]

    @cached_property
    def flat(self) -> dict[str, str]:
        """The recipe as dotted keys and JSON."""
        return flatten(self.recipe.to_dict())

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.summary["seed"])

    def numbers(self, path: str) -> list[float]:
        """The numbers that a metric's path leads to: one, all of a curve's, or none."""
        return numbers_at(self.summary | {"evaluation": self.parts}, path)

    def small(self) -> dict[str, Any]:
        """The result as one dictionary of a few kilobytes: a ``summary.json`` that :func:`read_one` reads as the same result."""
        return self.summary | {"evaluation": self.parts, "history": list(self.history)}


@dataclass(frozen=True, eq=False)
class Row(Result):
    """A run of which only seed and numbers are known: a line of somebody's CSV file, by column. It has no recipe."""

    recipe: None  # type: ignore[assignment]
    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, seed: int, values: Mapping[str, float]) -> "Row":
        """The run of a line."""
        return cls(source, {"seed": seed}, None, {}, (), values)

    def numbers(self, path: str) -> list[float]:
        """The number in the column of this name, if there is one."""
        return [self.values[path]] if path in self.values else []


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a ``summary.json``.

    Raises:
        ValueError: the file is damaged or not what a run writes.
    """
    summary = read_record(Summary, path)
    return summary | {key: summary.get(key) or {} for key in ("study", "environment")}


def read_one(path: Path) -> Result:
    """The run whose ``summary.json`` this is. An evaluation of other weights than are there now does not count.

    Raises:
        ValueError: a file is damaged or not what a run writes.
    """
    summary = read_summary(path)
    parts, history = summary.pop("evaluation", None), summary.pop("history", None)
    if parts is None:
        parts = _parts_of(path.with_name(RECORD), path.with_name("last.safetensors"))
    if history is None:
        history = history_of(path.with_name("metrics.jsonl"))
    return result_of(summary | {"evaluation": parts, "history": history}, path)


def result_of(summary: dict[str, Any], source: Path) -> Result:
    """The result that a summary with its evaluation and history holds.

    Raises:
        DamagedError: its recipe is not one.
    """
    parts, history = summary.pop("evaluation", None) or {}, summary.pop("history", None) or ()
    try:
        recipe = _recipe(summary["recipe"], str(source))
    except ValueError as error:
        raise DamagedError(str(error)) from None
    summary |= {key: summary.get(key) or {} for key in ("study", "environment")}
    return Result(source, summary, recipe, parts, tuple(history))


def _recipe(raw: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of a run, checked once for all runs that have the same."""
    try:
        return _recipe_of_text(json.dumps(raw))
    except ValueError:
        return Recipe.of(raw, source)  # says where


@lru_cache(maxsize=4096)
def _recipe_of_text(text: str) -> Recipe:
    return Recipe.of(json.loads(text))


def _parts_of(file: Path, weights: Path) -> dict[str, Any]:
    """The parts in ``evaluation.json``, if they are of these weights."""
    try:
        record = read_record(Evaluation, file)
    except FileNotFoundError:
        return {}
    parts: dict[str, Any] = record["parts"]
    return {} if weights.is_file() and record["weights"] != digest(weights) else parts


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights of a network: of names, shapes, types and bytes, whatever else their file holds."""
    return hashlib.sha256(save(dict(weights))).hexdigest()


def digest(weights: Path) -> str:
    """SHA-256 of a file."""
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def history_of(path: Path, rows: int = 25) -> list[dict[str, Any]]:
    """Near-orthogonality and validation accuracy of at most ``rows`` epochs of ``metrics.jsonl``, the last included."""
    try:
        lines = read_lines(Epoch, path)
    except FileNotFoundError:
        return []
    step = max(1, -(-len(lines) // rows))
    return [_thin(line) for line in lines[::-1][::step][::-1]]


def _thin(row: dict[str, Any]) -> dict[str, Any]:
    cosines = {part: row["orthogonality"].get(part, {}).get("mean_cos") for part in ("under", "over")}
    return {
        "epoch": row["epoch"],
        "validation": row["validation"] and round(row["validation"]["accuracy"], 4),
        **{part: float(f"{value:.3g}") for part, value in cosines.items() if value is not None},
    }


def numbers_at(record: Mapping[str, Any], path: str) -> list[float]:
    """The numbers in a nested dictionary below dotted keys."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return list(_numbers(value))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)
