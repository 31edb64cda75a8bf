"""Initialisations of any convolution: orthonormal filters, and He's."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["Init", "initialise_"]

Init = Literal["orthogonal", "he"]


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


def initialise_(module: nn.modules.conv._ConvNd, init: Init, name: str = "") -> None:
    """Draw the weight of a convolution anew from the global generator; a bias stays as it is.

    A weight that is computed from others (``torch.nn.utils.parametrizations``) is set through these.

    Args:
        module: the convolution.
        init: ``"orthogonal"``, orthonormal filters, or orthonormal columns where there are more filters than weights per filter;
            ``"he"``, normal with variance 2 over the fan-out (He et al. 2015, https://arxiv.org/abs/1502.01852).
        name: of the layer, for messages.

    Raises:
        ValueError: the parametrization cannot express such a weight.
    """
    across = module.transposed  # then filters lie along the second dimension
    weight = module.weight.detach().clone()
    for group in weight.chunk(module.groups):
        filters = group.transpose(0, 1).contiguous() if across else group
        if init == "orthogonal":
            nn.init.orthogonal_(filters)
        else:
            nn.init.kaiming_normal_(filters, mode="fan_out", nonlinearity="relu")
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
        raise ValueError(f'init = "{init}" cannot set the weight of layer {name!r} ({error}); leave init out') from None
