"""Every example runs as a script, learns, and reports on its filters."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_all_are_here():
    assert SCRIPTS == ["amp_ema_accumulation.py", "base.py", "with_lightning.py", "with_transformers.py"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.filterwarnings("ignore")  # a script's user sees a framework's own warnings too
def test_example(script, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.modules.pop("base", None)
    printed = capsys.readouterr().out
    right = re.search(r"([\d.]+)% of the test images right", printed)
    assert right, printed
    assert float(right[1]) > (50 if script == "with_transformers.py" else 80)  # five passes are few for a transformer
    assert "wide" in printed
    assert not list(tmp_path.iterdir())
