"""Schedules at their corners; their examples are in the docstrings."""

import pickle

import pytest

import orthokit as ok

EVERY = [
    ok.constant(0.1),
    ok.piecewise({0: 1.0, 5: 0.1, 10: 0.0}),
    ok.linear(1.0, 0.2, 10),
    ok.cosine(1.0, 0.2, 10),
    ok.warmup(4, ok.cosine(1.0, 0.0, 10)),
    ok.chain((ok.warmup(3, 1.0), 5), (0.5, 5), ok.linear(0.5, 0.0, 10)),
]


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_they_are_values(schedule):
    again = eval(repr(schedule), vars(ok))
    assert again == schedule == pickle.loads(pickle.dumps(schedule))
    assert all(schedule(step) >= 0 for step in range(50))


def test_corners():
    assert [ok.piecewise({5: 0.1, 0: 1.0})(s) for s in (0, 4, 5, 500)] == [1.0, 1.0, 0.1, 0.1]
    assert [round(ok.linear(1.0, 0.2, 4)(s), 9) for s in (0, 1, 4, 9)] == [1.0, 0.8, 0.2, 0.2]
    assert ok.cosine(1.0, 0.2, 10)(0) == 1.0
    assert ok.cosine(1.0, 0.2, 10)(99) == 0.2
    assert [ok.warmup(4, 1.0)(s) for s in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert [ok.chain((1.0, 2), ok.linear(1.0, 0.0, 2))(s) for s in (0, 1, 2, 3, 4, 9)] == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ok.constant(-1.0), ValueError, r"strength must be a finite number in \[0, 1e\+30\]"),
        (lambda: ok.constant(float("nan")), ValueError, "strength"),
        (lambda: ok.piecewise({1: 0.1}), ValueError, "from step 0"),
        (lambda: ok.piecewise({0: -0.1}), ValueError, "piecewise"),
        (lambda: ok.linear(1.0, 0.0, 0), ValueError, "steps"),
        (lambda: ok.cosine(-1.0, 0.0, 5), ValueError, "start"),
        (lambda: ok.warmup(0, 1.0), ValueError, "steps"),
        (lambda: ok.chain(), TypeError, "function from step to number"),
    ],
)
def test_bad_values(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_kinds(unchecked):
    with pytest.raises(TypeError, match="strengths of piecewise must be a number"):
        ok.piecewise({0: "high"})
    with pytest.raises(TypeError, match=r"pairs \(schedule, steps\)"):
        ok.chain(1.0, 2.0)
