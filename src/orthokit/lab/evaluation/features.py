"""Figures of features: their effective dimension, their correlations, and the collapse of classes.

Effective rank: O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007,
https://ieeexplore.ieee.org/document/7098875. Neural collapse: V. Papyan, X. Y. Han, D. L. Donoho, "Prevalence of neural collapse
during the terminal phase of deep learning training", 2020, https://arxiv.org/abs/2008.08186.

Papyan et al. measure training images, we measure test images. These figures differ where classes are not of equal size: every
class mean has the same weight in the covariance between classes, every image in the covariance within them. Classes without
images are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from orthokit.checks import check_count
from orthokit.diagnostics import effective_rank
from orthokit.lab.evaluation.attacks import frozen

__all__ = ["Figures", "Moments", "collect"]

ROWS = 2**16
"""Feature vectors held at once as 64-bit floats."""

RESOLUTION = 1e-6
"""Singular values of the class means below this share of the largest count as zero, as the means are of 32-bit floats."""


@dataclass(frozen=True)
class Figures:
    """Figures of a set of feature vectors; ``None`` where one is undefined, as the correlation of a single feature is.

    Attributes:
        where: the module that the features go into or come from.
        features: their number.
        samples: vectors: images, times positions in maps of features.
        dead: features that are constant.
        effective_rank: ``exp`` of the entropy of the normalised singular values of the centred feature matrix; from 1 to
            ``features``.
        participation_ratio: ``sum(l)^2 / sum(l^2)`` of the eigenvalues ``l`` of the covariance; from 1 to ``features``, and less
            sensitive to small eigenvalues.
        mean_correlation: mean absolute correlation of two features that are not dead.
        nc1: ``tr(S_W S_B^+) / C`` of the covariances within and between ``C`` classes; 0 where each has collapsed to a point.
        within_between: ``tr S_W / tr S_B``.
    """

    where: str
    features: int
    samples: int
    dead: int
    effective_rank: float | None
    participation_ratio: float | None
    mean_correlation: float | None
    nc1: float | None = None
    within_between: float | None = None


def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, classes: int) -> dict[str, Figures]:
    """The figures of a model's features over all batches, which are seen once and not kept.

    ``"penultimate"`` are the inputs of the last ``nn.Linear`` that a forward pass calls with one vector for each image, or the
    model's flattened output if there is none; ``where`` says which. ``"stage 1 (32x32)"`` and so on are maps of features, one
    sample a position: for each size of map larger than 1x1, in the order in which the sizes first occur, the last output of
    that size of any module. Models of tokens have no stages. With pre-activation or bottleneck blocks the last map of a size
    may be within the block that reduces it, as ``where`` shows.

    The model runs in evaluation mode, without gradients and outside autocast, and is left as it was.

    Args:
        model: of normalised images.
        batches: normalised images and their labels, on the model's device.
        classes: labels are below this.

    Raises:
        ValueError: no images, or a batch whose features come from other modules than those of the first.
    """
    check_count("classes", classes)
    moments: dict[str, Moments] = {}
    where: dict[str, str] = {}
    with frozen(model):
        for images, labels in batches:
            if not len(images):
                continue
            if not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(f"labels must be from 0 to {classes - 1}; got {int(labels.min())} to {int(labels.max())}")
            vectors = _features(model, images)
            sources = {key: source for key, (source, _) in vectors.items()}
            if moments and sources != where:
                raise ValueError(f"every batch must have the features of the first, {where}; got {sources}")
            where = sources
            for key, (_, features) in vectors.items():
                if key not in moments:
                    moments[key] = Moments(features, classes)
                moments[key].add(features, labels if key == "penultimate" else None)
    if not moments:
        raise ValueError("features need at least one image; got none")
    return {key: part.figures(where[key]) for key, part in moments.items()}


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> dict[str, tuple[str, Float[Tensor, "_ _"]]]:
    """The origin of each set of feature vectors of a batch, and the vectors.

    The hooks keep copies, as a module that works in place may change its input later.
    """
    linear: list[tuple[str, Tensor]] = []
    maps: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def before(name: str, inputs: Any) -> None:
        if isinstance(inputs, Tensor) and inputs.ndim == 2 and len(inputs) == len(images):
            linear[:] = [(f"input of {name or 'the model'}", inputs.clone())]

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-2:].numel() > 1:
            height, width = output.shape[-2:]
            maps[height, width] = (f"output of {name or 'the model'}", output.clone())

    hooks = []
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_hook(lambda _module, _inputs, output, name=name: after(name, output)))
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(lambda _module, inputs, name=name: before(name, *inputs[:1])))
        with torch.autocast(images.device.type, enabled=False):
            output = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    vectors = {"penultimate": linear[0] if linear else ("output of the model", output.flatten(1))}
    for stage, ((height, width), (source, features)) in enumerate(maps.items(), 1):
        vectors[f"stage {stage} ({height}x{width})"] = (source, features.permute(0, 2, 3, 1).flatten(0, 2))
    return vectors


class Moments:
    """Sums over feature vectors, about the mean of the first ones."""

    def __init__(self, first: Float[Tensor, "m d"], classes: int) -> None:
        d = first.shape[1]
        self.count = 0
        self.shift = first.double().mean(0)
        self.total, self.second = torch.zeros_like(self.shift), self.shift.new_zeros(d, d)
        self.counts, self.of_class = self.shift.new_zeros(classes), self.shift.new_zeros(classes, d)
        self.low, self.high = first[0], first[0]

    def add(self, features: Float[Tensor, "m d"], labels: Int64[Tensor, "m"] | None = None) -> None:  # noqa: F821
        """Take in feature vectors, and their classes."""
        self.count += len(features)
        self.low, self.high = torch.minimum(self.low, features.amin(0)), torch.maximum(self.high, features.amax(0))
        for part in features.split(ROWS):
            x = part.double() - self.shift
            self.total += x.sum(0)
            self.second += x.T @ x
        if labels is not None:
            self.of_class.index_add_(0, labels, features.double() - self.shift)
            self.counts += labels.bincount(minlength=len(self.counts))

    def figures(self, where: str) -> Figures:
        """The figures of all vectors so far."""
        mean = self.total / self.count
        covariance = self.second / self.count - mean.outer(mean)
        alive = self.low != self.high
        covariance = covariance[alive][:, alive]
        rank, participation, correlation, collapse, ratio = None, None, None, None, None
        if alive.any() and covariance.isfinite().all():
            eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
            rank = effective_rank(eigenvalues.sqrt()).item()
            participation = (eigenvalues.sum().square() / eigenvalues.square().sum()).item()
            deviation = covariance.diagonal().sqrt()
            if len(deviation) > 1:
                cosines = (covariance / deviation.outer(deviation)).abs()
                correlation = ((cosines.sum() - cosines.trace()) / (len(cosines) * (len(cosines) - 1))).item()
            collapse, ratio = self._collapse(alive)
        return Figures(
            where=where,
            features=len(alive),
            samples=self.count,
            dead=int((~alive).sum()),
            effective_rank=rank,
            participation_ratio=participation,
            mean_correlation=correlation,
            nc1=collapse,
            within_between=ratio,
        )

    def _collapse(self, alive: Tensor) -> tuple[float | None, float | None]:
        """``nc1`` and ``within_between``."""
        present = self.counts > 0
        classes = int(present.sum())
        if classes < 2:
            return None, None
        counts = self.counts[present, None]
        means = self.of_class[present][:, alive] / counts
        within = (self.second[alive][:, alive] - means.T @ (counts * means)) / self.count
        between = torch.linalg.svd((means - means.mean(0)) / classes**0.5, full_matrices=False)
        if between.S[0] <= RESOLUTION**2 * within.trace().clamp(min=0).sqrt():
            return None, None
        mask = between.S[: classes - 1] > RESOLUTION * between.S[0]
        directions, sizes = between.Vh[: classes - 1][mask], between.S[: classes - 1][mask].square()
        inside = ((directions @ within) * directions).sum(1).clamp(min=0)
        trace = within.diagonal().clamp(min=0).sum() / between.S.square().sum()
        return ((inside / sizes).sum() / classes).item(), trace.item()
