"""Gradients that are added to ``.grad`` of parameters, past autograd."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["add_to_grads", "grad_of"]


def add_to_grads(
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
    """``parameter.grad``, zeros where there was none; a sparse one becomes dense, as backward makes it of sparse plus dense."""
    if parameter.grad is None:
        # Fused optimizers want the gradient laid out as the parameter, e.g. channels_last.
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout != torch.strided:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad
