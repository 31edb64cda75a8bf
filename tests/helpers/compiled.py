"""Compiles every penalty, and a step that contains one: ``python compiled.py``; test_cost.py looks at how it ends."""

import warnings

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import orthokit as ok
from cases import CASES


def model():
    """Stacks of wide and tall layers, a grouped, a strided and a transposed one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 12, 1),
        nn.ConvTranspose2d(12, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def kinds():
    """One of each kind of layer that the penalties tell apart, and a stack."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 8, 3) for _ in range(2)),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Conv2d(8, 12, 1),
        nn.ConvTranspose2d(12, 4, 2, stride=2),
    )


def wide_and_tall():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1))


def gradients(m, value):
    m.zero_grad()
    value.backward()
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]


class Centred(nn.Conv2d):
    """Computes its weight in the forward pass."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def penalty_alone(penalty, m, backend="aot_eager"):
    """No graph break, one compilation for several weights, and what it is without a compiler.

    Breaks and further compilations show with any backend; "aot_eager" compiles the gradient as well, which takes twice as long.
    """
    torch._dynamo.reset()
    ortho = ok.Regularizer(m, penalty, strength=0.3)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda: ortho(), fullgraph=True, backend=counter)
    for _ in range(3):
        value, target = compiled(), ortho()
        assert torch.allclose(value, target, rtol=1e-4), (penalty, value, target)
        for actual, expected in zip(gradients(m, value), gradients(m, target), strict=True):
            assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5), penalty
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.add_(0.01)
    assert counter.frame_count == 1, (penalty, counter.frame_count)


def step():
    """20 steps of training with one compilation."""
    torch._dynamo.reset()
    m = model()
    ortho = ok.Regularizer(m, ok.Disentangled(), strength=0.01)
    counter = CompileCounterWithBackend("aot_eager")
    optimizer = torch.optim.SGD(m.parameters(), lr=0.01)

    @torch.compile(fullgraph=True, backend=counter)
    def loss(images, labels):
        return nn.functional.cross_entropy(m(images), labels) + ortho()

    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(torch.ones(4, 3, 8, 8), torch.arange(4))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert counter.frame_count == 1, counter.frame_count
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "form='pairs'")
    whole = {type(case.penalty): case for case in reversed(CASES)}.values()  # the first of each kind; options differ less
    for case in CASES:
        if case in whole:
            penalty_alone(case.penalty, kinds())
        else:
            penalty_alone(case.penalty, wide_and_tall(), "eager")
    penalty_alone(ok.SO(), nn.Sequential(Centred(3, 8, 3), nn.Conv2d(8, 8, 3)))
    step()
