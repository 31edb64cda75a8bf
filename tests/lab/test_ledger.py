"""The ledger: what is put in comes out, at once from several processes, damaged, and joined by git."""

import json
import multiprocessing
import re

import pytest

from made_up import made_up
from orthokit.lab.recipes.recipe import Recipe, TrainSection
from orthokit.lab.runs.collect import read
from orthokit.lab.runs.ledger import OWN, SHARED, Ledger, entries, is_ledger
from orthokit.lab.runs.summary import DamagedError

RAW = {"data": {"name": "cifar10"}, "network": {"kind": "resnet", "depth": 8}, "train": {"epochs": 20}}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger")


def summaries(seeds=3, **changes):
    """Of the runs of one recipe, small, with evaluation and history, as read from JSON."""
    return [json.loads(json.dumps(run.small() | changes)) for run in made_up({"none": 0}, depths=[8], seeds=seeds)]


def recipe_of(summary):
    return Recipe.of(summary["recipe"])


def stored(summary):
    """What comes back of a summary."""
    own = {key: value for key, value in summary.items() if key not in OWN}
    return own | {"environment": {key: value for key, value in (own.get("environment") or {}).items() if key != "platform"}}


def again(ledger, summary):
    """The same summary from the ledger."""
    actual = ledger.get(recipe_of(summary), summary["seed"])
    assert actual.recipe == recipe_of(summary)
    return {key: value for key, value in actual.small().items() if key not in OWN}


def lines(ledger, summary):
    return [json.loads(line) for line in ledger.file(recipe_of(summary)).read_text().splitlines()]


def put(ledger, *runs):
    for run in runs:
        ledger.put(run)


def otherwise(summary, images, **parts):
    """The same training, with one part evaluated with other settings."""
    noise = summary["evaluation"]["noise"] | {"settings": {"images": images}}
    return summary | {"evaluation": {"noise": noise, **parts}}


# What is put in


def test_what_is_put_in_comes_out_to_the_bit(ledger):
    runs = summaries(6)
    runs[1] |= {"validation": None, "environment": runs[1]["environment"] | {"device": "NVIDIA H100", "cores": None}}
    runs[2] = {key: value for key, value in runs[2].items() if key not in ("ranks", "environment")}
    runs[3] |= {"ranks": {"stem": 1}, "fingerprint": "others", "evaluation": {}, "history": []}
    runs[4] |= {"test": {"accuracy": 0.1 + 0.2, "loss": 5e-324}, "seconds": 7, "more": {"ä\u2028": [None, 1, 1.0, "\x85"]}}
    runs[5] |= {"layers": {"0": {"o": 6}}, "flops": 10**15, "train": None, "test": {"accuracy": 0.5, "loss": None}}
    put(ledger, *runs)
    for run in runs:
        assert repr(dict(sorted(again(ledger, run).items()))) == repr(dict(sorted(stored(run).items())))
    first = ledger.file(recipe_of(runs[0])).read_bytes()
    put(ledger, *runs[::-1])
    assert ledger.file(recipe_of(runs[0])).read_bytes() == first
    others = Ledger(ledger.folder.with_name("others"))
    for run in ledger.all():
        others.put(run.small())
    assert lines(others, runs[0]) == lines(ledger, runs[0])


def test_a_line_says_what_differs(ledger):
    runs = summaries(3)
    runs[2] = {key: value for key, value in runs[2].items() if key != "ranks"} | {"fingerprint": "others"}
    put(ledger, *runs)
    head, *rest = lines(ledger, runs[0])
    assert set(head) == {"version"} | {key for key in SHARED if key in runs[0]}
    own = {
        "seed",
        "test",
        "validation",
        "orthogonality",
        "images_per_second",
        "penalty_share",
        "seconds",
        "evaluation",
        "history",
    }
    assert [set(line) for line in rest] == [own, own, own | {"ranks", "fingerprint"}]
    assert (rest[2]["ranks"], rest[2]["fingerprint"]) == (None, "others")
    assert not {"platform", "8e0da"} & set(head["environment"])
    assert is_ledger(ledger.file(recipe_of(runs[0])))


def test_no_summary_is_refused(ledger):
    with pytest.raises(ValueError, match=r"the summary is not what a run writes \(seed"):
        ledger.put(summaries(1)[0] | {"seed": -1})
    assert not ledger.folder.exists()


def test_what_diverged(ledger):
    run, other = summaries(2)
    recipe = recipe_of(run)
    ledger.put_divergence(recipe, 0, "the loss is NaN")
    assert (ledger.get(recipe, 0), ledger.divergence(recipe, 0)) == (None, "the loss is NaN")
    assert (ledger.divergence(recipe, 1), ledger.all()) == (None, [])
    ledger.put(other)
    assert lines(ledger, run)[1] == {"seed": 0, "diverged": "the loss is NaN"}
    assert again(ledger, other) == stored(other)
    assert ledger.of([recipe], [0, 1])[0].seed == 1
    ledger.put(run)  # it can be trained after all
    ledger.put_divergence(recipe, 0, "elsewhere")
    assert ledger.divergence(recipe, 0) is None
    assert again(ledger, run) == stored(run)


# Put twice


def test_evaluations_with_other_settings_stay_beside(ledger):
    run = summaries(1)[0]
    few, many = otherwise(run, 10), otherwise(run, 1000)
    put(ledger, few, many)
    actual = ledger.get(recipe_of(run), 0)
    assert actual.parts["noise"]["settings"] == {"images": 1000}
    assert [each["settings"] for each in actual.summary["otherwise"]["noise"]] == [{"images": 10}]
    ledger.put(few)
    actual = ledger.get(recipe_of(run), 0)
    assert actual.parts == few["evaluation"]
    assert actual.summary["otherwise"] == {"noise": [many["evaluation"]["noise"]]}
    ledger.put(run | {"evaluation": {"accuracy": run["evaluation"]["accuracy"]}})
    actual = ledger.get(recipe_of(run), 0)
    assert set(actual.parts) == {"accuracy", "noise"}
    assert actual.summary["otherwise"] == {"noise": [many["evaluation"]["noise"]]}
    ledger.put(run | {"evaluation": {}})  # trained again, not evaluated
    assert set(ledger.get(recipe_of(run), 0).parts) == {"accuracy", "noise"}


def test_another_training_does_not_replace_one_evaluated_further(ledger):
    run = summaries(1)[0]
    another = run | {"test": {"accuracy": 0.25}}
    put(ledger, run, another | {"evaluation": {}})
    assert again(ledger, run) == stored(run)
    ledger.put(another)
    assert again(ledger, run) == stored(another)
    further = run | {"evaluation": run["evaluation"] | {"mine": {"settings": {}}}}
    put(ledger, further, another)
    assert again(ledger, run) == stored(further)


def _put_all(folder, runs, gate):
    gate.wait()
    put(Ledger(folder), *runs)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_put_at_once_lose_none(ledger):
    runs = summaries(40, evaluation={}, history=[])
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    both = [context.Process(target=_put_all, args=(ledger.folder, runs[part::2], gate)) for part in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [again(ledger, run) for run in runs] == [stored(run) for run in runs]
    assert {path.suffix for path in ledger.folder.iterdir()} <= {".jsonl", ""}  # and the lock


# Damaged


def without(line, key):
    record = json.loads(line)
    del record[key]
    return json.dumps(record)


DAMAGE = {
    "cut": (lambda line: line[:-20], "is damaged"),
    "no table": (lambda line: "[1, 2]", "a table is wanted"),
    "nothing but a number": (lambda line: "3", "a table is wanted"),
    "wrong type": (lambda line: line.replace('"seed": 1', '"seed": "1"'), "(seed: "),
    "seed out of range": (lambda line: line.replace('"seed": 1', '"seed": -1'), "(seed: "),
    "half a character": (lambda line: line.replace('"seed": 1', '"seed": 1, "note": "\\ud800"'), "half a character"),
    "missing key": (lambda line: without(line, "test"), "(test: Field required)"),
    "a key twice": (lambda line: line.replace('"seed": 1', '"seed": 1, "seed": 1'), "occurs twice"),
    "deep": (lambda line: line.replace('"seed": 1', '"seed": 1, "note": ' + "[" * 99 + "]" * 99), "inside each other"),
    "a wrong share": (lambda line: re.sub(r'"accuracy": [\d.]+', '"accuracy": 12', line, count=1), "accuracy"),
    "diverged without reason": (lambda line: '{"seed": 1, "diverged": null}', "(diverged: "),
    "diverged without seed": (lambda line: '{"diverged": "NaN"}', "(seed: "),
    "head of another version": (lambda line: '{"version": 99, "recipe": {}}', "(version: "),
    "no recipe": (lambda line: line.replace('"seed": 1', '"seed": 1, "recipe": 3'), "(recipe: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_a_sentence_and_the_others_go_on(ledger, name):
    damage, message = DAMAGE[name]
    runs = summaries(4)
    put(ledger, *runs[:3])
    recipe, file = recipe_of(runs[0]), ledger.file(recipe_of(runs[0]))
    text = file.read_text().splitlines()
    text[2] = damage(text[2])
    file.write_text("\n".join(text) + "\n")
    (why,) = ledger.damage([recipe, recipe])
    assert why.startswith(f"{file}, line 3 is ")
    assert message in why
    assert why.endswith("; mend or remove the line")
    assert "\n" not in why
    assert [run.seed for run in ledger.of([recipe], range(4))] == [0, 2]
    assert ledger.get(recipe, 1) is None
    runs_found, words_said = read([ledger.folder])
    assert ([run.seed for run in runs_found], len(words_said)) == ([0, 2], 1)
    assert why in words_said[0]

    ledger.put(runs[3])
    assert text[2] in file.read_text().splitlines()
    assert [run.seed for run in ledger.of([recipe], range(4))] == [0, 2, 3]
    assert len(ledger.damage([recipe])) == 1
    ledger.put(runs[1])
    assert [again(ledger, run) for run in runs] == [stored(run) for run in runs]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"{", "line 1 is damaged"),
        (b'{"seed": 0}', "line 1 is not what a run writes"),
        (b"\xff\xfe", "is damaged"),
        (b"\x00" * 99, "is damaged"),
    ],
)
def test_what_is_no_ledger_is_told_and_left_alone(ledger, content, message):
    run = summaries(1)[0]
    file = ledger.file(recipe_of(run))
    ledger.folder.mkdir()
    file.write_bytes(content)
    for reading in (lambda: ledger.get(recipe_of(run), 0), lambda: ledger.put(run), lambda: entries(file)):
        with pytest.raises(DamagedError, match=message) as note:
            reading()
        assert str(file) in str(note.value)
        assert "\n" not in str(note.value)
    assert file.read_bytes() == content
    assert not is_ledger(file)


def test_a_file_under_the_name_of_another_recipe_is_refused(ledger):
    run = summaries(1)[0]
    ledger.put(run)
    other = Recipe.of(RAW)
    ledger.file(recipe_of(run)).rename(ledger.file(other))
    with pytest.raises(DamagedError, match=r"holds runs of another recipe \(.*train\.") as message:
        ledger.get(other, 0)
    assert str(ledger.file(other)) in str(message.value)
    assert len(read([ledger.folder])[0]) == 1  # by itself it is one


# Joined by git


def test_branches_are_joined(ledger):
    """With merge=union a file has the lines of both, under two heads where these differ."""
    ours, theirs = Ledger(ledger.folder / "ours"), Ledger(ledger.folder / "theirs")
    runs = summaries(5)
    elsewhere = [run | {"environment": run["environment"] | {"device": "H100"}, "layers": {"0": {"o": 6}}} for run in runs]
    put(ours, runs[0], runs[1], otherwise(runs[2], 10))
    put(theirs, elsewhere[3], elsewhere[4], otherwise(elsewhere[2], 20))
    theirs.put_divergence(recipe_of(runs[0]), 0, "NaN")
    recipe = recipe_of(runs[0])
    text = [each.file(recipe).read_text() for each in (ours, theirs)]
    for number, parts in enumerate((text, text[::-1], [*text, *text], ["\n".join(text).replace("\n\n", "\n")])):
        merged = Ledger(ledger.folder / f"merged {number}")
        merged.folder.mkdir()
        merged.file(recipe).write_text("".join(parts))
        assert merged.damage([recipe]) == []
        for run in (runs[0], runs[1], elsewhere[3], elsewhere[4]):
            assert again(merged, run) == stored(run)
        both = merged.get(recipe, 2)
        kept = [both.parts["noise"], *both.summary["otherwise"]["noise"]]
        assert sorted(each["settings"]["images"] for each in kept) == [10, 20]
        before = [run.small() for run in merged.all()]
        merged.put(runs[0])
        merged.put(summaries(6)[5])
        assert [run.small() for run in merged.all()[:5]] == before
        assert sum('"version"' in line for line in merged.file(recipe).read_text().splitlines()) == 1


# Digests


def test_a_digest_is_of_what_a_recipe_says():
    assert Recipe.of(RAW).digest == "003e2b546f94c1e1"
    assert Recipe.of(dict(reversed(RAW.items()))).digest == Recipe.of(RAW).digest
    assert Recipe.of(Recipe.of(RAW).to_dict()).digest == Recipe.of(RAW).digest
    assert Recipe.of(RAW | {"train": {"epochs": 20, "batch": Recipe.of(RAW).train.batch}}).digest == Recipe.of(RAW).digest
    so = [{"strength": 0.1, "penalty": penalty} for penalty in ("so", {"name": "so"}, "dso")]
    digests = [Recipe.of(RAW | {"regularizer": each}).digest for each in so]
    assert digests[0] == digests[1]
    others = [RAW | {"train": {"epochs": 21}}, RAW | {"network": {"kind": "resnet", "depth": 14}}]
    assert len({Recipe.of(RAW).digest, *digests, *(Recipe.of(each).digest for each in others)}) == 5


def test_a_key_that_a_later_version_adds_changes_no_digest():
    class LaterTrain(TrainSection):
        patience: int = 3

    class Later(Recipe):
        train: LaterTrain

    train = RAW["train"]
    assert Later.of(RAW).digest == Later.of(RAW | {"train": train | {"patience": 3}}).digest == Recipe.of(RAW).digest
    assert Later.of(RAW | {"train": train | {"patience": 4}}).digest != Recipe.of(RAW).digest


def test_digests_are_equal_however_a_recipe_is_composed(tmp_path):
    from orthokit.lab.recipes.compose import load

    (tmp_path / "base.toml").write_text('[data]\nname = "cifar10"\n[network]\nkind = "resnet"\ndepth = 8\n[train]\nepochs = 3\n')
    (tmp_path / "more.toml").write_text('extends = "base.toml"\n[train]\nepochs = 20\n')
    assert load(tmp_path / "more.toml").digest == Recipe.of(RAW).digest != load(tmp_path / "base.toml").digest
