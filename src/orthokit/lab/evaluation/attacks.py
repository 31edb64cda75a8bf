"""Robustness of plainly trained networks: the images they still get right under attack and under noise.

One step along the sign of the gradient: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples",
2015, https://arxiv.org/abs/1412.6572. Projected gradient descent: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu,
"Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, https://arxiv.org/abs/1706.06083.

Ours differs from Madry et al.'s in being no weaker: an image is fooled if any iterate is misclassified, not only the last, and
one that is fooled within a small ball counts as fooled within every larger one. Both find upper bounds of the robust accuracy.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.checks import check_choice, check_count, check_number
from orthokit.kernel import evaluating

__all__ = ["L2", "LINF", "SIGMAS", "Pixels", "clean", "fgsm", "frozen", "noise", "noisy", "pgd"]

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")

LINF = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Radii in grey levels: divide by 255 for images in [0, 1]."""

L2 = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Euclidean radii for images in [0, 1]."""

SIGMAS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)
"""Standard deviations of Gaussian noise for images in [0, 1]."""


class Pixels(nn.Module):
    """A model of normalised images as one of images in [0, 1]: ``model((255 x - mean) / std)``.

    ``mean`` and ``std`` are those of an :class:`~orthokit.lab.data.images.ImageSet`, of pixels from 0 to 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Float[Tensor, "c"], std: Float[Tensor, "c"]) -> None:  # noqa: F821
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Images in [0, 1] to logits."""
        logits: Tensor = self.model((images * 255 - self.mean) / self.std)
        return logits


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode and its parameters without gradients; the model is then as it was."""
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model.requires_grad_(False)):
            yield
    finally:
        for parameter, requires_grad in states:
            parameter.requires_grad_(requires_grad)


def clean(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, "n"],  # noqa: F821
    *,
    batch: int = 256,
) -> Bool[Tensor, "n"]:  # noqa: F821
    """A mask of the images that are right as they are."""
    return _right(model, images, labels, lambda x, _: iter([x]), batch)[0]


def fgsm(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, "n"],  # noqa: F821
    epsilons: Sequence[float],
    *,
    batch: int = 256,
) -> Bool[Tensor, "e n"]:
    """A mask of the images still right after one step: ``clamp(x + epsilon sign(gradient), 0, 1)``, a row for each epsilon.

    One gradient of the cross-entropy, at the clean image, serves every epsilon. An image that is wrong at a small epsilon may be
    right at a larger one.

    Args:
        model: of images in [0, 1], such as :class:`Pixels`.
        images: in [0, 1].
        labels: of the images.
        epsilons: steps, in units of the images.
        batch: images at a time.
    """
    _check(images, epsilons, "epsilons", batch)

    def steps(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        _, gradient = _gradient(model, x, y)
        for epsilon in epsilons:
            yield (x + epsilon * gradient.sign()).clamp(0, 1)

    return _right(model, images, labels, steps, batch)


def pgd(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, "n"],  # noqa: F821
    epsilons: Sequence[float],
    *,
    norm: Norm = "linf",
    steps: int = 20,
    path: float = 5.0,
    batch: int = 256,
    seed: int = 0,
) -> Bool[Tensor, "e n"]:
    """A mask of the images still right at every iterate of projected gradient descent, a row for each epsilon.

    From a random place in the ball around the image, ``steps`` steps of length ``path epsilon / steps`` along the sign of the
    gradient of the cross-entropy (``"linf"``) or along the gradient (``"l2"``), each followed by a projection onto the ball and
    onto [0, 1]. An image counts as fooled if it is misclassified clean, at any iterate, the random start included, or within a
    smaller ball; it is then left alone.

    The starts are drawn for all images at once, one epsilon after the other: those of an image depend neither on ``batch`` nor
    on which images were fooled.

    Args:
        model: of images in [0, 1], such as :class:`Pixels`.
        images: in [0, 1].
        labels: of the images.
        epsilons: radii of the ball, in units of the images and in any order.
        norm: ``"linf"`` or ``"l2"``, of the ball.
        steps: gradients for each epsilon.
        path: length of all steps together, in radii: 5 of them in 20 steps are a quarter of the radius each, as is usual. Madry
            et al.'s 2.5 fools fewer in ``"l2"``: a start across the gradient ends 1.4 % short even if the gradient is constant.
        batch: images at a time.
        seed: of the random starts.
    """
    _check(images, epsilons, "epsilons", batch)
    check_choice("norm", norm, NORMS)
    check_count("steps", steps)
    check_number("path", path, open_low=True)
    generator = torch.Generator().manual_seed(seed)
    standing = clean(model, images, labels, batch=batch)
    right = torch.empty(len(epsilons), len(images), dtype=torch.bool, device=images.device)
    for row in sorted(range(len(epsilons)), key=epsilons.__getitem__):
        epsilon = float(epsilons[row])
        starts = _in_ball(images.shape, norm, generator) * epsilon
        with _attacking(model, images):
            for rows in standing.nonzero().squeeze(1).split(batch) if standing.any() else ():
                start = starts[rows.cpu()].to(images.device)
                standing[rows] = _descend(model, images[rows].float(), labels[rows], start, epsilon, norm, steps, path)
        right[row] = standing
    return right


def noise(
    images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"], sigma: float, *, seed: int = 0
) -> Float[Tensor, "n c h w"]:
    """``clamp(x + sigma z, 0, 1)``, not rounded, for images in [0, 1] or of bytes: the same normal ``z`` for every ``sigma``.

    Args:
        images: floats in [0, 1], or bytes, which are divided by 255.
        sigma: standard deviation, for images in [0, 1].
        seed: of ``z``.
    """
    check_number("sigma", sigma)
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return z.to(images.device).mul_(sigma).add_(x).clamp_(0, 1)


def noisy(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, "n"],  # noqa: F821
    sigmas: Sequence[float] = SIGMAS,
    *,
    batch: int = 256,
    seed: int = 0,
) -> Bool[Tensor, "e n"]:
    """A mask of the images still right under :func:`noise`, a row for each of ``sigmas``."""
    _check(images, sigmas, "sigmas", batch)
    return torch.cat([_right(model, noise(images, sigma, seed=seed), labels, lambda x, _: iter([x]), batch) for sigma in sigmas])


def _check(images: Tensor, sizes: Sequence[float], name: str, batch: int) -> None:
    check_count("batch", batch)
    if not len(sizes):
        raise ValueError(f"{name} must hold at least one number; got {sizes!r}")
    for size in sizes:
        check_number(f"each of {name}", size)
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images must be in [0, 1]; got values from {images.min():g} to {images.max():g}")


@contextlib.contextmanager
def _attacking(model: nn.Module, images: Tensor) -> Iterator[None]:
    with frozen(model), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        yield


def _right(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    change: Callable[[Tensor, Tensor], Iterator[Tensor]],
    batch: int,
) -> Bool[Tensor, "e n"]:
    """A mask of where the model is right on each of the changed images."""
    with _attacking(model, images):
        parts = [
            torch.stack([model(variant).argmax(1) == y for variant in change(x.float(), y)])
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        ]
    return torch.cat(parts, 1)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of each image's cross-entropy."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), x)
    return logits.detach(), gradient


def _descend(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, epsilon: float, norm: Norm, steps: int, path: float
) -> Bool[Tensor, "n"]:  # noqa: F821
    """A mask of the images that stay right at the start and after each step."""
    step = _linf_step if norm == "linf" else _l2_step
    rows, x, y = torch.arange(len(images), device=images.device), images, labels
    iterate = (x + start).clamp_(0, 1)
    for _ in range(steps):
        logits, gradient = _gradient(model, iterate, y)
        right = logits.argmax(1) == y
        rows, x, y, iterate, gradient = (part[right] for part in (rows, x, y, iterate, gradient))
        if not len(rows):
            break
        iterate = step(x, iterate, gradient, epsilon, path * epsilon / steps).clamp_(0, 1)
    standing = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    if len(rows):
        standing[rows] = model(iterate).argmax(1) == y
    return standing


def _linf_step(x: Tensor, iterate: Tensor, gradient: Tensor, epsilon: float, length: float) -> Tensor:
    return (iterate + length * gradient.sign()).clamp(x - epsilon, x + epsilon)


def _l2_step(x: Tensor, iterate: Tensor, gradient: Tensor, epsilon: float, length: float) -> Tensor:
    direction = gradient / _positive(gradient.abs().amax((1, 2, 3), keepdim=True))  # squares of small gradients underflow
    offset = iterate - x + length * direction / _positive(_length(direction))
    return x + offset * (epsilon / _positive(_length(offset))).clamp(max=1)


def _length(x: Tensor) -> Float[Tensor, "n 1 1 1"]:
    length: Tensor = x.flatten(1).norm(dim=1)[:, None, None, None]
    return length


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _in_ball(shape: Sequence[int], norm: Norm, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Points drawn uniformly from the unit ball."""
    if norm == "linf":
        return torch.rand(shape, generator=generator) * 2 - 1
    direction = torch.randn(shape, generator=generator)
    radius = torch.rand(shape[0], 1, 1, 1, generator=generator) ** (1 / direction[0].numel() if shape[0] else 1)
    return direction / _positive(_length(direction)) * radius
