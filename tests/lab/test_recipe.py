"""Recipes: the files of the repository, merging, strictness, identity."""

import itertools
import tomllib
from pathlib import Path

import pytest

from orthokit.lab.recipes.compose import label, load, merged, read_toml
from orthokit.lab.recipes.recipe import Recipe, differences

RECIPES = Path(__file__).parents[2] / "recipes"
NETWORKS = ("resnet20", "resnet56", "resnet110", "resnet18", "resnet34", "wrn16-8", "wrn28-10")
ARMS = ("none", "so", "srip", "ocnn", "eadk", "strict", "relaxed")
SETS = ("cifar10", "cifar100")
SMALL = {"data": {"name": "synthetic"}, "network": {"kind": "resnet", "depth": 8}, "train": {"epochs": 2}}


def small(**sections):
    return Recipe.of({**SMALL, **sections})


def test_every_network_set_and_arm_has_a_recipe():
    wanted = {f"{n}_{s}_{a}.toml" for n, s, a in itertools.product((*NETWORKS, "nano", "quick"), SETS, ARMS)}
    assert {path.name for path in RECIPES.glob("*.toml")} == wanted


@pytest.mark.parametrize("base", [*NETWORKS, "nano", "quick"])
def test_recipes_of_a_network_differ_in_data_and_penalty_alone(base):
    recipes = {(s, a): load(RECIPES / f"{base}_{s}_{a}.toml") for s in SETS for a in ARMS}
    none = recipes["cifar10", "none"]
    assert none.regularizer is None
    for (name, arm), recipe in recipes.items():
        assert recipe.data.name == name
        assert (recipe.regularizer is None) == (arm == "none")
        assert recipe.network == none.network
        assert recipe.train == none.train
        assert recipe.data.model_copy(update={"name": "cifar10"}) == none.data
    penalties = [str(recipes["cifar10", arm].regularizer.penalty) for arm in ARMS[1:]]
    assert len(set(penalties)) == 6


def test_the_protocol():
    recipe = load(RECIPES / "resnet20_cifar10_strict.toml")
    assert (recipe.train.lr, recipe.train.batch, recipe.train.epochs, recipe.train.weight_decay) == (0.1, 128, 200, 1e-4)
    assert [round(part * 200) for part in recipe.train.milestones] == [60, 120, 160]
    assert load(RECIPES / "wrn28-10_cifar100_none.toml").train.weight_decay == 5e-4
    assert recipe.network.build(3, 10).blocks[3].shortcut[0].weight.shape == (32, 16, 1, 1)  # projection shortcuts
    model = recipe.network.build(3, 10)
    assert len(recipe.regularizer.build(model).layers) == 21


@pytest.mark.parametrize("arm", ARMS[1:])
def test_recipes_build_their_regularizer(arm):
    recipe = load(RECIPES / f"nano_cifar10_{arm}.toml")
    ortho = recipe.regularizer.build(recipe.network.build(3, 10))
    assert ortho().item() > 0


def test_round_trip():
    recipe = load(RECIPES / "resnet56_cifar100_relaxed.toml", ["regularizer.where=convs & ~stem", "train.ema=0.99"])
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
    assert merged({"arms": arms}, {"arms": {"name": {}}}) == {"arms": arms}  # a table of this name names nothing


def test_blame(tmp_path):
    """What is wrong is told of the file that gives it, but where several do or it is the one that is loaded."""
    base, over = tmp_path / "base.toml", tmp_path / "a.toml"
    common = '[data]\nname="synthetic"\n[network]\nkind="resnet"\n[train]\n'
    base.write_text(f"{common}epoch=2\nlr=-1.0\nwarmup=3.0\n[train.sub]\nx=1\n")
    over.write_text('extends = "base.toml"\n[train]\nepochs=2\nwd=1\n')
    with pytest.raises(ValueError, match=r"a\.toml: in .*base\.toml, train\.lr") as told:
        load(over)
    for wrong in (f"in {base}, unknown key train.epoch;", f"in {base}, unknown key train.sub;", "; unknown key train.wd;"):
        assert wrong in str(told.value)
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
    with pytest.raises(ValueError, match="is no TOML"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no TOML"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = ["b.toml"]')
    (tmp_path / "b.toml").write_text('extends = ["a.toml"]')
    with pytest.raises(ValueError, match="extends itself, through"):
        load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text('extends = ["c.toml"]')
    with pytest.raises(FileNotFoundError, match=r"no file .*c.toml, which .*b.toml extends, is there"):
        load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("extends = 3")
    with pytest.raises(ValueError, match="extends must be a file or a list"):
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
    with pytest.raises(ValueError, match="too deep"):
        load(deep)
    assert read_toml(marked) == {"a": 1}
