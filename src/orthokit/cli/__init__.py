"""The command line: ``orthokit demo | list | report | plan | train | sweep | evaluate | compare | power | study``."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro
from rich.text import Text

import orthokit as ok
from orthokit import starting
from orthokit.checks import printable
from orthokit.cli.after import after
from orthokit.cli.base import Terminal, UsageError, suggest
from orthokit.cli.evidence import Compare, Evaluate, Power, Study
from orthokit.cli.lab import Demo, Sweep, Train
from orthokit.cli.look import List, Plan, Report
from orthokit.lab import own

__all__ = ["COMMANDS", "main"]

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


def _overview() -> str:
    """All commands, a line each: the first sentence of what each says of itself."""
    lines = [f"  {name:9} {(command.__doc__ or '').partition(chr(10))[0]}" for name, command in COMMANDS.items()]
    ends = ["orthokit COMMAND --help has the options; orthokit --version the version."]
    return "\n".join(["usage: orthokit COMMAND ...", "", ABOUT, "", *lines, "", *ends])


NARROWEST = 40
"""Columns of a terminal below which tables and help are laid out as if it had so many."""


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
    """Run the command line; return the exit status.

    0 when all went well, 2 for what the caller can put right, 3 when training diverged, 4 when one of several runs failed, 130
    when interrupted by Ctrl-C or a termination signal.

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
    own.TOLD.clear()
    try:
        command = _parsed(args)
        status: int | None = command.run(console := Terminal())
        if not status and getattr(command, "format", "table") == "table":
            suggest(console, after(command))
        with contextlib.suppress(AttributeError):  # of no stdout at all
            sys.stdout.flush()
        return status or 0
    except (UsageError, ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ORTHOKIT_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            _let_go_of_stdout()
        if isinstance(error, BrokenPipeError):
            return 0
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
        UsageError: they name none; the problem is told on one line.
        SystemExit: they ask for help, which is printed.
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
    """What stands in a box of several lines, in one sentence."""
    lines = (re.sub(r"[\u2500-\u257f]", " ", line) for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())
    _, *inside = [" ".join(line.split()) for line in lines if line.strip()] or [""]
    return printable(" ".join(inside), 500)


def _widen() -> None:
    """Nothing can be laid out in a few columns; what is printed there breaks where the terminal ends."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def _let_go_of_stdout() -> None:
    """What is still to be written there goes nowhere: Python would fail at it again, when it ends."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lacks_memory(error: BaseException) -> bool:
    """Whether the processor or an accelerator could not allocate what was asked for."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    return printable(re.sub(r"\s*\n\s*", " ", text))
