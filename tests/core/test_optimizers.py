"""Optimizers of others: wrapped, in two calls, of other kinds, two for one model, with averaged weights; and their groups."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthokit as ok

STRICT = ok.Disentangled()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))


def batches(steps=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(steps)]


def kernels(m):
    """The matrices of filters, which a muon or a SGD may train."""
    return [m[0].weight, m[3].weight]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(make, way, wrap=lambda optimizer: optimizer, parameters=nn.Module.parameters, where=ok.convs):
    """The weights after a few steps with the penalty in the loss, attached, or added by hand."""
    m = model().double()
    ortho = ok.Regularizer(m, STRICT, strength=0.1, where=where)
    optimizer = wrap(make(parameters(m)))
    if way == "attach":
        ok.attach(ortho, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(m(x.double()), y)
        (loss + ortho() if way == "loss" else loss).backward()
        if way == "add_grad_":
            ortho.add_grad_()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in m.parameters()])


class Lookahead:
    """A wrapper that is not an Optimizer: after every second step it goes half of the way back."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, fast in zip(self.slow, (p for g in self.optimizer.param_groups for p in g["params"]), strict=True):
                slow.lerp_(fast, 0.5)
                fast.copy_(slow)


class Nominal(Lookahead, torch.optim.Optimizer):
    """The same as an Optimizer that was never initialised as one."""

    __hash__ = object.__hash__


class Inside(Lookahead):
    """The same of a wrapper in a wrapper, under another name."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        del self.optimizer
        self.base_optimizer = Nominal(optimizer)

    @property
    def param_groups(self):
        return self.base_optimizer.optimizer.param_groups

    def zero_grad(self):
        self.base_optimizer.zero_grad()

    def step(self):
        self.base_optimizer.step()


@pytest.mark.parametrize("wrap", [Lookahead, Nominal, Inside])
def test_wrapped_optimizers(wrap):
    attached, by_loss, none = [train(sgd, way, wrap) for way in ("attach", "loss", "none")]
    assert torch.allclose(attached, by_loss, atol=1e-9)
    assert (none - by_loss).abs().max() > 1e-3


def test_the_wrapper_of_accelerate():
    accelerate = pytest.importorskip("accelerate")

    def wrap(optimizer):
        return accelerate.Accelerator(cpu=True).prepare(optimizer)

    attached, by_loss = [train(sgd, way, wrap) for way in ("attach", "loss")]
    assert torch.allclose(attached, by_loss, atol=1e-9)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is usually written."""

    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = sgd(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure):
        with torch.enable_grad():
            self.first_step()
            closure()
            self.second_step()


def test_a_sharpness_aware_optimizer_warns():
    m = model()
    optimizer = SAM(m.parameters())
    ortho = ok.Regularizer(m, STRICT, strength=0.1)
    with pytest.warns(UserWarning, match=r"SAM has first_step\(\) and second_step\(\).* step\(\) never runs"):
        ok.attach(ortho, optimizer)


def test_attaching_twice_is_said():
    m = model()
    optimizer, other = sgd(m.parameters()), sgd(m.parameters())
    ortho = ok.Regularizer(m, STRICT, strength=0.1)
    handle = ok.attach(ortho, optimizer)
    ok.attach(ortho, other)
    ok.attach(ok.Regularizer(m, ok.SO(), strength=0.1), optimizer)
    with pytest.warns(UserWarning, match="already attached to this SGD: its penalty now counts once more"):
        again = ok.attach(ortho, Lookahead(optimizer))
    again.remove()
    handle.remove()
    ok.attach(ortho, optimizer)


@pytest.mark.parametrize("what", [None, 3, "sgd", Lookahead.__new__(Lookahead)])
def test_what_is_no_optimizer(unchecked, what):
    m = model()
    with pytest.raises(TypeError, match=r"attach takes a Regularizer and a torch\.optim\.Optimizer"):
        ok.attach(ok.Regularizer(m, STRICT, strength=0.1), what)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_closure_sees_one_penalty_in_a_step(every):
    """A line search compares values within a step; ``every=`` counts steps."""
    m = model().double()
    ortho = ok.Regularizer(m, STRICT, strength=0.1, every=every)
    optimizer = torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    losses = []

    class Noted(ok.Regularizer):
        def _add_grad_(self, *args):
            losses.append((ortho.steps, super()._add_grad_(*args).item()))
            return torch.tensor(losses[-1][1])

    ortho.__class__ = Noted
    ok.attach(ortho, optimizer)
    x, y = batches(1)[0]
    for _ in range(2 * every):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x.double()), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        ortho.step()
    by_step = [[value > 0 for step, value in losses if step == index] for index in range(2 * every)]
    assert all(len(values) > 1 for values in by_step)
    assert [set(values) for values in by_step] == [{index % every == 0} for index in range(2 * every)]


# Optimizers of other kinds


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("way", ["attach", "add_grad_"])
def test_muon_beside_sgd(way):
    """Muon takes matrices only: the linear layer's; its gradient is orthogonalised with the penalty in it."""

    def make(parameters):
        return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.01)

    actual, by_loss, none = [train(make, w, where=ok.linears) for w in (way, "loss", "none")]
    assert torch.allclose(actual, by_loss, atol=1e-4)  # Muon computes in bfloat16
    assert (none - by_loss).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["Adafactor", "NAdam", "RMSprop", "Rprop", "Adagrad"])
def test_optimizers_of_torch(kind):
    def make(parameters):
        return getattr(torch.optim, kind)(parameters, lr=1e-2)

    actual, by_loss = [train(make, way, parameters=kernels) for way in ("attach", "loss")]
    assert torch.allclose(actual, by_loss, atol=1e-6)


def test_schedule_free():
    schedulefree = pytest.importorskip("schedulefree")

    def make(parameters):
        optimizer = schedulefree.SGDScheduleFree(parameters, lr=0.1)
        optimizer.train()
        return optimizer

    actual, by_loss = [train(make, way) for way in ("attach", "loss")]
    assert torch.allclose(actual, by_loss, atol=1e-9)


def test_two_networks_with_an_optimizer_each():
    """As a GAN: each optimizer serves the penalty of its own network."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.ConvTranspose2d(4, 8, 4), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    critic = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 1))
    networks, optimizers, penalties = [generator, critic], [], []
    for network in networks:
        optimizers.append(torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.5, 0.9)))
        penalties.append(ok.Regularizer(network, STRICT, strength=1.0))
        ok.attach(penalties[-1], optimizers[-1])
    with pytest.raises(ValueError, match="does not train 2 of 2 regularized layers"):
        ok.attach(penalties[0], optimizers[1])
    before = [ortho().item() for ortho in penalties]
    for step in range(120):
        images = generator(torch.randn(8, 4, 1, 1))
        loss = -critic(images).mean() if step % 2 else critic(images.detach()).mean() - critic(torch.randn(8, 3, 4, 4)).mean()
        optimizers[step % 2 == 0].zero_grad()
        loss.backward()
        optimizers[step % 2 == 0].step()
    assert all(ortho().item() < 0.5 * value for ortho, value in zip(penalties, before, strict=True))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_weights(average):
    """The average is read like any model, and has no part in the penalty of the model that trains."""
    m = model()
    ortho = ok.Regularizer(m, STRICT, strength=0.5)
    averaged = AveragedModel(m, multi_avg_fn=average)
    optimizer = sgd(m.parameters())
    ok.attach(ortho, optimizer)
    start = ortho().item()
    for x, y in batches(30):
        optimizer.zero_grad()
        F.cross_entropy(m(x), y).backward()
        optimizer.step()
        averaged.update_parameters(m)
    assert ortho().item() < 0.5 * start
    assert ok.Regularizer(averaged, STRICT, strength=0.5)().item() < 0.7 * start
    assert all(p.grad is None for p in averaged.parameters())


# Groups


def test_groups_of_several_regularizers():
    m = model()
    convs, linears = (ok.Regularizer(m, ok.SO(), strength=0.1, where=where) for where in (ok.convs, ok.linears))
    decayed, undecayed = ok.param_groups(m, convs, linears, weight_decay=5e-4)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (5e-4, 0.0)
    assert {id(p) for p in undecayed["params"]} == {id(m[i].weight) for i in (0, 3, 5)}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(m.parameters()))
    torch.optim.SGD(ok.param_groups(m, convs, linears, convs, weight_decay=5e-4), lr=0.1)


def test_biases_and_norms_without_decay():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Linear(6, 2))
    ortho = ok.Regularizer(m, ok.SO(), strength=0.1)
    groups = ok.param_groups(m, ortho, weight_decay=0.1, decay_biases_and_norms=False)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    expected = [[m[2].weight], [m[0].weight], [m[0].bias, m[1].weight, m[1].bias, m[2].bias]]
    assert [list(map(id, group["params"])) for group in groups] == [list(map(id, group)) for group in expected]
    by_method = ortho.param_groups(m, weight_decay=0.1, decay_biases_and_norms=False)
    assert [list(map(id, group["params"])) for group in by_method] == [list(map(id, group)) for group in expected]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ortho: ok.param_groups(m, weight_decay=0.1), TypeError, "one or more Regularizers"),
        (lambda m, ortho: ok.param_groups(m, m, weight_decay=0.1), TypeError, "one or more Regularizers"),
        (lambda m, ortho: ok.param_groups(ortho, ortho, weight_decay=0.1), TypeError, "must be a torch.nn.Module"),
        (lambda m, ortho: ok.param_groups(m, ortho, weight_decay=True), TypeError, "weight_decay must be a number"),
        (lambda m, ortho: ok.param_groups(m, ortho, weight_decay=0.1, decay_biases_and_norms="no"), TypeError, "True or False"),
        (lambda m, ortho: ok.param_groups(nn.Linear(2, 2), ortho, weight_decay=0.1), ValueError, "none of the regularized"),
    ],
)
def test_wrong_groups(unchecked, call, error, message):
    m = model()
    with pytest.raises(error, match=message):
        call(m, ok.Regularizer(m, STRICT, strength=0.1))
