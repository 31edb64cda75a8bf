"""Tensors that penalties need beside the weights: computed once for a device, in ways that a device need not wait for."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["cached", "on_device", "scattered"]

P = ParamSpec("P")
R = TypeVar("R")


def cached(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the tensors that a function computes from its arguments, at most ``size`` results.

    They are ordinary tensors, even if first asked for in inference mode: autograd may save them in later calls. A penalty that
    keeps what it needs on the device waits for no copy from the host.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(size)
        def cached_function(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.is_inference_mode_enabled():  # a compiler does not follow the switch
                return function(*args, **kwargs)
            with torch.inference_mode(False):
                return function(*args, **kwargs)

        return cast(Callable[P, R], functools.wraps(function)(cached_function))

    return decorate


def on_device(number: int | Tensor, device: torch.device) -> Tensor:
    """A whole number as a tensor on a device, which is not waited for."""
    return number.to(device) if isinstance(number, Tensor) else torch.full((), number, device=device)


def scattered(count: int) -> Float[Tensor, "count"]:  # noqa: F821
    """Numbers in ``[-1/2, 1/2)`` without visible order, always the same: of no generator, which no compiler would follow."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device="cpu").mul(12.9898).sin() * 43758.5453
    return numbers - numbers.floor() - 0.5
