"""Filters far longer than 1, as those of pretrained networks: squared penalties warn, and the others leave what was learned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok

SQUARED = [
    ok.SO(),
    ok.DSO(),
    ok.ConvOrth(),
    ok.Lorth(),
    ok.EADK(),
    ok.EADC(),
    ok.GOR(),
    ok.OffDiagonal(),
    ok.SRIP(squared=True),
    ok.Disentangled(squared=True),
    ok.Disentangled(squared=True, relax=ok.share(0.1), form="welch"),
]
SAFE = [
    ok.SO(squared=False),
    ok.SRIP(),
    ok.MC(),
    ok.ConvOrth(squared=False),
    ok.Disentangled(),
    ok.Disentangled(weights=(0.0, 1.0)),
    ok.Disentangled(weights=(0.0, 1.0), squared=True),
]


def model(times=1.0):
    """Every convolution is followed by a normalisation: whatever its length, the network computes the same."""
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    with torch.no_grad():
        for layer in (m[0], m[3]):
            layer.weight.mul_(times * (layer.weight.flatten(1).norm(dim=-1).mean()).reciprocal())
    return m


def images():
    """Four kinds of stripes in noise."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(64) % 4
    wave = torch.arange(8).mul(torch.pi / 2).sin()
    kinds = torch.stack([wave.expand(8, 8), wave.expand(8, 8).T, wave.outer(wave), torch.zeros(8, 8)])
    return (kinds[labels] + 0.5 * torch.randn(64, 8, 8, generator=g)).unsqueeze(1), labels


@pytest.mark.parametrize("penalty", SQUARED, ids=repr)
def test_a_squared_penalty_warns_once_with_the_numbers(penalty):
    m = model(10.0)
    with pytest.warns(UserWarning, match=r"is squared, and 2 of the layers have filters far longer than 1") as caught:
        ortho = ok.Regularizer(m, penalty, strength=0.1)
    assert len(caught) == 1
    message = str(caught[0].message)
    for expected in (repr(penalty), "median length is", "largest", f"adds {ortho().item():.3g} to the loss", "weights=(0, 1)"):
        assert expected in message
    ok.Regularizer(m, penalty, strength=0.1)  # the second time in silence


@pytest.mark.parametrize("penalty", SAFE, ids=repr)
def test_others_do_not(penalty):
    ok.Regularizer(model(10.0), penalty, strength=0.1)


@pytest.mark.parametrize("penalty", SQUARED, ids=repr)
def test_ordinary_networks_and_small_strengths_do_not(penalty):
    ok.Regularizer(model(1.5), penalty, strength=1.0)
    ok.Regularizer(model(10.0), penalty, strength=1e-6)
    frozen = model(10.0)
    frozen[0].requires_grad_(False)
    frozen[3].weight.data.div_(10)
    ok.Regularizer(frozen, penalty, strength=0.1)


def test_the_end_of_a_warm_up_counts_too():
    with pytest.warns(UserWarning, match="far longer than 1"):
        ok.Regularizer(model(10.0), ok.SO(), strength=ok.warmup(100, 0.1))


def test_weights_whose_squares_overflow():
    with pytest.warns(UserWarning, match="it adds inf to the loss"):
        ok.Regularizer(model(1e15), ok.SO(), strength=1e-3)


@pytest.mark.parametrize("penalty", SAFE, ids=repr)
def test_a_network_with_filters_ten_times_too_long_learns(penalty):
    m = model(10.0)
    ortho = ok.Regularizer(m, penalty, strength=1e-2)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    x, y = images()
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(m(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + ortho()).backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    for layer in ortho.layers:
        assert 0.1 < layer.kernel.matrix.norm(dim=-1).max() < 20


def test_directions_alone_leave_lengths_alone():
    m = model(10.0)
    ortho = ok.Regularizer(m, ok.Disentangled(weights=(0.0, 1.0)), strength=1.0)
    start = [layer.kernel.matrix.norm(dim=-1) for layer in ortho.layers]
    for _ in range(20):
        for layer in ortho.layers:
            layer.module.weight.grad = None
        ortho.add_grad_()
        with torch.no_grad():
            for layer in ortho.layers:
                layer.module.weight -= layer.module.weight.grad
    for layer, before in zip(ortho.layers, start, strict=True):
        assert torch.allclose(layer.kernel.matrix.norm(dim=-1), before, rtol=0.05)
