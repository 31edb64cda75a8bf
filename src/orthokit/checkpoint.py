"""Saved networks, read without running anything in them."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


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
