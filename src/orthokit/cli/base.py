"""Parts that all commands use."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from orthokit.checks import install, printable
from orthokit.tables import Table

if TYPE_CHECKING:
    from orthokit.lab.data.images import ImageSet

__all__ = [
    "Format",
    "Terminal",
    "UsageError",
    "check_positive",
    "demo_images",
    "needing",
    "say",
    "show",
    "suggest",
    "to_compare",
    "write_text",
]

Format = Literal["table", "json", "csv"]


class UsageError(Exception):
    """An error that the caller can put right; printed without a traceback."""


class Terminal(Console):
    """A console that shows no character a terminal would act on, whatever a file or a name holds.

    A closed pipe (``| head``) is treated as the reader having seen enough.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of ``renderable``, each of them printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))

    def on_broken_pipe(self) -> None:
        """Leave it to the command line."""
        raise BrokenPipeError


def check_positive(command: object, *names: str) -> None:
    """Raise ``UsageError`` where an option of a command is given and below 1."""
    for name in names:
        if (value := getattr(command, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


@contextlib.contextmanager
def needing(what: str) -> Iterator[None]:
    """Say how to install the extra ``lab`` if one of its libraries is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{what} {error.name}: {install('lab')}") from None


def show(table: Table, form: Format, console: Console) -> None:
    if form == "table":
        console.print(table)
    else:
        print(table.to_json() if form == "json" else table.to_csv(), end="")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print plain text as it is: no markup, no broken lines. Empty text prints nothing."""
    if text:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def suggest(console: Console, command: str) -> None:
    """Say in one line what to do next, on a terminal only: not into a pipe or a file."""
    if command and console.is_terminal:
        say(console, f"next: {command}", "dim")


def to_compare() -> str:
    """Folders below this one that ``compare`` accepts; for studies, the command that compares their runs."""
    studies = "; a study compares its own runs: orthokit study FILE --no-train" if Path("results/ledger").is_dir() else ""
    return f"folders of runs, such as runs, or a CSV file{studies}"


def write_text(path: Path, text: str) -> None:
    """Write a file that a command was told to write."""
    path.write_text(text, encoding="utf-8")


def demo_images(root: Path | None) -> "Callable[[], ImageSet]":
    """Loads what the demo trains on: the digits, or some of the CIFAR-10 in ``root``. Can be pickled."""
    from orthokit.lab.data.images import load

    return (
        functools.partial(load, "digits") if root is None else functools.partial(load, "cifar10", root=root, train=5000, size=16)
    )
