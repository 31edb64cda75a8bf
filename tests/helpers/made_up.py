"""Results of runs that never were, with gains that a comparison should find."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.results import Result

PENALTIES: tuple[dict[str, Any] | None, ...] = (
    None,
    {"name": "so", "squared": False},
    {"name": "disentangled"},
    {"name": "disentangled", "relax": {"name": "share", "q": 0.1}, "form": "welch"},
    {"name": "srip"},
    {"name": "disentangled", "relax": {"name": "share", "q": 0.5}},
    {"name": "dso"},
    {"name": "coherence"},
)
KINDS = ("gaussian_noise", "gaussian_blur", "contrast", "brightness", "pixelate", "jpeg_compression")
LINF, L2, SIGMA = (0.25, 0.5, 1, 2, 4, 8), (0.0625, 0.125, 0.25, 0.5, 1.0), (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "orthokit": "0.1.0", "torch": "2.13.0+cpu", "lightning": "2.6.6", "numpy": "2.4.6"},
    "platform": "Linux-6.1-x86_64-with-glibc2.36",
    "processor": "AMD EPYC",
    "cores": 2,
    "device": "cpu",
    "ranks": 1,
    "precision": "32-true",
    "threads": 1,
    "commit": "8e0da63b6cf817d041145d42c56da746ccd312fd",
}


def made_up(
    arms: Mapping[str, float], depths: Sequence[int] = (8, 20), seeds: int = 3, sd: float = 0.3, parts: bool = True
) -> list[Result]:
    """Runs of arms, whose first has no regularizer, with their gains in points of test accuracy; ``sd`` is of seeds."""
    random = np.random.default_rng(0)
    return [
        _result(random, place, arm, gain, depth, seed, sd, parts)
        for depth in depths
        for place, (arm, gain) in enumerate(arms.items())
        for seed in range(seeds)
    ]


def _result(
    random: np.random.Generator, place: int, arm: str, gain: float, depth: int, seed: int, sd: float, parts: bool
) -> Result:
    def near(value: float, spread: float = 0.03) -> float:
        return float(value * np.exp(spread * random.standard_normal()))

    accuracy = float((90 - 160 / (depth + 4) + gain + sd * random.standard_normal()) / 100)
    under = near(0.11 if place == 0 else (0.02, 0.0004, 0.03, 0.008, 0.05)[place % 5])
    over = near(0.186 if place == 0 else (0.14, 0.12)[place % 2])
    raw: dict[str, Any] = {
        "data": {"name": "cifar10", "train": 10000, "size": 16, "pad": 2},
        "network": {"kind": "resnet", "depth": depth},
        "train": {"epochs": 20, "warmup": 1.0},
    }
    turn, kind = divmod(max(0, place - 1), len(PENALTIES) - 1)
    if place and (penalty := PENALTIES[1 + kind]) is not None:
        raw["regularizer"] = {"strength": 0.1 * (1 + turn), "penalty": penalty}
    summary = {
        "name": f"ResNet-{depth}-{place}",
        "study": {"arm": arm, "panel": f"ResNet-{depth}"},
        "seed": seed,
        "test": {"loss": near(2.8 * (1 - accuracy)), "accuracy": accuracy},
        "validation": {"loss": near(2.8 * (1 - accuracy)), "accuracy": accuracy - 0.004},
        "orthogonality": {
            "under": {"mean_cos": under, "residual": near(12 * under), "copies": 0},
            "over": {"mean_cos": over, "tightness": near(over), "copies": seed},
        },
        "ranks": {"stem": 4 + place},
        "fingerprint": "17791032808d8694e57203a1f0e13909ed4212229ab977f8283fa7f9c4d73cc7",
        "images_per_second": near((2300 - 60 * place) * 8 / depth),
        "penalty_share": near(0.001 if place == 0 else 0.02 * place),
        "seconds": 97.1,
        "environment": ENVIRONMENT,
        "recipe": Recipe.of(raw).to_dict(),
    }
    history = tuple(
        {
            "epoch": epoch,
            "validation": round(accuracy - 0.4 * np.exp(-epoch / 5), 4),
            "under": near(under + (0.05 - under) * np.exp(-epoch)),
            "over": near(over + (0.15 - over) * np.exp(-epoch)),
        }
        for epoch in range(1, 21)
    )
    actual = _parts(near, accuracy, gain / 100) if parts else {}
    return Result(Path(f"runs/ResNet-{depth}-{place}/{seed}/summary.json"), summary, Recipe.of(raw), actual, history)


def _parts(near: Any, accuracy: float, gain: float) -> dict[str, Any]:
    def curve(strengths: Sequence[float], scale: float) -> list[float]:
        return [near((accuracy + gain) * float(np.exp(-strength / scale)), 0.01) for strength in strengths]

    def features(width: int, part: float) -> dict[str, Any]:
        rank = near(width * (part + 2 * gain), 0.02)
        return {
            "features": width,
            "effective_rank": rank,
            "participation_ratio": near(rank / 2),
            "mean_correlation": near(0.2),
            "dead": 0,
        }

    return {
        "accuracy": {"settings": {"images": 10000}, "accuracy": accuracy, "nll": near(2.8 * (1 - accuracy)), "ece": near(0.03)},
        "attacks": {
            "settings": {"images": 1000, "steps": 20},
            "linf": list(LINF),
            "fgsm": curve(LINF, 4),
            "pgd": curve(LINF, 3),
            "l2": list(L2),
            "pgd_l2": curve(L2, 0.4),
        },
        "noise": {"settings": {}, "sigma": list(SIGMA), "accuracy": curve(SIGMA, 0.3)},
        "corruptions": {
            "settings": {},
            "accuracy": {kind: curve(range(1, 6), 3 + 3 * place) for place, kind in enumerate(KINDS)},
        },
        "features": {
            "settings": {},
            "penultimate": features(64, 0.3) | {"nc1": near(1.2), "within_between": near(0.8)},
            "stages": {
                f"stage {k} ({side}x{side})": features(width, 0.8 - 0.1 * k)
                for k, (side, width) in enumerate(((16, 16), (8, 32), (4, 64)), 1)
            },
        },
    }
