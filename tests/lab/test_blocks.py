"""Seeds as blocks, the primary question of a study, and how well networks fit: values against SciPy, verdicts, tables."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from scipy import stats

from made_up import made_up
from orthokit.lab import study
from orthokit.lab.comparison.comparison import compare
from orthokit.lab.comparison.inference import Sample, blocked_differences, contrast, holm, paired_contrast
from orthokit.lab.comparison.metrics import metric_of
from orthokit.lab.reporting import markup, tables, words
from orthokit.lab.reporting.page import page
from tiny import TINY

ARMS = {"none": 0.0, "strict": 0.5, "wide only": 0.8, "tall": 1.3}


def sharing(arms, depths=(8, 20), seeds=6, spread=1.0, **changes):
    """Runs whose results of one seed rise and fall together."""
    lift = np.random.default_rng(7).normal(0, spread, (100, max(depths) + 1))
    runs = []
    for run in made_up(arms, depths, seeds, sd=0.2, parts=False):
        depth = run.recipe.to_dict()["network"]["depth"]
        test = run.summary["test"] | {"accuracy": run.summary["test"]["accuracy"] + lift[run.seed, depth] / 100}
        train = {"accuracy": test["accuracy"] + 0.05, "loss": 1 - test["accuracy"]}
        runs.append(dataclasses.replace(run, summary=run.summary | {"test": test, "train": train} | changes))
    return runs


def values(comparison, panel, arm):
    return np.array(comparison.cell(comparison.primary, panel, arm).sample.values)


def test_two_arms_are_the_paired_t_over_the_seeds_that_both_have():
    random = np.random.default_rng(1)
    one, two = ({seed: random.normal(90, 1) for seed in seeds} for seeds in (range(7), range(2, 10)))
    (actual,) = blocked_differences({"none": one, "so": two}, "none").values()
    both = range(2, 7)
    expected = stats.ttest_rel([two[seed] for seed in both], [one[seed] for seed in both])
    assert (actual.p, actual.seeds, actual.freedom) == (pytest.approx(expected.pvalue), (5,), 4)
    assert actual.interval == pytest.approx(tuple(expected.confidence_interval()))
    same = paired_contrast([1.0], [{seed: two[seed] - one[seed] for seed in both}])
    assert (same.mean, same.p, same.freedom) == pytest.approx((actual.mean, actual.p, 4))


def test_several_arms_are_the_two_way_analysis_of_variance():
    block = np.random.default_rng(2).normal(90, 1, (4, 6)) + np.arange(6)
    actual = blocked_differences({str(arm): dict(enumerate(row)) for arm, row in enumerate(block)}, "0")
    left = block - block.mean(1, keepdims=True) - block.mean(0) + block.mean()
    error = np.sqrt(2 * (left**2).sum() / 15 / 6)
    for arm in (1, 2, 3):
        mean = block[arm].mean() - block[0].mean()
        each = actual[str(arm)]
        assert (each.mean, each.error, each.freedom) == pytest.approx((mean, error, 15))
        assert each.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, 15))


@pytest.mark.parametrize(
    "arms",
    [
        {"none": {0: 1.0, 1: 2.0}, "so": {2: 1.0, 3: 2.5}},  # no seed in common
        {"none": {0: 1.0, 1: 2.0}, "so": {1: 2.5}},
        {"none": {0: 1.0, 1: 2.0}, "so": {0: 2.0, 1: 3.0}},  # no error at all
        {"none": {0: 1.0}, "so": {0: 2.0}},
        {"none": {0: 1.0, 1: 2.0}},
    ],
)
def test_where_blocks_tell_nothing(arms):
    assert blocked_differences(arms, "none") == {}


def test_blocks_are_wrong_as_often_as_they_should_be():
    random = np.random.default_rng(3)
    wrong = wrong_over_panels = 0
    for _ in range(400):
        draws = random.normal(0, 1, (2, 3, 5)) + random.normal(0, 2, (2, 1, 5))
        wrong += blocked_differences({str(arm): dict(enumerate(row)) for arm, row in enumerate(draws[0])}, "0")["1"].p < 0.05
        wrong_over_panels += paired_contrast([0.5, 0.5], [dict(enumerate(panel[1] - panel[0])) for panel in draws]).p < 0.05
    assert 0.02 <= wrong / 400 <= 0.08
    assert 0.02 <= wrong_over_panels / 400 <= 0.08


def test_a_seed_is_one_block_in_all_panels():
    random = np.random.default_rng(5)
    draws = random.normal(1, 1, (3, 6))
    weights = [0.5, 0.3, 0.2]
    same = paired_contrast(weights, [dict(enumerate(row)) for row in draws])
    expected = stats.ttest_1samp(weights @ draws, 0)
    assert (same.p, same.freedom, same.mean) == pytest.approx((expected.pvalue, 5, (weights @ draws).mean()))
    apart = paired_contrast(weights, [{10 * k + seed: value for seed, value in enumerate(row)} for k, row in enumerate(draws)])
    arms, zero = [Sample(tuple(row)) for row in draws], [Sample((0.0, 0.0))] * 3
    parts = [weight**2 * each.sd**2 / 6 for weight, each in zip(weights, arms, strict=True)]
    freedom = sum(parts) ** 2 / sum(part**2 / 5 for part in parts)
    assert (apart.error, apart.freedom) == pytest.approx((np.sqrt(sum(parts)), freedom))
    assert apart.p == pytest.approx(contrast(weights, arms, zero).raw)
    assert paired_contrast([1.0], [{0: 1.0, 1: 1.0}]) is None
    assert paired_contrast([0.5, 0.5], [{0: 1.0, 1: 2.0}, {0: 1.0}]) is None


@pytest.mark.parametrize("seeds", [(6, 6), (12, 4)])
def test_seeds_that_hang_together_over_panels_are_not_taken_as_independent(seeds):
    """400 studies without a difference: in every panel a seed favours one arm alike."""
    random = np.random.default_rng(6)
    wrong = 0
    for _ in range(400):
        common = random.normal(0, 2, max(seeds))
        panels = [dict(enumerate(common[:n] + random.normal(0, 1, n))) for n in seeds]
        wrong += paired_contrast([0.5, 0.5], panels).p < 0.05
    assert wrong / 400 <= 0.09


def test_what_blocks_could_have_resolved():
    """By simulation: the least difference is found in four of five studies."""
    random = np.random.default_rng(4)
    (actual,) = blocked_differences(
        {"none": dict(enumerate(random.normal(0, 1, 8))), "so": dict(enumerate(random.normal(0, 1, 8)))}, "none"
    ).values()
    least = actual.detectable(2)
    draws = random.normal(least, actual.error * np.sqrt(8), (20_000, 8))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.025).mean() == pytest.approx(0.8, abs=0.012)


def test_the_p_by_seed_stands_beside_welchs():
    runs = sharing(ARMS)
    plain, by_seed = compare(runs), compare(runs, blocks="seed")
    for panel in plain.panels:
        for arm in list(ARMS)[1:]:
            one, two = (each.cell(each.primary, panel.name, arm).difference for each in (plain, by_seed))
            assert one.blocked == two.blocked
            assert one.welch == two.welch
            assert two.interval == two.blocked.interval != one.interval
            assert two.blocked.seeds == (6,)
    cells = [c.difference for arms in by_seed.cells(by_seed.primary).values() for c in arms.values() if c.difference]
    assert [each.holm for each in cells] == pytest.approx(holm([each.blocked.p for each in cells]))
    verdicts = [{arm: c.verdict for arm, c in each.cells(each.primary)["ResNet-8"].items()} for each in (plain, by_seed)]
    assert verdicts[0]["tall"] == "not resolved"
    assert verdicts[1]["tall"] == "better"
    assert "Verdicts go by Welch's t" in words.explanation(plain)
    assert "Verdicts go by seeds as blocks" in words.explanation(by_seed)
    assert all("with these seeds as blocks, only gains above" in each for each in words.power(by_seed))


def test_the_primary_question_over_all_panels():
    runs = [run for run in sharing(ARMS) if run.seed < 4 or run.summary["study"]["panel"] == "ResNet-8"]
    comparison = compare(runs, blocks="seed", contrasts=["tall - strict", "tall - wide only"])
    actual = comparison.primary_answer.answers
    assert list(actual) == ["tall - strict", "tall - wide only"]
    for (arm, other), each in zip(comparison.primary_contrasts, actual.values(), strict=True):
        pairs = [values(comparison, panel.name, arm) - values(comparison, panel.name, other) for panel in comparison.panels]
        assert each.mean == pytest.approx(np.mean([pair.mean() for pair in pairs]))
        assert each.blocked == paired_contrast([0.5, 0.5], [dict(enumerate(pair)) for pair in pairs])
        assert 3 < each.blocked.freedom < 8
        assert each.blocked.seeds == (6, 4)
        samples = [[Sample(tuple(values(comparison, p.name, name))) for p in comparison.panels] for name in (arm, other)]
        assert each.raw == pytest.approx(contrast([0.5, 0.5], *samples).raw)
    assert [each.holm for each in actual.values()] == pytest.approx(holm([each.blocked.p for each in actual.values()]))
    assert [*map(comparison.primary_answer.verdict, actual)] == ["better", "better"]
    start = "primary question: mean difference, both panels: tall is better than"
    assert all(each.startswith(start) for each in words.verdicts(comparison)[:2])
    assert words.answer(comparison).startswith("In points of test accuracy, over both panels: tall less strict is +0.")
    assert "the primary question (2: " in words.explanation(comparison)
    assert words.power(comparison)[0].startswith("tall - strict: with these seeds as blocks, only gains above ")
    for text in (markup.markdown(comparison), page(comparison), markup.latex(comparison)):
        assert "rimary question: mean difference in test accuracy" in text
        assert "tall - wide only" in text
    rows = [
        row
        for row in csv.DictReader(io.StringIO(tables.numbers(comparison).to_csv()))
        if row["panel"].startswith("primary question")
    ]
    assert [(row["arm"], row["n_blocked"], float(row["p_blocked"])) for row in rows] == [
        (name, "6 4", each.blocked.p) for name, each in actual.items()
    ]


def test_a_question_by_welch_of_one_panel_and_one_that_is_not_answered():
    runs = sharing(ARMS)
    one = compare([run for run in runs if run.summary["study"]["panel"] == "ResNet-8"], contrasts=["tall - strict"])
    (each,) = one.primary_answer.answers.values()
    assert each.holm == pytest.approx(
        stats.ttest_ind(values(one, "ResNet-8", "tall"), values(one, "ResNet-8", "strict"), equal_var=False).pvalue
    )
    lacking = [run for run in runs if run.summary["study"] != {"arm": "tall", "panel": "ResNet-20"}]
    assert compare(lacking, contrasts=["tall - strict"]).primary_answer is None
    single = [run for run in runs if run.seed == 0 or run.summary["study"]["arm"] != "strict"]
    comparison = compare(single, contrasts=["tall - strict", "tall - wide only"], blocks="seed")
    strict, wide = comparison.primary_answer.answers.values()
    assert strict.holm is None
    assert wide.holm == pytest.approx(min(1, 2 * wide.blocked.p))  # two were asked


@pytest.mark.parametrize("wrong", ["tall", "tall - so", "tall - tall", "tall-strict"])
def test_contrasts_name_two_arms(wrong):
    with pytest.raises(ValueError, match=r"a contrast must be 'ARM - OTHER ARM'; got .*; the arms are 'none', 'strict'"):
        compare(sharing(ARMS), contrasts=[wrong])


def test_names_of_arms_may_hold_the_sign():
    runs = sharing({"none": 0, "a": 1, "a - b": 2}, depths=[8])
    assert compare(runs, contrasts=["a - b - a"]).primary_contrasts == (("a - b", "a"),)


def test_a_study_states_its_question(tmp_path):
    text = 'title = "x"\nrecipe = "base.toml"\nseeds = [0, 1]\n'
    arms = '[arms]\nnone = {}\nso = { regularizer = { strength = 0.1, penalty = "so" } }\n'
    (tmp_path / "base.toml").write_text(TINY)
    file = tmp_path / "one.toml"
    file.write_text(f'{text}contrasts = ["so - none"]\nblocks = "seed"\n{arms}')
    words_said = study.plan(file, out=tmp_path / "runs", results=tmp_path / "results").study
    assert (words_said.contrasts, words_said.blocks) == (["so - none"], "seed")
    for wrong, message in (
        ('contrasts = ["so - nothing"]', "a contrast must be"),
        ('contrasts = ["so - none", "so  - none"]', "contrasts must differ"),
        ('blocks = "panel"', "blocks"),
    ):
        file.write_text(f"{text}{wrong}\n{arms}")
        with pytest.raises(ValueError, match=message):
            study.plan(file, out=tmp_path / "runs", results=tmp_path / "results")


def test_families_are_named():
    comparison = compare(made_up(ARMS, depths=(8, 14, 20)))
    text = words.explanation(comparison)
    for part in ("cells (9: ", "means (3: ", "trends (3: ", "each adjusted by itself"):
        assert part in text
    assert "One family of tests: cells (3: " in words.explanation(compare(made_up(ARMS, depths=[8])))
    assert text in markup.markdown(comparison)


def test_how_well_networks_fit():
    comparison = compare(sharing(ARMS, spread=0.0), metric="train_loss")
    assert comparison.cell(comparison.primary, "ResNet-8", "tall").verdict == "better"  # a smaller one
    assert comparison.cell(metric_of("train_accuracy"), "ResNet-8", "tall").verdict == "better"
    loss = comparison.cell(metric_of("test_loss"), "ResNet-8", "tall")
    assert loss.verdict == ("better" if loss.difference.resolved else "not resolved")
    assert loss.difference.mean < 0
    assert any("Training accuracy and loss are means over the batches" in note for note in words.notes(comparison))
    headers = markup.markdown(compare(sharing(ARMS)))
    assert "| training accuracy, % | training loss | test loss |" in headers
    assert compare(made_up(ARMS)).cells(metric_of("train_loss")) == {}


def with_kept(run):
    parts = {name: dict(part) for name, part in run.parts.items()}
    parts["attacks"] |= {f"{name}_kept": [share / 2 for share in parts["attacks"][name]] for name in ("fgsm", "pgd", "pgd_l2")}
    parts["noise"]["kept"] = [None] * len(parts["noise"]["sigma"])  # no image was right
    return dataclasses.replace(run, parts=parts)


def test_robustness_among_images_that_are_right_clean():
    runs = made_up({"none": 0, "so": 1}, depths=[8])
    kept = metric_of("fgsm_kept")
    assert compare(runs).cells(kept) == {}  # early evaluations lack it
    comparison = compare([*map(with_kept, runs)])
    assert comparison.cell(kept, "ResNet-8", "so").sample.mean == pytest.approx(
        comparison.cell(metric_of("fgsm"), "ResNet-8", "so").sample.mean / 2
    )
    assert comparison.cells(metric_of("noise_kept")) == {}
    mixed = compare([with_kept(run) if run.recipe.regularizer else run for run in runs])
    assert mixed.excluded == ()
    assert list(mixed.cells(kept)["ResNet-8"]) == ["so"]


def other(run, **environment):
    return dataclasses.replace(run, summary=run.summary | {"environment": run.summary["environment"] | environment})


def test_arms_of_different_commits_are_flagged():
    runs = made_up({"none": 0, "so": 1}, depths=[8])
    later = "b" * 40
    assert compare(runs).flags == ()
    assert compare([other(run, commit=later) if run.seed == 1 else run for run in runs]).flags == ()  # of all arms alike
    assert compare([other(run, commit=None) for run in runs]).flags == ()
    (flag,) = compare([other(run, commit=later) if run.recipe.regularizer else run for run in runs]).flags
    assert flag.startswith("ResNet-8: arms share no commit of orthokit: ")
    assert flag.endswith("8e0da63b in none; bbbbbbbb in so")
    (flag,) = compare([other(run, commit=f"{later}+changes") if run == runs[-1] else run for run in runs]).flags
    assert flag.startswith("ResNet-8: arms were run at different commits")
    assert flag.endswith("8e0da63b in none; 8e0da63b, bbbbbbbb+changes in so")


def test_processors_of_one_name_are_told_apart():
    runs = made_up({"none": 0, "so": 1}, depths=[8])
    genoa = {"family": "25", "model": "17", "instructions": ["avx512f", "avx512_bf16"]}
    assert compare([other(run, cpu=genoa) for run in runs]).flags == ()
    for cpu in (genoa | {"model": "1"}, genoa | {"instructions": []}, None):
        changed = [other(run, cpu=cpu if run.recipe.regularizer else genoa) for run in runs]
        (flag,) = compare(changed).flags
        assert "different devices" in flag
        assert "AMD EPYC (family 25, model 17, avx512f+avx512_bf16) in none" in flag
