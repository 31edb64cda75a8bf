"""The convolution measures against the layer as a dense operator."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import orthokit as ok
from orthokit.penalties.conv_orth import convolution_orthogonality


def operator(layer, size):
    """The matrix of a bias-free layer with circular padding, from its action on every basis image of the given size."""
    basis = torch.eye(layer.in_channels * size**2, dtype=torch.float64).reshape(-1, layer.in_channels, size, size)
    return layer(basis).flatten(1).T


def conv(i, o, k, **options):
    padding = options.pop("padding", k // 2)
    return nn.Conv2d(i, o, k, padding=padding, padding_mode="circular", bias=False, **options).double()


SHAPES = [
    (conv(4, 4, 3), "square"),
    (conv(6, 4, 3), "wide"),
    (conv(3, 8, 3), "tall"),
    (conv(2, 6, 3, stride=2), "stride 2, wide"),
    (conv(2, 12, 3, stride=2), "stride 2, tall"),
    (conv(4, 8, 1, stride=2), "1x1, stride 2: fewer inputs are read than there are outputs"),
    (conv(4, 8, 3, groups=2), "grouped"),
    (conv(3, 3, 3, dilation=2, padding=2), "dilated"),
]


def minimise(layer):
    """Newton's method with a damped Hessian, after some L-BFGS: at orthogonal convolutions Lorth is flat to fourth order."""
    ortho = ok.Regularizer(layer, ok.Lorth(), strength=1.0)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=1.0, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = ortho()
        value.backward()
        return value.detach()

    optimizer.step(closure)
    shape, kernel = layer.weight.shape, ok.kernel_of(layer)

    def value(flat):
        return ok.Lorth()(replace(kernel, weight=flat.reshape(kernel.weight.shape))).sum()

    flat, damping = layer.weight.detach().flatten(), 1e-9
    for _ in range(40):
        flat = flat.requires_grad_()
        if (here := value(flat)) < 5e-10:  # then singular values differ from 1 by about 3e-5
            break
        (gradient,) = torch.autograd.grad(here, flat)
        curvature, directions = torch.linalg.eigh(torch.autograd.functional.hessian(value, flat, vectorize=True))
        with torch.no_grad():
            before, step = here.detach(), directions.T @ gradient
            while value(lower := flat - directions @ (step / (curvature.abs() + damping))) > before and damping < 1:
                damping *= 10
            flat, damping = lower, max(1e-9, damping / 100)
    with torch.no_grad():
        layer.weight.copy_(flat.reshape(shape))


@pytest.mark.parametrize(("layer", "name"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_minimising_lorth_makes_an_orthogonal_operator(layer, name):
    nn.init.normal_(layer.weight, std=0.2)
    before = torch.linalg.svdvals(operator(layer, 8).detach())
    assert before.max() - before.min() > 0.1
    minimise(layer)
    sigma = torch.linalg.svdvals(operator(layer, 8).detach())
    sigma = sigma[sigma > 1e-3]  # inputs that a 1x1 convolution of stride 2 never reads have singular value 0
    assert sigma.max() - sigma.min() < 1e-4
    assert sigma.max().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("layer", "name"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_conv_orth_is_the_gram_matrix_of_the_operator(layer, name):
    """Averaged over positions, the squared residual of the operator's rows is ConvOrth."""
    nn.init.normal_(layer.weight, std=0.3)
    rows = operator(layer, 12)
    positions = rows.shape[0] // layer.out_channels
    residual = rows @ rows.T - torch.eye(len(rows))
    actual = ok.ConvOrth()(ok.kernel_of(layer)).sum().item()
    assert actual == pytest.approx(residual.square().sum().item() / positions, rel=1e-9)


def test_a_unitary_upsampler_scores_zero():
    up = nn.ConvTranspose2d(4, 1, 2, stride=2, bias=False)
    nn.init.orthogonal_(up.weight.data.view(4, 4))
    for penalty in (ok.ConvOrth(), ok.Lorth(), ok.EADC()):
        assert penalty(ok.kernel_of(up)).item() < 1e-10
    x = torch.randn(1, 4, 5, 5)
    assert up(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-5)


def test_on_matrices_they_are_the_kernel_measures():
    linear = ok.kernel_of(nn.Linear(7, 4).double())
    assert torch.allclose(ok.ConvOrth()(linear), ok.SO()(linear))
    assert torch.allclose(ok.EADC()(linear), ok.EADK()(linear))
    big_stride = ok.kernel_of(nn.Conv2d(3, 5, 2, stride=2).double())
    assert torch.allclose(ok.ConvOrth()(big_stride), ok.SO()(big_stride))


def test_dilation_spreads_the_lags():
    """Stride 2 with dilation 2 shares taps as stride 1 does; with dilation 3 only every second tap."""
    for options, plain in (
        ({"stride": 2, "dilation": 2}, 1),
        ({"stride": 2, "dilation": 3}, 2),
        ({"stride": 4, "dilation": 2}, 2),
    ):
        layer = nn.Conv2d(2, 4, 3, **options)
        expected = convolution_orthogonality(layer.weight, stride=(plain, plain))
        assert torch.allclose(ok.ConvOrth()(ok.kernel_of(layer))[0], expected)


def test_layers_of_other_dilation_are_not_stacked_together():
    m = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, dilation=2, stride=2), nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)
    )
    actual = ok.Regularizer(m, ok.ConvOrth(), strength=1.0).per_layer()
    alone = [ok.ConvOrth()(ok.kernel_of(layer)).item() for layer in m]
    assert list(actual.values()) == pytest.approx(alone, rel=1e-5)


def test_bad_groups(unchecked):
    with pytest.raises(ValueError, match="groups must divide the number of filters: 6 filters in 4 groups"):
        ok.GOR(groups=4)(ok.kernel_of(nn.Linear(3, 6)))
    with pytest.raises(ValueError, match="kind must be one of 'inter', 'intra'"):
        ok.GOR(kind="both")
    for make in (lambda: ok.EADK(theta=2.0), lambda: ok.EADC(theta=0.0), lambda: ok.EADK(weight=-1.0)):
        with pytest.raises(ValueError, match=r"theta|weight"):
            make()
