"""Sphinx configuration; ``make docs`` builds the site."""

import shutil
import sys
from importlib.metadata import version as _version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fill

import orthokit.lab.runs.summary  # noqa: F401  # pydantic builds its schemas before autodoc sets TYPE_CHECKING

project = "orthokit"
copyright = "2026, the orthokit authors"
version = release = _version("orthokit")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"orthokit {version}"
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
nitpicky = False

# Copies, as links between pages are not found through a symbolic link, and as the numbers of cards are filled in anew.
_docs = Path(__file__).parent
shutil.rmtree(_docs / "evidence", ignore_errors=True)
shutil.copytree(_docs.parent / "results", _docs / "evidence", ignore=shutil.ignore_patterns("runs", "tuning", "*.html", "*.tex"))
shutil.rmtree(_docs / "penalties", ignore_errors=True)
(_docs / "penalties").mkdir()
for _card in fill.CARDS.glob("*.md"):
    _text = fill.fill(_card.read_text("utf-8")).replace("../../../docs/", "../").replace("../../../results/", "../evidence/")
    _pages = "\n```{toctree}\n:glob:\n:hidden:\n\n*\n```\n" if _card.stem == "index" else ""
    (_docs / "penalties" / _card.name).write_text(_text + _pages, "utf-8")
