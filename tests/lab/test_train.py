"""Training: what a run computes, that it survives anything, and what is in its folder."""

import contextlib
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.cli import main
from orthokit.lab.data.augment import Augment, Batches
from orthokit.lab.data.images import load as load_images
from orthokit.lab.networks.resnet import ResNet
from orthokit.lab.own import Code
from orthokit.lab.recipes.recipe import DataSection, Recipe
from orthokit.lab.runs.launch import Pool
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.run import Run
from orthokit.lab.training import hardware
from orthokit.lab.training import loop as training
from orthokit.lab.training.hardware import Hardware, fast_bfloat16
from orthokit.lab.training.loop import DivergenceError, Interruption, learning_rate, train

BASE = {
    "data": {"name": "synthetic", "train": 200, "validation": 100, "size": 8, "pad": 1},
    "network": {"kind": "resnet", "depth": 8},
    "train": {"epochs": 2, "batch": 50, "precision": "32-true"},
    "regularizer": {"strength": 0.1, "penalty": "disentangled"},
}
HARDWARE = Hardware(device="cpu", threads=1)


def recipe(**changes):
    """The base recipe with ``section__key=value`` changed."""
    raw = {name: dict(section) for name, section in BASE.items()}
    for place, value in changes.items():
        section, _, key = place.partition("__")
        if value is None:
            raw.pop(section)
        else:
            raw[section][key] = value
    return Recipe.of(raw)


def run_in(folder, seed=0, **changes):
    return Run(recipe(**changes), seed, folder / str(seed))


def weights(run, name="last"):
    return load_file(run.folder / f"{name}.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "penalty_share")} for row in rows]


def test_a_run_is_the_loop_one_would_write(tmp_path):
    run = run_in(tmp_path)
    summary = train(run, hardware=HARDWARE)

    data = load_images("synthetic", train=200, validation=100, size=8)
    torch.manual_seed(0)
    model = ResNet(8)
    model.to(memory_format=torch.channels_last)
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    batches, losses = Batches(data, 50, Augment(pad=1), seed=0), []
    for epoch in range(2):
        order = batches.order(epoch)
        for place in range(4):
            x, y = batches.get(epoch, place, order)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            (loss + ortho()).backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    actual = weights(run)
    for name, value in model.state_dict().items():
        assert torch.allclose(actual[name].float(), value.float(), atol=2e-5), name
    model.eval()
    with torch.no_grad():
        logits = model(data.normalise(data.test.pixels))
    assert summary["test"]["accuracy"] == pytest.approx((logits.argmax(1) == data.test.labels).float().mean().item(), abs=2e-3)
    assert summary["test"]["loss"] == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), abs=1e-3)
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["train"]["loss"] == pytest.approx(sum(losses[4:]) / 4, abs=1e-4)
    total = ok.report(model, where=ok.convs).totals["wide"]
    assert rows[1]["orthogonality"]["under"]["mean_cos"] == pytest.approx(total["mean_cos"], abs=1e-4)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["ranks"]["conv"] == 16
    assert 0 < summary["penalty_share"] < 1


@pytest.mark.parametrize(
    ("name", "supported", "precision"),
    [
        ("Intel(R) Xeon(R) Processor", {"amx_tile", "avx512_bf16"}, "bf16-mixed"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16"}, "32-true"),
        ("AMD EPYC 9R14", {"avx512_bf16"}, "bf16-mixed"),
        ("AMD EPYC 7R13", set(), "32-true"),
    ],
)
def test_precision_follows_the_processor(monkeypatch, tmp_path, name, supported, precision):
    """Where bfloat16 is multiplied no faster than float32, ``auto`` is float32."""
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: x\nmodel name\t: {name}\n")
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "_cpuinfo", hardware._cpuinfo.__wrapped__)  # without what it remembers
    for each in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{each}_supported", lambda each=each: each in supported)
    fabric = Hardware(device="cpu", threads=1).fabric("auto")
    assert fabric._precision.precision == precision
    assert hardware._processor() == name + ", AMX" * ("amx_tile" in supported)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not fast_bfloat16("cpu")


def test_what_is_in_the_folder(tmp_path):
    run = run_in(tmp_path, seed=3)
    summary = train(run, hardware=HARDWARE)
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    assert names == {
        *("recipe.toml", "environment.json", "metrics.jsonl", "last.ckpt", "last.safetensors", "best.safetensors", "summary.json")
    }
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    best = max(run.metrics(), key=lambda row: row["validation"]["accuracy"])
    assert summary["best"] == {"epoch": best["epoch"], **best["validation"]}
    assert summary["validation"] == run.metrics()[-1]["validation"]
    environment = summary["environment"]
    assert (environment["precision"], environment["threads"], environment["versions"]["torch"]) == (
        "32-true",
        1,
        torch.__version__,
    )
    assert environment["cpu"]["machine"] == platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        text = info.read_text().split()
        assert {*environment["cpu"]["instructions"]} <= {*text}
        assert environment["cpu"]["model"] is None or environment["cpu"]["model"] in text
    assert ok.report(weights(run)).rows
    assert main(["report", str(run.folder / "last.ckpt")]) == 0  # the library's own instrument reads it


@pytest.mark.parametrize(
    "changes",
    [
        {"regularizer": None},
        {"train__ema": 0.9},
        {"network__norm": "group", "train__warmup": 0.5, "train__label_smoothing": 0.1},
        {"data__validation": 0, "train__channels_last": False},
        {"network": None, "regularizer__decay": False, "train__init": "orthogonal"},
        {"train__precision": "bf16-mixed", "data__cutout": 2},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_kinds_of_runs(tmp_path, changes):
    if "network" in changes:  # dropout draws from the global generator
        changes = {k: v for k, v in changes.items() if k != "network"}
        changes |= {"network__kind": "wide_resnet", "network__depth": 10, "network__width": 1, "network__dropout": 0.3}
    run, again, other = run_in(tmp_path / "a", **changes), run_in(tmp_path / "b", **changes), run_in(tmp_path / "c", 1, **changes)
    summary = train(run, hardware=HARDWARE)
    train(again, hardware=HARDWARE)
    train(other, hardware=HARDWARE)
    assert_equal(weights(run), weights(again))
    assert without_times(run.metrics()) == without_times(again.metrics())
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(run).items())
    assert (run.folder / "best.safetensors").is_file() == (run.recipe.data.validation > 0)
    assert (summary["validation"] is None) == (run.recipe.data.validation == 0)
    plain = run_in(tmp_path / "d")
    train(plain, hardware=HARDWARE)
    assert weights(plain).keys() != weights(run).keys() or any(
        not torch.equal(value, weights(plain)[name]) for name, value in weights(run).items()
    )


class StopAt(Watch):
    """Asks to stop as Ctrl-C does, at the n-th step."""

    def __init__(self, step):
        self.left = step

    def step(self, run, epochs, loss, speed):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "changes", [{}, {"train__ema": 0.9}, {"train__precision": "bf16-mixed", "regularizer__strength": 1.0}], ids=str
)
def test_interrupted_anywhere_it_ends_bit_identical(tmp_path, monkeypatch, changes):
    changes |= {
        "network__kind": "wide_resnet",
        **{"network__depth": 10, "network__width": 1, "network__dropout": 0.3, "train__label_smoothing": 0.1},
    }
    monkeypatch.setattr(training, "SHOW_EVERY", -1.0)
    whole, handler = run_in(tmp_path / "whole", **changes), signal.getsignal(signal.SIGINT)
    train(whole, hardware=HARDWARE)
    run = run_in(tmp_path / "stopped", **changes)
    for step in (1, 2, 1, 3):
        with pytest.raises(Interruption, match="the same command goes on"):
            train(run, hardware=HARDWARE, watch=StopAt(step))
        assert not (run.folder / "summary.json").exists()
    train(run, hardware=HARDWARE)
    assert_equal(weights(run), weights(whole))
    assert_equal(weights(run, "best"), weights(whole, "best"))
    assert without_times(run.metrics()) == without_times(whole.metrics())
    assert signal.getsignal(signal.SIGINT) is handler


def command(run, *more):
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder.parent / "r.toml"
    path.write_text(run.recipe.to_toml())
    arguments = ["train", str(path), "--out", str(run.folder.parents[1]), "--name", run.folder.parent.name]
    return [
        sys.executable,
        "-m",
        "orthokit.cli",
        *arguments,
        "--seeds",
        str(run.seed),
        "--device",
        "cpu",
        "--threads",
        "1",
        *more,
    ]


def test_killed_anywhere_it_ends_bit_identical(tmp_path, request, monkeypatch):
    """The last process imports everything anew, as all do in life."""
    request.getfixturevalue("forked")
    changes = {"train__epochs": 12, "train__ema": 0.9}
    whole, run = run_in(tmp_path / "whole", **changes), run_in(tmp_path / "killed", **changes)
    train(whole, hardware=HARDWARE)
    moments, kills = random.Random(0), 0
    while kills < 3:
        process = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = len(run.metrics())
        while len(run.metrics()) < before + 2 and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors  # it had not finished
        kills += 1
        for path in run.folder.iterdir():  # whatever has its name is whole
            if path.suffix == ".safetensors":
                load_file(path)
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
    monkeypatch.undo()
    finished = subprocess.run(command(run), capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert_equal(weights(run), weights(whole))
    assert_equal(weights(run, "best"), weights(whole, "best"))
    assert without_times(run.metrics()) == without_times(whole.metrics())


def test_a_signal_saves_and_exits(tmp_path, forked):
    run = run_in(tmp_path / "a", train__epochs=500)
    process = subprocess.Popen(command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.metrics():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert "epoch 1/500  loss" in out
    state = torch.load(run.checkpoint, weights_only=True)["progress"]
    assert state["step"] >= 4


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    run = run_in(tmp_path)
    summary = train(run, hardware=HARDWARE)
    for path in run.folder.iterdir():  # as in a fresh clone
        if path.name != "summary.json":
            path.unlink()
    monkeypatch.setattr(DataSection, "images", lambda *_, **__: pytest.fail("it trains again"))
    assert train(run, hardware=HARDWARE) == summary
    assert {path.name for path in run.folder.iterdir()} == {"summary.json"}
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(train\.lr: 0\.1 -> 0\.2, in summary\.json\)"):
        train(Run(recipe(train__lr=0.2), 0, run.folder), hardware=HARDWARE)


def test_another_recipe_does_not_go_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SHOW_EVERY", -1.0)
    run = run_in(tmp_path)
    with pytest.raises(Interruption):
        train(run, hardware=HARDWARE, watch=StopAt(2))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(train\.epochs: 2 -> 3"):
        train(Run(recipe(train__epochs=3), 0, run.folder), hardware=HARDWARE)
    train(run, hardware=HARDWARE)


def test_a_recipe_that_never_began_may_be_mended(tmp_path):
    with pytest.raises(ValueError, match="depth must be"):
        train(run_in(tmp_path, network__depth=9), hardware=HARDWARE)
    train(run_in(tmp_path), hardware=HARDWARE)


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, capsys):
    run = run_in(tmp_path / "a", train__lr=1e20, train__epochs=4, regularizer=None, train__warmup=1.0)
    with pytest.raises(DivergenceError, match=r"a/0 diverged in epoch \d, step \d: the loss is (nan|inf).*Lower train\.lr"):
        train(run, hardware=HARDWARE)
    assert not (run.folder / "summary.json").exists()
    if run.checkpoint.exists():
        state = torch.load(run.checkpoint, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in state.values())
    path = tmp_path / "r.toml"
    path.write_text(run.recipe.to_toml())
    arguments = ["train", str(path), "--out", str(tmp_path), "--name", "a", "--threads", "1", "--device", "cpu"]
    assert main(arguments) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_divergence_after_a_good_epoch(tmp_path, monkeypatch):
    run = run_in(tmp_path, train__epochs=3)
    whole = training.Training.train_epoch

    def poisoned(self, epoch):
        if epoch == 1:
            self.model.conv.weight.data[0] = float("nan")
        whole(self, epoch)

    monkeypatch.setattr(training.Training, "train_epoch", poisoned)
    with pytest.raises(DivergenceError, match=r"epoch 2, step 1: .*last\.ckpt is from before"):
        train(run, hardware=HARDWARE)
    assert torch.load(run.checkpoint, weights_only=True)["progress"]["step"] == 4
    assert len(run.metrics()) == 1
    monkeypatch.undo()
    train(run, hardware=HARDWARE)
    straight = run_in(tmp_path / "b", train__epochs=3)
    train(straight, hardware=HARDWARE)
    assert_equal(weights(run), weights(straight))


def test_a_full_disk_loses_nothing(tmp_path):
    run = run_in(tmp_path / "a", train__epochs=6)
    train(run_in(tmp_path / "b", train__epochs=1), hardware=HARDWARE)
    size = (tmp_path / "b/0/last.ckpt").stat().st_size
    monkey = training.Training.save
    calls = itertools.count()

    def filling(self):
        if next(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        monkey(self)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    training.Training.save = filling
    try:
        with pytest.raises(OSError, match="File too large"):
            train(run, hardware=HARDWARE)
    finally:
        training.Training.save = monkey
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(run.checkpoint, weights_only=True)["progress"]["step"] == 8
    assert not list(run.folder.glob(".last.ckpt.*"))
    train(run, hardware=HARDWARE)
    straight = run_in(tmp_path / "c", train__epochs=6)
    train(straight, hardware=HARDWARE)
    assert_equal(weights(run), weights(straight))


def test_bad_folders_and_files(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / "r.toml"
    path.write_text(recipe().to_toml())
    base = ["train", str(path), "--threads", "1", "--device", "cpu"]
    assert main([*base, "--out", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    run = Run(recipe(), 0, tmp_path / "runs/r/0")
    train(run, hardware=HARDWARE)
    for name, message in (("summary.json", "is damaged"), ("environment.json", "is damaged"), ("last.ckpt", "cannot be read")):
        for other in ("summary.json", "environment.json"):
            (run.folder / other).unlink(missing_ok=True)
        (run.folder / name).write_bytes((run.folder / name).read_bytes()[:50] if name == "last.ckpt" else b"{")
        assert main([*base, "--out", str(tmp_path / "runs")]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert message in err
        assert "remove it" in err
    shutil.rmtree(run.folder)
    assert main([*base, "--out", str(tmp_path / "runs"), "--set", "network.kind=nowhere:build"]) == 2
    for setting in ("network.depth=eight", "network.depth=true", "network.dept=8"):
        assert main([*base, "--out", str(tmp_path / "runs"), "--set", setting]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert main([*base, "--out", str(tmp_path / "runs"), "--set", "train.batch=4000"]) == 2
    assert "a batch of 4000 is larger than the 200 training images" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", {"test": {}}),
        ("summary.json", {"validation": ...}),
        ("summary.json", {"seconds": "x"}),
        ("environment.json", {"threads": 0}),
        ("environment.json", {"threads": "x"}),
        ("environment.json", {"precision": ...}),
    ],
    ids=str,
)
def test_edited_files(tmp_path, name, change):
    run = run_in(tmp_path, train__epochs=1)
    train(run, hardware=HARDWARE)
    actual = json.loads((run.folder / name).read_text()) | change
    (run.folder / name).write_text(json.dumps({key: value for key, value in actual.items() if value is not ...}))
    if name == "environment.json":
        (run.folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"is not what a run writes .*; remove it to run again"):
        train(run, hardware=HARDWARE)


def test_begun_by_another_meanwhile(tmp_path, monkeypatch):
    """While we waited for the lock its holder has saved a checkpoint with other numerics than those we have set up."""
    run, other = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    train(other, hardware=HARDWARE)
    held = Run.hold

    @contextlib.contextmanager
    def holding(self, say):
        with held(self, say):
            for name in ("last.ckpt", "environment.json"):
                shutil.copy(other.folder / name, run.folder / name)
            yield

    monkeypatch.setattr(Run, "hold", holding)
    with pytest.raises(BlockingIOError, match="another process has begun a/0 meanwhile; the same command goes on"):
        train(run, hardware=HARDWARE)
    monkeypatch.undo()
    assert train(run, hardware=HARDWARE)["test"] == other.summary()["test"]


def test_a_held_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("orthokit.lab.runs.run.WAIT", 0.1)
    run = run_in(tmp_path)
    with run.hold(), pytest.raises(BlockingIOError, match="another process is training"):
        train(run, hardware=HARDWARE)


def test_learning_rates():
    section = recipe(
        train__epochs=4, train__schedule="step", train__milestones=[0.5, 0.75], train__gamma=0.1, train__warmup=1.0
    ).train
    rate = learning_rate(section, 10)
    assert [rate(step) for step in (0, 5, 10, 19, 20, 29, 30)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001])
    rate = learning_rate(recipe(train__epochs=4).train, 10)
    assert (rate(0), rate(20), rate(40)) == pytest.approx((0.1, 0.05, 0.0))


def test_weight_decay_on_regularized_kernels(tmp_path):
    """With decay = false only what is no kernel shrinks; seen where the penalty has no strength."""
    changes = {"regularizer__strength": 0.0, "train__weight_decay": 0.5, "train__epochs": 1}
    with_, without = run_in(tmp_path / "a", **changes), run_in(tmp_path / "b", **changes, regularizer__decay=False)
    for run in (with_, without):
        train(run, hardware=HARDWARE)
    a, b = weights(with_), weights(without)
    assert b["conv.weight"].norm() > 1.2 * a["conv.weight"].norm()


def test_a_network_without_convolutions(tmp_path, monkeypatch):
    (tmp_path / "mlps.py").write_text(
        "from torch import nn\n"
        "def mlp(channels, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = run_in(tmp_path / "a", network__kind="mlps:mlp", regularizer__where="linears")
    run = Run(Recipe.of({**run.recipe.to_dict(), "network": {"kind": "mlps:mlp"}}).with_code(Code()), 0, run.folder)
    summary = train(run, hardware=HARDWARE)
    assert summary["ranks"] == {"1": 8, "3": 10}
    assert summary["orthogonality"]["under"]["filters"] == 8


def test_what_never_trained_binds_nothing(tmp_path):
    with pytest.raises(ValueError, match="depth must be"):
        train(run_in(tmp_path, network__depth=9, train__precision="bf16-mixed"), hardware=HARDWARE)
    assert train(run_in(tmp_path), hardware=HARDWARE)["environment"]["precision"] == "32-true"


def test_orthogonal_initialisation():
    data = load_images("synthetic", train=100, size=8)
    model = recipe(train__init="orthogonal").build(data)
    for row in ok.report(model, where=ok.convs).rows:
        assert (row["sigma_min"], row["sigma_max"]) == pytest.approx((1, 1), abs=1e-6)


def test_he_initialisation():
    data = load_images("synthetic", train=100, size=8)
    for name, module in recipe(train__init="he", network__filters=64).build(data).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10**4:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def tiny(channels, classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = Run(Recipe.of({**BASE, "network": {"kind": "mynets:tiny", "width": 6}}).with_code(Code()), 0, tmp_path / "a/0")
    assert train(run, hardware=HARDWARE)["parameters"] == 3 * 9 * 6 + 6 + 60 + 10
    assert weights(run)["0.weight"].shape == (6, 3, 3, 3)


def under_torchrun(command, ranks=2):
    """The processes that ``torchrun --standalone`` would start, with the environment that it gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "OMP_NUM_THREADS": "1", **address}
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def test_several_processes_train_as_one(tmp_path, forked):
    changes = {"network__norm": "group", "train__epochs": 1, "data__train": 260, "train__batch": 52}  # 5 steps
    one, two = run_in(tmp_path / "one", **changes), run_in(tmp_path / "two", **changes)
    train(one, hardware=HARDWARE)
    for errors, process in [(process.communicate(timeout=300)[1], process) for process in under_torchrun(command(two))]:
        assert process.returncode == 0, errors
    first, second = one.summary(), two.summary()
    assert second["environment"]["ranks"] == 2
    a, b = weights(one), weights(two)
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    start = Recipe.of(one.recipe.to_dict()).network.build(3, 10).state_dict()
    assert any((a[name] - start[name]).abs().max() > 1e-2 for name in a)
    assert second["train"]["loss"] == pytest.approx(first["train"]["loss"], abs=1e-5)
    assert second["validation"] == pytest.approx(first["validation"], abs=1e-4)
    assert second["test"] == pytest.approx(first["test"], abs=1e-4)


def test_compiled(tmp_path):
    """The same run through torch.compile's front end; no compiler is needed for that."""
    torch._dynamo.reset()
    whole = run_in(tmp_path / "a", train__epochs=1)
    train(whole, hardware=HARDWARE)
    compiled = torch.compile
    try:
        torch.compile = lambda model, **options: compiled(model, **(options | {"backend": "eager"}))
        run = run_in(tmp_path / "b", train__epochs=1, train__compile=True)
        train(run, hardware=HARDWARE)
    finally:
        torch.compile = compiled
        torch._dynamo.reset()
    a, b = weights(whole), weights(run)
    assert a.keys() == b.keys()
    assert max((a[n].float() - b[n].float()).abs().max().item() for n in a) < 1e-4


def test_fewer_validations_leave_the_training_alone(tmp_path):
    whole, rare = run_in(tmp_path / "whole", train__epochs=5), run_in(tmp_path / "rare", train__epochs=5)
    summaries = train(whole, hardware=HARDWARE), train(rare, hardware=HARDWARE, validate_every=2)
    assert [row["epoch"] for row in rare.metrics() if row["validation"]] == [1, 3, 5]
    pairs = zip(rare.metrics(), whole.metrics(), strict=True)
    assert all(row["validation"] in (None, other["validation"]) for row, other in pairs)
    assert summaries[0]["weights"] == summaries[1]["weights"]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert summaries[1]["validation"] == rare.metrics()[-1]["validation"]
    best = max(filter(None, (row["validation"] for row in rare.metrics())), key=lambda scores: scores["accuracy"])
    assert summaries[1]["best"]["accuracy"] == best["accuracy"]
    assert "--validate-every 3" in " ".join(Pool(validate_every=3).command(rare, tmp_path / "recipe.toml"))
