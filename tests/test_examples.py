"""Every example runs as a script, learns, and ends with more orthogonal filters than it began with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_all_are_here():
    assert SCRIPTS == ["amp_ema_accumulation.py", "base.py", "with_lightning.py", "with_transformers.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    result = subprocess.run([sys.executable, EXAMPLES / script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    right = re.search(r"([\d.]+)% of the test images right", result.stdout)
    assert right, result.stdout
    assert float(right[1]) > 80
    assert not list(tmp_path.iterdir())
