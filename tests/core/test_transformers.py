"""The transformers adapter: training through it is training with the penalty in the loss, in the real Trainer."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import orthokit as ok
from orthokit.checks import install
from orthokit.integrations.transformers import OrthoTrainerCallback

PENALTY = ok.Disentangled()
STRENGTH = ok.linear(0.3, 0.0, steps=24)
RATE = 0.1
EXAMPLES, BATCH = 16, 4

pytestmark = pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true but no accelerator")


class Images(Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(EXAMPLES, 3, 8, 8, generator=g), torch.randint(5, (EXAMPLES,), generator=g)

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, k):
        return {"pixel_values": self.x[k], "labels": self.y[k]}


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def resnet():
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5)
    )


def weights(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def train(model, *callbacks, out, resume=None, data=None, first=None, **options):
    options = {"num_train_epochs": 2, "save_strategy": "no", "max_grad_norm": 0.0, "learning_rate": 0.01, **options}
    args = TrainingArguments(
        out,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"logging_strategy": "no", **options},
    )
    trainer = Sequential(model, args, train_dataset=data or Images(), callbacks=list(callbacks))
    if first is not None:
        first.add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Sequential(Trainer):
    """In the order of the data, with the mean loss of the accumulated batches, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        return loss if num_items_in_batch is None else loss * BATCH / num_items_in_batch


def plain(make, where, *, penalty=True, epochs=2, accumulate=1, clip=0.0, unit="epoch", precision=None):
    """The same training written out: clip the gradient of the task, then add the penalty's."""
    model, data = make(), Images()
    model.train()
    ortho = ok.Regularizer(model, PENALTY, strength=STRENGTH, where=where)
    # Not Adam, which turns the rounding errors of a gradient that is zero into steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for index, start in enumerate(range(0, EXAMPLES, BATCH)):
            x, y = data.x[start : start + BATCH], data.y[start : start + BATCH]
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = model(pixel_values=x, labels=y).loss / accumulate
            loss.backward()
            if (index + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                if penalty:
                    ortho().backward()
                optimizer.step()
                optimizer.zero_grad()
                if unit == "batch":
                    ortho.step()
        if unit == "epoch":
            ortho.step()
    return weights(model)


def callback(**options):
    return OrthoTrainerCallback(PENALTY, **{"strength": STRENGTH, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "clip": 0.05},
        {"accumulate": 2, "clip": 0.05, "unit": "batch"},
        {"precision": torch.bfloat16, "clip": 0.05},
    ],
    ids=["plain", "accumulate+clip", "accumulate+clip+batch", "bf16+clip"],
)
@pytest.mark.parametrize(("make", "where"), [(vit, ok.linears), (resnet, ok.convs)], ids=["ViT", "ResNet"])
def test_same_weights_as_the_penalty_in_the_loss(make, where, options, tmp_path):
    model = make()
    settings = {"gradient_accumulation_steps": options.get("accumulate", 1), "max_grad_norm": options.get("clip", 0.0)}
    if "precision" in options:
        settings["bf16"] = True
    train(
        model, callback(where=where, step=options.get("unit", "epoch")), out=tmp_path, optim="sgd", learning_rate=RATE, **settings
    )
    expected = plain(make, where, **options)
    error = (weights(model) - expected).abs().max().item()
    assert error < (5e-5 if "precision" in options else 2e-6)  # a sum may round to another bfloat16
    assert (plain(make, where, penalty=False, **options) - expected).abs().max().item() > 1e-2


# Checkpoints


@pytest.mark.parametrize("unit", ["epoch", "batch"])
@pytest.mark.parametrize(
    ("saving", "at"),
    [
        ({"save_strategy": "steps", "save_steps": 1}, 3),
        ({"save_strategy": "steps", "save_steps": 1}, 4),
        ({"save_strategy": "epoch"}, 4),
    ],
    ids=["mid-epoch", "last step", "epoch"],
)
def test_resumed_training_equals_uninterrupted(saving, at, unit, tmp_path):
    settings = {"out": tmp_path, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    whole, ortho = resnet(), callback(step=unit)
    train(whole, ortho, **settings, **saving)
    resumed, again = resnet(), callback(step=unit)
    with torch.no_grad():
        resumed.resnet.embedder.embedder.convolution.weight.zero_()
    train(resumed, again, resume=str(tmp_path / f"checkpoint-{at}"), **settings)
    assert torch.equal(weights(resumed), weights(whole))
    assert again.ortho.steps == ortho.ortho.steps == {"epoch": 3, "batch": 6}[unit]


def test_the_checkpoint_holds_the_schedule(tmp_path):
    settings = {"out": tmp_path, "save_strategy": "epoch", "restore_callback_states_from_checkpoint": True}
    train(resnet(), callback(), callback(step="batch", name="heads", where=ok.linears), **settings)
    states = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]
    assert states["orthokit/ortho"] == {"steps": 1, "calls": {}, "step": "epoch"}
    assert states["orthokit/heads"] == {"steps": 4, "calls": {}, "step": "batch"}
    first, second = callback(), callback(step="batch", name="heads", where=ok.linears)
    train(resnet(), first, second, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert (first.ortho.steps, second.ortho.steps) == (2, 8)
    with pytest.raises(ValueError, match="counts in step='epoch', this OrthoTrainerCallback in 'batch'"):
        train(resnet(), callback(step="batch"), resume=str(tmp_path / "checkpoint-4"), out=tmp_path)


def test_a_second_training_begins_anew(tmp_path):
    ortho = callback()
    train(resnet(), ortho, out=tmp_path, num_train_epochs=1)
    train(resnet(), ortho, out=tmp_path)
    assert ortho.ortho.steps == 2


def test_epochs_of_unknown_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            images = Images()
            return (images[k] for k in range(12))

    ortho = callback()
    Sequential._get_train_sampler, kept = Trainer._get_train_sampler, Sequential._get_train_sampler
    try:
        train(resnet(), ortho, out=tmp_path, data=Stream(), max_steps=9)
    finally:
        Sequential._get_train_sampler = kept
    assert ortho.ortho.steps == 3


# Logs, and what is left behind


def test_logs(tmp_path):
    class Reporter(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            Reporter.seen = (*Reporter.seen, dict(logs))

    model, ortho = resnet(), callback(step="batch", report=True)
    trainer = train(model, Reporter(), out=tmp_path, first=ortho, num_train_epochs=1, logging_strategy="steps", logging_steps=2)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["ortho/strength"] for row in rows] == pytest.approx([STRENGTH(1), STRENGTH(3)])
    last, actual = rows[-1], ok.Regularizer(model, PENALTY, strength=STRENGTH(3))
    assert {key: last[f"ortho/{key}"] for key in actual.per_layer()} == pytest.approx(actual.per_layer())
    assert last["ortho/total"] == pytest.approx(actual().item())
    assert last["ortho/wide/mean_cos"] == pytest.approx(ok.log(actual, None, 0)["ortho/wide/mean_cos"])
    assert [row.get("ortho/total") for row in Reporter.seen if "loss" in row] == [row["ortho/total"] for row in rows]


def test_the_optimizer_is_left_as_it_was(tmp_path):
    trainer = train(resnet(), callback(), out=tmp_path, num_train_epochs=1)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


# Bad input


def test_bad_arguments(unchecked, tmp_path):
    with pytest.raises(ValueError, match="step must be one of 'epoch', 'batch'; got 'step'"):
        callback(step="step")
    with pytest.raises(ValueError, match="selects no layer of ResNetForImageClassification"):
        train(resnet(), callback(where=ok.depthwise), out=tmp_path)


def test_sharded_weights_are_refused(unchecked):
    class Arguments:
        fsdp, deepspeed = "full_shard", None

    with pytest.raises(ValueError, match="under fsdp a process has only a part"):
        callback().on_train_begin(Arguments(), None, None, model=resnet(), optimizer=None)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "orthokit.integrations.transformers")
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"needs transformers: {install('transformers')}")):
        importlib.import_module("orthokit.integrations.transformers")


def test_the_core_imports_no_framework():
    code = "import orthokit, sys; print({'lightning', 'pytorch_lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
