"""Operator spectra against the dense operator, built column by column."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.diagnostics import operator_singular_values


def wrapped(weight, size, stride, dilation, groups, channels):
    """The dense matrix of the operator on images of a size."""
    inputs = channels * int(np.prod(size))
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, channels, *size)
    # Enough copies of the image that even a kernel larger than it wraps around.
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    tiles = [1 + -(-more // extent) for more, extent in zip(reach, size, strict=True)]
    tiled = basis.repeat(1, 1, *tiles)
    for axis, (extent, more) in enumerate(zip(size, reach, strict=True), 2):
        tiled = tiled.narrow(axis, 0, extent + more)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    return convolve(tiled, weight, stride=stride, dilation=dilation, groups=groups).flatten(1).T


LAYERS = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), (6, 6)),
    "tall": (lambda: nn.Conv2d(2, 5, 3), (5, 4)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 5)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2), (6, 8)),
    "mixed strides": (lambda: nn.Conv2d(2, 7, (3, 2), stride=(2, 3)), (4, 6)),
    "strided pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, stride=2), (4, 4)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2), (5, 7)),
    "kernel larger than the image": (lambda: nn.Conv2d(2, 3, 5), (3, 4)),
    "1d": (lambda: nn.Conv1d(3, 2, 4, stride=2), (8,)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_the_dense_operator(name):
    make, size = LAYERS[name]
    layer = make().double()
    dense = wrapped(layer.weight.detach(), size, layer.stride, layer.dilation, layer.groups, layer.in_channels)
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)
    sigma = operator_singular_values(ok.kernel_of(layer), size).numpy()
    assert len(sigma) == len(expected)
    assert np.abs(sigma - expected).max() < 1e-9


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolutions_have_those_of_their_adjoint(stride):
    layer = nn.ConvTranspose2d(4, 6, 2, stride=stride, groups=2).double()
    dense = wrapped(layer.weight.detach(), (4, 4), layer.stride, layer.dilation, 2, 6)
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)
    assert np.abs(operator_singular_values(ok.kernel_of(layer), (4, 4)).numpy() - expected).max() < 1e-9


def test_linear_layers_and_chunks(monkeypatch):
    layer = nn.Linear(5, 3)
    expected = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    assert np.allclose(operator_singular_values(ok.kernel_of(layer)).numpy(), expected)
    kernel = ok.kernel_of(nn.Conv2d(3, 4, 3, stride=2))
    whole = operator_singular_values(kernel, (8, 8))
    monkeypatch.setattr("orthokit.diagnostics.operator.ENTRIES", 1)
    assert torch.allclose(operator_singular_values(kernel, (8, 8)), whole)


def test_an_orthogonal_convolution_keeps_lengths():
    kernel = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 2] = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    sigma = operator_singular_values(ok.kernel_of(kernel), (6, 6))
    assert torch.allclose(sigma, torch.ones(144, dtype=torch.float64))


@pytest.mark.parametrize("size", [(5, 4), (4,), (0, 4)])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match=r"size must have 2 entries, multiples of the stride \(2, 2\)"):
        operator_singular_values(ok.kernel_of(nn.Conv2d(2, 2, 3, stride=2)), size)


def test_a_network_at_the_sizes_that_reach_its_layers():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Flatten(1),
        nn.Linear(96, 2),
    ).train()
    table = ok.operators(network, 8)
    assert [row["size"] for row in table.rows] == ["8x8", "4x4", "–"]
    product = np.prod([row["sigma_max"] for row in table.rows])
    assert table.totals["product"]["sigma_max"] == pytest.approx(product)
    assert network.training
    assert network[1].num_batches_tracked == 0
    state = ok.operators(network.state_dict(), 4)
    assert [row["size"] for row in state.rows] == ["4x4", "4x4", "–"]
    assert state.rows[1]["sigma_max"] == pytest.approx(table.rows[1]["sigma_max"])
    with pytest.raises(ValueError, match="does not go through the network"):
        ok.operators(network, 10)


def test_the_bound_holds_for_the_linear_parts():
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False),
    ).double()
    bound = ok.operators(network, 6).totals["product"]["sigma_max"]
    basis = torch.eye(72, dtype=torch.float64).reshape(72, 2, 6, 6)
    dense = network(basis).detach().flatten(1).numpy()
    assert np.linalg.norm(dense, 2) <= bound * (1 + 1e-12)


def test_the_image_is_that_of_the_network_whatever_is_selected():
    net = nn.Sequential()
    net.late, net.stem = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(3, 8, 3)  # in another order than they run
    net.forward = lambda x: net.late(net.stem(x))
    for where in (ok.convs, ok.matching("late")):
        assert {row["layer"]: row["size"] for row in ok.operators(net, (12, 16), where=where).rows}["late"] == "10x14"


@pytest.mark.parametrize("size", [True, 0, -3, "32", 8.5, (8,), (8, 8, 8), (8, True), 10**8])
def test_sizes_that_are_none(size):
    with pytest.raises((TypeError, ValueError), match="size"):
        ok.operators(nn.Conv2d(3, 4, 3).state_dict(), size)


def test_no_bound_of_a_network_with_nan():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    nn.init.constant_(net[1].weight, float("nan"))
    table = ok.operators(net, 4)
    assert table.totals == {}
    assert "no bound" in table.notes[-1]


def test_a_file_whose_model_is_known_is_read_as_the_model(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(32, 5))

    net = build()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with torch.device("meta"):
        like = build()
    of_file, of_model = ok.operators(tmp_path / "net.pt", 8, like=like), ok.operators(net, 8)
    assert of_file.rows == of_model.rows
    assert [row["size"] for row in of_file.rows] == ["8x8", "4x4", "–"]
    assert not any("sizes are not known" in note for note in of_file.notes)
    assert any("grouped by their sizes" in note for note in ok.operators(tmp_path / "net.pt", 8).notes)


@pytest.mark.parametrize("error", [AssertionError, AttributeError, KeyError, IndexError, TypeError])
def test_networks_that_take_no_such_image(error):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))

    def refuse(x):
        raise error("need 32")

    net.forward = refuse
    with pytest.raises(ValueError, match=r"need 32.*pass another size, or the state dict"):
        ok.operators(net, 8)
    assert not net[0]._forward_hooks
    assert ok.operators(net.state_dict(), 8).rows
