"""Studies: planned, trained, evaluated, kept, compared and drawn; nothing twice."""

import csv
import hashlib
import io
import shutil
from pathlib import Path

import pytest

from orthokit.cli import main
from orthokit.lab import study
from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.reporting import markup, tables, words
from orthokit.lab.runs.collect import read
from tiny import NOTHING, STUDY, TINY

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
UNFINISHED = {"large", "large-full", "fit", "near-squared", "stronger", "rates"}
DIGESTS = {
    "cifar100": "219819d4b652aae5",
    "decay-alone": "f46f1b18a9906b66",
    "decay": "c77284ae4d329191",
    "depth-tuned-strict": "27f36de5d69a3cd8",
    "full-evaluated": "d38ee3e7a024e5f2",
    "full-strict": "9e6900de19e7f333",
    "depth-short-strict": "e89ae37450d7e25d",
    "depth-short": "1b9e9cd43af6a705",
    "depth-strict": "20c176e6838b2a69",
    "depth-tuned": "92e44cd7181eb370",
    "depth": "698470b6c66aa98f",
    "every": "fbc369640fcc7d3e",
    "fit-bottleneck": "4eb3fa5c1c5c74bb",
    "fit-depth": "d28d7ddb7f317e06",
    "fit-policies": "f062c590b391d02a",
    "full": "12fe76fd755bef4d",
    "memorise": "0e99c2a9c1cfe9f0",
    "nano": "39fd9da5fc0ae1c3",
    "near-strict": "9b4883c85b529165",
    "near": "8824c54e7e48a267",
    "parts": "2971c89bd028b36c",
    "scale": "dece0d6bde9dd637",
    "transfer-wide": "f8d2f636cb8d7a08",
    "transfer": "8e6a240531d4d4e3",
}
"""Of the numbers of finished studies, see :func:`digest`."""


def line(text):
    return " ".join(text.split())


def contents(folder):
    """Of every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_from_one_file(lab, capsys):
    outcome = lab.run()
    assert (outcome.status, lab.texts("left")) == (0, ["4 of 4 runs to train, 4 to evaluate"])
    assert lab.trained == ["none/0", "so/0", "none/1", "so/1"]  # every arm before the next seed
    assert words.verdicts(outcome.comparison)
    ledger, kept = lab.folder / "results/ledger", lab.folder / "results/tiny"
    recipes = dict.fromkeys(task.run.recipe.digest for task in outcome.plan.tasks)
    assert {path.name for path in ledger.glob("*.jsonl")} == {f"{each}.jsonl" for each in recipes}
    assert not kept.exists()
    actual = outcome.plan.tasks[-1].result()
    assert actual.summary["study"] == {"arm": "so", "panel": ""}
    assert set(actual.parts) == {"accuracy", "noise", "orthogonality"}
    assert "platform" not in actual.summary["environment"]
    before = contents(ledger)

    # Nothing is left to do, with or without the weights; the command line draws it.
    shutil.rmtree(lab.folder / "runs")
    command = ["study", "tiny.toml", "--jobs", "1"]
    assert main(command) == 0
    text = line(capsys.readouterr().out)
    for part in ("Tiny: all is done", "SO² against none is", "power: with 2 seeds an arm"):
        assert part in text
    assert f"orthokit study {lab.folder.name}/tiny.toml" in (kept / "README.md").read_text()
    drawn = contents(kept)
    pictures = [path for path in drawn if path.suffix == ".svg"]
    assert pictures
    assert {path.name for path in drawn} == {"README.md"} | {path.name for path in pictures}
    pictures[0].unlink()
    (kept / "figures/old.svg").touch()
    readme = kept / "README.md"
    readme.write_text(readme.read_text() + "![old](figures/old.svg)\n")
    (kept / "figures/mine.svg").touch()
    assert main(command) == 0
    assert contents(kept) == drawn | {kept / "figures/mine.svg": b""}
    assert contents(ledger) == before

    # What is written if it is asked for.
    files = {"html": "page.html", "csv": "numbers.csv", "latex": "tables.tex"}
    capsys.readouterr()
    assert main([*command, *(word for flag, name in files.items() for word in (f"--{flag}", name))]) == 0
    assert (lab.folder / "numbers.csv").read_text() == tables.numbers(outcome.comparison).to_csv()
    assert (lab.folder / "tables.tex").read_text() == markup.latex(outcome.comparison)
    page = (lab.folder / "page.html").read_text()
    assert page.count("<figure>") >= len(pictures)
    assert words.answer(outcome.comparison) in page


def test_another_seed_and_another_arm_are_trained_and_one_less_is_not_missed(lab):
    lab.run(NOTHING)
    lab.trained.clear()
    half = 'half = { extends = "so.toml", regularizer.strength = 0.05 }'
    outcome = lab.run(NOTHING.replace("[0, 1]", "[0, 1, 2]").replace("\n[evaluate]", f"{half}\n[evaluate]"))
    assert lab.trained == ["half/0", "half/1", "none/2", "so/2", "half/2"]
    assert any("so, half differ in strength alone" in flag for flag in outcome.comparison.flags)
    assert lab.run(NOTHING).status == 0
    assert lab.texts("left") == ["all is done"]
    assert len(lab.trained) == 5


def test_the_command_trains_what_is_missing(lab, capsys, forked):
    for task in lab.write(NOTHING) and lab.plan().tasks[:3]:
        lab.train_one(task.run)
    assert main(["study", "tiny.toml", "--jobs", "1", "--device", "cpu"]) == 0
    assert "Tiny: 1 of 4 runs to train" in line(capsys.readouterr().out)
    assert lab.kept() == ["none/0", "none/1", "so/0", "so/1"]
    assert (lab.folder / "runs/tiny/so/1/summary.json").is_file()


def test_without_training(lab, capsys):
    command = ["study", "tiny.toml", "--jobs", "1"]
    assert main([*command, "--no-train"]) == 4
    text = line(capsys.readouterr().out)
    assert "Tiny: 4 of 4 runs to train" in text
    assert "nothing to compare yet: none of the 4 runs has a result" in text
    assert not (lab.folder / "results").exists()
    lab.write(NOTHING)
    for task in lab.plan().tasks[:3]:
        lab.train_one(task.run)  # as another process might
    assert main([*command, "--no-train"]) == 4
    text = line(capsys.readouterr().out)
    assert "Tiny: 1 of 4 runs to train" in text
    assert "! 1 of 4 runs are missing" in text
    assert len(read([lab.folder / "results/ledger"])[0]) == 3
    lab.trained.clear()
    assert lab.run().status == 0
    assert lab.trained == ["so/1"]
    assert main([*command, "--no-train"]) == 0


def test_more_to_evaluate(lab):
    assert lab.run(STUDY.replace('"noise", ', "")).status == 0
    assert lab.run(STUDY.replace('"noise"', '"noise", "features"')).status == 0
    assert lab.texts("left") == ["0 of 4 runs to train, 4 to evaluate"]
    assert len(lab.trained) == 4  # the weights are there
    assert "features" in lab.plan().tasks[0].result().parts


def test_evaluations_with_other_settings_stay(lab):
    assert lab.run().status == 0
    ten = lab.run(STUDY.replace("images = 20", "images = 10"))
    assert lab.texts("left") == ["0 of 4 runs to train, 4 to evaluate"]
    images = {each.result().parts["noise"]["settings"]["images"] for each in ten.plan.tasks}
    shutil.rmtree(lab.folder / "runs")
    assert lab.run(STUDY).status == 0
    assert lab.texts("left") == ["all is done"]
    assert (images, lab.plan().tasks[0].result().parts["noise"]["settings"]["images"]) == ({10}, 20)


def test_panels_and_factors(lab):
    panels = '[networks]\n"ResNet-8" = {}\n"ResNet-14" = { network.depth = 14 }\n[factors]\n"train.epochs" = [1, 2]\n'
    lab.write(STUDY.replace("\n[evaluate]", f"{panels}[evaluate]"))
    plan = lab.plan()
    assert len(plan.tasks) == 2 * 2 * 2 * 2
    assert list(dict.fromkeys(task.panel for task in plan.tasks)) == [
        f"{name}, epochs={e}" for name in ("ResNet-8", "ResNet-14") for e in (1, 2)
    ]
    last = plan.tasks[-1]
    assert (last.run.recipe.network.model_extra["depth"], last.run.recipe.train.epochs) == (14, 2)
    assert last.run.folder == lab.folder / "runs/tiny/ResNet-14-so+train.epochs=2/1"
    assert last.ledger.folder == lab.folder / "results/ledger"
    assert last.run.recipe.regularizer is not None
    assert plan.command == f"orthokit study {lab.folder.name}/tiny.toml"


def test_what_is_missing_is_flagged(lab):
    lab.run(NOTHING)
    outcome = lab.run(NOTHING.replace("[0, 1]", "[0, 1, 2]"), train=lambda runs, test: 4)
    assert outcome.status == 4
    assert "2 of 6 runs are missing; what is there may be a lucky choice" in outcome.comparison.flags


def test_what_is_finished_is_kept_when_interrupted(lab, capsys):
    def interrupted(runs, test):
        lab.train(runs[:3], test)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(train=interrupted)
    assert lab.kept() == ["none/0", "none/1", "so/0"]
    shutil.rmtree(lab.folder / "runs")
    outcome = lab.run(NOTHING, train=lambda runs, test: 4)
    assert (outcome.status, lab.texts("left")) == (4, ["1 of 4 runs to train"])
    assert "1 of 4 runs are missing; what is there may be a lucky choice" in outcome.comparison.flags


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_trained_is_kept_when_its_evaluation_is_interrupted(lab, error):
    def interrupted(subjects, asked):
        raise error

    with pytest.raises(error):
        lab.run(measure=interrupted)
    assert lab.kept() == ["none/0", "none/1", "so/0", "so/1"]
    assert lab.run(train=lambda runs, test: pytest.fail("trained again")).status == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must differ"),
        ("seeds", "seed", "unknown key seed; did you mean 'seeds'?"),
        ('"base.toml"', '"bass.toml"', "no file bass.toml, which tiny.toml extends, is there"),
        ("title", 'reuse = ["tony.toml"]\ntitle', "unknown key reuse"),
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
        ("none = {}", '".." = {}', "'..' cannot name an arm"),
        ("title", 'metric = "pgd"\ntitle', "metric = 'pgd' needs 'attacks' among evaluate.parts"),
        ("[evaluate]", '[factors]\n"train.epochs" = [1, 1]\n[evaluate]', "factors.train.epochs must differ"),
        ("[evaluate]", '[factors]\n"train.epochs" = [1, 2]\n[evaluate]', "overrides what its panel is to have in common"),
        ("[evaluate]", "[networks]\na = {}\nb = {}\n[evaluate]", "none has the same recipe in the panels a and b"),
    ],
)
def test_mistakes_are_told(lab, capsys, old, new, message):
    if "overrides" in message:
        (lab.folder / "so.toml").write_text('[train]\nepochs = 1\n[regularizer]\nstrength = 0.1\npenalty = "so"\n')
    (lab.folder / "tiny.toml").write_text(STUDY.replace(old, new, 1))
    assert main(["study", "tiny.toml"]) == 2
    assert message in line(capsys.readouterr().err)
    assert not (lab.folder / "runs").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[train]\nepoch = 3", "in part.toml, unknown key train.epoch; did you mean 'epochs'?"),
        ("[train]\nepochs = '3'", "in part.toml, train.epochs: should be a valid integer; got '3'"),
    ],
)
def test_mistakes_in_a_recipe_are_told_of_its_file(lab, capsys, wrong, message):
    (lab.folder / "tiny.toml").write_text(STUDY.replace('"base.toml"', '["base.toml", "part.toml"]'))
    (lab.folder / "part.toml").write_text(wrong)
    assert main(["study", "tiny.toml"]) == 2
    assert f"tiny.toml: {message}" in line(capsys.readouterr().err)


def test_a_recipe_may_lack_what_arms_and_panels_add(lab):
    base = TINY.replace('kind = "resnet"\n', "").replace("epochs = 1", "epochs = 1\nwarmup = 5.0")
    (lab.folder / "base.toml").write_text(base)
    assert lab.run(NOTHING + '[networks]\na = { network.kind = "resnet", train.warmup = 0.0 }\n').status == 0
    assert len(lab.trained) == 4


def test_a_run_belongs_to_its_recipe_whichever_study_trained_it(lab):
    assert lab.run().status == 0
    shutil.rmtree(lab.folder / "runs")
    third = '[arms]\ndso = { regularizer = { strength = 0.1, penalty = "dso" } }\nbare = {}'
    second = STUDY.replace("[arms]\nnone = {}", third).replace("[0, 1]", "[1, 2]").replace("title", 'baseline = "bare"\ntitle')
    lab.trained.clear()
    assert lab.run(second, "second").status == 0
    assert lab.trained == ["dso/1", "dso/2", "bare/2", "so/2"]
    ours = {(task.arm, task.run.seed): task.result() for task in lab.plan("second").tasks}
    theirs = {(task.arm, task.run.seed): task.result() for task in lab.plan().tasks}
    assert ours["bare", 1].summary == theirs["none", 1].summary | {"study": {"arm": "bare", "panel": ""}}
    lab.write(second.replace("images = 20", "images = 10"), "second")
    assert len(lab.plan("second").remaining()) == 6

    # A study extends another, of its own folder or not: a second question to the same runs.
    (lab.folder / "more").mkdir()
    outcome = lab.run('extends = "../tiny.toml"\nbaseline = "so"\ntitle = "2"\n', "more/third")
    assert (outcome.status, lab.texts("left")) == (0, ["all is done"])
    assert any("none against SO² is" in verdict for verdict in words.verdicts(outcome.comparison))


def test_a_damaged_line_is_told_and_its_run_trained_again(lab):
    lab.run(NOTHING)
    task = lab.plan().tasks[-1]
    file = task.ledger.file(task.run.recipe)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][:-1]]) + "\n")
    outcome = lab.run(only_keep=True)
    assert outcome.status == 0  # from the run's own folder; the damaged line stays, as the last
    assert f"left out: {file}, line 4 is damaged" in lab.texts("damaged")[0]
    shutil.rmtree(lab.folder / "runs")
    file.write_text("\n".join([*lines[:-1], lines[-1][:-1]]) + "\n")
    outcome = lab.run(only_keep=True)
    assert outcome.status == 4
    assert "1 of 4 runs are missing; what is there may be a lucky choice" in outcome.comparison.flags
    lab.trained.clear()
    assert lab.run().status == 0
    assert lab.trained == ["so/1"]


def test_a_damaged_run_is_told_and_the_others_are_kept(lab):
    lab.write(NOTHING)
    for task in lab.plan().tasks:
        lab.train_one(task.run)
    (lab.folder / "runs/tiny/so/1/summary.json").write_text("{")
    assert lab.run(only_keep=True).status == 4
    assert "so/1/summary.json is damaged" in lab.texts("damaged")[0]
    assert lab.kept() == ["none/0", "none/1", "so/0"]


def test_the_ledger_is_compared_and_tells_how_much_seeds_vary(lab, capsys):
    lab.run(NOTHING)
    ledger = lab.folder / "results/ledger"
    assert main(["compare", "results/ledger"]) == 0
    assert "against none is" in line(capsys.readouterr().out)
    assert main(["compare", *map(str, sorted(ledger.glob("*.jsonl")))]) == 0
    assert "against none is" in line(capsys.readouterr().out)
    assert main(["compare", "tiny.toml"]) == 2
    assert "tiny.toml is not a run" in (text := line(capsys.readouterr().err))
    assert "orthokit study tiny.toml --no-train" in text
    (lab.folder / "other.jsonl").write_text('{"epoch": 1}\n')
    assert main(["compare", "other.jsonl"]) == 2
    assert "other.jsonl is not a run" in line(capsys.readouterr().err)
    for paths in ([], ["--like", "results/ledger"], ["--like", *map(str, sorted(ledger.glob("*.jsonl")))]):
        assert main(["power", "--effect", "5", *paths]) == 0
        assert "seeds an arm resolve a difference of 5" in line(capsys.readouterr().out)


def test_a_baseline_that_failed(lab):
    outcome = lab.run(train=lambda runs, test: 4)
    assert (outcome.status, outcome.comparison) == (4, None)
    assert lab.texts("empty") == ["nothing to compare yet: none of the 4 runs has a result"]


def test_no_such_study(capsys):
    assert main(["study", "nothing.toml"]) == 2
    assert "no study nothing.toml is there" in capsys.readouterr().err


def digest(comparison: Comparison) -> str:
    """Of every number but those that depend on the machine, to six digits: the last ones are those of numpy and scipy."""

    def rounded(cell: str) -> str:
        try:
            number = float(cell)
        except ValueError:
            return cell
        return f"{0.0 if abs(number) < 1e-9 else number:.6g}"

    rows = [
        row | {"values": " ".join(f"{float(value):g}" for value in row["values"].split())}
        for row in csv.DictReader(io.StringIO(tables.numbers(comparison).to_csv()))
        if row["metric"] not in ("speed", "share")
    ]
    assert len(rows) > 10
    return hashlib.sha256(repr([[rounded(cell) for cell in row.values()] for row in rows]).encode()).hexdigest()[:16]


@pytest.mark.results
@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_repository(file, tmp_path):
    """Their results are kept, whole unless unfinished, and of the recipes as they are now; they say what they said."""
    plan = study.plan(file, out=tmp_path, results=file.parents[1] / "results")
    left = plan.remaining()
    assert bool(left) == (file.stem in UNFINISHED)
    assert not plan.damage()
    if not (plan.folder / "README.md").exists():  # not begun, or still choosing strengths
        assert left
        return
    written = (plan.folder / "README.md").read_text()
    comparison = plan.comparison()
    verdicts = [words.answer(comparison)]
    assert verdicts
    assert all(verdict in written for verdict in verdicts)
    missing = len(plan.tasks) - sum(len(runs) for panel in comparison.panels for runs in panel.arms.values())  # or diverged
    assert missing >= len(left)
    assert (f"{missing} of {len(plan.tasks)} runs are missing" in written) == bool(missing)
    assert left or digest(comparison) == DIGESTS[file.stem]


def test_panels_are_called_by_the_names_of_what_they_have(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text("""
title = "two"
recipe = "standard-30"
seeds = [0]
arms = { none = {}, so = "so" }
networks = { "ResNet-18" = "resnet18", "ResNet-20" = "resnet20" }
factors = { "data.name" = ["cifar10", "cifar100"] }
tune = { seeds = [100, 101], values = [0.1, 0.3], network = "ResNet-18" }
""")
    panels = {task.panel for task in study.plan(file, out=tmp_path, results=tmp_path).tuning}
    assert panels == {"ResNet-18, cifar10", "ResNet-18, cifar100"}
