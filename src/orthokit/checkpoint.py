"""Saved networks, read without running anything in them."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def load(path: Path) -> Mapping[str, Any]:
    """The tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, on the CPU; no code in it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as one; the message says what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; give a .pt, .pth or .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol of files that turn out to be no checkpoint
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and "magic" not in str(error):
            raise ValueError(
                f"{path} holds Python objects besides tensors, which are not loaded as they could run code; "
                "save model.state_dict() instead"
            ) from None
        raise ValueError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path} is no PyTorch checkpoint, or a damaged one ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    return loaded


def modules_of(checkpoint: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Modules that hold the weights of the state dict found in ``checkpoint``, by name."""
    state = state_of(checkpoint)
    weights = _weights(state)
    if not weights:
        shown = ", ".join(map(repr, list(checkpoint)[:8])) + (", ..." if len(checkpoint) > 8 else "")
        raise ValueError(
            "no layer's weight in this state dict (dense floating-point tensors named '*.weight' with 2 to 5 dimensions); "
            f"keys: {shown}"
        )
    # Tied entries share their storage. Of a sharded weight it is not known, and its part on this rank may be empty.
    parameters: dict[tuple[int, torch.Size], nn.Parameter] = {}
    modules: dict[str, nn.Module] = {}
    for key, weight in weights.items():
        name = key.removesuffix("weight").removesuffix(".").removeprefix("module.")
        tied = (weight.data_ptr() or id(weight), weight.shape)
        o, i, *size = weight.shape
        module: nn.Module = nn.Linear(i, o, bias=False, device="meta")
        if size:
            kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
            module = kind(i, o, tuple(size), bias=False, device="meta")
        module.weight = parameters.setdefault(tied, nn.Parameter(weight, requires_grad=False))
        modules[name] = module
    return modules


def state_of(checkpoint: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Of the checkpoint and all mappings in it, the one with the most weights."""
    found, waiting = {id(checkpoint): checkpoint}, [checkpoint]
    while waiting:
        for item in waiting.pop().values():
            if isinstance(item, Mapping) and id(item) not in found:
                found[id(item)] = item
                waiting.append(item)
    return max(found.values(), key=lambda mapping: len(_weights(mapping)))


def _weights(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in state.items()
        if isinstance(key, str)
        and key.rpartition(".")[2] == "weight"
        and isinstance(value, Tensor)
        and 2 <= value.ndim <= 5
        and value.numel() > 0
        and value.layout == torch.strided
        and value.dtype.is_floating_point
        and not value.is_meta
    }


def unread(checkpoint: Mapping[Any, Any]) -> list[str]:
    """Entries of a state dict that belong to the weight of a layer but cannot be read: parametrized, sparse, integer, empty."""
    state = state_of(checkpoint)
    parts = re.compile(r"(^|\.)(weight_(g|v|orig|mask)|parametrizations\.weight\..+)$")
    known = _weights(state)
    return [
        key
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and key not in known
        and (parts.search(key) or (key.rpartition(".")[2] == "weight" and value.ndim != 1))
    ]
