"""One row per layer, and totals: the figures of a report."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn.modules.conv import _ConvNd

from orthokit.diagnostics import angles, effective_rank, frame_tightness, random_cosine, stable_rank
from orthokit.diagnostics.spectrum import spectrum_of
from orthokit.gram import frobenius, gram, less_identity
from orthokit.kernel import Kernel
from orthokit.layers import Layer
from orthokit.relax import welch_bound
from orthokit.report.words import word_of
from orthokit.tables import Column, Row

__all__ = ["COLUMNS", "SPECTRAL", "is_measured", "row_of", "totals_of"]

COLUMNS = (
    Column("layer", "layer", "s"),
    Column("kind", "kind", "s", shown=False),
    Column("groups", "groups", "d", shown=False),
    Column("o", "o", "d"),
    Column("n", "n", "d"),
    Column("shape", "shape", "s", shown=False),
    Column("filters", "filters", "d", shown=False),
    Column("pairs", "pairs", "d", shown=False),
    Column("word", "reads as", "s"),
    Column("x_random", "×random", ".2f"),
    Column("mean_cos", "mean |c|", ".2g"),
    Column("max_cos", "max |c|", ".2g"),
    Column("copies", "copies", "d"),
    Column("mean_length", "mean ν", ".3g"),
    Column("mean_length_error", "mean |ν-1|", ".3f", shown=False),
    Column("max_length_error", "max |ν-1|", ".2g"),
    Column("residual", "residual", ".2g"),
    Column("tightness", "tightness", ".2g"),
    Column("welch_ratio", "×Welch bound", ".2f"),
    Column("sigma_min", "σ min"),
    Column("sigma_max", "σ max"),
    Column("condition", "σ max/min", shown=False),
    Column("effective_rank", "eff. rank", ".1f"),
    Column("stable_rank", "stable rank", ".1f", shown=False),
)
MEASURED = [column.key for column in COLUMNS[8:]]
SPECTRAL = ("sigma_min", "sigma_max", "condition", "effective_rank", "stable_rank")
"""Columns that are read off singular values."""
SHARED = 2**27
"""Entries of the Gram matrices of a layer's filters up to which they are held at once."""


@torch.no_grad()
def row_of(layer: Layer, *, spectrum: bool) -> Row:
    """The figures of a layer, groups taken together; only its shape, where a weight is NaN, infinite, or its square is."""
    kernel = layer.kernel
    kind = type(layer.module).__name__.removeprefix("Parametrized")  # the class before it was
    return {"layer": layer.name, "kind": kind, **_measure(kernel, spectrum)}


def _measure(kernel: Kernel, spectrum: bool) -> Row:
    matrix = kernel.matrix.detach().cpu().double().flatten(0, -3)  # (groups, o, n)
    groups, o, n = matrix.shape
    pairs = groups * (o * (o - 1) // 2)
    row: Row = {"groups": groups, "o": o, "n": n, "shape": "wide" if o <= n else "tall", "filters": groups * o, "pairs": pairs}
    row |= dict.fromkeys(MEASURED)
    if not matrix.square().sum().isfinite():  # nor where weights are so large that their squares are infinite
        return row
    product = gram(matrix) if groups * o * o <= SHARED else None
    lengths = matrix.square().sum(-1).sqrt()
    error = (lengths - 1).abs()
    row |= {
        "mean_length": lengths.mean().item(),
        "mean_length_error": error.mean().item(),
        "max_length_error": error.max().item(),
    }
    if pairs:
        total, largest, copies = angles(matrix, product)
        mean = total.sum().item() / pairs
        row |= {
            "mean_cos": mean,
            "max_cos": largest.max().item(),
            "copies": int(copies.sum()),
            "x_random": mean / random_cosine(n),
        }
    if spectrum:
        smaller = product if product is not None and o <= n else gram(matrix, "smaller")
        sigma = spectrum_of(matrix, smaller).flatten().sort(descending=True).values
        low, high = sigma[-1].item(), sigma[0].item()
        row |= {
            "sigma_min": low,
            "sigma_max": high,
            "condition": high / low if low > 0 else math.inf,
            "effective_rank": effective_rank(sigma).item(),
            "stable_rank": stable_rank(sigma).item(),
        }
    if o <= n:
        residual = less_identity(gram(matrix) if product is None else product)
        row["residual"] = frobenius(residual).square().mean().div(o).sqrt().item()
    else:
        row["tightness"] = frame_tightness(matrix).square().mean().sqrt().item()
        row["welch_ratio"] = row["max_cos"] / welch_bound(o, n)
    pointing = (lengths.square() > torch.finfo(lengths.dtype).tiny).sum(-1)  # as for cosines
    row["word"] = word_of(row, int((pointing * (pointing - 1) // 2).sum()))
    return row


def totals_of(rows: Sequence[Row], layers: Sequence[Layer]) -> dict[str, Row]:
    """Totals over ``wide`` and ``tall`` layers, and over ``all`` if there are both; ``other`` layers apart.

    Of the convolutions, which a penalty touches by default, if there is one; the others are then ``other``. Layers without
    figures do not count.
    """
    measured = [(row, isinstance(layer.module, _ConvNd)) for row, layer in zip(rows, layers, strict=True) if is_measured(row)]
    convolved = any(conv for _, conv in measured)
    counted = [row for row, conv in measured if conv or not convolved]
    kind = " convolutions" if convolved and len(counted) < len(measured) else ""
    parts = {shape: [row for row in counted if row["shape"] == shape] for shape in ("wide", "tall")}
    parts = {name: part for name, part in parts.items() if part}
    if len(parts) == 2:
        parts["all"] = counted
    labels = {name: f"{name}{kind} ({len(part)})" for name, part in parts.items()}
    if kind:
        parts["other"] = [row for row, conv in measured if not conv]
        labels["other"] = f"other layers ({len(parts['other'])})"
    return {name: {"label": labels[name], "layers": len(part), **_total(part)} for name, part in parts.items()}


def is_measured(row: Row) -> bool:
    """Whether a layer has figures: not with NaN or infinite weights."""
    return row["mean_length_error"] is not None


def _total(rows: Sequence[Row]) -> Row:
    filters = sum(row["filters"] for row in rows)

    def mean(key: str, weight: str, among: Callable[[Row], bool] = is_measured) -> float | None:
        part = [row for row in rows if among(row) and row[key] is not None]
        weights = sum(row[weight] for row in part)
        return sum(row[key] * row[weight] for row in part) / weights if weights else None

    total: Row = {
        "filters": filters,
        "pairs": sum(row["pairs"] for row in rows),
        "mean_length": mean("mean_length", "filters"),
        "mean_length_error": mean("mean_length_error", "filters"),
        "max_length_error": max(row["max_length_error"] for row in rows),
    }
    if rows[0]["sigma_max"] is not None:
        total |= {"sigma_min": min(row["sigma_min"] for row in rows), "sigma_max": max(row["sigma_max"] for row in rows)}
    if total["pairs"]:
        paired = [row for row in rows if row["pairs"]]
        total |= {
            "x_random": mean("x_random", "pairs"),
            "mean_cos": mean("mean_cos", "pairs"),
            "max_cos": max(row["max_cos"] for row in paired),
            "copies": sum(row["copies"] for row in paired),
        }
    for key in ("residual", "tightness"):
        measured = [row for row in rows if row[key] is not None]
        if measured:
            squares = sum(row[key] ** 2 * row["filters"] for row in measured)
            total[key] = math.sqrt(squares / sum(row["filters"] for row in measured))
    return total
