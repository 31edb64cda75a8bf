"""Commands that look at penalties and at saved networks: ``list``, ``report``, ``plan``."""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table as RichTable
from torch import nn

import orthokit as ok
from orthokit import checkpoint
from orthokit.architecture import build, opened
from orthokit.cli.base import Format, UsageError, demo_images, needing, show
from orthokit.relax import Policy


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
    """A file with a state dict (.pt, .pth, .bin, .ckpt, .safetensors), or a folder of such. Nothing in it is executed."""
    model: str | None = None
    """Its architecture: torchvision:NAME, timm:NAME, module:function (imported: code runs), or a folder with config.json."""
    key: str | None = None
    """Which network, where there are several in the file; also the beginning of its entries' names."""
    format: Format = "table"
    """What to print."""
    layers: tuple[str, ...] = ("*",)
    """Only layers whose name matches one of these patterns, e.g. 'layer1.*'."""
    picture: Path | None = None
    """Also draw cosines and singular values into this file (.png, .svg, .pdf)."""

    def run(self, console: Console) -> None:
        where, like = ok.matching(*self.layers), _architecture(self.model)
        report = ok.report(self.checkpoint, where=where, like=like, key=self.key)
        if self.picture is not None:
            from orthokit.plots import draw

            draw(
                {self.checkpoint.stem: [opened(self.checkpoint, like, self.key)[0]]},
                self.picture,
                title=str(self.checkpoint),
                where=where,
            )
        show(report, self.format, console)


def _architecture(spec: str | None) -> nn.Module | None:
    """The model that ``--model`` names; what is imported for it is said first."""
    errors = Console(stderr=True, soft_wrap=True)
    return None if spec is None else build(spec, lambda text: errors.print(escape(text), style="dim", highlight=False))


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
    """A file with a state dict (.pt, .pth, .bin, .ckpt, .safetensors), or a folder of such. Nothing in it is executed."""
    model: str | None = None
    """Its architecture: torchvision:NAME, timm:NAME, module:function (imported: code runs), or a folder with config.json."""
    key: str | None = None
    """Which network, where there are several in the file; also the beginning of its entries' names."""
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
        network, notes = opened(self.checkpoint, _architecture(self.model), self.key)
        if self.data is not None:
            network, measured = self._measure(checkpoint.read(self.checkpoint, self.key)[0], where)
            policies = [ok.ranks(measured, floor=self.floor)]
        table = ok.plan(network, policies[0] if policies else None, where=where, count=self.count)
        show(replace(table, notes=(*table.notes, *notes)), self.format, console)

    def _measure(self, saved: Mapping[str, Any], where: ok.Predicate) -> tuple[nn.Module, dict[str, int]]:
        """The lab's network with these weights, and the ranks of its layers on the training images."""
        from orthokit.lab.models import ResNet

        network = ResNet.from_checkpoint(saved)
        with needing("the digits need"):
            chosen = demo_images(self.root)()
        images = chosen.normalise(chosen.train.pixels)
        if (channels := network.conv.in_channels) != images.shape[1]:
            raise UsageError(f"{self.checkpoint} reads {channels} channels; the images of {self.data} have {images.shape[1]}")
        energy = 0.95 if self.energy is None else self.energy
        return network, ok.estimate(network, images.split(250), energy, where=where)


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
