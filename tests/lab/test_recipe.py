"""Recipes: parts and files, merging, strictness, identity."""

import hashlib
import itertools
import time
import tomllib
from pathlib import Path

import pytest

from orthokit.lab.recipes.compose import KINDS, label, load, merge, name_of, overview, parts, read_toml
from orthokit.lab.recipes.recipe import Recipe, differences

BUDGETS = ("nano", "quick", "standard-200", "standard-30")
NETWORKS = ("resnet20", "resnet56", "resnet110", "resnet18", "resnet34", "wrn16-8", "wrn28-10")
ARMS = ("none", "so", "srip", "ocnn", "eadk", "strict", "welch")
SETS = ("cifar10", "cifar100")
DIGESTS = {
    ("nano", "cifar10"): "0bde2750473ce8e3",
    ("nano", "cifar100"): "758425b336159890",
    ("quick", "cifar10"): "2dcf8b96ff027b9f",
    ("quick", "cifar100"): "1104b42a8cf4e0f8",
    ("resnet20", "cifar10"): "0cbfa5547e30d25a",
    ("resnet20", "cifar100"): "ddaa951def9a8bc5",
    ("resnet56", "cifar10"): "c5d09a8992d60828",
    ("resnet56", "cifar100"): "27cf793b194c36eb",
    ("resnet110", "cifar10"): "0f7019e183ac9b6e",
    ("resnet110", "cifar100"): "d843f3f917d90a6d",
    ("resnet18", "cifar10"): "e89ffad31ba0ca05",
    ("resnet18", "cifar100"): "1bc3ac5d958ee6de",
    ("resnet34", "cifar10"): "4b1158bac7cf12ca",
    ("resnet34", "cifar100"): "07779ecafebee549",
    ("wrn16-8", "cifar10"): "85e349ef4a0e6663",
    ("wrn16-8", "cifar100"): "70cf46b9d8898277",
    ("wrn28-10", "cifar10"): "d09e66550ed2deda",
    ("wrn28-10", "cifar100"): "a432515afca5c506",
}
"""By network and set, of the recipes with all ARMS: runs are kept by what their recipe says, so that it must not change."""
SMALL = {"data": {"name": "synthetic"}, "network": {"kind": "resnet", "depth": 8}, "train": {"epochs": 2}}


def small(**sections):
    return Recipe.of({**SMALL, **sections})


def composed(base, name, arm):
    """The pieces of a recipe: networks go with the papers' budget, and SRIP with the schedule for it."""
    short = base in BUDGETS
    return [*([base] if short else ["standard-200", base]), name, "srip-short" if short and arm == "srip" else arm]


@pytest.mark.parametrize(("base", "name"), DIGESTS)
def test_recipes_are_what_they_were(base, name):
    text = "".join(load("+".join(composed(base, name, arm))).to_toml() for arm in ARMS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[base, name]


def test_order_does_not_matter_between_kinds():
    for base, name, arm in [("nano", "cifar10", "strict"), ("resnet20", "cifar100", "srip"), ("wrn16-8", "digits", "so")]:
        pieces = composed(base, name, arm)
        assert len({load("+".join(order)).to_toml() for order in itertools.permutations(pieces)}) == 1


@pytest.mark.filterwarnings("ignore:form='pairs'")
def test_every_part_is_listed_and_fits_the_others():
    known = parts()
    by_kind = {kind: [name for name, part in known.items() if part.kind == kind] for kind in KINDS}
    assert set(by_kind["budget"]) == set(BUDGETS)
    assert set(by_kind["network"]) == set(NETWORKS)
    assert set(by_kind["data"]) == {*SETS, "digits"}
    for name, part in known.items():
        assert 10 < len(part.summary) < 110, name
        assert f"  {name} " in overview()
    for budget, network, data in itertools.product(by_kind["budget"], by_kind["network"], by_kind["data"]):
        recipe = load(f"{budget}+{network}+{data}")
        assert (recipe.data.name, recipe.regularizer) == (data, None)
        assert recipe.network == load(f"{network}+nano+cifar10").network
        assert recipe.train.epochs == load(f"{budget}+resnet20+cifar10").train.epochs
    for penalty in by_kind["penalty"]:
        recipe = load(f"nano+digits+{penalty}")
        model = recipe.network.build(1, 10)
        assert penalty == "none" or recipe.regularizer.build(model)().item() > 0
        assert recipe.model_copy(update={"regularizer": None}) == load("nano+digits")
    assert load("nano+cifar10").network.depth == 8
    assert load("quick+cifar100+welch").network.depth == 20


def test_digits_fit_every_budget():
    for budget in BUDGETS:
        recipe = load(f"{budget}+resnet20+digits")
        images = recipe.images(Path())
        assert (len(images.train), len(images.validation), images.train.pixels.shape[-1]) == (240, 60, 8)
        assert len(images.train) // recipe.train.batch == 10


def test_the_protocol():
    recipe = load("resnet20+standard-200+cifar10+strict")
    assert (recipe.train.lr, recipe.train.batch, recipe.train.epochs, recipe.train.weight_decay) == (0.1, 128, 200, 5e-4)
    assert (recipe.train.schedule, recipe.train.warmup, load("standard-30+resnet110+cifar10").train.warmup) == ("cosine", 0, 1)
    wide = load("standard-200+wrn28-10+cifar100").train
    assert (wide.weight_decay, [round(part * 200) for part in wide.milestones]) == (5e-4, [60, 120, 160])
    assert recipe.network.build(3, 10).blocks[3].shortcut[0].weight.shape == (32, 16, 1, 1)  # projection shortcuts
    model = recipe.network.build(3, 10)
    assert len(recipe.regularizer.build(model).layers) == 21


def test_files_among_parts(tmp_path, monkeypatch):
    """Files come last, wherever they stand; their names may have a +, and what they extend is relative to them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    (tmp_path / "a+b/mine.toml").write_text('extends = "so"\n[train]\nepochs = 3\n[regularizer]\nstrength = 0.5\n')
    (tmp_path / "a+b/over.toml").write_text('extends = ["nano+digits", "strict", "mine.toml"]\n')
    (tmp_path / "strict").mkdir()
    for reference in ("nano+cifar10+strict+a+b/mine.toml", "a+b/mine.toml+cifar10+./a+b/mine.toml+nano"):
        recipe = load(reference)
        assert (recipe.data.name, recipe.train.epochs) == ("cifar10", 3)
        assert (recipe.regularizer.penalty, recipe.regularizer.strength) == ({"name": "so", "squared": False}, 0.5)
    recipe = load("a+b/over.toml", ["train.batch=20"])
    assert (recipe.data.name, recipe.regularizer.strength, recipe.train.batch) == ("digits", 0.5, 20)
    assert recipe.code.folders == (tmp_path / "a+b",)  # parts name no modules
    assert load("nano+digits").code.folders == ()
    assert name_of("nano+cifar10+strict+a+b/mine.toml") == "nano+cifar10+strict+mine"
    assert name_of("cifar10+nano") == "cifar10+nano"
    (tmp_path / "...toml").write_text("")
    with pytest.raises(ValueError, match="rename the file"):
        name_of("...toml")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nano+cifar10+stict", r"no part of a recipe is called 'stict'; did you mean 'strict'\?"),
        ("nano+cifar10+", r"no part of a recipe is called ''; there are 'nano'"),
        ("nano+resnet20+resnet56+cifar10", r"two parts of one kind \(network\), resnet20 and resnet56; leave one"),
        ("nano+cifar10+cifar10", r"two parts of one kind \(data\)"),
        ("resnet20+cifar10+strict", r"names no budget \(nano, quick, standard-30, standard-200\); add one"),
        ("standard-200+cifar10", r"names no network \(resnet18, resnet20, "),
        ("nano+strict", r"names no data \(cifar10, "),
        ("strict", r"names no budget \(.*\) and no network \(.*\) and no data \("),
        ("+".join(["nano"] * 17), r"at most 16"),
        ("nano+nowhere.toml", r"no recipe nowhere\.toml, which nano\+nowhere\.toml extends, is there"),
        ("nowhere/nano", r"no recipe nowhere/nano is there"),
    ],
)
def test_bad_references(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(reference)


def test_bad_references_in_files_name_the_file(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "nano+strct"')
    with pytest.raises(ValueError, match=r"a\.toml: no part of a recipe is called 'strct'; did you mean 'strict'"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = "nano+cifar10"\n[train]\nepoch = 3\n[regularizer]\nextends = "strict"\n')
    with pytest.raises(ValueError, match=r"unknown key train\.epoch; did you mean 'epochs'"):
        load(tmp_path / "a.toml")


def test_round_trip():
    recipe = load("standard-200+resnet56+cifar100+welch", ["regularizer.where=convs & ~stem", "train.ema=0.99"])
    assert Recipe.of(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.of(recipe.to_dict()) == recipe
    assert "train = " not in recipe.to_toml().split("[network]")[0]  # absent, not null


def test_identity_sees_through_spelling():
    section = {"strength": 0.1, "penalty": "SO"}
    same = {"strength": {"name": "constant", "strength": 0.1}, "penalty": {"name": "so", "squared": True}, "where": "convs"}
    assert small(regularizer=section) == small(regularizer=same)
    other = small(regularizer={**section, "penalty": {"name": "so", "squared": False}})
    assert other != small(regularizer=section)
    assert differences(small(regularizer=section), other) == "regularizer.penalty.squared: absent -> false"


def test_extending_and_setting(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.toml").write_text(
        '[data]\nname = "digits"\nvalidation = 50\n[network]\nkind = "resnet"\ndepth = 14\n[train]\nepochs = 9\n'
        '[regularizer]\nstrength = 1.0\npenalty = { name = "srip", steps = 3 }\n'
    )
    (tmp_path / "a.toml").write_text(
        'extends = "sub/base.toml"\n[data]\nname = "patches"\n[network]\nkind = "wide_resnet"\nwidth = 1\ndepth = 10\n'
        '[regularizer]\npenalty = { name = "so" }\n'
    )
    recipe = load(tmp_path / "a.toml", ["train.epochs=3", "regularizer.strength = 0.5", "train.precision=32-true"])
    assert (recipe.data.name, recipe.data.validation, recipe.train.epochs) == ("patches", 50, 3)
    assert recipe.network.model_extra == {"width": 1, "depth": 10}  # another kind of network has other options
    assert (recipe.regularizer.penalty, recipe.regularizer.strength) == ({"name": "so"}, 0.5)


def test_extending_inside_a_table(tmp_path):
    """Relative to the file that says so, not to the one that extends it."""
    (tmp_path / "sub/parts").mkdir(parents=True)
    (tmp_path / "sub/parts/srip.toml").write_text('strength = 1.0\npenalty = { name = "srip", steps = 3 }\n')
    (tmp_path / "sub/base.toml").write_text(
        '[data]\nname = "digits"\n[network]\nkind = "resnet"\ndepth = 14\n[train]\nepochs = 9\n'
        '[regularizer]\nextends = "parts/srip.toml"\nstrength = 0.5\n'
    )
    (tmp_path / "a.toml").write_text('extends = "sub/base.toml"\n[regularizer.penalty]\nsteps = 4\n')
    regularizer = load(tmp_path / "a.toml").regularizer
    assert (regularizer.strength, regularizer.penalty) == (0.5, {"name": "srip", "steps": 4})
    (tmp_path / "net.toml").write_text('kind = "resnet"\ndepth = 8\nnorm = "group"\n')
    wide = 'extends = "sub/base.toml"\n[network]\nextends = "net.toml"\nkind = "wide_resnet"\nwidth = 1\ndepth = 10\n'
    (tmp_path / "a.toml").write_text(wide)
    assert load(tmp_path / "a.toml").network.model_extra == {"width": 1, "depth": 10}  # as between files
    arms = {"none": {}, "name": {"train": {"lr": 1.0}}}
    assert merge({"arms": arms}, {"arms": {"name": {}}}) == {"arms": arms}  # a table of this name names nothing


def test_blame(tmp_path):
    """What is wrong is told of the file that gives it, but where several do or it is the one that is loaded."""
    base, over = tmp_path / "base.toml", tmp_path / "a.toml"
    common = '[data]\nname="synthetic"\n[network]\nkind="resnet"\n[train]\n'
    base.write_text(f"{common}epoch=2\nlr=-1.0\nwarmup=3.0\n[train.sub]\nx=1\n")
    over.write_text('extends = "base.toml"\n[train]\nepochs=2\nwd=1\n')
    with pytest.raises(ValueError, match=r"a\.toml: in .*base\.toml, train\.lr") as message:
        load(over)
    for wrong in (f"in {base}, unknown key train.epoch;", f"in {base}, unknown key train.sub;", "; unknown key train.wd;"):
        assert wrong in str(message.value)
    with pytest.raises(ValueError, match=r"train\.lr: [^;]*; got -2\.0;"):
        load(over, ["train.lr=-2.0"])
    base.write_text(f"{common}warmup=3.0\n")
    over.write_text('extends = "base.toml"\n[train]\nepochs=2\n')
    with pytest.raises(ValueError, match=r"leaves nothing of 2 epochs$"):
        load(over)
    with pytest.raises(ValueError, match=r"data: .*got 3$"):
        load(over, ["data=3", "train.epochs=4"])
    base.write_text('[network]\nkind="resnet"\n')
    with pytest.raises(ValueError, match=r"a\.toml: data is missing$"):
        load(over)
    with pytest.raises(FileNotFoundError, match=r"no file .*there\.toml, which .*a\.toml extends, is there"):
        load(over, ["train.extends=there.toml"])


def test_labels():
    assert label([]) == ""
    assert label(["train.epochs = 10"]) == "+train.epochs=10"
    assert label(['data.name="digits"']).startswith("+data.name=_digits_~")
    assert label(["regularizer.where=convs & ~stem"]) != label(["regularizer.where=convs & stem"])
    assert "/" not in label(["network.kind=a/b:c"])
    assert len(label([f"train.lr={k}" for k in range(100)])) == 109


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch; did you mean 'epochs'"),
        ("trian.epochs=3", r"unknown key trian; did you mean 'train'"),
        ("train.epochs=0", r"train\.epochs: should be greater than or equal to 1; got 0"),
        ("train.epochs=ten", r"train\.epochs: should be a valid integer; got 'ten'"),
        ("train.epochs=true", r"train\.epochs: should be a valid integer; got True"),
        ("train.lr=0", r"train\.lr: should be greater than 0"),
        ("train.lr=nan", r"train\.lr: should be a finite number"),
        ("train.lr=inf", r"train\.lr: should be a finite number"),
        ("train.schedule=step", r'schedule = "step" and milestones'),
        ("train.milestones=[0.5]", r'schedule = "step" and milestones'),
        ("train={epochs=4, schedule='step', milestones=[60]}", r"train\.milestones\.0: should be less than 1"),
        ("train={epochs=4, schedule='step', milestones=[0.6, 0.5]}", r"milestones must increase"),
        ("regularizer={strength='x', penalty='so'}", r"regularizer\.strength: should be a valid number; got 'x'"),
        ("train.warmup=2", r"warmup = 2 leaves nothing of 2 epochs"),
        ("train.momentum=0", r"nesterov = true needs a momentum above 0"),
        ("train.precision=bf16", r"train\.precision: should be 'auto', '32-true' or 'bf16-mixed'"),
        ("data.name=cifar", r"data\.name: no data set 'cifar'; did you mean 'cifar10'"),
        ("data=3", r"data: should be a valid dictionary"),
        ("epochs", r"a setting is section\.key=value"),
        ("=3", r"a setting is section\.key=value"),
        ("regularizer.strength=1", r"regularizer\.penalty is missing"),
        ("regularizer={strength=1, penalty='sop'}", r"regularizer\.penalty.*no penalty 'sop'; did you mean 'so'"),
        ("regularizer={strength=-1, penalty='so'}", r"regularizer\.strength.*strength must be a finite number"),
        ("regularizer={strength=1, penalty='so', where='conv'}", r"regularizer\.where: where must combine convs"),
        ("regularizer={strength=1, penalty='so', wher='convs'}", r"unknown key regularizer\.wher; did you mean 'where'"),
    ],
)
def test_bad_settings(tmp_path, setting, message, unchecked):
    (tmp_path / "r.toml").write_text('[data]\nname="synthetic"\n[network]\nkind="resnet"\n[train]\nepochs=2\n')
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "r.toml", [setting])


def test_all_mistakes_at_once():
    with pytest.raises(ValueError, match=r"train\.epochs: .*; train\.lr: .*; unknown key train\.wd"):
        small(train={"epochs": -1, "lr": -1.0, "wd": 1})
    with pytest.raises(ValueError, match=r"data is missing; network is missing; train is missing"):
        Recipe.of({})


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe .*x\.toml is there"):
        load(tmp_path / "x.toml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "a.toml").write_text("a = ")
    with pytest.raises(ValueError, match="is not TOML"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = ["b.toml"]')
    (tmp_path / "b.toml").write_text('extends = ["a.toml"]')
    with pytest.raises(ValueError, match="extends itself, through"):
        load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text('extends = ["c.toml"]')
    with pytest.raises(FileNotFoundError, match=r"no file .*c.toml, which .*b.toml extends, is there"):
        load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("extends = 3")
    with pytest.raises(ValueError, match="extends must be a file or parts"):
        load(tmp_path / "b.toml")


@pytest.mark.parametrize(("count", "width"), [(2000, 1), (24, 2)])
def test_extends_is_bounded(tmp_path, count, width):
    for i in range(count):
        (tmp_path / f"{i}.toml").write_text(f"extends = {[f'{i + 1}.toml'] * width}")
    (tmp_path / f"{count}.toml").write_text("")
    with pytest.raises(ValueError, match="fewer files"):
        load(tmp_path / "0.toml")


def test_files_that_nest_too_deep_are_one_line_and_byte_order_marks_are_read(tmp_path):
    deep, marked = tmp_path / "deep.toml", tmp_path / "marked.toml"
    deep.write_text("a = " + "[" * 5000 + "]" * 5000)
    marked.write_bytes(b"\xef\xbb\xbfa = 1")
    with pytest.raises(ValueError, match="inside each other"):
        load(deep)
    assert read_toml(marked) == {"a": 1}


BASE = 'extends = "nano+digits+strict"\n'
HOSTILE = {
    "lists": ("x = " + "[" * 5000 + "]" * 5000, "inside each other"),
    "dotted keys": (".".join(["a"] * 5000) + " = 1", "inside each other"),
    "tables": ("x = " + "{a=" * 3000 + "1" + "}" * 3000, "inside each other"),
    "a header": ("[" + ".".join(["a"] * 3000) + "]", "inside each other"),
    "keys": ("\n".join(f"k{i} = 1" for i in range(3000)), "and 90 more"),
    "more keys": ("\n".join(f"k{i} = 1" for i in range(100_000)), "of at most 262,144"),
    "a learning rate": ("train.lr = 1e300", r"train\.lr"),
    "an integer": ("train.epochs = " + "9" * 5000, "Exceeds the limit"),
    "a large integer": ("network.depth = " + "9" * 400, r"network\.depth: should be a finite number"),
    "padding": ("data.pad = 1000000", r"data\.pad"),
    "steps": ("regularizer.penalty = {name = 'srip', steps = 1000000000000}", "at most 100,000"),
    "operators": ("regularizer.where = '" + "~" * 5000 + "convs'", "2,000 characters"),
    "fewer operators": ("regularizer.where = '" + "~" * 900 + "convs'", "100 operators"),
    "a text": ("network.kind = '" + "x" * 20_000 + "'", "20,000 characters"),
    "a date": ("network.depth = 1979-05-27", "got date"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_end_in_one_line_at_once(tmp_path, name):
    text, message = HOSTILE[name]
    (path := tmp_path / "x.toml").write_text(BASE + text)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 5


def test_a_recipe_that_is_data_holds_what_toml_can_hold():
    for extra in (None, {"y": [None]}, float("nan"), 10**400):
        raw = {"data": {"name": "digits"}, "network": {"kind": "resnet", "x": extra}, "train": {"epochs": 1}}
        with pytest.raises(ValueError, match=r"recipe: network\.x"):
            Recipe.of(raw)
