"""Order and augmentation: keyed by (seed, epoch, index) and by nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from orthokit.lab.data.augment import Augment, Batches, key_of, scramble
from orthokit.lab.data.images import Images, ImageSet


def a_set(n=40, channels=3, side=8):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)
    part = Images(pixels, torch.arange(n) % 4)
    mean, std = pixels.float().mean((0, 2, 3)), pixels.float().std((0, 2, 3))
    return ImageSet("made", 4, part, None, part, mean, std, "0")


def splitmix(x):
    """The finalizer of SplitMix64 in Python's unbounded integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_finalizer_is_that_of_splitmix64():
    # The generator's published first output from state 0 is the finalizer of the golden constant.
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    numbers = [0, 1, -1, 2**62, -(2**63), 0x1234567890ABCDEF, 0x9E3779B97F4A7C15 - 2**64]
    actual = scramble(torch.tensor(numbers)).tolist()
    assert [value % 2**64 for value in actual] == [splitmix(number % 2**64) for number in numbers]


def test_keys_differ():
    keys = {key_of(seed, epoch, index) for seed in range(8) for epoch in range(8) for index in range(8)}
    assert len(keys) == 512
    assert key_of(1, 2) != key_of(2, 1) != key_of(1, 2, 0)


def augmented_slowly(image, flip, top, left, pad):
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    cut = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return cut[:, :, ::-1] if flip else cut


def test_crop_and_flip_are_what_they_say():
    data, augment = a_set(), Augment(pad=2)
    index = torch.arange(40)
    got = augment(data.train.pixels, index, key_of(0, 0), data.mean)
    shifts = set()
    for image, result in zip(data.train.pixels.numpy(), got.numpy(), strict=True):
        actual = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(5)
            for left in range(5)
            if np.array_equal(augmented_slowly(image, flip, top, left, 2), result)
        ]
        assert len(actual) == 1
        shifts.add(actual[0])
    assert len(shifts) > 20
    plain = Augment(pad=0, flip=False)(data.train.pixels, index, key_of(0, 0), data.mean)
    assert torch.equal(plain, data.train.pixels)


def test_draws_are_uniform():
    # A white image in a black border shows its shift; 20,000 of them, one bin for each of 2 x 9 x 9 outcomes.
    n, side, pad = 20_000, 9, 4
    image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    image[..., 4, 4] = 1
    image[..., 4, 3] = 2  # tells left from right
    index = torch.arange(n)
    got = Augment(pad=pad)(image.expand(n, -1, -1, -1), index, key_of(7, 3), torch.zeros(1))
    place = (got == 1).flatten(1).float().argmax(1)
    beside = (got == 2).flatten(1).float().argmax(1)
    counts = torch.bincount(
        place[(got == 2).flatten(1).any(1)] * 2 + (beside > place)[(got == 2).flatten(1).any(1)], minlength=162
    )
    counts = counts[counts > 0].numpy()
    assert len(counts) == 2 * 9 * 8  # the marker leaves the picture where the shift is largest
    assert stats.chisquare(counts).pvalue > 1e-3
    epochs = [Augment(pad=pad)(image.expand(n, -1, -1, -1), index, key_of(7, epoch), torch.zeros(1)) for epoch in (3, 4)]
    assert (epochs[0] == epochs[1]).flatten(1).all(1).float().mean() == pytest.approx(1 / 162, abs=3e-3)


def test_cutout():
    data = a_set(n=200, side=8)
    fill = torch.tensor([10.0, 20.0, 30.0])
    white = torch.full_like(data.train.pixels, 255)
    got = Augment(pad=0, flip=False, cutout=4)(white, torch.arange(200), key_of(0, 0), fill)
    hole = (got != 255).all(1)
    sizes = hole.flatten(1).sum(1)
    assert sizes.max() == 16
    assert sizes.min() == 4  # centred in a corner
    assert (got[:, 1][hole] == 20).all()
    assert hole.any(0).all()


@pytest.mark.parametrize("augment", [Augment(), Augment(pad=2, flip=False, cutout=3), Augment(pad=0)], ids=str)
def test_an_image_does_not_depend_on_its_batch(augment):
    data = a_set()
    whole = augment(data.train.pixels, torch.arange(40), key_of(1, 2), data.mean)
    for rows in (torch.tensor([7]), torch.randperm(40)[:9], torch.arange(40).flip(0)):
        assert torch.equal(augment(data.train.pixels[rows], rows, key_of(1, 2), data.mean), whole[rows])
    other = augment(data.train.pixels, torch.arange(40), key_of(1, 3), data.mean)
    assert not torch.equal(other, whole)


def test_an_epoch_sees_every_image_at_most_once_and_ranks_share_it():
    data = a_set(n=41)
    one = Batches(data, 12, Augment(), seed=3)
    assert len(one) == 3
    order = one.order(5)
    assert sorted(order.tolist()) == list(range(41))
    assert torch.equal(order, Batches(data, 6, Augment(), seed=3, process=1, processes=2).order(5))
    assert not torch.equal(order, one.order(6))
    assert not torch.equal(order, Batches(data, 12, Augment(), seed=4).order(5))
    ranks = [Batches(data, 12, Augment(), seed=3, process=process, processes=3) for process in range(3)]
    for place in range(3):
        images, labels = one.get(5, place, order)
        parts = [rank.get(5, place, order) for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        assert images.dtype == torch.float32


def test_impossible_batches():
    data = a_set()
    with pytest.raises(ValueError, match="a batch of 41 is larger than the 40 training images"):
        Batches(data, 41, Augment(), seed=0)
    with pytest.raises(ValueError, match="a batch of 10 does not divide among 3 processes"):
        Batches(data, 10, Augment(), seed=0, process=0, processes=3)
