"""The Regularizer: what it sums, and that every way into training is the same training."""

import copy
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.penalties import srip

STRICT = ok.Disentangled()
RELAXED = ok.Disentangled(relax=ok.share(0.1), form="welch")


def model(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def batches(steps=6):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(5, (8,), generator=g)) for _ in range(steps)]


# What it sums


@pytest.mark.parametrize("penalty", [kind() for kind in ok.PENALTIES] + [RELAXED], ids=repr)
def test_value_is_the_sum_over_layers(penalty):
    m = model()
    ortho = ok.Regularizer(m, penalty, strength=0.3)
    alone = {}
    for name in ("0", "3", "5", "6"):
        kernel = ok.kernel_of(m[int(name)])
        groups = 1 if penalty.squared else kernel.groups**0.5
        alone[name] = penalty(kernel).sum().item() / groups
    assert ortho.per_layer() == pytest.approx(alone, rel=1e-5)
    assert list(ortho.per_layer()) == list(alone)
    assert ortho().item() == pytest.approx(0.3 * sum(alone.values()), rel=1e-5)


def test_grouping_keeps_the_pull():
    """Sum over groups of unsquared values pulls sqrt(groups) harder; the Regularizer takes that out."""

    def pull(groups):
        layer = nn.Conv2d(64, 64, 3, groups=groups).double()
        nn.init.normal_(layer.weight, std=ok.kernel_of(layer).n ** -0.5)
        ok.Regularizer(layer, ok.Disentangled(weights=(1, 0)), strength=1.0)().backward()
        return layer.weight.grad.norm().item()

    assert pull(64) == pytest.approx(pull(1), rel=0.2)


def test_scale_by_filters():
    m = model()
    plain = ok.Regularizer(m, STRICT, strength=1.0).per_layer()
    scaled = ok.Regularizer(m, STRICT, strength=1.0, scale=ok.sqrt_filters).per_layer()
    assert {name: scaled[name] / plain[name] for name in plain} == pytest.approx(
        {"0": 8**0.5, "3": 8**0.5, "5": 12**0.5, "6": 12**0.5}
    )
    with pytest.warns(UserWarning, match="scale= does nothing here"):
        squared = ok.Regularizer(m, ok.SO(), strength=1.0, scale=ok.sqrt_filters)
    assert squared.per_layer() == ok.Regularizer(m, ok.SO(), strength=1.0).per_layer()


def test_each_layer_of_a_stack_has_its_own_rank():
    m = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    given = {"0": 2, "1": 4, "2": 6}
    actual = ok.Regularizer(m, ok.Disentangled(relax=ok.ranks(given)), strength=1.0).per_layer()
    for name, r in given.items():
        alone = ok.disentangled_orthogonality(ok.kernel_of(m[int(name)]).matrix, r).item()
        assert actual[name] == pytest.approx(alone, rel=1e-5)


def test_any_callable_is_a_penalty():
    m = model()
    ortho = ok.Regularizer(m, lambda kernel: kernel.matrix.square().sum((-2, -1)), strength=2.0, where=ok.linears)
    assert ortho().item() == pytest.approx(2 * m[9].weight.square().sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"must return one value per leading dimension of the kernel, \(1, 1\); got \(\)"):
        ok.Regularizer(m, lambda kernel: kernel.matrix.sum(), strength=1.0, where=ok.linears)()


def test_float32_outside_autocast_whatever_the_model():
    m = model()
    for penalty in (ok.SO(), STRICT, lambda kernel: (kernel.matrix @ kernel.matrix.mT).square().sum((-2, -1))):
        ortho = ok.Regularizer(m, penalty, strength=1.0)
        plain = ortho()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ortho(), plain)
    low = ok.Regularizer(model().bfloat16(), STRICT, strength=1.0)
    low().backward()
    assert low().dtype == torch.float32
    assert low.layers[0].module.weight.grad.dtype == torch.bfloat16


def test_frozen_layers_are_left_out_until_they_thaw():
    m = model()
    m[0].requires_grad_(False)
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    assert list(ortho.per_layer()) == ["3", "5", "6"]
    assert list(ok.Regularizer(m, STRICT, strength=1.0, include_frozen=True).per_layer()) == ["0", "3", "5", "6"]
    m[0].requires_grad_(True)
    assert list(ortho.per_layer()) == ["0", "3", "5", "6"]
    m.requires_grad_(False)
    with pytest.raises(ValueError, match="all 4 selected layers are frozen"):
        ok.Regularizer(m, STRICT, strength=1.0)


def test_tied_weights_get_their_gradient_once():
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    m[1].weight = m[0].weight
    ok.Regularizer(m, ok.SO(), strength=1.0)().backward()
    alone = nn.Conv2d(4, 4, 1)
    alone.weight = nn.Parameter(m[0].weight.detach().clone())
    ok.Regularizer(alone, ok.SO(), strength=1.0)().backward()
    assert torch.allclose(m[0].weight.grad, alone.weight.grad)


def test_zero_strength_costs_nothing_and_adds_nothing():
    ortho = ok.Regularizer(model(), lambda kernel: pytest.fail("measured in vain"), strength=0.0)
    assert (torch.ones((), requires_grad=True) + ortho()).item() == 1
    assert ortho.add_grad_().item() == 0


# Schedules and state


def test_schedule_and_state():
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=ok.piecewise({0: 1.0, 2: 0.5}))
    first = ortho().item()
    ortho.step()
    ortho.step()
    assert ortho.strength == 0.5
    assert ortho().item() == pytest.approx(first / 2)
    again = ok.Regularizer(m, STRICT, strength=ok.piecewise({0: 1.0, 2: 0.5}))
    again.load_state_dict(ortho.state_dict())
    assert (again.steps, again.strength) == (2, 0.5)
    with pytest.raises(ValueError, match="not the state of a Regularizer"):
        again.load_state_dict({"epoch": 3})


def test_copies_and_pickles():
    ortho = ok.Regularizer(model(), RELAXED, strength=ok.linear(1.0, 0.0, 10))
    for other in (copy.deepcopy(ortho), pickle.loads(pickle.dumps(ortho))):
        assert torch.equal(other(), ortho())
        assert repr(other) == repr(ortho)


def test_nothing_is_stored_on_the_model():
    m = model()
    before = {name: set(vars(module)) for name, module in m.named_modules()}
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    ortho().backward()
    ortho.per_layer()
    assert before == {name: set(vars(module)) for name, module in m.named_modules()}


def test_param_groups():
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    decayed, kernels = ortho.param_groups(m, weight_decay=5e-4)
    assert (decayed["weight_decay"], kernels["weight_decay"]) == (5e-4, 0.0)
    assert {id(p) for p in kernels["params"]} == {id(m[i].weight) for i in (0, 3, 5, 6)}
    assert len(decayed["params"]) + len(kernels["params"]) == len(list(m.parameters()))
    assert len(ok.Regularizer(nn.Conv2d(3, 4, 1, bias=False), STRICT, strength=1.0).layers) == 1
    torch.optim.SGD(ortho.param_groups(m, weight_decay=5e-4), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the regularized kernels"):
        ortho.param_groups(nn.Linear(2, 2), weight_decay=0.1)


# Three ways into training


def train(make_optimizer, way, *, penalty=STRICT, precision=None, scaler=False, accumulate=1, m=None):
    m = m or model()
    ortho = ok.Regularizer(m, penalty, strength=ok.linear(0.1, 0.0, steps=10))
    optimizer = make_optimizer(m.parameters())
    scale = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaler)
    if way == "attach":
        ok.attach(ortho, optimizer)
    data = batches()
    for step in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for x, y in data[step : step + accumulate]:
            with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
                loss = F.cross_entropy(m(x.to(next(m.parameters()).dtype)), y) / accumulate
            if way == "loss":
                loss = loss + ortho() / accumulate
            scale.scale(loss).backward()
        if way == "add_grad_":
            scale.unscale_(optimizer)
            ortho.add_grad_()
        scale.step(optimizer)
        scale.update()
        ortho.step()
    return torch.cat([p.detach().flatten() for p in m.parameters()])


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["add_grad_", "attach"])
def test_every_way_gives_the_same_weights(way, optimizer, scaler):
    # In float64, as Adam turns the rounding errors of a gradient that is zero into steps.
    actual, through_loss, unpenalised = [
        train(OPTIMIZERS[optimizer], way, scaler=scaler, m=model().double()) for way in (way, "loss", "none")
    ]
    assert (actual - through_loss).abs().max().item() < 1e-8
    assert (unpenalised - through_loss).abs().max().item() > 1e-3


@pytest.mark.parametrize("way", ["add_grad_", "attach"])
@pytest.mark.parametrize(
    "options",
    [{"penalty": RELAXED}, {"penalty": ok.SRIP()}, {"accumulate": 3}, {"precision": torch.bfloat16}],
    ids=lambda o: next(iter(o)),
)
def test_the_same_with_other_options(way, options):
    make = OPTIMIZERS["SGD"]
    assert torch.allclose(train(make, way, **options), train(make, "loss", **options), atol=2e-6)


@pytest.mark.parametrize("way", ["add_grad_", "attach"])
def test_the_same_in_channels_last(way):
    results = [train(OPTIMIZERS["fused SGD"], w, m=model().to(memory_format=torch.channels_last)) for w in (way, "loss")]
    assert torch.allclose(*results, atol=2e-6)


def test_a_step_that_overflowed_is_skipped():
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    ok.attach(ok.Regularizer(m, STRICT, strength=0.1), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = m[0].weight.detach().clone()
    scaler.scale(m(batches()[0][0]).sum()).backward()
    m[0].weight.grad[0, 0, 0, 0] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(m[0].weight, before)


def test_attach_inside_a_closure():
    def run(attach):
        m = model(norm=False)
        ortho = ok.Regularizer(m, ok.SO(), strength=0.01)
        optimizer = torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
        if attach:
            ok.attach(ortho, optimizer)
        x, y = batches()[0]

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            if not attach:
                loss = loss + ortho()
            loss.backward()
            return loss

        return float(optimizer.step(closure).detach()), m[0].weight.detach()

    (loss, weight), (loss_wanted, weight_wanted) = run(True), run(False)
    assert loss == pytest.approx(loss_wanted, rel=1e-5)
    assert torch.allclose(weight, weight_wanted, atol=1e-4)


def test_detach_and_wrong_optimizer():
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=0.1)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    handle = ok.attach(ortho, optimizer)
    handle.remove()
    before = m[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(m[0].weight, before)
    with pytest.raises(ValueError, match="does not train 3 of 4 regularized layers: 3, 5, 6"):
        ok.attach(ortho, torch.optim.SGD(m[0].parameters(), lr=0.1))


def test_gradients_do_not_pile_up_in_the_graph():
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    with torch.no_grad():
        ortho.add_grad_(scale=2.0)
    twice = m[0].weight.grad.clone()
    m.zero_grad()
    ortho().backward()
    assert torch.allclose(twice, 2 * m[0].weight.grad)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_of_any_shape_scales(shape):
    m, expected = model(), model()
    expected.load_state_dict(m.state_dict())
    for net, scale in ((m, torch.full(shape, 2.0)), (expected, 2.0)):
        ortho = ok.Regularizer(net, STRICT, strength=1.0)
        assert ortho.add_grad_(scale).shape == ()
    for parameter, other in zip(m.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is None if other.grad is None else torch.allclose(parameter.grad, other.grad)


@pytest.mark.parametrize("penalty", [STRICT, ok.SO(), ok.Coherence(), ok.SRIP()], ids=repr)
@pytest.mark.parametrize("bag", [False, True])
def test_a_sparse_gradient_becomes_that_of_the_loss(penalty, bag):
    """SRIP goes through autograd, the others have their gradient in closed form."""
    grads = []
    for way in ("loss", "add_grad_"):
        torch.manual_seed(0)
        m = nn.EmbeddingBag(9, 4, sparse=True, mode="sum") if bag else nn.Embedding(9, 4, sparse=True)
        ortho = ok.Regularizer(m, penalty, strength=0.1, where=ok.embeddings)
        loss = m(torch.tensor([[1, 3, 3]])).square().sum()
        (loss + ortho() if way == "loss" else loss).backward()
        if way == "add_grad_":
            assert m.weight.grad.is_sparse
            ortho.add_grad_()
        grads.append(m.weight.grad.to_dense())
    assert torch.allclose(*grads, atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -0.1}, ValueError, r"strength at step 0 must be|strength must be a finite number"),
        ({"strength": float("nan")}, ValueError, "strength"),
        ({"strength": lambda step: -1.0}, ValueError, "strength at step 0"),
        ({"strength": "0.1"}, TypeError, "a number or a function"),
        ({"strength": None}, TypeError, "a number or a function"),
        ({"penalty": ok.SO}, TypeError, r"an instance such as orthokit.SO\(\); got SO"),
        ({"penalty": "so"}, TypeError, "an instance such as"),
        ({"model": "resnet"}, TypeError, r"must be a torch.nn.Module; got str"),
        ({"model": {"w": 1}}, TypeError, r"must be a torch.nn.Module; got dict"),
        ({"model": nn.ReLU()}, ValueError, "convs selects no layer of ReLU"),
        ({"penalty": ok.Disentangled(relax=ok.ranks({"x": 1}))}, ValueError, "no entry for layer '0'; it has 'x'"),
        ({"penalty": ok.Disentangled(relax=ok.ranks(dict.fromkeys("0356", 9)))}, ValueError, r"r of layer '0' \(8 filters"),
        ({"penalty": ok.Disentangled(relax=lambda o, n, name: 2.5)}, TypeError, "must be an integer"),
    ],
)
def test_bad_arguments(unchecked, options, error, message):
    arguments = {"model": model(), "penalty": STRICT, "strength": 0.1, **options}
    with pytest.raises(error, match=message):
        ok.Regularizer(arguments.pop("model"), arguments.pop("penalty"), **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", [kind() for kind in ok.PENALTIES] + [RELAXED], ids=repr)
def test_broken_weights_are_named(penalty, bad):
    m = model()
    with torch.no_grad():
        m[5].weight[3, 2] = bad
    with pytest.raises(FloatingPointError, match=r"layer 5: .* is not finite"):
        ok.Regularizer(m, penalty, strength=0.1)()


def test_pairs_on_tall_layers_warns_once():
    two_tall = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 32, 1))
    with pytest.warns(UserWarning, match="copies of each other") as caught:
        ok.Regularizer(two_tall, ok.Disentangled(relax=ok.feasible()), strength=0.1)()
    assert len(caught) == 1
    ok.Regularizer(two_tall, ok.Disentangled(relax=ok.feasible()), strength=0.1)()


def test_the_warning_points_at_the_callers_line():
    code = (
        "import orthokit as ok, torch\n"
        "layer = torch.nn.Conv2d(4, 16, 1)\n"
        "ok.Regularizer(layer, ok.Disentangled(relax=ok.feasible()), strength=0.1)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.startswith("<string>:3: UserWarning: form='pairs' lets filters")


@pytest.mark.parametrize(
    "penalty", [ok.Disentangled(), RELAXED, ok.Disentangled(relax=ok.feasible(), ceiling=ok.welch())], ids=repr
)
def test_no_other_form_warns(penalty, recwarn):
    ok.Regularizer(nn.Conv2d(4, 16, 1), penalty, strength=0.1)()
    assert not recwarn


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 2.0}, TypeError, "scale must be a function"),
        ({"scale": lambda kernel: -1.0}, ValueError, "scale of layer '0'"),
        ({"strength": 10**400}, (ValueError, OverflowError), r"strength|int too large"),
        ({"penalty": ok.Disentangled(relax=lambda o, n, name: o + 1)}, ValueError, "r of layer '0'"),
    ],
)
def test_more_bad_arguments(unchecked, options, error, message):
    arguments = {"model": model(), "penalty": STRICT, "strength": 0.1, **options}
    with pytest.raises(error, match=message):
        ok.Regularizer(arguments.pop("model"), arguments.pop("penalty"), **arguments)


def test_bad_penalties_of_ones_own(unchecked):
    m = model()
    with pytest.raises(ValueError, match="must return one value per leading dimension"):
        ok.Regularizer(m, lambda kernel: 1.0, strength=1.0)()
    with pytest.raises(FloatingPointError, match=r"layer 0: .* is not finite"):
        ok.Regularizer(m, lambda kernel: kernel.matrix.sum((-2, -1)) * float("nan"), strength=1.0)()
    with pytest.raises(TypeError, match="measured by the classes"):
        ok.Regularizer(m, ok.soft_orthogonality, strength=1.0)()


def test_numbers_of_other_kinds(unchecked):
    m = model()
    expected = ok.Regularizer(m, STRICT, strength=0.5)().item()
    for strength in (np.float32(0.5), Fraction(1, 2), lambda step: Fraction(1, 2)):
        assert ok.Regularizer(m, STRICT, strength=strength)().item() == pytest.approx(expected)


def test_layers_the_optimizer_does_not_train_gather_no_gradient():
    m = model()
    m[0].requires_grad_(False)
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    ok.attach(ortho, optimizer)
    m[0].requires_grad_(True)
    optimizer.step()
    assert m[0].weight.grad is None
    assert m[3].weight.grad is not None


def test_attach_with_arguments_swapped(unchecked):
    m = model()
    with pytest.raises(TypeError, match=r"attach takes a Regularizer and a torch\.optim\.Optimizer; got SGD, Regularizer"):
        ok.attach(torch.optim.SGD(m.parameters()), ok.Regularizer(m, STRICT, strength=1.0))


def test_inference_mode():
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=1.0)
    with torch.inference_mode():
        assert ortho().item() > 0
        assert ortho.per_layer()
        with pytest.raises(RuntimeError, match="inference_mode"):
            ortho.add_grad_()
    with torch.no_grad():
        assert ortho().item() > 0


@pytest.mark.parametrize("state", [None, {1: 2}, {"steps": "x"}, {"steps": -5}])
def test_bad_states(unchecked, state):
    with pytest.raises((ValueError, TypeError), match="steps"):
        ok.Regularizer(model(), STRICT, strength=1.0).load_state_dict(state)


def test_a_default_device_and_dtype_of_ones_own():
    expected = ok.Regularizer(model(), ok.SRIP(), strength=1.0)().item()
    srip._start.cache_clear()
    with torch.device("meta"):
        ok.spectral_restricted_isometry(torch.eye(5, device="cpu"))
    assert ok.Regularizer(model(), ok.SRIP(), strength=1.0)().item() == expected
    m = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)).double()
    for form in ("pairs", "welch", "budget"):
        both = ok.Regularizer(m, ok.Disentangled(relax=ok.ranks({"0": 2, "1": 3}), form=form), strength=1.0).per_layer()
        for place, r in enumerate((2, 3)):
            alone = ok.disentangled_orthogonality(ok.kernel_of(m[place]).matrix, r, form=form).item()
            assert both[str(place)] == pytest.approx(alone, rel=1e-12)
