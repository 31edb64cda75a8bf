"""Every option of every penalty, policy and schedule refuses what its annotation does not allow."""

import inspect
import math
from typing import get_args

import pytest
import torch
from torch import nn

import orthokit as ok
from orthokit.lab.recipes.compose import parse_setting
from orthokit.spec import POLICIES, SCHEDULES, penalty_of, schedule_of

REQUIRED = {
    "fraction": {"rho": 0.5},
    "share": {"q": 0.1},
    "ranks": {"by_name": {"a": 2}},
    "constant": {"strength": 0.1},
    "piecewise": {"pieces": {0: 0.1}},
    "linear": {"start": 1.0, "end": 0.0, "steps": 3},
    "cosine": {"start": 1.0, "end": 0.0, "steps": 3},
    "warmup": {"steps": 3, "schedule": 0.1},
}
NEVER = [
    "x",
    "False",
    "0.1",
    [],
    {"a": "b"},
    object(),
    b"1",
    1j,
    math.nan,
    -1,
    -1.5,
    (1, 2, 3),
    ("a", "b"),
    torch.ones(2),
    nn.Linear,
]
"""No option takes any of these."""
CALLED = {"by_name": "ranks|rank of", "pieces": "piecewise", "schedule": "strength", "weights": "weights"}
"""What errors call an option, where not by its name."""


def options():
    for kind in (*ok.PENALTIES, *POLICIES, *SCHEDULES):
        if kind is not ok.chain:
            for name, option in inspect.signature(kind).parameters.items():
                yield pytest.param(kind, name, option.annotation, id=f"{kind.__name__}-{name}")


def wrong(annotation):
    yield from NEVER
    kinds = get_args(annotation) or (annotation,)
    if bool in kinds:
        yield from (0, 1, 1.0, None)
    else:
        yield from (True, False)
    if type(None) not in kinds:
        yield None
    if int in kinds and float not in kinds:
        yield from (2.5, 2.0)


@pytest.mark.parametrize(("kind", "name", "annotation"), [*options()])
def test_values_of_the_wrong_kind_are_refused(unchecked, kind, name, annotation):
    given = REQUIRED.get(kind.__name__, {})
    kind(**given)
    for value in wrong(annotation):
        with pytest.raises((TypeError, ValueError), match=CALLED.get(name, name)):
            pytest.fail(f"{kind(**{**given, name: value})!r} was made")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ok.chain(),
        lambda: ok.chain(True),
        lambda: ok.chain("0.1"),
        lambda: ok.chain((0.5, 2.5), 0.1),
        lambda: ok.chain((0.5, True), 0.1),
        lambda: ok.chain(("x", 5), 0.1),
        lambda: ok.chain((0.5, 5), ok.linear),
        lambda: ok.piecewise({0: True}),
        lambda: ok.piecewise({0: 0.1, 1.5: 0.1}),
        lambda: ok.piecewise({0: 0.1, True: 0.1}),
        lambda: ok.piecewise({0: 1e308}),
        lambda: ok.constant(1e308),
        lambda: ok.constant(10**400),
        lambda: ok.warmup(3, ok.linear),
        lambda: ok.ranks({1: 2}),
        lambda: ok.ranks({"a": 2.0}),
        lambda: ok.Disentangled(weights=(True, 1.0)),
        lambda: ok.Disentangled(weights=(1.0, [1.0])),
        lambda: ok.Disentangled(weights="ab"),
    ],
)
def test_values_inside_of_others_are_looked_at(unchecked, make):
    with pytest.raises((TypeError, ValueError)):
        pytest.fail(f"{make()!r} was made")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: ok.soft_orthogonality(k, squared="no"), "squared must be True or False; got 'no'"),
        (lambda k: ok.spectral_restricted_isometry(k, squared=1), "squared must be True or False; got 1"),
        (lambda k: ok.convolution_orthogonality(k, squared="False"), "squared must be True or False; got 'False'"),
        (lambda k: ok.angular_dispersion(k, double="no"), "double must be True or False; got 'no'"),
        (lambda k: ok.disentangled_orthogonality(k, squared=None), "squared must be True or False; got None"),
        (lambda k: ok.disentangled_orthogonality(k, weights="ab"), "weights must be two numbers"),
        (lambda k: ok.disentangled_orthogonality(k, weights=(1.0,)), "weights must be two numbers"),
        (lambda k: ok.disentangled_orthogonality(k, weights=("1", 1.0)), "weights must be a number; got '1'"),
    ],
)
def test_functions_too(unchecked, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.eye(3))


def test_recipes_too(unchecked):
    for value in ("False", "no", 0):
        with pytest.raises(ValueError, match=f"penalty so: squared must be True or False; got {value!r}"):
            penalty_of({"name": "so", "squared": value})
    with pytest.raises(ValueError, match="schedule warmup: a strength is a number"):
        schedule_of({"name": "warmup", "steps": 3, "schedule": [0.1]})
    for text in ("False", "false", " False"):
        assert parse_setting(f"regularizer.penalty.squared={text}") == {"regularizer": {"penalty": {"squared": False}}}
    assert parse_setting("regularizer.penalty.squared=no") == {"regularizer": {"penalty": {"squared": "no"}}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": True}, "strength"),
        ({"strength": 1e308}, r"strength must be a finite number in \[0, 1e\+30\]"),
        ({"strength": lambda step: True}, "strength at step 0 must be a number"),
        ({"strength": lambda step: 1e308}, "strength at step 0 must be a finite number"),
        ({"strength": ok.linear}, "a strength is a number or a function"),
        ({"include_frozen": "no"}, "include_frozen must be True or False"),
        ({"shard": 1}, "shard must be True or False"),
    ],
)
def test_regularizers_too(unchecked, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ok.Regularizer(nn.Conv2d(2, 3, 3), ok.SO(), **{"strength": 0.1, **options})


@pytest.mark.parametrize("scale", [math.nan, math.inf, True, "2", None, torch.ones(2)])
@pytest.mark.parametrize("penalty", [ok.SO(), ok.ConvOrth()], ids=repr)
def test_factors_of_gradients(unchecked, penalty, scale):
    for layer in (nn.Conv2d(3, 4, 3), nn.Conv2d(64, 64, 3)):
        ortho = ok.Regularizer(layer, penalty, strength=0.1)
        with pytest.raises((TypeError, ValueError), match="scale"):
            ortho.add_grad_(scale)
        assert layer.weight.grad is None


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"step": 1},
        {"steps": True},
        {"steps": -1},
        {"steps": "3"},
        {"steps": 2.5},
        {"steps": 10**400},
        {"steps": 1, "calls": "abc"},
        {"steps": 1, "calls": [1]},
        {"steps": 1, "calls": {"a": -1}},
        {"steps": 1, "calls": {"a": "1"}},
        {"steps": 1, "calls": {3: 1}},
    ],
    ids=repr,
)
def test_malformed_states(unchecked, state):
    ortho = ok.Regularizer(nn.Conv2d(2, 3, 3), ok.SO(), strength=0.1, every=2)
    ortho.step()
    with pytest.raises((TypeError, ValueError), match=r"not the state of a Regularizer|steps must be|calls of"):
        ortho.load_state_dict(state)
    assert ortho.state_dict() == {"steps": 1, "calls": {}}


SCALES = {
    "length": lambda kernel: float(kernel.weight.norm()),
    "shape": lambda kernel: kernel.weight.shape[0] + 2.0 * kernel.weight.ndim,
    "filters": ok.sqrt_filters,
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "penalty", [ok.SO(squared=False), ok.Disentangled(), ok.Disentangled(relax=ok.share(0.2)), ok.SRIP()], ids=repr
)
@pytest.mark.parametrize("kind", ["plain", "computed", "half"])
def test_a_scale_gets_the_layers_own_kernel(penalty, groups, scale, kind):
    """By rule, by autograd on plain weights, and on computed ones."""
    torch.manual_seed(0)
    m = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=groups) for _ in range(3)), nn.Conv2d(8, 8, 1, groups=groups))
    m[1].weight.data.mul_(5)
    if kind == "half":
        m.bfloat16()
    if kind == "computed":
        for layer in m:
            nn.utils.parametrizations.weight_norm(layer)
    alone = ok.Regularizer(m, penalty, strength=1.0).per_layer()
    with torch.no_grad():
        by_hand = {name: scale(ok.kernel_of(layer)) * alone[name] for name, layer in m.named_children()}
    ortho = ok.Regularizer(m, penalty, strength=0.5, scale=scale)
    assert ortho.per_layer() == pytest.approx(by_hand, rel=1e-5)
    assert ortho().item() == pytest.approx(0.5 * sum(by_hand.values()), rel=1e-5)
    assert ortho.add_grad_().item() == pytest.approx(0.5 * sum(by_hand.values()), rel=1e-5)
    added = [parameter.grad for parameter in m.parameters() if parameter.grad is not None]
    m.zero_grad()
    ortho().backward()
    expected = [parameter.grad for parameter in m.parameters() if parameter.grad is not None]
    for actual, other in zip(added, expected, strict=True):
        assert torch.allclose(actual, other, rtol=2e-2 if kind == "half" else 1e-4, atol=1e-5)
