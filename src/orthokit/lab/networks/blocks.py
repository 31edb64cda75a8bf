"""Parts of the networks: convolutions, normalisation, stages, He's initialisation."""

from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from orthokit.checks import check_choice, check_count

__all__ = ["DEEPEST", "NORMS", "WIDEST", "Norm", "check_sizes", "conv", "he_", "norm_of", "stages"]

Norm = Literal["batch", "group", "none"]
NORMS: tuple[Norm, ...] = ("batch", "group", "none")


def norm_of(norm: Norm, width: int) -> nn.Module:
    """The normalisation of ``width`` channels."""
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "none":
        return nn.Identity()
    groups = min(32, max(1, width // 8))
    if width % groups:
        raise ValueError(f"norm='group' needs layers whose filters {groups} groups divide; got {width} filters: change the width")
    return nn.GroupNorm(groups, width)


def conv(norm: Norm, width_in: int, width: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width up to its stride; with a bias where no normalisation has one."""
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=norm == "none")


def stages(
    block: Callable[[int, int, int], nn.Module], width_in: int, widths: Iterable[int], counts: Iterable[int]
) -> nn.Sequential:
    """``counts[s]`` blocks of ``widths[s]`` filters; the first of each stage but the first halves height and width."""
    blocks = []
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for index in range(count):
            blocks.append(block(width_in, width, 2 if stage > 0 and index == 0 else 1))
            width_in = width
    return nn.Sequential(*blocks)


def he_(network: nn.Module) -> None:
    """Initialise convolutions as He et al. do (2015, https://arxiv.org/abs/1502.01852), scaled to the fan-out; biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


DEEPEST, WIDEST = 2000, 100
"""Most layers, and most times the filters of a thin network."""


def check_sizes(channels: int, classes: int, norm: Norm) -> None:
    check_count("channels", channels, most=2**16)
    check_count("classes", classes, most=2**20)
    check_choice("norm", norm, NORMS)
