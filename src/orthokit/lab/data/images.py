"""Image sets: CIFAR as published, and three that need no files: digits, patches of photographs, synthetic pictures."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from orthokit.checks import check_count, check_number, did_you_mean, warn_once
from orthokit.lab.atomic import replacing
from orthokit.lab.data import cifar
from orthokit.lab.data.cifar import RELEASES, Parts
from orthokit.lab.data.toy import TOYS, need

__all__ = ["SETS", "ImageSet", "Images", "Source", "arrange", "choose", "fingerprint_of", "load"]

SETS = {
    "cifar10": "CIFAR-10: 50,000 + 10,000 photographs of 10 kinds of objects, 32x32 RGB; in --root, or with --download",
    "cifar100": "CIFAR-100: 50,000 + 10,000 photographs of 100 kinds of objects, 32x32 RGB; in --root, or with --download",
    "digits": "300 + 1,497 handwritten digits, 8x8 grey; come with scikit-learn",
    "patches": "5,000 + 1,000 patches of 10 photographs, which of them?, 32x32 RGB; come with scikit-image",
    "synthetic": "5,000 + 1,000 pictures made of smooth random patterns, 10 classes, 32x32 RGB; computed",
}
"""Names, with how many training + test images a set has, and where they are from."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels from 0 to 255, and classes."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]  # noqa: F821

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> "Images":
        """A copy on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Training images, test images, and validation images if some were set aside.

    ``mean`` and ``std`` are those of the pixels of ``train``. ``fingerprint`` is the SHA-256 of the images and labels of the
    whole set at its native size: the same for every split and size, and whichever of its published forms it was read from.
    """

    name: str
    classes: int
    train: Images
    validation: Images | None
    test: Images
    mean: Float[Tensor, "c"]  # noqa: F821
    std: Float[Tensor, "c"]  # noqa: F821
    fingerprint: str

    def normalise(self, pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """``(pixels - mean) / std``: zero mean and unit variance over the training images."""
        return pixels.float().sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    def to(self, device: str | torch.device) -> "ImageSet":
        """A copy with all its tensors on ``device``."""
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            validation=None if self.validation is None else self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )


def load(
    name: str,
    *,
    root: str | Path = "data",
    train: int | None = None,
    validation: int = 0,
    size: int | None = None,
    noise: float = 0.0,
    download: bool = False,
) -> ImageSet:
    """One of ``SETS``, split once and for all: the same images for every seed.

    ``digits`` are E. Alpaydin and C. Kaynak's (UCI, 1998), their 17 greys multiplied by 15. The test patches of ``patches`` are
    from the right quarter of each photograph, the training patches from the rest, so that they share no pixel; none is fetched.
    CIFAR is decoded once and kept in ``root/.orthokit-<name>.safetensors`` until CIFAR's files or this one change.

    Args:
        name: a key of ``SETS``.
        root: folder that holds CIFAR unpacked or in its published archive; the other sets do not need it.
        train: training images, all by default; of each class in its proportion, out of those that validation leaves.
        validation: images to set aside from the published training images, of each class in its proportion.
        size: side in pixels, a divisor of the native one; areas are averaged and rounded, halves up.
        noise: share of the training images whose label is replaced by a class drawn at random, the same for every seed.
        download: fetch CIFAR's archive into ``root`` if ``root`` does not hold it.

    Raises:
        FileNotFoundError: CIFAR is not in ``root``.
        ValueError: an unknown name, impossible numbers, or files that are damaged or not CIFAR.
        ModuleNotFoundError: scikit-learn or scikit-image is missing.
    """
    if name not in SETS:
        raise ValueError(f"no data set {name!r}{did_you_mean(name, SETS)}")
    for option, value, low in (("train", train, 1), ("validation", validation, 0), ("size", size, 1)):
        if value is not None:
            check_count(option, value, low)
    if name in RELEASES:
        parts, fingerprint = _load_cifar(name, Path(root), download)
    else:
        if download:
            warn_once(f"download does nothing for {name}, which needs no files")
        parts = TOYS[name]()
        fingerprint = fingerprint_of(parts)
    return arrange(name, Source(parts, fingerprint), train=train, validation=validation, size=size, noise=noise)


class Source(NamedTuple):
    """A whole set at its native size, with validation images if it has some apart from the training images."""

    parts: Parts
    fingerprint: str
    validation: Images | None = None


def arrange(
    name: str, source: Source, *, train: int | None = None, validation: int = 0, size: int | None = None, noise: float = 0.0
) -> ImageSet:
    """A set, split, resized and relabelled as in :func:`load`.

    Raises:
        ValueError: impossible numbers.
    """
    parts, fingerprint, apart = source
    side = parts.train_pixels.shape[-1]
    if size is not None and side % size:
        sides = ", ".join(str(k) for k in range(side, 0, -1) if side % k == 0)
        raise ValueError(f"size must divide {side}, the side of the images of {name}: {sides}; got {size}")
    rows = np.arange(len(parts.train_labels))
    labels = parts.train_labels.numpy()
    aside = None
    if validation and apart is None:
        aside, rows = choose("validation", validation, rows, labels)
    if train is not None and train != len(rows):
        rows, _ = choose("train", train, rows, labels)
    validation_images = None if aside is None else _take(parts.train_pixels, parts.train_labels, aside, size)
    if validation and apart is not None:
        every = np.arange(len(apart))
        if validation < len(apart):
            every, _ = choose("validation", validation, every, apart.labels.numpy())
        elif validation > len(apart):
            raise ValueError(f"validation must be at most {len(apart):,}, the validation images of {name}; got {validation:,}")
        validation_images = _take(apart.pixels, apart.labels, every, size)
    classes = int(labels.max()) + 1
    training = _relabel(_take(parts.train_pixels, parts.train_labels, rows, size), noise, classes)
    mean, std = _moments(training.pixels)
    if not std.all():
        raise ValueError(f"the training images of {name} have a channel of one value only, which cannot be normalised")
    return ImageSet(
        name=name,
        classes=classes,
        train=training,
        validation=validation_images,
        test=Images(_resize(parts.test_pixels, size), parts.test_labels),
        mean=mean,
        std=std,
        fingerprint=fingerprint,
    )


def _relabel(images: Images, noise: float, classes: int) -> Images:
    """``images``, a share ``noise`` of them with a class drawn uniformly, perhaps the true one."""
    check_number("noise", noise, 0, 1)
    if noise == 0:
        return images
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images), generator=generator)[: round(noise * len(images))]
    labels = torch.randint(classes, (len(rows),), generator=generator)
    return Images(images.pixels, images.labels.index_put((rows,), labels))


def choose(option: str, count: int, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """``count`` of ``rows``, of each class in its proportion, always the same, and the others; both in the order of ``rows``.

    Raises:
        ValueError: one part would lack a class; the message speaks of ``option``.
    """
    classes = int(labels.max()) + 1
    if not classes <= count <= len(rows) - classes:
        everything = f", or all {len(rows):,}" if option == "train" else ""
        raise ValueError(
            f"{option} must be from {classes:,} to {len(rows) - classes:,}{everything}: of the {len(rows):,} images there are, "
            f"at least one of each of {classes} classes, and as many for the rest; got {count:,}"
        )
    split = need("sklearn.model_selection", "splitting image sets").train_test_split
    selection, others = split(rows, train_size=count, stratify=labels[rows], random_state=0)
    return np.sort(selection), np.sort(others)


def _take(pixels: Tensor, labels: Tensor, rows: NDArray[np.int64], size: int | None) -> Images:
    if len(rows) == len(labels):
        return Images(_resize(pixels, size), labels)
    index = torch.from_numpy(rows)
    return Images(_resize(pixels[index], size), labels[index])


def _resize(pixels: UInt8[Tensor, "n c h w"], size: int | None) -> UInt8[Tensor, "n c k k"]:
    side = pixels.shape[-1]
    if size in (None, side):
        return pixels
    # Exact, halves included: the sides are powers of two.
    return torch.cat([F.avg_pool2d(part.float(), side // size).add_(0.5).floor_().byte() for part in pixels.split(1000)])


def _moments(pixels: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:  # noqa: F821
    """Mean and standard deviation of each channel, from counts of the 256 values: exact in any order."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    values, total = torch.arange(256.0, dtype=torch.float64), counts[0].sum()
    mean = counts @ values / total
    return mean.float(), (counts @ values.square() / total - mean.square()).sqrt().float()


def fingerprint_of(parts: Sequence[Tensor]) -> str:
    """The SHA-256 of tensors with their types and shapes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _load_cifar(name: str, root: Path, download: bool) -> tuple[Parts, str]:
    """CIFAR and its fingerprint, from the cache if it is of the files in ``root``."""
    release, cache = RELEASES[name], root / f".orthokit-{name}.safetensors"
    try:
        source = cifar.find(release, root)
    except FileNotFoundError:
        if not download:
            raise
        source = None
    if source and (entry := _read_cache(cache, source)):
        return entry
    if download and not (source and source.is_intact()):
        cifar.download(release, root)
        source = cifar.find(release, root)
    assert source
    key = source.key()  # before reading: a change meanwhile makes the cache stale, not wrong
    parts = cifar.read(source)
    fingerprint = fingerprint_of(parts)
    _write_cache(cache, parts, {"source": key, "fingerprint": fingerprint})
    return parts, fingerprint


def _read_cache(path: Path, source: cifar.Source) -> tuple[Parts, str] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("source") != source.key():
                return None
            parts = Parts(*(file.get_tensor(field) for field in Parts._fields))
    except (SafetensorError, OSError):
        return None
    fingerprint = fingerprint_of(parts)  # of the tensors now, in a fifth of a second: a byte may have changed since
    return (parts, fingerprint) if fingerprint == metadata.get("fingerprint") else None


def _write_cache(path: Path, parts: Parts, metadata: dict[str, str]) -> None:
    """Write the cache if possible: the folder may be read-only or full."""
    with contextlib.suppress(SafetensorError, OSError), replacing(path) as part:
        save_file(parts._asdict(), part, metadata)
