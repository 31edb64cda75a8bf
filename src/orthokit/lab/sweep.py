"""Sweeps: a grid or an Optuna search over any keys of recipes, judged on validation accuracy alone.

.. code-block:: toml

    recipes = ["nano+cifar10+so", "nano+cifar10+strict"]
    seeds = [100, 101, 102]          # other seeds than those of the comparison that follows

    [grid]
    "regularizer.strength" = [0.01, 0.03, 0.1, 0.3]

or, in place of the grid:

.. code-block:: toml

    [search]
    trials = 20
    [search.space]
    "regularizer.strength" = { low = 1e-3, high = 1.0, log = true }
    "network.norm" = ["batch", "group"]

The best setting of each recipe is the one with the highest mean validation accuracy after the last epoch. Among settings that
differ from it in ``regularizer.strength`` alone, the rule of :mod:`orthokit.lab.comparison.tuning` decides, as in studies. There
is no state but the runs themselves: started again, a sweep repeats nothing and goes on.
"""

import itertools
import shlex
import statistics
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from orthokit.lab.atomic import to_json, write
from orthokit.lab.comparison.inference import Sample
from orthokit.lab.comparison.tuning import RULE, STRENGTH, Choice, Trial
from orthokit.lab.recipes.compose import inline, label, load, name_of, parse_setting, read_section
from orthokit.lab.recipes.sections import Section
from orthokit.lab.runs.run import Run, Seeds
from orthokit.tables import Column, Table

__all__ = ["Interval", "Point", "Search", "Sweep", "best", "edges", "read", "run", "save", "table"]

Settings = dict[str, Any]


class Interval(Section):
    """Numbers to search among: floats, or integers where both ends are."""

    low: float | int
    high: float | int
    log: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> "Interval":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low < high, and low > 0 with log; got low = {self.low}, high = {self.high}")
        return self


class Search(Section):
    """An Optuna search (tree-structured Parzen estimator)."""

    trials: int = Field(ge=1, le=10**5)
    """Number of settings tried with each recipe."""
    space: Annotated[dict[str, Interval | list[Any]], Field(min_length=1)]
    """An interval, or a list to choose from, for each key."""
    parallel: int = Field(4, ge=1, le=10**5)
    """Trials between two looks at the results; with the seed it fixes what is tried."""
    seed: int = Field(0, ge=0, lt=2**32)
    """The seed of the search."""


class Sweep(Section):
    """The file of a sweep."""

    FILES = ("recipes",)
    recipes: Annotated[list[str], Field(min_length=1)]
    """Parts joined by ``+``, or files; each gets its own best setting."""
    seeds: Seeds
    grid: Annotated[dict[str, list[Any]], Field(min_length=1)] | None = None
    search: Search | None = None
    set: Annotated[list[str], Field(default_factory=list)]
    """Settings of every run, as those of the command line."""

    @model_validator(mode="after")
    def _one(self) -> "Sweep":
        if (self.grid is None) == (self.search is None):
            raise ValueError("needs either [grid] or [search]")
        for key, values in (("recipes", list(map(name_of, self.recipes))), ("seeds", self.seeds)):
            if len({*values}) < len(values):
                raise ValueError(f"{key} must differ; got {values}")
        if empty := [key for key, values in (self.grid or {}).items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self


@dataclass(frozen=True)
class Point:
    """A setting of a recipe, and the validation accuracies of its seeds; fewer where runs failed."""

    recipe: str
    settings: tuple[str, ...]
    accuracies: tuple[float, ...]
    seeds: int

    @property
    def complete(self) -> bool:
        """Whether every seed finished: only then can it be the best."""
        return len(self.accuracies) == self.seeds

    @property
    def mean(self) -> float:
        """Mean validation accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def strength(self) -> float | None:
        """The value of ``regularizer.strength`` in the settings, if it is a number."""
        strengths = [parse_setting(setting)["regularizer"]["strength"] for setting in self.settings if _is_strength(setting)]
        return strengths[-1] if strengths and isinstance(strengths[-1], int | float) else None

    @property
    def others(self) -> list[str]:
        """The settings but for the strength."""
        return [setting for setting in self.settings if not _is_strength(setting)]

    @property
    def trial(self) -> Trial:
        """The point as the trial of a strength."""
        sample = Sample(tuple(100 * accuracy for accuracy in self.accuracies))
        return Trial(self.strength or 0.0, sample, diverged=self.seeds - sample.n)

    @property
    def command(self) -> str:
        """The command that trains the point's runs."""
        return shlex.join(["orthokit", "train", self.recipe, "--set", *self.settings])


def _is_strength(setting: str) -> bool:
    return setting.partition("=")[0].strip() == STRENGTH


def read(path: Path) -> Sweep:
    """The sweep of a TOML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not TOML, or not a sweep.
    """
    return read_section(Sweep, path)


def run(path: Path, out: Path, execute: Callable[[Sequence[Run]], int]) -> tuple[list[Point], int]:
    """Do what is left of the sweep in ``path``; return its points, and the highest status of ``execute``, which does the runs.

    Raises:
        ValueError: a recipe has no validation part, a setting is not a key of it, or a folder holds a run of another recipe.
    """
    sweep = read(path)
    rounds = _search(sweep) if sweep.grid is None else _grid(sweep)
    points: dict[tuple[str, tuple[str, ...]], Point] = {}
    status, answers = 0, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, on options it calls experimental
        while True:
            try:
                requests = rounds.send(answers)  # type: ignore[arg-type]  # None begins it
            except StopIteration:
                return list(points.values()), status
            todo = {(file, _settings(sweep, values)): None for file, values in requests}
            runs = {key: _runs(sweep, *key, out / path.stem) for key in todo}
            # Two ways to write one recipe are one point.
            unique = {one.folder: one for each in runs.values() for one in each}
            status = max(status, execute(list(unique.values())))
            for key, each in runs.items():
                points[key] = _point(*key, each)
            answers = [points[file, _settings(sweep, values)] for file, values in requests]


Rounds = Generator[list[tuple[str, Settings]], list[Point], None]
"""A generator that yields settings of recipes and receives their points."""


def _grid(sweep: Sweep) -> Rounds:
    assert sweep.grid is not None
    keys = list(sweep.grid)
    yield [
        (file, dict(zip(keys, values, strict=True)))
        for file in sweep.recipes
        for values in itertools.product(*sweep.grid.values())
    ]


def _search(sweep: Sweep) -> Rounds:
    import optuna

    assert sweep.search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = sweep.search
    space = {key: _distribution(values) for key, values in search.space.items()}
    studies = {
        file: optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=search.seed, constant_liar=True))
        for file in sweep.recipes
    }
    for start in range(0, search.trials, search.parallel):
        trials = [
            (file, study.ask(space))
            for file, study in studies.items()
            for _ in range(min(search.parallel, search.trials - start))
        ]
        points = yield [(file, {key: _short(value) for key, value in trial.params.items()}) for file, trial in trials]
        for (file, trial), point in zip(trials, points, strict=True):
            state = optuna.trial.TrialState.COMPLETE if point.complete else optuna.trial.TrialState.FAIL
            studies[file].tell(trial, point.mean if point.complete else None, state)


def _short(value: Any) -> Any:
    """Four digits of a float: they tell strengths apart, and keep folders' names short."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _distribution(values: Interval | list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, list):
        return CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _settings(sweep: Sweep, values: Mapping[str, Any]) -> tuple[str, ...]:
    return (*sweep.set, *(f"{key}={inline(value)}" for key, value in values.items()))


def _runs(sweep: Sweep, file: str, settings: tuple[str, ...], out: Path) -> list[Run]:
    recipe = load(file, settings)
    if recipe.data.validation == 0:
        raise ValueError(f"{file}: a sweep is judged on validation accuracy; set data.validation above 0")
    return [Run(recipe, seed, out / f"{name_of(file)}{label(settings)}" / str(seed)) for seed in sweep.seeds]


def _point(file: str, settings: tuple[str, ...], runs: Sequence[Run]) -> Point:
    accuracies = [summary["validation"]["accuracy"] for one in runs if not one.damage() and (summary := one.summary())]
    return Point(file, settings, tuple(accuracies), len(runs))


def best(points: Sequence[Point]) -> dict[str, Point]:
    """The best point of each recipe: of highest mean validation accuracy, or the one that the rule for strengths chooses.

    Only complete points count, of equals the first; recipes without a complete point are left out.
    """
    winners: dict[str, Point] = {}
    for recipe in dict.fromkeys(point.recipe for point in points if point.complete):
        complete = [point for point in points if point.recipe == recipe and point.complete]
        highest = max(complete, key=lambda point: point.mean)
        if (strengths := _strengths(complete, highest)) is not None:
            highest = strengths[Choice(recipe, "", tuple(point.trial for point in strengths.values())).chosen.strength]
        winners[recipe] = highest
    return winners


def _strengths(points: Sequence[Point], point: Point) -> dict[float, Point] | None:
    """Points that differ from ``point`` in their strength alone, the weakest first; None where strengths were not tried."""
    by_strength = {each.strength: each for each in points if each.strength is not None and each.others == point.others}
    return {strength: by_strength[strength] for strength in sorted(by_strength)} if len(by_strength) > 1 else None


def edges(sweep: Sweep, point: Point) -> list[str]:
    """Keys of the grid of which ``point`` has the least or the largest number: a better one may lie beyond."""
    keys = []
    for key, values in (sweep.grid or {}).items():
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) == len(values) > 1:
            ends = {f"{key}={inline(end)}" for end in (min(numbers), max(numbers))}
            keys += [key] if ends & set(point.settings) else []
    return keys


COLUMNS = (
    Column("name", "recipe and settings", ""),
    Column("chosen", "best", ""),
    Column("mean", "mean", ".2f"),
    Column("sd", "sd", ".2f"),
    Column("n", "n", ""),
)


def table(points: Sequence[Point]) -> Table:
    """The points, best first within each recipe."""
    winners = best(points)
    order = {recipe: k for k, recipe in enumerate(dict.fromkeys(point.recipe for point in points))}
    in_order = sorted(points, key=lambda p: (order[p.recipe], not p.complete, -p.mean if p.accuracies else 0.0))
    rows = []
    for point in in_order:
        sample = point.trial.sample
        rows.append(
            {
                "name": " ".join([name_of(point.recipe), *point.settings]),
                "chosen": "*" if winners.get(point.recipe) is point else "",
                "mean": sample.mean if sample.n else None,
                "sd": sample.sd if sample.n else None,
                "n": str(sample.n) if point.complete else f"{sample.n} of {point.seeds}",
            }
        )
    by_rule = any(_strengths(points, point) for point in winners.values())
    return Table("validation accuracy (%) after the last epoch", COLUMNS, tuple(rows), {}, (RULE,) if by_rule else ())


def save(points: Sequence[Point], path: Path) -> None:
    """The points and the best ones as JSON."""
    winners = best(points)
    rows = [
        {
            "recipe": point.recipe,
            "settings": list(point.settings),
            "validation": list(point.accuracies),
            "mean": point.mean if point.accuracies else None,
            "n": len(point.accuracies),
            "best": winners.get(point.recipe) is point,
        }
        for point in points
    ]
    write(path, to_json(rows))
