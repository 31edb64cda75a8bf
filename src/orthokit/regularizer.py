"""The Regularizer: binds a penalty to the layers of a model."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.checks import check_count, check_number, warn_once
from orthokit.gram import is_finite, upcast
from orthokit.kernel import Kernel, KernelMeasure, leaves, sources
from orthokit.schedules import Schedule, as_schedule, constant
from orthokit.select import Layer, Where, convs, reshard, select


def sqrt_filters(kernel: Kernel) -> float:
    """As ``scale=``: the root of the layer's number of filters; the pull on each filter is then the same at every width."""
    return float((kernel.groups * kernel.o) ** 0.5)


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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(penalty, type) or not callable(penalty):
            name = penalty.__name__ if isinstance(penalty, type) else repr(penalty)
            raise TypeError(f"penalty must be an instance such as orthokit.SO(); got {name}")
        self.model, self.penalty, self.schedule, self.scale = model, penalty, as_schedule(strength), scale
        self.include_frozen = include_frozen
        self.steps = 0
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
        if (transition := getattr(penalty, "transition", None)) is not None:
            for layer in self.layers:
                kernel = layer.kernel
                self.ranks[layer.name] = transition(kernel.o, kernel.n, layer.name)
        _ = self.strength  # a schedule that gives no valid strength fails here

    @property
    def _squared(self) -> bool:
        return bool(getattr(self.penalty, "squared", True))

    @property
    def strength(self) -> float:
        """The strength at the present step."""
        strength = self.schedule(self.steps)
        check_number(f"strength at step {self.steps}", strength)
        return float(strength)

    def __call__(self) -> Tensor:
        """``strength * sum of the layers' penalties``, a scalar to add to the loss.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers (on the CPU: see Note [full precision]).
        """
        strength = self.strength
        values = [value.sum() for _, value in self._stacks()] if strength > 0 else []
        if not values:
            return torch.zeros((), device=self.layers[0].device)
        total: Tensor = torch.stack([value.to(values[0].device) for value in values]).sum()
        return strength * total

    def per_layer(self) -> dict[str, float]:
        """Each layer's penalty by name, before the strength; their sum times :attr:`strength` is what a call returns."""
        with torch.no_grad():
            found = {
                layer.name: value
                for layers, values in self._stacks()
                for layer, value in zip(layers, values.tolist(), strict=True)
            }
        return {layer.name: found[layer.name] for layer in self.layers if layer.name in found}

    def _stacks(self) -> Iterator[tuple[list[Layer], Tensor]]:
        """Layers of equal shape, and the penalty of each as a vector."""
        for layers, kernel in self._kernels():
            yield layers, self._measure(layers, kernel)

    def _kernels(self) -> Iterator[tuple[list[Layer], Kernel]]:
        """Layers of equal shape, and their kernels stacked."""
        reshard(self.model)
        stacks: dict[tuple[object, ...], list[tuple[Layer, Kernel]]] = {}
        for layer in self.layers:
            with torch.enable_grad():  # without it the kernel would not tell whether it trains
                kernel = replace(layer.kernel, rank=self.ranks.get(layer.name))
            trains = kernel.weight.requires_grad or any(p.requires_grad for p in sources(layer.module, kernel))
            if self.include_frozen or trains:
                stacks.setdefault(kernel.layout, []).append((layer, kernel))
        for stack in stacks.values():
            layers, kernels = map(list, zip(*stack, strict=True))
            yield layers, Kernel.stack(kernels)

    def _measure(self, layers: list[Layer], kernel: Kernel) -> Tensor:
        kernel = replace(kernel, weight=upcast(kernel.weight))
        try:
            with torch.autocast(kernel.weight.device.type, enabled=False):  # Note [full precision]
                values = self.penalty(kernel)
            if not isinstance(values, Tensor) or values.shape != kernel.leading:
                got = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
                wanted = f"one value per leading dimension of the kernel, {tuple(kernel.leading)}"
                raise ValueError(f"{self.penalty!r} must return {wanted}; got {got}")
            if not is_finite(values):
                raise FloatingPointError(f"{self.penalty!r} is not finite")
        except FloatingPointError as error:
            broken = [layer.name for layer in layers if not layer.kernel.weight.isfinite().all()]
            raise FloatingPointError(f"layer {', '.join(broken or [layer.name for layer in layers])}: {error}") from None
        values = values.flatten(1)
        if self._squared:
            return values.sum(-1)
        scale = float(self.scale(kernel)) if self.scale else 1.0
        return values.sum(-1) * (scale / float(values.shape[-1] ** 0.5))

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
        with torch.enable_grad():
            value = self()
        wanted = None if only is None else set(map(id, only))
        parameters = [p for p in leaves(value) if wanted is None or id(p) in wanted]
        if parameters:
            for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                if parameter.grad is None:
                    # Fused optimizers want the gradient laid out as the parameter, e.g. channels_last.
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(gradient * scale)
        return value.detach()

    @torch.no_grad()
    def retract_(self, rate: float = 1.0) -> None:
        """Move every kernel the part ``rate`` of the way to the penalty's nearest minimum, in closed form and in place.

        Call it after the optimizer's step: decoupled from the gradient, as AdamW decouples weight decay, so that neither
        momentum nor the optimizer's scaling touches it. Neither strength nor schedule applies. ``rate=1`` keeps the kernels
        on the minimum; the optimizer's state is not changed.

        Raises:
            TypeError: the penalty has no method ``nearest`` (``SO``, ``DSO``, ``SRIP`` and ``Disentangled`` have).
            ValueError: ``rate`` is not in (0, 1]; a relaxation whose nearest minimum is not known in closed form; or a layer
                whose weight is computed (parametrized, pruned, sharded) and cannot be set.
        """
        check_number("rate", rate, 0, 1, open_low=True)
        nearest = getattr(self.penalty, "nearest", None)
        if nearest is None:
            raise TypeError(f"{self.penalty!r} knows no nearest minimum in closed form; use SO, DSO, SRIP or Disentangled")
        moves = []
        for layers, kernel in self._kernels():
            for layer, target in zip(layers, nearest(kernel), strict=True):
                with torch.enable_grad():
                    own = layer.kernel
                weight, behind = own.weight.detach(), sources(layer.module, own)
                if len(behind) != 1 or weight.data_ptr() != behind[0].data_ptr() or weight.numel() != behind[0].numel():
                    raise ValueError(f"the weight of layer {layer.name!r} is computed from others and cannot be set; see where=")
                moves.append((weight, target.reshape(weight.shape).to(weight.dtype)))
        for weight, target in moves:
            weight.lerp_(target, rate)

    def param_groups(self, model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters of ``model`` for an optimizer, with weight decay on all but the regularized kernels.

        Decay would pull their lengths towards 0 while the penalty pulls them towards 1.
        """
        check_number("weight_decay", weight_decay)
        reshard(model)
        kernels = {parameter for layer in self.layers for parameter in sources(layer.module)}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p not in kernels], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p in kernels], "weight_decay": 0.0},
        ]
        if not groups[1]["params"]:
            raise ValueError(
                f"{type(model).__name__} holds none of the regularized kernels; pass the model that was selected from"
            )
        return [group for group in groups if group["params"]]

    def step(self) -> None:
        """Advance the schedule by one, in whatever unit you call it: batches or epochs."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the step of the schedule."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a saved :meth:`state_dict`."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"not the state of a Regularizer: expected {{'steps': ...}}, got {state!r:.200}")
        check_count("steps", state["steps"], 0)
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        strength = self.schedule.strength if isinstance(self.schedule, constant) else self.schedule
        return f"Regularizer({self.penalty!r}, strength={strength}, {len(self.layers)} layers)"
