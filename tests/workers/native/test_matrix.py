"""Linear products with packed weights: near plain ones, and to the bit alone and in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, team
from workers.native.matrix import Matrix

SHAPES = [(1, 1), (32, 64), (33, 17), (70, 130), (520, 48)]
"""[out, in]; few are multiples of anything."""
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_near_plain_ones_and_rows_their_own(
    name: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    weight = random(*shape, dtype=dtype, seed=1)
    bias = random(shape[0], dtype=dtype, seed=2) if has_bias else None
    rows = random(150, shape[1], dtype=dtype, seed=3)
    expected = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    limit = 1e-5 if dtype == torch.float32 else 0.01
    for num_threads in (1, 3):
        matrix = Matrix(team(name, num_threads), weight, bias)
        found = matrix.multiply(rows)
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= limit * (1 + expected.abs())).all()
        if num_threads == 1:
            whole = found
        assert torch.equal(found, whole)
        for first, count in ((0, 1), (3, 2), (5, 7), (0, 9), (11, 64), (20, 65)):
            part = matrix.multiply(rows[first : first + count])
            assert torch.equal(part, whole[first : first + count]), (first, count)
    assert len(matrix.multiply(rows[:0])) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_can_be_read_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random(*shape, dtype=dtype, seed=4)
    matrix = Matrix(team(NAMES[0]), weight)
    assert torch.equal(matrix.weight(), weight)
    indices = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(matrix.rows(indices), weight[indices])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_has_the_same_bits_on_all_instruction_sets(shape: tuple[int, int]) -> None:
    weight = random(*shape, dtype=torch.float32, seed=5)
    rows = random(9, shape[1], dtype=torch.float32, seed=6)
    found = [Matrix(team(name), weight).multiply(rows) for name in NAMES]
    assert all(torch.equal(other, found[0]) for other in found[1:])
