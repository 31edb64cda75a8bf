"""Names and messages of strangers: nothing that a terminal, a spreadsheet, a page or a picture would act on."""

import csv
import io
import unicodedata
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file

import orthokit as ok
from made_up import made_up
from orthokit.checks import printable, warn_once
from orthokit.cli import main
from orthokit.lab.comparison.comparison import compare
from orthokit.lab.reporting.figures import figures
from orthokit.lab.reporting.markup import latex, markdown
from orthokit.lab.reporting.page import page
from orthokit.lab.reporting.tables import numbers
from orthokit.tables import to_csv

HOSTILE = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;pwned\x07",
    "c1": "\x9b31m\x85",
    "nul": "a\x00b",
    "bidi": "a\u202egnp.exe",
    "line": "a\u2028b\rc\vd",
    "zero width": "a\u200bb\ufeff",
    "noncharacter": "a\ufffeb",
    "formula": "=HYPERLINK(1)",
    "plus": "+1+cmd",
    "at": "@SUM(1)",
    "markup": "[/x][bold]y[/bold]",
    "maths": "$\\frac{1}{$",
    "html": "<script>alert(1)</script>",
    "image": "![x](http://example.org/x.png)",
    "link": "[x](javascript:alert(1))",
    "reference": "[x][y]",
    "address": "[x](http://example.org)",
    "code": "a`b`c",
    "escaped": "\\`b\\`",
    "lines": "a\n# b",
    "pipe": "a|b",
}


def dangerous(text):
    """Characters that are neither printable, nor spaces, nor ends of lines."""
    return {c for c in text if not c.isprintable() and c != "\n" and unicodedata.category(c) != "Zs"}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])))
def test_printable(text):
    shown = printable(text)
    assert not dangerous(shown)
    assert "\n" not in shown
    assert printable(shown) == shown
    shown.encode("utf-8")
    if not dangerous(text) and "\n" not in text:
        assert shown == text


def test_long_text_loses_its_middle():
    assert len(printable("x" * 10**6)) < 2100
    assert printable("x" * 3000, lines=True) == "x" * 3000


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=20) | st.floats(allow_nan=False).map(repr), st.floats(allow_nan=False))
def test_a_csv_holds_no_formula_and_keeps_numbers(text, number):
    (header, row) = csv.reader(io.StringIO(to_csv(["name", "value"], [{"name": text, "value": number}])))
    assert header == ["name", "value"]
    assert float(row[1]) == number
    assert not dangerous(row[0])
    if row[0].lstrip().startswith(("=", "+", "-", "@")):
        assert [float(word) for word in row[0].split()]


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_layers_of_a_saved_network(tmp_path, capsys, name):
    path = tmp_path / "net.safetensors"
    save_file({f"{name}.weight": torch.randn(4, 3, 2, 2), "b.weight": torch.full((4, 3, 2, 2), torch.nan)}, path)
    for options in ([], ["--format", "csv"], ["--format", "json"]):
        assert main(["report", str(path), *options]) == 0
        out = capsys.readouterr().out
        assert not dangerous(out)
    assert main(["report", str(path), "--layers", f"no{name}"]) == 2
    captured = capsys.readouterr()
    assert not dangerous(captured.out + captured.err)
    assert captured.err.count("\n") == 1


def compared(name):
    return compare(made_up({"none": 0.0, name: 1.0}, seeds=2, parts=False), baseline="none", title=name, flagged=[name])


@pytest.mark.parametrize("name", [*HOSTILE.values(), "a\udc80b"], ids=[*HOSTILE, "surrogate"])
def test_names_of_arms_in_markdown_latex_and_csv(name):
    comparison = compared(name)
    for text in (marked := markdown(comparison), latex(comparison), numbers(comparison).to_csv()):
        assert not dangerous(text)
        text.encode("utf-8")
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(marked)
    kinds = {child.type for token in tokens for child in (token, *(token.children or ()))}
    assert not kinds & {"image", "link_open", "html_inline", "html_block", "code_inline"}


def test_names_of_arms_in_pages_and_figures():
    comparison = compared("".join(HOSTILE.values()) + "\udc80")
    drawn = figures(comparison)
    assert drawn
    assert not dangerous(page(comparison, drawn=drawn))
    for drawing in drawn.values():
        ElementTree.fromstring(drawing.svg)
        assert not dangerous(drawing.svg + drawing.alt)


def test_errors_are_one_line_without_markup(tmp_path, capsys):
    for name in ("[/x]", "[bold]a", "a\nb", "\x1b[31m", "\udcff", "\\"):
        assert main(["report", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("orthokit: ")
        assert err.count("\n") == 1
        assert not dangerous(err)
        assert printable(name).replace("\\n", " ") in err


def test_warnings():
    with pytest.warns(UserWarning, match=r"^a\\x1b\[31m$"):
        warn_once("a\x1b[31m")


def test_a_report_prints_itself_safely():
    state = {"a\x1b[31m.weight": torch.randn(2, 3), "nan\x07.weight": torch.full((2, 3), torch.nan)}
    report = ok.report(state)
    assert not dangerous(str(report))
    assert report.to_dict()["layers"][0]["layer"] == "a\x1b[31m"
