"""Singular values of the kernel matrix, and ranks read off them."""

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.gram import full_precision


@full_precision
def singular_values(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b m"]:
    """Singular values of each kernel matrix, largest first; all equal where the smaller side is orthogonal.

    >>> singular_values(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    tensor([2., 1.])
    """
    o, n = matrix.shape[-2:]
    # The triangular factor has the same singular values and is square: several times faster, and as accurate.
    factor = torch.linalg.qr(matrix if o >= n else matrix.mT, mode="r").R
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
