"""Progress of runs: bars on a terminal, a line an epoch elsewhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from orthokit.lab.runs.run import Run

__all__ = ["Display", "Watch", "bars", "describe_epoch", "describe_run"]


class Watch:
    """A listener to the progress of runs; this one ignores everything."""

    def step(self, run: Run, epochs: float, loss: float, speed: float) -> None:
        """Hear that ``epochs`` are done, with this loss at this speed (images per second)."""

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """Hear that an epoch is done: its line of ``metrics.jsonl``."""

    def say(self, text: str) -> None:
        """Hear something that a person should know."""


def bars(console: Console, count: str, *more: ProgressColumn) -> Progress:
    """Bars on a terminal, nothing elsewhere: a description, a bar, how much is done, and how long the rest takes.

    Args:
        console: where the bars appear.
        count: how to say how much is done, such as ``"{task.completed:.0f}/{task.total:.0f}"``.
        more: columns behind these.
    """
    name = TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True, max_width=48))
    columns = (name, BarColumn(bar_width=12), TextColumn(count), TimeRemainingColumn(compact=True), *more)
    return Progress(*columns, console=console, disable=not console.is_terminal)


class Display(Watch):
    """Shows runs on a console; when the reader has gone it goes quiet. A method may be called from any thread.

    Args:
        console: where.
        test: whether to show results on the test set.
        of: number of short runs that share one bar, without lines but for failures; by default each run has its own bar.
    """

    def __init__(self, console: Console, *, test: bool = True, of: int | None = None) -> None:
        self.console, self.test, self.of = console, test, of
        last = TextColumn("{task.fields[last]}", style="dim", table_column=Column(overflow="ellipsis", no_wrap=True))
        self.bars = bars(console, "{task.completed:.1f}/{task.total:.0f}", last)
        self.tasks: dict[str, TaskID] = {}
        self.shares: dict[str, float] = {}
        """The part that is done of each run that shares a bar."""

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        try:
            self.bars.console.print(text, highlight=False, soft_wrap=True)
        except BrokenPipeError:
            self.console.quiet = True

    def step(self, run: Run, epochs: float, loss: float, speed: float) -> None:
        """Move the run's bar."""
        self._move(run, epochs, f"loss {loss:.2f}  {speed:,.0f} images/s")

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """Move the run's bar, or print a line."""
        validation = row["validation"]
        accuracy = f"train {row['train']['accuracy']:.1%}" if validation is None else f"validation {validation['accuracy']:.1%}"
        self._move(run, row["epoch"], f"loss {row['train']['loss']:.2f}  {accuracy}")
        if not self.console.is_terminal and self.of is None:
            self.say(escape(f"{run.name}  epoch {row['epoch']}/{run.recipe.train.epochs}  {describe_epoch(row)}"))

    def finish(self, run: Run, summary: dict[str, Any], *, before: bool = False) -> None:
        """Show that a run has finished, perhaps before this command."""
        if self.of is not None:
            self._move(run, run.recipe.train.epochs, "")
            return
        self._close(run, describe_run(run, summary, test=self.test) + ("  [dim]finished before[/]" if before else ""))

    def _close(self, run: Run, text: str) -> None:
        """Replace the run's bar by a line."""
        if (task := self.tasks.pop(run.name, None)) is not None:
            self.bars.remove_task(task)
        self.say(text)

    def fail(self, run: Run, why: str) -> None:
        """Show that a run has failed."""
        self._close(run, f"[bold red]{escape(run.name)}[/]  failed: {escape(why)}")

    def _move(self, run: Run, epochs: float, text: str) -> None:
        if self.of is not None:
            self.shares[run.name] = epochs / run.recipe.train.epochs
            if not self.tasks:
                self.tasks["runs"] = self.bars.add_task("runs", total=self.of, last="")
            self.bars.update(self.tasks["runs"], completed=sum(self.shares.values()))
            return
        if run.name not in self.tasks:
            self.tasks[run.name] = self.bars.add_task(escape(run.name), total=run.recipe.train.epochs, last="")
        self.bars.update(self.tasks[run.name], completed=epochs, last=text)


def describe_epoch(row: dict[str, Any]) -> str:
    """A line of ``metrics.jsonl`` in words."""
    parts = [f"loss {row['train']['loss']:.3f}", f"train {row['train']['accuracy']:.1%}"]
    if row["validation"] is not None:
        parts.append(f"validation {row['validation']['accuracy']:.1%}")
    for name, part in row["orthogonality"].items():
        if "mean_cos" in part and name != "all":
            parts.append(f"{name} mean|c| {part['mean_cos']:.1e}")
    return "  ".join([*parts, f"{row['images_per_second']:,.0f} images/s"])


def describe_run(run: Run, summary: dict[str, Any], *, test: bool = True) -> str:
    """A summary in a line."""
    parts = {"validation": summary["validation"], "test": summary["test"] if test else None}
    accuracies = ", ".join(f"{name} {part['accuracy']:.2%}" for name, part in parts.items() if part is not None)
    minutes = f"{summary['seconds'] / 60:.1f} min at {summary['images_per_second']:,.0f} images/s"
    share = f", penalty {summary['penalty_share']:.1%} of a step" if summary["recipe"].get("regularizer") else ""
    return f"[bold]{escape(run.name)}[/]  {accuracies}  ({minutes}{share})"
