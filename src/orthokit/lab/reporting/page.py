"""A comparison as one HTML file that opens without network and runs no script."""

import base64
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import tomli_w
from markupsafe import Markup

from orthokit import __version__
from orthokit.lab.comparison.comparability import Panel, plain, under
from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.recipes.recipe import flatten
from orthokit.lab.reporting import words
from orthokit.lab.reporting.drawing import Drawing, arm_colours
from orthokit.lab.reporting.figures import few, figures
from orthokit.lab.reporting.tables import sections, tables, verdict_of
from orthokit.tables import Table

__all__ = ["Part", "Shown", "page"]

CURVES = ("robustness", "features")
"""Groups whose figures are drawn of a few panels, where there are many."""


class Shown(NamedTuple):
    """A figure as the page embeds it."""

    caption: str
    alt: str
    data: str
    width: int
    height: int


class Part(NamedTuple):
    """A chapter of the page: a table, and the figures that belong to it."""

    key: str
    title: str
    table: Table | None
    figures: list[Shown]
    few: int
    """Number of panels whose curves are drawn; 0 for all."""


def page(
    comparison: Comparison,
    *,
    command: str | None = None,
    drawn: Mapping[str, Drawing] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The page of a comparison: question, answer, contents, tables, figures, and how it was made.

    Args:
        comparison: what it shows.
        command: the command that makes it again.
        drawn: its figures, if they are there already.
        links: name and address of what belongs to it.
    """
    source = files("orthokit.lab.reporting").joinpath("page.html.jinja").read_text("utf-8")
    sheet = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    labels = words.labels(comparison)
    return sheet.from_string(source).render(
        c=comparison,
        answer=words.answer(comparison),
        baseline=labels[comparison.baseline],
        labels=labels,
        command=command,
        links=links or {},
        version=__version__,
        counts=words.counts(comparison),
        colours=arm_colours(comparison),
        parts=_parts(comparison, figures(comparison) if drawn is None else drawn),
        anchors={panel.name: f"panel-{number}" for number, panel in enumerate(comparison.panels)},
        power=words.power(comparison),
        explanation=words.explanation(comparison),
        notes=words.notes(comparison),
        values={panel.name: ", ".join(f"{key} = {value}" for key, value in panel.values.items()) for panel in comparison.panels},
        recipe=comparison.panels[0].results[0].recipe.to_toml() if comparison.recorded else None,
        factors={arm: _factors(comparison, arm) for arm in comparison.arms} if comparison.recorded else {},
        environment=_environment(comparison.panels),
        sections=sections,
        verdict_of=verdict_of,
        joints=_joints,
    )


def _parts(comparison: Comparison, drawn: Mapping[str, Drawing]) -> list[Part]:
    """The chapters: the first figure of results stands beside the verdicts, every other one with the table of its group."""
    groups: dict[str, list[Shown]] = {}
    for name, drawing in drawn.items():
        groups.setdefault(name.partition("-")[0], []).append(_shown(drawing))
    groups["strengths"] = groups.pop("tuning", [])
    groups["primary"] = groups.pop("result", [])
    made: dict[str, Table | None] = dict(tables(comparison))
    if len(comparison.panels) == 1:
        made.pop("verdicts", None)  # the primary table of one panel shows the same
    elif "verdicts" in made:
        groups["verdicts"], groups["primary"] = groups["primary"][:1], groups["primary"][1:]
    made |= {key: None for key, shown in groups.items() if shown and key not in made}
    some = len(few(comparison.panels))
    part_of = some if some < len(comparison.panels) else 0
    return [
        Part(key, table.title if table else key, table, shown := groups.get(key, []), part_of if key in CURVES and shown else 0)
        for key, table in made.items()
    ]


def _shown(drawing: Drawing) -> Shown:
    return Shown(drawing.caption, drawing.alt, base64.b64encode(drawing.svg.encode()).decode(), *drawing.size)


def _factors(comparison: Comparison, arm: str) -> dict[str, list[str]]:
    """The arm's part of the recipe as TOML, and the panels that it is from."""
    texts: dict[str, list[str]] = {}
    for panel in comparison.panels:
        for result in panel.arms.get(arm, ())[:1]:
            texts.setdefault(tomli_w.dumps(_only(result.recipe.to_dict(), comparison.factor)), []).append(panel.name)
    return texts


def _only(raw: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    part: dict[str, Any] = {}
    for key, value in raw.items():
        if under(prefix + key, keys):
            part[key] = value
        elif isinstance(value, Mapping) and (inner := _only(value, keys, f"{prefix}{key}.")):
            part[key] = inner
    return part


def _environment(panels: Sequence[Panel]) -> dict[str, list[str]]:
    """Values of each key over all runs."""
    every: dict[str, dict[str, None]] = {}
    for result in (result for panel in panels for result in panel.results):
        for key, value in flatten(result.summary.get("environment") or {}).items():
            every.setdefault(key.removeprefix("versions."), {})[plain(value)] = None
    return {key: list(values) for key, values in every.items()}


def _joints(name: str) -> Markup:
    """A name that may break where it has a joint."""
    return Markup("<wbr>").join(re.split(r"(?<=[_,])|(?=\([^)])", name))
