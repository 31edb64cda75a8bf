"""Schemas of a study's file."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from orthokit.checks import did_you_mean
from orthokit.lab.comparison.comparability import under
from orthokit.lab.comparison.comparison import FACTOR, Blocks
from orthokit.lab.comparison.metrics import METRICS, metric_of
from orthokit.lab.comparison.panels import pair_of
from orthokit.lab.comparison.tuning import Tune, distinct
from orthokit.lab.evaluation.evaluate import PARTS, check_parts
from orthokit.lab.recipes.sections import Section
from orthokit.lab.runs.run import Seeds

__all__ = ["Evaluation", "Partial", "Study"]

Partial = dict[str, Any]
"""A part of a recipe."""
STRENGTH = "regularizer.strength"


class Evaluation(Section):
    """``[evaluate]``: the measurements of every trained network."""

    parts: Annotated[list[str], Field(default_factory=lambda: list(PARTS))]
    """Keys of ``orthokit.lab.evaluation.evaluate.PARTS``."""
    images: int = Field(1000, ge=1)
    """Test images that serve attacks, noise and corruptions."""

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: list[str]) -> list[str]:
        check_parts(parts)
        return parts


class Study(Section):
    """The file of a study."""

    FILES = ("recipe",)
    PARTIAL = ("arms", "networks")
    title: str
    question: str = ""
    """The question that the study is to answer, in one sentence; printed above the answer."""
    recipe: str | Annotated[list[str], Field(min_length=1)]
    """Parts of recipes, or files; several are merged in order."""
    seeds: Seeds
    arms: Annotated[dict[str, Partial], Field(min_length=2)]
    """Parts of a recipe, by name."""
    networks: Annotated[dict[str, Partial], Field(min_length=1)] | None = None
    """Parts of a recipe, by name."""
    factors: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(default_factory=dict)]
    """Values of keys of the recipe."""
    baseline: str | None = None
    """An arm; the first one by default."""
    factor: Annotated[list[str], Field(default_factory=lambda: list(FACTOR))]
    """Keys or sections of the recipe in which arms may differ."""
    metric: str = METRICS[0].key
    """The metric that verdicts go by."""
    contrasts: Annotated[list[str], Field(default_factory=list)]
    """The primary question: ``"<arm> - <arm>"``, differences averaged over the panels and adjusted over these alone."""
    blocks: Blocks | None = None
    """``"seed"``: verdicts go by tests with seeds as blocks."""
    tune: Tune | None = None
    evaluate: Annotated[Evaluation, Field(default_factory=lambda: Evaluation.model_validate({}))]

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        distinct({"contrasts": [pair_of(each, self.arms) for each in self.contrasts]})
        distinct({"seeds": self.seeds} | {f"factors.{key}": values for key, values in self.factors.items()})
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: no arm {self.baseline!r}{did_you_mean(self.baseline, self.arms)}")
        if self.metric not in (keys := [metric.key for metric in METRICS]):
            raise ValueError(f"metric: none is called {self.metric!r}{did_you_mean(self.metric, keys)}")
        if (part := metric_of(self.metric).part) is not None and part not in self.evaluate.parts:
            raise ValueError(f"metric = {self.metric!r} needs {part!r} among evaluate.parts")
        if self.tune is not None:
            self.tune.check(self.seeds, self.arms, self.networks or {})
            if not under(STRENGTH, self.factor) or any(under(STRENGTH, [key]) for key in self.factors):
                raise ValueError(f"[tune] chooses {STRENGTH}, arm by arm: it must be a part of factor, and none of factors")
        return self
