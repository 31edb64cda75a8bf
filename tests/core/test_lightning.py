"""The Lightning adapter: training through it is training with the penalty in the loss, in the real Trainer."""

import csv
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import orthokit as ok
from orthokit.checks import install
from orthokit.integrations.lightning import OrthoCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*`logging` interval|.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

PENALTY = ok.Disentangled()
STRENGTH = ok.linear(0.3, 0.0, steps=16)


class Module(LightningModule):
    def __init__(self, optimizer=None, penalty_in_loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
        )
        self.optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Resumable(DataLoader):
    """Lightning continues within an epoch only where the loader can say, and be told, how far it is."""

    done = start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = index + 1
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"] % len(self)


def batches(n=4):
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8 * n, 3, 8, 8, generator=g), torch.randint(5, (8 * n,), generator=g))
    return Resumable(data, batch_size=8)


def fit(module, *callbacks, path=None, val=False, data=None, kind=Trainer, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = kind(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options)
    trainer.fit(module, data or batches(), batches(1) if val else None, ckpt_path=path)
    return trainer


def plain(*, penalty=True, optimizer=None, epochs=2, accumulate=1, clip=None, unit="epoch", dtype=None, precision=None):
    """The same training written out: clip the gradient of the task, then add the penalty's."""
    module = Module(optimizer).to(dtype or torch.float32)
    ortho = ok.Regularizer(module, PENALTY, strength=STRENGTH)
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches()):
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = F.cross_entropy(module.net(x.to(dtype or x.dtype)), y) / accumulate
            loss.backward()
            if (index + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                if penalty:
                    ortho().backward()
                optimizer.step()
                optimizer.zero_grad()
                if unit == "batch":
                    ortho.step()
        if unit == "epoch":
            ortho.step()
    return weights(module)


def weights(module):
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def callback(**options):
    return OrthoCallback(PENALTY, **{"strength": STRENGTH, **options})


ADAM = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 2e-6),
        ({"accumulate": 2, "clip": 0.05}, 2e-6),
        ({"accumulate": 2, "clip": 0.05, "unit": "batch", **ADAM}, 2e-5),
        ({"unit": "batch", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)}, 2e-6),
        ({"precision": torch.bfloat16, "clip": 0.05}, 2e-6),
        ({"dtype": torch.bfloat16}, 2e-2),
        ({"dtype": torch.float64}, 1e-12),
    ],
    ids=["plain", "accumulate+clip", "accumulate+clip+batch+AdamW", "fused", "bf16-mixed+clip", "bf16-true", "64-true"],
)
def test_same_weights_as_the_penalty_in_the_loss(options, tolerance):
    module = Module(options.get("optimizer"))
    settings = {"accumulate_grad_batches": options.get("accumulate", 1), "gradient_clip_val": options.get("clip")}
    if "precision" in options:
        settings["precision"] = "bf16-mixed"
    if "dtype" in options:
        settings["precision"] = {torch.bfloat16: "bf16-true", torch.float64: "64-true"}[options["dtype"]]
    fit(module, callback(step=options.get("unit", "epoch")), **settings)
    expected = plain(**options)
    error = (weights(module) - expected).abs().max().item()
    assert error <= tolerance
    assert (plain(penalty=False, **options) - expected).abs().max().item() > 10 * max(tolerance, 1e-3)


@pytest.mark.parametrize(  # Lightning refuses to clip what a fused optimizer unscales
    ("fused", "clip"), [(False, None), (False, 0.05), (True, None)], ids=["unclipped", "clipped", "fused"]
)
def test_a_gradient_scaler(fused, clip):
    """What 16-mixed does on a GPU, on the CPU: the same scaler, with a scale that matters."""

    def optimizer(p):
        return torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused)

    def run(*callbacks):
        module = Module(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = scaler
        fit(module, *callbacks, plugins=[plugin], gradient_clip_val=clip)
        return weights(module)

    expected = plain(optimizer=optimizer, precision=torch.bfloat16, clip=clip)
    error = (run(callback()) - expected).abs().max().item()
    assert error < 1e-5
    assert (run() - expected).abs().max().item() > 1e-2


def test_a_closure_that_is_called_more_than_once():
    def lbfgs(p):
        return torch.optim.LBFGS(p, lr=0.1, max_iter=3)

    class InLoss(Module):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + ok.Regularizer(self, ok.SO(), strength=0.01)()

    through, expected = Module(lbfgs), InLoss(lbfgs)
    fit(through, OrthoCallback(ok.SO(), strength=0.01), max_epochs=1)
    fit(expected, max_epochs=1)
    assert torch.allclose(weights(through), weights(expected), atol=1e-4)
    without = Module(lbfgs)
    fit(without, max_epochs=1)
    assert not torch.allclose(weights(without), weights(expected), atol=1e-3)


class TwoOptimizers(Module):
    """Manual optimization: one optimizer per convolution, of which the second steps every other batch."""

    def __init__(self, in_loss=False):
        super().__init__()
        self.automatic_optimization = False
        self.in_loss = in_loss

    def configure_optimizers(self):
        first = list(self.net[0].parameters())
        return torch.optim.SGD(first, lr=0.1), torch.optim.Adam(list(self.net[2:].parameters()), lr=0.01)

    def training_step(self, batch, index):
        x, y = batch
        for place, optimizer in enumerate(self.optimizers()):
            if index % (place + 1) == 0:
                loss = F.cross_entropy(self.net(x), y)
                if self.in_loss:
                    loss = loss + ok.Regularizer(self, PENALTY, strength=STRENGTH(4 * self.current_epoch + index))()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()


def test_manual_optimization_with_two_optimizers():
    through, expected, without = TwoOptimizers(), TwoOptimizers(in_loss=True), TwoOptimizers()
    ortho = callback(step="batch")
    fit(through, ortho, max_epochs=1)
    fit(expected, max_epochs=1)
    fit(without, max_epochs=1)
    assert torch.allclose(weights(through), weights(expected), atol=2e-6)
    assert not torch.allclose(weights(without), weights(expected), atol=1e-2)
    assert ortho.ortho.steps == 3


# Checkpoints


def by_batches(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def by_validation(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1)


def by_epochs(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)


@pytest.mark.parametrize("unit", ["epoch", "batch"])
@pytest.mark.parametrize(
    ("saving", "at"),
    [(by_batches, 4), (by_batches, 6), (by_validation, 4), (by_epochs, 4)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_resumed_training_equals_uninterrupted(saving, at, unit, tmp_path):
    val = saving is by_validation
    whole, ortho = Module(), callback(step=unit)
    saver = saving(tmp_path)
    fit(whole, saver, ortho, val=val, max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0)

    resumed, again = Module(), callback(step=unit)
    with torch.no_grad():
        resumed.net[0].weight.zero_()
    fit(resumed, again, path=tmp_path / f"step={at}.ckpt", val=val, max_epochs=3, num_sanity_val_steps=0)
    assert torch.equal(weights(resumed), weights(whole))
    assert again.ortho.steps == ortho.ortho.steps == {"epoch": 2, "batch": 11}[unit]
    assert torch.allclose(weights(whole), plain(epochs=3, unit=unit), atol=2e-6)


def test_a_checkpoint_of_another_unit_is_refused(tmp_path):
    fit(Module(), by_batches(tmp_path), callback(), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match="counts in step='epoch', this OrthoCallback in 'batch'"):
        fit(Module(), callback(step="batch"), path=tmp_path / "step=2.ckpt")


def test_a_second_fit_continues_and_a_new_trainer_begins_anew():
    ortho, module = callback(), Module()
    trainer = fit(module, ortho)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches())
    assert ortho.ortho.steps == 3
    fit(Module(), ortho)
    assert ortho.ortho.steps == 1


def test_two_callbacks_keep_their_schedules_apart(tmp_path):
    def both():
        convolutions = callback(step="batch")
        return convolutions, callback(where=ok.linears, name="head")

    fit(Module(), by_batches(tmp_path), *both(), enable_checkpointing=True)
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"]
    assert {key: value["steps"] for key, value in state.items() if "Ortho" in key} == {
        "OrthoCallback('ortho')": 5,
        "OrthoCallback('head')": 1,
    }
    first, second = both()
    fit(Module(), first, second, path=tmp_path / "step=6.ckpt")
    assert (first.ortho.steps, second.ortho.steps) == (7, 1)


# Logs, and what is left behind


def logged(logger):
    """The rows that hold our values; empty fields left out."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "ortho/total" in row]


def test_logs(tmp_path):
    module, ortho = Module(), callback(step="batch")
    logger = CSVLogger(tmp_path)
    trainer = fit(module, ortho, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=3)
    rows = logged(logger)
    assert [row["step"] for row in rows] == [1, 3, 5]
    assert [row["ortho/strength"] for row in rows] == pytest.approx([STRENGTH(step) for step in (1, 3, 5)])
    last, actual = rows[-1], ok.Regularizer(module, PENALTY, strength=STRENGTH(5))
    assert {key: last[f"ortho/{key}"] for key in actual.per_layer()} == pytest.approx(actual.per_layer())
    assert list(actual.per_layer()) == ["net.0", "net.2"]
    assert last["ortho/total"] == pytest.approx(actual().item())
    assert trainer.callback_metrics["ortho/net.0"].item() == pytest.approx(last["ortho/net.0"])

    logger = CSVLogger(tmp_path, name="third")
    module = Module()
    fit(module, callback(log_every=3, report=True), logger=logger)
    assert [row["step"] for row in logged(logger)] == [2, 5]
    assert last.keys().isdisjoint({"ortho/wide/mean_cos", "ortho/tall/mean_cos"})
    summary = {key: value for key, value in ok.log(actual, None, 0).items() if key.count("/") == 2}
    assert summary.keys() <= logged(logger)[-1].keys()
    assert not any("ortho" in key for key in fit(Module(), callback(log_every=0)).callback_metrics)


def test_optimizers_are_left_as_they_were():
    trainer = fit(Module(), callback())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks

    class Breaks(Module):
        def on_train_batch_end(self, outputs, batch, index):
            raise RuntimeError("stop here")

    module, made = Breaks(), []
    module.optimizer = lambda p: made.append(torch.optim.SGD(p, lr=0.1)) or made[0]
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, callback())
    assert not made[0]._optimizer_step_pre_hooks


# Bad input


def test_bad_arguments(unchecked):
    with pytest.raises(ValueError, match="step must be one of 'epoch', 'batch'; got 'step'"):
        callback(step="step")
    with pytest.raises(ValueError, match="log_every must be an integer, at least 0"):
        callback(log_every=-1)
    with pytest.raises(ValueError, match="selects no layer of Module"):
        fit(Module(), callback(where=ok.depthwise))
    module = Module()
    module.optimizer = lambda p: torch.optim.SGD(module.net[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not train 1 of 2 regularized layers: net\.2"):
        fit(module, callback())


def test_sharding_strategies_are_refused(unchecked):
    FSDPStrategy = type("FSDPStrategy", (), {})  # noqa: N806
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="under FSDPStrategy a process has only a part"):
        callback().on_train_start(trainer, Module())


@pytest.fixture
def without(monkeypatch):
    """The adapter, imported anew where packages are missing."""

    def load(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, "orthokit.integrations.lightning")
        return importlib.import_module("orthokit.integrations.lightning")

    return load


def test_without_lightning(without):
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"OrthoCallback needs Lightning: {install('lightning')}")):
        without("lightning", "lightning.pytorch", "pytorch_lightning")


def test_with_the_older_name_only(without):
    older = pytest.importorskip("pytorch_lightning")
    adapter = without("lightning", "lightning.pytorch")
    assert issubclass(adapter.OrthoCallback, older.Callback)

    class Shrinks(older.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def training_step(self, batch, index):
            return 0 * self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module = Shrinks()
    fit(
        module,
        adapter.OrthoCallback(ok.SO(), strength=1.0),
        kind=older.Trainer,
        max_epochs=1,
        data=DataLoader(torch.randn(50, 2, 1, 1)),
    )
    assert ok.SO()(ok.kernel_of(module.layer)).item() < 1e-3
