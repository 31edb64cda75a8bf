"""The Kernel: a layer's weight seen as a batch of matrices, one filter per row."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

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

from orthokit.constants import on_device
from orthokit.gram import check_weight, whole
from orthokit.in_use import computed_weight, is_overridden

__all__ = [
    "Kernel",
    "KernelMeasure",
    "View",
    "evaluating",
    "has_kernel",
    "is_embedding",
    "is_linear",
    "kernel_named",
    "kernel_of",
    "leaves",
    "plain_view",
    "plain_weight",
    "sources",
    "sqrt_filters",
    "stored_sources",
    "stored_weight",
    "views",
    "weight_of",
]


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
        axis = -1 - len(self.stride)
        weight = self.weight.transpose(axis, axis - 1) if self.transposed else self.weight
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
        """Properties that kernels must share to be stacked."""
        weight = self.weight
        return weight.shape, self.stride, self.dilation, self.transposed, weight.dtype, weight.device

    @staticmethod
    def stack(kernels: Sequence["Kernel"]) -> "Kernel":
        """Kernels of equal :attr:`layout` as one, along a new leading dimension."""
        first = kernels[0]
        rank = first.rank
        if any(not isinstance(kernel.rank, int) or kernel.rank != rank for kernel in kernels) and rank is not None:
            ranks = [on_device(cast(int, kernel.rank), first.weight.device) for kernel in kernels]
            rank = torch.stack([each.expand(first.leading) for each in ranks])
        weight = torch.stack([kernel.weight for kernel in kernels]) if len(kernels) > 1 else first.weight.unsqueeze(0)
        return replace(first, weight=weight, rank=rank)


def sqrt_filters(kernel: Kernel) -> float:
    """As ``scale=``: the root of the layer's number of filters; the pull on each filter is then the same at every width."""
    return float((kernel.groups * kernel.o) ** 0.5)


@functools.singledispatch
def kernel_of(layer: object) -> Kernel:
    """The :class:`Kernel` of a layer: its weight as it is now, gradients attached.

    Linear and Conv1d/2d/3d give one filter per output feature; ConvTranspose1d/2d/3d the filters of the *output* channels;
    MultiheadAttention the query, key and value projections as three groups; an embedding its rows. A Linear or convolution whose
    class has a forward pass of its own is read as that pass uses it (weight standardisation, fake quantisation).
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
    """The reading of a layer's weight ``(*batch, out, i, *spatial)`` as a kernel; ``(*batch, in, o, *spatial)`` if transposed."""

    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    def kernel(self, weight: Tensor, rank: int | None = None) -> Kernel:
        """The kernel of one weight, or of a batch of them."""
        check_weight(weight)  # here already: a sparse one could not be reshaped
        axis = weight.ndim - 2 - len(self.stride)
        weight = weight.unflatten(axis, (self.groups, -1))
        if self.transposed:
            weight = weight.transpose(axis + 1, axis + 2)
        # Only a convolution has an adjoint; a matrix is just stored the other way round.
        return Kernel(weight, self.stride, rank, self.dilation, self.transposed and bool(self.stride))

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Groups, filters per group and weights per filter of a weight of this shape."""
        first, second, *spatial = shape
        o, i = (second, first // self.groups) if self.transposed else (first // self.groups, second)
        return self.groups, o, i * math.prod(spatial)


@functools.singledispatch
def _views(layer: object) -> dict[str, View]:
    """Readings of the weights of a layer of torch, by the name of the tensor."""
    return {}


@_views.register(nn.Linear)
@_views.register(nn.Embedding)
@_views.register(nn.EmbeddingBag)
def _one_matrix(layer: nn.Module) -> dict[str, View]:
    return {"weight": View()}


@_views.register
def _one_convolution(layer: _ConvNd) -> dict[str, View]:
    view = View(layer.groups, tuple(layer.stride), tuple(layer.dilation), isinstance(layer, _ConvTransposeNd))
    return {"weight": view}


@_views.register
def _three_projections(layer: nn.MultiheadAttention) -> dict[str, View]:
    packed_or_not = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    return {name: View(groups) for name, groups in packed_or_not.items() if getattr(layer, name, None) is not None}


def _read(layer: nn.Module) -> Kernel:
    """The kernel of a layer whose views are known."""
    names = list(_views(layer))
    if len(names) != 1:
        raise ValueError(
            f"this {type(layer).__name__} has {len(names)} weights that are kernels ({', '.join(names) or 'none'}); "
            "orthokit.layers gives each as a layer of its own"
        )
    return kernel_named(layer, names[0])


for _kind in (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag):
    kernel_of.register(_kind)(_read)


def _reader(kind: type) -> Callable[[Any], Kernel]:
    """The function that :func:`kernel_of` calls for this class."""
    reader = kernel_of.dispatch(kind)
    if reader is kernel_of.dispatch(object):
        # transformers' Conv1D, a Linear whose weight is stored (in, out), is known by its name: nothing is imported for it.
        for base in kind.__mro__:
            if base.__name__ == "Conv1D" and base.__module__.partition(".")[0] in ("transformers", "orthokit"):
                _views.register(base)(lambda layer: {"weight": View(transposed=True)})
                return kernel_of.register(base)(_read)
    return reader


def views(layer: object) -> dict[str, View]:
    """Readings of the weights of a layer, by the name of the tensor; empty where a user registered a reading."""
    return _views(layer) if _reader(type(layer)) is _read else {}


def kernel_named(layer: nn.Module, name: str, *, stored: bool = False) -> Kernel:
    """The kernel of the layer's weight ``name``, one of its :func:`views`; of a layer without views its only one.

    With ``stored`` the weight is the stored one, whatever the layer's forward pass makes of it.
    """
    view = views(layer).get(name)
    if view is None:
        return kernel_of(layer)
    return view.kernel(whole(stored_weight(layer, name)) if stored else weight_of(layer, name))


def plain_view(layer: nn.Module, name: str) -> View | None:
    """The reading of the weight; None where the forward pass computes another weight from it, or a user registered a reading."""
    view = views(layer).get(name)
    if view is None or not is_overridden(layer):
        return view
    return None if computed_weight(layer, stored_weight(layer, name)) is not None else view


def plain_weight(layer: nn.Module, name: str) -> nn.Parameter | None:
    """The weight where it is a parameter as it is: not parametrized, pruned, normalised or sharded."""
    weight = layer._parameters.get(name)
    return weight if type(weight) is nn.Parameter and not hasattr(type(layer), name) else None


@kernel_of.register
def _tensor(weight: Tensor) -> Kernel:
    check_weight(weight)
    if weight.ndim < 2:
        raise ValueError(f"a weight needs at least two dimensions (o, i, *spatial); got shape {tuple(weight.shape)}")
    return Kernel(weight.unsqueeze(0), (1,) * (weight.ndim - 2))


def has_kernel(layer: object) -> bool:
    """Whether :func:`kernel_of` knows this kind of layer."""
    reader = _reader(type(layer))
    return bool(_views(layer)) if reader is _read else reader is not kernel_of.dispatch(object)


def is_embedding(layer: object) -> bool:
    """Whether the layer looks up rows of its weight."""
    return isinstance(layer, (nn.Embedding, nn.EmbeddingBag))


def is_linear(layer: object) -> bool:
    """Whether the layer multiplies with its weights: Linear, attention's projections, transformers' ``Conv1D``."""
    return not is_embedding(layer) and any(not view.stride for view in views(layer).values())


def weight_of(layer: nn.Module, name: str = "weight") -> Tensor:
    """The layer's weight fresh from its parameters, whatever computes it; reading changes nothing in the model.

    A Linear or convolution with a forward pass of its own is asked which weight it uses: see :mod:`orthokit.in_use`.
    """
    stored = stored_weight(layer, name)
    used = computed_weight(layer, stored) if is_overridden(layer) else None
    return whole(stored if used is None else used)


def stored_weight(layer: nn.Module, name: str) -> Tensor:
    """``layer.weight``, computed anew.

    The old ``nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` refresh ``.weight`` only in the forward pass, and a
    spectral normalisation in training mode advances its power iteration whenever it is read: both are handled here.
    """
    if parametrize.is_parametrized(layer, name):
        parametrization = cast(nn.ModuleDict, layer.parametrizations)[name]
        # Its own call rather than `layer.weight`, which would leave this reading in the cache of `parametrize.cached()`.
        sharded = {part: whole(value) for part, value in parametrization.named_parameters() if hasattr(value, "full_tensor")}
        with evaluating(parametrization):
            return cast(Tensor, functional_call(parametrization, sharded, ()) if sharded else parametrization())
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return cast(Tensor, hook.compute_weight(layer))
        if isinstance(hook, SpectralNorm) and hook.name == name:
            original, u, v = (cast(Tensor, getattr(layer, f"{name}_{part}")) for part in ("orig", "u", "v"))
            # Copies: the next forward pass overwrites these vectors, perhaps before our backward pass.
            u, v = u.clone(), v.clone()
            return original / torch.dot(u, torch.mv(hook.reshape_weight_to_matrix(original), v))
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return cast(Tensor, hook.apply_mask(layer))
    weight = getattr(layer, name)
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f"{type(layer).__name__} has no weight yet; run one batch through the model first")
    if not isinstance(weight, Tensor):
        raise TypeError(f"the {name} of this {type(layer).__name__} is {weight!r}, not a tensor")
    return weight


def sources(layer: nn.Module, name: str = "weight", kernel: Kernel | None = None) -> tuple[Tensor, ...]:
    """The parameters from which a layer's kernel is computed: its weight, or what a parametrization makes it from.

    They are read off the graph of the kernel; pass it if it was read already. Where nothing asks for a gradient: the parameters
    with which it could.
    """
    with torch.enable_grad():
        if kernel is not None:
            weight = kernel.weight
        else:
            weight = weight_of(layer, name) if name in views(layer) else kernel_of(layer).weight
    return _behind(weight, layer, name)


def stored_sources(layer: nn.Module, name: str = "weight") -> tuple[Tensor, ...]:
    """:func:`sources` of the stored weight, of which a forward pass of the layer's own may use another."""
    with torch.enable_grad():
        weight = whole(stored_weight(layer, name)) if name in views(layer) else kernel_of(layer).weight
    return _behind(weight, layer, name)


def _behind(weight: Tensor, layer: nn.Module, name: str) -> tuple[Tensor, ...]:
    if parameters := leaves(weight):
        return parameters
    own = layer._parameters.get(name)
    if own is not None or isinstance(layer._buffers.get(name), Tensor):
        return () if own is None else (own,)
    return tuple(layer.parameters())


def leaves(value: Tensor) -> tuple[Tensor, ...]:
    """The tensors that ask for a gradient in the graph that computed ``value``, each once."""
    if value.grad_fn is None:
        return (value,) if value.requires_grad else ()
    tensors: dict[int, Tensor] = {}
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            tensors[id(leaf)] = leaf
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return tuple(tensors.values())


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
