"""The theory of relaxation, against simulation and against what it promises."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import orthokit as ok
import references as slow

PAIRS = [(o, r) for o in (4, 9, 16, 33, 64) for r in sorted({1, 2, o // 3, o // 2, o - 1})][:21]


@pytest.mark.parametrize(("o", "r"), PAIRS)
def test_expected_cardinality_is_the_mean_of_a_simulation(o, r):
    rng, runs = np.random.default_rng(o * 100 + r), 4000
    m = o - r
    draws = rng.integers(r, size=(runs, m))
    counts = np.stack([(draws == b).sum(1) for b in range(r)])
    totals = m + (counts * (counts - 1) // 2).sum(0)
    error = max(totals.std(ddof=1) / runs**0.5, 1e-12)
    assert abs(totals.mean() - ok.expected_cardinality(o, r)) < 4 * error


@pytest.mark.parametrize("o", [1, 2, 5, 16, 640])
@pytest.mark.parametrize("count", ["expected", "fewest"])
def test_cardinality(o, count):
    for r in range(1, o + 1):
        actual = ok.cardinality(o, r, count)
        assert actual == slow.free_pairs(o, r, count)
        assert type(actual) is int
        assert actual == ok.cardinality(o, torch.tensor(r), count)
    assert ok.cardinality(o, o, count) == 0
    assert ok.cardinality(o, 1, count) == o * (o - 1) // 2


def test_fewest_is_the_least_with_which_zero_is_possible():
    # Deal 6 filters to 2 directions in every way: the fewest pairs that must stay correlated is Turan's number.
    least = min(
        sum(size * (size - 1) // 2 for size in np.bincount(deal, minlength=2)) for deal in itertools.product(range(2), repeat=6)
    )
    assert ok.cardinality(6, 2, "fewest") == least


def test_policies():
    assert [ok.fraction(0.5)(o, n) for o, n in [(64, 576), (3, 9), (1, 9), (64, 16)]] == [32, 2, 1, 8]
    assert [ok.feasible()(o, n) for o, n in [(64, 576), (64, 16)]] == [64, 16]
    assert ok.fraction(1.0)(64, 16) == 16
    for policy in (ok.fraction(0.01, floor=10), ok.share(0.9, floor=10), ok.ranks({"": 1}, floor=10)):
        assert [policy(o, n, "") for o, n in [(64, 576), (64, 8), (5, 20)]] == [10, 8, 5]


@pytest.mark.parametrize("q", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("o", "n"), [(16, 144), (64, 576), (64, 16), (640, 5760), (1, 5)])
def test_share_is_the_nearest(q, o, n):
    r = ok.share(q)(o, n)
    assert 1 <= r <= min(o, n)
    off = [abs(ok.expected_cardinality(o, s) - q * o * (o - 1) / 2) for s in range(1, min(o, n) + 1)]
    assert off[r - 1] == min(off)


def test_relaxing_by_fraction_fades_with_width_and_share_does_not():
    freed = {o: ok.cardinality(o, ok.fraction(0.5)(o, 9 * o)) / (o * (o - 1) / 2) for o in (64, 640)}
    assert freed[64] == pytest.approx(0.024, abs=0.001)
    assert freed[640] == pytest.approx(0.0023, abs=0.0001)
    shared = {o: ok.cardinality(o, ok.share(0.1)(o, 9 * o)) / (o * (o - 1) / 2) for o in (64, 640)}
    assert shared[64] == pytest.approx(shared[640], abs=0.01)


def test_welch_bound():
    assert ok.welch()(64, 16) == pytest.approx(slow.welch(64, 16)) == pytest.approx(0.218, abs=5e-4)
    assert ok.welch()(16, 16) == 0
    assert ok.welch()(11, 4) == 0.5
    assert ok.welch()(2, 1) == 1


def test_values_compare_and_print_as_themselves():
    for policy in (
        ok.feasible(),
        ok.feasible(floor=3),
        ok.fraction(0.5),
        ok.share(0.1, floor=10),
        ok.ranks({"a": 3}),
        ok.welch(),
    ):
        again = eval(f"ok.{policy!r}")
        assert again == policy
        assert hash(again) == hash(policy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ok.fraction(0.0), r"rho must be a finite number in \(0, 1\]"),
        (lambda: ok.fraction(1.5), "rho"),
        (lambda: ok.fraction(float("nan")), "rho"),
        (lambda: ok.share(-0.1), r"q must be a finite number in \[0, 1\]"),
        (lambda: ok.share(1.1), "q"),
        (lambda: ok.ranks({"conv": 0}), "rank of 'conv'"),
        (lambda: ok.share(0.1, floor=0), "floor"),
        (lambda: ok.cardinality(4, 5), "r must be an integer, from 1 to 4"),
        (lambda: ok.expected_cardinality(4, 0), "r must be"),
        (lambda: ok.ranks({"a": 1})(4, 4, "b"), "no entry for layer 'b'; it has 'a'"),
        (lambda: ok.ranks({"a": 1})(4, 4), "through a Regularizer"),
        (lambda: ok.transition_dimension(ok.ranks({"a": 9}), 4, 4, "a"), r"r of layer 'a' \(4 filters of 4 weights\)"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kind(unchecked):
    with pytest.raises(TypeError, match="rank of 'conv' must be an integer"):
        ok.ranks({"conv": 2.5})  # type: ignore[dict-item]


def test_plan():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=4))
    plan = ok.plan(model, ok.feasible())
    rows = plan.to_dict()["layers"]
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    assert [row["shape"] for row in rows] == ["wide", "tall", "wide"]
    assert [row["r"] for row in rows] == [16, 16, 8]
    assert [row["pairs"] for row in rows] == [120, 496, 4 * 28]
    assert [row["free"] for row in rows] == [0, ok.cardinality(32, 16), 0]
    assert rows[1]["ceiling"] == pytest.approx((16 / (16 * 31)) ** 0.5)
    assert [row["memory"] for row in rows] == pytest.approx([2 * 16**2 * 4e-6, 2 * 32**2 * 4e-6, 4 * 2 * 8**2 * 4e-6])
    assert plan.totals["3 layers"] == {"free": ok.cardinality(32, 16), "pairs": 728}
    assert "feasible()" in str(plan)
    assert ok.plan(model, None).to_dict() != plan.to_dict()
    assert ok.plan(model.state_dict(), ok.share(0.1)).rows[0] == ok.plan(model, ok.share(0.1)).rows[0]
