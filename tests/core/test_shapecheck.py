"""The checker that the other tests run under: what it remembers hides nothing."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from shapecheck import check, lightly


@lightly(typechecker=check)
def product(a: Float[Tensor, "o n"], b: Float[Tensor, "n m"], wrong: object = None) -> Float[Tensor, "o m"]:
    return a @ b if wrong is None else wrong


@lightly(typechecker=check)
def total(numbers: list[int], matrices: tuple[Float[Tensor, "o n"], ...] = ()) -> int:
    return sum(numbers)


@lightly(typechecker=check)
def length(name: str) -> int:
    return len(name) if name else None


def test_shapes_are_checked_after_a_call_that_passed():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    for _ in range(3):
        assert product(a, b).shape == (2, 4)
        for arguments in [(a, a), (a, b.long()), (a, b[0]), (a, None)]:
            with pytest.raises(TypeError):
                product(*arguments)


def test_results_are_checked_of_arguments_that_passed():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    for _ in range(3):
        assert product(a, b, torch.ones(2, 4)).shape == (2, 4)
        for wrong in [torch.ones(4, 2), torch.ones(2, 4).int(), "none"]:
            with pytest.raises(TypeError):
                product(a, b, wrong)


def test_lists_are_checked_at_every_call():
    for _ in range(3):
        assert total([1, 2]) == 3
        with pytest.raises(TypeError):
            total(["1"])
        with pytest.raises(TypeError):
            total([1], matrices=(torch.ones(2),))


def test_functions_without_shapes_are_checked():
    assert length("name") == 4
    for wrong in [4, ""]:
        with pytest.raises(TypeError):
            length(wrong)


def test_functions_within_functions_share_what_passed():
    def outer(dtype):
        @lightly(typechecker=check)
        def inner(x: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
            return x.sum().to(dtype)

        return inner

    for _ in range(2):
        assert outer(torch.float32)(torch.ones(2, 2)) == 4
        with pytest.raises(TypeError):
            outer(torch.int32)(torch.ones(2, 2))
        with pytest.raises(TypeError):
            outer(torch.float32)(torch.ones(2, 3))
