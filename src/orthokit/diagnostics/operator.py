"""A convolution as a linear operator on images: its exact singular values.

Sedghi, Gupta, Long: "The Singular Values of Convolutional Layers", ICLR 2019, https://arxiv.org/abs/1805.10408: with circular
padding the Fourier transform makes the operator block-diagonal, one block a frequency. Strides fold ``prod(stride)`` frequencies
of the input into one block of the output (polyphase; ours), groups have blocks of their own.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics.spectrum import singular_values
from orthokit.kernel import Kernel

__all__ = ["operator_singular_values"]

ENTRIES = 2**22
"""Complex numbers held at once."""
POSITIONS = 2**22
"""Positions of the largest input, such as 2048 x 2048."""


@torch.no_grad()
def operator_singular_values(kernel: Kernel, size: Sequence[int] = ()) -> Float[Tensor, " m"]:
    """All singular values of a layer as an operator on inputs of a spatial ``size`` with circular padding, largest first.

    A linear layer (``size`` empty) has the singular values of its matrix. A transposed convolution has those of the convolution
    whose adjoint it is; ``size`` is then the size of its output. In float64, in bounded memory.

    Args:
        kernel: of one layer, ``(groups, o, i, *spatial)``; see :func:`orthokit.kernel_of`.
        size: one positive entry per spatial dimension, a multiple of the stride.

    Raises:
        ValueError: ``size`` has another number of dimensions, is not a multiple of the stride, or is too large to go through.

    >>> doubling = orthokit.kernel_of(torch.full((1, 1, 1), 2.0))
    >>> operator_singular_values(doubling, (3,))
    tensor([2., 2., 2.], dtype=torch.float64)

    Source: Sedghi, Gupta, Long 2019; strides ours.
    """
    stride = kernel.stride
    size = tuple(size)
    if len(size) != len(stride) or any(extent < 1 or extent % step for extent, step in zip(size, stride, strict=True)):
        raise ValueError(
            f"size must have {len(stride)} entries, multiples of the stride {tuple(stride)} with circular padding; got {size}"
        )
    if math.prod(size) > POSITIONS:
        raise ValueError(f"size must have at most {POSITIONS:,} positions, one block of the operator each; got {size}")
    weight = kernel.weight.detach().cpu().double().flatten(0, -3 - len(stride))  # (groups, o, i, *spatial)
    if not stride:
        return singular_values(weight).flatten().sort(descending=True).values
    dilation = kernel.dilation or (1,) * len(stride)
    extents, weight = weight.shape[3:], (weight.transpose(1, 2) if kernel.transposed else weight).flatten(3)
    groups, o, i, _ = weight.shape
    taps = torch.tensor(list(itertools.product(*map(range, extents)))) * torch.tensor(dilation)
    coarse = [extent // step for extent, step in zip(size, stride, strict=True)]
    # The kernel is real: frequencies f and -f have the same singular values.
    frequencies, counts = _half(coarse)
    aliases = torch.tensor(list(itertools.product(*map(range, stride))), dtype=torch.float64)
    folds = len(aliases)
    extent, steps = torch.tensor(size, dtype=torch.float64), torch.tensor(coarse, dtype=torch.float64)
    if not bool(taps.remainder(torch.tensor(size)).any()):
        frequencies, counts = frequencies[:1], torch.tensor([math.prod(coarse)])  # a single tap: every block is alike
    values, many = [], max(1, ENTRIES // (groups * o * i * folds))
    for some, count in zip(frequencies.split(many), counts.split(many), strict=True):
        every = some[:, None, :] + aliases * steps  # (f, folds, dimensions)
        phase = 2 * math.pi * torch.einsum("fad,td->fat", every / extent, taps.double())
        wave = torch.polar(torch.full_like(phase, folds**-0.5), phase)
        blocks = torch.einsum("goit,fat->fgoia", weight.to(torch.complex128), wave).flatten(-2)
        sigma = torch.linalg.svdvals(blocks if o <= i * folds else blocks.mT)
        values.append(sigma.flatten(1).repeat_interleave(count, 0).flatten())
    return torch.cat(values).sort(descending=True).values


def _half(coarse: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One of each pair of opposite frequencies on a grid, and how many frequencies each stands for."""
    counts: dict[tuple[int, ...], int] = {}
    for frequency in itertools.product(*map(range, coarse)):
        opposite = tuple(-f % extent for f, extent in zip(frequency, coarse, strict=True))
        key = min(frequency, opposite)
        counts[key] = counts.get(key, 0) + 1
    grid = torch.tensor(list(counts), dtype=torch.float64).reshape(len(counts), len(coarse))
    return grid, torch.tensor(list(counts.values()))
