"""What finished runs left, and the numbers that can be read off it."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orthokit.checks import check_choice
from orthokit.lab.recipe import Recipe
from orthokit.lab.record import read_json

Group = Literal["result", "orthogonality", "robustness", "features", "cost"]


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run as a comparison reads it: ``summary.json``, ``evaluation.json`` and a few columns of ``metrics.jsonl``."""

    source: Path
    summary: dict[str, Any]
    recipe: Recipe
    parts: dict[str, Any]
    history: tuple[dict[str, Any], ...]

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.summary["seed"])

    def small(self) -> dict[str, Any]:
        """All of it as one dictionary of a few kilobytes, from which :func:`read` makes the same again."""
        return self.summary | {"evaluation": self.parts, "history": list(self.history)}


def read(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The finished runs in and below folders, and notes on those that are not finished.

    Raises:
        FileNotFoundError: nothing is there, or no finished run.
        ValueError: a file is damaged or not what a run writes.
    """
    found: dict[Path, Result] = {}
    unfinished: dict[Path, str] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; give folders of runs, such as runs/nano_cifar10_strict")
        top = path.parent if path.is_file() else path
        for file in sorted(top.rglob("summary.json")):
            found.setdefault(file.resolve(), _read(file))
        for file in sorted(top.rglob("recipe.toml")):
            if not (file.parent / "summary.json").is_file():
                unfinished[file.parent] = "failed" if (file.parent / "failed.txt").is_file() else "not finished"
    if not found:
        raise FileNotFoundError(f"no finished run (summary.json) in {', '.join(map(str, paths))}")
    notes = []
    for kind in ("failed", "not finished"):
        if names := [f"{folder.parent.name}/{folder.name}" for folder, why in unfinished.items() if why == kind]:
            bias = "; what remains of its arm may be a lucky choice" if kind == "failed" else ""
            notes.append(f"{kind}, hence left out: {', '.join(names)}{bias}")
    return list(found.values()), notes


def _read(path: Path) -> Result:
    summary = read_json(path, recipe=dict, seed=int, test=dict, orthogonality=dict, fingerprint=str)
    if not isinstance(summary["test"].get("accuracy"), float):
        raise ValueError(f"{path} is not what a run writes (no accuracy in test)")
    parts, history = summary.pop("evaluation", None), summary.pop("history", None)
    if parts is None:
        file = path.with_name("evaluation.json")
        parts = read_json(file, parts=dict)["parts"] if file.is_file() else {}
    if history is None:
        file = path.with_name("metrics.jsonl")
        history = thinned(file) if file.is_file() else []
    return Result(path, summary, Recipe.of(summary["recipe"], str(path)), parts, tuple(history))


def thinned(path: Path, rows: int = 25) -> list[dict[str, Any]]:
    """Near-orthogonality and validation accuracy of at most ``rows`` epochs of ``metrics.jsonl``, the last included."""
    lines = path.read_text("utf-8").splitlines()
    step = -(-len(lines) // rows)
    chosen = [json.loads(line) for line in lines[::-1][:: max(1, step)][::-1]]
    return [
        {
            "epoch": row["epoch"],
            "validation": row["validation"] and round(row["validation"]["accuracy"], 4),
            **{
                part: float(f"{row['orthogonality'][part]['mean_cos']:.3g}")
                for part in ("under", "over")
                if row["orthogonality"].get(part, {}).get("mean_cos") is not None
            },
        }
        for row in chosen
    ]


@dataclass(frozen=True)
class Metric:
    """A number of a result. ``better``: +1 where more is better, -1 where less is, 0 where neither is a merit in itself."""

    key: str
    label: str
    group: Group
    better: Literal[-1, 0, 1]
    read: Callable[[Result], float | None]
    format: str = ".2f"
    part: str | None = None
    """Of the evaluation it is read from, if any: results evaluated differently do not compare."""

    def show(self, value: float | None, sign: bool = False) -> str:
        """``value`` as text; a dash where there is none."""
        return "–" if value is None else format(value, "+" * sign + self.format)


def _in(*keys: str, factor: float = 1.0, of: Literal["summary", "parts"] = "summary") -> Callable[[Result], float | None]:
    """Reads a nested number; the mean of the numbers where there are several."""

    def look(result: Result) -> float | None:
        value: Any = getattr(result, of)
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        numbers = list(_numbers(value))
        return factor * statistics.fmean(numbers) if numbers else None

    return look


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield float(value)


METRICS = (
    Metric("accuracy", "test accuracy, %", "result", 1, _in("test", "accuracy", factor=100)),
    Metric("nll", "NLL", "result", -1, _in("accuracy", "nll", of="parts"), ".3f", "accuracy"),
    Metric("ece", "ECE, %", "result", -1, _in("accuracy", "ece", of="parts", factor=100), part="accuracy"),
    Metric("under_cos", "mean |c| under", "orthogonality", 0, _in("orthogonality", "under", "mean_cos"), ".2g"),
    Metric("under_residual", "residual under", "orthogonality", 0, _in("orthogonality", "under", "residual"), ".2g"),
    Metric("over_cos", "mean |c| over", "orthogonality", 0, _in("orthogonality", "over", "mean_cos"), ".2g"),
    Metric("over_tightness", "tightness over", "orthogonality", 0, _in("orthogonality", "over", "tightness"), ".2g"),
    Metric("copies", "copies", "orthogonality", 0, lambda result: _copies(result), ".1f"),
    Metric("fgsm", "FGSM, %", "robustness", 1, _in("attacks", "fgsm", of="parts", factor=100), ".1f", "attacks"),
    Metric("pgd", "PGD L∞, %", "robustness", 1, _in("attacks", "pgd", of="parts", factor=100), ".1f", "attacks"),
    Metric("pgd_l2", "PGD L2, %", "robustness", 1, _in("attacks", "pgd_l2", of="parts", factor=100), ".1f", "attacks"),
    Metric("noise", "noise, %", "robustness", 1, _in("noise", "accuracy", of="parts", factor=100), ".1f", "noise"),
    Metric(
        "corruptions",
        "corruptions, %",
        "robustness",
        1,
        _in("corruptions", "accuracy", of="parts", factor=100),
        ".1f",
        "corruptions",
    ),
    Metric(
        "effective_rank",
        "effective rank",
        "features",
        0,
        _in("features", "penultimate", "effective_rank", of="parts"),
        ".1f",
        "features",
    ),
    Metric(
        "participation",
        "participation ratio",
        "features",
        0,
        _in("features", "penultimate", "participation_ratio", of="parts"),
        ".1f",
        "features",
    ),
    Metric(
        "correlation",
        "mean |corr|",
        "features",
        0,
        _in("features", "penultimate", "mean_correlation", of="parts"),
        ".3f",
        "features",
    ),
    Metric("nc1", "NC1", "features", 0, _in("features", "penultimate", "nc1", of="parts"), ".2f", "features"),
    Metric("speed", "images/s", "cost", 0, _in("images_per_second"), ".0f"),
    Metric("share", "penalty, % of a step", "cost", 0, _in("penalty_share", factor=100), ".1f"),
)
"""In the order of tables. Of a robustness curve the mean over its strengths."""


def _copies(result: Result) -> float | None:
    parts = [result.summary["orthogonality"].get(part, {}).get("copies") for part in ("under", "over")]
    return float(sum(part for part in parts if part is not None)) if any(part is not None for part in parts) else None


def metric_of(key: str) -> Metric:
    """The metric of a key.

    Raises:
        ValueError: there is none.
    """
    known = {metric.key: metric for metric in METRICS}
    check_choice("metric", key, list(known))
    return known[key]
