"""The lab's networks: sizes and costs against published ones, and what the blocks compute."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.lab.networks.blocks import NORMS
from orthokit.lab.networks.measures import flops
from orthokit.lab.networks.registry import NETWORKS, build
from orthokit.lab.networks.resnet import SHORTCUTS, BasicBlock, Bottleneck, ImageNetResNet, PadShortcut, ResNet
from orthokit.lab.networks.wide_resnet import WideBlock, WideResNet
from orthokit.lab.own import Code, function


def option_a(depth):
    return ResNet(depth, shortcut="identity")


# Millions of parameters as published: table 6 of He et al. 2015 (option A), table 4 of Zagoruyko & Komodakis 2016; for
# projections and the 3x3 stem, which the papers do not have, the exact counts of github.com/osmr/imgclsmob and
# github.com/kuangliu/pytorch-cifar. Millions of multiply-adds: option A from github.com/lmbxmu/HRank, 0.56G and 1.55G as
# commonly quoted, the others from osmr/imgclsmob, which counts normalisation and activations too: hence the tolerance.
PUBLISHED = [
    (option_a, (20,), 269_722, "0.27", None),
    (option_a, (32,), 464_154, "0.46", None),
    (option_a, (44,), 658_586, "0.66", None),
    (option_a, (56,), 853_018, "0.85", 125.49),
    (option_a, (110,), 1_727_962, "1.7", 252.89),
    (option_a, (1202,), 19_421_274, "19.4", None),
    (ResNet, (20,), 272_474, "0.272474", 41.29),
    (ResNet, (56,), 855_770, "0.855770", 127.06),
    (ResNet, (110,), 1_730_714, "1.730714", 255.70),
    (ImageNetResNet, (18,), 11_173_962, "11.173962", 560),
    (ImageNetResNet, (34,), 21_282_122, "21.282122", None),
    (ImageNetResNet, (50,), 23_520_842, "23.520842", None),
    (ImageNetResNet, (101,), 42_512_970, "42.512970", None),
    (WideResNet, (40, 1), 563_930, "0.6", None),
    (WideResNet, (40, 2), 2_243_546, "2.2", None),
    (WideResNet, (40, 4), 8_949_210, "8.9", None),
    (WideResNet, (40, 8), 35_748_314, "35.7", 5176.90),
    (WideResNet, (16, 8), 10_961_370, "11.0", 1550),
    (WideResNet, (16, 10), 17_116_634, "17.1", 2414.04),
    (WideResNet, (22, 8), 17_158_106, "17.2", None),
    (WideResNet, (28, 10), 36_479_194, "36.5", 5246.98),
    (WideResNet, (28, 12), 52_517_850, "52.5", None),
]


@pytest.mark.parametrize(
    ("make", "arguments", "parameters", "published", "cost"), PUBLISHED, ids=[f"{row[0].__name__}{row[1]}" for row in PUBLISHED]
)
def test_published_sizes_and_costs(make, arguments, parameters, published, cost):
    with torch.device("meta"):
        network = make(*arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters
    digits = len(published.partition(".")[2])
    assert f"{parameters / 1e6:.{digits}f}" == published
    if cost is not None:
        assert flops(network, (3, 32, 32)) / 1e6 == pytest.approx(cost, rel=0.015 if make is ResNet else 0.01)


SMALL = {
    "resnet": {"depth": 8},
    "resnet identity": {"depth": 8, "shortcut": "identity"},
    "imagenet_resnet 18": {"depth": 18},
    "imagenet_resnet 50": {"depth": 50},
    "wide_resnet": {"depth": 10, "width": 2, "dropout": 0.2},
    "wide_resnet thin": {"depth": 10, "width": 1},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward(name, norm):
    network = build(name.split()[0], channels=2, classes=7, norm=norm, **SMALL[name])
    logits = network(torch.randn(4, 2, 16, 16))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in network.parameters())
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
    assert kinds == {"batch": {nn.BatchNorm2d}, "group": {nn.GroupNorm}, "none": set()}[norm]
    assert all((m.bias is not None) == (norm == "none") for m in network.modules() if isinstance(m, nn.Conv2d))


def test_every_network_is_tested():
    assert {name.split()[0] for name in SMALL} == set(NETWORKS)


def test_group_sizes():
    groups = [m for m in ImageNetResNet(50, norm="group").modules() if isinstance(m, nn.GroupNorm)]
    sizes = {m.num_channels: m.num_groups for m in groups}
    assert sizes == {64: 8, 128: 16, 256: 32, 512: 32, 1024: 32, 2048: 32}
    with pytest.raises(ValueError, match="needs layers whose filters 32 groups divide; got 272 filters"):
        WideResNet(10, 17, norm="group")


@pytest.mark.parametrize(
    ("network", "over"),
    [
        (ResNet(8), ["blocks.1.shortcut.0", "blocks.2.shortcut.0"]),
        (ResNet(8, shortcut="identity"), []),
        (ResNet(8, channels=1, shortcut="identity"), ["conv"]),
        (ImageNetResNet(18), ["conv", *(f"blocks.{k}.shortcut.0" for k in (2, 4, 6))]),
        (WideResNet(10, 2), [f"blocks.{k}.shortcut" for k in range(3)]),
        (WideResNet(10, 10), ["blocks.0.conv1", *(f"blocks.{k}.shortcut" for k in range(3))]),
    ],
    ids=["projection", "identity", "gray", "imagenet", "wide", "wider"],
)
def test_over_determined_layers(network, over):
    assert [row["layer"] for row in ok.plan(network, None, where=ok.convs).rows if row["shape"] == "tall"] == over


def test_over_determined_layers_of_bottlenecks():
    over = [row["layer"] for row in ok.plan(ImageNetResNet(50), None, where=ok.convs).rows if row["shape"] == "tall"]
    assert set(over) == {"conv", *(f"blocks.{k}.conv3" for k in range(16)), *(f"blocks.{k}.shortcut.0" for k in (0, 3, 7, 13))}


@pytest.mark.parametrize(("stride", "extra", "size"), [(1, 0, 4), (2, 3, 4), (2, 2, 5), (1, 5, 3)])
def test_identity_shortcut_equals_its_slow_twin(stride, extra, size):
    x = torch.randn(2, 3, size, size)
    twin = torch.zeros(2, 3 + extra, -(-size // stride), -(-size // stride))
    for n in range(2):
        for channel in range(3):
            for row in range(0, size, stride):
                for column in range(0, size, stride):
                    twin[n, channel, row // stride, column // stride] = x[n, channel, row, column]
    assert torch.equal(PadShortcut(stride, extra)(x), twin)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck, WideBlock])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_without_its_last_convolution_is_the_shortcut(make, stride, norm):
    block = make(16, 32, stride, norm=norm)
    last = block.conv3 if make is Bottleneck else block.conv2
    for p in last.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 16, 6, 6)
    expected = block.shortcut(F.relu(block.bn1(x))) if make is WideBlock else F.relu(block.shortcut(x))
    assert expected.shape == (2, 32, 6 // stride, 6 // stride)
    assert torch.equal(block(x), expected)


def test_identity_blocks_keep_the_strided_input():
    block = BasicBlock(4, 8, 2, shortcut="identity").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(block(x)[:, :4], F.relu(x)[..., ::2, ::2])
    assert not block(x)[:, 4:].any()
    same = WideBlock(4, 4, 1).eval()
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_dropout_is_for_training():
    network = WideResNet(10, 1, dropout=0.5)
    x = torch.randn(4, 3, 8, 8)
    network(x)  # so that the statistics differ from their start
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    plain = WideResNet(10, 1)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain.eval()(x), network(x))
    assert torch.equal(plain.train()(x), plain(x))


@pytest.mark.parametrize("make", [lambda: ImageNetResNet(18), lambda: WideResNet(10, 4, norm="none")], ids=["imagenet", "wide"])
def test_initialisation(make):
    for module in make().modules():
        if isinstance(module, nn.Conv2d):
            o, _, height, width = module.weight.shape
            assert module.weight.std().item() == pytest.approx((2 / (o * height * width)) ** 0.5, rel=0.15)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()


def test_initialisation_of_resnet_is_that_of_pytorch():
    torch.manual_seed(5)
    network = ResNet(8)
    torch.manual_seed(5)
    assert torch.equal(network.conv.weight, nn.Conv2d(3, 16, 3, bias=False).weight)


def test_names_of_parameters():
    # Saved checkpoints depend on these.
    block = ["conv1", "bn1", "conv2", "bn2"]
    layers = ["conv", "bn", *(f"blocks.0.{name}" for name in block)]
    layers += [f"blocks.{k}.{name}" for k in (1, 2) for name in [*block, "shortcut.0", "shortcut.1"]]
    assert list(dict.fromkeys(key.rpartition(".")[0] for key in ResNet(8).state_dict())) == [*layers, "fc"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_from_checkpoint(shortcut, norm):
    network = ResNet(14, 2, 7, shortcut=shortcut, norm=norm)
    x = torch.randn(2, 2, 8, 8)
    network(x)
    again = ResNet.from_checkpoint({"model": {f"module.{key}": value for key, value in network.state_dict().items()}})
    assert str(again) == str(network)
    assert torch.equal(again.eval()(x), network.eval()(x))


@pytest.mark.parametrize("network", [ImageNetResNet(18), WideResNet(10, 1), nn.Linear(2, 2)], ids=lambda m: type(m).__name__)
def test_other_checkpoints(network):
    with pytest.raises(ValueError, match=r"not the weights of orthokit\.lab\.networks\.resnet\.ResNet"):
        ResNet.from_checkpoint(network.state_dict())


def test_flops_count_multiply_adds_once():
    # 5 filters of 3x3x2 at 4x4 pixels, then 5 x 10.
    network = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10))
    assert flops(network, (2, 4, 4)) == 5 * 18 * 16 + 50
    assert flops(nn.ReLU(), (3,)) == 0
    assert flops(network.double(), [2, 4, 4]) == 5 * 18 * 16 + 50


def test_flops_leave_the_model_as_it_was():
    network = WideResNet(10, 1, dropout=0.5)
    network.blocks[1].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes, random_state = [m.training for m in network.modules()], torch.get_rng_state()
    flops(network, (3, 8, 8))
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(RuntimeError):
        flops(network, (4, 8, 8))
    assert [m.training for m in network.modules()] == modes


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResNet(10), ValueError, r"depth must be 6 b \+ 2 .*; got 10"),
        (lambda: ResNet(2), ValueError, "depth must be an integer, at least 8; got 2"),
        (lambda: ResNet(8.0), TypeError, "depth must be an integer"),
        (lambda: ResNet(8, 0), ValueError, "channels must be an integer, at least 1"),
        (lambda: ResNet(8, classes=0), ValueError, "classes must be an integer, at least 1"),
        (lambda: ResNet(8, norm="layer"), ValueError, "norm must be one of 'batch', 'group', 'none'; got 'layer'"),
        (lambda: ResNet(8, shortcut="A"), ValueError, "shortcut must be one of 'projection', 'identity'; got 'A'"),
        (lambda: ImageNetResNet(20), ValueError, "depth must be one of 18, 34, 50, 101; got 20"),
        (lambda: WideResNet(20), ValueError, r"depth must be 6 b \+ 4 .*; got 20"),
        (lambda: WideResNet(4), ValueError, "depth must be an integer, at least 10; got 4"),
        (lambda: WideResNet(10, 0), ValueError, "width must be an integer, at least 1; got 0"),
        (lambda: WideResNet(10, 1, dropout=2), ValueError, r"dropout must be a finite number in \[0, 1\]; got 2"),
    ],
)
def test_bad_arguments(unchecked, make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module, importable for the length of a test under a name of its own."""
    name = f"mine_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def linear(channels, classes, *, size=8, bias=True):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes, bias))\n"
        "def anything(**options):\n"
        "    return linear(**options)\n"
        "def grey(classes):\n"
        "    return nn.Linear(1, classes)\n"
        "def forgot(channels, classes):\n"
        "    linear(channels, classes)\n"
        "size = 3\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("import no_such_library\n")
    (tmp_path / f"{name}_bad.py").write_text("def f(:\n")
    (tmp_path / f"{name}_exits.py").write_text("raise SystemExit(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def built(kind, options):
    own = function(kind, Code()) if ":" in kind else None
    return build(kind, own, channels=2, classes=5, **options)


@pytest.mark.parametrize("name", ["linear", "anything"])
def test_ones_own_network(mine, name):
    network = built(f"{mine}:{name}", {"size": 4, "bias": False})
    assert network(torch.randn(3, 2, 4, 4)).shape == (3, 5)
    assert network[1].bias is None
    with pytest.raises(ValueError, match="no network 'mine"):
        build(f"{mine}:{name}", channels=2, classes=5)  # imports nothing


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("reset", {}, ValueError, "no network 'reset'; did you mean 'resnet'"),
        (
            "vgg",
            {},
            ValueError,
            "no network 'vgg'; there are 'resnet', 'imagenet_resnet', 'wide_resnet' .module:function names one of your own",
        ),
        ("resnet", {"deph": 20}, ValueError, "resnet has no option 'deph'; did you mean 'depth'"),
        ("wide_resnet", {"k": 2}, ValueError, "wide_resnet has no option 'k'; there are 'depth', 'width', 'dropout', 'norm'$"),
        ("resnet", {"depth": 21}, ValueError, r"depth must be 6 b \+ 2"),
        (":linear", {}, ValueError, "named module:function, .*; got ':linear'"),
        ("{mine}.py:linear", {}, ValueError, r"no module 'mine_\d+\.py' for the network"),
        ("../mine:linear", {}, ValueError, "named module:function"),
        ("no_such_module_at_all:f", {}, ValueError, "no module 'no_such_module_at_all' .* on Python's path; move it there"),
        ("{mine}_bad:f", {}, ValueError, r"importing mine_\d+_bad for the network .* fails: SyntaxError: .*line 1"),
        ("{mine}_exits:f", {}, ValueError, "fails: SystemExit: 1"),
        ("{mine}_broken:f", {}, ModuleNotFoundError, "No module named 'no_such_library'"),
        ("{mine}:liner", {}, ValueError, r"module 'mine_\d+' \(.*\.py\) has no 'liner'; did you mean 'linear'"),
        ("{mine}:size", {}, TypeError, "must be a function that makes a network; got int"),
        ("{mine}:grey", {}, ValueError, "must take channels and classes; it takes no channels"),
        ("{mine}:linear", {"sise": 4}, ValueError, "has no option 'sise'; did you mean 'size'"),
        ("{mine}:forgot", {}, TypeError, r"must return a torch\.nn\.Module; got NoneType"),
        ("{mine}:forgot", {"size": 4}, ValueError, "has no option 'size'; there are none"),
    ],
)
def test_bad_builds(mine, kind, options, error, message):
    with pytest.raises(error, match=message):
        built(kind.format(mine=mine), options)


def test_bottlenecks_have_tall_layers_and_come_back_from_their_weights():
    network = ResNet(29, block="bottleneck")
    assert len(ok.select(network)) == 31
    tall = ok.select(network, ok.tall)
    assert len(tall) == 12
    assert sum(layer.kernel.o == 4 * layer.kernel.n for layer in tall) == 10
    again = ResNet.from_checkpoint(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network.eval()(x), again.eval()(x))
    with pytest.raises(ValueError, match=r"depth must be 9 b \+ 2 for b bottleneck blocks"):
        ResNet(26, block="bottleneck")
    with pytest.raises(ValueError, match="projected shortcuts"):
        ResNet(29, block="bottleneck", shortcut="identity")


@pytest.mark.parametrize(("block", "tall"), [("basic", 2), ("bottleneck", 6)])
def test_narrow_networks_come_back_from_their_weights(block, tall):
    network = ResNet(11 if block == "bottleneck" else 8, 3, 10, block=block, filters=4)
    widths = {module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)}
    assert widths == ({4, 8, 16} if block == "basic" else {4, 8, 16, 32, 64})
    assert len(ok.Regularizer(network, ok.SO(), strength=1.0, where=ok.convs & ok.tall).layers) == tall
    again = ResNet.from_checkpoint(network.state_dict())
    assert str(again) == str(network)
    with pytest.raises(ValueError, match="filters"):
        ResNet(8, filters=0)
