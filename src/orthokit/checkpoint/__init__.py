"""Saved networks: what a file or folder holds, read without running anything in it.

PyTorch's files are read by :mod:`orthokit.checkpoint.pickles`, which has no way to import or call;
safetensors files are numbers and names. Tensors are views of the file, mapped into memory: nothing is read before it is used,
so keep the file while you use them.
"""

import contextlib
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from orthokit.checkpoint.gaps import Gap
from orthokit.checkpoint.kind import HEADER, kind_of, regular
from orthokit.checkpoint.pickles import ELEMENTS, DamagedError, Thing, plain_name
from orthokit.checkpoint.shapes import natural, some
from orthokit.checkpoint.statedict import networks, pick
from orthokit.checkpoint.torchfiles import (
    Content,
    as_tensor,
    is_module,
    legacy,
    mapped_bytes,
    module_in,
    whole_module,
    zip_archive,
)

__all__ = ["metadata", "order_metadata", "read"]


def read(path: str | os.PathLike[str], key: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The state dict in a file or folder, and remarks: other networks in it, what was left out.

    Args:
        path: a file of PyTorch (a state dict, or a checkpoint that holds one; TorchScript) or of safetensors, whatever its
            suffix; the ``.index.json`` of one in several parts; or a folder with such files, as Hugging Face has them.
        key: which of several networks; see :func:`orthokit.checkpoint.statedict.networks`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is none of these; the message says what it is.
    """
    path = Path(path)
    content = _folder(path) if path.is_dir() else _index(path) if path.name.lower().endswith(".index.json") else _file(path)
    if (part := re.search(r"-(\d+)-of-(\d+)$", path.stem)) and int(part[2]) > 1:
        name, reason = f"part {int(part[1])} of {int(part[2])}", "the other layers are not read"
        content.notes.append(Gap(f"{name}: {reason}; give the folder", {name: reason}))
    if isinstance(content.value, Thing) and is_module(content.value):
        raise ValueError(whole_module(path, content.value.name))
    if not isinstance(content.value, dict):
        name = content.value.name if isinstance(content.value, Thing) else type(content.value).__name__
        raise ValueError(f"{path} holds a {plain_name(name)}, not a state dict; save model.state_dict() instead")
    if not networks(content.value) and (module := module_in(content.value)):
        raise ValueError(whole_module(path, module))
    state, notes = pick(content.value, key)
    if content.others:
        kinds = dict.fromkeys("numpy" if name.startswith("numpy.") else plain_name(name) for name in content.others)
        content.notes.append(f"Python objects in the file, left out as nothing in it is executed: {some(kinds, 5)}")
    return state, content.notes + notes


def metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors; empty for any other file."""
    size = regular(path)
    with path.open("rb") as file:
        if kind_of(path, file.read(512), size) != "safetensors":
            return {}
        file.seek(0)
        return _header(path, file, size)[1]


def _file(path: Path) -> Content:
    """The content of a file."""
    size = regular(path)
    with path.open("rb") as file:
        kind = kind_of(path, file.read(512), size)
        file.seek(0)
        return _safetensors(path, file, size) if kind == "safetensors" else _pytorch(path, file, size, kind)


def _pytorch(path: Path, file: io.BufferedReader, size: int, kind: str) -> Content:
    try:
        return zip_archive(path, file, size) if kind == "zip" else legacy(path, file, size)
    except (DamagedError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or a damaged one ({error}); download or save it again") from None


# safetensors

_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _header(path: Path, file: io.BufferedReader, size: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries of a safetensors file, its metadata, and where the numbers begin."""
    length = int.from_bytes(file.read(8), "little")
    if length + 8 > size or length > HEADER:
        raise ValueError(f"{path} is a safetensors file that was cut off: its header alone has {length:,} bytes; get it again")
    try:
        header = json.loads(file.read(length))
        metadata_texts = header.pop("__metadata__", {})
        entries: dict[str, tuple[str, list[int], int, int]] = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            entries[name] = (str(entry["dtype"]), list(entry["shape"]), start, end)
            if not all(type(number) is int for number in (*entries[name][1], start, end)):
                raise ValueError("a size is not a whole number")
        if not all(isinstance(text, str) for text in metadata_texts.values()):
            raise ValueError("its header is not one of safetensors")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} is not a safetensors file, or a damaged one ({reason}); get it again") from None
    if any(not 0 <= start <= end <= size - length - 8 for _, _, start, end in entries.values()):
        longest = max(end for _, _, _, end in entries.values())
        raise ValueError(
            f"{path} is a safetensors file that was cut off or damaged: its tensors need {longest + length + 8:,} bytes, "
            f"it has {size:,}; get it again"
        )
    return entries, metadata_texts, length + 8


def _safetensors(path: Path, file: io.BufferedReader, size: int) -> Content:
    entries, metadata_texts, begin = _header(path, file, size)
    view = mapped_bytes(file)
    state: dict[str, Any] = {}
    for name in _order(list(entries), metadata_texts):
        kind, shape, start, end = entries[name]
        dtype = _NAMES.get(kind)
        if dtype is None:
            state[name] = Thing(f"numbers of type {plain_name(kind, 20)}")
        elif not _is_possible(shape) or math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"{path} is a damaged safetensors file: {plain_name(name)} has an impossible shape; get it again")
        elif start == end:
            state[name] = torch.empty(shape, dtype=dtype)
        else:
            numbers = as_tensor(view[begin + start : begin + end])
            state[name] = numbers.view(dtype).view(shape)
    return Content(state)


def _is_possible(shape: list[int]) -> bool:
    """Whether a tensor can have this shape; in an empty one, too, the other sizes are numbers of elements."""
    return len(shape) <= 16 and all(n >= 0 for n in shape) and math.prod(n or 1 for n in shape) < ELEMENTS


ORDER = "order"
"""The key of the metadata in which a safetensors file keeps the order of its entries, which the format sorts."""


def order_metadata(names: Iterable[str]) -> dict[str, str]:
    """Metadata for ``save_file`` with which :func:`read` gives the entries in this order again."""
    return {ORDER: "\n".join(names)}


def _order(names: list[str], metadata_texts: dict[str, str]) -> list[str]:
    positions = {name: index for index, name in enumerate(metadata_texts.get(ORDER, "").split("\n"))}
    return sorted(names, key=lambda name: (positions.get(name, len(positions)), natural(name)))


# Networks in several files


def _index(path: Path) -> Content:
    """The parts that an index names, from its folder."""
    regular(path)
    try:
        names = list(json.loads(path.read_bytes()[:HEADER])["weight_map"].values())
        names = list(dict.fromkeys(names))
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not the index of a network in parts (JSON with a weight_map)") from None
    if strange or not names:
        raise ValueError(f"{path} names parts that are not files beside it: {plain_name(str(strange[:1]))}")
    return _join([path.with_name(name) for name in names])


def _join(parts: list[Path]) -> Content:
    there, content = [part for part in parts if part.is_file()], Content({})
    if not there:
        raise FileNotFoundError(f"none of the {len(parts)} parts of the network is in {parts[0].parent}, such as {parts[0].name}")
    for part in there:
        one = _file(part)
        if isinstance(one.value, dict):
            content.value |= one.value
        content.others |= one.others
        content.notes += one.notes
    if len(there) < len(parts):
        missing = {f"file {plain_name(part.name)}": "a part that is missing" for part in parts if part not in there}
        count = f"{len(parts) - len(there)} of {len(parts)} parts are missing"
        content.notes.append(
            Gap(f"{count}, such as {next(iter(missing)).removeprefix('file ')}: their layers are not read", missing)
        )
    content.value = {name: content.value[name] for name in sorted(content.value, key=lambda name: natural(str(name)))}
    return content


_PREFERRED = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model", "open_clip_pytorch_model")


def _folder(path: Path) -> Content:
    """The content of a folder as Hugging Face has them: one file, or parts with their index."""
    with contextlib.suppress(PermissionError):
        files = sorted(file for file in path.iterdir() if file.is_file())
        indices = [file for file in files if file.name.endswith((".safetensors.index.json", ".bin.index.json"))]
        weights = [file for file in files if file.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
        for suffix in (".safetensors", ".bin"):
            for name in _PREFERRED:
                for candidate in (f"{name}{suffix}.index.json", f"{name}{suffix}"):
                    if path / candidate in files:
                        return _index(path / candidate) if candidate.endswith(".json") else _file(path / candidate)
        if len(indices) == 1:
            return _index(indices[0])
        parts = [re.fullmatch(r"(.+)-\d+-of-(\d+)", file.stem) for file in weights]
        if weights and all(part is not None for part in parts) and len({part[1] for part in parts if part}) == 1:
            total = max(int(part[2]) for part in parts if part)
            content = _join(weights)
            if total > len(weights):
                name, reason = f"{len(weights)} of {total} parts", "the other layers are not read"
                content.notes.append(Gap(f"{name} are in the folder: {reason}", {name: reason}))
            return content
        if len(weights) == 1:
            return _file(weights[0])
        text = ", ".join(plain_name(file.name) for file in weights[:4]) or "none"
        raise ValueError(f"{path} is a folder with {len(weights)} files of weights ({text}); name one of them")
    raise PermissionError(f"{path} is a folder that cannot be read")
