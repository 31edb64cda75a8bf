"""Schedules: functions from a step to a strength. Plain values: they compare, print as themselves and can be pickled.

The unit of a step is whatever you call ``Regularizer.step()`` in. Any callable ``int -> float`` is a schedule too. Classes are
written in lower case because they are used as words in a call, as ``slice`` and ``range`` are.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from orthokit.checks import check_count, check_number

__all__ = ["Schedule", "as_schedule", "chain", "check_strength", "constant", "cosine", "linear", "piecewise", "warmup"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class constant:
    """The same strength at every step.

    >>> constant(0.1)(1000)
    0.1
    """

    strength: float

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)

    def __call__(self, step: int) -> float:
        return float(self.strength)


@dataclass(frozen=True, init=False)
class piecewise:
    """Jumps: each step of ``pieces`` begins a new strength. Step 0 must be there.

    >>> drop = piecewise({0: 1e-2, 150: 0.0})
    >>> drop(149), drop(150)
    (0.01, 0.0)
    """

    pieces: tuple[tuple[int, float], ...]

    def __init__(self, pieces: Mapping[int, float]) -> None:
        if not isinstance(pieces, Mapping):
            raise TypeError(f"piecewise takes a mapping from step to strength; got {pieces!r}")
        for start, strength in pieces.items():
            check_count("the steps of piecewise", start, 0)
            check_strength("the strengths of piecewise", strength)
        if 0 not in pieces:
            raise ValueError(f"piecewise needs the strength from step 0 on; got steps {sorted(pieces)}")
        object.__setattr__(self, "pieces", tuple(sorted(pieces.items())))

    def __repr__(self) -> str:
        return f"piecewise({dict(self.pieces)})"

    def __call__(self, step: int) -> float:
        return float(next(strength for start, strength in reversed(self.pieces) if start <= max(step, 0)))


@dataclass(frozen=True)
class linear:
    """A straight line from ``start`` to ``end`` over ``steps``, then ``end``.

    >>> linear(1.0, 0.0, steps=10)(5)
    0.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_strength("start", self.start)
        check_strength("end", self.end)
        check_count("steps", self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class cosine:
    """Half a cosine from ``start`` to ``end`` over ``steps``, then ``end``.

    >>> round(cosine(1.0, 0.0, steps=10)(5), 9)
    0.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        linear(self.start, self.end, self.steps)  # the same checks

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _progress(step, self.steps))) / 2


@dataclass(frozen=True)
class warmup:
    """Multiply ``schedule`` (or a constant strength) by a line from 0 to 1 over the first ``steps``.

    >>> warmup(4, 0.1)(1), warmup(4, 0.1)(4)
    (0.025, 0.1)
    """

    steps: int
    schedule: Schedule | float

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        as_schedule(self.schedule)

    def __call__(self, step: int) -> float:
        return _progress(step, self.steps) * as_schedule(self.schedule)(step)


@dataclass(frozen=True, init=False)
class chain:
    """One schedule after another: each but the last runs for its number of steps, and each starts at its own step 0.

    >>> schedule = chain((linear(0.0, 1.0, steps=10), 10), (0.5, 5), cosine(0.5, 0.0, steps=20))
    >>> schedule(5), schedule(12), schedule(15), schedule(35)
    (0.5, 0.5, 0.5, 0.0)
    """

    parts: tuple[tuple[Schedule | float, int], ...]
    last: Schedule | float

    def __init__(self, *parts: tuple[Schedule | float, int] | Schedule | float) -> None:
        *pairs, last = parts or (None,)
        for part in pairs:
            if not (isinstance(part, tuple) and len(part) == 2):
                raise TypeError(f"chain takes pairs (schedule, steps) and a last schedule without steps; got {part!r}")
            as_schedule(part[0])
            check_count("the steps of chain", part[1])
        as_schedule(last)
        object.__setattr__(self, "parts", tuple(pairs))
        object.__setattr__(self, "last", last)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, (*self.parts, self.last)))})"

    def __call__(self, step: int) -> float:
        for schedule, steps in self.parts:
            if step < steps:
                return as_schedule(schedule)(step)
            step -= steps
        return as_schedule(self.last)(step)


STRONGEST = 1e30
"""The largest strength: its product with a penalty's value still fits into float32."""


def check_strength(name: str, value: object) -> None:
    """Raise unless ``value`` is a number in ``[0, STRONGEST]``."""
    check_number(name, value, 0, STRONGEST)


def as_schedule(strength: object) -> Schedule:
    """The schedule ``strength`` itself, or a constant one of a number."""
    if callable(strength) and not isinstance(strength, type):
        return strength
    if isinstance(strength, numbers.Real):
        return constant(cast(float, strength))
    raise TypeError(f"a strength is a number or a function from step to number; got {strength!r}")


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)
