"""Evenly dispersed filters: penalties of angles rather than of cosines.

The EADK and EADC regularizers of the public code besonder/Evenly-Dispersing-Regularization: filters of unit length whose
angles, or those of all their shifts, are as near to a right angle as asked for.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_flag, check_number, check_options, short_repr
from orthokit.convolution import self_convolution
from orthokit.gram import (
    GramRule,
    Side,
    cosine_rule,
    full_precision,
    of_gram,
    row_map,
    squares_and_weighted_directions,
)
from orthokit.kernel import Kernel

__all__ = ["EADC", "EADK", "angular_dispersion", "convolution_angular_dispersion"]


@full_precision
def angular_dispersion(
    matrix: Float[Tensor, "*b o n"], *, theta: float = math.pi / 2, weight: float = 0.1, double: bool = False
) -> Float[Tensor, "*b"]:
    """``sum_i (1 - nu_i^2)^2 + weight sum_{i != j} hinge(angle_ij)^2``.

    The hinge of an angle is how much nearer than ``theta`` it is to 0 or pi; at ``theta = pi/2`` its distance from a right angle.
    Zero at unit filters all of whose angles are in ``[theta, pi - theta]``: orthonormal rows at ``theta = pi/2``. Exact copies
    have no angular gradient. The cosine of a filter shorter than 0.1 counts in proportion to its length (ours; see Note [short
    filters] in :mod:`orthokit.gram`).

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        theta: in radians, above 0, at most pi/2.
        weight: of the angles.
        double: adds the same of the columns, with target ``o/n`` for their squared lengths.

    >>> angular_dispersion(torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]), weight=1.0)  # twice (pi/4)^2
    tensor(1.2337)

    Source: besonder/Evenly-Dispersing-Regularization (EADK).
    """
    _check(theta, weight)
    check_flag("double", double)
    o, n = matrix.shape[-2:]
    value = of_gram(matrix, *_rule(n, 1.0, theta, weight))
    return value + of_gram(matrix.mT, *_rule(o, o / n, theta, weight)) if double else value


@full_precision
def convolution_angular_dispersion(
    weights: Float[Tensor, "..."], *, stride: tuple[int, ...] = (), theta: float = math.pi / 2, weight: float = 0.1
) -> Float[Tensor, "..."]:
    """:func:`angular_dispersion` of every filter and every shifted filter that it overlaps, itself shifted too.

    Zero at ``theta = pi/2`` where :func:`orthokit.convolution_orthogonality` is.

    Args:
        weights: ``(*b, o, i, *spatial)``.
        stride: one entry per spatial dimension; with a dilation ``d``, ``s / gcd(s, d)``.
        theta: in radians, above 0, at most pi/2.
        weight: of the angles.

    >>> convolution_angular_dispersion(torch.tensor([[[1.0, 1.0]]]) / 2**0.5, stride=(1,), weight=1.0)  # twice (pi/6)^2
    tensor(0.5483)

    Source: besonder/Evenly-Dispersing-Regularization (EADC).
    """
    _check(theta, weight)
    batch = weights.ndim - 2 - len(stride)
    squares, unit = squares_and_weighted_directions(weights.flatten(batch + 1))
    if unit.shape[-1] == 1:  # a filter of one weight cannot turn
        unit = unit.detach()
    products = self_convolution(unit.reshape(weights.shape), stride)
    o, lags = products.shape[-2:]
    itself = torch.zeros(o, o, lags, dtype=torch.bool, device=products.device)
    itself.diagonal()[lags // 2] = True
    others = torch.where(itself, 0.0, products)
    return (1 - squares).square().sum(-1) + weight * _hinge(others, theta)[0].square().sum((-3, -2, -1))


def _rule(n: int, target: float, theta: float, weight: float) -> tuple[GramRule, Side]:
    return cosine_rule(_Dispersion(target, theta, weight), n)


@dataclass(frozen=True)
class _Dispersion:
    """The rule of squared lengths near ``target`` and angles near ``theta``."""

    target: float
    theta: float
    weight: float

    def __call__(self, squares: Float[Tensor, "*b o"], c: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor, Tensor]:
        longer = squares - self.target
        near, by_cosines = row_map(partial(_squared_hinge, theta=self.theta, weight=self.weight), c)
        # Each pair counts twice: as (i, j) and as (j, i).
        return longer.square().sum(-1) + self.weight * near.sum(-1), 2 * longer, by_cosines


def _squared_hinge(c: Float[Tensor, "*b o m"], theta: float, weight: float) -> tuple[Tensor, Tensor]:
    """The squared hinges of each row, summed; and ``weight`` times the derivative by each pair, which counts twice."""
    near, slope = _hinge(c, theta)
    return near.square().sum(-1), 4 * weight * near * slope


def _hinge(cosine: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """``max(0, theta - arccos|c|)``, accurate near 0, and its slope.

    Copies, as far as rounding tells, are at angle 0 and have no slope: there that of arccos is infinite.
    """
    copies = cosine.abs() >= 1 - 8 * torch.finfo(cosine.dtype).eps
    beside = torch.where(copies, 0.0, cosine)
    beyond = torch.where(copies, math.pi / 2, beside.abs().arcsin())  # arcsin|c| = pi/2 - arccos|c|
    near = (beyond - (math.pi / 2 - theta)).relu()
    return near, torch.where(copies | (near == 0), 0.0, cosine.sign() * (1 - beside.square()).rsqrt())


def _check(theta: float, weight: float) -> None:
    check_number("theta", theta, 0, math.pi / 2, open_low=True)
    check_number("weight", weight)


@dataclass(frozen=True, kw_only=True)
class EADK:
    """:func:`angular_dispersion` of a layer's kernel matrix."""

    name: ClassVar[str] = "EADK"
    long_name: ClassVar[str] = "evenly dispersed angles of the kernel"
    source: ClassVar[str] = "public code, https://github.com/besonder/Evenly-Dispersing-Regularization"
    use: ClassVar[str] = "tall layers should end at tight frames, or nearly parallel filters should come apart"
    squared: ClassVar[bool] = True
    theta: float = math.pi / 2
    weight: float = 0.1
    double: bool = False
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)
        _check(self.theta, self.weight)

    def __call__(self, kernel: Kernel) -> Tensor:
        return angular_dispersion(kernel.matrix, theta=self.theta, weight=self.weight, double=self.double)

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side] | None:
        """See :func:`orthokit.gram.of_gram`."""
        return None if self.double else _rule(n, 1.0, self.theta, self.weight)


@dataclass(frozen=True, kw_only=True)
class EADC:
    """:func:`convolution_angular_dispersion` of a layer; a transposed convolution as its adjoint."""

    name: ClassVar[str] = "EADC"
    long_name: ClassVar[str] = "evenly dispersed angles of the convolution"
    source: ClassVar[str] = "public code, https://github.com/besonder/Evenly-Dispersing-Regularization"
    use: ClassVar[str] = "you compare with the public code"
    squared: ClassVar[bool] = True
    theta: float = math.pi / 2
    weight: float = 0.1
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)
        _check(self.theta, self.weight)

    def __call__(self, kernel: Kernel) -> Tensor:
        weights, stride = kernel.convolution
        return convolution_angular_dispersion(weights, stride=stride, theta=self.theta, weight=self.weight)
