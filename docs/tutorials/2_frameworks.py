"""
Lightning and the Hugging Face Trainer
======================================

You train with Lightning or with transformers. At the end you can add a penalty to either by one callback, see in the log that
the penalty works, and know when to take ``ok.attach`` instead.

Both networks below learn the handwritten digits that come with scikit-learn, in seconds.
"""

import csv
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import orthokit as ok
from orthokit.integrations.lightning import OrthoCallback
from orthokit.integrations.transformers import OrthoTrainerCallback

EPOCHS = 3
pixels, classes = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)
train, test = TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # say nothing of missing GPUs
warnings.filterwarnings("ignore", module="lightning")
folder = Path(tempfile.mkdtemp())

# %%
# Lightning
# ---------
# This is the module that you have. Nothing in it changes.


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
        self.network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


# %%
# One line is new, the callback. It acts in the optimizer's step, so accumulated batches count once and ``gradient_clip_val``
# clips the task's gradient only. ``report=True`` also logs how orthogonal the layers are. :term:`Strength <strength>` 0 gives
# the run to compare with: the callback then only logs.


def fit(name, strength):
    torch.manual_seed(0)
    module = Digits()
    trainer = LightningTrainer(
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        callbacks=[OrthoCallback(ok.Disentangled(), strength=strength, report=True)],  # the new line
        logger=CSVLogger(folder, name=name),
        log_every_n_steps=6,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))
    with torch.no_grad():
        accuracy = (module.network(test[0]).argmax(1) == test[1]).float().mean()
    print(f"{name:15} test accuracy {accuracy:.3f}")
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["ortho/total"]]


logs = {"without penalty": fit("without penalty", 0.0), "with penalty": fit("with penalty", 0.1)}

# %%
# The log has the penalty of each layer, their total times the strength, and for all :term:`wide layers <wide layer>` together
# the mean \|cosine\| between two :term:`filters <filter>`, which is 0 where filters are orthogonal.

for key, value in logs["with penalty"][-1].items():
    if value:
        print(f"{key:20} {float(value):.3g}")

# %%
# Watch this mean, and not the total. It should fall soon after the start.

figure, axis = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
for (name, rows), colour in zip(logs.items(), ("#8a8a8a", "#2166ac"), strict=True):
    steps, cosines = zip(*((int(row["step"]), float(row["ortho/wide/mean_cos"])) for row in rows), strict=True)
    axis.plot(steps, cosines, color=colour, linewidth=2.5)
    axis.annotate(name, (steps[-1], cosines[-1]), (0, 6), textcoords="offset points", ha="right", color=colour)
axis.set(xlabel="step", ylabel="mean |cosine|", title="Overlap of filters during training")
axis.set_ylim(0, 1.2 * axis.get_ylim()[1])  # room for the name of the upper line
plt.show()

# %%
# transformers
# ------------
# A transformer has next to no convolutions, so ``where=`` names its linear layers, here all but the classifier. ``add_to`` puts
# the callback before those that print, so that they see its values.

torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
)
arguments = TrainingArguments(
    str(folder / "transformer"),
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=100,
    learning_rate=1e-2,
    logging_strategy="epoch",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)
images = [{"pixel_values": image, "labels": label} for image, label in train]
trainer = Trainer(model, arguments, train_dataset=images)
trainer.remove_callback(PrinterCallback)  # it prints every value; we print four

blocks = ok.linears & ~ok.matching("classifier")  # three new lines
callback = OrthoTrainerCallback(ok.Disentangled(), strength=0.01, where=blocks, report=True)
callback.add_to(trainer)

trainer.train()
for entry in trainer.state.log_history[:-1]:
    print(*(f"{key} {float(entry[key]):.3f}" for key in ("epoch", "loss", "ortho/total", "ortho/wide/mean_cos")), sep="   ")

# %%
# Strength .01 is where this example begins, and not a recommendation: our studies are of convolutions trained with SGD. Of
# transformers and Adam they say nothing, so choose the strength on validation images.
#
# The schedule
# ------------
# Both callbacks take a :term:`schedule` in place of the number. Its unit is the epoch; ``step="batch"`` makes it the
# optimizer's step. The schedule is in the checkpoint: a run that is resumed goes on where it was.

warmed = OrthoCallback(ok.Disentangled(), strength=ok.piecewise({0: 0.01, 2: 0.1}))
print("strength by epoch:", [warmed.strength(epoch) for epoch in range(4)])

# %%
# Decide
# ------
# ========================================================  ==============================================================
# your training                                             take
# ========================================================  ==============================================================
# Lightning's ``Trainer``                                   ``OrthoCallback`` in ``callbacks=``
# transformers' ``Trainer``, or TRL's                       ``OrthoTrainerCallback(...).add_to(trainer)``
# another framework that steps a PyTorch optimizer          ``ok.attach(ortho, optimizer)``
# Fabric, Accelerate, or a loop of your own                 :doc:`Add it to your loop <1_loop>`
# FSDP or DeepSpeed inside a ``Trainer``                    neither callback: each process holds a part of the weights only
# ========================================================  ==============================================================
#
# Begin with ``Disentangled()``, on convolutions with strength .1. If ``wide/mean_cos`` does not fall, the strength is too
# small, or ``where`` selects other layers than you think: print ``callback.ortho.layers``. Whether accuracy gains is a question
# to seeds: :doc:`4_compare`. All arguments: :doc:`../reference/integrations`.
