"""Any framework that steps a ``torch.optim.Optimizer``: the penalty's gradient is added in the optimizer's step."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from orthokit.kernel import sources
from orthokit.regularizer import Regularizer
from orthokit.select import reshard


def attach(ortho: Regularizer, optimizer: Optimizer) -> RemovableHandle:
    """Add the gradient of ``ortho`` whenever ``optimizer.step()`` runs, as if the penalty were part of the loss.

    It comes after gradient clipping, once per step however many batches were accumulated, and obeys a ``GradScaler`` (fused
    optimizers too). A step that takes a closure gets the penalty inside the closure. Advancing the schedule stays with you: call
    ``ortho.step()`` once a batch or an epoch.

    Args:
        ortho: the regularizer.
        optimizer: the one that trains all of the regularizer's layers.

    Returns:
        A handle; ``handle.remove()`` undoes it.

    Raises:
        ValueError: the optimizer does not hold every regularized parameter that asks for a gradient.
    """
    if not isinstance(ortho, Regularizer) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach takes a Regularizer and a torch.optim.Optimizer; got {type(ortho).__name__}, {type(optimizer).__name__}"
        )
    check_trained(ortho, optimizer)
    return add_in_step(ortho, optimizer)


def check_trained(ortho: Regularizer, *optimizers: Optimizer) -> None:
    """Raise ``ValueError`` unless the optimizers together hold every regularized parameter that asks for a gradient."""
    reshard(ortho.model)
    held = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
    missing = [
        layer.name
        for layer in ortho.layers
        if not held.issuperset(id(parameter) for parameter in sources(layer.module) if parameter.requires_grad)
    ]
    if missing:
        raise ValueError(
            f"the optimizer does not train {len(missing)} of {len(ortho.layers)} regularized layers: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; pass the optimizer that does, or make one Regularizer per optimizer"
        )


def add_in_step(ortho: Regularizer, optimizer: Optimizer) -> RemovableHandle:
    """:func:`attach` without its check: each step serves those regularized parameters that the optimizer then holds."""

    def before_step(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch passes the optimizer itself as the first of args.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            # A fused optimizer under a GradScaler divides by this scale itself, inside its step.
            scale = getattr(optimizer, "grad_scale", None)
            ortho.add_grad_(1.0 if scale is None else scale, only=_parameters(optimizer))
            return None

        def with_penalty() -> Any:
            with torch.enable_grad():
                loss = closure()
            penalty = ortho.add_grad_(only=_parameters(optimizer))
            return loss if loss is None else loss + penalty

        return args[:1], {**kwargs, "closure": with_penalty}

    return optimizer.register_step_pre_hook(before_step)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
