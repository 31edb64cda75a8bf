"""What makes a penalty cheap must not change it: stacks, closed gradients, skipped calls, shares, compilation, low precision."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import compiled as here
import orthokit as ok
from cases import CASES
from orthokit import engine, regularizer, stacks
from orthokit.integrations.optimizer import add_in_step

PENALTIES = [case.penalty for case in CASES]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore:form='pairs'")


def model():
    """The one that is compiled, with a weight that is computed."""
    m = here.model()
    nn.utils.parametrizations.weight_norm(m[6])
    return m


def gradients(m):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in m.named_parameters()}


def penalised(m, way, penalty, **options):
    m.zero_grad()
    ortho = ok.Regularizer(m, penalty, strength=0.3, **options)
    value = ortho() if way == "loss" else ortho.add_grad_()
    if way == "loss":
        value.backward()
    return value.detach(), gradients(m)


# Closed gradients


@every_penalty
def test_both_ways_give_what_each_layer_alone_gives(penalty):
    m = model()
    layers = [layer for layer in m.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    m.zero_grad()
    alone = 0.3 * sum(
        penalty(ok.kernel_of(layer)).sum() / (1 if getattr(penalty, "squared", True) else layer.groups**0.5) for layer in layers
    )
    alone.backward()
    expected = gradients(m)
    assert max(g.norm() for g in expected.values()) > 1e-3
    for way in ("loss", "add_grad_"):
        value, actual = penalised(m, way, penalty)
        assert torch.allclose(value, alone, rtol=1e-5)
        for name, gradient in actual.items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), (way, name)


@pytest.mark.parametrize("size", [1, 2500, 2**40])
def test_the_size_of_stacks_changes_nothing(size, monkeypatch):
    expected = penalised(model(), "add_grad_", ok.Disentangled())
    monkeypatch.setattr(stacks, "STACKED", size)
    value, actual = penalised(model(), "add_grad_", ok.Disentangled())
    assert torch.allclose(value, expected[0])
    assert all(torch.allclose(actual[name], gradient, atol=1e-6) for name, gradient in expected[1].items())


@every_penalty
def test_second_derivatives(penalty):
    """Of penalties that know their gradient, as of any: through a function of the gradient."""
    for layer in (nn.Conv2d(2, 4, 3), nn.Conv2d(2, 7, 1)):
        kernel = ok.kernel_of(layer.double())
        weight = kernel.weight.detach().requires_grad_()

        def slope(w, kernel=kernel):
            (gradient,) = torch.autograd.grad(penalty(ok.Kernel(w, kernel.stride)).sum(), w, create_graph=True)
            return gradient

        assert torch.autograd.gradcheck(slope, (weight,), fast_mode=True, atol=1e-5, rtol=1e-3)


def test_second_derivatives_beside_frozen_layers():
    m = model()
    m[1].weight.requires_grad_(False)
    trained = [p for p in m.parameters() if p.requires_grad]
    ortho = ok.Regularizer(m, ok.SO(), strength=1.0, include_frozen=True)
    slopes = torch.autograd.grad(ortho(), trained, create_graph=True, allow_unused=True)
    curvatures = torch.autograd.grad(sum(s.square().sum() for s in slopes if s is not None), trained, allow_unused=True)
    assert max(c.norm() for c in curvatures if c is not None) > 0.1
    ortho().backward()
    assert m[1].weight.grad is None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_layer_that_changes_its_kind_is_read_anew():
    m = model()
    ortho = ok.Regularizer(m, ok.SO(), strength=1.0)
    before = ortho.per_layer()
    nn.utils.parametrize.register_parametrization(m[1], "weight", Doubled())
    after = ortho.per_layer()
    assert after["1"] == pytest.approx(ok.SO()(ok.kernel_of(2 * m[1].parametrizations.weight.original.detach())).item())
    assert abs(after["1"] - before["1"]) > 0.1
    assert all(after[name] == pytest.approx(value, rel=1e-5) for name, value in before.items() if name != "1")


# Without autograd


def wide():
    """Layers large enough to be read where they are, in ``channels_last`` or not, and small ones."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(32, 64, 3),
        nn.Conv2d(64, 48, 3, groups=2),
        nn.Conv2d(48, 64, 3),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 320, 1),
        nn.Conv2d(8, 320, 3),
        nn.Conv2d(320, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3),
    )


@pytest.mark.parametrize("large", [1, 2**14, 2**30])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("penalty", [ok.SO(side="smaller"), ok.Disentangled(), ok.Disentangled(relax=ok.share(0.1))], ids=repr)
def test_closed_gradients_are_those_of_autograd(penalty, layout, large, monkeypatch):
    monkeypatch.setattr(engine, "large", lambda device: large)
    monkeypatch.setattr(engine, "GRAMS", 2**16)
    m = wide().to(memory_format=layout)
    squared = getattr(penalty, "squared", True)
    alone = 0.3 * sum(penalty(ok.kernel_of(layer)).sum() / (1 if squared else layer.groups**0.5) for layer in m)
    alone.backward()
    expected = gradients(m)
    for way in ("loss", "add_grad_"):
        value, actual = penalised(m, way, penalty)
        assert torch.allclose(value, alone, rtol=1e-5)
        for name, gradient in actual.items():
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), (way, name)
    for layer in m:
        assert layer.weight.grad.stride() == layer.weight.stride()
    ok.Regularizer(m, penalty, strength=0.3).add_grad_(2.0, only=[m[0].weight, m[8].weight])
    for name, gradient in gradients(m).items():
        times = 3 if name in ("0.weight", "8.weight") else 1
        assert torch.allclose(gradient, times * expected[name], rtol=1e-4, atol=1e-6), name


def test_autograd_is_left_out(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("autograd")

    m = wide()
    ortho = ok.Regularizer(m, ok.Disentangled(relax=ok.share(0.1), ceiling=0.9), strength=0.3)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    ortho.add_grad_()
    ortho().backward()
    with pytest.raises(AssertionError, match="autograd"):
        ok.Regularizer(m, ok.ConvOrth(), strength=0.3).add_grad_()


def test_second_derivatives_of_a_regularizer():
    m = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 7, 1)).double()
    ortho = ok.Regularizer(m, ok.Disentangled(), strength=0.3)
    weights = [layer.weight for layer in m]
    direction = [torch.randn_like(weight) for weight in weights]

    def slope():
        actual = torch.autograd.grad(ortho(), weights, create_graph=True)
        return sum((g * d).sum() for g, d in zip(actual, direction, strict=True))

    curvature = torch.autograd.grad(slope(), weights)
    for weight, second in zip(weights, curvature, strict=True):
        step = torch.randn_like(weight)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(step, alpha=sign * 1e-6)
            values.append(slope().item())
            with torch.no_grad():
                weight.sub_(step, alpha=sign * 1e-6)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((second * step).sum().item(), rel=1e-4, abs=1e-7)


class Halved(ok.SO):
    """Inherits a rule that is not its own."""

    def __call__(self, kernel):
        return super().__call__(kernel) / 2


def test_an_overridden_call_has_no_inherited_rule():
    m = wide()
    for way in ("loss", "add_grad_"):
        (value, actual), (whole, twice) = penalised(m, way, Halved()), penalised(m, way, ok.SO())
        assert torch.allclose(2 * value, whole)
        assert all(torch.allclose(2 * actual[name], gradient, atol=1e-6) for name, gradient in twice.items())


@pytest.mark.parametrize("way", ["loss", "add_grad_"])
def test_broken_layers_are_named_and_no_gradient_of_theirs_added(way):
    m = wide()
    for layer, value in ((m[2], math.nan), (m[7], math.inf)):
        layer.weight.data[0, 0, 0, 0] = value
        ortho = ok.Regularizer(m, ok.Disentangled(), strength=0.3)
        with pytest.raises(FloatingPointError, match=f"layer {list(m).index(layer)}: "):
            ortho() if way == "loss" else ortho.add_grad_()
        assert layer.weight.grad is None
        layer.weight.data[0, 0, 0, 0] = 0.1


# Skipped calls


@pytest.mark.parametrize("way", ["loss", "add_grad_"])
@pytest.mark.parametrize("penalty", [ok.SO(), ok.Disentangled()], ids=["squared", "unsquared"])
def test_every_third_call(way, penalty):
    m = model()
    once_value, once = penalised(m, way, penalty)
    ortho = ok.Regularizer(m, penalty, strength=0.3, every=3)
    for call in range(7):
        m.zero_grad()
        with torch.no_grad():
            assert torch.allclose(ortho(), once_value)  # only looking counts for nothing, and shows what is there
        value = ortho() if way == "loss" else ortho.add_grad_()
        if way == "loss" and value.requires_grad:
            value.backward()
        due = 3 * (call % 3 == 0)
        assert torch.allclose(value, due * once_value)
        assert all(torch.allclose(g, due * once[name], atol=1e-6) for name, g in gradients(m).items())
    again = ok.Regularizer(m, penalty, strength=0.3, every=3)
    again.load_state_dict(ortho.state_dict())
    assert [again.add_grad_().item() > 0 for _ in range(3)] == [False, False, True]


def test_every_counts_the_steps_of_each_optimizer():
    m = model()
    ortho = ok.Regularizer(m, ok.SO(), strength=1e-3, every=2)
    halves = [list(m[:4].parameters()), list(m[4:].parameters())]
    optimizers = [torch.optim.SGD(half, lr=1.0) for half in halves]
    handles = [add_in_step(ortho, optimizer) for optimizer in optimizers]
    moved = []
    for _ in range(4):
        for half, optimizer in zip(halves, optimizers, strict=True):
            m.zero_grad()
            before = half[0].detach().clone()
            optimizer.step()
            moved.append(not torch.equal(before, half[0]))
    assert moved == [True, True, False, False] * 2
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_count(every):
    with pytest.raises((TypeError, ValueError), match="every"):
        ok.Regularizer(model(), ok.SO(), strength=1.0, every=every)


# Shares (on several ranks: test_distributed.py)


def test_one_process_has_the_whole_share():
    m = model()
    assert torch.equal(ok.Regularizer(m, ok.SO(), strength=1.0, shard=True)(), ok.Regularizer(m, ok.SO(), strength=1.0)())


def test_a_share_of_gradients_is_refused():
    with pytest.raises(RuntimeError, match="add the value of a call to the loss"):
        ok.Regularizer(model(), ok.SO(), strength=1.0, shard=True).add_grad_()


@pytest.mark.parametrize("ranks", [2, 3, 20])
def test_shares_are_balanced(ranks, monkeypatch):
    ortho = ok.Regularizer(model(), ok.SO(), strength=1.0, shard=True)
    monkeypatch.setattr(regularizer.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(regularizer.dist, "get_world_size", lambda: ranks)
    values, loads, places = [], [], []
    for rank in range(ranks):
        monkeypatch.setattr(regularizer.dist, "get_rank", lambda rank=rank: rank)
        share = ortho._share()
        places += share
        loads.append(sum(ortho._engine.costs[place] for place in share))
        values.append(ortho().item())
    assert sorted(places) == list(range(len(ortho.layers)))
    assert max(loads) - min(loads) <= max(ortho._engine.costs)
    assert sum(values) / ranks == pytest.approx(sum(ortho.per_layer().values()), rel=1e-5)


# Compiled


def test_compiled_whole_and_once():
    """In another process: the shape checks that these tests run under are no code for a compiler."""
    run = subprocess.run([sys.executable, here.__file__], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


# Low precision


def near(dtype):
    """An almost orthonormal layer: the residual is 1e-3 in float32, what rounding makes it in lower precision."""
    layer = nn.Conv2d(16, 24, 3)
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        layer.weight += 1e-3 / 24 * torch.randn_like(layer.weight)
    return layer.to(dtype)


@every_penalty
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "autocast"])
def test_the_gradient_near_orthogonality(penalty, kind):
    torch.manual_seed(3)
    layer = near(torch.float32 if kind == "autocast" else getattr(torch, kind))
    kernel = ok.kernel_of(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        ok.Regularizer(layer, penalty, strength=1.0)().backward()
    exact = kernel.weight.detach().double().requires_grad_()
    penalty(ok.Kernel(exact, kernel.stride)).sum().backward()
    actual, expected = layer.weight.grad.double().flatten(), exact.grad.flatten()
    assert expected.norm() > 0
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.9999
    assert math.isclose(actual.norm(), expected.norm(), rel_tol=1e-2)
