"""Every tutorial runs, with small numbers, and its words lead somewhere. The site's build runs it in full."""

import ast
import logging
import re
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

import orthokit as ok

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.py"))
SMALL = 2
"""What takes the place of each number of steps, epochs and seeds."""


def prose(text):
    """What a reader reads: the introduction, and the comments that begin with a line of percent signs."""
    introduction = ast.get_docstring(ast.parse(text))
    blocks = re.findall(r"^# %%\n((?:#.*\n)+)", text, re.MULTILINE)
    return "\n".join([introduction, *(re.sub("^# ?", "", block, flags=re.MULTILINE) for block in blocks)])


class Shrink(ast.NodeTransformer):
    """Makes constants in capitals small."""

    def visit_Module(self, module):
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                node.value = ast.Constant(SMALL)
        return ast.fix_missing_locations(module)


def test_all_are_here():
    assert [path.stem for path in TUTORIALS] == ["1_loop", "2_frameworks", "3_checkpoint", "4_compare", "5_fine_tune", "6_tall"]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # a reader sees a framework's own warnings too
def test_runs(path, tmp_path, monkeypatch, capsys):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    for folder in (here, temporary):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    matplotlib.use("agg")
    pictures = []
    monkeypatch.setattr(pyplot, "show", lambda: pictures.append(pyplot.gcf()))
    code = compile(Shrink().visit(ast.parse(path.read_text("utf-8"))), path, "exec")
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        pyplot.close("all")
    assert len(capsys.readouterr().out.splitlines()) > 3
    assert Path.cwd() == here, "the site's build goes back after each block"
    assert list(here.iterdir()) == []
    assert pictures
    for figure in pictures:
        assert figure.get_size_inches()[0] <= 5, "wider pictures cannot be read on a phone"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_ends_in_a_decision(path):
    text = prose(path.read_text("utf-8"))
    assert "At the end you" in " ".join(text.split("\n\n")[1].split())
    *_, decision = re.findall(r"^(.+)\n-+$", text, re.MULTILINE)
    assert decision == "Decide"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    """Sphinx checks that as well, where the whole site is built."""
    text = prose(path.read_text("utf-8"))
    terms = re.findall(r"^(\S.*)\n  \S", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)
    for shown, target in re.findall(r":term:`([^`<]+?)(?: <([^`>]+)>)?`", text):
        assert (target or shown) in terms
    for target in re.findall(r":doc:`(?:[^`<]+<)?([^`>]+)>?`", text):
        file = (path.parent / target.replace("../evidence/", "../../results/")).resolve()
        assert file.with_name(f"{file.name}.md").exists() or file.with_name(f"{file.name}.py").exists(), target
    for name in re.findall(r"``ok\.(\w+)", text):
        assert hasattr(ok, name)


@pytest.mark.results
def test_differences_that_are_quoted_are_those_of_the_results():
    results = " ".join(path.read_text("utf-8").replace(" | ", " ") for path in (ROOT / "results").rglob("*.md"))
    quoted = [each for path in TUTORIALS for each in re.findall(r"[+-][\d.]+ \[[^\]`]+\]", prose(path.read_text("utf-8")))]
    assert quoted
    assert [each for each in quoted if each not in results] == []
