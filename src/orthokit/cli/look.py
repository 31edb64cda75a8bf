"""Commands that look at penalties and at saved networks: ``list``, ``report``, ``plan``."""

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

import tyro
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import track
from rich.table import Table as RichTable
from torch import nn

import orthokit as ok
from orthokit import cards, checkpoint
from orthokit.architecture import build, open_network
from orthokit.checks import printable
from orthokit.cli.base import Format, Terminal, UsageError, check_positive, demo_images, needing, say, show, write_text
from orthokit.layers import Layer
from orthokit.relax import Policy
from orthokit.report import COLUMNS, compare
from orthokit.report.gate import Condition
from orthokit.report.measure import SPECTRAL
from orthokit.spec import where_of
from orthokit.tables import Table

__all__ = ["List", "Plan", "Relaxation", "Report"]


@dataclass(frozen=True)
class List:
    """List the penalties and their papers.

    With the NAME of a penalty: its card. With recipes: all parts of which recipes are made.
    """

    name: tyro.conf.Positional[str | None] = None
    """A penalty (so, srip, disentangled, ...; capitals do not matter), or recipes."""

    def run(self, console: Console) -> None:
        if self.name == "recipes":
            with needing("list recipes needs"):
                from orthokit.lab.recipes.compose import overview
            say(console, overview())
            return
        known = {penalty.name.lower(): penalty for penalty in ok.PENALTIES}
        if self.name is not None:
            if (penalty := known.get(self.name.lower())) is None:
                raise UsageError(f"no penalty {self.name!r}; there are {', '.join(p.name for p in ok.PENALTIES)}")
            console.print(f"[bold]orthokit.{penalty.name}[/]{escape(_options(penalty))}")
            console.print(Markdown(cards.read(penalty.name)))
            console.print(f"\nSource: {penalty.source}", markup=False)
            return
        table = RichTable(box=box.SIMPLE_HEAD)
        for header in ("penalty", "what it is", "use it when", "source"):
            table.add_column(header, overflow="fold")
        for penalty in ok.PENALTIES:
            table.add_row(penalty.name, *map(escape, (penalty.long_name, penalty.use, penalty.source)))
        console.print(table)
        console.print("What we recommend:")
        console.print(Markdown(cards.read("recommended")))
        console.print(
            "orthokit list NAME shows one penalty. To begin: orthokit.Regularizer(model, orthokit.Disentangled(), strength=0.1)"
        )


@dataclass(frozen=True)
class _Verdict:
    """Whether a layer passes a condition: ``why`` it does not, or nothing. All text is printable."""

    condition: str
    layer: str
    why: str


@dataclass(frozen=True)
class Report:
    """Show how orthogonal each layer of a saved network is.

    Each layer gets figures and a word; several networks are shown side by side. With --fail-if the command is a gate: exit status
    1 if a layer meets a condition or could not be read.
    """

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")]
    """Saved networks: .pt, .pth, .bin, .ckpt or .safetensors, or a folder of parts. No code in them is executed."""
    model: str | None = None
    """Architecture of the checkpoints: torchvision:NAME, timm:NAME, module:function (imported: its code runs), or a folder with
    config.json."""
    key: str | None = None
    """Which network to read where a file holds several: its name, or how the names of its weights begin."""
    format: Format = "table"
    """Output format."""
    layers: tuple[str, ...] = ("*",)
    """Only layers whose name matches one of these patterns, e.g. 'layer1.*'."""
    where: str | None = None
    """Only layers of this kind, e.g. 'convs & ~tall'."""
    exclude: tuple[str, ...] = ()
    """Leave out layers whose name matches one of these patterns, e.g. 'fc' 'head*'."""
    sort: str | None = None
    """Order by this column, largest values first, e.g. max_cos; word orders by what to mend first."""
    top: int | None = None
    """Show this many rows only. On the page of --html: draw this many layers (12 by default)."""
    no_spectrum: bool = False
    """Leave out singular values, which are most of the work."""
    operator: int | None = None
    """Show each layer as an operator instead: its exact singular values on square images of this size."""
    html: Path | None = None
    """Write a page with pictures into this file, too (extra 'lab')."""
    picture: Path | None = None
    """Draw cosines and singular values into this file, too (.png, .svg, .pdf; extra 'lab')."""
    fail_if: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Condition on a layer's columns, e.g. "copies > 0" or "max_cos > .95 and o <= n". The option may be repeated."""
    annotations: Literal["github"] | None = None
    """Print failures in GitHub's format, too, which GitHub shows beside a change."""
    junit: Path | None = None
    """Write failures as JUnit XML into this file, too."""

    def run(self, console: Terminal) -> int:
        check_positive(self, "top", "operator")
        if not self.checkpoints:
            raise UsageError("name a checkpoint, such as model.safetensors")
        if (self.annotations or self.junit) and not self.fail_if:
            raise UsageError("--annotations and --junit need --fail-if")
        if self.fail_if and len(self.checkpoints) > 1:
            raise UsageError("--fail-if needs a single checkpoint; run the command once for each")
        if len(self.checkpoints) > 1 and (self.sort is not None or (self.top is not None and self.html is None)):
            raise UsageError("--sort and --top need a single checkpoint; several are shown in the order of their layers")
        where, like, paths = self._where(), _architecture(self.model), _names(self.checkpoints)
        if self.operator is not None:
            self._refuse_beside_operator()
            for path in paths.values():
                show(ok.operators(path, self.operator, where=where, like=like, key=self.key), self.format, console)
            return 0
        conditions = [Condition(text, COLUMNS) for text in self.fail_if]
        unmeasured = [name for condition in conditions for name in condition.names if name in SPECTRAL]
        if self.no_spectrum and unmeasured:
            raise UsageError(f"--no-spectrum leaves out {', '.join(unmeasured)}, which --fail-if needs; drop one of the two")
        reports = {
            name: ok.report(path, where=where, spectrum=not self.no_spectrum, track=_track(name), like=like, key=self.key)
            for name, path in paths.items()
        }
        if self.picture is not None:
            from orthokit.plots import draw

            networks = {name: [open_network(path, like, self.key)[0]] for name, path in paths.items()}
            draw(networks, self.picture, title=" and ".join(paths), where=where)
        report, *others = reports.values()
        table: Table = compare(reports) if others else report
        if self.html is not None:
            from orthokit.report.page import page

            write_text(self.html, page(reports, top=self.top or 12, table=table if others else None))
        if not others and (self.sort is not None or self.top is not None):
            table = report.sorted(self.sort or "word", top=self.top)
        verdicts = self._verdicts(report, conditions)
        if self.junit is not None:
            write_text(self.junit, _junit(report, verdicts))
        show(table, self.format, console)
        if self.format == "table" and not others:
            say(console, report.summary, "bold")
            if report.action:
                say(console, f"to act on it: {report.action}")
            say(console, f"look closer: orthokit report {self.checkpoints[0]} --html report.html" if self.html is None else "")
        if self.html is not None:
            say(Terminal(stderr=True), f"page: {self.html}")
        return self._tell(verdicts, console) if conditions else 0

    def _where(self) -> ok.Predicate:
        where = ok.layers if self.where is None else where_of(self.where)
        if self.layers != ("*",):
            where = where & ok.matching(*self.layers)
        return where & ~ok.matching(*self.exclude) if self.exclude else where

    def _refuse_beside_operator(self) -> None:
        """Refuse options that would do nothing: above all, a gate must not pass without a test."""
        for name in ("fail_if", "sort", "top", "html", "picture", "no_spectrum"):
            if getattr(self, name) not in (None, (), False):
                raise UsageError(f"--{name.replace('_', '-')} is of the layers' filters; it does not go with --operator")

    def _verdicts(self, report: "ok.Report", conditions: Sequence[Condition]) -> list[_Verdict]:
        """A verdict on each layer by each condition; a layer that was not read passes none, unless its name is left out."""
        unread = {name: f"{why}: nothing to judge" for name, why in report.incomplete.items() if self._names(name)}
        return [
            _Verdict(printable(condition.text), printable(name), printable(why))
            for condition in conditions
            for name, why in [*((row["layer"], condition.failure(row)) for row in report.rows), *unread.items()]
        ]

    def _names(self, layer: str) -> bool:
        """Whether --layers and --exclude leave a layer in. A part of a network, which has a space in its name, stays in."""
        chosen, others = (any(fnmatch.fnmatchcase(layer, each) for each in patterns) for patterns in (self.layers, self.exclude))
        return " " in layer or (chosen and not others)

    def _tell(self, verdicts: Sequence[_Verdict], console: Terminal) -> int:
        """The exit status, 1 if a layer does not pass. Failures go to stderr, and to the format asked for."""
        errors = Terminal(stderr=True, soft_wrap=True)
        failures = [verdict for verdict in verdicts if verdict.why]
        # GitHub reads both streams; JSON and CSV must stay what they are.
        stream = console if self.format == "table" else errors
        for verdict in failures:
            say(errors, f"failed: {verdict.condition}: {verdict.layer} ({verdict.why})", "red")
            if self.annotations == "github":
                # A comma or colon would end a property, a newline the message.
                message = f"{verdict.layer}: {verdict.condition} ({verdict.why})"
                message = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
                name = printable(self.checkpoints[0].name).replace(",", " ").replace(":", " ")
                stream.write(f"::error title=orthokit report {name}::{message}\n")
        if not failures:
            say(errors, f"passed: no layer meets {' or '.join(repr(text) for text in self.fail_if)}")
        return 1 if failures else 0


def _junit(report: "ok.Report", verdicts: Sequence[_Verdict]) -> str:
    """JUnit XML with a test case for each verdict."""
    failed = sum(bool(verdict.why) for verdict in verdicts)
    count = str(len(verdicts))
    suite = ElementTree.Element("testsuite", name=printable(report.title), tests=count, failures=str(failed), errors="0")
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=verdict.condition, name=verdict.layer)
        if verdict.why:
            ElementTree.SubElement(case, "failure", message=f"{verdict.condition}: {verdict.why}")
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each file: the shortest end of its path that no other file has."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("the same checkpoint is named twice")
    for parts in (1, 2, 3):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return {str(path): path for path in paths}


def _track(name: str) -> Callable[[Sequence[Layer]], Iterable[Layer]]:
    """A progress bar on stderr, if stderr is a terminal. The bar disappears at the end."""
    errors = Terminal(stderr=True)
    return lambda layers: track(layers, escape(name), console=errors, transient=True, disable=not errors.is_terminal)


def _architecture(spec: str | None) -> nn.Module | None:
    """The model that ``--model`` names. A line on stderr says first what is imported."""
    errors = Terminal(stderr=True, soft_wrap=True)
    return None if spec is None else build(spec, lambda text: errors.print(escape(text), style="dim", highlight=False))


@dataclass(frozen=True)
class Relaxation:
    """Rule for each layer's transition dimension r. Without an option every layer is strict."""

    feasible: bool = False
    """r = min(o, n): relax tall layers only, those with more filters than weights per filter."""
    fraction: float | None = None
    """r = this fraction of min(o, n)."""
    share: float | None = None
    """Choose r so that about this share of all pairs of filters is free."""


@dataclass(frozen=True)
class Plan:
    """Show what a relaxed penalty would ask of each layer.

    The transition dimension r is chosen by --feasible, --fraction or --share. With --data it is measured: the number of principal
    components that hold --energy of the variance of a layer's outputs.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A saved network: .pt, .pth, .bin, .ckpt or .safetensors, or a folder of parts. No code in it is executed."""
    model: str | None = None
    """Architecture of the checkpoint: torchvision:NAME, timm:NAME, module:function (imported: its code runs), or a folder with
    config.json."""
    key: str | None = None
    """Which network to read where the file holds several: its name, or how the names of its weights begin."""
    relax: Annotated[Relaxation, tyro.conf.arg(name="")] = Relaxation()
    floor: int | None = None
    """Smallest r, where a layer has room for it; for example the number of classes."""
    data: Literal["digits", "cifar10"] | None = None
    """Measure r on the demo's training images. The checkpoint must hold a network of the demo or of orthokit train."""
    root: Path | None = None
    """With --data cifar10: the folder cifar-10-batches-py of CIFAR-10's python version, or the folder above it."""
    energy: float | None = None
    """With --data: share of the variance to keep, 0.95 by default."""
    count: Literal["expected", "fewest"] = "expected"
    """Rule for the number of pairs that form="pairs" leaves free: the fewest possible, or as many as expected."""
    linears: bool = False
    """Show linear layers, too."""
    format: Format = "table"
    """Output format."""

    def run(self, console: Terminal) -> None:
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
        network, notes = open_network(self.checkpoint, _architecture(self.model), self.key)
        if self.data is not None:
            network, measured = self._measure(checkpoint.read(self.checkpoint, self.key)[0], where)
            policies = [ok.ranks(measured, floor=self.floor)]
        table = ok.plan(network, policies[0] if policies else None, where=where, count=self.count)
        show(replace(table, notes=(*table.notes, *notes)), self.format, console)

    def _measure(self, saved: Mapping[str, Any], where: ok.Predicate) -> tuple[nn.Module, dict[str, int]]:
        """The lab's network with these weights, and the ranks of its layers on the training images."""
        from orthokit.lab.networks.resnet import ResNet

        network = ResNet.from_checkpoint(saved)
        with needing("--data needs"):
            chosen = demo_images(self.root)()
        images = chosen.normalise(chosen.train.pixels)
        if (channels := network.conv.in_channels) != images.shape[1]:
            raise UsageError(f"{self.checkpoint} reads {channels} channels; the images of {self.data} have {images.shape[1]}")
        energy = 0.95 if self.energy is None else self.energy
        return network, ok.estimate(network, images.split(250), energy, where=where)


def _options(penalty: type) -> str:
    return re.sub(r"orthokit\.\w+\.(\w+\.)*|typing\.| -> None", "", str(inspect.signature(penalty)))
