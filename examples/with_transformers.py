"""The base example plus: a small vision transformer in transformers' Trainer, its linear layers regularized.

Needs ``orthokit[transformers]``. The model is built from its configuration; nothing is downloaded.
"""

import tempfile

import torch
from base import digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import orthokit as ok
from orthokit.integrations.transformers import OrthoTrainerCallback

if __name__ == "__main__":
    train, test = digits()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    blocks = ok.linears & ~ok.matching("classifier")
    callback = OrthoTrainerCallback(ok.Disentangled(), strength=ok.schedules.linear(1e-2, 0.0, steps=5), where=blocks)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=5,
            per_device_train_batch_size=50,
            learning_rate=5e-3,
            logging_steps=30,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        data = [{"pixel_values": x, "labels": y} for x, y in zip(*train, strict=True)]
        trainer = Trainer(model, arguments, train_dataset=data)
        callback.add_to(trainer)  # before the callbacks that print and report
        trainer.train()
    with torch.no_grad():
        right = (model.eval()(test[0]).logits.argmax(1) == test[1]).float().mean().item()
    print(f"{right:.1%} of the test images right")
    print(ok.report(model, where=blocks))
