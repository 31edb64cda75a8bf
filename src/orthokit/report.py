"""How orthogonal is a network: one row per layer, totals for under- and over-determined layers apart."""

import math

import torch
from torch import nn

from orthokit.architecture import Network, opened
from orthokit.audit import unread_parameters
from orthokit.diagnostics import angles, effective_rank, frame_tightness, singular_values, stable_rank
from orthokit.gram import frobenius, lengths, residual, welch_bound
from orthokit.kernel import Kernel
from orthokit.select import Where, layers, select
from orthokit.tables import Column, Row, Table

COLUMNS = (
    Column("layer", "layer", "s"),
    Column("kind", "kind", "s", shown=False),
    Column("groups", "groups", "d", shown=False),
    Column("o", "o", "d"),
    Column("n", "n", "d"),
    Column("determined", "determined", "s", shown=False),
    Column("filters", "filters", "d", shown=False),
    Column("pairs", "pairs", "d", shown=False),
    Column("mean_cos", "mean |c|", ".2g"),
    Column("max_cos", "max |c|", ".2g"),
    Column("copies", "copies", "d"),
    Column("mean_length_error", "mean |ν-1|", ".3f", shown=False),
    Column("max_length_error", "max |ν-1|", ".2g"),
    Column("residual", "residual", ".2g"),
    Column("tightness", "tightness", ".2g"),
    Column("welch_ratio", "×Welch", ".2f"),
    Column("sigma_min", "σ min"),
    Column("sigma_max", "σ max"),
    Column("condition", "σ max/min", shown=False),
    Column("effective_rank", "eff. rank", ".1f"),
    Column("stable_rank", "stable rank", ".1f", shown=False),
)


@torch.no_grad()
def report(
    model: Network, *, where: Where = layers, spectrum: bool = True, like: nn.Module | None = None, key: str | None = None
) -> Table:
    """Near-orthogonality of each layer of a model, state dict or saved network, measured against what its shape allows.

    Columns (``c`` cosines of pairs of filters, ``nu`` lengths, ``sigma`` singular values; groups of a layer taken together):
    ``mean_cos``, ``max_cos``, ``copies`` (pairs with ``|c| > .99``), ``mean_length_error``, ``max_length_error`` (``|nu - 1|``);
    ``residual`` (``||K K^T - I||_F / sqrt(o)``) of under-determined layers (``o <= n``); ``tightness``
    (:func:`orthokit.diagnostics.frame_tightness`) and ``welch_ratio`` (``max_cos`` over :func:`orthokit.gram.welch_bound`) of
    over-determined ones; ``sigma_min``, ``sigma_max``, ``condition``, ``effective_rank``, ``stable_rank``. Computed in float64
    on the CPU; without ``spectrum`` the singular values, most of the work, are left out. A layer with NaN or infinite weights
    gets a row without figures, and a note.

    Args:
        model: a model, a state dict, a checkpoint that holds one, or the path of a file with one; nothing in it is executed.
        where: which layers.
        spectrum: whether singular values are computed.
        like: a model of the architecture of a state dict or file, which does not record all of it; without, the notes name
            what was concluded from sizes and names.
        key: which of several networks in a state dict or file.

    Raises:
        ValueError: ``where`` selects nothing, or a file cannot be read.
        TypeError: ``model`` is neither a module nor a mapping nor a path.
    """
    kind = type(model).__name__ if isinstance(model, nn.Module) else "state dict" if like is None else type(like).__name__
    network, reading = opened(model, like, key)
    chosen = select(network, where)
    rows = [{"layer": layer.name, "kind": type(layer.module).__name__, **_measure(layer.kernel, spectrum)} for layer in chosen]
    parts = {
        name: [row for row in rows if row["determined"] == name and row["mean_length_error"] is not None]
        for name in ("under", "over")
    }
    totals = {f"{name}-determined ({len(part)})": _total(part) for name, part in parts.items() if part}
    if len(totals) == 2:
        totals[f"all ({sum(map(len, parts.values()))})"] = _total([*parts["under"], *parts["over"]])
    broken = [row["layer"] for row in rows if row["mean_length_error"] is None]
    notes = ["c: cosine of two filters; ν: filter length; copies: |c| > .99; residual: ‖KKᵀ-I‖/√o"]
    notes += [f"NaN or infinite weights, left out of the totals: {', '.join(broken)}"] if broken else []
    notes += reading
    if isinstance(network, nn.Module):
        notes += filter(None, [str(unread_parameters(network, chosen))])
    return Table(f"orthogonality of {kind}", COLUMNS, tuple(rows), totals, tuple(notes))


def _measure(kernel: Kernel, spectrum: bool) -> Row:
    matrix = kernel.matrix.detach().cpu().double().flatten(0, -3)  # (groups, o, n)
    groups, o, n = matrix.shape
    pairs = groups * (o * (o - 1) // 2)
    row: Row = {"groups": groups, "o": o, "n": n, "determined": "under" if o <= n else "over", "filters": groups * o}
    row |= {"pairs": pairs} | dict.fromkeys([column.key for column in COLUMNS[8:]])
    if not matrix.isfinite().all():
        return row
    total, largest, copies = angles(matrix)
    error = (lengths(matrix) - 1).abs()
    row |= {"mean_length_error": error.mean().item(), "max_length_error": error.max().item()}
    if spectrum:
        sigma = singular_values(matrix).flatten().sort(descending=True).values
        low, high = sigma[-1].item(), sigma[0].item()
        row |= {
            "sigma_min": low,
            "sigma_max": high,
            "condition": high / low if low > 0 else math.inf,
            "effective_rank": effective_rank(sigma).item(),
            "stable_rank": stable_rank(sigma).item(),
        }
    if pairs:
        row |= {"mean_cos": total.sum().item() / pairs, "max_cos": largest.max().item(), "copies": int(copies.sum())}
    if o <= n:
        row["residual"] = frobenius(residual(matrix)).square().mean().div(o).sqrt().item()
    else:
        row["tightness"] = frame_tightness(matrix).square().mean().sqrt().item()
        row["welch_ratio"] = row["max_cos"] / welch_bound(o, n)
    return row


def _total(rows: list[Row]) -> Row:
    filters = sum(row["filters"] for row in rows)
    total: Row = {
        "filters": filters,
        "pairs": sum(row["pairs"] for row in rows),
        "mean_length_error": sum(row["mean_length_error"] * row["filters"] for row in rows) / filters,
        "max_length_error": max(row["max_length_error"] for row in rows),
    }
    if rows[0]["sigma_max"] is not None:
        total |= {"sigma_min": min(row["sigma_min"] for row in rows), "sigma_max": max(row["sigma_max"] for row in rows)}
    if total["pairs"]:
        paired = [row for row in rows if row["pairs"]]
        total |= {
            "mean_cos": sum(row["mean_cos"] * row["pairs"] for row in paired) / total["pairs"],
            "max_cos": max(row["max_cos"] for row in paired),
            "copies": sum(row["copies"] for row in paired),
        }
    for key in ("residual", "tightness"):
        measured = [row for row in rows if row[key] is not None]
        if measured:
            squares = sum(row[key] ** 2 * row["filters"] for row in measured)
            total[key] = math.sqrt(squares / sum(row["filters"] for row in measured))
    return total
