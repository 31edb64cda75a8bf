"""The contract of every penalty, and the properties that the mathematics promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import orthokit as ok
from cases import CASES
from orthokit.penalties import disentangled
from orthokit.testing import check_penalty

KERNELS = [(6, 9), (9, 4), (5, 5), (16, 4)]


def matrix(o, n, seed=0, dtype=torch.float64):
    return torch.randn(o, n, generator=torch.Generator().manual_seed(seed), dtype=dtype) / n**0.5


@pytest.mark.filterwarnings("ignore:form='pairs'")
@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.penalty))
def test_contract(case):
    check_penalty(case.penalty, reference=case.reference, minimum=case.minimum, invariances=case.invariances)


def test_every_penalty_has_a_case():
    assert {type(case.penalty) for case in CASES} == set(ok.PENALTIES)


@pytest.mark.parametrize("penalty", [kind() for kind in ok.PENALTIES])
def test_penalties_are_values(penalty):
    assert penalty == type(penalty)()
    assert hash(penalty) == hash(type(penalty)())
    assert repr(penalty) == f"{type(penalty).__name__}()"
    with pytest.raises(AttributeError):
        penalty.squared = None


RECORDED = json.loads((Path(__file__).parents[1] / "recorded.json").read_text())


FUNCTIONS = {
    "SO": ok.soft_orthogonality,
    "DSO": ok.double_soft_orthogonality,
    "MC": ok.mutual_coherence,
    "SRIP": ok.spectral_restricted_isometry,
    "OffDiagonal": ok.off_diagonal_orthogonality,
    "GOR": ok.group_orthogonality,
    "EADK": ok.angular_dispersion,
    "ConvOrth": ok.convolution_orthogonality,
    "Lorth": ok.lorth,
    "EADC": ok.convolution_angular_dispersion,
}


@pytest.mark.parametrize("entry", RECORDED, ids=lambda e: f"{e['repository']}:{e['file']}:{e['method']}:{e['option']}")
def test_values_of_public_implementations(entry):
    """Numbers recorded from public code, with our option that computes the same; see tests/recorded.md."""
    for shape, recorded in entry["values"].items():
        size = [int(part) for part in shape.split("x")]
        k = torch.arange(int(np.prod(size)), dtype=torch.float64)
        weight = (0.2 * torch.sin(0.7 * k + 0.013 * k**2 + 0.3)).reshape(size).requires_grad_()
        options = dict(entry["option"])
        if "stride" in options:
            measured, options["stride"] = weight, (options["stride"],) * 2
        else:
            measured = weight.flatten(1)
        if options.pop("transposed", False):
            measured = measured.mT
        if "m" in recorded:
            options["start"] = torch.cos(1.3 * torch.arange(recorded["m"], dtype=torch.float64) + 0.1)
        value = entry["factor"] * FUNCTIONS[entry["method"]](measured, **options)
        tolerance = entry.get("tolerance", 1e-9)
        if recorded["value"] is not None:
            assert value.item() == pytest.approx(recorded["value"], rel=tolerance, abs=1e-9)
        if "grad_norm" in recorded:
            # The one published SRIP with an exact spectral norm: our power iteration's gradient converges more slowly.
            tolerance = 1e-5 if options.get("steps", 0) >= 100 else 1e-9
            (gradient,) = torch.autograd.grad(value, weight)
            assert gradient.norm().item() == pytest.approx(recorded["grad_norm"], rel=tolerance, abs=tolerance)
            assert gradient.flatten()[5].item() == pytest.approx(recorded["grad5"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("o", "n"), KERNELS)
def test_lengths_and_directions_are_disentangled(o, n):
    k = matrix(o, n).requires_grad_()
    (of_lengths,) = torch.autograd.grad(ok.disentangled_orthogonality(k, weights=(1.0, 0.0)), k)
    (of_directions,) = torch.autograd.grad(ok.disentangled_orthogonality(k, weights=(0.0, 1.0)), k)
    u = torch.nn.functional.normalize(k.detach(), dim=-1)
    across = of_lengths - (of_lengths * u).sum(-1, keepdim=True) * u
    along = (of_directions * u).sum(-1)
    assert across.abs().max() < 1e-10
    assert along.abs().max() < 1e-10


@pytest.mark.parametrize("o", [16, 64, 256])
def test_pull_is_the_same_for_layers_of_any_size(o):
    k = torch.nn.functional.normalize(matrix(o, 4 * o), dim=-1).requires_grad_()
    (directions,) = torch.autograd.grad(ok.disentangled_orthogonality(k, weights=(0.0, 1.0)), k)
    assert directions.norm().item() == pytest.approx(2**0.5, rel=0.4)
    k = (1.01 * k.detach()).requires_grad_()
    (lengths,) = torch.autograd.grad(ok.disentangled_orthogonality(k, weights=(1.0, 0.0)), k)
    assert lengths.norm().item() == pytest.approx(2 * 1.01)


@pytest.mark.parametrize("form", ["pairs", "welch", "budget"])
@pytest.mark.parametrize(("o", "n"), KERNELS)
def test_every_form_is_strict_at_full_rank(form, o, n):
    k = matrix(o, n)
    assert torch.equal(ok.disentangled_orthogonality(k, o, form=form), ok.disentangled_orthogonality(k))
    per_kernel = ok.disentangled_orthogonality(k[None], torch.tensor([o]), form=form)
    assert torch.allclose(per_kernel, ok.disentangled_orthogonality(k))


@pytest.mark.parametrize("form", ["pairs", "welch", "budget"])
@pytest.mark.parametrize("count", ["expected", "fewest"])
def test_one_rank_per_kernel_of_a_stack(form, count):
    k = torch.stack([matrix(8, 12, seed) for seed in range(3)])
    together = ok.disentangled_orthogonality(k, torch.tensor([2, 5, 8]), form=form, count=count)
    alone = [ok.disentangled_orthogonality(m, r, form=form, count=count) for m, r in zip(k, [2, 5, 8], strict=True)]
    assert torch.allclose(together, torch.stack(alone))


def test_ties_free_the_earlier_pair():
    # Unit filters in the plane: c_10 = 0, c_20 = c_21 = .7071. One pair is free: (2, 0), so only filters 1 and 2 are pushed.
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]], dtype=torch.float64, requires_grad=True)
    assert ok.cardinality(3, 2) == 1
    (gradient,) = torch.autograd.grad(ok.disentangled_orthogonality(k, 2, weights=(0.0, 1.0)), k)
    assert gradient[0].abs().max() == 0
    assert gradient[1].norm() > 0.1


@pytest.mark.parametrize("kind", ["random", "periodic", "equal", "copies", "few"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.1, 0.9, 1.0])
def test_the_largest_are_found_as_by_sorting(kind, share):
    """Of many, by way of a sample; of several equal ones the earlier."""
    o, pairs = 300, 300 * 299 // 2
    c = matrix(o, o).tril(-1)
    if kind == "periodic":
        c = torch.arange(o * o, dtype=torch.float64).remainder(64).reshape(o, o).tril(-1)
    elif kind == "equal":
        c = torch.ones(o, o, dtype=torch.float64).tril(-1)
    elif kind == "copies":
        c = c.clamp(-0.01, 0.01)
    elif kind == "few":
        c[2:] = 0
    count = round(share * pairs)
    rows, columns = torch.tril_indices(o, o, offset=-1)
    freed = c.abs()[rows, columns].argsort(descending=True, stable=True)[:count]
    expected = c.clone()
    expected[rows[freed], columns[freed]] = 0
    assert torch.equal(disentangled._without_largest(c + c.mT, count), expected + expected.mT)
    both = disentangled._without_largest(torch.stack([c + c.mT] * 2), torch.tensor([count, 3]))
    assert torch.equal(both[0], expected + expected.mT)
    assert torch.equal(both[1], disentangled._without_largest(c + c.mT, 3))


def test_free_pairs_get_no_gradient_and_rank_one_frees_all():
    k = matrix(6, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(ok.disentangled_orthogonality(k, 1, weights=(0.0, 1.0)), k)
    assert gradient.abs().max() == 0


# Not welch at r = n < o: its value is zero only at equiangular tight frames, which need not exist.
@pytest.mark.parametrize(
    ("form", "o", "n", "r"),
    [(form, *shape) for form in ("welch", "budget") for shape in [(12, 20, 6), (12, 20, 3), (8, 8, 4), (16, 8, 4)]]
    + [("budget", 16, 8, 8)],
)
def test_zero_of_welch_and_budget_implies_the_rank(form, o, n, r):
    # Five kernels whose filters share a direction, so that there is something to minimise.
    k = torch.stack([matrix(o, n, seed) + 2 * matrix(1, n, 100 + seed) for seed in range(5)]).requires_grad_()
    start = ok.disentangled_orthogonality(k, r, form=form, weights=(0.0, 1.0))
    assert (start > 0.1).all()
    # Half of Polyak's steps to the value 0; a kernel that is there stays, so that it is not far beyond the bound.
    for _ in range(100):
        value = ok.disentangled_orthogonality(k, r, form=form, weights=(0.0, 1.0))
        (gradient,) = torch.autograd.grad(value.sum(), k)
        half = 0.5 * value.detach() / gradient.square().sum((-2, -1)).clamp(min=1e-20)
        k = (k.detach() - torch.where(value < 1e-3, 0, half)[:, None, None] * gradient).requires_grad_()
    assert (value < 1e-3).all()
    u = torch.nn.functional.normalize(k.detach(), dim=-1)
    assert (o**2 / torch.linalg.matrix_norm(u @ u.mT) ** 2 >= r * (1 - 1e-3)).all()
    assert (torch.linalg.matrix_rank(u, tol=1e-3) >= r).all()


def test_srip_reaches_the_spectral_norm():
    k = matrix(6, 20)
    exact = np.linalg.norm((k @ k.T - torch.eye(6)).numpy(), 2)
    lower = [ok.spectral_restricted_isometry(k, steps=steps).item() for steps in (1, 2, 5, 500)]
    assert lower == sorted(lower)
    assert lower[-1] == pytest.approx(exact, rel=1e-6)


def test_srip_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    ok.spectral_restricted_isometry(matrix(31, 37))
    assert torch.equal(state, torch.get_rng_state())


def test_a_kernel_of_rank_zero_batch_is_a_plain_matrix():
    for case in CASES:
        kernel = ok.kernel_of(nn.Linear(9, 5).double())
        many = kernel.weight.detach().expand(2, 3, 1, 5, 9)
        if "relax" not in repr(case.penalty) or "share" not in repr(case.penalty):
            assert case.penalty(ok.Kernel(many)).shape == (2, 3, 1)


def test_options_without_effect_are_said(unchecked):
    with pytest.warns(UserWarning, match="form='welch' does nothing without relax="):
        ok.Disentangled(form="welch")
    with pytest.warns(UserWarning, match="count='fewest' does nothing here"):
        ok.Disentangled(relax=ok.feasible(), form="budget", count="fewest")
    assert ok.Disentangled(weights=[1, 2]) == ok.Disentangled(weights=(1, 2))
