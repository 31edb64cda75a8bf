"""Fixtures, and the names that examples in docstrings and pages may use."""

import gc
import subprocess
from pathlib import Path

import jaxtyping
import pytest
import torch

from orthokit import checks


def pytest_collection_modifyitems(items):
    """A source distribution has no results: what is checked of those that are kept is checked in the repository."""
    if not (Path(__file__).parents[1] / "results").is_dir():
        for item in items:
            if item.get_closest_marker("results"):
                item.add_marker(pytest.mark.skip(reason="the kept results are in the repository only"))


def pytest_collection_finish():
    """Modules stay until the end: leave them out of all further searches for garbage, half of the time of a Trainer's run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    checks.warn_once.cache_clear()


@pytest.fixture
def unchecked():
    """Without the type checker of the test run, as users call us: arguments of the wrong kind reach our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def forked(monkeypatch):
    """Processes of the command line, and those that they start, are forked instead of importing everything: see forked.py."""
    from forked import forking  # not before: it imports the command line

    monkeypatch.setattr(subprocess.Popen, "__init__", forking)
