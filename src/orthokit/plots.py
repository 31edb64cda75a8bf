"""Pictures of orthogonality: how filters point, and what the kernels do to lengths. Needs matplotlib (extra ``[lab]``)."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orthokit.checkpoint.statedict import Layers
from orthokit.checks import install, printable
from orthokit.diagnostics import singular_values
from orthokit.gram import cosines, directions
from orthokit.kernel import Kernel
from orthokit.layers import Where, layers, select
from orthokit.palette import ARMS, COLOURS, DARK, INK, LINE, SOFT, WORDS
from orthokit.relax import welch_bound
from orthokit.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "SMALL",
    "STYLE",
    "WIDTH",
    "detail",
    "details",
    "draw",
    "lay_out",
    "named_above",
    "new_figure",
    "overview",
    "own_style",
    "see_through",
    "side_by_side",
    "svg",
]

WIDTH = 570 / 72
"""Inches, of a figure as wide as a page: 760 pixels."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orthokit",
    "text.parse_math": False,
    "text.color": INK,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 13.5,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2,
    "lines.markersize": 7,
}
"""Words of 18 pixels in a figure of 760: 9 on a telephone, where it is 380 wide."""
MARKERS = "osD^vPX"
SMALL = 9
"""Points of words in figures of half that width, of which several stand side by side where there is room."""
BLOCKS = 256
"""Rows and columns of a heat map; of more filters each block shows its largest ``|c|``."""
LARGEST = 2048
"""Filters drawn: of a layer with more, only the cosines among its first ``LARGEST`` are."""


@contextlib.contextmanager
def own_style(size: float = STYLE["font.size"]) -> Iterator[None]:
    """The look of all figures, and nothing of a matplotlibrc in the working directory, which can ask for LaTeX, a program.

    Args:
        size: points of words.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to get it.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"pictures need matplotlib: {install('lab')}", name="matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.size": size})
        yield


def svg(figure: "Figure", title: str, description: str = "") -> str:
    """A figure as SVG: on the page's ground, in light ink where that is dark. Drawn again it has the same bytes.

    Args:
        figure: drawn in :func:`own_style`.
        title: what it shows.
        description: its numbers, for those who do not see it.
    """
    file = io.StringIO()
    lay_out(figure)
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", _shorter, file.getvalue()))
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    words = [f"<{tag}>{escape(printable(words))}</{tag}>\n" for tag, words in (("title", title), ("desc", description)) if words]
    rules = [
        f'[style*="{key}: {colour}"]{{{key}:{dark}!important}}\n'
        for colour, dark in DARK.items()
        for key in ("fill", "stroke")
        if f"{key}: {colour}" in text
    ]
    family = ", ".join(f"'{name}'" for name in STYLE["font.sans-serif"])
    dark = f"@media (prefers-color-scheme: dark){{\n{''.join(rules)}}}"
    style = f"<style>\ntext{{font-family: {family}, sans-serif}}\n{dark}\n</style>\n"
    return re.sub(r"(<svg[^>]*>\n)", lambda tag: tag[0] + "".join(words) + style, text, count=1)


def lay_out(figure: "Figure") -> None:
    """Give the axes of a figure their places, once: drawing the figure later leaves them there.

    Args:
        figure: drawn in :func:`own_style`.
    """
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _shorter(tag: re.Match[str]) -> str:
    """A tag, whose coordinates need no more than a hundredth of a point, without its font, said once, and turns by nothing."""
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])
    return re.sub(r"font-family: [^;]*; | transform=\"rotate\(-0 [^)]*\)\"", "", text)


@torch.no_grad()
@own_style()
def draw(
    models: Mapping[str, Sequence[nn.Module | Mapping[str, Any] | Layers]],
    path: str | PathLike[str],
    *,
    title: str = "",
    where: Where = layers,
) -> None:
    """Save a picture that compares arms: cosines and singular values, of wide and of tall layers.

    Singular values are relative to those of the ideal kernel: 1 of orthonormal rows, ``sqrt(o/n)`` of a tight frame.

    Args:
        models: for each arm the models or state dicts it has trained, pooled.
        path: the file to write; its suffix decides the format.
        title: above the picture.
        where: which layers count.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message gives the install command.
        ValueError: ``where`` selects nothing, or no layer that is free of NaN and infinite weights (those are left out).
    """
    kernels = {
        arm: [k for model in trained for k in (layer.kernel for layer in select(model, where)) if k.weight.isfinite().all()]
        for arm, trained in models.items()
    }
    if not any(kernels.values()):
        raise ValueError("nothing to draw: every selected layer holds NaN or infinite weights")
    tall = {arm: [k for k in ks if k.o > k.n] for arm, ks in kernels.items()}
    wide = {arm: [k for k in ks if k.o <= k.n] for arm, ks in kernels.items()}
    kinds = {name: kind for name, kind in {"wide layers": wide, "tall layers": tall}.items() if any(kind.values())}
    figure = new_figure(WIDTH, 1.4 + 3.4 * len(kinds))
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), (name, kind) in zip(axes, kinds.items(), strict=True):
        for place, arm in enumerate(kind):
            # Arms often coincide: each later line is thinner, so that the earlier ones show beneath it.
            width = 1.6 + 4 * (1 - (place + 1) / len(kind))
            line = {"color": COLOURS[place % len(COLOURS)], "linewidth": width, "label": _middle(arm, 24)}
            if angles := [_absolute_cosines(k) for k in kind[arm] if k.o > 1]:
                values = np.concatenate(angles)
                counts, edges = np.histogram(values, np.linspace(0, 1, 51))
                left.stairs(100 * counts / len(values), edges, **line)
            if kind[arm]:
                spectrum = np.sort(np.concatenate([_relative_singular_values(k) for k in kind[arm]]))[::-1]
                right.plot(np.linspace(0, 100, len(spectrum)), spectrum, **line)
        if kind is tall:
            for bound in sorted({welch_bound(k.o, k.n) for ks in tall.values() for k in ks}):
                left.axvline(bound, color=SOFT, linestyle=":", linewidth=1.2)
        left.set(title=f"{name}:\n% of pairs of filters", xlabel="|cosine|" + ", dotted: Welch bounds" * (kind is tall))
        _percent_axis(left)
        right.axhline(1, color=SOFT, linestyle=":", linewidth=1.2)
        right.set(title=f"{name}: singular\nvalues over the ideal", xlabel="% of them, largest first", xlim=(0, 100))
        right.set_ylim(bottom=0)
    handles, names = next(axis for axis in axes[:, 1] if axis.lines).get_legend_handles_labels()
    named_above(figure, _middle(title, 60), handles=handles, labels=names, ncols=3)
    figure.savefig(path, dpi=130)


@own_style()
def overview(rows: Sequence[Row]) -> "Figure":
    """Every layer of a report as a bar: mean ``|c|`` relative to random filters, in the colour of its word, in model order."""
    measured = [row for row in rows if row["x_random"] is not None]
    figure, axis = _by_layer([row["layer"] for row in measured])
    values = [row["x_random"] for row in measured]
    axis.barh(range(len(measured)), values, color=[WORDS.get(row["word"], LINE) for row in measured], height=0.75)
    words = [word for word in WORDS if any(row["word"] == word for row in measured)]
    for word in words:
        axis.bar(0, 0, color=WORDS[word], label=word)
    axis.set_xlim(left=0)
    if words:
        named_above(figure, ncols=3)
    return figure


@own_style()
def side_by_side(rows: Mapping[str, Sequence[Row]]) -> "Figure":
    """Several reports in one picture: a dot for each network at each layer's mean ``|c|`` relative to random filters."""
    layers = list(dict.fromkeys(row["layer"] for some in rows.values() for row in some if row["x_random"] is not None))
    figure, axis = _by_layer(layers)
    known = [{row["layer"]: row["x_random"] for row in some} for some in rows.values()]
    for place, layer in enumerate(layers):
        there = [each[layer] for each in known if each.get(layer) is not None]
        axis.hlines(place, min(there), max(there), color=SOFT, linewidth=1.2)
    for place, (name, values) in enumerate(zip(rows, known, strict=True)):
        dots = {row: values[layer] for row, layer in enumerate(layers) if values.get(layer) is not None}
        look: dict[str, Any] = {
            "color": ARMS[place % len(ARMS)],
            "marker": "osD^vPX"[place % 7],
            "s": 55,
            "zorder": 3,
            "clip_on": False,
        }
        axis.scatter(list(dots.values()), list(dots), label=_middle(name, 24), **look)
    axis.set_xlim(left=0)
    named_above(figure, ncols=2)
    return figure


def _by_layer(names: Sequence[str]) -> "tuple[Figure, Axes]":
    """A row for each layer, and a line where random filters are."""
    figure = new_figure(WIDTH, max(2.2, 1.3 + 0.245 * len(names)))
    axis = figure.subplots()
    axis.set_yticks(range(len(names)), [_middle(name, 28) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.axvline(1, color=SOFT, linestyle=":", linewidth=1.5)
    figure.supxlabel("mean |cosine| over that of random filters (dotted)", fontsize="medium")
    return figure, axis


@own_style(SMALL)
def detail(kernel: Kernel) -> "Figure":
    """One layer: a heat map of ``|c|``, the cosines against random ones, singular values, and filters that read an image."""
    drawers = details(kernel)
    figure = new_figure(4.2 * len(drawers), 3.4)
    for axis, (name, draw_in) in zip(np.atleast_1d(figure.subplots(1, len(drawers))), drawers.items(), strict=True):
        draw_in(axis)
        axis.set_title(name)
    return figure


def details(kernel: Kernel) -> "dict[str, Any]":
    """The pictures of :func:`detail`, by title: functions that draw in an axis. Of the first group of a layer."""
    matrix = kernel.matrix.detach().cpu().double().flatten(0, -3)
    first = matrix[0]
    drawers: dict[str, Any] = {}
    if len(first) > 1:
        drawers["|cosine| of each pair of filters"] = lambda axis: _heat(axis, first)
        drawers["cosines against random filters"] = lambda axis: _histogram(axis, kernel)
    drawers["singular values, largest first"] = lambda axis: _spectrum(axis, matrix)
    channels = kernel.weight.shape[-3] if len(kernel.stride) == 2 else 0
    if channels in (1, 3) and kernel.weight[0].shape[-1] > 1 and not kernel.transposed:
        drawers["filters"] = lambda axis: _filters(axis, kernel.weight.detach().cpu().double().flatten(0, -5)[0])
    return drawers


def see_through() -> Any:
    """The colours of a heat map from 0, where the page shows through, to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("see-through", [(0.16, 0.47, 0.95, 0.0), (0.16, 0.47, 0.95, 1.0)])


def _heat(axis: "Axes", matrix: torch.Tensor) -> None:
    unit = directions(matrix[:4096])
    values = (unit @ unit.mT).abs_()
    side = min(len(values), BLOCKS)
    pooled = torch.nn.functional.adaptive_max_pool2d(values.fill_diagonal_(0)[None, None], side)[0, 0].numpy()
    look = {"cmap": see_through(), "interpolation": "nearest", "extent": (0, len(values), len(values), 0)}
    bar = axis.figure.colorbar(axis.imshow(pooled, vmin=0, vmax=1, **look), ax=axis, fraction=0.046)
    bar.outline.set_edgecolor(SOFT)
    axis.spines[:].set_visible(True)
    axis.set(xlabel="filter", ylabel="filter")
    axis.locator_params(integer=True)


def _histogram(axis: "Axes", kernel: Kernel) -> None:
    values = _absolute_cosines(kernel)
    counts, edges = np.histogram(values, np.linspace(0, 1, 51))
    axis.stairs(100 * counts / len(values), edges, color=ARMS[1], fill=True, alpha=0.75, label="this layer")
    axis.stairs(100 * _random_share(edges, kernel.n), edges, color=ARMS[0], linewidth=1.6, label="random filters")
    if (bound := welch_bound(kernel.o, kernel.n)) > 0:
        axis.axvline(bound, color=SOFT, linestyle=":", linewidth=1.4, label="Welch bound: least possible max")
    axis.set(xlabel="|cosine|", ylabel="% of pairs")
    _percent_axis(axis)
    axis.legend()


def _percent_axis(axis: "Axes") -> None:
    """Cosines across; up, percent with room for what is rare."""
    axis.set(xlim=(0, 1), yscale="symlog")
    axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axis.set_ylim(0, 130)


def _random_share(edges: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Share of ``|c|`` of random directions in each bin: density proportional to ``(1 - c^2)^((n - 3) / 2)``."""
    if n == 1:
        return np.array([0.0] * (len(edges) - 2) + [1.0])
    grid = np.linspace(0, math.pi / 2, 20_001)  # with c = sin(angle) the density is cos(angle)^(n - 2)
    density = np.cos(grid).clip(0) ** (n - 2)
    cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    below = np.interp(np.arcsin(edges.clip(0, 1)), grid, cumulated / cumulated[-1])
    return np.asarray(np.diff(below), dtype=np.float64)


def _spectrum(axis: "Axes", matrix: torch.Tensor) -> None:
    sigma = np.sort(singular_values(matrix).numpy().ravel())[::-1]
    places = np.linspace(0, 100, len(sigma)) if len(sigma) > 1 else [50]
    axis.plot(places, sigma, color=ARMS[1], marker="." if len(sigma) < 9 else "")
    axis.axhline(sigma.mean(), color=SOFT, linestyle=":", linewidth=1.2, label="all equal: orthogonal")
    axis.set(xlabel="% of singular values", ylabel="σ", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    axis.legend()


def _filters(axis: "Axes", weight: torch.Tensor) -> None:
    """The first filters as images, each from its least to its largest weight."""
    shown = weight[:64]
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    scaled = ((shown - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1)
    columns = math.ceil(len(shown) ** 0.5)
    height, width = scaled.shape[1] + 1, scaled.shape[2] + 1
    canvas = np.ones((height * math.ceil(len(shown) / columns), width * columns, scaled.shape[3]))
    for place, image in enumerate(scaled.numpy()):
        y, x = place // columns * height, place % columns * width
        canvas[y : y + height - 1, x : x + width - 1] = image
    axis.imshow(canvas.squeeze(), cmap="gray", interpolation="nearest")
    axis.set_axis_off()


def _middle(name: str, most: int = 36) -> str:
    """A name, shortened in the middle."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of matplotlib, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def named_above(figure: "Figure", title: str = "", **legend: Any) -> None:
    """A legend above a figure, below a title."""
    bold = {"weight": "bold"}
    figure.legend(loc="outside upper left", alignment="left", title=title or None, title_fontproperties=bold, **legend)


def _absolute_cosines(kernel: Kernel) -> NDArray[np.float64]:
    matrix = kernel.matrix[..., :LARGEST, :].detach().cpu().double()
    i, j = np.tril_indices(matrix.shape[-2], -1)
    absolute: NDArray[np.float64] = cosines(matrix).abs().numpy()[..., i, j].ravel()
    return absolute


def _relative_singular_values(kernel: Kernel) -> NDArray[np.float64]:
    sigma = singular_values(kernel.matrix.detach().cpu().double()) / max(1.0, kernel.o / kernel.n) ** 0.5
    values: NDArray[np.float64] = sigma.numpy().ravel()
    return values
