"""Files that appear under their name at once and whole, or not at all; and checkpoints that are checked before they are read."""

import contextlib
import glob
import io
import json
import os
import secrets
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["IDLE", "part_of", "read_checkpoint", "remove_parts", "replacing", "to_json", "write", "write_checkpoint"]

IDLE = 3600.0
"""Seconds after which a part that nobody writes to counts as left by a killed process."""


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Put ``content`` under ``path`` at once and whole, or leave what was there. Links and devices stay, too."""
    path, data = path.resolve(), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replacing(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the name ``path`` at the end, or vanishes on an error.

    The file lies beside ``path``, so that only the room on that disk counts. Parts that a killed process left are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path, IDLE)
    part = part_of(path)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        part.chmod(0o666 & ~mask)  # some writers keep their files to themselves
        part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file had no room
        raise
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """A new name beside ``path``, for a file that will take its place or that belongs to a single process."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def remove_parts(path: Path, idle: float) -> None:
    """Remove the parts of ``path`` that nobody has written to for ``idle`` seconds."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            if not idle or time.time() - part.stat().st_mtime >= idle:
                part.unlink()


def to_json(value: Any) -> str:
    """Indented JSON, with a line's end."""
    return json.dumps(value, indent=2) + "\n"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Put ``state`` under ``path`` as ``torch.save`` does, at once and whole."""
    torch.save(state, buffer := io.BytesIO())
    write(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> Any:
    """The state that :func:`write_checkpoint` put under ``path``. Nothing in the file is executed.

    Raises:
        ValueError: a byte of the file has changed, or the file holds more than tensors and plain values.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive can fail in any way
            raise ValueError(f"it is damaged: {error or type(error).__name__}") from None
        if part is not None:
            raise ValueError(f"it is damaged: the checksum of {part} is wrong")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"it is whole, but not a checkpoint of this version of orthokit: {reason}") from None
