"""What each penalty adds to a training step of ResNet-20 (batch 128, 32x32, float32, one core).

The penalty's forward and backward pass over all convolutions, and the step without it, in turn; medians. Prints Markdown:

    python benchmarks/share.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import orthokit as ok
from orthokit.lab.models import ResNet

ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet(20)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    penalties = [penalty() for penalty in ok.PENALTIES]
    penalties += [ok.Disentangled(relax=ok.share(0.1), form=form) for form in ("pairs", "welch", "budget")]
    regularizers = {repr(penalty): ok.Regularizer(model, penalty, strength=0.1) for penalty in penalties}

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()

    shares: dict[str, list[float]] = {name: [] for name in regularizers}
    for round_ in range(ROUNDS + 1):
        whole = seconds(step)
        for name, ortho in regularizers.items():
            taken = seconds(lambda ortho=ortho: ortho().backward())
            if round_:  # the first round warms up
                shares[name].append(100 * taken / whole)
    print("| penalty | % of a step |\n|---|---|")
    for name, share in shares.items():
        print(f"| `{name}` | {statistics.median(share):.1f} |")


if __name__ == "__main__":
    main()
