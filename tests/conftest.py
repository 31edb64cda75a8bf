"""Fixtures, and the names that examples in docstrings and pages may use."""

import jaxtyping
import pytest
import torch

from orthokit import checks


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
