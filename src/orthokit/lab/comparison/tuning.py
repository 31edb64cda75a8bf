"""The rule by which a strength is chosen, on validation images and seeds of their own: in studies, and in sweeps.

In a study:

.. code-block:: toml

    [tune]
    seeds = [100, 101, 102]             # none of the study's own
    values = [0.01, 0.03, 0.1, 0.3]     # of regularizer.strength, for every arm that has a regularizer
    network = "ResNet-20"               # choose on this network for all; by default each panel chooses its own

    [tune.arms]                         # own values of single arms
    srip = [0.001, 0.01]

The rule is ours, after the one-standard-error rule of Breiman, Friedman, Olshen, Stone, "Classification and Regression Trees"
(1984): chosen is the strongest value whose mean validation accuracy, in the last epoch, lies within one standard error of the
best mean. The standard error is that of a mean over the seeds, from the standard deviation pooled over the values. A value of
which a run diverged is out. Test images have no part in it.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import Field, model_validator

from orthokit.checks import did_you_mean
from orthokit.lab.comparison.inference import Sample, pooled_sd
from orthokit.lab.comparison.metrics import Metric
from orthokit.lab.recipes.sections import Section
from orthokit.lab.runs.results import Result
from orthokit.lab.runs.run import Seeds

__all__ = ["RULE", "STRENGTH", "VALIDATION", "Choice", "Trial", "Tune", "cautions", "distinct"]

RULE = (
    "Chosen (*), by a rule of ours: the strongest value whose mean validation accuracy in the last epoch lies within one "
    "standard error (the sd of the tuning seeds, pooled over the arm's values, by the root of their number) of the best mean; "
    "a value of which a run diverged is out, and neither test images nor the seeds of the comparison have a part in it."
)
STRENGTH = "regularizer.strength"
"""The key that is chosen."""
VALIDATION = Metric("validation", "validation accuracy", "result", 1, "validation.accuracy", unit="%")
Values = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


def distinct(lists: Mapping[str, Collection[object]]) -> None:
    """Raise ``ValueError`` where two values of a list are equal."""
    for name, values in lists.items():
        if any(a == b for a, b in itertools.combinations(values, 2)):
            raise ValueError(f"{name} must differ; got {values}")


class Tune(Section):
    """``[tune]``: the strengths of which every arm with a regularizer gets the best, and the seeds that choose."""

    seeds: Annotated[Seeds, Field(min_length=2)]
    """Seeds of the runs that choose; at least two, as one has no standard error."""
    values: Values
    """Values of ``regularizer.strength``, in place of the arm's own."""
    network: str | None = None
    """The network whose runs choose for all; by default each network has its own choice."""
    arms: Annotated[dict[str, Values], Field(default_factory=dict)]
    """Values of single arms."""

    @model_validator(mode="after")
    def _consistent(self) -> "Tune":
        distinct({"seeds": self.seeds, "values": self.values, **{f"arms.{arm}": values for arm, values in self.arms.items()}})
        return self

    def check(self, seeds: Iterable[int], arms: Collection[str], networks: Collection[str]) -> None:
        """Raise ``ValueError`` where a study with these seeds, arms and networks cannot be tuned so."""
        if common := [seed for seed in seeds if seed in self.seeds]:
            raise ValueError(f"tune.seeds must be others than those of the study, which has {common} too")
        if self.network is not None and self.network not in networks:
            raise ValueError(f"tune.network: no network {self.network!r}{did_you_mean(self.network, networks)}")
        if unknown := [arm for arm in self.arms if arm not in arms]:
            raise ValueError(f"tune.arms: no arm {unknown[0]!r}{did_you_mean(unknown[0], arms)}")

    def of(self, arm: str) -> list[float]:
        """The values of an arm, the least first."""
        return sorted(self.arms.get(arm, self.values))


@dataclass(frozen=True)
class Trial:
    """A strength, and the validation accuracies (%) of the seeds that finished with it."""

    strength: float
    sample: Sample
    diverged: int = 0
    """Seeds that diverged."""

    @classmethod
    def of(cls, strength: float, results: Iterable[Result], diverged: int) -> "Trial":
        """The trial of a strength, read from finished runs."""
        values = [VALIDATION.read(result) for result in results]
        return cls(strength, Sample(tuple(value for value in values if value is not None)), diverged)


@dataclass(frozen=True)
class Choice:
    """The strengths that were tried with an arm, by all seeds, and the one that the rule of this module chooses.

    >>> from orthokit.lab.comparison.inference import Sample
    >>> from orthokit.lab.comparison.tuning import Choice, Trial
    >>> tried = {0.01: (90.0, 90.4), 0.1: (90.3, 90.7), 1.0: (90.1, 90.5), 10.0: (80.0, 80.4)}
    >>> choice = Choice("so", "", tuple(Trial(strength, Sample(values)) for strength, values in tried.items()))
    >>> choice.best.strength, round(choice.error, 3), choice.chosen.strength
    (0.1, 0.2, 1.0)
    """

    arm: str
    panel: str
    trials: tuple[Trial, ...]
    """Trials, the weakest first."""

    @cached_property
    def able(self) -> list[Trial]:
        """The trials of which no run diverged; there may be none."""
        return [trial for trial in self.trials if not trial.diverged]

    @cached_property
    def best(self) -> Trial:
        """The trial of the highest mean; the strongest of equals."""
        return max(self.able, key=lambda trial: (trial.sample.mean, trial.strength))

    @cached_property
    def error(self) -> float:
        """Standard error of a mean."""
        return (pooled_sd([trial.sample for trial in self.able]) or 0.0) / math.sqrt(self.best.sample.n)

    @cached_property
    def chosen(self) -> Trial:
        """The strongest within one standard error of the best."""
        near = [trial for trial in self.able if trial.sample.mean >= self.best.sample.mean - self.error]
        return max(near, key=lambda trial: trial.strength)

    @property
    def edge(self) -> str | None:
        """The arm, if its chosen or its best value is the first or the last one tried, and which of the two is."""
        ends = self.trials[0], self.trials[-1]
        trials = {"chosen": self.chosen} | ({"best": self.best} if self.best is not self.chosen else {})
        parts = [f"{name} {trial.strength:g}" for name, trial in trials.items() if trial in ends]
        return f"{self.arm} ({', '.join(parts)})" if parts else None


def cautions(choices: Iterable[Choice]) -> list[str]:
    """A sentence for each panel that chose strengths at an edge."""
    by_panel: dict[str, list[str]] = {}
    for choice in choices:
        if choice.edge is not None:
            by_panel.setdefault(choice.panel, []).append(choice.edge)
    sentence = "strengths at the edge of those tried, beyond which better ones may lie"
    return [": ".join(filter(None, [panel, sentence, "; ".join(arms)])) for panel, arms in by_panel.items()]
