"""The command line: ``orthokit demo | list | report | plan | train | sweep | evaluate | compare | power | study``."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.text import Text

import orthokit as ok
from orthokit import starting
from orthokit.checks import printable
from orthokit.cli.after import after
from orthokit.cli.base import Terminal, UsageError, check_outputs, discard, suggest
from orthokit.cli.evidence import Compare, Evaluate, Power, Study
from orthokit.cli.lab import Demo, Sweep, Train
from orthokit.cli.look import List, Plan, Report
from orthokit.lab import own

__all__ = ["COMMANDS", "STATUS", "main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "list": List,
    "report": Report,
    "plan": Plan,
    "train": Train,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "compare": Compare,
    "power": Power,
    "study": Study,
}
ABOUT = "Orthogonal filters for deep networks: measure them, train for them, see what that did."
STATUS = {
    0: "success",
    1: "a gate failed (report --fail-if)",
    2: "an error that you can put right; one line says how",
    3: "training diverged",
    4: "one of several runs or parts failed; all others are done",
    130: "stopped by Ctrl-C or a signal; the same command goes on",
}
"""Meaning of each exit status."""


def _overview() -> str:
    """One line for each command: the first sentence of its docstring."""
    lines = [f"  {name:9} {(command.__doc__ or '').partition(chr(10))[0]}" for name, command in COMMANDS.items()]
    ends = ["orthokit COMMAND --help shows the options of a command; orthokit --version the version.", "", "Exit status:"]
    ends += [f"  {status:<9} {meaning}." for status, meaning in STATUS.items()]
    return "\n".join(["usage: orthokit COMMAND ...", "", ABOUT, "", *lines, "", *ends])


NARROWEST = 40
"""Columns that tables and help assume at least, however narrow the terminal is."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A termination signal ends a command as Ctrl-C does, with the processes that the command started."""
    starting.finish()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_interruptible()
def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, one of :data:`STATUS`.

    With ``ORTHOKIT_DEBUG=1`` in the environment errors keep their traceback.
    """
    args = sys.argv[1:] if args is None else list(args)
    if args == ["--version"]:
        print(f"orthokit {ok.__version__}")
        return 0
    if not args or args in (["--help"], ["-h"]):
        print(_overview())
        raise SystemExit(0)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Greek letters on a terminal without them
    _widen()
    errors = Terminal(stderr=True, soft_wrap=True)
    own.ANNOUNCED.clear()
    try:
        command = _parsed(args)
        check_outputs(command)
        status: int | None = command.run(console := Terminal())
        if not status and getattr(command, "format", "table") == "table":
            suggest(console, after(command))
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough
            discard(sys.stdout)
        except AttributeError:  # of no stdout at all
            pass
        return status or 0
    except (UsageError, ValueError, FloatingPointError, OSError, ModuleNotFoundError, TypeError) as error:
        if os.environ.get("ORTHOKIT_DEBUG") or (isinstance(error, TypeError) and not _is_raised_here(error)):
            raise
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            discard(sys.stdout)
        errors.print(Text.assemble(("orthokit:", "bold red"), " ", _line(error)))
        return getattr(error, "status", 2)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("ORTHOKIT_DEBUG") or not _lacks_memory(error):
            raise
        wanted = "fewer --jobs, a smaller train.batch, or fewer layers at a time (--where, --no-spectrum)"
        errors.print(Text.assemble(("orthokit:", "bold red"), f" out of memory; try {wanted}"))
        return 2
    except KeyboardInterrupt as interrupt:
        errors.print(Text(_line(interrupt) or "interrupted"))
        return 130


def _parsed(args: Sequence[str]) -> Any:
    """The command that ``args`` name.

    Raises:
        UsageError: ``args`` name no command; the message says why, on one line.
        SystemExit: ``args`` ask for help, which was printed.
    """
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="orthokit", description=ABOUT, args=args, config=(tyro.conf.FlagCreatePairsOff,)
            )
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
    raise UsageError(_unboxed(told.getvalue())) from None


def _unboxed(text: str) -> str:
    """The text inside a box, in one sentence."""
    lines = (re.sub(r"[\u2500-\u257f]", " ", line) for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())
    _, *inside = [" ".join(line.split()) for line in lines if line.strip()] or [""]
    return printable(" ".join(inside), 500)


def _widen() -> None:
    """Lay out tables and help for :data:`NARROWEST` columns; a narrower terminal breaks their lines."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def _is_raised_here(error: TypeError) -> bool:
    """Whether a statement of orthokit raised the error, with a message for the caller. Python's own are faults of a program."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return Path(last.filename).is_relative_to(Path(ok.__file__).parent) and (last.line or "").startswith("raise ")


def _lacks_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the processor or on an accelerator."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _line(error: BaseException) -> str:
    """The message of an error, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    return printable(re.sub(r"\s*\n\s*", " ", text))
