"""Layers concluded from the shapes, biases and neighbours in a state dict, which records names and tensors only."""

import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from orthokit.checkpoint.pickles import plain_name

__all__ = ["Conv1D", "Reading", "Unit", "natural", "some"]


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sorting key with which ``blocks.2`` comes before ``blocks.10``.

    >>> sorted(["b.10", "b.9.x", "b.9", "a"], key=natural)
    ['a', 'b.9', 'b.9.x', 'b.10']
    """
    parts = re.split(r"(\d{1,18}|\.)", name)
    return tuple((0, int(part), "") if part.isdecimal() and part.isascii() else (part != ".", 0, part) for part in parts if part)


@dataclass
class Unit:
    """The entries of one module.

    Attributes:
        out: channels that the module gives, where known; the size of a normalisation.
    """

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    out: int | None = None

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def words(self) -> set[str]:
        """The words that the last part of the name is made of."""
        last = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name.rpartition(".")[2])
        return set(last.lower().split("_"))

    @property
    def taps(self) -> int:
        """Positions of the kernel of a layer: 1 of a matrix; 0 of a normalisation."""
        weight = self.weight
        return 0 if weight is None or weight.ndim < 2 else weight.shape[2:].numel()

    def reads(self, channels: int) -> bool:
        """Whether the filters of the layer read so many channels."""
        return self.weight is not None and self.weight.ndim > 1 and self.weight.shape[1] == channels

    @property
    def pattern(self) -> str:
        """The name with its last number left out; empty where it has none."""
        parts = self.name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        return ".".join([*parts[: numbers[-1]], "#", *parts[numbers[-1] + 1 :]]) if numbers else ""

    @property
    def bias(self) -> int | None:
        bias = self.parts.get("bias")
        return len(bias) if bias is not None and bias.ndim == 1 else None

    def is_norm(self, weight: Tensor) -> bool:
        """Whether a weight of several dimensions is a normalisation's: its bias has the same shape."""
        bias = self.parts.get("bias")
        same = bias is not None and bias.shape == weight.shape
        return same or "running_mean" in self.parts or bool(self.words & {"norm", "ln", "layernorm", "groupnorm", "rmsnorm"})


_EMBEDDINGS = {"wte", "wpe", "shared", "emb", "embs", "embd", "embed", "embeds", "embedding", "embeddings"}
_NOT_EMBEDDINGS = {"out", "output", "proj", "projection", "linear", "fc", "head", "norm", "layer", "mlp", "patch"}
_UPWARD = {"up", "ups", "deconv", "upconv", "convt", "transpose", "transposed", "convtranspose", "conv2dtranspose"}


NEAR = 50
"""Number of units before and after another that are compared with it."""


def _is_sorted(names: list[str]) -> bool:
    """Whether the names are in the order of the alphabet where a model's would hardly be: then neighbours mean little."""
    pairs = set()
    for one, two in itertools.pairwise(names):
        a, b = next((pair for pair in zip(one.split("."), two.split("."), strict=False) if pair[0] != pair[1]), ("", ""))
        if (bare := tuple(re.sub(r"\d+", "", part) for part in (a, b)))[0] != bare[1] and all(bare):
            pairs.add((a, b))
    return len(pairs) > 1 and all(natural(a) < natural(b) for a, b in pairs)


def _is_squeeze(one: Unit, two: Unit) -> bool:
    """Whether the second layer undoes the first, as in squeeze and excitation: nothing else reads the channels between."""
    a, b = one.weight, two.weight
    if a is None or b is None or one.parent != two.parent or a.ndim < 2 or b.ndim != a.ndim:
        return False
    return a.shape[:2] == b.shape[:2][::-1] and a.shape[2:].numel() == b.shape[2:].numel() == 1 and len(a) < len(b)


class Reading:
    """Conclusions from the sizes in a state dict, unit after unit in its order."""

    def __init__(self, units: list[Unit]) -> None:
        self.sequence = [unit for unit in units if unit.weight is not None]
        self.index = {id(unit): index for index, unit in enumerate(self.sequence)}
        self.parameters: dict[tuple[int, torch.Size], nn.Parameter] = {}
        self.is_sorted = _is_sorted([unit.name for unit in self.sequence])
        self.squeezes = {id(one) for one, two in itertools.pairwise(self.sequence) if _is_squeeze(one, two)}
        self.channels = {len(unit.weight) for unit in self.sequence if unit.weight is not None and id(unit) not in self.squeezes}
        self.single = [unit for unit in self.sequence if self._is_spatial(unit, 1)]
        self.image = any(self._is_spatial(unit, 3) for unit in self.sequence)
        self.attention = {unit.name for unit in units if {"in_proj_weight", "q_proj_weight"} & unit.parts.keys()}
        self.conv1d = any(self._is_conv1d(unit) for unit in self.sequence)
        self.channels_so_far: set[int] = set()  # channels that the units so far give
        self.upward: set[str] = set()  # modules with transposed convolutions
        self.sure: set[tuple[str, int]] = set()
        self.guesses: dict[str, list[str]] = {"grouped": [], "transposed": [], "Conv1D": [], "undecided": []}

    @staticmethod
    def _is_spatial(unit: Unit, channels: int) -> bool:
        """Whether the unit is a convolution of more than one position whose filters read so many channels."""
        return unit.taps > 1 and unit.reads(channels)

    @staticmethod
    def _is_conv1d(unit: Unit) -> bool:
        weight = unit.weight
        return weight is not None and weight.ndim == 2 and unit.bias == weight.shape[1] != weight.shape[0]

    def module(self, unit: Unit) -> nn.Module | None:
        """The layer, with its weight; None for a normalisation, and for what is not a layer."""
        module = self._module(unit)
        if unit.out is not None and id(unit) not in self.squeezes:
            self.channels_so_far.add(unit.out)
        return module

    def _module(self, unit: Unit) -> nn.Module | None:
        weight = unit.weight
        if weight is None:
            return self._attention(unit)
        if weight.ndim == 1 or unit.is_norm(weight):
            unit.out = weight.numel() if weight.ndim == 1 else weight.shape[0]
            return None
        if not 2 <= weight.ndim <= 5 or (weight.ndim > 2 and "experts" in unit.name.split(".")):
            return None
        module = self._matrix(unit, weight) if weight.ndim == 2 else self._convolution(unit, weight)
        # Tied entries share their storage. That of a sharded weight is not known, and its part in this process may be empty.
        identity = (weight.data_ptr() or id(weight), weight.shape)
        module.weight = self.parameters.setdefault(identity, nn.Parameter(weight, requires_grad=False))
        return module

    def _attention(self, unit: Unit) -> nn.Module | None:
        """Attention's projections, packed or not."""
        parts = {name: unit.parts.get(f"{name}_proj_weight") for name in ("in", "q", "k", "v")}
        joint, q, k, v = parts.values()
        if joint is not None and joint.ndim == 2 and joint.shape[0] == 3 * joint.shape[1]:
            module, names = nn.MultiheadAttention(joint.shape[1], 1, bias=False, device="meta"), ["in"]
        elif q is not None and k is not None and v is not None and q.ndim == k.ndim == v.ndim == 2:
            width, names = q.shape[0], ["q", "k", "v"]
            module = nn.MultiheadAttention(width, 1, bias=False, kdim=k.shape[1], vdim=v.shape[1], device="meta")
        else:
            return None
        module._modules.clear()  # its other projection is an entry of its own
        for name in ("in", "q", "k", "v"):
            weight = parts[name]
            parameter = nn.Parameter(weight, requires_grad=False) if name in names and weight is not None else None
            setattr(module, f"{name}_proj_weight", parameter)
        return module

    def _matrix(self, unit: Unit, weight: Tensor) -> nn.Module:
        o, i = weight.shape
        unit.out = o
        is_embedding, is_other = bool(unit.words & _EMBEDDINGS), bool(unit.words & _NOT_EMBEDDINGS)
        vocabulary = self.index[id(unit)] == 0 and o >= max(4096, 8 * i) and i >= 16
        if unit.bias is None and (
            ((is_embedding or vocabulary) and not is_other) or unit.name.endswith("relative_attention_bias")
        ):
            unit.out = i
            return nn.Embedding(o, i, device="meta")
        names = ("c_attn", "c_proj", "c_fc", "q_attn")
        if self._is_conv1d(unit) or (self.conv1d and o == i and unit.name.rpartition(".")[2] in names):
            unit.out = i
            self.guesses["Conv1D"].append(unit.name)
            return Conv1D(i)
        if unit.parent in self.attention and unit.name.endswith("out_proj"):
            return NonDynamicallyQuantizableLinear(i, o, bias=False, device="meta")
        return nn.Linear(i, o, bias=False, device="meta")

    def _convolution(self, unit: Unit, weight: Tensor) -> nn.Module:
        first, second, *size = weight.shape
        if (groups := self._transposed_groups(unit, first, second)) is not None:
            unit.out = second * groups
            self.guesses["transposed"].append(unit.name)
            self.upward.add(unit.parent)
            kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(size) - 1]
            return kind(first, second * groups, tuple(size), groups=groups, bias=False, device="meta")  # type: ignore[no-any-return]
        unit.out, groups = first, self._groups(unit, first, second, math.prod(size) > 1)
        if groups > 1:
            self.guesses["grouped"].append(unit.name)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
        return kind(second * groups, first, tuple(size), groups=groups, bias=False, device="meta")  # type: ignore[no-any-return]

    def _before(self, unit: Unit) -> int | None:
        """Channels that the unit before gives."""
        index = self.index[id(unit)]
        return self.sequence[index - 1].out if index else None

    def _transposed_groups(self, unit: Unit, first: int, second: int) -> int | None:
        """Groups of a transposed convolution ``(in, out / groups, ...)``; None of a convolution."""
        bias = unit.bias
        if bias is not None and bias != first:
            groups = bias // second
            return groups if groups and bias % second == 0 and first % groups == 0 else None
        if first == second:
            even = unit.taps % 2 == 0
            self.guesses["undecided"] += [unit.name] if even and not unit.words & _UPWARD else []
            return 1 if unit.words & _UPWARD else None
        if bias is not None:
            return None
        after = next(iter(self.sequence[self.index[id(unit)] + 1 :]), None)
        near = after is not None and after.parent.startswith(unit.parent.rpartition(".")[0])
        follows = (
            len(after.weight) if near and after is not None and after.weight is not None and after.weight.ndim == 1 else None
        )
        before = self._before(unit)
        if before == second or follows == first or self.is_sorted:
            return None
        if follows == second or (before == first and unit.parent in self.upward and follows is None):
            return 1
        return 1 if unit.words & _UPWARD and before == first else None

    def _groups(self, unit: Unit, o: int, i: int, spatial: bool) -> int:
        """Groups of a convolution ``(o, i, ...)``, from the channels that reach it."""
        before = self._before(unit)
        if i == 1 and spatial:
            return self._depthwise(unit, o, before)
        # Three channels are an image's.
        if before is None or before <= i or before % i or o % (before // i) or i == 3 or self._is_split(unit, i):
            return 1
        groups, earlier = before // i, self.sequence[max(0, self.index[id(unit)] - NEAR) : self.index[id(unit)]]
        home = next((h for h in (unit.parent, unit.parent.rpartition(".")[0]) if self._layers_in(h, earlier)), "")
        here = self._layers_in(home, earlier)
        if i in {other.out for other in here if other.out != before}:
            return 1
        widths = self.channels_so_far if spatial and not self.is_sorted else self.channels
        follows = bool(here) and here[-1].out == before and not here[-1].reads(i) and (home == unit.parent or not self.is_sorted)
        separable = not self.is_sorted and bool(here) and here[-1].reads(1) and here[-1].parent == unit.parent
        follows_on = follows and (here[-1].taps == 1 if spatial else separable)
        if o < before:  # rather some of the channels
            self.guesses["undecided"] += [unit.name] if spatial and i not in widths else []
            return 1
        if i not in widths or follows_on or (spatial and {("groups", groups), ("width", i)} & self.sure):
            self.sure |= {("groups", groups), ("width", i)}
            return groups
        if spatial:
            self.guesses["undecided"].append(unit.name)
        return 1

    @staticmethod
    def _layers_in(home: str, units: list[Unit]) -> list[Unit]:
        """The layers among the units that are inside a module."""
        return [unit for unit in units if unit.taps and (not home or unit.name.startswith(f"{home}."))]

    def _is_split(self, unit: Unit, i: int) -> bool:
        """Whether the unit is one of several in parallel, ``x.0``, ``x.1``, that share the channels out among them."""
        key, index = unit.pattern, self.index[id(unit)]
        if not key:
            return False
        low, high = max(0, index - NEAR), min(len(self.sequence), index + NEAR)
        first, last = index, index + 1
        while first > low and (not self.sequence[first - 1].taps or self.sequence[first - 1].pattern == key):
            first -= 1
        while last < high and (not self.sequence[last].taps or self.sequence[last].pattern == key):
            last += 1
        run = [other.weight.shape[1] for other in self.sequence[first:last] if other.taps and other.weight is not None]
        return len(run) > 1 and sum(run) == (self.sequence[first - 1].out if first else None)

    def _depthwise(self, unit: Unit, o: int, before: int | None) -> int:
        """Groups of a convolution whose filters read one channel: the first of a network may read grey images."""
        alone = len(self.single) == 1 and not self.image
        if o == 1 or before == 1 or (alone and (before is None or self.is_sorted)):
            return 1
        if before is None and not self.image and unit is self.single[0]:
            self.guesses["undecided"].append(unit.name)
            return 1
        if before is None or self.is_sorted or o % before or before == o:
            return o
        if unit.parent == self.sequence[self.index[id(unit)] - 1].parent:
            return before
        self.guesses["undecided"].append(unit.name)
        return o

    def notes(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """The conclusions, one a line."""
        notes = []
        if any(isinstance(module, nn.modules.conv._ConvNd) for module in modules.values()):
            notes.append(
                "a state dict does not record groups, strides or dilation; where sizes do not tell, a weight is read as ungrouped"
            )
        for kind, names in self.guesses.items():
            remark = f"read as {kind} by their sizes"
            if kind == "undecided":
                remark = "groups or transposition are not told by sizes and perhaps misread"
            if names:
                notes.append(f"{remark}: {some(names)}")
        return notes


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is ``(in, out)``; named as the one in transformers."""

    weight: nn.Parameter

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.nf = nf


def some(names: Collection[str], most: int = 4) -> str:
    """The first names, printable, and how many more there are."""
    first = ", ".join(map(plain_name, itertools.islice(names, most)))
    return first + (f" and {len(names) - most} more" if len(names) > most else "")
