"""Argument checks, one-time warnings, short reprs and printable text, shared by every floor above."""

import dataclasses
import difflib
import functools
import math
import numbers
import shlex
import sys
import unicodedata
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

__all__ = [
    "check_choice",
    "check_count",
    "check_flag",
    "check_number",
    "check_options",
    "did_you_mean",
    "install",
    "printable",
    "short_repr",
    "warn_once",
]


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless ``value`` is a finite real number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        real = float(value)
    except OverflowError:  # an integer of more than 308 digits
        real = math.inf
    if not (low <= real <= high and math.isfinite(real)) or (open_low and real == low):
        interval = f"{'(' if open_low or low == -math.inf else '['}{low:g}, {f'{high:g}]' if high < math.inf else 'inf)'}"
        raise ValueError(f"{name} must be a finite number in {interval}; got {value!r:.200}")


def check_count(name: str, value: object, low: int = 1, high: float = math.inf, *, most: float = math.inf) -> None:
    """Raise unless ``value`` is an integer in ``low..high``, and at most ``most``: a larger one can only be a mistake."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if not low <= int(value) <= high:
        interval = f"at least {low}" if high == math.inf else f"from {low} to {high:g}"
        raise ValueError(f"{name} must be an integer, {interval}; got {_digits(int(value))}")
    if int(value) > most:
        raise ValueError(f"{name} must be an integer, at most {most:,g}; got {_digits(int(value))}")


def _digits(value: int) -> str:
    """An integer as text, however long: Python refuses to print more than 4,300 digits."""
    return str(value) if abs(value) < 10**40 else f"an integer of about {int(value.bit_length() * math.log10(2)):,} digits"


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r:.200}")


def check_options(self: Any) -> None:
    """Raise ``TypeError``, or ``ValueError`` for an unknown choice, unless every option of a dataclass fits its annotation.

    Annotations may be ``bool``, ``int``, ``float``, a ``Literal``, a tuple of these, a callable, a class, None, or a union.
    """
    for option in dataclasses.fields(self):
        value = getattr(self, option.name)
        if not _fits(value, option.type):
            error = ValueError if get_origin(option.type) is Literal else TypeError
            raise error(f"{option.name} must be {_in_words(option.type)}; got {value!r:.200}")


def _fits(value: object, annotation: Any) -> bool:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is Callable:
        return callable(value) and not isinstance(value, type)
    if annotation in (int, float):  # True is an integer to Python
        return isinstance(value, numbers.Integral if annotation is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _in_words(annotation: Any) -> str:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if kind is tuple:
        return f"a tuple ({', '.join(map(_in_words, parts))})"
    words = {bool: "True or False", int: "an integer", float: "a number", type(None): "None", Callable: "a function"}
    return words.get(kind or annotation) or f"{annotation.__name__}()"


def install(extra: str, package: Path = Path(__file__).parent) -> str:
    """A command that installs what an extra of orthokit needs, whether ``package`` lies in a clone or was installed.

    The name alone is enough where orthokit is installed: pip keeps it and adds what the extra lists.

    >>> install("lab", Path("/usr/lib/python3/site-packages/orthokit"))
    "pip install 'orthokit[lab]'"
    """
    clone = package.parents[1]
    wanted = f"-e {shlex.quote(f'{clone}[{extra}]')}" if (clone / "pyproject.toml").is_file() else f"'orthokit[{extra}]'"
    return f"pip install {wanted}"


def did_you_mean(name: str, names: Collection[str]) -> str:
    """The end of an error: ``; did you mean 'steps'?``, or all ``names`` where none is near."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(repr, names)) or 'none'}"


@functools.cache
def warn_once(message: str) -> None:
    """Warn with ``message`` the first time it occurs in this process, at the caller's line outside this package."""
    level = 2
    while sys._getframe(level - 1).f_globals.get("__name__", "").startswith("orthokit.") and sys._getframe(level - 1).f_back:
        level += 1
    warnings.warn(printable(message), stacklevel=level)


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


def printable(text: object, most: int = 2000, *, lines: bool = False) -> str:
    r"""``text`` as one line that is safe to show: characters that a terminal, a page or a picture would act on are escaped.

    These are control characters (C0, C1), those that change the direction of writing or take no room, lone surrogates, and
    code points that are not assigned. Letters of every language and spaces stay.

    Args:
        text: a string, or what ``str`` makes one of.
        most: longer text loses its middle.
        lines: keep the ends of lines, and any length.

    >>> print(printable("red \x1b[31m, \u202egnp.exe, café"))
    red \x1b[31m, \u202egnp.exe, café
    """
    whole = str(text)
    if not lines and len(whole) > most:
        whole = f"{whole[: most // 2]} … {whole[len(whole) - most // 2 :]}"
    if whole.isprintable():
        return whole
    line_ends = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in line_ends or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in whole)
