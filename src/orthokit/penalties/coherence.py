"""Mutual coherence, of the residual and of the directions.

Bansal, Chen, Wang: "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018,
https://arxiv.org/abs/1810.09102 (MC): the largest entry of the Gram residual, in which lengths count too. The coherence of frame
theory (Welch, "Lower bounds on the maximum cross correlation of signals", 1974) looks at directions only.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_options, short_repr
from orthokit.gram import (
    GramRule,
    Side,
    cosine_rule,
    full_precision,
    is_large,
    less_identity,
    of_gram,
    plus_transpose,
    row_map,
    row_values,
)
from orthokit.kernel import Kernel

__all__ = ["MC", "NORMS", "Coherence", "coherence", "mutual_coherence"]

NORMS = ("max", "rowsum")


@full_precision
def mutual_coherence(matrix: Float[Tensor, "*b o n"], *, norm: Literal["max", "rowsum"] = "max") -> Float[Tensor, "*b"]:
    """``max_ij |(K K^T - I)_ij|``, or the largest sum of absolute values in a row.

    Zero at orthonormal rows. Only the worst pair (or row) of each kernel gets a gradient.

    >>> mutual_coherence(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))  # residual [[3, 2], [2, 1]]
    tensor(3.)
    >>> mutual_coherence(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), norm="rowsum")
    tensor(5.)

    Source: Bansal, Chen, Wang 2018, arXiv 1810.09102.
    """
    check_choice("norm", norm, NORMS)
    return of_gram(matrix, RULES[norm])


def _by_largest_entry(product: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor]:
    value, slope = _largest(less_identity(product), (-2, -1))
    return value, plus_transpose(slope)


def _by_largest_row(product: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor]:
    difference = less_identity(product)
    value, of_rows = _largest(row_values(lambda rows: rows.abs().sum(-1), difference), (-1,))
    sign = difference.sign_() if is_large(difference) else difference.sign()
    return value, plus_transpose(sign.mul_(of_rows.unsqueeze(-1)))


RULES: dict[str, GramRule] = {"max": _by_largest_entry, "rowsum": _by_largest_row}


def _largest(entries: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The largest absolute value, and its derivative, in which equal ones have equal parts."""
    if is_large(entries):
        value = row_values(lambda rows: rows.abs().amax(-1), entries).amax(-1)
        equal, signs = row_map(partial(_signs_of, value[..., None, None]), entries)
        return value, signs.div_(equal.sum(-1)[..., None, None])
    sizes = entries.abs()
    value = sizes.amax(dims, keepdim=True)
    hit = sizes == value
    return value.squeeze(dims), torch.where(hit, entries.sign(), 0.0) / hit.sum(dims, keepdim=True)


def _signs_of(value: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Number of entries of each row with this absolute value, and their signs."""
    hit = entries.abs() == value
    return hit.sum(-1), torch.where(hit, entries.sign(), 0.0)


@full_precision
def coherence(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b"]:
    """``max |c_ij|``, the largest absolute cosine between two filters; 0 for a single filter.

    Zero at mutually orthogonal filters of any length; never below :func:`orthokit.relax.welch_bound` for filters of length 0.1 or
    more. The cosine of a shorter one counts in proportion to its length (see Note [short filters] in :mod:`orthokit.gram`).

    >>> coherence(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    tensor(0.7071)

    Source: Welch 1974; as a penalty ours.
    """
    return of_gram(matrix, *cosine_rule(_by_largest_cosine, matrix.shape[-1]))


def _by_largest_cosine(squares: Float[Tensor, "*b o"], c: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor, Tensor]:
    value, by_cosines = _largest(c, (-2, -1))
    value = value.masked_fill(squares.isinf().any(-1), torch.nan)
    return value, torch.zeros_like(squares), plus_transpose(by_cosines)


@dataclass(frozen=True, kw_only=True)
class MC:
    """:func:`mutual_coherence` of a layer's kernel matrix."""

    name: ClassVar[str] = "MC"
    long_name: ClassVar[str] = "mutual coherence of the residual"
    source: ClassVar[str] = "Bansal, Chen, Wang 2018, https://arxiv.org/abs/1810.09102"
    use: ClassVar[str] = "you reproduce a result that used it"
    squared: ClassVar[bool] = False
    norm: Literal["max", "rowsum"] = "max"
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, kernel: Kernel) -> Tensor:
        return mutual_coherence(kernel.matrix, norm=self.norm)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side]:
        """See :func:`orthokit.gram.of_gram`."""
        return RULES[self.norm], "rows"


@dataclass(frozen=True)
class Coherence:
    """:func:`coherence` of a layer's kernel matrix."""

    name: ClassVar[str] = "Coherence"
    long_name: ClassVar[str] = "the largest cosine"
    source: ClassVar[str] = "Welch 1974, https://doi.org/10.1109/TIT.1974.1055219"
    use: ClassVar[str] = "you want to look at the worst pair, or hold it below a bound"
    squared: ClassVar[bool] = False

    def __call__(self, kernel: Kernel) -> Tensor:
        return coherence(kernel.matrix)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side]:
        """See :func:`orthokit.gram.of_gram`."""
        return cosine_rule(_by_largest_cosine, n)
