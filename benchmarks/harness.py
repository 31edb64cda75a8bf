"""What training costs besides the network: ResNet-20 at 32x32, one core, everything of an epoch by part.

Forward pass, backward pass and optimizer are the network; all the rest (data, augmentation, penalty, recording, checkpoints)
should be little. Each arm trains on 12,800 generated images, 100 steps an epoch (a whole epoch has 390, over which recording and
checkpoint spread); the first epoch warms up, medians of the others. Prints Markdown:

    python benchmarks/harness.py [EPOCHS]
"""

import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orthokit.lab.data.augment import Augment, Batches
from orthokit.lab.data.images import load as load_images
from orthokit.lab.recipes.compose import load
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.run import Run
from orthokit.lab.training.hardware import Hardware
from orthokit.lab.training.loop import train

ARMS = ("none", "so", "strict", "welch")
PARTS = ("network", "penalty", "data", "record")


class Epochs(Watch):
    """The wall time of each epoch, and its line of ``metrics.jsonl``."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.found: list[tuple[float, dict[str, Any]]] = []

    def row(self, run: Run, row: dict[str, Any]) -> None:
        """An epoch is done."""
        now = time.perf_counter()
        self.found.append((now - self.last, row))
        self.last = now


def images(folder: Path) -> Path:
    """CIFAR-10's layout, filled with noise."""
    random = np.random.default_rng(0)
    (folder / "cifar-10-batches-py").mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        pixels = random.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"labels": (np.arange(10_000) % 10).tolist()}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def augmentation(rounds: int = 50) -> float:
    """Images a second that one core picks, crops, flips and normalises."""
    batches = Batches(load_images("synthetic"), 128, Augment(), seed=0)
    order = batches.order(0)
    times = []
    for k in range(rounds):
        start = time.perf_counter()
        batches.get(0, k % len(batches), order)
        times.append(time.perf_counter() - start)
    return 128 / statistics.median(times)


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    print(f"augmentation and normalisation: {augmentation():,.0f} images/s on one core\n")
    print("| arm | images/s | " + " | ".join(PARTS) + " | unaccounted | all but the network |\n|---" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        root = images(Path(folder))
        for arm in ARMS:
            recipe = load(f"quick+cifar10+{arm}", ["data.train=12800", f"train.epochs={epochs}"])
            watch = Epochs()
            train(Run(recipe, 0, root / arm / "0"), root=root, hardware=Hardware(device="cpu", threads=1), watch=watch)
            shares = [[row["seconds"].get(part, 0.0) / wall for part in PARTS] for wall, row in watch.found[1:]]
            middle = [statistics.median(column) for column in zip(*shares, strict=True)]
            rest = statistics.median(1 - sum(each) for each in shares)
            speed = statistics.median(row["images_per_second"] for _, row in watch.found[1:])
            cells = [f"{share:.1%}" for share in (*middle, rest, statistics.median(1 - each[0] for each in shares))]
            print(f"| {arm} | {speed:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
