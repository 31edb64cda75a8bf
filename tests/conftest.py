"""Fixtures, and the names that examples in docstrings and pages may use."""

import pytest
import torch

from orthokit import checks


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    checks.warn_once.cache_clear()
