"""A study from its file to its comparison: train, evaluate, keep, compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.evaluation import evaluate as evaluation
from orthokit.lab.recipes.recipe import check_all
from orthokit.lab.runs.launch import Pool, run_all
from orthokit.lab.runs.progress import Display
from orthokit.lab.runs.run import Run
from orthokit.lab.study.plan import Plan, Task, plan
from orthokit.lab.study.schema import Study

__all__ = ["Event", "Measure", "Outcome", "Train", "run"]

Kind = Literal["left", "chosen", "damaged", "empty"]
Train = Callable[[Sequence[Run], bool], int]
"""Trains runs; told whether their test results may be shown. Its value is an exit status, 0 if all went well."""
Measure = Callable[[Sequence[evaluation.Subject], Study], int]
"""Evaluates trained networks as a study asks; how many parts failed."""


@dataclass(frozen=True)
class Event:
    """Something that :func:`run` tells as it goes."""

    kind: Kind
    """``left``: what is to do; ``chosen``: a strength; ``damaged``: what cannot be read; ``empty``: why nothing is compared."""
    text: str
    title: str = ""
    """The study's."""


@dataclass(frozen=True)
class Outcome:
    """What :func:`run` came to."""

    plan: Plan
    comparison: Comparison | None
    """None where there is nothing to compare yet."""
    status: int
    """An exit status: 0, or 4 where a run or an evaluation failed or is missing."""


def run(
    file: Path,
    *,
    out: Path = Path("runs"),
    results: Path = Path("results"),
    pool: Pool | None = None,
    train: Train | None = None,
    measure: Measure | None = None,
    only_keep: bool = False,
    on_event: Callable[[Event], object] = lambda event: None,
) -> Outcome:
    """Do what is left of a study, keep it in the ledger, and compare. Started again it repeats nothing.

    Args:
        file: the study, a TOML file.
        out: where runs are trained, ``out/<study>/<arm>/<seed>``.
        results: where they are kept, ``results/ledger``.
        pool: where runs compute, this machine by default. Evaluations use its device, jobs, threads and images.
        train: trains runs in another way than :func:`orthokit.lab.runs.launch.run_all`.
        measure: evaluates them in another way than :func:`orthokit.lab.evaluation.evaluate.evaluate`.
        only_keep: train and evaluate nothing; keep and compare what is there.
        on_event: told of each :class:`Event`.

    Raises:
        FileNotFoundError: no such file, or no images.
        ValueError: as of :func:`orthokit.lab.study.plan`; or nothing can be compared though nothing failed.
    """
    pool = pool or Pool()
    train, measure = train or _trained_by(pool), measure or _measured_by(pool)
    work = plan(file, out=out, results=results)
    if not work.tasks:
        _advance(work, train, measure, only_keep, on_event)
        work = plan(file, out=out, results=results)
        if not work.tasks:
            missing = f"{len(work.left())} of {len(work.tuning)} tuning runs are missing"
            on_event(Event("empty", f"nothing is chosen yet: {missing}"))
            return Outcome(work, None, 4)
    for choice in work.choices:
        where = ", ".join(filter(None, [choice.panel, choice.arm]))
        on_event(Event("chosen", f"chosen: {where}: strength = {choice.chosen.strength:g}"))
    status = _advance(work, train, measure, only_keep, on_event)
    try:
        return Outcome(work, work.comparison(), status)
    except ValueError as error:
        if not status:
            raise
        on_event(Event("empty", f"nothing to compare yet: {error}"))
        return Outcome(work, None, status)


def _advance(work: Plan, train: Train, measure: Measure, only_keep: bool, on_event: Callable[[Event], object]) -> int:
    """Train, evaluate and keep what is left of the present stage; an exit status."""
    left, status = work.left(), 0
    damaged = [task for task in left if task.run.damage()]
    untrained = [task.run for task in left if task in damaged or task.run.summary() is None]
    on_event(Event("left", _summary(work, len(untrained), len(left)), work.study.title))
    try:
        if only_keep:
            return 4 * any(not task.done() for task in _kept(work, left, on_event))
        if untrained:
            status = train(untrained, bool(work.tasks))
        trained = [task for task in left if work.tasks and task not in damaged and task.run.summary() is not None]
        if trained:
            subjects = [each for task in trained for each in evaluation.subjects(task.run.folder, task.run.recipe)]
            status = 4 if measure(subjects, work.study) else status
    finally:  # when interrupted, too: the next sitting need not have the runs' own folders
        _kept(work, left, on_event)
    return status


def _kept(work: Plan, tasks: list[Task], on_event: Callable[[Event], object]) -> list[Task]:
    """Put ``tasks`` into the ledger, and tell what could not be read."""
    for why in [*work.keep(tasks), *work.damage()]:
        on_event(Event("damaged", f"left out: {why}"))
    return tasks


def _summary(work: Plan, untrained: int, left: int) -> str:
    if not left:
        return "all is done"
    of = f"{untrained} of {len(work.tasks or work.tuning)}"
    more = f", {left} to evaluate" if work.study.evaluate.parts else ""
    return f"{of} runs to train{more}" if work.tasks else f"{of} tuning runs to train"


def _trained_by(pool: Pool) -> Train:
    def train(runs: Sequence[Run], test: bool) -> int:
        sound = [run for run in runs if run.damage() is None]
        check_all([run.recipe for run in sound], pool.root)
        with Display(Console(quiet=True), test=test) as display:
            failed = len(runs) - len(sound) + sum(status != 0 for status in run_all(sound, pool, display))
        return 4 if failed else 0

    return train


def _measured_by(pool: Pool) -> Measure:
    def measure(subjects: Sequence[evaluation.Subject], study: Study) -> int:
        return evaluation.evaluate(
            subjects,
            parts=study.evaluate.parts,
            images=study.evaluate.images,
            root=pool.root,
            device=pool.device,
            jobs=pool.jobs,
            threads=pool.threads,
        )

    return measure
