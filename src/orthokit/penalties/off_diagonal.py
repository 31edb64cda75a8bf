"""Orthogonal regularization without the diagonal.

Brock, Donahue, Simonyan: "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019,
https://arxiv.org/abs/1809.11096 (BigGAN). Filters are pushed apart, their lengths left free.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from orthokit.gram import GramRule, Side, full_precision, of_gram, sum_of_squares
from orthokit.kernel import Kernel

__all__ = ["OffDiagonal", "off_diagonal_orthogonality"]


@full_precision
def off_diagonal_orthogonality(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b"]:
    """``1/2 ||(K K^T) o (1 - I)||_F^2``: the squared inner product of every pair of filters, summed.

    Zero at mutually orthogonal filters of any length, and at zero filters. The half makes the gradient
    ``2 ((K K^T) o (1 - I)) K``, which the published BigGAN code adds.

    >>> off_diagonal_orthogonality(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    tensor(4.)

    Source: Brock, Donahue, Simonyan 2019, arXiv 1809.11096.
    """
    o, n = matrix.shape[-2:]
    if o <= n:
        return of_gram(matrix, _by_pairs)
    # All entries are those of the smaller Gram matrix, squared and summed; less the diagonal.
    return (of_gram(matrix, _by_entries, "cols") - 0.5 * matrix.square().sum(-1).square().sum(-1)).relu()


def _by_entries(product: Float[Tensor, "*b m m"]) -> tuple[Tensor, Tensor]:
    return 0.5 * sum_of_squares(product), 2 * product


def _by_pairs(product: Float[Tensor, "*b m m"]) -> tuple[Tensor, Tensor]:
    product.diagonal(dim1=-2, dim2=-1).zero_()
    return _by_entries(product)


@dataclass(frozen=True)
class OffDiagonal:
    """:func:`off_diagonal_orthogonality` of a layer's kernel matrix."""

    name: ClassVar[str] = "OffDiagonal"
    long_name: ClassVar[str] = "BigGAN's orthogonal regularization"
    source: ClassVar[str] = "Brock, Donahue, Simonyan 2019, https://arxiv.org/abs/1809.11096"
    use: ClassVar[str] = "you train a generator whose lengths are held by spectral normalisation"
    squared: ClassVar[bool] = True

    def __call__(self, kernel: Kernel) -> Tensor:
        return off_diagonal_orthogonality(kernel.matrix)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side] | None:
        """See :func:`orthokit.gram.of_gram`."""
        return (_by_pairs, "rows") if 1 < o <= n else None  # of a single filter no pair would show a NaN
