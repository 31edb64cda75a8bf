"""The demo: the lab's own runs, a table, words that follow the numbers, a picture, and what to do next."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orthokit.cli import main
from orthokit.lab import demo
from orthokit.lab.comparison.inference import Sample
from orthokit.lab.recipes.compose import load


def words(text):
    return " ".join(text.split())


def test_the_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "out"
    command = ["demo", "--seeds", "2", "--epochs", "1", "--workers", "1", "--out", str(out)]
    assert main(command) == 0
    text = words(capsys.readouterr().out)
    assert re.search(r"10 runs: about \d+ s, and \d+ MB in", text)
    assert all(f" {arm} " in text for arm in demo.ARMS)
    assert "mean ± sd of 2 seeds" in text
    assert "no filter" not in text
    assert re.search(r"Accuracy: [\d.]+% without a penalty, .* than what another seed does|Differs from none by more", text)
    assert re.search(r"mean \|cosine\| of 0\.\d+ without a penalty, of [\d.e-]+ with", text)
    assert (out / "orthogonality.png").read_bytes()[:4] == b"\x89PNG"
    report = re.search(r"orthokit (report \S+)", text)
    assert main(report[1].split()) == 0
    compare = re.search(r"orthokit (compare \S+) --html", text)
    assert main(compare[1].split()) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert main(command) == 0
    assert "10 runs: about" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}


def test_its_runs_are_those_of_the_command(tmp_path):
    """Arms share everything but the penalty, and each is the recipe whose name the demo prints."""
    arms = demo.runs("digits", 3, None, tmp_path)
    assert list(arms) == ["none", "SO", "strict", "pairs", "welch"]
    for runs in arms.values():
        assert [run.seed for run in runs] == [0, 1, 2]
        assert runs[0].recipe == load(runs[0].folder.parent.name)
        assert runs[0].recipe.model_copy(update={"regularizer": None}) == arms["none"][0].recipe
    assert arms["strict"][0].recipe.regularizer.strength == 0.1
    cifar = demo.runs("cifar10", 1, 4, tmp_path)["SO"][0].recipe
    assert (cifar.data.name, cifar.data.train, cifar.data.validation, cifar.train.epochs) == ("cifar10", 5000, 0, 4)


def test_the_words_follow_the_numbers():
    cosines = {"none": [0.1, 0.12], "SO": [1e-5, 1e-5], "strict": [2e-5, 2e-5]}

    def said(none, so, strict):
        return demo._words({"none": Sample(none), "SO": Sample(so), "strict": Sample(strict)}, cosines)

    accuracy, orthogonality = said((90.0, 91.0, 92.0), (90.5, 91.5, 92.5), (89.0, 91.0, 92.0))
    assert accuracy.startswith("Accuracy: 91.0% without a penalty, 90.7 to 91.5% with one. No difference is larger than")
    assert "cosine| of 0.11 without a penalty, of 1e-05 with SO" in orthogonality
    accuracy, _ = said((90.0, 90.1, 90.2), (95.0, 95.1, 95.2), (90.0, 90.1, 90.3))
    assert accuracy.endswith("Differs from none by more than seeds do (Welch's t, Holm): SO.")
    accuracy, _ = said((90.0,), (95.0,), (90.0,))
    assert "Too few seeds" in accuracy


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc")
def test_terminated_it_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "orthokit.cli", "demo", "--seeds", "1", "--epochs", "2000", "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/0/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "interrupted")
    end = time.monotonic() + 10
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
