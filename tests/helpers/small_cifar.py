"""CIFAR-10 and CIFAR-100 in every published form, with few images, made here."""

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np

from orthokit.lab.data.cifar import RELEASES

TEN = replace(RELEASES["cifar10"], train=200, test=100)
HUNDRED = replace(RELEASES["cifar100"], train=1000, test=500)


def contents(published):
    """Images ``(n, 3, 32, 32)`` and labels of both parts: noise, the same at each call."""
    rng = np.random.default_rng(published.classes)
    for count in (published.train, published.test):
        yield rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.permutation(count) % published.classes


def files(published, layout):
    """Name and content of each file."""
    (images, labels), test = contents(published)
    share = len(images) // len(layout.train)
    parts = [(images[k : k + share], labels[k : k + share]) for k in range(0, len(images), share)] + [test]
    for name, (pixels, classes) in zip(layout.files, parts, strict=True):
        flat = pixels.reshape(len(pixels), -1)
        if isinstance(layout.labels, str):
            batch = {
                b"data": flat,
                layout.labels.encode(): classes.tolist(),
                b"batch_label": name.encode(),
                b"coarse_labels": [0],
            }
            yield name, pickle.dumps(batch, protocol=2)
        else:
            front = np.zeros((len(flat), layout.labels - 1), np.uint8)
            yield name, np.hstack([front, classes[:, None].astype(np.uint8), flat]).tobytes()


def unpacked(published, root, form=0):
    """Write the folder of a form into ``root``; return it."""
    folder = root / published.layouts[form].folder
    folder.mkdir()
    for name, content in files(published, published.layouts[form]):
        (folder / name).write_bytes(content)
    return folder


def packed(published, form=0, leave_out=()):
    """The archive of a form as bytes, and ``published`` with its hash."""
    layout, buffer = published.layouts[form], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files(published, layout):
            if name not in leave_out:
                member = tarfile.TarInfo(f"{layout.folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue(), with_md5(published, buffer.getvalue(), form)


def with_md5(published, content, form=0):
    """As if ``content`` were the published archive."""
    layouts = list(published.layouts)
    layouts[form] = replace(layouts[form], md5=hashlib.md5(content).hexdigest(), size=len(content))
    return replace(published, layouts=tuple(layouts))
