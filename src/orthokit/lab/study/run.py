"""A study from its file to its comparison: train, evaluate, keep, compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.evaluation import evaluate as evaluation
from orthokit.lab.runs.launch import Pool, train_all
from orthokit.lab.runs.progress import Display
from orthokit.lab.runs.run import Run
from orthokit.lab.study.plan import Plan, Task, plan
from orthokit.lab.study.schema import Study

__all__ = ["Event", "Measure", "Outcome", "Train", "run"]

Kind = Literal["left", "chosen", "damaged", "empty"]
Train = Callable[[Sequence[Run], bool], int]
"""A function that trains runs, told whether their test results may be shown; its value is an exit status, 0 if all went well."""
Measure = Callable[[Sequence[evaluation.Subject], Study], int]
"""A function that evaluates trained networks as a study asks; its value is how many parts failed."""


@dataclass(frozen=True)
class Event:
    """Something that :func:`run` tells as it goes."""

    kind: Kind
    """``left``: the work to do; ``chosen``: a strength; ``damaged``: an unreadable file; ``empty``: why nothing is compared."""
    text: str
    title: str = ""
    """The title of the study."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of :func:`run`."""

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
    """Do what is left of a study, keep its runs in the ledger, and compare. Nothing is done twice.

    Args:
        file: the study, a TOML file.
        out: where runs are trained, ``out/<study>/<arm>/<seed>``.
        results: where they are kept, ``results/ledger``.
        pool: where runs compute, this machine by default. Evaluations use its device, jobs, threads and images.
        train: trains runs in another way than :func:`orthokit.lab.runs.launch.run_all`.
        measure: evaluates them in another way than :func:`orthokit.lab.evaluation.evaluate.evaluate`.
        only_keep: train and evaluate nothing; keep and compare what is there.
        on_event: called for each :class:`Event`.

    Raises:
        FileNotFoundError: no such file, or no images.
        ValueError: see :func:`orthokit.lab.study.plan`; or nothing can be compared though nothing failed.
    """
    pool = pool or Pool()
    train, measure = train or _train_with(pool), measure or _measure_with(pool)
    work = plan(file, out=out, results=results)
    if not work.tasks:
        _advance(work, train, measure, only_keep, on_event)
        work = plan(file, out=out, results=results)
        if not work.tasks:
            missing = f"{len(work.remaining())} of {len(work.tuning)} tuning runs are missing"
            on_event(Event("empty", f"nothing is chosen yet: {missing}"))
            return Outcome(work, None, 4)
    for choice in work.choices:
        subject = ", ".join(filter(None, [choice.panel, choice.arm]))
        on_event(Event("chosen", f"chosen: {subject}: strength = {choice.chosen.strength:g}"))
    status = _advance(work, train, measure, only_keep, on_event)
    try:
        return Outcome(work, work.comparison(), status)
    except ValueError as error:
        if not status:
            raise
        on_event(Event("empty", f"nothing to compare yet: {error}"))
        return Outcome(work, None, status)


def _advance(work: Plan, train: Train, measure: Measure, only_keep: bool, on_event: Callable[[Event], object]) -> int:
    """Train, evaluate and keep what is left of the present stage; return an exit status."""
    tasks, status = work.remaining(), 0
    unreadable = [task for task in tasks if task.run.damage()]
    untrained_runs = [task.run for task in tasks if task in unreadable or task.run.summary() is None]
    on_event(Event("left", _summary(work, len(untrained_runs), len(tasks)), work.study.title))
    try:
        if only_keep:
            return 4 * any(not task.is_done() for task in _keep(work, tasks, on_event))
        if untrained_runs:
            status = train(untrained_runs, bool(work.tasks))
        complete = [task for task in tasks if work.tasks and task not in unreadable and task.run.summary() is not None]
        if complete:
            subjects = [each for task in complete for each in evaluation.subjects(task.run.folder, task.run.recipe)]
            status = 4 if measure(subjects, work.study) else status
    finally:  # when interrupted, too: the next sitting need not have the runs' own folders
        _keep(work, tasks, on_event)
    return status


def _keep(work: Plan, tasks: list[Task], on_event: Callable[[Event], object]) -> list[Task]:
    """Put ``tasks`` into the ledger, and report files that could not be read."""
    for why in [*work.keep(tasks), *work.damage()]:
        on_event(Event("damaged", f"left out: {why}"))
    return tasks


def _summary(work: Plan, missing: int, remaining: int) -> str:
    if not remaining:
        return "all is done"
    of = f"{missing} of {len(work.tasks or work.tuning)}"
    more = f", {remaining} to evaluate" if work.study.evaluate.parts else ""
    return f"{of} runs to train{more}" if work.tasks else f"{of} tuning runs to train"


def _train_with(pool: Pool) -> Train:
    return lambda runs, test: 4 if train_all(runs, pool, Display(Console(quiet=True), test=test)) else 0


def _measure_with(pool: Pool) -> Measure:
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
