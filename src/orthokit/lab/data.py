"""Small image sets: real digits that come with scikit-learn, and a CIFAR-10 folder as published."""

import importlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from orthokit.checks import check_count


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images ``(n, channels, height, width)``, of zero mean and unit variance over the training part, and their classes."""

    name: str
    classes: int
    train_images: Float[Tensor, "n c h w"]
    train_labels: Int[Tensor, "n"]  # noqa: F821
    test_images: Float[Tensor, "m c h w"]
    test_labels: Int[Tensor, "m"]  # noqa: F821


def digits(train: int = 300) -> ImageSet:
    """Handwritten digits, 8x8 pixels (scikit-learn; E. Alpaydin, C. Kaynak, UCI 1998), split once and for all.

    Args:
        train: training images, the same number of each class up to one; all others of the 1,797 are for testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_count("train", train, 10, 1787)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32), labels, train_size=train, stratify=labels, random_state=0)
    train_images, test_images = (torch.from_numpy(part).reshape(-1, 1, 8, 8) for part in parts[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in parts[2:])
    return _normalised("digits", 10, train_images, train_labels, test_images, test_labels)


def cifar10(root: str | Path, train: int = 5000, size: int = 16) -> ImageSet:
    """CIFAR-10 (A. Krizhevsky, 2009) from a folder of its python version, scaled down by averaging areas.

    Args:
        root: ``cifar-10-batches-py``, or the folder that holds it.
        train: training images, the first of each class in equal number; all 10,000 test images are used.
        size: side in pixels, a divisor of 32.

    Raises:
        FileNotFoundError: a batch is missing.
        ValueError: a batch is damaged or is not CIFAR-10.
    """
    check_count("train", train, 10, 50_000)
    if size not in (32, 16, 8, 4):
        raise ValueError(f"size must divide 32: 32, 16, 8 or 4; got {size}")
    folder = Path(root) / "cifar-10-batches-py"
    folder = folder if folder.is_dir() else Path(root)
    names = [f"data_batch_{k}" for k in range(1, 6)]
    missing = [name for name in [*names, "test_batch"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no {', '.join(missing)} in {folder}; --root must name the folder cifar-10-batches-py of CIFAR-10's python version "
            "(cifar-10-python.tar.gz, unpacked), or the folder that holds it"
        )
    batches = [_read_batch(folder / name) for name in names]
    images, labels = np.concatenate([batch[0] for batch in batches]), np.concatenate([batch[1] for batch in batches])
    place = np.argsort(np.argsort(labels, kind="stable")) - np.searchsorted(np.sort(labels), labels)
    order = np.lexsort((labels, place))[:train]  # the first of every class, then the second of every class, ...
    test_images, test_labels = _read_batch(folder / "test_batch")
    small = [
        F.avg_pool2d(torch.from_numpy(part).reshape(-1, 3, 32, 32).float(), 32 // size) for part in (images[order], test_images)
    ]
    return _normalised("cifar10", 10, small[0], torch.from_numpy(labels[order]), small[1], torch.from_numpy(test_labels))


def _normalised(name: str, classes: int, train_images: Tensor, train_labels: Tensor, *test: Tensor) -> ImageSet:
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3), keepdim=True)
    return ImageSet(name, classes, (train_images - mean) / std, train_labels, (test[0] - mean) / std, test[1])


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        batch = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged, or no batch of CIFAR-10's python version: {error}; unpack it anew") from None
    if images.dtype != np.uint8 or images.shape != (10_000, 3072) or labels.shape != (10_000,):
        raise ValueError(f"{path} is no batch of CIFAR-10: images {images.dtype} {images.shape}, labels {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path}: labels must be integers from 0 to 9")
    return images, labels.astype(np.int64)


class _Plain(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing else: a pickle from elsewhere may name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        if module.removeprefix("numpy.") in ("core.multiarray", "_core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(importlib.import_module("numpy._core.multiarray"), name)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such batch needs")
