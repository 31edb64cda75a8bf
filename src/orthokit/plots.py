"""Pictures of orthogonality: how filters point, and what the kernels do to lengths. Needs matplotlib (extra ``[lab]``)."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orthokit.diagnostics import singular_values
from orthokit.gram import cosines, welch_bound
from orthokit.kernel import Kernel
from orthokit.select import Where, layers, select
from orthokit.statedict import Layers

COLOURS = ("#8a8a8a", "#d1711f", "#2166ac", "#7b3294", "#1a9850", "#b2182b", "#01665e", "#a6611a")
LARGEST = 2048
"""Of a layer with more filters, the cosines among its first ``LARGEST`` are drawn."""


@torch.no_grad()
def draw(
    models: Mapping[str, Sequence[nn.Module | Mapping[str, Any] | Layers]],
    path: str | PathLike[str],
    *,
    title: str = "",
    where: Where = layers,
) -> None:
    """Save a picture that compares arms: cosines and singular values, of under- and of over-determined layers.

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
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'orthokit[lab]'") from None

    kernels = {
        arm: [k for model in trained for k in (layer.kernel for layer in select(model, where)) if k.weight.isfinite().all()]
        for arm, trained in models.items()
    }
    if not any(kernels.values()):
        raise ValueError("nothing to draw: every selected layer holds NaN or infinite weights")
    tall = {arm: [k for k in ks if k.o > k.n] for arm, ks in kernels.items()}
    wide = {arm: [k for k in ks if k.o <= k.n] for arm, ks in kernels.items()}
    named = {"Under-determined layers (filters ≤ weights per filter)": wide, "Over-determined layers (more filters)": tall}
    kinds = {name: kind for name, kind in named.items() if any(kind.values())}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc in the working directory can ask for LaTeX, which is a program
        figure = Figure(figsize=(11, 1.2 + 3.6 * len(kinds)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(kinds), 2, squeeze=False)
        for (left, right), (name, kind) in zip(axes, kinds.items(), strict=True):
            for place, arm in enumerate(kind):
                # Arms often coincide: each later line is thinner, so that the earlier ones show beneath it.
                line = {
                    "color": COLOURS[place % len(COLOURS)],
                    "linewidth": 1.4 + 3.6 * (1 - (place + 1) / len(kind)),
                    "label": arm,
                }
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


def _absolute_cosines(kernel: Kernel) -> NDArray[np.float64]:
    matrix = kernel.matrix[..., :LARGEST, :].detach().cpu().double()
    i, j = np.tril_indices(matrix.shape[-2], -1)
    absolute: NDArray[np.float64] = cosines(matrix).abs().numpy()[..., i, j].ravel()
    return absolute


def _relative_singular_values(kernel: Kernel) -> NDArray[np.float64]:
    sigma = singular_values(kernel.matrix.detach().cpu().double()) / max(1.0, kernel.o / kernel.n) ** 0.5
    values: NDArray[np.float64] = sigma.numpy().ravel()
    return values
