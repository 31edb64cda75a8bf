"""Residual networks for small images."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.checks import check_count
from orthokit.select import state_of


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR residual network of He et al. (2015, https://arxiv.org/abs/1512.03385), with projection shortcuts.

    Three stages of 16, 32 and 64 filters. The 1x1 projections, 32x16 and 64x32, have more filters than weights per filter:
    they are over-determined.

    Args:
        depth: ``6 b + 2`` layers for ``b`` blocks a stage: 8, 14, 20, ...
        channels: of the images.
        classes: outputs.
    """

    def __init__(self, depth: int = 8, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        check_count("depth", depth, 8)
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6 b + 2 for b blocks a stage (8, 14, 20, ...); got {depth}")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, width_in = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(depth // 6):
                blocks.append(BasicBlock(width_in, width, 2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ResNet":
        """The network whose state dict is in ``checkpoint``; depth, channels and classes are read off the shapes.

        Raises:
            ValueError: the weights are not those of this network.
        """
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state_of(checkpoint).items()}
        blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
        try:
            channels, classes = state["conv.weight"].shape[1], state["fc.weight"].shape[0]
            network = cls(2 * len(blocks) + 2, channels, classes)
            network.load_state_dict(state)
        except (KeyError, IndexError, AttributeError, ValueError, RuntimeError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(
                "these are not the weights of orthokit.lab.models.ResNet, the only network that can be rebuilt from a checkpoint "
                f"({reason[:200]}); for another call orthokit.estimate(model, loader)"
            ) from None
        return network
