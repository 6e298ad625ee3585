"""Attention of chunks of prompts over blocks of the KV cache, read in place.

The kernel serves chunks that attend to keys of earlier steps, and sliding windows. The keys of a
shared prefix are not copied. Reference: ``workers.model.attention``.

Source: "FlashAttention-2" (Dao, 2023); here each tile of keys is read from blocks of the cache.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.cache_rows import load_rows
from workers.cuda.triton_common import LOG2_E, MIN_DOT, cast, dot, jit, power_of_two


def prefill(
    queries: Tensor,
    cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    first_rows: Tensor,
    max_rows: int,
    window: int | None,
    out: Tensor,
    skips_whole: bool = False,
    sinks: Tensor | None = None,
) -> None:
    """Attend with the last rows of sequences; each row attends to the keys up to its own.

    queries, out [T, A, D], all rows of a batch; cache [2 * K, num_blocks, block_size, D], keys
    before values; tables [n, max_blocks] int32: blocks of each sequence; lengths [n] int32: number
    of keys of each sequence, including the keys of its rows; first_rows [n + 1] int32: first row of
    each sequence; ``max_rows``: maximum number of rows of a sequence. ``window``: number of last
    keys that a row attends to, its own included; None: all. ``skips_whole``: write nothing for
    sequences that have only the keys of their rows. sinks [A] float32: score of the attention sink
    of each head.
    """
    num_heads, dim = queries.shape[1:]
    num_kv_heads, block_size = cache.shape[0] // 2, cache.shape[2]
    is_half = queries.itemsize < 4
    rows = 64 if is_half else 32
    _prefill[(triton.cdiv(max_rows, rows), num_heads, lengths.shape[0])](
        queries,
        cache,
        tables,
        lengths,
        first_rows,
        out,
        lengths if sinks is None else sinks,
        dim**-0.5 * LOG2_E.value,
        cache.shape[1] * block_size,
        tables.stride(0),
        window or 0,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        SKIPS_WHOLE=skips_whole,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        DIM=dim,
        DIM_TILE=max(power_of_two(dim), MIN_DOT),
        ROWS=rows,
        KEYS=64 if is_half else 32,
        ROW=cache.shape[3],
        num_warps=4,
        num_stages=2,
    )


@partial(jit, any_alignment=["tables", "lengths", "first_rows", "sinks"])
def _prefill(
    queries: tl.pointer_type,
    cache: tl.pointer_type,
    tables: tl.pointer_type,
    lengths: tl.pointer_type,
    first_rows: tl.pointer_type,
    out: tl.pointer_type,
    sinks: tl.pointer_type,
    scale: tl.tensor,
    num_slots: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SKIPS_WHOLE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """Compute ``ROWS`` rows of a sequence and one query head in each program. Programs of the last
    rows, which attend to the most keys, run first."""
    tl.static_assert(ROW == DIM or BLOCK_SIZE % 4 == 0)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, entry = tl.program_id(1), tl.program_id(2)
    first_row = tl.load(first_rows + entry)
    count = tl.load(first_rows + entry + 1) - first_row
    length = tl.load(lengths + entry)
    is_done = tile * ROWS >= count
    if SKIPS_WHOLE:
        is_done = is_done | (length == count)
    if is_done:
        return
    rows = tile * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, DIM_TILE)
    is_row, is_place = rows < count, place < DIM
    target = ((first_row + rows).to(tl.int64) * NUM_HEADS + head)[:, None] * DIM + place[None, :]
    is_inside = is_row[:, None] & is_place[None, :]
    q = tl.load(queries + target, mask=is_inside, other=0.0)
    kv_head = (head // (NUM_HEADS // NUM_KV_HEADS)).to(tl.int64)
    keys = cache + kv_head * num_slots * ROW
    values = keys + NUM_KV_HEADS * num_slots.to(tl.int64) * ROW
    table = tables + entry.to(tl.int64) * table_stride

    positions = length - count + rows
    end = tl.minimum(length - count + (tile + 1) * ROWS, length)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - count + tile * ROWS + 1 - window, 0) // KEYS * KEYS
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    total = tl.zeros([ROWS, DIM_TILE], dtype=tl.float32)
    if HAS_SINKS:
        highest = tl.zeros([ROWS], dtype=tl.float32) + tl.load(sinks + head) * LOG2_E
        weight += 1.0
    for start in range(begin, end, KEYS):
        own = start + tl.arange(0, KEYS)
        has_key = own < end
        block = tl.load(table + own // BLOCK_SIZE, mask=has_key, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + own % BLOCK_SIZE
        k = load_rows(keys, slot, own, has_key, q.dtype, True, DIM, DIM_TILE, ROW)
        scores = dot(q, k, tl.zeros([ROWS, KEYS], dtype=tl.float32)) * scale
        is_seen = own[None, :] <= positions[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (own[None, :] > positions[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        known = tl.where(higher == float("-inf"), 0.0, higher)  # no key of the row's window yet
        weights = tl.exp2(scores - known[:, None])
        kept = tl.exp2(highest - known)
        v = load_rows(values, slot, own, has_key, q.dtype, False, DIM, DIM_TILE, ROW)
        total = dot(cast(weights, v.dtype), v, total * kept[:, None])
        weight = weight * kept + tl.sum(weights, 1)
        highest = higher
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]  # beyond the last row
    result = cast(total, out.dtype.element_ty)
    tl.store(out + target, result, mask=is_inside)
