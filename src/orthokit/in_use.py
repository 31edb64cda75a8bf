"""The weight that a layer's forward pass uses, where a subclass may compute it there (weight standardisation, fake quantisation).

The forward pass itself is asked: a copy of the layer runs on a tiny input of zeros, and the weight that reaches torch's
convolution or linear function is the weight in use, with its graph. So no list of classes is needed, and a harmless override
(padding, casting, a branch beside) is told from one that uses another weight.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

__all__ = ["Facts", "computed_weight", "is_overridden"]

METHODS = "forward", "_conv_forward"
TORCH = "torch.nn.modules.conv", "torch.nn.modules.linear"
WEIGHTED: frozenset[Any] = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
)
PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum"))


def is_overridden(layer: nn.Module) -> bool:
    """Whether anyone but torch wrote the forward pass of this Linear or convolution."""
    if not isinstance(layer, (nn.Linear, _ConvNd)):
        return False
    methods = [getattr(type(layer), name, None) for name in METHODS]
    return any(name in vars(layer) for name in METHODS) or any(
        method is not None and method.__module__ not in TORCH for method in methods
    )


class Facts:
    """Notes what the reading of a layer's weight depends on, to see cheaply at each call whether that has changed.

    Of any layer: its class, stride, dilation, groups and a forward pass of the instance. Of one with a forward pass of its own
    also the attributes of it and its parts, what lists, dictionaries and plain objects among them hold, and how often each
    buffer was changed in place.
    """

    def __init__(self, layer: nn.Module) -> None:
        parts = [*layer.modules()] if is_overridden(layer) else []
        values = [
            value for part in parts for name, value in vars(part).items() if name != "_parameters" and type(value) not in ATOMS
        ]
        self.layer, self.own = layer, _own_facts(layer)
        # Not their dictionaries: a copy of this would not have those of the copied layer.
        self.objects = [*parts, *(value for value in values if _is_plain_object(value))]
        self.tables = [value for value in values if type(value) is dict]
        self.lists = [value for value in values if type(value) is list]
        self.buffers = [part._buffers for part in parts if part._buffers]
        self.all = self._read()

    def are_stale(self) -> bool:
        """Whether any of them has changed."""
        if _own_facts(self.layer) != self.own:
            return True
        if not self.objects:
            return False
        try:
            return self._read() != self.all
        except (RuntimeError, ValueError):  # other tensors or arrays, of which nobody knows whether they are equal
            return True

    def _read(self) -> list[object]:
        facts: list[object] = []
        for each in self.objects:
            facts += vars(each).values()
        for table in self.tables:
            facts += table.values()
        for values in self.lists:
            facts += values
        for buffers in self.buffers:
            facts += [tensor._version for tensor in buffers.values() if tensor is not None and not tensor.is_inference()]
        return facts


def _own_facts(layer: nn.Module) -> tuple[object, ...]:
    get = layer.__dict__.get
    return type(layer), get("forward"), get("_conv_forward"), get("stride"), get("dilation"), get("groups")


def _is_plain_object(value: object) -> bool:
    return not isinstance(value, (nn.Module, type)) and type(getattr(value, "__dict__", None)) is dict


def computed_weight(layer: nn.Module, stored: Tensor) -> Tensor | None:
    """The weight that the forward pass computes from ``stored``, the layer's weight; None where ``stored`` is used as it is.

    The layer is left as it was. The copy has its own parameters and buffers, through which gradients reach the layer's; modules
    that the layer holds, registered or not, are copied likewise, and so are its lists, dictionaries and sets. torch's random
    numbers start from one seed, the same at each call, and go on afterwards as if nothing had happened. Not protected are other
    objects that the layer holds, tensors in its lists, and the generators of Python and NumPy.

    Raises:
        TypeError: the forward pass cannot be followed; the message says how to register the layer.
    """
    twin: Any = _twin(layer)
    if "weight" in vars(layer):  # set by the old `weight_norm` in its hook, perhaps long ago
        vars(twin)["weight"] = stored
    watch = _Watch(twin.weight)
    reason = "no convolution or linear function of torch gets a weight of that shape"
    try:
        with _repeatable(stored.device), watch:
            twin.forward(_tiny_input(layer, stored))
    except Exception as error:  # a forward pass can fail in any way
        if not watch.weights:
            reason = f"on an input of zeros it fails with {type(error).__name__}: {str(error).partition(chr(10))[0]:.120}"
    weights = [weight for weight in watch.weights if weight.shape == stored.shape]
    if weights and all(_is_same(weight, weights[0]) for weight in weights):
        return None if any(_is_same(weights[0], candidate) for candidate in (twin.weight, stored)) else weights[0]
    if not weights and watch.is_multiplied:
        return None
    name = type(layer).__name__
    if weights:
        reason = f"it uses {len(weights)} different ones"
    raise TypeError(
        f"{name} has a forward pass of its own, and which weight it uses could not be read off: {reason}. Say how to read it "
        f"with @orthokit.kernel_of.register({name}), or leave it out with where="
    )


class _Watch(TorchFunctionMode):
    """Notes the weights that torch's convolution and linear functions get, and whether ``weight`` is multiplied as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.is_multiplied = weight, False
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHTED:
            self.weights.append(args[1] if len(args) > 1 else kwargs["weight"])
            with torch.no_grad():
                return func(*args, **kwargs)
        if getattr(func, "__name__", "") in PRODUCTS:
            tensors = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
            self.is_multiplied |= any(isinstance(each, Tensor) and _shares(each, self.weight) for each in tensors)
        return func(*args, **kwargs)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and torch's generators as they were afterwards."""
    generators: list[torch.Generator] = []
    if not torch.compiler.is_compiling():  # compiled code knows no generators
        generators.append(torch.default_generator)
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _twin(module: nn.Module, twins: dict[int, Any] | None = None) -> nn.Module:
    """A copy in evaluation mode whose tensors are computed from the module's; ``twins`` are by the ``id`` of the original."""
    twins = {} if twins is None else twins
    twin = twins[id(module)] = type(module).__new__(type(module))  # `copy` would ask __getstate__: parametrized modules refuse
    own = vars(module)
    vars(twin).update(own)
    vars(twin).update({name: _copy(value, twins) for name, value in own.items() if type(value) not in ATOMS})
    for kind in ("_parameters", "_buffers"):
        vars(twin)[kind] = {name: tensor if tensor is None else tensor.clone() for name, tensor in own[kind].items()}
    vars(twin)["training"] = False
    return twin


ATOMS: frozenset[type] = frozenset((bool, int, float, str, type(None), OrderedDict, Tensor, nn.Parameter))
"""Types of attributes that a twin shares with its module: what does not change, tensors, and torch's tables of hooks."""


def _copy(value: Any, twins: dict[int, Any]) -> Any:
    """A module's twin, a container of copies; anything else itself."""
    if id(value) in twins:
        return twins[id(value)]
    if isinstance(value, nn.Module) and "_parameters" in vars(value):  # one of TorchScript keeps its tensors elsewhere
        return _twin(value, twins)
    if type(value) not in (list, tuple, set, dict):
        return value
    if ATOMS.issuperset(map(type, value.values() if type(value) is dict else value)):
        return value if type(value) is tuple else value.copy()
    twins[id(value)] = value  # so that one that holds itself comes to an end
    if type(value) is dict:
        return {key: _copy(each, twins) for key, each in value.items()}
    return type(value)([_copy(each, twins) for each in value])


def _tiny_input(layer: nn.Module, weight: Tensor) -> Tensor:
    size: tuple[int, ...] = (1, layer.in_features) if isinstance(layer, nn.Linear) else ()
    if isinstance(layer, _ConvNd):
        # One position of the kernel, and more than a reflecting padding can reflect.
        padding = max(layer.padding) if isinstance(layer.padding, tuple) else 0
        taps = [max(d * (k - 1), padding) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        size = 1, layer.in_channels, *taps
    return torch.zeros(size, dtype=weight.dtype, device=weight.device)


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, all of them."""
    if torch.compiler.is_compiling():  # compiled code knows no storages
        return one is other
    return one.numel() == other.numel() and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.stride() == other.stride() and _shares(one, other))
