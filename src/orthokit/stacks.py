"""Layers that are measured together: parameters that are read alike, or kernels that are computed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthokit.kernel import Kernel, View
from orthokit.layers import Layer

__all__ = ["STACKED", "Computed", "Form", "Plain", "Reading", "Stack"]

STACKED = 2**21
"""Bytes up to which weights of one form are copied into one tensor for autograd: small enough for a core's cache, large enough
for products."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The reading of a weight and the transition dimension chosen for its shape; the same object for equal ones."""

    view: View
    rank: int | None
    shape: torch.Size | None


class Form(NamedTuple):
    """Properties that parameters share where they can be stacked."""

    reading: Reading
    size: torch.Size
    trains: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Plain:
    """Layers of one form whose weights are parameters as they are."""

    form: Form
    layers: list[Layer] = field(default_factory=list)
    weights: list[nn.Parameter] = field(default_factory=list)

    def part(self, which: slice) -> "Plain":
        """Some of the layers."""
        return Plain(self.form, self.layers[which], self.weights[which])

    def split(self) -> Iterator["Plain"]:
        """Stacks of at most :data:`STACKED` bytes, and of at least one layer."""
        many = max(1, STACKED // max(1, self.form.size.numel() * self.form.dtype.itemsize))
        yield from (self.part(slice(start, start + many)) for start in range(0, len(self.layers), many))

    def joined(self) -> Tensor:
        """The weights as one tensor, along a new first dimension."""
        return torch.stack(tuple(self.weights)) if len(self.weights) > 1 else self.weights[0].unsqueeze(0)

    def each(self) -> Iterator[Kernel]:
        """The kernel of each layer."""
        return (self.form.reading.view.kernel(weight, self.form.reading.rank) for weight in self.weights)

    def kernel(self, joined: Tensor | None = None) -> Kernel:
        """The kernels as one, whose weights are ``joined``."""
        reading = self.form.reading
        return reading.view.kernel(self.joined() if joined is None else joined, reading.rank)


@dataclass(frozen=True, eq=False)
class Computed:
    """Layers whose kernels are computed from parameters, and have one layout."""

    layers: list[Layer] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)

    def split(self) -> Iterator["Computed"]:
        """The whole stack: its kernels exist already."""
        yield self

    def each(self) -> Iterator[Kernel]:
        """The kernel of each layer."""
        return (replace(kernel, weight=kernel.weight.detach()) for kernel in self.kernels)

    def kernel(self) -> Kernel:
        """The kernels as one."""
        return Kernel.stack(self.kernels)


Stack = Plain | Computed
