"""The demo's training."""

import pytest
import torch

from orthokit.lab import demo
from orthokit.lab.data.images import load


@pytest.mark.filterwarnings("ignore:form='pairs'")
def test_demo_arms_share_everything_but_the_penalty(monkeypatch):
    data, seen = load("digits", train=100), []
    results = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: seen.append(1))
    assert len(seen) == 2
    assert [result.arm for result in results] == list(demo.ARMS)
    again = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: None)
    assert all(torch.equal(a.weights[k], b.weights[k]) for a, b in zip(results, again, strict=True) for k in a.weights)
    # Without its penalty any arm is the arm none.
    monkeypatch.setattr(demo, "STRENGTH", 0.0)
    plain = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: None)
    for result in plain:
        assert all(torch.equal(result.weights[k], results[0].weights[k]) for k in result.weights)
    for result in results[1:]:
        assert not torch.equal(result.weights["conv.weight"], results[0].weights["conv.weight"])
