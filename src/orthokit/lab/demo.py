"""The demo: one small network, five arms, real images, the same seeds and batches for each."""

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import mean, median, stdev

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

import orthokit as ok
from orthokit.checkpoint import ordered
from orthokit.kernel import KernelMeasure
from orthokit.lab.atomic import write
from orthokit.lab.data.images import ImageSet
from orthokit.lab.networks.resnet import ResNet
from orthokit.lab.runs.control import follow
from orthokit.plots import draw

STRENGTH = 0.1
"""Of every penalty; not tuned for accuracy."""

ARMS: dict[str, KernelMeasure | None] = {
    "none": None,
    "SO": ok.SO(),
    "strict": ok.Disentangled(),
    "relaxed, pairs": ok.Disentangled(relax=ok.feasible()),
    "relaxed, welch": ok.Disentangled(relax=ok.feasible(), form="welch"),
}


@dataclass(frozen=True)
class Result:
    """One arm of one seed: accuracy in percent, median step time over that of the arm without a penalty, trained weights."""

    arm: str
    seed: int
    accuracy: float
    cost: float
    weights: dict[str, Tensor]


def train_seed(data: ImageSet, seed: int, epochs: int, batch: int, tick: Callable[[], object]) -> list[Result]:
    """Train every arm from the same weights on the same batches, step by step in turn, so that their times compare."""
    torch.manual_seed(seed)
    first = ResNet(depth=8, channels=data.train.pixels.shape[1], classes=data.classes)
    models = {arm: deepcopy(first) for arm in ARMS}
    regularizers = {arm: ok.Regularizer(models[arm], penalty, strength=STRENGTH) for arm, penalty in ARMS.items() if penalty}
    optimizers = {arm: torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True) for arm, m in models.items()}
    images, labels = data.normalise(data.train.pixels), data.train.labels
    steps = epochs * (len(labels) // batch)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, steps, pct_start=0.15) for o in optimizers.values()]
    order = torch.Generator().manual_seed(seed)
    costs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(batch):
            if len(rows) < batch:
                continue
            seconds = {}
            for arm, model in models.items():
                start = time.perf_counter()
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                if arm in regularizers:
                    loss = loss + regularizers[arm]()
                optimizers[arm].zero_grad()
                loss.backward()
                optimizers[arm].step()
                seconds[arm] = time.perf_counter() - start
            for arm in ARMS:
                costs[arm].append(seconds[arm] / seconds["none"])
            for schedule in schedules:
                schedule.step()
        tick()
    return [Result(arm, seed, _accuracy(m, data), median(costs[arm]), m.state_dict()) for arm, m in models.items()]


@torch.no_grad()
def _accuracy(model: ResNet, data: ImageSet) -> float:
    model.eval()
    right = sum(
        int((model(data.normalise(pixels)).argmax(-1) == labels).sum())
        for pixels, labels in zip(data.test.pixels.split(1000), data.test.labels.split(1000), strict=True)
    )
    return 100 * right / len(data.test)


_ticks: "SimpleQueue[int] | None" = None
"""In a worker: where it tells of each epoch of a seed."""


def _begin(parent: int, ticks: "SimpleQueue[int]") -> None:
    """Set up a worker."""
    global _ticks
    follow(parent)
    _ticks = ticks
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # the copies that form="pairs" warns of are what the demo shows


def _work(load: Callable[[], ImageSet], seed: int, epochs: int, batch: int) -> list[Result]:
    ticks = _ticks
    assert ticks is not None
    return train_seed(load(), seed, epochs, batch, lambda: ticks.put(seed))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started here never see a Ctrl-C, not even while they import; ours is kept for the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(load: Callable[[], ImageSet], *, seeds: int, epochs: int, batch: int, workers: int, out: Path, console: Console) -> None:
    """Train, one seed a single-threaded process; print the table; write the picture and one checkpoint per arm into ``out``."""
    data = load()  # fails here rather than in a worker
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]orthokit demo[/]: ResNet-8 on {data.name}, {len(data.train):,} training images, {epochs} epochs, "
        f"{len(ARMS)} arms, {seeds} seeds\n"
    )
    results: list[Result] = []
    context = multiprocessing.get_context("spawn")
    ticks = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), ticks))
    with _progress(console) as progress, pool:
        bars = {seed: progress.add_task(f"seed {seed}", total=epochs) for seed in range(seeds)}
        try:
            with _without_interrupts():
                waiting = {pool.submit(_work, load, seed, epochs, batch) for seed in range(seeds)}
            while waiting:
                done, waiting = wait(waiting, timeout=0.2)
                while not ticks.empty():
                    progress.advance(bars[ticks.get()])
                results += [result for future in done for result in future.result()]
        except BaseException:
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results.sort(key=lambda result: result.seed)
    by_arm = {arm: [result for result in results if result.arm == arm] for arm in ARMS}
    console.print(_table(by_arm, data))
    console.print(
        "c: cosine of two filters of a convolution. Under-determined layers can be orthogonal; over-determined ones (here the "
        "1x1 shortcuts, and the first convolution of grey images) have more filters than weights per filter and cannot. "
        "Copies: pairs with |c| > .99. Cost: time of a training step over that of none, on this small network. Every penalty "
        f"has strength {STRENGTH}; nothing was tuned for accuracy.\n"
    )
    title = f"ResNet-8 on {data.name}: {len(data.train):,} training images, {epochs} epochs, {seeds} seeds pooled"
    picture = out / "orthogonality.png"
    draw({arm: [result.weights for result in found] for arm, found in by_arm.items()}, picture, title=title, where=ok.convs)
    for arm, (first, *_) in by_arm.items():
        write(out / f"{arm.replace(', ', '-')}.safetensors", save(first.weights, ordered(first.weights)))
    console.print(f"picture: {picture}", f"look closer: orthokit report {out / 'strict.safetensors'}", sep="\n", soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


def _table(by_arm: dict[str, list[Result]], data: ImageSet) -> Table:
    seeds = len(by_arm["none"])
    table = Table(
        title=f"{data.name}, {len(data.test):,} test images, mean ± sd of {seeds} seeds",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("\narm", no_wrap=True)
    for header in ("accuracy\n%", "under:\nmean |c|", "\nmax |c|", "over:\nmean |c|", "\nmax |c|", "\ncopies", "\ncost"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm, results in by_arm.items():
        totals = [ok.report(result.weights, where=ok.convs).totals for result in results]
        figures = [mean(total[part][key] for total in totals) for part in ("wide", "tall") for key in ("mean_cos", "max_cos")]
        copies = mean(total["all"]["copies"] for total in totals)
        accuracy = [result.accuracy for result in results]
        spread = f" ± {stdev(accuracy):.1f}" if seeds > 1 else ""
        cost = mean(result.cost for result in results)
        table.add_row(arm, f"{mean(accuracy):.1f}{spread}", *(f"{f:.2g}" for f in figures), f"{copies:g}", f"{cost:.2f}")
    return table
