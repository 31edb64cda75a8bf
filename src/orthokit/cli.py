"""The command line: ``orthokit list | report | plan | demo | train | sweep``."""

import contextlib
import functools
import inspect
import io
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table as RichTable
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import orthokit as ok
from orthokit.relax import Policy
from orthokit.tables import Table

if TYPE_CHECKING:
    from orthokit.lab.data import ImageSet
    from orthokit.lab.record import Run

Format = Literal["table", "json", "csv"]


class UsageError(Exception):
    """Something the caller can put right; printed without a traceback."""


@dataclass(frozen=True)
class List:
    """List the penalties: what each measures, and its paper. With a NAME, all about that one."""

    name: tyro.conf.Positional[str | None] = None
    """A penalty, in any case: so, srip, disentangled, ..."""

    def run(self, console: Console) -> None:
        known = {penalty.__name__.lower(): penalty for penalty in ok.PENALTIES}
        if self.name is not None:
            if (penalty := known.get(self.name.lower())) is None:
                raise UsageError(f"no penalty {self.name!r}; there are {', '.join(p.__name__ for p in ok.PENALTIES)}")
            console.print(f"[bold]orthokit.{penalty.__name__}[/]{escape(_options(penalty))}")
            console.print(
                Markdown(resources.files("orthokit.cards").joinpath(f"{penalty.__name__.lower()}.md").read_text("utf-8"))
            )
            console.print(f"\n{_plain(_module_doc(penalty))}", markup=False)
            return
        table = RichTable(box=box.SIMPLE_HEAD)
        for header in ("penalty", "value", "source"):
            table.add_column(header, overflow="fold")
        for penalty in ok.PENALTIES:
            source = re.search(r"Source: (.*)\.", inspect.getdoc(_function(penalty)) or "")
            table.add_row(penalty.__name__, escape(_formula(penalty)), source[1] if source else "")
        console.print(table)
        console.print("orthokit list NAME tells more. In Python: orthokit.Regularizer(model, orthokit.SO(), strength=1e-2)")


@dataclass(frozen=True)
class Report:
    """Show how orthogonal each layer of a saved network is."""

    checkpoint: tyro.conf.Positional[Path]
    """A .pt, .pth or .safetensors file with a state dict. Nothing in it is executed."""
    format: Format = "table"
    """What to print."""
    layers: tuple[str, ...] = ("*",)
    """Only layers whose name matches one of these patterns, e.g. 'layer1.*'."""
    picture: Path | None = None
    """Also draw cosines and singular values into this file (.png, .svg, .pdf)."""

    def run(self, console: Console) -> None:
        state = load_checkpoint(self.checkpoint)
        where = ok.matching(*self.layers)
        report = ok.report(state, where=where)
        if self.picture is not None:
            from orthokit.plots import draw

            draw({self.checkpoint.stem: [state]}, self.picture, title=str(self.checkpoint), where=where)
        _show(report, self.format, console)


@dataclass(frozen=True)
class Relaxation:
    """How to choose each layer's transition dimension r; none of them is strict."""

    feasible: bool = False
    """r = min(o, n): only layers with more filters than weights per filter are relaxed."""
    fraction: float | None = None
    """r = this fraction of min(o, n)."""
    share: float | None = None
    """The r that leaves about this share of all pairs free."""


@dataclass(frozen=True)
class Plan:
    """Show what a relaxation would ask of each convolution of a saved network.

    With --data r is measured: the principal components that hold --energy of the variance of each layer's outputs.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A .pt, .pth or .safetensors file with a state dict. Nothing in it is executed."""
    relax: Annotated[Relaxation, tyro.conf.arg(name="")] = Relaxation()
    floor: int | None = None
    """Never choose r below this (say, the classes of the data set) where the layer has room for it."""
    data: Literal["digits", "cifar10"] | None = None
    """Measure r on the images the demo trains on; the checkpoint must be of its network (orthokit.lab.models.ResNet)."""
    root: Path | None = None
    """With --data cifar10: the folder cifar-10-batches-py of CIFAR-10's python version, or the one that holds it."""
    energy: float | None = None
    """With --data: share of the variance, 0.95 by default."""
    count: Literal["expected", "fewest"] = "expected"
    """Which number of pairs form="pairs" leaves free."""
    linears: bool = False
    """Linear layers too."""
    format: Format = "table"
    """What to print."""

    def run(self, console: Console) -> None:
        chosen = [
            ok.feasible(floor=self.floor) if self.relax.feasible else None,
            None if self.relax.fraction is None else ok.fraction(self.relax.fraction, floor=self.floor),
            None if self.relax.share is None else ok.share(self.relax.share, floor=self.floor),
        ]
        policies: list[Policy] = [policy for policy in chosen if policy is not None]
        if len(policies) + (self.data is not None) > 1:
            raise UsageError("choose one of --feasible, --fraction, --share and --data")
        if self.floor is not None and not policies and self.data is None:
            raise UsageError("--floor does nothing without --feasible, --fraction, --share or --data")
        if (self.data == "cifar10") != (self.root is not None):
            raise UsageError("--data cifar10 and --root DIR go together")
        if self.energy is not None and self.data is None:
            raise UsageError("--energy does nothing without --data")
        where = ok.convs | ok.linears if self.linears else ok.convs
        checkpoint = load_checkpoint(self.checkpoint)
        network: nn.Module | Mapping[str, Any] = checkpoint
        if self.data is not None:
            network, measured = self._measure(checkpoint, where)
            policies = [ok.ranks(measured, floor=self.floor)]
        _show(ok.plan(network, policies[0] if policies else None, where=where, count=self.count), self.format, console)

    def _measure(self, checkpoint: Mapping[str, Any], where: ok.Predicate) -> tuple[nn.Module, dict[str, int]]:
        """The lab's network with these weights, and the ranks of its layers on the training images."""
        from orthokit.lab.models import ResNet

        network = ResNet.from_checkpoint(checkpoint)
        with _needing("the digits need"):
            chosen = _demo_images(self.root)()
        images = chosen.normalise(chosen.train.pixels)
        if (channels := network.conv.in_channels) != images.shape[1]:
            raise UsageError(f"{self.checkpoint} reads {channels} channels; the images of {self.data} have {images.shape[1]}")
        energy = 0.95 if self.energy is None else self.energy
        return network, ok.estimate(network, images.split(250), energy, where=where)


@dataclass(frozen=True)
class Demo:
    """Train a small residual network without, with strict and with relaxed orthogonality; compare what it learned.

    Under two minutes on two cores. Nothing is downloaded: the digits come with scikit-learn.
    """

    data: Literal["digits", "cifar10"] = "digits"
    """Handwritten digits (300 training images, 8x8), or CIFAR-10 (5,000 training images, 16x16) from --root."""
    root: Path | None = None
    """The folder cifar-10-batches-py of CIFAR-10's python version, or the one that holds it."""
    seeds: int = 4
    """Runs of each arm."""
    epochs: int | None = None
    """Passes over the training images; 40 of digits, 8 of cifar10."""
    workers: int | None = None
    """Processes, one core each; all cores by default."""
    out: Path = Path("orthokit-demo")
    """Folder for the picture and the trained weights."""

    def run(self, console: Console) -> None:
        for name in ("seeds", "epochs", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1; got {value}")
        if (self.data == "cifar10") != (self.root is not None):
            raise UsageError("--data cifar10 and --root DIR go together")
        with _needing("the demo needs"):
            from orthokit.lab import demo

            demo.run(
                _demo_images(self.root),
                seeds=self.seeds,
                epochs=self.epochs or (40 if self.root is None else 8),
                batch=50 if self.root is None else 125,
                workers=min(self.workers or os.cpu_count() or 1, self.seeds),
                out=self.out,
                console=console,
            )


@dataclass(frozen=True)
class Machine:
    """Where images and runs are, and what computes."""

    root: Path = Path("data")
    """Folder of the images: CIFAR as published, archive or unpacked, python or binary version."""
    download: bool = False
    """Fetch the official archive into --root if it is not there."""
    out: Path = Path("runs")
    """Folder of the runs: OUT/NAME/SEED."""
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

    def __post_init__(self) -> None:
        for name in ("jobs", "jobs_per_device", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
        if self.address is not None and self.backend == "local":
            raise UsageError("--address does nothing without --backend ray")

    def run_all(self, runs: "Sequence[Run]", console: Console, *, test: bool = True) -> int:
        """Do what is left of ``runs``, each in a process of its own; exit status 4 if any failed. ``test``: show test results."""
        from orthokit.lab.data import load
        from orthokit.lab.display import Display
        from orthokit.lab.runner import Pool, run_all

        for name in dict.fromkeys(run.recipe.data.name for run in runs if run.summary() is None):
            load(name, root=self.root, download=self.download)  # decoded once, for all; fails here rather than in each
        pool = Pool(
            jobs=self.jobs,
            per_device=self.jobs_per_device,
            backend=self.backend,
            address=self.address,
            root=self.root,
            device=self.device,
            threads=self.threads or 1,
        )
        with Display(console, test=test) as display:
            failed = sum(status != 0 for status in run_all(runs, pool, display))
            display.say(f"{len(runs) - failed} of {len(runs)} runs finished, in {escape(str(self.out))}")
        return 4 if failed else 0


@dataclass(frozen=True)
class Train:
    """Train what recipes say, for each of the seeds.

    A run that was interrupted goes on where it was; a finished one is not repeated. Under torchrun one run after another, on all
    its processes; else several runs share the machine. Exit status: 3 where a run diverged, 4 where one of several failed, 130
    after Ctrl-C.
    """

    recipes: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE...")]
    """TOML files, such as recipes/nano_cifar10_strict.toml."""
    seeds: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SEED...")] = ()
    """A run for each; 0 by default."""
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE...")] = ()
    """Keys of the recipe to set, such as train.epochs=10 regularizer.strength=0.03."""
    name: str | None = None
    """Folder of the runs below --out, for a single recipe; by default the file's name and what --set says."""
    devices: int = 1
    """Processes that share a run, one a device."""
    strategy: str = "auto"
    """How they share it, a name of Lightning Fabric's."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        if not self.recipes:
            raise UsageError("name a recipe, such as recipes/nano_cifar10_strict.toml")
        if self.name is not None and len(self.recipes) > 1:
            raise UsageError("--name is for a single recipe")
        seeds = [seed for given in self.seeds for seed in given] if self.seeds else [0]
        with _needing("training needs"):
            from orthokit.lab.display import Display
            from orthokit.lab.hardware import Hardware
            from orthokit.lab.recipe import label, load
            from orthokit.lab.record import SEEDS, Run
            from orthokit.lab.train import train
        if not seeds or not all(0 <= seed < SEEDS for seed in seeds) or len({*seeds}) < len(seeds):
            raise UsageError(f"--seeds must be different numbers from 0 to 2^32; got {' '.join(map(str, seeds)) or 'none'}")
        machine, settings = self.machine, [setting for given in self.set for setting in given]
        loaded = {self.name or path.stem + label(settings): load(path, settings) for path in self.recipes}
        if len(loaded) < len(self.recipes):
            raise UsageError("two recipes of one name would share a folder; train them apart, with --name")
        runs = [Run(recipe, seed, machine.out / name / str(seed)) for name, recipe in loaded.items() for seed in seeds]
        if len(runs) > 1 and "WORLD_SIZE" not in os.environ:
            if self.devices > 1:
                raise UsageError("--devices shares one run among processes; several runs in turn on all of them: use torchrun")
            return machine.run_all(runs, console)
        hardware = Hardware(device=machine.device, devices=self.devices, strategy=self.strategy, threads=machine.threads)
        with Display(console) as display:
            for run in runs:
                before = run.summary() is not None
                summary = train(run, root=machine.root, download=machine.download, hardware=hardware, watch=display)
                if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
                    display.done(run, summary, before=before)
        return 0


@dataclass(frozen=True)
class Sweep:
    """Try settings of recipes, a grid or a search, and tell the best of each recipe by validation accuracy.

    Started again it repeats nothing. Exit status 4 where a run failed; the others are done all the same.
    """

    file: tyro.conf.Positional[Path]
    """A TOML file: recipes, seeds, and [grid] or [search] (see the guide)."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()

    def run(self, console: Console) -> int:
        with _needing("training needs"):
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


@contextlib.contextmanager
def _needing(what: str) -> Iterator[None]:
    """Names the extra where a library of the lab is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{what} {error.name}: pip install 'orthokit[lab]'") from None


def _demo_images(root: Path | None) -> "Callable[[], ImageSet]":
    """Loads what the demo trains on: the digits, or some of the CIFAR-10 in ``root``. Can be pickled."""
    from orthokit.lab.data import load

    return (
        functools.partial(load, "digits") if root is None else functools.partial(load, "cifar10", root=root, train=5000, size=16)
    )


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """The tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, on the CPU; no code in it runs.

    Raises:
        UsageError: no such file, or it cannot be read as one; the message says what to do.
    """
    if not path.is_file():
        raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol of files that turn out to be no checkpoint
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UsageError(f"{path} is no safetensors file, or a damaged one ({error})") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and "magic" not in str(error):
            raise UsageError(
                f"{path} holds Python objects besides tensors, which are not loaded as they could run code; "
                "save model.state_dict() instead"
            ) from None
        raise UsageError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UsageError(f"{path} is no PyTorch checkpoint, or a damaged one ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    return loaded


def _show(table: Table, form: Format, console: Console) -> None:
    if form == "table":
        console.print(table)
    else:
        print(table.to_json() if form == "json" else table.to_csv(), end="")


def _module_doc(penalty: type) -> str:
    return inspect.getdoc(sys.modules[penalty.__module__]) or ""


def _function(penalty: type) -> Any:
    """The function that a penalty's class docstring points to."""
    match = re.search(r":func:`(\w+)`", inspect.getdoc(penalty) or "")
    if match is None:
        raise UsageError("descriptions are read from docstrings, which python -OO strips; run without it")
    return getattr(sys.modules[penalty.__module__], match[1])


def _formula(penalty: type) -> str:
    return _plain((inspect.getdoc(_function(penalty)) or "").split("\n\n")[0]).replace("\n", " ").rstrip(".")


def _options(penalty: type) -> str:
    return re.sub(r"orthokit\.\w+\.(\w+\.)*|typing\.| -> None", "", str(inspect.signature(penalty)))


def _plain(text: str) -> str:
    return re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")


class _Console(Console):
    """Treats a closed pipe (``| head``) as the reader having seen enough."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 when all went well, 2 for what the caller can put right, 3 when training diverged, 4 when one of several runs failed, 130
    when interrupted.

    With ``ORTHOKIT_DEBUG=1`` in the environment errors keep their traceback.
    """
    args = sys.argv[1:] if args is None else list(args)
    if args == ["--version"]:
        print(f"orthokit {ok.__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Greek letters on a terminal without them
    errors = Console(stderr=True, soft_wrap=True)
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {"list": List, "report": Report, "plan": Plan, "demo": Demo, "train": Train, "sweep": Sweep},
            prog="orthokit",
            description="Orthogonal filters for deep networks: measure them, plan for them, see what they do.",
            args=args or ["--help"],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        status: int | None = command.run(_Console())
        with contextlib.suppress(AttributeError):  # of no stdout at all
            sys.stdout.flush()
        return status or 0
    except (UsageError, ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ORTHOKIT_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        errors.print(f"[bold red]orthokit:[/] {escape(str(error))}", highlight=False)
        return getattr(error, "status", 2)
    except KeyboardInterrupt as interrupt:
        errors.print(escape(str(interrupt) or "interrupted"), highlight=False)
        return 130


if __name__ == "__main__":
    sys.exit(main())
