"""Studies: planned, trained, evaluated, kept, compared and drawn; nothing twice."""

import json
import shutil
from pathlib import Path

import pytest

from orthokit.cli import main
from orthokit.cli.lab import Machine
from orthokit.lab import study
from orthokit.lab.atomic import to_json, write
from orthokit.lab.comparison.inference import Sample
from orthokit.lab.comparison.tuning import RULE, Choice, Trial, cautions
from orthokit.lab.runs.results import read
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import DivergenceError, train
from tiny import TINY

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
UNFINISHED = {"large", "fit", "memorise", "near-squared", "parts"}
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
NOTHING = STUDY.replace('"accuracy", "noise", "orthogonality"', "")


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


def test_without_training(folder, in_process, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    assert main([*command, "--no-train"]) == 4
    said = words(capsys.readouterr().out)
    assert "Tiny: 4 of 4 runs to train" in said
    assert "nothing to compare yet: none of the 4 runs has a result" in said
    assert in_process == []
    assert not (folder / "results").exists()
    (folder / "tiny.toml").write_text(NOTHING)
    for task in study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results").tasks[:3]:
        train(task.run, hardware=Hardware(device="cpu", threads=1))  # as another process might
    assert main([*command, "--no-train"]) == 4
    said = words(capsys.readouterr().out)
    assert "Tiny: 1 of 4 runs to train" in said
    assert "! 1 of 4 runs are missing" in said
    assert len(read([folder / "results/tiny"])[0]) == 3
    assert main(command) == 0
    assert in_process == ["so/1"]
    assert main([*command, "--no-train"]) == 0


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
    assert last.kept.folder == folder / "results/tiny/runs/ResNet-14-so+train.epochs=2/1"
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
    (folder / "tiny.toml").write_text(NOTHING)
    shutil.rmtree(folder / "runs")
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 4
    said = words(capsys.readouterr().out)
    assert "1 of 4 runs to train" in said
    assert "! 1 of 4 runs are missing" in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must differ"),
        ("seeds", "seed", "unknown key seed; did you mean 'seeds'?"),
        ('"base.toml"', '"bass.toml"', "no file bass.toml, which tiny.toml extends, is there"),
        ("title", 'reuse = ["tony.toml"]\ntitle', "no study tony.toml to reuse runs of"),
        ('"noise"', '"nose"', "no part 'nose'; did you mean 'noise'?"),
        ("title", 'baseline = "non"\ntitle', "no arm 'non'"),
        ("title", 'metric = "acuracy"\ntitle', "none is called 'acuracy'"),
        ("none = {}", "none = { train.epoch = 3 }", "none: unknown key train.epoch"),
        ("none = {}\n", "", "arms"),
        ('"so.toml"', "3", "extends must be a file"),
        ("none = {}", '"s/o" = {}\n"s o" = { regularizer = { strength = 1, penalty = "dso" } }', "would share the folder s-o"),
        ("title", "title = [", "is not TOML"),
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[train]\nepoch = 3", "in part.toml, unknown key train.epoch; did you mean 'epochs'?"),
        ("[train]\nepochs = '3'", "in part.toml, train.epochs: should be a valid integer; got '3'"),
    ],
)
def test_mistakes_in_a_recipe_are_told_of_its_file(folder, capsys, wrong, message):
    (folder / "tiny.toml").write_text(STUDY.replace('"base.toml"', '["base.toml", "part.toml"]'))
    (folder / "part.toml").write_text(wrong)
    assert main(["study", "tiny.toml"]) == 2
    assert f"tiny.toml: {message}" in words(capsys.readouterr().err)


def test_a_recipe_may_lack_what_arms_and_panels_add(folder, in_process):
    (folder / "base.toml").write_text(TINY.replace('kind = "resnet"\n', "").replace("epochs = 1", "epochs = 1\nwarmup = 5.0"))
    (folder / "tiny.toml").write_text(NOTHING + '[networks]\na = { network.kind = "resnet", train.warmup = 0.0 }\n')
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 0
    assert len(in_process) == 4


def test_what_another_study_keeps_is_not_trained_again(folder, in_process, capsys):
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 0
    shutil.rmtree(folder / "runs")
    third = '[arms]\ndso = { regularizer = { strength = 0.1, penalty = "dso" } }\nbare = {}'
    second = STUDY.replace("[arms]\nnone = {}", third).replace("[0, 1]", "[1, 2]").replace("title", 'baseline = "bare"\ntitle')
    (folder / "second.toml").write_text('reuse = ["tiny.toml"]\n' + second)
    in_process.clear()
    capsys.readouterr()
    assert main(["study", "second.toml", "--jobs", "1"]) == 0
    assert in_process == ["dso/1", "dso/2", "bare/2", "so/2"]
    assert "! 2 of 6 runs are those of other studies (tiny: 2)" in words(capsys.readouterr().out)
    plan = study.plan(folder / "second.toml", out=folder / "runs", results=folder / "results")
    lent = {task.arm: task.result().summary for task in plan.tasks if task.lent}
    assert {arm: (found["seed"], found["study"]["arm"]) for arm, found in lent.items()} == {"bare": (1, "bare"), "so": (1, "so")}
    assert lent["so"]["test"] == json.loads((folder / "results/tiny/runs/so/1/summary.json").read_text())["test"]
    assert len(list((folder / "results/second").rglob("summary.json"))) == 4
    (folder / "second.toml").write_text('reuse = ["tiny.toml"]\n' + second.replace("images = 20", "images = 10"))
    assert len(study.plan(folder / "second.toml", out=folder / "runs", results=folder / "results").left()) == 6


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
    if not (plan.folder / "README.md").exists():  # not begun, or still choosing strengths
        assert left
        return
    written = (plan.folder / "README.md").read_text()
    verdicts = plan.comparison().verdicts()
    assert verdicts
    assert all(verdict in written for verdict in verdicts)
    assert (f"{len(left)} of {len(plan.tasks)} runs are missing" in written) == bool(left)


def test_panels_are_called_by_the_names_of_what_they_have(tmp_path):
    file = STUDIES[0].parent / "large.toml"
    panels = {task.panel for task in study.plan(file, out=tmp_path, results=tmp_path).tuning}
    assert panels == {"ResNet-18, cifar10", "ResNet-18, cifar100"}


TUNE = """
[tune]
seeds = [100, 101]
values = [0.1, 0.01]
"""


def choice(**tried):
    """Of strengths and accuracies; "x" is a run that diverged."""
    trials = []
    for strength, values in tried.items():
        finished = [value for value in values if value != "x"]
        trials.append(Trial(float(strength[1:]), Sample(tuple(map(float, finished))), len(values) - len(finished)))
    return Choice("so", "", tuple(trials))


@pytest.mark.parametrize(
    ("tried", "error", "best", "chosen", "warned"),
    [
        # sd is sqrt(2) everywhere, hence 1 of the mean of two
        ({"s1": (88, 90), "s2": (89, 91), "s3": (88, 90), "s4": (80, 82)}, 1, 2, 3, None),
        ({"s1": (88, 90), "s2": (89, 91), "s3": (87.9, 89.9), "s4": (80, 82)}, 1, 2, 2, None),
        ({"s1": (89, 91), "s2": (80, 82), "s3": (70, 72)}, 1, 1, 1, "so (chosen 1)"),
        ({"s1": (89, 91), "s2": (88.5, 90.5), "s3": (70, 72)}, 1, 1, 2, "so (best 1)"),
        ({"s1": (89, 91), "s2": (88.5, 90.5)}, 1, 1, 2, "so (chosen 2, best 1)"),
        # variances 0 and 4, pooled 2
        ({"s1": (80, 80), "s2": (90 - 2**0.5, 90 + 2**0.5), "s3": (80, 82 - 2)}, (4 / 3 / 2) ** 0.5, 2, 2, None),
        # without spread only equal means are near
        ({"s1": (90, 90), "s2": (90, 90), "s3": (89, 89)}, 0, 2, 2, None),
        # what diverged is out, but was looked at: 2 is no edge
        ({"s1": (88, 90), "s2": (89, 91), "s3": ("x", 99)}, 1, 2, 2, None),
        ({"s1": (88, 90), "s2": (89, 91), "s3": ("x", "x")}, 1, 2, 2, None),
        ({"s1": (88, 90)}, 1, 1, 1, "so (chosen 1)"),
    ],
)
def test_the_strongest_within_a_standard_error_of_the_best(tried, error, best, chosen, warned):
    found = choice(**tried)
    assert found.error == pytest.approx(error)
    assert (found.best.strength, found.chosen.strength) == (best, chosen)
    assert found.edge == warned


def test_strengths_are_chosen_first(folder, in_process, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    (folder / "tiny.toml").write_text(STUDY + TUNE)
    assert main(command) == 0
    tuning = [f"so+strength={value}/{seed}" for seed in (100, 101) for value in (0.01, 0.1)]
    assert in_process[:4] == tuning
    kept = folder / "results/tiny"
    plan = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")
    (found,) = plan.choices
    strength = found.chosen.strength
    assert in_process[4:] == [name for s in (0, 1) for name in (f"none/{s}", f"so+strength={strength:g}/{s}")]
    said = words(capsys.readouterr().out)
    assert "Tiny: 4 of 4 tuning runs to train" in said
    assert f"chosen: so: strength = {strength:g} Tiny: 4 of 4 runs to train, 4 to evaluate" in said

    # What is kept: accuracies by which it was chosen; validation's.
    for trial in found.trials:
        files = [kept / f"tuning/so+strength={trial.strength:g}/{seed}/summary.json" for seed in (100, 101)]
        summaries = [json.loads(file.read_text()) for file in files]
        assert list(trial.sample.values) == pytest.approx([100 * each["validation"]["accuracy"] for each in summaries])
        assert all(each["recipe"]["regularizer"]["strength"] == trial.strength and not each["evaluation"] for each in summaries)
    assert json.loads((kept / "runs/so/1/summary.json").read_text())["recipe"]["regularizer"]["strength"] == strength

    # What is shown.
    means = {trial.strength: f"{trial.sample.mean:.2f} ± {trial.sample.sd:.2f}" for trial in found.trials}
    cells = " | ".join(means[each] + " *" * (each == strength) for each in (0.01, 0.1))
    written = (kept / "README.md").read_text()
    assert f"| so | 2 | {strength:g} | {found.error:.2f} | {cells} |" in written
    assert RULE in written
    assert f"> **Caution.** {cautions([found])[0]}" in written
    assert "](figures/tuning.svg)" in written
    assert (kept / "figures/tuning.svg").is_file()
    page = (kept / "report.html").read_text()
    assert f"<td>{means[strength]} *</td>" in page
    assert page.count("<figure>") == len(list((kept / "figures").glob("*.svg")))
    assert "Strengths: validation accuracy" in (kept / "tables.tex").read_text()
    assert f"validation,,so, strength={strength:g}," in (kept / "numbers.csv").read_text().replace('"', "")
    assert len(read([kept])[0]) == len(read([folder / "runs"])[0]) == 4  # the tuning's are not compared
    assert len(read([kept / "tuning"])[0]) == 4

    # Nothing to do: it only draws, the same, without the runs.
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    shutil.rmtree(folder / "runs")
    assert main(command) == 0
    assert "Tiny: all is done" in words(capsys.readouterr().out)
    assert len(in_process) == 8
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before

    # Other values, another choice: what is new is trained, and of the arm whose strength is another one everything.
    (folder / "tiny.toml").write_text(STUDY + TUNE + "[tune.arms]\nso = [0.02, 0.1]\n".replace("0.1", f"{0.11 - strength:g}"))
    assert main(command) == 0
    assert in_process[8:10] == ["so+strength=0.02/100", "so+strength=0.02/101"]
    plan = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")
    assert in_process[10:] == [f"so+strength={plan.choices[0].chosen.strength:g}/{seed}" for seed in (0, 1)]
    assert f"of no part in this study any more: 2 results, such as results/tiny/tuning/so+strength={strength:g}/100" in words(
        capsys.readouterr().out
    )
    assert plan.left() == []
    assert len(read([kept])[0]) == 4


def test_between_the_stages_and_within_them(folder, monkeypatch, capsys):
    """Killed after any number of runs, and the runs gone, it goes on."""
    done, sittings = [], []

    def run_all(machine, runs, console, *, test=True):
        assert test == (runs[0].folder.parents[1].name != "tuning")
        for run in runs:
            if len(done) == 3 * len(sittings):
                raise KeyboardInterrupt
            train(run, hardware=Hardware(device="cpu", threads=1))
            done.append(run.name)
        return 0

    monkeypatch.setattr(Machine, "run_all", run_all)
    text = (STUDY + TUNE).replace('"accuracy", "noise", "orthogonality"', "")
    (folder / "tiny.toml").write_text(text)
    plan = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")
    assert (len(plan.tuning), len(plan.left()), plan.tasks, plan.choices) == (4, 4, (), ())
    for status in (130, 130, 0):
        sittings.append(status)
        assert main(["study", "tiny.toml", "--jobs", "1"]) == status
        shutil.rmtree(folder / "runs")
    assert len(done) == 8 == len(set(done))
    assert [name.endswith(("/100", "/101")) for name in done] == [True] * 4 + [False] * 4
    assert "Tiny: 1 of 4 tuning runs to train" in words(capsys.readouterr().out)


def test_a_tuning_run_that_failed(folder, monkeypatch, capsys):
    (folder / "tiny.toml").write_text(STUDY + TUNE)
    monkeypatch.setattr(Machine, "run_all", lambda *arguments, **options: 4)
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 4
    said = words(capsys.readouterr().out)
    assert "nothing is chosen yet: 4 of 4 tuning runs are missing" in said
    assert "compare" not in said


@pytest.fixture
def diverging(monkeypatch):
    """As ``in_process``, for runs that may diverge."""
    done = []

    def run_all(machine, runs, console, *, test=True):
        status = 0
        for run in runs:
            try:
                train(run, hardware=Hardware(device="cpu", threads=1))
            except DivergenceError:
                status = 4
            done.append(run.name)
        return status

    monkeypatch.setattr(Machine, "run_all", run_all)
    return done


def test_what_diverges_is_out(folder, diverging, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    (folder / "tiny.toml").write_text(NOTHING + TUNE.replace("0.1,", "1e30,"))
    assert main(command) == 0
    kept = folder / "results/tiny"
    records = sorted((kept / "tuning").rglob("diverged.json"))
    assert [path.parent.relative_to(kept).as_posix() for path in records] == [f"tuning/so+strength=1e+30/{s}" for s in (100, 101)]
    record = json.loads(records[0].read_text())
    assert record["seed"] == 100
    assert record["why"].endswith("in epoch 1, step 2")
    assert str(folder) not in records[0].read_text()
    (found,) = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results").choices
    assert found.chosen.strength == 0.01
    assert "| diverged |" in (kept / "README.md").read_text()
    assert ",diverged," in (kept / "numbers.csv").read_text()
    assert "diverged" in (kept / "report.html").read_text()

    # It is not tried again.
    count = len(diverging)
    shutil.rmtree(folder / "runs")
    assert main(command) == 0
    assert len(diverging) == count

    # No strength is left.
    (folder / "tiny.toml").write_text(NOTHING + TUNE.replace("0.1, 0.01", "1e30"))
    capsys.readouterr()
    assert main(command) == 2
    assert "so diverged with every strength, [1e+30]; give it smaller ones in tune.arms" in words(capsys.readouterr().err)

    # Of what is compared it is flagged, and not tried again either.
    (folder / "so.toml").write_text('[regularizer]\nstrength = 1e30\npenalty = "so"\n')
    half = NOTHING.replace("\n[evaluate]", 'half = { regularizer = { penalty = "so", strength = 0.05 } }\n[evaluate]')
    (folder / "tiny.toml").write_text(half)
    assert main(command) == 4
    assert "2 of 6 runs are missing, 2 of which diverged; what is there may be a lucky choice" in words(capsys.readouterr().out)
    count = len(diverging)
    assert main(command) == 0
    assert len(diverging) == count


PANELS = """
[networks]
a = { network.depth = 8 }
b = { network.depth = 14 }
[factors]
"train.batch" = [50, 100]
"""


def test_a_second_question(folder, diverging, capsys):
    """A study extends another, of its own folder or not; nothing is trained or chosen again, what diverged neither."""
    (folder / "tiny.toml").write_text(NOTHING + TUNE.replace("0.1,", "1e30,"))
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 0
    count = len(diverging)
    capsys.readouterr()
    second = folder / "more/second.toml"
    second.parent.mkdir()
    second.write_text('extends = "../tiny.toml"\nreuse = ["../tiny.toml"]\nbaseline = "so"\ntitle = "2"\n')
    assert main(["study", str(second), "--jobs", "1"]) == 0
    said = words(capsys.readouterr().out)
    assert "2: all is done" in said
    assert "none against so is" in said
    assert "! 4 of 4 runs are those of other studies (tiny: 4)" in said
    assert "| diverged |" in (folder / "results/second/README.md").read_text()
    assert len(diverging) == count
    assert not list((folder / "results/second").rglob("*.json"))

    # What it reuses serves those that reuse it, in a circle too; two studies of one name would share their results.
    (folder / "third.toml").write_text('extends = "tiny.toml"\nreuse = ["more/second.toml", "third.toml"]\n')
    third = study.plan(folder / "third.toml", out=folder / "runs", results=folder / "results")
    assert third.left() == []
    (folder / "more/tiny.toml").write_text('extends = "../tiny.toml"\nreuse = ["../tiny.toml"]\n')
    with pytest.raises(ValueError, match=r"reuses .*tiny.toml, whose results are where those of .*more/tiny.toml are"):
        study.plan(folder / "more/tiny.toml", out=folder / "runs", results=folder / "results")
    kept = next((folder / "results/tiny").rglob("summary.json"))
    kept.write_text("{")
    with pytest.raises(ValueError, match=r"third.toml reuses .*tiny.toml: .*summary.json is damaged"):
        study.plan(folder / "third.toml", out=folder / "runs", results=folder / "results")


def test_the_best_of_what_is_kept_twice(folder, in_process):
    """Evaluated before not evaluated, finished before diverged; and what is evaluated stays."""
    (folder / "bare.toml").write_text(NOTHING)
    for name in ("bare.toml", "tiny.toml"):
        assert main(["study", name, "--jobs", "1"]) == 0
    for first, second in (("bare", "tiny"), ("tiny", "bare")):
        (folder / "more.toml").write_text(f'extends = "tiny.toml"\nreuse = ["{first}.toml", "{second}.toml"]\n')
        plan = study.plan(folder / "more.toml", out=folder / "runs", results=folder / "results")
        assert plan.left() == []
    run = plan.tasks[0].run
    record = to_json({"seed": run.seed, "why": "NaN", "recipe": run.recipe.to_dict()})
    write(folder / "results/bare/runs/none/0/diverged.json", record)
    assert plan.tasks[0].result() is not None
    for file in (folder / "runs/tiny").rglob("evaluation.json"):
        file.unlink()  # as after training again
    tiny = study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")
    tiny.keep(tiny.tasks)
    assert tiny.left() == []


def keep(task, validation, test=0.5):
    """As if the run had been done."""
    summary = {"recipe": task.run.recipe.to_dict(), "seed": task.run.seed, "orthogonality": {}, "fingerprint": "of the images"}
    summary |= {"seconds": 1.0, "images_per_second": 1.0, "penalty_share": 0.0}
    summary |= {
        "validation": {"accuracy": validation},
        "test": {"accuracy": test},
        "study": {"arm": task.arm, "panel": task.panel},
    }
    write(task.kept.folder / "summary.json", to_json(summary))


def test_panels_choose_for_themselves_or_one_for_all(folder):
    text = NOTHING.replace("\n[evaluate]", PANELS + "[evaluate]")
    text = text.replace('{ extends = "so.toml" }', '{ regularizer.penalty = "so" }')  # which strength it has, [tune] says

    def planned(more=""):
        (folder / "tiny.toml").write_text(text + TUNE + more)
        return study.plan(folder / "tiny.toml", out=folder / "runs", results=folder / "results")

    plan = planned()
    assert len(plan.tuning) == 2 * 2 * 2 * 2
    assert plan.tuning[0].kept.folder == folder / "results/tiny/tuning/a-so+train.batch=50+strength=0.01/100"
    assert (plan.tuning[0].arm, plan.tuning[0].panel) == ("so, strength=0.01", "a, batch=50")
    plan = planned('network = "a"\n')
    assert [task.panel for task in plan.tuning] == [f"a, batch={size}" for size in (50, 100) for _ in range(4)]
    wanted = {50: 0.01, 100: 0.1}

    for task in plan.tuning:  # the validation images say so; the test images say otherwise
        recipe = task.run.recipe
        right = recipe.regularizer.strength == wanted[recipe.train.batch]
        keep(task, 0.7 + 0.1 * right + 0.01 * (task.run.seed - 100), 0.9 - 0.1 * right)
    plan = planned('network = "a"\n')
    assert [each.panel for each in plan.choices] == [f"a, batch={size}, for every network" for size in (50, 100)]
    for task in plan.tasks:
        assert task.arm == "none" or task.run.recipe.regularizer.strength == wanted[task.run.recipe.train.batch]
        keep(task, 0.6, 0.6 + 0.01 * task.run.seed)
    assert plan.left() == plan.strangers() == []
    comparison = plan.comparison()
    assert len(comparison.panels) == 4
    plan.draw(comparison)
    assert "**a, batch=100, for every network**" in (folder / "results/tiny/README.md").read_text()
    assert len(list((folder / "results/tiny/figures").glob("tuning-*.svg"))) == 2

    # Each for itself: b has still to choose.
    plan = planned()
    assert (plan.tasks, len(plan.left())) == ((), 8)
    assert {task.panel for task in plan.left()} == {"b, batch=50", "b, batch=100"}
    for task in plan.left():
        keep(task, 0.7 + 0.1 * (task.run.recipe.regularizer.strength == 0.1), 0.5)
    strengths = {task.panel: task.run.recipe.regularizer.strength for task in planned().tasks if task.arm == "so"}
    assert strengths == {"a, batch=50": 0.01, "a, batch=100": 0.1, "b, batch=50": 0.1, "b, batch=100": 0.1}
    assert {task.panel for task in planned().left()} == {"b, batch=50"}  # it had another strength before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[100, 101]", "[100, 1]", "tune.seeds must be others than those of the study, which has [1] too"),
        ("[100, 101]", "[100, 100]", "tune: seeds must differ"),
        ("[100, 101]", "[100]", "tune.seeds: list should have at least 2 items"),
        ("seeds = [100", "seed = [100", "unknown key tune.seed; did you mean 'seeds'?"),
        ("[0.1, 0.01]", "[]", "tune.values: list should have at least 1 item"),
        ("[0.1, 0.01]", "[1, 1.0]", "tune: values must differ"),
        ("[0.1, 0.01]", "[0.1, 0]", "should be greater than 0"),
        ("values", 'network = "a"\nvalues', "tune.network: no network 'a'; there are none"),
        ("[tune]", "[networks]\nnet8 = {}\n[tune]\nnetwork = 'net9'", "no network 'net9'; did you mean 'net8'?"),
        ("0.01]", "0.01]\narms.sso = [1]", "tune.arms: no arm 'sso'; did you mean 'so'?"),
        ("0.01]", "0.01]\narms.so = [1, 1]", "tune: arms.so must differ"),
        ("0.01]", "0.01]\narms.none = [1]", "tune.arms: none has no regularizer to tune"),
        ('so = { extends = "so.toml" }', 'so = { train.init = "orthogonal" }', "no arm has a regularizer"),
        ("none = {}", 'none = {}\nhalf = { regularizer = { strength = 9, penalty = "so" } }', "but for the strength that [tune]"),
        ("title", 'factor = ["train.init"]\ntitle', "[tune] chooses regularizer.strength, arm by arm"),
        ("[tune]", '[factors]\n"regularizer.strength" = [1]\n[tune]', "[tune] chooses regularizer.strength, arm by arm"),
        ("none = {}", "none = { train.epochs = 3 }", "runs differ in train.epochs, which is not the declared factor"),
        ('"so.toml"', '"so.toml", data.validation = 0', "set data.validation above 0"),
    ],
)
def test_mistakes_in_tuning_are_told(folder, capsys, old, new, message):
    text = (STUDY + TUNE).replace(old, new, 1)
    if "no arm has" in message:
        text = text.replace("title", 'factor = ["regularizer", "train.init"]\ntitle', 1)
    if "validation" in message:
        text = text.replace("title", 'factor = ["regularizer", "data.validation"]\ntitle', 1)
    (folder / "tiny.toml").write_text(text)
    assert main(["study", "tiny.toml"]) == 2
    assert message in words(capsys.readouterr().err)
    assert not (folder / "runs").exists()
