"""Warnings and errors about weights: too long for their penalty, resized, NaN or infinite."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from orthokit.checks import warn_once
from orthokit.gram import lengths, outside_autocast
from orthokit.kernel import Kernel, KernelMeasure, plain_weight
from orthokit.layers import Layer
from orthokit.penalties.base import is_squared
from orthokit.schedules import Schedule, cosine, linear, warmup

__all__ = ["check_shape", "name_layers", "warn_of_long_filters"]

LONG = 4.0
"""The usual initialisations make shorter filters (up to 3.5, in 1x1 convolutions with six times fewer outputs than inputs).
Filters of pretrained networks are 5 to 20 times longer than 1."""


def warn_of_long_filters(penalty: KernelMeasure, schedule: Schedule, layers: Iterable[Layer], ranks: Mapping[str, int]) -> None:
    """Warn where a squared penalty meets long filters and would throw them away.

    The gradient of a squared penalty grows with the cube of the length. For ``||K K^T - I||^2`` and filters of length ``l`` a
    step moves a kernel by ``4 * strength * (l^2 - 1)`` times its own length times the learning rate. A learning rate of 0.1 with
    momentum 0.9 makes a rate of 1 in the long run. The warning comes where a step then moves a kernel by more than a tenth: a
    ResNet-8 forgot everything at a half, and nothing at a twentieth (docs/fine-tuning.md).
    """
    if not is_squared(penalty, otherwise=False):
        return
    # Computed weights are left out: other weights train behind them, and a spectral norm is far off before its first steps.
    plain = (layer for layer in layers if plain_weight(layer.module, layer.weight) is not None and not layer.frozen)
    kernels = ((layer.name, replace(layer.kernel, rank=ranks.get(layer.name))) for layer in plain)
    long = [(name, kernel, length) for name, kernel in kernels if LONG < (length := lengths(_matrix(kernel))).max() < torch.inf]
    if not long:
        return
    steps = [_step(penalty, kernel) for _, kernel, _ in long]
    end = schedule.steps if isinstance(schedule, (warmup, linear, cosine)) else 0  # a warm-up begins with 0
    strength = max(schedule(0), schedule(end))
    worst = max(range(len(long)), key=lambda index: steps[index][1])
    name, _, length = long[worst]
    if (step := strength * steps[worst][1]) > 0.1:
        warn_once(
            f"{penalty!r} is squared, and {len(long)} of the layers have filters far longer than 1 (in {name!r} the median "
            f"length is {length.median().item():.3g}, the largest {length.max().item():.3g}), as pretrained networks do: it adds "
            f"{strength * sum(value for value, _ in steps):.3g} to the loss, and at a learning rate of 0.1 with momentum 0.9 "
            f"moves {name!r} by {step:.3g} times its own length. To keep what the network learned, leave lengths alone with "
            f"Disentangled(weights=(0, 1)); or take squared=False, a strength below {0.1 * strength / step:.1g}, or retract_() "
            "with a small rate. See docs/fine-tuning.md"
        )


def _matrix(kernel: Kernel) -> Tensor:
    return kernel.matrix.detach().float()


def _step(penalty: KernelMeasure, kernel: Kernel) -> tuple[float, float]:
    """The penalty's value, and how long its gradient is, in lengths of the kernel."""
    with torch.inference_mode(False), torch.enable_grad(), outside_autocast(kernel.weight.device):
        weight = kernel.weight.detach().clone().float().requires_grad_()
        try:
            value = penalty(replace(kernel, weight=weight)).sum()
        except FloatingPointError:  # the squares overflow
            return torch.inf, torch.inf
        (gradient,) = torch.autograd.grad(value, weight, allow_unused=True) if value.requires_grad else (None,)
        return value.item(), 0.0 if gradient is None else (gradient.norm() / weight.norm()).item()


def check_shape(layer: Layer, rank: object, before: torch.Size | None, now: torch.Size) -> None:
    """Raise ``ValueError`` where a layer was resized after a transition dimension was chosen for its shape."""
    if rank is not None and before is not None and before != now:
        raise ValueError(
            f"layer {layer.name!r} had a weight of shape {tuple(before)} when this Regularizer was made, and has {tuple(now)} "
            f"now; its transition dimension {rank} was chosen for the former: make a new Regularizer"
        )


def name_layers(layers: Sequence[Layer], error: FloatingPointError) -> FloatingPointError:
    """``error`` with the names of the layers that hold NaN or infinite weights, or of all ``layers`` where none does."""
    names = [layer.name for layer in layers if not layer.kernel.weight.isfinite().all()]
    return FloatingPointError(f"layer {', '.join(names or [layer.name for layer in layers])}: {error}")
