"""The Kernel: a layer's weight seen as a batch of matrices, one filter per row."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from orthokit.gram import check_weight, whole


@dataclass(frozen=True, eq=False)
class Kernel:
    """A layer's weight as filters.

    Attributes:
        weight: ``(*batch, groups, o, i, *spatial)``: per group ``o`` filters, each reading ``i`` channels. A sharded one
            (a DTensor) is gathered.
        stride: one entry per spatial dimension; ``()`` for a linear layer.
        dilation: likewise; ``()`` is 1 everywhere.
        transposed: whether the layer is a transposed convolution. Then ``weight`` holds the filters of its output channels, and
            :attr:`convolution` the convolution that it is the adjoint of.
        rank: the transition dimension ``r`` that a relaxation policy chose (an integer, or one per leading dimension),
            or None where none was resolved. See :mod:`orthokit.relax`.

    >>> kernel_of(nn.Conv2d(6, 8, (3, 1), groups=2)).matrix.shape  # 2 groups of 4 filters with 3 * 3 * 1 weights
    torch.Size([2, 4, 9])
    """

    weight: Tensor
    stride: tuple[int, ...] = ()
    rank: int | Tensor | None = None
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    def __post_init__(self) -> None:
        check_weight(self.weight)
        object.__setattr__(self, "weight", whole(self.weight))
        if self.weight.ndim < 3 + len(self.stride):
            raise ValueError(
                f"a kernel with {len(self.stride)} spatial dimensions needs a weight (*batch, groups, o, i, *spatial); "
                f"got shape {tuple(self.weight.shape)}"
            )

    @property
    def matrix(self) -> Float[Tensor, "*batch_groups o n"]:
        """The matrices ``K``, ``(*batch, groups, o, n)`` with ``n = i * prod(spatial)``."""
        return self.weight.flatten(-1 - len(self.stride))

    @property
    def convolution(self) -> tuple[Tensor, tuple[int, ...]]:
        """The layer as a convolution operator: ``(*batch, groups, o, i, *spatial)``, and its stride counted in taps.

        A transposed convolution is read as its adjoint, the stored weight. A stride ``s`` with dilation ``d`` makes two outputs
        share taps only at shifts that are multiples of both: in taps, of ``s / gcd(s, d)``.
        """
        place = -1 - len(self.stride)
        weight = self.weight.transpose(place, place - 1) if self.transposed else self.weight
        dilation = self.dilation or (1,) * len(self.stride)
        return weight, tuple(s // math.gcd(s, d) for s, d in zip(self.stride, dilation, strict=True))

    @property
    def leading(self) -> torch.Size:
        """``(*batch, groups)``: the dimensions of which a measure gives one value each."""
        return self.weight.shape[: -2 - len(self.stride)]

    @property
    def groups(self) -> int:
        """Number of groups the layer is split into."""
        return self.leading[-1]

    @property
    def o(self) -> int:
        """Filters per group."""
        return self.weight.shape[-2 - len(self.stride)]

    @property
    def n(self) -> int:
        """Weights per filter."""
        return self.weight.shape[-1 - len(self.stride) :].numel()

    @property
    def layout(self) -> tuple[object, ...]:
        """What kernels must have in common to be stacked."""
        weight = self.weight
        return weight.shape, self.stride, self.dilation, self.transposed, weight.dtype, weight.device

    @staticmethod
    def stack(kernels: Sequence["Kernel"]) -> "Kernel":
        """Kernels of equal :attr:`layout` as one, along a new leading dimension."""
        first = kernels[0]
        rank = first.rank
        if any(not isinstance(kernel.rank, int) or kernel.rank != rank for kernel in kernels) and rank is not None:
            each = [torch.as_tensor(kernel.rank, device=kernel.weight.device).expand(kernel.leading) for kernel in kernels]
            rank = torch.stack(each)
        weight = torch.stack([kernel.weight for kernel in kernels]) if len(kernels) > 1 else first.weight.unsqueeze(0)
        return replace(first, weight=weight, rank=rank)


@functools.singledispatch
def kernel_of(layer: object) -> Kernel:
    """The :class:`Kernel` of a layer: its weight as it is now, gradients attached.

    Linear and Conv1d/2d/3d give one filter per output feature; ConvTranspose1d/2d/3d the filters of the *output* channels.
    A plain tensor ``(o, i, *spatial)`` is read as an ungrouped convolution of stride 1. Teach it a layer of your own with
    ``@orthokit.kernel_of.register``.

    Raises:
        TypeError: the layer has no kernel view, or its weights are sparse, complex, integer or on the meta device.

    >>> kernel_of(nn.Linear(5, 3)).matrix.shape
    torch.Size([1, 3, 5])
    """
    if isinstance(layer, type):
        raise TypeError(f"expected a layer, an instance; got the class {layer.__name__}")
    raise TypeError(
        f"{type(layer).__name__} has no kernel view; add one with @orthokit.kernel_of.register({type(layer).__name__})"
    )


@dataclass(frozen=True)
class View:
    """How a layer's weight ``(*batch, out, i, *spatial)`` is read as a kernel."""

    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    def kernel(self, weight: Tensor, rank: int | None = None) -> Kernel:
        """The kernel of one weight, or of a batch of them."""
        place = weight.ndim - 2 - len(self.stride)
        weight = weight.unflatten(place, (self.groups, -1))
        if self.transposed:
            weight = weight.transpose(place + 1, place + 2)
        return Kernel(weight, self.stride, rank, self.dilation, self.transposed)


@kernel_of.register
def _linear(layer: nn.Linear) -> Kernel:
    return View().kernel(weight_of(layer))


@kernel_of.register
def _convolution(layer: _ConvNd) -> Kernel:
    return _view(layer).kernel(weight_of(layer))


def _view(layer: _ConvNd) -> View:
    return View(layer.groups, tuple(layer.stride), tuple(layer.dilation), isinstance(layer, _ConvTransposeNd))


def plain_view(layer: nn.Module) -> View | None:
    """How :func:`kernel_of` reads the layer's weight; None for a layer that somebody else taught it to read."""
    reader = kernel_of.dispatch(type(layer))
    return View() if reader is _linear else _view(cast(_ConvNd, layer)) if reader is _convolution else None


def plain_weight(layer: nn.Module) -> nn.Parameter | None:
    """``layer.weight`` where it is a parameter as it is: not parametrized, pruned, normalised or sharded."""
    weight = layer._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and not hasattr(type(layer), "weight") else None


@kernel_of.register
def _tensor(weight: Tensor) -> Kernel:
    if weight.ndim < 2:
        raise ValueError(f"a weight needs at least two dimensions (o, i, *spatial); got shape {tuple(weight.shape)}")
    return Kernel(weight.unsqueeze(0), (1,) * (weight.ndim - 2))


def has_kernel(layer: object) -> bool:
    """Whether :func:`kernel_of` knows this kind of layer."""
    return kernel_of.dispatch(type(layer)) is not kernel_of.dispatch(object)


def weight_of(layer: nn.Module) -> Tensor:
    """``layer.weight`` fresh from its parameters, whatever computes it; reading changes nothing in the model.

    The old ``nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` refresh ``.weight`` only in the forward pass, and a
    spectral normalisation in training mode advances its power iteration whenever it is read: both are handled here.
    """
    if parametrize.is_parametrized(layer, "weight"):
        parametrization = cast(nn.ModuleDict, layer.parametrizations)["weight"]
        # Its own call rather than `layer.weight`, which would leave this reading in the cache of `parametrize.cached()`.
        sharded = {name: whole(part) for name, part in parametrization.named_parameters() if hasattr(part, "full_tensor")}
        with evaluating(parametrization):
            return cast(Tensor, functional_call(parametrization, sharded, ()) if sharded else parametrization())
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return cast(Tensor, hook.compute_weight(layer))
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            matrix = hook.reshape_weight_to_matrix(cast(Tensor, layer.weight_orig))
            # Copies: the next forward pass overwrites these vectors, perhaps before our backward pass.
            u, v = cast(Tensor, layer.weight_u).clone(), cast(Tensor, layer.weight_v).clone()
            return cast(Tensor, layer.weight_orig) / torch.dot(u, torch.mv(matrix, v))
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return cast(Tensor, hook.apply_mask(layer))
    weight = layer.weight
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f"{type(layer).__name__} has no weight yet; run one batch through the model first")
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of this {type(layer).__name__} is {weight!r}, not a tensor")
    return whole(weight)


def sources(layer: nn.Module, kernel: Kernel | None = None) -> tuple[Tensor, ...]:
    """The parameters from which a layer's kernel is computed: its weight, or what a parametrization makes it from.

    They are read off the graph of the kernel; pass it if it was read already. Where nothing asks for a gradient: the parameters
    with which it could.
    """
    with torch.enable_grad():
        if found := leaves((kernel or kernel_of(layer)).weight):
            return found
    own = layer._parameters.get("weight")
    if own is not None or isinstance(layer._buffers.get("weight"), Tensor):
        return () if own is None else (own,)
    return tuple(layer.parameters())


def leaves(value: Tensor) -> tuple[Tensor, ...]:
    """The tensors that ask for a gradient in the graph that computed ``value``, each once."""
    if value.grad_fn is None:
        return (value,) if value.requires_grad else ()
    found: dict[int, Tensor] = {}
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found[id(leaf)] = leaf
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return tuple(found.values())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, with each submodule's own mode restored."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


KernelMeasure = Callable[[Kernel], Tensor]
"""A measure: one value per leading dimension (batch and groups) of a kernel."""
