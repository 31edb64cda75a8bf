"""Evenly dispersed filters: penalties of angles rather than of cosines.

The EADK and EADC regularizers of the public code besonder/Evenly-Dispersing-Regularization: filters of unit length whose
angles, or those of all their shifts, are as near to a right angle as asked for.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_number, short_repr
from orthokit.gram import cosines, directions, full_precision, self_convolution
from orthokit.kernel import Kernel


@full_precision
def angular_dispersion(
    matrix: Float[Tensor, "*b o n"], *, theta: float = math.pi / 2, weight: float = 0.1, double: bool = False
) -> Float[Tensor, "*b"]:
    """``sum_i (1 - nu_i^2)^2 + weight sum_{i != j} hinge(angle_ij)^2``.

    The hinge of an angle is how much nearer than ``theta`` it is to 0 or pi; at ``theta = pi/2`` its distance from a right angle.
    Zero at unit filters all of whose angles are in ``[theta, pi - theta]``: orthonormal rows at ``theta = pi/2``. Exact copies
    have no angular gradient.

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
    o, n = matrix.shape[-2:]
    value = _dispersion(matrix, 1.0, theta, weight)
    return value + _dispersion(matrix.mT, o / n, theta, weight) if double else value


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
    length = weights.flatten(batch + 1).square().sum(-1)
    unit = directions(weights.flatten(batch + 1)).reshape(weights.shape)
    products = self_convolution(unit, stride)
    o, lags = products.shape[-2:]
    itself = torch.zeros(o, o, lags, dtype=torch.bool, device=products.device)
    itself.diagonal()[lags // 2] = True
    others = torch.where(itself, 0.0, products)
    return (1 - length).square().sum(-1) + weight * _hinge(others, theta).square().sum((-3, -2, -1))


def _dispersion(matrix: Float[Tensor, "*b o n"], target: float, theta: float, weight: float) -> Float[Tensor, "*b"]:
    length = matrix.square().sum(-1)
    # Each pair twice: as (i, j) and as (j, i).
    return (target - length).square().sum(-1) + 2 * weight * _hinge(cosines(matrix), theta).square().sum((-2, -1))


def _hinge(cosine: Tensor, theta: float) -> Tensor:
    """``max(0, theta - arccos|c|)``, accurate near 0. At copies, where the slope of arccos is infinite, it has no gradient."""
    size = cosine.abs()
    copies = size >= 1 - torch.finfo(cosine.dtype).eps
    beside = torch.where(copies, 0.0, size).arcsin()  # arcsin|c| = pi/2 - arccos|c|
    return (torch.where(copies, size.detach().clamp(max=1).arcsin(), beside) - (math.pi / 2 - theta)).relu()


def _check(theta: float, weight: float) -> None:
    check_number("theta", theta, 0, math.pi / 2, open_low=True)
    check_number("weight", weight)


@dataclass(frozen=True, kw_only=True)
class EADK:
    """:func:`angular_dispersion` of a layer's kernel matrix."""

    squared: ClassVar[bool] = True
    theta: float = math.pi / 2
    weight: float = 0.1
    double: bool = False
    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check(self.theta, self.weight)

    def __call__(self, kernel: Kernel) -> Tensor:
        return angular_dispersion(kernel.matrix, theta=self.theta, weight=self.weight, double=self.double)


@dataclass(frozen=True, kw_only=True)
class EADC:
    """:func:`convolution_angular_dispersion` of a layer; a transposed convolution as its adjoint."""

    squared: ClassVar[bool] = True
    theta: float = math.pi / 2
    weight: float = 0.1
    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check(self.theta, self.weight)

    def __call__(self, kernel: Kernel) -> Tensor:
        weights, stride = kernel.convolution
        return convolution_angular_dispersion(weights, stride=stride, theta=self.theta, weight=self.weight)
