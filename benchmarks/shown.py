"""What ``cost.py`` found, shown: a table on screen, tables in Markdown, a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from plain import ARMS
from rich import box
from rich.table import Table

from orthokit import palette
from orthokit.palette import BASELINE, GROUND, LINE, SOFT
from orthokit.plots import WIDTH, named_above, own_style, svg

WAYS = {"add_grad_": "add_grad_()", "loss": "loss, backward", "plain": "plain loop"}
EVERY = 8
LABELS = {
    "SO": "SO²",
    "SO-smaller": "SO², smaller side",
    "strict": "Disentangled",
    "pairs": "relaxed, pairs",
    "welch": "relaxed, Welch-bounded",
    "budget": "relaxed, budget",
}


def table(title: str, found: Mapping[str, Any]) -> Table:
    """Times as multiples of the floor, extra memory of ``add_grad_()`` also as one of its bounds, and the share of a step."""
    floor, step = found["floor"], found.get("step")
    heading = f"{title}: floor {1000 * floor['median']:.3g} ms ({1000 * floor['low']:.3g} to {1000 * floor['high']:.3g})"
    if step:
        heading += f", step {step['seconds']['median']:.3g} s (n = {step['seconds']['n']})"
    drawn = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", collapse_padding=True)
    headers = ["", WAYS["add_grad_"], "quartiles", WAYS["loss"], WAYS["plain"], "rounds", "MiB", "/layer", "/stack"]
    for place, header in enumerate([*headers, "share"][: 10 if step else 9]):
        drawn.add_column(header, justify="right" if place else "left", no_wrap=True)
    for name, ways in found["penalties"].items():
        ratios = [ways[way]["over_floor"] for way in WAYS]
        ours, counts = ways["add_grad_"], [ratio["n"] for ratio in ratios]
        one, two, three = (f"{ratio['median']:.3g}" for ratio in ratios)
        cells = [one, f"{ratios[0]['low']:.3g}–{ratios[0]['high']:.3g}", two, three, f"{min(counts)}–{max(counts)}"]
        cells += [f"{ours['extra_mib']:.3g}", f"{ours['extra_over_layer']:.2f}", f"{ours['extra_over_stack']:.2f}"]
        drawn.add_row(LABELS.get(name, name), *cells, *([share(found, name)] if step else []))
    return drawn


def share(found: Mapping[str, Any], name: str) -> str:
    """Of a step, in percent: at every step and, where it is known, every eighth."""
    values = found["step"]["share"][name].values() if "step" in found else ()
    return " / ".join(f"{100 * value['median']:.2g}%" for value in values) or "–"


def tables(results: Mapping[str, Any]) -> str:
    """Three tables for each device."""
    titles = {
        "Times the floor: `add_grad_()` / `ortho().backward()` / plain loop": lambda found, name: " / ".join(
            f"{found['penalties'][name][way]['over_floor']['median']:.3g}" for way in WAYS
        ),
        "Peak extra memory of `add_grad_()`, MiB (times the largest stack and three of its Grams)": lambda found, name: (
            "{extra_mib:.3g} ({extra_over_stack:.2f})".format(**found["penalties"][name]["add_grad_"])
        ),
        f"Share of a training step: at every step / at every {EVERY}th, where measured": share,
    }
    lines = []
    for kind, networks in results["networks"].items():
        machine = results["machine"][kind]
        where = machine["device"] if kind != "cpu" else f"{machine['processor']}, threads: {machine['threads']}"
        commit, _, changes = (machine["commit"] or "unknown").partition("+")
        versions = f"torch {machine['versions']['torch']}, commit {commit[:8]}{changes and f' with {changes}'}"
        lines += [f"{where}, {versions}, {results['date']}"]
        names = list(dict.fromkeys(name for found in networks.values() for name in found["penalties"]))
        for title, cell in titles.items():
            if cell is share and not any("step" in found for found in networks.values()):
                continue
            lines += ["", f"{title}:", "", f"| | {' | '.join(networks)} |", "|---" * (len(networks) + 1) + "|"]
            for name in names:
                cells = [cell(found, name) if name in found["penalties"] else "–" for found in networks.values()]
                lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
        counts = [
            ways[way]["over_floor"]["n"] for found in networks.values() for ways in found["penalties"].values() for way in WAYS
        ]
        lines += ["", f"Medians of {min(counts)} to {max(counts)} rounds.", ""]
    return "\n".join(lines).strip()


def picture(results: Mapping[str, Any], path: Path) -> None:
    """A panel for each network, a row for each penalty: ``add_grad_()`` and the plain loop, times the floor."""
    panels = [(kind, *each) for kind, networks in results["networks"].items() for each in networks.items()]
    names = [name for name in ARMS if any(name in found["penalties"] for *_, found in panels)]
    ratios = {
        (place, name, way): found["penalties"][name][way]["over_floor"]
        for place, (*_, found) in enumerate(panels)
        for name in found["penalties"]
        for way in WAYS
    }
    look = {"plain": ("plain loop in autograd", BASELINE, GROUND), "add_grad_": ("orthokit", palette.ARMS[1], palette.ARMS[1])}
    with own_style():
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(WIDTH, 1.1 + (0.7 + 0.25 * len(names)) * rows), layout="constrained")
        axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.remove()
        for place, (axis, (kind, title, _)) in enumerate(zip(axes, panels, strict=False)):
            axis.set_title(f"{title}{', GPU' * (kind != 'cpu')}")
            axis.axvline(1, color=SOFT, linewidth=1.4)
            axis.grid(axis="x")
            for y, name in enumerate(names):
                if (place, name, "plain") not in ratios:
                    continue
                ends = [ratios[place, name, way]["median"] for way in look]
                axis.plot(ends, [y, y], color=LINE, linewidth=2, zorder=1)
                for way, (_, colour, face) in look.items():
                    found = ratios[place, name, way]
                    axis.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=1.6, zorder=2)
                    axis.plot([found["median"]], [y], marker="o", color=colour, markerfacecolor=face, zorder=3)
            axis.tick_params(axis="y", length=0)
            axis.tick_params(axis="x", labelbottom=True)
            axis.spines["left"].set_visible(False)
        every = [ratio["median"] for key, ratio in ratios.items() if key[2] in look]
        axes[0].set(xscale="log", ylim=(len(names) - 0.5, -0.5), xlim=(0.8 * min(1, *every), 1.25 * max(every)))
        axes[0].set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
        span = max(every) / min(1, *every)
        axes[0].xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if span < 30 else (1, 3) if span < 100 else (1,)))
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
        title = "Time over all convolutions, as a multiple of the floor"
        dots = [axes[0].plot([], [], "o", color=c, markerfacecolor=face, label=label)[0] for label, c, face in look.values()]
        named_above(figure, title, handles=dots[::-1], ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(svg(figure, f"{title}: forward and backward, medians with quartiles"), "utf-8")
        else:
            figure.savefig(path, dpi=130)
