"""The folder of a run, ``<out>/<name>/<seed>/``, and its files.

============================ =========================================================================================
``recipe.toml``              the resolved recipe
``environment.json``         versions, hardware, commit, precision, threads
``metrics.jsonl``            a line an epoch
``last.ckpt``                all that is needed to go on
``last.safetensors``         the trained weights, once training is done
``best.safetensors``         the weights of the best epoch by validation accuracy, where there is a validation part
``summary.json``             the result; written last, so where it is the run is finished
``diverged.json``            in its place, why training could not go on: the loss or a weight was no longer finite
``metrics.csv``              with ``--log``: the same as ``metrics.jsonl``
``tensorboard/``, ``wandb/`` likewise, for these programs
============================ =========================================================================================

Every file appears under its name at once and whole, or not at all.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field

from orthokit.lab.atomic import remove_parts, to_json, write
from orthokit.lab.recipes.compose import read_toml
from orthokit.lab.recipes.recipe import Recipe, differences
from orthokit.lab.runs.summary import DamagedError, Divergence, Epoch, Resumable, Seed, Summary, read, read_lines

__all__ = ["LATER", "SERVES", "SUMMARY", "HeldError", "Run", "Seeds"]

Seeds = Annotated[list[Seed], Field(min_length=1)]
"""Seeds in files of sweeps and studies."""
SUMMARY, DIVERGED = "summary.json", "diverged.json"
"""The files in a run's folder with its result, or with the reason why it could not go on."""
FILES = (
    *("recipe.toml", "environment.json", "metrics.jsonl", "last.ckpt", "last.safetensors", "best.safetensors"),
    *(SUMMARY, DIVERGED),
)
"""The files in a run's folder that only the process which trains the run writes."""
WAIT = 60.0
"""Seconds to wait for another process that holds the run: one that is asked to stop saves a checkpoint first."""
SERVES = "ORTHOKIT_SERVES"
"""The environment variable with the process for whose sake this one runs."""
LATER = 75
"""Exit status for the process in ``SERVES``: another process has the run."""


class HeldError(BlockingIOError):
    """Another process has the run."""

    @property
    def status(self) -> int:
        """Exit status of the command line: 2, or ``LATER`` where a process that starts many runs can wait."""
        return LATER if SERVES in os.environ else 2


@dataclass(frozen=True)
class Run:
    """One recipe, one seed, one folder."""

    recipe: Recipe
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """``<name>/<seed>``."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def checkpoint(self) -> Path:
        """The file with all that is needed to go on."""
        return self.folder / "last.ckpt"

    def summary(self) -> dict[str, Any] | None:
        """The result of the finished run, or None.

        Raises:
            ValueError: the folder holds a run of another recipe, or a damaged file.
        """
        if (path := self.folder / SUMMARY).is_file():
            summary = read(Summary, path)
            self._check(_recipe(summary["recipe"], path), path)
            return summary
        if self.checkpoint.is_file() and (path := self.folder / "recipe.toml").is_file():
            self._check(_recipe(read_toml(path), path), path)
        return None

    def damage(self) -> str | None:
        """The reason why the files of the run cannot be read; None if they can."""
        try:
            self.summary()
        except DamagedError as error:
            return str(error)
        return None

    def _check(self, present: Recipe, path: Path) -> None:
        if present != self.recipe:
            raise ValueError(
                f"{self.folder} holds a run of another recipe ({differences(present, self.recipe)}, in {path.name}); "
                "choose another --name or --out, or remove the folder"
            )

    @property
    def divergence(self) -> Path:
        """The file ``diverged.json``, there if training could not go on."""
        return self.folder / DIVERGED

    def has_diverged(self) -> bool:
        """Whether training this recipe could not go on.

        Raises:
            ValueError: a damaged file.
        """
        if not (path := self.divergence).is_file():
            return False
        return _recipe(read(Divergence, path)["recipe"], path) == self.recipe

    def diverge(self, why: str) -> None:
        """Record that training could not go on, and why."""
        write(self.divergence, to_json({"seed": self.seed, "why": why, "recipe": self.recipe.to_dict()}))

    def environment(self) -> dict[str, Any] | None:
        """The environment recorded when this run started. None if it has no checkpoint."""
        path = self.folder / "environment.json"
        if not (self.checkpoint.is_file() and path.is_file()):
            return None
        return read(Resumable, path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; none where there is none yet.

        Raises:
            DamagedError: the file is not what a run writes.
        """
        try:
            return read_lines(Epoch, self.folder / "metrics.jsonl")
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def hold(self, say: Callable[[str], object] = lambda _: None) -> Iterator[None]:
        """Keep every other process out of the folder, made if need be; ``say`` hears of another process to wait for.

        Files that a killed process left half written are removed.

        Raises:
            HeldError: another process holds the folder and does not let go.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"another process holds {self.name}; waiting for it to stop")
                lock.acquire(timeout=WAIT)
        except Timeout:
            raise HeldError(f"another process is training {self.folder}; wait for it, or stop it") from None
        try:
            for name in FILES:
                remove_parts(self.folder / name, idle=0)
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Whether another process holds the folder at this moment."""
        if not self.folder.is_dir():
            return False
        try:
            with self._lock().acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")


def _recipe(raw: dict[str, Any], path: Path) -> Recipe:
    """The recipe that a file of a run holds."""
    try:
        return Recipe.of(raw, str(path))
    except ValueError as error:
        raise DamagedError(f"{error}; remove {path.name} to run again") from None
