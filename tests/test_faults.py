"""A table of faults: whatever happens to a run, a file or a connection, nothing is lost in silence and a line says what to do."""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orthokit.cli import main
from orthokit.lab import files
from orthokit.lab import train as training
from orthokit.lab.hardware import Hardware
from orthokit.lab.recipe import Recipe
from orthokit.lab.record import Run
from orthokit.lab.train import train

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


@pytest.fixture
def quick(monkeypatch):
    """Saves after every step; no time for disks and for git."""
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("orthokit.lab.hardware._commit", lambda: None)


def before_each_save(monkeypatch, act):
    """Call ``act(number, part)`` before each file gets its name."""
    numbers, replace = itertools.count(), Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: (act(next(numbers), part), replace(part, path))[1])


# Kills


@pytest.mark.parametrize("epochs", [1, 3])
def test_killed_at_every_save(tmp_path, monkeypatch, quick, epochs):
    """The folder of a run, as it is before each file gets its name, is what a kill at that moment leaves."""
    whole, stages = Run(recipe(epochs), 0, tmp_path / "whole/r/0"), []

    def keep(number, part):
        stages.append(shutil.copytree(whole.folder, tmp_path / f"{number}/r/0"))

    with monkeypatch.context() as patch:
        before_each_save(patch, keep)
        train(whole, hardware=HARDWARE)
    assert len(stages) > 6 * epochs
    for stage in stages:
        assert list(stage.glob(".*.part"))
        run = Run(whole.recipe, 0, stage)
        train(run, hardware=HARDWARE)
        assert left_by(run) == left_by(whole), stage
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


def begun(folder):
    """A run that has a checkpoint and is not finished."""
    run = Run(recipe(1), 0, folder)
    train(run, hardware=HARDWARE)
    (folder / "summary.json").unlink()
    return run


def test_one_bit_anywhere_in_a_checkpoint_is_noticed_or_harmless(tmp_path, quick):
    """Whatever is read after a change is what was written."""
    path = begun(tmp_path / "r/0").checkpoint
    whole, refused = path.read_bytes(), 0

    def content(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: content(inner) for key, inner in value.items()}
        return [content(inner) for inner in value] if isinstance(value, list) else value

    expected = content(files.read_checkpoint(path))
    places = [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 60, len(whole), 4)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            present = content(files.read_checkpoint(path))
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
        files.write_checkpoint(path, state)

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
def test_a_checkpoint_that_cannot_be_read_says_what_it_is(tmp_path, quick, capsys, damage, reason):
    run = begun(tmp_path / "r/0")
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


def test_checkpoints_of_before_are_taken(tmp_path, quick):
    """They do not say what they are of."""
    run = begun(tmp_path / "r/0")
    changed(lambda state: state.pop("of"))(run.checkpoint)
    train(run, hardware=HARDWARE)


# Full disks


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors", "last.safetensors", "metrics.jsonl", "summary.json"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, quick, capsys, name):
    """The file does not fit; what was there stays, and the run goes on once there is room."""
    whole, run = Run(recipe(2), 0, tmp_path / "whole/r/0"), Run(recipe(2), 0, tmp_path / "r/0")
    train(whole, hardware=HARDWARE)
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
    assert re.search(rf"File too large: '.*/r/0/\.?{re.escape(name)}", lines[0])
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
    files.write(target, "y")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, *others}
