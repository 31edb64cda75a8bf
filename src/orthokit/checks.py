"""Argument checks, one-time warnings and short reprs, shared by every floor above."""

import dataclasses
import difflib
import functools
import math
import numbers
import sys
import warnings
from collections.abc import Collection
from typing import Any, cast


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless ``value`` is a finite real number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    real = cast(float, value)
    if not (low <= real <= high and real < math.inf) or (open_low and real == low):
        interval = f"{'(' if open_low else '['}{low:g}, {f'{high:g}]' if high < math.inf else 'inf)'}"
        raise ValueError(f"{name} must be a finite number in {interval}; got {value!r}")


def check_count(name: str, value: object, low: int = 1, high: float = math.inf) -> None:
    """Raise unless ``value`` is an integer in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if not low <= int(value) <= high:
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high:g}"
        raise ValueError(f"{name} must be an integer, {wanted}; got {value!r}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """``; did you mean 'steps'?``, or all of ``known`` where none is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(repr, known)) or 'none'}"


@functools.cache
def warn_once(message: str) -> None:
    """Warn with ``message`` the first time it occurs in this process, at the caller's line outside this package."""
    level = 2
    while sys._getframe(level - 1).f_globals.get("__name__", "").startswith("orthokit.") and sys._getframe(level - 1).f_back:
        level += 1
    warnings.warn(message, stacklevel=level)


def short_repr(self: Any) -> str:
    """A dataclass as the call that makes it, with only the options that differ from their defaults.

    Keyword-only options are named; so is every option after one that was left out.
    """
    arguments, positional = [], True
    for option in dataclasses.fields(self):
        value = getattr(self, option.name)
        positional &= not option.kw_only
        if value == option.default and type(value) is type(option.default):
            positional = False
        else:
            arguments.append(repr(value) if positional else f"{option.name}={value!r}")
    return f"{type(self).__name__}({', '.join(arguments)})"
