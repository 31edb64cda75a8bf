"""A small study in a folder of its own, whose runs are trained and evaluated once for all tests."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orthokit.lab import study
from orthokit.lab.evaluation import evaluate
from orthokit.lab.runs.results import RECORD
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import DivergenceError, train
from tiny import STUDY, TINY


@dataclass
class Lab:
    """Studies in a folder; training happens in this process, and ``trained`` is told of it."""

    folder: Path
    shared: Path
    """The folders of the runs that any test has trained, by recipe and seed."""
    trained: list[str] = field(default_factory=list)
    events: list[study.Event] = field(default_factory=list)

    def write(self, text: str, name: str = "tiny") -> Path:
        """The file of a study."""
        file = self.folder / f"{name}.toml"
        file.write_text(text)
        return file

    def plan(self, name: str = "tiny") -> study.Plan:
        return study.plan(self.folder / f"{name}.toml", out=self.folder / "runs", results=self.folder / "results")

    def run(self, text: str | None = None, name: str = "tiny", **options) -> study.Outcome:
        """What a study comes to, after its file is written anew; ``events`` are those of this run alone."""
        file = self.folder / f"{name}.toml" if text is None else self.write(text, name)
        self.events.clear()
        options = {"train": self.train, "measure": self.measure} | options
        return study.run(file, out=self.folder / "runs", results=self.folder / "results", on_event=self.events.append, **options)

    def texts(self, kind: str) -> list[str]:
        """What the events of a kind say."""
        return [event.text for event in self.events if event.kind == kind]

    def train(self, runs: Sequence[Run], test: bool) -> int:
        statuses = []
        for run in runs:
            assert test == (run.folder.parents[1].name != "tuning")
            statuses.append(self.train_one(run))
        return max(statuses)

    def train_one(self, run: Run) -> int:
        """An exit status: 4 where training diverges."""
        once = self.shared / run.recipe.digest / str(run.seed)
        if not once.exists():
            with contextlib.suppress(DivergenceError):
                train(Run(run.recipe, run.seed, once), hardware=Hardware(device="cpu", threads=1))
        shutil.copytree(once, run.folder, dirs_exist_ok=True)
        self.trained.append(run.name)
        return 4 if run.has_diverged() else 0

    def measure(self, subjects: Sequence[evaluate.Subject], asked: study.Study) -> int:
        status = evaluate.evaluate(subjects, parts=asked.evaluate.parts, images=asked.evaluate.images, jobs=1, device="cpu")
        for subject in subjects:
            once = self.shared / subject.recipe.digest / subject.record.parent.name
            if once.exists() and not (once / RECORD).exists() and subject.record.exists():
                shutil.copy(subject.record, once / RECORD)
        return status

    def kept(self, name: str = "tiny") -> list[str]:
        """Arm and seed of what the ledger holds of a study."""
        return [f"{task.arm}/{task.run.seed}" for task in self.plan(name).tasks if task.result() is not None]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def lab(tmp_path, monkeypatch, shared):
    (tmp_path / "base.toml").write_text(TINY)
    (tmp_path / "so.toml").write_text('[regularizer]\nstrength = 0.1\npenalty = "so"\n')
    (tmp_path / "tiny.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, shared)
