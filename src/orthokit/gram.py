"""Gram arithmetic on batches of matrices ``(*b, o, n)``: o filters (rows) of n weights each.

Note [full precision]: every measure runs in float32 or better and outside autocast, whatever the model's dtype. Under
bfloat16 autocast ``||K K^T - I||^2`` near orthogonality is off by orders of magnitude and its gradient points elsewhere.

Note [memory]: the Gram matrix of 12,000 filters takes 576 MB. A rule may overwrite the one that it gets and make one more;
everything else of that size is made by blocks of rows.

Note [transforms]: gradients that are known in closed form are ``autograd.Function``s, which save more than inputs and outputs and
thus cannot take part in the transforms of ``torch.func``, nor in forward-mode differentiation. There the same values come from
their plain, differentiable operations.

Note [short filters]: the pull on the direction of a filter is proportional to ``1 / ||k_i||``, which throws a zero-initialised
layer far away as soon as its filters have moved at all. Penalties therefore weigh the direction of each filter by
``w_i = min(1, ||k_i|| / SHORT)``: cosines become ``w_i w_j c_ij``, with the weights held fixed in every derivative. The pull is
then at most ``1 / SHORT`` and still perpendicular to the filter; nothing changes for filters of length ``SHORT`` or more (ours).
Reports show the plain cosines.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "LARGE",
    "SHORT",
    "CosineRule",
    "GramRule",
    "Lengths",
    "MatrixMeasure",
    "ResidualNorm",
    "RuleOfCosines",
    "Side",
    "by_filters",
    "check_weight",
    "cosine_rule",
    "cosines",
    "directions",
    "distance_rule",
    "distance_to_identity",
    "frobenius",
    "full_precision",
    "gram",
    "inverse_lengths",
    "is_by_rows",
    "is_differentiated",
    "is_finite",
    "is_large",
    "is_transformed",
    "is_visible",
    "lengths",
    "lengths_and_cosines",
    "less_identity",
    "of_gram",
    "outside_autocast",
    "plus_transpose",
    "reciprocal",
    "residual",
    "row_blocks",
    "row_map",
    "row_products",
    "row_values",
    "squares_and_weighted_directions",
    "sum_of_squares",
    "upcast",
    "whole",
]

Side = Literal["rows", "cols", "smaller"]
SIDES: tuple[Side, ...] = ("rows", "cols", "smaller")

SHORT = 0.1
"""Length below which a filter's direction counts less: see Note [short filters]."""

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
        with outside_autocast(matrix.device):
            value = measure(upcast(matrix), *args, **kwargs)
        # A single NaN filter has no pair to show it: there the weights themselves, too.
        if not (is_finite(value) and (matrix.shape[-2] > 1 or is_finite(matrix))):
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
    # Their sum is neither NaN nor infinite then, as far as values that could train go.
    return not is_visible(value) or math.isfinite(value.detach().sum().item())


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast for what is computed on ``device``; costs nothing where there is none."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def is_visible(value: Tensor) -> bool:
    """Whether a decision may depend on the numbers: not on an accelerator, which would stall, nor in a compiler or transform."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def is_transformed() -> bool:
    """Whether ``torch.func`` (grad, vmap, jvp, ...) or forward-mode differentiation is at work: see Note [transforms]."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


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
    return matrix @ matrix.mT if is_by_rows(matrix.shape, side) else matrix.mT @ matrix


def is_by_rows(shape: Sequence[int], side: Side) -> bool:
    """Whether ``side`` means the rows of matrices ``(*b, o, n)`` of this shape."""
    return side == "rows" or (side == "smaller" and shape[-2] <= shape[-1])


def residual(matrix: Float[Tensor, "*b o n"], side: Side = "rows") -> Float[Tensor, "*b m m"]:
    """The Gram matrix less the identity: zero exactly where that side's vectors are orthonormal."""
    return less_identity(gram(matrix, side))


def less_identity(product: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """``product - I``, in place."""
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product


def distance_to_identity(
    matrix: Float[Tensor, "*b o n"], side: Side = "rows", *, squared: bool = True, less: int = 0
) -> Float[Tensor, "*b"]:
    """``||G - I||_F``, squared or not, by :func:`of_gram` on the smaller side; ``less`` is taken from the square, exactly."""
    return of_gram(matrix, *distance_rule(matrix.shape[-2], matrix.shape[-1], side, squared=squared, less=less))


def distance_rule(
    o: int, n: int, side: Side = "rows", *, squared: bool = True, less: int = 0, times: int = 1
) -> tuple["GramRule", Side]:
    """:func:`distance_to_identity`, ``times`` the square, as a rule for :func:`of_gram`.

    The sides differ by a constant: ``||K K^T - I||^2 = ||K^T K - I||^2 + o - n``.
    """
    more = {"rows": max(0, o - n), "cols": max(0, n - o), "smaller": 0}[side] * times - less
    return ResidualNorm(more, squared, times), "smaller"


@dataclass(frozen=True)
class ResidualNorm:
    """The rule of ``times ||G - I||_F^2 + more``, or of its root."""

    more: int
    squared: bool
    times: int

    def __call__(self, product: Float[Tensor, "*b m m"]) -> tuple[Tensor, Tensor]:
        difference = less_identity(product)
        if self.squared:
            return self.times * sum_of_squares(difference) + self.more, (4 * self.times) * difference
        norm = frobenius(difference)
        if self.more:
            norm = (norm.square() + self.more).sqrt()
        return norm, (2 * reciprocal(norm))[..., None, None] * difference


def reciprocal(norm: Tensor) -> Tensor:
    """``1 / norm``, kept finite. Where the norm is 0, so is whatever we multiply it with."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.4).reciprocal()


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
    return _squares_and_directions(matrix, False)[1]


def cosines(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o o"]:
    """``c_ij = <u_i, u_j>`` for ``i > j``, in the strict lower triangle; zero elsewhere."""
    return gram(directions(matrix)).tril(-1)


def squares_and_weighted_directions(matrix: Float[Tensor, "*b o n"]) -> tuple[Float[Tensor, "*b o"], Float[Tensor, "*b o n"]]:
    """Squared lengths ``||k_i||^2`` and directions ``w_i u_i``, weighed as Note [short filters] says.

    Both have gradient zero at a filter without direction; that of the directions is perpendicular to each filter.
    """
    return _squares_and_directions(matrix, True)


def _squares_and_directions(matrix: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    if is_transformed():  # Note [transforms]
        return _plain_squares_and_directions(matrix, weighted)
    squares, unit = cast(tuple[Tensor, Tensor], _SquaresAndDirections.apply(matrix, weighted))  # type: ignore[no-untyped-call]
    return squares, unit


def inverse_lengths(squares: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """``1 / ||k_i||``; 0 for a filter without direction, or whose square overflowed."""
    return F.threshold(squares, torch.finfo(squares.dtype).tiny, math.inf).rsqrt()  # NaN stays visible


def _weighted(inverse: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """``w_i / ||k_i||`` of the inverse lengths, with ``w_i = min(1, ||k_i|| / SHORT)`` fixed: see Note [short filters]."""
    if not inverse.requires_grad and not is_transformed():
        return inverse.clamp(max=1 / SHORT)
    return inverse * (SHORT * inverse.detach()).reciprocal().clamp(max=1)


def _plain_squares_and_directions(matrix: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    squares = matrix.square().sum(-1)
    inverse = inverse_lengths(squares).masked_fill(squares.isinf(), torch.nan)
    return squares, matrix * (_weighted(inverse) if weighted else inverse).unsqueeze(-1)


class _SquaresAndDirections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
        squares, unit = _plain_squares_and_directions(matrix, weighted)
        ctx.weighted = weighted
        ctx.save_for_backward(matrix, squares, unit)
        return squares, unit

    @staticmethod
    def backward(ctx: Any, of_squares: Tensor, of_directions: Tensor) -> tuple[Tensor, None]:
        matrix, squares, unit = ctx.saved_tensors
        inverse = inverse_lengths(squares)
        turning = _weighted(inverse) if ctx.weighted else inverse
        # Moving a filter along itself does not turn it: the part of the pull that is parallel to it is taken away.
        along = (of_directions * unit).sum(-1) * inverse.square()
        return of_directions * turning.unsqueeze(-1) + (2 * of_squares - along).unsqueeze(-1) * matrix, None


LARGE = 2**22
"""Entries of Gram matrices from which on a rule works by blocks of rows: see Note [memory]."""


def is_large(product: Tensor) -> bool:
    """Whether a rule must not hold several tensors of this size; not where its operations are differentiated."""
    return product.numel() > LARGE and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def row_blocks(matrix: Float[Tensor, "*b o m"]) -> Iterator[slice]:
    """Rows in blocks of about an eighth of :data:`LARGE` entries each."""
    o = matrix.shape[-2]
    many = max(1, LARGE // 8 * o // matrix.numel())
    yield from (slice(start, min(start + many, o)) for start in range(0, o, many))


def row_values(function: Callable[[Tensor], Tensor], matrix: Float[Tensor, "*b o m"]) -> Float[Tensor, "*b o"]:
    """``function(matrix)``, one number a row, by blocks where it is large."""
    if not is_large(matrix):
        return function(matrix)
    # Into one tensor: small ones that stay between freed blocks would keep their memory from being used again.
    values = matrix.new_empty(matrix.shape[:-1])
    for rows in row_blocks(matrix):
        values[..., rows] = function(matrix[..., rows, :])
    return values


def row_map(function: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Float[Tensor, "*b o m"]) -> tuple[Tensor, Tensor]:
    """``function(matrix)``, one number a row and a matrix of the same shape, by blocks where it is large."""
    if not is_large(matrix):
        return function(matrix)
    values, mapped = matrix.new_empty(matrix.shape[:-1]), torch.empty_like(matrix)
    for rows in row_blocks(matrix):
        values[..., rows], mapped[..., rows, :] = function(matrix[..., rows, :])
    return values, mapped


def row_products(a: Float[Tensor, "*b o m"], b: Float[Tensor, "*b o m"]) -> Float[Tensor, "*b o"]:
    """The inner product of each row of ``a`` with that of ``b``."""
    if not is_large(a):
        return (a * b).sum(-1)
    values = a.new_empty(a.shape[:-1])
    for rows in row_blocks(a):
        values[..., rows] = (a[..., rows, :] * b[..., rows, :]).sum(-1)
    return values


def plus_transpose(matrix: Float[Tensor, "*b o o"]) -> Float[Tensor, "*b o o"]:
    """``matrix + matrix^T``, in place where it is large."""
    if not is_large(matrix):
        return matrix + matrix.mT
    blocks = [*row_blocks(matrix)]
    for index, rows in enumerate(blocks):
        for columns in blocks[index:]:
            both = matrix[..., rows, columns] + matrix[..., columns, rows].mT
            matrix[..., rows, columns] = both
            matrix[..., columns, rows] = both.mT
    return matrix


GramRule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``G -> (value, slope)``: twice the derivative of the value by the entries of a Gram matrix, as a symmetric matrix.

A rule is a value: a function, or a frozen dataclass of its options. Layers whose rules are equal are worked on together.
"""


def of_gram(matrix: Float[Tensor, "*b o n"], rule: GramRule, side: Side = "rows") -> Float[Tensor, "*b"]:
    """The value that ``rule`` gives a Gram matrix of ``matrix``; the slope, known with it, makes the gradient one product.

    ``slope @ K`` by rows, ``K @ slope`` by columns: nothing else of size ``o x n`` is made. A rule consists of differentiable
    operations, for whoever differentiates twice.

    A penalty that is such a value and nothing else offers its rule: see :class:`orthokit.penalties.base.HasGramRule`.
    """
    by_rows = is_by_rows(matrix.shape, side)
    if is_transformed():  # Note [transforms]
        return rule(gram(matrix, "rows" if by_rows else "cols"))[0]
    return cast(Tensor, _OfGram.apply(matrix, rule, by_rows))  # type: ignore[no-untyped-call]


class _OfGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rule: GramRule, by_rows: bool) -> Tensor:
        value, slope = rule(gram(matrix, "rows" if by_rows else "cols"))
        ctx.rule, ctx.by_rows = rule, by_rows
        ctx.save_for_backward(matrix, slope)
        return value

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor, None, None]:
        matrix, slope = ctx.saved_tensors
        with outside_autocast(matrix.device):  # whoever calls backward under it
            if is_differentiated():
                slope = ctx.rule(gram(matrix, "rows" if ctx.by_rows else "cols"))[1]
            slope = of_value[..., None, None] * slope
            return slope @ matrix if ctx.by_rows else matrix @ slope, None, None


def is_differentiated() -> bool:
    """Whether the backward pass at hand is to be differentiated: what it saved as numbers must then get a graph of its own."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


CosineRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(squares, c) -> (value, by_squares, by_cosines)``: squared lengths ``(*b, o)`` and weighted cosines ``(*b, o, o)``, symmetric
with zeros on the diagonal; derivatives by the squares, and by each pair's cosine, symmetric."""


def cosine_rule(rule: CosineRule, n: int) -> tuple[GramRule, Side]:
    """For :func:`of_gram`: the value that ``rule`` gives squared lengths and weighted cosines, all of one Gram matrix.

    A filter whose square is ``tiny(dtype)`` or less has no direction: its cosines are zero, and have gradient zero. Nor can a
    filter of ``n = 1`` weight turn: its gradient is one of length alone, without the rounding of what should cancel.
    """
    return RuleOfCosines(rule, n > 1), "rows"


@dataclass(frozen=True)
class RuleOfCosines:
    """A rule of squared lengths and weighted cosines as one of the Gram matrix; ``turning``: whether filters have directions."""

    rule: CosineRule
    turning: bool

    def __call__(self, product: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor]:
        lengths, c = lengths_and_cosines(product)
        value, by_squares, by_cosines = self.rule(lengths.squares, c if self.turning else c.detach())
        if not self.turning:
            by_cosines = torch.zeros_like(by_cosines)
        return value, by_filters(lengths, 2 * by_squares, by_cosines, row_products(by_cosines, c))


class Lengths(NamedTuple):
    """Lengths of filters as a rule of cosines needs them: ``||k_i||^2``, ``1 / ||k_i||`` and ``w_i / ||k_i||``."""

    squares: Float[Tensor, "*b o"]
    inverse: Float[Tensor, "*b o"]
    weighted: Float[Tensor, "*b o"]


def lengths_and_cosines(product: Float[Tensor, "*b o o"]) -> tuple[Lengths, Float[Tensor, "*b o o"]]:
    """The filters' lengths, and their weighted cosines (Note [short filters]) with zeros on the diagonal.

    The cosines take the place of the Gram matrix.
    """
    diagonal = product.diagonal(dim1=-2, dim2=-1)
    squares = diagonal.clone()
    diagonal.zero_()
    inverse = inverse_lengths(squares)
    weighted = _weighted(inverse)
    return Lengths(squares, inverse, weighted), product.mul_(weighted.unsqueeze(-1)).mul_(weighted.unsqueeze(-2))


def by_filters(
    lengths: Lengths,
    lengthwise: Float[Tensor, "*b o"],
    by_cosines: Float[Tensor, "*b o o"],
    along: Float[Tensor, "*b o"],
    times: Float[Tensor, "*b 1"] | None = None,
) -> Float[Tensor, "*b o o"]:
    """The slope of a rule, from its derivatives by squared lengths, twice, and by weighted cosines.

    Moving a filter along itself changes no cosine: the part of the pull that is parallel to the filter, ``along`` (the row sums
    of ``by_cosines * c``), is taken away. ``times`` multiplies these two.
    """
    _, inverse, weighted = lengths
    factor, parallel = (weighted, inverse) if times is None else (weighted * times, inverse * times)
    # In place where nobody differentiates: Note [memory].
    slope = by_cosines.mul_(factor.unsqueeze(-1)) if is_large(by_cosines) else by_cosines * factor.unsqueeze(-1)
    slope = slope.mul_(weighted.unsqueeze(-2))
    slope.diagonal(dim1=-2, dim2=-1).copy_(lengthwise - along * parallel * inverse)
    return slope
