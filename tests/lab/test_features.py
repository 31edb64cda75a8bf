"""Figures of features: against closed forms and a one-shot computation, over networks of several kinds."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orthokit.lab.evaluation import features
from orthokit.lab.evaluation.features import Figures, Moments, collect
from orthokit.lab.networks.resnet import ImageNetResNet, ResNet
from orthokit.lab.networks.wide_resnet import WideResNet


def figures(x, labels=None, classes=1, split=None):
    x = torch.as_tensor(x)
    parts = list(x.split(split or len(x)))
    moments = Moments(parts[0], classes)
    for part, of in zip(parts, [None] * len(parts) if labels is None else labels.split(split or len(x)), strict=True):
        moments.add(part, of)
    return moments.figures("here")


def constructed(eigenvalues, count=200, seed=0):
    """Vectors whose covariance has exactly these eigenvalues, turned at random and shifted."""
    rng = np.random.default_rng(seed)
    d = len(eigenvalues)
    white = rng.standard_normal((count, d))
    white = np.linalg.qr(white - white.mean(0))[0] * count**0.5
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return white * np.sqrt(eigenvalues) @ turn + rng.standard_normal(d)


@pytest.mark.parametrize("d", [2, 7, 32])
def test_isotropic_features_fill_their_space(d):
    actual = figures(constructed(np.full(d, 3.0)))
    assert actual.effective_rank == pytest.approx(d, rel=1e-9)
    assert actual.participation_ratio == pytest.approx(d, rel=1e-9)
    assert actual.mean_correlation == pytest.approx(0, abs=1e-9)
    assert (actual.features, actual.samples, actual.dead) == (d, 200, 0)
    assert (actual.nc1, actual.within_between) == (None, None)
    sample = figures(torch.randn(20_000, d, generator=torch.Generator().manual_seed(0)))
    # An unbiased covariance of n samples has E tr(S^2) = d + d (d + 1) / n.
    assert sample.participation_ratio == pytest.approx(d / (1 + (d + 1) / 20_000), rel=0.003)
    assert sample.effective_rank == pytest.approx(d, rel=0.002)
    assert sample.mean_correlation == pytest.approx((2 / math.pi / 20_000) ** 0.5, rel=0.7 if d == 2 else 0.25)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_rank(k):
    actual = figures(constructed([2.0] * k + [0.0] * (10 - k)))
    assert actual.effective_rank == pytest.approx(k, rel=1e-5)
    assert actual.participation_ratio == pytest.approx(k, rel=1e-9)


def test_a_spectrum_in_closed_form():
    """Singular values 4, 2, 1, 1: p = 1/2, 1/4, 1/8, 1/8 with an entropy of 7/4 bits; 22^2 / (256 + 16 + 1 + 1)."""
    actual = figures(constructed([16.0, 4.0, 1.0, 1.0]))
    assert actual.effective_rank == pytest.approx(2**1.75, rel=1e-9)
    assert actual.participation_ratio == pytest.approx(22**2 / 274, rel=1e-9)


def test_correlation_of_constructed_channels():
    a, b = constructed([1.0, 1.0]).T
    unit = [(v - v.mean()) / v.std() for v in (a, b)]
    orthogonal = np.linalg.qr(np.stack(unit, 1))[0].T
    first, second = orthogonal
    x = np.stack([first, 0.6 * first + 0.8 * second, -3 * first + 5, np.full_like(a, 7.0)], 1)
    actual = figures(x)
    assert actual.dead == 1
    assert actual.features == 4
    assert actual.mean_correlation == pytest.approx((0.6 + 1 + 0.6) / 3)


def simplex(classes, within, each=50):
    """Classes at the unit vectors, with orthogonal noise of variance ``within`` in every direction; ``(x, labels)``."""
    noise = np.concatenate([constructed(np.ones(classes), each, seed) for seed in range(classes)])
    noise -= noise.reshape(classes, each, -1).mean(1).repeat(each, 0)
    labels = torch.arange(classes).repeat_interleave(each)
    return torch.from_numpy(np.eye(classes)[labels] + within**0.5 * noise), labels


@pytest.mark.parametrize(("classes", "within"), [(2, 0.5), (5, 0.01), (10, 4.0)])
def test_collapse_in_closed_form(classes, within):
    """S_W = v I and S_B has C - 1 eigenvalues 1 / C, so tr(S_W S_B^+) / C = v (C - 1); tr S_W / tr S_B = v C / (1 - 1 / C)."""
    actual = figures(*simplex(classes, within), classes=classes)
    assert actual.nc1 == pytest.approx(within * (classes - 1), rel=1e-9)
    assert actual.within_between == pytest.approx(within * classes / (1 - 1 / classes), rel=1e-9)


def test_collapsed_classes():
    x, labels = simplex(5, 0.0)
    actual = figures((x * 3 + 1).float(), labels, classes=5)
    assert actual.nc1 == pytest.approx(0, abs=1e-12)
    assert actual.within_between == pytest.approx(0, abs=1e-12)
    assert actual.effective_rank == pytest.approx(4, rel=1e-5)


def test_classes_of_unequal_size_weigh_the_same_between():
    x = torch.tensor([[-1.0], [1.0], [9.0], [10.0], [11.0], [10.0]])
    actual = figures(x, torch.tensor([0, 0, 2, 2, 2, 2]), classes=3)  # class 1 has no images
    within, between = (1 + 1 + 1 + 1) / 6, 25
    assert actual.nc1 == pytest.approx(within / between / 2)
    assert actual.within_between == pytest.approx(within / between)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("split", [1, 7, 64, 300])
def test_streaming_equals_one_shot(split, offset, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 50)
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, 300))
    x = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + rng.standard_normal((4, 6))[labels] + offset
    actual = figures(x, labels, 4, split)
    covariance = np.cov(x.T, bias=True)
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = sigma / sigma.sum()
    assert actual.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-7)
    assert actual.participation_ratio == pytest.approx(np.trace(covariance) ** 2 / (covariance**2).sum(), rel=1e-7)
    correlation = np.abs(np.corrcoef(x.T))[np.triu_indices(6, 1)].mean()
    assert actual.mean_correlation == pytest.approx(correlation, rel=1e-7)
    means = np.stack([x[labels == k].mean(0) for k in range(4)])
    inside = x - means[labels]
    within, between = inside.T @ inside / 300, np.cov(means.T, bias=True)
    assert actual.nc1 == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4, rel=1e-7)
    assert actual.within_between == pytest.approx(np.trace(within) / np.trace(between), rel=1e-7)


def test_what_is_undefined_is_none():
    nothing = {"effective_rank": None, "participation_ratio": None, "mean_correlation": None}
    x, labels = torch.randn(20, 3), torch.arange(2).repeat(10)
    assert figures(torch.full((20, 3), 0.1), labels, 2) == Figures("here", 3, 20, 3, **nothing)
    assert figures(x[:1]) == Figures("here", 3, 1, 3, **nothing)
    assert figures(x.index_fill(0, torch.tensor([3]), math.nan), labels, 2) == Figures("here", 3, 20, 0, **nothing)
    assert figures(x.index_fill(0, torch.tensor([3]), math.inf), labels, 2) == Figures("here", 3, 20, 0, **nothing)
    one = figures(x[:, :1], labels, 2)
    assert (one.effective_rank, one.participation_ratio, one.mean_correlation) == (pytest.approx(1), pytest.approx(1), None)
    assert one.nc1 > 0
    assert figures(x, torch.zeros_like(labels), 2).nc1 is None
    same = figures(torch.cat([x, x]), torch.arange(2).repeat_interleave(20), 2)  # equal class means
    assert (same.nc1, same.within_between) == (None, None)
    constant = figures(torch.cat([x, torch.full((20, 2), 0.1)], 1), labels, 2)
    alone = figures(x, labels, 2)
    assert (constant.dead, constant.features) == (2, 5)
    assert constant.effective_rank == pytest.approx(alone.effective_rank)
    assert constant.mean_correlation == pytest.approx(alone.mean_correlation)
    assert constant.nc1 == pytest.approx(alone.nc1)


class Block(nn.Module):
    """As in torchvision: one rectifier, which works in place, serves twice."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Conv2d(width_in, width, 1, stride) if stride > 1 or width_in != width else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Torchvision(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.embed(F.unfold(x, 4, stride=4).mT)
        return self.head(self.block(tokens).mean(1))


def plain():
    """Ends in a convolution, and changes an output in place by a function."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 7, 3, 2), nn.Conv2d(7, 5, 3)

        def forward(self, x):
            x = self.two(F.relu_(self.one(x)))
            return F.relu_(self.three(F.relu_(x))).mean((2, 3))

    return Plain()


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 20), nn.ReLU(inplace=True), nn.Linear(20, 5))


def data(count=48, side=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator), torch.arange(5).repeat(10)[:count]


def batches(images, labels, size):
    return zip(images.split(size), labels.split(size), strict=True)


NETWORKS = {
    "resnet": (
        lambda: ResNet(8, 3, 5),
        {
            "penultimate": ("input of fc", 64),
            "stage 1 (16x16)": ("output of blocks.0", 16),
            "stage 2 (8x8)": ("output of blocks.1", 32),
            "stage 3 (4x4)": ("output of blocks", 64),
        },
    ),
    "wide": (
        lambda: WideResNet(10, 1, 3, 5, dropout=0.3),
        {
            "penultimate": ("input of fc", 64),
            "stage 1 (16x16)": ("output of blocks.1.bn1", 16),
            "stage 2 (8x8)": ("output of blocks.2.bn1", 32),
            "stage 3 (4x4)": ("output of bn", 64),
        },
    ),
    "torchvision": (
        Torchvision,
        {
            "penultimate": ("input of fc", 12),
            "stage 1 (16x16)": ("output of layer1", 8),
            "stage 2 (8x8)": ("output of layer2", 12),
        },
    ),
    "plain": (
        plain,
        {
            "penultimate": ("output of the model", 5),
            "stage 1 (7x7)": ("output of one", 6),
            "stage 2 (3x3)": ("output of two", 7),
        },
    ),
    "mlp": (mlp, {"penultimate": ("input of 3", 20)}),
    "tokens": (Tokens, {"penultimate": ("input of head", 16)}),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, expected = NETWORKS[name]
    model, (images, labels) = make(), data()
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    actual = collect(model, batches(images, labels, 48), classes=5)
    assert {key: (part.where, part.features) for key, part in actual.items()} == expected
    for key, part in actual.items():
        area = math.prod(map(int, key.split("(")[1][:-1].split("x"))) if "stage" in key else 1
        assert part.samples == 48 * area
        assert 1 <= part.effective_rank <= part.features
        assert 1 <= part.participation_ratio <= part.features
        assert 0 < part.mean_correlation <= 1
        assert (part.nc1 is None) == ("stage" in key)
    again = collect(model, batches(images, labels, 7), classes=5)
    for key, part in actual.items():
        for figure in ("effective_rank", "participation_ratio", "mean_correlation", "nc1", "within_between"):
            if getattr(part, figure) is not None:
                assert getattr(again[key], figure) == pytest.approx(getattr(part, figure), rel=2e-4)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_features_are_those_of_the_network():
    model, (images, labels) = ResNet(8, 3, 5), data()
    actual = collect(model, batches(images, labels, 10), classes=5)
    model.eval()
    with torch.no_grad():
        x = F.relu(model.bn(model.conv(images)))
        for stage, block in enumerate(model.blocks, 1):
            x = block(x)
            expected = figures(x.permute(0, 2, 3, 1).flatten(0, 2))
            part = actual[f"stage {stage} ({16 >> stage - 1}x{16 >> stage - 1})"]
            assert part.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
            assert part.mean_correlation == pytest.approx(expected.mean_correlation, rel=1e-4)
            assert part.dead == expected.dead
        expected = figures(x.mean((-2, -1)), labels, 5)
        assert actual["penultimate"].nc1 == pytest.approx(expected.nc1, rel=1e-3)


def test_in_place_functions_do_not_reach_what_was_seen():
    model, (images, labels) = plain(), data()
    actual = collect(model, batches(images, labels, 48), classes=5)["stage 1 (7x7)"]
    with torch.no_grad():
        expected = figures(model.one(images).permute(0, 2, 3, 1).flatten(0, 2))
    assert actual.effective_rank == pytest.approx(expected.effective_rank, rel=1e-5)


def test_bottlenecks_end_within_the_next_stage():
    actual = collect(ImageNetResNet(50, 3, 5), [data(4)], classes=5)
    assert actual["stage 1 (16x16)"].where == "output of blocks.3.bn1"


def test_a_hook_that_was_there_stays_and_none_stays_after_an_error():
    model, (images, labels) = ResNet(8, 3, 5), data()
    model.blocks[0].eval()
    model.fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    collect(model, batches(images, labels, 24), classes=5)
    assert len(calls) == 2

    def broken(*_):
        raise RuntimeError("broken")

    handle = model.blocks[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        collect(model, batches(images, labels, 24), classes=5)
    handle.remove()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == len(model.conv._forward_hooks) == 1
    assert [module.training for module in model.modules()] == modes
    assert not model.fc.weight.requires_grad
    assert model.conv.weight.requires_grad


def test_without_autocast_and_gradients():
    model, (images, labels) = ResNet(8, 3, 5), data()
    expected = collect(model, [(images, labels)], classes=5)
    dtypes = []
    model.conv.register_forward_hook(lambda _module, _given, output: dtypes.append((output.dtype, output.requires_grad)))
    with torch.autocast("cpu", torch.bfloat16):
        assert collect(model, [(images, labels)], classes=5) == expected
    assert dtypes == [(torch.float32, False)]


def test_bad_input():
    model, (images, labels) = ResNet(8, 3, 5), data()
    with pytest.raises(ValueError, match="features need at least one image; got none"):
        collect(model, [], classes=5)
    with pytest.raises(ValueError, match="features need at least one image; got none"):
        collect(model, [(images[:0], labels[:0])], classes=5)
    with pytest.raises(ValueError, match="labels must be from 0 to 3; got 0 to 4"):
        collect(model, [(images, labels)], classes=4)
    with pytest.raises(ValueError, match=r"every batch must have the features of the first, .*16x16.*; got .*8x8"):
        collect(model, [(images, labels), (images[..., :8, :8], labels)], classes=5)
    with pytest.raises(ValueError, match="classes must be an integer, at least 1; got 0"):
        collect(model, [(images, labels)], classes=0)
