"""Which layers: predicates on (name, module), and the walk over a model that applies them."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from orthokit.checkpoint.statedict import Layers, layers_of
from orthokit.checks import did_you_mean, warn_once
from orthokit.gram import outside_autocast
from orthokit.kernel import (
    Kernel,
    has_kernel,
    is_embedding,
    is_linear,
    kernel_named,
    sources,
    stored_sources,
    stored_weight,
    views,
)
from orthokit.wrappers import named_modules, reshard, unwrap

__all__ = [
    "Layer",
    "Predicate",
    "Where",
    "convs",
    "depthwise",
    "embeddings",
    "head",
    "layers",
    "layers_in",
    "linears",
    "matching",
    "pointwise",
    "select",
    "spatial",
    "stem",
    "tall",
    "tied",
    "zeros",
]

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
    return is_linear(module)


def _is_embedding(name: str, module: nn.Module) -> bool:
    return is_embedding(module)


def _is_layer(name: str, module: nn.Module) -> bool:
    return has_kernel(module) and not is_embedding(module)


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
"""Every ``nn.Linear``, ``nn.MultiheadAttention``'s projections, and transformers' ``Conv1D``."""
embeddings = Predicate("embeddings", _is_embedding)
"""Every ``nn.Embedding`` and ``nn.EmbeddingBag``: one filter per entry. Only this predicate, and names, select them."""
layers = Predicate("layers", _is_layer)
"""Every layer that has a kernel view, including those you registered; embeddings left out."""
spatial = Predicate("spatial", _is_spatial)
"""Convolutions whose kernel is larger than one position."""
pointwise = Predicate("pointwise", _is_pointwise)
"""1x1 convolutions (of any dimension)."""
depthwise = Predicate("depthwise", _is_depthwise)
"""Convolutions with one group per input channel."""
stem = Predicate("stem", _reads_image)
"""Spatial convolutions that read an image: ungrouped, at most 4 input channels. Leave it out with ``convs & ~stem``."""


def _is_tall(name: str, module: nn.Module) -> bool:
    return has_kernel(module) and _layer_named(name, module).is_tall


def _is_zero(name: str, module: nn.Module) -> bool:
    return has_kernel(module) and not bool(_layer_named(name, module).kernel.weight.detach().any())


def _is_tied(name: str, module: nn.Module) -> bool:
    return any(id(parameter) in _model().tied for parameter in module.parameters())


def _is_head(name: str, module: nn.Module) -> bool:
    return module in _model().heads


tall = Predicate("tall", _is_tall)
"""Layers with more filters than weights per filter (in each group): at most ``n`` of their filters can be mutually orthogonal.
Leave them out with ``convs & ~tall``."""
zeros = Predicate("zeros", _is_zero)
"""Layers whose weight is all zero now, such as ControlNet's zero convolutions or LoRA's B; ``convs & ~zeros`` leaves them out."""

tied = Predicate("tied", _is_tied)
"""Layers whose weight is also another module's, such as a language model's output layer that shares its word embedding."""
head = Predicate("head", _is_head)
"""The output layer: what the model's ``get_output_embeddings()`` (transformers) or ``get_classifier()`` (timm) gives, else the
last layer with a kernel view, in the model's order. Leave it out with ``linears & ~head``."""


def matching(*patterns: str) -> Predicate:
    """Choose layers (with a kernel view) whose dotted name matches one of the shell-style ``patterns``.

    Each pattern must match some layer of the model; the selection raises ``ValueError`` otherwise.

    >>> matching("layer1.*", "*.downsample.0")("layer1.0.conv1", nn.Conv2d(1, 1, 1))
    True
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"matching takes one or more patterns such as 'layer1.*'; got {patterns!r}")
    shown = ", ".join(map(repr, patterns))
    return Predicate(f"matching({shown})", partial(_matches, patterns))


class Layer(NamedTuple):
    """A selected layer: its dotted name in the model, the module itself, and which of its tensors is the weight.

    The name is the module's. A weight that is not called ``weight`` adds its own: ``attn.in_proj`` for ``attn.in_proj_weight``.
    """

    name: str
    module: nn.Module
    weight: str = "weight"

    @property
    def kernel(self) -> Kernel:
        """The layer's kernel as its weight is now; an error names the layer."""
        return self._kernel(stored=False)

    @property
    def stored(self) -> Kernel:
        """The kernel of the stored weight, of which a forward pass of the layer's own may use another."""
        return self._kernel(stored=True)

    def _kernel(self, *, stored: bool) -> Kernel:
        try:
            # Note [full precision]; autocast knows no meta device.
            with nullcontext() if self.device.type == "meta" else outside_autocast(self.device):
                return kernel_named(self.module, self.weight, stored=stored)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {self.name!r}: {error}") from None

    @property
    def size(self) -> tuple[int, int, int]:
        """Groups, filters per group, weights per filter; also on the meta device, where there is no kernel."""
        view = views(self.module).get(self.weight)
        if view is not None and self.device.type == "meta":
            return view.size(stored_weight(self.module, self.weight).shape)
        kernel = self.stored
        return kernel.groups, kernel.o, kernel.n

    @property
    def is_tall(self) -> bool:
        """Whether it has more filters than weights per filter."""
        _, o, n = self.size
        return o > n

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers()), torch.empty(0)).device

    @property
    def sources(self) -> tuple[torch.Tensor, ...]:
        """The parameters from which its kernel is computed."""
        return sources(self.module, self.weight)

    @property
    def frozen(self) -> bool:
        """Whether none of the parameters behind the kernel asks for a gradient."""
        return not any(parameter.requires_grad for parameter in self.sources)


def layers_in(path: str, module: nn.Module) -> Iterator[Layer]:
    """One layer for each weight of the module that is a kernel."""
    for weight in views(module) or ("weight",):
        own = [] if weight == "weight" else [weight.removesuffix("_weight")]
        yield Layer(".".join([path] * bool(path) + own), module, weight)


def _layer_named(name: str, module: nn.Module) -> Layer:
    """The one of the module's layers that has this name, which may be a longer one; else the first."""
    own = list(layers_in("", module))
    return next((layer for layer in own if layer.name and f".{name}".endswith(f".{layer.name}")), own[0])


class _Model:
    """Facts about the whole model, for predicates that look beyond one layer."""

    def __init__(self, bare: object, modules: Mapping[str, nn.Module]) -> None:
        self.bare, self.modules = bare, modules

    @cached_property
    def tied(self) -> set[int]:
        """The ids of parameters that several modules hold."""
        own = Counter(id(p) for module in set(self.modules.values()) for p in module._parameters.values() if p is not None)
        return {key for key, count in own.items() if count > 1}

    @cached_property
    def heads(self) -> set[nn.Module]:
        """The output layer, or the layers that it is made of."""
        for name in ("get_output_embeddings", "get_classifier"):
            try:
                output = getattr(self.bare, name)()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            parts = output if isinstance(output, (tuple, list)) else [output]
            if layers := {m for part in parts if isinstance(part, nn.Module) for m in part.modules() if has_kernel(m)}:
                return layers
        return set([module for module in self.modules.values() if has_kernel(module)][-1:])


_selecting: ContextVar[_Model] = ContextVar("the model in which layers are selected")


def _model() -> _Model:
    try:
        return _selecting.get()
    except LookupError:
        raise TypeError("the predicates `tied` and `head` look at a whole model; pass them as where=") from None


def select(model: nn.Module | Mapping[str, Any] | Layers, where: Where = convs) -> tuple[Layer, ...]:
    """The layers of ``model`` for which ``where(name, module)`` holds, in the model's order, tied weights once.

    Wrappers are looked through (DistributedDataParallel, ``torch.compile``, averaged models, Fabric, checkpointing): names are
    those of the bare model. On the meta device layers have a :attr:`Layer.size` but no kernel.
    Of a state dict, or a checkpoint that holds one, see :func:`orthokit.checkpoint.statedict.layers_of`: what it does not record
    is concluded from sizes and names.

    Raises:
        TypeError: ``model`` is neither module nor mapping, ``where`` no callable, or a chosen layer has no kernel view.
        ValueError: no layer was chosen, and the message counts what the model has; or a pattern of :func:`matching` matches none.
    """
    _check_where(where)
    if isinstance(model, nn.Module):
        reshard(model)
        bare: Any = unwrap(model)
        kind, modules = type(bare).__name__, dict(named_modules(model))
    elif isinstance(model, (Mapping, Layers)):
        bare, kind, modules = model, "the state dict", (model if isinstance(model, Layers) else layers_of(model)).modules
    else:
        raise TypeError(f"expected a torch.nn.Module or a state dict; got {type(model).__name__}")
    known = [layer for path, module in modules.items() if has_kernel(module) for layer in layers_in(path, module)]
    _check_patterns(where, [layer.name for layer in known])
    chosen: dict[tuple[int, ...], Layer] = {}
    token = _selecting.set(_Model(bare, modules))
    try:
        for path, module in modules.items():
            # Containers that a predicate matches are passed over; a function of the caller's own that picks one without a kernel
            # view is told so.
            if isinstance(where, Predicate) and not has_kernel(module):
                continue
            for layer in layers_in(path, module):
                if where(layer.name, module):
                    layer = layer if layer.name else layer._replace(name=type(module).__name__)
                    _ = layer.size  # fails here, with the layer's name, rather than in the first step
                    parameters = stored_sources(module, layer.weight)
                    chosen.setdefault(tuple(map(id, parameters)) or (id(module),), layer)
    finally:
        _selecting.reset(token)
    if not chosen:
        counts = Counter(type(layer.module).__name__ for layer in known)
        has = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no layer with a kernel view"
        raise ValueError(f"{_label(where)} selects no layer of {kind}, which has: {has}; pass another where=")
    if where is convs:
        _warn_of_few(len(chosen), [layer for layer in known if not is_embedding(layer.module)])
    return tuple(chosen.values())


FEW = 10
"""The default choice is told to be of next to nothing where it is less than one in so many layers."""


def _warn_of_few(count: int, known: list[Layer]) -> None:
    if FEW * count >= len(known):
        return
    others = Counter(type(layer.module).__name__ for layer in known if not _is_conv(layer.name, layer.module))
    shown = ", ".join(f"{number} {name}" for name, number in others.most_common(3))
    warn_once(
        f"convs, the default of where=, selects {count} of {len(known)} layers that have a kernel view and leaves out {shown}; "
        "pass where=orthokit.linears or where=orthokit.layers to select those"
    )


def _check_patterns(where: object, names: list[str]) -> None:
    """Raise ``ValueError`` if a pattern of :func:`matching`, anywhere in ``where``, matches none of the names."""
    for part in _parts(where):
        if part.func is _matches:
            for pattern in part.args[0]:
                if not any(fnmatchcase(name, pattern) for name in names):
                    hint = (
                        did_you_mean(pattern, names)
                        if len(names) <= FEW
                        else did_you_mean(pattern, names).partition("; there")[0]
                    )
                    raise ValueError(f"the pattern {pattern!r} of matching matches no layer with a kernel view{hint}")


def _parts(where: object) -> Iterator[partial[bool]]:
    test = where.test if isinstance(where, Predicate) else None
    if isinstance(test, partial):
        yield test
        for arg in test.args:
            yield from _parts(arg)
