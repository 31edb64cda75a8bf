"""Singular values of the kernel matrix, and ranks read off them."""

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.gram import full_precision, gram

__all__ = ["effective_rank", "singular_values", "spectrum_of", "stable_rank"]

EXACT = 2048
"""Size of the smaller side up to which singular values far below the largest are exact."""


@full_precision
def singular_values(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b m"]:
    """Singular values of each kernel matrix, largest first; all equal where the smaller side is orthogonal.

    >>> singular_values(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    tensor([2., 1.])
    """
    if matrix.dtype == torch.float64:
        return spectrum_of(matrix, gram(matrix, "smaller"))
    return _by_triangle(matrix)


def spectrum_of(matrix: Float[Tensor, "*b o n"], product: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m"]:
    """Singular values of matrices in float64, largest first, from the Gram matrix of their smaller side.

    Several times faster than a decomposition of the matrix. Squaring loses the smallest: where one falls below ``1e-5`` of the
    largest, matrices with a smaller side up to :data:`EXACT` are decomposed themselves; those of larger ones stay accurate to
    ``1e-8`` of the largest.
    """
    squares = torch.linalg.eigvalsh(product)
    if product.shape[-1] <= EXACT and bool((squares[..., 0] < 1e-10 * squares[..., -1]).any()):
        return _by_triangle(matrix)
    sigma: Tensor = squares.clamp(min=0).sqrt().flip(-1)
    return sigma


def _by_triangle(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b m"]:
    # The triangular factor has the same singular values and is square: several times faster, and as accurate.
    factor = torch.linalg.qr(matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT, mode="r").R
    sigma: Tensor = torch.linalg.svdvals(factor)
    return sigma


def effective_rank(sigma: Float[Tensor, "*b m"]) -> Float[Tensor, "*b"]:
    """``exp`` of the entropy of ``sigma / sum(sigma)`` (Roy and Vetterli, 2007); 0 where all are zero.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    tensor(2.)
    """
    total = sigma.sum(-1, keepdim=True)
    p = sigma / torch.where(total == 0, 1.0, total)
    return torch.where(total.squeeze(-1) == 0, 0.0, torch.special.entr(p).sum(-1).exp())


def stable_rank(sigma: Float[Tensor, "*b m"]) -> Float[Tensor, "*b"]:
    """``sum(sigma^2) / max(sigma)^2``; 0 where all are zero.

    >>> stable_rank(torch.tensor([2.0, 1.0]))
    tensor(1.2500)
    """
    largest = sigma.amax(-1, keepdim=True)
    return (sigma / torch.where(largest == 0, 1.0, largest)).square().sum(-1)
