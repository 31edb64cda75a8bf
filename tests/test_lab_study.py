"""Studies: planned, trained, evaluated, kept, compared and drawn; nothing twice."""

import json
import shutil
from pathlib import Path

import pytest

from orthokit.cli import main
from orthokit.cli.lab import Machine
from orthokit.lab import study
from orthokit.lab.hardware import Hardware
from orthokit.lab.results import read
from orthokit.lab.train import train
from tiny import TINY

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
UNFINISHED = {"depth"}
STUDY = """
title = "Tiny"
recipe = "base.toml"
seeds = [0, 1]

[arms]
none = {}
so = { extends = "so.toml" }

[evaluate]
images = 20
parts = ["accuracy", "noise", "orthogonality"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "base.toml").write_text(TINY)
    (tmp_path / "so.toml").write_text('[regularizer]\nstrength = 0.1\npenalty = "so"\n')
    (tmp_path / "tiny.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Does runs here, as the command does them in processes of their own; which have been done."""
    done = []

    def run_all(machine, runs, console, *, test=True):
        for run in runs:
            train(run, hardware=Hardware(device="cpu", threads=1))
        done.extend(run.name for run in runs)
        return 0

    monkeypatch.setattr(Machine, "run_all", run_all)
    return done


def words(text):
    return " ".join(text.split())


def test_a_study_from_one_file(folder, in_process, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    assert main(command) == 0
    said = words(capsys.readouterr().out)
    assert "Tiny: 4 of 4 runs to train, 4 to evaluate" in said
    assert "so against none is" in said
    assert "power: 2 seeds an arm" in said
    assert in_process == ["none/0", "so/0", "none/1", "so/1"]
    kept = folder / "results/tiny"
    assert {path.relative_to(kept).as_posix() for path in kept.rglob("*.json")} == {
        f"runs/{arm}/{seed}/summary.json" for arm in ("none", "so") for seed in (0, 1)
    }
    small = json.loads((kept / "runs/so/1/summary.json").read_text())
    assert small["study"]["arm"] == "so"
    assert set(small["evaluation"]) == {"accuracy", "noise", "orthogonality"}
    assert "platform" not in small["environment"]
    for name in ("README.md", "report.html", "tables.tex", "numbers.csv"):
        assert (kept / name).stat().st_size > 500
    pictures = sorted((kept / "figures").glob("*.svg"))
    assert pictures
    assert f"orthokit study {folder.name}/tiny.toml" in (kept / "README.md").read_text()
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}

    # Nothing to do: it only draws, the same, with or without the weights.
    shutil.rmtree(folder / "runs")
    pictures[0].unlink()
    (kept / "figures/old.svg").touch()
    assert main(command) == 0
    assert "Tiny: all is done" in words(capsys.readouterr().out)
    assert in_process == ["none/0", "so/0", "none/1", "so/1"]
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert len(read([kept])[0]) == 4
    assert main(["compare", str(kept)]) == 0
    assert "so against none" in words(capsys.readouterr().out)

    # Another seed, another arm: what is new is trained.
    half = 'half = { extends = "so.toml", regularizer.strength = 0.05 }'
    text = STUDY.replace("[0, 1]", "[0, 1, 2]").replace("\n[evaluate]", f"{half}\n[evaluate]")
    (folder / "tiny.toml").write_text(text)
    assert main(command) == 0
    assert in_process[4:] == ["half/0", "half/1", "none/2", "so/2", "half/2"]
    assert "so, half differ in strength alone" in words(capsys.readouterr().out)

    # An arm less: what was kept of it is told.
    (folder / "tiny.toml").write_text(STUDY)
    assert main(command) == 0
    assert "of no part in this study any more: 5 results" in words(capsys.readouterr().out)
    assert len(in_process) == 9


def test_more_to_evaluate(folder, in_process, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    assert main(command) == 0
    (folder / "tiny.toml").write_text(STUDY.replace('"noise"', '"noise", "features"'))
    assert main(command) == 0
    assert len(in_process) == 4  # the weights are there
    assert "features" in json.loads((folder / "results/tiny/runs/so/0/summary.json").read_text())["evaluation"]
    assert len(in_process) == 4


def test_panels_and_factors(folder):
    panels = '[networks]\n"ResNet-8" = {}\n"ResNet-14" = { network.depth = 14 }\n[factors]\n"train.epochs" = [1, 2]\n'
    (folder / "tiny.toml").write_text(STUDY.replace("\n[evaluate]", f"{panels}[evaluate]"))
    plan = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")
    assert len(plan.tasks) == 2 * 2 * 2 * 2
    assert list(dict.fromkeys(task.panel for task in plan.tasks)) == [
        f"{name}, epochs={e}" for name in ("ResNet-8", "ResNet-14") for e in (1, 2)
    ]
    last = plan.tasks[-1]
    assert (last.run.recipe.network.model_extra["depth"], last.run.recipe.train.epochs) == (14, 2)
    assert last.run.folder == folder / "runs/tiny/ResNet-14-so+train.epochs=2/1"
    assert last.kept == folder / "results/tiny/runs/ResNet-14-so+train.epochs=2/1/summary.json"
    assert last.run.recipe.regularizer is not None
    assert plan.command == f"orthokit study {folder.name}/tiny.toml"


def test_what_is_missing_is_flagged(folder, in_process, capsys, monkeypatch):
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 0
    (folder / "tiny.toml").write_text(STUDY.replace("[0, 1]", "[0, 1, 2]"))
    monkeypatch.setattr(Machine, "run_all", lambda *arguments, **options: 4)
    capsys.readouterr()
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 4
    assert "! 2 of 6 runs are missing; what is there may be a lucky choice" in words(capsys.readouterr().out)


def test_what_is_finished_is_kept_when_interrupted(folder, monkeypatch, capsys):
    done = []

    def run_all(machine, runs, console, *, test=True):
        for run in runs[: 3 - len(done)]:
            train(run, hardware=Hardware(device="cpu", threads=1))
            done.append(run.name)
        if len(done) == 3:
            done.append("interrupted")
            raise KeyboardInterrupt
        return 4

    monkeypatch.setattr(Machine, "run_all", run_all)
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 130
    assert done == ["none/0", "so/0", "none/1", "interrupted"]  # every arm before the next seed
    kept = sorted(
        path.parent.relative_to(folder / "results/tiny/runs").as_posix() for path in folder.rglob("results/**/summary.json")
    )
    assert kept == ["none/0", "none/1", "so/0"]
    capsys.readouterr()
    text = STUDY.replace('"accuracy", "noise", "orthogonality"', "")
    (folder / "tiny.toml").write_text(text)
    shutil.rmtree(folder / "runs")
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 4
    said = words(capsys.readouterr().out)
    assert "1 of 4 runs to train, 1 to evaluate" in said
    assert "! 1 of 4 runs are missing" in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must differ"),
        ("seeds", "seed", "unknown key seed; did you mean 'seeds'?"),
        ('"base.toml"', '"bass.toml"', "no recipe"),
        ('"noise"', '"nose"', "no part 'nose'; did you mean 'noise'?"),
        ("title", 'baseline = "non"\ntitle', "no arm 'non'"),
        ("title", 'metric = "acuracy"\ntitle', "none is called 'acuracy'"),
        ("none = {}", "none = { train.epoch = 3 }", "none: unknown key train.epoch"),
        ("none = {}\n", "", "arms"),
        ('"so.toml"', "3", "extends must be a file"),
        ("none = {}", '"s/o" = {}\n"s o" = { regularizer = { strength = 1, penalty = "dso" } }', "would share the folder s-o"),
        ("title", "title = [", "is no TOML"),
        (
            "none = {}",
            "none = { train.epochs = 3 }",
            "runs differ in train.epochs, which is not the declared factor",
        ),
        ("none = {}", "none = {}\nzero = {}", "the arms none and zero have the same recipe"),
        ("none = {}", '".." = {}', "'..' is no name for an arm"),
        ("title", 'metric = "pgd"\ntitle', "metric = 'pgd' needs 'attacks' among evaluate.parts"),
        ("[evaluate]", '[factors]\n"train.epochs" = [1, 1]\n[evaluate]', "factors.train.epochs must differ"),
        ("[evaluate]", '[factors]\n"train.epochs" = [1, 2]\n[evaluate]', "overrides what its panel is to have in common"),
        ("[evaluate]", "[networks]\na = {}\nb = {}\n[evaluate]", "none has the same recipe in the panels a and b"),
    ],
)
def test_mistakes_are_told(folder, capsys, old, new, message):
    if "overrides" in message:
        (folder / "so.toml").write_text('[train]\nepochs = 1\n[regularizer]\nstrength = 0.1\npenalty = "so"\n')
    (folder / "tiny.toml").write_text(STUDY.replace(old, new, 1))
    assert main(["study", "tiny.toml"]) == 2
    assert message in words(capsys.readouterr().err)
    assert not (folder / "runs").exists()


def test_a_baseline_that_failed(folder, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "run_all", lambda *arguments, **options: 4)
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 4
    assert "nothing to compare yet" in words(capsys.readouterr().out)


def test_no_such_study(capsys):
    assert main(["study", "nothing.toml"]) == 2
    assert "no study nothing.toml is there" in capsys.readouterr().err


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_repository(file, tmp_path):
    """Their results are kept, whole unless unfinished, and of the recipes as they are now."""
    plan = study.plan(file, out=tmp_path, results=file.parents[1] / "results")
    left = plan.left()
    assert bool(left) == (file.stem in UNFINISHED)
    assert plan.strangers() == []
    written = (plan.folder / "README.md").read_text()
    verdicts = plan.comparison().verdicts()
    assert verdicts
    assert all(verdict in written for verdict in verdicts)
    assert (f"{len(left)} of {len(plan.tasks)} runs are missing" in written) == bool(left)
