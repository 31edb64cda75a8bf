"""From the layers of a model to a penalty's values and gradients, in one way.

:meth:`Engine.read` sorts layers into stacks: parameters that are read alike, or kernels that are computed. Where the penalty has
a rule of Gram matrices (:class:`orthokit.penalties.base.HasGramRule`), stacks are joined into batches, whose gradient is known in
closed form: no graph is built, and large weights are not copied. The other stacks go through autograd.

:func:`orthokit.gram.of_gram` does the same for one matrix that is part of somebody's graph.
"""

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.advice import check_shape, name_layers
from orthokit.audit import check_places, edges_to
from orthokit.checks import warn_once
from orthokit.grads import add_to_grads, grad_of
from orthokit.gram import GramRule, Side, is_by_rows, is_differentiated, is_finite, is_transformed, outside_autocast, upcast
from orthokit.in_use import Facts
from orthokit.kernel import Kernel, KernelMeasure, View, leaves, plain_view, plain_weight, sources, sqrt_filters, views
from orthokit.layers import Layer
from orthokit.penalties.base import Relaxes, gram_rule_of, is_squared
from orthokit.stacks import Computed, Form, Plain, Reading, Stack
from orthokit.wrappers import reshard

__all__ = ["GRAMS", "Batch", "Engine", "Measured", "large"]

GRAMS = 2**21
"""Bytes of Gram matrices up to which they are worked on together, small enough for a core's cache."""


def large(device: torch.device) -> int:
    """Weights with at least this many elements are used in place; smaller ones are stacked."""
    return 2**14 if device.type == "cpu" else 2**19


class Engine:
    """Measures a penalty on layers of a model: values, and gradients by the parameters behind the weights.

    Weights are read at every call, in float32 or better and outside autocast. Nothing is stored on the model.

    Args:
        model: the model; a layer that is no longer in its place there raises ``ValueError`` at the next call.
        layers: layers of the model.
        penalty: one value per leading dimension of a kernel.
        scale: multiplies an unsquared penalty of each layer, given the layer's own kernel.
        include_frozen: count layers that do not train.

    Attributes:
        ranks: the transition dimension of each layer by name, of a penalty that relaxes.
        costs: multiplications that each layer's Gram matrix takes.
        zeros: the layers that were all zero when the engine was made.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        penalty: KernelMeasure,
        *,
        scale: Callable[[Kernel], float] | None = None,
        include_frozen: bool = False,
    ) -> None:
        self.model, self.layers, self.penalty, self.scale, self.include_frozen = model, layers, penalty, scale, include_frozen
        self.ranks: dict[str, int] = {}
        self.costs: list[int] = []
        self.zeros: list[Layer] = []
        self._shapes: list[torch.Size] = []
        self._readings: list[Reading | None] = []
        self._facts: list[Facts] = []
        # A reading that a user registered may make different kernels of one parameter.
        self._owns = [layer.weight if layer.weight in views(layer.module) else "" for layer in layers]
        self._rules: dict[tuple[Reading, torch.Size], tuple[GramRule, Side] | None] = {}
        self._edges = edges_to(model, layers)
        self._known: dict[tuple[View, int | None, torch.Size | None], Reading] = {}
        for layer in layers:
            kernel = layer.kernel
            if isinstance(penalty, Relaxes):
                self.ranks[layer.name] = penalty.transition(kernel.o, kernel.n, layer.name)
            self._shapes.append(kernel.weight.shape)
            self._facts.append(Facts(layer.module))
            self._readings.append(self._reading(layer, getattr(plain_weight(layer.module, layer.weight), "shape", None)))
            self.costs.append(kernel.groups * kernel.o * kernel.n * min(kernel.o, kernel.n))
            if not kernel.weight.detach().any():
                self.zeros.append(layer)

    def value(self, only: Collection[int] | None = None) -> Tensor:
        """The sum over all layers, or over those at the indices ``only``; autograd knows its gradient."""
        by_rule = not (torch.compiler.is_compiling() or is_transformed())  # Note [transforms]
        batches, stacks = self._sorted(self.read(only), by_rule=by_rule)
        values = [self.measure(stack).sum() for stack in stacks]
        if batches:
            weights = [weight for batch in batches for stack in batch.stacks for weight in stack.weights]
            values.append(cast(Tensor, _Total.apply(self, batches, *weights)))  # type: ignore[no-untyped-call]
        return self.sum(values)

    def add_grads_(self, scale: float | Tensor, wanted: Collection[int] | None = None) -> Tensor:
        """Add ``scale`` times the gradient to ``.grad`` of the parameters whose ``id`` is wanted, of all by default; the sum."""
        batches, stacks = self._sorted(self.read())
        values = []
        for batch in batches:
            measured = self.measure_batch(batch)
            if batch.stacks[0].form.trains:
                measured.add_grads_(scale, wanted)
            values.append(measured.value)
        values += [self._add_grads(stack, scale, wanted) for stack in stacks]
        return self.sum(values)

    @torch.enable_grad()
    def _add_grads(self, stack: Stack, scale: float | Tensor, wanted: Collection[int] | None) -> Tensor:
        """The same of one stack, by autograd."""
        if isinstance(stack, Plain):
            joined = stack.joined().detach().requires_grad_(stack.form.trains)  # one leaf instead of a graph of all weights
            value = self.measure(stack, joined).sum()
            parameters: Sequence[Tensor] = stack.weights
            gradients: Sequence[Tensor] = torch.autograd.grad(value, joined)[0].unbind() if value.requires_grad else ()
        else:
            value = self.measure(stack).sum()
            parameters = leaves(value)
            gradients = torch.autograd.grad(value, parameters) if parameters else ()
        if gradients:
            add_to_grads(parameters, gradients, scale, wanted)
        return value.detach()

    @torch.no_grad()
    def per_layer(self) -> dict[str, float]:
        """Each layer's value by name."""
        values = {
            layer.name: value
            for whole in self.read()
            for stack in whole.split()
            for layer, value in zip(stack.layers, self.measure(stack).tolist(), strict=True)
        }
        return {layer.name: values[layer.name] for layer in self.layers if layer.name in values}

    def read(self, only: Collection[int] | None = None) -> list[Stack]:
        """The layers that count now, or those of them at the indices ``only``, in stacks.

        Raises:
            ValueError: a layer was replaced, removed, or resized though a transition dimension was chosen for its shape.
        """
        reshard(self.model)
        if not torch.compiler.is_compiling():
            self._check_model()
        plain: dict[Form, Plain] = {}
        computed: dict[tuple[object, ...], Computed] = {}
        ties: set[int] = set()
        for index, (layer, reading) in enumerate(zip(self.layers, self._readings, strict=True)):
            own = layer.module._parameters.get(self._owns[index])
            if own is not None:
                if id(own) in ties:  # tied since: it counts once
                    continue
                ties.add(id(own))
            if only is not None and index not in only:
                continue
            if reading is not None and (weight := plain_weight(layer.module, layer.weight)) is not None:
                trains = weight.requires_grad
                if trains or self.include_frozen:
                    # A plain tuple hashes like a Form and is cheaper to build.
                    form = reading, weight.shape, trains, weight.dtype, weight.device
                    if (stack := plain.get(cast(Form, form))) is None:
                        check_shape(layer, reading.rank, reading.shape, weight.shape)
                        stack = plain[Form(*form)] = Plain(Form(*form))
                    stack.layers.append(layer)
                    stack.weights.append(weight)
                continue
            with torch.enable_grad():  # without it the kernel would not tell whether it trains
                kernel = replace(layer.kernel, rank=self.ranks.get(layer.name))
            check_shape(layer, kernel.rank, self._shapes[index], kernel.weight.shape)
            trains = self.include_frozen or kernel.weight.requires_grad
            # Only then: the compiler cannot follow a graph back to its parameters.
            if trains or any(p.requires_grad for p in sources(layer.module, layer.weight, kernel)):
                alike = computed.setdefault(kernel.layout, Computed())
                alike.layers.append(layer)
                alike.kernels.append(kernel)
        if not (plain or computed or only is not None):
            warn_once(f"all {len(self.layers)} selected layers are frozen now, so the penalty is 0; see include_frozen")
        return [*plain.values(), *computed.values()]

    def _reading(self, layer: Layer, shape: torch.Size | None) -> Reading | None:
        """How the layer's weight is read, with the shape for which its transition dimension was chosen; None if computed."""
        view, rank = plain_view(layer.module, layer.weight), self.ranks.get(layer.name)
        return None if view is None else self._known.setdefault((view, rank, shape), Reading(view, rank, shape))

    def _check_model(self) -> None:
        for entries, name, module in self._edges:
            if entries.get(name) is not module:
                check_places(self.model, self.layers)
                self._edges = edges_to(self.model, self.layers)  # something harmless, such as torch.compile of a part
                break
        for index, facts in enumerate(self._facts):
            if facts.are_stale():
                layer, before = self.layers[index], self._readings[index]
                now = self._reading(layer, None if before is None else before.shape)
                if before and now and before.rank is not None and before.view.groups != now.view.groups:
                    raise ValueError(
                        f"layer {layer.name!r} had {before.view.groups} groups when this Regularizer was made, and has "
                        f"{now.view.groups} now; its transition dimension was chosen for the former: make a new Regularizer"
                    )
                self._facts[index], self._readings[index] = Facts(layer.module), now

    def _sorted(self, stacks: Iterable[Stack], *, by_rule: bool = True) -> tuple[list["Batch"], list[Stack]]:
        """Stacks for which the penalty is a rule, joined into batches; and the others."""
        batches: list[Batch] = []
        others: list[Stack] = []
        for stack in stacks:
            parts = self._batches(stack) if by_rule and isinstance(stack, Plain) else []
            batches += parts
            if not parts:
                others += stack.split()
        return list(_joined(batches)), others

    def _batches(self, stack: Plain) -> "list[Batch]":
        """The stack in batches of one scale each; none where the penalty has no rule for it."""
        form, view = stack.form, stack.form.reading.view
        groups, o, n = view.size(form.size)
        key = form.reading, form.size
        if key not in self._rules:
            is_adjoint = view.transposed and bool(view.stride)
            self._rules[key] = None if is_adjoint else gram_rule_of(self.penalty, o, n, form.reading.rank)
        if (rule_and_side := self._rules[key]) is None or form.dtype.itemsize < 4:
            return []
        rule, side = rule_and_side
        rows = is_by_rows((o, n), side)
        factors = self._factors(groups, stack)
        # The filters of a matrix that is stored the other way round are its columns.
        size = groups, o if rows else n, rule, rows != view.transposed
        if len(factors) == 1:
            return [Batch([stack], *size, factors[0])]
        return [Batch([stack.part(slice(i, i + 1))], *size, factor) for i, factor in enumerate(factors)]

    def measure(self, stack: Stack, joined: Tensor | None = None) -> Tensor:
        """The value of each layer of a stack, whose weights are ``joined``, by the penalty itself.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers.
            ValueError: the penalty returns something else than one value per leading dimension.
        """
        kernel = stack.kernel(joined) if isinstance(stack, Plain) else stack.kernel()
        if kernel.weight.dtype.itemsize < 4:
            kernel = replace(kernel, weight=upcast(kernel.weight))
        try:
            with outside_autocast(kernel.weight.device):  # Note [full precision]
                values = self.penalty(kernel)
            if not isinstance(values, Tensor) or values.shape != kernel.leading:
                got = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
                wanted = f"one value per leading dimension of the kernel, {tuple(kernel.leading)}"
                raise ValueError(f"{self.penalty!r} must return {wanted}; got {got}")
            if not is_finite(values):
                raise FloatingPointError(f"{self.penalty!r} is not finite")
        except FloatingPointError as error:
            raise name_layers(stack.layers, error) from None
        values = values.flatten(1)
        factors = self._factors(values.shape[-1], stack)
        if len(factors) > 1:
            return values.sum(-1) * values.new_tensor(factors)
        return values.sum(-1) if factors[0] == 1 else values.sum(-1) * factors[0]

    def measure_batch(self, batch: "Batch") -> "Measured":
        """The sum over a batch, in closed form; raises as :meth:`measure`."""
        measured = batch.measure()
        if not is_finite(measured.value):
            self.sum_by_autograd([batch])  # says which layer it is
        return measured

    def sum_by_autograd(self, batches: Iterable["Batch"]) -> Tensor:
        """The sum over batches by operations that can be differentiated twice."""
        return self.sum([self.measure(stack).sum() for batch in batches for whole in batch.stacks for stack in whole.split()])

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of scalars, on the device of the first; 0 on that of the first layer where there are none."""
        if not values:
            return torch.zeros((), device=self.layers[0].device)
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def _factors(self, groups: int, stack: Stack) -> list[float]:
        """Factors of the values of a stack's layers of so many groups; a single one where all are equal."""
        if is_squared(self.penalty, otherwise=True):
            return [1.0]
        if self.scale is None:
            return [1.0 / float(groups**0.5)]
        kernels = itertools.islice(stack.each(), 1) if self.scale is sqrt_filters else stack.each()
        with torch.no_grad():
            factors = [float(self.scale(kernel)) / float(groups**0.5) for kernel in kernels]
        return factors if len(set(factors)) > 1 else factors[:1]


class _Piece(NamedTuple):
    """Weights of one shape as matrices: copied into a stack, or a large one as it is.

    Whatever the order of the entries of all filters, their inner products are the same: weights in ``channels_last`` are not
    rearranged. ``order`` is that of the dimensions in memory, None if it is the usual one.
    """

    weights: Sequence[Tensor]
    order: list[int] | None
    matrix: Float[Tensor, "k o n"]

    def split(self, product: Float[Tensor, "k o n"]) -> list[Tensor]:
        """A product of the matrices' shape, as tensors with the shape of the weights."""
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
    """Stacks whose Gram matrices are of one size and follow one rule.

    Attributes:
        stacks: layers whose weights ``(groups * o, ...)`` are parameters as they are.
        groups: of each weight.
        m: rows of a Gram matrix.
        rule: of the Gram matrices.
        by_rows: whether they are the rows', or the columns'.
        scale: multiplies value and gradient.
    """

    stacks: Sequence[Plain]
    groups: int
    m: int
    rule: GramRule
    by_rows: bool
    scale: float

    @torch.no_grad()
    def measure(self) -> "Measured":
        """The summed value of these weights, and its gradient."""
        pieces = [piece for stack in self.stacks for piece in self._pieces(stack.weights)]
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


def _joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same weights in few batches, of at most :data:`GRAMS` bytes of Gram matrices each."""
    together: dict[Hashable, list[Batch]] = {}
    for batch in batches:
        alike = batch.groups, batch.m, batch.rule, batch.by_rows, batch.scale, *batch.stacks[0].form[2:]
        together.setdefault(alike, []).append(batch)
    for same in together.values():
        first = same[0]
        most = max(1, GRAMS // (first.groups * first.m**2 * first.stacks[0].form.dtype.itemsize))
        stacks: list[Plain] = []
        room = most
        for stack in [stack for batch in same for stack in batch.stacks]:
            start = 0
            while start < len(stack.weights):
                stacks.append(stack.part(slice(start, start + room)))
                start, room = start + room, room - len(stacks[-1].weights)
                if not room:
                    yield replace(first, stacks=stacks)
                    stacks, room = [], most
        if stacks:
            yield replace(first, stacks=stacks)


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
                add_to_grads(piece.weights, piece.split(torch.bmm(*factors)), scale, wanted)


class _Total(torch.autograd.Function):
    """The sum over batches, of which autograd knows the gradient by each of their weights."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, batches: Sequence[Batch], *weights: Tensor) -> Tensor:
        measured = [engine.measure_batch(batch) for batch in batches]
        ctx.engine, ctx.weights = engine, weights
        ctx.shapes = [(each.batch, [(piece.weights, piece.order) for piece in each.pieces]) for each in measured]
        ctx.save_for_backward(*(tensor for each in measured for tensor in (each.slope, *(piece.matrix for piece in each.pieces))))
        return engine.sum([each.value for each in measured])

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        if is_differentiated():
            trained = [weight for weight in ctx.weights if weight.requires_grad]
            value = ctx.engine.sum_by_autograd(batch for batch, _ in ctx.shapes)
            by_weight = iter(torch.autograd.grad(value, trained, of_value, create_graph=True))
            return None, None, *(next(by_weight) if weight.requires_grad else None for weight in ctx.weights)
        gradients: list[Tensor | None] = []
        saved = iter(ctx.saved_tensors)
        for batch, shapes in ctx.shapes:
            slope = next(saved)
            measured = Measured(batch, of_value, slope, [_Piece(weights, order, next(saved)) for weights, order in shapes])
            gradients += measured.gradients(of_value.to(slope.device))
        return None, None, *gradients
