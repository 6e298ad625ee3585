"""Root mean square norms of rows, with an optional addition before, in one kernel.

Reference: ``workers.model.layers.rms_norm``, with the same roundings.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import cast, jit, power_of_two, rounded

_WARPS = 8


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [T, H], whose rows must be contiguous; weight [H]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, x, out, eps, is_sum=False)
    return out


def sum_and_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + other, each [T, H] and contiguous, and the RMS norm of the sum; weight [H]."""
    assert x.is_contiguous()
    assert other.is_contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, other, weight, total, out, eps, is_sum=True)
    return total, out


def _launch(
    x: Tensor,
    other: Tensor,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    eps: float,
    is_sum: bool,
) -> None:
    if len(x):
        width = x.shape[1]
        _norm[(len(x),)](
            x,
            other,
            weight,
            total,
            out,
            x.stride(0),
            eps,
            WIDTH=width,
            TILE=power_of_two(width),
            IS_SUM=is_sum,
            num_warps=_WARPS,
        )


@partial(jit, any_alignment=["x", "other", "weight", "total"])
def _norm(
    x: tl.pointer_type,
    other: tl.pointer_type,
    weight: tl.pointer_type,
    total: tl.pointer_type,
    out: tl.pointer_type,
    stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_SUM: tl.constexpr,
) -> None:
    """Compute the norm of one row in each program; with ``IS_SUM``, add ``other`` first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    is_column = columns < WIDTH
    dtype: tl.constexpr = out.dtype.element_ty
    numbers = tl.load(x + row * stride + columns, mask=is_column, other=0.0).to(tl.float32)
    if IS_SUM:
        more = tl.load(other + row * stride + columns, mask=is_column, other=0.0)
        numbers = rounded(numbers + more.to(tl.float32), dtype)
        tl.store(total + row * WIDTH + columns, cast(numbers, dtype), mask=is_column)
    factor = tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
    scale = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    result = rounded(numbers * factor, dtype) * scale
    tl.store(out + row * WIDTH + columns, cast(result, dtype), mask=is_column)
