"""The command line: ``orthokit list | report | plan | demo | train | sweep | evaluate | compare | power | study``."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

import orthokit as ok
from orthokit.cli.base import UsageError
from orthokit.cli.evidence import Compare, Evaluate, Power, Study
from orthokit.cli.lab import Demo, Sweep, Train
from orthokit.cli.look import List, Plan, Report
from orthokit.lab import own

COMMANDS: dict[str, Callable[..., Any]] = {
    "list": List,
    "report": Report,
    "plan": Plan,
    "demo": Demo,
    "train": Train,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "compare": Compare,
    "power": Power,
    "study": Study,
}


class _Console(Console):
    """Treats a closed pipe (``| head``) as the reader having seen enough."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 when all went well, 2 for what the caller can put right, 3 when training diverged, 4 when one of several runs failed, 130
    when interrupted.

    With ``ORTHOKIT_DEBUG=1`` in the environment errors keep their traceback.
    """
    args = sys.argv[1:] if args is None else list(args)
    if args == ["--version"]:
        print(f"orthokit {ok.__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Greek letters on a terminal without them
    errors = Console(stderr=True, soft_wrap=True)
    own.TOLD.clear()
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="orthokit",
            description="Orthogonal filters for deep networks: measure them, plan for them, see what they do.",
            args=args or ["--help"],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        status: int | None = command.run(_Console())
        with contextlib.suppress(AttributeError):  # of no stdout at all
            sys.stdout.flush()
        return status or 0
    except (UsageError, ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ORTHOKIT_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        errors.print(f"[bold red]orthokit:[/] {escape(str(error))}", highlight=False)
        return getattr(error, "status", 2)
    except KeyboardInterrupt as interrupt:
        errors.print(escape(str(interrupt) or "interrupted"), highlight=False)
        return 130
