"""Reports on the orthogonality of networks: figures and a word a layer, a sentence for the network, and what to do about it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from orthokit.architecture import Network, open_network
from orthokit.audit import unread_parameters
from orthokit.checkpoint.gaps import Gap
from orthokit.checks import check_count, check_number, did_you_mean
from orthokit.diagnostics import COPY
from orthokit.kernel import Kernel
from orthokit.layers import Layer, Where, layers, select
from orthokit.report.measure import COLUMNS, is_measured, row_of, totals_of
from orthokit.report.merge import Pair, merge_copies, pairs_of
from orthokit.report.operators import operators
from orthokit.report.words import WORDS, action_of, ranked, sentence_of
from orthokit.tables import Column, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "WORDS", "Pair", "Report", "compare", "duplicates", "merge_copies", "operators", "pairs_of", "report"]


@dataclass(frozen=True, repr=False)
class Report(Table):
    """A report: a :class:`~orthokit.tables.Table` of layers, with a summary in words, advice, pictures and a page.

    Attributes:
        layers: the layers it is of, in the order of the rows; figures are of the time of the report, pairs and pictures read
            the weights as they are now.
    """

    layers: tuple[Layer, ...] = field(default=(), compare=False)

    @property
    def summary(self) -> str:
        """One sentence: how many layers read as what, and which are the least orthogonal."""
        return sentence_of(self.rows)

    @property
    def incomplete(self) -> dict[str, str]:
        """Layers and parts of the network that were not read, with the reasons; their orthogonality is not known."""
        return {name: reason for note in self.notes if isinstance(note, Gap) for name, reason in note.missing.items()}

    @property
    def action(self) -> str:
        """The line of Python that would act on the layers that need it; empty where none does."""
        return action_of(self.rows)

    def __repr__(self) -> str:
        return f"<{self.title}: {self.summary}>"

    def kernel(self, layer: str) -> Kernel:
        """The kernel of a layer by its name.

        Raises:
            ValueError: no layer of that name is in the report.
        """
        known = {each.name: each for each in self.layers}
        if layer not in known:
            raise ValueError(f"no layer {layer!r} in this report{did_you_mean(layer, known)}")
        return known[layer].kernel

    def pairs(self, layer: str, above: float = COPY) -> list[Pair]:
        """The pairs of filters of a layer whose ``|c|`` is above a bound, the most correlated first.

        Args:
            layer: its name.
            above: from 0 to 1.

        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        >>> orthokit.report(layer).pairs("Linear", above=0.5)[0].j
        1
        """
        check_number("above", above, 0, 1)
        return pairs_of(self.kernel(layer), above)

    def sorted(self, column: str, *, top: int | None = None) -> "Report":
        """The same with the largest values of a column first (words: what to mend first), cut after ``top`` rows.

        Raises:
            ValueError: no such column.
        """
        if top is not None:
            check_count("top", top, 0)
        known = [each.key for each in self.columns]
        if column not in known:
            raise ValueError(f"no column {column!r}{did_you_mean(column, known)}")
        rows = list(self.rows)
        if column == "word":
            rows = ranked(rows)
        elif column == "layer":
            rows.sort(key=lambda row: row["layer"])
        else:
            rows = sorted((row for row in rows if row[column] is not None), key=lambda row: row[column], reverse=True) + [
                row for row in rows if row[column] is None
            ]
        notes = self.notes
        if top is not None and top < len(rows):
            notes = (*notes, f"{len(rows) - top} of {len(rows)} layers are not shown; the totals hold all")
            rows = rows[:top]
        by_name = {layer.name: layer for layer in self.layers}
        layers = tuple(by_name[row["layer"]] for row in rows)
        return Report(self.title, self.columns, tuple(rows), self.totals, notes, layers)

    def plot(self, layer: str | None = None, path: str | PathLike[str] | None = None) -> "Figure":
        """A picture (matplotlib): of every layer's word and figures, or of one layer's cosines, lengths and singular values.

        Args:
            layer: its name; None for all.
            path: a file to save the picture in.

        Raises:
            ValueError: no layer of that name, or one with NaN or infinite weights.
            ModuleNotFoundError: matplotlib is missing; the message says how to get it.
        """
        from orthokit import plots

        if layer is not None and not self.kernel(layer).weight.isfinite().all():
            raise ValueError(f"layer {layer!r} has NaN or infinite weights: there is nothing to draw")
        figure = plots.overview(self.rows) if layer is None else plots.detail(self.kernel(layer))
        if path is not None:
            with plots.own_style():
                figure.savefig(path, dpi=130)
        return figure

    def to_html(self, path: str | PathLike[str] | None = None, *, top: int | None = 12) -> str:
        """A page in one file, without scripts or anything from outside. Written to ``path`` if given.

        Args:
            path: a file to write.
            top: layers that get pictures, the least orthogonal ones; None for all.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message says how to get it.
        """
        from orthokit.report.page import page

        if top is not None:
            check_count("top", top, 0)
        text = page({"": self}, top=top)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        from orthokit.report.page import fragment

        return fragment(self)


def report(
    model: Network,
    *,
    where: Where = layers,
    spectrum: bool = True,
    like: nn.Module | None = None,
    key: str | None = None,
    track: Callable[[Sequence[Layer]], Iterable[Layer]] = iter,
) -> Report:
    """Near-orthogonality of each layer of a model, state dict or file, measured against what its shape allows.

    Columns (``c`` cosines of pairs of filters, ``nu`` lengths, ``sigma`` singular values; groups of a layer taken together):
    ``word`` (see :func:`orthokit.report.words.word_of`), ``x_random`` (``mean_cos`` over that of random filters,
    :func:`orthokit.diagnostics.random_cosine`), ``mean_cos``, ``max_cos``, ``copies`` (pairs with ``|c| > .99``),
    ``mean_length``, ``mean_length_error``, ``max_length_error`` (``|nu - 1|``); ``residual`` (``||K K^T - I||_F / sqrt(o)``)
    of wide layers (``o <= n``); ``tightness`` (:func:`orthokit.diagnostics.frame_tightness`) and ``welch_ratio`` (``max_cos``
    over :func:`orthokit.relax.welch_bound`) of tall ones; ``sigma_min``, ``sigma_max``, ``condition``, ``effective_rank``,
    ``stable_rank``. Computed in float64 on the CPU. A layer with NaN, infinite or overflowing
    weights gets a row without figures, and a note.

    Args:
        model: a module, a state dict or checkpoint, or the path of a file that holds one; nothing in it is executed.
        where: ``(name, module) -> bool``; every layer with a kernel view by default.
        spectrum: whether to compute singular values, most of the work.
        like: a model of the architecture of a state dict or file, which does not record all of it; without, the notes name
            what was concluded from sizes and names.
        key: which of several networks in a state dict or file.
        track: goes through the layers, for whoever shows progress.

    Raises:
        ValueError: ``where`` selects nothing, or the file cannot be read.
        TypeError: ``model`` is neither a module, nor a mapping, nor a path.
    """
    named = Path(model).name if isinstance(model, str | PathLike) else "state dict"
    kind = type(model).__name__ if isinstance(model, nn.Module) else named if like is None else type(like).__name__
    network, reading = open_network(model, like, key)
    chosen = select(network, where)
    rows = [row_of(layer, spectrum=spectrum) for layer in track(chosen)]
    notes = ["×random: mean |c| over that of random filters; c: cosine of two filters; ν: filter length; copies: |c| > .99"]
    if broken := [row["layer"] for row in rows if not is_measured(row)]:
        notes.append(f"NaN, infinite or overflowing weights, left out of the totals: {', '.join(broken)}")
    if isinstance(network, nn.Module):
        notes += filter(None, [str(unread_parameters(network, chosen))])
    return Report(f"orthogonality of {kind}", COLUMNS, tuple(rows), totals_of(rows, chosen), (*notes, *reading), chosen)


@torch.no_grad()
def duplicates(model: Network, *, above: float = COPY, where: Where = layers) -> dict[str, list[Pair]]:
    """The copies in a network: for each layer that has some, its pairs of filters with ``|c|`` above a bound.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> duplicates(nn.Sequential(layer))
    {'0': [Pair(i=0, j=1, cosine=1.0)]}
    """
    check_number("above", above, 0, 1)
    chosen = select(open_network(model, None, None)[0], where)
    pairs = {layer.name: pairs_of(layer.kernel, above) for layer in chosen if layer.kernel.weight.isfinite().all()}
    return {name: some for name, some in pairs.items() if some}


COMPARED = ("word", "x_random", "max_cos", "copies", "residual", "tightness", "mean_length")


def compare(reports: Mapping[str, Report]) -> Table:
    """Reports of several networks side by side, layers matched by name; of two also the change of ``x_random``.

    Args:
        reports: at least two, by the name that stands in the header.

    >>> from orthokit.report import compare
    >>> layer = nn.Linear(4, 2)
    >>> before = orthokit.report(layer)
    >>> _ = nn.init.orthogonal_(layer.weight)
    >>> compare({"before": before, "after": orthokit.report(layer)}).rows[0]["after: word"]
    'orthogonal'
    """
    if not isinstance(reports, Mapping) or not all(isinstance(each, Report) for each in reports.values()):
        raise TypeError(f"compare takes reports by name, {{'before': report, 'after': report}}; got {reports!r:.200}")
    if len(reports) < 2:
        raise ValueError(f"a comparison needs two reports or more; got {len(reports)}")
    names = list(dict.fromkeys(row["layer"] for each in reports.values() for row in each.rows))
    by_layer = {name: {row["layer"]: row for row in each.rows} for name, each in reports.items()}
    formats = {column.key: column for column in COLUMNS}
    columns = [formats["layer"]]
    for key in COMPARED:
        columns += [Column(f"{name}: {key}", f"{name}: {formats[key].header}", formats[key].format) for name in reports]
    first, last = next(iter(reports)), list(reports)[-1]
    if len(reports) == 2:
        columns.insert(5, Column("change", "change of ×random", "+.2f"))
    rows: list[Row] = []
    for layer in names:
        row: Row = {"layer": layer}
        for name, rows_of in by_layer.items():
            row |= {f"{name}: {key}": rows_of.get(layer, {}).get(key) for key in COMPARED}
        ends = row[f"{first}: x_random"], row[f"{last}: x_random"]
        row["change"] = None if None in ends else ends[1] - ends[0]
        rows.append(row)
    totals: dict[str, Row] = {}
    for part in dict.fromkeys(part for each in reports.values() for part in each.totals):
        total: Row = {"label": part}
        for name, each in reports.items():
            total |= {f"{name}: {key}": value for key, value in each.totals.get(part, {}).items() if key in COMPARED}
        totals[part] = total
    notes = [f"{name}: {each.summary}" for name, each in reports.items()]
    alone = {name: [layer for layer in names if layer not in rows_of] for name, rows_of in by_layer.items()}
    notes += [f"{name} lacks {len(lacking)} layers, such as {lacking[0]}" for name, lacking in alone.items() if lacking]
    *most, final = reports
    return Table(f"{', '.join(most)} and {final} compared", tuple(columns), tuple(rows), totals, tuple(notes))
