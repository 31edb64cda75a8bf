"""Files that appear under their name at once and whole, or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(path: Path, content: str) -> None:
    """Put ``content`` under ``path`` at once and whole; where that fails what was there stays. Links and devices stay too."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content.encode())
        return
    with replacing(path) as part:
        part.write_bytes(content.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the name ``path`` at the end, or vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        part.chmod(0o666 & ~mask)  # some writers keep their files to themselves
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Indented JSON, with a line's end."""
    return json.dumps(value, indent=2) + "\n"
