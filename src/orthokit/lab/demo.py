"""The demo: one small network, five arms, real images, the same seeds and batches for each; what it shows, in words."""

import contextlib
import functools
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console

from orthokit.lab.comparison.inference import Sample, differences, holm
from orthokit.lab.recipes.compose import load
from orthokit.lab.recipes.recipe import check_all
from orthokit.lab.runs.launch import Pool, run_all
from orthokit.lab.runs.progress import Display
from orthokit.lab.runs.run import Run
from orthokit.lab.training.estimate import estimate
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train
from orthokit.plots import COLOURS, new_figure, own_style
from orthokit.tables import Column, Table

__all__ = ["ARMS", "runs", "show", "train_all"]

ARMS = {"none": "none", "SO": "so", "strict": "strict", "pairs": "pairs", "welch": "welch"}
"""The arms: name -> part of a recipe."""
COLUMNS = (
    Column("arm", "arm", ""),
    Column("accuracy", "accuracy %", ""),
    Column("wide_mean", "wide: mean", ".1g"),
    Column("wide_max", "max", ".1g"),
    Column("tall_mean", "tall: mean", ".2g"),
    Column("tall_max", "max", ".2g"),
    Column("copies", "copies", ".3g"),
    Column("cost", "cost", ".0f"),
)
NOTES = (
    "Wide, tall: |cosine| of two filters of a layer, 0 where they are orthogonal. Wide layers can be orthogonal; tall layers "
    "cannot, as they have more filters than weights per filter.",
    "Copies: pairs with |cosine| > .99. Cost: the penalty's part of a training step, in %.",
)


def runs(images: str, seeds: int, epochs: int | None, out: Path) -> dict[str, list[Run]]:
    """The runs of each arm: those of ``orthokit train nano+<images>+<arm>``, on fewer images of CIFAR-10 than there."""
    settings = [] if images == "digits" else ["data.train=5000", "data.validation=0", "train.epochs=8"]
    if epochs is not None:
        settings += [f"train.epochs={epochs}", f"train.warmup={min(1.0, epochs / 5)}"]
    names = {arm: f"nano+{images}+{part}" for arm, part in ARMS.items()}
    return {
        arm: [Run(load(name, settings), seed, out / name / str(seed)) for seed in range(seeds)] for arm, name in names.items()
    }


def train_all(arms: Mapping[str, Sequence[Run]], root: Path, workers: int, console: Console) -> list[int]:
    """Train what is left of the runs, several at a time, one thread each; the exit status of each."""
    every = [run for each in zip(*arms.values(), strict=True) for run in each]
    left = [run for run in every if run.summary() is None]
    with _silent_on_copies():
        check_all([run.recipe for run in left], root)
        told = estimate([run.recipe for run in left], root, device="cpu", threads=1, processes=min(workers, len(left)))
    recipe, seeds = every[0].recipe, len(every) // len(arms)
    lines = [f"ResNet-8 on {recipe.data.name}, {recipe.train.epochs} epochs: {len(arms)} arms, {seeds} seeds each"]
    if left and told is not None:
        lines.append(told.text(len(left), workers, every[0].folder.parents[1]))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    pool = Pool(jobs=workers, root=root, device="cpu")
    with Display(console, of=len(every)) as display:
        return run_all(every, pool, display, functools.partial(_train, root))


@contextlib.contextmanager
def _silent_on_copies() -> Iterator[None]:
    """The copies of filters that ``form="pairs"`` warns of are what the demo shows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="form='pairs'")
        yield


def _train(root: Path, run: Run) -> None:
    with _silent_on_copies():
        train(run, root=root, hardware=Hardware(device="cpu", threads=1))


def show(arms: Mapping[str, Sequence[Run]], out: Path, console: Console) -> None:
    """Print what finished runs came to, as a table and in words, draw it into ``out``, and say what to do next."""
    summaries = {arm: [run.summary() or {} for run in each] for arm, each in arms.items()}
    accuracy = {arm: Sample(tuple(100 * each["test"]["accuracy"] for each in found)) for arm, found in summaries.items()}
    cosines = {arm: [each["orthogonality"]["under"]["mean_cos"] for each in found] for arm, found in summaries.items()}
    seeds = len(summaries["none"])
    title = f"{arms['none'][0].recipe.data.name}: test accuracy, mean ± sd of {seeds} seeds; filters after training"
    console.print(Table(title, COLUMNS, tuple(_row(arm, accuracy[arm], found) for arm, found in summaries.items()), {}, NOTES))
    picture = out / "orthogonality.png"
    _draw(accuracy, cosines, picture)
    strict = arms["strict"][0]
    lines = (
        "",
        *_words(accuracy, cosines),
        "",
        f"picture:  {picture}",
        f"each layer of a network:  orthokit report {strict.folder / 'last.safetensors'}",
        f"intervals and verdicts:   orthokit compare {out} --html {out / 'report.html'}",
        f"one of these runs again:  orthokit train {strict.folder.parent.name}",
        "your own network:         ortho = orthokit.Regularizer(model, orthokit.SO(), strength=0.1); loss = loss + ortho()",
    )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _mean(summaries: Sequence[Mapping[str, Any]], part: str, key: str) -> float:
    return statistics.fmean(each["orthogonality"][part][key] for each in summaries)


def _row(arm: str, accuracy: Sample, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spread = "" if accuracy.sd is None else f" ± {accuracy.sd:.1f}"
    return {
        "arm": arm,
        "accuracy": f"{accuracy.mean:.1f}{spread}",
        **{
            f"{name}_{key}": _mean(summaries, part, f"{key}_cos")
            for name, part in (("wide", "under"), ("tall", "over"))
            for key in ("mean", "max")
        },
        "copies": _mean(summaries, "all", "copies"),
        "cost": None if arm == "none" else 100 * statistics.fmean(each["penalty_share"] for each in summaries),
    }


def _words(accuracy: Mapping[str, Sample], cosines: Mapping[str, Sequence[float]]) -> list[str]:
    """The demo's result in sentences: whether accuracies differ by more than seeds do, and by how much orthogonality differs."""
    others = [arm for arm in accuracy if arm != "none"]
    least, most = (pick(accuracy[arm].mean for arm in others) for pick in (min, max))
    said = f"Accuracy: {accuracy['none'].mean:.1f}% without a penalty, {least:.1f} to {most:.1f}% with one."
    tested = {arm: each.welch for arm, each in differences(accuracy, "none").items() if each.welch is not None}
    resolved = [arm for arm, p in zip(tested, holm([*tested.values()]), strict=True) if p < 0.05]
    if resolved:
        said += f" Differs from none by more than seeds do (Welch's t, Holm): {', '.join(resolved)}."
    elif tested:
        said += " No difference is larger than what another seed does (Welch's t, Holm): the demo does not show a gain."
    else:
        said += " Too few seeds to tell whether that is more than another seed does."
    means = {arm: statistics.fmean(values) for arm, values in cosines.items()}
    nearest = min(others, key=lambda arm: means[arm])
    return [
        said,
        f"Orthogonality: two filters of a wide layer have a mean |cosine| of {means['none']:.2g} without a penalty, of "
        f"{means[nearest]:.1g} with {nearest}; that is what a penalty does.",
    ]


@own_style(11)
def _draw(accuracy: Mapping[str, Sample], cosines: Mapping[str, Sequence[float]], path: Path) -> None:
    """Accuracies above cosines, a dot a seed; readable on a screen of 400 pixels."""
    figure = new_figure(4.4, 4.8)
    axes = figure.subplots(2, 1)
    kinds = (
        (
            "Accuracy, a dot a seed",
            "test images classified right (%)",
            {arm: each.values for arm, each in accuracy.items()},
        ),
        ("Orthogonality", "mean |cosine| of two filters, wide layers", cosines),
    )
    for axis, (title, label, values) in zip(axes, kinds, strict=True):
        for row, arm in enumerate(values):
            colour = COLOURS[row % len(COLOURS)]
            axis.plot(values[arm], [row] * len(values[arm]), "o", color=colour, markersize=9, alpha=0.7, markeredgewidth=0)
        axis.set_yticks(range(len(values)), list(values))
        axis.set_ylim(len(values) - 0.5, -0.5)
        axis.set_title(title, fontweight="bold")
        axis.set_xlabel(label)
        axis.grid(axis="y")
        axis.spines["left"].set_visible(False)
        axis.tick_params(left=False)
    axes[1].set_xscale("log")
    axes[1].set_xlim(right=1)
    axes[1].xaxis.set_major_locator(LogLocator(numticks=5))
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
    axes[1].xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=180, metadata={"Software": None})
