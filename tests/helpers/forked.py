"""Processes of the command line that begin at once: forked from this one, where all is imported, instead of importing it anew.

Such a process has its own memory, environment, session, output and signals, and is killed like any other.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings

import torch

from orthokit.cli import main

EXECUTED = subprocess.Popen.__init__


def forking(process, command, *args, env=None, **options):
    """The constructor of ``subprocess.Popen``, but for our command line, which is called where Python would be executed."""
    if isinstance(command, list) and command[0] == sys.executable and "orthokit.cli" in command:
        arguments = command[command.index("orthokit.cli") + 1 :]
        options["preexec_fn"] = functools.partial(_become, arguments, dict(os.environ if env is None else env))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        EXECUTED(process, command, *args, env=env, **options)


def _become(arguments, environment):
    """Do a command in this process, just forked, and end it as Python would."""
    try:
        os.closerange(3, 4096)  # as the new program would; the parent waits for the last of these to be closed
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python does when it starts
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(1)  # the threads of a forked process are gone, and OpenMP would wait for them
        os.environ.clear()
        os.environ.update(environment)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        sys.stdout, sys.stderr = (open(fd, "w", encoding=encoding, closefd=False) for fd in (1, 2))  # noqa: SIM115
        warnings.resetwarnings()
        threading.excepthook = threading.__excepthook__
        status = _status(arguments)
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.flush()
        try:
            sys.stdout.flush()
        except OSError:  # Python says so, and gives this status
            os.write(2, b"Exception ignored in: <stdout>\n")
            status = 120
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        status = 1
    os._exit(status)


def _status(arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code or 0
