"""Angles between filters: the cosines of all pairs, in bounded memory, and the tightness of the frame."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthokit.checks import check_count
from orthokit.gram import directions, frobenius, full_precision, inverse_lengths

__all__ = ["COPY", "Angles", "angles", "frame_tightness", "random_cosine"]

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
def angles(matrix: Float[Tensor, "*b o n"], product: Float[Tensor, "*b o o"] | None = None) -> Angles:
    """Sum and maximum of ``|c_ij|``, and the number of :data:`COPY` pairs, without holding all cosines at once.

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        product: ``matrix @ matrix.mT``, where it is known already; the cosines are then read off it.

    >>> angles(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    Angles(total=tensor(1.), largest=tensor(1.), copies=tensor(1))
    """
    unit = directions(matrix) if product is None else torch.empty(0)
    inverse = None if product is None else inverse_lengths(product.diagonal(dim1=-2, dim2=-1))
    *batch, o, _ = matrix.shape
    rows = max(1, BLOCK // (o * max(1, torch.Size(batch).numel())))
    parts = []
    for start in range(0, o, rows):
        if product is None or inverse is None:
            block = unit[..., start : start + rows, :] @ unit[..., : start + rows, :].mT
        else:
            block = product[..., start : start + rows, : start + rows] * inverse[..., start : start + rows, None]
            block *= inverse[..., None, : start + rows]
        block = block.tril_(start - 1).abs_()
        parts.append(Angles(block.sum((-2, -1)), block.amax((-2, -1)), (block > COPY).sum((-2, -1))))
    total, largest, copies = (torch.stack(part) for part in zip(*parts, strict=True))
    return Angles(total.sum(0), largest.amax(0), copies.sum(0))


def random_cosine(n: int) -> float:
    """Mean ``|c_ij|`` of random filters with ``n`` weights: ``Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2))``, about ``sqrt(2/(pi n))``.

    Exact for directions drawn uniformly from the sphere, such as those of Gaussian weights.

    >>> round(random_cosine(2), 4), round(random_cosine(576), 4)
    (0.6366, 0.0333)
    """
    check_count("n", n)
    return math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)


@full_precision
def frame_tightness(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b"]:
    """``||U^T U - (o/n) I||_F / (o sqrt(1 - 1/n))`` of the directions ``U``: 0 at tight frames, 1 where all filters are copies.

    A tight frame is the natural target of a tall layer, whose filters cannot all be orthogonal. 0 for filters of a single weight.

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
