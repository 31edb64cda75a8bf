"""The disentangled norm, strict and relaxed.

Wu, Zhang, Long, Yin, Leng: "Towards Better Orthogonality Regularization with Disentangled Norm in Training Deep CNNs", 2023,
https://arxiv.org/abs/2306.09939. The residual ``K K^T - I`` mixes how long each filter is with how two filters point; here the
two are measured apart, and relaxed orthogonality lets some of the correlations stay. Only the abstract and the public reviews
could be read: the formulas below, their weights, and the forms "welch" and "budget" are ours, after the paper's idea.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from orthokit.checks import check_choice, check_count, check_flag, check_number, check_options, short_repr, warn_once
from orthokit.constants import cached, on_device, scattered
from orthokit.gram import (
    SHORT,
    GramRule,
    Side,
    by_filters,
    directions,
    frobenius,
    full_precision,
    is_finite,
    is_large,
    is_visible,
    lengths,
    lengths_and_cosines,
    of_gram,
    plus_transpose,
    reciprocal,
    row_blocks,
    row_products,
    row_values,
    squares_and_weighted_directions,
    sum_of_squares,
)
from orthokit.kernel import Kernel
from orthokit.polar import polar
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

__all__ = ["TALL", "Disentangled", "Form", "disentangled_orthogonality"]

Form = Literal["pairs", "welch", "budget"]
FORMS: tuple[Form, ...] = ("pairs", "welch", "budget")
TALL = 256
"""Filters from which on the smaller Gram matrix of a tall layer repays the detour by way of normalised filters."""


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

    A value of zero guarantees rank ``r`` or more with "welch" and "budget" (``o^2 / ||U U^T||_F^2 >= r``). With "pairs" it does
    not: identical filters can reach it. Exact copies are stationary points: do not initialise filters as copies.

    The direction of a filter shorter than 0.1 counts in proportion to its length, with weights that the derivative holds fixed
    (see Note [short filters] in :mod:`orthokit.gram`): a zero-initialised layer trains.

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
    check_flag("squared", squared)
    _check_weights(weights)
    o, n = matrix.shape[-2:]
    r = o if r is None else r
    if not isinstance(r, Tensor):
        check_count("r", r, 1, o)
    elif r.dtype.is_floating_point or not is_finite(1 / ((r >= 1) & (r <= o))):
        raise ValueError(f"r must hold integers from 1 to {o}; got {r.dtype} {r.tolist()}")
    if ceiling is not None:
        check_number("ceiling", ceiling, 0, 1)
    terms = _terms(o, r, form, count, ceiling)
    if not _is_by_frame(o, n, terms):
        return of_gram(matrix, _Apart(terms, (weights[0], weights[1]), squared, n > 1))
    squares, unit = squares_and_weighted_directions(matrix)
    length, _ = _norm(torch.linalg.vector_norm(squares - 1, dim=-1), squared)
    own = (squares.detach() / SHORT**2).clamp(max=1).square().sum(-1)
    frame = partial(_by_frame, own=own, budget=terms[0].budget, squared=squared)
    return weights[0] * length + weights[1] * of_gram(unit, frame, "cols")


def _check_weights(weights: object) -> None:
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise ValueError(f"weights must be two numbers, for lengths and for directions; got {weights!r:.200}")
    for weight in weights:
        check_number("weights", weight)
    if not any(weights):
        raise ValueError("weights must not both be 0: nothing would be measured")


@dataclass(frozen=True)
class _Term:
    """The cosines that count, and what their norm may keep: by default every one, and nothing."""

    free: int | Tensor = 0
    """Number of largest pairs that do not count."""
    ceiling: float | Tensor = 0.0
    """Largest ``|c_ij|`` without a penalty."""
    budget: float | Tensor = 0.0
    """Largest norm without a penalty."""

    @property
    def is_plain(self) -> bool:
        """Whether every cosine counts in full."""
        return _is_zero(self.free) and _is_zero(self.ceiling)

    def __call__(self, c: Float[Tensor, "*b o m"]) -> Float[Tensor, "*b o m"]:
        if not _is_zero(self.free):
            return _without_largest(c, self.free)
        return c if _is_zero(self.ceiling) else _excess(c, self.ceiling)


def _is_zero(number: float | Tensor) -> bool:
    return not isinstance(number, Tensor) and number == 0


def _terms(o: int, r: int | Tensor, form: Form, count: Count, ceiling: float | None) -> tuple[_Term, ...]:
    real_r = r.double() if isinstance(r, Tensor) else r
    if isinstance(r, int) and r == o:
        term = _Term()
    elif form == "budget":
        term = _Term(budget=relaxed_budget(o, real_r))
    elif form == "welch":
        term = _Term(ceiling=relaxed_ceiling(o, real_r))
    else:
        term = _Term(free=cardinality(o, r, count))
    return (term,) if ceiling is None else (term, _Term(ceiling=ceiling))


def _is_by_frame(o: int, n: int, terms: Sequence[_Term]) -> bool:
    """Whether the directions are measured by the columns' Gram matrix: of a large tall layer, where it says all of them."""
    return o > n > 1 and o >= TALL and len(terms) == 1 and terms[0].is_plain


@dataclass(frozen=True)
class _Apart:
    """The rule of ``a`` times the errors of length and ``b`` times each term; ``turning``: whether filters have directions."""

    terms: tuple[_Term, ...]
    weights: tuple[float, float]
    squared: bool
    turning: bool

    def __call__(self, product: Float[Tensor, "*b o o"]) -> tuple[Tensor, Tensor]:
        (a, b), squared = self.weights, self.squared
        lengths, c = lengths_and_cosines(product)
        if not self.turning:  # filters of one weight: see cosine_rule
            c = c.detach()
        d = lengths.squares - 1
        value, slope = _norm(torch.linalg.vector_norm(d, dim=-1), squared)
        value, lengthwise = a * value, (2 * a * slope).unsqueeze(-1) * d
        pulls: list[tuple[Tensor, Tensor]] = []
        for term in self.terms:
            if pulls and is_large(c):  # Note [memory]
                value = torch.add(value, _add_by_blocks_(pulls, term, c, b, squared), alpha=b)
                continue
            remaining = term(c)
            # Each pair is there twice.
            size, slope = _norm(0.5**0.5 * frobenius(remaining), squared, term.budget)
            value = torch.add(value, size, alpha=b)
            pulls.append((remaining, b * slope))
        pull, times = pulls[0]
        if len(pulls) > 1:
            pull = sum((times[..., None, None] * pull for pull, times in pulls), torch.zeros_like(c))
            times = torch.ones_like(times)
        if not self.turning:
            pull = torch.zeros_like(pull)
        return value, by_filters(lengths, lengthwise, pull, row_products(pull, c), times.unsqueeze(-1))


def _add_by_blocks_(pulls: list[tuple[Tensor, Tensor]], term: _Term, c: Tensor, b: float, squared: bool) -> Tensor:
    """Add to the only pull that of another term, which reads each cosine by itself; the norm of that."""
    each = row_values(lambda rows: lengths(term(rows)), c)
    size, slope = _norm(0.5**0.5 * torch.linalg.vector_norm(each, dim=-1), squared)
    pull, times = pulls[0]
    # Where nothing is freed the pull is the cosines themselves, which are needed still.
    pull = pull * times[..., None, None] if pull is c else pull.mul_(times[..., None, None])
    for rows in row_blocks(c):
        pull[..., rows, :] += (b * slope)[..., None, None] * term(c[..., rows, :])
    pulls[0] = pull, torch.ones_like(times)
    return size


def _by_frame(product: Float[Tensor, "*b n n"], *, own: Tensor, budget: float | Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """The cosines' part on a tall layer: ``||U U^T|| = ||U^T U||``, less what each filter contributes by itself, ``own``."""
    square = (sum_of_squares(product) - own).clamp(min=torch.finfo(product.dtype).tiny)
    value, slope = _norm((0.5 * square).sqrt(), squared, budget)
    return value, slope[..., None, None] * product


def _norm(norm: Tensor, squared: bool, budget: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """The value ``max(0, norm - budget)`` (squared if asked) and the factor ``s`` with ``d value / d x_i = s * x_i``."""
    per_entry = reciprocal(norm)
    if isinstance(budget, Tensor) or budget > 0:
        norm = (norm - budget).relu()
        per_entry = per_entry.masked_fill(norm == 0, 0.0)
    return (norm.square(), 2 * norm * per_entry) if squared else (norm, per_entry)


def _excess(c: Float[Tensor, "*b o m"], ceiling: float | Tensor) -> Float[Tensor, "*b o m"]:
    """Excess of each ``|c_ij|`` over the ceiling, with the sign of the cosine."""
    if not isinstance(ceiling, Tensor):
        return F.softshrink(c, ceiling)
    high = ceiling.to(c)[..., None, None]
    return c - c.clamp(-high, high)


def _without_largest(c: Float[Tensor, "*b o o"], count: int | Tensor) -> Float[Tensor, "*b o o"]:
    """``c`` without its ``count`` largest pairs in absolute value, the earlier of equal ones first."""
    o = c.shape[-1]
    if o == 1:
        return c
    if is_large(c):
        return _without_largest_by_blocks(c, count)
    below, mirrored = _pairs(o, c.device)
    pairs = c.flatten(-2).index_select(-1, below)
    sizes = pairs.detach().abs()
    counts = on_device(count, c.device).expand(sizes.shape[:-1]).unsqueeze(-1)
    least = _nth_largest(sizes, counts if isinstance(count, Tensor) else count)
    counted = sizes < least
    # Every row has as many as are to stay, or fewer where several are equal.
    if not is_visible(c) or int(counted.count_nonzero()) < sizes.numel() - int(counts.sum()):
        larger, equal = sizes > least, sizes == least
        counted |= equal & (equal.cumsum(-1) > counts - larger.sum(-1, keepdim=True))
    rest: Tensor = (pairs * counted).index_select(-1, mirrored).unflatten(-1, (o, o))
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    return rest


def _without_largest_by_blocks(c: Float[Tensor, "*b o o"], count: int | Tensor) -> Float[Tensor, "*b o o"]:
    """As :func:`_without_largest`; beside a large ``c`` it holds first all pairs, half of its size, and then the result."""
    flat = c.flatten(0, -3) if c.ndim > 2 else c.unsqueeze(0)
    counts = torch.as_tensor(count).expand(c.shape[:-2]).flatten().tolist()
    limits = [_limit(matrix, each) for matrix, each in zip(flat, counts, strict=True)]
    rest, visible = torch.empty_like(flat), is_visible(c)
    for matrix, result, (least, ties) in zip(flat, rest, limits, strict=True):
        for rows in row_blocks(matrix):
            part = matrix[rows].tril(rows.start - 1)
            part.masked_fill_(part.abs() > least, 0.0)
            equal = part.abs() == least if not visible or ties > 0 else None
            if equal is not None and (not visible or equal.any()):  # of pairs just as large the first are free
                order = equal.flatten().cumsum(0).view_as(equal)
                part.masked_fill_(equal & (order <= ties), 0.0)
                ties = ties - order[-1, -1]
            result[rows] = part
        plus_transpose(result) if is_large(result) else result.add_(result.mT.clone())
    return rest.reshape(c.shape)


def _limit(matrix: Float[Tensor, "o o"], count: int) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The ``count``-th largest size of a pair, and how many pairs of just this size are among these ``count``."""
    o = len(matrix)
    sizes = torch.empty(o * (o - 1) // 2, dtype=matrix.dtype, device=matrix.device)
    for row in range(1, o):
        start = row * (row - 1) // 2
        sizes[start : start + row] = matrix[row, :row]
    sizes.abs_()
    if count == 0:
        return sizes.new_full((), torch.inf), torch.zeros((), dtype=torch.int64, device=sizes.device)
    index = len(sizes) - count
    if sizes.is_cpu:
        sizes.numpy().partition(index)  # in place
        return sizes[index].clone(), count - (sizes[index + 1 :] > sizes[index]).count_nonzero()
    least = sizes.kthvalue(index + 1).values
    return least, count - (sizes > least).count_nonzero()


@cached(32)
def _pairs(o: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in ``o x o`` entries those below the diagonal are, in row-major order; and which of these each entry equals."""
    rows, columns = torch.tril_indices(o, o, -1, device=device)
    mirrored = torch.zeros(o, o, dtype=torch.int32, device=device)
    mirrored[rows, columns] = torch.arange(len(rows), dtype=torch.int32, device=device)
    return (rows * o + columns).int(), torch.maximum(mirrored, mirrored.mT).flatten()


def _nth_largest(sizes: Float[Tensor, "*b m"], count: int | Tensor) -> Float[Tensor, "*b 1"]:
    """The ``count``-th largest size of each row; infinity where that is 0."""
    if isinstance(count, Tensor):
        each = sizes.sort(-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))
        return torch.where(count > 0, each, torch.inf)
    if count == 0:
        return torch.full_like(sizes[..., :1], torch.inf)
    index = sizes.shape[-1] - count
    if not is_visible(sizes):
        return sizes.kthvalue(index + 1, keepdim=True).values
    # Many times faster than kthvalue on a CPU.
    return torch.from_numpy(np.partition(sizes.numpy(), index)[..., index : index + 1])


@torch.no_grad()
def _nearest_frame(matrix: Float[Tensor, "*b o n"]) -> Float[Tensor, "*b o n"]:
    """The nearest tight frame of a tall matrix, its filters then of length 1; zero filters first get a direction."""
    o, n = matrix.shape[-2:]
    exact = matrix.double()
    length = lengths(exact)
    anywhere = directions(scattered(o * n).to(exact).reshape(o, n)) * length.amax(-1).clamp(min=1)[..., None, None]
    return directions(polar(torch.where(length[..., None] == 0, anywhere, exact))).to(matrix.dtype)


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

    name: ClassVar[str] = "Disentangled"
    long_name: ClassVar[str] = "lengths and directions apart, strict and relaxed"
    source: ClassVar[str] = "ours, after the idea of Wu et al. 2023, https://arxiv.org/abs/2306.09939"
    use: ClassVar[str] = "you begin: one setting served all wide and tall layers that we tried"
    relax: Policy | None = None
    form: Form = "pairs"
    count: Count = "expected"
    squared: bool = False
    weights: tuple[float, float] = (1.0, 1.0)
    ceiling: float | welch | None = None
    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_policy(self.relax)
        if not isinstance(self.ceiling, welch | None):
            check_number("ceiling", self.ceiling, 0, 1)
        _check_weights(self.weights)
        object.__setattr__(self, "weights", tuple(self.weights))
        check_options(self)
        if self.relax is None and self.form != "pairs":
            warn_once(f"form={self.form!r} does nothing without relax=: every form is the same where all pairs count")
        if self.count != "expected" and (self.relax is None or self.form != "pairs"):
            warn_once(f"count={self.count!r} does nothing here: it applies to form='pairs' with relax=")

    def transition(self, o: int, n: int, name: str = "") -> int:
        """The transition dimension of a layer with ``o`` filters of ``n`` weights."""
        r = transition_dimension(self.relax, o, n, name)
        if self.form == "pairs" and self.ceiling is None and r < o and o > n:
            warn_once(
                "form='pairs' lets filters of a tall layer (more filters than weights per filter) become copies of each other, "
                "and was less accurate in our study than leaving tall layers alone, where=orthokit.convs & ~orthokit.tall; leave "
                "relax= out, or forbid copies with ceiling=orthokit.welch()"
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
            ceiling=self._ceiling(kernel.o, kernel.n),
        )

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side] | None:
        """See :func:`orthokit.gram.of_gram`."""
        r = self.transition(o, n) if rank is None else rank
        terms = _terms(o, r, self.form, self.count, self._ceiling(o, n))
        if _is_by_frame(o, n, terms):
            return None
        return _Apart(terms, self.weights, self.squared, n > 1), "rows"

    def _ceiling(self, o: int, n: int) -> float | None:
        return self.ceiling(o, n) if isinstance(self.ceiling, welch) else self.ceiling

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at its minimum: orthonormal rows; on a tall layer a tight frame, its lengths then set to 1.

        Where filters do not determine it (copies on a wide layer, zero filters) the rest is chosen, always in the same way.

        Raises:
            FloatingPointError: a weight is NaN or infinite.
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
        return polar(kernel.matrix) if o <= n else _nearest_frame(kernel.matrix)
