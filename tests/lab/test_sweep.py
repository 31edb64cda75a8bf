"""Many runs: side by side, failures apart, interruption passed on, a grid and a search judged on validation alone."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orthokit.checks import install
from orthokit.cli import main
from orthokit.lab import sweep
from orthokit.lab.comparison.inference import Sample
from orthokit.lab.comparison.tuning import RULE, Choice, Trial
from orthokit.lab.recipes.compose import load
from orthokit.lab.runs.launch import Pool
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train
from tiny import TINY

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.toml"))
RECIPE = f'{TINY}[regularizer]\nstrength = 0.1\npenalty = "so"\n'


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path / "r.toml"


def words(text):
    return " ".join(text.split())


def in_process(runs):
    """Does runs here, as the command does them in processes of their own."""
    for run in runs:
        train(run, hardware=Hardware(device="cpu", threads=1))
    return 0


def test_several_runs_of_which_one_fails(recipe, tmp_path, capsys, forked):
    (tmp_path / "bad.toml").write_text(f'extends = "{recipe.name}"\n[train]\nlr = 1e25\nweight_decay = 0.0\n')
    arguments = [
        "train",
        str(recipe),
        str(tmp_path / "bad.toml"),
        "--seeds",
        "0",
        "1",
        "--out",
        str(tmp_path / "runs"),
        "--jobs",
        "2",
    ]
    assert main([*arguments, "--device", "cpu"]) == 4
    out = capsys.readouterr().out
    assert "2 of 4 runs finished" in out
    assert len(re.findall(r"^bad/[01]  failed: .*diverged", out, re.M)) == 2
    assert len(re.findall(r"^r/[01]  epoch 1/1  loss", out, re.M)) == 2
    assert len(re.findall(r"^r/[01]  validation .*%, test", out, re.M)) == 2
    assert "diverged" in (tmp_path / "runs/bad/0/failed.txt").read_text()
    alone = Run(load(recipe), 0, tmp_path / "alone/0")
    in_process([alone])
    beside = Run(load(recipe), 0, tmp_path / "runs/r/0")
    assert beside.summary()["test"] == alone.summary()["test"]  # a run does not depend on those beside it
    assert beside.summary()["environment"]["threads"] == 1
    assert main(["train", str(recipe), "--seeds", "0", "1", "--out", str(tmp_path / "runs"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_an_interruption_is_passed_on(recipe, tmp_path, forked):
    command = [sys.executable, "-m", "orthokit.cli", "train", str(recipe), "--seeds", "0", "1", "2", "--set", "train.epochs=400"]
    command += ["--name", "r", "--out", str(tmp_path / "runs"), "--jobs", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / f"runs/r/{seed}" for seed in (0, 1, 2)]
    while not all((folder / "metrics.jsonl").exists() for folder in folders[:2]):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert all((folder / "last.ckpt").is_file() for folder in folders[:2])
    assert not (folders[2] / "metrics.jsonl").exists()
    assert not any((folder / "failed.txt").exists() for folder in folders)


def children(parent):
    return [int(child) for task in Path(f"/proc/{parent}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc")
def test_a_killed_run_is_told_and_the_rest_goes_on(recipe, tmp_path, forked):
    command = [sys.executable, "-m", "orthokit.cli", "train", str(recipe), "--seeds", "0", "1", "--set", "train.epochs=30"]
    command += ["--name", "r", "--out", str(tmp_path / "runs"), "--jobs", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs/r/0/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    log = tmp_path / "runs/r/0/log.txt"
    (child,) = (child for child in children(process.pid) if Path(f"/proc/{child}/fd/1").resolve() == log)
    os.kill(child, signal.SIGKILL)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 4, errors
    assert "r/0  failed: killed by signal 9 (out of memory?)" in out
    assert "1 of 2 runs finished" in out


def test_a_single_run_outlives_its_shell(recipe, tmp_path, forked):
    command = [sys.executable, "-m", "orthokit.cli", "train", str(recipe), "--name", "r", "--out", str(tmp_path / "runs")]
    command += ["--device", "cpu", "--threads", "1"]

    def start():  # and end, as a shell that is closed
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os._exit(0)

    subprocess.run(["true"], preexec_fn=lambda: (os.closerange(3, 4096), start()), check=True)
    end = time.monotonic() + 90
    while not (tmp_path / "runs/r/0/summary.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_nobody_reads(recipe, tmp_path, forked):
    command = [sys.executable, "-m", "orthokit.cli", "train", str(recipe), "--seeds", "0", "1", "--name", "r"]
    command += ["--out", str(tmp_path / "runs"), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert (process.stderr.read(), process.wait(120)) == ("", 0)
    assert all((tmp_path / f"runs/r/{seed}/summary.json").exists() for seed in (0, 1))


def test_runs_outlive_no_parent(recipe, tmp_path, forked):
    """Killed hard, the command leaves no process behind that trains on unseen."""
    command = [sys.executable, "-m", "orthokit.cli", "train", str(recipe), "--seeds", "0", "1", "--set", "train.epochs=4000"]
    command += ["--name", "r", "--out", str(tmp_path / "runs"), "--jobs", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = [tmp_path / f"runs/r/{seed}/metrics.jsonl" for seed in (0, 1)]
    while not all(path.exists() for path in metrics):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    run = Run(load(recipe, ["train.epochs=4000"]), 0, tmp_path / "runs/r/0")
    with run.hold():  # as soon as its process has let go
        assert (
            "stopped after epoch" in (run.folder / "log.txt").read_text()
            or "stopped in epoch" in (run.folder / "log.txt").read_text()
        )


def test_a_grid(recipe, tmp_path):
    (tmp_path / "s.toml").write_text(
        'recipes = ["r.toml"]\nseeds = [5, 6]\nset = ["train.batch=100"]\n'
        '[grid]\n"regularizer.strength" = [0.01, 1.0, 100.0]\n"regularizer.penalty" = [{ name = "so" }]\n'
    )
    points, status = sweep.run(tmp_path / "s.toml", tmp_path / "runs", in_process)
    assert status == 0
    assert len(points) == 3
    assert [len(point.accuracies) for point in points] == [2, 2, 2]
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs/s").glob("*/*/summary.json")]
    assert len(summaries) == 6
    assert {s["recipe"]["regularizer"]["strength"] for s in summaries} == {0.01, 1.0, 100.0}
    assert all(s["recipe"]["train"]["batch"] == 100 for s in summaries)
    for point in points:
        assert point.settings[0] == "train.batch=100"
        expected = float(point.settings[1].partition("=")[2])
        mine = sorted(s["validation"]["accuracy"] for s in summaries if s["recipe"]["regularizer"]["strength"] == expected)
        assert sorted(point.accuracies) == mine
    best = sweep.best(points)[str(recipe)]
    assert best.mean == max(point.mean for point in points)
    # What it prints can be run: the settings survive their way through the command line.
    assert load(recipe, best.settings).regularizer.penalty == {"name": "so"}
    again, _ = sweep.run(tmp_path / "s.toml", tmp_path / "runs", lambda runs: in_process(runs))
    assert again == points
    sweep.save(points, tmp_path / "sweep.json")
    assert sum(row["best"] for row in json.loads((tmp_path / "sweep.json").read_text())) == 1


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_the_sweeps_of_the_repository(path, tmp_path):
    asked = []
    points, _ = sweep.run(path, tmp_path, lambda runs: asked.extend(runs) or 0)
    assert len(asked) == len(points) * len(sweep.read(path).seeds) == len({run.folder for run in asked}) > 0


def made(settings, accuracies, seeds=2, recipe="r.toml"):
    return sweep.Point(recipe, tuple(settings), tuple(accuracies), seeds)


def test_the_best_is_complete_and_the_edge_is_told(tmp_path):
    points = [
        made(["a.b=1"], [0.9]),
        made(["a.b=2"], [0.5, 0.6]),
        made(["a.b=3"], [0.55, 0.56]),
        made(["a.b=2"], [0.1, 0.1], recipe="q.toml"),
    ]
    best = sweep.best(points)
    assert best["r.toml"] is points[2]
    assert best["q.toml"] is points[3]
    (tmp_path / "s.toml").write_text('recipes = ["r.toml"]\nseeds = [0, 1]\n[grid]\n"a.b" = [1, 2, 3]\n"c.d" = ["x", "y"]\n')
    read = sweep.read(tmp_path / "s.toml")
    assert sweep.edges(read, points[2]) == ["a.b"]
    assert sweep.edges(read, points[1]) == []


def test_a_strength_is_chosen_as_studies_do():
    """The strongest within a standard error of the best mean, among those that differ in nothing else."""

    def tried(strength, accuracies, *others, recipe="r.toml"):
        return made([*others, f"regularizer.strength={strength}"], [a / 100 for a in accuracies], recipe=recipe)

    values = {0.01: (90.0, 90.4), 0.1: (90.3, 90.7), 1.0: (90.1, 90.5), 10.0: (80.0, 80.4)}
    points = [tried(strength, accuracies, "train.lr=0.1") for strength, accuracies in values.items()]
    points += [tried(3.0, (90.3, 90.6), "train.lr=1.0"), tried(2.0, (99.0,), "train.lr=0.1")]
    choice = Choice("", "", tuple(Trial(strength, Sample(accuracies)) for strength, accuracies in values.items()))
    assert choice.best.strength == 0.1
    for order in (points, points[::-1]):
        assert sweep.best(order)["r.toml"].strength == choice.chosen.strength == 1.0
    table = sweep.table(points)
    assert [row["chosen"] for row in table.rows].count("*") == 1
    assert table.notes == (RULE,)
    assert "train.lr=0.1 regularizer.strength=10.0" in table.rows[4]["name"]
    assert (table.rows[-1]["n"], table.rows[-1]["sd"]) == ("1 of 2", None)
    other = [made(["train.lr=1"], [0.5, 0.5]), made(["train.lr=2"], [0.6, 0.5]), tried(9.0, (50, 50))]
    assert sweep.best(other)["r.toml"] is other[1]  # no strengths were tried beside it
    assert sweep.table(other).notes == ()


def test_a_search_finds_the_better_and_repeats_itself(recipe, tmp_path, monkeypatch):
    (tmp_path / "s.toml").write_text(
        'recipes = ["r.toml"]\nseeds = [0]\n[search]\ntrials = 24\nparallel = 4\n[search.space]\n'
        '"regularizer.strength" = { low = 1e-3, high = 1.0, log = true }\n"train.batch" = { low = 50, high = 60 }\n'
        '"train.nesterov" = [true, false]\n'
    )
    tried = []

    def accuracy(file, settings, runs):
        """A landscape with its top at strength 0.03."""
        strength = load(file, settings).regularizer.strength
        tried.append(settings)
        return sweep.Point(str(file), settings, (1 - abs(strength - 0.03),), 1)

    monkeypatch.setattr(sweep, "_point", accuracy)
    points, _ = sweep.run(tmp_path / "s.toml", tmp_path / "runs", lambda runs: 0)
    assert len(tried) <= 24
    best = sweep.best(points)[str(recipe)]
    assert load(recipe, best.settings).regularizer.strength == pytest.approx(0.03, abs=0.02)
    assert all(50 <= load(recipe, point.settings).train.batch <= 60 for point in points)
    first, tried[:] = list(tried), []
    sweep.run(tmp_path / "s.toml", tmp_path / "runs", lambda runs: 0)
    assert tried == first


def test_points_are_what_was_written(recipe, tmp_path):
    (tmp_path / "s.toml").write_text(
        'recipes = ["r.toml"]\nseeds = [0]\n[grid]\n"train.weight_decay" = [0.000123451, 0.000123452]\n'
        '"regularizer.where" = ["convs & ~stem", "convs & pointwise"]\n'
    )
    asked = []
    points, _ = sweep.run(tmp_path / "s.toml", tmp_path / "runs", lambda runs: asked.extend(runs) or 0)
    assert len({run.folder for run in asked}) == len(points) == 4
    assert {run.recipe.train.weight_decay for run in asked} == {0.000123451, 0.000123452}
    words = shlex.split(points[0].command)
    assert words[:3] == ["orthokit", "train", str(recipe)]
    assert load(recipe, words[4:]) == asked[0].recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('recipes = ["r.toml"]\nseeds = [1, 1]\n[grid]\n"train.lr" = [1.0]\n', "seeds must differ"),
        ('recipes = ["r.toml", "./r.toml"]\nseeds = [1]\n[grid]\n"train.lr" = [1.0]\n', "recipes must differ"),
        ('recipes = ["r.toml"]\nseeds = [0]\n', r"needs either \[grid\] or \[search\]"),
        ('recipes = ["r.toml"]\nseeds = [0]\n[grid]\n"train.lr" = []\n', r"grid\.train\.lr has no values"),
        ('recipes = []\nseeds = [0]\n[grid]\n"train.lr" = [1.0]\n', "recipes: list should have at least 1 item"),
        ('recipes = ["r.toml"]\nseed = [0]\n[grid]\n"train.lr" = [1.0]\n', "unknown key seed; did you mean 'seeds'"),
        ('recipes = ["r.toml"]\nseeds = [0]\n[grid]\n"train.l" = [1.0]\n', r"unknown key train\.l; did you mean 'lr'"),
        ('recipes = ["x.toml"]\nseeds = [0]\n[grid]\n"train.lr" = [1.0]\n', r"no recipe .*x\.toml is there"),
        ('recipes = ["r.toml"]\nseeds = [0]\n[grid]\n"data.validation" = [0]\n', "a sweep is judged on validation accuracy"),
        (
            'recipes = ["r.toml"]\nseeds = [0]\n[search]\ntrials = 3\n[search.space]\n"train.lr" = { low = 2.0, high = 1.0 }\n',
            "needs low < high",
        ),
        ("recipes = ", "is not TOML"),
    ],
)
def test_bad_sweeps(recipe, tmp_path, capsys, text, message):
    (tmp_path / "s.toml").write_text(text)
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "runs")]) == 2
    assert re.search(message, words(capsys.readouterr().err))
    assert not (tmp_path / "runs").exists()


def test_the_command(recipe, tmp_path, capsys, forked):
    (tmp_path / "s.toml").write_text('recipes = ["r.toml"]\nseeds = [0]\n[grid]\n"train.lr" = [0.1, 1e30]\n')
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "runs"), "--device", "cpu"]) == 4
    out = words(capsys.readouterr().out)
    assert f"best: orthokit train {recipe} --set train.lr=0.1" in out
    assert ", test" not in out
    assert "at the edge of the grid in train.lr: widen it" in out
    assert "0 of 1" in out
    table = out.partition("validation accuracy (%)")[2].partition("best:")[0]
    assert "train.lr=1e+30" in table
    assert "test" not in table
    rows = json.loads((tmp_path / "runs/s/sweep.json").read_text())
    assert [(row["best"], row["n"]) for row in rows] == [(True, 1), (False, 0)]


def test_a_local_ray_cluster(recipe, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default whatever else the machine does goes first
    in_process([Run(load(recipe), 1, tmp_path / "runs/r/1")])  # importing everything in one worker and its run is enough
    arguments = ["train", str(recipe), "--seeds", "0", "1", "--out", str(tmp_path / "runs"), "--backend", "ray", "--jobs", "2"]
    assert main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 runs finished" in out
    assert out.count("finished before") == 1
    alone = Run(load(recipe), 0, tmp_path / "alone/0")
    in_process([alone])
    assert Run(load(recipe), 0, tmp_path / "runs/r/0").summary()["test"] == alone.summary()["test"]


def test_gpus_are_handed_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Pool(per_device=2).devices == ["0", "1", "0", "1"]
    assert Pool(device="cpu").devices == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Pool().devices == ["3", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a recipe"),
        (["train", "FILE", "--seeds", "0", "0"], "--seeds must be different numbers from 0 to"),
        (["train", "FILE", "--seeds", "-1"], "--seeds must be different numbers from 0 to"),
        (["train", "FILE", "FILE"], "two recipes of one name"),
        (["train", "FILE", "OTHER", "--name", "x"], "--name is for a single recipe"),
        (["train", "FILE", "--set", "train.epochs=0", "--set", "train.batch=5"], "train.epochs: should be greater"),
        (["train", "FILE", "--seeds", "0", "1", "--devices", "2"], "use torchrun"),
        (["train", "FILE", "--jobs", "0"], "--jobs must be at least 1"),
        (["train", "FILE", "--address", "auto"], "--address does nothing without --backend ray"),
        (["train", "FILE", "--device", "mps"], "--device mps cannot be used here"),
        (["train", "FILE", "--strategy", "none"], "invalid strategy name"),
        (["train", "nowhere.toml"], "no recipe nowhere.toml is there"),
        (["train", "FILE", "--set", "data.name=cifar10", "--root", "nowhere"], "no CIFAR-10 in nowhere"),
        (["sweep", "nowhere.toml"], "no sweep nowhere.toml is there"),
    ],
)
def test_bad_arguments(recipe, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.toml").write_text(RECIPE)
    names = {"FILE": str(recipe), "OTHER": "o.toml"}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    err = words(capsys.readouterr().err)
    assert message in err
    assert "Traceback" not in err


def test_missing_ray_is_named(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["train", str(recipe), "--seeds", "0", "1", "--out", str(tmp_path / "runs"), "--backend", "ray"]
    assert main(arguments) == 2
    assert install("ray") in words(capsys.readouterr().err)
