"""How runs are grouped: the arm and the panel of each, the baseline, and pairs of arms by name."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from orthokit.checks import printable
from orthokit.lab.comparison.comparability import plain, under
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.results import Result
from orthokit.spec import penalty_of

__all__ = ["arms_of", "baseline_of", "pair_of", "panels_of", "sortable"]


def pair_of(text: str, arms: Collection[str]) -> tuple[str, str]:
    """The two arms of ``"<arm> - <arm>"``.

    Raises:
        ValueError: the text names no two of the arms.
    """
    for place in (found.start() for found in re.finditer(" - ", text)):
        arm, other = text[:place].strip(), text[place + 3 :].strip()
        if arm in arms and other in arms and arm != other:
            return arm, other
    raise ValueError(f"a contrast must be 'ARM - OTHER ARM'; got {text!r}; the arms are {', '.join(map(repr, arms))}")


def sortable(value: Any) -> tuple[int, float, str]:
    """A key that puts numbers before words."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _varying(parts: Sequence[dict[str, str]], keys: Sequence[str]) -> list[str]:
    return [key for key in dict.fromkeys(keys) if len({part.get(key) for part in parts}) > 1]


def _short(key: str, part: dict[str, str]) -> str:
    return f"{key.split('.', 1)[-1]}={plain(part.get(key))}"


def arms_of(results: Sequence[Result], flat: Sequence[dict[str, str]], factor: Sequence[str]) -> list[str]:
    """The arm of each result, printable: a study's own name, or what tells it apart."""
    penalties = any(key.split(".")[0] == "regularizer" for key in factor)
    keys = _varying(flat, [key for each in flat for key in each if under(key, factor) and not under(key, ["regularizer"])])
    return [
        printable(
            result.summary["study"].get("arm")
            or ", ".join([*([_penalty(result.recipe)] if penalties else []), *(_short(key, part) for key in keys)])
        )
        for result, part in zip(results, flat, strict=True)
    ]


def _penalty(recipe: Recipe) -> str:
    if (said := recipe.regularizer) is None:
        return "none"
    strength = said.strength if isinstance(said.strength, dict) else repr(said.strength)
    shown = ", ".join(f"{key}={value}" for key, value in strength.items()) if isinstance(strength, dict) else strength
    more = {key: getattr(said, key) for key in ("where", "scale", "decay")}
    default = {"where": "convs", "scale": None, "decay": True}
    return ", ".join([repr(penalty_of(said.penalty)), shown, *(f"{k}={v}" for k, v in more.items() if v != default[k])])


def panels_of(results: Sequence[Result], flat: Sequence[dict[str, str]], keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The panel of each result, printable, and its values of the keys that vary: a study's own name, or these."""
    varying = _varying(flat, keys)
    found = []
    for result, part in zip(results, flat, strict=True):
        words = [_short(key, part) for key in varying] or [plain(part["network.kind"]), "on", plain(part["data.name"])]
        name = result.summary["study"].get("panel") or (", " if varying else " ").join(words)
        values = {key: json.loads(part[key]) if key in part else None for key in varying}
        found.append((printable(name), {key: printable(each) if isinstance(each, str) else each for key, each in values.items()}))
    return found


BASELINES = ("none", "baseline")
"""What a baseline is called, where that cannot be told otherwise."""


def baseline_of(wanted: str | None, arms: Sequence[str], bare: Collection[str] = ()) -> str:
    """The arm that is asked for, or the only one of those without a penalty, ``bare``, or the only one called none or baseline.

    Raises:
        ValueError: there is none, or more than one.
    """
    known = ", ".join(map(repr, dict.fromkeys(arms)))
    if wanted is not None:
        wanted = printable(wanted)
        if wanted not in arms:
            raise ValueError(f"no arm {wanted!r} to be the baseline; there are {known}")
        return wanted
    bare = dict.fromkeys(bare)
    if len(bare) != 1:
        bare = dict.fromkeys(arm for arm in arms if arm.lower() in BASELINES)
    if len(bare) != 1:
        raise ValueError(f"which arm is the baseline? name it with --baseline; there are {known}")
    return next(iter(bare))
