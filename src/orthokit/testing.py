"""The contract of a penalty, for ours and for yours: ``check_penalty(MyPenalty(), reference=my_slow_twin)``."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from orthokit.kernel import Kernel, KernelMeasure, kernel_of

__all__ = ["check_penalty"]

Invariance = Literal["order", "sign", "rotation", "length"]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Conv2d(3, 8, 3),
    "tall": lambda: nn.Conv2d(4, 10, 1),
    "square": lambda: nn.Linear(6, 6),
    "linear": lambda: nn.Linear(7, 4),
    "rectangular": lambda: nn.Conv2d(3, 6, (3, 1)),
    "strided": lambda: nn.Conv2d(2, 5, 3, stride=2),
    "dilated": lambda: nn.Conv2d(2, 4, 3, stride=(2, 1), dilation=(2, 3)),
    "small kernel": lambda: nn.Conv2d(2, 12, (1, 2), stride=(2, 3)),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(5, 10, 3, groups=5),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    "1d": lambda: nn.Conv1d(3, 5, 3),
    "3d": lambda: nn.Conv3d(2, 5, 2),
    "two filters": lambda: nn.Conv2d(3, 2, 3),
    "one filter": lambda: nn.Linear(5, 1),
    "one weight": lambda: nn.Linear(1, 4),
}
"""The layers every penalty is checked on, by kind."""


def check_penalty(
    penalty: KernelMeasure,
    *,
    reference: Callable[[Kernel], float],
    minimum: Callable[[int, int], float | None] | None = None,
    invariances: Collection[Invariance] = ("order", "sign"),
    tolerance: float = 1e-9,
) -> None:
    """Check a penalty on every kind of layer in :data:`LAYERS`, in float64.

    The penalty must give one value per leading dimension, equal to the slow ``reference``; pass ``torch.autograd.gradcheck``;
    give the same for a stack as for each kernel alone; fall along its negative gradient; keep float64 and float32, and compute in
    float32 for lower precisions and under autocast; have finite gradients at zero, equal and orthonormal filters; have its
    ``minimum``; and not change under its ``invariances``.

    Args:
        penalty: an instance, ``Kernel -> Tensor``.
        reference: an obvious, slow twin for one kernel of a single group in float64; ``kernel.matrix[0].numpy()`` is ``(o, n)``.
        minimum: least value for ``o`` filters of ``n`` weights, or None where it is not known. It must be attained at one of
            these kernels: orthonormal rows; if tall orthonormal columns, a unit-norm tight frame, orthonormal rows with zero
            filters or with copies; and no other kernel tried may go below it.
        invariances: what leaves the value unchanged: filters in another ``"order"``, of other ``"sign"``, of other
            ``"length"``, or turned by a common ``"rotation"``.
        tolerance: relative, for all comparisons of values.

    Raises:
        AssertionError: names the penalty, the kind of layer and what failed.
    """
    for kind, make in LAYERS.items():
        kernel = _random_kernel(make())
        check = _Checks(penalty, kind, kernel, tolerance)
        check.value(reference)
        check.gradient()
        check.batch()
        check.precision()
        check.descent()
        check.special_kernels()
        check.minimum(minimum or (lambda o, n: None))
        for invariance in invariances:
            check.invariance(invariance)


class _Checks:
    def __init__(self, penalty: KernelMeasure, kind: str, kernel: Kernel, tolerance: float) -> None:
        self.penalty, self.kind, self.kernel, self.tolerance = penalty, kind, kernel, tolerance
        self.values = penalty(kernel)

    def of(self, weight: Tensor) -> Tensor:
        return self.penalty(replace(self.kernel, weight=weight))

    def of_matrix(self, matrix: Tensor) -> Tensor:
        return self.of(matrix.to(self.kernel.weight.dtype).reshape(self.kernel.weight.shape))

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise AssertionError(f"{self.penalty!r} on the {self.kind} layer: {message}")

    def close(self, value: Tensor, expected: Tensor, message: str) -> None:
        error = ((value - expected).abs() / expected.abs().clamp(min=1)).max().item()
        self.require(error <= self.tolerance, f"{message}: off by {error:.1e}, {value.tolist()} instead of {expected.tolist()}")

    def value(self, reference: Callable[[Kernel], float]) -> None:
        shape = self.kernel.weight.shape[:1]
        self.require(self.values.shape == shape, f"gave shape {tuple(self.values.shape)}, not one value per group {tuple(shape)}")
        alone = [reference(replace(self.kernel, weight=weight.unsqueeze(0))) for weight in self.kernel.weight]
        self.close(self.values, torch.tensor(alone, dtype=torch.float64), "differs from the reference")

    def gradient(self) -> None:
        weight = self.kernel.weight.clone().requires_grad_()
        try:
            # Every entry of small kernels; of large ones a random combination, as testing each takes minutes.
            torch.autograd.gradcheck(self.of, (weight,), atol=1e-6, fast_mode=weight.numel() > 64)
        except RuntimeError as error:
            self.require(False, f"gradcheck: {error}")

    def batch(self) -> None:
        other = replace(self.kernel, weight=0.7 * self.kernel.weight.flip(-1))
        together = self.penalty(Kernel.stack([self.kernel, other]))
        self.close(together, torch.stack([self.values, self.penalty(other)]), "a stack differs from its kernels alone")

    def precision(self) -> None:
        self.require(self.values.dtype == torch.float64, f"float64 became {self.values.dtype}")
        single = self.of(self.kernel.weight.float())
        self.require(single.dtype == torch.float32, f"float32 became {single.dtype}")
        for dtype in (torch.bfloat16, torch.float16):
            weight = self.kernel.weight.to(dtype).requires_grad_()
            low = self.of(weight)
            same = low.dtype == torch.float32 and torch.equal(low, self.of(weight.detach().float()))
            self.require(same, f"{dtype} weights are not measured in float32")
            (gradient,) = torch.autograd.grad(low.sum(), weight)
            self.require(gradient.dtype == dtype and bool(gradient.isfinite().all()), f"the gradient of {dtype} weights is off")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.require(torch.equal(self.of(self.kernel.weight.float()), single), "the value changes under autocast")

    def descent(self) -> None:
        weight = self.kernel.weight.clone().requires_grad_()
        value = self.of(weight).sum()
        (gradient,) = torch.autograd.grad(value, weight)
        if (norm := gradient.norm()) > 1e-9:
            lower = self.of(weight.detach() - 1e-5 * gradient / norm).sum()
            self.require(bool(lower < value), f"a small step along the negative gradient raises it from {value} to {lower}")

    def special_kernels(self) -> None:
        matrix = self.kernel.matrix
        copies = matrix.clone()
        copies[..., -1, :] = copies[..., 0, :]
        for name, special in {
            "zero filters": torch.zeros_like(matrix),
            "a zero filter": torch.cat([torch.zeros_like(matrix[..., :1, :]), matrix[..., 1:, :]], -2),
            "tiny filters": 1e-160 * matrix,
            "equal filters": copies,
            "orthonormal filters": _orthonormal(matrix),
        }.items():
            weight = special.reshape(self.kernel.weight.shape).requires_grad_()
            value = self.of(weight)
            (gradient,) = torch.autograd.grad(value.sum(), weight)
            finite = bool(value.isfinite().all() and gradient.isfinite().all())
            self.require(finite, f"value or gradient at {name} is not finite")

    def minimum(self, minimum: Callable[[int, int], float | None]) -> None:
        matrix = self.kernel.matrix
        groups, o, n = matrix.shape
        least = minimum(o, n)
        if least is None:
            return
        lowest = torch.stack([self.of_matrix(best.expand(groups, o, n)) for best in _best_kernels(o, n)]).amin(0)
        is_attained = bool((lowest <= least + 1e-7).all())
        self.require(is_attained, f"the minimum {least} is not attained: {lowest.tolist()} is the least found")
        weight = self.kernel.weight.clone().requires_grad_()
        for step in range(40):
            value = self.of(weight)
            self.require(bool((value >= least - 1e-7).all()), f"{value.tolist()} is below the minimum {least}")
            (gradient,) = torch.autograd.grad(value.sum(), weight)
            with torch.no_grad():
                weight -= 0.3 * 0.95**step * gradient / gradient.norm().clamp(min=1.0)

    def invariance(self, invariance: Invariance) -> None:
        matrix = self.kernel.matrix
        _, o, n = matrix.shape
        if invariance == "order":
            variant = matrix.flip(-2)
        elif invariance == "sign":
            variant = matrix * torch.tensor([1.0, -1.0], dtype=matrix.dtype).repeat(o)[:o].unsqueeze(-1)
        elif invariance == "length":
            variant = matrix * torch.linspace(0.5, 2.0, o, dtype=matrix.dtype).unsqueeze(-1)
        else:
            variant = matrix @ _orthonormal(_normal(n, n))
        self.close(self.of_matrix(variant), self.values, f"changes with the {invariance} of its filters")


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _random_kernel(layer: nn.Module) -> Kernel:
    """Random weights, none below 0.12: the derivative at shorter filters holds their weights fixed (Note [short filters])."""
    kernel = kernel_of(layer)
    weight = _normal(*kernel.weight.shape) * (1.2 / kernel.n**0.5)
    return replace(kernel, weight=weight.abs().clamp(min=0.12).copysign(weight))


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, or columns if tall."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _best_kernels(o: int, n: int) -> list[Tensor]:
    rows = torch.eye(min(o, n), n, dtype=torch.float64)
    if o <= n:
        return [rows]
    with_zeros = torch.eye(o, n, dtype=torch.float64)
    copies = rows[torch.arange(o) % n]
    return [_orthonormal(_normal(o, n)), _tight_frame(o, n), with_zeros, copies]


def _tight_frame(o: int, n: int) -> Tensor:
    """A unit-norm tight frame: ``o`` unit rows with ``K^T K = (o/n) I``, from harmonics."""
    angle = 2 * torch.pi * torch.arange(o, dtype=torch.float64).unsqueeze(-1) * torch.arange(1, n // 2 + 1) / o
    frame = torch.cat([angle.cos(), angle.sin()], -1) * (2 / n) ** 0.5
    return torch.cat([frame, torch.full((o, 1), n**-0.5, dtype=torch.float64)], -1) if n % 2 else frame
