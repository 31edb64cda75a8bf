"""Filters shorter than 0.1: their direction counts in proportion to their length, and no penalty throws them away."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.gram import SHORT

PENALTIES = [
    ok.Disentangled(),
    ok.Disentangled(squared=True),
    ok.Disentangled(weights=(0.0, 1.0)),
    ok.Disentangled(relax=ok.share(0.1)),
    ok.Disentangled(relax=ok.share(0.3), form="welch"),
    ok.Disentangled(relax=ok.feasible(), form="budget"),
    ok.Disentangled(ceiling=0.2),
    ok.EADK(),
    ok.EADK(double=True),
    ok.EADC(),
    ok.Coherence(),
]
ids = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)


def filters(o, n, lengths, dtype=torch.float64):
    k = F.normalize(torch.randn(o, n, generator=torch.Generator().manual_seed(3), dtype=dtype), dim=-1)
    return k * torch.as_tensor(lengths, dtype=dtype)[:, None]


def spread(o):
    """Lengths from 1e-5 to 2, the bound itself among them."""
    return torch.cat([torch.logspace(-5, math.log10(2), o - 1, dtype=torch.float64), torch.tensor([SHORT], dtype=torch.float64)])


def weighted_norm(k):
    """``||d|| + ||c||`` with the weights of METHOD 3 fixed by ``detach``: what autograd makes of the definition itself."""
    length = k.norm(dim=-1)
    u = (length.detach() / SHORT).clamp(max=1)[:, None] * k / length[:, None]
    c = (u @ u.mT)[tuple(torch.tril_indices(len(k), len(k), -1))]
    return (length.square() - 1).norm() + c.norm()


@pytest.mark.parametrize(("o", "n"), [(6, 9), (9, 4), (300, 20)])  # the last by way of the columns' Gram matrix
def test_values_and_gradients_are_those_of_the_definition(o, n):
    k = filters(o, n, spread(o)).requires_grad_()
    value, expected = ok.disentangled_orthogonality(k), weighted_norm(k)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    actual, reference = (torch.autograd.grad(v, k)[0] for v in (value, expected))
    assert torch.allclose(actual, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["pairs", "welch", "budget"])
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-8, 1e-3, 0.05, 0.1, 1.0])
def test_the_pull_on_a_direction_is_bounded_and_perpendicular(form, length):
    k = filters(12, 8, [length] * 6 + [1.0] * 6).requires_grad_()
    (pull,) = torch.autograd.grad(ok.disentangled_orthogonality(k, 6, form=form, weights=(0.0, 1.0)), k)
    assert (pull.norm(dim=-1) <= (1 + 1e-9) / max(SHORT, length)).all()
    along = (pull * F.normalize(k.detach(), dim=-1)).sum(-1).abs()
    assert along.max() < 1e-9
    if length == 0:
        assert pull[:6].abs().max() == 0


def test_nothing_changes_for_filters_that_are_long_enough():
    k = filters(8, 12, [SHORT * (1 + 1e-12)] * 4 + [0.5, 1.0, 2.0, 20.0])
    c = (F.normalize(k, dim=-1) @ F.normalize(k, dim=-1).mT).tril(-1)
    expected = (k.square().sum(-1) - 1).norm() + c.norm()
    assert ok.disentangled_orthogonality(k).item() == pytest.approx(expected.item(), rel=1e-14)


def test_continuous_at_the_bound():
    for penalty in PENALTIES:
        below, above = (penalty(ok.Kernel(filters(6, 9, [SHORT * s] + [1.0] * 5)[None])).item() for s in (1 - 1e-9, 1 + 1e-9))
        assert below == pytest.approx(above, rel=1e-6)


@pytest.mark.filterwarnings("ignore:form='pairs'")
@ids
def test_every_way_to_the_gradient_agrees(penalty):
    """By autograd, in closed form, in a batch of layers, under low precision."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 1))
    for layer in model:
        layer.weight.data.copy_(filters(8, layer.weight[0].numel(), spread(8)).reshape(layer.weight.shape))
    ortho = ok.Regularizer(model, penalty, strength=0.1)
    value = ortho()
    expected = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, create_graph=False)
    model.zero_grad()
    assert ortho.add_grad_().item() == pytest.approx(value.item(), rel=1e-6)
    apart = [
        torch.autograd.grad(0.1 * penalty(ok.kernel_of(layer)).sum(), layer.weight)[0] if "relax" not in repr(penalty) else None
        for layer in model
    ]
    for layer, gradient, alone in zip(model, expected[::2], apart, strict=True):
        assert torch.allclose(layer.weight.grad, gradient, rtol=1e-4, atol=1e-6)
        assert gradient.isfinite().all()
        if alone is not None:
            assert torch.allclose(alone, gradient, rtol=1e-4, atol=1e-6)
    low = ok.kernel_of(copy.deepcopy(model[2]).bfloat16())
    assert torch.isfinite(penalty(low)).all()


@pytest.mark.parametrize(("o", "n"), [(6, 9), (9, 4), (300, 20)])
def test_the_second_derivative_holds_the_weights_fixed_too(o, n):
    k, direction = filters(o, n, spread(o)).requires_grad_(), filters(o, n, [1.0] * o)
    curvature = []
    for value in (ok.disentangled_orthogonality(k), weighted_norm(k)):
        (gradient,) = torch.autograd.grad(value, k, create_graph=True)
        curvature.append(torch.autograd.grad((gradient * direction).sum(), k)[0])
    assert torch.allclose(*curvature, rtol=1e-6, atol=1e-6 * curvature[1].abs().max().item())


class Control(nn.Module):
    """A frozen path beside a trained one that enters by a convolution of zeros, as ControlNet's."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        self.hint = nn.Conv2d(3, 8, 3, padding=1)
        self.zero = nn.Conv2d(8, 8, 1)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        return (self.frozen(x) + self.zero(self.hint(x).relu())).relu().mean((-2, -1))


class LowRank(nn.Module):
    """A frozen layer with a low-rank update whose second factor starts at zero, as LoRA's."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(48, 32).requires_grad_(False)
        self.a, self.b = nn.Linear(48, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        x = x.flatten(1)
        return (self.frozen(x) + self.b(self.a(x))).relu()


def short_penalties():
    forms = [ok.Disentangled(relax=ok.share(0.1), form=form) for form in ("welch", "budget")]
    return [ok.Disentangled(), ok.Disentangled(relax=ok.share(0.1), ceiling=ok.welch()), *forms, ok.EADK(), ok.EADC()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strength", [1e-3, 1e-2])
@pytest.mark.parametrize("penalty", short_penalties(), ids=repr)
@pytest.mark.parametrize("network", [Control, LowRank])
def test_a_zero_initialised_layer_trains(network, penalty, strength):
    torch.manual_seed(0)
    model = network()
    head = nn.Linear(8 if network is Control else 32, 4)
    x = torch.randn(64, 3, 4, 4)
    labels = x.flatten(1)[:, :4].argmax(-1)
    ortho = ok.Regularizer(model, penalty, strength=strength, where=ok.layers)
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(head(model(x)), labels)
        optimizer.zero_grad()
        (loss + ortho()).backward()
        optimizer.step()
        losses.append(loss.item())
    longest = max(ok.kernel_of(layer.module).matrix.norm(dim=-1).max().item() for layer in ortho.layers)
    assert longest < 3
    assert losses[-1] < losses[0]


def test_an_all_zero_layer_is_told_and_can_be_left_out(unchecked):
    model = Control()
    assert [layer.name for layer in ok.select(model, ok.zeros)] == ["zero"]
    with pytest.warns(UserWarning, match=r"1 of 3 selected layers are all zero \('zero'\).*~orthokit.zeros"):
        ok.Regularizer(model, ok.SO(), strength=0.1)
    ok.Regularizer(model, ok.SO(), strength=0.1, where=ok.convs & ~ok.zeros)


def test_tall_layers_can_be_left_out():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    assert [layer.name for layer in ok.select(model, ok.tall)] == ["1"]
    assert [layer.name for layer in ok.select(model, ok.convs & ~ok.tall)] == ["0", "2"]
