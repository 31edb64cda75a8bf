"""Batches of training images: order and augmentation, both keyed.

The fate of an image depends on (seed, epoch, its index) and nothing else: not on the order, the process, the device, the batch
it falls into, or whether training was interrupted in between. There is no generator whose state could be lost.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from orthokit.lab.data.images import ImageSet

__all__ = ["Augment", "Batches", "key_of", "scramble"]

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The odd constant of SplitMix64 (Steele, Lea, Flood 2014), as a signed integer: distinct counters, well spread."""


def scramble(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The finalizer of SplitMix64: 64 bits in, 64 bits that look random out, a bijection; the same on every device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & int(2 ** (64 - bits) - 1)  # less the copies of the sign that >> moves in


def key_of(*parts: int) -> int:
    """One signed 64-bit key of several counters, such as (seed, epoch).

    >>> from orthokit.lab.data.augment import key_of
    >>> key_of(0, 1) == key_of(0, 1), key_of(0, 1) == key_of(1, 0)
    (True, False)
    """
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = scramble(key + torch.tensor(part + 1) * GOLDEN)
    return int(key)


@dataclass(frozen=True)
class Augment:
    """Random crop, horizontal flip and cutout.

    Args:
        pad: pixels of black around the image, from which a window of the image's size is cut at random; 0 for none.
        flip: mirror every other image.
        cutout: side of a square set to the mean colour, its centre anywhere in the image (DeVries, Taylor 2017,
            https://arxiv.org/abs/1708.04552); 0 for none.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def __call__(
        self, pixels: UInt8[Tensor, "n c h w"], index: Int[Tensor, " n"], key: int, fill: Float[Tensor, " c"]
    ) -> UInt8[Tensor, "n c h w"]:
        """The images whose numbers in the set are ``index``, as they look in the epoch of ``key``.

        Args:
            pixels: ``(n, c, h, w)``.
            index: ``(n,)`` numbers of the images in their set.
            key: :func:`key_of` seed and epoch.
            fill: ``(c,)``, the colour of what cutout removes.
        """
        (n, channels, height, width), device = pixels.shape, pixels.device
        draws = scramble(index * GOLDEN + key)

        def draw(stream: int, below: int) -> Tensor:
            return _shift(scramble(draws ^ stream), 1) % below

        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        if self.pad or self.flip:
            canvas = F.pad(pixels, (self.pad,) * 4)
            mirror = (draw(1, 2) * self.flip)[:, None]
            y = draw(2, 2 * self.pad + 1)[:, None] + rows
            x = draw(3, 2 * self.pad + 1)[:, None] + torch.where(mirror == 1, columns.flip(0), columns)
            positions = (y[:, :, None] * canvas.shape[-1] + x[:, None, :]).reshape(n, 1, -1).expand(-1, channels, -1)
            pixels = canvas.flatten(2).gather(2, positions).view(n, channels, height, width)
        if self.cutout:
            low = self.cutout // 2
            y = (rows - draw(4, height)[:, None] + low)[:, None, :, None]
            x = (columns - draw(5, width)[:, None] + low)[:, None, None, :]
            hole = (y >= 0) & (y < self.cutout) & (x >= 0) & (x < self.cutout)
            pixels = torch.where(hole, fill.round().to(torch.uint8)[:, None, None], pixels)
        return pixels


@dataclass(frozen=True, eq=False)
class Batches:
    """The training images of a set in batches, shuffled anew every epoch; what does not fill a batch is left to the next epoch.

    Args:
        data: the set.
        batch: images in a batch, over all processes together.
        augment: what is done to the images.
        seed: the run's.
        process: the number of this process, below ``processes``; each gets its own part of a batch.
        processes: must divide ``batch``.

    Raises:
        ValueError: a batch is larger than the set, or does not divide among the processes.
    """

    data: ImageSet
    batch: int
    augment: Augment
    seed: int
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(f"a batch of {self.batch} is larger than the {len(self.data.train)} training images")
        if self.batch % self.processes:
            raise ValueError(f"a batch of {self.batch} does not divide among {self.processes} processes")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.data.train) // self.batch

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """The order of the images in an epoch."""
        generator = torch.Generator().manual_seed(key_of(self.seed, epoch) % 2**63)
        return torch.randperm(len(self.data.train), generator=generator).to(self.data.train.labels.device)

    def get(self, epoch: int, index: int, order: Int[Tensor, " n"]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        """The part of this process in batch ``index`` of an epoch: normalised images and their classes."""
        rows = order[index * self.batch : (index + 1) * self.batch].chunk(self.processes)[self.process]
        train = self.data.train
        pixels = self.augment(train.pixels[rows], rows, key_of(self.seed, epoch), self.data.mean)
        return self.data.normalise(pixels), train.labels[rows]
