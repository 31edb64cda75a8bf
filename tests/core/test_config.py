"""Penalties, policies, schedules and predicates to plain data and back."""

import json

import pytest
from torch import nn

import orthokit as ok
from orthokit.spec import config_of, penalty_of, schedule_of, where_of

PENALTIES = [
    ok.SO(),
    ok.SO(squared=False, side="rows"),
    ok.SRIP(steps=5),
    ok.EADK(double=True, weight=0.5),
    ok.GOR(kind="inter", groups=2),
    ok.Disentangled(),
    ok.Disentangled(relax=ok.feasible(floor=10), form="budget", weights=(1.0, 2.0)),
    ok.Disentangled(relax=ok.ranks({"conv1": 4, "layer1.0.conv1": 8}, floor=2), ceiling=ok.welch()),
    ok.Disentangled(ceiling=0.5),
]
SCHEDULES = [
    ok.constant(0.1),
    ok.piecewise({0: 1e-2, 21: 1e-5}),
    ok.linear(1.0, 0.0, steps=3),
    ok.warmup(4, ok.cosine(0.1, 0.0, steps=9)),
    ok.chain((ok.linear(0.0, 1.0, steps=10), 10), (0.5, 5), ok.cosine(0.5, 0.0, steps=20)),
    ok.chain(0.5),
]


@pytest.mark.parametrize("penalty", [*PENALTIES, *(penalty() for penalty in ok.PENALTIES)], ids=repr)
def test_penalties_round_trip(penalty):
    config = json.loads(json.dumps(config_of(penalty)))  # what TOML and JSON keep
    assert penalty_of(config) == penalty


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_round_trip(schedule):
    assert schedule_of(json.loads(json.dumps(config_of(schedule)))) == schedule


def test_names_alone():
    assert penalty_of("Disentangled") == ok.Disentangled()
    assert penalty_of({"name": "disentangled", "relax": "feasible", "ceiling": "welch"}) == ok.Disentangled(
        relax=ok.feasible(), ceiling=ok.welch()
    )
    assert penalty_of({"name": "disentangled", "relax": {"name": "share", "q": 0.1}, "form": "welch"}).form == "welch"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sripp", "no penalty 'sripp'; did you mean 'srip'"),
        ("xyz", "no penalty 'xyz'; there are 'so', 'dso'"),
        ({"name": "srip", "step": 2}, "penalty srip has no option 'step'; did you mean 'steps'"),
        ({"name": "srip", "steps": 0}, "penalty srip: steps must be an integer, at least 1"),
        ({"name": "srip", "steps": "2"}, "penalty srip: steps must be an integer; got '2'"),
        ({"name": "disentangled", "relax": "shar"}, "no relax 'shar'; did you mean 'share'"),
        ({"name": "disentangled", "relax": {"name": "share"}}, "relax share: missing 1 required positional argument: 'q'"),
        ({"steps": 2}, "a name, or a table with a name"),
        (3, "a name, or a table with a name"),
    ],
)
def test_bad_penalties(config, message, unchecked):
    with pytest.raises(ValueError, match=message):
        penalty_of(config)


def test_bad_schedules(unchecked):
    with pytest.raises(ValueError, match="no schedule 'cosin'; did you mean 'cosine'"):
        schedule_of({"name": "cosin"})
    with pytest.raises(ValueError, match="schedule piecewise: piecewise needs the strength from step 0 on"):
        schedule_of({"name": "piecewise", "pieces": {"3": 1.0}})
    with pytest.raises(ValueError, match="steps of piecewise must be an integer; got 'x'"):
        schedule_of({"name": "piecewise", "pieces": {"x": 1.0}})


@pytest.mark.parametrize(
    "where", [ok.convs, ok.convs & ~ok.stem, ok.layers & (ok.pointwise | ok.matching("a.*", "b")) & ~ok.depthwise], ids=repr
)
def test_predicates_round_trip(where):
    again = where_of(repr(where))
    assert repr(again) == repr(where)
    modules = {"x": nn.Conv2d(3, 8, 3), "a.1": nn.Linear(2, 2), "b": nn.Conv2d(4, 4, 1, groups=4), "c": nn.Conv2d(8, 8, 1)}
    assert [again(*item) for item in modules.items()] == [where(*item) for item in modules.items()]


@pytest.mark.parametrize(
    "text", ["", "conv", "convs and stem", "matching()", "matching(stem)", "__import__('os')", "convs - stem", "1"]
)
def test_bad_predicates(text):
    with pytest.raises(ValueError, match="where must combine convs, linears, layers"):
        where_of(text)
