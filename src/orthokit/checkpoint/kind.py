"""The kind of a file, told from its first bytes rather than from its name."""

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from orthokit.checkpoint.pickles import plain_name

__all__ = ["HEADER", "archive_kind", "kind_of", "regular"]

HEADER = 10**8
"""Most bytes of the header of a safetensors file, by the format."""
SUFFIXES = ".pt, .pth, .bin, .ckpt or .safetensors"


def regular(path: Path) -> int:
    """The size of a file, never of a device or pipe, which could be read for ever."""
    try:
        status = path.stat()
    except ValueError as error:
        raise ValueError(f"{plain_name(str(path), 200)} is not a path ({error})") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; give a {SUFFIXES} file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a device or a pipe, not a file; give a {SUFFIXES} file")
    return status.st_size


_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, which stands for a file that was not downloaded; run `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first (gunzip, or tar xzf)"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow), not PyTorch's; convert it to PyTorch first"),
    (b"\x93NUMPY", "a NumPy array; save the weights with torch.save or safetensors"),
    (b"GGUF", "a GGUF file of quantized weights (llama.cpp); take the original weights"),
    (b"ggml", "a GGML file of quantized weights (llama.cpp); take the original weights"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)


def kind_of(path: Path, head: bytes, size: int) -> str:
    """``zip``, ``safetensors`` or ``pickle``.

    Raises:
        ValueError: the file is something else, which the message names.
    """
    if not size:
        raise ValueError(f"{path} is empty (0 bytes); download or save it again")
    for start, kind in _STARTS:
        if head.startswith(start):
            raise ValueError(f"{path} is {kind}")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if path.suffix.lower() == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER):
        if not (head[8:9] == b"{" or re.match(rb"\s*[<{\[]", head)):
            raise ValueError(f"{path} is not a safetensors file, or a damaged one; download or save it again")
        if head[8:9] == b"{":
            return "safetensors"
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive; unpack it first")
    if head[4:8] == b"TFL3":
        raise ValueError(f"{path} is a TensorFlow Lite file, not PyTorch's; convert it to PyTorch first")
    if not head.strip(b"\0"):
        raise ValueError(f"{path} begins with zeros, as a download that was cut off does; download it again")
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and re.search(rb"pytorch|onnx|\x12.\x01?torch", head[:64])):
        raise ValueError(f"{path} is an ONNX file; export the weights from PyTorch with torch.save(model.state_dict(), path)")
    if path.suffix.lower() == ".pb":
        raise ValueError(f"{path} is a TensorFlow file, not PyTorch's; convert it to PyTorch first")
    if (text := _text(head)) is not None:
        raise ValueError(f"{path} is {text}, not a saved network; give a {SUFFIXES} file")
    if head[:1] == b"\x80" or re.match(rb"[(\]}cIL]", head):
        return "pickle"
    raise ValueError(f"{path} is not a PyTorch checkpoint, or a damaged one; give a {SUFFIXES} file")


def _text(head: bytes) -> str | None:
    """The kind of text that ``head`` begins; None if it is not text, or the oldest kind of pickle."""
    try:
        start = head.decode("utf-8", "strict" if len(head) < 512 else "ignore").lstrip("\ufeff \t\r\n").lower()
    except UnicodeDecodeError:
        return None
    if any(ord(letter) < 32 and letter not in "\t\r\n" for letter in start):
        return None
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "a web page (perhaps the one that a download link led to)"
    if start.startswith("<"):
        return "an XML document or web page"
    if start.startswith(("{", "[")) and not start.startswith("]"):
        return "a JSON document (perhaps a configuration)"
    return None if re.match(r"\(?[dlp]p\d|c\w+(\.\w+)*\n|\(i?\w+\n|i\d+\n|l\d+l?\n", start) else "a text"


def archive_kind(names: Iterable[str]) -> str:
    """The kind of a zip archive without PyTorch's ``data.pkl``, in words."""
    names = list(names)
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz); save the weights with torch.save or safetensors"
    if any(name.endswith((".h5", "keras_metadata.pb")) for name in names):
        return "a Keras file, not PyTorch's; convert it to PyTorch first"
    inner = next((name for name in names if Path(name).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")), None)
    inside = f"it holds {plain_name(inner)}" if inner else "PyTorch's data.pkl is not in it"
    return f"a zip archive, not a PyTorch checkpoint ({inside}); unpack it and give the file in it"
