"""Saved networks read into a model of their architecture, so that nothing has to be guessed."""

import copy
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit import checkpoint
from orthokit.checkpoint.gaps import Gap
from orthokit.checkpoint.kind import regular
from orthokit.checkpoint.pickles import plain_name
from orthokit.checkpoint.shapes import some
from orthokit.checkpoint.statedict import Layers, bare, layers_of, pick
from orthokit.checks import install
from orthokit.kernel import has_kernel
from orthokit.wrappers import unwrap

__all__ = ["Network", "build", "fill", "model_of_config", "open_network"]

Network = nn.Module | Mapping[str, Any] | str | os.PathLike[str]
"""A model, a state dict (or a checkpoint that holds one), or the path of a saved network."""


def open_network(network: Network, like: nn.Module | None = None, key: str | None = None) -> tuple[nn.Module | Layers, list[str]]:
    """The layers of a network, and remarks on how it was read.

    Args:
        network: see :data:`Network`.
        like: a model of the same architecture; its weights do not matter.
        key: which of several networks in a checkpoint.

    Raises:
        TypeError: ``network`` is none of these, or ``like`` and ``key`` come with a model.
        ValueError: ``network`` cannot be read, or does not fit ``like``.
    """
    notes: list[str] = []
    if isinstance(network, (str, os.PathLike)):
        path = Path(network)
        network, notes = checkpoint.read(path, key)
        key = None
        if like is None and (path / "config.json").is_file():
            like, remark = _of_folder(path)
            notes.append(remark)
    if isinstance(network, nn.Module):
        if like is not None or key is not None:
            raise TypeError("like= and key= go with a state dict or a file; a model has its own architecture")
        return network, notes
    if not isinstance(network, Mapping):
        raise TypeError(f"expected a torch.nn.Module or a state dict, or a file with one; got {type(network).__name__}")
    if like is None:
        layers = layers_of(network, key)
        return layers, notes + list(layers.notes)
    state, more = pick(network, key)
    model, remarks = fill(like, state)
    whole = {name: module for name, module in unwrap(model).named_modules() if not _is_lost(module)}
    return Layers(whole), notes + more + remarks


def _is_lost(module: nn.Module) -> bool:
    """Whether a layer lacks weights, of which the meta device has shapes only."""
    return has_kernel(module) and any(parameter.is_meta for parameter in module.parameters())


def _of_folder(folder: Path) -> tuple[nn.Module | None, str]:
    """The model that a folder describes, or None; and a remark on how its weights are read."""
    try:
        model = model_of_config(folder)
    except (ModuleNotFoundError, ValueError) as error:
        return None, f"read as a state dict, without the architecture in config.json: {error}"
    return model, f"read as {type(model).__name__}, as config.json says"


def fill(like: nn.Module, state: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """A copy of ``like`` with the weights of ``state``, and remarks on what did not match. No weight of ``like`` is copied.

    Weights that ``state`` lacks are on the meta device.

    Raises:
        TypeError: ``like`` is not a module, or one that cannot be copied.
        ValueError: nothing matches, or a shape differs.
    """
    if not isinstance(like, nn.Module):
        raise TypeError(f"like must be a model, a torch.nn.Module; got {type(like).__name__}")
    tensors = [*like.named_parameters(remove_duplicate=False), *like.named_buffers(remove_duplicate=False)]
    empty: dict[int, Any] = {}
    for _, tensor in tensors:
        blank = torch.empty_like(tensor, device="meta")
        empty.setdefault(id(tensor), nn.Parameter(blank, False) if isinstance(tensor, nn.Parameter) else blank)
    for module in like.modules():  # what hooks compute, such as the old weight_norm, is an attribute and cannot be copied
        values = [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
        empty |= {id(value): torch.empty_like(value, device="meta") for value in values}
    try:
        model = copy.deepcopy(like, dict(empty))
    except Exception as error:  # of anybody's module
        raise TypeError(
            f"{type(like).__name__} cannot be copied ({error}); load the weights into it and report the model"
        ) from None
    entries, names = bare(state), bare(dict(tensors))
    matches = {name: entries[name] for name in names if isinstance(entries.get(name), Tensor)}
    if not matches:
        raise ValueError(
            f"no entry of the state dict belongs to {type(like).__name__}, which has {some(names, 3)}; "
            f"the state dict has {some(entries, 3)}"
        )
    replacements: dict[int, nn.Parameter | Tensor] = {}
    for name, tensor in names.items():
        if (value := matches.get(name)) is None:
            continue
        if value.shape != tensor.shape:
            raise ValueError(
                f"the state dict does not fit {type(like).__name__}: "
                f"{plain_name(name)} is {tuple(value.shape)}, not {tuple(tensor.shape)}"
            )
        replacements[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    for name, tensor in tensors:
        if id(tensor) in replacements:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = replacements[id(tensor)]  # type: ignore[assignment]
    missing = [name for name, tensor in names.items() if isinstance(tensor, nn.Parameter) and id(tensor) not in replacements]
    strange = [name for name in entries if name not in names and isinstance(entries[name], Tensor)]
    lost = {name: "not in the file" for name, module in unwrap(model).named_modules() if _is_lost(module)}
    notes: list[str] = [Gap(f"not in the file, left out: {some(missing, 3)}", lost)] if missing else []
    notes += [f"not in {type(like).__name__}, not read: {some(strange, 3)}"] if strange else []
    return model, notes


def build(spec: str, say: Callable[[str], object]) -> nn.Module:
    """The model that ``spec`` names, on the meta device: no weight is made or downloaded.

    Args:
        spec: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224``, ``package.module:function`` for a function of your own
            without arguments, or a folder with the ``config.json`` of a Hugging Face model.
        say: called before code is imported, with a sentence that says which code and why.

    Raises:
        ValueError: no such model, module or function, or one that makes no model.
        ModuleNotFoundError: the library is missing; the message names it.
    """
    if (folder := Path(spec)).is_dir() or folder.name == "config.json":
        say(f"building the model of {spec} with transformers")
        return model_of_config(folder if folder.is_dir() else folder.parent)
    library, separator, name = spec.partition(":")
    if not separator or not all(part.isidentifier() for part in library.split(".")) or not name:
        raise ValueError(
            f"a model is torchvision:NAME, timm:NAME, package.module:function, or a folder with config.json; got {spec!r}"
        )
    say(f"importing {library} to build {name}, as --model says")
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{library}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"no module {error.name!r} for the model {spec}; install it, or set PYTHONPATH to its folder"
        ) from None
    with torch.device("meta"):
        if library == "torchvision":
            model = _call(spec, module.models.get_model, name, weights=None, **_no_backbone(module, name))
        elif library == "timm":
            model = _call(spec, module.create_model, name, pretrained=False)
        else:
            if not callable(make := getattr(module, name, None)):
                raise ValueError(f"module {library!r} ({getattr(module, '__file__', 'built in')}) has no function {name!r}")
            model = _call(spec, make)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} must make a torch.nn.Module; it made a {type(model).__name__}")
    return model


def _no_backbone(torchvision: Any, name: str) -> dict[str, None]:
    """Options without which torchvision's detection models download a backbone."""
    try:
        takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    except ValueError:
        return {}
    return {"weights_backbone": None} if "weights_backbone" in takes else {}


def _call(spec: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return make(*arguments, **options)
    except Exception as error:  # of anybody's function
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{spec} cannot be built on the meta device: {reason}") from None


MOST = 2000
"""Most layers, blocks or experts that a file may ask for."""


def _check_config(path: Path) -> None:
    """Raise ``ValueError`` where a configuration asks for so much that building it would not end."""
    try:
        text = path.read_text(encoding="utf-8") if regular(path) < 10**7 else ""
        waiting: list[tuple[str, Any]] = [("", json.loads(text))]
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not the configuration of a model") from None
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += list(value.items())
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif isinstance(value, int) and value > MOST and re.search("layer|block|depth|expert", key):
            raise ValueError(f"{path} asks for {plain_name(key)} = {plain_name(str(value)[:20])}, more than {MOST:,}")


def model_of_config(folder: Path) -> nn.Module:
    """The transformers model that a folder's ``config.json`` describes, on the meta device; code in the folder is never run."""
    _check_config(folder / "config.json")
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"models of Hugging Face need transformers: {install('transformers')}") from None
    config = _call(str(folder), transformers.AutoConfig.from_pretrained, folder, trust_remote_code=False, local_files_only=True)
    kind = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0], None)
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return _call(str(folder), kind, config)  # type: ignore[no-any-return]
        return _call(str(folder), transformers.AutoModel.from_config, config, trust_remote_code=False)  # type: ignore[no-any-return]
