"""The grouping of runs: the arm and the panel of each, the baseline, and pairs of arms by name."""

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
        ValueError: the text does not name two of the arms.
    """
    for start in (match.start() for match in re.finditer(" - ", text)):
        arm, other = text[:start].strip(), text[start + 3 :].strip()
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
    """The arm of each result, printable: a study's own name, or the values that tell the arm apart."""
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
    if (section := recipe.regularizer) is None:
        return "none"
    strength = section.strength if isinstance(section.strength, dict) else repr(section.strength)
    strength_text = ", ".join(f"{key}={value}" for key, value in strength.items()) if isinstance(strength, dict) else strength
    more = {key: getattr(section, key) for key in ("where", "scale", "decay")}
    default = {"where": "convs", "scale": None, "decay": True}
    return ", ".join(
        [repr(penalty_of(section.penalty)), strength_text, *(f"{k}={v}" for k, v in more.items() if v != default[k])]
    )


def panels_of(results: Sequence[Result], flat: Sequence[dict[str, str]], keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The panel of each result, printable, and its values of the keys that vary: a study's own name, or these."""
    varying = _varying(flat, keys)
    panels = []
    for result, part in zip(results, flat, strict=True):
        words = [_short(key, part) for key in varying] or [plain(part["network.kind"]), "on", plain(part["data.name"])]
        name = result.summary["study"].get("panel") or (", " if varying else " ").join(words)
        values = {key: json.loads(part[key]) if key in part else None for key in varying}
        panels.append(
            (printable(name), {key: printable(each) if isinstance(each, str) else each for key, each in values.items()})
        )
    return panels


BASELINES = ("none", "baseline")
"""Names of a baseline, where it cannot be told otherwise."""


def baseline_of(name: str | None, arms: Sequence[str], bare: Collection[str] = ()) -> str:
    """The arm called ``name``; by default the only one without a penalty, ``bare``, or the only one called none or baseline.

    Raises:
        ValueError: there is no such arm, or more than one.
    """
    names = ", ".join(map(repr, dict.fromkeys(arms)))
    if name is not None:
        name = printable(name)
        if name not in arms:
            raise ValueError(f"no arm {name!r} to be the baseline; there are {names}")
        return name
    bare = dict.fromkeys(bare)
    if len(bare) != 1:
        bare = dict.fromkeys(arm for arm in arms if arm.lower() in BASELINES)
    if len(bare) != 1:
        raise ValueError(f"which arm is the baseline? name it with --baseline; there are {names}")
    return next(iter(bare))
