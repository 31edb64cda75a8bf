"""Studies that choose strengths first, by validation accuracy; and what diverges."""

import shutil

import pytest

from orthokit.cli import main
from orthokit.lab.comparison.inference import Sample
from orthokit.lab.comparison.tuning import RULE, Choice, Trial, cautions
from orthokit.lab.reporting import figures, markup, tables
from orthokit.lab.runs.collect import read
from tiny import NOTHING, STUDY, TUNE


def words(text):
    return " ".join(text.split())


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
    actual = choice(**tried)
    assert actual.error == pytest.approx(error)
    assert (actual.best.strength, actual.chosen.strength) == (best, chosen)
    assert actual.edge == warned


def test_strengths_are_chosen_first(lab, capsys):
    outcome = lab.run(STUDY + TUNE)
    (actual,) = outcome.plan.choices
    strength = actual.chosen.strength
    assert outcome.status == 0
    assert lab.trained[:4] == [f"so+strength={value}/{seed}" for seed in (100, 101) for value in (0.01, 0.1)]
    assert lab.trained[4:] == [name for s in (0, 1) for name in (f"none/{s}", f"so+strength={strength:g}/{s}")]
    assert [event.text for event in lab.events] == [
        "4 of 4 tuning runs to train",
        f"chosen: so: strength = {strength:g}",
        "4 of 4 runs to train, 4 to evaluate",
    ]

    # What is kept: accuracies by which it was chosen; validation's.
    for trial in actual.trials:
        tried = [task for task in outcome.plan.tuning if task.run.recipe.regularizer.strength == trial.strength]
        assert [task.run.seed for task in tried] == [100, 101]
        results = [task.result() for task in tried]
        assert list(trial.sample.values) == pytest.approx([100 * each.summary["validation"]["accuracy"] for each in results])
        assert not any(each.parts for each in results)
    assert outcome.plan.tasks[-1].result().recipe.regularizer.strength == strength

    # Nothing is left to do, without the runs' own folders; what is shown.
    assert len(read([lab.folder / "runs"])[0]) == 4  # the tuning's are not compared
    assert len(read([lab.folder / "runs/tiny/tuning"])[0]) == 4
    shutil.rmtree(lab.folder / "runs")
    files = ("--html", "page.html", "--csv", "numbers.csv", "--latex", "tables.tex")
    assert main(["study", "tiny.toml", "--jobs", "1", *files]) == 0
    out = words(capsys.readouterr().out)
    assert "Tiny: all is done" in out
    assert f"chosen: so: strength = {strength:g}" in out  # in every sitting, not in the first alone
    means = {trial.strength: f"{trial.sample.mean:.2f} ± {trial.sample.sd:.2f}" for trial in actual.trials}
    cells = " | ".join(means[each] + " *" * (each == strength) for each in (0.01, 0.1))
    kept = lab.folder / "results/tiny"
    written = (kept / "README.md").read_text()
    assert f"| SO² | {strength:g} | 2 | {actual.error:.2f} | {cells} |" in written
    assert RULE in written
    assert f"> **Caution.** {cautions([actual])[0]}" in written
    assert "tuning" in figures.figures(outcome.comparison)
    assert f"<td>{means[strength]} *</td>" in (lab.folder / "page.html").read_text()
    assert "Strengths: validation accuracy" in (lab.folder / "tables.tex").read_text()
    assert f"validation,,so, strength={strength:g}," in (lab.folder / "numbers.csv").read_text().replace('"', "")

    # Other values, another choice: what is new is trained, and of the arm whose strength is another one everything.
    other = "[tune.arms]\nso = [0.02, 0.1]\n".replace("0.1", f"{0.11 - strength:g}")
    lab.trained.clear()
    outcome = lab.run(STUDY + TUNE + other)
    chosen = outcome.plan.choices[0].chosen.strength
    tried = [f"so+strength=0.02/{seed}" for seed in (100, 101)]
    assert lab.trained == [*tried, *(f"so+strength={chosen:g}/{seed}" for seed in (0, 1))]
    assert outcome.plan.remaining() == []


def test_between_the_stages_and_within_them(lab):
    """Killed after any number of runs, and the runs gone, it goes on."""
    lab.write(NOTHING + TUNE)
    plan = lab.plan()
    assert (len(plan.tuning), len(plan.remaining()), plan.tasks, plan.choices) == (4, 4, (), ())
    sittings: list[str] = []

    def interrupted(runs, test):
        for run in runs:
            if len(lab.trained) == 3 * len(sittings):
                raise KeyboardInterrupt
            lab.train([run], test)
        return 0

    for sitting in ("first", "second"):
        sittings.append(sitting)
        with pytest.raises(KeyboardInterrupt):
            lab.run(train=interrupted)
        shutil.rmtree(lab.folder / "runs")
    assert "1 of 4 tuning runs to train" in lab.texts("left")
    assert lab.run(train=lab.train).status == 0
    assert len(lab.trained) == 8 == len(set(lab.trained))
    assert [name.endswith(("/100", "/101")) for name in lab.trained] == [True] * 4 + [False] * 4


def test_a_tuning_run_that_failed(lab):
    outcome = lab.run(STUDY + TUNE, train=lambda runs, test: 4)
    assert (outcome.status, outcome.comparison) == (4, None)
    assert lab.texts("empty") == ["nothing is chosen yet: 4 of 4 tuning runs are missing"]


def test_what_diverges_is_out(lab, capsys):
    outcome = lab.run(NOTHING + TUNE.replace("0.1,", "1e30,"))
    assert outcome.status == 0
    assert [task.run.seed for task in outcome.plan.tuning if task.has_diverged()] == [100, 101]
    task = next(task for task in outcome.plan.tuning if task.has_diverged())
    why = task.ledger.divergence(task.run.recipe, 100)
    assert why.endswith("in epoch 1, step 2")
    assert str(lab.folder) not in task.ledger.file(task.run.recipe).read_text()
    assert (task.result(), task.is_done()) == (None, True)
    (actual,) = outcome.plan.choices
    assert actual.chosen.strength == 0.01
    assert "| diverged |" in markup.markdown(outcome.comparison)
    assert ",diverged," in tables.numbers(outcome.comparison).to_csv()

    # It is not tried again.
    shutil.rmtree(lab.folder / "runs")
    lab.trained.clear()
    assert lab.run().status == 0
    assert lab.trained == []

    # No strength is left.
    lab.write(NOTHING + TUNE.replace("0.1, 0.01", "1e30"))
    assert main(["study", "tiny.toml", "--jobs", "1"]) == 2
    assert "so diverged with every strength, [1e+30]; give it smaller ones in tune.arms" in words(capsys.readouterr().err)

    # Of what is compared it is flagged, and not tried again either.
    (lab.folder / "so.toml").write_text('[regularizer]\nstrength = 1e30\npenalty = "so"\n')
    half = NOTHING.replace("\n[evaluate]", 'half = { regularizer = { penalty = "so", strength = 0.05 } }\n[evaluate]')
    outcome = lab.run(half)
    assert outcome.status == 4
    flag = "2 of 6 runs are missing, 2 of which diverged; what is there may be a lucky choice"
    assert flag in outcome.comparison.flags
    lab.trained.clear()
    outcome = lab.run()
    assert (outcome.status, lab.trained) == (0, [])
    assert flag in outcome.comparison.flags


PANELS = """
[networks]
a = { network.depth = 8 }
b = { network.depth = 14 }
[factors]
"train.batch" = [50, 100]
"""


def keep(task, validation, test=0.5):
    """As if the run had been done."""
    summary = {"recipe": task.run.recipe.to_dict(), "seed": task.run.seed, "orthogonality": {}, "fingerprint": "of the images"}
    summary |= {"seconds": 1.0, "images_per_second": 1.0, "penalty_share": 0.0}
    task.ledger.put(summary | {"validation": {"accuracy": validation}, "test": {"accuracy": test}})


def test_panels_choose_for_themselves_or_one_for_all(lab):
    text = NOTHING.replace("\n[evaluate]", PANELS + "[evaluate]")
    text = text.replace('{ extends = "so.toml" }', '{ regularizer.penalty = "so" }')  # which strength it has, [tune] says

    def planned(more=""):
        lab.write(text + TUNE + more)
        return lab.plan()

    plan = planned()
    assert len(plan.tuning) == 2 * 2 * 2 * 2
    assert plan.tuning[0].run.folder == lab.folder / "runs/tiny/tuning/a-so+train.batch=50+strength=0.01/100"
    assert (plan.tuning[0].arm, plan.tuning[0].panel) == ("so, strength=0.01", "a, batch=50")
    plan = planned('network = "a"\n')
    assert [task.panel for task in plan.tuning] == [f"a, batch={size}" for size in (50, 100) for _ in range(4)]
    expected = {50: 0.01, 100: 0.1}

    for task in plan.tuning:  # the validation images say so; the test images say otherwise
        recipe = task.run.recipe
        right = recipe.regularizer.strength == expected[recipe.train.batch]
        keep(task, 0.7 + 0.1 * right + 0.01 * (task.run.seed - 100), 0.9 - 0.1 * right)
    plan = planned('network = "a"\n')
    assert [each.panel for each in plan.choices] == [f"a, batch={size}, for every network" for size in (50, 100)]
    for task in plan.tasks:
        assert task.arm == "none" or task.run.recipe.regularizer.strength == expected[task.run.recipe.train.batch]
        keep(task, 0.6, 0.6 + 0.01 * task.run.seed)
    assert plan.remaining() == []
    comparison = plan.comparison()
    assert len(comparison.panels) == 4
    plan.draw(comparison)
    assert "**a, batch=100, for every network**" in (lab.folder / "results/tiny/README.md").read_text()
    assert sum(name.startswith("tuning-") for name in figures.figures(comparison)) == 2

    # Each for itself: b has still to choose.
    plan = planned()
    assert (plan.tasks, len(plan.remaining())) == ((), 8)
    assert {task.panel for task in plan.remaining()} == {"b, batch=50", "b, batch=100"}
    for task in plan.remaining():
        keep(task, 0.7 + 0.1 * (task.run.recipe.regularizer.strength == 0.1), 0.5)
    strengths = {task.panel: task.run.recipe.regularizer.strength for task in planned().tasks if task.arm == "so"}
    assert strengths == {"a, batch=50": 0.01, "a, batch=100": 0.1, "b, batch=50": 0.1, "b, batch=100": 0.1}
    assert {task.panel for task in planned().remaining()} == {"b, batch=50"}  # it had another strength before


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
def test_mistakes_in_tuning_are_told(lab, capsys, old, new, message):
    text = (STUDY + TUNE).replace(old, new, 1)
    if "no arm has" in message:
        text = text.replace("title", 'factor = ["regularizer", "train.init"]\ntitle', 1)
    if "validation" in message:
        text = text.replace("title", 'factor = ["regularizer", "data.validation"]\ntitle', 1)
    (lab.folder / "tiny.toml").write_text(text)
    assert main(["study", "tiny.toml"]) == 2
    assert message in words(capsys.readouterr().err)
    assert not (lab.folder / "runs").exists()
