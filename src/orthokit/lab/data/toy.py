"""Sets that need no download: digits, patches of photographs, synthetic pictures."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from orthokit.checks import install
from orthokit.lab.data.cifar import Parts

__all__ = ["PHOTOGRAPHS", "TOYS", "digits", "need", "patches", "synthetic"]

PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "ihc", "motorcycle_left")
"""The classes of ``patches``: losslessly stored pictures inside the scikit-image wheel."""


def need(module: str, user: str) -> Any:
    """A module of the lab's libraries.

    Raises:
        ModuleNotFoundError: the module is missing; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{user} needs {error.name}: {install('lab')}", name=error.name) from None


def digits() -> Parts:
    """The digits of scikit-learn."""
    pixels, labels = need("sklearn.datasets", "digits").load_digits(return_X_y=True)
    images = (pixels * 15).astype(np.uint8).reshape(-1, 1, 8, 8)
    split = need("sklearn.model_selection", "digits").train_test_split
    train, test, *classes = split(images, labels.astype(np.int64), train_size=300, stratify=labels, random_state=0)
    return Parts(*(torch.from_numpy(part) for part in (train, classes[0], test, classes[1])))


def patches() -> Parts:
    """Patches of the photographs of scikit-image."""
    image = need("PIL.Image", "patches")
    folder = Path(need("skimage", "patches").__file__).parent / "data"  # skimage.data may fetch what it does not find there
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in PHOTOGRAPHS:
        if not (path := folder / f"{name}.png").is_file():
            raise FileNotFoundError(f"patches need {path}, which this version of scikit-image does not ship; install another")
        with image.open(path) as file:
            photograph = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        _, height, width = photograph.shape
        for part, corners in zip(parts, _corners(height, width, generator), strict=True):
            part.append(torch.stack([photograph[:, y : y + 32, x : x + 32] for y, x in corners.tolist()]))
    pixels = [torch.cat(part) for part in parts]
    labels = [torch.arange(10).repeat_interleave(len(part[0])) for part in parts]
    return Parts(pixels[0], labels[0], pixels[1], labels[1])


def _corners(height: int, width: int, generator: torch.Generator) -> tuple[Int64[Tensor, "500 2"], Int64[Tensor, "100 2"]]:
    """Top left corners of training patches, within the left three quarters, and of test patches, within the right one."""
    border, corners = width * 3 // 4, []
    for count, left, right in ((500, 0, border), (100, border, width)):
        columns = right - left - 31
        positions = torch.randperm((height - 31) * columns, generator=generator)[:count]
        corners.append(torch.stack([positions // columns, left + positions % columns], 1))
    return corners[0], corners[1]


@functools.cache
def synthetic() -> Parts:
    """Pictures whose class is a smooth pattern, shifted at random (cyclically) and buried in another pattern and in noise.

    Nothing is rounded before the last step, so that the pictures are the same on any machine. They are made once a process.
    """
    generator = torch.Generator().manual_seed(0)
    step = torch.arange(32)
    weights = torch.zeros(32, 4).index_put_((step, step // 8), 8.0 - step.float() % 8)
    weights.index_put_((step, (step // 8 + 1) % 4), (step % 8).float())  # interpolates a cyclic grid of 4 linearly, times 8

    def smooth(count: int) -> Tensor:
        grid = torch.randint(-64, 65, (count, 3, 4, 4), generator=generator).float()
        return weights @ (grid.view(-1, 4) @ weights.T).view(count, 3, 4, 32) / 64

    patterns, channels, parts = smooth(10), torch.arange(3)[:, None, None], []
    for each in (500, 100):
        labels = torch.arange(10).repeat_interleave(each)
        shifts = torch.randint(0, 32, (2, len(labels)), generator=generator)
        rows, columns = ((step + shift[:, None]) % 32 for shift in shifts)
        signal = patterns[labels[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
        noise = torch.randint(-64, 65, signal.shape, generator=generator, dtype=torch.int16)
        pixels = smooth(len(labels)).add_(signal).add_(noise).add_(128)
        parts += [pixels.round_().clamp_(0, 255).byte().contiguous(memory_format=torch.channels_last), labels]
    return Parts(*parts)


TOYS: dict[str, Callable[[], Parts]] = {"digits": digits, "patches": patches, "synthetic": synthetic}
