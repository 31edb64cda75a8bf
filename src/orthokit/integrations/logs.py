"""Logs of a training: each layer's penalty and how near to orthogonal the filters are, into whatever keeps the log."""

import csv
import inspect
import io
import os
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from orthokit.checks import check_count, check_flag
from orthokit.diagnostics import angles, random_cosine
from orthokit.gram import outside_autocast, upcast
from orthokit.layers import Layer
from orthokit.regularizer import Regularizer
from orthokit.wrappers import reshard

__all__ = ["log", "measure", "write_to"]

DICTIONARIES = "log_metrics", "log_dict", "log"
"""Methods of loggers that take a dictionary and ``step=``: Lightning's and MLflow's, Fabric's, those of W&B and Accelerate."""

Write = Callable[[dict[str, float], int], object]


def log(ortho: Regularizer, writer: Any, step: int, *, prefix: str = "ortho", report: bool = True) -> dict[str, float]:
    """Write each layer's penalty, their total, the strength and a summary of near-orthogonality to a log; return them.

    The names are ``ortho/LAYER``, ``ortho/total`` (the strength times the sum of the layers' penalties), ``ortho/strength``, and
    of the wide and the tall layers apart ``ortho/wide/x_random``, ``.../mean_cos``, ``.../max_cos``, ``.../copies``, as in the
    totals of :func:`orthokit.report`, here over the regularized layers and in float32 or better, where the weights are.

    The log may be

    * a ``torch.utils.tensorboard.SummaryWriter`` or another object with ``add_scalar(name, value, step)``;
    * a W&B run, the module ``wandb``, a Lightning logger, a ``Fabric``, an ``Accelerator``, the module ``mlflow``: an object with
      a method ``log``, ``log_dict`` or ``log_metrics`` that takes a dictionary and ``step=``;
    * the path of a CSV file, or a text file open for writing: one row a call, a header before the first. Where a call has new
      columns the file of a path is written anew with them; an open file cannot be;
    * a function of the dictionary and the step;
    * None, which writes nothing: where every rank has to read the weights, as with FSDP2, and only one of them logs.

    Args:
        ortho: the regularizer, whose layers are measured.
        writer: the log.
        step: the number under which the log has the values.
        prefix: stands before every name, and tells several regularizers in one log apart.
        report: whether to measure near-orthogonality, in about the time of a training step's penalty.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the file at the path is not such a log, or an open file would need other columns than its header
            has, or has a header that cannot be read.
        FloatingPointError: a weight is NaN or infinite.

    >>> layer = nn.Conv2d(2, 2, 1)
    >>> _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> ortho = orthokit.Regularizer(layer, orthokit.SO(), strength=0.5)
    >>> log(ortho, lambda values, step: print(step, list(values)), 7, report=False)
    7 ['ortho/Conv2d', 'ortho/total', 'ortho/strength']
    {'ortho/Conv2d': 18.0, 'ortho/total': 9.0, 'ortho/strength': 0.5}
    """
    if not isinstance(ortho, Regularizer):
        raise TypeError(f"log takes a Regularizer, then where to log; got {type(ortho).__name__}, {type(writer).__name__}")
    check_count("step", step, 0)
    check_flag("report", report)
    write = _ignore if writer is None else write_to(writer)
    values = measure(ortho, ortho.strength, prefix, report=report)
    write(values, int(step))
    return values


def measure(ortho: Regularizer, strength: float, prefix: str, *, report: bool = False) -> dict[str, float]:
    """The values that :func:`log` writes, by name, with a strength of your choice.

    >>> layer = nn.Conv2d(2, 2, 1)
    >>> _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> measure(orthokit.Regularizer(layer, orthokit.SO(), strength=0.5), 0.1, "ortho")
    {'ortho/Conv2d': 18.0, 'ortho/total': 1.8, 'ortho/strength': 0.1}
    """
    layers = ortho.per_layer()
    values = {f"{prefix}/{layer}": value for layer, value in layers.items()}
    values |= {f"{prefix}/total": strength * sum(layers.values()), f"{prefix}/strength": strength}
    if report:
        values |= _summary(ortho, [layer for layer in ortho.layers if layer.name in layers], prefix)
    return values


@torch.no_grad()
def _summary(ortho: Regularizer, layers: list[Layer], prefix: str) -> dict[str, float]:
    """The cosines within wide and within tall layers, from the weights where they are, in float32 or better."""
    reshard(ortho.model)
    by_shape: dict[str, list[dict[str, float]]] = {"wide": [], "tall": []}
    for layer in layers:
        kernel = layer.kernel
        pairs = kernel.groups * (kernel.o * (kernel.o - 1) // 2)
        if pairs > 0:
            matrix = upcast(kernel.matrix).flatten(0, -3)
            with outside_autocast(matrix.device):
                total, largest, copies = angles(matrix)
            mean, shape = total.double().sum().item() / pairs, "wide" if kernel.o <= kernel.n else "tall"
            row = {"x_random": mean / random_cosine(kernel.n), "mean_cos": mean, "max_cos": largest.max().item()}
            by_shape[shape].append({**row, "copies": float(copies.sum()), "pairs": pairs})
    values: dict[str, float] = {}
    for shape, rows in by_shape.items():
        if rows:
            every = sum(row["pairs"] for row in rows)
            for key in ("x_random", "mean_cos"):
                values[f"{prefix}/{shape}/{key}"] = sum(row[key] * row["pairs"] for row in rows) / every
            values[f"{prefix}/{shape}/max_cos"] = max(row["max_cos"] for row in rows)
            values[f"{prefix}/{shape}/copies"] = sum(row["copies"] for row in rows)
    return values


def write_to(writer: Any) -> Write:
    """The function that writes a dictionary of numbers and their step to a log; see :func:`log`.

    Raises:
        TypeError: ``writer`` is none of the logs that :func:`log` lists.
    """
    if isinstance(writer, str | PathLike):
        return lambda values, step: _add_to_path(Path(writer), {"step": step, **values})
    # A class in place of its instance, or a network, has or takes anything.
    if not isinstance(writer, type | nn.Module | io.RawIOBase | io.BufferedIOBase):
        for name in DICTIONARIES:
            method: Any = getattr(writer, name, None)
            if _takes(method, {}, step=0):
                return lambda values, step: method(values, step=step)
        if callable(scalar := getattr(writer, "add_scalar", None)):
            return lambda values, step: [scalar(name, value, step) for name, value in values.items()]
        if callable(getattr(writer, "write", None)):
            return lambda values, step: _add_to_file(writer, {"step": step, **values})
        if _takes(writer, {}, 0):
            return lambda values, step: writer(values, step)
    raise TypeError(
        "log writes to a SummaryWriter, a W&B run, a logger with log_metrics(values, step=), the path of a CSV file, an open "
        f"text file or a function of (values, step); got {writer!r:.200}"
    )


def _ignore(values: dict[str, float], step: int) -> None:
    pass


def _takes(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ``function`` takes such arguments, as far as its signature tells."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a function in C that does not tell
        return True
    return True


def _add_to_path(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV file; where it has columns that the file lacks, the file is written anew."""
    header: list[str] = []
    if path.exists() and path.stat().st_size:
        header = _header(path)
        if header[:1] != ["step"]:
            raise ValueError(f"{path} is not a log to append to, whose first column is 'step'; name another file")
    columns = list(dict.fromkeys([*header, *row]))
    if len(header) < len(columns):
        _write_anew(path, columns, [*_rows(path), row] if header else [row])
        return
    is_torn = _is_torn(path)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write("\n" * is_torn)
        _add_rows(file, columns, [row], header=False)


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _write_anew(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Replace the file by one of these rows, once all of them are on the disk."""
    path = path.resolve()  # a link stays one
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            _add_rows(file, columns, rows, header=True)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_torn(path: Path) -> bool:
    """Whether the last row was not written to its end."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


_columns: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()
"""Columns of open files, once these were written to."""


def _add_to_file(file: Any, row: dict[str, float]) -> None:
    """Append a row to an open file, after a header if nothing is in the file yet."""
    columns, is_new = _columns.get(file), False
    if columns is None:
        is_new = not _position(file)
        columns = list(row) if is_new else _header_of(file)
    if new := [name for name in row if name not in columns]:
        raise ValueError(f"an open file keeps its header, which lacks {', '.join(new)}; log to a path, or to another file")
    _columns[file] = columns
    _add_rows(file, columns, [row], header=is_new)


def _header_of(file: Any) -> list[str]:
    """The columns of an open file that others wrote to before, read from the path that it was opened with."""
    name, header = getattr(file, "name", None), list[str]()
    if isinstance(name, str | PathLike) and Path(name).is_file():
        file.flush()
        header = _header(Path(name))
    if header[:1] != ["step"]:
        raise ValueError(
            "the open file has content, and no header could be read whose first column is 'step'; log to a path, or to an empty "
            "file"
        )
    return header


def _position(file: Any) -> int:
    try:
        return int(file.tell())
    except (AttributeError, OSError):  # a pipe
        return 0


def _add_rows(file: Any, columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> None:
    table = csv.DictWriter(file, columns, lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows(rows)
