"""Parameter groups for an optimizer: weight decay on all parameters but those that a penalty keeps at length 1."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from orthokit.checks import check_flag, check_number
from orthokit.layers import Layer
from orthokit.wrappers import reshard

__all__ = ["HasLayers", "param_groups"]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@runtime_checkable
class HasLayers(Protocol):
    """The part of a :class:`~orthokit.Regularizer` that parameter groups need."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...


def param_groups(
    model: nn.Module, *regularizers: HasLayers, weight_decay: float, decay_biases_and_norms: bool = True
) -> list[dict[str, Any]]:
    """The parameters of ``model`` for an optimizer, each once, with weight decay on all but the regularized kernels.

    Decay would pull the lengths of filters towards 0 while a penalty pulls them towards 1.

    Args:
        model: the model that the regularizers were made for.
        regularizers: one or more; a kernel that any of them regularizes is not decayed.
        weight_decay: the decay of the first group.
        decay_biases_and_norms: False puts parameters of fewer than two dimensions, and all of normalisation layers, into a group
            without decay.

    Returns:
        Up to three groups, without the empty ones: decayed parameters, regularized kernels, biases and norms without decay.

    Raises:
        ValueError: ``model`` holds none of the kernels of a regularizer.
        TypeError: an argument is of the wrong kind, or there is no regularizer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> convs, linears = (Regularizer(model, orthokit.SO(), strength=0.1, where=w) for w in (orthokit.convs, orthokit.linears))
    >>> [len(group["params"]) for group in orthokit.param_groups(model, convs, linears, weight_decay=5e-4)]
    [4, 2]
    """
    check_number("weight_decay", weight_decay)
    check_flag("decay_biases_and_norms", decay_biases_and_norms)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not regularizers or not all(isinstance(each, HasLayers) for each in regularizers):
        raise TypeError(f"param_groups takes a model and one or more Regularizers; got {regularizers!r:.200}")
    reshard(model)
    parameters = set(model.parameters())
    kernels: set[Tensor] = set()
    for each in regularizers:
        sources = {parameter for layer in each.layers for parameter in layer.sources}
        if not sources & parameters:
            raise ValueError(
                f"{type(model).__name__} holds none of the regularized kernels; pass the model that was selected from"
            )
        kernels |= sources
    others = set() if decay_biases_and_norms else set(_biases_and_norms(model)) - kernels
    groups = [
        {"params": [p for p in model.parameters() if p not in kernels and p not in others], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p in kernels], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p in others], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _biases_and_norms(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, NORMS):
                yield parameter
