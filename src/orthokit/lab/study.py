"""Studies: one file says what is trained, evaluated and compared; what it found is kept in a folder small enough to commit.

.. code-block:: toml

    title = "Four penalties on a small budget"
    recipe = "../recipes/nano_cifar10_none.toml"     # or several, merged in order
    seeds = [0, 1, 2]

    [arms]                                           # parts of recipes, laid over it; the first one is the baseline
    none = {}
    strict = { extends = "../recipes/parts/strict.toml" }

    [networks]                                       # the panels, if there are several
    "ResNet-8" = { network.depth = 8 }
    "ResNet-20" = { network.depth = 20 }

    [factors]                                        # more panels: every combination
    "train.epochs" = [10, 20]

    [evaluate]
    images = 1000

``<results>/<study>/runs/<network>-<arm><factors>/<seed>/summary.json`` is all that is kept of a run: where it is, of this recipe
and evaluated, nothing is left to do for that run, whether or not its weights are there.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from orthokit.checks import did_you_mean
from orthokit.lab import figures, formats, page
from orthokit.lab.compare import FACTOR, Comparison, compare
from orthokit.lab.evaluate import PARTS, check_parts, settings
from orthokit.lab.fairness import undeclared
from orthokit.lab.files import to_json, write
from orthokit.lab.recipe import Recipe, Section, differences, extended, flattened, inline, label, merged, parsed, read_section
from orthokit.lab.record import Run, Seeds
from orthokit.lab.results import METRICS, Result, metric_of, read_one

Partial = dict[str, Any]


class Evaluation(Section):
    """``[evaluate]``: what is measured of every trained network."""

    parts: Annotated[list[str], Field(default_factory=lambda: list(PARTS))]
    """Keys of ``orthokit.lab.evaluate.PARTS``."""
    images: int = Field(1000, ge=1)
    """Test images that serve attacks, noise and corruptions."""

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: list[str]) -> list[str]:
        check_parts(parts)
        return parts


class Study(Section):
    """What a study's file says."""

    title: str
    recipe: str | Annotated[list[str], Field(min_length=1)]
    """Files, relative to the study's, merged in order."""
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
    """What verdicts go by."""
    evaluate: Annotated[Evaluation, Field(default_factory=lambda: Evaluation.model_validate({}))]

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        for key, values in {"seeds": self.seeds, **{f"factors.{key}": values for key, values in self.factors.items()}}.items():
            if any(a == b for a, b in itertools.combinations(values, 2)):
                raise ValueError(f"{key} must differ; got {values}")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: no arm {self.baseline!r}{did_you_mean(self.baseline, self.arms)}")
        if self.metric not in (keys := [metric.key for metric in METRICS]):
            raise ValueError(f"metric: none is called {self.metric!r}{did_you_mean(self.metric, keys)}")
        if (part := metric_of(self.metric).part) is not None and part not in self.evaluate.parts:
            raise ValueError(f"metric = {self.metric!r} needs {part!r} among evaluate.parts")
        return self


@dataclass(frozen=True)
class Task:
    """A run of a study: where it belongs, where it is trained, and where its result is kept."""

    arm: str
    panel: str
    run: Run
    kept: Path


@dataclass(frozen=True)
class Plan:
    """A study with the runs it consists of."""

    file: Path
    said: Study
    folder: Path
    tasks: tuple[Task, ...] = field(repr=False)

    @property
    def command(self) -> str:
        """What does it all."""
        return f"orthokit study {'/'.join(self.file.resolve().parts[-2:])}"

    def left(self) -> list[Task]:
        """Those whose result is not kept, or was evaluated otherwise.

        A seed of every arm comes before the next one, so that what is interrupted can be compared.
        """
        order = self.said.seeds.index
        return sorted((task for task in self.tasks if not self._done(task)), key=lambda task: order(task.run.seed))

    def _done(self, task: Task) -> bool:
        if not task.kept.is_file():
            return False
        kept, wanted = read_one(task.kept), self.said.evaluate
        return kept.recipe == task.run.recipe and all(
            kept.parts.get(part, {}).get("settings") == settings(part, wanted.images) for part in wanted.parts
        )

    def keep(self, tasks: Iterable[Task]) -> None:
        """Keep what is small of those that are finished."""
        for task in tasks:
            if task.run.summary() is None:
                continue
            small = read_one(task.run.folder / "summary.json").small()
            small["environment"] = {key: value for key, value in small["environment"].items() if key != "platform"}
            write(task.kept, to_json(small | {"study": {"arm": task.arm, "panel": task.panel}}))

    def results(self) -> list[Result]:
        """What is kept of the runs of this study, in its order."""
        found = [(task, read_one(task.kept)) for task in self.tasks if task.kept.is_file()]
        return [result for task, result in found if result.recipe == task.run.recipe]

    def strangers(self) -> list[Path]:
        """What is kept of runs that are no longer part of it."""
        known = {task.kept for task in self.tasks}
        return [path for path in sorted((self.folder / "runs").rglob("summary.json")) if path not in known]

    def comparison(self) -> Comparison:
        """Of what is kept.

        Raises:
            ValueError: there is too little of it; arms differ in more than the study's factor.
        """
        results = self.results()
        missing = len(self.tasks) - len(results)
        flagged = [f"{missing} of {len(self.tasks)} runs are missing; what is there may be a lucky choice"] if missing else []
        said = self.said
        return compare(
            results,
            title=said.title,
            factor=said.factor,
            by=["network", "data.name", *(said.factors), *_panel_keys(said)],
            baseline=said.baseline or next(iter(said.arms)),
            metric=said.metric,
            flagged=flagged,
        )

    def draw(self, comparison: Comparison) -> list[Path]:
        """Write tables, figures and the page; which files."""
        drawn = figures.figures(comparison)
        files = {f"figures/{name}.svg": figure.svg for name, figure in drawn.items()}
        shown = [(f"figures/{name}.svg", figure.alt) for name, figure in drawn.items()]
        files |= {
            "README.md": formats.markdown(comparison, figures=shown, command=self.command),
            "report.html": page.page(comparison, command=self.command, drawn=drawn),
            "tables.tex": formats.latex(comparison),
            "numbers.csv": formats.to_csv(comparison),
        }
        for name, content in files.items():
            write(self.folder / name, content)
        for old in (self.folder / "figures").glob("*.svg"):
            if f"figures/{old.name}" not in files:
                old.unlink()
        return [self.folder / name for name in files]


def _panel_keys(said: Study) -> list[str]:
    """Sections that networks are told apart by, besides ``network``."""
    return list(dict.fromkeys(key for part in (said.networks or {}).values() for key in part if key != "extends"))


def plan(file: Path, *, out: Path, results: Path) -> Plan:
    """The study of a TOML file: trained in ``out/<study>``, kept in ``results/<study>``.

    Raises:
        FileNotFoundError: no such file, or one that it extends.
        ValueError: it is no TOML, no study, or its recipes are none; arms are equal, differ in more than the factor, or would
            share a folder.
    """
    said = read_section(Study, file)
    base = extended({"extends": said.recipe}, file)
    tasks, folders, panels = [], dict[str, tuple[str, str]](), dict[tuple[str, str], str]()
    for (network, part), values in itertools.product(
        (said.networks or {"": {}}).items(), itertools.product(*said.factors.values())
    ):
        factors = {key: inline(value) for key, value in zip(said.factors, values, strict=True)}
        chosen = [f"{key}={value}" for key, value in factors.items()]
        short = [f"{key.rpartition('.')[2]}={value}" for key, value in factors.items()]
        panel = ", ".join([*([network] if network else []), *short])
        laid = extended(part, file)
        for setting in chosen:
            laid = merged(laid, parsed(setting))
        raw = merged(base, laid)
        recipes = {
            arm: Recipe.of(merged(raw, extended(over, file)), f"{file}: {arm}" + f" of {panel}" * bool(panel))
            for arm, over in said.arms.items()
        }
        _check(f"{file}" + f", {panel}" * bool(panel), recipes, said.factor, laid)
        for arm, recipe in recipes.items():
            name = "-".join(_slug(file, each) for each in ([network, arm] if said.networks else [arm])) + label(chosen)
            if folders.setdefault(name, (panel, arm)) != (panel, arm):
                raise ValueError(f"{file}: {arm} and {folders[name][1]} would share the folder {name}; choose other names")
            if (twin := panels.setdefault((arm, recipe.to_toml()), panel)) != panel:
                raise ValueError(f"{file}: {arm} has the same recipe in the panels {twin} and {panel}")
            for seed in said.seeds:
                run = Run(recipe, seed, out / file.stem / name / str(seed))
                tasks.append(Task(arm, panel, run, results / file.stem / "runs" / name / str(seed) / "summary.json"))
    return Plan(file, said, results / file.stem, tuple(tasks))


def _slug(file: Path, name: str) -> str:
    """A name as part of a folder's."""
    if not (plain := re.sub(r"[^\w.=+]+", "-", name).strip("-.")):
        raise ValueError(f"{file}: {name!r} is no name for an arm or a network; it needs letters or digits")
    return plain


def _check(where: str, recipes: Mapping[str, Recipe], factor: Sequence[str], laid: Mapping[str, Any]) -> None:
    """Before anything is trained: whether it is what the panel says, and could be compared."""
    for arm, recipe in recipes.items():
        if changed := differences(Recipe.of(merged(recipe.to_dict(), laid), where), recipe):
            raise ValueError(f"{where}: the arm {arm} overrides what its panel is to have in common ({changed})")
    if told := undeclared([(arm, flattened(recipe.to_dict())) for arm, recipe in recipes.items()], factor):
        raise ValueError(f"{where}: {told[0]}; declare it among factor = [...]")
    for (one, a), (two, b) in itertools.combinations(recipes.items(), 2):
        if a == b:
            raise ValueError(f"{where}: the arms {one} and {two} have the same recipe")
