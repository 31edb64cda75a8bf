"""What a report says: words, sentences, pairs, comparisons, pages, and the gate."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.cli import main
from orthokit.diagnostics import COPY, random_cosine
from orthokit.report import compare, words
from orthokit.report.gate import Condition
from orthokit.report.measure import COLUMNS
from orthokit.report.words import action_of, ranked, sentence_of
from orthokit.tables import Column, Table


def linear(matrix):
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data.copy_(matrix)
    return layer


def gaussian(o, n):
    return torch.randn(o, n, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", [1, 2, 3, 27, 576])
def test_the_cosine_of_random_filters(n):
    u = F.normalize(torch.randn(400, n, dtype=torch.float64), dim=-1)
    measured = (u @ u.T).tril(-1).abs().sum().item() / (400 * 399 / 2)
    assert random_cosine(n) == pytest.approx(measured, rel=0.02)
    if n > 20:
        assert random_cosine(n) == pytest.approx(math.sqrt(2 / (math.pi * n)), rel=0.02)


def shared(o, n, part):
    """Filters that have a part of one direction in common."""
    k = F.normalize(gaussian(o, n), dim=-1)
    return k + part * F.normalize(gaussian(1, n), dim=-1)


orthonormal = torch.linalg.qr(gaussian(64, 64)).Q
frame = torch.cat([torch.linalg.qr(gaussian(8, 8)).Q, torch.linalg.qr(gaussian(8, 8).flip(0)).Q])


@pytest.mark.parametrize(
    ("matrix", "word"),
    [
        (orthonormal[:32], "orthogonal"),
        (5 * orthonormal[:32], "orthogonal"),  # lengths do not matter
        (orthonormal[:32] + 0.02 * gaussian(32, 64), "near-orthogonal"),
        (gaussian(32, 64), "like random"),
        (shared(32, 64, 1.0), "correlated"),
        (torch.cat([gaussian(31, 64), gaussian(31, 64)[:1]]), "copies"),
        (torch.cat([gaussian(31, 64), -3 * gaussian(31, 64)[:1]]), "copies"),
        (frame, "orthogonal"),  # of a tall layer: as tight a frame as there is
        (gaussian(64, 16), "like random"),
        (shared(64, 16, 1.5), "correlated"),
        (gaussian(2, 3), "like random"),  # one pair tells little
        (gaussian(1, 8), None),
        (gaussian(5, 1), None),
    ],
)
def test_words(matrix, word):
    assert ok.report(linear(matrix)).rows[0]["word"] == word


def test_random_layers_of_every_shape_are_like_random():
    shapes = [(o, n) for o in (4, 16, 64, 200) for n in (9, 27, 64, 576)]
    words = [ok.report(linear(torch.randn(o, n)), spectrum=False).rows[0]["word"] for o, n in shapes for _ in range(5)]
    assert words.count("like random") >= 0.95 * len(words)


def trained():
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 8, 3)
    model.twice = nn.Conv2d(8, 16, 3)
    model.fine = nn.Conv2d(16, 16, 3)
    model.fc = nn.Linear(16, 10)
    model.twice.weight.data[5] = 2 * model.twice.weight.data[3]
    nn.init.orthogonal_(model.fine.weight)
    return model


def test_the_sentence_and_the_line_that_acts():
    report = ok.report(trained())
    assert re.match(
        r"1 of 4 layers holds copies; 2 are like random; 1 is orthogonal\. The least orthogonal: twice \(1 copy\), (stem|fc)",
        report.summary,
    )
    assert report.action == (
        "ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.1, where=ok.matching('stem', 'twice', 'fc'))"
    )
    model = trained()
    namespace = {"ok": ok, "model": model}
    exec(report.action, namespace)
    assert [layer.name for layer in namespace["ortho"].layers] == ["stem", "twice", "fc"]
    assert repr(report).startswith("<orthogonality of Sequential: 1 of 4 layers holds copies")
    assert ok.report(linear(orthonormal)).action == ""
    assert "weights=(0, 1)" in ok.report(linear(8 * gaussian(8, 16))).action
    assert "no angles" in sentence_of(ok.report(nn.Linear(3, 1)).rows)
    assert ranked(report.rows)[0]["layer"] == "twice"
    assert action_of([]) == ""


@pytest.mark.parametrize(("bad", "good"), [(2, 3), (9, 2), (8, 12)])
def test_the_line_that_acts_can_be_run(bad, good):
    model = nn.Sequential()
    for place in range(bad + good):
        model.add_module(f"it's [{place}]*", layer := nn.Linear(24, 24))
        if place >= bad:
            nn.init.orthogonal_(layer.weight)
    scope = {"ok": ok, "model": model}
    exec(ok.report(model).action, scope)
    assert [layer.name for layer in scope["ortho"].layers] == [f"it's [{place}]*" for place in range(bad)]


def test_pairs_and_duplicates():
    model = trained()
    report = ok.report(model)
    assert report.pairs("twice") == [ok.report(model).pairs("twice")[0]]
    (pair,) = report.pairs("twice")
    assert (pair.i, pair.j) == (3, 5)
    assert pair.cosine == pytest.approx(1)
    assert ok.duplicates(model) == {"twice": [pair]}
    every = report.pairs("stem", above=0.0)
    assert len(every) == 28
    assert [abs(p.cosine) for p in every] == sorted((abs(p.cosine) for p in every), reverse=True)
    k = F.normalize(model.stem.weight.detach().flatten(1).double(), dim=-1)
    assert all(p.cosine == pytest.approx((k[p.i] @ k[p.j]).item()) for p in every)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    grouped.weight.data[5] = -grouped.weight.data[3]
    assert [(p.i, p.j, round(p.cosine)) for p in ok.report(grouped).pairs("Conv2d")] == [(3, 5, -1)]
    with pytest.raises(ValueError, match="no layer 'stern' in this report; did you mean 'stem'"):
        report.pairs("stern")
    with pytest.raises(ValueError, match="above must be"):
        report.pairs("stem", above=2)


@pytest.mark.parametrize("affine", [True, False])
def test_merging_copies_leaves_the_output_unchanged(affine):
    torch.manual_seed(3)
    first, norm, second = nn.Conv2d(3, 8, 3, bias=affine), nn.BatchNorm2d(8, affine=affine), nn.Conv2d(8, 4, 3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        if affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        # Channel 5 repeats channel 2 through the normalisation, three times as large; 6 is the filter of 2, shifted.
        for channel, factor in ((5, 3.0), (6, 1.0)):
            first.weight[channel] = factor * first.weight[2]
            if affine:
                first.bias[channel] = factor * first.bias[2]
            norm.running_mean[channel] = factor * norm.running_mean[2]
            norm.running_var[channel] = factor**2 * (norm.running_var[2] + norm.eps) - norm.eps
            if affine:
                norm.weight[channel], norm.bias[channel] = norm.weight[2], norm.bias[2]
        norm.running_mean[6] += 1.0
    x = torch.randn(2, 3, 9, 9)
    whole = nn.Sequential(first, norm, nn.ReLU(), second).eval()
    smaller, merged_norm, after, pairs = ok.merge_copies(first, second, norm=norm)
    assert [(p.i, p.j) for p in pairs] == [(2, 5)]
    merged = nn.Sequential(smaller, merged_norm, nn.ReLU(), after).eval()
    assert smaller.weight.shape[0] == 7
    assert torch.allclose(merged(x), whole(x), atol=1e-5)
    assert first.weight.shape[0] == 8  # the given layers stay as they are


def test_merging_needs_layers_that_follow_each_other():
    with pytest.raises(ValueError, match="8 channels are made, but 4 are read"):
        ok.merge_copies(nn.Conv2d(3, 8, 3), nn.Conv2d(4, 2, 1))
    with pytest.raises(TypeError, match="ungrouped convolution"):
        ok.merge_copies(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 2, 1))


def test_side_by_side():
    before, after = trained(), trained()
    nn.init.orthogonal_(after.stem.weight)
    del after.fc
    table = compare({"before": ok.report(before), "after": ok.report(after)})
    rows = {row["layer"]: row for row in table.rows}
    assert list(rows) == ["stem", "twice", "fine", "fc"]
    assert rows["stem"]["change"] == pytest.approx(rows["stem"]["after: x_random"] - rows["stem"]["before: x_random"])
    assert rows["stem"]["after: word"] == "orthogonal"
    assert rows["fc"]["after: word"] is None
    assert rows["fc"]["change"] is None
    assert any("after lacks 1 layers, such as fc" in note for note in table.notes)
    with pytest.raises(ValueError, match="two reports or more"):
        compare({"one": ok.report(before)})


@pytest.mark.parametrize("name", ["net [v1].pt", "net [bold].pt", "[red]net.pt", "net [nats] x.pt"])
def test_names_of_files_are_shown_as_they_are(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "400")
    for each in (name, "other.pt"):
        torch.save(trained().state_dict(), tmp_path / each)
    assert main(["report", str(tmp_path / name), str(tmp_path / "other.pt")]) == 0
    assert f"{name}: reads as" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["report", str(tmp_path / name), str(tmp_path / "other.pt")]) == 0
    assert f"{name}: copies" in " ".join(capsys.readouterr().out.split())
    rows = ({"layer": "a", "x": 1},)
    table = Table(
        "t [x]", (Column("layer", "layer [l]", "s"), Column("x", "x [/s]", "d")), rows, {"t": {"label": "[all]", "x": 1}}
    )
    assert all(part in str(table) for part in ("t [x]", "layer [l]", "x [/s]", "[all]"))


def test_order_and_top():
    report = ok.report(trained())
    by_cos = report.sorted("max_cos", top=2)
    assert [row["max_cos"] for row in by_cos.rows] == sorted((row["max_cos"] for row in report.rows), reverse=True)[:2]
    assert by_cos.totals == report.totals
    assert "2 of 4 layers are not shown" in str(by_cos)
    assert report.sorted("word").rows[0]["layer"] == "twice"
    assert by_cos.pairs(by_cos.rows[0]["layer"])
    with pytest.raises(ValueError, match="no column 'max_cso'; did you mean 'max_cos'"):
        report.sorted("max_cso")


KEYS = [column.key for column in COLUMNS]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("copies > 0", True),
        ("copies > 3", False),
        ("max_cos >= .95 and o == 8", True),
        ("max_cos > .95 and o > 8", False),
        ("o > 8 or max_cos > .95", True),
        ("not copies > 0", False),
        ("word == 'copies'", True),
        ("word != 'copies'", False),
        ("welch_ratio > 0", False),  # no value meets no comparison
        ("word > 0", None),
        ("copies == 'x'", None),
        ("word > 'a'", None),
        ("copies", None),
        ("copies > o", False),
        ("o < n", False),  # nor a column without one
        ("copies < o", True),
        ("0 < copies < 3", True),
        ("0 < copies < 1", False),
        ("'copies' == word", True),
        ("0 < 1", None),
        ("copies < word", None),
        ("copies in o", None),
        ("copies > 0; import os", None),
        ("__import__('os').system('true') > 0", None),
        ("copies > (1).__class__", None),
        ("copies > True", None),
        ("copis > 0", None),
        ("", None),
        ("(" * 900, None),
        ("not " * 240 + "copies > 0", True),
        ("x" * 2000, None),
    ],
)
def test_conditions(text, met):
    row = dict.fromkeys(KEYS) | {"copies": 1, "max_cos": 0.99, "o": 8, "word": "copies", "layer": "a"}
    if met is None:
        with pytest.raises(ValueError, match=r"condition|no column"):
            Condition(text, COLUMNS)
    else:
        assert Condition(text, COLUMNS).met(row) is met


@pytest.fixture
def file(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_the_gate(file, capsys, tmp_path):
    assert main(["report", str(file), "--fail-if", "copies > 0", "--fail-if", "max_cos > 1"]) == 1
    out, err = capsys.readouterr()
    assert "failed: copies > 0: twice (copies = 1)" in err
    assert "holds copies" in out
    junit = tmp_path / "junit.xml"
    arguments = ["--fail-if", "copies > 0", "--annotations", "github", "--junit", str(junit), "--format", "json"]
    assert main(["report", str(file), *arguments]) == 1
    message = capsys.readouterr()
    assert "::error title=orthokit report net.pt::twice: copies > 0 (copies = 1)" in message.err
    assert json.loads(message.out)  # failures leave it what it is
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["failures"] == "1"
    assert len(suite) == 4
    assert [case.attrib["name"] for case in suite if len(case)] == ["twice"]
    assert main(["report", str(file), "--fail-if", "copies > 1"]) == 0
    assert "passed" in capsys.readouterr().err
    assert main(["report", str(file), "--fail-if", "copis > 1"]) == 2
    assert "did you mean 'copies'" in capsys.readouterr().err
    assert main(["report", str(file), "--exclude", "twice", "--fail-if", "copies > 0"]) == 0
    assert main(["report", str(file), "--junit", str(junit)]) == 2


@pytest.mark.parametrize(
    ("condition", "options", "why"),
    [
        ("copies > 0", ["--operator", "6"], "does not go with --operator"),
        ("sigma_max > 0", ["--no-spectrum"], "leaves out sigma_max"),
    ],
)
def test_a_gate_never_passes_unjudged(file, capsys, condition, options, why):
    assert main(["report", str(file), "--fail-if", condition, *options]) == 2
    assert why in capsys.readouterr().err
    state = torch.load(file)
    state["fine.weight"][0, 0] = math.nan
    torch.save(state, file)
    assert main(["report", str(file), "--fail-if", "max_cos > 2"]) == 1
    assert "fine (NaN, infinite or overflowing weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--html", "x.html"], ["--sort", "o"], ["--top", "1"], ["--picture", "x.png"], ["--no-spectrum"]]
)
def test_options_that_would_do_nothing(file, capsys, tmp_path, options):
    assert main(["report", str(file), "--operator", "6", *options]) == 2
    assert f"{options[0]} is of the layers' filters" in capsys.readouterr().err
    other = tmp_path / "other.pt"
    torch.save(trained().state_dict(), other)
    if options[0] in ("--sort", "--top"):
        assert main(["report", str(file), str(other), *options]) == 2


def test_hostile_names_in_a_gate(capsys, tmp_path):
    name = "a\x1b[31m<x>]]>\n\x00\ud800%0A::error::x"
    torch.save({f"{name}.weight": torch.eye(3)}, tmp_path / "net.pt")
    arguments = ["--fail-if", "layer != ''", "--junit", str(tmp_path / "j.xml"), "--annotations", "github"]
    assert main(["report", str(tmp_path / "net.pt"), *arguments]) == 1
    text = capsys.readouterr()
    assert not re.search(r"[\x00\x1b\ud800]", text.out + text.err)
    assert sum(line.startswith("::error") for line in text.out.splitlines()) == 1
    assert ElementTree.parse(tmp_path / "j.xml").getroot().attrib["failures"] == "1"


def test_filters_of_zeros_are_not_orthogonal():
    def word(matrix):
        return ok.report(linear(matrix)).rows[0]["word"]

    assert word(torch.zeros(5, 5)) is None
    half = gaussian(40, 50)
    half[::2] = 0
    assert word(half) == "like random"
    assert ok.report(linear(torch.zeros(5, 5))).plot()


def test_no_picture_of_nan():
    layer = linear(torch.full((3, 4), math.nan))
    with pytest.raises(ValueError, match="nothing to draw"):
        ok.report(layer).plot("Linear")
    assert "NaN" in ok.report(layer).to_html()
    assert ok.report(nn.Linear(4, 1)).to_html()  # one filter: no word, no legend
    with pytest.raises(ValueError, match="top"):
        ok.report(layer).sorted("o", top=-1)


@pytest.mark.parametrize("wrapped", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_merging_rewrites_plain_weights_only(wrapped):
    with pytest.raises(TypeError, match="computes its weight"):
        ok.merge_copies(wrapped(nn.Linear(3, 4)), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="following computes its weight"):
        ok.merge_copies(nn.Linear(3, 4), wrapped(nn.Linear(4, 3)))
    with pytest.raises(TypeError, match="no values yet"):
        ok.merge_copies(nn.Linear(3, 4, device="meta"), nn.Linear(4, 3, device="meta"))
    with pytest.raises(TypeError, match="no values yet"):
        ok.merge_copies(nn.LazyLinear(4), nn.Linear(4, 3))


def test_merging_among_many_channels():
    first, second = nn.Linear(5, 900), nn.Linear(900, 2)
    with torch.no_grad():
        for value in (first.weight, first.bias):
            value[450:] = 3 * value[:450].flip(0)
    smaller, _, after, merged = ok.merge_copies(first, second)
    assert smaller.out_features == 450
    assert {(pair.i, pair.j) for pair in merged} == {(i, 899 - i) for i in range(450)}
    x = torch.randn(7, 5)
    torch.testing.assert_close(after(smaller(x).relu()), second(first(x).relu()))


def test_choices_of_the_command(file, capsys, tmp_path):
    def layers(*arguments):
        assert main(["report", str(file), "--format", "json", *arguments]) == 0
        return [row["layer"] for row in json.loads(capsys.readouterr().out)["layers"]]

    assert layers("--where", "convs & ~stem") == ["twice", "fine"]
    assert layers("--exclude", "fc", "t*") == ["stem", "fine"]
    assert layers("--sort", "o", "--top", "1") in (["twice"], ["fine"])
    assert layers("--top", "1") == ["twice"]
    assert main(["report", str(file), "--no-spectrum", "--format", "csv"]) == 0
    capsys.readouterr()
    assert main(["report", str(file), "--operator", "6", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 4
    for bad in (["--where", "convs and stem"], ["--sort", "nothing"], ["--top", "0"]):
        assert main(["report", str(file), *bad]) == 2
    capsys.readouterr()
    other = tmp_path / "sub" / "net.pt"
    other.parent.mkdir()
    torch.save(trained().state_dict(), other)
    page = tmp_path / "both.html"
    assert main(["report", str(file), str(other), "--html", str(page), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert "sub/net.pt: word" in rows[0]
    assert "Side by side" in page.read_text("utf-8")
    assert main(["report", str(file), str(file)]) == 2


def test_the_page_needs_nothing_from_outside(tmp_path):
    model = trained()
    model.add_module("<script>alert(1)</script>", nn.Conv2d(16, 4, 1))
    report = ok.report(model)
    text = report.to_html(tmp_path / "report.html", top=2)
    assert (tmp_path / "report.html").read_text("utf-8") == text
    assert report.to_html(top=2) == text
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "prefers-color-scheme: dark" in text
    assert "holds copies" in text
    assert text.count("<figure><figcaption>|cosine| of each pair") == 2
    assert "Pictures of the 2 least orthogonal of 5 layers" in text
    assert "<table>" in report._repr_html_()
    assert "filters</figcaption>" in report.to_html(top=None)  # the layer that reads images


def test_pictures(tmp_path):
    report = ok.report(trained())
    report.plot(path=tmp_path / "all.png")
    report.plot("stem", tmp_path / "stem.svg")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert len(report.plot("stem").axes) == 5  # four pictures, one with a scale
    assert len(report.plot("fc").axes) == 4


def test_the_random_histogram_is_that_of_random_filters():
    from orthokit.plots import _random_share

    edges = np.linspace(0, 1, 11)
    for n in (1, 2, 3, 9):
        u = F.normalize(torch.randn(600, n, dtype=torch.float64), dim=-1)
        c = (u @ u.T).abs()[tuple(torch.tril_indices(600, 600, -1))].clamp(max=1 - 1e-12).numpy()
        assert np.abs(_random_share(edges, n) - np.histogram(c, edges)[0] / len(c)).max() < 0.02


def test_of_a_file_and_of_pandas(file):
    assert ok.report(str(file)).rows[1]["copies"] == 1
    assert ok.report(file).title == "orthogonality of net.pt"
    assert ok.duplicates(file)
    pandas = pytest.importorskip("pandas")
    assert isinstance(ok.report(file).to_pandas(), pandas.DataFrame)


def test_singular_values_far_below_the_largest():
    u, v = torch.linalg.qr(gaussian(20, 20).double()).Q, torch.linalg.qr(gaussian(30, 30).double()).Q[:20]
    sigma = torch.logspace(0, -9, 20, dtype=torch.float64)
    row = ok.report(linear(gaussian(20, 30)).double()).rows[0]
    assert row["condition"] == pytest.approx(row["sigma_max"] / row["sigma_min"])
    layer = linear(gaussian(20, 30)).double()
    layer.weight.data.copy_(u @ torch.diag(sigma) @ v)
    row = ok.report(layer).rows[0]
    assert row["sigma_min"] == pytest.approx(1e-9, rel=1e-5)


def test_the_thresholds_are_those_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    rules = {
        row[0]: row[1]
        for row in re.findall(r"^\| (?:{term}`)?([a-z -]+)`? \| (.*?) \| [^|]*", page.replace("\\|", "¦"), re.MULTILINE)
    }
    assert set(words.WORDS) <= set(rules)
    assert rules["copies"].endswith(f"> {COPY:g}")
    assert rules["orthogonal"].endswith(f"at most {words.ORTHOGONAL:g}")
    assert rules["near-orthogonal"].endswith(f"below {words.NEAR:g} times random")
    assert rules["correlated"].endswith(f"above {words.CORRELATED:g} times random")
