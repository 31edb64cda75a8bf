"""Large layers: rules that work by blocks give the same, and hold about two Gram matrices at once."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import orthokit as ok
from cases import CASES
from orthokit import gram

pytestmark = pytest.mark.filterwarnings("ignore:form='pairs'")
PENALTIES = [
    *(case.penalty for case in CASES),
    ok.Disentangled(relax=ok.share(0.1), ceiling=0.2, squared=True),
    ok.Disentangled(relax=ok.share(0.0), ceiling=0.2),
    ok.Disentangled(relax=ok.fraction(0.01)),
]


def gradient(layers, penalty, way):
    for layer in layers:
        layer.weight.grad = None
    ortho = ok.Regularizer(layers, penalty, strength=0.3)
    value = ortho() if way == "loss" else ortho.add_grad_()
    if way == "loss":
        value.backward()
    return value.item(), [layer.weight.grad.clone() for layer in layers]


@pytest.mark.parametrize("way", ["loss", "add_grad_"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_blocks_change_nothing(penalty, way, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(9, 21, 1), nn.Conv2d(4, 42, 3, groups=2), nn.Conv2d(9, 21, 1)).double()
    with torch.no_grad():
        layers[0].weight[3] = layers[0].weight[7]  # ties
        layers[0].weight[5] = 0
    value, expected = gradient(layers, penalty, way)
    monkeypatch.setattr(gram, "LARGE", 100)
    again, actual = gradient(layers, penalty, way)
    assert again == pytest.approx(value, rel=1e-12)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("count", [0, 1, 7, 100, 209, 210])
def test_of_equal_pairs_the_earlier_are_freed_by_blocks_too(count, monkeypatch):
    c = torch.arange(21 * 21).remainder(5).double().reshape(21, 21).tril(-1) / 5
    c = c + c.mT
    whole = ok.penalties.disentangled._without_largest(c, count)
    monkeypatch.setattr(gram, "LARGE", 100)
    with torch.no_grad():
        assert torch.equal(ok.penalties.disentangled._without_largest(c, count), whole)
        both = ok.penalties.disentangled._without_largest(torch.stack([c, c]), torch.tensor([count, 3]))
    assert torch.equal(both[0], whole)


CODE = """
import resource, warnings
import torch
from torch import nn
import orthokit as ok

warnings.simplefilter("ignore")
torch.set_num_threads(1)
share = ok.share(0.1)
penalties = [ok.MC(), ok.MC(norm="rowsum"), ok.EADK(), ok.Coherence(), ok.Disentangled(relax=share),
             ok.Disentangled(relax=share, form="welch"), ok.Disentangled(relax=share, ceiling=0.3)]

def peak(filters):
    layer = nn.Linear(16, filters, bias=False)
    for penalty in penalties:
        ortho = ok.Regularizer(layer, penalty, strength=0.1, where=ok.linears)
        ortho.add_grad_()
    ortho().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print((peak(2200) - peak(64)) * 1024 / (4 * 2200**2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_about_two_gram_matrices_at_once():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2.6  # between 3 and 9 without blocks
