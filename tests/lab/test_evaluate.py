"""Evaluation: every part against a slow twin, once and not again, of runs and of anybody's checkpoints."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.cli import main
from orthokit.lab.data.images import load
from orthokit.lab.evaluation import attacks, evaluate
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.results import read_one
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train

RAW = {
    "data": {"name": "synthetic", "train": 200, "validation": 100, "size": 8, "pad": 1},
    "network": {"kind": "resnet", "depth": 8},
    "train": {"epochs": 2, "batch": 50},
    "regularizer": {"strength": 0.1, "penalty": "so"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(Run(Recipe.of(RAW), seed, folder / "so" / str(seed)), hardware=Hardware(device="cpu", threads=1))
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def network(run):
    data = load("synthetic", train=200, validation=100, size=8)
    model = Recipe.of(RAW).build(data)
    model.load_state_dict(load_file(run / "last.safetensors"))
    return model.eval(), data


def words(text):
    return " ".join(text.split())


def test_parts_equal_slow_twins(runs, capsys):
    assert main(["evaluate", str(runs / "so/0"), "--images", "60", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert "accuracy by strength" in text
    assert "PGD L2, radius" in text
    actual = json.loads((runs / "so/0/evaluation.json").read_text())["parts"]
    assert list(actual) == list(evaluate.PARTS)
    model, data = network(runs / "so/0")

    with torch.no_grad():
        logits = model(data.normalise(data.test.pixels))
    labels = data.test.labels
    assert actual["accuracy"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-6)
    assert actual["accuracy"]["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    confidence, guess = logits.double().softmax(1).max(1)
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [
        (bins == k).double().mean() * ((guess == labels).double()[bins == k].mean() - confidence[bins == k].mean()).abs()
        for k in bins.unique()
    ]
    assert actual["accuracy"]["ece"] == pytest.approx(float(sum(gaps)), abs=1e-4)

    report = ok.report(model, where=ok.convs).totals
    assert actual["orthogonality"]["under"]["mean_cos"] == pytest.approx(next(iter(report.values()))["mean_cos"])
    assert set(actual["orthogonality"]) == {"settings", "under", "over", "all"}

    clean = actual["attacks"]
    assert [len(clean[key]) for key in ("linf", "fgsm", "pgd", "l2", "pgd_l2")] == [6, 6, 6, 5, 5]
    assert all(a >= b for key in ("pgd", "pgd_l2") for a, b in zip(clean[key], clean[key][1:], strict=False))
    assert clean["pgd"][-1] <= clean["fgsm"][-1] + 1e-6
    assert len(actual["noise"]["accuracy"]) == len(actual["noise"]["sigma"])
    assert {len(each) for each in actual["corruptions"]["accuracy"].values()} == {5}
    some = evaluate.some(data, 60)
    x, y = some.pixels.float() / 255, some.labels
    pixels = attacks.Pixels(model, data.mean, data.std)
    right, nudged = attacks.clean(pixels, x, y), attacks.fgsm(pixels, x, y, [radius / 255 for radius in attacks.LINF])
    assert 0 < int(right.sum()) < len(y)
    assert clean["clean"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert clean["fgsm_kept"] == pytest.approx([float(each[right].float().mean()) for each in nudged], abs=1e-6)
    assert actual["noise"]["kept"] == pytest.approx(
        [float(each[right].float().mean()) for each in attacks.noisy(pixels, x, y)], abs=1e-6
    )
    for name in ("pgd", "pgd_l2"):  # what is wrong clean counts as fooled: the one is the other in a share of the images
        assert clean[name] == pytest.approx([share * clean["clean"] for share in clean[f"{name}_kept"]], abs=2e-6)
    kept = actual["corruptions"]["kept"]
    assert {name: len(each) for name, each in kept.items()} == dict.fromkeys(actual["corruptions"]["accuracy"], 5)
    assert all(0 <= share <= 1 for each in kept.values() for share in each)

    seen = []
    model.fc.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(data.normalise(data.test.pixels))
    covariance = torch.cov(seen[0].double().T)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    rank = float((-(share * share.clamp(min=1e-300).log()).sum()).exp())
    assert actual["features"]["penultimate"]["effective_rank"] == pytest.approx(rank, rel=1e-3)
    assert list(actual["features"]["stages"]) == ["stage 1 (8x8)", "stage 2 (4x4)", "stage 3 (2x2)"]


def test_full_confidence_belongs_to_the_last_bin():
    """100 images at a confidence of 1 and an accuracy of .95, 100 at .94 and 1: together .97 and .975, apart .05 and .06."""
    certain, sure = torch.tensor([200.0, 0.0]), torch.tensor([0.94, 0.06]).log()
    logits = torch.cat([certain.expand(100, 2), sure.expand(100, 2)])
    labels = torch.zeros(200, dtype=torch.int64)
    labels[:5] = 1
    assert logits.softmax(-1).max() == 1
    assert evaluate.calibration_error(logits, labels) == pytest.approx(0.005, abs=2e-6)
    assert evaluate.calibration_error(logits[:100], labels[:100]) == pytest.approx(0.05, abs=1e-6)


def test_attacks_are_on_a_fixed_part_of_the_test_images_of_every_class_alike(runs):
    (subject,) = evaluate.subjects(runs / "so/0")
    bench = evaluate._bench(subject.weights, "", subject.recipe.to_toml(), 60, runs, torch.device("cpu"))
    assert torch.bincount(bench.some.labels).tolist() == [6] * 10
    right = attacks.fgsm(bench.pixels, bench.some.pixels / 255, bench.some.labels, [0.0])
    assert float(right.float().mean()) == pytest.approx(float(bench.right(bench.some).float().mean()))
    everything = evaluate._bench(subject.weights, "", subject.recipe.to_toml(), 10**6, runs, torch.device("cpu"))
    assert len(everything.some) == len(everything.data.test)


def without_digest(run):
    """A run of a version that did not write down what its weights are."""
    path = run / "summary.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "weights"}))


def test_a_changed_bit_is_noticed(runs, capsys):
    path = runs / "so/0/last.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert main(["evaluate", str(runs), "--parts", "accuracy", "--jobs", "1"]) == 4
    assert "so/0/last.safetensors is damaged" in words(capsys.readouterr().out)
    assert (runs / "so/1/evaluation.json").is_file()


def test_parts_are_not_measured_again(runs, capsys, monkeypatch):
    command = ["evaluate", str(runs), "--images", "20", "--jobs", "1"]
    assert main([*command, "--parts", "accuracy", "orthogonality"]) == 0
    assert len(re.findall("accuracy$", capsys.readouterr().out, re.M)) == 2  # a line for each run
    measured = []
    monkeypatch.setattr(evaluate, "_measure", lambda *task: measured.append(task[1]) or (task[0], {"x": 1}, None))
    assert main([*command, "--parts", "accuracy", "orthogonality"]) == 0
    assert measured == []
    assert main([*command, "--parts", "accuracy", "noise"]) == 0
    assert measured == ["noise", "noise"]
    assert main([*command[:2], "--images", "30", "--jobs", "1", "--parts", "accuracy", "noise"]) == 0
    assert measured == ["noise"] * 4  # with other settings; accuracy is of all images
    other = load_file(runs / "so/1/last.safetensors")
    with torch.no_grad():
        other["fc.bias"] += 1
    save_file(other, runs / "so/1/last.safetensors", {"recipe": json.dumps(Recipe.of(RAW).to_dict())})
    assert main([*command, "--parts", "accuracy"]) == 4
    assert "so/1/last.safetensors is damaged: its weights are not those that the run wrote" in words(capsys.readouterr().out)
    assert measured[4:] == []
    without_digest(runs / "so/1")
    assert main([*command, "--parts", "accuracy"]) == 0
    assert measured[4:] == ["accuracy"]  # the other weights'
    assert list(json.loads((runs / "so/1/evaluation.json").read_text())["parts"]) == ["accuracy"]


def test_several_processes_give_the_same(runs, capsys):
    command = ["evaluate", str(runs / "so/0"), "--images", "20", "--parts", "noise", "accuracy", "attacks"]
    assert main([*command, "--jobs", "2"]) == 0
    first = json.loads((runs / "so/0/evaluation.json").read_text())
    (runs / "so/0/evaluation.json").unlink()
    assert main([*command, "--jobs", "1"]) == 0
    assert json.loads((runs / "so/0/evaluation.json").read_text()) == first


def test_formats(runs, capsys):
    for form, check in (("json", json.loads), ("csv", lambda text: text.startswith("network,"))):
        assert main(["evaluate", str(runs), "--parts", "accuracy", "--jobs", "1", "--format", form]) == 0
        assert check(capsys.readouterr().out)


OWN = '[data]\nname = "digits"\nvalidation = 0\n[network]\nkind = "test_evaluate:Plain"\n[train]\nepochs = 1\n'


class Plain(nn.Module):
    """Somebody's own network."""

    def __init__(self, channels, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.features(x))


def test_any_checkpoint_with_a_recipe(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in Plain(1, 10).state_dict().items()}}, tmp_path / "own.pt")
    (tmp_path / "own.toml").write_text(OWN)
    assert main(["evaluate", str(tmp_path / "own.pt"), "--jobs", "1"]) == 2
    assert "--recipe" in capsys.readouterr().err
    command = ["evaluate", str(tmp_path / "own.pt"), "--recipe", str(tmp_path / "own.toml"), "--jobs", "1", "--images", "30"]
    assert main(command) == 0
    actual = json.loads((tmp_path / "own.pt.evaluation.json").read_text())["parts"]
    assert set(actual) == set(evaluate.PARTS)
    assert not any(isinstance(value, float) and math.isnan(value) for value in actual["accuracy"].values())


def test_measurements_are_of_a_network_and_its_images(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(Plain(3, 10).state_dict(), tmp_path / "own.pt")
    for size in (8, 16):
        data = f'[data]\nname = "synthetic"\nvalidation = 0\nsize = {size}\n'
        text = data + '[network]\nkind = "test_evaluate:Plain"\n[train]\nepochs = 1\n'
        (tmp_path / f"{size}.toml").write_text(text)
    actual = []
    for size in (8, 16, 8):
        command = ["evaluate", str(tmp_path / "own.pt"), "--recipe", str(tmp_path / f"{size}.toml"), "--jobs", "1"]
        assert main([*command, "--parts", "accuracy"]) == 0
        actual.append(json.loads((tmp_path / "own.pt.evaluation.json").read_text())["parts"]["accuracy"]["nll"])
    assert actual[0] == actual[2] != actual[1]


def test_another_recipe_is_refused(runs, tmp_path, capsys):
    (tmp_path / "other.toml").write_text(
        '[data]\nname = "digits"\nvalidation = 0\n[network]\nkind = "resnet"\n[train]\nepochs = 1\n'
    )
    for path in (runs / "so/0", runs / "so/0/last.safetensors"):
        assert main(["evaluate", str(path), "--recipe", str(tmp_path / "other.toml")]) == 2
        assert "is of another recipe than --recipe: data.name:" in words(capsys.readouterr().err)


def test_evaluations_of_other_weights_do_not_count(runs):
    assert main(["evaluate", str(runs / "so/0"), "--parts", "accuracy", "--jobs", "1"]) == 0
    assert set(read_one(runs / "so/0/summary.json").parts) == {"accuracy"}
    shutil.copy(runs / "so/1/last.safetensors", runs / "so/0/last.safetensors")
    assert read_one(runs / "so/0/summary.json").parts == {}


def test_how_many_images(runs, capsys):
    data = load("synthetic", train=200, validation=100, size=8)
    assert [len(evaluate.some(data, images)) for images in (10, 990, 991, 1000, 10**6)] == [10, 990, 1000, 1000, 1000]
    assert main(["evaluate", str(runs / "so/0"), "--images", "9", "--jobs", "1"]) == 2
    assert "images must be from 10 to 990" in words(capsys.readouterr().err)
    assert main(["evaluate", str(runs / "so/0"), "--images", "9", "--parts", "accuracy", "--jobs", "1"]) == 0


def test_two_networks_of_one_name(tmp_path, capsys):
    torch.manual_seed(0)
    (tmp_path / "own.toml").write_text(OWN)
    paths = [tmp_path / name for name in ("a/net.pt", "b/net.pt", "a/net.pth")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        torch.save(Plain(1, 10).double().state_dict(), path)
    command = ["evaluate", *map(str, paths), "--recipe", str(tmp_path / "own.toml"), "--jobs", "1", "--parts", "accuracy"]
    assert main([*command, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in rows] == list(map(str, paths))
    assert len({row["nll"] for row in rows}) == 3


def test_what_goes_wrong_is_told_and_the_rest_is_done(trained, runs, tmp_path, capsys):
    weights = load_file(runs / "so/0/last.safetensors")
    weights["fc.weight"] = weights["fc.weight"][:5].clone()
    save_file(weights, runs / "so/0/last.safetensors", {"recipe": json.dumps(Recipe.of(RAW).to_dict())})
    for run in ("so/0", "so/1"):
        without_digest(runs / run)
    assert main(["evaluate", str(runs), "--parts", "accuracy", "--jobs", "1"]) == 4
    text = words(capsys.readouterr().out)
    assert "so/0 accuracy: ValueError:" in text
    assert "does not fit the network of its recipe" in text
    assert (runs / "so/1/evaluation.json").is_file()
    weights = load_file(runs / "so/1/last.safetensors")
    weights["fc.bias"][0] = math.nan
    save_file(weights, runs / "so/1/last.safetensors", {"recipe": json.dumps(Recipe.of(RAW).to_dict())})
    for part in ("accuracy", "attacks", "noise", "corruptions", "features"):  # NaN is no class, and no robustness
        assert main(["evaluate", str(runs / "so/1"), "--parts", part, "--jobs", "1", "--images", "20"]) == 4
        assert "not finite" in words(capsys.readouterr().out)
    (runs / "so/1/evaluation.json").write_text("{")
    assert main(["evaluate", str(runs / "so/1"), "--jobs", "1"]) == 2
    assert "evaluation.json is damaged" in words(capsys.readouterr().err)
    (runs / "so/1/last.safetensors").unlink()
    for path, message in (
        (runs / "so/1/last.safetensors", "last.safetensors is not there"),
        (tmp_path / "nothing", "is not there; give a run's folder"),
    ):
        assert main(["evaluate", str(path)]) == 2
        assert message in words(capsys.readouterr().err)
    (runs / "so/1/evaluation.json").unlink()
    shutil.copy(trained / "so/0/last.safetensors", runs / "so/0")
    assert main(["evaluate", str(runs), "--parts", "orthogonality", "--jobs", "1"]) == 4
    assert "last.safetensors is not there" in words(capsys.readouterr().out)
    assert "orthogonality" in json.loads((runs / "so/0/evaluation.json").read_text())["parts"]
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty")]) == 2
    assert "no finished run" in capsys.readouterr().err
    for wrong in ([], ["x", "--images", "0"], ["x", "--jobs", "0"]):
        assert main(["evaluate", *wrong]) == 2
    with pytest.raises(ValueError, match="no part 'acuracy'; did you mean 'accuracy'"):
        evaluate.evaluate([], parts=["acuracy"])


def test_of_several_networks_in_a_checkpoint_one_is_evaluated_whatever_their_order(tmp_path, capsys):
    (tmp_path / "own.toml").write_text(OWN)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(Plain(1, 10).state_dict())
    values = {}
    for order, key in (((0, 1), None), ((1, 0), None), ((0, 1), "model_ema")):
        names = ("model", "model_ema")
        torch.save({names[k]: states[k] for k in order}, path := tmp_path / f"{order[0]}{key}.pt")
        command = ["evaluate", str(path), "--recipe", str(tmp_path / "own.toml"), "--jobs", "1", "--parts", "accuracy"]
        assert main(command + (["--key", key] if key else [])) == 0
        assert ("read model (" in capsys.readouterr().out) == (key is None)
        record = json.loads(path.with_name(f"{path.name}.evaluation.json").read_text())
        values[order, key] = record["parts"]["accuracy"]["nll"]
    assert values[(0, 1), None] == values[(1, 0), None] != values[(0, 1), "model_ema"]
