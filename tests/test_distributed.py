"""On several ranks training ends at the weights of one process, whichever way the penalty comes in."""

import os
import subprocess
import sys

import pytest
import several_ranks as one
import torch


@pytest.fixture(scope="module")
def alone():
    """The same in this process, without a process group."""
    settings = {combination[1:] for combination in one.combinations()}
    trained = {(way, penalty, parts): one.train(way, penalty, accumulated=parts) for way, penalty, parts in settings}
    return trained, one.train("none", "strict"), one.reading()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_several_ranks_train_as_one(ranks, alone, tmp_path):
    trained, unpenalised, read = alone
    script = [sys.executable, "-W", "error", one.__file__, str(ranks), str(tmp_path)]
    run = subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found["trained"]) == list(one.combinations())
        for key, weights in found["trained"].items():
            assert torch.allclose(weights, trained[key[1:]], atol=1e-6, rtol=0), key
            assert (weights - unpenalised).abs().max() > 1e-2, key
        for wrap, values in found["read"].items():
            for name, value in values.items():
                assert value.dtype == torch.float32
                assert torch.allclose(value, read[name], atol=1e-6), (wrap, name)
        # Each selected layer once, the tied one not again.
        assert found["whole"]["gathers"] == 8
        assert found["whole"]["message"].startswith("layer 3: disentangled_orthogonality is not finite")
        assert found["whole"]["rows"] == ["0", "3", "5", "6", "7", "8", "9", "10", "13"]
