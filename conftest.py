"""Runs the examples in docstrings, the README and the documentation as tests."""

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

import orthokit


def setup(namespace):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3))  # what a card regularizes
    namespace.update(vars(orthokit), orthokit=orthokit, ok=orthokit, torch=torch, nn=torch.nn, model=model)


def in_module(namespace):
    """As :func:`setup`, with the private names that a module's own examples use."""
    setup(namespace)
    namespace.update(vars(orthokit.diagnostics), welch_bound=orthokit.welch_bound)


docstrings = Sybil(parsers=[DocTestParser()], patterns=["src/orthokit/**/*.py"], setup=in_module)
pages = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md", "docs/**/*.md"], setup=setup)

pytest_collect_file = (docstrings + pages).pytest()
