"""What is executed, what never: a module on the path whose import leaves a trace, named by every document that commands read."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import orthokit as ok
from orthokit.cli import main
from orthokit.lab.evaluation.evaluate import subjects
from orthokit.lab.own import Code, function
from orthokit.lab.recipes.compose import load
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.ledger import Ledger
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train
from tiny import TINY

CPU = Hardware(device="cpu", threads=1)
RELAXED = """
[regularizer]
strength = 0.1
penalty = { name = "disentangled", relax = { name = "fraction", rho = 0.5 }, form = "welch" }
"""
NETWORK = """
import pathlib
pathlib.Path({trace!r}).write_text("imported")
from torch import nn
def build(channels, classes, width=4):
    pooled = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return nn.Sequential(nn.Conv2d(channels, width, 3), pooled)
def load(*arguments, **options):
    return build(3, 10)
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that is on the path; it writes ``trace`` when it is imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/canary.py").write_text(NETWORK.format(trace=str(tmp_path / "trace")))
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "trace"
    sys.modules.pop("canary", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "base.toml").write_text(TINY)
    (folder / "relaxed.toml").write_text(TINY + RELAXED)
    for name in ("base", "relaxed"):
        train(Run(load(folder / f"{name}.toml"), 0, folder / "runs" / name / "0"), hardware=CPU)
    return folder / "runs"


def hostile(raw):
    return raw | {"network": {"kind": "canary:build"}}


@pytest.fixture
def runs(trained, canary, tmp_path):
    """Runs of built-in networks, whose documents now say that they are of the canary."""
    runs = shutil.copytree(trained, tmp_path / "runs")
    for file in runs.rglob("summary.json"):
        summary = json.loads(file.read_text())
        del summary["layers"]  # as old ones
        file.write_text(json.dumps(summary | {"recipe": hostile(summary["recipe"])}))
    for file in runs.rglob("*.safetensors"):
        recipe = hostile(Recipe.of(json.loads((file.parent / "summary.json").read_text())["recipe"]).to_dict())
        save_file(load_file(file), file, {"recipe": json.dumps(recipe)})
    for file in runs.rglob("recipe.toml"):
        file.write_text(Recipe.of(hostile(load(file).to_dict())).to_toml())
    return runs


COMMANDS = {
    "compare": ["compare", "runs/base", "runs/relaxed"],
    "compare a ledger": ["compare", "results/ledger"],
    "evaluate a folder": ["evaluate", "runs", "--jobs", "1"],
    "evaluate a run": ["evaluate", "runs/base/0", "--jobs", "1"],
    "evaluate weights": ["evaluate", "runs/base/0/last.safetensors", "--jobs", "1"],
    "features": ["evaluate", "runs/base/0", "--parts", "features", "--jobs", "1"],
    "report": ["report", "runs/base/0/last.safetensors"],
    "plan": ["plan", "runs/base/0/last.safetensors", "--fraction", "0.5"],
    "estimate": ["plan", "runs/base/0/last.safetensors", "--data", "digits"],
    "train": ["train", "base.toml", "--name", "base"],
    "resume": ["train", "base.toml", "--name", "resumed"],
    "sweep": ["sweep", "sweep.toml"],
    "study": ["study", "study.toml", "--no-train"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_document_is_executed(runs, canary, tmp_path, capsys, name):
    (tmp_path / "base.toml").write_text(TINY)
    (tmp_path / "relaxed.toml").write_text(TINY + RELAXED)
    (tmp_path / "sweep.toml").write_text('recipes = ["base.toml"]\nseeds = [0]\n[grid]\n"train.lr" = [0.1]\n')
    arms = '[arms]\nnone = {}\nrelaxed = { extends = "relaxed.toml" }\n[evaluate]\nparts = []\n'
    (tmp_path / "study.toml").write_text(f'title = "t"\nrecipe = "base.toml"\nseeds = [0]\n{arms}')
    resumed = shutil.copytree(runs / "base/0", runs / "resumed/0")
    (resumed / "summary.json").unlink()
    for folder in ("runs/sweep/base+train.lr=0.1", "runs/study/none"):
        shutil.copytree(runs / "base/0", tmp_path / folder / "0")
    kept = Ledger(tmp_path / "results/ledger")
    kept.put(json.loads((runs / "base/0/summary.json").read_text()))
    (hostile_file,) = kept.folder.glob("*.jsonl")
    for arm in ("base", "relaxed"):
        shutil.copy(hostile_file, kept.file(load(f"{arm}.toml")))
    status, text = main(COMMANDS[name]), capsys.readouterr()
    assert not canary.exists()
    assert "importing" not in text.err
    assert status in (0, 2)
    if name == "study":
        assert "holds runs of another recipe" in text.err
    if name in ("train", "resume", "sweep"):
        assert status == 2
        assert "holds a run of another recipe" in text.err
    if name.startswith("evaluate") or name == "features":
        assert status == 2
        assert "canary:build is code, and this recipe came with data" in text.err
    if name == "compare":
        assert "plans of" in text.out
        assert "canary:build is not imported here" in " ".join(text.out.split())


def test_a_recipe_in_a_runs_folder_reads_no_other_file(trained, tmp_path):
    run = Run(load(trained.parent / "base.toml"), 0, shutil.copytree(trained / "base/0", tmp_path / "0"))
    (run.folder / "summary.json").unlink()
    (tmp_path / "secret.toml").write_text(TINY)
    (run.folder / "recipe.toml").write_text('extends = "../secret.toml"\n')
    with pytest.raises(ValueError, match="unknown key extends"):
        run.summary()


def test_what_the_user_names_is_executed_and_told_first(runs, canary, tmp_path, capsys):
    assert main(["evaluate", "runs/base/0", "--model", "canary:other", "--jobs", "1"]) == 2
    assert "names a network that none of these runs has; theirs: canary:build" in capsys.readouterr().err
    assert not canary.exists()
    command = ["evaluate", "runs/base/0", "--parts", "orthogonality", "--jobs", "1"]
    assert main([*command, "--model", "canary:build"]) == 4  # whose weights are those of another network
    assert canary.exists()
    assert "importing canary:build" in capsys.readouterr().err


def test_a_run_of_ones_own_network(canary, tmp_path, capsys):
    recipe = TINY.replace('kind = "resnet"\ndepth = 8', 'kind = "canary:build"\nwidth = 6')
    (tmp_path / "own.toml").write_text(recipe)
    (tmp_path / "relaxed.toml").write_text(recipe + RELAXED)
    for name in ("own", "relaxed"):
        assert main(["train", f"{name}.toml", "--device", "cpu"]) == 0
        assert "importing canary:build for the network of your recipe" in capsys.readouterr().err
        assert main(["train", f"{name}.toml", "--device", "cpu"]) == 0
    canary.unlink()
    sys.modules.pop("canary")
    summary = json.loads((tmp_path / "runs/relaxed/0/summary.json").read_text())
    assert summary["layers"] == {"0": {"groups": 1, "o": 6, "n": 27, "stride": [1, 1]}}
    assert main(["compare", "runs"]) == 0  # with plans
    assert "not compared" not in capsys.readouterr().out
    assert main(["evaluate", "runs/own/0", "--jobs", "1"]) == 2
    assert not canary.exists()
    for options in (["--recipe", "own.toml"], ["--model", "canary:build"]):
        assert main(["evaluate", "runs/own/0", "--parts", "accuracy", "orthogonality", "--jobs", "1", *options]) == 0
        (tmp_path / "runs/own/0/evaluation.json").unlink()
    assert canary.exists()


def test_an_interrupted_run_of_ones_own_network_goes_on(canary, tmp_path):
    (tmp_path / "own.toml").write_text(TINY.replace('kind = "resnet"\ndepth = 8', 'kind = "canary:build"'))
    assert main(["train", "own.toml", "--device", "cpu"]) == 0
    folder = tmp_path / "runs/own/0"
    weights = load_file(folder / "last.safetensors")
    (folder / "summary.json").unlink()
    (folder / "last.safetensors").unlink()
    assert main(["train", "own.toml", "--device", "cpu"]) == 0
    assert all(torch.equal(value, weights[key]) for key, value in load_file(folder / "last.safetensors").items())


def test_permission_belongs_to_whole_recipes(canary, tmp_path):
    """Another recipe of the same function, with options of its own, has none."""
    raw = {"data": {"name": "synthetic"}, "network": {"kind": "canary:load", "source": "github"}, "train": {"epochs": 1}}
    assert Recipe.of(raw).code is None
    with pytest.raises(ValueError, match="canary:load is code"):
        Recipe.of(raw).network.build(3, 10)
    assert not canary.exists()
    function("canary:build", Code())
    with pytest.raises(ValueError, match="canary:load is code"):
        Recipe.of(raw).network.build(3, 10)
    assert isinstance(Recipe.of(raw).network.build(3, 10, Code()), torch.nn.Module)


def test_mixed_runs_are_evaluated_but_for_those_of_unnamed_code(runs, trained, canary, tmp_path, capsys):
    shutil.copytree(trained / "base/0", runs / "plain/0")
    assert main(["evaluate", "runs", "--parts", "orthogonality", "--jobs", "1"]) == 4
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("canary:build is code") == 2
    assert not canary.exists()
    assert (runs / "plain/0/evaluation.json").is_file()


def test_recipes_compare_by_what_they_say(tmp_path):
    (tmp_path / "a.toml").write_text(TINY)
    named = load(tmp_path / "a.toml")
    assert named.code is not None
    assert named == Recipe.of(named.to_dict())
    assert named != named.to_dict()
    assert named.code.folders == (tmp_path,)


def test_pictures_do_not_follow_settings_in_the_working_directory(tmp_path, monkeypatch):
    import matplotlib

    from orthokit.plots import draw

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # starts latex
    draw({"a": [ok.lab.networks.resnet.ResNet(8)]}, tmp_path / "a.png")
    assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_subjects_carry_what_the_user_named(runs, canary):
    assert [subject.recipe.code for subject in subjects(runs)] == [None, None]
    assert all(subject.recipe.code is not None for subject in subjects(runs, model="canary:build"))
    assert not canary.exists()
