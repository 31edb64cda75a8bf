"""Where do strict and relaxed orthogonality end on tall kernels, where o filters of n < o weights cannot all be orthogonal?

Minimises each form alone, from random Gaussian filters, by Adam with a decaying rate, all seeds in one batch, and prints a
Markdown table. About a minute on one core:

    python benchmarks/frames.py
"""

import torch

import orthokit as ok
from orthokit.diagnostics import angles, frame_tightness

SEEDS, STEPS, RATE, DECAY = 5, 20_000, 0.02, 0.9995

FORMS = {
    "strict": ok.Disentangled(),
    "pairs": ok.Disentangled(relax=ok.feasible()),
    "welch": ok.Disentangled(relax=ok.feasible(), form="welch"),
    "budget": ok.Disentangled(relax=ok.feasible(), form="budget"),
    "strict + welch() ceiling": ok.Disentangled(ceiling=ok.welch()),
    "pairs + welch() ceiling": ok.Disentangled(relax=ok.feasible(), ceiling=ok.welch()),
}


def minimise(penalty: ok.Disentangled, o: int, n: int) -> torch.Tensor:
    """Kernel matrices ``(seeds, o, n)`` at which the penalty has converged."""
    start = [torch.randn(1, o, n, generator=torch.Generator().manual_seed(seed)) / n**0.5 for seed in range(SEEDS)]
    weight = torch.stack(start).double().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        penalty(ok.Kernel(weight)).sum().backward()
        optimizer.step()
        schedule.step()
    return weight.detach()[:, 0]


def main() -> None:
    torch.set_num_threads(1)
    print(f"{SEEDS} seeds, Adam, {STEPS:,} steps; max |c|: least to largest of the seeds\n")
    print("| kernel | form | max abs c | copies | tightness (median) | value (median) | Welch bound |")
    print("|---|---|---|---|---|---|---|")
    for o, n in ((64, 16), (32, 16)):
        for name, penalty in FORMS.items():
            matrix = minimise(penalty, o, n)
            _, largest, copies = angles(matrix)
            tightness, value = frame_tightness(matrix).median().item(), penalty(ok.Kernel(matrix.unsqueeze(1))).median().item()
            print(
                f"| {o}x{n} | {name} | {largest.min():.3f} to {largest.max():.3f} | {copies.min()} to {copies.max()} | "
                f"{tightness:.1e} | {value:.2g} | {ok.welch_bound(o, n):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
