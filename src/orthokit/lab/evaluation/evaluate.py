"""Evaluation of trained networks, part by part: accuracy and calibration, near-orthogonality, robustness, features.

All in float32, on the test images that training looked at once or never. Results go into ``evaluation.json`` beside the weights,
part by part; a part that is there, of the same weights and settings, is not measured again.
"""

import functools
import hashlib
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
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from orthokit import checkpoint
from orthokit.checks import did_you_mean
from orthokit.lab.atomic import to_json, write
from orthokit.lab.data.images import Images, ImageSet, choose
from orthokit.lab.evaluation import attacks, corruptions, features
from orthokit.lab.networks.measures import orthogonality
from orthokit.lab.networks.resnet import state_in
from orthokit.lab.own import Code, refusal
from orthokit.lab.recipes.recipe import Recipe, differences
from orthokit.lab.recipes.sections import DataSection
from orthokit.lab.runs.collect import below
from orthokit.lab.runs.launch import workers
from orthokit.lab.runs.results import RECORD, Result, digest, digest_of, read_summary
from orthokit.lab.runs.run import SUMMARY
from orthokit.lab.runs.summary import DamagedError, Evaluation, parse_json, read

__all__ = [
    "PARTS",
    "Bench",
    "Subject",
    "calibration_error",
    "check_parts",
    "device_of",
    "evaluate",
    "parts_of",
    "result",
    "settings",
    "some",
    "subjects",
]

STEPS, PATH = 20, 5.0
"""Steps of projected gradient descent, and the length of all of them in radii."""
BINS = 15
"""Bins of confidence, in the expected calibration error."""
BATCH = 500


@dataclass(frozen=True, eq=False)
class Subject:
    """Trained weights, their recipe, and the file for the results.

    Attributes:
        key: which of several networks in the file.
        notes: notes on how the file was read.
    """

    weights: Path
    recipe: Recipe
    record: Path
    key: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name to show."""
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
    """The networks to evaluate in ``path``: a run, a folder of runs, or a checkpoint.

    A recipe found there is data: it builds a network of somebody's own only if ``recipe`` or ``model`` names that network, too.

    Args:
        path: a run's folder, or one above several; or a file that ``orthokit report`` reads.
        recipe: for a checkpoint that does not carry its own, or for runs whose network or data set is the user's own.
        model: ``module:function``, looked for in the working directory first; recipes found in ``path`` with this network may
            import it.
        key: the name of one of a checkpoint's several networks.
        tell: called for each run that is damaged; the others are evaluated all the same.

    Raises:
        FileNotFoundError: ``path`` leads nowhere, or to no finished run.
        ValueError: the recipe of a checkpoint is not known, or is another one.
    """
    if path.is_dir():
        runs = _runs(path, tell)
        if key is not None:
            raise ValueError(f"a key chooses among the networks of a checkpoint; {path} is a folder of runs")
        if not runs:
            raise FileNotFoundError(f"no finished run (summary.json) in {path}")
        return [_subject(file.with_name("last.safetensors"), _recipe_in(raw, file, model), recipe) for file, raw in runs.items()]
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a run's folder, or a .pt, .pth or .safetensors file")
    text = checkpoint.metadata(path).get("recipe")
    if text is None and recipe is None:
        raise ValueError(f"{path} does not say what network it is, and of which images; give its recipe with --recipe FILE")
    raw = parse_json(text, f"{path}: the recipe in its metadata") if text else None
    if raw is not None and not isinstance(raw, Mapping):
        raise ValueError(f"{path}: the recipe in its metadata is not a table; give its recipe with --recipe FILE")
    subject = _subject(path, None if raw is None else _recipe_in(raw, path, model), recipe)
    return [replace(subject, key=key, notes=tuple(checkpoint.read(path, key)[1]))]


def _runs(path: Path, tell: Callable[[str], object]) -> dict[Path, Mapping[str, Any]]:
    """The recipes of the runs below a folder."""
    recipes: dict[Path, Mapping[str, Any]] = {}
    files, errors = below(path, SUMMARY), list[DamagedError]()
    for file in files:
        try:
            recipes[file] = read_summary(file)["recipe"]
        except DamagedError as error:
            errors.append(error)
    if errors and not recipes:
        raise errors[0]
    for each in errors:
        tell(str(each))
    return recipes


def _recipe_in(raw: Mapping[str, Any], path: Path, model: str | None) -> Recipe:
    """The recipe in a file, which is data but for the network that the user names."""
    recipe = Recipe.of(raw, str(path))
    return recipe.with_code(Code((Path.cwd(),))) if [model] == recipe.own_functions else recipe


def _subject(weights: Path, file_recipe: Recipe | None, override: Recipe | None) -> Subject:
    recipe = override or file_recipe
    assert recipe is not None
    if file_recipe is not None and file_recipe != recipe:
        raise ValueError(f"{weights} is of another recipe than --recipe: {differences(file_recipe, recipe)}; leave --recipe out")
    run = weights.name == "last.safetensors" and weights.with_name(SUMMARY).is_file()
    return Subject(weights, recipe, weights.with_name(RECORD if run else f"{weights.name}.{RECORD}"))


def _check_weights(subject: Subject) -> tuple[str, str]:
    """The SHA-256 of the weights' file; and why they cannot be measured, if they are gone or not those that the run wrote."""
    if not subject.weights.is_file():
        return "", f"{subject.weights} is not there"
    if subject.record.name != RECORD:  # not a run's
        return digest(subject.weights), ""
    wrote = read_summary(subject.weights.with_name(SUMMARY)).get("weights")
    content = subject.weights.read_bytes()
    try:
        same = wrote is None or wrote == digest_of(load(content))
    except SafetensorError:
        same = False
    damage = f"{subject.weights} is damaged: its weights are not those that the run wrote; remove {SUMMARY} to run again"
    return hashlib.sha256(content).hexdigest(), "" if same else damage


def some(data: ImageSet, images: int) -> Images:
    """``images`` test images, of every class alike and always the same; all of them where hardly any would be left.

    Raises:
        ValueError: fewer images than classes.
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
        """Test images, of every class alike, at most ``images``."""
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
        """A mask of the images that are classified right."""
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


def _shares_of_right(variants: Iterable[Bool[Tensor, "n"]], clean: Bool[Tensor, "n"]) -> list[float | None]:  # noqa: F821
    """Shares of the images right when clean that stay right when changed; None where no clean image is right."""
    return [_share(right[clean]) if clean.any() else None for right in variants]


def calibration_error(logits: Float[Tensor, "b classes"], labels: Int64[Tensor, "b"]) -> float:  # noqa: F821
    """The expected calibration error: the mean distance of confidence from accuracy over bins of equal width."""
    # For a confidence of exactly 1 torchmetrics opens one bin more, beyond the last: stay below it, in its float32.
    confidences = logits.float().softmax(-1).clamp(max=1 - 2**-24)
    return float(multiclass_calibration_error(confidences, labels, logits.shape[-1], n_bins=BINS, norm="l1"))


def _attacks(bench: Bench) -> dict[str, Any]:
    images, labels = bench.some.pixels.float() / 255, bench.some.labels
    linf = [radius / 255 for radius in attacks.LINF]
    rows = {
        "fgsm": attacks.fgsm(bench.pixels, images, labels, linf),
        "pgd": attacks.pgd(bench.pixels, images, labels, linf, norm="linf", steps=STEPS, path=PATH),
        "pgd_l2": attacks.pgd(bench.pixels, images, labels, attacks.L2, norm="l2", steps=STEPS, path=PATH),
    }
    clean = attacks.clean(bench.pixels, images, labels)
    values = {"count": len(labels), "clean": _share(clean), "linf": list(attacks.LINF), "l2": list(attacks.L2)}
    values |= {name: [_share(each) for each in right] for name, right in rows.items()}
    return values | {f"{name}_kept": _shares_of_right(right, clean) for name, right in rows.items()}


def _noise(bench: Bench) -> dict[str, Any]:
    images, labels = bench.some.pixels.float() / 255, bench.some.labels
    right, clean = attacks.noisy(bench.pixels, images, labels), attacks.clean(bench.pixels, images, labels)
    values = {"count": len(labels), "clean": _share(clean), "sigma": list(attacks.SIGMAS)}
    return values | {"accuracy": [_share(each) for each in right], "kept": _shares_of_right(right, clean)}


def _corruptions(bench: Bench) -> dict[str, Any]:
    rows: dict[str, list[Tensor]] = {}
    pixels, clean = bench.some.pixels.cpu(), bench.right(bench.some)
    for name in corruptions.CORRUPTIONS:
        variants = corruptions.corrupt_all(pixels, name, folder=bench.cache).to(bench.some.pixels.device)
        rows[name] = [bench.right(Images(each, bench.some.labels)) for each in variants]
    accuracy = {name: [_share(right) for right in each] for name, each in rows.items()}
    shares = {name: _shares_of_right(each, clean) for name, each in rows.items()}
    return {"count": len(pixels), "clean": _share(clean), "accuracy": accuracy, "kept": shares}


def _features(bench: Bench) -> dict[str, Any]:
    spectra = features.collect(bench.model, bench.batches(bench.data.test), classes=bench.data.classes)
    figures = {name: asdict(each) for name, each in spectra.items()}
    return {"penultimate": figures.pop("penultimate"), "stages": figures}


PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], dict[str, Any]]] = {
    "attacks": (_attacks, {"images": None, "steps": STEPS, "path": PATH}),
    "corruptions": (_corruptions, {"images": None, "version": corruptions.VERSION}),
    "noise": (_noise, {"images": None}),
    "features": (_features, {}),
    "accuracy": (_accuracy, {"bins": BINS}),
    "orthogonality": (lambda bench: dict(orthogonality(bench.model)), {}),
}
"""The function that measures each part, and its settings; those with ``images`` use some of the test images. Slow ones first."""


def device_of(name: str) -> torch.device:
    """The device that ``name`` means here: ``"auto"`` is a GPU if there is one.

    Raises:
        ValueError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there.get(name, True):
        raise ValueError(f"--device {name} cannot be used here")
    return torch.device(name)


def check_parts(parts: Sequence[str]) -> None:
    """Raise ``ValueError`` unless all are keys of ``PARTS``."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}{did_you_mean(part, PARTS)}")


def settings(part: str, images: int) -> dict[str, Any]:
    """The settings with which a part is measured; measurements with others do not count."""
    options = PARTS[part][1]
    return options | ({"images": images} if "images" in options else {})


def parts_of(subject: Subject, weights: str) -> dict[str, Any]:
    """The parts that have been measured of the weights with this digest, as this network on these images."""
    if not subject.record.is_file():
        return {}
    record = read(Evaluation, subject.record)
    return record["parts"] if (record["weights"], record.get("of")) == (weights, subject.network) else {}


def evaluate(
    targets: Sequence[Subject],
    *,
    parts: Sequence[str] = tuple(PARTS),
    images: int = 1000,
    root: Path = Path("data"),
    device: str = "auto",
    jobs: int | None = None,
    threads: int = 1,
    tick: Callable[[Subject, str, str | None], object] = lambda subject, part, error: None,
    start: Callable[[int, int], object] = lambda count, total: None,
) -> int:
    """Measure what is left of ``parts`` of every subject, several at a time; how many of them failed.

    Args:
        targets: see :func:`subjects`.
        parts: keys of ``PARTS``.
        images: number of test images, of every class alike, for attacks, noise and corruptions; all where there are no more.
        root: where the images are.
        device: see :func:`device_of`.
        jobs: parts measured at a time; by default one for each ``threads`` cores on the CPU, one on a GPU.
        threads: threads of each on the CPU.
        tick: called for each part that is done, with the error if one occurred.
        start: called first, with how many parts are left and how many there are.

    Raises:
        ValueError: no such part, device or record, or images that cannot be read.
    """
    check_parts(parts)
    torch_device = device_of(device)
    checks = {subject: _check_weights(subject) for subject in targets}
    unusable = {subject: why for subject, (_, why) in checks.items() if why}
    digests = {subject: key for subject, (key, why) in checks.items() if not why}
    records = {subject: parts_of(subject, weights) for subject, weights in digests.items()}
    pairs = [
        (subject, part)
        for part in PARTS
        for subject in digests
        if part in parts and records[subject].get(part, {}).get("settings") != settings(part, images)
    ]
    refusals = {
        subject: refusal(names[0])
        for subject, _ in pairs
        if (names := subject.recipe.own_functions) and subject.recipe.code is None
    }
    if refusals and len(refusals) == len(targets):
        raise ValueError(f"{targets[0].weights}: {refusals[targets[0]]}")
    pairs = [(subject, part) for subject, part in pairs if subject not in refusals]
    for section, code in dict.fromkeys((subject.recipe.data.model_dump_json(), subject.recipe.code) for subject, _ in pairs):
        data = _images(section, root, code)  # decoded once, for all; fails here rather than in each
        for recipe in {subject.recipe.to_toml(): subject.recipe for subject, _ in pairs if subject.recipe.own_functions}.values():
            if (recipe.data.model_dump_json(), recipe.code) == (section, code):
                recipe.check(data, training=False)
        if any("images" in settings(part, images) for _, part in pairs):
            some(data, images)
    start(len(pairs), len(targets) * len(parts))
    jobs = jobs or (max(1, (os.cpu_count() or 1) // threads) if torch_device.type == "cpu" else 1)
    for subject, why in unusable.items():
        tick(subject, "all", why)
    for subject, why in refusals.items():
        tick(subject, "all", why)
    failures = len(unusable) + len(refusals)
    with workers(threads):
        pool = joblib.Parallel(min(jobs, max(1, len(pairs))), return_as="generator_unordered")
        tasks = (
            joblib.delayed(_measure)(index, part, subject, digests[subject], images, root, torch_device, threads)
            for index, (subject, part) in enumerate(pairs)
        )
        for index, value, error in pool(tasks):
            subject, part = pairs[index]
            if error is None:
                _add(subject, digests[subject], part, {"settings": settings(part, images)} | value)
            failures += error is not None
            tick(subject, part, error)
    return failures


def _add(subject: Subject, weights: str, part: str, value: dict[str, Any]) -> None:
    parts = parts_of(subject, weights) | {part: value}  # another command may have added parts meanwhile
    in_order = {part: parts[part] for part in PARTS if part in parts}
    write(subject.record, to_json({"weights": weights, "of": subject.network, "parts": in_order}))


def _measure(
    index: int, part: str, subject: Subject, checksum: str, images: int, root: Path, device: torch.device, threads: int
) -> tuple[int, dict[str, Any], str | None]:
    """The values of a part of a subject, or the error."""
    torch.set_num_threads(threads)
    try:
        recipe = subject.recipe
        bench = _bench(subject.weights, checksum, recipe.to_toml(), images, root, device, recipe.code, subject.key)
        return index, PARTS[part][0](bench), None
    except Exception as error:  # of anybody's network
        return index, {}, " ".join(f"{type(error).__name__}: {error}".split())[:300]


@functools.lru_cache(maxsize=2)
def _images(section: str, root: Path, code: Code | None) -> ImageSet:
    return DataSection.model_validate_json(section).images(root, code=code)


@functools.lru_cache(maxsize=2)
def _bench(
    weights: Path,
    checksum: str,
    toml: str,
    images: int,
    root: Path,
    device: torch.device,
    code: Code | None = None,
    key: str | None = None,
) -> Bench:
    recipe = Recipe.of(tomllib.loads(toml)).with_code(code)
    data = _images(recipe.data.model_dump_json(), root, code).to(device)
    model = recipe.build(data)
    try:
        model.load_state_dict(state_in(checkpoint.read(weights, key)[0]))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{weights} does not fit the network of its recipe: {error}") from None
    model.to(device, torch.float32).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    model.register_forward_hook(_finite)
    return Bench(model, data, images, root)


def _finite(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if not output.isfinite().all():  # else NaN would count as the first class
        raise FloatingPointError("the network's outputs are not finite")


def result(subject: Subject) -> Result:
    """The measurements of a subject, in the form of a run's result."""
    parts = parts_of(subject, digest(subject.weights)) if subject.weights.is_file() else {}
    accuracy: Mapping[str, Any] = parts.get("accuracy", {})
    summary = {"test": accuracy, "orthogonality": parts.get("orthogonality", {}), "seed": 0, "fingerprint": ""}
    return Result(subject.record, summary, subject.recipe, parts, ())
