"""Initialisation with orthonormal filters, of any convolution."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["orthogonal_"]


def _set(module: nn.Module, weight: Tensor) -> None:
    """Set a layer's weight, or what the hooks of ``torch.nn.utils`` (spectral_norm, weight_norm) compute the weight from."""
    parameters = {name: parameter.detach() for name, parameter in module._parameters.items() if parameter is not None}
    if target := parameters.keys() & {"weight", "weight_orig", "weight_v"}:
        parameters[target.pop()].copy_(weight)
    else:
        raise ValueError("it is computed in an unknown way")
    if (lengths := parameters.get("weight_g")) is not None:
        over = [dim for dim, length in enumerate(lengths.shape) if length == 1]
        lengths.copy_(torch.linalg.vector_norm(weight, dim=over, keepdim=True))


def orthogonal_(module: nn.modules.conv._ConvNd, name: str = "") -> None:
    """Give a convolution orthonormal filters, or orthonormal columns where it has more filters than weights per filter.

    Filters are drawn from the global generator. A weight that is computed from others (``torch.nn.utils.parametrizations``) is
    set through these.

    Raises:
        ValueError: the parametrization cannot express such a weight.
    """
    across = module.transposed  # then filters lie along the second dimension
    weight = module.weight.detach().clone()
    for group in weight.chunk(module.groups):
        filters = group.transpose(0, 1).contiguous() if across else group
        nn.init.orthogonal_(filters)
        if across:
            group.copy_(filters.transpose(0, 1))
    try:
        if is_parametrized(module, "weight"):
            module.weight = weight
            if torch.cosine_similarity(module.weight.detach().flatten(), weight.flatten(), 0) < 0.9999:  # scaled, at most
                raise ValueError("its parametrization makes another one of it")
        else:
            _set(module, weight)
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f'init = "orthogonal" cannot set the weight of layer {name!r} ({error}); leave init out') from None
