"""Which layers are selected, and under which names."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import orthokit as ok
from orthokit.spec import PREDICATES


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)),
        nn.ConvTranspose2d(16, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def names(where, m=None):
    return [layer.name for layer in ok.select(m or model(), where)]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (ok.convs, ["0", "1.0", "1.2", "2"]),
        (ok.linears, ["4"]),
        (ok.layers, ["0", "1.0", "1.2", "2", "4"]),
        (ok.spatial, ["0", "1.0", "2"]),
        (ok.pointwise, ["1.2"]),
        (ok.depthwise, ["1.0"]),
        (ok.stem, ["0"]),
        (ok.convs & ~ok.stem, ["1.0", "1.2", "2"]),
        (ok.linears | ok.pointwise, ["1.2", "4"]),
        (ok.matching("1.*", "4") & ok.layers, ["1.0", "1.2", "4"]),
        (lambda name, m: ok.convs(name, m) and m.stride == (1, 1), ["0", "1.0", "1.2"]),
        (ok.convs & (lambda name, m: m.out_channels > 8), ["1.2"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_predicates(where, wanted):
    assert names(where) == wanted


def test_predicates_print_as_themselves():
    assert repr(ok.convs & ~ok.stem | ok.matching("a*")) == "((convs & ~stem) | matching('a*'))"


@pytest.mark.parametrize(
    "where",
    [*PREDICATES.values(), ok.matching("1.*", "4"), ok.convs & ~ok.stem | ok.matching("4")],
    ids=repr,
)
def test_predicates_pickle(where):
    again = pickle.loads(pickle.dumps(where))
    assert repr(again) == repr(where)
    m = model().extend([nn.Embedding(2, 4), nn.Linear(4, 2)])
    m[1][0].weight.data.zero_()  # for `zeros`
    m[6].weight = m[5].weight  # for `tied`
    assert names(again, m) == names(where, m)


def test_tied_weights_count_once():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    m[2].weight = m[0].weight
    assert names(ok.linears, m) == ["0", "1"]
    shared = nn.Conv2d(3, 3, 3)
    assert names(ok.convs, nn.Sequential(shared, nn.ReLU(), shared)) == ["0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself, on importing its compiler
def test_wrappers_are_looked_through():
    m = model()
    m[1] = torch.compile(m[1])
    assert names(ok.convs, DataParallel(m)) == ["0", "1.0", "1.2", "2"]
    assert names(ok.convs, torch.compile(m)) == ["0", "1.0", "1.2", "2"]


def test_a_model_that_is_one_layer():
    assert names(ok.convs, nn.Conv2d(3, 4, 3)) == ["Conv2d"]


def test_nothing_selected_says_what_there_is():
    with pytest.raises(ValueError, match=r"linears selects no layer of Sequential, which has: 1 Conv2d; pass another where="):
        ok.select(nn.Sequential(nn.Conv2d(3, 4, 3)), ok.linears)
    with pytest.raises(ValueError, match="no layer with a kernel view"):
        ok.select(nn.ReLU())


def test_bad_arguments(unchecked):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module or a state dict; got int"):
        ok.select(3)
    with pytest.raises(TypeError, match="where must be a predicate"):
        ok.select(model(), "convs")
    with pytest.raises(TypeError, match="patterns"):
        ok.matching()
    with pytest.raises(TypeError, match="layer '3': Flatten has no kernel view"):
        ok.select(model(), lambda name, m: name == "3")


def test_state_dicts():
    m = model()
    kinds = {layer.name: type(layer.module).__name__ for layer in ok.select(m.state_dict(), ok.layers)}
    assert kinds == {"0": "Conv2d", "1.0": "Conv2d", "1.2": "Conv2d", "2": "ConvTranspose2d", "4": "Linear"}
    checkpoint = {"epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}, "net": DataParallel(m).state_dict()}
    assert names(ok.layers, checkpoint) == list(kinds)
    tied = {"a.weight": m[4].weight, "b.weight": m[4].weight.detach()}
    assert names(ok.layers, tied) == ["a"]
    with pytest.raises(ValueError, match="no layer's weight in this state dict"):
        ok.select({"x": torch.ones(3)}, ok.layers)


def test_predicates_that_match_containers_choose_their_layers():
    assert names(ok.matching("1*")) == ["1.0", "1.2"]
    assert names(~ok.convs) == ["4"]


def test_words_instead_of_operators(unchecked):
    with pytest.raises(TypeError, match=r"combine predicates with & \| ~"):
        _ = ok.convs or ok.linears
    with pytest.raises(TypeError, match="where must be a predicate"):
        _ = ok.convs & "layer1"
    assert names((lambda name, m: name != "0") & ok.convs) == ["1.0", "1.2", "2"]


def test_weights_that_are_buffers():
    class Fixed(nn.Linear):
        def __init__(self, bias):
            super().__init__(3, 3)
            del self.weight
            self.register_buffer("weight", torch.eye(3))
            self.bias = bias

    bias = nn.Parameter(torch.zeros(3))
    m = nn.Sequential(Fixed(bias), Fixed(bias))
    chosen = ok.select(m, ok.linears)
    assert [layer.name for layer in chosen] == ["0", "1"]
    assert all(layer.frozen for layer in chosen)
