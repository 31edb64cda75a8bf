"""Sphinx configuration; ``make docs`` builds the site."""

import sys
from importlib.metadata import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

import orthokit.lab.runs.summary  # noqa: F401  # pydantic builds its schemas before autodoc sets TYPE_CHECKING

_about = metadata("orthokit")
project = "orthokit"
copyright = "2026, the orthokit authors"
version = release = _about["Version"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["tutorials"]
html_theme = "furo"
html_title = f"orthokit {version}"
if _repository := dict(each.split(", ") for each in _about.get_all("Project-URL", [])).get("Repository"):
    html_theme_options = {"source_repository": _repository, "source_branch": "main", "source_directory": "docs/"}
html_static_path = ["static"]
html_css_files = ["site.css"]
myst_enable_extensions = ["colon_fence", "deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
nitpicky = False
smartquotes = False  # "--root" is an option and not a dash

# The tutorials: Python files that are executed here, every time, and become pages and notebooks in docs/learn.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "filename_pattern": r"\.py",
    "run_stale_examples": True,
    "abort_on_example_error": True,
    "reset_modules": ("gallery.style",),
    "image_scrapers": ("matplotlib", "gallery.last_value"),
    "image_srcset": ["2x"],
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "copyfile_regex": r"",
    "doc_module": ("orthokit",),
    "backreferences_dir": "learn/used",
    "reference_url": {"orthokit": None},
    "inspect_global_variables": False,
    "min_reported_time": 1,
    "remove_config_comments": True,
}


def setup(app):
    """Pages link to files of the repository, so that they can be read there; on the site these are pages."""
    app.connect("source-read", lambda app, name, content: content.__setitem__(0, generate.on_site(content[0])))


generate.commands()
generate.evidence()
generate.cards()
