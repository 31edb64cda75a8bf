"""torch.func and forward mode, sparse weights, layers of one filter, of one weight, or of another size than before."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vmap

import orthokit as ok
from cases import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:form='pairs'"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of torch itself, on importing forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
]
every_penalty = pytest.mark.parametrize("penalty", [case.penalty for case in CASES], ids=repr)
LAYERS = {"wide": (5, 3, 3), "tall": (12, 2, 2), "linear": (4, 7)}


def weight(shape, seed=0):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 3
    w[1] *= 0.02  # so short that its direction counts less
    return w


def value_of(penalty):
    return lambda w: penalty(ok.kernel_of(w)).sum()


@every_penalty
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_transforms_give_the_plain_values_and_gradients(penalty, shape):
    value, w, direction = value_of(penalty), weight(shape), weight(shape, 1)
    plain = value(w)
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    assert torch.allclose(grad(value)(w), expected, atol=1e-9)
    forward, slope = jvp(value, (w,), (direction,))
    assert torch.allclose(forward, plain)
    assert slope.item() == pytest.approx((expected * direction).sum().item(), abs=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(value(forward_ad.make_dual(w, direction)))
        assert torch.allclose(dual.primal, plain)
        assert torch.allclose(dual.tangent, slope)
    many = torch.stack([w, 0.5 * w, direction])
    assert torch.allclose(vmap(value)(many), torch.stack([value(each) for each in many]))
    gradients = vmap(grad(value))(many)
    assert torch.allclose(gradients[0], expected, atol=1e-9)


@pytest.mark.parametrize("penalty", [ok.SO(), ok.Disentangled(), ok.SRIP(), ok.ConvOrth(), ok.EADK()], ids=repr)
def test_second_derivatives_by_transforms(penalty):
    value, w = value_of(penalty), weight((3, 2, 2))
    expected = torch.autograd.functional.hessian(value, w)
    assert torch.allclose(hessian(value)(w), expected, atol=1e-7)
    assert torch.allclose(jacrev(grad(value))(w), expected, atol=1e-7)


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 12, 1)).double()
        self.ortho = ok.Regularizer(self.layers, ok.Disentangled(relax=ok.share(0.1), form="welch"), strength=0.3)

    def forward(self, x):
        return self.layers(x).square().mean() + self.ortho()


def test_a_regularizer_inside_of_a_functional_call():
    m, x = Penalised(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    m(x).backward()
    actual = grad(lambda parameters: functional_call(m, parameters, (x,)))({k: v.detach() for k, v in m.named_parameters()})
    for name, parameter in m.named_parameters():
        assert torch.allclose(actual[name], parameter.grad, atol=1e-9), name


@pytest.mark.parametrize("penalty", [ok.SO(), ok.Disentangled(), ok.SRIP(), ok.ConvOrth()], ids=repr)
def test_layers_that_are_not_transformed_count_in_a_transform(penalty):
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 3)).double()
    ortho = ok.Regularizer(m, penalty, strength=0.3)
    ortho().backward()
    plain, x = ortho().detach(), torch.randn(5, 3, 12, 12, dtype=torch.float64)

    def value(parameters):
        with torch.nn.utils.stateless._reparametrize_module(m, parameters):
            return ortho()

    transformed = {"1.weight": m[1].weight.detach()}
    gradients, transformed_value = grad_and_value(value)(transformed)
    assert torch.allclose(transformed_value, plain)
    assert torch.allclose(gradients["1.weight"], m[1].weight.grad, atol=1e-9)
    assert torch.allclose(vmap(lambda each: m(each).mean() + ortho())(x), m(x).mean((1, 2, 3)) + plain)
    loss = vmap(lambda each: m(each).mean() + ortho())(x).mean()  # a graph, to parameters that no transform knows
    expected = torch.autograd.grad(m(x).mean() + ortho(), list(m.parameters()))
    for actual, other in zip(torch.autograd.grad(loss, list(m.parameters())), expected, strict=True):
        assert torch.allclose(actual, other, atol=1e-9)
    with forward_ad.dual_level():
        assert torch.allclose(ortho(), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_a_transform(dtype):
    w = weight((4, 7)).to(dtype)
    leaf = w.clone().requires_grad_()
    value_of(ok.Disentangled())(leaf).backward()
    assert torch.allclose(grad(value_of(ok.Disentangled()))(w), leaf.grad, atol=1e-2)


# Sparse weights


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_weights_get_our_message(make):
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(make(layer.weight.detach()))
    for call in (
        lambda: ok.kernel_of(layer),
        lambda: ok.kernel_of(make(torch.ones(3, 4))),
        lambda: ok.soft_orthogonality(make(torch.ones(3, 4))),
        lambda: ok.Regularizer(layer, ok.SO(), strength=0.1, where=ok.linears),
        lambda: ok.report(layer, where=ok.linears),
        lambda: ok.plan(layer, None, where=ok.linears),
    ):
        with pytest.raises(TypeError, match=r"sparse weights .* have no Gram matrix here; convert with .to_dense\(\)"):
            call()


# One filter, one weight, another size


@every_penalty
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(9, 1, 1), nn.Conv2d(1, 6, 1)], ids=str
)
def test_broken_weights_never_count_as_zero(penalty, bad, layer):
    layer = nn.Sequential(
        nn.Conv2d(3, 4, 3), type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)
    )
    with torch.no_grad():
        layer[1].weight.view(-1)[-1] = bad
    ortho = ok.Regularizer(layer, penalty, strength=0.1)
    for call in (ortho, ortho.add_grad_):
        with pytest.raises(FloatingPointError, match=r"^layer 1: "):
            call()


@pytest.mark.parametrize("groups", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "penalty",
    [
        ok.Disentangled(weights=(0.0, 1.0)),
        ok.Disentangled(weights=(0.0, 1.0), relax=ok.feasible(), form="budget"),
        ok.Disentangled(weights=(0.0, 1.0), ceiling=0.3),
        ok.Disentangled(weights=(0.0, 1.0), squared=True),
        ok.Coherence(),
    ],
    ids=repr,
)
def test_filters_of_one_weight_cannot_turn(penalty, dtype, groups):
    """Their direction is their sign: what is left of a gradient is rounding, which Adam would take for one."""
    torch.manual_seed(0)
    layer = nn.Conv2d(groups, 300, 1, groups=groups, dtype=dtype)
    ortho = ok.Regularizer(layer, penalty, strength=1.0)
    ortho().backward()
    ortho.add_grad_()
    assert layer.weight.grad.abs().max() == 0
    assert grad(lambda w: penalty(ok.Kernel(w)).sum())(ok.kernel_of(layer).weight.detach()).abs().max() == 0


@pytest.mark.parametrize("penalty", [ok.EADK(), ok.EADC(), ok.Disentangled()], ids=repr)
def test_filters_of_one_weight_have_lengths(penalty):
    k = torch.tensor([[0.3], [-2.0], [0.7]], dtype=torch.float64, requires_grad=True)
    value = penalty(ok.kernel_of(k)).sum()
    (actual,) = torch.autograd.grad(value, k)
    d = k.detach().square() - 1
    expected = 2 * k.detach() * d / d.norm() if type(penalty) is ok.Disentangled else 4 * k.detach() * d
    assert torch.allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_resized_layer_is_named(parametrized):
    m = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 1))
    if parametrized:
        nn.utils.parametrizations.weight_norm(m[1])
    ortho = ok.Regularizer(m, ok.Disentangled(relax=ok.feasible(), form="budget"), strength=0.1)
    plain = ok.Regularizer(m, ok.SO(), strength=0.1)
    if parametrized:
        m[1].parametrizations.weight.original1 = nn.Parameter(torch.randn(20, 8, 1, 1))
        m[1].parametrizations.weight.original0 = nn.Parameter(torch.ones(20, 1, 1, 1))
    else:
        m[1].weight = nn.Parameter(torch.randn(20, 8, 1, 1))
    for call in (ortho, ortho.add_grad_, ortho.per_layer):
        with pytest.raises(ValueError, match=r"layer '1' had a weight of shape .*16, 8, 1, 1\) .* has .*20, 8, 1, 1\) now"):
            call()
    assert plain.per_layer()["1"] > 0
