"""Weighted sums of expert outputs over the (row, expert slot) pairs of each row.

Reference: ``workers.model.weighting``.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import cast, jit, rounded

_SUM_WIDTH = 1024


def sum_rows(
    outputs: Tensor, slots: Tensor, weights: Tensor, rounds_products: bool, dtype: torch.dtype
) -> Tensor:
    """Return the weighted sum of each row's expert outputs, in slot order and in float32.

    outputs [T * k, out], one per slot; slots [T, k] integers, -1 for none (not summed); weights
    [T, k] of any floating-point dtype. Returns [T, out] ``dtype``. ``rounds_products``: weights,
    and then products of weight and output, are rounded to the dtype of ``outputs``.
    """
    num_rows, top_k = slots.shape
    width = outputs.shape[1]
    out = outputs.new_empty(num_rows, width, dtype=dtype)
    _sum_rows[(num_rows, triton.cdiv(width, _SUM_WIDTH))](
        outputs,
        slots,
        weights,
        out,
        slots.stride(0),
        weights.stride(0),
        TOP_K=top_k,
        WIDTH=width,
        ROUNDS=rounds_products,
        TILE=_SUM_WIDTH,
        enable_fp_fusion=False,  # a product is rounded, as in torch
    )
    return out


@partial(jit, any_alignment=["slots", "weights"])
def _sum_rows(
    outputs: tl.pointer_type,
    slots: tl.pointer_type,
    weights: tl.pointer_type,
    out: tl.pointer_type,
    slots_stride: tl.tensor,
    weights_stride: tl.tensor,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Sum ``TILE`` elements of one row's expert outputs, with weights, in each program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    for place in range(TOP_K):
        if tl.load(slots + row * slots_stride + place) >= 0:
            address = outputs + (row * TOP_K + place) * WIDTH + columns
            x = tl.load(address, mask=columns < WIDTH, other=0.0).to(tl.float32)
            factor = tl.load(weights + row * weights_stride + place).to(tl.float32)
            if ROUNDS:
                dtype = outputs.dtype.element_ty
                total += rounded(x * rounded(factor, dtype), dtype)
            else:
                total += x * factor
    tl.store(out + row * WIDTH + columns, cast(total, out.dtype.element_ty), mask=columns < WIDTH)
