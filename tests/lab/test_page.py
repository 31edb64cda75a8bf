"""The page and the figures of a comparison: well-formed, complete without network, the same each time, and whole in a browser."""

import base64
import html
import html.parser
import itertools
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from made_up import made_up
from orthokit import palette
from orthokit.lab.comparison.comparison import compare
from orthokit.lab.reporting import words
from orthokit.lab.reporting.drawing import arm_colours, groups
from orthokit.lab.reporting.figures import figures
from orthokit.lab.reporting.page import page
from orthokit.plots import COLOURS

ARMS = {"none": 0.0, "so": 0.5, "disentangled": 2.0, "Disentangled(relax=share(q=0.1), form='welch'), 0.1": 3.0}
HOSTILE = "<b>&\"x'</script>$\\frac"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "wbr"}


class Outline(html.parser.HTMLParser):
    """Elements in order with their attributes; fails where they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="module")
def comparison():
    return compare(made_up(ARMS), title="ResNets & small images")


@pytest.fixture(scope="module")
def drawn(comparison):
    return figures(comparison)


@pytest.fixture(scope="module")
def text(comparison, drawn):
    return page(comparison, command="orthokit compare runs/study", drawn=drawn)


def test_figures_are_there(drawn):
    panels = {"training", "accuracy", "fgsm", "pgd", "pgd_l2", "noise", "severity", "kinds", "rank"}
    of_panels = {re.search(r"-(\w+?)-ResNet_(8|20)$", name) for name in drawn} - {None}
    assert {actual[1] for actual in of_panels} == panels
    assert len(of_panels) == 2 * len(panels)
    assert {"result-accuracy", "result-differences", "result-contrasts", "cost-share", "cost-speed"} <= set(drawn)
    assert "mean difference, disentangled +" in drawn["result-contrasts"].alt


def test_figures_are_xml_with_words(drawn):
    for drawing in drawn.values():
        ElementTree.fromstring(drawing.svg)
        assert drawing.size[0] == 760
        assert 150 < drawing.size[1] < 800
        assert drawing.alt.startswith(drawing.caption)
        assert len(drawing.alt) > len(drawing.caption) + 10
        assert "<text" in drawing.svg
        assert "<dc:date>" not in drawing.svg
        assert f"<title>{html.escape(drawing.caption, quote=False)}</title>" in drawing.svg
        assert "prefers-color-scheme: dark" in drawing.svg


def test_numbers_on_axes_are_whole(drawn):
    """Files are made smaller by cutting digits of coordinates; those that are read stay."""
    words = ElementTree.fromstring(drawn["orthogonality-training-ResNet_8"].svg).iter("{http://www.w3.org/2000/svg}text")
    labels = [word.text for word in words]
    assert {"0.1", "0.01", "0.001"} <= set(labels)
    assert "0.00" not in labels


@pytest.fixture(scope="module")
def of_many():
    """A comparison of 15 arms in one panel, whose lines end close to each other."""
    return compare(made_up({"none": 0.0} | {f"arm {k}": k / 100 for k in range(14)}, (8,), seeds=2, parts=False))


def test_names_of_lines_stand_apart(of_many):
    (drawing,) = figures(of_many, ["orthogonality-training"]).values()
    texts = ElementTree.fromstring(drawing.svg).iter("{http://www.w3.org/2000/svg}text")
    places = [(text.text, float(text.get("x")), float(text.get("y"))) for text in texts if text.text in of_many.arms]
    names = [name for name, _, _ in places]
    assert set(names) == set(of_many.arms)
    assert names.count("none") == 2 * names.count("arm 0") == 4  # wide and tall layers, in two groups of arms
    assert len({x for _, x, _ in places}) == 1
    heights = sorted(y for _, _, y in places)
    assert all(after - before > 13 for before, after in itertools.pairwise(heights))


def test_arms_that_share_an_axis_differ_in_colour(of_many):
    colours, parts = arm_colours(of_many), groups(of_many, of_many.arms)
    assert [len(part) for part in parts] == [8, 8]
    assert all(len({colours[arm] for arm in part}) == 8 for part in parts)
    assert [arm for arm in of_many.arms if colours[arm] == palette.BASELINE] == ["none"]
    few = compare(made_up({"none": 0.0, "one": 1.0}, (8,), parts=False))
    assert groups(few, ["none"]) == [["none"]]
    assert groups(few, ["one"]) == [["one"]]


def contrast(one, two):
    """The ratio of WCAG."""

    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_colours_read_on_both_grounds():
    light, dark = palette.GROUND, palette.DARK[palette.GROUND]
    for colour in (*palette.COLOURS, *palette.WORDS.values()):
        assert min(contrast(colour, light), contrast(colour, dark)) > 3
    for ink in (palette.INK, palette.SOFT, *map(palette.pen, palette.COLOURS)):
        assert min(contrast(ink, light), contrast(palette.DARK[ink], dark)) > 4.5
    assert all(contrast(chip, "#ffffff") > 4.5 for chip in palette.WORDS.values())


def test_figures_leave_the_settings_of_matplotlib_alone(comparison):
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.grid": True}):
        assert figures(
            compare(made_up({"none": 0, "so": 1}, (8,), parts=False)), ["result-differences", "orthogonality-training"]
        )
        assert matplotlib.rcParams["font.size"] == 31


def test_page_is_well_formed(comparison, text):
    outline = Outline(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for attributes in outline.all("th"))
    assert all(attributes["alt"] and int(attributes["width"]) and int(attributes["height"]) for attributes in outline.all("img"))
    assert "<title>ResNets &amp; small images</title>" in text
    whole = [words.answer(comparison), *words.power(comparison), *words.notes(comparison), words.explanation(comparison)]
    for sentence in [*whole, "orthokit compare runs/study"]:
        assert sentence in outline.text
    assert "24 runs, 2 panels, 4 arms, 3 seeds an arm" in outline.text
    assert "None" not in outline.text


def test_page_needs_nothing_else(text):
    outline = Outline(text)
    assert not outline.all("script", "link", "iframe", "object", "embed")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert all(attributes["src"].startswith("data:image/svg+xml;base64,") for attributes in outline.all("img"))
    assert not any(name.startswith("on") for _, attributes in outline.found for name in attributes)
    for attributes in outline.all("img"):
        ElementTree.fromstring(base64.b64decode(attributes["src"].partition(",")[2]))


def test_page_is_the_same_each_time(comparison, drawn, text):
    again = compare(made_up(ARMS), title=comparison.title)
    of_each_kind = figures(again, [name for name in drawn if not name.endswith("ResNet_20")])
    assert len(of_each_kind) == 14
    assert page(again, command="orthokit compare runs/study", drawn=drawn | of_each_kind) == text


def test_hostile_names():
    results = made_up({"none": 0, HOSTILE: 2}, (8,))
    for result in results:
        result.summary["study"]["panel"] = f"panel {HOSTILE}"
    outline = Outline(page(compare(results, title=HOSTILE, flagged=[HOSTILE]), command=HOSTILE))
    assert not outline.all("b", "script")
    assert outline.text.count(HOSTILE) >= 10


def test_names_that_fall_together():
    arms = {"none": 0, "x" * 80 + "a" + "y" * 80: 1, "x" * 80 + "b" + "y" * 80: 2}
    results = made_up(arms, parts=False)
    for result in results:
        result.summary["study"]["panel"] = "a b" if result.recipe.network.model_extra["depth"] == 8 else "a/b"
    drawn = figures(compare(results), ["orthogonality-training", "result-accuracy"])
    assert sum("orthogonality-training-a_b" in name for name in drawn) == 2
    assert {"2: xxx", "3: xxx"} <= set(re.findall(r"\d: xxx", drawn["result-accuracy"].svg))


def test_single_seeds_without_parts():
    results = made_up(ARMS, seeds=1, parts=False)
    kept = [result for result in results if result.summary["study"] != {"arm": "none", "panel": "ResNet-20"}]
    for result in kept[:2]:
        result.summary["orthogonality"].pop("over")
    kept = [replace(result, history=()) if result.seed == 0 and k < 2 else result for k, result in enumerate(kept)]
    comparison = compare(kept)
    assert comparison.flags
    drawn = figures(comparison)
    outline = Outline(page(comparison, drawn=drawn))
    assert "Read this first" in outline.text
    assert all(flag in outline.text for flag in comparison.flags)
    assert "None" not in outline.text
    assert "nan" not in outline.text.split()
    assert not any(name.startswith(("robustness", "features")) for name in drawn)
    assert COLOURS[0] in drawn["orthogonality-accuracy-ResNet_8"].svg
    assert COLOURS[0] not in drawn["orthogonality-accuracy-ResNet_20"].svg  # the baseline's, which is missing there


def test_parts_that_some_runs_lack():
    results = made_up(ARMS, (8,))
    results[0].parts.pop("noise")
    results[4].parts["attacks"].pop("pgd_l2")
    for result in results:
        result.parts.pop("features")
        result.parts["attacks"].pop("fgsm")
    names = figures(compare(results), ["robustness", "features"]).keys()
    assert names == {f"robustness-{name}" for name in ("noise", "severity", "kinds")}


def test_parts_that_do_not_compare_are_not_drawn():
    results = made_up(ARMS, (8,))
    for part in ("attacks", "features", "corruptions", "noise"):
        results[0].parts[part]["settings"]["images"] = 7
    assert not figures(compare(results), ["robustness", "features"])


def test_near_orthogonality_over_decades_is_on_a_logarithmic_axis():
    results = made_up({"none": 0, "one": 0, "two": 0}, (8,))
    levels = {arm: re.findall(r">([\d.e-]+)</text>", _drawn(results, arm)) for arm in ("one", "two")}
    assert {"0.001", "0.01", "0.1"} <= set(levels["one"])  # 0.11 and 0.0004
    assert "0.001" not in levels["two"]  # 0.11 and 0.03


def _drawn(results, arm):
    some = [result for result in results if result.summary["study"]["arm"] in ("none", arm)]
    return figures(compare(some, metric="under_cos"), ["result-under_cos"])["result-under_cos"].svg


def test_one_panel_and_another_primary_metric_and_factor():
    outline = Outline(page(compare(made_up({"none": 0, "so": 1}, (8,)), metric="nll", factor=("regularizer", "train.epochs"))))
    assert "1 panel, 2 arms" in outline.text
    assert "Near-orthogonality and NLL, the most orthogonal arm first: " in outline.text
    assert "regularizer, train.epochs" in outline.text
    assert "epochs = 20" in outline.text


def test_a_run_that_diverged():
    results = made_up({"none": 0, "so": 1}, (8,), seeds=1)
    results = [replace(result, parts={"accuracy": result.parts["accuracy"]}) for result in results]
    results[1].parts["accuracy"]["nll"] = math.nan
    results[1].summary["orthogonality"]["under"]["mean_cos"] = math.nan
    results[1].history[-1]["under"] = math.nan
    text = page(compare(results, metric="nll"))
    assert "no NLL, or no finite one, of so (seed 0)" in text
    assert "Nothing can be compared with the baseline." in text


def test_many_arms_and_panels():
    arms = {"none": 0.0} | {
        f"Disentangled(relax=share(q=0.{k}), form='welch', count='expected'), 0.1": k / 4 for k in range(1, 8)
    }
    results = made_up(arms, (8, 14, 20, 32, 56, 110), seeds=2)
    results = [replace(result, parts={"noise": result.parts["noise"]}) for result in results]
    comparison = compare(results)
    kinds = ["result", "robustness", "features", "cost", "orthogonality-training-ResNet_8", "orthogonality-accuracy-ResNet_8"]
    outline = Outline(page(comparison, drawn=(drawn := figures(comparison, kinds))))
    captions = [attributes["alt"] for attributes in outline.all("img")]
    assert sum(caption.startswith("Differences") for caption in captions) == 1
    assert sum(caption.startswith("Accuracy under noise") for caption in captions) == 3
    assert sum(caption.startswith("Noise by depth") for caption in captions) == 1
    assert all(150 < int(attributes["height"]) < 1300 for attributes in outline.all("img"))
    assert "drawn of 3 of 6 panels" in outline.text
    assert "None" not in outline.text
    bare = compare([replace(result, parts={}) for result in results])
    assert not figures(bare, ["robustness"])
    assert "of 6 panels" not in page(bare, drawn={name: each for name, each in drawn.items() if "robustness" not in name})


def test_long_names_of_panels_stay_whole():
    comparison = compare(made_up({"none": 0.0, "so": 1.0}, (8, 14, 20, 32, 56), parts=False))
    panels = tuple(replace(panel, name=f"{panel.name}, CIFAR-100", values={}) for panel in comparison.panels)
    (drawing,) = figures(replace(comparison, panels=panels), ["result-accuracy"]).values()
    assert all(f">{panel.name}<" in drawing.svg for panel in panels)


def _chromium(folder, file, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=5000"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


LOOK = """<script>onload = () => {
  const page = document.documentElement, images = [...document.images];
  parent.document.title = [innerWidth, page.clientWidth, page.scrollWidth, images.length,
    images.filter(image => image.complete && image.naturalWidth > 0).length].join(" ");
}</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(text, tmp_path, width):
    """In a frame, as a window is never narrower than 500 pixels."""
    (tmp_path / "page.html").write_text(text.replace("</body>", LOOK), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!DOCTYPE html><body><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>', "utf-8"
    )
    done = _chromium(tmp_path / "profile", frame, f"--window-size={width + 100},1000", "--dump-dom")
    title = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert title, done.stdout[:500]
    inner, client, scroll, images, whole = map(int, title[1].split())
    assert inner == width
    assert scroll == client
    assert images == whole == text.count("<img ")
    assert "CONSOLE" not in done.stderr
