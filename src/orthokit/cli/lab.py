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
"""Threads of one process. OpenMP fails to start when asked for far more."""


@dataclass(frozen=True)
class Demo:
    """Train a small network with and without penalties, and draw both.

    It takes about two minutes on two idle cores and downloads nothing: the digits come with scikit-learn. Start the command again
    after an interruption: it goes on.
    """

    data: Literal["digits", "cifar10"] = "digits"
    """Handwritten digits (240 training images, 8x8), or CIFAR-10 (5,000 training images, 16x16) from --root."""
    root: Path | None = None
    """With --data cifar10: the folder cifar-10-batches-py of CIFAR-10's python version, or the folder above it."""
    seeds: int = 4
    """Runs of each arm, that is of each penalty and of none."""
    epochs: int | None = None
    """Passes over the training images; 20 by default, 8 with cifar10."""
    workers: int | None = None
    """Processes, each on one core; by default as many as there are cores."""
    out: Path = Path("orthokit-demo")
    """Folder of the picture and the runs."""

    def run(self, console: Console) -> int:
        check_positive(self, "seeds", "epochs", "workers")
        if (self.data == "cifar10") != (self.root is not None):
            raise UsageError("--data cifar10 and --root DIR go together")
        with needing("demo needs"):
            from orthokit.lab import demo

            arms = demo.runs(self.data, self.seeds, self.epochs, self.out)
            workers = min(self.workers or os.cpu_count() or 1, len(arms) * self.seeds)
            failed = sum(status != 0 for status in demo.train_all(arms, self.root or Path("data"), workers, console))
        if failed:
            raise UsageError(f"{failed} runs of the demo failed; start the same command to try them again")
        demo.show(arms, self.out, console)
        return 0


@dataclass(frozen=True)
class Machine:
    """Where images and runs are, and what computes."""

    root: Path = Path("data")
    """Folder of the images: CIFAR's published archive (python or binary version), or the folder inside it."""
    download: bool = False
    """Download CIFAR's official archive into --root unless it is there."""
    out: Path = Path("runs")
    """Folder of the runs: OUT/NAME/SEED; for sweeps and studies OUT/FILE/NAME/SEED."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on."""
    jobs: int | None = None
    """Runs at the same time; by default one on each core, or --jobs-per-device on each GPU."""
    jobs_per_device: int = 1
    """Runs at the same time on each GPU."""
    threads: int | None = None
    """CPU threads of each run; by default 1 for several runs, all cores for a single one."""
    backend: Literal["local", "ray"] = "local"
    """Where several runs compute: here, or on a Ray cluster that shares the folders (extra 'ray')."""
    address: str | None = None
    """With --backend ray: address of the cluster, or auto; by default a local cluster is started."""
    log: Literal["tensorboard", "wandb", "csv"] | None = None
    """Write each epoch's metrics for TensorBoard, for Weights & Biases, or as CSV, too; in the folder of each run."""
    validate_every: int = 1
    """Epochs from one validation to the next, the last epoch among them; 10 saves up to half of the time on few images."""

    def __post_init__(self) -> None:
        check_positive(self, "jobs", "jobs_per_device", "threads", "validate_every")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"--threads must be at most {MOST_THREADS:,}; got {self.threads:,}")
        if self.address is not None and self.backend == "local":
            raise UsageError("--address does nothing without --backend ray")

    def foretell(self, runs: "Sequence[Run]", console: Console, *, jobs: int = 1, threads: int | None = None) -> None:
        """Print about how long ``runs`` will take, and how much disk they need; nothing if another machine computes them."""
        from orthokit.lab.runs.run import SERVES
        from orthokit.lab.training.estimate import estimate

        left = [run.recipe for run in runs if run.summary() is None]
        if not left or self.backend != "local" or SERVES in os.environ:
            return
        found = estimate(left, self.root, device=self.device, threads=threads)
        if found is not None:
            say(console, found.text(len(left), jobs, self.out), "dim")

    def run_all(self, runs: "Sequence[Run]", console: Console, *, test: bool = True) -> int:
        """Train what is left of ``runs``, each in its own process; exit status 4 if any failed. ``test``: show test results."""
        from orthokit.lab.runs.launch import Pool, train_all
        from orthokit.lab.runs.logs import Log
        from orthokit.lab.runs.progress import Display, Watch

        def start(sound: "Sequence[Run]") -> None:
            self.foretell(sound, console, jobs=self.jobs or os.cpu_count() or 1, threads=self.threads or 1)
            with Log(self.log, Watch()) as log:  # those that are not finished do it in their own processes
                for run in sound:
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
            validate_every=self.validate_every,
        )
        display = Display(console, test=test)
        failed = train_all(runs, pool, display, download=self.download, start=start)
        display.say(f"{len(runs) - failed} of {len(runs)} runs finished, in {escape(str(self.out))}")
        return 4 if failed else 0


@dataclass(frozen=True)
class Train:
    """Train networks from recipes, such as nano+digits+strict.

    An interrupted run goes on where it stopped; a finished run is not repeated. Several runs share the machine; under torchrun
    each run uses all processes, one run after another. Exit status 3 if a run diverged, 4 if one of several failed, 130 after
    Ctrl-C.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE...")]
    """Parts joined by +, such as nano+cifar10+strict, or TOML files of your own. orthokit list recipes shows all parts."""
    seeds: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SEED...")] = ()
    """Train one run for each of these numbers; 0 by default."""
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE...")] = ()
    """Change keys of the recipe, such as train.epochs=10 regularizer.strength=0.03."""
    name: str | None = None
    """Name of the folder in --out, for a single recipe; by default RECIPE and --set."""
    code: tuple[Path, ...] = ()
    """Folders of modules that a recipe names as module:function; by default the folder of the recipe."""
    devices: int = 1
    """Processes that share one run, each on its own device."""
    strategy: str = "auto"
    """Strategy of Lightning Fabric by which processes share a run."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        if not self.recipes:
            raise UsageError("name a recipe, such as nano+digits+strict; orthokit list recipes shows all parts")
        if self.name is not None and len(self.recipes) > 1:
            raise UsageError("--name is for a single recipe; several get the names of their recipes")
        if self.name is not None and (self.name != Path(self.name).name or self.name in ("", ".", "..") or "\0" in self.name):
            raise UsageError(f"--name is a folder below --out, without slashes; got {self.name!r}")
        check_positive(self, "devices")
        seeds = [seed for given in self.seeds for seed in given] if self.seeds else [0]
        with needing("train needs"):
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
            raise UsageError("two recipes of one name would share a folder; train each by itself, with --name")
        runs = [Run(recipe, seed, machine.out / name / str(seed)) for name, recipe in loaded.items() for seed in seeds]
        if len(runs) > 1 and "WORLD_SIZE" not in os.environ:
            if self.devices > 1:
                raise UsageError("--devices needs a single run; for several runs, each on all devices, use torchrun")
            return machine.run_all(runs, console)
        hardware = Hardware(device=machine.device, devices=self.devices, strategy=self.strategy, threads=machine.threads)
        if self.devices == 1 and "WORLD_SIZE" not in os.environ:
            machine.foretell(runs, console, threads=machine.threads)
        with Display(console) as display, Log(machine.log, display) as log:
            for run in runs:
                before = run.summary() is not None
                summary = train(
                    run,
                    root=machine.root,
                    download=machine.download,
                    hardware=hardware,
                    watch=log,
                    validate_every=machine.validate_every,
                )
                if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
                    log.update(run, before=before)
                    display.finish(run, summary, before=before)
        return 0


@dataclass(frozen=True)
class Sweep:
    """Try strengths or other settings, and choose by validation accuracy.

    The file has a [grid] or a [search]. Start the command again after an interruption: no finished run is repeated. Exit status 4
    if a run failed; all others are trained.
    """

    file: tyro.conf.Positional[Path]
    """TOML file with recipes, seeds, and [grid] or [search]; see sweeps/strength.toml, and the page on the lab."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        with needing("sweep needs"):
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
