"""Spectral restricted isometry property regularization.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (SRIP). The spectral norm of the Gram residual, by power iteration. The published copies differ
(squared or not, two or three products, either side) and draw a new start vector at each call; ours is fixed, so the value of
given weights is always the same.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_count, short_repr
from orthokit.gram import (
    SIDES,
    Side,
    full_precision,
    is_by_rows,
    is_differentiated,
    is_finite,
    outside_autocast,
    polar,
    reciprocal,
)
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
    left = matrix if is_by_rows(matrix.shape, side) else matrix.mT
    size = left.shape[-2]
    vector = (_start(size) if start is None else start).to(matrix).unsqueeze(-1)
    if vector.shape != (size, 1):
        raise ValueError(
            f"start must be a vector of {size} numbers, as this side's Gram matrix has; got {vector.squeeze(-1).shape}"
        )
    length = torch.linalg.vector_norm(vector)
    if start is not None and not is_finite(1 / length):
        raise ValueError("start must not be zero")
    norm = cast(Tensor, _PowerIteration.apply(left, vector / length, steps))  # type: ignore[no-untyped-call]
    return norm**2 if squared else norm


class _PowerIteration(torch.autograd.Function):
    """The length of the last of some products of ``R = A A^T - I`` with a unit vector, each but the last made a unit vector.

    The residual is never formed: a product with it is two with ``A``, and the gradient has the rank of twice the steps.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Float[Tensor, "*b m k"], unit: Float[Tensor, "m 1"], steps: int) -> Float[Tensor, "*b"]:
        units, folded, norms = _iterate(matrix, unit, steps)
        ctx.save_for_backward(matrix, *units, *folded, *norms)
        return norms[-1].squeeze((-2, -1))

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor, None, None]:
        matrix, *saved = ctx.saved_tensors
        steps = len(saved) // 3
        with outside_autocast(matrix.device):
            if is_differentiated():
                units, folded, norms = _iterate(matrix, saved[0], steps)
            else:
                units, folded, norms = saved[: steps + 1], saved[steps + 1 : 2 * steps + 1], saved[2 * steps + 1 :]
            pull = of_value[..., None, None] * units[steps]
            left, right = [], []
            for step in reversed(range(steps)):
                back = matrix.mT @ pull
                left += [pull, units[step]]
                right += [folded[step], back]
                if step:
                    along = matrix @ back - pull
                    turned = along - units[step] * (units[step] * along).sum(-2, keepdim=True)
                    pull = turned * reciprocal(norms[step - 1])
            return torch.cat(left, -1) @ torch.cat(right, -1).mT, None, None


def _iterate(matrix: Tensor, unit: Tensor, steps: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The unit vectors before and after each step, ``A^T`` times those before, and the norms of the products."""
    units, folded, norms = [unit.expand(*matrix.shape[:-1], 1)], [], []
    for _ in range(steps):
        folded.append(matrix.mT @ units[-1])
        vector = matrix @ folded[-1] - units[-1]
        norms.append(torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
        # At an exactly orthonormal kernel the product is zero and stays zero, with zero gradient.
        units.append(vector * reciprocal(norms[-1]))
    return units, folded, norms


@cache
def _start(size: int) -> Tensor:
    """Numbers from -1/2 to 1/2 without visible order: of no generator, which no compiler would follow."""
    scattered = torch.arange(1, size + 1, dtype=torch.float64, device="cpu").mul(12.9898).sin() * 43758.5453
    return scattered - scattered.floor() - 0.5


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
