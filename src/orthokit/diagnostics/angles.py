"""How filters point: the cosines of all pairs, in bounded memory, and how tight a frame they form."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthokit.gram import directions, frobenius, full_precision

COPY = 0.99
"""Two filters with ``|c_ij|`` above this are copies of each other."""

BLOCK = 2**22
"""Cosines held at once by :func:`angles`."""


class Angles(NamedTuple):
    """Statistics of ``|c_ij|`` over the pairs ``i > j`` of each kernel; zero where there is no pair."""

    total: Float[Tensor, "*b"]
    largest: Float[Tensor, "*b"]
    copies: Int[Tensor, "*b"]


@torch.no_grad()
def angles(matrix: Float[Tensor, "*b o n"]) -> Angles:
    """Sum and maximum of ``|c_ij|``, and the number of :data:`COPY` pairs, without holding all cosines at once.

    >>> angles(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    Angles(total=tensor(1.), largest=tensor(1.), copies=tensor(1))
    """
    unit = directions(matrix)
    *batch, o, _ = unit.shape
    rows = max(1, BLOCK // (o * max(1, torch.Size(batch).numel())))
    parts = []
    for start in range(0, o, rows):
        block = (unit[..., start : start + rows, :] @ unit[..., : start + rows, :].mT).tril(start - 1).abs()
        parts.append(Angles(block.sum((-2, -1)), block.amax((-2, -1)), (block > COPY).sum((-2, -1))))
    total, largest, copies = (torch.stack(part) for part in zip(*parts, strict=True))
    return Angles(total.sum(0), largest.amax(0), copies.sum(0))


@full_precision
def frame_tightness(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b"]:
    """``||U^T U - (o/n) I||_F / (o sqrt(1 - 1/n))`` of the directions ``U``: 0 at tight frames, 1 where all filters are copies.

    The natural target of a tall layer, whose filters cannot all be orthogonal. 0 for filters of a single weight.

    >>> frame_tightness(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 3.0]]))
    tensor(0.)
    """
    o, n = matrix.shape[-2:]
    if n == 1:
        return torch.zeros_like(matrix[..., 0, 0])
    unit = directions(matrix)
    deviation = unit.mT @ unit - (o / n) * torch.eye(n, dtype=unit.dtype, device=unit.device)
    tightness: Tensor = frobenius(deviation) / (o * (1 - 1 / n) ** 0.5)
    return tightness
