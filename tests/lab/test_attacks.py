"""Attacks against models whose minimal perturbations are known, and against AutoAttack's APGD."""

import functools
import warnings

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn
from torch.nn import functional as F

from orthokit.lab.data.images import load
from orthokit.lab.evaluation import attacks
from orthokit.lab.evaluation.attacks import L2, LINF, SIGMAS, Pixels, fgsm, noise, noisy, pgd
from orthokit.lab.networks.resnet import ResNet

SHAPE = (3, 4, 4)


class Recorder(nn.Module):
    """A model that keeps its inputs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs = model, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.model(x)


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(nn.Flatten(), layer)


def two_classes():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 48, generator=generator)
    return linear(weight, -weight.sum(1) / 2)


def many_classes():
    """Filters of equal norms that share no pixel: the gradient leads to the nearest class."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.zeros(6, 48)
    places = torch.randperm(48, generator=generator).view(6, 8)
    weight.scatter_(1, places, torch.randint(0, 2, (6, 8), generator=generator) * 2.0 - 1)
    return linear(300 * weight, -150 * weight.sum(1))


def near_grey(model, count=400):
    """Images whose minimal perturbations are small enough for no pixel to be clamped, and the classes the model sees."""
    images = 0.5 + 0.02 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    return images, model(images).argmax(1)


def minimal(model, images, labels, order):
    """The dual norm of the way to the nearest border between two classes."""
    weight = model[1].weight.double()
    logits = images.flatten(1).double() @ weight.T + model[1].bias.double()
    actual = []
    for logit, y in zip(logits, labels.tolist(), strict=True):
        others = [k for k in range(len(weight)) if k != y]
        actual.append(min(((logit[y] - logit[k]) / (weight[k] - weight[y]).norm(p=order)).item() for k in others))
    return torch.tensor(actual)


def gaps(sizes, low, high):
    """Epsilons in the widest gaps between the sizes, on either side of each decile, so that no image is a close call."""
    ordered, epsilons = sizes.sort().values, []
    for place in range(len(ordered) // 10, len(ordered) - 20, len(ordered) // 10):
        part = ordered[place : place + 20]
        widest = (part[1:] / part[:-1]).argmax()
        epsilon = (part[widest] * part[widest + 1]).sqrt().item()
        ratios = sizes / epsilon
        if not ((ratios > low) & (ratios < high)).any():
            epsilons.append(epsilon)
    return epsilons


@torch.no_grad()
@pytest.mark.parametrize("make", [two_classes, many_classes])
@pytest.mark.parametrize("attack", ["fgsm", "linf", "l2"])
def test_linear_models_fall_at_their_minimal_perturbation(make, attack):
    model = make()
    images, labels = near_grey(model, 40)
    if attack == "l2":
        sizes = minimal(model, images, labels, 2)
        epsilons = gaps(sizes, 0.99, 1.001)
        actual = pgd(model, images, labels, epsilons, norm="l2")
    else:
        sizes = minimal(model, images, labels, 1)
        epsilons = gaps(sizes, 0.99, 1.01)
        actual = (fgsm if attack == "fgsm" else pgd)(model, images, labels, epsilons)
    assert len(epsilons) >= 2
    assert 0.05 < actual[-1].float().mean() < actual[0].float().mean() < 0.95
    assert torch.equal(actual, sizes > torch.tensor(epsilons)[:, None])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_in_the_ball_and_in_range(norm):
    model = two_classes()
    images = torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(4))
    labels, epsilon = model(images).argmax(1), 0.2 if norm == "linf" else 1.0
    model[1].weight.data *= 1e-9  # nobody is fooled: the order of the images stays
    model[1].bias.data = torch.tensor([0.0, 1.0])
    labels[:] = 1
    recorder = Recorder(model)
    assert pgd(recorder, images, labels, [epsilon], norm=norm, steps=7).all()
    assert len(recorder.inputs) == 1 + 7 + 1
    assert torch.equal(recorder.inputs[0], images)
    for moved in recorder.inputs[1:]:
        sizes = (moved - images).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
        assert sizes.max() <= epsilon * (1 + 1e-5)
        assert sizes.min() > 0.3 * epsilon
        assert moved.min() >= 0
        assert moved.max() <= 1
    assert not torch.equal(recorder.inputs[1], recorder.inputs[2])


def test_fgsm_uses_one_gradient_at_the_clean_image():
    recorder = Recorder(two_classes())
    images, labels = near_grey(recorder.model, 10)
    fgsm(recorder, images, labels, [0.01, 0.6])
    clean, *moved = recorder.inputs
    assert torch.equal(clean, images)
    images.requires_grad_()
    F.cross_entropy(recorder.model(images), labels, reduction="sum").backward()
    sign = images.grad.sign()
    for epsilon, actual in zip([0.01, 0.6], moved, strict=True):
        assert torch.equal(actual, (images + epsilon * sign).clamp(0, 1))


def test_starts_are_uniform_in_the_ball():
    generator = torch.Generator().manual_seed(0)
    cube = attacks._in_ball((20_000, 1, 1, 2), "linf", generator).flatten(1)
    assert cube.abs().max() <= 1
    assert cube.mean(0).abs().max() < 0.02
    assert cube.square().mean(0).tolist() == pytest.approx([1 / 3] * 2, abs=0.01)
    ball = attacks._in_ball((20_000, 1, 1, 2), "l2", generator).flatten(1)
    radius = ball.norm(dim=1)
    assert radius.max() <= 1 + 1e-6
    assert ball.mean(0).abs().max() < 0.02
    for size in (0.25, 0.5, 0.9):
        assert (radius < size).float().mean().item() == pytest.approx(size**2, abs=0.015)


def test_a_flat_model_does_not_break_l2():
    model = linear(torch.zeros(2, 48), torch.tensor([1.0, 0.0]))
    images = torch.rand(4, *SHAPE)
    assert pgd(model, images, torch.zeros(4, dtype=torch.int64), [0.5], norm="l2").all()
    faint = linear(1e-30 * torch.randn(2, 48), torch.zeros(2))
    assert not pgd(faint, images, 1 - faint(images).argmax(1), [0.5], norm="l2").any()
    assert attacks._l2_step(images, images, torch.full_like(images, 1e-30), 1.0, 0.5).sub(images).flatten(1).norm(
        dim=1
    ).tolist() == pytest.approx([0.5] * 4)


@functools.cache
def trained():
    """A ResNet-8 after a few seconds on the digits, the first 100 test images in [0, 1], and their labels."""
    digits = load("digits")
    torch.manual_seed(0)
    model = ResNet(8, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    x, y = digits.normalise(digits.train.pixels), digits.train.labels
    for _ in range(10):
        for rows in torch.randperm(len(y)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return Pixels(model, digits.mean, digits.std), digits.test.pixels[:100].float() / 255, digits.test.labels[:100]


EPSILONS = {"linf": (0.02, 0.05, 0.08), "l2": (0.15, 0.25, 0.4, 0.7)}


@pytest.mark.parametrize(("norm", "epsilon"), [(norm, epsilon) for norm, sizes in EPSILONS.items() for epsilon in sizes])
def test_as_strong_as_apgd(norm, epsilon):
    """One start of APGD with 50 steps; ours has 20."""
    model, images, labels = trained()
    with attacks.frozen(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pyautoattack")
        attack = AutoAttack(
            model, attacks=["apgd-ce"], version="custom", norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=0
        )
        attack.apgd.n_restarts, attack.apgd.n_iter = 1, 50
        moved, _ = attack.run_standard_evaluation(images, labels, batch_size=100)
        reference = 100 * (model(moved).argmax(1) == labels).float().mean().item()
    assert 5 < reference < 98
    accuracy = 100 * pgd(model, images, labels, [epsilon], norm=norm).float().mean().item()
    print(f"{norm} {epsilon}: PGD {accuracy:.1f}, APGD {reference:.1f}")
    assert abs(accuracy - reference) <= 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_monotone_and_independent_of_batches_and_order(norm):
    model, images, labels = trained()
    epsilons = EPSILONS[norm]
    torch.manual_seed(1)
    actual = pgd(model, images, labels, epsilons, norm=norm, steps=5)
    torch.manual_seed(2)
    assert torch.equal(actual, pgd(model, images, labels, epsilons, norm=norm, steps=5))
    assert torch.equal(actual, pgd(model, images, labels, epsilons, norm=norm, steps=5, batch=37))
    assert torch.equal(actual.flip(0), pgd(model, images, labels, epsilons[::-1], norm=norm, steps=5))
    clean = noisy(model, images, labels, [0])[0]
    assert 0.8 < clean.float().mean() < 1
    for larger, smaller in zip(actual, (clean, *actual), strict=False):
        assert not (larger & ~smaller).any()
    assert torch.equal(pgd(model, images, labels, [0], norm=norm, steps=2)[0], clean)
    assert torch.equal(fgsm(model, images, labels, [0, 0.05]), fgsm(model, images, labels, [0, 0.05], batch=37))


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(outer, fails):
    model, images, labels = trained()
    parameters = list(model.parameters())
    model.train()
    model.model.bn.eval()
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def snapshot():
        return (
            [module.training for module in model.modules()],
            [p.requires_grad for p in parameters],
            [None if p.grad is None else p.grad.sum().item() for p in parameters],
        )

    def broken(*_):
        raise RuntimeError("broken")

    before = snapshot()
    handle = model.register_forward_hook(broken) if fails else None
    with outer():
        for attack in (fgsm, pgd, functools.partial(pgd, norm="l2", steps=2), noisy):
            if fails:
                with pytest.raises(RuntimeError, match="broken"):
                    attack(model, images[:10], labels[:10], [0.05])
            else:
                attack(model, images[:10], labels[:10], [0.05])
            assert snapshot() == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not images.requires_grad
    if handle:
        handle.remove()
    parameters[0].requires_grad_(True)
    model.zero_grad()


def test_without_autocast():
    model, images, labels = trained()
    recorder = Recorder(model)
    expected = fgsm(model, images, labels, [0.05])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fgsm(recorder, images, labels, [0.05]), expected)
    assert {x.dtype for x in recorder.inputs} == {torch.float32}


def test_pixels_normalise_inside():
    digits = load("digits")
    model, pixels = nn.Flatten(), digits.test.pixels[:20]
    actual = Pixels(model, digits.mean, digits.std)(pixels.float() / 255)
    assert torch.allclose(actual, digits.normalise(pixels).flatten(1), atol=1e-5)
    assert set(Pixels(model, digits.mean, digits.std).state_dict()) == {"mean", "std"}


def test_noise():
    pixels = load("patches").test.pixels[:100]
    images = pixels.float() / 255
    one, two = noise(images, 0.1), noise(images, 0.2)
    assert torch.equal(noise(pixels, 0.1), one)
    assert not torch.equal(noise(pixels, 0.1, seed=1), one)
    assert one.min() == 0
    assert one.max() == 1
    inside = (one > 0) & (one < 1) & (two > 0) & (two < 1)
    assert torch.allclose((two - images)[inside], 2 * (one - images)[inside], atol=1e-6)
    z = noise(torch.full((200, 3, 32, 32), 0.5), 0.05) - 0.5
    assert z.std().item() == pytest.approx(0.05, rel=0.01)
    assert z.mean().item() == pytest.approx(0, abs=3e-4)
    assert torch.equal(noise(images, 0), images)


def test_noisy():
    model, images, labels = trained()
    actual = noisy(model, images, labels, batch=37)
    assert actual.shape == (len(SIGMAS), len(images))
    with attacks.frozen(model), torch.no_grad():
        expected = [model(noise(images, sigma)).argmax(1) == labels for sigma in SIGMAS]
    assert torch.equal(actual, torch.stack(expected))


def test_grids():
    assert LINF == (0.25, 0.5, 1, 2, 4, 8)
    assert L2 == (0.0625, 0.125, 0.25, 0.5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2'; got 'l1'"),
        ({"path": 0.0}, "path must be a finite number in"),
        ({"steps": 0}, "steps must be an integer, at least 1; got 0"),
        ({"batch": 0}, "batch must be an integer, at least 1; got 0"),
        ({"epsilons": []}, r"epsilons must hold at least one number; got \[\]"),
        ({"epsilons": [-1.0]}, "each of epsilons must be a finite number in"),
        ({"images": 255 * torch.ones(2, *SHAPE)}, r"images must be in \[0, 1\]; got values from 255 to 255"),
    ],
)
def test_bad_input(options, message, unchecked):
    arguments = {"images": torch.rand(2, *SHAPE), "labels": torch.zeros(2, dtype=torch.int64), "epsilons": [0.1], **options}
    with pytest.raises(ValueError, match=message):
        pgd(two_classes(), **arguments)
