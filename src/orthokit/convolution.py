"""Self-convolutions: inner products of all filters of a convolution with all shifted filters, the cheapest way."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orthokit.constants import cached
from orthokit.gram import (
    distance_to_identity,
    gram,
    is_differentiated,
    is_transformed,
    less_identity,
    outside_autocast,
    sum_of_squares,
)

__all__ = ["convolution_distance", "self_convolution"]


def self_convolution(weight: Float[Tensor, "..."], stride: tuple[int, ...]) -> Float[Tensor, "*b o o lags"]:
    """Inner products of all filters with all filters shifted: the Gram matrix of a convolution operator.

    Args:
        weight: ``(*b, o, i, *spatial)``.
        stride: one entry per spatial dimension, in taps.

    Returns:
        ``(*b, o, o, lags)``: every shift by a multiple of the stride at which two filters overlap, ``2 floor((k - 1) / s) + 1``
        of them per dimension. Lag zero is in the middle.
    """
    if not stride:
        return gram(weight).unsqueeze(-1)
    batch, size = weight.shape[: -2 - len(stride)], weight.shape[-len(stride) :]
    o, i = weight.shape[-2 - len(stride) : -len(stride)]
    many = batch.numel()
    padding = [(k - 1) // s * s for k, s in zip(size, stride, strict=True)]
    flat = weight.reshape(many, o, i, *size)
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    # The filters are the images and the filters; each kernel of the batch is a group.
    images = flat.transpose(0, 1).reshape(o, many * i, *size)
    products = convolve(images, flat.reshape(many * o, i, *size), stride=stride, padding=padding, groups=many)
    return products.reshape(o, many, o, -1).transpose(0, 1).reshape(*batch, o, o, -1)


def convolution_distance(weight: Float[Tensor, "..."], stride: tuple[int, ...], less: int = 0) -> Float[Tensor, "*b"]:
    """``||conv(K, K) - I_0||_F^2 - less``: :func:`self_convolution` less the identity at lag zero, the cheapest way.

    Filters that overlap at lag zero alone need one Gram matrix. At stride 1 the value is, by Parseval's theorem, the mean of
    ``||A A^H - I||^2`` over the frequencies of a grid as large as the lags, with ``A`` the kernel's transform there. A kernel of
    3x3 then takes 37 products of the size ``o x o x i`` instead of 81, on the smaller side of ``A``.

    Args:
        weight: ``(*b, o, i, *spatial)``.
        stride: one entry per spatial dimension, in taps.
        less: subtracted from the value; the least possible value here leaves no rounding error of its own size.
    """
    size = weight.shape[weight.ndim - len(stride) :]
    if all(k <= s for k, s in zip(size, stride, strict=True)):
        return distance_to_identity(weight.flatten(weight.ndim - len(stride) - 1), less=less)
    if any(s > 1 for s in stride):
        products = self_convolution(weight, stride)
        products[..., products.shape[-1] // 2].diagonal(dim1=-2, dim2=-1).sub_(1)
        return products.square().sum((-3, -2, -1)) - less
    flat = weight.flatten(weight.ndim - len(stride))
    *batch, o, i, taps = flat.shape
    table = _transform(tuple(size), weight.dtype, weight.device)
    spectrum = (table @ flat.reshape(-1, taps).mT).reshape(-1, *batch, o, i)
    if o > i:
        spectrum = spectrum.mT
    real, pairs = spectrum[0], len(spectrum) // 2
    value = _of_spectrum(spectrum[1 : 1 + pairs], spectrum[1 + pairs :])
    return (distance_to_identity(real) + 2 * value) / len(spectrum) + (max(0, o - i) - less)


@cached(64)
def _transform(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "frequencies taps"]:
    """The discrete Fourier transform of a real kernel, on ``2 k - 1`` points a dimension, as a matrix of real rows.

    Rows: frequency zero; the real parts of half of the other frequencies, whose conjugates the rest are; their imaginary parts.
    """
    grid = torch.cartesian_prod(*(torch.arange(1 - k, k, dtype=torch.float64) / (2 * k - 1) for k in size)).reshape(-1, len(size))
    taps = torch.cartesian_prod(*(torch.arange(k, dtype=torch.float64) for k in size)).reshape(-1, len(size))
    half = 2 * math.pi * grid[len(grid) // 2 + 1 :] @ taps.T  # the second half of the grid; the first half is its negative
    table = torch.cat([torch.ones(1, len(taps), dtype=torch.float64), half.cos(), -half.sin()])
    return table.to(device, dtype)


def _of_spectrum(x: Float[Tensor, "f *b o i"], y: Float[Tensor, "f *b o i"]) -> Float[Tensor, "*b"]:
    """``sum_f ||A_f A_f^H - I||^2`` of matrices ``A_f = X_f + i Y_f``."""
    if is_transformed():  # Note [transforms]
        real, imaginary = _complex_residual(x, y)
        return (sum_of_squares(real) + sum_of_squares(imaginary)).sum(0)
    return cast(Tensor, _OfSpectrum.apply(x, y))  # type: ignore[no-untyped-call]


class _OfSpectrum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "f *b o i"], y: Float[Tensor, "f *b o i"]) -> Float[Tensor, "*b"]:
        real, imaginary = _complex_residual(x, y)
        ctx.save_for_backward(x, y, real, imaginary)
        return (sum_of_squares(real) + sum_of_squares(imaginary)).sum(0)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor, Tensor]:
        x, y, real, imaginary = ctx.saved_tensors
        with outside_autocast(x.device):
            if is_differentiated():
                real, imaginary = _complex_residual(x, y)
            scale = 4 * of_value[..., None, None]
            real, imaginary = scale * real, scale * imaginary
            return real @ x - imaginary @ y, real @ y + imaginary @ x


def _complex_residual(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of ``A A^H - I``: three products."""
    product = y @ x.mT
    return less_identity(x @ x.mT + y @ y.mT), product - product.mT
