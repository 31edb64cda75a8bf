"""The numbers that verdicts and tables are about, and how each was measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orthokit.checks import check_choice
from orthokit.lab.runs.results import Result, numbers_at
from orthokit.lab.runs.summary import HUGE

__all__ = ["METRICS", "STRENGTHS", "Group", "Metric", "curve", "metric_of"]

Group = Literal["result", "orthogonality", "robustness", "features", "cost"]


@dataclass(frozen=True)
class Metric:
    """A number of a result."""

    key: str
    label: str
    group: Group
    better: Literal[-1, 0, 1]
    """+1 where more is better, -1 where less is, 0 where neither is a merit in itself."""
    path: str
    """Dotted keys in ``summary.json`` or, below ``evaluation``, in parts of ``evaluation.json``; the mean of a curve counts."""
    format: str = ".2f"
    unit: Literal["", "%"] = ""

    @property
    def heading(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def part(self) -> str | None:
        """The part of the evaluation that the metric is read from, if there is one."""
        first, second, *_ = [*self.path.split("."), None]
        return second if first == "evaluation" else None

    def read(self, result: Result) -> float | None:
        """The metric's value, None where it is missing or not finite; fractions become percent where that is the unit."""
        return self._of(result.numbers(self.path))

    def of(self, record: Mapping[str, Any]) -> float | None:
        """The metric's value in a dictionary such as a summary; see :meth:`read`."""
        return self._of(numbers_at(record, self.path))

    def _of(self, numbers: Sequence[float]) -> float | None:
        if not numbers or not all(abs(number) < HUGE for number in numbers):
            return None
        return statistics.fmean(numbers) * (100 if self.unit == "%" else 1)

    def show(self, value: float | None, sign: bool = False) -> str:
        """``value`` as text; a dash where there is none."""
        return "–" if value is None else format(value, "+" * sign + self.format)


METRICS = (
    Metric("accuracy", "test accuracy", "result", 1, "test.accuracy", unit="%"),
    Metric("train_accuracy", "training accuracy", "result", 1, "train.accuracy", unit="%"),
    Metric("train_loss", "training loss", "result", -1, "train.loss", ".3f"),
    Metric("test_loss", "test loss", "result", -1, "test.loss", ".3f"),
    Metric("nll", "NLL", "result", -1, "evaluation.accuracy.nll", ".3f"),
    Metric("ece", "ECE", "result", -1, "evaluation.accuracy.ece", unit="%"),
    Metric("under_cos", "wide: mean |c|", "orthogonality", 0, "orthogonality.under.mean_cos", ".2g"),
    Metric("under_residual", "wide: residual", "orthogonality", 0, "orthogonality.under.residual", ".2g"),
    Metric("under_copies", "wide: copies", "orthogonality", 0, "orthogonality.under.copies", ".1f"),
    Metric("over_cos", "tall: mean |c|", "orthogonality", 0, "orthogonality.over.mean_cos", ".2g"),
    Metric("over_tightness", "tall: tightness", "orthogonality", 0, "orthogonality.over.tightness", ".2g"),
    Metric("over_copies", "tall: copies", "orthogonality", 0, "orthogonality.over.copies", ".1f"),
    Metric("fgsm", "FGSM", "robustness", 1, "evaluation.attacks.fgsm", ".1f", "%"),
    Metric("pgd", "PGD L∞", "robustness", 1, "evaluation.attacks.pgd", ".1f", "%"),
    Metric("pgd_l2", "PGD L2", "robustness", 1, "evaluation.attacks.pgd_l2", ".1f", "%"),
    Metric("noise", "noise", "robustness", 1, "evaluation.noise.accuracy", ".1f", "%"),
    Metric("corruptions", "corruptions", "robustness", 1, "evaluation.corruptions.accuracy", ".1f", "%"),
    Metric("fgsm_kept", "FGSM, of right", "robustness", 1, "evaluation.attacks.fgsm_kept", ".1f", "%"),
    Metric("pgd_kept", "PGD L∞, of right", "robustness", 1, "evaluation.attacks.pgd_kept", ".1f", "%"),
    Metric("pgd_l2_kept", "PGD L2, of right", "robustness", 1, "evaluation.attacks.pgd_l2_kept", ".1f", "%"),
    Metric("noise_kept", "noise, of right", "robustness", 1, "evaluation.noise.kept", ".1f", "%"),
    Metric("corruptions_kept", "corruptions, of right", "robustness", 1, "evaluation.corruptions.kept", ".1f", "%"),
    Metric("effective_rank", "effective rank", "features", 0, "evaluation.features.penultimate.effective_rank", ".1f"),
    Metric("participation", "participation ratio", "features", 0, "evaluation.features.penultimate.participation_ratio", ".1f"),
    Metric("correlation", "mean |corr|", "features", 0, "evaluation.features.penultimate.mean_correlation", ".3f"),
    Metric("nc1", "NC1", "features", 0, "evaluation.features.penultimate.nc1"),
    Metric("speed", "images/s", "cost", 0, "images_per_second", ".0f"),
    Metric("share", "penalty in a step", "cost", 0, "penalty_share", ".1f", "%"),
)
"""Metrics in display order. A robustness metric is the mean over all strengths. Features are the penultimate layer's."""

STRENGTHS = {"fgsm": "linf", "pgd": "linf", "pgd_l2": "l2", "noise": "sigma"}
"""Metrics that are means of a curve, and the key of their part with its strengths."""


def curve(key: str, result: Result) -> dict[float, float]:
    """Strength -> accuracy, a fraction, of a metric in ``STRENGTHS``; empty where it was not measured."""
    metric = metric_of(key)
    part = result.parts.get(metric.part or "", {})
    return dict(zip(part.get(STRENGTHS[key], ()), part.get(metric.path.rpartition(".")[2], ()), strict=False))


def metric_of(key: str) -> Metric:
    """The metric of a key.

    Raises:
        ValueError: there is no such metric.
    """
    by_key = {metric.key: metric for metric in METRICS}
    check_choice("metric", key, list(by_key))
    return by_key[key]
