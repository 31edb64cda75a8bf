"""Checks of a selection of layers: what it leaves out, what is odd about it, whether its layers are still the model's."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from orthokit.checks import warn_once
from orthokit.kernel import has_kernel, is_embedding, stored_sources
from orthokit.layers import Layer, layers_in
from orthokit.wrappers import named_modules

__all__ = ["Edge", "Unread", "check_places", "edges_to", "unread_parameters", "warn_of_selection"]


class Unread(NamedTuple):
    """Weights of a model that no kernel view reads.

    A weight is a parameter with at least two dimensions larger than 1; one with fewer is a vector.

    Attributes:
        parameters: pairs of name and tensor, in the model's order.
        kinds: how many there are of each kind, the largest kind first: ``{"in_proj_weight": 12, "pos_embed": 1}``.
        numbers: how many numbers they hold together.
        total: how many numbers all weights of the model hold.
    """

    parameters: tuple[tuple[str, Tensor], ...]
    kinds: dict[str, int]
    numbers: int
    total: int

    def __str__(self) -> str:
        """``not read: 12 in_proj_weight, 1 pos_embed (21.3 of 86.4 M weights)``; empty where all is read."""
        if not self.parameters:
            return ""
        parts = [f"{count} {kind}" for kind, count in self.kinds.items()]
        more = [f"{len(parts) - MOST} more kinds"] if len(parts) > MOST else []
        million = self.total >= 1e5
        numbers = f"{self.numbers / 1e6:.1f} of {self.total / 1e6:.1f} M" if million else f"{self.numbers:,} of {self.total:,}"
        return f"not read: {', '.join(parts[:MOST] + more)} ({numbers} weights)"


MOST = 5
"""Kinds of unread weights that a sentence names."""


def unread_parameters(model: nn.Module, layers: Iterable[Layer] = ()) -> Unread:
    """The weights of ``model`` that no kernel view reads: recurrent ones, stacks of experts, embeddings, whatever is not a layer.

    Layers that ``where=`` left out can be read, so they do not count. Embeddings count unless they are in ``layers``.

    >>> str(unread_parameters(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3))))
    'not read: 1 weight_ih_l0, 1 weight_hh_l0 (84 of 100 weights)'
    """
    modules = dict(named_modules(model))
    readable = [layer for path, m in modules.items() if has_kernel(m) and not is_embedding(m) for layer in layers_in(path, m)]
    read_ids = {id(parameter) for layer in [*readable, *layers] for parameter in _behind(layer)}
    weights: dict[int, tuple[str, str, Tensor]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if (
                parameter is None
                or isinstance(parameter, UninitializedParameter)
                or sum(size > 1 for size in parameter.shape) < 2
            ):
                continue
            kind = "embedding" if is_embedding(module) else f"{type(module).__name__}.{name}" if name == "weight" else name
            weights.setdefault(id(parameter), (f"{path}.{name}".lstrip("."), kind, parameter))
    unread = {key: entry for key, entry in weights.items() if key not in read_ids}
    sizes: Counter[str] = Counter()
    for _, kind, weight in unread.values():
        sizes[kind] += weight.numel()
    counts = Counter(kind for _, kind, _ in unread.values())
    return Unread(
        tuple((name, weight) for name, _, weight in unread.values()),
        {kind: counts[kind] for kind, _ in sizes.most_common()},
        sizes.total(),
        sum(weight.numel() for _, _, weight in weights.values()),
    )


def _behind(layer: Layer) -> tuple[Tensor, ...]:
    try:
        return stored_sources(layer.module, layer.weight)
    except (TypeError, ValueError):  # the layer cannot be read now: on the meta device, of integers, not yet initialised
        return tuple(layer.module.parameters())


def warn_of_selection(model: nn.Module, layers: Sequence[Layer], zero: Sequence[Layer]) -> None:
    """Warn once of layers that are all zero, of adapters that are selected without their base, and of word embeddings."""
    count = len(layers)
    if zero:
        warn_once(
            f"{len(zero)} of {count} selected layers are all zero ({_names_of(zero)}): the penalty moves their filters to "
            "length 1 as soon as they train; if they are to stay near zero, as ControlNet's zero convolutions or LoRA's B, "
            "leave them out with where=... & ~orthokit.zeros"
        )
    bases = [layer.name.removesuffix("base_layer") for layer in layers if layer.name.endswith(".base_layer") and layer.frozen]
    adapters = [layer for layer in layers if not layer.frozen and layer.name.startswith(tuple(bases))]
    if bases and adapters:
        warn_once(
            f"{len(bases)} of {count} selected layers are frozen base layers and do not count; {len(adapters)} are the adapters "
            f"beside them ({_names_of(adapters)}), and the penalty acts on these low-rank matrices by themselves, not on base "
            "plus adapter; leave them out with where=, or unfreeze the base layers"
        )
    entries = {id(p): path for path, m in named_modules(model) if is_embedding(m) for p in m.parameters(recurse=False)}
    trainable = [layer for layer in layers if not (is_embedding(layer.module) or layer.frozen)]
    sharers = [layer for layer in trainable if any(id(p) in entries for p in layer.sources)]
    if sharers:
        tables = sorted({entries[id(p)] for layer in sharers for p in layer.sources if id(p) in entries})
        warn_once(
            f"{len(sharers)} of {count} selected layers ({_names_of(sharers)}) have the weight of an embedding "
            f"({', '.join(tables)}), which the penalty then acts on, too; leave them out with where=... & ~orthokit.tied"
        )


def _names_of(layers: Sequence[Layer]) -> str:
    return ", ".join(repr(layer.name) for layer in layers[:3]) + (", ..." if len(layers) > 3 else "")


class Edge(NamedTuple):
    """An entry that leads from a model towards a selected layer: ``entries[name]`` is ``module``."""

    entries: Mapping[str, nn.Module | None]
    name: str
    module: nn.Module


def edges_to(model: nn.Module, layers: Sequence[Layer]) -> list[Edge]:
    """All entries on the ways from the model to the layers. While each still holds its module, no layer has moved."""
    leads: dict[nn.Module, bool] = {}
    targets = {layer.module for layer in layers}
    edges: list[Edge] = []

    def visit(module: nn.Module) -> bool:
        if module not in leads:
            leads[module] = module in targets
            for name, part in module._modules.items():
                if part is not None and visit(part):
                    edges.append(Edge(module._modules, name, part))
                    leads[module] = True
        return leads[module]

    visit(model)
    return edges


def check_places(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise ``ValueError`` for layers that are no longer in the model, or were moved in it and frozen."""
    now = {module: path for path, module in named_modules(model)}
    missing = [layer for layer in layers if layer.module not in now]
    strays = [layer for layer in layers if layer not in missing and layer.frozen and not _is_named(layer, now[layer.module])]
    if not missing and not strays:
        return
    inside = dict(named_modules(model))
    losses: Iterator[str] = (
        f"{layer.name!r} is now {type(inside[layer.name]).__name__}" if layer.name in inside else f"{layer.name!r} is gone"
        for layer in missing
    )
    moves = [f"{layer.name!r} is now {now[layer.module]!r}, frozen" for layer in strays]
    changes = [*losses, *moves]
    raise ValueError(
        f"the model has changed since this Regularizer was made: {', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''} "
        f"({len(changes)} of {len(layers)} layers). Make the Regularizer when the model is complete: after get_peft_model, after "
        "replacing layers"
    )


def _is_named(layer: Layer, path: str) -> bool:
    return any(layer.name in (each.name, type(layer.module).__name__) for each in layers_in(path, layer.module))
