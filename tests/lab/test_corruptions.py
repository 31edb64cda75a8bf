"""Corruptions against the authors' definitions, one image at a time."""

import functools
import io
import itertools

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import scipy.stats
import skimage
import torch

from orthokit.lab.data.images import load
from orthokit.lab.evaluation import corruptions
from orthokit.lab.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupt_all

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise")
FIXED = tuple(name for name in CORRUPTIONS if name not in RANDOM)


@functools.cache
def photographs():
    return load("patches").test.pixels[::10].clone()


@functools.cache
def colours():
    """Random colours, ties between channels, greys, the corners of the cube, flat pictures."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=generator)
    for row, (one, other) in enumerate(((0, 1), (0, 2), (1, 2))):
        pixels[row, one] = pixels[row, other]
    pixels[3] = pixels[3, :1]
    pixels[4:7] = pixels[4:7] // 64 * 85
    pixels[7:10] = pixels[7:10, :, :1, :1]
    return pixels.byte()


def digits():
    return load("digits").test.pixels[:40]


def gaussian_blur(x, level):
    sigma = [0.4, 0.6, 0.7, 0.8, 1][level]
    return np.clip(skimage.filters.gaussian(x / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255


def contrast(x, level):
    means = np.mean(x / 255.0, axis=(0, 1), keepdims=True)
    return np.clip((x / 255.0 - means) * [0.75, 0.5, 0.4, 0.3, 0.15][level] + means, 0, 1) * 255


def brightness(x, level):
    added = [0.05, 0.1, 0.15, 0.2, 0.3][level]
    if x.shape[-1] == 1:
        return np.clip(x / 255.0 + added, 0, 1) * 255
    x = skimage.color.rgb2hsv(x / 255.0)
    x[:, :, 2] = np.clip(x[:, :, 2] + added, 0, 1)
    return np.clip(skimage.color.hsv2rgb(x), 0, 1) * 255


def picture(x):
    return PIL.Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def pixelate(x, level):
    side = len(x)
    small = int(side * [0.95, 0.9, 0.85, 0.75, 0.65][level])
    return picture(x).resize((small, small), PIL.Image.BOX).resize((side, side), PIL.Image.BOX)


def jpeg_compression(x, level):
    output = io.BytesIO()
    picture(x).save(output, "JPEG", quality=[80, 65, 58, 50, 40][level])
    return PIL.Image.open(output)


TWINS = {
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("images", [photographs, colours, digits])
def test_equals_its_definition(images, name, severity):
    images = images()
    actual = corrupt(images, name, severity)
    assert actual.dtype == torch.uint8
    assert actual.shape == images.shape
    assert actual.is_contiguous()
    pictures = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images]
    twins = [np.uint8(TWINS[name](picture, severity - 1)) for picture in pictures]
    expected = np.stack(twins).reshape(len(images), *images.shape[2:], images.shape[1]).transpose(0, 3, 1, 2)
    assert np.array_equal(actual, expected)


def test_every_corruption_has_a_test():
    assert sorted((*TWINS, *RANDOM)) == sorted(CORRUPTIONS)


@pytest.mark.parametrize(("severity", "sigma"), list(zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.1), strict=True)))
def test_gaussian_noise(severity, sigma):
    images = torch.full((250, 3, 32, 32), 128, dtype=torch.uint8)
    added = (corrupt(images, "gaussian_noise", severity).double() + 0.5 - 128) / 255  # truncated: half a level too low
    assert added.mean().item() == pytest.approx(0, abs=5e-4)
    assert added.std().item() == pytest.approx(sigma, rel=0.01)
    assert scipy.stats.kurtosis(added.flatten().numpy()) == pytest.approx(0, abs=0.03)
    flat = added.view(250, -1)
    assert torch.corrcoef(flat[:, :200].T).triu(1).abs().mean() < 0.06
    limit = corrupt(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32), "gaussian_noise", severity)
    assert (limit[0] == 0).float().mean().item() == pytest.approx(0.5 + 1 / 255 / sigma / 2.507, abs=0.04)
    assert (limit[1] == 255).float().mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("severity", "photons"), list(zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True)))
def test_shot_noise(severity, photons):
    for grey in (0, 20, 100):
        images = torch.full((200, 3, 16, 16), grey, dtype=torch.uint8)
        actual = corrupt(images, "shot_noise", severity).flatten().numpy()
        counts = np.arange(photons + 1)
        levels = np.minimum(counts / photons * 255, 255).astype(int)
        expected = np.zeros(256)
        np.add.at(expected, levels, scipy.stats.poisson.pmf(counts, grey / 255 * photons))
        assert np.bincount(actual, minlength=256) / actual.size == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("severity", "amount"), list(zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True)))
def test_impulse_noise(severity, amount):
    images = torch.full((250, 3, 32, 32), 77, dtype=torch.uint8)
    actual = corrupt(images, "impulse_noise", severity)
    for level in (0, 255):
        assert (actual == level).double().mean().item() == pytest.approx(amount / 2, rel=0.05)
    hit = actual != images
    assert ((actual == 0) | (actual == 255) | ~hit).all()
    assert (hit[:, 0] & hit[:, 1]).double().mean().item() == pytest.approx(amount**2, rel=0.25)  # each channel by itself
    twin = skimage.util.random_noise(images[:200].permute(0, 2, 3, 1).numpy() / 255, "s&p", amount=amount, rng=0)
    assert hit.double().mean().item() == pytest.approx((twin != 77 / 255).mean(), rel=0.05)


def test_noise_is_nested_in_severity():
    images = photographs()
    hits = [corrupt(images, "impulse_noise", severity) != images for severity in SEVERITIES]
    assert all((larger | ~smaller).all() for smaller, larger in itertools.pairwise(hits))
    grey = torch.full((5, 3, 32, 32), 128, dtype=torch.uint8)
    small, large = ((corrupt(grey, "gaussian_noise", severity).double() + 0.5 - 128).flatten() for severity in (1, 3))
    assert torch.corrcoef(torch.stack([small, large]))[0, 1] > 0.999


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_increase_the_distance(name):
    images = photographs()
    distances = [(corrupt(images, name, severity).double() - images).square().mean().sqrt().item() for severity in SEVERITIES]
    print(name, [round(distance, 1) for distance in distances])
    assert distances == sorted(distances)
    assert distances[-1] > 1.3 * distances[0] > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("images", [photographs, digits])
def test_the_first_images_stay_whatever_follows_them(name, images, monkeypatch):
    images = images()
    before = images.clone()
    np.random.seed(1)  # noqa: NPY002
    actual = corrupt(images, name, 3)
    for count in (1, 7, 33):
        assert torch.equal(corrupt(images[:count], name, 3), actual[:count])
    monkeypatch.setattr(corruptions, "PART", 7)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(corrupt(images, name, 3), actual)
    if name in FIXED:
        assert torch.equal(corrupt(images[5:9], name, 3), actual[5:9])
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", RANDOM)
def test_images_differ_in_their_noise(name):
    grey = torch.full((50, 3, 8, 8), 128, dtype=torch.uint8)
    actual = corrupt(grey, name, 5)
    assert len({image.numpy().tobytes() for image in actual}) == 50


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_rectangles_and_other_channels(name):
    images = photographs()[:3, :, :20, :24]
    assert corrupt(images, name, 2).shape == images.shape
    two = images[:, :2].contiguous()
    if name in ("brightness", "pixelate", "jpeg_compression"):
        with pytest.raises(ValueError, match=f"{name} is defined for grey and RGB images, with 1 or 3 channels; got 2 channels"):
            corrupt(two, name, 2)
    else:
        assert corrupt(two, name, 2).shape == two.shape


def test_cache(tmp_path, monkeypatch):
    images = photographs()[:20]
    expected = torch.stack([corrupt(images, "gaussian_noise", severity) for severity in SEVERITIES])
    calls = []
    monkeypatch.setitem(CORRUPTIONS, "gaussian_noise", lambda *given: calls.append(1) or corruptions.gaussian_noise(*given))

    def computes(images=images, folder=tmp_path, expected=expected):
        calls.clear()
        assert torch.equal(corrupt_all(images, "gaussian_noise", folder=folder), expected)
        return len(calls)

    assert computes() == 5
    assert computes() == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(".orthokit-gaussian_noise-")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert computes() == 5
        assert computes() == 0
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    corrupt_all(changed, "gaussian_noise", folder=tmp_path)
    corrupt_all(images, "impulse_noise", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert computes() == 0
    monkeypatch.setattr(corruptions, "VERSION", corruptions.VERSION + 1)
    assert computes() == 5
    assert computes(folder=None) == 5


def test_no_cache_where_it_cannot_be(tmp_path, monkeypatch):
    images = photographs()[:2]
    expected = corrupt_all(images, "contrast")
    assert torch.equal(corrupt_all(images, "contrast", folder=tmp_path / "missing"), expected)
    (tmp_path / "file").write_text("no folder")
    assert torch.equal(corrupt_all(images, "contrast", folder=tmp_path / "file"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def full(tensors, path, metadata):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corruptions, "save_file", full)
    assert torch.equal(corrupt_all(images, "contrast", folder=tmp_path), expected)
    tmp_path.chmod(0o500)
    monkeypatch.undo()
    assert torch.equal(corrupt_all(images, "contrast", folder=tmp_path), expected)
    tmp_path.chmod(0o700)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 1, "no corruption 'gausian_noise'; did you mean 'gaussian_noise'?"),
        ("contrast", 0, "severity must be an integer, from 1 to 5; got 0"),
        ("contrast", 6, "severity must be an integer, from 1 to 5; got 6"),
    ],
)
def test_bad_input(name, severity, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        corrupt(photographs(), name, severity)
    if severity == 1:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            corrupt_all(photographs(), name)


def test_pixelate_needs_two_pixels():
    with pytest.raises(ValueError, match="pixelate needs images of at least 2x2 pixels; got 1x4"):
        corrupt(torch.zeros(1, 1, 1, 4, dtype=torch.uint8), "pixelate", 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images(name):
    assert corrupt(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), name, 1).shape == (0, 3, 32, 32)
