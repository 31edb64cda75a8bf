"""Real networks: every row against NumPy, model against state dict, a step of training, and plans on the meta device.

It runs where all the frameworks are installed, and is skipped elsewhere.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import orthokit as ok
from orthokit.architecture import open_network
from orthokit.in_use import is_overridden
from zoo.networks import NEEDED, NETWORKS

for _framework in NEEDED:
    pytest.importorskip(_framework)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("network", NETWORKS, ids=repr)]

LARGE = 2**26
"""Layers with fewer products (filters times weights) are measured in NumPy, too, and the smallest four in any case."""


def matrices(model):
    """The filters of every layer as NumPy arrays (groups, o, n), read without orthokit."""
    tied = set()
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        weight = getattr(module, "weight", None)
        if hasattr(module, "base_layer"):  # of an adapter: peft calls it Linear, too
            continue
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                yield f"{name}.in_proj", module.in_proj_weight.detach().double().numpy().reshape(3, module.embed_dim, -1)
            continue
        if not kinds & {"Linear", "_ConvNd", "Conv1D"} or not isinstance(weight, torch.Tensor) or id(weight) in tied:
            continue
        tied.add(id(weight) if isinstance(weight, nn.Parameter) else None)
        array = weight.detach().double().numpy()
        groups = getattr(module, "groups", 1)
        if "Conv1D" in kinds:
            array = array.T
        if "_ConvTransposeNd" in kinds:
            array = np.swapaxes(array.reshape(groups, -1, *array.shape[1:]), 1, 2).reshape(module.out_channels, -1)
        array = array.reshape(groups, len(array) // groups, -1)
        if kinds & {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "WeightStandardizedConv2d"}:
            array = (array - array.mean(-1, keepdims=True)) / np.sqrt(array.var(-1, keepdims=True) + module.eps)
            if hasattr(module, "gain"):
                array = array * (module.gain.detach().double() * module.scale).numpy().reshape(groups, -1, 1)
        yield name, array


def measured(array):
    lengths = np.linalg.norm(array, axis=-1)
    unit = array / np.maximum(lengths, 1e-150)[..., None]
    cosines = np.abs(unit @ unit.swapaxes(-1, -2))[:, *np.triu_indices(array.shape[1], 1)]
    return {
        "mean_cos": cosines.mean() if cosines.size else None,
        "max_cos": cosines.max() if cosines.size else None,
        "mean_length_error": np.abs(lengths - 1).mean(),
        "max_length_error": np.abs(lengths - 1).max(),
    }


def on_meta(network):
    try:
        with torch.device("meta"):
            return network.build()
    except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
        return network.build().to("meta")


def sizes(layers):
    return [(layer.name, layer.size) for layer in layers]


def test_each_row_is_that_of_numpy(network):
    model = network.build()
    with torch.no_grad():  # else a part of them is zero, and says nothing
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    expected = dict(matrices(model))
    layers = ok.select(model, ok.layers)
    assert {layer.name: layer.size for layer in layers} == {name: array.shape for name, array in expected.items()}
    products = {name: array.shape[1] * array.size for name, array in expected.items()}
    small = {name for name, count in products.items() if count < LARGE} | set(sorted(products, key=products.__getitem__)[:4])
    table = ok.report(model, where=lambda name, module: ok.layers(name, module) and name in small, spectrum=False)
    assert {row["layer"] for row in table.rows} == small
    for row in table.rows:
        for key, value in measured(expected[row["layer"]]).items():
            assert row[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), (row["layer"], key)


def test_a_state_dict_gives_the_rows_of_the_model_or_says_what_it_guessed(network):
    model = network.build()
    state = copy.copy(model.state_dict())
    layers = ok.select(model, ok.layers)
    read, notes = open_network(state)
    differing = set(sizes(layers)) ^ set(sizes(ok.select(read, ok.layers)))
    assert not differing or notes
    assert set(sizes(ok.select(open_network(state, like=on_meta(network))[0], ok.layers))) == set(sizes(layers))


def test_a_step_of_training(network):
    model = network.build().train()
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=1e-3, where=ok.layers & ~ok.tied)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss = network.value(model) + ortho()
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(any(p.grad is not None for p in layer.sources) for layer in ortho.layers if not layer.frozen)


def test_a_plan_on_the_meta_device(network):
    model = on_meta(network)
    table = ok.plan(model, ok.share(0.1), where=ok.layers)
    assert [(row["layer"], row["groups"], row["o"], row["n"]) for row in table.rows] == [
        (layer.name, *layer.size) for layer in ok.select(network.build(), ok.layers)
    ]
    if any(is_overridden(layer.module) for layer in ok.select(model, ok.layers)):
        with pytest.raises(TypeError, match=r"layer '.*': weights on the meta device"):
            ok.report(model)
