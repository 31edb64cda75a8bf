"""Studies: one file says what is trained, evaluated and compared; what it found is kept in a folder small enough to commit.

.. code-block:: toml

    title = "Four penalties on a small budget"
    question = "Which of four penalties gains on a small budget?"
    recipe = "nano+cifar10"                          # parts of recipes, a file, or several, merged in order
    seeds = [0, 1, 2]
    reuse = ["depth.toml"]                           # what this study keeps of the same runs need not be trained again

    [arms]                                           # parts of recipes, laid over it; the first one is the baseline
    none = {}
    strict = "strict"                                # short for { extends = "strict" }

    [networks]                                       # the panels, if there are several
    "ResNet-8" = { network.depth = 8 }
    "ResNet-20" = { network.depth = 20 }

    [factors]                                        # more panels: every combination
    "train.epochs" = [10, 20]

    [tune]                                           # strengths by validation accuracy: see orthokit.lab.comparison.tuning
    seeds = [100, 101, 102]
    values = [0.01, 0.03, 0.1, 0.3]

    [evaluate]
    images = 1000

A study may itself extend another, and say in what it differs; with ``reuse`` and another ``baseline`` or ``metric`` that is a
second question to the same runs. The primary question is written down before the runs:

.. code-block:: toml

    contrasts = ["tall - strict", "tall - wide only"]    # averaged over all panels, adjusted after Holm over these two
    blocks = "seed"                                      # all verdicts by a test with seeds as blocks; Welch's by default

File names are relative to the file that gives them.

``<results>/<study>/runs/<network>-<arm><factors>/<seed>/summary.json`` is all that is kept of a run: where it is, of this recipe
and evaluated, nothing is left to do for that run, whether or not its weights are there. So it is with the runs by which strengths
are chosen, below ``tuning`` and with their strength in the name; of one that diverged that is kept, in ``diverged.json``.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from orthokit.checks import did_you_mean
from orthokit.lab.atomic import to_json, write
from orthokit.lab.comparison.comparability import undeclared, under
from orthokit.lab.comparison.comparison import FACTOR, Blocks, Comparison, compare
from orthokit.lab.comparison.metrics import METRICS, metric_of
from orthokit.lab.comparison.panels import pair_of
from orthokit.lab.comparison.tuning import STRENGTH, Choice, Trial, Tune, cautions, distinct
from orthokit.lab.evaluation.evaluate import PARTS, check_parts, settings
from orthokit.lab.recipes.compose import NAMED, inline, joined, label, merged, parsed, read_section
from orthokit.lab.recipes.recipe import Recipe, differences, flattened
from orthokit.lab.recipes.sections import Section
from orthokit.lab.reporting import figures, markup, page, tables
from orthokit.lab.runs.results import TUNING, Result, read_one
from orthokit.lab.runs.run import DIVERGED, SUMMARY, Run, Seeds
from orthokit.lab.runs.summary import DamagedError, Divergence, Summary, read, read_text

Partial = dict[str, Any]
Lent = dict[tuple[str, int], list[Path]]
"""Folders with what is kept of runs, by their recipe and seed."""
RUNS = "runs"
"""In the folder of a study: the runs that are compared, ``runs/<name>/<seed>``."""
LINKS = {"All numbers (CSV)": "numbers.csv", "LaTeX tables": "tables.tex"}
"""What stands beside a study's page."""


class Evaluation(Section):
    """``[evaluate]``: what is measured of every trained network."""

    parts: Annotated[list[str], Field(default_factory=lambda: list(PARTS))]
    """Keys of ``orthokit.lab.evaluation.evaluate.PARTS``."""
    images: int = Field(1000, ge=1)
    """Test images that serve attacks, noise and corruptions."""

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: list[str]) -> list[str]:
        check_parts(parts)
        return parts


class Study(Section):
    """What a study's file says."""

    FILES = ("recipe", "reuse")
    PARTIAL = ("arms", "networks")
    title: str
    question: str = ""
    """What the study is to answer, in one sentence; printed above the answer."""
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
    """What verdicts go by."""
    contrasts: Annotated[list[str], Field(default_factory=list)]
    """The primary question: ``"<arm> - <arm>"``, differences averaged over the panels and adjusted over these alone."""
    blocks: Blocks | None = None
    """``"seed"``: verdicts go by tests with seeds as blocks."""
    reuse: Annotated[list[str], Field(default_factory=list)]
    """Files of other studies: what they keep, or reuse themselves, serves where recipe, seed and evaluation are the same."""
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


@dataclass(frozen=True)
class Task:
    """A run of a study: where it belongs, where it is trained, and where what is small of it is kept."""

    arm: str
    panel: str
    run: Run
    kept: Run
    """The same, as if it had been trained where it is kept."""
    parts: Mapping[str, Partial] = field(default_factory=dict)
    """Of the evaluation: their settings."""
    lent: Sequence[Path] = ()
    """Where other studies keep the same run."""

    def kept_in(self, folder: Path) -> Result | None:
        """What is kept of it there."""
        if not (file := folder / SUMMARY).is_file() or (found := read_one(file)).recipe != self.run.recipe:
            return None
        return replace(found, summary=found.summary | {"study": self.place})

    def result(self) -> Result | None:
        """What is kept of it, the most evaluated where it is kept twice."""
        found = [result for folder in (self.kept.folder, *self.lent) if (result := self.kept_in(folder)) is not None]
        return max(found, key=self.evaluated, default=None)

    def evaluated(self, result: Result) -> int:
        """How many parts were evaluated as wanted."""
        return sum(result.parts.get(part, {}).get("settings") == wanted for part, wanted in self.parts.items())

    def diverged(self) -> bool:
        """Whether that is what is kept of it."""
        return any(run.diverged() for run in (self.kept, *(replace(self.kept, folder=folder) for folder in self.lent)))

    @property
    def place(self) -> dict[str, str]:
        """Arm and panel, as a result names them."""
        return {"arm": self.arm, "panel": self.panel}

    def done(self) -> bool:
        """Whether its result is kept, evaluated as wanted, or that it diverged."""
        result = self.result()
        return self.diverged() if result is None else self.evaluated(result) == len(self.parts)


@dataclass(frozen=True)
class Plan:
    """A study with the runs it consists of."""

    file: Path
    said: Study
    folder: Path
    tuning: tuple[Task, ...] = field(repr=False)
    """Runs by which strengths are chosen."""
    choices: tuple[Choice, ...] = field(repr=False)
    """What they tell; nothing while some are left."""
    tasks: tuple[Task, ...] = field(repr=False)
    """Runs that are compared; none while strengths are to be chosen."""

    @property
    def command(self) -> str:
        """What does it all."""
        return f"orthokit study {'/'.join(self.file.resolve().parts[-2:])}"

    def left(self) -> list[Task]:
        """Those of the present stage, tuning first, whose result is not kept, or was evaluated otherwise.

        A seed of every arm comes before the next one, so that what is interrupted can be compared.
        """
        return _left(self.tuning) or _left(self.tasks)

    def keep(self, tasks: Iterable[Task]) -> list[str]:
        """Keep what is small of those that are finished, and which ones diverged; what to say of those that are damaged."""
        damaged = []
        for task in tasks:
            try:
                self._keep(task)
            except DamagedError as error:
                damaged.append(str(error))
        return damaged

    def _keep(self, task: Task) -> None:
        if task.run.summary() is None:
            if task.run.diverged():
                write(task.kept.divergence, read_text(task.run.divergence))
            return
        new, old = read_one(task.run.folder / SUMMARY), task.kept_in(task.kept.folder)
        if old is not None and task.evaluated(old) > task.evaluated(new):
            return
        small = new.small()
        small["environment"] = {key: value for key, value in small["environment"].items() if key != "platform"}
        write(task.kept.folder / SUMMARY, to_json(small | {"study": task.place}))

    def strangers(self) -> list[Path]:
        """What is kept of runs that are no longer part of it."""
        known = {task.kept.folder for task in (*self.tuning, *self.tasks)}
        kept = [path for part in (RUNS, TUNING) for path in sorted((self.folder / part).rglob("*.json"))]
        return [path for path in kept if path.parent not in known]

    def comparison(self) -> Comparison:
        """Of what is kept.

        Raises:
            ValueError: there is nothing, or too little of it; arms differ in more than the study's factor.
        """
        results, diverged = _found(self.tasks)
        if not results:
            raise ValueError(f"none of the {len(self.tasks)} runs has a result" + f"; {diverged} diverged" * bool(diverged))
        lent = Counter(lender.name for each in results if (lender := each.source.parents[3]) != self.folder)
        missing, said = len(self.tasks) - len(results), self.said
        which = f", {diverged} of which diverged" if diverged else ""
        flagged = (
            [f"{missing} of {len(self.tasks)} runs are missing{which}; what is there may be a lucky choice"] if missing else []
        )
        compared = compare(
            results,
            title=said.title,
            question=said.question,
            factor=said.factor,
            by=["network", "data.name", *(said.factors), *_panel_keys(said)],
            baseline=said.baseline or next(iter(said.arms)),
            metric=said.metric,
            blocks=said.blocks,
            contrasts=said.contrasts,
            flagged=[
                *flagged,
                *([f"{lent.total()} of {len(results)} runs are those of other studies ({_counted(lent)})"] if lent else []),
                *cautions(self.choices),
            ],
        )
        return replace(compared, choices=self.choices)

    def draw(self, comparison: Comparison) -> list[Path]:
        """Write tables, figures and the page; which files."""
        drawn = figures.figures(comparison)
        files = {f"figures/{name}.svg": figure.svg for name, figure in drawn.items()}
        shown = [(f"figures/{name}.svg", drawn[name].alt) for name in figures.best(drawn, comparison)]
        files |= {
            "README.md": markup.markdown(comparison, figures=shown, command=self.command, links=LINKS),
            "report.html": page.page(comparison, command=self.command, drawn=drawn, links=LINKS),
            "tables.tex": markup.latex(comparison),
            "numbers.csv": tables.numbers(comparison).to_csv(),
        }
        for name, content in files.items():
            write(self.folder / name, content)
        for old in (self.folder / "figures").glob("*.svg"):
            if f"figures/{old.name}" not in files:
                old.unlink()
        return [self.folder / name for name in files]


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in names.items())


def _left(tasks: Sequence[Task]) -> list[Task]:
    order = {seed: place for place, seed in enumerate(dict.fromkeys(task.run.seed for task in tasks))}
    return sorted((task for task in tasks if not task.done()), key=lambda task: order[task.run.seed])


def _found(tasks: Iterable[Task]) -> tuple[list[Result], int]:
    """What is kept of some runs, and how many of them diverged."""
    found = [(task, task.result()) for task in tasks]
    return [result for _, result in found if result is not None], sum(r is None and task.diverged() for task, r in found)


def _panel_keys(said: Study) -> list[str]:
    """Sections that networks are told apart by, besides ``network``."""
    return list(dict.fromkeys(key for part in (said.networks or {}).values() for key in part))


@dataclass(frozen=True)
class _Place:
    """An arm in a panel."""

    arm: str
    network: str
    panel: str
    recipe: Recipe
    name: str
    settings: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Of its runs."""
        return self.name + label(self.settings)

    @property
    def tunable(self) -> bool:
        """Whether it has a strength."""
        return self.recipe.regularizer is not None

    def of(self, strength: float) -> "_Place":
        """The same, with this strength."""
        recipe = Recipe.of(merged(self.recipe.to_dict(), {"regularizer": {"strength": strength}}))
        recipe = recipe.named(self.recipe.code)
        return replace(self, recipe=recipe, settings=(*self.settings, f"strength={inline(strength)}"))


def plan(file: Path, *, out: Path, results: Path) -> Plan:
    """The study of a TOML file: trained in ``out/<study>``, kept in ``results/<study>``.

    Raises:
        FileNotFoundError: no such file, or one that it extends.
        ValueError: it is no TOML, no study, or its recipes are none; arms are equal, differ in more than the factor, or would
            share a folder; every strength of an arm diverged.
    """
    said = read_section(Study, file)
    tune, trained, kept = said.tune, out / file.stem, results / file.stem
    places, lent = _places(said, file), _lent(said, file, results)
    tuning, choices = list[Task](), dict[tuple[str, str, tuple[str, ...]], Choice]()
    if tune is not None:
        _check_tuning(file, tune, places)
        for place in places:
            if place.tunable and tune.network in (None, place.network):
                tried = {strength: _trial(place, strength, tune.seeds, trained, kept, lent) for strength in tune.of(place.arm)}
                tuning += itertools.chain(*tried.values())
                if not any(map(_left, tried.values())):
                    choices[place.arm, place.network, place.settings] = _choice(
                        file, place, tried, shared=tune.network is not None
                    )
    complete = not _left(tuning)
    tasks, parts = list[Task](), {part: settings(part, said.evaluate.images) for part in said.evaluate.parts}
    for place in places if complete else ():
        final = place
        if tune is not None and place.tunable:
            final = place.of(choices[place.arm, tune.network or place.network, place.settings].chosen.strength)
        tasks += _tasks(final, said.seeds, trained / final.folder, kept / RUNS / place.folder, parts, lent[RUNS])
    return Plan(file, said, kept, tuple(tuning), tuple(choices.values()) if complete else (), tuple(tasks))


def _lent(said: Study, file: Path, results: Path) -> dict[str, Lent]:
    """What other studies keep of the runs of either stage."""
    found: dict[str, Lent] = {RUNS: {}, TUNING: {}}
    for lender, (stage, runs), name in itertools.product(_lenders(said, file), found.items(), (SUMMARY, DIVERGED)):
        for path in sorted((results / lender.stem / stage).glob(f"*/*/{name}")):
            try:
                kept = read(Summary if name == SUMMARY else Divergence, path)
                key = Recipe.of(kept["recipe"], str(path)).to_toml(), kept["seed"]
            except ValueError as error:
                raise ValueError(f"{file} reuses {lender}: {error}") from None
            runs.setdefault(key, []).append(path.parent)
    return found


def _lenders(said: Study, file: Path) -> list[Path]:
    """The studies that one reuses, and those that they reuse."""
    found = {file.stem: file}

    def add(reuse: Sequence[str], by: Path) -> None:
        for other in map(Path, reuse):
            if not other.is_file():
                raise FileNotFoundError(f"{by}: no study {other} to reuse runs of")
            if (known := found.get(other.stem)) is None:
                found[other.stem] = other
                add(read_section(Study, other).reuse, other)
            elif known.resolve() != other.resolve():
                raise ValueError(f"{by} reuses {other}, whose results are where those of {known} are; rename one of them")

    add(said.reuse, file)
    return [other for other in found.values() if other is not file]


def _trial(
    place: _Place, strength: float, seeds: Sequence[int], trained: Path, kept: Path, lent: Mapping[str, Lent]
) -> list[Task]:
    """The runs that try a strength; by its name they are an arm of its own."""
    each = place.of(strength)
    each, folder = replace(each, arm=f"{place.arm}, {each.settings[-1]}"), Path(TUNING, each.folder)
    return _tasks(each, seeds, trained / folder, kept / folder, {}, lent[TUNING])


def _choice(file: Path, place: _Place, tried: Mapping[float, Sequence[Task]], *, shared: bool) -> Choice:
    trials = tuple(Trial.of(strength, *_found(tasks)) for strength, tasks in tried.items())
    choice = Choice(place.arm, place.panel + ", for every network" * shared, trials)
    if not choice.able:
        where = f" in {place.panel}" * bool(place.panel)
        raise ValueError(
            f"{file}: {place.arm} diverged{where} with every strength, {[*tried]}; give it smaller ones in tune.arms"
        )
    return choice


def _tasks(
    place: _Place, seeds: Sequence[int], trained: Path, kept: Path, parts: Mapping[str, Partial], lent: Lent
) -> list[Task]:
    toml = place.recipe.to_toml()

    def task(seed: int) -> Task:
        run, small = (Run(place.recipe, seed, folder / str(seed)) for folder in (trained, kept))
        return Task(place.arm, place.panel, run, small, parts, lent.get((toml, seed), ()))

    return [task(seed) for seed in seeds]


def _places(said: Study, file: Path) -> list[_Place]:
    """Every arm in every panel; where strengths are to be chosen, all with the same one."""
    base, code = joined(said.recipe, file)
    found, folders, panels = [], dict[str, tuple[str, str]](), dict[tuple[str, str], str]()
    for (network, part), values in itertools.product(
        (said.networks or {"": {}}).items(), itertools.product(*said.factors.values())
    ):
        factors = dict(zip(said.factors, values, strict=True))
        chosen = tuple(f"{key}={inline(value)}" for key, value in factors.items())
        panel = ", ".join([*([network] if network else []), *itertools.starmap(_short, factors.items())])
        laid = part
        for setting in chosen:
            laid = merged(laid, parsed(setting))
        raw = merged(base, laid)
        recipes = {}
        for arm, over in said.arms.items():
            own = merged(raw, over)
            if said.tune is not None and isinstance(own.get("regularizer"), Mapping):
                own = merged(own, {"regularizer": {"strength": said.tune.values[0]}})
            recipes[arm] = Recipe.of(own, f"{file}: {arm}" + f" of {panel}" * bool(panel)).named(code)
        _check(f"{file}" + f", {panel}" * bool(panel), recipes, said, laid)
        for arm, recipe in recipes.items():
            name = "-".join(_slug(file, each) for each in ([network, arm] if said.networks else [arm]))
            found.append(place := _Place(arm, network, panel, recipe, name, chosen))
            if folders.setdefault(place.folder, (panel, arm)) != (panel, arm):
                raise ValueError(
                    f"{file}: {arm} and {folders[place.folder][1]} would share the folder {place.folder}; choose other names"
                )
            if (twin := panels.setdefault((arm, recipe.to_toml()), panel)) != panel:
                raise ValueError(f"{file}: {arm} has the same recipe in the panels {twin} and {panel}")
    return found


def _short(key: str, value: Any) -> str:
    """A factor's value in the name of a panel."""
    last = key.rpartition(".")[2]
    return value if last in NAMED and isinstance(value, str) else f"{last}={inline(value)}"


def _slug(file: Path, name: str) -> str:
    """A name as part of a folder's."""
    if not name.isprintable() or not (plain := re.sub(r"[^\w.=+]+", "-", name).strip("-.")):
        raise ValueError(f"{file}: {name!r} is no name for an arm or a network; it needs letters or digits, all printable")
    return plain


def _check(where: str, recipes: Mapping[str, Recipe], said: Study, laid: Mapping[str, Any]) -> None:
    """Before anything is trained: whether it is what the panel says, and could be compared."""
    for arm, recipe in recipes.items():
        if changed := differences(Recipe.of(merged(recipe.to_dict(), laid), where), recipe):
            raise ValueError(f"{where}: the arm {arm} overrides what its panel is to have in common ({changed})")
    if told := undeclared([(arm, flattened(recipe.to_dict())) for arm, recipe in recipes.items()], said.factor):
        raise ValueError(f"{where}: {told[0]}; declare it among factor = [...]")
    for (one, a), (two, b) in itertools.combinations(recipes.items(), 2):
        if a == b:
            but = "" if said.tune is None else ", but for the strength that [tune] chooses"
            raise ValueError(f"{where}: the arms {one} and {two} have the same recipe{but}")


def _check_tuning(file: Path, tune: Tune, places: Sequence[_Place]) -> None:
    """Whether there is something to tune, and to tune it by."""
    tunable = [place for place in places if place.tunable]
    if not tunable:
        raise ValueError(f"{file}: [tune] has nothing to do, as no arm has a regularizer")
    if bare := [arm for arm in tune.arms if arm not in {place.arm for place in tunable}]:
        raise ValueError(f"{file}: tune.arms: {bare[0]} has no regularizer to tune")
    if not all(place.recipe.data.validation for place in tunable):
        raise ValueError(f"{file}: [tune] goes by validation accuracy; set data.validation above 0")
