"""Any framework that steps a ``torch.optim.Optimizer``: the penalty's gradient is added in the optimizer's step."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from orthokit.checks import warn_once
from orthokit.regularizer import Regularizer
from orthokit.wrappers import reshard

__all__ = ["add_in_step", "attach", "check_trained"]


def attach(ortho: Regularizer, optimizer: Any) -> RemovableHandle:
    """Add the gradient of ``ortho`` whenever ``optimizer.step()`` runs, as if the penalty were part of the loss.

    The gradient comes after gradient clipping, once per step however many batches were accumulated, and obeys a ``GradScaler``
    (fused optimizers too). A step that takes a closure gets the penalty inside the closure, with
    one strength at all of its calls, and counts once for ``every=``. Advancing the schedule stays with
    you: call ``ortho.step()`` once a batch or an epoch.

    An optimizer in the wrapper of a framework (Accelerate's, or one as Lookahead's) is found inside of it. A SAM that is used in
    two calls, ``first_step`` and ``second_step``, never runs its ``step``: attaching to one warns.

    Args:
        ortho: the regularizer.
        optimizer: the ``torch.optim.Optimizer`` that trains all of the regularizer's layers, or a wrapper of it.

    Returns:
        A handle; ``handle.remove()`` undoes it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the optimizer does not hold every regularized parameter that asks for a gradient.
    """
    inner = _unwrap(optimizer)
    if not isinstance(ortho, Regularizer) or inner is None:
        raise TypeError(
            f"attach takes a Regularizer and a torch.optim.Optimizer; got {type(ortho).__name__}, {type(optimizer).__name__}"
        )
    check_trained(ortho, inner)
    if callable(getattr(inner, "first_step", None)) and callable(getattr(inner, "second_step", None)):
        warn_once(
            f"{type(inner).__name__} has first_step() and second_step(): where your loop calls these two, step() never runs and "
            "the penalty is left out. Pass a closure to step(), or add ortho() to both losses instead of attaching"
        )
    if any(isinstance(hook, _BeforeStep) and hook.ortho is ortho for hook in inner._optimizer_step_pre_hooks.values()):
        warn_once(
            f"{ortho!r} is already attached to this {type(inner).__name__}: its penalty now counts once more in each step; "
            "call remove() of the handle that the first attach returned"
        )
    return add_in_step(ortho, inner)


WRAPPED = "optimizer", "base_optimizer", "_optimizer", "optim"
"""Attributes under which wrappers keep the optimizer that they step."""


def _unwrap(optimizer: object) -> Optimizer | None:
    """The optimizer whose ``step`` runs hooks: itself, or the one that it wraps; None if there is none."""
    visits: set[int] = set()
    while id(optimizer) not in visits:
        # A wrapper may call itself an Optimizer without having been initialised as one.
        if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
            return optimizer
        visits.add(id(optimizer))
        optimizer = next((inner for name in WRAPPED if (inner := getattr(optimizer, name, None)) is not None), None)
    return None


def check_trained(ortho: Regularizer, *optimizers: Optimizer) -> None:
    """Raise ``ValueError`` unless the optimizers together hold every regularized parameter that asks for a gradient."""
    reshard(ortho.model)
    trained_ids = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
    missing = [
        layer.name
        for layer in ortho.layers
        if not trained_ids.issuperset(id(parameter) for parameter in layer.sources if parameter.requires_grad)
    ]
    if missing:
        raise ValueError(
            f"the optimizer does not train {len(missing)} of {len(ortho.layers)} regularized layers: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; pass the optimizer that does, or make one Regularizer per optimizer"
        )


def add_in_step(ortho: Regularizer, optimizer: Optimizer) -> RemovableHandle:
    """:func:`attach` without its check: each step serves those regularized parameters that the optimizer then holds."""
    return optimizer.register_step_pre_hook(_BeforeStep(ortho))


@dataclass(frozen=True, eq=False)
class _BeforeStep:
    """The hook that adds the penalty's gradient; a class, so that :func:`attach` knows its own hooks."""

    ortho: Regularizer

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch passes the optimizer itself as the first of args.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            # A fused optimizer under a GradScaler divides by this scale itself, inside its step.
            scale = getattr(optimizer, "grad_scale", None)
            self.ortho.add_grad_(1.0 if scale is None else scale, only=_parameters(optimizer))
            return None

        # One strength for all calls of the closure: a line search compares the values of one loss.
        due = functools.cache(self.ortho._due)

        def with_penalty() -> Any:
            with torch.enable_grad():
                loss = closure()
            penalty = self.ortho._add_grad_(1.0, _parameters(optimizer), due)
            return loss if loss is None else loss + penalty

        return args[:1], {**kwargs, "closure": with_penalty}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
