"""Measures of a network: multiply-adds, and the totals of near-orthogonality that runs record."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orthokit.kernel import evaluating
from orthokit.layers import convs, layers
from orthokit.report import report
from orthokit.tables import Row

__all__ = ["flops", "orthogonality"]


def flops(model: nn.Module, input_shape: Iterable[int]) -> int:
    """Multiply-adds of one forward pass of one input, which papers on small networks call FLOPs.

    Half of what PyTorch's ``FlopCounterMode`` counts, which takes a multiply-add for two: convolutions, matrix products and
    attention; no normalisation, activation, pooling or bias. The pass runs in evaluation mode, on zeros, and leaves the model
    as it was; on the meta device it costs nothing.

    >>> from orthokit.lab.networks.measures import flops
    >>> from orthokit.lab.networks.resnet import ResNet
    >>> with torch.device("meta"):
    ...     flops(ResNet(20), (3, 32, 32))
    40813184

    Args:
        model: on any device.
        input_shape: the shape of one input, without the batch dimension: ``(channels, height, width)``.
    """
    like = next(model.parameters(), torch.empty(0))
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(like.new_zeros((1, *input_shape)))
    return int(counter.get_total_flops()) // 2


COLUMNS = (
    *("filters", "pairs", "mean_length_error", "max_length_error", "sigma_min", "sigma_max"),
    *("mean_cos", "max_cos", "copies", "residual", "tightness"),
)
"""Columns of a report whose totals records of runs hold."""


def orthogonality(model: nn.Module, *, spectrum: bool = True) -> dict[str, Row]:
    """Totals of :func:`orthokit.report` over wide layers (``under``), tall ones (``over``), and ``all`` if there are both.

    The totals are those of the convolutions, or of every layer with a kernel where there is no convolution; else empty.
    """
    modules = list(model.named_modules())
    where = next((where for where in (convs, layers) if any(where(*module) for module in modules)), None)
    totals = {} if where is None else report(model, where=where, spectrum=spectrum).totals
    record_names = {"wide": "under", "tall": "over", "all": "all"}  # in the records of runs
    return {
        record_names[part]: {key: value for key, value in total.items() if key in COLUMNS}
        for part, total in totals.items()
        if part in record_names
    }
