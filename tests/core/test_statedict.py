"""A model and its state dict give the same rows, or the report names what was guessed."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import orthokit as ok
from orthokit.checkpoint.shapes import Conv1D, natural
from orthokit.checkpoint.statedict import bare, layers_of


class Block(nn.Module):
    """A bottleneck with a grouped convolution and a projection, as ResNeXt has it."""

    def __init__(self, i, o, width, groups):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, o, 1, bias=False), nn.BatchNorm2d(o)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o))


class Fire(nn.Module):
    """SqueezeNet's: the second expansion reads the squeezed channels, not those of the first."""

    def __init__(self, i, squeezed, o):
        super().__init__()
        self.squeeze = nn.Conv2d(i, squeezed, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeezed, o, 1), nn.Conv2d(squeezed, o, 3)


class Inverted(nn.Module):
    """MobileNet's block with squeeze and excitation."""

    def __init__(self, i, width, o):
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv_dw, self.bn2 = nn.Conv2d(width, width, 5, groups=width, bias=False), nn.BatchNorm2d(width)
        self.se = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1))
        self.conv_pwl, self.bn3 = nn.Conv2d(width, o, 1, bias=False), nn.BatchNorm2d(o)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 2, 3)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(200, 16), nn.Embedding(32, 16)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = conv1d(16, 48), conv1d(16, 16)
        self.mlp.c_fc, self.mlp.c_proj = conv1d(16, 64), conv1d(64, 16)
        self.ln = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 200, bias=False)
        self.lm_head.weight = self.wte.weight


def conv1d(i, o):
    layer = Conv1D(o)
    layer.weight, layer.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.zeros(o))
    return layer


def generator():
    up = nn.ConvTranspose2d
    first, second = up(100, 64, 4, bias=False), up(64, 32, 4, 2, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(), second, nn.BatchNorm2d(32), up(32, 3, 4, 2, 1, bias=False))


def pruned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def nested():
    first = parametrizations.weight_norm(nn.Conv1d(3, 8, 3))
    return nn.Sequential(first, parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))).eval()


@pytest.mark.filterwarnings("ignore")
def hooked():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.utils.spectral_norm(nn.Conv2d(3, 5, 3))).eval()


NETWORKS = {
    "resnext": lambda: nn.Sequential(nn.Conv2d(3, 64, 7), nn.BatchNorm2d(64), Block(64, 256, 128, 32), Block(256, 256, 128, 32)),
    "resnext of another layer's width": lambda: nn.Sequential(nn.Conv2d(3, 64, 7), nn.Conv2d(64, 32, 1), Block(32, 256, 256, 4)),
    "fire": lambda: nn.Sequential(nn.Conv2d(3, 64, 3), Fire(64, 16, 64), Fire(128, 16, 64), nn.Conv2d(128, 10, 1)),
    "mobilenet": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), Inverted(16, 64, 24), Inverted(24, 96, 24)
    ),
    "depthwise on one channel": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    ),
    "channel multiplier": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)),
    "one channel": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4)),
    "audio": lambda: nn.Sequential(nn.Conv1d(1, 16, 10), nn.GELU(), nn.Conv1d(16, 16, 3), nn.Conv1d(16, 16, 8, groups=4)),
    "three dimensions": lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 8, 3, groups=8), nn.Conv3d(8, 4, 1)),
    "unet": UNet,
    "generator": generator,
    "grouped transposed": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 2, groups=2)),
    "gpt": Gpt,
    "layer norm of two dimensions": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((6, 8)), nn.LayerNorm((2, 6, 8))),
    "attention": lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.MultiheadAttention(16, 2, kdim=8, vdim=4)),
    "pruned": pruned,
    "weight and spectral normalisation": nested,
    "the same by hooks": hooked,
    "head of a dense network": lambda: nn.Sequential(nn.Linear(8, 64, bias=False), nn.Linear(64, 8)),
    "double": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)).double(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_gives_the_rows_of_its_model(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    assert ok.report(model.state_dict()).rows == ok.report(model).rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_so_does_an_architecture_with_its_weights(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    torch.manual_seed(1)
    other = NETWORKS[name]()
    report = ok.report(model.state_dict(), like=other)
    assert report.rows == ok.report(model).rows
    assert not [note for note in report.notes if "guess" in note or "sizes" in note]


@pytest.mark.parametrize("name", ["mobilenet", "resnext", "gpt", "unet"])
def test_rows_do_not_depend_on_the_order_of_entries(name):
    state = NETWORKS[name]().state_dict()
    ordered = {row["layer"]: row for row in ok.report(state).rows}
    assert {row["layer"]: row for row in ok.report({key: state[key] for key in sorted(state, key=natural)}).rows} == ordered


def test_guesses_are_named():
    notes = " ".join(layers_of(NETWORKS["mobilenet"]().state_dict()).notes)
    assert "read as grouped by their sizes: 2.conv_dw, 3.conv_dw" in notes
    assert "read as Conv1D" in " ".join(layers_of(Gpt().state_dict()).notes)
    undecided = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, bias=False))
    assert "perhaps misread: 1" in " ".join(layers_of(undecided.state_dict()).notes)


def test_what_is_not_read_is_named_with_its_share():
    model = nn.Sequential(nn.LSTM(4, 5), nn.Linear(5, 3), nn.Embedding(100, 8, _freeze=True))
    state = model.state_dict() | {"experts.gate_up_proj": torch.ones(2, 4, 4)}
    note = next(note for note in layers_of(state).notes if note.startswith("not read"))
    assert "1 weight_ih_l0, 1 weight_hh_l0" in note
    assert "1 gate_up_proj" in note
    assert note.endswith("(212 of 1,027 weights)")


def test_parametrizations_that_are_not_recorded_are_named():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4))
    notes = " ".join(layers_of(model.state_dict()).notes)
    assert "0.weight (parametrized in a way that is not recorded)" in notes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "_forward_module."])
def test_prefixes_of_wrappers(prefix):
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)).state_dict()
    assert list(bare({f"{prefix}{key}": value for key, value in state.items()})) == list(state)
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)).state_dict()
    assert [row["layer"] for row in ok.report(averaged).rows] == ["Linear"]
    assert list(bare({"module.a": 1, "head": 2})) == ["module.a", "head"]  # a module of that name


def test_like():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 8, 3, groups=4, bias=False))
    state = {"epoch": 1, "net": {f"module.{key}": value for key, value in model.state_dict().items()}}
    with torch.device("meta"):
        blank = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.Linear(2, 3))
    report = ok.report(state, like=blank)
    assert report.rows == ok.report(model).rows
    assert "not in the file, left out: 2.weight, 2.bias" in report.notes
    with pytest.raises(ValueError, match=r"does not fit Sequential: 0.weight is \(8, 4, 3, 3\), not \(4, 4, 3, 3\)"):
        ok.report(state, like=nn.Sequential(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match="no entry of the state dict belongs to Linear"):
        ok.report(state, like=nn.Linear(2, 3))
    with pytest.raises(TypeError, match="go with a state dict"):
        ok.report(model, like=model)


def test_tied_weights_of_an_architecture_stay_tied():
    model = Gpt()
    state = model.state_dict()
    del state["lm_head.weight"]
    assert ok.report(state, like=Gpt()).rows == ok.report(model).rows
