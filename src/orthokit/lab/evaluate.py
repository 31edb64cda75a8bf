"""Evaluation of trained networks, part by part: accuracy and calibration, near-orthogonality, robustness, features.

All in float32, on the test images that training looked at once or never. What is found goes into ``evaluation.json`` beside the
weights, part by part; a part that is there, of the same weights and settings, is not measured again.
"""

import functools
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from orthokit import checkpoint
from orthokit.checks import did_you_mean
from orthokit.lab import attacks, corruptions, features
from orthokit.lab.data import Images, ImageSet, choose, load
from orthokit.lab.files import to_json, write
from orthokit.lab.models import orthogonality
from orthokit.lab.recipe import DataSection, Recipe
from orthokit.lab.record import read_json
from orthokit.lab.results import Result
from orthokit.select import state_of

STEPS, PATH = 20, 5.0
"""Of projected gradient descent: steps, and the length of all of them in radii."""
BINS = 15
"""Of confidence, in the expected calibration error."""
BATCH = 500


@dataclass(frozen=True, eq=False)
class Subject:
    """Trained weights, the recipe they are of, and the file for what is found."""

    weights: Path
    recipe: Recipe
    record: Path

    @property
    def name(self) -> str:
        """To be shown."""
        return "/".join(self.weights.parts[-3:-1] if self.record.name == "evaluation.json" else self.weights.parts[-1:])


def subjects(path: Path, recipe: Recipe | None = None) -> list[Subject]:
    """What is to be evaluated in ``path``: a run, a folder of runs, or a checkpoint.

    Args:
        path: a run's folder, or one above several; or a file that ``orthokit report`` reads.
        recipe: of a checkpoint that does not carry its own.

    Raises:
        FileNotFoundError: nothing is there, or a run without its weights.
        ValueError: a checkpoint whose recipe is not known.
    """
    if path.is_dir():
        runs = [file.parent for file in sorted(path.rglob("summary.json"))]
        if not runs:
            raise FileNotFoundError(f"no finished run (summary.json) in {path}")
        return [subject for run in runs for subject in subjects(run / "last.safetensors")]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a run's folder, or a .pt, .pth or .safetensors file")
    finished = path.name == "last.safetensors" and (path.parent / "summary.json").is_file()
    record = path.with_name("evaluation.json") if finished else path.with_suffix(".evaluation.json")
    carried = _carried(path)
    if carried is None and recipe is None:
        raise ValueError(f"{path} does not say what network it is, and of which images; give its recipe with --recipe FILE")
    return [Subject(path, recipe or Recipe.of(json.loads(carried or ""), str(path)), record)]


def _carried(path: Path) -> str | None:
    """The recipe in the metadata of weights that ``orthokit train`` saved."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("recipe")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from None


@dataclass(frozen=True)
class Bench:
    """A network in evaluation mode, its test images, and some of them for what is slow."""

    model: nn.Module
    data: ImageSet
    some: Images
    cache: Path

    @property
    def pixels(self) -> nn.Module:
        """The network of pixels from 0 to 1."""
        return attacks.Pixels(self.model, self.data.mean, self.data.std)

    def batches(self, images: Images) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, "b"]]]:  # noqa: F821
        """Normalised images and labels."""
        for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True):
            yield self.data.normalise(pixels), labels

    @torch.no_grad()
    def right(self, images: Images) -> float:
        """Accuracy on images."""
        return sum(int((self.model(x).argmax(-1) == y).sum()) for x, y in self.batches(images)) / len(images)


def _accuracy(bench: Bench) -> dict[str, Any]:
    with torch.no_grad():
        logits = torch.cat([bench.model(x) for x, _ in bench.batches(bench.data.test)])
    labels, classes = bench.data.test.labels, bench.data.classes
    if not logits.isfinite().all():
        raise FloatingPointError("the network's outputs are not finite")
    error = multiclass_calibration_error(logits.softmax(-1), labels, classes, n_bins=BINS, norm="l1")
    return {
        "accuracy": round(float(multiclass_accuracy(logits, labels, classes, average="micro")), 6),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": round(float(error), 6),
    }


def _attacks(bench: Bench) -> dict[str, Any]:
    images, labels = bench.some.pixels.float() / 255, bench.some.labels
    linf = [radius / 255 for radius in attacks.LINF]
    found = {
        "fgsm": attacks.fgsm(bench.pixels, images, labels, linf),
        "pgd": attacks.pgd(bench.pixels, images, labels, linf, norm="linf", steps=STEPS, path=PATH),
        "pgd_l2": attacks.pgd(bench.pixels, images, labels, attacks.L2, norm="l2", steps=STEPS, path=PATH),
    }
    return {"linf": list(attacks.LINF), "l2": list(attacks.L2)} | {
        name: [round(float(each.float().mean()), 6) for each in right] for name, right in found.items()
    }


def _noise(bench: Bench) -> dict[str, Any]:
    right = attacks.noisy(bench.pixels, bench.some.pixels.float() / 255, bench.some.labels)
    return {"sigma": list(attacks.SIGMAS), "accuracy": [round(float(each.float().mean()), 6) for each in right]}


def _corruptions(bench: Bench) -> dict[str, Any]:
    found = {}
    pixels = bench.some.pixels.cpu()
    for name in corruptions.CORRUPTIONS:
        changed = corruptions.corrupted(pixels, name, folder=bench.cache).to(bench.some.pixels.device)
        found[name] = [round(bench.right(Images(each, bench.some.labels)), 6) for each in changed]
    return {"accuracy": found}


def _features(bench: Bench) -> dict[str, Any]:
    found = features.collect(bench.model, bench.batches(bench.data.test), classes=bench.data.classes)
    figures = {name: asdict(each) for name, each in found.items()}
    return {"penultimate": figures.pop("penultimate"), "stages": figures}


PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], dict[str, Any]]] = {
    "attacks": (_attacks, {"images": None, "steps": STEPS, "path": PATH}),
    "corruptions": (_corruptions, {"images": None, "version": corruptions.VERSION}),
    "noise": (_noise, {"images": None}),
    "features": (_features, {}),
    "accuracy": (_accuracy, {"bins": BINS}),
    "orthogonality": (lambda bench: dict(orthogonality(bench.model)), {}),
}
"""What measures each part, with which settings: who asks for ``images`` uses some of the test images. Slow ones first."""


def device_of(name: str) -> torch.device:
    """The device that ``name`` means here: ``"auto"`` is a GPU if there is one.

    Raises:
        ValueError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there.get(name, True):
        raise ValueError(f"--device {name} cannot be used here")
    return torch.device(name)


def settings(part: str, images: int) -> dict[str, Any]:
    """With which a part is measured; what was measured with others does not count."""
    fixed = PARTS[part][1]
    return fixed | ({"images": images} if "images" in fixed else {})


def known(subject: Subject) -> tuple[str, dict[str, Any]]:
    """SHA-256 of the weights, and the parts that have been measured of them."""
    with subject.weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not subject.record.is_file():
        return digest, {}
    found = read_json(subject.record, weights=str, parts=dict)
    return digest, found["parts"] if found["weights"] == digest else {}


def evaluate(
    wanted: Sequence[Subject],
    *,
    parts: Sequence[str] = tuple(PARTS),
    images: int = 1000,
    root: Path = Path("data"),
    device: str = "auto",
    jobs: int | None = None,
    threads: int = 1,
    tick: Callable[[Subject, str, str | None], object] = lambda subject, part, error: None,
    start: Callable[[int, int], object] = lambda left, total: None,
) -> int:
    """Measure what is left of ``parts`` of every subject, several at a time; how many of them failed.

    Args:
        wanted: see :func:`subjects`.
        parts: keys of ``PARTS``.
        images: how many test images, of every class alike, serve attacks, noise and corruptions; all where there are no more.
        root: where the images are.
        device: see :func:`device_of`.
        jobs: parts measured at a time; by default one for each ``threads`` cores on the CPU, one on a GPU.
        threads: of each on the CPU.
        tick: told of each part that is done, with what went wrong if anything did.
        start: told first how many parts are left, and of how many.

    Raises:
        ValueError: no such part, device or record; the images are not to be read.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}{did_you_mean(part, PARTS)}")
    place = device_of(device)
    recorded = {subject: known(subject) for subject in wanted}
    left = [
        (subject, part)
        for part in PARTS
        for subject in wanted
        if part in parts and recorded[subject][1].get(part, {}).get("settings") != settings(part, images)
    ]
    for section in dict.fromkeys(subject.recipe.data.model_dump_json() for subject, _ in left):
        _images(section, root)  # decoded once, for all; fails here rather than in each
    start(len(left), len(wanted) * len(parts))
    jobs = jobs or (max(1, (os.cpu_count() or 1) // threads) if place.type == "cpu" else 1)
    failed = 0
    with joblib.parallel_config("loky", inner_max_num_threads=threads):
        pool = joblib.Parallel(min(jobs, max(1, len(left))), return_as="generator_unordered")
        tasks = (
            joblib.delayed(_measured)(index, part, subject, recorded[subject][0], images, root, place, threads)
            for index, (subject, part) in enumerate(left)
        )
        for index, value, error in pool(tasks):
            subject, part = left[index]
            if error is None:
                digest, measured = recorded[subject]
                measured[part] = {"settings": settings(part, images)} | value
                write(subject.record, to_json({"weights": digest, "parts": {p: measured[p] for p in PARTS if p in measured}}))
            failed += error is not None
            tick(subject, part, error)
    return failed


def _measured(
    index: int, part: str, subject: Subject, digest: str, images: int, root: Path, device: torch.device, threads: int
) -> tuple[int, dict[str, Any], str | None]:
    """A part of a subject, or what went wrong."""
    torch.set_num_threads(threads)
    try:
        return index, PARTS[part][0](_bench(subject.weights, digest, subject.recipe.to_toml(), images, root, device)), None
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
        return index, {}, " ".join(str(error).split())[:300]


@functools.lru_cache(maxsize=2)
def _images(section: str, root: Path) -> ImageSet:
    wanted = DataSection.model_validate_json(section)
    return load(wanted.name, root=root, train=wanted.train, validation=wanted.validation, size=wanted.size)


@functools.lru_cache(maxsize=2)
def _bench(weights: Path, digest: str, recipe: str, images: int, root: Path, device: torch.device) -> Bench:
    said = Recipe.of(tomllib.loads(recipe))
    data = _images(said.data.model_dump_json(), root).to(device)
    some = data.test
    if images < len(some):
        labels = some.labels.cpu().numpy()
        rows = torch.from_numpy(choose("images", images, np.arange(len(labels)), labels)[0])
        some = Images(some.pixels[rows], some.labels[rows])
    model = said.build(data)
    state = state_of(checkpoint.load(weights))
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}
    try:
        model.load_state_dict(plain)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{weights} does not fit the network of its recipe: {error}") from None
    model.to(device)
    return Bench(model.to(memory_format=torch.channels_last).eval(), data, some, root)  # type: ignore[call-overload]


def result(subject: Subject) -> Result:
    """What has been measured, in the form of a run's result."""
    parts = known(subject)[1]
    accuracy: Mapping[str, Any] = parts.get("accuracy", {})
    summary = {"test": accuracy, "orthogonality": parts.get("orthogonality", {}), "seed": 0, "fingerprint": ""}
    return Result(subject.record, summary, subject.recipe, parts, ())
