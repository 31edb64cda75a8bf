"""Filters of every awkward kind: a clear error or a defined value, never a NaN gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import orthokit as ok
from cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore:form='pairs'")

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))
ENTRIES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-25, 1e-12, 1e8]),
    st.floats(-3, 3, width=32),
)


@st.composite
def kernels(draw):
    """Matrices with zero, equal, opposite and one-hot rows among random ones."""
    o, n = draw(SHAPES)
    rows = [draw(st.lists(ENTRIES, min_size=n, max_size=n)) for _ in range(o)]
    for i in range(1, o):
        kind = draw(st.sampled_from(["own", "own", "copy", "opposite", "unit"]))
        if kind == "unit":
            rows[i] = [float(j == i % n) for j in range(n)]
        elif kind != "own":
            rows[i] = [x if kind == "copy" else -x for x in rows[draw(st.integers(0, i - 1))]]
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.penalty))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(matrix=kernels())
def test_value_and_gradient_are_finite(case, matrix):
    weight = matrix.clone().requires_grad_()
    value = case.penalty(ok.kernel_of(weight))
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert value.shape == (1,)
    assert value.dtype == matrix.dtype
    assert (value >= 0).all()
    assert gradient.isfinite().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrix=kernels(), rho=st.floats(0.01, 1), form=st.sampled_from(["pairs", "welch", "budget"]))
def test_relaxed_is_never_more_than_strict(matrix, rho, form):
    kernel = ok.kernel_of(matrix.double())
    strict, relaxed = ok.Disentangled()(kernel), ok.Disentangled(relax=ok.fraction(rho), form=form)(kernel)
    assert relaxed <= strict + 1e-9


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.penalty))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize(("o", "n"), [(3, 5), (5, 3), (2, 2), (1, 4)])
def test_not_finite_is_said(case, bad, o, n):
    matrix = torch.randn(o, n)
    matrix[-1] = bad
    with pytest.raises(FloatingPointError, match=r"is not finite: the largest \|weight\|"):
        case.penalty(ok.kernel_of(matrix))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.penalty))
def test_one_filter_and_one_weight(case):
    for o, n in [(1, 1), (1, 5), (5, 1), (2, 2), (2, 1)]:
        weight = torch.randn(o, n, requires_grad=True)
        value = case.penalty(ok.kernel_of(weight))
        (gradient,) = torch.autograd.grad(value.sum(), weight)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.penalty))
def test_short_filters_have_no_direction(case):
    weight = torch.randn(4, 6)
    weight[1] *= 1e-25
    weight.requires_grad_()
    value = case.penalty(ok.kernel_of(weight))
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert gradient.isfinite().all()
    if type(case.penalty) is ok.Disentangled:
        assert gradient[1].abs().max() < 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ok.SO(side="left"), ValueError, "side must be one of 'rows', 'cols', 'smaller'; got 'left'"),
        (lambda: ok.MC(norm="l2"), ValueError, "norm must be one of"),
        (lambda: ok.SRIP(steps=0), ValueError, "steps must be an integer, at least 1; got 0"),
        (lambda: ok.SRIP(steps=2.5), TypeError, "steps must be an integer"),
        (lambda: ok.SRIP(side="both"), ValueError, "side"),
        (lambda: ok.Disentangled(form="soft"), ValueError, "form must be one of 'pairs', 'welch', 'budget'; got 'soft'"),
        (lambda: ok.Disentangled(count="most"), ValueError, "count"),
        (lambda: ok.Disentangled(relax=0.5), TypeError, r"relax must be a policy such as orthokit.share\(0.1\), or None"),
        (lambda: ok.Disentangled(relax=ok.share), TypeError, "relax must be a policy"),
        (lambda: ok.Disentangled(ceiling=1.5), ValueError, r"ceiling must be a finite number in \[0, 1\]"),
        (lambda: ok.Disentangled(ceiling=ok.welch), TypeError, "ceiling must be a number"),
        (lambda: ok.Disentangled(weights=(1.0,)), ValueError, "weights must be two numbers"),
        (lambda: ok.Disentangled(weights=(1.0, -1.0)), ValueError, "weights must be a finite number"),
        (lambda: ok.soft_orthogonality(torch.ones(3)), ValueError, "needs matrices"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), 4), ValueError, "r must be an integer, from 1 to 3"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), 1.5), TypeError, "r must be an integer"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), form="x"), ValueError, "form"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), torch.tensor(0)), ValueError, "r must hold integers from 1 to 3"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), torch.tensor(4)), ValueError, "r must hold integers"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), torch.tensor(1.5)), ValueError, "r must hold integers"),
        (lambda: ok.disentangled_orthogonality(torch.eye(3), ceiling=-1.0), ValueError, "ceiling"),
        (lambda: ok.spectral_restricted_isometry(torch.eye(3), start=torch.zeros(3)), ValueError, "start must not be zero"),
        (lambda: ok.soft_orthogonality(np.eye(3)), TypeError, "expected a tensor of matrices"),
        (lambda: ok.Disentangled(weights=1.0), ValueError, "weights must be two numbers"),
        (lambda: ok.Disentangled(weights=(0.0, 0.0)), ValueError, "weights must not both be 0"),
        (lambda: ok.plan(torch.nn.Conv2d(3, 4, 1), 0.5), TypeError, "relax must be a policy"),
        (lambda: ok.plan(torch.nn.Conv2d(3, 4, 1), ok.feasible), TypeError, "relax must be a policy"),
        (lambda: ok.ranks(["a"]), TypeError, "mapping from layer name"),
        (lambda: ok.piecewise(0.1), TypeError, "mapping from step"),
        (lambda: ok.welch_bound(5, 0), ValueError, "n must be an integer"),
        (lambda: ok.spectral_restricted_isometry(torch.eye(3), start=torch.ones(4)), ValueError, "vector of 3 numbers"),
        (lambda: ok.report(3), TypeError, "expected a torch.nn.Module or a state dict"),
        (lambda: ok.Disentangled(relax=ok.ranks({"a": 1}))(ok.kernel_of(torch.eye(3))), ValueError, "through a Regularizer"),
    ],
)
def test_bad_options(unchecked, make, error, message):
    with pytest.raises(error, match=message):
        make()
