"""Common corruptions of small photographs at five severities, as CIFAR-10-C defines them.

D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
https://arxiv.org/abs/1903.12261. Parameters: ``ImageNet-C/create_c/make_cifar_c.py`` of https://github.com/hendrycks/robustness.

Where ours differs from the published CIFAR-10-C:

* Eight of its nineteen corruptions. Many of the others need OpenCV, ImageMagick or pictures of frost. ``defocus_blur`` is among
  them: its kernel is known, but the rounding of OpenCV's single precision decides on one level of every twentieth pixel or so.
* The published noise came from an unseeded generator: ours has the same distribution, not the same draws. Between
  severities Gaussian noise is one draw scaled, and the values hit by impulse noise are hit at every higher one.
* JPEG depends on the version of the library behind Pillow.

Images that are not 32x32 get the same parameters, which then are not those of CIFAR-10-C (nor of ImageNet-C), and their
severities do not compare with its. Grey images are changed as one channel.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthokit.checks import check_count, did_you_mean
from orthokit.lab.atomic import replacing
from orthokit.lab.data.toy import need

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "VERSION",
    "brightness",
    "contrast",
    "corrupt",
    "corrupt_all",
    "gaussian_blur",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "pixelate",
    "shot_noise",
]

SEVERITIES = (1, 2, 3, 4, 5)

VERSION = 1
"""Part of the name of every cache file: raise it where any result changes."""

PART = 100
"""Images held at once as 64-bit floats."""

Change = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Images ``(n, h, w, c)`` in [0, 1] to images that are yet to be clipped."""


def gaussian_noise(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """``x + sigma z`` with normal ``z``."""
    sigma = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    draws = np.random.default_rng(0)
    return _apply(images, lambda x: x + sigma * draws.standard_normal(x.shape))


def shot_noise(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """``poisson(c x) / c``. The draws of an image depend on the images before it, not on those after it."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    draws = np.random.default_rng(0)
    return _apply(images, lambda x: draws.poisson(x * photons) / photons)


def impulse_noise(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """Values of each channel set to 0 or 1, each with half the probability ``amount``."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draws = np.random.default_rng(0)

    def change(x: NDArray[np.float64]) -> NDArray[np.float64]:
        chance, white = np.moveaxis(draws.random((len(x), 2, *x.shape[1:])), 1, 0)
        return np.where(chance < amount, np.where(white < 0.5, 1.0, 0.0), x)

    return _apply(images, change)


def gaussian_blur(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """A Gaussian cut off at four standard deviations; the border is repeated outwards."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    blur = need("scipy.ndimage", "gaussian_blur").gaussian_filter
    return _apply(images, lambda x: blur(x, (0, sigma, sigma, 0), mode="nearest", truncate=4.0))


def contrast(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """``m + c (x - m)`` with ``m`` the mean of each channel of each image."""
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]

    def change(x: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = x.mean((1, 2), keepdims=True)
        result: NDArray[np.float64] = (x - mean) * factor + mean
        return result

    return _apply(images, change)


def brightness(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """An amount added to the value in hue, saturation and value; to the grey of grey images."""
    amount = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    if _grey_or_colour("brightness", images) == "L":
        return _apply(images, lambda x: x + amount)

    def change(x: NDArray[np.float64]) -> NDArray[np.float64]:
        red, green, blue = channels = np.ascontiguousarray(np.moveaxis(x, -1, 0))
        high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        spread = high - low
        grey = spread == 0
        saturation, divisor = spread / np.where(grey, 1, high), np.where(grey, 1, spread)
        # Six sectors of hue, with the roundings of scikit-image: they decide about whole grey levels when truncated.
        hue = np.where(green == high, 2 + (blue - red) / divisor, (green - blue) / divisor)
        hue = np.where(blue == high, 4 + (red - green) / divisor, hue)
        sixths = np.where(grey, 0, hue / 6 % 1) * 6
        sector = np.floor(sixths)
        falling, share = sector % 2 == 1, sixths - sector
        value = np.minimum(high + amount, 1)
        middle = value * (1 - np.where(falling, share, 1 - share) * saturation)
        return np.stack([np.where(c == high, value, np.where(c == low, value * (1 - saturation), middle)) for c in channels], -1)

    return _apply(images, change)


def pixelate(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """Images reduced to ``int(c side)`` by averaging areas, and enlarged again."""
    factor = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[-2:]
    small = (int(width * factor), int(height * factor))
    if not all(small):
        raise ValueError(f"pixelate needs images of at least 2x2 pixels; got {height}x{width}")
    box = need("PIL.Image", "pixelate").Resampling.BOX
    return _each("pixelate", images, lambda picture: picture.resize(small, box).resize((width, height), box))


def jpeg_compression(images: UInt8[Tensor, "n c h w"], severity: int) -> UInt8[Tensor, "n c h w"]:
    """JPEG at the given quality, and back."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    image = need("PIL.Image", "jpeg_compression")

    def change(picture: Any) -> Any:
        picture.save(file := io.BytesIO(), "JPEG", quality=quality)
        return image.open(file)

    return _each("jpeg_compression", images, change)


CORRUPTIONS: dict[str, Callable[[UInt8[Tensor, "n c h w"], int], UInt8[Tensor, "n c h w"]]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def corrupt(images: UInt8[Tensor, "n c h w"], name: str, severity: int) -> UInt8[Tensor, "n c h w"]:
    """The images after a corruption.

    An image's corruption does not depend on the images after it.

    Args:
        images: from 0 to 255, grey or RGB (any channels but for ``brightness``, ``pixelate`` and ``jpeg_compression``).
        name: a key of ``CORRUPTIONS``.
        severity: from 1 to 5.

    Raises:
        ValueError: an unknown name, no such severity, or channels that the corruption is not defined for.
        ModuleNotFoundError: SciPy or Pillow is missing.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}{did_you_mean(name, CORRUPTIONS)}")
    check_count("severity", severity, SEVERITIES[0], SEVERITIES[-1])
    return CORRUPTIONS[name](images, severity)


def corrupt_all(images: UInt8[Tensor, "n c h w"], name: str, *, folder: Path | None = None) -> UInt8[Tensor, "5 n c h w"]:
    """:func:`corrupt` at every severity, from a file in ``folder`` if one is there, else computed and kept there if possible.

    The file's name tells the corruption and the SHA-256 of the images; a damaged one is replaced. No file is written unless
    ``folder`` exists and can be written to.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}{did_you_mean(name, CORRUPTIONS)}")
    if folder is None:
        return torch.stack([corrupt(images, name, severity) for severity in SEVERITIES])
    key = _digest(images, f"{name}, version {VERSION}")
    path = folder / f".orthokit-{name}-{key[:16]}.safetensors"
    result = _read(path, key)
    if result is None:
        result = torch.stack([corrupt(images, name, severity) for severity in SEVERITIES]).cpu()
        if folder.is_dir():
            with contextlib.suppress(SafetensorError, OSError), replacing(path) as part:
                save_file({"images": result}, part, {"key": key, "content": _digest(result, key)})
    return result.to(images.device)


def _read(path: Path, key: str) -> UInt8[Tensor, "5 n c h w"] | None:
    """The content of a cache file, if it is whole and of this ``key``."""
    try:
        with safe_open(path, "pt") as file:
            metadata, result = file.metadata() or {}, file.get_tensor("images")
    except (SafetensorError, OSError):
        return None
    is_intact = metadata.get("key") == key and metadata.get("content") == _digest(result, key)
    return result if is_intact else None


def _digest(images: Tensor, about: str) -> str:
    digest = hashlib.sha256(f"{about} {images.dtype}{tuple(images.shape)}".encode())
    digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _apply(images: UInt8[Tensor, "n c h w"], change: Change) -> UInt8[Tensor, "n c h w"]:
    """The images changed in parts and in order, truncated to bytes as the authors do."""
    parts = []
    for part in images.cpu().split(PART):
        x = np.ascontiguousarray(part.permute(0, 2, 3, 1).numpy()) / 255.0
        result = (np.clip(change(x), 0, 1) * 255).astype(np.uint8)
        parts.append(torch.from_numpy(result).permute(0, 3, 1, 2).contiguous())
    return torch.cat(parts).to(images.device)


def _each(name: str, images: UInt8[Tensor, "n c h w"], change: Callable[[Any], Any]) -> UInt8[Tensor, "n c h w"]:
    """The images changed one by one, as Pillow pictures."""
    mode, image = _grey_or_colour(name, images), need("PIL.Image", name)
    shape = (len(images), *images.shape[-2:], images.shape[1])
    result = np.empty(shape, np.uint8)
    for row, picture in enumerate(images.cpu().permute(0, 2, 3, 1).contiguous().numpy()):
        result[row] = np.asarray(change(image.fromarray(picture.squeeze(-1) if mode == "L" else picture))).reshape(shape[1:])
    return torch.from_numpy(result).permute(0, 3, 1, 2).contiguous().to(images.device)


def _grey_or_colour(name: str, images: UInt8[Tensor, "n c h w"]) -> str:
    """Pillow's mode for images of this shape."""
    modes = {1: "L", 3: "RGB"}
    if images.shape[1] not in modes:
        raise ValueError(f"{name} is defined for grey and RGB images, with 1 or 3 channels; got {images.shape[1]} channels")
    return modes[images.shape[1]]
