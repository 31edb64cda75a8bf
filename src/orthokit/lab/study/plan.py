"""A study's runs, made from its file, and what the ledger holds of them."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orthokit.lab.atomic import write
from orthokit.lab.comparison.comparability import undeclared_differences
from orthokit.lab.comparison.comparison import Comparison, compare
from orthokit.lab.comparison.tuning import Choice, Trial, Tune, cautions
from orthokit.lab.evaluation.evaluate import settings
from orthokit.lab.recipes.compose import NAMED, inline, join, label, merge, parse_setting, read_section
from orthokit.lab.recipes.recipe import Recipe, differences, flatten
from orthokit.lab.reporting import figures, markup
from orthokit.lab.runs.collect import TUNING
from orthokit.lab.runs.ledger import Ledger
from orthokit.lab.runs.results import Result, read_one
from orthokit.lab.runs.run import SUMMARY, Run
from orthokit.lab.runs.summary import DamagedError, Divergence, read, read_text
from orthokit.lab.study.schema import Partial, Study

__all__ = ["LEDGER", "Plan", "Task", "plan"]

SHOWN = re.compile(r"\]\((figures/[^/)]+\.svg)\)")
"""A figure in a README."""
EXTENDS = re.compile(r'^extends = "(.+)"', re.MULTILINE)
"""The file that a study extends."""
LEDGER = "ledger"
"""The folder of results where all runs are kept."""


@dataclass(frozen=True)
class Task:
    """A run of a study, with its arm and panel, and the ledger that keeps it."""

    arm: str
    panel: str
    run: Run
    ledger: Ledger
    parts: Mapping[str, Partial] = field(default_factory=dict)
    """Parts of the evaluation, and their settings."""

    def result(self) -> Result | None:
        """The result that the ledger keeps, in this study's arm and panel."""
        if (record := self.ledger.get(self.run.recipe, self.run.seed)) is None:
            return None
        return replace(
            record,
            summary=record.summary | {"study": {"arm": self.arm, "panel": self.panel}},
            parts=record.parts | {part: value for part in self.parts if (value := self._part(record, part)) is not None},
        )

    def _part(self, record: Result, part: str) -> Partial | None:
        """The evaluation of a part with this study's settings."""
        values = [record.parts.get(part), *(record.summary.get("otherwise") or {}).get(part, ())]
        return next((value for value in values if value is not None and value["settings"] == self.parts[part]), None)

    def is_evaluated(self, result: Result) -> bool:
        """Whether every part was evaluated as this study asks."""
        return all(result.parts.get(part, {}).get("settings") == options for part, options in self.parts.items())

    def has_diverged(self) -> bool:
        """Whether training could not go on."""
        return self.ledger.divergence(self.run.recipe, self.run.seed) is not None

    def is_done(self) -> bool:
        """Whether the ledger has the result, evaluated as this study asks, or that the run diverged."""
        result = self.result()
        return self.has_diverged() if result is None else self.is_evaluated(result)

    def keep(self) -> None:
        """Put the result of the run into the ledger.

        Raises:
            DamagedError: a file of the run is damaged.
        """
        if self.run.summary() is not None:
            self.ledger.put(read_one(self.run.folder / SUMMARY).small())
        elif self.run.has_diverged():
            self.ledger.put_divergence(self.run.recipe, self.run.seed, read(Divergence, self.run.divergence)["why"])


@dataclass(frozen=True)
class Plan:
    """A study with the runs it consists of."""

    file: Path
    study: Study
    folder: Path
    tuning: tuple[Task, ...] = field(repr=False)
    """Runs by which strengths are chosen."""
    choices: tuple[Choice, ...] = field(repr=False)
    """Strengths that these runs choose; none while some of the runs are left."""
    tasks: tuple[Task, ...] = field(repr=False)
    """Runs that are compared; none while strengths are to be chosen."""

    @property
    def command(self) -> str:
        """The command that does the whole study."""
        return f"orthokit study {'/'.join(self.file.resolve().parts[-2:])}"

    def remaining(self) -> list[Task]:
        """The tasks of the present stage, tuning first, whose result is not kept, or was evaluated otherwise.

        A seed of every arm comes before the next seed, so that an interrupted study can be compared.
        """
        return _remaining(self.tuning) or _remaining(self.tasks)

    def keep(self, tasks: Iterable[Task]) -> list[str]:
        """Put tasks that are finished, or diverged, into the ledger; return a sentence for each that is damaged."""
        errors = []
        for task in tasks:
            try:
                task.keep()
            except DamagedError as error:
                errors.append(str(error))
        return errors

    def damage(self) -> list[str]:
        """A sentence for each record of this study's runs in the ledger that cannot be read."""
        tasks = (*self.tuning, *self.tasks)
        return tasks[0].ledger.damage(task.run.recipe for task in tasks) if tasks else []

    def comparison(self) -> Comparison:
        """The comparison of the results in the ledger.

        Raises:
            ValueError: there are no results, or too few; arms differ in more than the study's factor.
        """
        results, diverged = _results(self.tasks)
        if not results:
            raise ValueError(f"none of the {len(self.tasks)} runs has a result" + f"; {diverged} diverged" * bool(diverged))
        missing, study = len(self.tasks) - len(results), self.study
        suffix = f", {diverged} of which diverged" if diverged else ""
        notes = (
            [f"{missing} of {len(self.tasks)} runs are missing{suffix}; what is there may be a lucky choice"] if missing else []
        )
        result = compare(
            results,
            title=study.title,
            question=study.question,
            factor=study.factor,
            by=["network", "data.name", *(study.factors), *_panel_keys(study)],
            baseline=study.baseline or next(iter(study.arms)),
            metric=study.metric,
            blocks=study.blocks,
            contrasts=study.contrasts,
            flagged=[
                *notes,
                *cautions(self.choices),
            ],
        )
        return replace(result, choices=self.choices)

    def draw(self, comparison: Comparison) -> list[Path]:
        """Write ``README.md`` and the figures that it shows, the first few; return the files.

        Figures that the README showed before, and does not show now, are removed.
        """
        readme = self.folder / "README.md"
        before = set(SHOWN.findall(read_text(readme))) if readme.is_file() else set[str]()
        drawn = figures.best(comparison)
        files = {f"figures/{name}.svg": figure.svg for name, figure in drawn.items()}
        shown = [(f"figures/{name}.svg", figure.alt, figure.caption) for name, figure in drawn.items()]
        files[readme.name] = markup.markdown(comparison, figures=shown, command=self.command, links=self._links())
        for name, content in files.items():
            write(self.folder / name, content)
        for name in before - set(files):
            (self.folder / name).unlink(missing_ok=True)
        return [self.folder / name for name in files]

    def _links(self) -> dict[str, str]:
        """Relative to the folder: the study's file, the pages of studies that extend it or that it extends, the evidence."""
        bases = {file.stem: EXTENDS.search(file.read_text("utf-8", "replace")) for file in self.file.parent.glob("*.toml")}
        extends = {name: base[1] for name, base in sorted(bases.items()) if base}
        own = self.file.name
        related = [name for name, base in extends.items() if base == own]
        related += [base.removesuffix(".toml") for name, base in extends.items() if f"{name}.toml" == own]
        links = {"the study's file": os.path.relpath(self.file, self.folder)}
        links |= {f"the study {name}": f"../{name}/README.md" for name in related if (self.folder.parent / name).is_dir()}
        links |= {"all evidence": "../STUDY.md"} if (self.folder.parent / "STUDY.md").is_file() else {}
        return {name: Path(path).as_posix() for name, path in links.items()}


def _remaining(tasks: Sequence[Task]) -> list[Task]:
    order = {seed: index for index, seed in enumerate(dict.fromkeys(task.run.seed for task in tasks))}
    return sorted((task for task in tasks if not task.is_done()), key=lambda task: order[task.run.seed])


def _results(tasks: Iterable[Task]) -> tuple[list[Result], int]:
    """The results of some runs in the ledger, and how many of the runs diverged."""
    pairs = [(task, task.result()) for task in tasks]
    return [result for _, result in pairs if result is not None], sum(r is None and task.has_diverged() for task, r in pairs)


def _panel_keys(study: Study) -> list[str]:
    """Sections, besides ``network``, in which a study's networks differ."""
    return list(dict.fromkeys(key for part in (study.networks or {}).values() for key in part))


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
        """The folder of its runs."""
        return self.name + label(self.settings)

    @property
    def tunable(self) -> bool:
        """Whether the arm has a strength."""
        return self.recipe.regularizer is not None

    def of(self, strength: float) -> "_Place":
        """The same arm with this strength."""
        recipe = Recipe.of(merge(self.recipe.to_dict(), {"regularizer": {"strength": strength}}))
        recipe = recipe.with_code(self.recipe.code)
        return replace(self, recipe=recipe, settings=(*self.settings, f"strength={inline(strength)}"))


def plan(file: Path, *, out: Path, results: Path) -> Plan:
    """The study of a TOML file: trained in ``out/<study>``, kept in ``results/ledger``, shown in ``results/<study>``.

    Raises:
        FileNotFoundError: no such file, or one that it extends.
        ValueError: the file is not TOML, not a study, or not of recipes; arms are equal, differ in more than the factor, or would
            share a folder; every strength of an arm diverged.
    """
    study = read_section(Study, file)
    tune, folder, ledger = study.tune, out / file.stem, Ledger(results / LEDGER)
    places = _places(study, file)
    tuning, choices = list[Task](), dict[tuple[str, str, tuple[str, ...]], Choice]()
    if tune is not None:
        _check_tuning(file, tune, places)
        for place in places:
            if place.tunable and tune.network in (None, place.network):
                trials = {strength: _trial(place, strength, tune.seeds, folder, ledger) for strength in tune.of(place.arm)}
                tuning += itertools.chain(*trials.values())
                if not any(map(_remaining, trials.values())):
                    choices[place.arm, place.network, place.settings] = _choice(
                        file, place, trials, common=tune.network is not None
                    )
    complete = not _remaining(tuning)
    tasks, parts = list[Task](), {part: settings(part, study.evaluate.images) for part in study.evaluate.parts}
    for place in places if complete else ():
        final = place
        if tune is not None and place.tunable:
            final = place.of(choices[place.arm, tune.network or place.network, place.settings].chosen.strength)
        tasks += _tasks(final, study.seeds, folder / final.folder, ledger, parts)
    return Plan(file, study, results / file.stem, tuple(tuning), tuple(choices.values()) if complete else (), tuple(tasks))


def _trial(place: _Place, strength: float, seeds: Sequence[int], folder: Path, ledger: Ledger) -> list[Task]:
    """The runs that try a strength; by its name they are an arm of its own."""
    each = place.of(strength)
    each = replace(each, arm=f"{place.arm}, {each.settings[-1]}")
    return _tasks(each, seeds, folder / TUNING / each.folder, ledger, {})


def _choice(file: Path, place: _Place, tasks_by_strength: Mapping[float, Sequence[Task]], *, common: bool) -> Choice:
    trials = tuple(Trial.of(strength, *_results(tasks)) for strength, tasks in tasks_by_strength.items())
    choice = Choice(place.arm, place.panel + ", for every network" * common, trials)
    if not choice.able:
        location = f" in {place.panel}" * bool(place.panel)
        raise ValueError(
            f"{file}: {place.arm} diverged{location} with every strength, {[*tasks_by_strength]}; give it smaller ones in "
            "tune.arms"
        )
    return choice


def _tasks(place: _Place, seeds: Sequence[int], folder: Path, ledger: Ledger, parts: Mapping[str, Partial]) -> list[Task]:
    runs = [Run(place.recipe, seed, folder / str(seed)) for seed in seeds]
    return [Task(place.arm, place.panel, run, ledger, parts) for run in runs]


def _places(study: Study, file: Path) -> list[_Place]:
    """Every arm in every panel; where strengths are to be chosen, all with the same one."""
    base, code = join(study.recipe, file)
    places, folders, panels = [], dict[str, tuple[str, str]](), dict[tuple[str, str], str]()
    for (network, part), values in itertools.product(
        (study.networks or {"": {}}).items(), itertools.product(*study.factors.values())
    ):
        factors = dict(zip(study.factors, values, strict=True))
        factor_settings = tuple(f"{key}={inline(value)}" for key, value in factors.items())
        panel = ", ".join([*([network] if network else []), *itertools.starmap(_short, factors.items())])
        overlay = part
        for setting in factor_settings:
            overlay = merge(overlay, parse_setting(setting))
        raw = merge(base, overlay)
        recipes = {}
        for arm, over in study.arms.items():
            table = merge(raw, over)
            if study.tune is not None and isinstance(table.get("regularizer"), Mapping):
                table = merge(table, {"regularizer": {"strength": study.tune.values[0]}})
            recipes[arm] = Recipe.of(table, f"{file}: {arm}" + f" of {panel}" * bool(panel)).with_code(code)
        _check(f"{file}" + f", {panel}" * bool(panel), recipes, study, overlay)
        for arm, recipe in recipes.items():
            name = "-".join(_slug(file, each) for each in ([network, arm] if study.networks else [arm]))
            places.append(place := _Place(arm, network, panel, recipe, name, factor_settings))
            if folders.setdefault(place.folder, (panel, arm)) != (panel, arm):
                raise ValueError(
                    f"{file}: {arm} and {folders[place.folder][1]} would share the folder {place.folder}; choose other names"
                )
            if (twin := panels.setdefault((arm, recipe.to_toml()), panel)) != panel:
                raise ValueError(f"{file}: {arm} has the same recipe in the panels {twin} and {panel}")
    return places


def _short(key: str, value: Any) -> str:
    """A factor's value in the name of a panel."""
    last = key.rpartition(".")[2]
    return value if last in NAMED and isinstance(value, str) else f"{last}={inline(value)}"


def _slug(file: Path, name: str) -> str:
    """A name as part of a folder's."""
    if not name.isprintable() or not (plain := re.sub(r"[^\w.=+]+", "-", name).strip("-.")):
        raise ValueError(f"{file}: {name!r} cannot name an arm or a network; it needs letters or digits, all printable")
    return plain


def _check(subject: str, recipes: Mapping[str, Recipe], study: Study, overlay: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where arms override their panel's settings, or could not be compared."""
    for arm, recipe in recipes.items():
        if overrides := differences(Recipe.of(merge(recipe.to_dict(), overlay), subject), recipe):
            raise ValueError(f"{subject}: the arm {arm} overrides what its panel is to have in common ({overrides})")
    if undeclared_keys := undeclared_differences(
        [(arm, flatten(recipe.to_dict())) for arm, recipe in recipes.items()], study.factor
    ):
        raise ValueError(f"{subject}: {undeclared_keys[0]}; declare it among factor = [...]")
    for (one, a), (two, b) in itertools.combinations(recipes.items(), 2):
        if a == b:
            but = "" if study.tune is None else ", but for the strength that [tune] chooses"
            raise ValueError(f"{subject}: the arms {one} and {two} have the same recipe{but}")


def _check_tuning(file: Path, tune: Tune, places: Sequence[_Place]) -> None:
    """Raise ``ValueError`` unless there is something to tune, and validation images to tune it by."""
    tunable = [place for place in places if place.tunable]
    if not tunable:
        raise ValueError(f"{file}: [tune] has nothing to do, as no arm has a regularizer")
    if bare := [arm for arm in tune.arms if arm not in {place.arm for place in tunable}]:
        raise ValueError(f"{file}: tune.arms: {bare[0]} has no regularizer to tune")
    if not all(place.recipe.data.validation for place in tunable):
        raise ValueError(f"{file}: [tune] goes by validation accuracy; set data.validation above 0")
