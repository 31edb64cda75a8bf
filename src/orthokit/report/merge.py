"""Copies among filters, and removing them without changing what the network computes."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from orthokit.diagnostics import COPY
from orthokit.gram import directions
from orthokit.in_use import is_overridden
from orthokit.kernel import Kernel

__all__ = ["Pair", "merge_copies", "pairs_of"]

ROWS = 2**22
"""Cosines held at once."""


class Pair(NamedTuple):
    """Two filters of a layer, by the output channels that they make, ``i < j``, and their cosine."""

    i: int
    j: int
    cosine: float


@torch.no_grad()
def pairs_of(kernel: Kernel, above: float = COPY) -> list[Pair]:
    """The pairs of filters in one group whose ``|c_ij|`` is larger than ``above``, the most correlated first.

    >>> from orthokit.report import pairs_of
    >>> pairs_of(orthokit.kernel_of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])))
    [Pair(i=0, j=2, cosine=-1.0)]
    """
    unit = directions(kernel.matrix.detach().cpu().double()).flatten(0, -3)
    _, o, _ = unit.shape
    rows, pairs = max(1, ROWS // o), list[Pair]()
    for group, block in enumerate(unit):
        for start in range(0, o, rows):
            cosines = (block[start : start + rows] @ block[: start + rows].mT).tril_(start - 1)
            for j, i in (cosines.abs() > above).nonzero().tolist():
                value = max(-1.0, min(1.0, cosines[j, i].item()))
                pairs.append(Pair(group * o + i, group * o + start + j, value))
    return sorted(pairs, key=lambda pair: (-abs(pair.cosine), pair.i, pair.j))


@torch.no_grad()
def merge_copies(
    convolution: nn.Module, following: nn.Module, *, norm: nn.Module | None = None, tolerance: float = 1e-6
) -> tuple[nn.Module, nn.Module | None, nn.Module, list[Pair]]:
    """Remove output channels that repeat an earlier one, without changing the output in evaluation mode.

    A channel is removed where its filter, its bias and its normalisation make the same numbers as an earlier channel, up to a
    positive factor (ReLU and its kind pass such a factor on; for other activations the factor must be 1: see the pairs'
    ``cosine`` and check the output). In the layer that reads the channels, its weights are added to those of the one that stays.

    Args:
        convolution: an ungrouped convolution or linear layer whose copies are to go.
        following: the ungrouped convolution or linear layer that alone reads its output, after ``norm`` and a ReLU.
        norm: the batch normalisation between, in evaluation mode.
        tolerance: relative, for what counts as the same number.

    Returns:
        New layers ``(convolution, norm, following)``, and the pairs that were merged: channel ``j`` went into ``i``.

    Raises:
        TypeError: a layer is of another kind, computes its weight, or has no values yet.
        ValueError: the channels of the layers do not fit.

    >>> first, second = nn.Linear(2, 3, bias=False), nn.Linear(3, 1)
    >>> _ = first.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    >>> smaller, _, after, merged = orthokit.merge_copies(first, second)
    >>> smaller, merged
    (Linear(in_features=2, out_features=2, bias=False), [Pair(i=0, j=2, cosine=1.0)])
    """
    made_by, read_by = _checked("convolution", convolution), _checked("following", following)
    if norm is not None and not (isinstance(norm, _BatchNorm) and norm.running_mean is not None):
        raise TypeError(f"norm must be a batch normalisation with running statistics; got {type(norm).__name__}")
    o, inputs = len(made_by.weight), read_by.weight.shape[1]
    if inputs != o or (norm is not None and norm.num_features != o):
        raise ValueError(f"{o} channels are made, but {inputs} are read: the layers do not follow each other")
    flat = made_by.weight.detach().double().flatten(1)
    bias = torch.zeros(o, dtype=torch.float64) if made_by.bias is None else made_by.bias.detach().double().cpu()
    gain, shift = torch.ones(o, dtype=torch.float64), bias.clone()
    if norm is not None:
        gain, shift = _affine(norm, bias)
    # What a channel computes: its filter times a gain, plus a shift.
    made = torch.cat([flat.cpu() * gain[:, None], shift[:, None]], 1)
    sizes = made.norm(dim=1)
    kept: list[int] = []
    into: dict[int, tuple[int, float]] = {}
    for channel, candidates in enumerate(_candidates(made, tolerance)):
        remaining = set(kept)
        for earlier in candidates if sizes[channel] > 0 else kept[:1]:
            if earlier not in remaining:
                continue
            factor = (sizes[channel] / sizes[earlier]).item() if sizes[earlier] > 0 else 1.0
            if (made[channel] - factor * made[earlier]).norm() <= tolerance * sizes[channel]:
                into[channel] = earlier, factor
                break
        else:
            kept.append(channel)
    smaller, after = copy.deepcopy(made_by), copy.deepcopy(read_by)
    shared = None if norm is None else copy.deepcopy(norm)
    read = after.weight.detach().clone()
    for channel, (earlier, factor) in into.items():
        read[:, earlier] += factor * read[:, channel]
    _shrink(smaller, kept)
    if isinstance(shared, _BatchNorm):
        shared.num_features = len(kept)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(value := getattr(shared, name), Tensor):
                getattr(shared, name).data = value.data[kept]
    after.weight = nn.Parameter(read[:, kept].contiguous(), requires_grad=after.weight.requires_grad)
    setattr(after, "in_channels" if isinstance(after, _ConvNd) else "in_features", len(kept))
    unit = directions(flat)
    merged = [
        Pair(earlier, channel, max(-1.0, min(1.0, (unit[earlier] @ unit[channel]).item())))
        for channel, (earlier, _) in into.items()
    ]
    return smaller, shared, after, merged


def _candidates(made: Tensor, tolerance: float) -> Iterator[list[int]]:
    """For each row the earlier rows of nearly its direction, without all cosines held at once."""
    unit = directions(made)
    rows = max(1, ROWS // max(1, len(unit)))
    for start in range(0, len(unit), rows):
        cosines = (unit[start : start + rows] @ unit[: start + rows].mT).tril_(start - 1)
        # |u - v|^2 = 2 - 2 cos; a little more room, as the caller compares exactly.
        close = cosines > max(0.0, 1 - tolerance**2 - 1e-9)
        for row in close:
            yield row.nonzero().flatten().tolist()


def _checked(name: str, layer: nn.Module) -> nn.Linear | _ConvNd:
    if not (
        isinstance(layer, nn.Linear)
        or (isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) and layer.groups == 1)
    ):
        raise TypeError(f"{name} must be an ungrouped convolution or a linear layer; got {layer}")
    weight = layer._parameters.get("weight")
    if weight is None or is_overridden(layer):
        raise TypeError(
            f"{name} computes its weight (a parametrization, a norm, a mask, or a forward pass of its own), which merging cannot "
            f"rewrite; make it plain first, as with torch.nn.utils.parametrize.remove_parametrizations; got {layer}"
        )
    if is_lazy(weight) or weight.is_meta:
        raise TypeError(f"{name} has no values yet (lazy, or on the meta device); initialise it first; got {layer}")
    return layer


def _affine(norm: _BatchNorm, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel that normalisation in evaluation mode applies to a filter's response and bias."""
    mean, variance = (t.detach().double().cpu() for t in (norm.running_mean, norm.running_var) if t is not None)
    gain = (variance + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.detach().double().cpu()
    shift = (bias - mean) * gain
    return gain, shift + norm.bias.detach().double().cpu() if norm.affine else shift


def _shrink(layer: nn.Module, kept: list[int]) -> None:
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach()[kept].clone(), requires_grad=value.requires_grad))
    setattr(layer, "out_channels" if isinstance(layer, _ConvNd) else "out_features", len(kept))
