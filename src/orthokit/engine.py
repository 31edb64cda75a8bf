"""Closed-form gradients for penalties that depend on a Gram matrix only. No autograd graph is built.

The penalties are those with a rule: see :class:`orthokit.penalties.base.HasGramRule`.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.gram import GramRule, is_differentiated, outside_autocast

GRAMS = 2**21
"""Bytes of Gram matrices up to which they are worked on together, small enough for a core's cache."""


def large(device: torch.device) -> int:
    """Weights with at least this many elements are used in place; smaller ones are stacked."""
    return 2**14 if device.type == "cpu" else 2**19


class _Piece(NamedTuple):
    """Weights of one shape as matrices: copied into a stack, or a large one as it is.

    Whatever the order of the entries of all filters, their inner products are the same: weights in ``channels_last`` are not
    rearranged. ``order`` is that of the dimensions in memory, None if it is the usual one.
    """

    weights: Sequence[Tensor]
    order: list[int] | None
    matrix: Float[Tensor, "k o n"]

    def split(self, product: Float[Tensor, "k o n"]) -> list[Tensor]:
        """What has the shape of the matrices, as tensors with the shape of the weights."""
        if self.order is None:
            return list(product.view(-1, *self.weights[0].shape).unbind())
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        size = [self.weights[0].shape[dim] for dim in self.order]
        return [each.permute(back) for each in product.view(-1, *size).unbind()]

    def as_matrix(self, grad: Tensor) -> Float[Tensor, "k o n"] | None:
        """A view of the single weight's gradient with the matrix's shape, or None if its memory layout differs."""
        ordered = grad if self.order is None else grad.permute(self.order)
        return ordered.view(self.matrix.shape) if ordered.is_contiguous() else None


@dataclass(frozen=True, eq=False)
class Batch:
    """Weights ``(groups * o, ...)`` whose Gram matrices are of one size and follow one rule.

    Attributes:
        parts: the weights; those of a part have one shape.
        groups: of each weight.
        rule: of the Gram matrices.
        by_rows: whether they are the rows', or the columns'.
        scale: multiplies value and gradient.
        trains: whether a gradient is wanted.
    """

    parts: Sequence[Sequence[Tensor]]
    groups: int
    rule: GramRule
    by_rows: bool
    scale: float
    trains: bool = True

    @property
    def m(self) -> int:
        """Rows of a Gram matrix."""
        first = self.parts[0][0].shape
        return first[0] // self.groups if self.by_rows else first[1:].numel()

    @property
    def layout(self) -> Hashable:
        """What batches must have in common to be joined."""
        first = self.parts[0][0]
        return self.rule, self.by_rows, self.m, self.groups, self.scale, self.trains, first.dtype, first.device

    @torch.no_grad()
    def measure(self) -> "Measured":
        """The summed value of these weights, and its gradient."""
        pieces = [piece for part in self.parts for piece in self._pieces(part)]
        matrices = [piece.matrix for piece in pieces]
        counts = [len(matrix) for matrix in matrices]
        products = matrices[0].new_empty(sum(counts), self.m, self.m)
        with outside_autocast(products.device):  # Note [full precision]
            for matrix, product in zip(matrices, products.split(counts), strict=True):
                torch.bmm(*((matrix, matrix.mT) if self.by_rows else (matrix.mT, matrix)), out=product)
            values, slope = self.rule(products)
        value = values.sum()
        return Measured(self, value if self.scale == 1 else self.scale * value, slope, pieces)

    def _pieces(self, weights: Sequence[Tensor]) -> Iterator[_Piece]:
        first = weights[0]
        shape = -1, first.shape[0] // self.groups, first.shape[1:].numel()
        order = None
        if self.by_rows and not first.is_contiguous():
            order = [0, *sorted(range(1, first.ndim), key=first.stride, reverse=True)]
        alone = first.numel() >= large(first.device)
        for some in [[weight] for weight in weights] if alone else [weights]:
            ordered = some if order is None else [weight.permute(order) for weight in some]
            yield _Piece(some, order, (torch.stack(tuple(ordered)) if len(some) > 1 else ordered[0]).reshape(shape))


def in_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same weights in few batches, of at most :data:`GRAMS` bytes of Gram matrices each."""
    together: dict[Hashable, list[Batch]] = {}
    for batch in batches:
        together.setdefault(batch.layout, []).append(batch)
    for alike in together.values():
        first = alike[0]
        most = max(1, GRAMS // (first.groups * first.m**2 * first.parts[0][0].element_size()))
        parts: list[Sequence[Tensor]] = []
        room = most
        for weights in [part for batch in alike for part in batch.parts]:
            while weights:
                parts.append(weights[:room])
                weights, room = weights[room:], room - len(parts[-1])
                if not room:
                    yield replace(first, parts=parts)
                    parts, room = [], most
        if parts:
            yield replace(first, parts=parts)


class Measured(NamedTuple):
    """The value of a batch, and the slope of each Gram matrix: twice the derivative by its entries."""

    batch: Batch
    value: Tensor
    slope: Float[Tensor, "k m m"]
    pieces: Sequence[_Piece]

    def _factors(self) -> Iterator[tuple[_Piece, tuple[Tensor, Tensor]]]:
        """With each piece the two matrices whose product is its gradient, before the scale."""
        slopes = self.slope.split([len(piece.matrix) for piece in self.pieces])
        for piece, slope in zip(self.pieces, slopes, strict=True):
            yield piece, (slope, piece.matrix) if self.batch.by_rows else (piece.matrix, slope)

    def gradients(self, of_value: Tensor) -> list[Tensor]:
        """The gradient of each weight, given the derivative by the value."""
        scaled = self._replace(slope=self.batch.scale * of_value * self.slope)
        with outside_autocast(self.slope.device):  # whoever calls backward under it
            return [each for piece, factors in scaled._factors() for each in piece.split(torch.bmm(*factors))]

    @torch.no_grad()
    def add_grads_(self, scale: float | Tensor, wanted: Collection[int] | None) -> None:
        """Add ``scale`` times the gradients to ``.grad`` of those weights whose ``id`` is wanted."""
        scale = scale * self.batch.scale
        with outside_autocast(self.slope.device):
            for piece, factors in self._factors():
                if wanted is not None and not any(id(weight) in wanted for weight in piece.weights):
                    continue
                if len(piece.weights) == 1 and not isinstance(scale, Tensor):
                    matrix = piece.as_matrix(grad_of(piece.weights[0]))
                    if matrix is not None:
                        matrix.baddbmm_(*factors, alpha=scale)
                        continue
                add_grads_(piece.weights, piece.split(torch.bmm(*factors)), scale, wanted)


def total(batches: Sequence[Batch], measure: Callable[[Batch], Measured], again: Callable[[], Tensor]) -> Tensor:
    """The sum of the batches' values, of which autograd knows the gradient by the weights.

    Args:
        batches: weights that follow a rule.
        measure: gives the values.
        again: gives the sum by way of operations that can be differentiated twice.
    """
    weights = [weight for batch in batches for part in batch.parts for weight in part]
    value: Tensor = _Total.apply(batches, measure, again, *weights)  # type: ignore[no-untyped-call]
    return value


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, batches: Sequence[Batch], measure: Callable[[Batch], Measured], again: Callable[[], Tensor], *weights: Tensor
    ) -> Tensor:
        found = [measure(batch) for batch in batches]
        ctx.again, ctx.weights = again, weights
        ctx.shapes = [(each.batch, [(piece.weights, piece.order) for piece in each.pieces]) for each in found]
        ctx.save_for_backward(*(tensor for each in found for tensor in (each.slope, *(piece.matrix for piece in each.pieces))))
        return add_up([each.value for each in found])

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        if is_differentiated():
            of_weights = torch.autograd.grad(ctx.again(), ctx.weights, of_value, create_graph=True, allow_unused=True)
            return None, None, None, *of_weights
        gradients: list[Tensor] = []
        saved = iter(ctx.saved_tensors)
        for batch, shapes in ctx.shapes:
            slope = next(saved)
            measured = Measured(batch, of_value, slope, [_Piece(weights, order, next(saved)) for weights, order in shapes])
            gradients += measured.gradients(of_value.to(slope.device))
        return None, None, None, *gradients


def add_up(values: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, on the device of the first."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def add_grads_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], scale: float | Tensor, wanted: Collection[int] | None
) -> None:
    """Add ``scale`` times the gradients to ``.grad`` of those parameters whose ``id`` is wanted; None: of all."""
    grads, added = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if wanted is None or id(parameter) in wanted:
            grads.append(grad_of(parameter))
            added.append(gradient)
    if grads and isinstance(scale, Tensor):
        torch._foreach_add_(grads, list(torch._foreach_mul(added, scale)))
    elif grads:
        torch._foreach_add_(grads, added, alpha=float(scale))


def grad_of(parameter: Tensor) -> Tensor:
    """``parameter.grad``, zeros where there was none."""
    if parameter.grad is None:
        # Fused optimizers want the gradient laid out as the parameter, e.g. channels_last.
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
