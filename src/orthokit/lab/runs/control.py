"""Requests that stop a run: Ctrl-C, a termination signal, the death of the process that started the run."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from orthokit.lab.runs.run import SERVES

__all__ = ["Stop", "follow"]

LOOK_EVERY = 1.0
"""Seconds between two looks of a worker at whether its parent still lives."""


class Stop:
    """A context that turns Ctrl-C or a termination signal into a request; a second one raises ``KeyboardInterrupt``.

    A run started by the launcher (:mod:`orthokit.lab.runs.launch`) also stops when the launcher dies.
    """

    def __init__(self) -> None:
        self.parent = os.environ.get(SERVES)
        self._is_requested = False
        self._before: dict[int, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether to save and stop."""
        return self._is_requested or (self.parent is not None and self.parent != str(os.getppid()))

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True


def follow(parent: int) -> None:
    """Make this process, a worker that ``parent`` started, end when ``parent`` ends, in whatever way.

    A Ctrl-C of the terminal reaches every process of a command; a worker leaves it to ``parent``, which ends the worker.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
