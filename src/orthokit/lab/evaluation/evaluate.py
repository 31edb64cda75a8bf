"""Evaluation of trained networks, part by part: accuracy and calibration, near-orthogonality, robustness, features.

All in float32, on the test images that training looked at once or never. What is found goes into ``evaluation.json`` beside the
weights, part by part; a part that is there, of the same weights and settings, is not measured again.
"""

import functools
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from orthokit import checkpoint
from orthokit.checks import did_you_mean
from orthokit.lab.atomic import to_json, write
from orthokit.lab.data.images import Images, ImageSet, choose
from orthokit.lab.evaluation import attacks, corruptions, features
from orthokit.lab.networks.measures import orthogonality
from orthokit.lab.networks.resnet import unwrapped
from orthokit.lab.own import Code, refusal
from orthokit.lab.recipes.recipe import Recipe, differences
from orthokit.lab.recipes.sections import DataSection
from orthokit.lab.runs.collect import below
from orthokit.lab.runs.launch import workers
from orthokit.lab.runs.results import RECORD, Result, digest, digest_of, read_summary
from orthokit.lab.runs.run import SUMMARY
from orthokit.lab.runs.summary import DamagedError, Evaluation, parsed, read

__all__ = [
    "PARTS",
    "Bench",
    "Subject",
    "calibration_error",
    "check_parts",
    "device_of",
    "evaluate",
    "known",
    "result",
    "settings",
    "some",
    "subjects",
]

STEPS, PATH = 20, 5.0
"""Of projected gradient descent: steps, and the length of all of them in radii."""
BINS = 15
"""Of confidence, in the expected calibration error."""
BATCH = 500


@dataclass(frozen=True, eq=False)
class Subject:
    """Trained weights, the recipe they are of, and the file for what is found.

    Attributes:
        key: which of several networks in the file.
        notes: on how the file was read.
    """

    weights: Path
    recipe: Recipe
    record: Path
    key: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """To be shown."""
        return "/".join(self.weights.resolve().parts[-3:-1]) if self.record.name == RECORD else str(self.weights)

    @property
    def network(self) -> dict[str, Any]:
        """The sections of the recipe that say what is evaluated, and on which images."""
        key = {} if self.key is None else {"key": self.key}
        return self.recipe.model_dump(mode="json", include={"data", "network"}) | key


def subjects(
    path: Path,
    recipe: Recipe | None = None,
    model: str | None = None,
    key: str | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Subject]:
    """What is to be evaluated in ``path``: a run, a folder of runs, or a checkpoint.

    A recipe that is found there is data: of a network of somebody's own it builds only what ``recipe`` or ``model`` names too.

    Args:
        path: a run's folder, or one above several; or a file that ``orthokit report`` reads.
        recipe: of a checkpoint that does not carry its own, or of runs whose network or data set is the user's own.
        model: ``module:function``, looked for in the working directory first; recipes found in ``path`` with this network may
            import it.
        key: of a checkpoint with several networks, which.
        tell: told of each run that is damaged; the others are evaluated all the same.

    Raises:
        FileNotFoundError: nothing is there, or no finished run.
        ValueError: a checkpoint whose recipe is not known, or known to be another.
    """
    if path.is_dir():
        runs = _runs(path, tell)
        if key is not None:
            raise ValueError(f"a key chooses among the networks of a checkpoint; {path} is a folder of runs")
        if not runs:
            raise FileNotFoundError(f"no finished run (summary.json) in {path}")
        return [_subject(file.with_name("last.safetensors"), _carried(raw, file, model), recipe) for file, raw in runs.items()]
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a run's folder, or a .pt, .pth or .safetensors file")
    carried = checkpoint.metadata(path).get("recipe")
    if carried is None and recipe is None:
        raise ValueError(f"{path} does not say what network it is, and of which images; give its recipe with --recipe FILE")
    raw = parsed(carried, f"{path}: the recipe in its metadata") if carried else None
    if raw is not None and not isinstance(raw, Mapping):
        raise ValueError(f"{path}: the recipe in its metadata is not a table; give its recipe with --recipe FILE")
    subject = _subject(path, None if raw is None else _carried(raw, path, model), recipe)
    return [replace(subject, key=key, notes=tuple(checkpoint.read(path, key)[1]))]


def _runs(path: Path, tell: Callable[[str], object]) -> dict[Path, Mapping[str, Any]]:
    """The recipes of the runs below a folder."""
    found: dict[Path, Mapping[str, Any]] = {}
    files, damaged = below(path, SUMMARY), list[DamagedError]()
    for file in files:
        try:
            found[file] = read_summary(file)["recipe"]
        except DamagedError as error:
            damaged.append(error)
    if damaged and not found:
        raise damaged[0]
    for each in damaged:
        tell(str(each))
    return found


def _carried(raw: Mapping[str, Any], path: Path, model: str | None) -> Recipe:
    """The recipe that a file holds, which is data but for the network that the user names."""
    recipe = Recipe.of(raw, str(path))
    return recipe.named(Code((Path.cwd(),))) if [model] == recipe.own else recipe


def _subject(weights: Path, carried: Recipe | None, given: Recipe | None) -> Subject:
    own = given or carried
    assert own is not None
    if carried is not None and carried != own:
        raise ValueError(f"{weights} is of another recipe than --recipe: {differences(carried, own)}; leave --recipe out")
    run = weights.name == "last.safetensors" and weights.with_name(SUMMARY).is_file()
    return Subject(weights, own, weights.with_name(RECORD if run else f"{weights.name}.{RECORD}"))


def _unusable(subject: Subject) -> str | None:
    """Why the weights cannot be measured: they are gone, or not those that the run wrote."""
    if not subject.weights.is_file():
        return f"{subject.weights} is not there"
    if subject.record.name != RECORD:  # not a run's
        return None
    wrote = read_summary(subject.weights.with_name(SUMMARY)).get("weights")
    try:
        same = wrote is None or wrote == digest_of(load_file(subject.weights))
    except SafetensorError:
        same = False
    damaged = f"{subject.weights} is damaged: its weights are not those that the run wrote; remove {SUMMARY} to run again"
    return None if same else damaged


def some(data: ImageSet, images: int) -> Images:
    """``images`` test images, of every class alike and always the same; all of them where hardly any would be left.

    Raises:
        ValueError: fewer than classes.
    """
    test = data.test
    if images > len(test) - data.classes:
        return test
    labels = test.labels.cpu().numpy()
    rows = torch.from_numpy(choose("images", images, np.arange(len(labels)), labels)[0])
    return Images(test.pixels[rows], test.labels[rows])


@dataclass(frozen=True)
class Bench:
    """A network in evaluation mode, its test images, and some of them for what is slow."""

    model: nn.Module
    data: ImageSet
    images: int
    cache: Path

    @functools.cached_property
    def some(self) -> Images:
        """At most ``images`` test images, of every class alike."""
        return some(self.data, self.images)

    @property
    def pixels(self) -> nn.Module:
        """The network of pixels from 0 to 1."""
        return attacks.Pixels(self.model, self.data.mean, self.data.std)

    def batches(self, images: Images) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, "b"]]]:  # noqa: F821
        """Normalised images and labels."""
        for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True):
            yield self.data.normalise(pixels), labels

    @torch.no_grad()
    def right(self, images: Images) -> Bool[Tensor, "n"]:  # noqa: F821
        """Which images are classified right."""
        return torch.cat([self.model(x).argmax(-1) == y for x, y in self.batches(images)])


def _accuracy(bench: Bench) -> dict[str, Any]:
    with torch.no_grad():
        logits = torch.cat([bench.model(x) for x, _ in bench.batches(bench.data.test)])
    labels, classes = bench.data.test.labels, bench.data.classes
    return {
        "accuracy": round(float(multiclass_accuracy(logits, labels, classes, average="micro")), 6),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": round(calibration_error(logits, labels), 6),
    }


def _share(right: Bool[Tensor, "n"]) -> float:  # noqa: F821
    return round(float(right.float().mean()), 6)


def _kept(changed: Iterable[Bool[Tensor, "n"]], clean: Bool[Tensor, "n"]) -> list[float | None]:  # noqa: F821
    """Of the images that are right clean, the shares that are right changed, too; None where no image is."""
    return [_share(right[clean]) if clean.any() else None for right in changed]


def calibration_error(logits: Float[Tensor, "b classes"], labels: Int64[Tensor, "b"]) -> float:  # noqa: F821
    """The expected calibration error: over bins of equal width, how far mean confidence is from accuracy, in absolute value."""
    # For a confidence of exactly 1 torchmetrics opens one bin more, beyond the last: stay below it, in its float32.
    confidences = logits.float().softmax(-1).clamp(max=1 - 2**-24)
    return float(multiclass_calibration_error(confidences, labels, logits.shape[-1], n_bins=BINS, norm="l1"))


def _attacks(bench: Bench) -> dict[str, Any]:
    images, labels = bench.some.pixels.float() / 255, bench.some.labels
    linf = [radius / 255 for radius in attacks.LINF]
    found = {
        "fgsm": attacks.fgsm(bench.pixels, images, labels, linf),
        "pgd": attacks.pgd(bench.pixels, images, labels, linf, norm="linf", steps=STEPS, path=PATH),
        "pgd_l2": attacks.pgd(bench.pixels, images, labels, attacks.L2, norm="l2", steps=STEPS, path=PATH),
    }
    clean = attacks.clean(bench.pixels, images, labels)
    told = {"count": len(labels), "clean": _share(clean), "linf": list(attacks.LINF), "l2": list(attacks.L2)}
    told |= {name: [_share(each) for each in right] for name, right in found.items()}
    return told | {f"{name}_kept": _kept(right, clean) for name, right in found.items()}


def _noise(bench: Bench) -> dict[str, Any]:
    images, labels = bench.some.pixels.float() / 255, bench.some.labels
    right, clean = attacks.noisy(bench.pixels, images, labels), attacks.clean(bench.pixels, images, labels)
    told = {"count": len(labels), "clean": _share(clean), "sigma": list(attacks.SIGMAS)}
    return told | {"accuracy": [_share(each) for each in right], "kept": _kept(right, clean)}


def _corruptions(bench: Bench) -> dict[str, Any]:
    found: dict[str, list[Tensor]] = {}
    pixels, clean = bench.some.pixels.cpu(), bench.right(bench.some)
    for name in corruptions.CORRUPTIONS:
        changed = corruptions.corrupted(pixels, name, folder=bench.cache).to(bench.some.pixels.device)
        found[name] = [bench.right(Images(each, bench.some.labels)) for each in changed]
    accuracy = {name: [_share(right) for right in each] for name, each in found.items()}
    kept = {name: _kept(each, clean) for name, each in found.items()}
    return {"count": len(pixels), "clean": _share(clean), "accuracy": accuracy, "kept": kept}


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


def check_parts(parts: Sequence[str]) -> None:
    """Raise ``ValueError`` unless all are keys of ``PARTS``."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}{did_you_mean(part, PARTS)}")


def settings(part: str, images: int) -> dict[str, Any]:
    """With which a part is measured; what was measured with others does not count."""
    fixed = PARTS[part][1]
    return fixed | ({"images": images} if "images" in fixed else {})


def known(subject: Subject, weights: str) -> dict[str, Any]:
    """The parts that have been measured of the weights with this digest, as this network on these images."""
    if not subject.record.is_file():
        return {}
    found = read(Evaluation, subject.record)
    return found["parts"] if (found["weights"], found.get("of")) == (weights, subject.network) else {}


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
    check_parts(parts)
    place = device_of(device)
    gone = {subject: why for subject in wanted if (why := _unusable(subject)) is not None}
    digests = {subject: digest(subject.weights) for subject in wanted if subject not in gone}
    recorded = {subject: known(subject, weights) for subject, weights in digests.items()}
    left = [
        (subject, part)
        for part in PARTS
        for subject in digests
        if part in parts and recorded[subject].get(part, {}).get("settings") != settings(part, images)
    ]
    refused = {subject: refusal(own[0]) for subject, _ in left if (own := subject.recipe.own) and subject.recipe.code is None}
    if refused and len(refused) == len(wanted):
        raise ValueError(f"{wanted[0].weights}: {refused[wanted[0]]}")
    left = [(subject, part) for subject, part in left if subject not in refused]
    for section, code in dict.fromkeys((subject.recipe.data.model_dump_json(), subject.recipe.code) for subject, _ in left):
        data = _images(section, root, code)  # decoded once, for all; fails here rather than in each
        for recipe in {subject.recipe.to_toml(): subject.recipe for subject, _ in left if subject.recipe.own}.values():
            if (recipe.data.model_dump_json(), recipe.code) == (section, code):
                recipe.check(data, training=False)
        if any("images" in settings(part, images) for _, part in left):
            some(data, images)
    start(len(left), len(wanted) * len(parts))
    jobs = jobs or (max(1, (os.cpu_count() or 1) // threads) if place.type == "cpu" else 1)
    for subject, why in gone.items():
        tick(subject, "all", why)
    for subject, why in refused.items():
        tick(subject, "all", why)
    failed = len(gone) + len(refused)
    with workers(threads):
        pool = joblib.Parallel(min(jobs, max(1, len(left))), return_as="generator_unordered")
        tasks = (
            joblib.delayed(_measured)(index, part, subject, digests[subject], images, root, place, threads)
            for index, (subject, part) in enumerate(left)
        )
        for index, value, error in pool(tasks):
            subject, part = left[index]
            if error is None:
                _add(subject, digests[subject], part, {"settings": settings(part, images)} | value)
            failed += error is not None
            tick(subject, part, error)
    return failed


def _add(subject: Subject, weights: str, part: str, value: dict[str, Any]) -> None:
    parts = known(subject, weights) | {part: value}  # another command may have added to it meanwhile
    ordered = {part: parts[part] for part in PARTS if part in parts}
    write(subject.record, to_json({"weights": weights, "of": subject.network, "parts": ordered}))


def _measured(
    index: int, part: str, subject: Subject, digest: str, images: int, root: Path, device: torch.device, threads: int
) -> tuple[int, dict[str, Any], str | None]:
    """A part of a subject, or what went wrong."""
    torch.set_num_threads(threads)
    try:
        recipe = subject.recipe
        bench = _bench(subject.weights, digest, recipe.to_toml(), images, root, device, recipe.code, subject.key)
        return index, PARTS[part][0](bench), None
    except Exception as error:  # of anybody's network
        return index, {}, " ".join(f"{type(error).__name__}: {error}".split())[:300]


@functools.lru_cache(maxsize=2)
def _images(section: str, root: Path, code: Code | None) -> ImageSet:
    return DataSection.model_validate_json(section).images(root, code=code)


@functools.lru_cache(maxsize=2)
def _bench(
    weights: Path,
    digest: str,
    recipe: str,
    images: int,
    root: Path,
    device: torch.device,
    code: Code | None = None,
    key: str | None = None,
) -> Bench:
    said = Recipe.of(tomllib.loads(recipe)).named(code)
    data = _images(said.data.model_dump_json(), root, code).to(device)
    model = said.build(data)
    try:
        model.load_state_dict(unwrapped(checkpoint.read(weights, key)[0]))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{weights} does not fit the network of its recipe: {error}") from None
    model.to(device, torch.float32).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    model.register_forward_hook(_finite)
    return Bench(model, data, images, root)


def _finite(module: nn.Module, given: Any, output: Tensor) -> None:
    if not output.isfinite().all():  # whose largest, of NaN, is the first class
        raise FloatingPointError("the network's outputs are not finite")


def result(subject: Subject) -> Result:
    """What has been measured, in the form of a run's result."""
    parts = known(subject, digest(subject.weights)) if subject.weights.is_file() else {}
    accuracy: Mapping[str, Any] = parts.get("accuracy", {})
    summary = {"test": accuracy, "orthogonality": parts.get("orthogonality", {}), "seed": 0, "fingerprint": ""}
    return Result(subject.record, summary, subject.recipe, parts, ())
