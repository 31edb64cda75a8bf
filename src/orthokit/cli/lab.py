"""Commands that train: ``demo``, ``train``, ``sweep``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from orthokit.cli.base import UsageError, check_positive, needing, say

if TYPE_CHECKING:
    from orthokit.lab.runs.run import Run

__all__ = ["Demo", "Machine", "Sweep", "Train"]


MOST_THREADS = 1024
"""Of one process; far more make OpenMP fail as it starts them."""


@dataclass(frozen=True)
class Demo:
    """Train a small network with and without penalties, and draw them.

    Under two minutes on two cores. Nothing is downloaded: the digits come with scikit-learn. Interrupted, it goes on.
    """

    data: Literal["digits", "cifar10"] = "digits"
    """Handwritten digits (240 training images, 8x8), or CIFAR-10 (5,000 training images, 16x16) from --root."""
    root: Path | None = None
    """The folder cifar-10-batches-py of CIFAR-10's python version, or the one that holds it."""
    seeds: int = 4
    """Runs of each arm."""
    epochs: int | None = None
    """Passes over the training images; 20 of digits, 8 of cifar10."""
    workers: int | None = None
    """Processes, one core each; all cores by default."""
    out: Path = Path("orthokit-demo")
    """Folder for the picture and the runs."""

    def run(self, console: Console) -> int:
        check_positive(self, "seeds", "epochs", "workers")
        if (self.data == "cifar10") != (self.root is not None):
            raise UsageError("--data cifar10 and --root DIR go together")
        with needing("the demo needs"):
            from orthokit.lab import demo

            arms = demo.runs(self.data, self.seeds, self.epochs, self.out)
            workers = min(self.workers or os.cpu_count() or 1, len(arms) * self.seeds)
            failed = sum(status != 0 for status in demo.train_all(arms, self.root or Path("data"), workers, console))
        if failed:
            raise UsageError(f"{failed} runs of the demo failed; the same command tries them again")
        demo.show(arms, self.out, console)
        return 0


@dataclass(frozen=True)
class Machine:
    """Where images and runs are, and what computes."""

    root: Path = Path("data")
    """Folder of the images: CIFAR as published, archive or unpacked, python or binary version."""
    download: bool = False
    """Fetch the official archive into --root if it is not there."""
    out: Path = Path("runs")
    """Folder of the runs: OUT/NAME/SEED, and OUT/FILE/NAME/SEED of sweeps and studies."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """What to compute on."""
    jobs: int | None = None
    """Runs at a time; by default one a core, or --jobs-per-device on each GPU."""
    jobs_per_device: int = 1
    """Runs at a time on each GPU."""
    threads: int | None = None
    """Threads of each run on the CPU; by default 1 where there are several runs, else all cores."""
    backend: Literal["local", "ray"] = "local"
    """Where several runs go: this machine, or a Ray cluster (extra 'ray') that shares the folders."""
    address: str | None = None
    """With --backend ray: the cluster, e.g. auto; a local one is started by default."""
    log: Literal["tensorboard", "wandb", "csv"] | None = None
    """Where the metrics of each epoch also go: TensorBoard, Weights & Biases, or a CSV file; in the folder of each run."""

    def __post_init__(self) -> None:
        check_positive(self, "jobs", "jobs_per_device", "threads")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"--threads must be at most {MOST_THREADS:,}; got {self.threads:,}")
        if self.address is not None and self.backend == "local":
            raise UsageError("--address does nothing without --backend ray")

    def foretell(self, runs: "Sequence[Run]", console: Console, *, jobs: int = 1, threads: int | None = None) -> None:
        """Say about how long ``runs`` will take, and what they leave on the disk; nothing where they compute elsewhere."""
        from orthokit.lab.runs.run import SERVES
        from orthokit.lab.training.estimate import estimate

        left = [run.recipe for run in runs if run.summary() is None]
        if not left or self.backend != "local" or SERVES in os.environ:
            return
        found = estimate(left, self.root, device=self.device, threads=threads)
        if found is not None:
            say(console, found.text(len(left), jobs, self.out), "dim")

    def run_all(self, runs: "Sequence[Run]", console: Console, *, test: bool = True) -> int:
        """Do what is left of ``runs``, each in a process of its own; exit status 4 if any failed. ``test``: show test results."""
        from orthokit.lab.recipes.recipe import check_all
        from orthokit.lab.runs.launch import Pool, run_all
        from orthokit.lab.runs.logs import Log
        from orthokit.lab.runs.progress import Display, Watch

        damaged = {run.folder: why for run in runs if (why := run.damage()) is not None}
        every, runs = runs, [run for run in runs if run.folder not in damaged]
        check_all([run.recipe for run in runs if run.summary() is None], self.root, download=self.download)
        self.foretell(runs, console, jobs=self.jobs or os.cpu_count() or 1, threads=self.threads or 1)
        with Log(self.log, Watch()) as log:  # those that are not finished do it in their own processes
            for run in runs:
                if run.summary() is not None:
                    log.update(run, before=True)
        pool = Pool(
            jobs=self.jobs,
            per_device=self.jobs_per_device,
            backend=self.backend,
            address=self.address,
            root=self.root,
            device=self.device,
            threads=self.threads or 1,
            log=self.log,
        )
        with Display(console, test=test) as display:
            for run in every:
                if run.folder in damaged:
                    display.fail(run, damaged[run.folder])
            failed = len(damaged) + sum(status != 0 for status in run_all(runs, pool, display))
            display.say(f"{len(every) - failed} of {len(every)} runs finished, in {escape(str(self.out))}")
        return 4 if failed else 0


@dataclass(frozen=True)
class Train:
    """Train what recipes say, such as nano+digits+strict.

    A run that was interrupted goes on where it was; a finished one is not repeated. Under torchrun one run after another, on all
    its processes; else several runs share the machine. Exit status: 3 where a run diverged, 4 where one of several failed, 130
    after Ctrl-C.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE...")]
    """Parts joined by +, such as nano+cifar10+strict (orthokit list recipes shows them), or TOML files of your own."""
    seeds: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SEED...")] = ()
    """A run for each; 0 by default."""
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE...")] = ()
    """Keys of the recipe to set, such as train.epochs=10 regularizer.strength=0.03."""
    name: str | None = None
    """Folder of the runs below --out, for a single recipe; by default what RECIPE and --set say."""
    code: tuple[Path, ...] = ()
    """Folders of the modules that recipes call module:function; by default those of the recipes."""
    devices: int = 1
    """Processes that share a run, one a device."""
    strategy: str = "auto"
    """How they share it, a name of Lightning Fabric's."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        if not self.recipes:
            raise UsageError("name a recipe, such as nano+digits+strict; orthokit list recipes shows what they are made of")
        if self.name is not None and len(self.recipes) > 1:
            raise UsageError("--name is for a single recipe")
        if self.name is not None and (self.name != Path(self.name).name or self.name in ("", ".", "..") or "\0" in self.name):
            raise UsageError(f"--name is a folder below --out, without slashes; got {self.name!r}")
        check_positive(self, "devices")
        seeds = [seed for given in self.seeds for seed in given] if self.seeds else [0]
        with needing("training needs"):
            from orthokit.lab.recipes.compose import label, load, name_of
            from orthokit.lab.runs.logs import Log
            from orthokit.lab.runs.progress import Display
            from orthokit.lab.runs.run import Run
            from orthokit.lab.runs.summary import SEEDS
            from orthokit.lab.training.hardware import Hardware
            from orthokit.lab.training.loop import train
        if not seeds or not all(0 <= seed < SEEDS for seed in seeds) or len({*seeds}) < len(seeds):
            raise UsageError(f"--seeds must be different numbers from 0 to 2^32; got {' '.join(map(str, seeds)) or 'none'}")
        machine, settings = self.machine, [setting for given in self.set for setting in given]
        loaded = {self.name or name_of(each) + label(settings): load(each, settings, self.code) for each in self.recipes}
        if len(loaded) < len(self.recipes):
            raise UsageError("two recipes of one name would share a folder; train them apart, with --name")
        runs = [Run(recipe, seed, machine.out / name / str(seed)) for name, recipe in loaded.items() for seed in seeds]
        if len(runs) > 1 and "WORLD_SIZE" not in os.environ:
            if self.devices > 1:
                raise UsageError("--devices shares one run among processes; several runs in turn on all of them: use torchrun")
            return machine.run_all(runs, console)
        hardware = Hardware(device=machine.device, devices=self.devices, strategy=self.strategy, threads=machine.threads)
        if self.devices == 1 and "WORLD_SIZE" not in os.environ:
            machine.foretell(runs, console, threads=machine.threads)
        with Display(console) as display, Log(machine.log, display) as log:
            for run in runs:
                before = run.summary() is not None
                summary = train(run, root=machine.root, download=machine.download, hardware=hardware, watch=log)
                if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
                    log.update(run, before=before)
                    display.done(run, summary, before=before)
        return 0


@dataclass(frozen=True)
class Sweep:
    """Try strengths or other settings; choose by validation accuracy.

    A grid or a search. Started again it repeats nothing. Exit status 4 where a run failed; the others are done all the same.
    """

    file: tyro.conf.Positional[Path]
    """A TOML file: recipes, seeds, and [grid] or [search] (see the guide)."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        with needing("training needs"):
            from orthokit.lab import sweep
        out = self.machine.out
        points, status = sweep.run(self.file, out, lambda runs: self.machine.run_all(runs, console, test=False))
        sweep.save(points, out / self.file.stem / "sweep.json")
        console.print(sweep.table(points))
        said = sweep.read(self.file)
        for point in sweep.best(points).values():
            console.print(f"best: {point.command}", markup=False, highlight=False, soft_wrap=True)
            if edges := sweep.edges(said, point):
                console.print(f"  at the edge of the grid in {', '.join(edges)}: widen it", markup=False, highlight=False)
        return status
