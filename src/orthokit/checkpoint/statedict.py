"""State dicts as layers: which network of a checkpoint, its names, and what shapes and biases tell about each layer.

A state dict records names and tensors, not layers. Notes say what had to be concluded from sizes or names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.checkpoint.gaps import Gap
from orthokit.checkpoint.pickles import Thing, plain_name
from orthokit.checkpoint.shapes import Reading, Unit, natural, some
from orthokit.kernel import has_kernel, is_embedding

__all__ = ["Layers", "bare", "layers_of", "networks", "pick"]

LARGEST = 2**30
"""Most elements of a weight that is read: 8 GiB in float64."""
EXPANDED = 2**24
"""Most elements of a weight with fewer in memory: ``expand`` makes any number of elements of four bytes."""
DEEPEST = 64
"""Most mappings inside one another that are searched."""
COPIES = re.compile(r"(^|[._-])(ema|.*_ema|ema_.*|swa|averaged?|shadow|teacher|target|old|previous|momentum)", re.I)


# Which network


def networks(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """The state dicts in a checkpoint by the names that lead to them, joined by dots; the checkpoint itself is ``""``."""
    levels, visits, result = [("", checkpoint)], {id(checkpoint)}, {}
    for _ in range(DEEPEST):
        below: list[tuple[str, Any]] = []
        for path, mapping in levels:
            if any(_is_weight(key, value) for key, value in mapping.items()):
                result[path] = mapping
            for key, value in mapping.items():
                inner = value.entries if isinstance(value, Thing) else value
                if isinstance(inner, (list, tuple)):
                    inner = dict(enumerate(inner)) if any(isinstance(item, Mapping) for item in inner) else None
                if isinstance(inner, Mapping) and id(value) not in visits:
                    visits.add(id(value))
                    below.append((f"{path}.{key}" if path else str(key), inner))
        levels = below
    return result


def pick(checkpoint: Mapping[Any, Any], key: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """One network of a checkpoint, and a note that names the others.

    Args:
        checkpoint: mappings of tensors, perhaps inside one another.
        key: the network's name as :func:`networks` gives it, or the beginning of its entries' names. By default the network
            with the most layers; of equals one that is not named as an average or a teacher; of these the first by name.

    Raises:
        ValueError: no network of that name.
    """
    states = networks(checkpoint)
    if key is None:
        if not states:
            return _entries(checkpoint), []
        layers = {name: sum(_is_weight(*item) for item in state.items()) for name, state in states.items()}
        first = min(states, key=lambda name: (-layers[name], bool(COPIES.search(name)), natural(name)))
        sizes = {name: f"{plain_name(name) or 'the outermost'} ({_millions(state)})" for name, state in states.items()}
        others = some([text for name, text in sizes.items() if name != first])
        notes = [f"several networks: read {sizes[first]}, not {others}; --key NAME reads another"] if others else []
        return _entries(states[first]), notes
    if key in states:
        return _entries(states[key]), []
    for state in states.values():
        part = {name[len(key) + 1 :]: value for name, value in _entries(state).items() if name.startswith(f"{key}.")}
        if any(_is_weight(*item) for item in part.items()):
            return part, []
    prefixes = dict.fromkeys(name.split(".")[0] for state in states.values() for name in _entries(state) if "." in name)
    names = ", ".join(repr(plain_name(name)) for name in [*filter(None, states), *prefixes][:12]) or "none"
    raise ValueError(f"no network {plain_name(key)!r} in this checkpoint; there are {names}")


def _entries(state: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and _readable(value) and "weight" in key and _reason(value) is None


def _readable(value: Tensor) -> bool:
    return not value.is_nested and 2 <= value.ndim <= 5


def _numbers(state: Mapping[Any, Any]) -> int:
    return sum(value.numel() for value in state.values() if isinstance(value, Tensor) and not value.is_nested)


def _millions(state: Mapping[Any, Any]) -> str:
    count = _numbers(state)
    return f"{count / 1e6:.1f} M weights" if count >= 1e5 else f"{count:,} weights"


def bare(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without the parts of their names that wrappers added: compiled, sharded, data-parallel or averaged models.

    >>> list(bare({"module._orig_mod.a.weight": 1, "n_averaged": 2}))
    ['a.weight', 'n_averaged']
    """
    names = {key: ".".join(part for part in key.split(".") if part not in _SHELLS) for key in state}
    while (rest := [name for name in names.values() if name != "n_averaged"]) and all(n.startswith("module.") for n in rest):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return {name: state[key] for key, name in names.items()} if len(set(names.values())) == len(names) else dict(state)


_SHELLS = ("_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# What each layer is


@dataclass(frozen=True)
class Layers:
    """Layers read off a state dict: modules that hold its weights, by name, and notes on the reading."""

    modules: dict[str, nn.Module]
    notes: tuple[str, ...] = ()


def layers_of(checkpoint: Mapping[Any, Any], key: str | None = None) -> Layers:
    """The layers of the state dict in ``checkpoint``, as :func:`pick` chooses it.

    Groups, transposition, attention's packed projection, GPT-2's ``Conv1D`` and embeddings are concluded from shapes, biases, the
    sizes of neighbouring layers, and last from names. Weights that normalisations, masks or spectral norms make are computed.

    Raises:
        ValueError: the state dict has no layer.
    """
    state, notes = pick(checkpoint, key)
    left_out: dict[str, str] = {}
    units = _units(bare(state), left_out)
    reading = Reading(units)
    modules = {unit.name: module for unit in units if (module := reading.module(unit)) is not None}
    if not any(_is_row(module) for module in modules.values()):
        keys = ", ".join(plain_name(repr(name)) for name in list(checkpoint)[:8]) + (", ..." if len(checkpoint) > 8 else "")
        raise ValueError(
            "no layer's weight in this state dict (dense floating-point tensors named '*.weight' with 2 to 5 dimensions); "
            f"keys: {keys}{_first_reason(left_out)}"
        )
    row_parts = {id(part) for unit in units if _is_row(modules.get(unit.name)) for part in unit.parts.values()}
    notes += reading.notes(modules) + _not_read(units, modules, row_parts, left_out)
    return Layers(modules, tuple(notes))


def _is_row(module: object) -> bool:
    """Whether the module is a layer of the report: one with a kernel view that is not an embedding."""
    return has_kernel(module) and not is_embedding(module)


def _first_reason(left_out: Mapping[str, str]) -> str:
    return next((f"; {plain_name(name)} is {reason}" for name, reason in left_out.items()), "")


_INNER = re.compile(r"(?:(.*)\.)?(parametrizations\.weight\..+)", re.DOTALL)


def _units(state: Mapping[str, Any], left_out: dict[str, str]) -> list[Unit]:
    """The modules of a state dict; what cannot be read goes to ``left_out``, with the reason."""
    units: dict[str, Unit] = {}
    for key, value in state.items():
        module, leaf = inner.groups() if (inner := _INNER.fullmatch(key)) else (key.rpartition(".")[0], key.rpartition(".")[2])
        if isinstance(value, Thing):
            left_out[key] = value.name
        elif isinstance(value, Tensor):
            if (reason := _reason(value)) is None or (leaf != "weight" and not value.is_nested and value.dim() < 2):
                units.setdefault(module or "", Unit(module or "")).parts[leaf] = value
            elif leaf == "weight" or "weight" in leaf:
                left_out[key] = reason
        elif isinstance(value, tuple) and any(isinstance(part, Thing) or _is_quantized(part) for part in value):
            left_out[key] = "packed, as quantized layers are"
    for unit in units.values():
        unit.weight, reason = _weight(unit.parts)
        if unit.weight is not None and (why := _reason(unit.weight)) is not None:
            unit.weight, reason = None, why
        if reason is not None:
            left_out[f"{unit.name}.weight" if unit.name else "weight"] = reason
    return list(units.values())


def _reason(value: Tensor) -> str | None:
    """The reason why a tensor is not read as a weight; None if it is read."""
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_quantized or value.dtype in _PACKED:
        return f"quantized ({str(value.dtype).removeprefix('torch.')})"
    if not value.dtype.is_floating_point:
        return f"of type {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta:
        return "on the meta device"
    if value.numel() == 0:
        return "empty"
    if value.numel() > LARGEST or (value.numel() > EXPANDED and _elements_in_memory(value) < value.numel()):
        return f"of {value.numel():.1e} elements"
    return None


_OF_LAYER = re.compile("weight|packed_params")
"""Entries without which a layer is not read."""


def _is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def _elements_in_memory(value: Tensor) -> int:
    """Number of elements in memory; of a sharded tensor, the number of its shape."""
    if type(value) not in (Tensor, nn.Parameter):
        return value.numel()
    return value.untyped_storage().nbytes() // value.element_size()


_PACKED = {
    dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype) and name.startswith(("float4", "float8"))
}


def _weight(parts: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
    """A module's weight as its forward pass uses it, or the reason why that is not known."""
    if (weight := parts.get("weight")) is not None:
        return weight, None
    inner = {leaf.removeprefix("parametrizations.weight."): part for leaf, part in parts.items() if leaf.startswith("parametri")}
    try:
        if {"weight_g", "weight_v"} <= parts.keys():
            return _normalise(parts["weight_v"], parts["weight_g"]), None
        if inner.keys() == {"original0", "original1"}:
            return _normalise(inner["original1"], inner["original0"]), None
        if {"weight_orig", "weight_mask"} <= parts.keys():
            return parts["weight_orig"] * parts["weight_mask"], None
        if {"weight_orig", "weight_u", "weight_v"} <= parts.keys():
            return _spectral(parts["weight_orig"], parts["weight_u"], parts["weight_v"]), None
        if inner.keys() == {"original", "0._u", "0._v"}:
            return _spectral(inner["original"], inner["0._u"], inner["0._v"]), None
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None, "parametrized with parts that do not fit"
    return None, "parametrized in a way that is not recorded" if inner or "weight_orig" in parts else None


def _normalise(direction: Tensor, length: Tensor) -> Tensor:
    """Weight normalisation: filters of given lengths."""
    if length.ndim == 0:
        return torch._weight_norm(direction, length, -1)
    varies = [axis for axis, size in enumerate(length.shape) if size != 1] or [list(direction.shape).index(1)]
    if len(varies) > 1 or length.ndim != direction.ndim:
        raise ValueError("these are not the parts of a weight normalisation")
    return torch._weight_norm(direction, length, varies[0])


def _spectral(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A weight divided by its estimated largest singular value."""
    axis = 0 if len(u) == len(weight) else 1
    return weight / torch.dot(u, weight.transpose(0, axis).flatten(1).mv(v))


def _not_read(units: list[Unit], modules: Mapping[str, nn.Module], row_parts: set[int], left_out: Mapping[str, str]) -> list[str]:
    """Notes on the weights that are not rows: how many, of which names, and what share of all."""
    notes: list[str] = []
    if left_out:
        descriptions = [f"{plain_name(name)} ({plain_name(reason)})" for name, reason in left_out.items()]
        text = f"left out: {some(descriptions)}; report the model itself to see them"
        weights = {name.rpartition(".")[0] or name: reason for name, reason in left_out.items() if _OF_LAYER.search(name)}
        notes.append(Gap(text, weights))
    kinds: dict[str, list[int]] = {}
    for unit in units:
        for leaf, part in unit.parts.items():
            if id(part) in row_parts or part.ndim < 2 or not part.dtype.is_floating_point or _bookkeeping(leaf):
                continue
            if leaf == "weight" and unit.weight is not None and unit.is_norm(unit.weight):
                continue
            embedding = isinstance(modules.get(unit.name), nn.Embedding)
            kinds.setdefault("embedding" if embedding else leaf if leaf != "weight" else unit.name, []).append(part.numel())
    if kinds:
        descriptions = [f"{len(counts)} {plain_name(kind)}" for kind, counts in kinds.items()]
        missing = sum(map(sum, kinds.values()))
        total = sum(part.numel() for unit in units for part in unit.parts.values() if part.ndim > 1)
        share = f"{missing / 1e6:.1f} of {total / 1e6:.1f} M" if total >= 1e5 else f"{missing:,} of {total:,}"
        notes.append(f"not read: {some(descriptions)} ({share} weights)")
    return notes


_PARTS = {"bias", "running_mean", "running_var", "weight_g", "weight_v", "weight_u", "weight_orig", "weight_mask"}


def _bookkeeping(leaf: str) -> bool:
    return leaf.startswith("parametri") or leaf in _PARTS
