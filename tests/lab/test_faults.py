"""A table of faults: whatever happens to a run, a file or a connection, nothing is lost in silence and a line says what to do."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from made_up import made_up
from orthokit.cli import main
from orthokit.lab import atomic
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs import collect, control, launch
from orthokit.lab.runs.launch import Pool, run_all
from orthokit.lab.runs.progress import Display
from orthokit.lab.runs.run import LATER, Run
from orthokit.lab.training import loop as training
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train

HARDWARE = Hardware(device="cpu", threads=1)


def recipe(epochs=3):
    """Two steps an epoch of a small network on small digits."""
    return Recipe.of(
        {
            "data": {"name": "digits", "train": 100, "validation": 100, "size": 4, "pad": 1},
            "network": {"kind": "resnet", "depth": 8},
            "train": {"epochs": epochs, "batch": 50, "precision": "32-true"},
            "regularizer": {"strength": 0.1, "penalty": "so"},
        }
    )


def left_by(run):
    """What a run leaves, without what tells the time."""

    def timeless(value):
        if isinstance(value, dict):
            times = ("seconds", "images_per_second", "penalty_share")
            return {key: timeless(inner) for key, inner in value.items() if key not in times}
        return [timeless(inner) for inner in value] if isinstance(value, list) else value

    weights = {name: load_file(run.folder / f"{name}.safetensors") for name in ("last", "best")}
    bits = {name: {key: value.numpy().tobytes() for key, value in state.items()} for name, state in weights.items()}
    summary = json.loads((run.folder / "summary.json").read_text())
    return bits, timeless(run.metrics()), timeless(summary)


def hasten(patch):
    """Save after every step; leave disks and git out."""
    patch.setattr(training, "SAVE_EVERY", -1.0)
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr("orthokit.lab.training.hardware._commit", lambda: None)


@pytest.fixture
def quick(monkeypatch):
    hasten(monkeypatch)


def before_each_save(monkeypatch, act):
    """Call ``act(number, part)`` before each file gets its name."""
    numbers, replace = itertools.count(), Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: (act(next(numbers), part), replace(part, path))[1])


# Kills


@pytest.mark.parametrize("epochs", [1, 2])
def test_killed_at_every_save(tmp_path, monkeypatch, quick, epochs):
    """The folder of a run, as it is before each file gets its name, is what a kill at that moment leaves."""
    whole, stages = Run(recipe(epochs), 0, tmp_path / "whole/r/0"), []

    def keep(number, part):
        stages.append(shutil.copytree(whole.folder, tmp_path / f"{number}/r/0"))

    with monkeypatch.context() as patch:
        before_each_save(patch, keep)
        train(whole, hardware=HARDWARE)
    assert len(stages) > 6 * epochs
    expected = left_by(whole)
    for stage in stages:
        assert list(stage.glob(".*.part"))
        run = Run(whole.recipe, 0, stage)
        train(run, hardware=HARDWARE)
        assert left_by(run) == expected, stage
        assert not list(stage.glob(".*.part"))


class Killed(BaseException):
    """Nothing catches it."""


def test_killed_again_and_again(tmp_path, monkeypatch, quick):
    whole, run = Run(recipe(), 0, tmp_path / "whole/r/0"), Run(recipe(), 0, tmp_path / "killed/r/0")
    train(whole, hardware=HARDWARE)

    def die(number, part):
        if number == 5:  # the least that gets on: recipe and metrics at the start; best weights, metrics, checkpoint
            raise Killed

    for kills in range(20):  # noqa: B007
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            before_each_save(patch, die)
            train(run, hardware=HARDWARE)
            break
    assert kills >= 4
    assert left_by(run) == left_by(whole)


# Damaged checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of finished runs of one and of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        for epochs in (1, 2):
            train(Run(recipe(epochs), 0, folder / f"{epochs}/r/0"), hardware=HARDWARE)
    return folder


@pytest.fixture
def begun(tmp_path, quick, finished):
    """A run that has a checkpoint and is not finished."""
    run = Run(recipe(1), 0, shutil.copytree(finished / "1/r/0", tmp_path / "r/0"))
    (run.folder / "summary.json").unlink()
    return run


def test_one_bit_anywhere_in_a_checkpoint_is_noticed_or_harmless(begun):
    """Whatever is read after a change is what was written."""
    path = begun.checkpoint
    whole, refused = path.read_bytes(), 0

    def content(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: content(inner) for key, inner in value.items()}
        return [content(inner) for inner in value] if isinstance(value, list) else value

    expected = content(atomic.read_checkpoint(path))
    places = [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 60, len(whole), 4)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            present = content(atomic.read_checkpoint(path))
        except ValueError:
            refused += 1
        else:
            assert present == expected, place
    assert refused > 40


def changed(change):
    """Damages a checkpoint: changes what it holds and writes it anew."""

    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        atomic.write_checkpoint(path, state)

    return damage


def flipped(path):
    content = path.read_bytes()
    middle = content.index(b"data/0") + 100
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, r"it is damaged: the checksum of .*data/\d+ is wrong"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "it is damaged: File is not a zip file"),
        (lambda path: path.write_bytes(b""), "it is damaged: File is not a zip file"),
        (lambda path: torch.save({"model": Evil()}, path), "it is whole, but not a checkpoint of this version of orthokit"),
        (lambda path: torch.save([1, 2], path), "it is whole, but not a checkpoint of this version of orthokit"),
        (changed(lambda state: state.pop("optimizer")), "not a checkpoint of this version of orthokit .*'optimizer'"),
        (changed(lambda state: state["model"].pop("fc.bias")), "it is of another network than the recipe builds now .*fc.bias"),
        (changed(lambda state: state["of"].update(seed=7)), "it is of a run with seed 7, and this one has 0"),
        (changed(lambda state: state["of"].update(threads=3)), "it is of a run with threads 3, and this one has 1"),
        (changed(lambda state: state["of"]["recipe"]["train"].update(lr=7.0)), r"of another recipe \(train.lr: 7.0 -> 0.1\)"),
        (changed(lambda state: state["progress"]["history"].clear()), "at step 2 of 2 to an epoch, but has the epochs"),
        (changed(lambda state: state["progress"].update(step=9)), "at step 9 of 2 to an epoch, but has the epochs"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_says_what_it_is(begun, tmp_path, capsys, damage, reason):
    run = begun
    if reason.startswith("at step 2"):
        damage = changed(lambda state: state["progress"].update(history=[{"epoch": 3}]))
    damage(run.checkpoint)
    (tmp_path / "r.toml").write_text(run.recipe.to_toml())
    assert main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path), "--threads", "1", "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(f"r/0/last.ckpt cannot be read: .*{reason}", lines[0])
    assert re.search("To go on with r/0, put back .*; to train it again from the beginning, and lose .*, remove it$", lines[0])
    assert not (run.folder / "diverged.json").exists()


def test_checkpoints_of_before_are_taken(begun):
    """They do not say what they are of."""
    changed(lambda state: state.pop("of"))(begun.checkpoint)
    train(begun, hardware=HARDWARE)


# Full disks


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors", "last.safetensors", "metrics.jsonl", "summary.json"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, quick, finished, capsys, name):
    """The file does not fit; what was there stays, and the run goes on once there is room."""
    whole, run = Run(recipe(2), 0, finished / "2/r/0"), Run(recipe(2), 0, tmp_path / "r/0")
    write_bytes = Path.write_bytes

    def small(path, data):
        if path.name.startswith(f".{name}."):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, hard))
            try:
                return write_bytes(path, data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return write_bytes(path, data)

    (tmp_path / "r.toml").write_text(run.recipe.to_toml())
    arguments = ["train", str(tmp_path / "r.toml"), "--out", str(tmp_path), "--threads", "1", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", small)
        assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(rf"/r/0/\.?{re.escape(name)}[^:]*: File too large", lines[0])
    assert not list(run.folder.glob(".*.part"))
    assert main(arguments) == 0
    assert left_by(run) == left_by(whole)


def test_only_the_disk_of_the_run_counts(tmp_path, monkeypatch, quick):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    train(Run(recipe(1), 0, tmp_path / "r/0"), hardware=HARDWARE)


def test_old_parts_of_any_file_are_removed(tmp_path):
    target, others = tmp_path / "a.csv", [".b.csv.0123abcd.part", ".a.csv.new.part", "a.csv.part"]
    old = tmp_path / ".a.csv.0123abcd.part"
    for name in (old.name, *others):
        (tmp_path / name).write_text("x")
    os.utime(old, (0, 0))
    atomic.write(target, "y")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, *others}


# Two commands


class Shell(Pool):
    """Does a run by a line of the shell; ``$1`` is the recipe."""

    line = ""

    def command(self, run, recipe):
        return ["sh", "-c", self.line, "sh", str(recipe)]


def run_all_by(run, line):
    """What the shell's line comes to as a run, and what is shown meanwhile."""
    console = Console(file=io.StringIO(), width=500)
    pool = Shell(jobs=1)
    object.__setattr__(pool, "line", line)
    with Display(console) as display:
        return run_all([run], pool, display), console.file.getvalue()


@pytest.fixture
def pair(tmp_path, quick, finished, monkeypatch):
    """A run that is not begun, and the summary that it would come to."""
    monkeypatch.setattr(launch, "LOOK_EVERY", 0.02)
    return Run(recipe(1), 0, tmp_path / "r/0"), finished / "1/r/0/summary.json"


def test_a_run_that_another_command_trains_is_left_to_it(pair):
    run, summary = pair
    holding, shown = threading.Event(), []

    def other():
        with run.hold():
            (run.folder / "log.txt").write_text("of the other\n")
            holding.set()
            while not shown:
                time.sleep(0.01)
            shutil.copy(summary, run.folder)

    thread = threading.Thread(target=other)
    thread.start()
    holding.wait()
    say, Display.say = Display.say, lambda self, text: (shown.append(text), say(self, text))[1]
    try:
        statuses, text = run_all_by(run, "echo not to be called; exit 1")
    finally:
        Display.say = say
        thread.join()
    assert statuses == [0]
    assert "r/0 is being trained by another command; waiting for it" in text
    assert "validation" in text
    assert (run.folder / "log.txt").read_text() == "of the other\n"
    assert not (run.folder / "failed.txt").exists()


def test_a_run_that_another_command_leaves_is_taken_up(pair):
    """First the process finds the run held by another one, as it takes seconds to begin; the next one finishes it."""
    run, summary = pair
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").write_text("before\n")
    foreign = atomic.part_of(run.folder / launch.QUEUED)
    foreign.write_text("of another command")
    first = f"test -f $1 || exit 9; if mkdir {run.folder}/once 2>&-; then echo held; exit {LATER}; fi"
    statuses, _ = run_all_by(run, f"{first}; echo done; cp {summary} {run.folder}")
    assert statuses == [0]
    assert (run.folder / "log.txt").read_text() == "before\nheld\ndone\n"
    assert [*run.folder.glob(".*.part")] == [foreign]


def test_a_failure_is_told_by_its_own_last_line(pair):
    run, _ = pair
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").write_text("before\n")
    for line, why in (("echo broken >&2; exit 3", "broken"), ("exit 3", "exit status 3"), ("kill -9 $$", "killed by signal 9")):
        statuses, text = run_all_by(run, line)
        assert statuses[0] != 0
        assert f"r/0  failed: {why}" in text
        assert (run.folder / "failed.txt").read_text().startswith(why)


def test_what_cannot_be_started_fails_alone(pair):
    run, _ = pair
    (run.folder / "log.txt").mkdir(parents=True)
    statuses, text = run_all_by(run, "true")
    assert statuses == [2]
    assert re.search(r"r/0  failed: .*Is a directory: .*log\.txt", text)


# Orphans and interruptions


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_worker_ends_with_its_parent(monkeypatch):
    """The pipe is closed when the worker has ended."""
    monkeypatch.setattr(control, "LOOK_EVERY", 0.02)
    reading, writing = os.pipe()
    if (parent := os.fork()) == 0:
        if os.fork() == 0:
            control.follow(os.getppid())
            os.write(writing, b"up")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 2)
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    assert select.select([reading], [], [], 20)[0]
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at a process as it imports")
def test_an_interruption_while_importing_is_one_word():
    process = subprocess.Popen([sys.executable, "-m", "orthokit.cli", "list"], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == 130


def test_a_termination_signal_is_an_interruption(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("orthokit.cli.look.List.run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


# Runs that cannot be read


def test_compare_tells_what_it_cannot_read_and_follows_links(tmp_path, monkeypatch, capsys):
    for run in made_up({"none": 0, "so": 1, "strict": 2}, depths=[8]):
        folder = tmp_path / "elsewhere" / run.summary["name"] / str(run.seed)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(atomic.to_json(run.summary))
    runs, arms = tmp_path / "runs", sorted((tmp_path / "elsewhere").iterdir())
    runs.mkdir()
    arms[0].rename(runs / arms[0].name)
    for arm in arms[1:]:
        (runs / arm.name).symlink_to(arm)
    (arms[1] / "back").symlink_to(runs)  # in a circle
    actual, text = collect.read([runs])
    assert (len(actual), len({run.summary["name"] for run in actual}), text) == (9, 3, [])

    scandir = os.scandir

    def forbidding(folder):
        if Path(folder).name == arms[2].name:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidding)
    actual, text = collect.read([runs])
    assert len(actual) == 6
    assert text == [f"cannot be read, hence left out with all runs in it: [Errno 13] Permission denied: '{runs / arms[2].name}'"]
    assert main(["compare", str(runs)]) == 0
    assert "cannot be read, hence left out with all runs in it" in " ".join(capsys.readouterr().out.split())
