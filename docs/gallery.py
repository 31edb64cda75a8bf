"""How the tutorials' pictures come onto the site: readable on a phone, and as a notebook shows them."""

from pathlib import PurePosixPath
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

WIDTH = 4.8
"""Inches. A phone shows a picture of this width at three quarters of its size, so that 11 points stay readable."""
STYLE = {
    "figure.figsize": (WIDTH, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.5,
}


def style(gallery_conf: dict[str, Any], tutorial: str) -> None:
    """Begin each tutorial with matplotlib's defaults, and with letters that a phone can show."""
    plt.rcdefaults()
    plt.rcParams.update(STYLE)


def last_value(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Show the picture that a block ends with, such as that of ``report.plot()``, as a notebook does."""
    variables = block_vars["example_globals"]
    figure = variables.get("___")  # sphinx-gallery's name for the value of a last line
    if not isinstance(figure, Figure):
        return ""
    path = PurePosixPath(next(block_vars["image_path_iterator"]))
    double = path.with_stem(f"{path.stem}_2_00x")
    figure.savefig(path, dpi=100)
    figure.savefig(double, dpi=200)
    variables["___"] = None  # a later block may end with no value
    return str(figure_rst([str(path)], gallery_conf["src_dir"], srcsetpaths=[{0: path, 2.0: double}]))
