"""Spectral restricted isometry property regularization.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (SRIP). The spectral norm of the Gram residual, by power iteration. The published copies differ
(squared or not, two or three products, either side) and draw a new start vector at each call; ours is fixed, so the value of
given weights is always the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_count, check_flag, check_options, short_repr
from orthokit.constants import cached, scattered
from orthokit.gram import (
    SIDES,
    GramRule,
    Side,
    full_precision,
    is_by_rows,
    is_differentiated,
    is_finite,
    is_transformed,
    less_identity,
    outside_autocast,
    reciprocal,
)
from orthokit.kernel import Kernel
from orthokit.polar import polar

__all__ = ["MOST", "SMALL", "SRIP", "spectral_restricted_isometry"]

SMALL = 64
"""Rows of a Gram matrix up to which it is formed: a few products with vectors take longer then than one with the matrix."""

MOST = 100_000
"""Steps of power iteration; two or three are usual."""


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
    check_flag("squared", squared)
    check_count("steps", steps, most=MOST)
    left = matrix if is_by_rows(matrix.shape, side) else matrix.mT
    size = left.shape[-2]
    vector = (_start(size, matrix.dtype, matrix.device) if start is None else start.to(matrix)).unsqueeze(-1)
    if vector.shape != (size, 1):
        raise ValueError(
            f"start must be a vector of {size} numbers, as this side's Gram matrix has; got {vector.squeeze(-1).shape}"
        )
    length = torch.linalg.vector_norm(vector)
    if start is not None and not is_finite(1 / length):
        raise ValueError("start must not be zero")
    if is_transformed():  # Note [transforms] in orthokit.gram
        unit = (vector / length).expand(*left.shape[:-1], 1)
        norm = _iterate(partial(_times_residual, left), unit, steps)[1][-1].squeeze((-2, -1))
    else:
        norm = cast(Tensor, _PowerIteration.apply(left, vector / length, steps))  # type: ignore[no-untyped-call]
    return norm**2 if squared else norm


class _PowerIteration(torch.autograd.Function):
    """The length of the last of some products of ``R = A A^T - I`` with a unit vector, each but the last made a unit vector.

    The residual is never formed: a product with it is two with ``A``, and the gradient has the rank of twice the steps.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Float[Tensor, "*b m k"], unit: Float[Tensor, "m 1"], steps: int) -> Float[Tensor, "*b"]:
        units, norms = _iterate(partial(_times_residual, matrix), unit.expand(*matrix.shape[:-1], 1), steps)
        ctx.save_for_backward(matrix, *units, *norms)
        return norms[-1].squeeze((-2, -1))

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor, None, None]:
        matrix, *saved = ctx.saved_tensors
        steps = len(saved) // 2
        with outside_autocast(matrix.device):
            times = partial(_times_residual, matrix)
            units, norms = _iterate(times, saved[0], steps) if is_differentiated() else (saved[: steps + 1], saved[steps + 1 :])
            left, right = _slope(times, units, norms)
            return of_value[..., None, None] * left @ (right.mT @ matrix), None, None


def _times_residual(matrix: Tensor, vector: Tensor) -> Tensor:
    return matrix @ (matrix.mT @ vector) - vector


def _iterate(times: Callable[[Tensor], Tensor], unit: Tensor, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The unit vectors before and after each step, and the norms of the products."""
    units, norms = [unit], []
    for _ in range(steps):
        vector = times(units[-1])
        norms.append(torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
        # At an exactly orthonormal kernel the product is zero and stays zero, with zero gradient.
        units.append(vector * reciprocal(norms[-1]))
    return units, norms


def _slope(times: Callable[[Tensor], Tensor], units: Sequence[Tensor], norms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Twice the derivative of the last norm by the Gram matrix, as two factors: ``left @ right.mT``."""
    pull = units[-1]
    left, right = [], []
    for step in reversed(range(len(norms))):
        left += [pull, units[step]]
        right += [units[step], pull]
        if step:
            along = times(pull)
            turned = along - units[step] * (units[step] * along).sum(-2, keepdim=True)
            pull = turned * reciprocal(norms[step - 1])
    return torch.cat(left, -1), torch.cat(right, -1)


@dataclass(frozen=True)
class _ByPower:
    """The rule of the same value where the Gram matrix is formed."""

    steps: int
    squared: bool

    def __call__(self, product: Float[Tensor, "*b m m"]) -> tuple[Tensor, Tensor]:
        times = less_identity(product).matmul
        unit = _start(product.shape[-1], product.dtype, product.device).unsqueeze(-1)
        units, norms = _iterate(times, unit.expand(*product.shape[:-1], 1), self.steps)
        left, right = _slope(times, units, norms)
        norm = norms[-1]
        if self.squared:
            left, norm = 2 * norm * left, norm**2
        return norm.squeeze((-2, -1)), left @ right.mT


@cached(64)
def _start(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    vector = scattered(size)
    length: Tensor = torch.linalg.vector_norm(vector)
    return (vector / length).to(device, dtype)


@dataclass(frozen=True, kw_only=True)
class SRIP:
    """:func:`spectral_restricted_isometry` of a layer's kernel matrix."""

    name: ClassVar[str] = "SRIP"
    long_name: ClassVar[str] = "spectral restricted isometry"
    source: ClassVar[str] = "Bansal, Chen, Wang 2018, https://arxiv.org/abs/1810.09102"
    use: ClassVar[str] = "layers are large, so that its products with vectors are far cheaper than a Gram matrix"
    steps: int = 2
    squared: bool = False
    side: Side = "smaller"
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)
        check_count("steps", self.steps, most=MOST)

    def __call__(self, kernel: Kernel) -> Tensor:
        return spectral_restricted_isometry(kernel.matrix, steps=self.steps, squared=self.squared, side=self.side)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side] | None:
        """See :func:`orthokit.gram.of_gram`."""
        m = o if is_by_rows((o, n), self.side) else n
        return (_ByPower(self.steps, self.squared), self.side) if m <= SMALL else None

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows, or columns if tall."""
        return polar(kernel.matrix)
