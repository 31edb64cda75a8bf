"""Ranks from data: the numbers against a plain PCA, and the model as it was."""

import copy
import gc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel
from torch.utils.data import DataLoader, TensorDataset

import orthokit as ok
from orthokit.cli import main
from orthokit.estimate import Moments, components, orthonormal_filters
from orthokit.lab.networks.resnet import ResNet


def rank_of(vectors, energy):
    """Principal components of the rows of ``vectors`` by their singular values, largest first."""
    vectors = np.asarray(vectors, np.float64)
    variances = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    held = 0.0
    for r, variance in enumerate(variances, 1):
        held += variance
        if held >= energy * variances.sum():
            return r
    return len(variances)


def replaced(layer, seed=0):
    """A copy of ``layer`` with the filters that an estimate uses, written into its own weight."""
    kernel = ok.kernel_of(layer)
    filters = orthonormal_filters(kernel.groups, kernel.o, kernel.n, torch.Generator().manual_seed(seed))
    twin = copy.deepcopy(layer)
    ok.kernel_of(twin).weight.data.copy_(filters.reshape(kernel.weight.shape))  # a view of the weight
    return twin


LAYERS = {
    "linear": (nn.Linear(6, 4), (40, 6)),
    "tall linear": (nn.Linear(3, 8), (40, 3)),
    "linear over a sequence": (nn.Linear(6, 5), (9, 4, 3, 6)),
    "linear without samples": (nn.Linear(6, 5), (6,)),
    "conv1d": (nn.Conv1d(3, 5, 3, stride=2, padding=1), (20, 3, 9)),
    "conv1d, one sample": (nn.Conv1d(3, 5, 3), (3, 40)),
    "conv2d": (nn.Conv2d(3, 10, 3, padding=(1, 0), dilation=(1, 2)), (20, 3, 6, 7)),
    "conv2d, same": (nn.Conv2d(2, 6, (1, 3), padding="same", bias=False), (20, 2, 5, 5)),
    "conv2d, reflect": (nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), (20, 2, 5, 5)),
    "tall conv2d": (nn.Conv2d(3, 16, 1), (20, 3, 4, 4)),
    "conv2d in groups": (nn.Conv2d(6, 8, 3, groups=2), (20, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (20, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 6, (1, 2, 3)), (20, 2, 3, 3, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(3, 5, 4, stride=2, output_padding=1), (20, 3, 5)),
    "transposed conv2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2), (20, 6, 4, 4)),
    "transposed conv3d": (nn.ConvTranspose3d(2, 4, 2), (20, 2, 3, 2, 2)),
}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_against_a_plain_pca(kind, energy):
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double()
    kernel = ok.kernel_of(layer)
    x = torch.randn(shape, dtype=torch.float64)
    x = x * torch.linspace(0.1, 1.5, shape[-1]) + 3  # neither white nor centred
    batches = [x] if x.ndim == 1 or "one sample" in kind else x.split(7)
    if x.ndim == 1:
        batches = [x, 2 * x, x.flip(0), x.square()]
    with torch.no_grad():
        outputs = [replaced(layer)(batch) for batch in batches]
    places = len(kernel.stride)
    rows = torch.cat([y.movedim(-1 - places, -1).reshape(-1, kernel.groups * kernel.o) for y in outputs])
    groups = rows.reshape(-1, kernel.groups, kernel.o).unbind(1)
    expected = max(rank_of(group, energy) for group in groups)
    with nullcontext() if len(rows) > min(kernel.o, kernel.n) else pytest.warns(UserWarning, match="more batches"):
        actual = ok.estimate(nn.Sequential(layer), batches, energy, where=ok.layers, positions=None)
    assert actual == {"0": expected}
    assert type(actual["0"]) is int


def test_tall_layers_are_measured_by_their_patches_whatever_the_filters():
    x = F.interpolate(torch.randn(30, 2, 3, 3, dtype=torch.float64), size=8, mode="bilinear")
    patches = F.unfold(x, 3).mT.reshape(-1, 18)
    for energy in (0.5, 0.9, 0.99):
        for seed in (0, 1):
            actual = ok.estimate(nn.Conv2d(2, 30, 3).double(), [x], energy, seed=seed)
            assert actual == {"Conv2d": rank_of(patches, energy)}


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_planted_rank_is_found(rank):
    directions = torch.linalg.qr(torch.randn(16, rank)).Q
    batches = [torch.einsum("br...,cr->bc...", torch.randn(50, rank, 4, 4), directions) + 5]
    model = nn.Sequential(nn.Conv2d(16, 12, 1))
    assert ok.estimate(model, batches, 0.999) == {"0": rank}
    assert ok.estimate(model, batches, 1.0) == {"0": rank}  # float32 rounding is no dimension


def test_the_group_that_needs_most_stands_for_all():
    x = torch.randn(50, 12, 3, 3)
    x[:, 1:4] = x[:, :1]
    x[:, 4:7] = x[:, 7:8]
    x[:, 11] = x[:, 10] + x[:, 9]  # groups of rank 1, 1 and 3
    assert ok.estimate(nn.Conv2d(12, 12, 1, groups=3), [x], 0.9999) == {"Conv2d": 3}
    assert ok.estimate(nn.Conv2d(12, 12, 1, groups=3), [x.flip(1)], 0.9999) == {"Conv2d": 3}


def test_it_does_not_follow_the_rank_of_the_layer_itself():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 8, 3))
    batches = [torch.randn(40, 3, 9, 9)]
    before = ok.estimate(model, batches)
    collapsed = model[2].weight.data
    collapsed[1:] = collapsed[0]
    assert ok.estimate(model, batches) == before
    model[0].weight.data[1:] = model[0].weight.data[0]
    model[0].bias.data.zero_()
    after = ok.estimate(model, batches)
    assert after["0"] == before["0"]
    assert after["2"] < before["2"]


def test_scale_and_bias_play_no_part():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(40, 3, 6, 6)
    actual = ok.estimate(model, [x])
    nn.init.constant_(model[0].weight, 7.0)
    nn.init.constant_(model[0].bias, 1e3)
    assert ok.estimate(model, [x]) == ok.estimate(model, [100 * x]) == actual


def test_more_energy_more_components_and_constant_outputs_none():
    x = torch.randn(60, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    ranks = [ok.estimate(nn.Linear(6, 6), [x], e, where=ok.linears)["Linear"] for e in (0.01, 0.5, 0.9, 0.99, 1)]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (1, 6)
    for value in (0.0, 0.1, -1e5):
        assert ok.estimate(nn.Linear(6, 6), [torch.full((60, 6), value)], 1.0, where=ok.linears) == {"Linear": 1}


@pytest.mark.parametrize(("o", "n"), [(4, 9), (9, 4), (5, 5), (1, 3), (3, 1)])
def test_orthonormal_filters(o, n):
    filters = orthonormal_filters(3, o, n, torch.Generator().manual_seed(0))
    assert filters.shape == (3, o, n)
    side = filters @ filters.mT if o <= n else filters.mT @ filters * (n / o)
    assert torch.allclose(side, torch.eye(min(o, n), dtype=torch.float64).expand_as(side))
    assert filters.square().sum(-1).mean().item() == pytest.approx(1)
    assert not torch.allclose(filters[0], filters[1])


def test_filters_are_uniformly_rotated():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([orthonormal_filters(1, 2, 2, generator)[0] for _ in range(2000)])
    assert draws.mean(0).abs().max() < 4 * (0.5 / 2000) ** 0.5  # each entry has variance 1 / 2


def test_moments_in_pieces_equal_those_at_once(monkeypatch):
    vectors = torch.randn(101, 3, 4, dtype=torch.float64) + 1e4
    monkeypatch.setitem(Moments.add.__globals__, "CHUNK", 100)
    moments = Moments(3, 4)
    for part in (vectors[:1], vectors[1:1], vectors[1:70], vectors[70:]):
        moments.add(part)
    for group in range(3):
        assert np.allclose(moments.mean[group], vectors[:, group].mean(0))
        assert np.allclose(moments.covariance[group], np.cov(vectors[:, group].T, bias=True), rtol=1e-9, atol=1e-12)


def test_moments_of_vectors_that_differ_by_rounding_only():
    moments = Moments(2, 3)
    vectors = torch.ones(50, 2, 3)
    vectors[:, 0] -= 1e-8 * torch.randn(50, 3).sign()
    vectors[::2, 1] += 1e-4
    moments.add(vectors.double() - torch.rand(50, 2, 3) * 1e-9)
    assert moments.covariance[0].eq(0).all()
    assert components(moments.covariance, 1.0).tolist() == [1, 1]
    assert moments.covariance[1].diagonal().min() > 0


def test_components_over_a_batch():
    actual = components(torch.diag_embed(torch.tensor([[5.0, 4.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])), 0.9)
    assert actual.tolist() == [2, 3, 1]


def test_memory_is_bounded():
    """Neither batches nor outputs are kept: what lives at a batch is what lived at the second one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    alive = []

    def loader():
        for _ in range(8):
            alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
            yield torch.randn(10, 3, 12, 12)

    ok.estimate(model, loader())
    assert len(set(alive[2:])) == 1, alive
    moments = Moments(2, 5)
    for _ in range(10):
        moments.add(torch.randn(1000, 2, 5))
    assert sum(value.numel() for value in vars(moments).values() if isinstance(value, torch.Tensor)) == 2 * 5 + 2 * 5 * 5


def test_large_maps_are_sampled():
    smooth = F.interpolate(torch.randn(40, 4, 5, 5), size=40, mode="bicubic")
    model = nn.Sequential(nn.Conv2d(4, 16, 3))
    everything = ok.estimate(model, [smooth], positions=None)["0"]
    sampled = [ok.estimate(model, smooth.split(20), positions=50, seed=0)["0"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert abs(sampled[0] - everything) <= 1
    few = torch.zeros(3, 4, 40, 40)
    few[:, :, :20] = torch.randn(3, 4, 20, 40)
    with pytest.warns(UserWarning, match="layer '0': 3 outputs fill less than 3 of 16 dimensions"):
        assert ok.estimate(model, [few], 1.0, positions=1)["0"] <= 2


def test_layers_used_twice_count_every_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            self.conv(x[:, :4])
            return self.conv(input=x[:, 4:])

    x = torch.zeros(50, 8, 6)
    x[:, 1], x[:, 6] = torch.randn(2, 50, 6)  # one dimension in either use, another in each
    assert ok.estimate(Twice(), [x], 0.99) == {"conv": 2}


def test_a_given_output_size():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 2, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(9, 9)) + self.up(x, (9, 9))

    assert ok.estimate(Up(), [torch.randn(20, 2, 4, 4)], 1.0) == {"up": 3}


def test_results_feed_ranks_and_plan():
    model = ResNet(depth=8, channels=1)
    r = ok.estimate(model, torch.randn(64, 1, 8, 8).split(32))
    rows = ok.plan(model, ok.ranks(r)).rows
    assert [row["r"] for row in rows] == list(r.values())
    assert all(1 <= row["r"] <= min(row["o"], row["n"]) for row in rows)
    assert ok.estimate(model, torch.randn(64, 1, 8, 8).split(32), where=ok.pointwise).keys() == {
        "blocks.1.shortcut.0",
        "blocks.2.shortcut.0",
    }


def test_a_layer_does_not_depend_on_which_others_are_measured():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(30, 3, 30, 30)
    assert ok.estimate(model, [x], where=ok.matching("2"), positions=20)["2"] == ok.estimate(model, [x], positions=20)["2"]


def test_loaders():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3)), torch.randn(12, 1, 6, 6)
    expected = ok.estimate(model, [x])
    data = DataLoader(TensorDataset(x, torch.zeros(12)), batch_size=5, shuffle=True)
    assert ok.estimate(model, data) == expected
    assert ok.estimate(model, [{"image": x, "label": 0}], key="image") == expected
    assert ok.estimate(model, [(0, x)], key=1) == ok.estimate(model, iter([[x]])) == expected
    read = iter([x[:6], x[6:], "no batch"])
    assert ok.estimate(model, read, batches=2) == expected
    assert next(read) == "no batch"


def test_wrappers_are_looked_through():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(12, 1, 6, 6)
    expected = ok.estimate(model, [x])
    assert ok.estimate(DataParallel(model), [x]) == expected
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert ok.estimate(compiled, [x]) == expected
    assert ok.estimate(nn.Sequential(compiled), [x]) == {f"0.{name}": r for name, r in expected.items()}
    compiled(x)


def test_half_precision_and_autocast():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(30, 3, 6, 6)
    expected = ok.estimate(model, [x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ok.estimate(model, [x]) == expected
    low = ok.estimate(copy.deepcopy(model).bfloat16(), [x.bfloat16()])
    assert abs(low["0"] - expected["0"]) <= 1
    with torch.inference_mode():
        assert ok.estimate(model, [x]) == expected


class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
        self.norm = nn.BatchNorm2d(4)
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.old = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
        self.older = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))
        self.lazily = nn.BatchNorm2d(4, momentum=None)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.count = 0
        self.norm.eval()
        self.fail = False

    def forward(self, x):
        self.calls += 1
        self.last = x.mean((0, 2, 3))
        self.count += 1
        self.kept = x
        x = self.older(self.old(self.norm(self.first(x))))
        if self.fail:
            raise RuntimeError("on purpose")
        return F.dropout(self.lazily(x), 0.5, training=True)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_exactly_as_it_was(fail):
    model = Restless()
    seen = []
    model.old.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(4, 2, 8, 8)).sum().backward()
    model.older.weight_orig.requires_grad_(False)
    model.fail = fail
    x = torch.randn(8, 2, 8, 8)

    def everything():
        hooks = {
            (name, kind): list(value.items())
            for name, m in model.named_modules()
            for kind, value in vars(m).items()
            if "_hooks" in kind and isinstance(value, dict)
        }
        objects = {(name, key): id(value) for name, m in model.named_modules() for key, value in vars(m).items()}
        tensors = {(name, key): id(value) for name, m in model.named_modules() for key, value in m._buffers.items()}
        asks = {name: (p.requires_grad, p.grad is None or p.grad.clone()) for name, p in model.named_parameters()}
        modes = {name: m.training for name, m in model.named_modules()}
        return hooks, objects, tensors, modes, {name: a for name, (a, _) in asks.items()}, {n: g for n, (_, g) in asks.items()}

    state = copy.deepcopy(model.state_dict())
    *before, grads = everything()
    generator = torch.get_rng_state()
    enabled = torch.is_grad_enabled()

    def loader():
        torch.rand(5)
        yield from (x, x)

    if fail:
        with pytest.raises(RuntimeError, match="on purpose"):
            ok.estimate(model, loader())
    else:
        assert ok.estimate(model, loader()).keys() == {"first", "old", "older"}
    *after, grads_after = everything()
    assert after == before
    assert torch.is_grad_enabled() == enabled
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert grads.keys() == grads_after.keys()
    for name, grad in grads.items():
        same = grads_after[name]
        assert same is grad is True or torch.equal(same, grad)
    assert seen  # the caller's own hooks ran


def test_the_model_runs_in_evaluation_mode_without_gradients():
    class Look(nn.Conv2d):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    seen = []
    ok.estimate(nn.Sequential(Look(1, 2, 1)).train(), [torch.randn(4, 1, 3, 3)])
    assert seen == [(False, False)]


def test_layers_that_are_not_called():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, 1)

        def forward(self, x):
            return self.used(x)

    x = torch.randn(9, 2, 5)
    with pytest.warns(UserWarning, match="never called, and left out: 'aside'"):
        assert ok.estimate(Part(), [x]).keys() == {"used"}
    with pytest.raises(ValueError, match="no selected layer was called in 1 batches: 'aside'"):
        ok.estimate(Part(), [x], where=ok.matching("aside"))


def test_attention_is_not_run_past_its_layers():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    where = ok.linears & ~ok.matching("self_attn.*")
    assert ok.estimate(block, [torch.randn(20, 5, 8)], where=where).keys() == {"linear1", "linear2"}


def test_not_a_number_names_the_layer():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(8, 1, 3, 3)
    with pytest.raises(FloatingPointError, match="layer '0': NaN or infinite activations"):
        ok.estimate(model, [x, x * float("inf")])
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(FloatingPointError, match="layer '2': NaN"):
        ok.estimate(model, [x])
    assert not model[2]._forward_hooks


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"loader": []}, "the loader gave no batch"),
        (ValueError, {"energy": 0.0}, r"energy must be a finite number in \(0, 1\]; got 0.0"),
        (ValueError, {"energy": 1.01}, "energy"),
        (ValueError, {"energy": float("nan")}, "energy"),
        (TypeError, {"energy": "all"}, "energy must be a number"),
        (TypeError, {"loader": ["a", "b"]}, "batch 0 gave a str"),
        (TypeError, {"loader": "ab"}, "iterable of batches .* got a str"),
        (TypeError, {"loader": torch.zeros(4, 1, 3, 3)}, r"iterable of batches such as \[images\]"),
        (TypeError, {"loader": 3}, "got a int"),
        (TypeError, {"loader": [{"x": torch.zeros(1)}]}, "pick it by key=, one of 'x'"),
        (ValueError, {"loader": [{"x": torch.zeros(1)}], "key": "y"}, "batch 0, a dict, has no entry key='y'"),
        (TypeError, {"loader": [()]}, "batch 0 gave a tuple"),
        (ValueError, {"batches": 0}, "batches must be an integer, at least 1"),
        (ValueError, {"positions": 0}, "positions"),
        (TypeError, {"seed": 0.5}, "seed"),
        (TypeError, {"model": {"a.weight": torch.zeros(2, 2, 1, 1)}}, "must be a torch.nn.Module, which runs on the data"),
        (TypeError, {"model": nn.Conv2d}, "must be a torch.nn.Module"),
        (ValueError, {"model": nn.ReLU()}, "selects no layer"),
        (TypeError, {"where": "convs"}, "where must be a predicate"),
        (ValueError, {"model": nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.LazyLinear(3))}, "run one batch through it"),
    ],
)
def test_bad_input(unchecked, error, change, message):
    arguments = {"model": nn.Sequential(nn.Conv2d(1, 4, 1)), "loader": [torch.randn(8, 1, 3, 3)]} | change
    with pytest.raises(error, match=message):
        ok.estimate(**arguments)


def test_a_registered_layer_is_refused():
    class Own(nn.Linear):
        pass

    @ok.kernel_of.register
    def _(layer: Own) -> ok.Kernel:
        return ok.Kernel(layer.weight.T.unsqueeze(0))

    model = nn.Sequential(Own(3, 3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="layer '0': a Own with a kernel view of its own is not supported"):
        ok.estimate(model, [torch.randn(9, 3)], where=ok.layers)
    assert ok.estimate(model, [torch.randn(9, 3)], 1.0, where=ok.matching("1")) == {"1": 3}


def test_the_bar_is_for_terminals(capsys, monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(4, 1, 3, 3)
    ok.estimate(model, [x])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    ok.estimate(model, iter([x, x]))
    out, err = capsys.readouterr()
    assert (out, "estimating ranks" in err) == ("", True)
    ok.estimate(model, [x], progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def saved(tmp_path):
    network = ResNet(depth=8, channels=1)
    torch.save({"model": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_plan_on_data(saved, capsys):
    from orthokit.lab.data.images import load

    assert main(["plan", str(saved), "--data", "digits", "--energy", "0.8", "--floor", "10", "--format", "csv"]) == 0
    network = ResNet.from_checkpoint(torch.load(saved))
    data = load("digits")
    actual = ok.estimate(network, [data.normalise(data.train.pixels)], 0.8)
    assert capsys.readouterr().out == ok.plan(network, ok.ranks(actual, floor=10)).to_csv()


@pytest.mark.parametrize("depth", [8, 20])
def test_a_network_from_its_checkpoint(depth):
    network = ResNet(depth, channels=2, classes=7).eval()
    again = ResNet.from_checkpoint({"epoch": 3, "state": network.state_dict()}).eval()
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(again(x), network(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits", "--share", ".1"], "choose one of"),
        (["--data", "cifar10"], "--data cifar10 and --root DIR go together"),
        (["--data", "digits", "--root", "."], "go together"),
        (["--energy", ".5"], "--energy does nothing without --data"),
        (["--data", "digits", "--energy", "2"], "energy must be a finite number in (0, 1]"),
        (["--data", "cifar10", "--root", "nowhere"], "no CIFAR-10 in nowhere"),
    ],
)
def test_bad_plans(saved, capsys, arguments, message):
    assert main(["plan", str(saved), *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "these are not the weights of orthokit.lab.networks.resnet.ResNet"),
        (ResNet(8, channels=3), "reads 3 channels; the images of digits have 1"),
    ],
)
def test_plans_of_other_networks(tmp_path, capsys, network, message):
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert main(["plan", str(tmp_path / "net.pt"), "--data", "digits"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_broken_weights_on_the_command_line(tmp_path, capsys):
    network = ResNet(8, channels=1)
    nn.init.constant_(network.conv.weight, float("nan"))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert main(["plan", str(tmp_path / "net.pt"), "--data", "digits"]) == 2
    assert "layer 'blocks.0.conv1': NaN or infinite" in capsys.readouterr().err.replace("\n", " ")
