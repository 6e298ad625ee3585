"""The weighted sum: dtypes of the product, order of the additions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.model.weighting import sum_by_position, weighted_sum


def in_a_loop(
    outputs: Tensor, weights: Tensor, pair_row: Tensor, num_rows: int, float32_weights: bool
) -> Tensor:
    """Pair after pair, as the definition says."""
    total = torch.zeros(num_rows, outputs.shape[1])
    for output, weight, row in zip(outputs, weights, pair_row.tolist(), strict=True):
        factor = weight if float32_weights else weight.to(outputs.dtype)
        product = output.float() * factor if float32_weights else output * factor
        total[row] = total[row] + product.float()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("float32_weights", [False, True])
@pytest.mark.parametrize("top_k", [1, 8, 20])
def test_equals_the_definition_bit_for_bit(
    dtype: torch.dtype, float32_weights: bool, top_k: int
) -> None:
    torch.manual_seed(0)
    outputs = (10 * torch.randn(30 * top_k, 24)).to(dtype)
    weights = torch.rand(30 * top_k)
    rows = torch.randint(0, 40, (30 * top_k,)).sort().values
    got = weighted_sum(outputs, weights, rows, 40, float32_weights)
    assert got.dtype == torch.float32
    assert torch.equal(got, in_a_loop(outputs, weights, rows, 40, float32_weights))


def test_the_way_of_other_devices_adds_in_the_same_order() -> None:
    torch.manual_seed(1)
    products = 10 * torch.randn(100, 16)
    rows = torch.randint(0, 20, (100,)).sort().values
    expected = torch.zeros(20, 16).index_add_(0, rows, products)
    assert torch.equal(sum_by_position(products, rows, 20), expected)


def test_rows_without_pairs_are_zero() -> None:
    empty = weighted_sum(torch.empty(0, 4), torch.empty(0), torch.empty(0).long(), 3, False)
    assert torch.equal(empty, torch.zeros(3, 4))
    assert sum_by_position(torch.empty(0, 4), torch.empty(0).long(), 0).shape == (0, 4)


def test_a_sum_is_never_negative_zero() -> None:
    """So that adding a rank's zeros changes no bit: static and exact split stay equal."""
    outputs = torch.tensor([[-0.0], [1.0], [-1.0]])
    total = weighted_sum(outputs, torch.ones(3), torch.tensor([0, 1, 1]), 2, False)
    assert not torch.signbit(total).any()
