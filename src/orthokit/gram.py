"""Gram arithmetic on batches of matrices ``(*b, o, n)``: o filters (rows) of n weights each.

Note [full precision]: every measure runs in float32 or better and outside autocast, whatever the model's dtype. Under
bfloat16 autocast ``||K K^T - I||^2`` near orthogonality is off by orders of magnitude and its gradient points elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orthokit.checks import check_count

Side = Literal["rows", "cols", "smaller"]
SIDES: tuple[Side, ...] = ("rows", "cols", "smaller")

P = ParamSpec("P")
MatrixMeasure = Callable[Concatenate[Tensor, P], Tensor]


def full_precision(measure: MatrixMeasure[P]) -> MatrixMeasure[P]:
    """Make ``measure(matrix, ...)`` follow Note [full precision], and check what goes in and what comes out.

    The wrapped function raises ``TypeError`` unless the matrix is a dense real floating-point tensor, ``ValueError`` if it has
    fewer than two dimensions or an empty one, and ``FloatingPointError`` if the value is NaN or infinite. The last is not
    checked on an accelerator or under ``torch.compile``, where looking would stall the device: there the value itself is NaN
    or infinite.
    """

    @functools.wraps(measure)
    def wrapper(matrix: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        check_weight(matrix)
        matrix = whole(matrix)
        if matrix.ndim < 2:
            raise ValueError(f"{measure.__name__} needs matrices (*b, o, n), one filter a row; got {tuple(matrix.shape)}")
        with torch.autocast(matrix.device.type, enabled=False):
            value = measure(upcast(matrix), *args, **kwargs)
        # A single NaN filter has no pair to show it, hence the weights themselves too.
        if not (is_finite(value) and is_finite(matrix.detach().sum(dtype=value.dtype))):
            raise FloatingPointError(
                f"{measure.__name__} is not finite: the largest |weight| is {matrix.detach().abs().max().item():g} in "
                f"{matrix.dtype}. Training has diverged, or the weights were never initialised; lower the learning rate "
                "or load finite weights."
            )
        return value

    return wrapper


def whole(weight: Tensor) -> Tensor:
    """``weight``, gathered if it is sharded over devices: every rank must ask, and gets its own part of the gradient back."""
    # A DTensor is known by its method: importing its class takes longer than importing this package.
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else cast(Tensor, gather())


def upcast(weight: Tensor) -> Tensor:
    """``weight`` in float32 or better; a gradient too large for its own precision is clipped on the way back, not infinite."""
    if weight.dtype.itemsize >= 4:
        return weight
    limit = torch.finfo(weight.dtype).max
    upcasted = weight.float()
    if upcasted.requires_grad:
        upcasted.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return upcasted


def is_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite, as far as can be seen without stalling: True on an accelerator or when compiling."""
    return not is_visible(value) or bool(value.isfinite().all())


def is_visible(value: Tensor) -> bool:
    """Whether a decision may depend on the numbers: not on an accelerator, which would stall, nor when compiling."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_weight(weight: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``weight`` is a dense, real, floating-point, non-empty tensor."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"expected a tensor of matrices (*b, o, n); got {type(weight).__name__}. Layers and kernels are measured by the "
            "classes, e.g. orthokit.SO()(orthokit.kernel_of(layer))"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"sparse weights ({weight.layout}) have no Gram matrix here; convert with .to_dense()")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weights must be real floating-point numbers; got {weight.dtype}")
    if weight.is_meta:
        raise TypeError("weights on the meta device have no values; materialise the model (.to_empty, then initialise) first")
    if 0 in weight.shape:
        raise ValueError(f"weights of shape {tuple(weight.shape)} hold no numbers")


def gram(matrix: Float[Tensor, "*b o n"], side: Side = "rows") -> Float[Tensor, "*b m m"]:
    """``K K^T`` (rows), ``K^T K`` (cols), or the smaller of the two."""
    o, n = matrix.shape[-2:]
    by_rows = side == "rows" or (side == "smaller" and o <= n)
    return matrix @ matrix.mT if by_rows else matrix.mT @ matrix


def residual(matrix: Float[Tensor, "*b o n"], side: Side = "rows") -> Float[Tensor, "*b m m"]:
    """The Gram matrix less the identity: zero exactly where that side's vectors are orthonormal."""
    product = gram(matrix, side)
    return product - torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)


def sum_of_squares(matrix: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    """Squared Frobenius norm."""
    return matrix.square().sum((-2, -1))


def frobenius(matrix: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    """Frobenius norm, with gradient 0 where it is 0."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norm


def lengths(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o"]:
    """Euclidean length of each filter, with gradient 0 at a zero filter."""
    length: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return length


def directions(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o n"]:
    """Filters scaled to unit length; one shorter than ``sqrt(tiny(dtype))`` has no direction and becomes zero."""
    length = lengths(matrix).unsqueeze(-1)
    # `<=` so that NaN passes and stays visible, as does a length that overflowed; the inner `where` keeps the gradient finite.
    short = length <= torch.finfo(matrix.dtype).tiny ** 0.5
    divisor = torch.where(short, 1.0, torch.where(length.isinf(), torch.nan, length))
    return torch.where(short, 0.0, matrix / divisor)


@torch.no_grad()
def polar(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o n"]:
    """The nearest matrix with orthonormal rows (columns, if tall), by Newton-Schulz iteration; no gradient.

    Directions whose singular value is below a millionth of the largest stay as they are, or zero: nothing says where to.

    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    tall = upcast(matrix if matrix.shape[-2] > matrix.shape[-1] else matrix.mT)
    basis, x = torch.linalg.qr(tall)[:2]  # the iteration runs on the square factor alone
    # The Frobenius norm bounds the largest singular value; the iteration converges from all below sqrt(3).
    norm = frobenius(x)[..., None, None]
    x = x / torch.where(norm == 0, 1.0, norm)
    # The smallest singular value grows by 3/2 a step until it is near one, then converges quadratically.
    for _ in range(40):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    nearest: Tensor = (basis @ x).to(matrix.dtype)
    return nearest if matrix.shape[-2] > matrix.shape[-1] else nearest.mT


def cosines(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o o"]:
    """``c_ij = <u_i, u_j>`` for ``i > j``, in the strict lower triangle; zero elsewhere."""
    return gram(directions(matrix)).tril(-1)


def squares_and_cosines(matrix: Float[Tensor, "*b o n"]) -> tuple[Float[Tensor, "*b o"], Float[Tensor, "*b o o"]]:
    """Squared lengths ``||k_i||^2`` and :func:`cosines`, of one Gram matrix; their gradient is one product of the same size.

    A filter whose square is ``tiny(dtype)`` or less has no direction: its cosines are zero, and have gradient zero.
    """
    squares, c = cast(tuple[Tensor, Tensor], _SquaresAndCosines.apply(matrix))  # type: ignore[no-untyped-call]
    return squares, c


def _inverse_lengths(squares: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """``1 / ||k_i||``; 0 for a filter without direction, NaN where the square overflowed."""
    inverse = torch.where(squares.isinf(), torch.nan, squares.rsqrt())
    return torch.where(squares <= torch.finfo(squares.dtype).tiny, 0.0, inverse)  # `<=` so that NaN passes and stays visible


class _SquaresAndCosines(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        product = matrix @ matrix.mT
        squares = product.diagonal(dim1=-2, dim2=-1).clone()
        inverse = _inverse_lengths(squares)
        return squares, (product * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).tril(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, of_squares: Tensor, of_cosines: Tensor) -> Tensor:
        matrix, squares, c = ctx.saved_tensors
        inverse = _inverse_lengths(squares).unsqueeze(-1)
        lower = of_cosines.tril(-1)
        pull = lower + lower.mT
        # Moving a filter along itself changes no cosine: what of the pull is parallel to it is taken away.
        along = (pull * (c + c.mT)).sum(-1)
        turned = (pull - torch.diag_embed(along)) @ (inverse * matrix)
        gradient: Tensor = inverse * turned + 2 * of_squares.unsqueeze(-1) * matrix
        return gradient


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


def welch_bound(o: int, n: int) -> float:
    """The least possible ``max |c_ij|`` of ``o`` directions in ``n`` dimensions, as far as closed forms tell.

    0 for ``o <= n``; the Welch bound ``sqrt((o - n) / (n (o - 1)))`` on tall layers; the orthoplex bound ``1 / sqrt(n)`` beyond
    ``o > n (n + 1) / 2``, where Welch's cannot be reached.

    >>> welch_bound(64, 64), round(welch_bound(64, 16), 3), welch_bound(11, 4)
    (0.0, 0.218, 0.5)
    """
    check_count("o", o)
    check_count("n", n)
    if o <= n:
        return 0.0
    if o > n * (n + 1) // 2:
        return float(n**-0.5)
    return float(((o - n) / (n * (o - 1))) ** 0.5)
