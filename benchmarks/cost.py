"""What each penalty costs over all convolutions of four networks, against a floor: time, memory, share of a training step.

The floor is the least anybody could do: layer by layer the smaller Gram matrix and one product, ``G = K K^T``,
``dK = 4 (G - I) K``, without autograd, nothing checked, nothing added up. Beside it, for each penalty, ``add_grad_()``,
``ortho().backward()``, and the plain loop of ``plain.py``, whose value and gradient are checked to be the same. All take turns in
an order that rotates, each against the floor beside it; medians and quartiles.

Peak memory is what PyTorch's allocator holds at most, above what it held before. The share of a training step is that of
``add_grad_()`` in a step of 128 images of 32x32 (bfloat16 autocast, channels_last, SGD with momentum), the penalty included.

    python benchmarks/cost.py                                          # make bench; wants an idle machine, and about an hour
    python benchmarks/cost.py --networks resnet110 --penalties SO strict --no-step
    python benchmarks/cost.py --draw benchmarks/cost.json cost.svg     # a picture of what was found
    python benchmarks/cost.py --markdown benchmarks/cost.json          # tables of it
"""

import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tyro
from plain import ARMS, TENTH
from rich.console import Console
from rich.progress import Progress
from shown import EVERY, WAYS, picture, table, tables
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import orthokit as ok
from orthokit.checks import check_choice
from orthokit.lab.networks.registry import build
from orthokit.lab.training.hardware import Hardware, environment

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("ResNet-20", {"kind": "resnet", "depth": 20}),
    "resnet110": ("ResNet-110", {"kind": "resnet", "depth": 110}),
    "resnet18": ("ResNet-18", {"kind": "imagenet_resnet", "depth": 18}),
    "wrn28-10": ("WRN-28-10", {"kind": "wide_resnet", "depth": 28, "width": 10}),
    "resnet50": ("ResNet-50", {"kind": "imagenet_resnet", "depth": 50}),
}
STRENGTH, BATCH, MOST = 0.1, 128, 200
OUT = Path(__file__).with_name("cost.json")
T = TypeVar("T")


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1])) / 1000


def peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds, above what was held before."""
    if device.type == "cuda":
        call()  # a library's own workspace is there from now on
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(0, int(np.cumsum([0, *(event.nbytes() for event in events)]).max()))


def backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high, "n": len(values)}


def rotated(items: Sequence[T], by: int) -> list[T]:
    by %= len(items)
    return [*items[by:], *items[:by]]


class Bench:
    """A network on a device, and what is measured of it."""

    def __init__(self, options: Mapping[str, Any], device: torch.device, names: Sequence[str], seconds: float) -> None:
        torch.manual_seed(0)
        self.device, self.names, self.seconds = device, names, seconds
        self.network = build(**options, channels=3, classes=10).to(device)
        self.layers = [layer for layer in self.network.modules() if isinstance(layer, nn.Conv2d)]
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name in names:
            ortho = ok.Regularizer(self.network, ARMS[name].penalty, strength=STRENGTH)
            self.calls[name, "add_grad_"] = ortho.add_grad_
            self.calls[name, "loss"] = partial(backward, ortho)
            self.calls[name, "plain"] = partial(backward, partial(self.plain, name))

    def plain(self, name: str) -> Tensor:
        arm, total = ARMS[name], torch.zeros((), device=self.device)
        for layer in self.layers:
            w = layer.weight
            total = total + (arm.plain(w, layer.stride[0]) if arm.convolution else arm.plain(w.flatten(1)))
        return STRENGTH * total

    def check(self, name: str) -> None:
        """Raise ``AssertionError`` unless the plain loop has the library's value and gradient."""
        found = []
        for total in (self.calls[name, "add_grad_"], partial(self.plain, name)):
            self.network.zero_grad(set_to_none=False)
            value: Any = total()
            if value.requires_grad:
                value.backward()
            gradients = [layer.weight.grad.flatten() for layer in self.layers if layer.weight.grad is not None]
            found.append((float(value.detach()), torch.cat(gradients)))
        (value, ours), (other, theirs) = found
        if not math.isclose(value, other, rel_tol=1e-3) or (ours - theirs).norm() > 1e-2 * theirs.norm():
            raise AssertionError(f"{name}: the plain loop gives {other:g}, the library {value:g}, or their gradients differ")

    @torch.no_grad()
    def floor(self) -> None:
        for layer in self.layers:
            k = layer.weight.flatten(1)
            wide = k.shape[0] <= k.shape[1]
            gram = k @ k.T if wide else k.T @ k
            gram.diagonal().sub_(1)
            gram.mul_(4)
            _ = gram @ k if wide else k @ gram

    def costs(self, progress: Progress) -> dict[str, Any]:
        """Times, their ratios to the floor, and peak memory: of each penalty, each way."""
        memory, rounds = {}, {}
        with torch.autocast(self.device.type, torch.bfloat16):  # memory is then handed out as it is amid training
            self.network(torch.randn(BATCH, 3, 32, 32, device=self.device)).square().mean().backward()
        waiting = progress.add_task("memory", total=len(self.calls))
        for key, call in self.calls.items():
            if key[1] == "add_grad_":
                self.check(key[0])
            begin = time.perf_counter()
            memory[key] = peak(call, self.device)
            once = time.perf_counter() - begin
            once = once if once > 1 else clock(call, self.device)  # the look at memory takes time of its own
            least = 5 if once < 2 else 2 if key[1] == "plain" else 3
            rounds[key] = min(MOST, max(least, int(self.seconds / len(self.calls) / once)))
            progress.advance(waiting)
        progress.update(waiting, description="time  ", total=sum(rounds.values()), completed=0)
        floors: list[float] = []
        times: dict[tuple[str, str], list[float]] = {key: [] for key in self.calls}
        ratios: dict[tuple[str, str], list[float]] = {key: [] for key in self.calls}
        for k in range(max(rounds.values())):
            for name in rotated(self.names, k):
                keys = [(name, way) for way in WAYS if k < rounds[name, way]]
                if keys:
                    taken = {key: clock(self.calls.get(key, self.floor), self.device) for key in rotated([("", ""), *keys], k)}
                    floors.append(taken["", ""])
                for key in keys:
                    times[key].append(taken[key])
                    ratios[key].append(taken[key] / floors[-1])
                    progress.advance(waiting)
        progress.remove_task(waiting)
        layer, stack = self.bounds()
        found = {
            name: {
                way: {
                    "seconds": spread(times[name, way]),
                    "over_floor": spread(ratios[name, way]),
                    "extra_mib": memory[name, way] / 2**20,
                    "extra_over_layer": memory[name, way] / layer,
                    "extra_over_stack": memory[name, way] / stack,
                }
                for way in WAYS
            }
            for name in self.names
        }
        sizes = {"layers": len(self.layers), "layer_mib": layer / 2**20, "stack_mib": stack / 2**20}
        return sizes | {"floor": spread(floors), "penalties": found}

    def bounds(self) -> tuple[int, int]:
        """Bytes of the weights and three of their smaller Gram matrices: the largest of a layer, of a stack of equal layers."""
        sizes = {(w := layer.weight).shape: 4 * (w.numel() + 3 * min(len(w), w[0].numel()) ** 2) for layer in self.layers}
        counts = Counter((layer.weight.shape, layer.stride) for layer in self.layers)
        return max(sizes.values()), max(count * sizes[shape] for (shape, _), count in counts.items())

    def shares(self, progress: Progress) -> dict[str, Any]:
        """Seconds of a training step without a penalty, and each penalty's share of one with it."""
        kind = self.device.type
        network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(BATCH, 3, 32, 32, device=self.device).to(memory_format=torch.channels_last)
        labels = torch.randint(10, (BATCH,), device=self.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(kind, torch.bfloat16):
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()

        regularizers = {
            (name, every): ok.Regularizer(network, ARMS[name].penalty, strength=STRENGTH, every=every)
            for name in self.names
            for every in (1, EVERY)
        }
        steps: list[float] = []
        shares: dict[tuple[str, int], list[float]] = {key: [] for key in regularizers}
        begin, k = time.perf_counter(), 0
        waiting = progress.add_task("step  ", total=None)
        while k < 4 or (k < MOST and time.perf_counter() - begin < self.seconds):
            steps.append(clock(step, self.device))
            for (name, every), ortho in rotated(list(regularizers.items()), k):
                taken = sum(clock(ortho.add_grad_, self.device) for _ in range(every)) / every
                shares[name, every].append(taken / (steps[-1] + taken))
            k += 1
        progress.remove_task(waiting)
        found: dict[str, Any] = {name: {} for name in self.names}
        for (name, every), values in shares.items():
            found[name][str(every)] = spread(values[1:])  # the first round warms up
        return {"seconds": spread(steps[1:]), "share": found}


def main(
    networks: tuple[str, ...] = ("resnet110", "resnet18", "wrn28-10", "resnet50"),
    penalties: tuple[str, ...] = tuple(ARMS),
    devices: tuple[str, ...] = ("cpu", *(["cuda"] * torch.cuda.is_available())),
    threads: int | None = None,
    seconds: float = 60.0,
    step: bool = True,
    out: Path = OUT,
    draw: tuple[Path, Path] | None = None,
    markdown: Path | None = None,
) -> None:
    """Measure what the penalties cost, or show what was measured.

    Args:
        networks: resnet20, resnet110, resnet18, wrn28-10, resnet50.
        penalties: by their names in ``plain.py``; SO-smaller is SO of the smaller side, and strict, pairs, welch and budget are
            forms of Disentangled, with a tenth of the pairs free.
        devices: cpu, cuda.
        threads: on the CPU; PyTorch's choice by default.
        seconds: for the times of a network, and as many for its steps; more where few rounds take longer.
        step: measure the share of a training step too.
        out: the file to write, after each network.
        draw: only draw the first file into the second (.svg, .png).
        markdown: only print this file as tables.
    """
    if draw is not None:
        picture(json.loads(draw[0].read_text("utf-8")), draw[1])
    if markdown is not None:
        print(tables(json.loads(markdown.read_text("utf-8"))))
    if draw is not None or markdown is not None:
        return
    for network in networks:
        check_choice("networks", network, NETWORKS)
    for penalty in penalties:
        check_choice("penalties", penalty, ARMS)
    for device in devices:
        check_choice("devices", device, ("cpu", "cuda"))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which tells of memory, tells of itself too
    warnings.filterwarnings("ignore", "form='pairs'")
    settings = {"strength": STRENGTH, "batch": BATCH, "relax": repr(TENTH), "seconds": seconds}
    results: dict[str, Any] = {"date": str(date.today()), "machine": {}, "settings": settings, "networks": {}}
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for device in devices:
        results["machine"][device] = environment(Hardware(device=device, threads=threads).fabric("32-true"))
        results["networks"][device] = {}
        for network in networks:
            title, options = NETWORKS[network]
            with Progress(console=console, transient=True) as progress:
                bench = Bench(options, torch.device(device), penalties, seconds)
                found = bench.costs(progress)
                if step:
                    found["step"] = bench.shares(progress)
            results["networks"][device][title] = found
            console.print(table(f"{title} on {device}", found))
            out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
