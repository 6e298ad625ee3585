"""Weighted sum over a token's experts: one function for all dispatchers.

The order of additions affects the bits of the result, so it is fixed: sums start from zero in
float32 and add pair after pair (row, slot) in the given order, which is always row-major.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PIECE_PAIRS = 512
"""Maximum number of (row, expert) pairs that are multiplied at a time: page faults make large new
tensors slow. 1024 rows of 512 bfloat16, top-8, on one core of an AMD EPYC take 9 ms at once and
3 ms in pieces."""


def weighted_sum(
    outputs: Tensor,
    weights: Tensor,
    pair_row: Tensor,
    num_rows: int,
    float32_weights: bool,
) -> Tensor:
    """Return the sum of weight x expert output over the (row, expert) pairs of each row.

    outputs [P, D] model dtype, weights [P] float32; pair_row [P] int64, not decreasing: row of each
    pair. Returns [num_rows, D] float32, with zeros for a row without pairs. Products have the
    promoted dtype of both factors; weights are cast to the model dtype first unless
    ``float32_weights``.
    """
    num_pairs, width = outputs.shape
    factors = (weights if float32_weights else weights.to(outputs.dtype)).unsqueeze(1)
    if outputs.is_cpu:
        total = torch.zeros(num_rows, width)
        if num_pairs <= _PIECE_PAIRS:
            return total.index_add_(0, pair_row, (outputs * factors).float())
        for first in range(0, num_pairs, _PIECE_PAIRS):
            piece = slice(first, first + _PIECE_PAIRS)
            total.index_add_(0, pair_row[piece], (outputs[piece] * factors[piece]).float())
        return total
    products = (outputs * factors).float()
    return sum_by_position(products, pair_row, num_rows)


def sum_of_pairs(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Tensor,
    slots: Tensor,
    weights: Tensor,
    *,
    per_slot_input: bool,
    float32_weights: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the expert outputs of all (row, expert) pairs, then the weighted sum of each row.

    Implements ``ExpertBank.compute_rows``, which describes the arguments, with
    ``compute(inputs, pair_input, pair_slot)``: ``ExpertBank.compute`` for one exchange.
    """
    top_k = slots.shape[1]
    flat = slots.flatten()
    pairs = (flat >= 0).nonzero().squeeze(1)  # device-to-host sync
    rows = pairs // top_k
    sources = rows
    if per_slot_input:
        sources = (
            pairs if len(inputs) == len(flat) else torch.arange(len(pairs), device=pairs.device)
        )
    outputs = compute(inputs, sources, flat[pairs].long())
    own = weights.flatten()[pairs]
    return weighted_sum(outputs, own, rows, len(slots), float32_weights).to(dtype)


def sum_by_position(products: Tensor, pair_row: Tensor, num_rows: int) -> Tensor:
    """Sum products [P, D] by row: [num_rows, D] float32. Adds in the fixed order of
    ``weighted_sum``, on devices where ``index_add_`` has no fixed order. ``pair_row`` [P]: row of
    each product, not decreasing."""
    total = torch.zeros(num_rows, products.shape[1], device=products.device)
    counts = torch.bincount(pair_row, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    for position in range(int(counts.max()) if num_rows else 0):  # device-to-host sync
        rows = (counts > position).nonzero().squeeze(1)
        total[rows] += products[starts[rows] + position]
    return total
