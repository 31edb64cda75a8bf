"""Residual networks: the one of He et al. for CIFAR, and the one for ImageNet on small images."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.checkpoint.statedict import bare, pick
from orthokit.checks import check_choice, check_count
from orthokit.lab.networks.blocks import DEEPEST, WIDEST, Norm, check_sizes, conv, he_, norm_of, stages

__all__ = ["SHORTCUTS", "BasicBlock", "Bottleneck", "ImageNetResNet", "PadShortcut", "ResNet", "state_in"]

Shortcut = Literal["projection", "identity"]
Block = Literal["basic", "bottleneck"]
SHORTCUTS: tuple[Shortcut, ...] = ("projection", "identity")
BLOCKS: tuple[Block, ...] = ("basic", "bottleneck")


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel of the input, and ``extra`` channels of zeros after its own: no parameters."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, h, w) -> (n, c + extra, h / stride, w / stride)``."""
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


def _shortcut(shortcut: Shortcut, norm: Norm, width_in: int, width: int, stride: int) -> nn.Module:
    """The way around a block; empty where the shape stays."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    if shortcut == "identity":
        return PadShortcut(stride, width - width_in)
    return nn.Sequential(conv(norm, width_in, width, 1, stride), norm_of(norm, width))


class BasicBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut."""

    def __init__(
        self, width_in: int, width: int, stride: int, *, norm: Norm = "batch", shortcut: Shortcut = "projection"
    ) -> None:
        super().__init__()
        self.conv1 = conv(norm, width_in, width, 3, stride)
        self.bn1 = norm_of(norm, width)
        self.conv2 = conv(norm, width, width)
        self.bn2 = norm_of(norm, width)
        self.shortcut = _shortcut(shortcut, norm, width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3 with the stride, 1x1 back, around a projected shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, *, norm: Norm = "batch") -> None:
        super().__init__()
        inner = width // 4
        self.conv1 = conv(norm, width_in, inner, 1)
        self.bn1 = norm_of(norm, inner)
        self.conv2 = conv(norm, inner, inner, 3, stride)
        self.bn2 = norm_of(norm, inner)
        self.conv3 = conv(norm, inner, width, 1)
        self.bn3 = norm_of(norm, width)
        self.shortcut = _shortcut("projection", norm, width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def state_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint, without the prefixes of DistributedDataParallel and ``torch.compile``."""
    return bare(pick(checkpoint)[0])


class ResNet(nn.Module):
    """The CIFAR residual network of He et al. (2015, https://arxiv.org/abs/1512.03385).

    Three stages of 16, 32 and 64 filters (``filters``, twice and four times as many); PyTorch's initialisation. The 1x1
    projections, 32x16 and 64x32, have more filters than weights per filter: they are tall. So is the first convolution, 16x9,
    of images with one channel. With bottlenecks the blocks put out four times as many filters, and the last convolution of
    each, with four filters for each weight, is tall too: 12 of the 31 convolutions of 29 layers.

    Args:
        depth: ``6 b + 2`` layers for ``b`` basic blocks a stage (8, 14, ...), ``9 b + 2`` for ``b`` bottlenecks (11, 20, ...).
        channels: of the images.
        classes: outputs.
        shortcut: where the shape changes, ``"projection"`` by a 1x1 convolution (the paper's option B) or ``"identity"``, the
            strided input with zeros for the new channels (its option A, the one it reports for CIFAR).
        block: ``"basic"``, two 3x3 convolutions, or ``"bottleneck"``, a 3x3 between two 1x1, with projected shortcuts.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias.
        filters: of the first convolution and stage.
    """

    def __init__(
        self,
        depth: int = 8,
        channels: int = 3,
        classes: int = 10,
        *,
        shortcut: Shortcut = "projection",
        norm: Norm = "batch",
        block: Block = "basic",
        filters: int = 16,
    ) -> None:
        super().__init__()
        check_choice("block", block, BLOCKS)
        per_block = 6 if block == "basic" else 9
        check_count("depth", depth, per_block + 2, most=DEEPEST)
        if depth % per_block != 2:
            examples = ", ".join(str(per_block * blocks + 2) for blocks in (1, 2, 3))
            raise ValueError(f"depth must be {per_block} b + 2 for b {block} blocks a stage ({examples}, ...); got {depth}")
        check_count("filters", filters, most=16 * WIDEST)
        check_sizes(channels, classes, norm)
        check_choice("shortcut", shortcut, SHORTCUTS)
        if block == "bottleneck" and shortcut == "identity":
            raise ValueError('block="bottleneck" has projected shortcuts; leave shortcut="identity" out')
        self.conv = conv(norm, channels, filters)
        self.bn = norm_of(norm, filters)
        factor, make = (1, partial(BasicBlock, shortcut=shortcut)) if block == "basic" else (4, Bottleneck)
        widths = [factor * filters * multiple for multiple in (1, 2, 4)]
        self.blocks = stages(partial(make, norm=norm), filters, widths, [depth // per_block] * 3)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ResNet":
        """The network whose state dict is in ``checkpoint``; its arguments are read off the names and shapes.

        Raises:
            ValueError: the weights are not those of this network.
        """
        state = state_in(checkpoint)
        blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
        shortcut: Shortcut = "projection" if any(".shortcut." in key for key in state) else "identity"
        norm: Norm = "batch" if "bn.running_mean" in state else "group" if "bn.weight" in state else "none"
        block: Block = "bottleneck" if "blocks.0.conv3.weight" in state else "basic"
        try:
            (filters, channels), classes = state["conv.weight"].shape[:2], state["fc.weight"].shape[0]
            depth = (2 if block == "basic" else 3) * len(blocks) + 2
            network = cls(depth, channels, classes, shortcut=shortcut, norm=norm, block=block, filters=filters)
            network.load_state_dict(state)
        except (KeyError, IndexError, AttributeError, ValueError, RuntimeError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(
                "these are not the weights of orthokit.lab.networks.resnet.ResNet, the only network that can be rebuilt "
                f"from a checkpoint ({reason[:200]}); for another call orthokit.estimate(model, loader)"
            ) from None
        return network


class ImageNetResNet(nn.Module):
    """ResNet-18, 34, 50 or 101 of He et al. (2015, https://arxiv.org/abs/1512.03385) as widely used on 32x32 images.

    The paper's four stages for ImageNet, with a 3x3 convolution of stride 1 in place of the 7x7 and the max pooling. Basic
    blocks of 64, 128, 256 and 512 filters up to depth 34, from 50 bottlenecks of four times that many, with their stride on
    the 3x3 convolution. He's initialisation (normal, fan-out), biases zero.

    Tall, with more filters than weights per filter: the first convolution, 64x27 for three channels; every 1x1
    projection; the last 1x1 convolution of every bottleneck, four filters for each weight.

    Args:
        depth: 18, 34, 50 or 101.
        channels: of the images.
        classes: outputs.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias (and
            the signal grows with each block: the first logits of ResNet-101 are in the thousands).
    """

    def __init__(self, depth: int = 18, channels: int = 3, classes: int = 10, *, norm: Norm = "batch") -> None:
        super().__init__()
        counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
        check_choice("depth", depth, counts)
        check_sizes(channels, classes, norm)
        block, factor = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        self.conv = conv(norm, channels, 64)
        self.bn = norm_of(norm, 64)
        self.blocks = stages(partial(block, norm=norm), 64, [factor * width for width in (64, 128, 256, 512)], counts[depth])
        self.fc = nn.Linear(512 * factor, classes)
        he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits
