"""Commands that show what training did: ``evaluate``, ``compare``, ``power``, ``study``."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table as RichTable
from rich.text import Text

from orthokit.cli.base import Format, Terminal, UsageError, check_positive, needing, say, to_compare, write_text
from orthokit.cli.lab import Machine
from orthokit.tables import Column, Table

if TYPE_CHECKING:
    from orthokit.lab.comparison.comparison import Comparison
    from orthokit.lab.evaluation.evaluate import Subject
    from orthokit.lab.runs.results import Result

__all__ = ["Compare", "Evaluate", "Power", "Study", "measured"]

Part = Literal["attacks", "corruptions", "noise", "features", "accuracy", "orthogonality"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Evaluate:
    """Measure robustness, calibration and features of trained networks.

    Results go to evaluation.json in a run's folder, or to FILE.evaluation.json beside a checkpoint. Parts that were measured
    before are not measured again. Exit status 4 if a part could not be measured; all other parts are.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT...")]
    """Runs, folders of runs, or weights (.safetensors, .pt, .pth). No code in them is executed."""
    recipe: str | None = None
    """Recipe with [network] and [data]. Checkpoints that orthokit did not save need one, and runs with your own code."""
    model: str | None = None
    """Your own network as module:function, from this folder or Python's path. The module is imported, so its code runs."""
    key: str | None = None
    """Which network to read where a checkpoint holds several: its name, or how the names of its weights begin."""
    parts: tuple[Part, ...] = PARTS
    """Parts of the evaluation."""
    images: int = 1000
    """Number of test images for attacks, noise and corruptions, equally many of each class."""
    root: Path = Path("data")
    """Folder of the images. Corrupted images are kept there, too."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on."""
    jobs: int | None = None
    """Parts measured at the same time; by default one on each core, or one on a GPU."""
    threads: int = 1
    """CPU threads of each part."""
    format: Format = "table"
    """Output format."""

    def run(self, console: Terminal) -> int:
        if not self.paths:
            raise UsageError("name a run's folder or a checkpoint, such as runs/nano+cifar10+strict")
        check_positive(self, "images", "jobs", "threads")
        with needing("evaluate needs"):
            from orthokit.lab.evaluation import evaluate
            from orthokit.lab.recipes import compose
            from orthokit.lab.reporting.terminal import Wide
        given = None if self.recipe is None else compose.load(self.recipe)
        damaged: list[str] = []
        wanted = [
            subject for path in self.paths for subject in evaluate.subjects(path, given, self.model, self.key, damaged.append)
        ]
        if self.model is not None and not any(subject.recipe.network.kind == self.model for subject in wanted):
            kinds = ", ".join(dict.fromkeys(subject.recipe.network.kind for subject in wanted))
            raise UsageError(f"--model {self.model} names a network that none of these runs has; theirs: {kinds}")
        unique = list({subject.record.resolve(): subject for subject in wanted}.values())
        quiet = Terminal(stderr=True) if self.format != "table" else console
        for why in damaged:
            quiet.print(f"left out: {why}", markup=False, highlight=False, soft_wrap=True)
        for subject in unique:
            for note in subject.notes:
                quiet.print(f"{subject.name}: {note}", markup=False, highlight=False, soft_wrap=True)
        options = {name: getattr(self, name) for name in ("parts", "images", "root", "device", "jobs", "threads")}
        failed = measured(unique, quiet, **options)
        results = [evaluate.result(subject) for subject in unique]
        table = _table(unique, results)
        if self.format == "table":
            shown = [column for column in table.columns if any(row[column.key] is not None for row in table.rows)]
            console.print(Wide(replace(table, columns=tuple(shown))))
            if len(unique) == 1:
                console.print(_curves(results[0]))
        else:
            as_json = self.format == "json"
            console.write(json.dumps(table.rows, indent=2) + "\n" if as_json else table.to_csv())
        return 4 if failed or damaged else 0


def measured(subjects: "Sequence[Subject]", console: Console, **options: Any) -> int:
    """Evaluate what is left, behind a progress bar; return how many parts failed."""
    from orthokit.lab.evaluation.evaluate import evaluate
    from orthokit.lab.runs.progress import bars

    with bars(console, "{task.completed:.0f}/{task.total:.0f}") as shown:
        bar: list[TaskID] = []

        def start(left: int, total: int) -> None:
            bar.append(shown.add_task("evaluating", total=left))
            if left < total and left:
                shown.console.print(
                    f"{total - left} of {total} parts were measured before and are kept", style="dim", highlight=False
                )

        def tick(subject: "Subject", part: str, error: str | None) -> None:
            shown.advance(bar[0])
            if error is not None:
                shown.console.print(
                    f"[bold red]{escape(subject.name)}[/]  {part}: {escape(error)}", highlight=False, soft_wrap=True
                )
            elif not console.is_terminal:
                console.print(f"{subject.name}  {part}", markup=False, highlight=False, soft_wrap=True)

        return evaluate(subjects, tick=tick, start=start, **options)


def _table(subjects: "Sequence[Subject]", results: "Sequence[Result]") -> Table:
    """A row for each network, a column for each metric."""
    from orthokit.lab.comparison.metrics import METRICS

    metrics = [metric for metric in METRICS if metric.group != "cost"]
    twice = {name for name, count in Counter(subject.name for subject in subjects).items() if count > 1}
    rows = [
        {"network": str(subject.weights) if subject.name in twice else subject.name} | {m.key: m.read(result) for m in metrics}
        for subject, result in zip(subjects, results, strict=True)
    ]
    columns = Column("network", "network", "s"), *(Column(m.key, m.heading, m.format) for m in metrics)
    return Table("evaluation (robustness: accuracy, mean over the strengths)", columns, tuple(rows), {})


def _curves(found: "Result") -> RichTable:
    """A table of accuracies by the strength of an attack, noise or corruption, where measured."""
    from orthokit.lab.comparison.metrics import curve

    labels = {"fgsm": "FGSM, radius/255", "pgd": "PGD L∞, radius/255", "pgd_l2": "PGD L2, radius", "noise": "noise, sd"}
    curves = {label: curve(key, found) for key, label in labels.items()}
    for name, values in found.parts.get("corruptions", {}).get("accuracy", {}).items():
        curves[f"{name}, severity"] = dict(enumerate(values, 1))
    table = RichTable(title="accuracy by strength, %", title_justify="left", box=box.SIMPLE, show_header=False)
    for label, points in curves.items():
        if points:
            table.add_row(Text(label), *(f"{strength:g}" for strength in points), style="dim")
            table.add_row("", *(f"{100 * value:.1f}" for value in points.values()))
    return table


@dataclass(frozen=True)
class Compare:
    """Compare arms with a baseline: gain, interval, test, verdict.

    Runs that differ in --factor are different arms. Runs that differ in --by are compared separately. Any other difference is an
    error. Results are those of the last epoch, never of the best one. Your own results work too: a CSV file with a line for each
    run, columns arm, seed and metrics, and a column panel or network if there are several.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS|FILE.csv...")]
    """Folders, of which all finished runs are compared, or CSV files."""
    baseline: str | None = None
    """Arm that all others are compared with; by default the arm without a penalty (in CSV files: none or baseline)."""
    factor: tuple[str, ...] = ("regularizer",)
    """Keys or sections of a recipe in which arms may differ."""
    by: tuple[str, ...] = ()
    """Keys or sections of a recipe by which runs are compared separately: network and data.name by default. Or CSV columns."""
    metric: str | None = None
    """Metric of the verdicts: accuracy (the default), train_accuracy, train_loss, test_loss, nll,
    ece, fgsm, pgd, pgd_l2, noise, corruptions, under_cos, ..."""
    higher: tuple[str, ...] = ()
    """CSV columns where more is better. Names with accuracy, score, loss or error need no such option."""
    lower: tuple[str, ...] = ()
    """CSV columns where less is better."""
    contrast: tuple[str, ...] = ()
    """The primary question: differences "ARM - OTHER ARM", averaged over all panels and adjusted among themselves."""
    blocks: Literal["seed"] | None = None
    """Base verdicts on a test that pairs runs of one seed, instead of Welch's t. Decide this before you train."""
    anyway: bool = False
    """Compare runs that would be refused, and mark every output with a flag."""
    title: str = "comparison"
    """Title of the tables and of the page."""
    question: str = ""
    """The question behind the comparison, in one sentence; printed above the answer."""
    html: Path | None = None
    """Write one page with all figures into this file, too."""
    markdown: Path | None = None
    """Write the tables as Markdown into this file, too."""
    latex: Path | None = None
    """Write the tables as LaTeX into this file, too."""
    csv: Path | None = None
    """Write all numbers as CSV into this file, too."""

    def run(self, console: Console) -> None:
        if not self.runs:
            raise UsageError(f"name {to_compare()}")
        with needing("compare needs"):
            from orthokit.lab.atomic import write
            from orthokit.lab.comparison.comparison import PANELS, compare
            from orthokit.lab.reporting import markup, page, tables
            from orthokit.lab.reporting.terminal import Shown
            from orthokit.lab.runs import collect
        files = [path for path in (self.markdown, self.latex, self.csv, self.html) if path is not None]
        options: dict[str, Any] = {"title": self.title, "question": self.question, "baseline": self.baseline}
        options |= {"blocks": self.blocks, "contrasts": self.contrast}
        if any(path.suffix.lower() == ".csv" for path in self.runs):
            comparison = self._of_sheets(options)
        elif self.higher or self.lower:
            raise UsageError("--higher and --lower name columns of CSV files; these are folders of runs")
        else:
            found, flagged = collect.read(self.runs)
            options |= {"factor": self.factor, "by": self.by or PANELS, "metric": self.metric or "accuracy"}
            comparison = compare(found, anyway=self.anyway, flagged=flagged, **options)
        writers: list[tuple[Path | None, Callable[[Comparison], str]]] = [
            (self.markdown, markup.markdown),
            (self.latex, markup.latex),
            (self.csv, lambda each: tables.numbers(each).to_csv()),
            (self.html, page.page),
        ]
        for path, writer in writers:
            if path is not None:
                write(path, writer(comparison))
        console.print(Shown(comparison))
        for path in files:
            console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)

    def _of_sheets(self, options: dict[str, Any]) -> "Comparison":
        from orthokit.lab.comparison.sheet import compare_lines

        if others := [path for path in self.runs if path.suffix.lower() != ".csv"]:
            raise UsageError(f"{others[0]} is not a CSV file; give CSV files or folders of runs, not both at once")
        if self.factor != ("regularizer",) or self.anyway:
            raise UsageError("--factor and --anyway are of runs with recipes; in a CSV file the column arm says what an arm is")
        options |= {"by": self.by, "metric": self.metric, "higher": self.higher, "lower": self.lower}
        return compare_lines(self.runs, **options)


@dataclass(frozen=True)
class Power:
    """Tell how many seeds a gain needs, or which gain some seeds resolve.

    Two-sided Welch t-test. With --comparisons N the level is divided by N (Holm's worst case). Without --sd the standard
    deviation is the median over the networks in --like.
    """

    sd: float | None = None
    """Standard deviation of one arm's results from seed to seed, in the unit of --effect."""
    like: tuple[Path, ...] = ()
    """Folders of runs, the folder results, or CSV files, with runs that vary as yours will; results by default."""
    metric: str | None = None
    """Metric in --like: test accuracy by default; in CSV files the first column with numbers."""
    effect: float | None = None
    """Gain to resolve, such as 0.3 (points of accuracy)."""
    seeds: int | None = None
    """Seeds of each arm. With --effect the command prints the chance that they resolve it."""
    comparisons: int = 1
    """Number of tests: arms other than the baseline, times panels."""
    chance: float = 0.8
    """Probability of resolving a real gain."""
    alpha: float = 0.05
    """Risk of one wrong verdict or more among all tests."""

    def _typical(self, console: Console) -> float:
        """The standard deviation from seed to seed, measured on runs that exist."""
        from orthokit.lab.comparison.spread import spreads, typical

        paths = self.like or (Path("results"),)
        if not self.like and not paths[0].is_dir():
            raise UsageError("give --sd, or --like with a folder of runs or a CSV file whose runs vary as yours will")
        heading, found = spreads(paths, self.metric)
        table = RichTable(title=Text(f"standard deviation of seeds, {heading}"), title_justify="left", box=box.SIMPLE_HEAD)
        for header in ("network", "arms", "runs", "sd"):
            table.add_column(header, justify="left" if header == "network" else "right")
        for each in found:
            table.add_row(Text(each.where), str(each.arms), str(each.runs), f"{each.sd:.3g}")
        console.print(table)
        sd = typical(found)
        least, most = min(each.sd for each in found), max(each.sd for each in found)
        spread = f" the median of {len(found)}, from {least:.3g} to {most:.3g};" if len(found) > 1 else ""
        console.print(f"sd = {sd:.3g} of {heading}:{spread} --sd sets another", highlight=False, soft_wrap=True, markup=False)
        return sd

    def run(self, console: Console) -> None:
        with needing("power needs"):
            from orthokit.lab.comparison.inference import detectable, power, seeds_needed
        family: dict[str, Any] = {"comparisons": self.comparisons, "alpha": self.alpha}

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        if self.effect is None and self.seeds is None:
            raise UsageError("give --effect, --seeds, or both")
        sd = self.sd if self.sd is not None else self._typical(console)
        if self.seeds is not None and self.effect is not None:
            chance = power(self.seeds, self.effect, sd, **family)
            say(f"[bold]{chance:.0%}[/] is the chance that {self.seeds} seeds an arm resolve a difference of {self.effect:g}")
        elif self.seeds is not None:
            least = detectable(self.seeds, sd, chance=self.chance, **family)
            say(f"[bold]{least:.3g}[/] is what {self.seeds} seeds an arm resolve with probability {100 * self.chance:g}%")
        if self.effect is None:
            return
        needed = seeds_needed(self.effect, sd, chance=self.chance, **family)
        say(f"[bold]{needed:,} seeds an arm[/] resolve a difference of {self.effect:g} with probability {100 * self.chance:g}%")
        table = RichTable(box=box.SIMPLE_HEAD)
        for header in ("seeds an arm", f"chance to resolve {self.effect:g}", f"resolved with {100 * self.chance:g}%"):
            table.add_column(header, justify="right")
        for n in sorted({2, 3, 5, 10, 20, max(2, needed), *({self.seeds} if self.seeds else ())}):
            least = detectable(n, sd, chance=self.chance, **family)
            style = "bold" if n == needed else ""
            table.add_row(f"{n:,}", f"{power(n, self.effect, sd, **family):.0%}", f"{least:.3g}", style=style)
        console.print(table)


@dataclass(frozen=True)
class Study:
    """Train, evaluate and compare what one file says.

    With [tune] in the file, strengths are chosen by validation accuracy first. A record of each run goes to RESULTS/ledger,
    tables and figures go to RESULTS/NAME. Start the command again after an interruption: it goes on. With nothing left to do it
    draws the results again. Exit status 4 if a run or an evaluation failed or is missing; all others are compared.
    """

    file: tyro.conf.Positional[Path]
    """TOML file with arms, networks, seeds and what to evaluate; see studies/nano.toml, and the page on the lab."""
    results: Path = Path("results")
    """Folder of the ledger and of all studies' tables."""
    html: Path | None = None
    """Write a page with every table and figure into this file, too."""
    csv: Path | None = None
    """Write all numbers as CSV into this file, too."""
    latex: Path | None = None
    """Write the tables as LaTeX into this file, too."""
    no_train: bool = False
    """Train nothing: show what is left to do, record finished runs, and draw the results so far."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)

    def run(self, console: Console) -> int:
        with needing("study needs"):
            from orthokit.lab import study
            from orthokit.lab.reporting import markup, page, tables
            from orthokit.lab.reporting.terminal import Shown

        machine = self.machine

        def tell(event: "study.Event") -> None:
            if event.kind == "left":
                console.print(f"[bold]{escape(event.title)}[/]: {event.text}", highlight=False, soft_wrap=True)
            else:
                say(console, event.text)

        def measure(subjects: "Sequence[Subject]", asked: "study.Study") -> int:
            options = {"root": machine.root, "device": machine.device, "jobs": machine.jobs, "threads": machine.threads or 1}
            return measured(subjects, console, parts=asked.evaluate.parts, images=asked.evaluate.images, **options)

        outcome = study.run(
            self.file,
            out=machine.out,
            results=self.results,
            train=lambda runs, test: machine.run_all(runs, console, test=test),
            measure=measure,
            only_keep=self.no_train,
            on_event=tell,
        )
        if (comparison := outcome.comparison) is None:
            return outcome.status
        outcome.plan.draw(comparison)
        for path, content in ((self.csv, lambda each: tables.numbers(each).to_csv()), (self.latex, markup.latex)):
            if path is not None:
                write_text(path, content(comparison))
        if self.html is not None:
            write_text(self.html, page.page(comparison, command=outcome.plan.command))
        console.print(Shown(comparison, secondary=False))
        say(console, f"tables: {outcome.plan.folder / 'README.md'}")
        return outcome.status
