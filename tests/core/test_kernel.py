"""The kernel view of every kind of layer, and that looking changes nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import orthokit as ok
from orthokit.kernel import Kernel, sources

VIEWS = [
    (nn.Linear(5, 3), (1, 3, 5)),
    (nn.Conv1d(4, 6, 3, groups=2), (2, 3, 6)),
    (nn.Conv2d(3, 8, (3, 2)), (1, 8, 18)),
    (nn.Conv2d(6, 6, 3, groups=6), (6, 1, 9)),
    (nn.Conv3d(2, 4, 2), (1, 4, 16)),
    (nn.ConvTranspose1d(4, 6, 3), (1, 6, 12)),
    (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (2, 3, 12)),
    (nn.ConvTranspose3d(2, 4, 2), (1, 4, 16)),
]


@pytest.mark.parametrize(("layer", "shape"), VIEWS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None)
def test_shape(layer, shape):
    kernel = ok.kernel_of(layer)
    assert kernel.matrix.shape == shape
    assert (kernel.groups, kernel.o, kernel.n) == shape


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)])
def test_a_row_is_what_makes_an_output_channel(layer):
    """Zeroing one row of the view silences exactly that output channel."""
    matrix = ok.kernel_of(layer).matrix
    assert matrix.norm().item() == pytest.approx(layer.weight.norm().item())
    with torch.no_grad():
        view = ok.kernel_of(layer).weight
        view[1, 2] = 0  # the third filter of the second group writes output channel 5
    out = layer(torch.randn(1, 4, 8, 8))
    silent = out.abs().sum((0, 2, 3)) == 0
    assert silent.tolist() == [False] * 5 + [True]


def test_a_layer_of_ones_own():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 7))

    with pytest.raises(TypeError, match=r"Spread has no kernel view; add one with @orthokit.kernel_of.register\(Spread\)"):
        ok.kernel_of(Spread())

    @ok.kernel_of.register
    def _(layer: Spread) -> Kernel:
        return Kernel(layer.table.unsqueeze(0))

    model = nn.Sequential(Spread(), nn.ReLU())
    ortho = ok.Regularizer(model, ok.SO(), strength=1.0, where=ok.layers)
    ortho().backward()
    assert model[0].table.grad is not None
    assert sources(model[0]) == (model[0].table,)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
def test_old_style_normalisations_are_fresh_and_untouched(norm):
    layer = norm(nn.Conv2d(3, 4, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0)
    for _ in range(2):  # a stale weight would be backpropagated through twice
        layer(torch.randn(2, 3, 8, 8)).sum().backward()
        before.update({name: value.clone() for name, value in layer.state_dict().items()})
        ortho().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with torch.no_grad():
        (layer.weight_g if norm is nn.utils.weight_norm else layer.weight_orig).mul_(3)
    if norm is nn.utils.weight_norm:
        assert ok.kernel_of(layer).matrix.detach().norm() == pytest.approx(3 * layer.weight.detach().norm().item())


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrizations(make):
    layer = make(nn.Linear(6, 4))
    layer.train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0, where=ok.linears)
    ortho().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(module.training for module in layer.modules())
    assert any(parameter.grad is not None for parameter in sources(layer))
    assert {id(p) for p in sources(layer)} == {id(p) for n, p in layer.named_parameters() if "parametrizations" in n}


def test_a_parametrization_is_read_outside_autocast():
    class Twice(nn.Module):
        def forward(self, weight):
            return weight @ torch.eye(weight.shape[-1])

    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Twice())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ok.select(layer, ok.linears)[0].kernel.weight.dtype == torch.float32


def test_stack_carries_the_ranks():
    kernels = [Kernel(torch.randn(1, 4, 9), (), rank) for rank in (2, 3)]
    assert Kernel.stack(kernels).rank.tolist() == [[2], [3]]
    assert Kernel.stack([kernels[0], kernels[0]]).rank == 2
    assert Kernel.stack(kernels).weight.shape == (2, 1, 4, 9)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), "real floating-point"),
        (torch.ones(3, 4, dtype=torch.complex64), "real floating-point"),
        (torch.ones(3, 4, device="meta"), "meta device"),
        (torch.ones(3, 4).to_sparse(), "sparse"),
    ],
    ids=["integer", "complex", "meta", "sparse"],
)
def test_weights_without_a_gram_matrix(weight, message):
    with pytest.raises(TypeError, match=message):
        ok.kernel_of(weight)
    with pytest.raises(TypeError, match=message):
        ok.soft_orthogonality(weight)


def test_other_bad_weights():
    with pytest.raises(ValueError, match="hold no numbers"):
        ok.kernel_of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="at least two dimensions"):
        ok.kernel_of(torch.zeros(3))
    with pytest.raises(ValueError, match="run one batch"):
        ok.kernel_of(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="spatial dimensions needs"):
        Kernel(torch.zeros(3, 4), (1, 1))


def test_pruned_layers():
    layer = nn.Conv2d(4, 6, 3)
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0)
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.1)
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    ortho.add_grad_()
    before = ortho().item()
    with torch.no_grad():
        layer.weight_orig.mul_(2)
    assert ortho().item() != before
    assert sources(layer) == (layer.weight_orig,)


def test_the_cache_of_parametrizations_is_left_alone():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0, where=ok.linears)
    with parametrize.cached():
        ortho.per_layer()
        layer(torch.randn(2, 6)).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_spectral_norm_before_the_forward_pass():
    layer = nn.utils.spectral_norm(nn.Linear(6, 4))
    value = ok.Regularizer(layer, ok.SO(), strength=1.0, where=ok.linears)()
    (value + layer(torch.randn(2, 6)).sum()).backward()
    assert layer.weight_orig.grad is not None


def test_every_parameter_behind_a_kernel_of_ones_own():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 1))
            self.other = nn.Parameter(torch.randn(4))

    @ok.kernel_of.register
    def _(layer: Gain) -> Kernel:
        return Kernel((layer.weight * layer.gain).unsqueeze(0))

    layer = Gain()
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0, where=ok.layers)
    ortho().backward()
    expected = layer.gain.grad.clone()
    layer.zero_grad()
    ortho.add_grad_()
    assert torch.allclose(layer.gain.grad, expected)
    assert {id(p) for p in sources(layer)} == {id(layer.weight), id(layer.gain)}
    layer.weight.requires_grad_(False)
    assert ortho().item() > 0


def test_a_kernel_of_ones_own_is_computed_outside_autocast():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(64, 64)), nn.Parameter(torch.empty(64, 64))
            nn.init.orthogonal_(self.a), nn.init.orthogonal_(self.b)

    @ok.kernel_of.register
    def _(layer: Product) -> Kernel:
        return Kernel((layer.a @ layer.b).unsqueeze(0))

    ortho = ok.Regularizer(Product(), ok.SO(), strength=1.0, where=ok.layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ortho().item() < 1e-8


def test_kernels_with_a_batch():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, 4, 6))

    @ok.kernel_of.register
    def _(layer: Experts) -> Kernel:
        return Kernel(layer.weight)

    model = nn.Sequential(Experts(), Experts())
    values = [ok.SO()(ok.kernel_of(layer)) for layer in model]
    assert values[0].shape == (3, 2)
    actual = ok.Regularizer(model, ok.SO(), strength=1.0, where=ok.layers).per_layer()
    assert list(actual.values()) == pytest.approx([value.sum().item() for value in values])
    relaxed = ok.Disentangled(relax=ok.ranks({"0": 2, "1": 3}), form="welch")
    ok.Regularizer(model, relaxed, strength=1.0, where=ok.layers)().backward()
    assert ok.report(model).rows[0]["pairs"] == 6 * 6


def test_other_precisions():
    half = nn.Linear(16, 8).half()
    with torch.no_grad():
        half.weight.mul_(1e-6)
    ok.Regularizer(half, ok.Disentangled(), strength=1.0, where=ok.linears)().backward()
    assert half.weight.grad.isfinite().all()
    tiny = nn.Linear(16, 8).to(torch.float8_e4m3fn)
    assert ok.Regularizer(tiny, ok.SO(), strength=1.0, where=ok.linears)().dtype == torch.float32
    assert ok.report(tiny).rows


def test_classes_and_layers_without_a_weight():
    with pytest.raises(TypeError, match="an instance; got the class Conv2d"):
        ok.kernel_of(nn.Conv2d)
    layer = nn.Linear(2, 2)
    layer.weight = None
    with pytest.raises(TypeError, match="the weight of this Linear is None"):
        ok.kernel_of(layer)
