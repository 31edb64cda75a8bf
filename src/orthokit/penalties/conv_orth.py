"""Orthogonal convolutions: the layer as an operator on images, not its kernel matrix alone.

Wang, Chen, Chakraborty, Yu: "Orthogonal Convolutional Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.12207 (OCNN): the
self-convolution of the kernel, less the identity at lag zero. We pad as the paper says, so that every lag counts; the published
code pads by 1 and misses some. Achour, Malgouyres, Mamalet: "Existence, Stability and Scalability of Orthogonal Convolutional
Neural Networks", JMLR 2022, https://arxiv.org/abs/2108.05623 (Lorth): the same less the least value that the layer's shape
allows, so that zero means orthogonal for tall layers too. Lorth here also knows kernels smaller than their stride.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_flag, check_options, short_repr
from orthokit.convolution import convolution_distance
from orthokit.gram import full_precision
from orthokit.kernel import Kernel

__all__ = ["ConvOrth", "Lorth", "convolution_orthogonality", "lorth"]


@full_precision
def convolution_orthogonality(
    weight: Float[Tensor, "..."], *, stride: tuple[int, ...] = (), squared: bool = True
) -> Float[Tensor, "..."]:
    """``||conv(K, K) - I_0||_F^2``: filters are orthonormal, and orthogonal to every shifted filter that they overlap.

    Zero where the rows of the convolution, as an operator with circular or full padding, are orthonormal. Never zero where there
    are more outputs than inputs: see :func:`lorth`.

    Args:
        weight: ``(*b, o, i, *spatial)``.
        stride: one entry per spatial dimension; with a dilation ``d``, ``s / gcd(s, d)``.
        squared: False gives the norm itself.

    >>> convolution_orthogonality(torch.tensor([[[1.0, 1.0]]]), stride=(1,))  # lags -1, 0, 1: 1, 2, 1
    tensor(3.)
    >>> convolution_orthogonality(torch.tensor([[[1.0, 1.0]]]), stride=(2,))  # lag 0 alone: 2
    tensor(1.)

    Source: Wang, Chen, Chakraborty, Yu 2020, arXiv 1911.12207.
    """
    check_flag("squared", squared)
    square = convolution_distance(weight, stride)
    return square if squared else square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


@full_precision
def lorth(weight: Float[Tensor, "..."], *, stride: tuple[int, ...] = ()) -> Float[Tensor, "..."]:
    """``||conv(K, K) - I_0||_F^2 - max(0, o - i prod_d min(k_d, s_d))``: zero exactly at an orthogonal convolution.

    Row-orthogonal where the layer has no more outputs than inputs, column-orthogonal where it has more: then all singular
    values of the operator (circular padding) are 1.

    Args:
        weight: ``(*b, o, i, *spatial)``.
        stride: one entry per spatial dimension; with a dilation ``d``, ``s / gcd(s, d)``.

    >>> lorth(torch.tensor([[[1.0]], [[0.0]]]), stride=(1,))  # two outputs of one input
    tensor(0.)

    Source: Achour, Malgouyres, Mamalet 2022, arXiv 2108.05623; the minimum for kernels smaller than the stride ours.
    """
    o, i, *size = weight.shape[weight.ndim - 2 - len(stride) :]
    inputs = i * math.prod([min(k, s) for k, s in zip(size, stride, strict=True)])
    return convolution_distance(weight, stride, less=max(0, o - inputs)).relu()


@dataclass(frozen=True, kw_only=True)
class ConvOrth:
    """:func:`convolution_orthogonality` of a layer; a transposed convolution as its adjoint."""

    name: ClassVar[str] = "ConvOrth"
    long_name: ClassVar[str] = "orthogonal convolution (OCNN)"
    source: ClassVar[str] = "Wang, Chen, Chakraborty, Yu 2020, https://arxiv.org/abs/1911.12207"
    use: ClassVar[str] = "the layer as an operator matters: stable signals through depth, overlapping windows, few strides"
    squared: bool = True
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, kernel: Kernel) -> Tensor:
        weight, stride = kernel.convolution
        return convolution_orthogonality(weight, stride=stride, squared=self.squared)


@dataclass(frozen=True)
class Lorth:
    """:func:`lorth` of a layer; a transposed convolution as its adjoint."""

    name: ClassVar[str] = "Lorth"
    long_name: ClassVar[str] = "an orthogonal convolution, zero where possible"
    source: ClassVar[str] = "Achour, Malgouyres, Mamalet 2022, https://arxiv.org/abs/2108.05623"
    use: ClassVar[str] = "you build a Lipschitz network, or need a value that is zero exactly at orthogonality"
    squared: ClassVar[bool] = True

    def __call__(self, kernel: Kernel) -> Tensor:
        weight, stride = kernel.convolution
        return lorth(weight, stride=stride)
