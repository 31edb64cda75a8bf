"""Logs: what ok.log writes where, and the lab's --log."""

import contextlib
import csv
import errno
import io
import json
import logging
import os
import signal
import sys
import time

import pytest
import torch
from torch import nn

import orthokit as ok
from orthokit.cli import main
from orthokit.integrations import logs
from orthokit.integrations.logs import measure
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.runs.logs import Log, check_installed
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import Interruption, train


class Scalars:
    """As a SummaryWriter."""

    def __init__(self):
        self.rows = {}

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        assert isinstance(scalar_value, float)
        self.rows[tag, global_step] = scalar_value


class Metrics:
    """As Lightning's loggers, W&B's runs and Fabric, by the name of the method."""

    def __init__(self, name):
        self.rows = []
        setattr(self, name, self._log)

    def _log(self, values, step=None):
        self.rows.append((step, values))


@pytest.fixture
def ortho():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 3, groups=2))
    model[1].weight.data[1] = model[1].weight.data[0]  # a copy in a tall layer
    return ok.Regularizer(model, ok.SO(), strength=ok.linear(0.5, 0.0, steps=5))


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_values(ortho):
    ortho.step()
    values = ok.log(ortho, None, 3)
    layers = ortho.per_layer()
    assert {key: values[f"ortho/{key}"] for key in layers} == layers
    assert values["ortho/strength"] == ortho.strength == 0.4
    assert values["ortho/total"] == pytest.approx(ortho().item(), rel=1e-6)
    totals = ok.report(ortho.model, where=ok.convs).totals
    for shape in ("wide", "tall"):
        for key in ("x_random", "mean_cos", "max_cos", "copies"):
            assert values[f"ortho/{shape}/{key}"] == pytest.approx(totals[shape][key], rel=1e-5), (shape, key)
    assert values["ortho/tall/copies"] == 1
    assert set(ok.log(ortho, None, 3, prefix="mine", report=False)) == {f"mine/{key}" for key in (*layers, "total", "strength")}


def test_frozen_layers_and_layers_without_pairs(ortho):
    ortho.model[1].weight.requires_grad_(False)
    values = ok.log(ortho, None, 0)
    assert "ortho/1" not in values
    assert not any("tall" in key for key in values)
    depthwise = ok.Regularizer(ortho.model[2], ok.SO(), strength=1.0)
    assert set(ok.log(depthwise, None, 0)) == {"ortho/Conv2d", "ortho/total", "ortho/strength"}


def test_precision_and_autocast(ortho):
    ortho.model.bfloat16()
    plain = ok.log(ortho, None, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ok.log(ortho, None, 0) == plain
    assert plain["ortho/wide/mean_cos"] == pytest.approx(
        ok.report(ortho.model, where=ok.convs).totals["wide"]["mean_cos"], rel=1e-5
    )
    assert all(p.grad is None for p in ortho.model.parameters())


@pytest.mark.parametrize("name", ["log", "log_dict", "log_metrics"])
def test_dictionaries(name, ortho):
    writer = Metrics(name)
    values = ok.log(ortho, writer, 7)
    assert writer.rows == [(7, values)]


def test_scalars_and_functions(ortho):
    writer, calls = Scalars(), []
    values = ok.log(ortho, writer, 7)
    assert writer.rows == {(key, 7): value for key, value in values.items()}
    assert ok.log(ortho, lambda *args: calls.append(args), 8) == values
    assert calls == [(values, 8)]


def test_csv_file(tmp_path, ortho):
    path = tmp_path / "log.csv"
    for step in (0, 5):
        values = ok.log(ortho, path if step else str(path), step)
    rows = rows_of(path.read_text())
    assert [row.pop("step") for row in rows] == ["0", "5"]
    assert {key: float(value) for key, value in rows[1].items()} == values
    ok.log(ortho, path, 9, prefix="second", report=False)  # further columns
    ok.log(ortho, path, 10, report=False)  # fewer
    rows = rows_of(path.read_text())
    assert [row["step"] for row in rows] == ["0", "5", "9", "10"]
    assert float(rows[1]["ortho/total"]) == values["ortho/total"]
    assert rows[1]["second/total"] == rows[2]["ortho/total"] == rows[3]["ortho/wide/copies"] == ""
    assert float(rows[2]["second/total"]) == float(rows[3]["ortho/total"]) == values["ortho/total"]


def test_a_row_that_was_not_finished(tmp_path, ortho):
    path = tmp_path / "log.csv"
    ok.log(ortho, path, 0)
    with path.open("a") as file:
        file.write("1,0.5")  # stopped here
    ok.log(ortho, path, 2)
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == ["step", "0", "1", "2"]


def test_a_file_that_is_no_log_is_left_alone(tmp_path, ortho):
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match="not a log to append to"):
        ok.log(ortho, path, 0)
    assert path.read_bytes() == b"PK\x03\x04\xff\xfe"


def test_open_files(tmp_path, ortho):
    path = tmp_path / "log.csv"
    for step in (0, 2):  # opened again to append
        with path.open("a", newline="") as file:
            ok.log(ortho, file, step)
            ok.log(ortho, file, step + 1)
    assert [row["step"] for row in rows_of(path.read_text())] == ["0", "1", "2", "3"]

    class Pipe(io.StringIO):
        def tell(self):
            raise io.UnsupportedOperation("underlying stream is not seekable")

    pipe = Pipe()
    ok.log(ortho, pipe, 0)
    ok.log(ortho, pipe, 1, report=False)
    assert [(row["step"], row["ortho/wide/copies"]) for row in rows_of(pipe.getvalue())] == [("0", "0.0"), ("1", "")]
    with pytest.raises(ValueError, match="an open file keeps its header, which lacks other/0, other/1"):
        ok.log(ortho, pipe, 2, prefix="other")


def test_new_columns_never_cost_rows(tmp_path, ortho, monkeypatch):
    """The disk is full while the file is written anew."""
    path, link = tmp_path / "log.csv", tmp_path / "link.csv"
    for step in range(3):
        ok.log(ortho, path, step)
    path.chmod(0o640)
    link.symlink_to(path)
    before = path.read_bytes()
    write = logs._add_rows

    def fill_the_disk(file, columns, rows, *, header):
        write(file, columns, rows[:1], header=header)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logs, "_add_rows", fill_the_disk)
        with pytest.raises(OSError, match="No space"):
            ok.log(ortho, link, 3, prefix="other")
    assert path.read_bytes() == before
    ok.log(ortho, link, 3, prefix="other")
    assert [row["step"] for row in rows_of(path.read_text())] == ["0", "1", "2", "3"]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_an_open_file_keeps_the_columns_that_it_has(tmp_path, ortho):
    path = tmp_path / "log.csv"
    values = ok.log(ortho, path, 0)
    with path.open("a", newline="") as file:  # fewer columns
        ok.log(ortho, file, 1, report=False)
        ok.log(ortho, file, 2)
    rows = rows_of(path.read_text())
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [float(row["ortho/strength"]) for row in rows] == [values["ortho/strength"]] * 3
    assert rows[1]["ortho/wide/copies"] == ""
    before = path.read_text()
    with path.open("a", newline="") as file:
        with pytest.raises(ValueError, match="which lacks other/0"):
            ok.log(ortho, file, 3, prefix="other")
        ok.log(ortho, file, 3)  # nothing of the refused call is remembered
    assert rows_of(path.read_text())[:-1] == rows_of(before)


@pytest.mark.parametrize("kind", ["notes", "memory", "nameless"])
def test_an_open_file_whose_header_is_not_known_is_refused(tmp_path, ortho, kind):
    path = tmp_path / "notes.txt"
    path.write_text("some notes\n" if kind == "notes" else "step,other\n")
    if kind == "memory":
        file = io.StringIO("step,other\n")
        file.seek(0, io.SEEK_END)
    else:
        file = path.open("a") if kind == "notes" else os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "a")
    with file, pytest.raises(ValueError, match=r"no header could be read .* log to a path"):
        ok.log(ortho, file, 0)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "writer",
    [3, object(), Scalars, nn.Linear(2, 2), logging.getLogger("x"), io.BytesIO(), lambda values: values],
    ids=lambda writer: type(writer).__name__,
)
def test_other_writers(writer, ortho):
    with pytest.raises(TypeError, match="log writes to a SummaryWriter, a W&B run"):
        ok.log(ortho, writer, 0)


def test_bad_arguments(ortho, unchecked):
    with pytest.raises(TypeError, match="log takes a Regularizer, then where to log; got Scalars, Regularizer"):
        ok.log(Scalars(), ortho, 0)
    with pytest.raises(TypeError, match="step must be an integer"):
        ok.log(ortho, None, 0.5)
    with pytest.raises(ValueError, match="step must be an integer, at least 0"):
        ok.log(ortho, None, -1)
    with pytest.raises(TypeError, match="report must be True or False"):
        ok.log(ortho, None, 0, report="yes")
    ortho.model[0].weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="layer 0"):
        ok.log(ortho, None, 0)


def test_fabric_and_lightning_loggers(tmp_path, ortho):
    fabric = pytest.importorskip("lightning.fabric")
    logger = fabric.loggers.CSVLogger(tmp_path, name="fabric", flush_logs_every_n_steps=1)
    values = ok.log(ortho, fabric.Fabric(accelerator="cpu", loggers=logger), 4)
    ok.log(ortho, logger, 5)
    rows = rows_of(next(tmp_path.rglob("metrics.csv")).read_text())
    assert [row["step"] for row in rows] == ["4", "5"]
    assert float(rows[1]["ortho/total"]) == pytest.approx(values["ortho/total"])


@pytest.mark.filterwarnings("ignore")  # its own
def test_tensorboard(tmp_path, ortho):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        values = ok.log(ortho, writer, 3)
    assert events(tmp_path) == {key: [(3, pytest.approx(value))] for key, value in values.items()}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_measured_takes_a_strength(ortho):
    values = measure(ortho, 0.25, "x", report=True)
    assert values["x/strength"] == 0.25
    assert values["x/total"] == 0.25 * sum(ortho.per_layer().values())
    assert "x/wide/max_cos" in values


# The lab ------------------------------------------------------------------------------------------------------------------

RECIPE = {
    "data": {"name": "synthetic", "train": 100, "validation": 50, "size": 8, "pad": 1},
    "network": {"kind": "resnet", "depth": 8},
    "train": {"epochs": 3, "batch": 50, "precision": "32-true"},
    "regularizer": {"strength": 0.1, "penalty": "disentangled"},
}


def run_in(folder, **train):
    return Run(Recipe.of({**RECIPE, "train": {**RECIPE["train"], **train}}), 0, folder / "0")


def fit(run, log):
    return train(run, hardware=Hardware(device="cpu", threads=1), watch=log)


class Once(Log):
    """Is killed, or has the run stopped, in the middle of it."""

    def row(self, run, row):
        if row["epoch"] == 2:
            raise RuntimeError("killed between the checkpoint and its log")
        super().row(run, row)
        signal.raise_signal(signal.SIGINT)


def test_csv_of_a_run(tmp_path):
    run, heard = run_in(tmp_path), []
    listener = Watch()
    listener.row = lambda run, row: heard.append(row["epoch"])
    log = tmp_path / "0" / "metrics.csv"
    with Once("csv", listener) as watch, pytest.raises(Interruption):
        fit(run, watch)
    assert [row["epoch"] for row in rows_of(log.read_text())] == ["1"]
    with Once("csv", listener) as watch, pytest.raises(RuntimeError, match="killed"):
        fit(run, watch)
    with Log("csv", listener) as watch:
        fit(run, watch)
    rows = rows_of(log.read_text())
    assert heard == [1, 3]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    for row, line in zip(rows, run.metrics(), strict=True):
        assert float(row["train/loss"]) == line["train"]["loss"]
        assert float(row["validation/accuracy"]) == line["validation"]["accuracy"]
        assert float(row["strength"]) == 0.1
        assert any(key.startswith("orthogonality/") and key.endswith("/mean_cos") for key in row)
    text = log.read_text()
    log.unlink()
    with Log("csv", Watch()) as watch:  # of a finished run
        watch.update(run, before=True)
    assert log.read_text() == text


@pytest.mark.filterwarnings("ignore")  # its own
def test_tensorboard_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    run = run_in(tmp_path)
    for _ in range(3):
        with contextlib.suppress(Interruption, RuntimeError), Once("tensorboard", Watch()) as watch:
            fit(run, watch)
    with Log("tensorboard", Watch()) as watch:
        watch.update(run)
    logged = events(run.folder / "tensorboard")
    assert logged["train/loss"] == [(row["step"], pytest.approx(row["train"]["loss"])) for row in run.metrics()]
    assert [value for _, value in logged["epoch"]] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, text = run_in(tmp_path, epochs=2), []
    listener = Watch()
    listener.say = text.append
    with pytest.raises(Interruption), Once("wandb", listener) as watch:
        fit(run, watch)
    time.sleep(1.1)  # its folder is named after the second
    with Log("wandb", listener) as watch:
        fit(run, watch)
    (folder,) = run.folder.glob("wandb/offline-run-*")
    assert text[-1] == f"W&B, offline; to upload it: wandb sync {folder}"
    assert next(folder.glob("*.wandb")).read_bytes().count(b"images_per_second") >= 2
    with Log("wandb", listener) as watch:
        watch.update(run, before=True)
    assert len(text) == 2


def command(tmp_path, *options):
    recipe = tmp_path / "small.toml"
    recipe.write_text(Recipe.of({**RECIPE, "train": {**RECIPE["train"], "epochs": 1}}).to_toml())
    where = ["--out", str(tmp_path / "runs"), "--device", "cpu", "--threads", "1"]
    return main(["train", str(recipe), *where, *options])


def test_the_option_reaches_every_run(tmp_path, capsys, forked):
    assert command(tmp_path, "--seeds", "0") == 0
    assert not (tmp_path / "runs/small/0/metrics.csv").exists()
    assert command(tmp_path, "--seeds", "0", "1", "--log", "csv") == 0
    for seed in (0, 1):  # one that was finished before, one in a process of its own
        folder = tmp_path / "runs/small" / str(seed)
        (row,) = rows_of((folder / "metrics.csv").read_text())
        assert float(row["train/loss"]) == json.loads((folder / "metrics.jsonl").read_text())["train"]["loss"]
        assert "log" not in (folder / "recipe.toml").read_text()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_training(kind, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ModuleNotFoundError, match=f"--log {kind} needs {kind}: pip install {kind}"):
        check_installed(kind)
    for seeds in (["0"], ["0", "1"]):
        assert command(tmp_path, "--seeds", *seeds, "--log", kind) == 2
        assert f"--log {kind} needs {kind}: pip install {kind}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    check_installed("csv")
    check_installed(None)
