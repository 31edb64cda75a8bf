"""Spectral restricted isometry property regularization.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (SRIP). The spectral norm of the Gram residual, by power iteration. The published copies differ
(squared or not, two or three products, either side) and draw a new start vector at each call; ours is fixed, so the value of
given weights is always the same.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_count, short_repr
from orthokit.gram import SIDES, Side, full_precision, is_by_rows, is_finite, polar
from orthokit.kernel import Kernel


@full_precision
def spectral_restricted_isometry(
    matrix: Float[Tensor, "*b o n"],
    *,
    steps: int = 2,
    squared: bool = False,
    side: Side = "smaller",
    start: Float[Tensor, "m"] | None = None,  # noqa: F821
) -> Float[Tensor, "*b"]:
    """``sigma_max(G - I)`` after ``steps`` products with the residual, a lower bound that grows with ``steps``.

    Zero where that side's vectors are orthonormal. On the longer side of a non-square kernel it is pinned at 1 or more.

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        steps: products of the residual with a vector; two and three are published.
        squared: the square, as most published copies have it.
        side: which Gram matrix: ``"rows"``, ``"cols"`` or the ``"smaller"``.
        start: the start vector, of any length but zero; by default a fixed random one.

    >>> spectral_restricted_isometry(torch.diag(torch.tensor([2.0, 1.0])), steps=20)  # residual diag(3, 0)
    tensor(3.)

    Source: Bansal, Chen, Wang 2018, arXiv 1810.09102.
    """
    check_choice("side", side, SIDES)
    check_count("steps", steps)
    left = matrix if is_by_rows(matrix, side) else matrix.mT
    size = left.shape[-2]
    vector = (_start(size) if start is None else start).to(matrix).unsqueeze(-1)
    if vector.shape != (size, 1):
        raise ValueError(
            f"start must be a vector of {size} numbers, as this side's Gram matrix has; got {vector.squeeze(-1).shape}"
        )
    length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    if start is not None and not is_finite(1 / length):
        raise ValueError("start must not be zero")
    for _ in range(steps):
        # At an exactly orthonormal kernel the product is zero and stays zero, with zero gradient.
        unit = (vector / torch.where(length == 0, 1.0, length)).expand(*matrix.shape[:-2], size, 1)
        vector = left @ (left.mT @ unit) - unit  # the residual itself is never formed
        length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    norm: Tensor = length.squeeze((-2, -1))
    return norm**2 if squared else norm


@cache
def _start(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")


@dataclass(frozen=True, kw_only=True)
class SRIP:
    """:func:`spectral_restricted_isometry` of a layer's kernel matrix."""

    steps: int = 2
    squared: bool = False
    side: Side = "smaller"
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("side", self.side, SIDES)

    def __call__(self, kernel: Kernel) -> Tensor:
        return spectral_restricted_isometry(kernel.matrix, steps=self.steps, squared=self.squared, side=self.side)

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows, or columns if tall."""
        return polar(kernel.matrix)
