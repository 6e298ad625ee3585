"""Best tokens and finiteness, from the bits of logits, as torch finds them from the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.sampling.best_tokens import best_tokens, finite_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY, NAN = float("inf"), float("nan")


def lowest_best(logits: Tensor) -> list[int]:
    """The first of the best in each row."""
    return [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, -100.0, 100.0])
def test_the_best_token_is_the_first_of_the_largest(dtype: torch.dtype, shift: float) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = (torch.randn(50, 301, generator=draw) + shift).to(dtype)  # ties, once rounded
    assert best_tokens(logits).tolist() == lowest_best(logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_equal(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0], [-2.0, -1.0, -1.0]], dtype=dtype)
    assert best_tokens(logits).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_are_never_best(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-INFINITY, -3.0, -INFINITY], [-INFINITY, 3.0, 2.0]], dtype=dtype)
    assert best_tokens(logits).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, -NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("others", [-5.0, 0.0, 5.0])
def test_one_bad_logit_makes_its_row_not_finite(
    dtype: torch.dtype, bad: float, others: float
) -> None:
    logits = torch.full((3, 100), others, dtype=dtype)
    logits[1, 70] = bad
    assert finite_rows(logits).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, 0.0], [-largest, 0.0]], dtype=dtype)
    assert finite_rows(logits).tolist() == [True, True]


def test_logits_may_be_a_view() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    assert best_tokens(logits[::2, ::3]).tolist() == lowest_best(logits[::2, ::3])
    assert finite_rows(logits[0].expand(3, -1)).tolist() == [True, True, True]
