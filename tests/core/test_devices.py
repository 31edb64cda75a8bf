"""No penalty makes the host wait for an accelerator; what one caches serves every later call.

The meta device stands in for an accelerator: reading a number from it raises an error, and copies to it are counted.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import orthokit as ok
from cases import CASES
from orthokit import convolution, gram
from orthokit.penalties import disentangled, srip

PENALTIES = [case.penalty for case in CASES] + [ok.SRIP(steps=4)]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore:form='pairs'")


def model():
    """A wide layer, a grouped and strided one, a tall one."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Conv2d(8, 12, 1))


class Copies(TorchDispatchMode):
    """Collects operations that take tensors from one device to another."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        if len({each.device for each in tensors if each.ndim or "copy" in operation.name()}) > 1:
            self.operations.append(operation.name())
        return result


class Numbers(TorchFunctionMode):
    """Collects tensors that are made of the host's numbers on another device: they are copied, and waited for."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor) and result.is_meta:
            self.made.append(function.__name__)
        return result


@pytest.fixture
def accelerator(monkeypatch):
    """A function that moves a model to the meta device, which penalties then take for an accelerator."""
    answers = {"check_weight": lambda weight: None, "outside_autocast": lambda device: nullcontext()}
    for name, module in list(sys.modules.items()):
        for function in answers.keys() & vars(module).keys() if name.startswith("orthokit") else ():
            monkeypatch.setattr(module, function, answers[function])
    return lambda network: network.to("meta")


def waits(call):
    """What a call makes the host wait for."""
    with Copies() as copies, Numbers() as numbers:
        call()
    return copies.operations + numbers.made


@pytest.mark.parametrize("large", [False, True])
@every_penalty
def test_no_penalty_waits_for_the_device(penalty, large, accelerator, monkeypatch):
    if large:  # Note [memory]: by blocks of rows
        monkeypatch.setattr(gram, "LARGE", 100)
    network = model()
    ortho = ok.Regularizer(network, penalty, strength=0.3)
    accelerator(network)
    ortho.add_grad_()  # what is cached is copied once
    ortho().backward()
    assert waits(lambda: (ortho.add_grad_(), ortho().backward())) == []


def test_waiting_is_noticed(accelerator):
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))
    assert waits(lambda: torch.ones(2).to(weight)) == ["aten::_to_copy"]
    assert waits(lambda: torch.as_tensor(3, device="meta")) == ["as_tensor"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        weight.sum().item()


@every_penalty
def test_trains_after_a_look_in_inference_mode(penalty):
    for cache in (convolution._transform, disentangled._pairs, srip._start):
        cache.cache_clear()
    network = model()
    ortho = ok.Regularizer(network, penalty, strength=0.3)
    with torch.inference_mode():
        value = ortho()
    ortho().backward()
    assert torch.equal(ortho.add_grad_(), value)
