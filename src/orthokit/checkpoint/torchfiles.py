"""PyTorch's files, zip archives and the older format, with tensors as views of the file."""

import io
import mmap
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthokit.checkpoint import pickles
from orthokit.checkpoint.kind import archive_kind
from orthokit.checkpoint.pickles import DamagedError, Storage, Thing, plain_name

__all__ = ["Content", "as_tensor", "is_module", "legacy", "mapped_bytes", "module_in", "whole_module", "zip_archive"]

UNPACKED = 2**30
"""Most bytes that the compressed parts of a file may unpack to, or 20 times the file where that is more."""
PICKLE = 2**28
"""Most bytes of the description of the tensors in a file."""
MAGIC, LEGACY = 0x1950A86A20F9469CFC6C, 1001
SAVE = "save model.state_dict() with torch.save"


@dataclass
class Content:
    """The content of a file: nested values, remarks, and the names of objects that were not built."""

    value: Any
    notes: list[str] = field(default_factory=list)
    others: dict[str, None] = field(default_factory=dict)


def mapped_bytes(file: io.BufferedReader) -> memoryview:
    """The bytes of a file, loaded when they are used; what is written to them stays in memory."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def as_tensor(content: memoryview) -> Tensor:
    """Bytes as a tensor that is alone in its storage, copied where their address is not one of numbers."""
    if not len(content):
        return torch.empty(0, dtype=torch.uint8)
    tensor = torch.frombuffer(content, dtype=torch.uint8)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def zip_archive(path: Path, file: io.BufferedReader, size: int) -> Content:
    """The content of a zip archive of ``torch.save`` or TorchScript."""
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, OSError, struct.error) as error:
        raise ValueError(
            f"{path} is a PyTorch file (or zip archive) that was cut off or damaged ({error}); get it again"
        ) from None
    roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if not roots:
        raise ValueError(f"{path} is {archive_kind(members)}")
    root = roots[0]
    unpacked_size = sum(info.file_size for info in members.values() if info.compress_type != zipfile.ZIP_STORED)
    if unpacked_size > max(UNPACKED, 20 * size):
        raise ValueError(f"{path} has {size:,} bytes that unpack to {unpacked_size:,}; files that swell so are not read")
    view, wrong = mapped_bytes(file), 0
    bytes_of: dict[str, Tensor] = {}

    def member(name: str) -> memoryview:
        nonlocal wrong
        info = members[name]
        if info.flag_bits & 1:
            raise DamagedError("it is encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            try:
                return memoryview(bytearray(archive.read(info)))
            except Exception as error:  # each way of compressing has errors of its own
                raise DamagedError(str(error) or type(error).__name__) from None
        lengths = struct.unpack("<HH", view[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + sum(lengths)
        if start + info.file_size > size:
            raise DamagedError("it ends too early")
        content = view[start : start + info.file_size]
        wrong += zlib.crc32(content) != info.CRC
        return content

    def storage(identifier: tuple[Any, ...]) -> Any:
        if (key := pickles.storage_key(identifier)) is None:
            return Thing("an object outside the file")
        dtype, name = pickles.storage_type(identifier[1]), f"{root}data/{key}"
        if dtype is None:
            return Thing(f"a tensor of {getattr(identifier[1], 'name', '?')}")
        if name not in members:
            raise DamagedError(f"it lacks the numbers {plain_name(str(key), 20)}")
        if name not in bytes_of:
            bytes_of[name] = as_tensor(member(name))
        return Storage(bytes_of[name], dtype)

    if f"{root}byteorder" in members and bytes(member(f"{root}byteorder")[:3]) == b"big":
        raise ValueError(f"{path} was saved on a big-endian machine; save it again on this one")
    content = Content(None)
    if members[f"{root}data.pkl"].file_size > PICKLE:
        raise DamagedError(f"the description of its tensors has more than {PICKLE:,} bytes")
    description = io.BytesIO(member(f"{root}data.pkl"))
    content.value = pickles.read(description, storage, content.others)
    if wrong:
        content.notes.append(f"the checksum of {wrong} parts of the file is wrong: it may be damaged")
    if any(name.startswith(f"{root}code/") for name in members) or f"{root}constants.pkl" in members:
        content.value, content.others = _flat(content.value), {}
        content.notes.append("TorchScript: the tensors are read, the program in it is not")
    return content


def _flat(value: Any) -> Any:
    """The tensors of TorchScript's nested objects by their dotted names."""
    state: dict[str, Tensor] = {}
    waiting, visits = [("", value)], set()
    while waiting:
        prefix, item = waiting.pop()
        attributes = item.state if isinstance(item, Thing) and isinstance(item.state, dict) else None
        if attributes is None or id(item) in visits:
            continue
        visits.add(id(item))
        state |= {f"{prefix}{name}": part for name, part in attributes.items() if isinstance(part, Tensor)}
        waiting += [(f"{prefix}{name}.", part) for name, part in reversed(attributes.items()) if isinstance(part, Thing)]
    return state or value


def legacy(path: Path, file: io.BufferedReader, size: int) -> Content:
    """The content of the older format: pickles, then numbers, whose sizes only the pickles tell; hence these are read twice."""
    view, content, dtypes = mapped_bytes(file), Content(None), dict[str | int, torch.dtype]()

    def declare(identifier: tuple[Any, ...]) -> Any:
        if (key := pickles.storage_key(identifier)) is not None and (dtype := pickles.storage_type(identifier[1])):
            dtypes[key] = dtype
        return Thing("a tensor's numbers")

    first = pickles.read(file, declare, content.others)
    if first != MAGIC:  # pickle.dump rather than torch.save
        if isinstance(first, Thing) or not isinstance(first, dict):
            name = first.name if isinstance(first, Thing) else type(first).__name__
            raise ValueError(f"{path} is a pickle of a {plain_name(name)}, of which nothing is executed; {SAVE}")
        raise ValueError(f"{path} was written by pickle.dump, not by torch.save; {SAVE}")
    if pickles.read(file, declare, content.others) != LEGACY:
        raise DamagedError("its protocol is not known")
    system = pickles.read(file, declare, content.others)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError(f"{path} was saved on a big-endian machine; save it again on this one")
    start = file.tell()
    pickles.read(file, declare, content.others)
    order = pickles.read(file, declare, content.others)
    position, ranges = file.tell(), dict[str | int, Tensor]()
    for key in order if isinstance(order, list) else []:
        if not isinstance(key, (str, int)):
            raise DamagedError("the name of a tensor's numbers is not text")
        dtype = dtypes.get(key, torch.uint8)
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        if count < 0 or position + 8 + count * dtype.itemsize > size:
            raise DamagedError("it ends too early")
        ranges[key] = as_tensor(view[position + 8 : position + 8 + count * dtype.itemsize])
        position += 8 + count * dtype.itemsize

    def storage(identifier: tuple[Any, ...]) -> Any:
        if identifier[:1] == ("module",) and len(identifier) > 1:
            return identifier[1]
        if (key := pickles.storage_key(identifier)) is None or key not in ranges:
            return Thing("an object outside the file")
        if key not in dtypes:
            return Thing(f"a tensor of {getattr(identifier[1], 'name', '?')}")
        dtype, numbers = dtypes[key], ranges[key]
        if len(identifier) > 5 and isinstance(identifier[5], tuple) and len(identifier[5]) == 3:  # a part of another storage
            _, offset, count = identifier[5]
            numbers = numbers[offset * dtype.itemsize : (offset + count) * dtype.itemsize].clone()
        return Storage(numbers, dtype)

    file.seek(start)
    content.others.clear()
    content.value = pickles.read(file, storage, content.others)
    return content


def is_module(thing: Thing) -> bool:
    return isinstance(thing.state, dict) and {"_parameters", "_modules"} <= thing.state.keys()


def module_in(value: dict[Any, Any]) -> str | None:
    """The class of a whole module among the values of a checkpoint."""
    return next((item.name for item in value.values() if isinstance(item, Thing) and is_module(item)), None)


def whole_module(path: Path, name: str) -> str:
    """The error for a pickled module, whose class would have to be imported and run, with what to do."""
    return (
        f"{path} holds a whole module, {plain_name(name)}, which only running its code could load; "
        f"save model.state_dict() instead, where the model is: `torch.save(model.state_dict(), '{path.stem}_weights.pt')`, "
        f"then `orthokit.report('{path.stem}_weights.pt')`"
    )
