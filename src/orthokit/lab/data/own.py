"""Images of the user's own: files in folders by class, or what a function returns."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthokit.checks import warn_once
from orthokit.lab.data.cifar import Parts
from orthokit.lab.data.images import Images, ImageSet, Source, choose, fingerprint_of
from orthokit.lab.data.toy import need
from orthokit.lab.own import Code, arguments_of, check_options

__all__ = ["FOLDER", "folder_of", "of_folder", "of_function"]

FOLDER = "folder"
"""The name of a set that is a folder of files."""
SUFFIXES = (".png", ".jpg", ".jpeg")
PARTS = ("train", "val", "test")
TENSORS = "uint8 pixels (n, c, h, w) and integer labels (n,) of the training images, then those of the test images"


def folder_of(path: str, root: Path, code: Code | None) -> Path:
    """The folder that a recipe's ``path`` means: beside the recipe, or in ``root``.

    A recipe that came with data has no ``code``: it means a folder inside ``root`` only.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a recipe that came with data names a folder outside ``root``.
    """
    if code is None and (Path(path).is_absolute() or ".." in Path(path).parts):
        raise ValueError(f"data.path = {path!r} leads out of --root, in a recipe that came with data; name it with --recipe FILE")
    candidates = [folder / path for folder in dict.fromkeys([*(code.folders if code else ()), root])]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder of images {' or '.join(dict.fromkeys(map(str, candidates)))}; set data.path, or --root")


def of_folder(folder: Path, size: int | None) -> Source:
    """The images in ``folder/train/CLASS/*.png``, and in ``test/`` and ``val/`` where there are such folders.

    Without ``test`` the images of ``val`` are the test images; without either a fifth of the training images is, of every class
    alike and always the same. Classes are the folders of ``train`` in alphabetical order. Images are RGB, or grey where all of
    them are.

    Args:
        folder: as above; PNG and JPEG files.
        size: side in pixels: the middle square of each image, by averaging areas. None where all are squares of one side.

    Raises:
        FileNotFoundError: no ``train`` folder, or no images in a class.
        ValueError: a damaged image; images of several sizes without ``size``; a class without training images.
        ModuleNotFoundError: Pillow is missing.
    """
    if not (folder / "train").is_dir():
        raise FileNotFoundError(f"{folder} has no folder train; images belong into {folder}/train/CLASS/*.png or *.jpg")
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder}/train must have a folder for each class, at least two; got {classes or 'none'}")
    files = {part: _files(folder / part, classes) for part in PARTS if (folder / part).is_dir()}
    digest, arrays = hashlib.sha256(), dict[str, list[NDArray[np.uint8]]]()
    for part, each in files.items():
        arrays[part] = []
        for label, file in each:
            content = file.read_bytes()
            digest.update(f"{part} {classes[label]} {hashlib.sha256(content).hexdigest()}\n".encode())
            arrays[part].append(_pixels(file, size))
    grey = all(not image.ndim or image.shape[-1] == 1 for images in arrays.values() for image in images)
    sets = {
        part: Images(_stack(images, files[part], grey), torch.tensor([label for label, _ in files[part]]))
        for part, images in arrays.items()
    }
    if len({images.pixels.shape[-1] for images in sets.values()}) > 1:
        raise ValueError(f"{folder}: the parts have images of different sizes; set data.size")
    return _source(sets, digest.hexdigest(), f"{folder}")


def _classes(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _files(folder: Path, classes: list[str]) -> list[tuple[int, Path]]:
    """The images of a part with their labels, in order."""
    if strangers := [name for name in _classes(folder) if name not in classes]:
        raise ValueError(f"{folder / strangers[0]} is not a class of the training images, which are {', '.join(classes)}")
    pairs = []
    for label, name in enumerate(classes):
        inside = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        inside = [file for file in inside if file.is_file() and not file.name.startswith(".")]
        images = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if len(images) < len(inside):
            other = next(file for file in inside if file not in images)
            warn_once(f"{other} and perhaps others are left out, as they are neither .png nor .jpg")
        if not images and folder.name == "train":
            raise FileNotFoundError(f"{folder / name} holds no image (*.png or *.jpg)")
        pairs += [(label, file) for file in images]
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no image of {', '.join(classes)}")
    return pairs


def _pixels(file: Path, size: int | None) -> NDArray[np.uint8]:
    """Pixels ``(h, w, 1)`` of a grey image, ``(h, w, 3)`` of any other."""
    image, ops = need("PIL.Image", "a folder of images"), need("PIL.ImageOps", "a folder of images")
    try:
        with image.open(file, formats=("PNG", "JPEG")) as picture:  # other formats start other programs
            upright = ops.exif_transpose(picture)
            if upright.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel; save it with 8")
            upright = upright.convert("L" if upright.mode in ("1", "L") else "RGB")
            if size is not None:
                upright = ops.fit(upright, (size, size), image.Resampling.BOX)
            pixels = np.array(upright, np.uint8)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error})") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _stack(images: list[NDArray[np.uint8]], files: list[tuple[int, Path]], grey: bool) -> Tensor:
    height, width = images[0].shape[:2]
    for pixels, (_, file) in zip(images, files, strict=True):
        if pixels.shape[0] != pixels.shape[1] or pixels.shape[:2] != (height, width):
            first = f"; {files[0][1].name} is {width}x{height}" if pixels is not images[0] else ""
            raise ValueError(
                f"{file} is {pixels.shape[1]}x{pixels.shape[0]}{first}: set data.size to make all squares of one side"
            )
    channels = 1 if grey else 3
    array = np.stack([np.broadcast_to(pixels, (height, width, channels)) for pixels in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def of_function(name: str, make: Callable[..., Any], root: Path, options: Mapping[str, Any]) -> Source:
    """The images that a function returns, called with ``options``, and with ``root`` if it has such an argument.

    The function returns an ``ImageSet``; or tensors or arrays ``(pixels, labels, pixels, labels)``, or pairs of these: of the
    training and of the test images, between them perhaps of validation images.

    Raises:
        ValueError: options that the function does not take, an error in it, or something else than images.
    """
    names, more = arguments_of(make)
    if not more:
        check_options(name, options, [each for each in names if each != "root"])
    arguments = {"root": root} if "root" in names else {}
    try:
        result = make(**arguments, **options)
    except Exception as error:  # of anybody's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"data: {name} fails with {reason}") from error
    if isinstance(result, ImageSet):
        parts = [(each.pixels, each.labels) for each in (result.train, result.validation, result.test) if each is not None]
    else:
        items = list(result) if isinstance(result, (tuple, list)) else []
        if items and all(isinstance(each, (tuple, list)) and len(each) == 2 for each in items):
            items = [each for pair in items for each in pair]
        parts = list(zip(items[::2], items[1::2], strict=False))
        if len(items) not in (4, 6):
            description = f"{type(result).__name__}" + f" of {len(items)}" * bool(items)
            raise ValueError(f"data: {name} must return an ImageSet, or {TENSORS}; got {description}")
    names = ["train", "test"] if len(parts) == 2 else ["train", "val", "test"]
    sets = {part: _images(name, part, *each) for part, each in zip(names, parts, strict=True)}
    if len({images.pixels.shape[1:] for images in sets.values()}) > 1:
        shapes = ", ".join(f"{tuple(images.pixels.shape[1:])} of {part}" for part, images in sets.items())
        raise ValueError(f"data: the images of {name} must all be of one shape; got {shapes}")
    tensors = [tensor for images in sets.values() for tensor in (images.pixels, images.labels)]
    return _source(sets, fingerprint_of(tensors), f"data: {name}")


def _images(name: str, part: str, pixels: Any, labels: Any) -> Images:
    try:
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"data: {name} must return {TENSORS}; of {part} it returns something else ({error})") from None
    fits = pixels.ndim == 4 and pixels.shape[-1] == pixels.shape[-2] and labels.shape == pixels.shape[:1] and len(labels) > 0
    if not fits or pixels.dtype != torch.uint8 or labels.is_floating_point() or labels.is_complex():
        description = f"{pixels.dtype} {tuple(pixels.shape)} and {labels.dtype} {tuple(labels.shape)}".replace("torch.", "")
        raise ValueError(f"data: {name} must return {TENSORS}, images square; of {part} it returns {description}")
    return Images(pixels.cpu().contiguous(), labels.cpu().long())


def _source(sets: dict[str, Images], fingerprint: str, subject: str) -> Source:
    """A set made of its parts. Without test images, those of ``val`` or a fifth of the training images take their place."""
    train, test = sets["train"], sets.get("test", sets.get("val"))
    if test is None:
        labels = train.labels.numpy()
        classes = len(set(labels.tolist()))
        selection, rest = choose("test", max(classes, len(train) // 5), np.arange(len(train)), labels)
        test, train = (Images(train.pixels[rows], train.labels[rows]) for rows in map(torch.from_numpy, (selection, rest)))
    classes = int(train.labels.max()) + 1
    counts = torch.bincount(train.labels.clamp(min=0), minlength=classes)
    if train.labels.min() < 0 or not counts.all():
        raise ValueError(
            f"{subject}: training labels must be 0, 1, ... with images of each; got {sorted(set(train.labels.tolist()))}"
        )
    for part, images in sets.items():
        if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < classes:
            raise ValueError(f"{subject}: labels of {part} must be from 0 to {classes - 1}, as those of the training images are")
    parts = Parts(train.pixels, train.labels, test.pixels, test.labels)
    return Source(parts, fingerprint, sets.get("val") if "test" in sets else None)
