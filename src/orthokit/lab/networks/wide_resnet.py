"""Wide residual networks."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.checks import check_count, check_number
from orthokit.lab.networks.blocks import DEEPEST, WIDEST, Norm, check_sizes, conv, he_, norm_of, stages

__all__ = ["WideBlock", "WideResNet"]


class WideBlock(nn.Module):
    """Normalise, rectify, convolve, twice, with dropout before the second convolution; nothing after the sum.

    A projection reads the normalised input, as in the authors' code.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, norm: Norm = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = norm_of(norm, width_in)
        self.conv1 = conv(norm, width_in, width, 3, stride)
        self.bn2 = norm_of(norm, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(norm, width, width)
        self.shortcut = None if stride == 1 and width_in == width else conv(norm, width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(y)
        inside: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(y)))))
        return inside + around


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` of Zagoruyko & Komodakis (2016, https://arxiv.org/abs/1605.07146), with pre-activation blocks.

    Three stages of 16, 32 and 64 times ``width`` filters. He's initialisation (normal, fan-out), biases zero.

    Tall, with more filters than weights per filter: every 1x1 projection; with ``width`` above 9 the first 3x3
    convolution of the first block, ``16 width x 144``; the first convolution, 16x9, of images with one channel.

    Args:
        depth: ``6 b + 4`` layers for ``b`` blocks a stage: 10, 16, 22, 28, ...
        width: how many times the filters of the thin network.
        channels: of the images.
        classes: outputs.
        dropout: probability, between the two convolutions of a block; the paper uses 0.3 on CIFAR, or none.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias (and
            the signal grows with each block).
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        channels: int = 3,
        classes: int = 10,
        *,
        dropout: float = 0.0,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        check_count("depth", depth, 10, most=DEEPEST)
        if depth % 6 != 4:
            raise ValueError(f"depth must be 6 b + 4 for b blocks a stage (10, 16, 22, 28, ...); got {depth}")
        check_count("width", width, most=WIDEST)
        check_sizes(channels, classes, norm)
        check_number("dropout", dropout, 0, 1)
        widths = [16 * width, 32 * width, 64 * width]
        self.conv = conv(norm, channels, 16)
        self.blocks = stages(partial(WideBlock, norm=norm, dropout=dropout), 16, widths, [depth // 6] * 3)
        self.bn = norm_of(norm, widths[-1])
        self.fc = nn.Linear(widths[-1], classes)
        he_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = F.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits
