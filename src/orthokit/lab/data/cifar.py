"""CIFAR-10 and CIFAR-100 as published: find, check and read them, or download them.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import hashlib
import http.client
import importlib
import io
import json
import os
import pickle
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

__all__ = ["RELEASES", "WAITS", "Layout", "Parts", "Release", "Source", "download", "find", "read"]

PIXELS = 3 * 32 * 32
WAITS = (1.0, 2.0, 5.0, 10.0)
"""Seconds before each new attempt to go on with a download that broke off; after progress the count begins anew."""
TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a connection counts as broken."""
LEAST = 1000.0
"""Bytes a second. A connection that gives less for ``TIMEOUT`` counts as broken. An attempt that gives less is not progress."""


@dataclass(frozen=True)
class Layout:
    """One published form: a folder of files, and the archive that holds it.

    ``size`` is that of the archive: a download ends with an error at the first byte beyond.
    ``labels`` is the key of the labels in a pickle, or the number of label bytes before a binary image, the last of which counts.
    """

    folder: str
    archive: str
    md5: str
    size: int
    train: tuple[str, ...]
    test: str
    labels: str | int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return *self.train, self.test


@dataclass(frozen=True)
class Release:
    """A set of 32x32 colour images: its number of classes, of images in either part, all classes equally often, and its forms."""

    name: str
    title: str
    classes: int
    train: int
    test: int
    layouts: tuple[Layout, ...]


RELEASES = {
    "cifar10": Release(
        name="cifar10",
        title="CIFAR-10",
        classes=10,
        train=50_000,
        test=10_000,
        layouts=(
            Layout(
                folder="cifar-10-batches-py",
                archive="cifar-10-python.tar.gz",
                md5="c58f30108f718f92721af3b95e74349a",
                size=170_498_071,
                train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
                test="test_batch",
                labels="labels",
            ),
            Layout(
                folder="cifar-10-batches-bin",
                archive="cifar-10-binary.tar.gz",
                md5="c32a1d4ab5d03f1284b67883e8d87530",
                size=170_052_171,
                train=("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"),
                test="test_batch.bin",
                labels=1,
            ),
        ),
    ),
    "cifar100": Release(
        name="cifar100",
        title="CIFAR-100",
        classes=100,
        train=50_000,
        test=10_000,
        layouts=(
            Layout(
                folder="cifar-100-python",
                archive="cifar-100-python.tar.gz",
                md5="eb9058c3a382ffc7106e4002c42a8d85",
                size=169_001_437,
                train=("train",),
                test="test",
                labels="fine_labels",
            ),
            Layout(
                folder="cifar-100-binary",
                archive="cifar-100-binary.tar.gz",
                md5="03b5dce01913d631647c71ecec9e9cb8",
                size=168_513_733,
                train=("train.bin",),
                test="test.bin",
                labels=2,
            ),
        ),
    ),
}
"""The first form of each is the one that :func:`download` fetches."""


class Parts(NamedTuple):
    """Both parts of a set: pixels ``(n, c, h, w)`` in uint8, labels ``(n,)`` in int64."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Source:
    """A set in one of its forms, found at ``path``: a folder, or an archive that is not unpacked."""

    release: Release
    layout: Layout
    path: Path

    @property
    def is_archive(self) -> bool:
        """Whether the set is in an archive."""
        return self.path.is_file()

    def key(self) -> str:
        """Names, sizes and times of change of the files, and the expected numbers: equal as long as nothing changes."""
        paths = [self.path] if self.is_archive else [self.path / name for name in self.layout.files]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return json.dumps([self.release.classes, self.release.train, self.release.test, *stats])

    def is_intact(self) -> bool:
        """Whether an archive has the published MD5; always so for a folder, whose contents :func:`read` checks."""
        return not self.is_archive or _md5(self.path) == self.layout.md5


def find(release: Release, root: str | Path) -> Source:
    """The set in ``root``: unpacked there, in an archive there, or ``root`` itself is the unpacked folder.

    Raises:
        FileNotFoundError: none of these is there and complete.
    """
    root = Path(root)
    folders = [Source(release, layout, root / layout.folder) for layout in release.layouts]
    itself = [Source(release, layout, root) for layout in release.layouts]
    lacking = {each: [name for name in each.layout.files if not (each.path / name).is_file()] for each in folders + itself}
    complete = [source for source in folders if not lacking[source]]
    complete += [Source(release, layout, path) for layout in release.layouts if (path := root / layout.archive).is_file()]
    complete += [source for source in itself if not lacking[source]]
    if complete:
        return complete[0]
    part = [
        f"{source.path} lacks {', '.join(lacking[source])}; "
        for source in folders + itself
        if source.path.is_dir() and (source.path != root or len(lacking[source]) < len(source.layout.files))
    ]
    forms = [f"the folder {layout.folder}" for layout in release.layouts] + [layout.archive for layout in release.layouts]
    raise FileNotFoundError(
        f"no {release.title} in {root}: {''.join(part)}root (--root) must hold {', '.join(forms[:-1])} or {forms[-1]}; "
        f"download=True (orthokit train --download) fetches {release.layouts[0].archive}. "
        "Without a network, train on data = digits, such as nano+digits+strict"
    )


def read(source: Source) -> Parts:
    """Decode a set and check it against what is published. An archive is hashed before anything in it is read.

    Raises:
        ValueError: a file is damaged, or holds images of another number or kind than published.
    """
    release, layout = source.release, source.layout
    share = release.train // len(layout.train)
    contents: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}
    for name, content in _contents(source):
        path = source.path / name
        images, labels = _decode(content, path, layout.labels)
        count = release.test if name == layout.test else share
        if images.dtype != np.uint8 or images.shape != (count, PIXELS) or labels.shape != (count,):
            raise ValueError(
                f"{path} is not a file of {release.title}: it must hold {count:,} images of {PIXELS} bytes and their labels; it "
                f"holds {images.dtype} {images.shape} and labels {labels.shape}; unpack {layout.archive} anew"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= release.classes:
            odd = [label for label in labels.tolist() if label not in range(release.classes)][:3]
            raise ValueError(
                f"{path}: labels must be integers from 0 to {release.classes - 1}; got {labels.dtype} {odd}; "
                f"unpack {layout.archive} anew"
            )
        contents[name] = images, labels.astype(np.int64)
    if missing := [name for name in layout.files if name not in contents]:
        raise ValueError(f"{source.path} holds no {', '.join(missing)}; get {layout.archive} anew (--download)")
    parts = []
    for names in (layout.train, (layout.test,)):
        images, labels = (np.concatenate([contents[name][k] for name in names]) for k in (0, 1))
        _check_classes(labels, release.classes, f"{source.path}: {', '.join(names)}", layout)
        parts += [torch.from_numpy(images).reshape(-1, 3, 32, 32), torch.from_numpy(labels)]
    return Parts(*parts)


def _check_classes(labels: NDArray[np.int64], classes: int, source: str, layout: Layout) -> None:
    counts, expected = np.bincount(labels, minlength=classes), len(labels) // classes
    if (counts != expected).any():
        odd = int((counts != expected).argmax())
        raise ValueError(
            f"{source}: every class must have {expected:,} images; class {odd} has {counts[odd]:,}; unpack {layout.archive} anew"
        )


def _contents(source: Source) -> Iterator[tuple[str, bytes]]:
    layout, path = source.layout, source.path
    if not source.is_archive:
        yield from ((name, (path / name).read_bytes()) for name in layout.files)
        return
    archive = path.read_bytes()  # once, so that what is unpacked is what was hashed
    if (md5 := hashlib.md5(archive, usedforsecurity=False).hexdigest()) != layout.md5:
        raise ValueError(f"{path} has the MD5 {md5}, not the published {layout.md5}; delete it, or fetch it anew with --download")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == layout.folder and name in layout.files and (file := tar.extractfile(member)):
                    yield name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, or fetch it anew with --download") from None


def _decode(content: bytes, path: Path, labels: str | int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels of one file, not checked yet; ``labels`` as in :class:`Layout`."""
    if isinstance(labels, str):
        try:
            batch = _Plain(io.BytesIO(content), encoding="bytes").load()
            data, classes = (np.asarray(batch[k.encode()] if k.encode() in batch else batch[k]) for k in ("data", labels))
        except Exception as error:  # a damaged pickle can fail in any way
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error) or type(error).__name__
            raise ValueError(f"{path} is damaged, or not a batch of a python version: {reason}; unpack it anew") from None
        return data, classes
    if len(content) % (labels + PIXELS):
        raise ValueError(
            f"{path} is damaged, or not a file of a binary version: its size must be a multiple of {labels + PIXELS} bytes, and "
            f"is {len(content):,}; unpack it anew"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, labels + PIXELS)
    return rows[:, labels:], rows[:, labels - 1]


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


def download(release: str | Release, root: str | Path, *, url: str | None = None, console: Console | None = None) -> Path:
    """Fetch the archive of the python version into ``root``, unless it is there already; return its path.

    The archive grows as ``<archive>.part``, which a later call goes on with, and gets its name once its MD5 is right.

    Args:
        release: ``"cifar10"``, ``"cifar100"``, or an entry like those of ``RELEASES``.
        root: folder, made if need be.
        url: where from; https://www.cs.toronto.edu/~kriz/ by default.
        console: for the progress bar; stderr by default.

    Raises:
        ValueError: what came has another MD5, or is longer than the archive; it is deleted.
        ConnectionError: the server did not give the file, broke off too often, or was too slow; what came is kept.
        OSError: the folder cannot be written to, or is full.
    """
    if isinstance(release, str):
        if release not in RELEASES:
            raise ValueError(f"only {' and '.join(RELEASES)} can be downloaded; got {release!r}")
        release = RELEASES[release]
    layout, console = release.layouts[0], console or Console(stderr=True)
    url = url or f"https://www.cs.toronto.edu/~kriz/{layout.archive}"
    target = Path(root) / layout.archive
    part = target.with_name(f"{layout.archive}.part")
    if target.is_file() and _md5(target) == layout.md5:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{layout.archive}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process is downloading {escape(str(target))}; waiting for it", highlight=False)
        lock.acquire()
    try:
        if target.is_file() and _md5(target) == layout.md5:
            return target
        _fetch(url, part, layout, console)
        if (md5 := _md5(part)) != layout.md5:
            size = part.stat().st_size
            part.unlink()
            raise ValueError(
                f"{url} gave {size:,} bytes with the MD5 {md5}, not the published {layout.md5}; they are deleted. Try again, or "
                f"put {layout.archive} into {target.parent} by hand"
            )
        part.replace(target)
    finally:
        lock.release()
    return target


class _BrokenOffError(Exception):
    """The network failed in a way that another attempt may mend."""


def _fetch(url: str, part: Path, layout: Layout, console: Console) -> None:
    """Append to ``part`` until it is complete."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(escape(part.stem), total=None)
        failures, most, since = 0, _size(part), time.monotonic()
        while True:
            try:
                return _receive(url, part, layout, progress, task)
            except _BrokenOffError as error:
                reason = str(error)
            if _size(part) - most > LEAST * (time.monotonic() - since):
                failures, most, since = 0, _size(part), time.monotonic()
            if failures == len(WAITS):
                raise ConnectionError(
                    f"could not fetch {url}: {reason}; {_size(part):,} bytes are kept in {part}. Try again to go on, or put "
                    f"{part.stem} into {part.parent} by hand"
                )
            progress.console.print(f"{escape(reason)}; trying again in {WAITS[failures]:g} s", highlight=False)
            time.sleep(WAITS[failures])
            failures += 1


def _receive(url: str, part: Path, layout: Layout, progress: Progress, task: TaskID) -> None:
    """Append to ``part`` what comes, in one attempt."""
    have = _size(part)
    headers = {"User-Agent": "orthokit"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing comes after what we have: it is complete, or too long
            if _md5(part) == layout.md5:
                return
            part.unlink()
            raise _BrokenOffError(f"{part} was not a beginning of {url}") from None
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _BrokenOffError(f"HTTP {error.code} {error.reason}") from None
        raise ConnectionError(
            f"could not fetch {url}: HTTP {error.code} {error.reason}; put {part.stem} into {part.parent} by hand"
        ) from None
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from None
    with response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdecimal() else None
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if match is None or int(match[1]) != have:
                part.unlink(missing_ok=True)
                raise _BrokenOffError(f"{url} answered with another range than asked for")
            total = None if match[2] == "*" else int(match[2])
        else:
            have = 0
        progress.update(task, total=total, completed=have)
        size, window, since = have, 0, time.monotonic()
        try:
            with part.open("ab" if have else "wb") as file:
                while chunk := _chunk(response):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
                    size, window = size + len(chunk), window + len(chunk)
                    if size > layout.size:
                        break
                    if (seconds := time.monotonic() - since) > TIMEOUT:
                        if window < LEAST * seconds:
                            raise _BrokenOffError(f"the connection gave only {window:,} bytes in {seconds:.0f} s")
                        window, since = 0, time.monotonic()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(part)
            raise
    if size > layout.size:
        part.unlink()
        raise ValueError(
            f"{url} gave more than the {layout.size:,} bytes of {layout.archive}; they are deleted. Try again, or put "
            f"{layout.archive} into {part.parent} by hand"
        )
    if total is not None and size < total:
        raise _BrokenOffError(f"the connection broke off after {size:,} of {total:,} bytes")


def _chunk(response: http.client.HTTPResponse) -> bytes:
    """The bytes that have come, however few, so that none is lost where the connection stalls."""
    try:
        return response.read1(1 << 18)
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOffError(f"the connection broke off: {str(error) or type(error).__name__}") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
