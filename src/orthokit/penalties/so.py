"""Soft orthogonality.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (SO). The distance of the Gram matrix from the identity. ``squared=False`` on the smaller side
is ``orth_dist`` of Wang, Chen, Chakraborty, Yu: "Orthogonal Convolutional Neural Networks", CVPR 2020,
https://arxiv.org/abs/1911.12207.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_flag, check_options, short_repr
from orthokit.gram import SIDES, GramRule, Side, distance_rule, distance_to_identity, full_precision
from orthokit.kernel import Kernel
from orthokit.polar import polar

__all__ = ["SO", "soft_orthogonality"]


@full_precision
def soft_orthogonality(matrix: Float[Tensor, "*b o n"], *, side: Side = "rows", squared: bool = True) -> Float[Tensor, "*b"]:
    """``||G - I||_F^2`` with ``G = K K^T`` (rows), ``K^T K`` (cols), or the smaller of the two.

    Zero where that side's vectors are orthonormal; never below ``o - n`` by rows of a tall kernel, nor ``n - o`` by columns
    of a wide one.

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        side: which Gram matrix.
        squared: False gives the norm itself, whose pull does not fade near orthogonality.

    >>> soft_orthogonality(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # Gram [[2, 1], [1, 1]]
    tensor(3.)

    Source: Bansal, Chen, Wang 2018, arXiv 1810.09102.
    """
    check_choice("side", side, SIDES)
    check_flag("squared", squared)
    return distance_to_identity(matrix, side, squared=squared)


@dataclass(frozen=True, kw_only=True)
class SO:
    """:func:`soft_orthogonality` of a layer's kernel matrix."""

    name: ClassVar[str] = "SO"
    long_name: ClassVar[str] = "soft orthogonality"
    source: ClassVar[str] = "Bansal, Chen, Wang 2018, https://arxiv.org/abs/1810.09102"
    use: ClassVar[str] = (
        "you want filters as near to orthogonal as float32 allows (SO), or values that compare with the literature (SO²)"
    )
    side: Side = "rows"
    squared: bool = True
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, kernel: Kernel) -> Tensor:
        return soft_orthogonality(kernel.matrix, side=self.side, squared=self.squared)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side]:
        """See :func:`orthokit.gram.of_gram`."""
        return distance_rule(o, n, self.side, squared=self.squared)

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows, or columns if tall."""
        return polar(kernel.matrix)
