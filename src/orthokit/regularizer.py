"""The Regularizer: binds a penalty to the layers of a model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.checks import check_number, warn_once
from orthokit.kernel import Kernel, KernelMeasure, sources
from orthokit.schedules import Schedule, as_schedule, constant
from orthokit.select import Layer, Where, convs, select


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
        self.penalty, self.schedule, self.scale = penalty, as_schedule(strength), scale
        self.include_frozen = include_frozen
        self.steps = 0
        self.layers = select(model, where)
        if not include_frozen and all(layer.frozen for layer in self.layers):
            raise ValueError(f"all {len(self.layers)} selected layers are frozen; unfreeze some, or pass include_frozen=True")
        if scale is not None and self._squared:
            warn_once(f"scale= does nothing here: it applies to unsquared penalties, and {penalty!r} is squared")
        self._ranks: dict[str, int] = {}
        if (transition := getattr(penalty, "transition", None)) is not None:
            for layer in self.layers:
                kernel = layer.kernel
                self._ranks[layer.name] = transition(kernel.o, kernel.n, layer.name)
        _ = self.strength  # a schedule that gives no valid strength fails here

    @property
    def _squared(self) -> bool:
        return bool(getattr(self.penalty, "squared", True))

    @property
    def strength(self) -> float:
        """The strength at the present step."""
        strength = self.schedule(self.steps)
        check_number(f"strength at step {self.steps}", strength)
        return strength

    def __call__(self) -> Tensor:
        """``strength * sum of the layers' penalties``, a scalar to add to the loss.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers (on the CPU: see Note [full precision]).
        """
        strength = self.strength
        values = [value.sum() for _, value in self._stacks()] if strength > 0 else []
        if not values:
            return torch.zeros((), device=self.layers[0].kernel.weight.device)
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
        stacks: dict[tuple[Any, ...], list[tuple[Layer, Kernel]]] = {}
        for layer in self.layers:
            if self.include_frozen or not layer.frozen:
                kernel = replace(layer.kernel, rank=self._ranks.get(layer.name))
                key = (kernel.weight.shape, kernel.stride, kernel.weight.dtype, kernel.weight.device)
                stacks.setdefault(key, []).append((layer, kernel))
        for stack in stacks.values():
            layers, kernels = map(list, zip(*stack, strict=True))
            yield layers, self._measure(layers, Kernel.stack(kernels))

    def _measure(self, layers: list[Layer], kernel: Kernel) -> Tensor:
        weight = kernel.weight
        kernel = replace(kernel, weight=weight.to(torch.promote_types(weight.dtype, torch.float32)))
        try:
            with torch.autocast(weight.device.type, enabled=False):  # Note [full precision]
                values = self.penalty(kernel)
        except FloatingPointError as error:
            broken = [layer.name for layer in layers if not layer.kernel.weight.isfinite().all()]
            raise FloatingPointError(f"layer {', '.join(broken or [layer.name for layer in layers])}: {error}") from None
        if values.shape != (len(layers), kernel.groups):
            raise ValueError(
                f"{self.penalty!r} must return one value per leading dimension of the kernel, {(len(layers), kernel.groups)}; "
                f"got {tuple(values.shape)}"
            )
        if self._squared:
            return values.sum(-1)
        scale = self.scale(kernel) if self.scale else 1.0
        return values.sum(-1) * (scale / float(kernel.groups**0.5))

    def add_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add the gradient of ``self()`` times ``scale`` to ``.grad`` of the parameters behind the kernels; return the value.

        Call it between ``loss.backward()`` and the optimizer's step: after gradient clipping, so that the penalty is not clipped,
        and with a ``GradScaler`` after ``scaler.unscale_(optimizer)``. No hook of the model or of autograd sees it.
        """
        with torch.enable_grad():
            value = self()
        if value.requires_grad:
            parameters = [p for p in dict.fromkeys(self._parameters()) if p.requires_grad]
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    # Fused optimizers want the gradient laid out as the parameter, e.g. channels_last.
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(gradient * scale)
        return value.detach()

    def _parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers:
            yield from sources(layer.module)

    def param_groups(self, model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters of ``model`` for an optimizer, with weight decay on all but the regularized kernels.

        Decay would pull their lengths towards 0 while the penalty pulls them towards 1.
        """
        check_number("weight_decay", weight_decay)
        kernels = set(self._parameters())
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
        if "steps" not in state:
            raise ValueError(f"not the state of a Regularizer: expected the key 'steps', got {sorted(state)}")
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        strength = self.schedule.strength if isinstance(self.schedule, constant) else self.schedule
        return f"Regularizer({self.penalty!r}, strength={strength}, {len(self.layers)} layers)"
