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

The best setting of each recipe is the one with the highest mean validation accuracy after the last epoch. There is no state but
the runs themselves: started again, a sweep repeats nothing and goes on.
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
from rich import box
from rich.markup import escape
from rich.table import Table

from orthokit.lab.atomic import to_json, write
from orthokit.lab.recipes.compose import inline, label, load, name_of, read_section
from orthokit.lab.recipes.sections import Section
from orthokit.lab.runs.run import Run, Seeds

Settings = dict[str, Any]


class Interval(Section):
    """Numbers to search among: floats, or integers where both ends are."""

    low: float | int
    high: float | int
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low < high, and low > 0 with log; got low = {self.low}, high = {self.high}")
        return self


class Search(Section):
    """An Optuna search (tree-structured Parzen estimator)."""

    trials: int = Field(ge=1)
    """Settings tried, of each recipe."""
    space: Annotated[dict[str, Interval | list[Any]], Field(min_length=1)]
    """By key: an interval, or a list to choose from."""
    parallel: int = Field(4, ge=1)
    """Trials between two looks at the results; with the seed it fixes what is tried."""
    seed: int = 0
    """Of the search."""


class Sweep(Section):
    """What a sweep's file says."""

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
    def command(self) -> str:
        """What trains it."""
        return shlex.join(["orthokit", "train", self.recipe, "--set", *self.settings])


def read(path: Path) -> Sweep:
    """The sweep of a TOML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TOML or no sweep.
    """
    return read_section(Sweep, path)


def run(path: Path, out: Path, execute: Callable[[Sequence[Run]], int]) -> tuple[list[Point], int]:
    """Do what is left of the sweep in ``path``; its points, and the highest status of ``execute``, which does the runs.

    Raises:
        ValueError: a recipe has no validation part, a setting is no key of it, or a folder holds a run of another recipe.
    """
    sweep = read(path)
    rounds = _search(sweep) if sweep.grid is None else _grid(sweep)
    points: dict[tuple[str, tuple[str, ...]], Point] = {}
    status, told = 0, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, on options it calls experimental
        while True:
            try:
                asked = rounds.send(told)  # type: ignore[arg-type]  # None begins it
            except StopIteration:
                return list(points.values()), status
            todo = {(file, _settings(sweep, values)): None for file, values in asked}
            runs = {key: _runs(sweep, *key, out / path.stem) for key in todo}
            # Two ways to write one recipe are one point.
            unique = {run.folder: run for each in runs.values() for run in each}
            status = max(status, execute(list(unique.values())))
            for key, each in runs.items():
                points[key] = _point(*key, each)
            told = [points[file, _settings(sweep, values)] for file, values in asked]


Rounds = Generator[list[tuple[str, Settings]], list[Point], None]
"""Asks for settings of recipes, is told their points."""


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
    found = [summary["validation"]["accuracy"] for run in runs if not run.damage() and (summary := run.summary())]
    return Point(file, settings, tuple(found), len(runs))


def best(points: Sequence[Point]) -> dict[str, Point]:
    """Of each recipe the complete point of highest mean validation accuracy; the first of equals."""
    found: dict[str, Point] = {}
    for point in points:
        if point.complete and (point.recipe not in found or point.mean > found[point.recipe].mean):
            found[point.recipe] = point
    return found


def edges(sweep: Sweep, point: Point) -> list[str]:
    """Keys of the grid of which ``point`` has the least or the largest number: the best may lie beyond."""
    found = []
    for key, values in (sweep.grid or {}).items():
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) == len(values) > 1:
            ends = {f"{key}={inline(end)}" for end in (min(numbers), max(numbers))}
            found += [key] if ends & set(point.settings) else []
    return found


def table(points: Sequence[Point]) -> Table:
    """The points, best first within each recipe."""
    drawn = Table(
        title="validation accuracy (%) after the last epoch", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    drawn.add_column("recipe", overflow="fold")
    drawn.add_column("settings", overflow="fold")
    for header in ("mean", "sd", "n"):
        drawn.add_column(header, justify="right", no_wrap=True)
    chosen = set(map(id, best(points).values()))
    order = {recipe: place for place, recipe in enumerate(dict.fromkeys(point.recipe for point in points))}
    for point in sorted(points, key=lambda p: (order[p.recipe], not p.complete, -p.mean if p.accuracies else 0.0)):
        mean = f"{100 * point.mean:.2f}" if point.accuracies else "–"
        sd = f"{100 * statistics.stdev(point.accuracies):.2f}" if len(point.accuracies) > 1 else "–"
        n = str(point.seeds) if point.complete else f"{len(point.accuracies)} of {point.seeds}"
        style = "bold" if id(point) in chosen else "" if point.complete else "red"
        drawn.add_row(escape(name_of(point.recipe)), escape("\n".join(point.settings)), mean, sd, n, style=style)
    return drawn


def save(points: Sequence[Point], path: Path) -> None:
    """The points and the best ones as JSON."""
    chosen = best(points)
    rows = [
        {
            "recipe": point.recipe,
            "settings": list(point.settings),
            "validation": list(point.accuracies),
            "mean": point.mean if point.accuracies else None,
            "n": len(point.accuracies),
            "best": chosen.get(point.recipe) is point,
        }
        for point in points
    ]
    write(path, to_json(rows))
