"""Weights that are not simply ``weight``: packed and separate projections, stored the other way round, computed in forward."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import orthokit as ok


class Conv1D(nn.Module):
    """As in transformers: a Linear whose weight is stored (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def names(model, where):
    return [layer.name for layer in ok.select(model, where)]


def packed():
    return nn.MultiheadAttention(6, 2)


def separate():
    return nn.MultiheadAttention(6, 2, kdim=4, vdim=5)


def value(ortho):
    return ortho().item()


# -- attention


def test_a_packed_projection_is_three_matrices():
    layer = packed()
    kernel = ok.kernel_of(layer)
    assert kernel.matrix.shape == (3, 6, 6)
    assert torch.equal(kernel.matrix.detach(), torch.stack(layer.in_proj_weight.detach().chunk(3)))
    assert names(nn.ModuleDict({"a": layer}), ok.linears) == ["a.in_proj", "a.out_proj"]
    assert names(layer, ok.layers) == ["in_proj", "out_proj"]
    assert names(nn.TransformerEncoderLayer(8, 2, 16), ok.matching("*.in_proj")) == ["self_attn.in_proj"]


def test_separate_projections_are_three_layers():
    layer = separate()
    assert names(nn.Sequential(layer), ok.linears) == ["0.q_proj", "0.k_proj", "0.v_proj", "0.out_proj"]
    assert [layer.size for layer in ok.select(layer, ok.linears)] == [(1, 6, 6), (1, 6, 4), (1, 6, 5), (1, 6, 6)]
    assert names(layer, ok.matching("k_proj")) == ["k_proj"]
    assert names(layer, ok.tall) == ["k_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"3 weights that are kernels \(q_proj_weight, k_proj_weight, v_proj_weight\)"):
        ok.kernel_of(layer)


@pytest.mark.parametrize("make", [packed, separate, lambda: Conv1D(5, 3)], ids=["packed", "separate", "Conv1D"])
@pytest.mark.parametrize(
    "penalty", [ok.SO(), ok.SO(side="rows"), ok.DSO(), ok.Disentangled(), ok.SRIP(), ok.Coherence(), ok.ConvOrth()], ids=repr
)
def test_the_penalty_is_that_of_plain_layers(make, penalty):
    """A Linear for each matrix gives the same values and gradients; groups count 1 / sqrt(3) where the penalty is unsquared."""
    model = make().double()
    ortho = ok.Regularizer(model, penalty, strength=0.5, where=ok.linears)
    twins, factors = [], []
    for layer in ok.select(model, ok.linears):
        for matrix in layer.kernel.matrix.detach():
            twin = nn.Linear(*reversed(matrix.shape), bias=False)
            twin.weight = nn.Parameter(matrix.clone())
            twins.append(twin)
            factors.append(1 if penalty.squared else layer.kernel.groups**-0.5)
    values = ok.Regularizer(nn.ModuleList(twins), penalty, strength=1.0, where=ok.linears).per_layer().values()
    expected = sum(factor * each for factor, each in zip(factors, values, strict=True))
    assert value(ortho) == pytest.approx(0.5 * expected)
    assert sum(ortho.per_layer().values()) == pytest.approx(expected)

    for twin, factor in zip(twins, factors, strict=True):
        ok.Regularizer(twin, penalty, strength=0.5 * factor, where=ok.linears).add_grad_()
    ortho().backward()
    by_loss = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ortho.add_grad_()
    assert all(
        torch.allclose(a, p.grad) for a, p in zip(by_loss, (p for p in model.parameters() if p.grad is not None), strict=True)
    )
    twin = iter(twins)
    for layer in ok.select(model, ok.linears):
        (parameter,) = layer.sources
        grad = parameter.grad.T if isinstance(layer.module, Conv1D) else parameter.grad
        for part in grad.chunk(layer.kernel.groups):
            assert torch.allclose(part, next(twin).weight.grad)


@pytest.mark.parametrize("make", [packed, separate, lambda: Conv1D(3, 5)], ids=["packed", "separate", "Conv1D"])
def test_what_else_a_regularizer_does(make):
    model = make()
    ortho = ok.Regularizer(model, ok.SO(), strength=1.0, where=ok.linears)
    decayed, kernels = ortho.param_groups(model, weight_decay=0.1)
    assert len(kernels["params"]) == len(ortho.layers)
    assert all(p.ndim == 1 for p in decayed["params"])
    ok.attach(ortho, torch.optim.SGD(model.parameters(), 0.1))
    ortho.retract_()
    assert all(row["residual"] is None or row["residual"] < 1e-5 for row in ok.report(model).rows)
    assert [row["layer"] for row in ok.plan(model, None, where=ok.linears).rows] == [layer.name for layer in ortho.layers]
    relaxed = ok.Regularizer(model, ok.Disentangled(relax=ok.fraction(0.5), form="welch"), strength=1.0, where=ok.linears)
    assert set(relaxed.ranks) == {layer.name for layer in ortho.layers}


def test_tensors_with_another_name_are_normalised_and_pruned_too():
    layer = parametrizations.weight_norm(packed(), "in_proj_weight")
    ok.Regularizer(layer, ok.SO(), strength=1.0, where=ok.matching("in_proj"))().backward()
    assert layer.parametrizations.in_proj_weight.original0.grad is not None
    layer = prune.l1_unstructured(packed(), "in_proj_weight", 0.5)
    (chosen,) = ok.select(layer, ok.matching("in_proj"))
    assert (chosen.kernel.weight == 0).float().mean() == pytest.approx(0.5)
    assert chosen.sources == (layer.in_proj_weight_orig,)


def test_another_conv1d_is_not_taken_for_the_one_of_transformers():
    mine = type("Conv1D", (nn.Module,), {"__module__": "mine"})()
    assert ok.layers("", Conv1D(2, 3))
    assert not ok.layers("", mine)
    assert ok.kernel_of(Conv1D(2, 3)).matrix.shape == (1, 2, 3)


# -- computed in forward


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByHook(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), weight=F.normalize(self.weight))


class Transposed(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight - self.weight.mean(), self.bias, self.stride)


def used(layer):
    """The weight in use, told by the output for each unit input: an independent way."""
    if isinstance(layer, nn.Linear):
        return (
            torch.stack([layer(unit[None])[0] for unit in torch.eye(layer.in_features)], -1)
            - layer(torch.zeros(1, layer.in_features)).T
        )
    if isinstance(layer, nn.ConvTranspose2d):
        unit = torch.eye(layer.in_channels)[:, :, None, None]
        return layer(unit) - layer(0 * unit)
    unit = torch.eye(layer.in_channels * 9).reshape(-1, layer.in_channels, 3, 3)
    return (layer(unit) - layer(0 * unit)).flatten(1).T.reshape(layer.weight.shape)


@pytest.mark.parametrize(
    "layer", [Standardised(2, 3, 3), ByHook(2, 3, 3), Transposed(2, 3, 2, stride=2)], ids=lambda layer: type(layer).__name__
)
def test_a_weight_computed_in_forward_is_read_as_used(layer):
    (chosen,) = ok.select(layer, ok.layers)
    weight = chosen.kernel.weight.transpose(1, 2) if isinstance(layer, nn.ConvTranspose2d) else chosen.kernel.weight
    assert torch.allclose(weight[0], used(layer), atol=1e-5)
    assert chosen.sources == (layer.weight,)
    ortho = ok.Regularizer(layer, ok.Disentangled(), strength=1.0, where=ok.layers)
    ortho().backward()
    by_loss = layer.weight.grad.clone()
    assert by_loss.abs().sum() > 0
    layer.zero_grad()
    ortho.add_grad_()
    assert torch.allclose(layer.weight.grad, by_loss)
    with pytest.raises(ValueError, match="is computed from others and cannot be set"):
        ortho.retract_()


def test_rows_of_a_linear_layer_as_used():
    layer = Cosine(5, 3)
    assert torch.allclose(ok.kernel_of(layer).weight[0], F.normalize(layer.weight))
    assert ok.report(layer).rows[0]["max_length_error"] < 1e-6


def test_training_brings_the_weight_in_use_to_orthogonality():
    layer = Standardised(3, 6, 3)
    ortho = ok.Regularizer(layer, ok.Disentangled(weights=(0, 1)), strength=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), 0.02)
    before = ok.report(layer).rows[0]["mean_cos"]
    for _ in range(60):
        optimizer.zero_grad()
        ortho().backward()
        optimizer.step()
    assert ok.report(layer).rows[0]["mean_cos"] < 0.1 * before


class Same(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias) * scale


class Unfolded(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Branch(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.down, self.up = nn.Linear(i, 1), nn.Linear(1, o)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Projected(nn.Conv2d):
    """EEGNet's constraint: the forward pass changes the parameter itself."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        with torch.no_grad():
            self.bias.zero_()
        return super().forward(x)


HARMLESS = [
    Same(2, 3, 3),
    Same(2, 3, 3, padding=2, padding_mode="reflect"),
    Unfolded(5, 3),
    Branch(5, 3),
    Projected(2, 3, 3),
]


@pytest.mark.parametrize("layer", HARMLESS, ids=lambda layer: type(layer).__name__)
def test_a_harmless_override_changes_nothing(layer):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    (chosen,) = ok.select(layer, lambda name, module: module is layer)
    assert chosen.kernel.weight.data_ptr() == layer.weight.data_ptr()
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0, where=lambda name, module: module is layer)
    assert ortho._engine._readings[0] is not None  # in closed form, as any other
    ortho.retract_()
    assert ok.report(layer, where=lambda name, module: module is layer).rows[0]["residual"] < 1e-5
    before["weight"] = layer.weight.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


class Noted(nn.Conv2d):
    """Draws random numbers, counts and takes notes, in containers and in modules that it has not registered."""

    def __init__(self, *args):
        super().__init__(*args)
        self.notes, self.by_name, self.seen, self.helpers = [], {"calls": 0, "shapes": []}, set(), [nn.BatchNorm2d(2)]
        vars(self)["hidden"] = nn.BatchNorm2d(2)
        self.helpers.append(self)
        self.by_name["self"] = self.by_name
        self.loop = [self.helpers]
        self.loop.append(self.loop)

    def forward(self, x):
        self.notes.append(x.shape)
        self.seen.add(x.shape)
        self.by_name["calls"] += 1
        self.by_name["shapes"].append(x.shape)
        for norm in (self.helpers[0], self.hidden):
            norm.running_mean.add_(1)
            norm.calls = getattr(norm, "calls", 0) + 1
        self.helpers[1].times = 2
        return F.conv2d(x, self.weight * (1 + torch.rand(())))


def test_a_forward_pass_that_is_asked_leaves_no_trace():
    layer = Noted(2, 3, 1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ortho = ok.Regularizer(layer, ok.SO(), strength=1.0)
    first, again = ortho(), ortho()
    ortho.add_grad_()
    ok.report(layer)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert (layer.notes, layer.seen) == ([], set())
    assert (layer.by_name["calls"], layer.by_name["shapes"]) == (0, [])
    for norm in (layer.helpers[0], layer.hidden):
        assert not norm.running_mean.any()
        assert not hasattr(norm, "calls")
    assert not hasattr(layer, "times")


class Masked(nn.Conv2d):
    def forward(self, x, mask):
        return super().forward(x * mask)


class Twofold(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, 2 * self.weight) + F.conv2d(x, 3 * self.weight)


class Reshaped(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, F.pad(self.weight, (1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Masked, "fails with TypeError: .*'mask'"),
        (Twofold, "it uses 2 different ones"),
        (Reshaped, "gets a weight of that shape"),
    ],
)
def test_a_forward_pass_that_cannot_be_followed_is_refused(kind, why):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), kind(2, 3, 3))
    for look in (ok.report, lambda m: ok.Regularizer(m, ok.SO(), strength=1.0)):
        with pytest.raises(
            TypeError, match=rf"layer '1': {kind.__name__} has a forward pass of its own.*{why}.*register\({kind.__name__}"
        ):
            look(model)
    assert names(model, ok.convs & ~ok.matching("1")) == ["0"]

    @ok.kernel_of.register
    def _(layer: kind) -> ok.Kernel:
        return ok.Kernel(layer.weight.unsqueeze(0), layer.stride)

    assert names(model, ok.convs) == ["0", "1"]


def test_a_forward_pass_set_on_the_instance():
    layer = nn.Conv2d(2, 3, 3)
    layer.forward = lambda x: F.conv2d(x, 3 * layer.weight)
    assert torch.allclose(ok.kernel_of(layer).weight[0], 3 * layer.weight)
    layer.forward = lambda x: F.conv2d(x, layer.weight)
    assert ok.kernel_of(layer).weight.data_ptr() == layer.weight.data_ptr()


def test_computed_from_a_computed_weight():
    layer = parametrizations.spectral_norm(Standardised(2, 3, 3)).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    ok.Regularizer(layer, ok.SO(), strength=1.0)().backward()
    assert layer.parametrizations.weight.original.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.training
    assert layer.parametrizations.weight[0].training
    with torch.no_grad():
        assert torch.allclose(ok.kernel_of(layer).weight[0], used(layer.eval()), atol=1e-5)
    twice = nn.Conv2d(2, 3, 3)
    parametrize.register_parametrization(twice, "weight", nn.Identity())
    assert ok.kernel_of(twice).weight.shape == (1, 3, 2, 3, 3)


def test_fake_quantisation_leaves_its_observers_alone():
    quantised = pytest.importorskip("torch.ao.nn.qat")
    from torch.ao.quantization import get_default_qat_qconfig

    layer = quantised.Linear(6, 4, qconfig=get_default_qat_qconfig("fbgemm"))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = ok.kernel_of(layer).weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert weight.unique().numel() < layer.weight.unique().numel() or not torch.equal(weight[0], layer.weight)


# -- the meta device


def test_a_plan_needs_shapes_only():
    with torch.device("meta"):
        block = nn.ModuleDict(
            {"attn": nn.MultiheadAttention(4096, 32), "up": nn.Linear(4096, 11008), "down": nn.Linear(11008, 4096)}
        )
        large = nn.ModuleList([nn.ModuleDict({**block}) for _ in range(32)])
        model = nn.Sequential(
            nn.ModuleList([nn.TransformerEncoderLayer(4096, 32, 11008) for _ in range(32)]), nn.Conv2d(3, 4096, 14)
        )
        kinds = nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), Conv1D(5, 3), Standardised(2, 3, 3), separate(),
            parametrizations.weight_norm(nn.Linear(3, 4)), nn.Embedding(7, 3), prune.identity(nn.Linear(3, 5), "weight"),
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) > 4e9
    start = time.perf_counter()
    table = ok.plan(model, ok.share(0.1), where=ok.linears & ~ok.tall | ok.matching("0.*"))
    assert time.perf_counter() - start < 5
    assert len(table.rows) == 32 * 4
    assert table.rows[0] | {"groups": 3, "o": 4096, "n": 4096} == table.rows[0]
    assert len(names(large, ok.layers)) == 4
    everything = ok.layers | ok.embeddings
    real = [layer.size for layer in ok.select(kinds.to_empty(device="cpu"), everything)]
    assert [layer.size for layer in ok.select(kinds.to("meta"), everything)] == real


def test_all_else_on_the_meta_device_names_the_layer():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 4, device="meta"))
    for look in (lambda: ok.report(model), lambda: ok.Regularizer(model, ok.SO(), strength=1.0, where=ok.linears)):
        with pytest.raises(TypeError, match="layer '1': weights on the meta device have no values"):
            look()
