"""Networks and images of the user's own: found from the recipe's folder, checked before anything is trained."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations

from orthokit.cli import main
from orthokit.cli.lab import Machine
from orthokit.lab.data.images import load as load_set
from orthokit.lab.networks.init import initialise_
from orthokit.lab.recipes.compose import load
from orthokit.lab.recipes.recipe import Recipe, check_all
from orthokit.lab.recipes.sections import NetworkSection
from orthokit.lab.runs.control import Stop
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import Training, train

CPU = Hardware(device="cpu", threads=1)
DATA = '[data]\nname = "synthetic"\ntrain = 200\nvalidation = 100\nsize = 8\npad = 1\n'
TRAIN = "[train]\nepochs = 1\nbatch = 50\n"
MODULE = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes, returns="logits"):
        super().__init__()
        self.conv, self.head, self.returns = nn.Conv2d(channels, 8, 3), nn.Linear(8, classes), returns

    def forward(self, x):
        features = self.conv(x).relu().mean((-2, -1))
        logits = self.head(features)
        many = {"tuple": (logits, features), "dict": {"logits": logits, "loss": None}, "features": features}
        return many.get(self.returns, logits)

class Output(dict):
    """As of Hugging Face: a dictionary with attributes."""

def build(channels, classes, returns="logits"):
    return Net(channels, classes, returns)

def aux(channels, classes):
    class Aux(Net):
        def forward(self, x):
            return (super().forward(x),) * 2 if self.training else super().forward(x)
    return Aux(channels, classes)

def hub(channels, classes):
    class Hub(Net):
        def forward(self, x):
            return Output(logits=super().forward(x))
    return Hub(channels, classes)

def five(classes, channels):
    return Net(channels, 5)

def grey(channels, classes):
    return Net(1, classes)

def integers(channels, classes):
    class Integers(Net):
        def forward(self, x):
            return super().forward(x).round().long()
    return Integers(channels, classes)

def create_model(model_name, pretrained=False, **options):
    return Net(options.pop("in_chans"), options.pop("num_classes"), **options)

def vision(*, weights=None, num_classes=1000, **options):
    return Net(3, num_classes, **options)

def aliased(in_channels, num_labels):
    return Net(in_channels, num_labels)

def images(root, each=20, side=8, kind="tensors"):
    labels = torch.arange(4).repeat_interleave(each)
    pixels = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pair = pixels, labels
    if kind == "set":
        from orthokit.lab.data.images import load
        return load("digits")
    wrong = {"none": None, "float": (pixels / 255, labels, *pair), "few": pair, "wide": (pixels[..., :4], labels, *pair)}
    wrong |= {"labels": (pixels, labels + 1, *pair), "stranger": (pixels, labels, pixels, labels + 1)}
    wrong |= {"pairs": (pair, pair), "three": (pair, (pixels[::2], labels[::2]), pair)}
    wrong |= {"arrays": [tensor.numpy() for tensor in (*pair, *pair)]}
    wrong |= {"sides": (pair, (pixels[..., :4, :4], labels))}
    return wrong.get(kind, (*pair, *pair))

def fails():
    raise RuntimeError("no such disk")
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module ``mynet`` beside the recipes in a folder; the working directory is another one, and neither is on the path."""
    folder, here = tmp_path / "project", tmp_path / "here"
    for each in (folder, here):
        each.mkdir()
    (folder / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    sys.modules.pop("mynet", None)


def recipe(folder, network, data=DATA, more="", name="r"):
    (folder / f"{name}.toml").write_text(f"{data}[network]\n{network}\n{TRAIN}{more}")
    return str(folder / f"{name}.toml")


def test_one_run_and_several_find_the_module_beside_the_recipe(mine, capfd):
    file = recipe(mine, 'kind = "mynet:build"')
    assert main(["train", file, "--device", "cpu"]) == 0
    assert "importing mynet:build" in capfd.readouterr().err
    assert main(["train", file, "--device", "cpu", "--seeds", "0", "1", "--jobs", "1"]) == 0  # a process of its own
    assert "2 of 2 runs finished" in capfd.readouterr().out
    assert main(["evaluate", "runs/r", "--recipe", file, "--parts", "accuracy", "--jobs", "1"]) == 0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ('kind = "mynet:build"\nreturns = "tuple"', "in training mode .* must return a tensor of logits; got tuple"),
        ('kind = "mynet:build"\nreturns = "dict"', "got dict with logits, loss: wrap it in a module"),
        ('kind = "mynet:hub"', "got Output with logits"),
        ('kind = "mynet:aux"', "in training mode .* got tuple"),
        ('kind = "mynet:build"\nreturns = "features"', r"must return logits \(2, 10\), one for each class; got float32 \(2, 8\)"),
        ('kind = "mynet:five"', r"must return logits \(2, 10\), .* got float32 \(2, 5\)"),
        ('kind = "mynet:grey"', "with 2 images of 3 channels, 8x8, fails with RuntimeError: .*"),
        ('kind = "mynet:integers"', r"got int64 \(2, 10\)"),
        ('kind = "mynet:vision"', r"it takes no channels. Say what it calls them: arguments|fails with|got"),
        ('kind = "mynet:missing"', "has no 'missing'"),
        ('kind = "nowhere:build"', "no module 'nowhere' for the network"),
        ('kind = "mynet:build"\narguments = { width = "w" }', "arguments rename channels and classes, .*; got 'width'"),
        ('kind = "mynet:build"\narguments = { classes = "num_classes" }', "has no argument 'num_classes'"),
        ('kind = "resnet"\narguments = { classes = "num_classes" }', "arguments are those of a function of your own"),
        (
            'kind = "mynet:create_model"\nmodel_name = "x"',
            "create_model.model_name=.x., channels=3|create_model.*fails with KeyError",
        ),
    ],
)
def test_misfits_are_one_line_before_anything_is_trained(mine, network, message, capsys):
    assert main(["train", recipe(mine, network), "--device", "cpu", "--seeds", "0", "1"]) == 2
    text = capsys.readouterr().err.splitlines()
    assert re.search(message, text[-1])
    if "five" in network:
        assert main(["train", str(mine / "r.toml"), "--device", "cpu"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == text[-1]
    assert all("importing" in line for line in text[:-1])
    assert not list(Path().rglob("metrics.jsonl"))


@pytest.mark.parametrize("command", ["study", "sweep"])
def test_studies_and_sweeps_check_before_they_train(mine, capsys, command):
    recipe(mine, 'kind = "resnet"', name="good")
    recipe(mine, 'kind = "mynet:five"', name="bad")
    arms = '[arms]\nnone = {}\nso = { regularizer = { penalty = "so", strength = 0.1 } }\n[evaluate]\nparts = []\n'
    networks = '[networks]\na = {}\nb = { network.kind = "mynet:five" }\n'
    (mine / "study.toml").write_text(f'title = "t"\nrecipe = "good.toml"\nseeds = [0]\n{networks}{arms}')
    (mine / "sweep.toml").write_text('recipes = ["good.toml", "bad.toml"]\nseeds = [0]\n[grid]\n"train.lr" = [0.1, 0.2]\n')
    assert main([command, str(mine / f"{command}.toml"), "--device", "cpu"]) == 2
    assert "got float32 (2, 5)" in capsys.readouterr().err
    assert not list(Path().rglob("metrics.jsonl"))


def test_a_penalty_without_layers_is_told_before_anything_is_trained(mine, capsys):
    more = '[regularizer]\npenalty = "so"\nstrength = 0.1\nwhere = "depthwise"\n'
    assert main(["train", recipe(mine, 'kind = "mynet:build"', more=more), "--seeds", "0", "1", "--device", "cpu"]) == 2
    assert "depthwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "network",
    [
        'kind = "mynet:aliased"',
        'kind = "mynet:create_model"\nmodel_name = "x"\narguments = { channels = "in_chans", classes = "num_classes" }',
        'kind = "mynet:vision"\narguments = { classes = "num_classes" }',
    ],
)
def test_other_names_of_arguments(mine, network):
    check_all([load(Path(recipe(mine, network)))], Path())


def test_known_packages(mine):
    (mine / "timm.py").write_text(MODULE)
    (mine / "torchvision.py").write_text(MODULE)
    packages = [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]
    kept = {name: sys.modules.pop(name) for name in packages}
    try:
        for network in ('kind = "timm:create_model"\nmodel_name = "x"', 'kind = "torchvision:vision"'):
            check_all([load(Path(recipe(mine, network)))], Path())
    finally:
        for name in ("timm", "torchvision"):
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def test_each_recipe_gets_the_module_of_its_own_folder(mine, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mynet.py").write_text(
        MODULE.replace("nn.Conv2d(channels, 8, 3), nn.Linear(8", "nn.Conv2d(channels, 9, 3), nn.Linear(9")
    )
    data = load_set("synthetic", train=200)
    widths = [
        load(Path(recipe(folder, 'kind = "mynet:build"'))).build(data).conv.out_channels for folder in (mine, other, mine, other)
    ]
    assert widths == [8, 9, 8, 9]


def test_a_module_of_a_name_that_is_taken(mine):
    (mine / "json.py").write_text(MODULE)
    with pytest.raises(ValueError, match=r"json\.py has the name of a module that is imported already, .*; rename yours"):
        load(Path(recipe(mine, 'kind = "json:build"'))).network.build(3, 10, load(Path(recipe(mine, 'kind = "json:build"'))).code)


OWN = '[data]\nkind = "mynet:images"\nvalidation = 0\npad = 1\n{}'


@pytest.mark.parametrize("kind", ["tensors", "pairs", "arrays", "set"])
def test_images_that_a_function_returns(mine, kind):
    actual = load(Path(recipe(mine, 'kind = "resnet"', data=OWN.format(f'options = {{ kind = "{kind}" }}\n')))).images(mine)
    assert (len(actual.train), actual.classes, actual.name) == (
        (300, 10, "mynet:images") if kind == "set" else (80, 4, "mynet:images")
    )
    if kind != "set":
        again = load(Path(recipe(mine, 'kind = "resnet"', data=OWN.format("size = 4\nname = 'noise'\n")))).images(mine)
        assert again.fingerprint == actual.fingerprint
        assert again.train.pixels.shape[-1] == 4
        assert again.name == "noise"


def test_validation_images_that_a_function_returns(mine):
    three = OWN.replace("validation = 0", "validation = {}").format("{}", 'options = {{ kind = "three" }}\n')
    for validation, count in ((0, None), (8, 8), (40, 40)):
        data = three.format(validation)
        held = load(Path(recipe(mine, 'kind = "resnet"', data=data))).images(mine).validation
        assert (held and len(held)) == count
    data = three.format(41)
    with pytest.raises(ValueError, match="validation must be at most 40, the validation images of mynet:images; got 41"):
        load(Path(recipe(mine, 'kind = "resnet"', data=data))).images(mine)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OWN.format('options = { kind = "none" }\n'), "must return an ImageSet, or uint8 pixels .*; got NoneType"),
        (OWN.format('options = { kind = "few" }\n'), "got tuple of 2"),
        (OWN.format('options = { kind = "float" }\n'), r"of train it returns float32 \(80, 3, 8, 8\) and int64 \(80,\)"),
        (OWN.format('options = { kind = "wide" }\n'), r"images square; of train it returns uint8 \(80, 3, 8, 4\)"),
        (
            OWN.format('options = { kind = "labels" }\n'),
            r"labels must be 0, 1, .* with images of each; got \[1, 2, 3, 4\]",
        ),
        (OWN.format('options = { kind = "stranger" }\n'), "labels of test must be from 0 to 3"),
        (
            OWN.format('options = { kind = "sides" }\n'),
            r"must all be of one shape; got \(3, 8, 8\) of train, \(3, 4, 4\) of test",
        ),
        (OWN.format("options = { sides = 3 }\n"), "has no option 'sides'; did you mean 'side'"),
        (OWN.format("").replace("mynet:images", "mynet:fails"), "mynet:fails fails with RuntimeError: no such disk"),
        (OWN.format("").replace("mynet:images", "digits"), "a data set of your own is module:function"),
        ('[data]\nname = "digits"\noptions = { a = 1 }\n', "options are those of kind"),
        ('[data]\nname = "folder"\n', 'name = "folder" and path = "..." go together'),
        ('[data]\nname = "digits"\npath = "x"\n', 'name = "folder" and path = "..." go together'),
        ('[data]\nname = "folder"\npath = "nowhere"\n', r"no folder of images .*project/nowhere or .*nowhere; set data.path"),
    ],
)
def test_bad_images_are_one_line(mine, data, message, capsys):
    assert main(["train", recipe(mine, 'kind = "resnet"', data=data), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def picture(file, colour=(200, 10, 10), size=(8, 8), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(abs(hash(colour)) % 100 + size[0]).integers(0, 50, (size[1], size[0], 3))
    Image.fromarray((noise + np.array(colour) * 200 // 255).astype(np.uint8)).convert(mode).save(file)


@pytest.fixture
def pets(mine):
    """Three classes in train, of 10 images each, and in test."""
    for part, count in (("train", 10), ("test", 3)):
        for label, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
            for k in range(count):
                suffix = "png" if k % 2 else "JPG"
                picture(mine / f"pets/{part}/{['cat', 'dog', 'eel'][label]}/{k}.{suffix}", colour, (8, 8))
    return mine / "pets"


FOLDER = '[data]\nname = "folder"\npath = "pets"\nvalidation = 6\npad = 1\n'


def images(mine, data=FOLDER, root=Path("nowhere")):
    return load(Path(recipe(mine, 'kind = "resnet"', data=data))).images(root)


def test_a_folder_of_images(mine, pets):
    actual = images(mine)
    assert (len(actual.train), len(actual.validation), len(actual.test), actual.classes) == (24, 6, 9, 3)
    assert actual.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert actual.test.pixels.shape == (9, 3, 8, 8)
    assert actual.test.pixels.float().mean((-2, -1)).argmax(1).tolist() == actual.test.labels.tolist()
    smaller = images(mine, FOLDER + "size = 4\n")
    assert smaller.test.pixels.shape == (9, 3, 4, 4)
    assert smaller.fingerprint == actual.fingerprint
    picture(pets / "train/cat/0.JPG", (1, 2, 3))
    assert images(mine).fingerprint != actual.fingerprint


def test_parts_of_a_folder(mine, pets):
    picture(pets / "val/cat/1.png")
    picture(pets / "val/dog/2.png")
    picture(pets / "val/eel/3.png")
    assert len(images(mine, FOLDER.replace("6", "3")).validation) == 3
    assert len(images(mine, FOLDER.replace("6", "3")).train) == 30
    with pytest.raises(ValueError, match="validation must be at most 3"):
        images(mine)
    (pets / "test").rename(pets / "away")
    assert (len(images(mine).test), len(images(mine).train)) == (3, 24)  # val's, and validation from train
    (pets / "val").rename(pets / "gone")
    assert (len(images(mine).test), len(images(mine).train)) == (6, 18)


def test_sizes_and_colours_of_a_folder(mine, pets):
    for file in pets.rglob("*.*"):
        picture(file, (100, 100, 100), (12, 9), "L")
    with pytest.raises(ValueError, match=r"0\.JPG is 12x9.*: set data.size"):
        images(mine)
    assert images(mine, FOLDER + "size = 5\n").train.pixels.shape == (24, 1, 5, 5)
    picture(pets / "train/cat/1.png", size=(6, 20))
    assert images(mine, FOLDER + "size = 5\n").train.pixels.shape == (24, 3, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pets: (pets / "train/cat/0.JPG").write_bytes(b"\xff\xd8 no"), r"0\.JPG cannot be read as an image"),
        (lambda pets: (pets / "train/cat/0.JPG").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be read as an image"),
        (
            lambda pets: picture(pets / "test/bird/1.png"),
            "test/bird is not a class of the training images, which are cat, dog, eel",
        ),
        (lambda pets: (pets / "train/fox").mkdir(), "train/fox holds no image"),
        (lambda pets: (pets / "train").rename(pets / "training"), "has no folder train; images belong into .*/train/CLASS"),
        (lambda pets: picture(pets / "train/cat/0.JPG", size=(9, 9)), r"9x9|8x8.*set data.size"),
        (lambda pets: Image.fromarray(np.full((8, 8), 9999, np.uint16)).save(pets / "train/cat/1.png"), "more than 8 bits"),
    ],
)
def test_bad_folders_are_one_line(mine, pets, change, message, capsys):
    change(pets)
    assert main(["train", recipe(mine, 'kind = "resnet"', data=FOLDER), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_folder_is_beside_the_recipe_or_in_root_and_in_recipes_of_others_in_root_only(mine, pets, tmp_path):
    beside = images(mine)
    (tmp_path / "data").mkdir()
    pets.rename(tmp_path / "data/pets")
    assert images(mine, root=tmp_path / "data").fingerprint == beside.fingerprint
    assert images(mine, FOLDER.replace("pets", str(tmp_path / "data/pets"))).fingerprint == beside.fingerprint
    raw = load(Path(recipe(mine, 'kind = "resnet"', data=FOLDER))).to_dict()
    assert Recipe.of(raw).images(tmp_path / "data").fingerprint == beside.fingerprint
    for outside in ("../data/pets", str(tmp_path / "data/pets")):
        raw["data"]["path"] = outside
        with pytest.raises(ValueError, match="leads out of --root, in a recipe that came with data; name it with --recipe"):
            Recipe.of(raw).images(tmp_path / "data")


def test_other_files_in_a_folder_are_told(mine, pets):
    (pets / "train/cat/notes.txt").write_text("x")
    (pets / "train/cat/.hidden").write_text("x")
    with pytest.warns(UserWarning, match=r"notes\.txt and perhaps others are left out"):
        images(mine)


def test_a_run_on_a_folder(mine, pets, capsys):
    file = recipe(mine, 'kind = "mynet:build"', data=FOLDER)
    assert main(["train", file, "--device", "cpu", "--set", "train.batch=8"]) == 0
    assert main(["evaluate", "runs/r+train.batch=8/0", "--jobs", "1", "--model", "mynet:build"]) == 2
    (mine / "r.toml").write_text((mine / "r.toml").read_text().replace("batch = 50", "batch = 8"))
    command = ["evaluate", "runs/r+train.batch=8/0", "--jobs", "1", "--recipe", file, "--parts", "accuracy", "orthogonality"]
    assert main(command) == 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.ConvTranspose3d])
def test_orthogonal_filters_of_any_convolution(kind, groups):
    module = kind(4, 6, 3, groups=groups)
    initialise_(module, "orthogonal")
    for group in module.weight.detach().chunk(groups):
        filters = (group.transpose(0, 1) if module.transposed else group).flatten(1)
        assert torch.allclose(filters @ filters.T, torch.eye(len(filters)), atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore")),
        pytest.param(nn.utils.spectral_norm, marks=pytest.mark.filterwarnings("ignore")),
    ],
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_orthogonal_filters_of_computed_weights(wrap, kind):
    module = wrap(kind(4, 6, 3))
    initialise_(module, "orthogonal")
    module(torch.randn(1, 4, 5, 5))  # computes the weight
    filters = (module.weight.transpose(0, 1) if module.transposed else module.weight).detach().flatten(1)
    gram = filters @ filters.T
    assert torch.allclose(gram / gram[0, 0], torch.eye(6), atol=1e-4)


def test_weights_that_cannot_be_set_are_named():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    doubled, small = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
    nn.utils.parametrize.register_parametrization(doubled, "weight", Doubled())
    with pytest.raises(ValueError, match="its parametrization makes another one of it"):
        initialise_(parametrizations.orthogonal(small), "orthogonal")  # of each 3x3 matrix
    with pytest.raises(ValueError, match=r'init = "orthogonal" cannot set the weight of layer \'a\.b\'.*; leave init out'):
        initialise_(doubled, "orthogonal", "a.b")


def test_spectral_vectors_are_copied_not_averaged(mine):
    (mine / "mynet.py").write_text(
        "from torch import nn\nfrom torch.nn.utils.parametrizations import spectral_norm\n"
        "def build(channels, classes):\n"
        "    conv = spectral_norm(nn.Conv2d(channels, 8, 3))\n"
        "    pooled = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(conv, nn.BatchNorm2d(8), pooled, nn.Linear(8, classes))\n"
    )
    file = recipe(mine, 'kind = "mynet:build"', more="ema = 0.9\n")
    made = load(Path(file))
    data = made.images(Path())
    with Stop() as stop:
        training = Training(Run(made, 0, mine / "run"), CPU.fabric("32-true"), data, stop, Watch())
        training.fit()
    averaged, current = dict(training.average.module.named_buffers()), dict(training.model.named_buffers())
    for name in ("0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"):
        assert torch.equal(averaged[name], current[name])
        assert averaged[name].norm().item() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(averaged["1.running_mean"], current["1.running_mean"])  # averaged like the weights
    sigma = torch.linalg.matrix_norm(training.average.module[0].weight.detach().flatten(1), 2)
    assert sigma.item() == pytest.approx(1, abs=0.05)


def test_checked_once(mine, monkeypatch):
    """Runs of many seeds build each network twice before they train, to check it and to estimate its time."""
    built, loaded = [], []
    original = NetworkSection.build
    monkeypatch.setattr(NetworkSection, "build", lambda self, *a, **k: built.append(self.kind) or original(self, *a, **k))
    images = Recipe.images
    monkeypatch.setattr(Recipe, "images", lambda self, *a, **k: loaded.append(1) or images(self, *a, **k))
    made = load(Path(recipe(mine, 'kind = "mynet:build"')))
    runs = [Run(made, seed, mine / "runs" / str(seed)) for seed in range(3)]
    monkeypatch.setattr("orthokit.lab.runs.launch.run_all", lambda runs, pool, display: [0] * len(runs))
    from rich.console import Console

    assert Machine().run_all(runs, Console(quiet=True)) == 0
    assert (built, loaded) == (["mynet:build"] * 2, [1] * 2)


def test_training_is_the_same_after_the_check(mine):
    """The check draws from a generator of its own."""
    made = load(Path(recipe(mine, 'kind = "mynet:build"')))
    first = train(Run(made, 0, mine / "a/0"), hardware=CPU)
    torch.manual_seed(5)
    assert train(Run(made, 0, mine / "b/0"), hardware=CPU)["test"] == first["test"]


def test_the_example_of_the_documentation(mine, capsys):
    """What docs/lab.md shows is written to files and run; it learns to tell its two classes apart."""
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n# (\w+\.(?:py|toml))\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in blocks] == ["mynet.py", "mine.toml"]
    for name, text in blocks:
        (mine / name).write_text(text)
    assert main(["train", str(mine / "mine.toml"), "--device", "cpu"]) == 0
    command = ["evaluate", "runs/mine", "--recipe", str(mine / "mine.toml"), "--parts", "accuracy", "--jobs", "1"]
    assert main([*command, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("[")[2].join(["[", ""]))[0]["accuracy"] > 90
