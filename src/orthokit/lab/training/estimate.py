"""An estimate, before training begins, of how long it takes: a few steps are timed, and weights are counted."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from orthokit.lab.data.images import ImageSet
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.training.hardware import fast_bfloat16

__all__ = ["Estimate", "estimate"]

MOST = 64
"""Most images of a timed step; larger batches take that much longer."""
BESIDE = 1.2
"""Time of training over that of its steps: images are augmented, accuracy is measured after each epoch."""
START = 5.0
"""Seconds until a run's own process begins to train; a single run has none."""
WEIGHTS = 4 / 2**20
"""MiB of a parameter."""
BUSY = "training only, on an idle machine; longer on a busy one"


@dataclass(frozen=True)
class Estimate:
    """Seconds of one process, None where the steps would not run on this CPU, and MiB of weights that stay."""

    seconds: float | None
    mebibytes: float

    def text(self, runs: int, jobs: int, out: Path) -> str:
        """One line: ``6 runs: about 2 min with 2 at a time, and 1 MB in runs``, and what the time does not count."""
        jobs = min(jobs, runs)
        parts = [] if self.seconds is None else [_duration(self.seconds / jobs) + (f" with {jobs} at a time" if jobs > 1 else "")]
        parts.append(f"{max(1, round(self.mebibytes)):,} MB in {out}")
        but = "" if self.seconds is None else f" ({BUSY})"
        return f"{runs} run{'s' * (runs > 1)}: about {', and '.join(parts)}{but}"


def estimate(
    recipes: Iterable[Recipe], root: Path, *, device: str = "auto", threads: int | None = None, processes: int | None = None
) -> Estimate | None:
    """Time a few steps of each network and count what its runs do. The images must be there.

    Args:
        recipes: one for each run; a network with one kind of images is timed once, with the first recipe's penalty.
        root: folder of the images.
        device: where it will train; steps are timed on the CPU only.
        threads: threads of each process.
        processes: processes that the runs share; by default each of several runs has its own.

    Returns:
        The estimate, or None where something does not fit: the runs themselves say what.
    """
    here = device == "cpu" or (device == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available())
    before, timings = torch.get_num_threads(), dict[str, tuple[float, float, int]]()
    recipes = sorted(recipes, key=lambda recipe: recipe.regularizer is None)
    starts = processes if processes is not None else len(recipes) * (len(recipes) > 1)
    seconds, mebibytes = START * starts, 0.0
    try:
        torch.set_num_threads(threads or before)
        for recipe in recipes:
            section = recipe.train
            key = repr((recipe.network, recipe.data, section.batch, section.precision))
            if key not in timings:
                timings[key] = _time(recipe, recipe.images(root), here=here)
            step, size, steps = timings[key]
            seconds += BESIDE * section.epochs * steps * step
            mebibytes += size * (2 if recipe.data.validation else 1)  # weights of the last epoch, and of the best one
    except Exception:  # a network of the user's own may raise anything; its run reports that, and leaves the others alone
        return None
    finally:
        torch.set_num_threads(before)
    return Estimate(seconds if here else None, mebibytes)


def _time(recipe: Recipe, data: ImageSet, *, here: bool) -> tuple[float, float, int]:
    """Seconds of a step, MiB of the weights, and steps in an epoch."""
    section = recipe.train
    batch = min(section.batch, len(data.train))
    with torch.random.fork_rng(devices=()):
        model = recipe.build(data).train()
        size = WEIGHTS * sum(tensor.numel() for tensor in model.state_dict().values())
        if not here:
            return 0.0, size, 0
        ortho = None if recipe.regularizer is None else recipe.regularizer.build(model)
        count = min(batch, MOST)
        images, labels = data.normalise(data.train.pixels[:count]), data.train.labels[:count]
        low_precision = section.precision == "bf16-mixed" or (section.precision == "auto" and fast_bfloat16("cpu"))
        durations = []
        for _ in range(3):  # the first is slow: memory is taken, kernels are chosen
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if ortho is not None:
                ortho.add_grad_()
            durations.append(time.perf_counter() - start)
            if sum(durations) > 2:
                break
    return min(durations) * batch / count, size, max(1, len(data.train) // batch)


def _duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h``, ``4 days``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
