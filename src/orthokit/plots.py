"""Pictures of orthogonality: how filters point, and what the kernels do to lengths. Needs matplotlib (extra ``[lab]``)."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orthokit.checkpoint.statedict import Layers
from orthokit.checks import install, printable
from orthokit.diagnostics import singular_values
from orthokit.gram import cosines, directions, welch_bound
from orthokit.kernel import Kernel
from orthokit.layers import Where, layers, select
from orthokit.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "detail", "details", "draw", "new_figure", "overview", "own_style", "side_by_side"]

COLOURS = ("#8a8a8a", "#d1711f", "#2166ac", "#7b3294", "#1a9850", "#b2182b", "#01665e", "#a6611a")
WORDS = {
    "copies": "#b2182b",
    "correlated": "#d1711f",
    "like random": "#8a8a8a",
    "near-orthogonal": "#4393c3",
    "orthogonal": "#1a9850",
    None: "#bbbbbb",
}
"""Colour of each word of a report; readable on white and on black."""
INK = "#808080"
"""The colour of text and axes that stand on white or on black."""
BLOCKS = 256
"""Rows and columns of a heat map; of more filters each block shows its largest ``|c|``."""
LARGEST = 2048
"""Filters drawn: of a layer with more, only the cosines among its first ``LARGEST`` are."""


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Matplotlib's defaults: a matplotlibrc in the working directory can ask for LaTeX, which is a program.

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
        yield


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
    named = {"Wide layers (filters ≤ weights per filter)": wide, "Tall layers (more filters)": tall}
    kinds = {name: kind for name, kind in named.items() if any(kind.values())}
    figure = new_figure(11, 1.2 + 3.6 * len(kinds))
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), (name, kind) in zip(axes, kinds.items(), strict=True):
        for place, arm in enumerate(kind):
            # Arms often coincide: each later line is thinner, so that the earlier ones show beneath it.
            line = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.4 + 3.6 * (1 - (place + 1) / len(kind)), "label": arm}
            if angles := [_absolute_cosines(k) for k in kind[arm] if k.o > 1]:
                values = np.concatenate(angles)
                counts, edges = np.histogram(values, np.linspace(0, 1, 51))
                left.stairs(100 * counts / len(values), edges, **line)
            if kind[arm]:
                spectrum = np.sort(np.concatenate([_relative_singular_values(k) for k in kind[arm]]))[::-1]
                right.plot(np.linspace(0, 100, len(spectrum)), spectrum, **line)
        if kind is tall:
            bounds = sorted({welch_bound(k.o, k.n) for ks in tall.values() for k in ks})
            for bound in bounds:
                label = "Welch bound of a layer" if bound == bounds[0] else None
                left.axvline(bound, color="#444444", linestyle=":", linewidth=1, label=label)
        left.set(title=name, xlabel="|cosine| of two filters", ylabel="% of pairs", xlim=(0, 1), yscale="symlog")
        left.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        left.set_ylim(0, 130)
        right.axhline(1, color="#444444", linestyle=":", linewidth=1)
        right.set(title=name, xlabel="singular values, largest first (%)", ylabel="relative to the ideal", xlim=(0, 100))
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)


@own_style()
def overview(rows: Sequence[Row]) -> "Figure":
    """Every layer of a report as a bar: mean ``|c|`` relative to random filters, in the colour of its word, in model order."""
    measured = [row for row in rows if row["x_random"] is not None]
    figure = new_figure(5.6, max(1.6, 0.9 + 0.19 * len(measured)))
    axis = figure.subplots()
    places = np.arange(len(measured))
    colours = [WORDS[row["word"]] for row in measured]
    axis.barh(places, [row["x_random"] for row in measured], color=colours, height=0.75)
    axis.set_yticks(places, [_middle(row["layer"], 28) for row in measured])
    axis.invert_yaxis()
    axis.axvline(1, color=INK, linestyle=":", linewidth=1.2)
    axis.set_xlabel("mean |cosine| over that of random filters (dotted)", fontsize=9)
    axis.set(xlim=(0, None), ylim=(len(measured) - 0.4, -0.6))
    words = dict.fromkeys(row["word"] for row in measured if row["word"])
    for word in words:
        axis.bar(0, 0, color=WORDS[word], label=word)
    if words:
        figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside upper center", ncols=3)
    _plain(axis)
    return figure


@own_style()
def side_by_side(rows: Mapping[str, Sequence[Row]]) -> "Figure":
    """Several reports in one picture: a dot for each network at each layer's mean ``|c|`` relative to random filters."""
    layers = list(dict.fromkeys(row["layer"] for some in rows.values() for row in some if row["x_random"] is not None))
    figure = new_figure(5.6, max(1.8, 1.1 + 0.19 * len(layers)))
    axis = figure.subplots()
    known = [{row["layer"]: row["x_random"] for row in some} for some in rows.values()]
    for place, layer in enumerate(layers):
        there = [each[layer] for each in known if each.get(layer) is not None]
        axis.hlines(place, min(there), max(there), color=INK, linewidth=1)
    for place, (name, values) in enumerate(zip(rows, known, strict=True)):
        dots = {row: values[layer] for row, layer in enumerate(layers) if values.get(layer) is not None}
        colour = (*COLOURS[1:], COLOURS[0])[place % len(COLOURS)]
        axis.scatter(list(dots.values()), list(dots), s=22, color=colour, label=_middle(name, 28), zorder=3)
    axis.set_yticks(range(len(layers)), [_middle(layer, 28) for layer in layers])
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.axvline(1, color=INK, linestyle=":", linewidth=1.2)
    axis.set_xlabel("mean |cosine| over that of random filters (dotted)", fontsize=9)
    axis.set_xlim(left=0)
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside upper center", ncols=2)
    _plain(axis)
    return figure


@own_style()
def detail(kernel: Kernel) -> "Figure":
    """One layer: a heat map of ``|c|``, the cosines against random ones, singular values, and filters that read an image."""
    drawers = details(kernel)
    figure = new_figure(4.2 * len(drawers), 3.4)
    for axis, (name, draw_in) in zip(np.atleast_1d(figure.subplots(1, len(drawers))), drawers.items(), strict=True):
        draw_in(axis)
        axis.set_title(name, fontsize=10, color=INK)
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


def _heat(axis: "Axes", matrix: torch.Tensor) -> None:
    unit = directions(matrix[:4096])
    values = (unit @ unit.mT).abs_()
    side = min(len(values), BLOCKS)
    pooled = torch.nn.functional.adaptive_max_pool2d(values.fill_diagonal_(0)[None, None], side)[0, 0].numpy()
    image = axis.imshow(pooled, vmin=0, vmax=1, cmap="magma", interpolation="nearest", extent=(0, len(values), len(values), 0))
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.046)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    axis.set(xlabel="filter", ylabel="filter")
    axis.locator_params(integer=True)
    _plain(axis)


def _histogram(axis: "Axes", kernel: Kernel) -> None:
    values = _absolute_cosines(kernel)
    counts, edges = np.histogram(values, np.linspace(0, 1, 51))
    axis.stairs(100 * counts / len(values), edges, color="#2f7fc1", fill=True, alpha=0.75, label="this layer")
    axis.stairs(100 * _random_share(edges, kernel.n), edges, color="#d1711f", linewidth=1.6, label="random filters")
    if (bound := welch_bound(kernel.o, kernel.n)) > 0:
        axis.axvline(bound, color=INK, linestyle=":", linewidth=1.4, label="Welch bound: least possible max")
    axis.set(xlabel="|cosine|", ylabel="% of pairs", xlim=(0, 1), yscale="symlog")
    axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axis.set_ylim(0, 130)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    _plain(axis)


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
    axis.plot(places, sigma, color="#2f7fc1", linewidth=1.8, marker="." if len(sigma) < 9 else "")
    axis.axhline(sigma.mean(), color=INK, linestyle=":", linewidth=1.2, label="all equal: orthogonal")
    axis.set(xlabel="% of singular values", ylabel="σ", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    _plain(axis)


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


def _plain(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(colors=INK, labelsize=8)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)


def _middle(name: str, most: int = 36) -> str:
    """A name, shortened in the middle, in which nothing is read as a formula."""
    name = printable(name).replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of matplotlib, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _absolute_cosines(kernel: Kernel) -> NDArray[np.float64]:
    matrix = kernel.matrix[..., :LARGEST, :].detach().cpu().double()
    i, j = np.tril_indices(matrix.shape[-2], -1)
    absolute: NDArray[np.float64] = cosines(matrix).abs().numpy()[..., i, j].ravel()
    return absolute


def _relative_singular_values(kernel: Kernel) -> NDArray[np.float64]:
    sigma = singular_values(kernel.matrix.detach().cpu().double()) / max(1.0, kernel.o / kernel.n) ** 0.5
    values: NDArray[np.float64] = sigma.numpy().ravel()
    return values
