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
from orthokit.lab.comparison.tuning import RULE
from orthokit.lab.recipes.recipe import flattened
from orthokit.lab.reporting import tables as formats
from orthokit.lab.reporting.figures import Drawing, few, figures
from orthokit.plots import COLOURS


class Shown(NamedTuple):
    """A figure as the page embeds it."""

    caption: str
    alt: str
    data: str
    width: int
    height: int


def page(comparison: Comparison, *, command: str | None = None, drawn: Mapping[str, Drawing] | None = None) -> str:
    """The page.

    Args:
        comparison: what it shows.
        command: by which it can be made again.
        drawn: its figures, if they are there already.
    """
    source = files("orthokit.lab.reporting").joinpath("page.html.jinja").read_text("utf-8")
    sheet = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = figures(comparison) if drawn is None else drawn
    curves = any(name.startswith(("robustness-", "features-")) for name in drawn)
    return sheet.from_string(source).render(
        c=comparison,
        command=command,
        version=__version__,
        counts=_counts(comparison),
        colours={arm: COLOURS[place % len(COLOURS)] for place, arm in enumerate(comparison.arms)},
        verdicts=comparison.told(),
        groups=list(formats.groups(comparison)),
        figures={
            title: [_shown(d) for name, d in drawn.items() if name.startswith(f"{g}-")] for g, title in formats.GROUPS.items()
        },
        values={panel.name: ", ".join(f"{key} = {value}" for key, value in panel.values.items()) for panel in comparison.panels},
        recipe=comparison.panels[0].results[0].recipe.to_toml() if comparison.recorded else None,
        factors={arm: _factors(comparison, arm) for arm in comparison.arms} if comparison.recorded else {},
        environment=_environment(comparison.panels),
        headers=formats.primary(comparison)[0],
        columns=formats.columns(comparison),
        contrasts=list(formats.contrasts(comparison)),
        contrast=formats.CONTRAST,
        chosen=list(formats.chosen(comparison)),
        rule=RULE,
        tuning=[_shown(d) for name, d in drawn.items() if name.startswith("tuning")],
        interval=formats.interval,
        p=formats.p,
        by_seed=formats.by_seed,
        spread=formats.mean,
        joints=_joints,
        left_out=curves and len(comparison.panels) - len(few(comparison.panels)),
    )


def _counts(comparison: Comparison) -> str:
    runs = [len(results) for panel in comparison.panels for results in panel.arms.values()]
    seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    counts = {"run": sum(runs), "panel": len(comparison.panels), "arm": len(comparison.arms)}
    words = [f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items()]
    return f"{', '.join(words)}, {seeds} seed{'s' * (seeds != '1')} an arm"


def _shown(drawing: Drawing) -> Shown:
    return Shown(drawing.caption, drawing.alt, base64.b64encode(drawing.svg.encode()).decode(), *drawing.size)


def _factors(comparison: Comparison, arm: str) -> dict[str, list[str]]:
    """The arm's part of the recipe as TOML, and the panels that it is from."""
    found: dict[str, list[str]] = {}
    for panel in comparison.panels:
        for result in panel.arms.get(arm, ())[:1]:
            found.setdefault(tomli_w.dumps(_only(result.recipe.to_dict(), comparison.factor)), []).append(panel.name)
    return found


def _only(raw: Mapping[str, Any], sections: Sequence[str], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if under(prefix + key, sections):
            found[key] = value
        elif isinstance(value, Mapping) and (inner := _only(value, sections, f"{prefix}{key}.")):
            found[key] = inner
    return found


def _environment(panels: Sequence[Panel]) -> dict[str, list[str]]:
    """Of all runs, the values of each key."""
    found: dict[str, dict[str, None]] = {}
    for result in (result for panel in panels for result in panel.results):
        for key, value in flattened(result.summary.get("environment") or {}).items():
            found.setdefault(key.removeprefix("versions."), {})[plain(value)] = None
    return {key: list(values) for key, values in found.items()}


def _joints(name: str) -> Markup:
    """A name that may break where it has a joint."""
    return Markup("<wbr>").join(re.split(r"(?<=[_,])|(?=\([^)])", name))
