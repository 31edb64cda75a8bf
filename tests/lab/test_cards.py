"""The README and the cards say what was measured, and their code and recipes are of the penalty they describe."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

import orthokit as ok
from orthokit.cards import read
from orthokit.cli import main
from orthokit.lab.recipes.compose import load
from orthokit.spec import penalty_of

ROOT = Path(__file__).parents[2]
PARTS = ["Use it", "Strength and schedule", "Use it when", "Do not use it when", "Cost", "Interactions", "Value", "Prefers"]
PARTS += ["Tutorials", "What the paper claims", "Reproduced here", "Not reproduced"]


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "docs/fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.results
def test_every_number_is_the_one_that_was_measured(fill):
    for path in fill.files():
        text = path.read_text("utf-8")
        assert fill.fill(text) == text, f"{path.name}: python docs/fill.py"


def test_a_number_follows_its_source(fill, tmp_path, monkeypatch):
    costs = json.loads((ROOT / "benchmarks/cost.json").read_text("utf-8"))
    network = {"step": {"share": {"SO": {"1": {"median": 0.025}, "8": {"median": 0.003}}}}}
    costs["networks"]["cpu"] = {"a": network, "b": {}}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/cost.json").write_text(json.dumps(costs))
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    assert fill.fill("<!--=cost: SO-->1%<!--/-->, <!--=cost:\nSO; 8-->?<!--/-->") == (
        "<!--=cost: SO-->2.5%<!--/-->, <!--=cost:\nSO; 8-->0.3%<!--/-->"
    )


@pytest.mark.parametrize("source", ["cost: XO", "gains: depth; so", "gain: depth; so", "tried: near; so; 7", "gain"])
def test_a_mark_without_a_source_is_an_error(fill, source):
    with pytest.raises(ValueError, match="cannot fill in"):
        fill.fill(f"<!--={source}--><!--/-->")


@pytest.mark.parametrize("penalty", ok.PENALTIES)
def test_a_card_has_all_its_parts(penalty):
    text = read(penalty.__name__)
    assert text.startswith("# ")
    assert "<!--" not in text
    assert "![" not in text
    assert "{term}" not in text
    words = " ".join(text.split())
    assert [part for part in PARTS if f"**{part}" not in words] == []
    assert f": {penalty.long_name}\n" in text
    assert f"**Use it when** {penalty.use}. **Do not" in words
    assert penalty.source.rpartition(", ")[2] in text
    recipe = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    section = tomllib.loads(recipe[1])["regularizer"]
    assert type(penalty_of(section["penalty"])) is penalty
    assert section["strength"] > 0
    assert f"ok.{penalty.__name__}(" in text


@pytest.mark.results
@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "src/orthokit/cards").glob("*.md"))], ids=lambda p: p.name)
def test_cells(path):
    text = path.read_text("utf-8")
    assert not re.findall(r"\b[Nn]o (?:measure|CSV)\b", text)
    cells = [cell for line in re.sub(r"<!--.*?-->", "", text).splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if len(cell.split()) > 40] == []


@pytest.mark.results
@pytest.mark.parametrize("folder", [".", "docs", "docs/reference", "results", "results/questions", "src/orthokit/cards"])
def test_links_lead_to_files_of_the_repository(folder):
    """As pages are read there, too, and not on the site alone."""
    built = [ROOT / "docs/commands.md", *(ROOT / "docs" / name for name in ("evidence", "penalties", "learn"))]
    for path in sorted((ROOT / folder).glob("*.md")):
        if path not in built:
            for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text("utf-8")):
                file = (path.parent / target).resolve()
                assert file.exists(), f"{path}: {target}"
                assert not any(file.is_relative_to(each) for each in built), f"{path}: {target}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "src/orthokit/cards").glob("*.md"))], ids=lambda p: p.name)
def test_recipes_that_are_named_are_there(path):
    for line in re.findall(r"orthokit train ([^`\n]*)", path.read_text("utf-8")):
        for recipe in re.findall(r"[\w.-]+\+[\w.+-]+", line):
            assert load(recipe).train.epochs > 0


def test_the_glossary_and_its_links_know_the_same_words():
    _, entries, _ = (ROOT / "docs/glossary.md").read_text("utf-8").split("```")
    words = [entry.strip().split("\n") for entry in entries.removeprefix("{glossary}").split("\n\n")]
    assert [entry[0] for entry in words if not 2 <= len(entry) <= 3] == []  # a word, and two lines on it
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/reference").glob("*.md"), *(ROOT / "docs/tutorials").glob("*.py")]
    text = "\n".join(page.read_text("utf-8") for page in [*pages, *(ROOT / "src/orthokit/cards").glob("*.md")])
    links = {target or text for text, target in re.findall(r"(?:\{term\}|:term:)`([^`<]+?)(?:\s<([^>`]+)>)?`", text)}
    assert links == {entry[0] for entry in words}


def test_the_first_screen(capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) < 9000
    namespace: dict = {}
    torch.manual_seed(0)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], namespace)
    before, after = map(float, re.fullmatch(r"residual ([\d.]+) -> ([\d.]+)\n", capsys.readouterr().out).groups())
    assert before > 0.6
    assert after < 0.02


@pytest.mark.results
def test_what_is_recommended_stands_in_one_place(capsys):
    """The evidence quotes it word by word, the guide includes it, and the list of penalties ends with it."""
    recommended = (ROOT / "src/orthokit/cards/recommended.md").read_text("utf-8")
    assert recommended.strip() in (ROOT / "results/STUDY.md").read_text("utf-8")
    assert "{include} ../src/orthokit/cards/recommended.md" in (ROOT / "docs/guide.md").read_text("utf-8")
    assert main(["list"]) == 0
    assert "strict disentangled norm" in " ".join(capsys.readouterr().out.split())
