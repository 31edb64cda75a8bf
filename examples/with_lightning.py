"""The base example plus: the loop is Lightning's, and the penalty comes as a callback. Needs ``orthokit[lightning]``."""

import torch
from base import digits, network, show
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import orthokit as ok
from orthokit.integrations.lightning import OrthoCallback


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    train, test = digits()
    module = Digits()
    callback = OrthoCallback(ok.Disentangled(), strength=ok.schedules.linear(0.1, 0.0, steps=5))
    trainer = Trainer(
        max_epochs=5,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,  # of the task's gradient; the penalty comes after it
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, DataLoader(TensorDataset(*train), batch_size=50, shuffle=True))
    show(module.network, test)
