"""A Ctrl-C while the command line is still importing ends it without a traceback.

Importing PyTorch takes seconds, and nothing of ``orthokit.cli`` runs before that is done. This module is imported first. It does
nothing in any other program, and imports little itself.
"""

import os
import signal
import sys

__all__ = ["finish"]


def _is_command() -> bool:
    """Whether this process was started as ``orthokit`` or ``python -m orthokit.cli``."""
    name = next(iter(getattr(sys, "argv", [])), "")
    program = name.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    return program == "orthokit" or (name == "-m" and "orthokit.cli" in sys.orig_argv)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def finish() -> None:
    """Let Ctrl-C raise ``KeyboardInterrupt`` again: from here on the command line catches it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Whoever has set a handler of their own, or starts us with the signal ignored, keeps that.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
