"""The decoupled step towards the nearest minimum."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.lab.data.images import load
from orthokit.lab.networks.resnet import ResNet
from orthokit.polar import _polar_by_products, polar


def model():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.Conv2d(6, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 4, 8)])
@pytest.mark.parametrize("condition", [1, 1e3])
def test_polar_is_the_nearest(shape, condition):
    m = torch.randn(*shape, dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(m, full_matrices=False)
    m = (
        left
        * torch.logspace(0, -torch.tensor(float(condition)).log10().item(), sigma.shape[-1], dtype=torch.float64).unsqueeze(-2)
        @ right
    )
    assert torch.allclose(polar(m), left @ right, atol=1e-9)


def polar_by_products(matrix):
    """As on an accelerator, in float32."""
    scaled = matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp(min=1e-45)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    basis, square = torch.linalg.qr(scaled if is_tall else scaled.mT)
    nearest = basis @ _polar_by_products(square)
    return nearest if is_tall else nearest.mT


def orthonormal_error(matrix):
    """Largest entry of the smaller side's residual, in float64."""
    m = matrix.double()
    m = m if m.shape[-2] <= m.shape[-1] else m.mT
    return (m @ m.mT - torch.eye(m.shape[-2], dtype=torch.float64)).abs().max().item()


def degenerate(o, n):
    m = torch.randn(o, n, generator=torch.Generator().manual_seed(0))
    copy, opposite, zero, short, long = (m.clone() for _ in range(5))
    copy[2], opposite[2], zero[1] = copy[0], -opposite[0], 0
    short[1] *= 1e-30
    long[1] *= 1e19
    few = m[:, :1] @ m[:1]
    return {
        "a copy": copy,
        "an opposite copy": opposite,
        "a zero filter": zero,
        "two zero columns": torch.cat([m[:, :-2], torch.zeros(o, 2)], -1),
        "rank one": few,
        "all zero": torch.zeros(o, n),
        "all equal": torch.ones(o, n),
        "one short filter": short,
        "one long filter": long,
        "1e19": 1e19 * m,
        "1e37": 1e37 * m,
        "1e-30": 1e-30 * m,
        "subnormal": 1e-42 * m,
    }


SHAPES = [(5, 9), (9, 5), (6, 6), (24, 6), (64, 576), (1, 4), (4, 1)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape) > 2], ids=str)
@pytest.mark.parametrize("polar_of", [polar, pytest.param(polar_by_products, id="by products")])
def test_the_polar_factor_is_orthonormal_whatever_the_rank(shape, polar_of):
    kinds = degenerate(*shape)
    for kind, m in kinds.items():
        actual = polar_of(m)
        assert actual.dtype == torch.float32
        assert orthonormal_error(actual) < (2e-6 if polar_of is polar else 1e-5), kind
        assert torch.equal(actual, polar_of(m)), kind
    together = polar_of(torch.stack(list(kinds.values())))
    for (kind, m), actual in zip(kinds.items(), together, strict=True):
        assert torch.allclose(actual, polar_of(m), atol=1e-5), kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_has_a_direction_keeps_it(shape):
    """The polar factor maximises <P, K>: also of a matrix of lower rank, where it is the sum of singular values."""
    for kind, m in degenerate(max(3, shape[0]), shape[1] + 2).items():
        m = m.double() / m.double().abs().max().clamp(min=1e-300)
        assert (polar(m) * m).sum().item() == pytest.approx(torch.linalg.svdvals(m).sum().item(), rel=1e-9), kind


@pytest.mark.filterwarnings("ignore:1 of . selected layers are all zero")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", [ok.Disentangled(), ok.SO(), ok.DSO(), ok.SRIP()], ids=repr)
def test_retracting_degenerate_layers(penalty, dtype):
    m = model().to(dtype)
    with torch.no_grad():
        m[0].weight[1] = m[0].weight[0]
        m[2].weight[:4] = 0
        m[4].weight.zero_()
        m[5].weight[:20] = 0
        m[8].weight *= 1e19 if dtype.itemsize > 2 else 100
    ortho = ok.Regularizer(m, penalty, strength=0.0, where=ok.layers)
    ortho.retract_()
    tolerance = 10 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
    for layer in ortho.layers:
        kernel = layer.kernel
        if kernel.o <= kernel.n or type(penalty) is not ok.Disentangled:
            assert orthonormal_error(kernel.matrix.detach()) < tolerance, layer.name
        else:
            assert (kernel.matrix.norm(dim=-1) - 1).abs().max() < tolerance, layer.name


@pytest.mark.filterwarnings("ignore:1 of . selected layers are all zero")
def test_tall_layers_with_zero_filters_become_tight_frames_without_copies():
    layers = [nn.Conv2d(6, 24, 1), nn.Conv2d(6, 24, 1)]
    nn.init.zeros_(layers[0].weight)
    layers[1].weight.data[3:9] = 0
    for layer in layers:
        for penalty in (ok.Disentangled(), ok.Disentangled(relax=ok.feasible(), form="budget")):
            ortho = ok.Regularizer(layer, penalty, strength=0.0)
            for _ in range(30):
                ortho.retract_()
        row = ok.report(layer).rows[0]
        assert row["max_length_error"] < 1e-6
        assert row["tightness"] < 1e-5
        assert row["copies"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("penalty", [ok.Disentangled(), ok.SO(), ok.DSO(), ok.SRIP()], ids=repr)
def test_broken_weights_are_named_and_nothing_moves(penalty, bad):
    m = model()
    with torch.no_grad():
        m[5].weight[3, 2] = bad
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(FloatingPointError, match=r"^layer 5: no orthonormal matrix is nearest"):
        ok.Regularizer(m, penalty, strength=0.0).retract_()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True) if p.isfinite().all())


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=3e-3)])
@pytest.mark.parametrize("penalty", [ok.Disentangled(), ok.SO(), ok.SRIP()], ids=repr)
def test_real_training_on_the_minimum(make, penalty):
    data = load("digits", train=200)
    m = ResNet(8, channels=1)
    wide = ok.convs & ~ok.pointwise & ~ok.stem  # the shortcuts and the first convolution are tall
    ortho = ok.Regularizer(m, penalty, strength=0.0, where=wide)
    optimizer = make(m.parameters())
    x, y = data.normalise(data.train.pixels), data.train.labels
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ortho.retract_()
        losses.append(loss.item())
        for layer in ortho.layers:
            matrix = layer.kernel.matrix.detach()
            residual = matrix @ matrix.mT - torch.eye(matrix.shape[-2])
            assert residual.norm(dim=(-2, -1)).max() < 1e-5 * matrix.shape[-2] ** 0.5
    assert losses[-1] < 0.5 * losses[0]


def test_tall_layers_become_tight_frames_of_unit_filters():
    layer = nn.Conv2d(6, 24, 1)
    ortho = ok.Regularizer(layer, ok.Disentangled(), strength=0.0)
    for _ in range(30):
        ortho.retract_()
    row = ok.report(layer).rows[0]
    assert row["max_length_error"] < 1e-6
    assert row["tightness"] < 1e-5
    budget = ok.Regularizer(layer, ok.Disentangled(relax=ok.feasible(), form="budget"), strength=0.0)
    before = layer.weight.detach().clone()
    budget.retract_()
    assert torch.allclose(layer.weight, before, atol=1e-5)


def test_rate_goes_part_of_the_way():
    layer = nn.Linear(9, 4)
    start, end = layer.weight.detach().clone(), polar(layer.weight.detach())
    ok.Regularizer(layer, ok.SO(), strength=0.0, where=ok.linears).retract_(0.25)
    assert torch.allclose(layer.weight, start + 0.25 * (end - start), atol=1e-6)


def test_the_nearest_is_a_minimum_of_its_penalty():
    for o, n in ((4, 9), (9, 4), (6, 6)):
        kernel = ok.kernel_of(torch.randn(o, n, dtype=torch.float64))
        for penalty in (ok.SO(), ok.SO(side="smaller"), ok.DSO(), ok.SRIP(), ok.Disentangled()):
            at_best = penalty(ok.Kernel(penalty.nearest(kernel))).item()
            least = {"SO()": max(0, o - n), "DSO()": abs(o - n)}.get(repr(penalty), 0)
            if o <= n or type(penalty) is not ok.Disentangled:
                assert at_best == pytest.approx(least, abs=1e-7)
            else:
                assert at_best < penalty(kernel).item()


@pytest.mark.parametrize(
    ("penalty", "error", "message"),
    [
        (
            ok.Coherence(),
            TypeError,
            r"Coherence\(\) does not know its nearest minimum .*; use one of SO, DSO",
        ),
        (ok.Disentangled(relax=ok.share(0.1), form="welch"), ValueError, "form='welch' leaves many minima"),
        (ok.Disentangled(ceiling=ok.welch()), ValueError, "a ceiling leaves many minima"),
    ],
    ids=repr,
)
def test_what_has_no_closed_form_is_refused(penalty, error, message):
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(error, match=message):
        ok.Regularizer(m, penalty, strength=0.0).retract_()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))


def test_other_refusals():
    m = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    ortho = ok.Regularizer(m, ok.SO(), strength=0.0, where=ok.linears)
    before = m[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the weight of layer '1' is computed from others"):
        ortho.retract_()
    assert torch.equal(m[0].weight, before)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"rate must be a finite number in \(0, 1\]"):
            ortho.retract_(rate)


@pytest.mark.parametrize("kind", ["plain", "parametrized", "all of one stack"])
def test_frozen_layers_count_and_do_not_move(kind):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1))
    if kind == "parametrized":  # it could not be set, and need not be
        nn.utils.parametrizations.weight_norm(m[1])
    for layer in m if kind == "all of one stack" else [m[1]]:
        layer.requires_grad_(False)
    m[2].requires_grad_(True)
    before = [layer.weight.detach().clone() for layer in m]
    ortho = ok.Regularizer(m, ok.SO(), strength=1.0, include_frozen=True)
    assert list(ortho.per_layer()) == ["0", "1", "2"]
    ortho.retract_()
    moved = [not torch.equal(layer.weight, old) for layer, old in zip(m, before, strict=True)]
    assert moved == [kind != "all of one stack", False, True]
    assert ortho.per_layer()["2"] == pytest.approx(2.0, abs=1e-5)  # 6 filters of 4 weights
