"""The polar factor: the nearest matrix with orthonormal rows or columns."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.gram import frobenius, residual, upcast

__all__ = ["polar"]


@torch.no_grad()
def polar(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o n"]:
    """The nearest matrix with orthonormal rows (columns, if tall); no gradient.

    Where filters do not determine all of its directions (copies, zero filters) the rest is chosen, always in the same way: the
    result is orthonormal to rounding whatever the matrix.

    Raises:
        FloatingPointError: an entry is NaN or infinite.

    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    largest = upcast(matrix).abs().amax((-2, -1), keepdim=True)
    if not largest.isfinite().all():
        raise FloatingPointError(
            f"no orthonormal matrix is nearest to one with entries that are NaN or infinite ({matrix.dtype})"
        )
    scaled = upcast(matrix) / torch.where(largest == 0, 1.0, largest)  # no square overflows, or vanishes
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    # The polar factor of the square part alone, times an orthonormal basis, which is complete whatever the rank.
    basis, square = torch.linalg.qr((scaled if is_tall else scaled.mT).to(torch.float64 if matrix.is_cpu else scaled.dtype))
    nearest: Tensor = (basis @ _polar_by_svd(square) if matrix.is_cpu else basis @ _polar_by_products(square)).to(matrix.dtype)
    return nearest if is_tall else nearest.mT


def _polar_by_svd(square: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """Singular vectors are complete, also where singular values are zero."""
    left, _, right = torch.linalg.svd(square)
    return cast(Tensor, left @ right)


def _polar_by_products(square: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """The same by Newton-Schulz iteration, much faster on an accelerator; matrices near a lower rank by :func:`_polar_by_svd`."""
    # The Frobenius norm bounds the largest singular value; the iteration converges from all below sqrt(3).
    norm = frobenius(square)[..., None, None]
    x = square / torch.where(norm == 0, 1.0, norm)
    # The smallest singular value grows by 3/2 a step until it is near one, then converges quadratically.
    for _ in range(40):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    singular = residual(x).abs().amax((-2, -1)) > 1e3 * torch.finfo(x.dtype).eps
    return torch.where(singular[..., None, None], _polar_by_svd(square), x) if singular.any() else x
