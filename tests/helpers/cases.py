"""One line per penalty and option: the penalty, its slow twin, its known minimum and its invariances."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import orthokit as ok
import references as slow


@dataclass(frozen=True)
class Case:
    penalty: Callable
    twin: Callable  # of the kernel matrix as a numpy array
    minimum: Callable | None = None
    invariances: tuple = ("order", "sign", "rotation")
    of_kernel: bool = False  # the twin takes the kernel, not its matrix

    def reference(self, kernel):
        return self.twin(kernel if self.of_kernel else kernel.matrix[0].numpy())


def relaxed(policy, **options):
    return lambda k: slow.disentangled(k, policy(*k.shape), **options)


def capped(k):
    return slow.disentangled(k, ceiling=slow.welch(*k.shape))


def wide_zero(o, n):
    return 0.0 if o <= n else None


def zero(o, n):
    return 0.0


def tall(o, n):
    return float(max(0, o - n))


def frame(o, n):
    """Of filters none of which is zero: at unit-norm tight frames."""
    return math.sqrt(max(0, o * (o - n) / (2 * n)))


half, feasible, tenth = ok.fraction(0.5), ok.feasible(), ok.share(0.1)

CASES = [
    Case(ok.SO(), slow.so, tall),
    Case(ok.SO(side="cols"), partial(slow.so, side="cols"), lambda o, n: float(max(0, n - o))),
    Case(ok.SO(side="smaller"), partial(slow.so, side="smaller"), zero),
    Case(ok.SO(squared=False), partial(slow.so, squared=False), lambda o, n: math.sqrt(max(0, o - n))),
    Case(ok.DSO(), slow.dso, lambda o, n: float(abs(o - n))),
    Case(ok.MC(), slow.mc, wide_zero),
    Case(ok.MC(norm="rowsum"), partial(slow.mc, norm="rowsum"), wide_zero),
    Case(ok.Coherence(), slow.coherence, wide_zero, ("order", "sign", "rotation", "length")),
    Case(ok.SRIP(), slow.srip, zero, ()),
    Case(
        ok.SRIP(steps=3, squared=True, side="rows"),
        partial(slow.srip, steps=3, squared=True, side="rows"),
        wide_zero,
        ("rotation",),
    ),
    Case(ok.OffDiagonal(), slow.off_diagonal, zero),
    Case(ok.Disentangled(), slow.disentangled, frame),
    Case(
        ok.Disentangled(squared=True, weights=(2.0, 0.5)), partial(slow.disentangled, squared=True, weights=(2.0, 0.5)), wide_zero
    ),
    Case(
        ok.Disentangled(weights=(0.0, 1.0)),
        partial(slow.disentangled, weights=(0.0, 1.0)),
        frame,
        ("order", "sign", "rotation", "length"),
    ),
    Case(ok.Disentangled(ceiling=ok.welch()), capped, wide_zero),
    Case(ok.Disentangled(relax=feasible), relaxed(feasible), zero),
    Case(ok.Disentangled(relax=half), relaxed(half), zero),
    Case(ok.Disentangled(relax=half, count="fewest"), relaxed(half, count="fewest"), zero),
    Case(ok.Disentangled(relax=tenth, squared=True), relaxed(tenth, squared=True), zero),
    Case(ok.Disentangled(relax=half, ceiling=0.3), relaxed(half, ceiling=0.3), wide_zero),
    Case(ok.Disentangled(relax=half, form="welch"), relaxed(half, form="welch"), wide_zero),
    Case(ok.Disentangled(relax=feasible, form="welch", squared=True), relaxed(feasible, form="welch", squared=True), wide_zero),
    Case(ok.Disentangled(relax=half, form="budget"), relaxed(half, form="budget"), zero),
    Case(ok.Disentangled(relax=feasible, form="budget"), relaxed(feasible, form="budget"), zero),
    Case(ok.ConvOrth(), slow.conv_orth, None, ("order", "sign"), of_kernel=True),
    Case(ok.ConvOrth(squared=False), partial(slow.conv_orth, squared=False), None, ("order", "sign"), of_kernel=True),
    Case(ok.Lorth(), slow.lorth, None, ("order", "sign"), of_kernel=True),
    Case(ok.EADK(), slow.eadk, wide_zero),
    Case(ok.EADK(theta=1.3, weight=2.0), partial(slow.eadk, theta=1.3, weight=2.0), wide_zero),
    Case(ok.EADK(double=True), partial(slow.eadk, double=True), None, ("order", "sign")),
    Case(ok.EADC(), slow.eadc, None, ("order", "sign"), of_kernel=True),
    Case(ok.EADC(theta=1.3, weight=2.0), partial(slow.eadc, theta=1.3, weight=2.0), None, ("order", "sign"), of_kernel=True),
    Case(ok.GOR(), slow.gor, wide_zero, ("sign", "rotation")),
    Case(ok.GOR(kind="intra"), partial(slow.gor, kind="intra"), wide_zero, ("sign", "rotation")),
]
