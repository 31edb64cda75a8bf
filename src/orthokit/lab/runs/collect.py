"""The finished runs in folders and ledgers."""

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orthokit.lab.runs.ledger import entries, is_ledger
from orthokit.lab.runs.results import Result, read_one
from orthokit.lab.runs.run import SUMMARY
from orthokit.lab.runs.summary import DamagedError

__all__ = ["TUNING", "below", "read"]

TUNING = "tuning"
"""The folder, where a study trains, of the runs by which strengths are chosen: ``tuning/<name>/<seed>``."""


def read(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The finished runs in and below folders, or in ledgers, and remarks on runs that are not finished, or damaged.

    Runs by which a study chose strengths are not compared; they count where their own folder is named.

    Raises:
        FileNotFoundError: a path leads nowhere, or there is no finished run.
        ValueError: a path is not a run, or none of the runs can be read.
    """
    results: dict[Path, Result] = {}
    states: dict[Path, str] = {}
    damage: dict[Path, str] = {}
    for path in paths:
        _check(path)
        top = path.parent if path.name == SUMMARY else path
        for file in below(top, SUMMARY):
            try:
                results.setdefault(_real(file), read_one(file))
            except DamagedError as error:
                damage[_real(file)] = str(error)
        for file in filter(is_ledger, below(top, "*.jsonl")):
            runs, reasons = entries(file)
            results |= {_real(run.source): run for run in runs}
            damage |= {Path(f"{_real(file)}:{number}"): why for number, why in enumerate(reasons)}
        for file in below(top, "recipe.toml"):
            if not (file.parent / SUMMARY).is_file():
                states[_real(file.parent)] = "failed" if (file.parent / "failed.txt").is_file() else "not finished"
    if damage and not results:
        more = f"; so {'is' if len(damage) == 2 else 'are'} {len(damage) - 1} more" if len(damage) > 1 else ""
        raise DamagedError(next(iter(damage.values())) + more)
    if not results:
        shown = any((path.parent / "ledger").is_dir() for path in paths)  # by a study, whose runs are in the ledger
        study = "; a study compares its own runs: orthokit study FILE --no-train" if shown else ""
        raise FileNotFoundError(f"no finished run (summary.json) in {', '.join(map(str, paths))}{study}")
    remarks = [f"left out, as what remains of its arm may be a lucky choice: {why}" for why in damage.values()]
    for kind in ("failed", "not finished"):
        if names := [f"{folder.parent.name}/{folder.name}" for folder, why in states.items() if why == kind]:
            bias = "; what remains of its arm may be a lucky choice" if kind == "failed" else ""
            remarks.append(f"{kind}, hence left out: {', '.join(names)}{bias}")
    for path in filter(Path.is_dir, paths):
        for _ in _walk(path, lambda error: remarks.append(f"cannot be read, hence left out with all runs in it: {error}")):
            pass
    return list(results.values()), remarks


def _check(path: Path) -> None:
    """Raise where there is neither a folder, nor a run, nor a ledger."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give folders of runs, such as runs/nano+cifar10+strict")
    if path.is_file() and path.name != SUMMARY and not is_ledger(path):
        study = f"; of a study: orthokit study {path} --no-train" if path.suffix == ".toml" else ""
        raise ValueError(f"{path} is not a run; give folders of runs, such as runs/nano+cifar10+strict{study}")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve fails on links that lead to themselves


def below(top: Path, pattern: str) -> list[Path]:
    """The files in and below a folder that match, through links too, without the runs that chose strengths; or ``top`` itself."""
    if top.is_file():
        return [top] if top.match(pattern) else []
    files = [Path(folder, name) for folder, inside in _walk(top) for name in fnmatch.filter(inside, pattern)]
    return [file for file in sorted(files) if file.relative_to(top).parts[-4:-3] != (TUNING,)]


def _walk(top: Path, on_error: Callable[[OSError], object] = lambda _: None) -> Iterator[tuple[str, list[str]]]:
    """Each folder in and below ``top`` once, and the names in it; ``on_error`` is called for those that cannot be listed."""
    visits = set[str]()
    for folder, folders, files in os.walk(top, onerror=on_error, followlinks=True):
        if (real := os.path.realpath(folder)) in visits:  # links may lead in a circle
            folders.clear()
        else:
            visits.add(real)
            yield folder, [*folders, *files]
