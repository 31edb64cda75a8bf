"""Relaxation: how many filters of a layer must be mutually orthogonal.

Strict orthogonality asks for ``o`` mutually orthogonal filters. Relaxed, ``r`` of them (the *transition dimension*) are
structural and mutually orthogonal, the other ``m = o - r`` flexible. A *policy* chooses ``r`` for each layer from ``o``
filters of ``n`` weights. The idea of relaxing is the disentangled-norm paper's (arXiv 2306.09939); these formulas and
policies are ours, as the paper's full text could not be read.

Policies are plain values, written in lower case because they are used as words in a call.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import Tensor, nn

from orthokit.audit import unread_parameters
from orthokit.checkpoint.statedict import Layers
from orthokit.checks import check_choice, check_count, check_number, short_repr
from orthokit.layers import Where, convs, select
from orthokit.tables import Column, Row, Table

__all__ = [
    "COUNTS",
    "Count",
    "Policy",
    "cardinality",
    "check_policy",
    "expected_cardinality",
    "feasible",
    "fraction",
    "plan",
    "ranks",
    "relaxed_budget",
    "relaxed_ceiling",
    "share",
    "transition_dimension",
    "welch",
    "welch_bound",
]

Count = Literal["expected", "fewest"]
COUNTS: tuple[Count, ...] = ("expected", "fewest")

Policy = Callable[[int, int, str], int]
"""``(o, n, layer name) -> r`` with ``1 <= r <= min(o, n)``."""


def expected_cardinality(o: int, r: int) -> float:
    """Expected number of correlated pairs among ``o`` filters of which ``r`` are structural: ``m + m (m - 1) / (2 r)`` (ours).

    Each of the ``m = o - r`` flexible filters draws a structural direction uniformly. It then fails to be orthogonal to that
    filter, and to every flexible one that drew the same, which happens with probability ``1 / r``.

    >>> expected_cardinality(64, 16), expected_cardinality(64, 64)
    (118.5, 0.0)
    """
    check_count("o", o)
    check_count("r", r, 1, o)
    m = o - r
    return m + m * (m - 1) / (2 * r)


@overload
def cardinality(o: int, r: int, count: Count = ...) -> int: ...
@overload
def cardinality(o: int, r: Tensor, count: Count = ...) -> Tensor: ...
def cardinality(o: int, r: int | Tensor, count: Count = "expected") -> int | Tensor:
    """Number of pairs left free: an integer, for integer ``r`` or a tensor of them.

    Args:
        o: filters.
        r: transition dimension, ``1 <= r <= o``.
        count: ``"expected"`` rounds :func:`expected_cardinality`, halves up. ``"fewest"`` is Turan's number, the fewest free
            pairs with which all other pairs can be orthogonal in ``r`` dimensions; it guarantees ``r`` mutually orthogonal
            filters.

    >>> cardinality(64, 16), cardinality(64, 16, "fewest"), cardinality(64, 1)
    (119, 96, 2016)
    """
    check_choice("count", count, COUNTS)
    check_count("o", o)
    if not isinstance(r, Tensor):
        check_count("r", r, 1, o)
    if count == "fewest":
        each, more = o // r, o % r
        return r * each * (each - 1) // 2 + each * more
    m = o - r
    return (2 * r * m + m * (m - 1) + r) // (2 * r)


def relaxed_ceiling(o: int, r: int | Tensor) -> float | Tensor:
    """``w_r = sqrt((o - r) / (r (o - 1)))``: what ``form="welch"`` lets a pair keep; 0 at ``r = o`` (ours)."""
    return 0.0 if o == 1 else ((o - r) / (r * (o - 1))) ** 0.5


def relaxed_budget(o: int, r: int | Tensor) -> float | Tensor:
    """``sqrt(o (o - r) / (2 r))``: what ``form="budget"`` lets all pairs keep together; 0 at ``r = o`` (ours)."""
    return (o * (o - r) / (2 * r)) ** 0.5


def _at_least(r: int, o: int, n: int, floor: int | None) -> int:
    """``r``, or ``floor`` (the classes of the data set) where that is more and the layer has room for it."""
    return max(r, min(o, n, floor or 1))


def _check_floor(floor: int | None) -> None:
    if floor is not None:
        check_count("floor", floor)


@dataclass(frozen=True)
class feasible:
    """``r = min(o, n)``: only tall layers, where strict orthogonality is impossible, are relaxed.

    >>> feasible()(64, 16, ""), feasible()(16, 64, "")
    (16, 16)
    """

    floor: int | None = field(default=None, kw_only=True)
    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_floor(self.floor)

    def __call__(self, o: int, n: int, name: str = "") -> int:
        return min(o, n)


@dataclass(frozen=True)
class fraction:
    """``r = floor(rho * min(o, n) + 1/2)``, at least 1.

    >>> fraction(0.5)(64, 576, ""), fraction(0.1, floor=10)(64, 576, "")
    (32, 10)
    """

    rho: float
    floor: int | None = field(default=None, kw_only=True)
    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_floor(self.floor)
        check_number("rho", self.rho, 0, 1, open_low=True)

    def __call__(self, o: int, n: int, name: str = "") -> int:
        return _at_least(max(1, math.floor(self.rho * min(o, n) + 0.5)), o, n, self.floor)


@dataclass(frozen=True)
class share:
    """The ``r`` whose expected cardinality is nearest the share ``q`` of all pairs: the same relaxation at every width.

    Of two equally near, the larger ``r``; never more than ``min(o, n)``.

    >>> share(0.1)(64, 576, ""), share(0.1)(640, 5760, "")
    (10, 10)
    """

    q: float
    floor: int | None = field(default=None, kw_only=True)
    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_floor(self.floor)
        check_number("q", self.q, 0, 1)

    def __call__(self, o: int, n: int, name: str = "") -> int:
        target, most = self.q * o * (o - 1) / 2, min(o, n)
        # The cardinality falls with r: the nearest is the first at or below the target, or the one before.
        below = bisect_left(range(1, most + 1), -target, key=lambda r: -expected_cardinality(o, r)) + 1
        around = (r for r in (below - 1, below) if 1 <= r <= most)
        nearest = min(around, key=lambda r: (abs(expected_cardinality(o, r) - target), -r))
        return _at_least(nearest, o, n, self.floor)


@dataclass(frozen=True, init=False)
class ranks:
    """``r`` as given for each layer's name, e.g. measured from its outputs.

    >>> ranks({"conv1": 8})(16, 27, "conv1")
    8
    """

    by_name: tuple[tuple[str, int], ...]
    floor: int | None

    def __init__(self, by_name: Mapping[str, int], *, floor: int | None = None) -> None:
        if not isinstance(by_name, Mapping):
            raise TypeError(f"ranks takes a mapping from layer name to rank; got {by_name!r}")
        for name, r in by_name.items():
            if not isinstance(name, str):
                raise TypeError(f"ranks takes the names of layers; got {name!r:.200}")
            check_count(f"the rank of {name!r}", r)
        object.__setattr__(self, "by_name", tuple(by_name.items()))
        _check_floor(floor)
        object.__setattr__(self, "floor", floor)

    def __repr__(self) -> str:
        return f"ranks({dict(self.by_name)}{f', floor={self.floor}' if self.floor else ''})"

    def __call__(self, o: int, n: int, name: str = "") -> int:
        by_name = dict(self.by_name)
        if name not in by_name:
            raise ValueError(
                f"ranks has no entry for layer {name!r}; it has {', '.join(map(repr, by_name)) or 'none'}"
                if name
                else "ranks needs the layer's name; use it through a Regularizer or plan(model, ...)"
            )
        return _at_least(by_name[name], o, n, self.floor)


def welch_bound(o: int, n: int) -> float:
    """The least possible ``max |c_ij|`` of ``o`` directions in ``n`` dimensions, as far as closed forms tell.

    0 for ``o <= n``; the Welch bound ``sqrt((o - n) / (n (o - 1)))`` on tall layers; the orthoplex bound ``1 / sqrt(n)`` beyond
    ``o > n (n + 1) / 2``, where the Welch bound cannot be reached.

    >>> welch_bound(64, 64), round(welch_bound(64, 16), 3), welch_bound(11, 4)
    (0.0, 0.218, 0.5)
    """
    check_count("o", o)
    check_count("n", n)
    if o <= n:
        return 0.0
    if o > n * (n + 1) // 2:
        return float(n**-0.5)
    return float(((o - n) / (n * (o - 1))) ** 0.5)


@dataclass(frozen=True)
class welch:
    """The least ``max |c_ij|`` a layer's shape allows, :func:`welch_bound`; for ``ceiling=``.

    The bound is 0 on layers that are not tall: there the ceiling counts every correlation, relaxed or not.

    >>> round(welch()(64, 16), 3), welch()(16, 64)
    (0.218, 0.0)
    """

    def __call__(self, o: int, n: int) -> float:
        return welch_bound(o, n)


def check_policy(relax: object) -> None:
    """Raise ``TypeError`` unless ``relax`` is a policy or None."""
    if relax is not None and (isinstance(relax, type) or not callable(relax)):
        raise TypeError(f"relax must be a policy such as orthokit.share(0.1), or None; got {relax!r}")


def transition_dimension(relax: Policy | None, o: int, n: int, name: str = "") -> int:
    """The ``r`` that ``relax`` chooses for a layer; ``o``, the strict form, for None.

    Raises:
        ValueError: the policy's ``r`` is outside ``1 <= r <= min(o, n)``.
    """
    check_policy(relax)
    if relax is None:
        return o
    r = relax(o, n, name)
    check_count(f"r of layer {name!r} ({o} filters of {n} weights)" if name else f"r of {o}x{n}", r, 1, min(o, n))
    return r


PLAN_COLUMNS = (
    Column("layer", "layer", "s"),
    Column("groups", "g", "d"),
    Column("o", "o", "d"),
    Column("n", "n", "d"),
    Column("shape", "shape", "s"),
    Column("r", "r", "d"),
    Column("free", "free pairs", ",d"),
    Column("pairs", "of", ",d"),
    Column("ceiling", "w_r"),
    Column("memory", "MB", ",.1f"),
)


def plan(
    model: nn.Module | Mapping[str, Any] | Layers,
    relax: Policy | None,
    *,
    where: Where = convs,
    count: Count = "expected",
) -> Table:
    """A table of what ``relax`` asks of each layer of a model or state dict, to print before training. A meta model will do.

    Columns: filters ``o`` and weights per filter ``n`` (of each group), wide or tall, the transition dimension
    ``r``, how many pairs ``form="pairs"`` leaves free of how many, and the ceiling ``w_r`` of ``form="welch"``. Two arms of
    an experiment whose plans are equal are the same arm. The memory is what measuring the layer takes at most, in megabytes: two
    matrices ``o x o`` per group in float32. Where all pairs count, a tall layer of 256 filters or more needs ``n x n`` only.

    Raises:
        ValueError: ``where`` selects nothing, or the policy's ``r`` is outside ``1 <= r <= min(o, n)``.
    """
    rows: list[Row] = []
    layers = select(model, where)
    for layer in layers:
        groups, o, n = layer.size
        r = transition_dimension(relax, o, n, layer.name)
        rows.append(
            {
                "layer": layer.name,
                "groups": groups,
                "o": o,
                "n": n,
                "shape": "wide" if o <= n else "tall",
                "r": r,
                "free": groups * cardinality(o, r, count),
                "pairs": groups * (o * (o - 1) // 2),
                "ceiling": relaxed_ceiling(o, r),
                "memory": groups * 2 * o * o * 4 / 1e6,
            }
        )
    total = {"free": sum(row["free"] for row in rows), "pairs": sum(row["pairs"] for row in rows)}
    notes = tuple(filter(None, [str(unread_parameters(model, layers))])) if isinstance(model, nn.Module) else ()
    # The ranks themselves are in the table.
    name = "ranks({...})" if isinstance(relax, ranks) else repr(relax) if relax else "strict orthogonality"
    return Table(f"plan of {name}", PLAN_COLUMNS, tuple(rows), {f"{len(rows)} layers": total}, notes)
