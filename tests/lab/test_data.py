"""The lab's image sets: what they hold, how they are split, and the cache of CIFAR."""

import functools
import json
import os
import pickle
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from orthokit.checks import install
from orthokit.lab.data import cifar, toy
from orthokit.lab.data import images as data
from orthokit.lab.data.images import SETS, Images, load
from small_cifar import HUNDRED, TEN, contents, packed, unpacked


@pytest.fixture
def small(monkeypatch, tmp_path):
    """CIFAR-10 unpacked in a folder, 20 + 10 images of each class."""
    monkeypatch.setitem(cifar.RELEASES, "cifar10", TEN)
    monkeypatch.setitem(cifar.RELEASES, "cifar100", HUNDRED)
    unpacked(TEN, tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("used the network"))


def rows(images):
    return [image.numpy().tobytes() for image in images.pixels]


@functools.cache
def once(name):
    return load(name)


LARGE = {"digits": (300, 1497, 1, 8), "patches": (5000, 1000, 3, 32), "synthetic": (5000, 1000, 3, 32)}


@pytest.mark.parametrize("name", LARGE)
def test_sets_without_files(name, offline):
    actual, (train, test, channels, side) = once(name), LARGE[name]
    assert (actual.name, actual.classes, actual.validation) == (name, 10, None)
    for images, count in ((actual.train, train), (actual.test, test)):
        assert len(images) == count
        assert images.pixels.shape == (count, channels, side, side)
        assert images.labels.dtype == torch.int64
        assert images.labels.bincount().tolist() == pytest.approx([count / 10] * 10, abs=0 if name != "digits" else 8)
    assert not set(rows(actual.train)) & set(rows(actual.test))
    assert len(set(rows(actual.train))) == train
    x = actual.normalise(actual.train.pixels)
    assert x.dtype == torch.float32
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0] * channels, abs=1e-4)
    assert x.square().mean((0, 2, 3)).tolist() == pytest.approx([1] * channels, abs=1e-4)
    assert torch.allclose(
        actual.normalise(actual.test.pixels[:3]),
        (actual.test.pixels[:3] - actual.mean.view(-1, 1, 1)) / actual.std.view(-1, 1, 1),
    )
    toy.synthetic.cache_clear()
    torch.manual_seed(5)
    assert load(name).fingerprint == actual.fingerprint


def test_fingerprints_do_not_change():
    """Numbers made from these sets are comparable as long as these stay."""
    assert {name: once(name).fingerprint[:16] for name in LARGE} == {
        "digits": "a8d646dd698c9b4b",
        "patches": "c5ca7361b2bd02e0",
        "synthetic": "e0644ac6404b8998",
    }


def test_the_list():
    assert list(SETS) == ["cifar10", "cifar100", "digits", "patches", "synthetic"]


def test_digits():
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, train_size=300, stratify=labels, random_state=0)
    actual = once("digits")
    assert np.array_equal(actual.train.pixels.flatten(1), 15 * train)
    assert np.array_equal(actual.test.pixels.flatten(1), 15 * test)
    assert np.array_equal(actual.train.labels, train_labels)
    assert np.array_equal(actual.test.labels, test_labels)


def test_patches_are_of_their_photographs_and_share_no_pixel():
    import skimage.io

    actual, generator = once("patches"), torch.Generator().manual_seed(0)
    for label, name in enumerate(toy.PHOTOGRAPHS):
        photograph = skimage.io.imread(Path(skimage.__file__).parent / f"data/{name}.png")
        photograph = np.broadcast_to(np.atleast_3d(photograph), (*photograph.shape[:2], 3))
        covered = np.zeros((2, *photograph.shape[:2]), bool)
        corners = toy._corners(*photograph.shape[:2], generator)
        for part, (images, places) in enumerate(zip((actual.train, actual.test), corners, strict=True)):
            for image, (y, x) in zip(images.pixels[images.labels == label], places.tolist(), strict=True):
                assert np.array_equal(image.permute(1, 2, 0), photograph[y : y + 32, x : x + 32])
                covered[part, y : y + 32, x : x + 32] = True
        assert not covered.all(0).any()
        assert (covered.mean((1, 2)) > (0.4, 0.1)).all()


def test_synthetic_is_neither_trivial_nor_hopeless():
    """The class is in the pattern's spectrum, whatever its shift; not in the mean picture."""
    actual = once("synthetic")

    def powers(images):
        return torch.fft.fft2(actual.normalise(images.pixels)).abs()[..., :5, :5].flatten(1)

    def nearest(features):
        train, test = features(actual.train), features(actual.test)
        means = torch.stack([train[actual.train.labels == k].mean(0) for k in range(10)])
        return (torch.cdist(test, means).argmin(1) == actual.test.labels).float().mean().item()

    assert nearest(lambda images: actual.normalise(images.pixels).flatten(1)) < 0.5
    assert 0.3 < nearest(powers) < 0.98


@pytest.mark.parametrize(("name", "published"), [("cifar10", TEN), ("cifar100", HUNDRED)])
def test_cifar(small, name, published):
    if name == "cifar100":
        unpacked(HUNDRED, small, 1)
    (images, labels), (test_images, test_labels) = contents(published)
    for _ in range(2):  # decoded, cached
        actual = load(name, root=str(small))
        assert (actual.name, actual.classes) == (name, published.classes)
        assert np.array_equal(actual.train.pixels, images)
        assert np.array_equal(actual.train.labels, labels)
        assert np.array_equal(actual.test.pixels, test_images)
        assert np.array_equal(actual.test.labels, test_labels)
        assert actual.mean.tolist() == pytest.approx(images.mean((0, 2, 3)).tolist())
        assert actual.std.tolist() == pytest.approx(images.std((0, 2, 3)).tolist())
        assert (small / f".orthokit-{name}.safetensors").is_file()


def test_every_form_has_the_same_fingerprint(small, tmp_path_factory, monkeypatch):
    expected = load("cifar10", root=small).fingerprint
    assert load("cifar10", root=small / "cifar-10-batches-py").fingerprint == expected
    binary, archive = tmp_path_factory.mktemp("binary"), tmp_path_factory.mktemp("archive")
    unpacked(TEN, binary, 1)
    assert load("cifar10", root=binary).fingerprint == expected
    content, published = packed(TEN)
    (archive / "cifar-10-python.tar.gz").write_bytes(content)
    monkeypatch.setitem(cifar.RELEASES, "cifar10", published)
    assert load("cifar10", root=archive, size=8, train=20).fingerprint == expected
    batch = pickle.loads((small / "cifar-10-batches-py/test_batch").read_bytes())
    batch[b"data"][0, 0] ^= 1
    (small / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(batch))
    assert load("cifar10", root=small).fingerprint != expected


def test_splits(small):
    everything = load("cifar10", root=small)
    actual = load("cifar10", root=small, validation=50, train=100)
    assert actual.train.labels.bincount().tolist() == [10] * 10
    assert actual.validation.labels.bincount().tolist() == [5] * 10
    assert torch.equal(actual.test.pixels, everything.test.pixels)
    train, validation, published = set(rows(actual.train)), set(rows(actual.validation)), rows(everything.train)
    assert not train & validation
    assert train | validation < set(published)
    label = dict(zip(published, everything.train.labels.tolist(), strict=True))
    for images in (actual.train, actual.validation):
        assert [label[row] for row in rows(images)] == images.labels.tolist()
    rest = load("cifar10", root=small, validation=50)
    assert set(rows(rest.train)) == set(published) - validation
    torch.manual_seed(1)
    for other in (
        rest,
        load("cifar10", root=small, validation=50, train=150),
        load("cifar10", root=small, validation=50, train=10),
    ):
        assert torch.equal(other.validation.pixels, actual.validation.pixels)
    again = load("cifar10", root=small, validation=50, train=100)
    assert torch.equal(again.train.pixels, actual.train.pixels)
    few = load("cifar10", root=small, train=20)
    assert torch.equal(few.mean, few.train.pixels.float().mean((0, 2, 3)))
    assert not torch.equal(few.mean, everything.mean)


def test_sizes(small):
    native = load("cifar10", root=small, validation=50)
    assert torch.equal(load("cifar10", root=small, size=32, validation=50).train.pixels, native.train.pixels)
    for size in (16, 4, 1):
        actual = load("cifar10", root=small, size=size, validation=50)
        for images, large in ((actual.train, native.train), (actual.validation, native.validation), (actual.test, native.test)):
            k = 32 // size
            sums = large.pixels.long().reshape(-1, 3, size, k, size, k).sum((3, 5))
            assert torch.equal(images.pixels.long(), (2 * sums + k * k) // (2 * k * k))  # the nearest, halves up
        assert actual.mean.tolist() == pytest.approx(actual.train.pixels.double().mean((0, 2, 3)).tolist())
    assert load("digits", size=4).test.pixels.shape == (1497, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size must divide 32, the side of the images of cifar10: 32, 16, 8, 4, 2, 1; got 7"),
        ({"size": 64}, "size must divide 32"),
        ({"size": 0}, "size must be an integer, at least 1"),
        ({"train": 0}, "train must be an integer, at least 1"),
        ({"train": 5}, "train must be from 10 to 190, or all 200: of the 200 images"),
        ({"train": 195}, "train must be from 10 to 190, or all 200"),
        ({"train": 201}, "train must be from 10 to 190, or all 200.*; got 201"),
        ({"train": 151, "validation": 50}, "train must be from 10 to 140, or all 150"),
        ({"validation": -1}, "validation must be an integer, at least 0"),
        ({"validation": 9}, "validation must be from 10 to 190: "),
        ({"validation": 200}, "validation must be from 10 to 190: "),
    ],
)
def test_impossible_numbers(small, options, message):
    with pytest.raises(ValueError, match=message):
        load("cifar10", root=small, **options)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no data set 'cifar-10'; did you mean 'cifar10'\?"):
        load("cifar-10")
    with pytest.raises(ValueError, match=r"no data set 'x'; there are 'cifar10', 'cifar100', 'digits', 'patches', 'synthetic'$"):
        load("x")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("patches", "skimage"), ("patches", "PIL")])
def test_missing_libraries(monkeypatch, name, module):
    for known in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, known, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs {module}.*: {re.escape(install('lab'))}") as caught:
        load(name)
    assert caught.value.name.startswith(module)


def test_devices():
    actual = once("digits")
    moved = load("digits", validation=100).to("meta")
    for images, count in ((moved.train, 200), (moved.validation, 100), (moved.test, 1497)):
        assert isinstance(images, Images)
        assert (len(images), images.pixels.device.type, images.labels.device.type) == (count, "meta", "meta")
    assert moved.normalise(moved.test.pixels).device.type == "meta"
    assert actual.to("cpu").fingerprint == actual.fingerprint
    assert pickle.loads(pickle.dumps(functools.partial(load, "digits", size=4)))().train.pixels.shape == (300, 1, 4, 4)


# The cache


@pytest.fixture
def reads(monkeypatch):
    """How often a source has been decoded."""
    seen, read = [], cifar.read
    monkeypatch.setattr(cifar, "read", lambda source: (seen.append(source.path), read(source))[1])
    return seen


def test_decoded_once(small, reads):
    first = load("cifar10", root=small)
    again = load("cifar10", root=small, size=16)
    assert len(reads) == 1
    assert again.fingerprint == first.fingerprint
    cache = small / ".orthokit-cifar10.safetensors"
    with safe_open(cache, "pt") as file:
        assert file.metadata()["fingerprint"] == first.fingerprint
        assert len(json.loads(file.metadata()["source"])) == 3 + 6
    assert sorted(path.name for path in small.iterdir()) == [cache.name, "cifar-10-batches-py"]
    if os.name == "posix":
        source = (small / "cifar-10-batches-py").stat().st_mode
        assert cache.stat().st_mode & 0o777 == source & 0o666


def test_a_changed_source_is_decoded_anew(small, reads):
    first = load("cifar10", root=small)
    path = small / "cifar-10-batches-py/data_batch_2"
    batch = pickle.loads(path.read_bytes())
    batch[b"data"][:] = 7
    path.write_bytes(pickle.dumps(batch, protocol=2))
    again = load("cifar10", root=small)
    assert len(reads) == 2
    assert (again.train.pixels[40:80] == 7).all()
    assert torch.equal(again.train.pixels[:40], first.train.pixels[:40])
    assert again.fingerprint != first.fingerprint
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="data_batch_2 is damaged"):
        load("cifar10", root=small)


def damaged(path, how):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "text":
        path.write_bytes(b"no safetensors file, but long enough to have a header")
    elif how == "zeros":
        path.write_bytes(content[:start] + bytes(len(content) - start))
    elif how == "one bit":
        path.write_bytes(content[: start + 70_000] + bytes([content[start + 70_000] ^ 4]) + content[start + 70_001 :])
    elif how == "garbage":
        path.write_bytes(content[:start] + b"\xf7" * (len(content) - start))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content.replace(b"test_labels", b"toast_label"))


@pytest.mark.parametrize("how", ["empty", "truncated", "text", "zeros", "one bit", "garbage", "folder", "names"])
def test_a_damaged_cache_is_written_anew(small, reads, how):
    first = load("cifar10", root=small)
    damaged(small / ".orthokit-cifar10.safetensors", how)
    for _ in range(2):
        again = load("cifar10", root=small)
        assert torch.equal(again.train.pixels, first.train.pixels)
        assert torch.equal(again.test.labels, first.test.labels)
    assert len(reads) == (3 if how == "folder" else 2)
    assert len(list(small.iterdir())) == 2


def test_no_cache_of_a_damaged_source(small):
    (small / "cifar-10-batches-py/test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match="test_batch is damaged"):
        load("cifar10", root=small)
    assert [path.name for path in small.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("call", ["save_file", "chmod", "replace"])
def test_a_folder_that_cannot_be_written_to(small, reads, monkeypatch, call):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(data if call == "save_file" else Path, call, refuse)
    for _ in range(2):
        load("cifar10", root=small)
    assert len(reads) == 2
    assert [path.name for path in small.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(small, reads):
    small.chmod(0o555)
    try:
        load("cifar10", root=small)
    finally:
        small.chmod(0o755)
    assert [path.name for path in small.iterdir()] == ["cifar-10-batches-py"]


def test_a_cache_in_use_may_be_replaced(small):
    load("cifar10", root=small)
    first = load("cifar10", root=small)  # mapped into memory
    pixels = first.train.pixels.clone()
    os.utime(small / "cifar-10-batches-py/test_batch", ns=(1, 1))
    load("cifar10", root=small)
    assert torch.equal(first.train.pixels, pixels)
    first.train.pixels.zero_()
    assert torch.equal(load("cifar10", root=small).train.pixels, pixels)


# Downloads


def test_download(monkeypatch, tmp_path, reads):
    content, published = packed(TEN)
    monkeypatch.setitem(cifar.RELEASES, "cifar10", published)
    fetched = []

    def fetch(published, root):
        fetched.append(root)
        (root / "cifar-10-python.tar.gz").write_bytes(content)

    monkeypatch.setattr(cifar, "download", fetch)
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 in "):
        load("cifar10", root=tmp_path)
    assert not fetched
    first = load("cifar10", root=tmp_path, download=True)
    assert fetched == [tmp_path]
    load("cifar10", root=tmp_path, download=True)
    assert (len(fetched), len(reads)) == (1, 1)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="has the MD5"):
        load("cifar10", root=tmp_path)
    assert load("cifar10", root=tmp_path, download=True).fingerprint == first.fingerprint
    (tmp_path / ".orthokit-cifar10.safetensors").unlink()
    load("cifar10", root=tmp_path, download=True)
    assert len(fetched) == 2  # what is whole stays


def test_nothing_to_download():
    with pytest.warns(UserWarning, match="download does nothing for digits"):
        load("digits", download=True)


def test_noise_replaces_labels_of_training_images_alone():
    plain, noisy, random = (load("synthetic", train=2000, validation=500, noise=share) for share in (0.0, 0.5, 1.0))
    again = load("synthetic", train=2000, validation=500, noise=0.5)
    assert torch.equal(noisy.train.labels, again.train.labels)
    assert torch.equal(noisy.train.pixels, plain.train.pixels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(noisy, part).labels, getattr(plain, part).labels)
    # A tenth of the drawn classes are the true ones.
    for changed, share in ((noisy, 0.5), (random, 1.0)):
        kept = (changed.train.labels == plain.train.labels).double().mean().item()
        assert kept == pytest.approx(1 - 0.9 * share, abs=0.03)
    assert random.train.labels.bincount(minlength=10).min() > 130
    assert noisy.fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match="noise must be a finite number in"):
        load("synthetic", noise=1.5)
