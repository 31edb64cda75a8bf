"""What training costs besides the network: ResNet-20 at 32x32, one core, everything of an epoch by part.

Forward pass, backward pass and optimizer are the network; all the rest (data, augmentation, penalty, recording, checkpoints)
should be little. Each arm trains on 5,000 generated images; the first epoch warms up, medians of the others. Prints Markdown:

    python benchmarks/harness.py [EPOCHS]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from orthokit.lab.batches import Augment, Batches
from orthokit.lab.data import load as load_images
from orthokit.lab.recipe import load
from orthokit.lab.record import Run
from orthokit.lab.train import Hardware, Watch, train

RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = ("none", "so", "strict", "relaxed")
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
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    torch.set_num_threads(1)
    print(f"augmentation and normalisation: {augmentation():,.0f} images/s on one core\n")
    print("| arm | images/s | " + " | ".join(PARTS) + " | unaccounted | all but the network |\n|---" + "|---" * 7 + "|")
    for arm in ARMS:
        settings = ["data.name=synthetic", f"train.epochs={epochs}"]
        recipe, watch = load(RECIPES / f"quick_cifar10_{arm}.toml", settings), Epochs()
        with tempfile.TemporaryDirectory() as folder:
            train(Run(recipe, 0, Path(folder) / arm / "0"), hardware=Hardware(device="cpu", threads=1), watch=watch)
        shares = [[row["seconds"].get(part, 0.0) / wall for part in PARTS] for wall, row in watch.found[1:]]
        middle = [statistics.median(column) for column in zip(*shares, strict=True)]
        rest = statistics.median(1 - sum(each) for each in shares)
        speed = statistics.median(row["images_per_second"] for _, row in watch.found[1:])
        cells = [f"{share:.1%}" for share in (*middle, rest, statistics.median(1 - each[0] for each in shares))]
        print(f"| {arm} | {speed:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
