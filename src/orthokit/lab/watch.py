"""What looks at a run while it goes: who is told, who may stop it, and the clock."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from orthokit.lab.record import SERVES, Run

LOOK_EVERY = 1.0
"""Seconds between two looks of a worker at whether its parent still lives."""


class Stop:
    """Turns Ctrl-C or a termination signal into a request; a second one is an order.

    A process that was started for one of many runs (:mod:`orthokit.lab.runner`) is also asked by the death of the one it serves.
    """

    def __init__(self) -> None:
        self.parent = os.environ.get(SERVES)
        self._asked = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to save and stop."""
        return self._asked or (self.parent is not None and self.parent != str(os.getppid()))

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


def follow(parent: int) -> None:
    """Make this process, a worker that ``parent`` started, end when ``parent`` has ended in whatever way.

    A Ctrl-C of the terminal reaches every process of a command; a worker leaves it to ``parent``, which ends the worker.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


class Watch:
    """What is told of a run as it goes; this one listens to nothing."""

    def step(self, run: Run, epochs: float, loss: float, speed: float) -> None:
        """``epochs`` are done, with this loss at this speed (images per second)."""

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """An epoch is done: its line of ``metrics.jsonl``."""

    def say(self, text: str) -> None:
        """Something a person should know."""


class Clock:
    """Seconds by part of the work."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.on = True
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
