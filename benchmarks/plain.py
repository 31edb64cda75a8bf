"""Penalties as plain loops compute them: the formula of a layer, in autograd, as one would write it after the paper.

``cost.py`` checks that each has the value and the gradient of the library's, and times it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import orthokit as ok

TENTH = ok.share(0.1)


def norm(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x)
    return length


def eye(square: Tensor) -> Tensor:
    return torch.eye(len(square), device=square.device)


def small(w: Tensor) -> Tensor:
    return w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w


def so(gram: Tensor) -> Tensor:
    return (gram - eye(gram)).square().sum()


def cosines(w: Tensor) -> Tensor:
    unit = F.normalize(w, dim=1)
    return (unit @ unit.T).tril(-1)


def lengths(w: Tensor) -> Tensor:
    return norm(w.square().sum(1) - 1)


@cache
def start(size: int, device: torch.device) -> Tensor:
    """The vector that SRIP starts from here; published code draws one at each call."""
    scattered = torch.arange(1, size + 1, dtype=torch.float64).mul(12.9898).sin() * 43758.5453
    return (scattered - scattered.floor() - 0.5).to(device, torch.float32)


def srip(w: Tensor) -> Tensor:
    residual = small(w)
    residual = residual - eye(residual)
    v = start(len(residual), w.device)
    v = residual @ (v / norm(v))
    return norm(residual @ (v / norm(v)))


@cache
def rank(o: int, n: int) -> int:
    return TENTH(o, n)


def kept(w: Tensor) -> Tensor:
    sizes = cosines(w).abs().flatten().sort().values
    return norm(sizes[: len(sizes) - ok.cardinality(len(w), rank(*w.shape))])


def excess(w: Tensor) -> Tensor:
    o, r = len(w), rank(*w.shape)
    return norm((cosines(w).abs() - math.sqrt((o - r) / (r * (o - 1)))).relu())


def over_budget(w: Tensor) -> Tensor:
    o, r = len(w), rank(*w.shape)
    return (norm(cosines(w)) - math.sqrt(o * (o - r) / (2 * r))).relu()


def shifted(weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Products of all filters with all filters at every lag, and the identity at lag zero."""
    products = F.conv2d(weight, weight, stride=stride, padding=(weight.shape[-1] - 1) // stride * stride)
    identity = torch.zeros_like(products)
    identity[..., products.shape[-2] // 2, products.shape[-1] // 2] = eye(weight)
    return products, identity


def conv_orth(weight: Tensor, stride: int) -> Tensor:
    products, identity = shifted(weight, stride)
    return (products - identity).square().sum()


def lorth(weight: Tensor, stride: int) -> Tensor:
    inputs = weight.shape[1] * min(weight.shape[-1], stride) ** 2
    return (conv_orth(weight, stride) - max(0, len(weight) - inputs)).relu()


def dispersion(cosine: Tensor) -> Tensor:
    return 0.1 * (cosine.clamp(-0.9999, 0.9999).arccos() - math.pi / 2).square().sum()


def eadk(w: Tensor) -> Tensor:
    return lengths(w).square() + 2 * dispersion(cosines(w))


def eadc(weight: Tensor, stride: int) -> Tensor:
    w = weight.flatten(1)
    products, identity = shifted(F.normalize(w, dim=1).view_as(weight), stride)
    return lengths(w).square() + dispersion(products * (1 - identity))


def gor(w: Tensor) -> Tensor:
    groups = next(g for g in range(min(32, max(1, len(w) // 4)), 0, -1) if len(w) % g == 0)
    part: Tensor = w.unflatten(0, (groups, -1))
    products = part @ part.mT if part.shape[1] <= part.shape[2] else part.mT @ part
    return (products - eye(products[0])).square().sum()


@dataclass(frozen=True)
class Arm:
    """A penalty, and its formula for a layer: of the kernel matrix, or of the weight and the stride."""

    penalty: Any
    plain: Callable[..., Tensor]
    convolution: bool = False


ARMS = {
    "SO": Arm(ok.SO(), lambda w: so(w @ w.T)),
    "SO-smaller": Arm(ok.SO(side="smaller"), lambda w: so(small(w))),
    "DSO": Arm(ok.DSO(), lambda w: so(w @ w.T) + so(w.T @ w)),
    "OffDiagonal": Arm(ok.OffDiagonal(), lambda w: ((w @ w.T) * (1 - eye(w))).square().sum() / 2),
    "GOR": Arm(ok.GOR(), gor),
    "SRIP": Arm(ok.SRIP(), srip),
    "MC": Arm(ok.MC(), lambda w: (w @ w.T - eye(w)).abs().max()),
    "Coherence": Arm(ok.Coherence(), lambda w: cosines(w).abs().max()),
    "strict": Arm(ok.Disentangled(), lambda w: lengths(w) + norm(cosines(w))),
    "pairs": Arm(ok.Disentangled(relax=TENTH), lambda w: lengths(w) + kept(w)),
    "welch": Arm(ok.Disentangled(relax=TENTH, form="welch"), lambda w: lengths(w) + excess(w)),
    "budget": Arm(ok.Disentangled(relax=TENTH, form="budget"), lambda w: lengths(w) + over_budget(w)),
    "EADK": Arm(ok.EADK(), eadk),
    "ConvOrth": Arm(ok.ConvOrth(), conv_orth, convolution=True),
    "Lorth": Arm(ok.Lorth(), lorth, convolution=True),
    "EADC": Arm(ok.EADC(), eadc, convolution=True),
}
