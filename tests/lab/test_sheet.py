"""Anybody's results from CSV files: the same numbers as of the lab's runs, and mistakes that are told."""

import csv
import io

import pytest

from made_up import made_up
from orthokit.cli import main
from orthokit.lab.atomic import to_json
from orthokit.lab.comparison.comparison import compare
from orthokit.lab.comparison.metrics import METRICS
from orthokit.lab.comparison.sheet import compare_lines, direction
from orthokit.lab.comparison.spread import spreads, typical
from orthokit.lab.reporting import markup, words
from orthokit.lab.reporting.page import page

ARMS = {"none": 0.0, "so": 1.0, "strict": -1.0}
GOOD = "arm,seed,accuracy\nnone,0,90.0\nnone,1,90.2\nso,0,91.0\nso,1,91.5\n"


def as_csv(runs, delimiter=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["Arm", "seed", "network", "accuracy", "test_loss"])
    for run in runs:
        test, study = run.summary["test"], run.summary["study"]
        writer.writerow([study["arm"], run.seed, study["panel"], repr(100 * test["accuracy"]), repr(test["loss"])])
    return text.getvalue()


@pytest.fixture
def sheet(tmp_path):
    def write(text, name="results.csv"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("options", [{}, {"blocks": "seed", "contrasts": ["so - strict"]}])
def test_the_same_as_of_the_labs_runs(sheet, options):
    runs = [run for run in made_up(ARMS, seeds=4, parts=False) if (run.summary["study"]["arm"], run.seed) != ("so", 3)]
    ours, theirs = compare(runs, **options), compare_lines([sheet(as_csv(runs, ";"))], **options)
    assert theirs.arms == ours.arms
    assert [panel.name for panel in theirs.panels] == [panel.name for panel in ours.panels]
    for one, two in ((ours.primary, theirs.primary), (ours.known[3], theirs.known[1])):
        assert one.key == two.key
        for panel, arms in ours.cells(one).items():
            for arm, cell in arms.items():
                other = theirs.cell(two, panel, arm)
                assert other.verdict == cell.verdict
                assert other.sample.interval == pytest.approx(cell.sample.interval)
                if cell.difference is not None:
                    for name in ("mean", "interval", "welch", "holm", "dunnett"):
                        assert getattr(other.difference, name) == pytest.approx(getattr(cell.difference, name))
                    assert other.difference.blocked.p == pytest.approx(cell.difference.blocked.p)
    for mine, other in zip(ours.contrasts, theirs.contrasts, strict=True):
        assert [each.holm for each in mine.answers.values()] == pytest.approx([each.holm for each in other.answers.values()])
        assert [*map(mine.verdict, mine.answers)] == [*map(other.verdict, other.answers)]
    for one, two in zip(ours.resolutions(), theirs.resolutions(), strict=True):
        assert (one.name, one.seeds, [*one.more.values()]) == (two.name, two.seeds, [*two.more.values()])
        assert one.least == pytest.approx(two.least)
    assert [flag for flag in ours.flags if "seeds" in flag] == [*theirs.flags]
    assert "arms have different seeds: 0 1 2 3 in none; 0 1 2 in so" in theirs.flags[0]


def test_what_is_written(sheet, tmp_path, capsys):
    file = sheet(as_csv(made_up(ARMS, depths=(8, 20), seeds=3, parts=False)))
    outputs = {option: tmp_path / f"out{option}" for option in ("--html", "--csv", "--markdown", "--latex")}
    assert main(["compare", str(file), *(str(each) for pair in outputs.items() for each in pair)]) == 0
    words_said = line(capsys.readouterr().out)
    assert "so is better than none: +1." in words_said
    assert "From results.csv. accuracy: more is better; test_loss: less is better." in words_said
    assert "Wide layers" not in words_said
    assert "power: ResNet-8: with 3 seeds an arm, only gains above" in words_said
    text = outputs["--html"].read_text()
    assert "18 runs, 2 panels, 3 arms, 3 seeds an arm" in text
    assert "<svg" not in text
    assert "data:image/svg+xml" in text
    assert "None" not in text
    assert "recipe" not in text
    assert {row["metric"] for row in csv.DictReader(io.StringIO(outputs["--csv"].read_text()))} == {"accuracy", "test_loss"}


def test_panels_by_columns_and_a_trend(sheet):
    rows = [
        f"{arm},{seed},{depth},{80 + gain * k + 0.01 * seed * (1 + k)}"
        for k, depth in enumerate((64, 8, 16))
        for arm, gain in (("baseline", 0), ("so", 1))
        for seed in range(3)
    ]
    comparison = compare_lines([sheet("\n".join(["arm,seed,depth,top-1.5 accuracy", *rows]))], by=["depth"])
    assert [panel.name for panel in comparison.panels] == ["depth=8", "depth=16", "depth=64"]
    assert comparison.grows == "depth"
    assert comparison.baseline == "baseline"
    assert comparison.primary.key == "top-1.5 accuracy"
    assert "per doubling" in markup.markdown(comparison)


def test_missing_values_and_several_files(sheet):
    lines = GOOD.replace("91.5", "").splitlines()
    first = sheet("\n".join([lines[0], *lines[1:3]]), "a.csv")
    second = sheet("\ufeff" + "\n".join([lines[0], *lines[3:], "", "strict,0,nan", "strict,1,90"]), "b.csv")
    comparison = compare_lines([first, second])
    assert list(comparison.cells(comparison.primary)["all runs"]) == ["none"]
    assert comparison.flags == (
        "all runs: no accuracy, or no finite one, of so (seed 1), strict (seed 0); these arms are left out of it",
    )
    assert "None" not in page(comparison)


def test_how_many_decimals(sheet):
    shown = [
        compare_lines([sheet(f"arm,seed,x\nnone,0,{a}\nnone,1,{b}\nso,0,{a}\nso,1,{b}\n")]).primary.format
        for a, b in ((0.912, 0.915), (91.2, 91.5), (1000, 1300), (3, 3), (1e-9, 2e-9))
    ]
    assert shown == [".4f", ".2f", ".0f", ".2f", ".3g"]


def test_which_way_is_better(sheet):
    file = sheet(GOOD.replace("accuracy", "sparsity"))
    (sentence,) = words.verdicts(compare_lines([file]))
    assert sentence.startswith("so against none is not resolved")
    assert compare_lines([file], lower=["sparsity"]).primary.better == -1
    assert [direction(name) for name in ("test accuracy", "NLL", "val_error", "F1", "copies")] == [1, -1, -1, 1, 0]
    with pytest.raises(ValueError, match="cannot both be better"):
        compare_lines([file], lower=["sparsity"], higher=["sparsity"])


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        ("arm,", "armm,", [], "needs a column 'arm'; did you mean 'armm'?"),
        ("seed,", "run,", [], "needs a column 'seed'; there are 'arm', 'run', 'accuracy'"),
        (",accuracy", ",seed", [], "the column 'seed' stands there twice"),
        ("90.2", "high", [], "line 3: accuracy must be a number; got 'high'"),
        ("so,1", "so,0", [], "line 5: so, seed 0 stands in"),
        ("so,1", "so,1.5", [], "line 5: seed must be a whole number; got '1.5'"),
        ("so,1", ",1", [], "line 5: arm is empty"),
        ("so,1,91.5", "so,1,91,5", [], "line 5 has 4 cells, but the header has 3"),
        ("so,", "none,1", [], "there is only one arm, none"),
        (GOOD, "", [], "is empty; it needs a header"),
        (GOOD, "arm,seed,accuracy\n", [], "a header, and no runs below it"),
        (",accuracy\nnone,0,90.0\nnone,1,90.2\nso,0,91.0\nso,1,91.5", "\nnone,0\nso,0", [], "no column with a metric"),
        ("none", "plain", [], "which arm is the baseline? name it with --baseline; there are 'plain', 'so'"),
        ("", "", ["--baseline", "strict"], "no arm 'strict' to be the baseline"),
        ("", "", ["--metric", "loss"], "no column 'loss' with a metric"),
        ("", "", ["--by", "depth"], "has no column 'depth' to tell panels apart"),
        ("", "", ["--lower", "acc"], "no column 'acc' with a metric; there are 'accuracy'"),
        ("", "", ["--factor", "train.init"], "--factor and --anyway are of runs with recipes"),
        ("", "", ["--contrast", "so"], "a contrast must be 'ARM - OTHER ARM'"),
        ("none,0", '"none,0', [], "cannot be read as CSV"),
    ],
)
def test_mistakes_are_told(sheet, capsys, old, new, options, message):
    text = GOOD.replace(old, new) if old else GOOD
    if message.startswith("there is only one"):
        text = "arm,seed,accuracy\nnone,0,1\nnone,1,2\n"
    assert main(["compare", str(sheet(text)), *options]) == 2
    words_said = capsys.readouterr().err
    assert message in line(words_said)
    assert "Traceback" not in words_said


def test_names_of_strangers_do_nothing(sheet, tmp_path, capsys):
    file = sheet(GOOD.replace("so,", "=1+1\x1b[31m<b>,").replace("accuracy", "x\u202ey"))
    out = tmp_path / "out.csv"
    assert main(["compare", str(file), "--csv", str(out), "--html", str(tmp_path / "out.html")]) == 0
    text = capsys.readouterr().out
    assert "\x1b[31m" not in text
    assert "\u202e" not in text
    assert "'=1+1" in out.read_text()
    assert "<b>" not in (tmp_path / "out.html").read_text()


def test_files_and_folders_do_not_mix(sheet, tmp_path, capsys):
    assert main(["compare", str(sheet(GOOD)), str(tmp_path)]) == 2
    assert "is not a CSV file" in line(capsys.readouterr().err)
    assert main(["compare", str(tmp_path / "nothing.csv")]) == 2
    assert "nothing.csv is not there" in line(capsys.readouterr().err)
    assert main(["compare", str(tmp_path), "--lower", "loss"]) == 2


def test_a_typical_sd_for_power(sheet, tmp_path, monkeypatch, capsys):
    runs = made_up(ARMS, seeds=4, parts=False)
    for run in runs:
        place = tmp_path / "results/mine/runs" / run.summary["name"] / str(run.seed)
        place.mkdir(parents=True)
        (place / "summary.json").write_text(to_json(run.summary))
    heading, actual = spreads([tmp_path / "results"])
    assert (heading, [(each.where, each.arms, each.runs) for each in actual]) == (
        "test accuracy, %",
        [(f"runs, resnet {depth}, 20 epochs of 10000 images of cifar10", 3, 12) for depth in (20, 8)],
    )
    comparison = compare(runs)
    for each in actual:
        cells = comparison.cells(comparison.primary)[f"ResNet-{each.where.split()[2].rstrip(',')}"].values()
        assert each.sd**2 == pytest.approx(sum(cell.sample.sd**2 for cell in cells) / 3)
    file = sheet(as_csv(runs))
    assert typical(spreads([file])[1]) == pytest.approx(typical(actual))
    monkeypatch.chdir(tmp_path)
    text = f"sd = {typical(actual):.3g} of test accuracy, %: the median of 2, from "
    assert main(["power", "--effect", "0.5"]) == 0
    assert text in line(capsys.readouterr().out)
    assert main(["power", "--seeds", "4", "--like", str(file), "--metric", "test_loss"]) == 0
    assert "of test_loss: the median of 2" in line(capsys.readouterr().out)
    for wrong, message in (
        (["--like", "nowhere"], "nowhere is not there; give folders of runs"),
        (["--like", str(file), "--metric", "x"], "no column 'x'"),
        (["--like", str(file), "results"], "not both at once"),
        (["--metric", "x"], "metric must be one of"),
    ):
        assert main(["power", "--effect", "1", *wrong]) == 2
        assert message in line(capsys.readouterr().err)
    monkeypatch.chdir(tmp_path / "results/mine")
    assert main(["power", "--effect", "1"]) == 2
    assert "give --sd, or --like" in line(capsys.readouterr().err)


def test_panels_are_told_apart_by_name_whatever_the_order(sheet, capsys):
    values = {("none", 0): 90, ("none", 1): 91, ("so", 0): 92, ("so", 1): 94}
    rows = [(arm, str(seed), "big", "r8", str(value)) for (arm, seed), value in values.items()]
    first = sheet("arm,seed,panel,network,acc\n" + "".join(f"{','.join(row)}\n" for row in rows[:2]), "a.csv")
    other = "arm,seed,network,panel,acc\n" + "".join(f"{a},{s},{n},{p},{v}\n" for a, s, p, n, v in rows[2:])
    for by in ((), ("network", "panel")):
        comparison = compare_lines([first, sheet(other, "b.csv")], by=by)
        assert len(comparison.panels) == 1
        assert list(comparison.panels[0].arms) == ["none", "so"]
    for header in ("arm,seed,panel,acc", "arm,seed,network,acc", "arm,seed,acc"):
        middle = "".join(f",{value}" for value in ("big",) * (header.count(",") - 2))
        second = sheet(f"{header}\nso,0{middle},92\nso,1{middle},94\n", "c.csv")
        for paths in ([first, second], [second, first]):
            assert main(["compare", *map(str, paths)]) == 2
            message = capsys.readouterr().err
            assert "tell panels apart by different columns" in message
            assert "c.csv" in message
            assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["loss [nats]", "rate [/s]", "[bold]x[/bold]", "a [/] b", "cost [$]", "$x_$ loss", "[link=x]y"])
def test_a_header_is_shown_as_it_is(sheet, tmp_path, capsys, name):
    file = sheet(GOOD.replace("accuracy", name))
    assert main(["compare", str(file), "--html", str(tmp_path / "p.html")]) == 0
    assert name in line(capsys.readouterr().out)
    assert main(["power", "--like", str(file), "--seeds", "3"]) == 0
    assert name in line(capsys.readouterr().out)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_columns_named_as_what_the_lab_records_are_only_columns(sheet, tmp_path, capsys, metric):
    for name in (metric.path, metric.key):
        assert main(["compare", str(sheet(GOOD.replace("accuracy", name))), "--html", str(tmp_path / "p.html")]) == 0
        text = line(capsys.readouterr().out)
        assert name in text
        for note in (words.FITTED, words.COST, *words.MEASURED.values()):
            assert line(note)[:40] not in text
        comparison = compare_lines([sheet(GOOD.replace("accuracy", name))])
        assert len(words.notes(comparison)) == 1
        assert comparison.primary.part is None
    assert main(["compare", str(sheet("arm,seed,evaluation.noise.x,y\nnone,0,,1\nso,0,,2\n"))]) == 2
    assert "orthokit evaluate" not in capsys.readouterr().err


def test_numbers_are_written_whole(sheet, tmp_path):
    values = ["90.123456789012", "0.1", "1e-300", "123456789.25"]
    rows = [
        f"{arm},{seed},{value}" for arm, pair in (("none", values[:2]), ("so", values[2:])) for seed, value in enumerate(pair)
    ]
    assert main(["compare", str(sheet("\n".join(["arm,seed,acc", *rows]))), "--csv", str(tmp_path / "n.csv")]) == 0
    with (tmp_path / "n.csv").open() as file:
        cells = [row["values"].split() for row in csv.DictReader(file) if row["metric"] == "acc"]
    assert [[*map(float, cell)] for cell in cells[:2]] == [[*map(float, pair)] for pair in (values[:2], values[2:])]
