"""What training will take is told before it begins."""

import re
from pathlib import Path

import pytest
import torch

from orthokit.cli import main
from orthokit.lab.recipes.compose import load
from orthokit.lab.training.estimate import BUSY, START, Estimate, estimate


def test_it_grows_with_the_work(tmp_path):
    one = load("nano+digits+strict", ["train.epochs=2"])
    before = torch.get_num_threads(), torch.random.get_rng_state()
    short = estimate([one], tmp_path, device="cpu", threads=1)
    assert (torch.get_num_threads(), torch.equal(torch.random.get_rng_state(), before[1])) == (before[0], True)
    long = estimate([load("nano+digits+strict", ["train.epochs=50"])] * 2, tmp_path, device="cpu", threads=1)
    assert 0 < short.seconds < START
    assert long.seconds > 10 * short.seconds
    assert long.mebibytes == 2 * short.mebibytes > 0


def test_what_does_not_fit_is_left_to_the_run(tmp_path):
    assert estimate([load("nano+cifar10+none")], tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("seconds", "mebibytes", "runs", "text"),
    [
        (0.2, 0.1, 1, f"1 run: about 1 s, and 1 MB in out ({BUSY})"),
        (80.0, 2.4, 2, f"2 runs: about 40 s with 2 at a time, and 2 MB in out ({BUSY})"),
        (7200.0, 1500, 30, f"30 runs: about 60 min with 2 at a time, and 1,500 MB in out ({BUSY})"),
        (9.0e5, 3.0, 2, f"2 runs: about 5 days with 2 at a time, and 3 MB in out ({BUSY})"),
        (None, 3.0, 1, "1 run: about 3 MB in out"),
    ],
)
def test_words(seconds, mebibytes, runs, text):
    assert Estimate(seconds, mebibytes).text(runs, 2, Path("out")) == text


def test_it_stands_before_the_first_epoch(tmp_path, capsys):
    arguments = ["train", "nano+digits+none", "--set", "train.epochs=2", "--out", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert re.match(r"1 run: about \d+ s, and 1 MB in ", out)
    assert main(arguments) == 0
    assert "about" not in capsys.readouterr().out  # nothing is left to do
