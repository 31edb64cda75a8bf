"""Double soft orthogonality.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (DSO). Rows and columns at once.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from orthokit.gram import GramRule, Side, distance_rule, full_precision, of_gram
from orthokit.kernel import Kernel
from orthokit.polar import polar

__all__ = ["DSO", "double_soft_orthogonality"]


@full_precision
def double_soft_orthogonality(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b"]:
    """``||K K^T - I||_F^2 + ||K^T K - I||_F^2``.

    Zero at orthogonal square kernels only; otherwise never below ``|o - n|``. The two terms differ by the constant ``n - o``, so
    only the smaller Gram matrix is formed.

    >>> double_soft_orthogonality(torch.eye(3, 5))
    tensor(2.)

    Source: Bansal, Chen, Wang 2018, arXiv 1810.09102.
    """
    return of_gram(matrix, *_rule(*matrix.shape[-2:]))


def _rule(o: int, n: int) -> tuple[GramRule, Side]:
    return distance_rule(o, n, "smaller", times=2, less=-abs(o - n))


@dataclass(frozen=True)
class DSO:
    """:func:`double_soft_orthogonality` of a layer's kernel matrix."""

    name: ClassVar[str] = "DSO"
    long_name: ClassVar[str] = "double soft orthogonality"
    source: ClassVar[str] = "Bansal, Chen, Wang 2018, https://arxiv.org/abs/1810.09102"
    use: ClassVar[str] = "you reproduce a result that used it"
    squared: ClassVar[bool] = True

    def __call__(self, kernel: Kernel) -> Tensor:
        return double_soft_orthogonality(kernel.matrix)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side]:
        """See :func:`orthokit.gram.of_gram`."""
        return _rule(o, n)

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows, or columns if tall."""
        return polar(kernel.matrix)
