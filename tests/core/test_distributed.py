"""On several ranks training ends at the weights of one process, whichever way the penalty comes in."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import orthokit as ok
import several_ranks as here


def test_several_ranks_train_as_one(tmp_path):
    script = [sys.executable, "-W", "error", here.__file__, str(tmp_path)]
    run = subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr

    combinations, read = list(here.combinations()), here.reading()
    settings = {combination[1:] for combination in combinations}
    trained = {(way, penalty, parts): here.train(way, penalty, accumulated=parts) for way, penalty, parts in settings}
    unpenalised = here.train("none", "strict")
    part = here.train_a_part("loss")
    for rank, ranks in [(r, n) for n in here.RANKS for r in range(n)]:
        actual = torch.load(tmp_path / f"{rank} of {ranks}.pt")
        assert list(actual["trained"]) == combinations
        for key, weights in actual["trained"].items():
            assert torch.allclose(weights, trained[key[1:]], atol=1e-6, rtol=0), (rank, ranks, key)
            assert (weights - unpenalised).abs().max() > 1e-2, (rank, ranks, key)
        assert list(actual["read"]) == [*here.WRAPS, "FSDP2 in bfloat16"]
        for wrap, values in actual["read"].items():
            assert values.keys() == read.keys()
            for name, value in values.items():
                assert value.dtype == torch.float32
                assert torch.allclose(value, read[name], atol=1e-6), (rank, ranks, wrap, name)
        # With find_unused_parameters=True the parts that no forward pass used must not come in by the loss.
        for way in ("add_grad_", "attach"):
            assert torch.allclose(actual["parts"][way], part, atol=1e-6), (rank, ranks, way)
        assert "mark a variable ready only once" in actual["parts"]["loss"]
        # Each selected layer once, the tied one not again, the parametrized one in its two parts.
        assert actual["whole"]["gathers"] == 9
        assert actual["whole"]["message"].startswith("layer 3: disentangled_orthogonality is not finite")
        assert actual["whole"]["rows"] == ["0", "3", "5", "6", "7", "8", "9", "10", "13"]


def test_the_first_fsdp_is_refused():
    class Wrapped(FullyShardedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = module

    with pytest.raises(TypeError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        ok.report(Wrapped(nn.Linear(3, 3)))
