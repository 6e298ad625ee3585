"""One kernel for the operators between the projections and attention: norms, clip, rotation, and
the write to the KV cache.

With few rows, the launches of separate kernels for these operators would dominate the time.
Reference: ``attend_rows`` of ``TorchAttentionSublayer`` in ``workers.model.attention_sublayer``,
with the same roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import triton.language as tl
from torch import Tensor

from workers.cuda.cache_rows import store_rows
from workers.cuda.triton_common import jit, power_of_two, rounded

HeadNorm = Literal["none", "head", "width"]
"""Kind of norm of queries and keys: none, one for each head, or one over all heads of a row."""
_WARPS = 8


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of the rows of a step, ready for attention. All are contiguous."""

    queries: Tensor
    """Rotated queries, [T, A, D]."""
    keys_values: Tensor
    """Rotated keys, then values, [T, 2 * K, D]."""


def prepare_heads(
    rows: Tensor,
    num_heads: int,
    weight: Tensor | None,
    eps: float,
    clip: float | None,
    waves: tuple[Tensor, Tensor],
    cache: Tensor,
    slot_mapping: Tensor,
) -> Heads:
    """Norm, clip and rotate projected rows, and write keys and values to the cache.

    rows [T, (A + 2K) * D]: queries, keys, values. ``num_heads``: A. ``weight`` of the norm of
    queries and keys: [A + K, D] for one norm per head, [(A + K) * D] for one over all heads, or
    None. ``clip``: limit of absolute values after the norms. ``waves``: cosines and signed sines
    [T, 1, D], see ``Rope.rows``. cache [2 * K, num_blocks, block_size, D], or with rows of
    ``workers.model.fp8``. slot_mapping [T] int64: cache slot of each row.
    """
    cos, sin = waves
    num_rows, dim = len(rows), cos.shape[-1]
    num_kv_heads = (rows.shape[1] // dim - num_heads) // 2
    norm: HeadNorm = "none" if weight is None else "head" if weight.dim() == 2 else "width"
    queries = rows.new_empty(num_rows, num_heads, dim)
    keys_values = rows.new_empty(num_rows, 2 * num_kv_heads, dim)
    if num_rows:
        _prepare[(num_rows, 3)](
            rows,
            rows if weight is None else weight,
            cos,
            sin,
            slot_mapping,
            queries,
            keys_values,
            cache,
            rows.stride(0),
            cos.stride(0),
            cache.shape[1] * cache.shape[2],
            eps,
            0.0 if clip is None else clip,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            DIM=dim,
            HEAD_TILE=power_of_two(max(num_heads, num_kv_heads)),
            DIM_TILE=power_of_two(dim),
            NORM=norm,
            HAS_CLIP=clip is not None,
            ROW=cache.shape[3],
            num_warps=_WARPS,
            enable_fp_fusion=False,  # products are rounded, as in torch
        )
    return Heads(queries, keys_values)


@partial(jit, any_alignment=["rows", "weight", "cos", "sin", "slots"])
def _prepare(
    rows: tl.pointer_type,
    weight: tl.pointer_type,
    cos: tl.pointer_type,
    sin: tl.pointer_type,
    slots: tl.pointer_type,
    queries: tl.pointer_type,
    keys_values: tl.pointer_type,
    cache: tl.pointer_type,
    rows_stride: tl.tensor,
    waves_stride: tl.tensor,
    cache_rows: tl.tensor,
    eps: tl.tensor,
    limit: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """Norm, clip, rotate and store the queries, the keys or the values of one row in each
    program."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = rows.dtype.element_ty
    heads = tl.arange(0, HEAD_TILE)[:, None]
    columns = tl.arange(0, DIM_TILE)[None, :]
    count = tl.where(part == 0, NUM_HEADS, NUM_KV_HEADS)
    first = tl.where(part == 0, 0, NUM_HEADS + (part - 1) * NUM_KV_HEADS)
    is_there = (heads < count) & (columns < DIM)
    places = (first + heads) * DIM + columns
    own = rows + row * rows_stride
    x = tl.load(own + places, mask=is_there, other=0.0).to(tl.float32)
    if part < 2:
        # Rotation pairs each element with the one half a head away.
        swapped_columns = (columns + DIM // 2) % DIM
        swapped_places = (first + heads) * DIM + swapped_columns
        swapped = tl.load(own + swapped_places, mask=is_there, other=0.0).to(tl.float32)
        if NORM != "none":
            squares = tl.sum(x * x, 1)[:, None]
            size = DIM
            if NORM == "width":
                squares = tl.sum(squares, 0)[:, None]
                size = DIM * count
            factor = tl.rsqrt(squares / size + eps)
            scale = tl.load(weight + places, mask=is_there, other=0.0).to(tl.float32)
            x = rounded(rounded(x * factor, dtype) * scale, dtype)
            scale = tl.load(weight + swapped_places, mask=is_there, other=0.0).to(tl.float32)
            swapped = rounded(rounded(swapped * factor, dtype) * scale, dtype)
        if HAS_CLIP:
            x, swapped = _clipped(x, limit, dtype), _clipped(swapped, limit, dtype)
        is_column = columns < DIM
        cosines = tl.load(cos + row * waves_stride + columns, mask=is_column, other=0.0)
        sines = tl.load(sin + row * waves_stride + columns, mask=is_column, other=0.0)
        x = rounded(x * cosines.to(tl.float32), dtype)
        x += rounded(swapped * sines.to(tl.float32), dtype)
    elif HAS_CLIP:
        x = _clipped(x, limit, dtype)
    x = rounded(x, dtype)
    if part == 0:
        target = queries + row * (NUM_HEADS * DIM) + heads * DIM + columns
        tl.store(target, x.to(dtype), mask=is_there)
    else:
        own_heads = (part - 1) * NUM_KV_HEADS + heads
        target = keys_values + row * (2 * NUM_KV_HEADS * DIM) + own_heads * DIM + columns
        tl.store(target, x.to(dtype), mask=is_there)
        slot = tl.load(slots + row)
        cache_row = cache + (own_heads.to(tl.int64) * cache_rows + slot) * ROW
        store_rows(cache_row, x, columns, heads < count, DIM, ROW)


@jit
def _clipped(x: tl.tensor, limit: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Clip x to the range -``limit`` to ``limit``; NaN stays NaN."""
    x = tl.where(x > limit, limit, x)
    return rounded(tl.where(x < -limit, -limit, x), dtype)
