"""Which layers: predicates on (name, module), and the walk over a model that applies them."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel

from orthokit.checkpoint import modules_of
from orthokit.kernel import Kernel, has_kernel, kernel_of, sources

Where = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Predicate:
    """A choice of layers that combines with ``&``, ``|`` and ``~``; any ``(name, module) -> bool`` may stand beside it.

    >>> convs & ~stem
    (convs & ~stem)
    """

    name: str
    test: Where = field(repr=False)

    def __call__(self, name: str, module: nn.Module) -> bool:
        return self.test(name, module)

    def __and__(self, other: Where) -> "Predicate":
        _check_where(other)
        return Predicate(f"({self} & {_label(other)})", partial(_both, self, other))

    def __or__(self, other: Where) -> "Predicate":
        _check_where(other)
        return Predicate(f"({self} | {_label(other)})", partial(_either, self, other))

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        raise TypeError("combine predicates with & | ~; `and`, `or` and `not` would silently drop one")

    def __invert__(self) -> "Predicate":
        return Predicate(f"~{self}", partial(_other_than, self))

    def __repr__(self) -> str:
        return self.name


# Named functions rather than lambdas, which cannot be pickled.


def _both(first: Where, second: Where, name: str, module: nn.Module) -> bool:
    return first(name, module) and second(name, module)


def _either(first: Where, second: Where, name: str, module: nn.Module) -> bool:
    return first(name, module) or second(name, module)


def _other_than(where: Where, name: str, module: nn.Module) -> bool:
    return not where(name, module)


def _matches(patterns: tuple[str, ...], name: str, module: nn.Module) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_conv(name: str, module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def _is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _is_layer(name: str, module: nn.Module) -> bool:
    return has_kernel(module)


def _is_spatial(name: str, module: nn.Module) -> bool:
    return _taps(module) > 1


def _is_pointwise(name: str, module: nn.Module) -> bool:
    return _taps(module) == 1


def _check_where(where: object) -> None:
    if not callable(where):
        raise TypeError(f"where must be a predicate (name, module) -> bool such as orthokit.convs; got {where!r}")


def _label(where: Where) -> str:
    return repr(where) if isinstance(where, Predicate) else getattr(where, "__name__", repr(where))


def _taps(module: nn.Module) -> int:
    """Spatial positions of a convolution's kernel; 0 for anything else."""
    return math.prod(module.kernel_size) if isinstance(module, _ConvNd) else 0


def _reads_image(name: str, module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == 1 and module.in_channels <= 4 and _taps(module) > 1


def _is_depthwise(name: str, module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


convs = Predicate("convs", _is_conv)
"""Every convolution, transposed ones too."""
linears = Predicate("linears", _is_linear)
"""Every ``nn.Linear``."""
layers = Predicate("layers", _is_layer)
"""Every layer that has a kernel view, including those you registered."""
spatial = Predicate("spatial", _is_spatial)
"""Convolutions whose kernel is larger than one position."""
pointwise = Predicate("pointwise", _is_pointwise)
"""1x1 convolutions (of any dimension)."""
depthwise = Predicate("depthwise", _is_depthwise)
"""Convolutions with one group per input channel."""
stem = Predicate("stem", _reads_image)
"""Spatial convolutions that read an image: ungrouped, at most 4 input channels. Leave it out with ``convs & ~stem``."""


def _is_tall(name: str, module: nn.Module) -> bool:
    if not has_kernel(module):
        return False
    kernel = kernel_of(module)
    return kernel.o > kernel.n


def _is_zero(name: str, module: nn.Module) -> bool:
    return has_kernel(module) and not bool(kernel_of(module).weight.detach().any())


tall = Predicate("tall", _is_tall)
"""Layers with more filters than weights per filter (in each group): at most ``n`` of their filters can be mutually orthogonal.
Leave them out with ``convs & ~tall``."""
zeros = Predicate("zeros", _is_zero)
"""Layers whose weight is all zero now, such as ControlNet's zero convolutions or LoRA's B; ``convs & ~zeros`` leaves them out."""


def matching(*patterns: str) -> Predicate:
    """Layers (with a kernel view) whose dotted name matches one of the shell-style ``patterns``.

    >>> matching("layer1.*", "*.downsample.0")("layer1.0.conv1", nn.Conv2d(1, 1, 1))
    True
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"matching takes one or more patterns such as 'layer1.*'; got {patterns!r}")
    shown = ", ".join(map(repr, patterns))
    return Predicate(f"matching({shown})", partial(_matches, patterns))


class Layer(NamedTuple):
    """A selected layer: its dotted name in the model, and the module itself."""

    name: str
    module: nn.Module

    @property
    def kernel(self) -> Kernel:
        """Its kernel now; an error names the layer."""
        try:
            with torch.autocast(self.device.type, enabled=False):  # Note [full precision]
                return kernel_of(self.module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {self.name!r}: {error}") from None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers()), torch.empty(0)).device

    @property
    def frozen(self) -> bool:
        """Whether none of the parameters behind the kernel asks for a gradient."""
        return not any(parameter.requires_grad for parameter in sources(self.module))


def select(model: nn.Module | Mapping[str, Any], where: Where = convs) -> tuple[Layer, ...]:
    """The layers of ``model`` for which ``where(name, module)`` holds, in the model's order, tied weights once.

    DistributedDataParallel, DataParallel and ``torch.compile`` wrappers are looked through: names are those of the bare model.
    Of a state dict, or a checkpoint that holds one, the tensors named ``weight`` are read as Linear (two dimensions) or
    convolution (three to five); it does not record groups, strides or transposition, so these are taken as 1, 1 and no.

    Raises:
        TypeError: ``model`` is neither module nor mapping, ``where`` no callable, or a chosen layer has no kernel view.
        ValueError: no layer was chosen; the message counts what the model has.
    """
    _check_where(where)
    if isinstance(model, nn.Module):
        reshard(model)
        kind, modules = type(unwrap(model)).__name__, dict(unwrap(model).named_modules())
    elif isinstance(model, Mapping):
        kind, modules = "the state dict", modules_of(model)
    else:
        raise TypeError(f"expected a torch.nn.Module or a state dict; got {type(model).__name__}")
    chosen: dict[tuple[int, ...], Layer] = {}
    for name, module in modules.items():
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        # A compiled submodule is a shell: the module inside it comes next. Containers that a predicate matches are passed over;
        # a function of the caller's own that picks one without a kernel view is told so.
        if "_orig_mod" in module._modules or (isinstance(where, Predicate) and not has_kernel(module)):
            continue
        if where(name, module):
            layer = Layer(name or type(module).__name__, module)
            with torch.enable_grad():  # the parameters behind a kernel are read off its graph
                kernel = layer.kernel  # fails here, with the layer's name, rather than in the first step
            key = tuple(map(id, sources(module, kernel))) or (id(module),)
            chosen.setdefault(key, layer)
    if not chosen:
        found = Counter(type(module).__name__ for module in modules.values() if has_kernel(module))
        has = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no layer with a kernel view"
        raise ValueError(f"{_label(where)} selects no layer of {kind}, which has: {has}; pass another where=")
    return tuple(chosen.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def reshard(model: nn.Module) -> None:
    """Have FSDP2 (``fully_shard``) put its shards back where a forward pass has left gathered weights in the model.

    The gathered ones may be of lower precision, and a gradient that reached them would be averaged, or lost.

    Raises:
        TypeError: the model is in the first FSDP, ``FullyShardedDataParallel``.
    """
    # Nobody can have sharded the model who has not imported this.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise TypeError("FullyShardedDataParallel flattens the weights; use torch.distributed.fsdp.fully_shard")
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
