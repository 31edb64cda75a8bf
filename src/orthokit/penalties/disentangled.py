"""The disentangled norm, strict and relaxed.

Wu, Zhang, Long, Yin, Leng: "Towards Better Orthogonality Regularization with Disentangled Norm in Training Deep CNNs", 2023,
https://arxiv.org/abs/2306.09939. The residual ``K K^T - I`` mixes how long each filter is with how two filters point; here the
two are measured apart, and relaxed orthogonality lets some of the correlations stay. Only the abstract and the public reviews
could be read: the formulas below, their weights, and the forms "welch" and "budget" are ours, after the paper's idea.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.checks import check_choice, check_count, check_number, short_repr, warn_once
from orthokit.gram import (
    directions,
    frobenius,
    full_precision,
    is_finite,
    is_visible,
    of_cosines,
    of_gram,
    polar,
    reciprocal,
    squares_and_directions,
    sum_of_squares,
)
from orthokit.kernel import Kernel
from orthokit.relax import (
    COUNTS,
    Count,
    Policy,
    cardinality,
    check_policy,
    relaxed_budget,
    relaxed_ceiling,
    transition_dimension,
    welch,
)

Form = Literal["pairs", "welch", "budget"]
FORMS: tuple[Form, ...] = ("pairs", "welch", "budget")
SAMPLED = 2**16
"""From so many sizes on, the largest of them are found by way of a sample."""


@full_precision
def disentangled_orthogonality(
    matrix: Float[Tensor, "*b o n"],
    r: int | Tensor | None = None,
    *,
    form: Form = "pairs",
    count: Count = "expected",
    squared: bool = False,
    weights: tuple[float, float] = (1.0, 1.0),
    ceiling: float | None = None,
) -> Float[Tensor, "*b"]:
    """``a ||d||_2 + b ||c||_2``: errors of length ``d_i = ||k_i||^2 - 1`` and cosines ``c_ij`` of all pairs ``i > j``, apart.

    The gradient of the first term is parallel to each filter, that of the second perpendicular to it. Strict (``r = o``) it is
    zero at orthonormal rows. With a transition dimension ``r < o`` only part of the correlations must vanish:

    * ``form="pairs"``: ``b ||c||`` without its ``cardinality(o, r, count)`` largest ``|c_ij|``, chosen anew at every call; of
      equal ones the earlier pair in row-major order is freed first. Free pairs get no gradient.
    * ``form="welch"``: ``b ||max(0, |c_ij| - w_r)||`` with ``w_r = sqrt((o - r) / (r (o - 1)))``.
    * ``form="budget"``: ``b max(0, ||c|| - sqrt(o (o - r) / (2 r)))``.

    Zero of the last two implies ``o^2 / ||U U^T||_F^2 >= r``, hence rank at least ``r``. Filters shorter than
    ``sqrt(tiny(dtype))`` have no direction: their cosines are 0. Exact copies are stationary points: never initialise so.

    Args:
        matrix: ``(*b, o, n)``, one filter a row.
        r: transition dimension, from 1 to ``o``, an integer or a tensor that broadcasts to ``*b``; None is strict.
        form: how the relaxed correlations are chosen.
        count: for ``form="pairs"``, how many are free: see :func:`orthokit.relax.cardinality`.
        squared: every norm squared, for comparison; its pull fades near orthogonality.
        weights: ``(a, b)`` of lengths and directions.
        ceiling: adds ``b ||max(0, |c_ij| - ceiling)||`` over all pairs, free or not.

    >>> disentangled_orthogonality(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))  # d = (3, 1), c = (.7071)
    tensor(3.8694)
    >>> disentangled_orthogonality(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), 1)  # the only pair is free
    tensor(3.1623)

    Source: ours, after the idea of Wu et al. 2023, arXiv 2306.09939.
    """
    check_choice("form", form, FORMS)
    check_choice("count", count, COUNTS)
    o = matrix.shape[-2]
    r = o if r is None else r
    if not isinstance(r, Tensor):
        check_count("r", r, 1, o)
    elif r.dtype.is_floating_point or not is_finite(1 / ((r >= 1) & (r <= o))):
        raise ValueError(f"r must hold integers from 1 to {o}; got {r.dtype} {r.tolist()}")
    if ceiling is not None:
        check_number("ceiling", ceiling, 0, 1)
    a, b = weights
    strict = isinstance(r, int) and r == o
    real_r = r.to(matrix) if isinstance(r, Tensor) else r
    budget = relaxed_budget(o, real_r) if form == "budget" and not strict else 0.0
    kept: Callable[[Tensor], Tensor]
    if strict or form == "budget":
        if ceiling is None and o > matrix.shape[-1]:
            squares, unit = squares_and_directions(matrix)
            length, _ = _norm(torch.linalg.vector_norm(squares - 1, dim=-1), squared)
            directed = (squares > torch.finfo(squares.dtype).tiny).sum(-1)
            frame = partial(_by_frame, directed=directed, budget=budget, squared=squared)
            return a * length + b * of_gram(unit, frame, "cols")
        kept = _all
    elif form == "welch":
        kept = partial(_excess, ceiling=relaxed_ceiling(o, real_r))
    else:
        kept = partial(_without_largest, count=cardinality(o, r, count))
    terms = [(kept, budget)] if ceiling is None else [(kept, budget), (partial(_excess, ceiling=ceiling), 0.0)]
    return of_cosines(matrix, partial(_apart, terms=terms, weights=weights, squared=squared))


def _apart(
    squares: Float[Tensor, "*b o"],
    c: Float[Tensor, "*b o o"],
    *,
    terms: Sequence[tuple[Callable[[Tensor], Tensor], float | Tensor]],
    weights: tuple[float, float],
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``a`` times the errors of length and ``b`` times each term: what it keeps of the cosines, less its budget."""
    a, b = weights
    d = squares - 1
    value, slope = _norm(torch.linalg.vector_norm(d, dim=-1), squared)
    value, by_squares = a * value, (a * slope).unsqueeze(-1) * d
    pulls = []
    for kept, budget in terms:
        remaining = kept(c)
        # Each pair is there twice.
        size, slope = _norm(0.5**0.5 * frobenius(remaining), squared, budget)
        value = value + b * size
        pulls.append((b * slope)[..., None, None] * remaining)
    return value, by_squares, sum(pulls[1:], pulls[0])


def _by_frame(
    product: Float[Tensor, "*b n n"], *, directed: Tensor, budget: float | Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    """The cosines' part on a tall layer: ``||U U^T|| = ||U^T U||``, whose diagonal has a 1 for every filter with a direction."""
    square = (sum_of_squares(product) - directed).clamp(min=torch.finfo(product.dtype).tiny)
    value, slope = _norm((0.5 * square).sqrt(), squared, budget)
    return value, slope[..., None, None] * product


def _norm(norm: Tensor, squared: bool, budget: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """``max(0, norm - budget)``, squared or not, and its derivative by an entry whose norm it is, divided by that entry."""
    per_entry = reciprocal(norm)
    if isinstance(budget, Tensor) or budget > 0:
        norm = (norm - budget).relu()
        per_entry = per_entry.masked_fill(norm == 0, 0.0)
    return (norm.square(), 2 * norm * per_entry) if squared else (norm, per_entry)


def _all(c: Float[Tensor, "*b o o"]) -> Float[Tensor, "*b o o"]:
    return c


def _excess(c: Float[Tensor, "*b o o"], ceiling: float | Tensor) -> Float[Tensor, "*b o o"]:
    """How far each ``|c_ij|`` exceeds the ceiling, with the sign of the cosine."""
    high = torch.as_tensor(ceiling, dtype=c.dtype, device=c.device)[..., None, None]
    return c - c.clamp(-high, high)


def _without_largest(c: Float[Tensor, "*b o o"], count: int | Tensor) -> Float[Tensor, "*b o o"]:
    """``c`` without its ``count`` largest pairs in absolute value, the earlier of equal ones first."""
    sizes = c.detach().tril(-1).abs_().flatten(-2)
    counts = torch.as_tensor(count, device=c.device).expand(sizes.shape[:-1]).unsqueeze(-1)
    least = _nth_largest(sizes, counts if isinstance(count, Tensor) else count)
    free = sizes >= least
    # No row has fewer than asked for; more only where several are equal.
    if not is_visible(c) or int(free.count_nonzero()) > int(counts.sum()):
        larger, equal = sizes > least, sizes == least
        free = larger | (equal & (equal.cumsum(-1) <= counts - larger.sum(-1, keepdim=True)))
    free = free.unflatten(-1, c.shape[-2:])
    return c.masked_fill(free | free.mT, 0.0)


def _nth_largest(sizes: Float[Tensor, "*b m"], count: int | Tensor) -> Float[Tensor, "*b 1"]:
    """The ``count``-th largest size of each row; infinity where that is 0."""
    m = sizes.shape[-1]
    if isinstance(count, Tensor):
        each = sizes.sort(-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))
        return torch.where(count > 0, each, torch.inf)
    if count == 0:
        return torch.full_like(sizes[..., :1], torch.inf)
    if m < SAMPLED or not is_visible(sizes):
        return sizes.kthvalue(m - count + 1, keepdim=True).values
    rows = [_nth_of_many(row, count) for row in sizes.reshape(-1, m)]
    return torch.stack(rows).reshape(*sizes.shape[:-1], 1)


def _nth_of_many(sizes: Float[Tensor, "m"], count: int) -> Float[Tensor, ""]:  # noqa: F821
    """The same of one long row: sought between two bounds that a sample suggests, a few percent of the sizes."""
    m, drawn = len(sizes), SAMPLED >> 4
    place, spread = drawn * count / m, 4 * (drawn * count * (m - count)) ** 0.5 / m + 2
    # Steps of an irregular size, as a layer's filters may repeat at regular ones.
    sample = sizes[torch.arange(drawn, device=sizes.device) * 2654435761 % m].sort(descending=True).values
    high, low = sample[max(0, int(place - spread))], sample[min(drawn - 1, int(place + spread))]
    inside = sizes[(sizes >= low) & (sizes <= high)]
    left = count - int((sizes > high).count_nonzero())
    if 0 < left <= len(inside):
        return inside.kthvalue(len(inside) - left + 1).values
    return sizes.kthvalue(m - count + 1).values


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """:func:`disentangled_orthogonality` of a layer's kernel matrix; strict by default, relaxed by a policy.

    Args:
        relax: a policy of :mod:`orthokit.relax`, such as ``feasible()`` or ``share(0.1)``; None is strict: every pair.
        form: ``"pairs"`` frees the most correlated pairs; ``"welch"`` and ``"budget"`` (ours) forbid copies.
        count: with ``"pairs"``, the ``"expected"`` or the ``"fewest"`` free pairs.
        squared: square every norm, for comparison.
        weights: ``(a, b)`` of lengths and directions.
        ceiling: a cap on ``|c_ij|`` over all pairs: a number in [0, 1], or ``welch()`` for the least possible one.

    >>> Disentangled()(Kernel(torch.eye(2, 3)[None]))
    tensor([0.])
    """

    relax: Policy | None = None
    form: Form = "pairs"
    count: Count = "expected"
    squared: bool = False
    weights: tuple[float, float] = (1.0, 1.0)
    ceiling: float | welch | None = None
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        check_choice("count", self.count, COUNTS)
        check_policy(self.relax)
        if not isinstance(self.ceiling, welch | None):
            check_number("ceiling", self.ceiling, 0, 1)
        if not isinstance(self.weights, (tuple, list)) or len(self.weights) != 2:
            raise ValueError(f"weights must be two numbers, for lengths and for directions; got {self.weights!r}")
        for weight in self.weights:
            check_number("weights", weight)
        if not any(self.weights):
            raise ValueError("weights must not both be 0: nothing would be measured")
        object.__setattr__(self, "weights", tuple(self.weights))
        if self.relax is None and self.form != "pairs":
            warn_once(f"form={self.form!r} does nothing without relax=: every form is the same where all pairs count")
        if self.count != "expected" and (self.relax is None or self.form != "pairs"):
            warn_once(f"count={self.count!r} does nothing here: it applies to form='pairs' with relax=")

    def transition(self, o: int, n: int, name: str = "") -> int:
        """The transition dimension of a layer with ``o`` filters of ``n`` weights."""
        r = transition_dimension(self.relax, o, n, name)
        if self.form == "pairs" and self.ceiling is None and r < o and o > n:
            warn_once(
                "form='pairs' lets filters of a tall layer (more filters than weights per filter) become copies of each "
                "other; add ceiling=orthokit.welch(), or use form='welch' or form='budget'"
            )
        return r

    def __call__(self, kernel: Kernel) -> Tensor:
        return disentangled_orthogonality(
            kernel.matrix,
            self.transition(kernel.o, kernel.n) if kernel.rank is None else kernel.rank,
            form=self.form,
            count=self.count,
            squared=self.squared,
            weights=self.weights,
            ceiling=self.ceiling(kernel.o, kernel.n) if isinstance(self.ceiling, welch) else self.ceiling,
        )

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows; on a tall layer a tight frame, its lengths then set to 1.

        Raises:
            ValueError: relaxed (or with a ceiling) so that no nearest one is known in closed form.
        """
        o, n = kernel.o, kernel.n
        r = torch.as_tensor(self.transition(o, n) if kernel.rank is None else kernel.rank)
        strict, tight = bool((r == o).all()), self.form == "budget" and bool((r == n).all())
        if self.ceiling is not None or not (strict or tight):
            why = "a ceiling" if self.ceiling is not None else f"form={self.form!r}"
            raise ValueError(
                f"the kernel nearest to the minimum of {self!r} is not known in closed form for {o} filters of {n} weights: "
                f"{why} leaves many minima, and no formula projects onto them; take it strict, or form='budget' with "
                "relax=feasible(), or add the penalty to the loss"
            )
        nearest = polar(kernel.matrix)
        return nearest if o <= n else directions((o / n) ** 0.5 * nearest)
