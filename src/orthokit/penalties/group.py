"""Group orthogonalization.

Kurtz, Bar, Giryes: "Group Orthogonalization Regularization For Vision Models Adaptation and Robustness", 2023,
https://arxiv.org/abs/2306.10001 (GOR). Orthogonality inside groups of filters only, which is cheaper and asks for less.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_count, check_options, short_repr
from orthokit.gram import distance_to_identity, full_precision
from orthokit.kernel import Kernel

__all__ = ["GOR", "KINDS", "group_orthogonality"]

KINDS = ("inter", "intra")


@full_precision
def group_orthogonality(
    matrix: Float[Tensor, "*b o n"], *, kind: Literal["inter", "intra"] = "inter", groups: int | None = None
) -> Float[Tensor, "*b"]:
    """``||G - I||_F^2`` of the smaller side, summed over groups of filters.

    Zero where the filters of each group are orthonormal (or, of groups larger than ``n``, their columns).

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        kind: ``"inter"`` takes contiguous groups; ``"intra"`` the first filters of all groups together, the second, and so on.
        groups: their number, a divisor of ``o``; by default the largest divisor that is at most 32 and at most ``o / 4``.

    >>> k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> group_orthogonality(k, groups=2), group_orthogonality(k, kind="intra", groups=2)
    (tensor(0.), tensor(4.))

    Source: Kurtz, Bar, Giryes 2023, arXiv 2306.10001; the default where ``o`` does not divide ours.
    """
    check_choice("kind", kind, KINDS)
    o = matrix.shape[-2]
    if groups is None:
        groups = next(g for g in range(min(32, max(1, o // 4)), 0, -1) if o % g == 0)
    check_count("groups", groups, 1, o)
    if o % groups:
        raise ValueError(f"groups must divide the number of filters: {o} filters in {groups} groups")
    grouped = matrix.unflatten(-2, (groups, o // groups))
    if kind == "intra":
        grouped = grouped.transpose(-3, -2)
    return distance_to_identity(grouped, "smaller").sum(-1)


@dataclass(frozen=True, kw_only=True)
class GOR:
    """:func:`group_orthogonality` of a layer's kernel matrix."""

    name: ClassVar[str] = "GOR"
    long_name: ClassVar[str] = "group orthogonalization"
    source: ClassVar[str] = "Kurtz, Bar, Giryes 2023, https://arxiv.org/abs/2306.10001"
    use: ClassVar[str] = "layers are followed by GroupNorm (use its number of groups), or are so large that a Gram matrix is dear"
    squared: ClassVar[bool] = True
    kind: Literal["inter", "intra"] = "inter"
    groups: int | None = None
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)
        if self.groups is not None:
            check_count("groups", self.groups)

    def __call__(self, kernel: Kernel) -> Tensor:
        return group_orthogonality(kernel.matrix, kind=self.kind, groups=self.groups)
