"""The instrument: figures against numpy, totals, printing, and broken or unusual networks."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import orthokit as ok
import references as slow
from orthokit import diagnostics


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 20, 3, groups=5), nn.Linear(20, 4)).double()


@pytest.mark.parametrize("place", range(4))
def test_every_figure_against_numpy(place):
    m = network()
    row = ok.report(m).rows[place]
    groups = ok.kernel_of(m[place]).matrix.detach().numpy()
    o, n = groups.shape[1:]
    cosines = np.abs(np.concatenate([slow.pairs(k) for k in groups]))
    lengths = np.linalg.norm(groups, axis=-1)
    blocks = np.zeros((len(groups) * o, len(groups) * n))  # the layer as one block-diagonal matrix
    for g, k in enumerate(groups):
        blocks[g * o : (g + 1) * o, g * n : (g + 1) * n] = k
    sigma = np.concatenate([np.linalg.svd(k, compute_uv=False) for k in groups])
    p = sigma / sigma.sum()
    expected = {
        "pairs": len(cosines),
        "mean_cos": cosines.mean(),
        "max_cos": cosines.max(),
        "copies": int((cosines > 0.99).sum()),
        "mean_length_error": np.abs(lengths - 1).mean(),
        "max_length_error": np.abs(lengths - 1).max(),
        "sigma_min": sigma.min(),
        "sigma_max": np.linalg.norm(blocks, 2),
        "condition": sigma.max() / sigma.min(),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "stable_rank": np.linalg.norm(blocks) ** 2 / np.linalg.norm(blocks, 2) ** 2,
    }
    if o <= n:
        residual = blocks @ blocks.T - np.eye(len(blocks))
        expected["residual"] = np.linalg.norm(residual) / math.sqrt(len(blocks))
    else:
        u = groups[0] / lengths[0][:, None]
        expected["tightness"] = np.linalg.norm(u.T @ u - o / n * np.eye(n)) / (o * math.sqrt(1 - 1 / n))
        expected["welch_ratio"] = cosines.max() / slow.welch(o, n)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert row["shape"] == ("wide" if o <= n else "tall")
    assert row["x_random"] == pytest.approx(cosines.mean() / diagnostics.random_cosine(n))
    assert row["mean_length"] == pytest.approx(lengths.mean())


def test_totals():
    report = ok.report(network())
    rows, totals = report.rows, report.totals
    assert {name: total["label"] for name, total in totals.items()} == {
        "wide": "wide convolutions (2)",
        "tall": "tall convolutions (1)",
        "all": "all convolutions (3)",
        "other": "other layers (1)",
    }
    total = totals["all"]
    assert total["pairs"] == sum(row["pairs"] for row in rows[:3])
    assert total["mean_cos"] == pytest.approx(sum(row["mean_cos"] * row["pairs"] for row in rows[:3]) / total["pairs"])
    assert total["max_cos"] == max(row["max_cos"] for row in rows[:3])
    assert totals["tall"]["tightness"] == pytest.approx(rows[1]["tightness"])
    assert totals["other"]["max_cos"] == rows[3]["max_cos"]
    linear = ok.report(nn.Sequential(nn.Linear(4, 4), nn.Linear(2, 4))).totals
    assert [total["label"] for total in linear.values()] == ["wide (1)", "tall (1)", "all (2)"]


def test_ideal_kernels_score_zero():
    wide, tall = nn.Linear(9, 5), nn.Linear(4, 8)
    nn.init.orthogonal_(wide.weight)
    nn.init.orthogonal_(tall.weight, gain=2**0.5)
    with torch.no_grad():
        tall.weight.copy_(torch.cat([torch.eye(4), torch.eye(4)]))
    rows = ok.report(nn.Sequential(wide, tall)).rows
    assert rows[0]["residual"] < 1e-6
    assert rows[0]["max_cos"] < 1e-6
    assert rows[1]["tightness"] < 1e-6
    assert rows[1]["copies"] == 4
    assert rows[1]["effective_rank"] == pytest.approx(4)


def test_angles_in_blocks(monkeypatch):
    m = torch.randn(3, 50, 7, dtype=torch.float64)
    whole = diagnostics.angles(m)
    monkeypatch.setattr(sys.modules["orthokit.diagnostics.angles"], "BLOCK", 200)
    for one, other in zip(diagnostics.angles(m), whole, strict=True):
        assert torch.allclose(one, other)


def test_unusual_layers():
    m = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(5, 1), nn.Linear(1, 3), nn.Linear(3, 3))
    nn.init.zeros_(m[3].weight)
    rows = ok.report(m).rows
    assert [row["mean_cos"] for row in rows[:2]] == [None, None]
    assert rows[2]["tightness"] == 0
    assert rows[2]["welch_ratio"] == pytest.approx(1)
    assert (rows[3]["effective_rank"], rows[3]["stable_rank"], rows[3]["condition"]) == (0, 0, math.inf)
    assert "–" in str(ok.report(m))
    json.loads(ok.report(m).to_json())


def test_broken_layers_are_shown():
    m = network()
    with torch.no_grad():
        m[1].weight[0] = float("nan")
    report = ok.report(m)
    assert report.rows[1]["mean_cos"] is None
    assert "NaN, infinite or overflowing weights, left out of the totals: 1" in str(report)
    assert report.totals["wide"]["max_cos"] < 1


def test_formats(tmp_path):
    report = ok.report(network())
    data = json.loads(report.to_json(tmp_path / "r.json"))
    assert data == json.loads((tmp_path / "r.json").read_text())
    assert data["layers"][0]["mean_cos"] == report.rows[0]["mean_cos"]
    lines = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "r.csv"))))
    assert [line["layer"] for line in lines] == ["0", "1", "2", "3"]
    assert float(lines[2]["stable_rank"]) == report.rows[2]["stable_rank"]
    assert report.to_dict()["totals"]["all"] == report.totals["all"]


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_print_fits_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(ok.report(network()))
    assert max(map(len, text.splitlines())) <= width
    if width > 20:
        assert "mean |c|" in text
        assert "…" not in text
    assert ("  eff. rank" in text) == (width == 200)
    if width < 200:
        assert "not shown at this width:" in " ".join(text.split())
        assert "eff. rank" in " ".join(text.split())  # among what is not shown


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    m = network().to(dtype)
    assert ok.report(m).rows[0]["mean_cos"] == pytest.approx(ok.report(m.float()).rows[0]["mean_cos"])
