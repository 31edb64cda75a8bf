"""The Regularizer: binds a penalty to the layers of a model."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orthokit.advice import check_shape, named, warn_of_long_filters
from orthokit.audit import check_places, edges_to, warn_of_selection
from orthokit.checks import check_count, check_flag, check_number, warn_once
from orthokit.engine import Batch, Measured, add_grads_, add_up, in_batches, total
from orthokit.gram import GramRule, Side, is_by_rows, is_finite, outside_autocast, upcast
from orthokit.groups import param_groups
from orthokit.kernel import Kernel, KernelMeasure, View, leaves, plain_view, plain_weight, sources
from orthokit.layers import Layer, Where, convs, select
from orthokit.penalties import PENALTIES
from orthokit.penalties.base import HasNearest, Relaxes, gram_rule_of, is_squared
from orthokit.schedules import Schedule, as_schedule, check_strength, constant
from orthokit.wrappers import reshard


def sqrt_filters(kernel: Kernel) -> float:
    """As ``scale=``: the root of the layer's number of filters; the pull on each filter is then the same at every width."""
    return float((kernel.groups * kernel.o) ** 0.5)


MOST_STEPS = 2**53
"""Steps that a schedule can still tell apart as floating-point numbers."""
STACKED = 2**21
"""Bytes up to which weights of equal shape are copied into one stack: small enough for a core's cache, large enough for its
products. A larger weight is read where it is."""


@dataclass(frozen=True, eq=False)
class _Reading:
    """How a weight is read, and the transition dimension that was chosen for its shape; the same object for equal ones."""

    view: View
    rank: int | None
    shape: torch.Size | None


class _Form(NamedTuple):
    """What weights have in common that can be stacked: parameters as they are, read in one way."""

    reading: _Reading
    size: torch.Size
    trains: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def o(self) -> int:
        """Filters per group."""
        return self.reading.view.size(self.size)[1]

    @property
    def n(self) -> int:
        """Weights per filter."""
        return self.reading.view.size(self.size)[2]


_Plain = dict[_Form, list[tuple[Layer, nn.Parameter]]]


@dataclass(frozen=True, eq=False)
class _Stack:
    """Layers whose kernels have one layout.

    Attributes:
        layers: the layers.
        weights: the parameters, where they are the weights as they are; else empty.
        form: theirs.
        computed: the kernels as one, where they are computed.
    """

    layers: list[Layer]
    weights: list[Tensor] = field(default_factory=list)
    form: _Form | None = None
    computed: Kernel | None = None

    def joined(self) -> Tensor:
        """The weights as one tensor, along a new first dimension."""
        return torch.stack(self.weights) if len(self.weights) > 1 else self.weights[0].unsqueeze(0)

    def kernel(self, joined: Tensor | None = None) -> Kernel:
        """The kernels as one, whose weights are ``joined``."""
        if self.form is None:
            return cast(Kernel, self.computed)
        reading = self.form.reading
        return reading.view.kernel(self.joined() if joined is None else joined, reading.rank)


class Regularizer:
    """``strength * sum`` of a penalty over the selected layers of a model.

    Call it and add the result to the loss, or call :meth:`add_grad_` just before the optimizer's step: the gradient is the same.
    Layers are selected once; their weights are read at every call, in float32 or better and outside autocast, equal shapes in
    one batch. Nothing is stored on the model.

    An unsquared penalty of a layer in ``g`` groups is divided by ``sqrt(g)``, so that a grouped layer is not pulled harder than a
    dense one.

    Args:
        model: any module; wrappers (DataParallel, DistributedDataParallel, ``torch.compile``) are looked through.
        penalty: a penalty of this package, or any callable ``Kernel -> Tensor`` with one value per leading dimension.
        strength: a number, or a schedule: a function from step to number.
        where: ``(name, module) -> bool``; every convolution by default.
        scale: multiplies an unsquared penalty of each layer, e.g. :func:`sqrt_filters`; a function ``Kernel -> float``.
        include_frozen: count layers none of whose parameters ask for a gradient, too. They are left out at each call otherwise.
        every: act at each ``every``-th call only, the first one included, then ``every`` times as hard; other calls give 0. Calls
            that can train are counted: not those under ``torch.no_grad()``, nor :meth:`per_layer`. A squared penalty overshoots,
            and diverges, where ``lr * strength * every / (1 - momentum)`` is not well below 1/4; an unsquared one does not.
        shard: under DistributedDataParallel each rank measures a part of the layers, of about equal cost, and the averaging of
            gradients brings the parts together. The value of a call is then this rank's part times the number of ranks.

    Attributes:
        layers: the selected layers, each a (name, module).
        ranks: the transition dimension of each layer by name, of a penalty that relaxes; else empty.
        steps: how often :meth:`step` was called.

    Raises:
        ValueError: no layer is selected, all of them are frozen, or ``strength`` is negative, NaN or infinite.
        TypeError: an argument is of the wrong kind, or a selected layer has no kernel view.

    >>> model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    >>> for layer in (model[0], model[2]):
    ...     _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> ortho = Regularizer(model, orthokit.SO(), strength=0.1)
    >>> ortho(), ortho.per_layer()
    (tensor(3.6000, grad_fn=<MulBackward0>), {'0': 18.0, '2': 18.0})
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: KernelMeasure,
        *,
        strength: float | Schedule,
        where: Where = convs,
        scale: Callable[[Kernel], float] | None = None,
        include_frozen: bool = False,
        every: int = 1,
        shard: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(penalty, type) or not callable(penalty):
            name = penalty.__name__ if isinstance(penalty, type) else repr(penalty)
            raise TypeError(f"penalty must be an instance such as orthokit.SO(); got {name}")
        self.model, self.penalty, self.schedule, self.scale = model, penalty, as_schedule(strength), scale
        check_count("every", every)
        check_flag("include_frozen", include_frozen)
        check_flag("shard", shard)
        self.include_frozen, self.every, self.shard = include_frozen, every, shard
        self.steps = 0
        self._calls: Counter[str] = Counter()
        self.layers = select(model, where)
        if not include_frozen and all(layer.frozen for layer in self.layers):
            raise ValueError(f"all {len(self.layers)} selected layers are frozen; unfreeze some, or pass include_frozen=True")
        if scale is not None:
            if not callable(scale):
                raise TypeError(f"scale must be a function Kernel -> float such as orthokit.sqrt_filters; got {scale!r}")
            for layer in self.layers:
                check_number(f"scale of layer {layer.name!r}", scale(layer.kernel))
        if scale is not None and self._squared:
            warn_once(f"scale= does nothing here: it applies to unsquared penalties, and {penalty!r} is squared")
        self.ranks: dict[str, int] = {}
        self._readings: list[_Reading | None] = []
        self._rules: dict[tuple[_Reading, torch.Size], tuple[GramRule, Side] | None] = {}
        self._shapes: list[torch.Size] = []
        readings: dict[tuple[View, int | None, torch.Size | None], _Reading] = {}
        self._costs: list[int] = []
        zero: list[Layer] = []
        for layer in self.layers:
            kernel = layer.kernel
            if isinstance(penalty, Relaxes):
                self.ranks[layer.name] = penalty.transition(kernel.o, kernel.n, layer.name)
            view, rank = plain_view(layer.module, layer.weight), self.ranks.get(layer.name)
            self._shapes.append(kernel.weight.shape)
            shape = getattr(plain_weight(layer.module, layer.weight), "shape", None)
            self._readings.append(None if view is None else readings.setdefault((view, rank, shape), _Reading(view, rank, shape)))
            self._costs.append(kernel.groups * kernel.o * kernel.n * min(kernel.o, kernel.n))
            if not bool(kernel.weight.detach().any()):
                zero.append(layer)
        warn_of_selection(model, self.layers, zero)
        self._edges = edges_to(model, self.layers)
        _ = self.strength  # a schedule that gives no valid strength fails here
        warn_of_long_filters(penalty, self.schedule, self.layers, self.ranks)

    @property
    def _squared(self) -> bool:
        return is_squared(self.penalty, otherwise=True)

    @property
    def strength(self) -> float:
        """The strength at the present step."""
        strength = self.schedule(self.steps)
        check_strength(f"strength at step {self.steps}", strength)
        return float(strength)

    def __call__(self) -> Tensor:
        """``strength * sum of the layers' penalties``, a scalar to add to the loss.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers (on the CPU: see Note [full precision]).
            ValueError: a layer was replaced or removed in the model since, or moved and frozen (``get_peft_model``).
        """
        strength = self._due() if torch.is_grad_enabled() else self.strength
        mine = self._share() if self.shard else None
        closed, stacks = self._read(mine, apart=not torch.compiler.is_compiling()) if strength > 0 else ({}, ())
        values = [self._measure(stack).sum() for stack in stacks]
        if closed:
            again = partial(self._by_autograd, closed)
            values.append(total(self._batches(closed), self._measure_closed, again))
        return strength * (1 if mine is None else dist.get_world_size()) * self._total(values)

    def _by_autograd(self, plain: _Plain) -> Tensor:
        return add_up([self._measure(stack).sum() for stack in _stacked(plain)])

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        return add_up(values) if values else torch.zeros((), device=self.layers[0].device)

    def _due(self, key: str = "") -> float:
        """The strength of this call, counted under ``key``: 0 but for each ``every``-th, which makes up for the others."""
        strength = self.strength
        if self.every == 1:
            return strength
        due = self._calls[key] % self.every == 0
        self._calls[key] += 1
        return due * strength * self.every

    def per_layer(self) -> dict[str, float]:
        """Each layer's penalty by name, before the strength; their sum times :attr:`strength` is what a call returns."""
        with torch.no_grad():
            found = {
                layer.name: value
                for stack in self._read()[1]
                for layer, value in zip(stack.layers, self._measure(stack).tolist(), strict=True)
            }
        return {layer.name: found[layer.name] for layer in self.layers if layer.name in found}

    def _share(self) -> Collection[int] | None:
        """Places of this rank's layers, dearest first each to the rank with the least to do; None where there are no ranks."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        for layer in self.layers:
            if any(hasattr(p, "full_tensor") for p in layer.module.parameters()):
                raise TypeError(f"shard=True is for DistributedDataParallel; layer {layer.name!r} is sharded already")
        shares: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        load = [0] * len(shares)
        for place in sorted(range(len(self.layers)), key=lambda place: (-self._costs[place], place)):
            rank = load.index(min(load))
            shares[rank].append(place)
            load[rank] += self._costs[place]
        return shares[dist.get_rank()]

    def _read(self, mine: Collection[int] | None = None, *, apart: bool = False) -> tuple[_Plain, Iterable[_Stack]]:
        """The layers, or those in the places ``mine``, that count now.

        Returns:
            The weights of those for which the penalty is a rule of Gram matrices, if they are asked for ``apart``; and stacks of
            the others.
        """
        reshard(self.model)
        if not torch.compiler.is_compiling():
            self._check_places()
        plain: _Plain = {}
        computed: dict[tuple[object, ...], list[tuple[Layer, Kernel]]] = {}
        for place, (layer, reading) in enumerate(zip(self.layers, self._readings, strict=True)):
            if mine is not None and place not in mine:
                continue
            if reading is not None and (weight := plain_weight(layer.module, layer.weight)) is not None:
                trains = weight.requires_grad
                if trains or self.include_frozen:
                    # A plain tuple hashes like a _Form and is cheaper to build.
                    form = reading, weight.shape, trains, weight.dtype, weight.device
                    if (members := plain.get(cast(_Form, form))) is None:
                        check_shape(layer, reading.rank, reading.shape, weight.shape)
                        members = plain[_Form(*form)] = []
                    members.append((layer, weight))
                continue
            with torch.enable_grad():  # without it the kernel would not tell whether it trains
                kernel = replace(layer.kernel, rank=self.ranks.get(layer.name))
            check_shape(layer, kernel.rank, self._shapes[place], kernel.weight.shape)
            trains = self.include_frozen or kernel.weight.requires_grad
            # Only then: the compiler cannot follow a graph back to its parameters.
            if trains or any(p.requires_grad for p in sources(layer.module, layer.weight, kernel)):
                computed.setdefault(kernel.layout, []).append((layer, kernel))
        if not (plain or computed or mine is not None):
            warn_once(f"all {len(self.layers)} selected layers are frozen now, so the penalty is 0; see include_frozen")
        closed = {form: members for form, members in plain.items() if apart and self._rule(form) is not None}
        return closed, chain(
            _stacked({form: members for form, members in plain.items() if form not in closed}),
            (
                _Stack([layer for layer, _ in members], computed=Kernel.stack([kernel for _, kernel in members]))
                for members in computed.values()
            ),
        )

    def _check_places(self) -> None:
        for entries, name, module in self._edges:
            if entries.get(name) is not module:
                check_places(self.model, self.layers)
                self._edges = edges_to(self.model, self.layers)  # something harmless, such as torch.compile of a part
                return

    def _rule(self, form: _Form) -> tuple[GramRule, Side] | None:
        """The rule of Gram matrices that the penalty is on such weights, if it is one."""
        key, (view, rank) = form[:2], (form.reading.view, form.reading.rank)
        if key not in self._rules:
            is_adjoint = view.transposed and bool(view.stride)
            self._rules[key] = None if is_adjoint else gram_rule_of(self.penalty, form.o, form.n, rank)
        return self._rules[key] if form.dtype.itemsize >= 4 else None

    def _batches(self, closed: _Plain) -> list[Batch]:
        """Weights for which the penalty is a rule, in batches."""
        found = []
        for form, members in closed.items():
            rule, side = cast(tuple[GramRule, Side], self._rule(form))
            weights: list[Tensor] = [weight for _, weight in members]
            view = form.reading.view
            scale = self._factor(view.groups, _Stack([members[0][0]], weights[:1], form).kernel)
            # The filters of a matrix that is stored the other way round are its columns.
            by_rows = is_by_rows((form.o, form.n), side) != view.transposed
            found.append(Batch([weights], view.groups, rule, by_rows, scale, form.trains))
        return list(in_batches(found))

    def _measure_closed(self, batch: Batch) -> Measured:
        measured = batch.measure()
        if not is_finite(measured.value):
            weights = {id(weight) for part in batch.parts for weight in part}
            for stack in self._read()[1]:
                if any(id(weight) in weights for weight in stack.weights):
                    self._measure(stack)  # says which layer it is
        return measured

    def _measure(self, stack: _Stack, joined: Tensor | None = None) -> Tensor:
        layers, kernel = stack.layers, stack.kernel(joined)
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
            raise named(layers, error) from None
        values = values.flatten(1)
        factor = self._factor(values.shape[-1], lambda: kernel)
        return values.sum(-1) if factor == 1 else values.sum(-1) * factor

    def _factor(self, groups: int, kernel: Callable[[], Kernel]) -> float:
        """What the values of a layer in so many groups are multiplied with."""
        if self._squared:
            return 1.0
        return (float(self.scale(kernel())) if self.scale else 1.0) / float(groups**0.5)

    def add_grad_(self, scale: float | Tensor = 1.0, *, only: Collection[Tensor] | None = None) -> Tensor:
        """Add the gradient of ``self()`` times ``scale`` to ``.grad`` of the parameters behind the kernels; return the value.

        Call it between ``loss.backward()`` and the optimizer's step: after gradient clipping, so that the penalty is not clipped,
        and with a ``GradScaler`` after ``scaler.unscale_(optimizer)``. No hook of the model or of autograd sees it.

        Args:
            scale: factor of the gradient, for whoever scales gradients by hand.
            only: parameters to serve; by default all.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "add_grad_ needs autograd, which torch.inference_mode() switches off for good; use torch.no_grad()"
            )
        if self.shard:
            raise RuntimeError(
                "add_grad_() runs after gradients are averaged, so with shard=True each process would add only its own layers: "
                "add the value of a call to the loss instead"
            )
        wanted = None if only is None else set(map(id, only))
        if not isinstance(scale, Tensor):
            check_number("scale", scale, -math.inf)
        elif scale.numel() != 1:
            raise ValueError(f"scale must be one number; got a tensor of shape {tuple(scale.shape)}")
        strength = self._due(self._first(wanted))
        closed, stacks = self._read(apart=True) if strength > 0 else ({}, ())
        values = []
        for batch in self._batches(closed):
            measured = self._measure_closed(batch)
            if batch.trains:
                measured.add_grads_(strength * scale, wanted)
            values.append(measured.value)
        values += [self._add_grad(stack, strength * scale, wanted) for stack in stacks]
        return strength * self._total(values)

    @torch.enable_grad()
    def _add_grad(self, stack: _Stack, scale: float | Tensor, wanted: set[int] | None) -> Tensor:
        """The same of one stack, by way of autograd."""
        parameters: Sequence[Tensor] = stack.weights
        if stack.form is not None:
            joined = stack.joined().detach().requires_grad_(stack.form.trains)
            value = self._measure(stack, joined).sum()
            gradients: Sequence[Tensor] = torch.autograd.grad(value, joined)[0].unbind() if value.requires_grad else ()
        else:
            value = self._measure(stack).sum()
            parameters = leaves(value)
            gradients = torch.autograd.grad(value, parameters) if parameters else ()
        if gradients:
            add_grads_(parameters, gradients, scale, wanted)
        return value.detach()

    def _first(self, wanted: set[int] | None) -> str:
        """Under which name calls for some of the parameters are counted: optimizers of one model step at their own pace."""
        if wanted is None or self.every == 1:
            return ""
        return next((layer.name for layer in self.layers if any(id(p) in wanted for p in layer.module.parameters())), "")

    @torch.no_grad()
    def retract_(self, rate: float = 1.0) -> None:
        """Move every kernel the part ``rate`` of the way to the penalty's nearest minimum, in closed form and in place.

        Call it after the optimizer's step: decoupled from the gradient, as AdamW decouples weight decay, so that neither
        momentum nor the optimizer's scaling touches it. Neither strength nor schedule applies. ``rate=1`` keeps the kernels
        on the minimum; the optimizer's state is not changed.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers.
            TypeError: the penalty has no method ``nearest``: see :class:`orthokit.penalties.base.HasNearest`.
            ValueError: ``rate`` is not in (0, 1]; a relaxation whose nearest minimum is not known in closed form; or a layer
                whose weight is computed (parametrized, pruned, sharded) and cannot be set.
        """
        check_number("rate", rate, 0, 1, open_low=True)
        if not isinstance(self.penalty, HasNearest):
            able = ", ".join(kind.__name__ for kind in PENALTIES if issubclass(kind, HasNearest))
            raise TypeError(f"{self.penalty!r} does not know its nearest minimum in closed form; use one of {able}")
        moves = []
        for stack in self._read()[1]:
            try:
                targets = self.penalty.nearest(stack.kernel())
            except FloatingPointError as error:
                raise named(stack.layers, error) from None
            for layer, target in zip(stack.layers, targets, strict=True):
                with torch.enable_grad():
                    own = layer.kernel
                weight, behind = own.weight.detach(), sources(layer.module, layer.weight, own)
                if len(behind) != 1 or weight.data_ptr() != behind[0].data_ptr() or weight.numel() != behind[0].numel():
                    raise ValueError(f"the weight of layer {layer.name!r} is computed from others and cannot be set; see where=")
                moves.append((weight, target.reshape(weight.shape).to(weight.dtype)))
        for weight, target in moves:
            weight.lerp_(target, rate)

    def param_groups(self, model: nn.Module, *, weight_decay: float, decay_biases_and_norms: bool = True) -> list[dict[str, Any]]:
        """:func:`orthokit.param_groups` of this regularizer alone: weight decay on all but the regularized kernels."""
        return param_groups(model, self, weight_decay=weight_decay, decay_biases_and_norms=decay_biases_and_norms)

    def step(self) -> None:
        """Advance the schedule by one, in whatever unit you call it: batches or epochs."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the step of the schedule, and with ``every=`` the calls so far."""
        return {"steps": self.steps, "calls": dict(self._calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a saved :meth:`state_dict`."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"not the state of a Regularizer: expected {{'steps': ...}}, got {state!r:.200}")
        calls = state.get("calls", {})
        check_count("steps", state["steps"], 0, MOST_STEPS)
        if not isinstance(calls, Mapping) or not all(isinstance(name, str) for name in calls):
            raise ValueError(f"not the state of a Regularizer: calls must map names of layers to counts, got {calls!r:.200}")
        for name, count in calls.items():
            check_count(f"calls of {name!r}", count, 0, MOST_STEPS)
        self.steps = int(state["steps"])
        self._calls = Counter({name: int(count) for name, count in calls.items()})

    def __repr__(self) -> str:
        strength = self.schedule.strength if isinstance(self.schedule, constant) else self.schedule
        return f"Regularizer({self.penalty!r}, strength={strength}, {len(self.layers)} layers)"


def _stacked(plain: _Plain) -> Iterator[_Stack]:
    for form, members in plain.items():
        many = max(1, STACKED // max(1, form.size.numel() * form.dtype.itemsize))
        for start in range(0, len(members), many):
            some = members[start : start + many]
            yield _Stack([layer for layer, _ in some], [weight for _, weight in some], form)
