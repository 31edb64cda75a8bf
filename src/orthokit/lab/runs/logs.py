"""Logs of runs for other programs: the lines of ``metrics.jsonl`` in TensorBoard, Weights & Biases or a CSV file."""

import contextlib
import csv
import importlib
import io
import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from orthokit.integrations.logs import write_to
from orthokit.lab.atomic import write
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.run import Run

__all__ = ["Kind", "Log", "check_installed", "numbers"]

Kind = Literal["tensorboard", "wandb", "csv"]
Add = Callable[[Sequence[dict[str, float]]], object]
"""Writes further rows to a log."""
WANDB_ID = "wandb.id"
"""The file in a run's folder with its id at W&B."""
NEEDS: dict[Kind, str] = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_installed(kind: Kind | None) -> None:
    """Raise ``ModuleNotFoundError``, with what to install, where the library of a kind of log is missing."""
    try:
        if kind in NEEDS:
            importlib.import_module(NEEDS[kind])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--log {kind} needs {error.name}: pip install {kind}", name=error.name) from None


class Log(Watch):
    """A :class:`Watch` that keeps the log of a run up with its ``metrics.jsonl``, and passes everything on to another one.

    A process begins the log with the lines that are there. So a run that was interrupted, anywhere, and goes on has each epoch in
    its log once.

    Args:
        kind: the log; None for none.
        watch: hears the same.

    Raises:
        ModuleNotFoundError: TensorBoard or W&B is not installed.
    """

    def __init__(self, kind: Kind | None, watch: Watch) -> None:
        check_installed(kind)
        self.kind, self.watch = kind, watch
        self._folder: Path | None = None  # of the run whose log is open
        self._rows = 0
        self._add: Add = len
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def step(self, run: Run, epochs: float, loss: float, speed: float) -> None:
        """Pass it on."""
        self.watch.step(run, epochs, loss, speed)

    def say(self, text: str) -> None:
        """Pass it on."""
        self.watch.say(text)

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """Pass the epoch on, and log it."""
        self.watch.row(run, row)
        self.update(run)

    def update(self, run: Run, *, before: bool = False) -> None:
        """Log the epochs of a run that its log lacks.

        Args:
            run: the run.
            before: whether it had finished before this command; W&B, where each run takes seconds, gets it only if it never did.
        """
        if self.kind is None or (before and self.kind == "wandb" and (run.folder / WANDB_ID).is_file()):
            return
        rows = run.metrics()
        if run.folder != self._folder:
            self._open.close()
            self._add, self._folder, self._rows = self._open.enter_context(OPEN[self.kind](run, self.say)), run.folder, 0
        if new := rows[self._rows :]:
            self._add([numbers(row) for row in new])
        self._rows = len(rows)


def numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl``, by the keys that lead to each.

    >>> numbers({"step": 8, "train": {"loss": 0.5}, "validation": None})
    {'step': 8, 'train/loss': 0.5}
    """
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            values |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            values[prefix + key] = value
    return values


Say = Callable[[str], object]


@contextlib.contextmanager
def _csv(run: Run, say: Say) -> Iterator[Add]:
    rows: list[dict[str, float]] = []

    def add(new: Sequence[dict[str, float]]) -> None:
        rows.extend(new)
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write(run.folder / "metrics.csv", text.getvalue())

    yield add


@contextlib.contextmanager
def _tensorboard(run: Run, say: Say) -> Iterator[Add]:
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    # purge_step: a TensorBoard that is looking on forgets what it has read from the old file.
    with SummaryWriter(folder, purge_step=0) as writer:
        one = write_to(writer)

        def add(new: Sequence[dict[str, float]]) -> None:
            _each(one, new)
            writer.flush()

        yield add


@contextlib.contextmanager
def _wandb(run: Run, say: Say) -> Iterator[Add]:
    import wandb

    run.folder.mkdir(parents=True, exist_ok=True)
    name = run.folder / WANDB_ID  # random: a run that was removed and is trained again is another one
    if not name.is_file():
        write(name, secrets.token_hex(8))
    log = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "orthokit"),
        name=run.name,
        group=run.folder.parent.name,
        id=name.read_text("utf-8"),
        resume="allow",
        dir=run.folder,
        config=run.recipe.to_dict(),
        mode=None if _signed_in() else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    one, there = write_to(log), log.step  # the server has the steps before this one
    files = Path(log.dir).parent
    if log.offline:  # an earlier part of this run, uploaded too, would double its epochs
        for old in files.parent.glob(f"offline-run-*-{log.id}"):
            if old != files:
                shutil.rmtree(old)
    try:
        yield lambda new: _each(one, [row for row in new if row["step"] >= there])
    finally:
        log.finish()
        say(f"W&B, offline; to upload it: wandb sync {files}" if log.offline else f"W&B: {log.url}")


def _signed_in() -> bool:
    """Whether W&B has a mode or a key; it would ask for a key otherwise."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _each(one: Callable[[dict[str, float], int], object], rows: Sequence[dict[str, float]]) -> None:
    for row in rows:
        one({key: value for key, value in row.items() if key != "step"}, int(row["step"]))


OPEN: dict[Kind, Callable[[Run, Say], contextlib.AbstractContextManager[Add]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "csv": _csv,
}
