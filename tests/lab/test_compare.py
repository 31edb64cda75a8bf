"""Comparisons: statistics against SciPy and simulation, what may be compared, verdicts, tables."""

import csv
import dataclasses
import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from made_up import made_up
from orthokit.cli import main
from orthokit.lab.atomic import to_json
from orthokit.lab.comparison.comparison import compare
from orthokit.lab.comparison.inference import (
    ALPHA,
    Sample,
    contrast,
    detectable,
    differences,
    holm,
    intraclass,
    per_doubling,
    pooled_sd,
    power,
    seeds_needed,
)
from orthokit.lab.comparison.metrics import metric_of
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.reporting import markup, tables, words
from orthokit.lab.reporting.page import page
from orthokit.lab.reporting.terminal import Shown
from orthokit.lab.runs import collect

ARMS = {"none": 0.0, "so": 2.0, "strict": 0.0, "welch": -2.0}


def changed(result, raw=None, **summary):
    """A result with other entries in its summary or recipe."""
    recipe = Recipe.of(raw) if raw else result.recipe
    return dataclasses.replace(result, summary=result.summary | {"recipe": recipe.to_dict()} | summary, recipe=recipe)


def with_recipe(result, section, **keys):
    raw = result.recipe.to_dict()
    raw[section] = raw.get(section, {}) | keys
    return changed(result, raw)


def shown(comparison, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Shown(comparison))
    return console.file.getvalue()


# Statistics ---------------------------------------------------------------------------------------------------------------------


def test_a_sample_by_hand():
    sample = Sample((1.0, 2.0, 4.0))
    assert (sample.n, sample.mean, sample.sd) == (3, pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)))
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=math.sqrt(7 / 9))
    assert sample.interval == pytest.approx((low, high))
    assert (Sample((1.0,)).sd, Sample((1.0,)).interval) == (None, None)
    assert pooled_sd([Sample((0.0, 2.0)), Sample((0.0, 2.0, 4.0)), Sample((9.0,))]) == pytest.approx(math.sqrt((2 + 8) / 3))
    assert pooled_sd([Sample((1.0,))]) is None


def test_differences_are_those_of_scipy_and_of_the_formula():
    random = np.random.default_rng(1)
    values = {name: tuple(random.normal(90, sd, n)) for name, sd, n in (("none", 1, 5), ("a", 0.2, 3), ("b", 3, 8))}
    actual = differences({name: Sample(each) for name, each in values.items()}, "none")
    dunnett = stats.dunnett(values["a"], values["b"], control=values["none"], rng=np.random.default_rng(7)).pvalue
    for name, p in zip(("a", "b"), dunnett, strict=True):
        x, y = np.array(values[name]), np.array(values["none"])
        parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))
        t = (x.mean() - y.mean()) / math.sqrt(sum(parts))
        half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
        assert actual[name].mean == pytest.approx(x.mean() - y.mean())
        assert actual[name].interval == pytest.approx((actual[name].mean - half, actual[name].mean + half))
        assert actual[name].welch == pytest.approx(2 * stats.t.sf(abs(t), freedom))
        assert actual[name].dunnett == pytest.approx(p, abs=2e-3)  # it integrates by chance


def test_dunnett_of_the_textbook():
    """Dunnett 1955, blood counts: SciPy's own example gives p = 0.6201 and 0.0058."""
    control = (7.40, 8.50, 7.20, 8.24, 9.84, 8.32)
    drugs = {"a": (9.76, 8.80, 7.68, 9.36), "b": (12.80, 9.68, 12.16, 9.20, 10.55)}
    actual = differences({"none": Sample(control)} | {name: Sample(v) for name, v in drugs.items()}, "none")
    assert actual["a"].dunnett == pytest.approx(0.6201, abs=2e-3)
    assert actual["b"].dunnett == pytest.approx(0.0058, abs=5e-4)


def test_no_spread_and_single_runs():
    same = differences({"none": Sample((1.0, 1.0)), "a": Sample((1.0, 1.0)), "b": Sample((2.0, 2.0))}, "none")
    assert [(same[name].mean, same[name].welch, same[name].dunnett, same[name].interval) for name in "ab"] == [
        (0.0, None, None, None),
        (1.0, None, None, None),
    ]
    hardly = differences({"none": Sample((19.7, 19.7)), "a": Sample((19.7, 19.7 + 1e-14)), "b": Sample((19.6, 19.8))}, "none")
    assert all(0 <= hardly[name].welch <= 1 and 0 <= hardly[name].dunnett <= 1 for name in "ab")
    single = differences({"none": Sample((1.0, 1.1)), "a": Sample((3.0,)), "b": Sample((1.0, 1.3))}, "none")
    assert (single["a"].interval, single["a"].welch, single["a"].dunnett) == (None, None, None)
    assert single["b"].welch is not None
    assert not single["a"].resolved


def test_holm_by_hand_and_in_any_order():
    values = [0.01, 0.02, 0.03, 0.005]
    assert holm(values) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    order = [2, 0, 3, 1]
    assert [holm([values[k] for k in order])[order.index(k)] for k in range(4)] == pytest.approx(holm(values))
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_power_by_simulation_and_back():
    random = np.random.default_rng(0)
    for n, effect, comparisons in ((2, 9.0, 1), (3, 3.0, 1), (3, 6.0, 6), (6, 2.0, 4), (12, 1.0, 1)):
        a, b = random.normal(0, 1, (20_000, n)), random.normal(effect, 1, (20_000, n))
        rate = (stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < ALPHA / comparisons).mean()
        assert power(n, effect, 1.0, comparisons=comparisons) == pytest.approx(rate, abs=0.012)
    for n in (2, 3, 10, 200):
        least = detectable(n, 0.4)
        assert power(n, least, 0.4) == pytest.approx(0.8, abs=1e-6)
        assert seeds_needed(least * 1.0001, 0.4) == n
    for effect in (0.05, 0.2, 1.0):
        n = seeds_needed(effect, 0.3, comparisons=3)
        assert power(n, effect, 0.3, comparisons=3) >= 0.8 > (power(n - 1, effect, 0.3, comparisons=3) if n > 2 else 0)
    assert power(5, 0.0, 1.0) == ALPHA
    assert power(2, 1e6, 1e-3) == 1.0
    assert (seeds_needed(1.0, 0.0), detectable(2, 0.0)) == (2, 0.0)
    for n, comparisons in ((2, 3), (3, 10), (3, 40), (4, 40), (6, 100)):  # far out, where SciPy's noncentral t is not a number
        least = detectable(n, 1.0, comparisons=comparisons)
        a, b = random.normal(0, 1, (20_000, n)), random.normal(least, 1, (20_000, n))
        rate = (stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < ALPHA / comparisons).mean()
        assert rate == pytest.approx(0.8, abs=0.015)
    for wrong in ({"n": 1, "sd": 1.0}, {"n": 3, "sd": -1.0}, {"n": 3, "sd": math.nan}, {"n": 10**400, "sd": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            detectable(**wrong)
    for bad in (
        {"effect": 0.0, "sd": 1.0},
        {"effect": -1.0, "sd": 1.0},
        {"effect": 1e-6, "sd": 1.0},
        {"effect": 1.0, "sd": -1.0},
    ):
        with pytest.raises(ValueError, match=r"effect|sd|more than"):
            seeds_needed(**bad)
    with pytest.raises(ValueError, match="chance must be below 1"):
        seeds_needed(1.0, 1.0, chance=1.0)


def trend(arm, none):
    return contrast(per_doubling([*arm]), [*arm.values()], [*none.values()])


def test_a_trend_by_hand():
    random = np.random.default_rng(2)
    arm, none = ({x: Sample(tuple(random.normal(0, sd, n))) for x, sd, n in ((3, 1, 4), (6, 2, 5), (12, 3, 6))} for _ in "ab")
    actual = trend(arm, none)
    ends = [arm[12], none[12], arm[3], none[3]]  # the middle one has no weight
    parts = [each.sd**2 / each.n / 4 for each in ends]
    freedom = sum(parts) ** 2 / sum(part**2 / (each.n - 1) for part, each in zip(parts, ends, strict=True))
    expected = (arm[12].mean - none[12].mean - arm[3].mean + none[3].mean) / 2
    assert actual.mean == pytest.approx(expected)
    assert actual.interval == pytest.approx(stats.t.interval(0.95, freedom, loc=expected, scale=math.sqrt(sum(parts))))
    assert actual.raw == pytest.approx(2 * stats.t.sf(abs(expected) / math.sqrt(sum(parts)), freedom))
    for other in ({x: Sample((1.0,)) for x in none}, {x: Sample((1.0, 1.0)) for x in none}):
        assert trend(other, other).raw is None


def test_trends_are_found_as_often_as_they_should_be():
    """500 studies: without a trend, however the means lie, 5% wrong; intervals that hold the planted one in 95%."""
    random = np.random.default_rng(3)
    depths, bent = (8, 14, 20, 32), {8: 3.0, 14: -1.0, 20: 2.0, 32: 0.0}
    wrong = held = 0
    for _ in range(500):
        none, flat, rising = (
            {x: Sample(tuple(random.normal(bent[x] + slope * math.log2(x), 0.5, 5))) for x in depths} for slope in (0.0, 0.0, 0.4)
        )
        wrong += trend(flat, none).raw < 0.05
        low, high = trend(rising, none).interval
        held += low < 0.4 < high
    assert 0.02 <= wrong / 500 <= 0.08
    assert 0.92 <= held / 500 <= 0.98


def seeded(random, correlation, arms=4, seeds=6):
    """Results of arms whose means differ and whose runs of one seed correlate."""
    common, own = random.normal(0, math.sqrt(correlation), seeds), random.normal(0, math.sqrt(1 - correlation), (arms, seeds))
    return (np.arange(arms)[:, None] + common + own).tolist()


def test_what_seeds_have_in_common_is_the_anova_of_arms_and_seeds():
    block = np.array(seeded(np.random.default_rng(4), 0.5, arms=3, seeds=5))
    total, arms, seeds = ((block - mean) ** 2 for mean in (block.mean(), block.mean(0), block.mean(1, keepdims=True)))
    error = (arms.sum() + seeds.sum() - total.sum()) / 8
    of_seeds = (total.sum() - arms.sum()) / 4
    expected = (of_seeds - error) / (of_seeds + 2 * error), stats.f.sf(of_seeds / error, 4, 8)
    assert intraclass([block.tolist()]) == pytest.approx(expected)
    assert intraclass([block.tolist(), [], [[1.0], [2.0]], [[1.0, 2.0]]]) == pytest.approx(expected)
    assert intraclass([(block + 7).tolist()] * 2)[0] == pytest.approx(expected[0])
    for nothing in ([], [[]], [[[1.0], [2.0]]], [[[1.0, 2.0]]], [[[1.0, 1.0], [1.0, 1.0]]]):
        assert intraclass(nothing) is None


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_what_seeds_have_in_common_is_found_as_it_was_planted(correlation):
    random = np.random.default_rng(5)
    actual = [intraclass([seeded(random, correlation, arms), seeded(random, correlation, 5)]) for arms in (2, 4) * 200]
    assert np.mean([each for each, _ in actual]) == pytest.approx(correlation, abs=0.05)
    called = np.mean([p < 0.05 for _, p in actual])
    assert called > 0.6 if correlation else 0.02 < called < 0.08


@pytest.mark.parametrize(
    ("gain", "seeds", "low", "high"),
    [
        (0.5, seeds_needed(0.5, 0.3, comparisons=3), 0.72, 0.92),  # 80% and a little, as Holm gains on Bonferroni
        (0.5, 3, 0.0, 0.35),
        (0.0, 6, 0.0, 0.09),  # of families with any wrong verdict
    ],
)
def test_simulated_studies(gain, seeds, low, high):
    """200 studies of three arms, one of which gains: how often it is found, and how often anything is that is not there."""
    random = np.random.default_rng(seeds)
    template = compare(made_up({"none": 0.0, "so": 0.0, "strict": 0.0, "welch": 0.0}, depths=[8], seeds=seeds, parts=False))
    (panel,) = template.panels
    actual = wrong = 0

    def drawn(run, mean):
        test = {"accuracy": 0.9 + (mean + random.normal(0, 0.3)) / 100}
        return dataclasses.replace(run, summary=run.summary | {"test": test})

    for _ in range(200):
        arms = {arm: tuple(drawn(run, gain * (arm == "so")) for run in runs) for arm, runs in panel.arms.items()}
        comparison = dataclasses.replace(template, panels=(dataclasses.replace(panel, arms=arms),))
        cells = comparison.cells(comparison.primary)["ResNet-8"]
        verdicts = {arm: cell.verdict for arm, cell in cells.items() if cell.difference}
        assert set(verdicts.values()) <= {"better", "worse", "not resolved"}
        actual += verdicts.pop("so") == "better"
        wrong += any(verdict != "not resolved" for verdict in verdicts.values())
    assert low <= actual / 200 <= high
    assert wrong / 200 <= 0.09  # 5%, and three standard errors


# Comparisons --------------------------------------------------------------------------------------------------------------------


def test_planted_gains_and_what_is_said():
    comparison = compare(made_up(ARMS, seeds=6, sd=0.3), title="made up")
    assert [panel.name for panel in comparison.panels] == ["ResNet-8", "ResNet-20"]
    assert comparison.arms == list(ARMS)
    for panel in comparison.panels:
        cells = comparison.cells(comparison.primary)[panel.name]
        assert {arm: cell.verdict for arm, cell in cells.items()} == {
            "none": "",
            "so": "better",
            "strict": "not resolved",
            "welch": "worse",
        }
    assert comparison.comparisons(comparison.primary) == 6
    text = words.verdicts(comparison)
    assert len(text) == 9
    assert text[0].startswith("mean difference, both panels: SO is better than none: +1.98 [+1.67, +2.28] points of ")
    assert re.fullmatch(
        r"ResNet-8: SO is better than none: \+[\d.]+ \[\+[\d.]+, \+[\d.]+\] points of test accuracy, adjusted p = \S+, n = 6",
        text[3],
    )
    assert text[4].startswith("ResNet-8: strict against none is not resolved: ")
    assert not comparison.flags
    nll = comparison.cells(metric_of("nll"))["ResNet-20"]
    assert nll["so"].verdict == "better"  # a smaller one
    assert nll["so"].difference.mean < 0
    cosines = comparison.cells(metric_of("under_cos"))["ResNet-8"]
    assert {cosines[arm].verdict for arm in ("so", "strict", "welch")} == {"lower"}
    assert all(
        re.search(r"with 6 seeds an arm, only gains above .* points .* For .* use \d+ seeds, for", each)
        for each in words.power(comparison)
    )


def test_what_arms_of_one_seed_share_is_told():
    runs = made_up(ARMS, seeds=6)

    def lifted(run):
        return changed(run, test=run.summary["test"] | {"accuracy": run.summary["test"]["accuracy"] + run.seed / 20})

    shared = re.compile(r"Arms share seeds: .* results of one seed correlate by ([+-][\d.]+) \(intraclass; F test p = (\S+)\)")
    assert float(shared.search(words.explanation(compare(runs)))[2]) > 0.05
    actual = shared.search(words.explanation(compare([*map(lifted, runs)])))
    assert actual[1] == "+1.00"
    assert float(actual[2]) < 1e-9
    apart = [run for run in runs if (run.seed < 3) == (run.summary["study"]["arm"] == "none")]
    assert "Arms share seeds" not in words.explanation(compare(apart))
    lacking = [changed(run, test={"loss": 1.0, "accuracy": None}) if run.summary["study"]["arm"] == "so" else run for run in runs]
    assert shared.search(words.explanation(compare(lacking)))


def test_adjusted_over_all_panels():
    comparison = compare(made_up(ARMS, seeds=3))
    cells = [c for arms in comparison.cells(comparison.primary).values() for c in arms.values() if c.difference]
    assert [c.difference.holm for c in cells] == pytest.approx(holm([c.difference.welch for c in cells]))
    assert len(cells) == 6


def test_trends_over_panels_that_grow():
    gains = {8: 0.0, 16: 1.0, 32: 2.0, 64: 3.0}
    runs = [
        run for depth, gain in gains.items() for run in made_up({"none": 0, "so": 1, "strict": gain, "welch": -gain}, [depth], 4)
    ]
    comparison = compare(runs)
    assert comparison.grows == "network.depth"
    mean, change = comparison.contrasts
    assert [change.verdict(arm) for arm in ("so", "strict", "welch")] == ["not resolved", "rises", "falls"]
    assert [mean.verdict(arm) for arm in ("so", "strict", "welch")] == ["better", "better", "worse"]
    assert change.answers["strict"].mean == pytest.approx(1.0, abs=0.3)
    cells = [comparison.cell(comparison.primary, panel.name, "strict").difference.mean for panel in comparison.panels]
    assert mean.answers["strict"].mean == pytest.approx(sum(cells) / 4)
    for asked in (mean, change):
        raw = [each.raw for each in asked.answers.values()]
        assert [each.holm for each in asked.answers.values()] == pytest.approx(holm(raw))
    for text in (shown(comparison), markup.markdown(comparison), markup.latex(comparison), page(comparison, drawn={})):
        assert "per doubling" in text
        assert "network.depth from 8 to 64" in " ".join(text.replace("\\_", "_").split())
        assert "all 4 panels" in text
    start = "change per doubling, network.depth from 8 to 64: Welch-bounded falls against none: -"
    assert sum(each.startswith(start) for each in words.verdicts(comparison)) == 1
    (row,) = [row for row in csv.DictReader(io.StringIO(tables.numbers(comparison).to_csv())) if row["verdict"] == "rises"]
    assert (row["panel"], row["arm"]) == ("change per doubling, network.depth from 8 to 64", "strict")
    # Two panels are no trend, nor are panels that differ in a word.
    assert [asked.name for asked in compare(made_up(ARMS)).contrasts] == ["mean difference"]
    assert compare(made_up(ARMS, [8])).contrasts == []
    projected = [
        with_recipe(run, "network", shortcut="projection") if run.recipe.to_dict()["network"]["depth"] > 8 else run
        for run in runs
    ]
    assert compare(projected).grows is None
    assert "per doubling" not in markup.markdown(compare(projected))
    # An arm that is missing somewhere has none.
    short = [run for run in runs if not (run.summary["study"]["arm"] == "so" and run.recipe.to_dict()["network"]["depth"] == 16)]
    assert all(list(asked.answers) == ["strict", "welch"] for asked in compare(short).contrasts)


def test_what_is_not_finite_is_missing():
    runs = made_up({"none": 0, "so": 9}, depths=[8])
    broken = dataclasses.replace(runs[0], parts=runs[0].parts | {"accuracy": runs[0].parts["accuracy"] | {"nll": math.nan}})
    cells = compare([broken, *runs[1:]]).cells(metric_of("nll"))["ResNet-8"]
    assert list(cells) == ["so"]
    (flag,) = compare([broken, *runs[1:]]).flags
    assert flag == "ResNet-8: no NLL, or no finite one, of none (seed 0); these arms are left out of it"


def test_single_runs_resolve_nothing():
    comparison = compare(made_up({"none": 0, "so": 9}, depths=[8], seeds=1))
    cell = comparison.cells(comparison.primary)["ResNet-8"]["so"]
    assert (cell.verdict, cell.sample.sd, cell.difference.holm) == ("not resolved", None, None)
    assert "nothing is tested" in words.power(comparison)[0]
    assert "no p of single or equal runs" in words.verdicts(comparison)[0]
    assert "–" in shown(comparison)


def test_arms_and_panels_without_a_study():
    runs = [changed(run, study={}) for run in made_up(ARMS)]
    comparison = compare(runs)
    assert comparison.arms == [
        "none",
        "SO(squared=False), 0.1",
        "Disentangled(), 0.1",
        "Disentangled(relax=share(0.1), form='welch'), 0.1",
    ]
    assert [(panel.name, panel.depth) for panel in comparison.panels] == [("depth=8", 8), ("depth=20", 20)]
    longer = [with_recipe(run, "train", epochs=40) for run in runs]
    panels = compare([*runs, *longer], by=["network", "train.epochs"]).panels
    assert [panel.name for panel in panels] == [f"depth={d}, epochs={e}" for d in (8, 20) for e in (20, 40)]
    plain = [run for run in runs if run.recipe.regularizer is None]
    orthogonal = [with_recipe(run, "train", init="orthogonal") for run in plain]
    both = compare([*plain, *orthogonal], factor=["train.init"], baseline="init=default")
    assert both.arms == ["init=default", "init=orthogonal"]
    with pytest.raises(
        ValueError, match=r"which arm is the baseline\? name it with --baseline; there are 'init=default', 'init="
    ):
        compare([*plain, *orthogonal], factor=["train.init"])
    named = [changed(run, study={"arm": arm}) for arm, each in (("Baseline", plain), ("other", orthogonal)) for run in each]
    assert compare(named, factor=["train.init"]).baseline == "Baseline"


def test_what_differs_besides_the_factor_is_refused():
    runs = made_up(ARMS, depths=[8])
    longer = [with_recipe(run, "train", epochs=40) if run.recipe.regularizer else run for run in runs]
    with pytest.raises(
        ValueError, match=r"ResNet-8: runs differ in train.epochs, .*: 20 in none; 40 in so, strict, welch.*--factor"
    ):
        compare(longer)
    flagged = compare(longer, anyway=True)
    assert any("runs differ in train.epochs" in flag for flag in flagged.flags)
    assert not compare(longer, factor=["regularizer", "train.epochs"]).flags
    other = [changed(run, fingerprint="another") if run.seed == 2 else run for run in runs]
    with pytest.raises(ValueError, match="runs are of different images"):
        compare(other)
    with pytest.raises(ValueError, match="the same run counts 2 times: runs/ResNet-8-1/1, runs/ResNet-8-1/1"):
        compare([*runs, next(run for run in runs if run.summary["study"]["arm"] == "so" and run.seed == 1)])


def test_what_is_not_one_arm_is_refused():
    runs = made_up({"none": 0, "so": 0}, depths=[8])
    stronger = [with_recipe(run, "regularizer", strength=0.3) for run in runs if run.recipe.regularizer]
    others = [changed(run, seed=run.seed + 3) for run in stronger]
    with pytest.raises(ValueError, match=r"so is the name of more than one arm: regularizer.strength is 0.1 and 0.3"):
        compare([*runs, *others])
    twins = [changed(run, study={}) for run in runs]
    with pytest.raises(ValueError, match="the same run counts 2 times"):
        compare([*runs, *twins])


def test_curves_of_other_lengths_do_not_compare():
    runs = made_up({"none": 0, "so": 0}, depths=[8])
    short = dataclasses.replace(runs[0], parts=runs[0].parts | {"attacks": runs[0].parts["attacks"] | {"pgd": [0.9]}})
    assert "pgd" not in {metric.key for metric in compare([short, *runs[1:]]).metrics}


def test_arms_that_are_one_arm_are_flagged():
    runs = made_up(ARMS, depths=[8])
    strict = [run for run in runs if run.summary["study"]["arm"] == "strict"]
    network = strict[0].recipe.network.build(channels=3, classes=10)
    orders = {name: module.out_channels for name, module in network.named_modules() if hasattr(module, "out_channels")}

    def relaxed(arm, ranks, **penalty):
        section = {"strength": 0.1, "penalty": {"name": "disentangled", "relax": {"name": "fraction", "rho": 1.0}} | penalty}
        return [
            changed(with_recipe(run, "regularizer", **section), study={"arm": arm, "panel": "ResNet-8"}, ranks=ranks)
            for run in made_up({"none": 0.0, "strict": 1.0}, depths=[8])
            if run.recipe.regularizer
        ]

    less = {name: min(order, 9) for name, order in orders.items()}
    flags = compare([*runs, *relaxed("whole", orders)]).flags
    assert [flag for flag in flags if "strict and whole have equal plans" in flag]
    assert not [flag for flag in compare([*runs, *relaxed("less", less)]).flags if "equal plans" in flag]
    flags = compare([*runs, *relaxed("one", less), *relaxed("two", less, relax={"name": "share", "q": 0.3})]).flags
    assert [flag for flag in flags if "one and two have equal plans" in flag]
    flags = compare([*runs, *relaxed("one", less), *relaxed("two", less, form="welch")]).flags
    assert not [flag for flag in flags if "equal plans" in flag]
    copies = [
        dataclasses.replace(run, summary=run.summary | {"test": twin.summary["test"]})
        for run, twin in zip([r for r in runs if r.summary["study"]["arm"] == "so"], strict, strict=True)
    ]
    flags = compare([*copies, *(r for r in runs if r.summary["study"]["arm"] != "so")]).flags
    assert [flag for flag in flags if "so and strict have the very same results" in flag]


def test_selection_on_test_is_flagged(tmp_path):
    runs = made_up({"none": 0, "so": 0}, depths=[8])
    bare = [with_recipe(run, "data", validation=0) for run in runs]
    assert "ResNet-8: no validation images in so" in compare(bare).flags[0]
    stronger = [
        changed(with_recipe(run, "regularizer", strength=0.3), study={"arm": "so .3", "panel": "ResNet-8"})
        for run in runs
        if run.recipe.regularizer
    ]
    assert any("so, so .3 differ in strength alone" in flag for flag in compare([*runs, *stronger]).flags)
    (tmp_path / "strength").mkdir()
    (tmp_path / "strength/sweep.json").write_text("[]")
    swept = [
        dataclasses.replace(run, source=tmp_path / "strength/so/0/summary.json") if run.recipe.regularizer else run
        for run in runs
    ]
    assert "runs of a sweep, which chose among them: so" in compare(swept).flags[0]


def test_unequal_speeds_are_told():
    runs = made_up({"none": 0, "so": 0}, depths=[8], parts=False)
    (note,) = words.notes(compare(runs))
    assert note == words.COST  # arms may differ as they like
    slow = changed(runs[0], images_per_second=runs[1].summary["images_per_second"] / 4)
    (note,) = words.notes(compare([slow, *runs[1:]]))
    assert re.search(r"by up to a factor of (3\.[6-9]|4\.[0-4]) in images/s", note)
    (note,) = words.notes(compare([changed(runs[0], images_per_second=0.0), *runs[1:]]))
    assert note == words.COST


def test_other_flags():
    runs = made_up({"none": 0, "so": 0}, depths=[8, 20])
    assert "arms have different seeds" in compare(runs[:-1]).flags[0]
    environment = runs[0].summary["environment"] | {"precision": "bf16-mixed"}
    (flag,) = compare([changed(runs[0], environment=environment), *runs[1:]]).flags
    assert flag.startswith("ResNet-8: different precision, ")
    environment = runs[0].summary["environment"] | {"processor": "another"}
    (flag,) = compare([changed(runs[0], environment=environment), *runs[1:]]).flags
    assert flag.startswith("ResNet-8: different devices, ")
    on_gpus = [
        changed(run, environment=run.summary["environment"] | {"device": "H200", "processor": str(k)})
        for k, run in enumerate(runs)
    ]
    assert not compare(on_gpus).flags
    without = [run for run in runs if run.recipe.regularizer or run.summary["study"]["panel"] == "ResNet-8"]
    assert "ResNet-20: no run of the baseline none, hence no differences" in compare(without).flags
    assert compare(runs, flagged=["3 runs are missing"]).flags == ("3 runs are missing",)
    less = dataclasses.replace(
        runs[0], parts=runs[0].parts | {"attacks": runs[0].parts["attacks"] | {"settings": {"images": 50, "steps": 20}}}
    )
    comparison = compare([less, *runs[1:]])
    assert comparison.flags[0].startswith("evaluated with different settings, hence left out: attacks; ")
    assert not {"fgsm", "pgd", "pgd_l2"} & {metric.key for metric in comparison.metrics}
    lacking = dataclasses.replace(runs[0], parts={k: v for k, v in runs[0].parts.items() if k != "noise"})
    comparison = compare([lacking, *runs[1:]])
    assert comparison.flags == ("not evaluated in 1 of 12 runs, whose arms are left out there: noise",)
    assert comparison.cell(metric_of("noise"), "ResNet-8", "none") is None
    assert comparison.cell(metric_of("noise"), "ResNet-8", "so").difference is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": ["regulariser"]}, "unknown recipe key 'regulariser'; --factor and --by take recipe keys"),
        ({"baseline": "nothing"}, "no arm 'nothing' to be the baseline; there are 'none', 'so'"),
        ({"metric": "acc"}, "metric must be one of"),
        ({"metric": "speed"}, "verdicts cannot go by speed"),
        ({"factor": ["train.lrr"]}, "no recipe of these runs has the key 'train.lrr'"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        compare(made_up({"none": 0, "so": 0}), **options)


def test_one_arm_is_no_comparison():
    with pytest.raises(ValueError, match="only one arm"):
        compare(made_up({"none": 0}))
    with pytest.raises(ValueError, match="no run has a finite FGSM; measure it with orthokit evaluate --parts attacks"):
        compare(made_up({"none": 0, "so": 0}, parts=False), metric="fgsm")


# Reading ------------------------------------------------------------------------------------------------------------------------


def saved(runs, folder):
    for run in runs:
        place = folder / run.summary["name"] / str(run.seed)
        place.mkdir(parents=True)
        (place / "summary.json").write_text(to_json(run.summary))
        (place / "evaluation.json").write_text(to_json({"weights": "", "parts": run.parts}))
        rows = [
            {
                "epoch": epoch,
                "validation": None,
                "orthogonality": {"under": {"mean_cos": 0.1 / epoch}, "over": {"copies": 0}},
            }
            for epoch in range(1, 61)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_read_and_kept_small(tmp_path):
    runs = made_up({"none": 0, "so": 1}, depths=[8])
    actual, text = collect.read([saved(runs, tmp_path / "runs")])
    assert (len(actual), text) == (6, [])
    assert actual[0].parts == runs[0].parts
    assert len(actual[0].history) <= 25
    assert actual[0].history[-1] == {"epoch": 60, "validation": None, "under": 0.00167}
    assert len(json.dumps(actual[0].small())) < 12_000
    for run in actual:
        place = tmp_path / "kept" / run.summary["name"] / str(run.seed)
        place.mkdir(parents=True)
        (place / "summary.json").write_text(to_json(run.small()))
    again, _ = collect.read([tmp_path / "kept", tmp_path / "kept/ResNet-8-0/0"])
    assert [(run.summary, run.parts, run.history) for run in again] == [(run.summary, run.parts, run.history) for run in actual]


def test_unfinished_and_broken_runs_are_told(tmp_path, capsys):
    folder = saved(made_up({"none": 0, "so": 1}, depths=[8]), tmp_path / "runs")
    (folder / "ResNet-8-1/0/summary.json").unlink()
    (folder / "ResNet-8-1/0/recipe.toml").touch()
    (folder / "ResNet-8-1/0/failed.txt").touch()
    (folder / "ResNet-8-1/1/summary.json").unlink()
    (folder / "ResNet-8-1/1/recipe.toml").touch()
    _, text = collect.read([folder])
    assert text[0] == "failed, hence left out: ResNet-8-1/0; what remains of its arm may be a lucky choice"
    assert text[1] == "not finished, hence left out: ResNet-8-1/1"
    assert main(["compare", str(folder)]) == 0
    assert "failed, hence left out" in " ".join(capsys.readouterr().out.split())
    ok = json.loads((folder / "ResNet-8-1/2/summary.json").read_text())
    odd = [
        json.dumps(ok | each) for each in ({"study": 3}, {"environment": []}, {"test": {"accuracy": 1e308}}, {"evaluation": [1]})
    ]
    for content in (*odd, "{", "[]", "{}", '{"recipe": {}, "seed": 0, "test": {}, "orthogonality": {}, "fingerprint": ""}'):
        (folder / "ResNet-8-1/2/summary.json").write_text(content)
        _, text = collect.read([folder])
        assert re.match(r"left out, .*: \S*ResNet-8-1/2/summary.json is (damaged|not what a run writes) \(", text[0])
        with pytest.raises(ValueError, match=r"ResNet-8-1/2/summary.json is (damaged|not what a run writes) \("):
            collect.read([folder / "ResNet-8-1/2"])
    assert main(["compare", str(folder)]) == 2
    err = capsys.readouterr().err.replace("\n", "")
    assert "there is only one arm, none" in err
    assert "ResNet-8-1/2/summary.json is not what a run writes" in err
    (folder / "ResNet-8-1/2/summary.json").write_text(json.dumps(ok))
    for content in ("{", '{"epoch": 1}', '{"epoch": 1, "validation": null, "orthogonality": {"under": null}}'):
        (folder / "ResNet-8-1/2/metrics.jsonl").write_text(content)
        _, text = collect.read([folder])
        assert re.search(r"ResNet-8-1/2/metrics.jsonl.* is (damaged|not what a run writes) \(", text[0])
    assert main(["compare", str(tmp_path / "nothing")]) == 2


# Output -------------------------------------------------------------------------------------------------------------------------


def test_on_a_terminal():
    comparison = compare(made_up(ARMS, seeds=4), flagged=["beware"])
    text = shown(comparison, 160)
    for part in (
        "! beware",
        "p (Holm)",
        "not resolved",
        "better",
        "PGD L∞, %",
        "effective rank",
        "power:",
        "adjusted after Holm",
    ):
        assert part in text
    assert f"{comparison.cells(comparison.primary)['ResNet-8']['so'].sample.mean:.2f}" in shown(comparison, 40)
    narrow = shown(comparison, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    for part in ("difference", "verdict", "not resolved", "PGD L2, %", "NC1"):
        assert part in narrow


def test_markdown_latex_csv():
    comparison = compare(made_up({"none": 0, "a_b & 50% |x|": 2}, seeds=4), title="T_1")
    text = markup.markdown(comparison, figures=[("figures/x.svg", "a picture")], command="orthokit study s.toml")
    for piped in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace("\\|", "").count("|") for line in piped.splitlines()}) == 1
    assert "![a picture](figures/x.svg)" in text
    assert "a_b & 50% \\|x\\|" in text
    tex = markup.latex(comparison)
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == len(tables.tables(comparison)) == 8
    assert r"a\_b \& 50\% $|$x$|$" in tex
    assert not re.search(r"[±∞–↑↓]|(?<!\\)[%_#]", re.sub("^%.*", "", tex, flags=re.M))
    for body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", tex, re.S):
        lines = [line for line in body[1].splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(body[0])}
    rows = list(csv.DictReader(io.StringIO(tables.numbers(comparison).to_csv())))
    row = next(row for row in rows if row["metric"] == "accuracy" and row["arm"] != "none")
    cell = comparison.cells(comparison.primary)[row["panel"]][row["arm"]]
    assert float(row["p_holm"]) == cell.difference.holm
    assert float(row["mean"]) == cell.sample.mean
    assert row["verdict"] == cell.verdict == "better"


def test_power_command(capsys):
    assert main(["power", "--effect", "0.3", "--sd", "0.15"]) == 0
    assert "6 seeds an arm resolve a difference of 0.3" in capsys.readouterr().out
    assert main(["power", "--seeds", "3", "--sd", "0.15"]) == 0
    assert "0.526 is what 3 seeds an arm resolve" in capsys.readouterr().out
    assert main(["power", "--seeds", "3", "--effect", "0.3", "--sd", "0.15", "--comparisons", "4"]) == 0
    assert "is the chance that 3 seeds" in capsys.readouterr().out
    for wrong in (["--sd", "1"], ["--sd", "-1", "--effect", "1"], ["--sd", "1", "--effect", "0"], ["--sd", "1", "--seeds", "1"]):
        assert main(["power", *wrong]) == 2
        assert "orthokit:" in capsys.readouterr().err
