"""A clock for the parts of a training step."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

__all__ = ["Clock"]


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
