"""Parts that all commands use."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

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
    "check_outputs",
    "check_positive",
    "demo_images",
    "discard",
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

    After a closed pipe (``| head``) it shows nothing more; the command goes on, and its status counts.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of ``renderable``, each of them printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))

    def on_broken_pipe(self) -> None:
        """Show nothing from now on: the reader has seen enough."""
        self.quiet = True
        discard(self.file)

    def write(self, text: str) -> None:
        """Write text for a program, such as JSON: neither laid out nor changed."""
        if self.quiet:
            return
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()


def discard(stream: IO[str]) -> None:
    """Let what is left to print vanish: Python would fail at it again as it ends."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


OUTPUTS = ("html", "picture", "junit", "markdown", "latex", "csv")
"""Options that name a file to write."""
INPUTS = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".jsonl", ".toml", ".py"}
"""Suffixes of what commands read: weights, settings, records, code. No output option replaces such a file."""


def check_outputs(command: object) -> None:
    """Raise ``UsageError`` where an output option of a command names one of its inputs, another output, or a saved network."""
    values = {field.name: getattr(command, field.name) for field in fields(command)}  # type: ignore[arg-type]
    outputs = {f"--{name}": path for name in OUTPUTS if isinstance(path := values.pop(name, None), Path)}
    inputs = [path for value in values.values() for path in (value if isinstance(value, tuple) else (value,))]
    for option, path in outputs.items():
        if any(_is_same(path, each) for each in inputs if isinstance(each, Path)):
            raise UsageError(f"{option} {path} would replace what the command reads; give another file")
        if path.suffix.lower() in INPUTS and path.exists():
            raise UsageError(f"{option} {path} would replace a {path.suffix} file that is there; give another file")
    for (one, path), (two, other) in itertools.combinations(outputs.items(), 2):
        if _is_same(path, other):
            raise UsageError(f"{one} and {two} name the same file; give each its own")


def _is_same(one: Path, two: Path) -> bool:
    """Whether two paths lead to one file, which need not exist."""
    try:
        return one.resolve() == two.resolve() or one.samefile(two)
    except (OSError, ValueError):
        return False


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


def show(table: Table, form: Format, console: Terminal) -> None:
    if form == "table":
        console.print(table)
    else:
        console.write(table.to_json() if form == "json" else table.to_csv())


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
