"""Attention of single rows over blocks of the KV cache, read in place.

The keys of a row are split among several programs, because one program per row and head would not
fill a GPU; a second kernel combines their results. The number of splits depends on shapes alone, so
that a CUDA graph can capture the launch. Reference: ``workers.model.attention``.

Source: "Flash-Decoding for long-context inference" (Dao et al., 2023).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.cache_rows import load_rows
from workers.cuda.triton_common import LOG2_E, MIN_DOT, cast, dot, jit, power_of_two

_ENOUGH_PROGRAMS = 528
"""Number of kernel programs that fill a GPU: four for each multiprocessor of an H100."""
_MIN_SPLIT_KEYS, _MAX_SPLITS = 256, 64


def num_splits(num_rows: int, num_kv_heads: int, max_length: int) -> int:
    """Return the number of programs that share the keys of one row and head: a power of two,
    because the kernel is compiled for each number."""
    wanted = triton.cdiv(_ENOUGH_PROGRAMS, num_rows * num_kv_heads)
    useful = triton.cdiv(max_length, _MIN_SPLIT_KEYS)
    return power_of_two(min(wanted, useful, _MAX_SPLITS))


def decode(
    queries: Tensor,
    cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None,
    out: Tensor,
    splits: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Compute attention of one row per sequence over the blocks of the KV cache; write it to
    ``out``.

    queries, out [rows, A, D]; cache [2 * K, num_blocks, block_size, D], keys before values, or with
    rows of ``workers.model.fp8``; tables [rows, max_blocks] int32: blocks of each row's sequence;
    lengths [rows] int32: number of keys of each row, including the row's own key. The output of a
    row without keys is zeros. ``window``: number of last keys that a row attends to; None: all.
    ``splits`` None: see ``num_splits``. sinks [A] float32: score of the attention sink of each
    head. All contiguous, except that a row of ``tables`` may be part of a longer one.
    """
    num_rows, num_heads, dim = queries.shape
    num_kv_heads, block_size = cache.shape[0] // 2, cache.shape[2]
    if splits is None:
        splits = num_splits(num_rows, num_kv_heads, tables.shape[1] * block_size)
    parts, marks = out, out
    if splits > 1:
        parts = queries.new_empty(num_rows, num_heads, splits, dim, dtype=torch.float32)
        marks = queries.new_empty(num_rows, num_heads, splits, dtype=torch.float32)
    padded = max(power_of_two(dim), MIN_DOT)
    group = num_heads // num_kv_heads
    _decode[(num_rows, num_kv_heads, splits)](
        queries,
        cache,
        tables,
        lengths,
        parts,
        marks,
        lengths if sinks is None else sinks,
        dim**-0.5 * LOG2_E.value,
        cache.shape[1] * block_size,
        tables.stride(0),
        window or 0,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_TILE=max(power_of_two(group), MIN_DOT),
        BLOCK_SIZE=block_size,
        DIM=dim,
        DIM_TILE=padded,
        SPLITS=splits,
        KEYS=64 if queries.itemsize < 4 else 32,
        ROW=cache.shape[3],
        num_warps=4,
        num_stages=3 if queries.itemsize < 4 else 2,
    )
    if splits > 1:
        _combine[(num_rows, num_heads)](
            parts, marks, out, DIM=dim, DIM_TILE=padded, SPLITS=splits, num_warps=4
        )


@partial(jit, any_alignment=["tables", "lengths", "sinks"])
def _decode(
    queries: tl.pointer_type,
    cache: tl.pointer_type,
    tables: tl.pointer_type,
    lengths: tl.pointer_type,
    out: tl.pointer_type,
    marks: tl.pointer_type,
    sinks: tl.pointer_type,
    scale: tl.tensor,
    num_slots: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """Attend with the query heads of one key head and row over a share of the keys, in one program.

    The program writes the heads' output; if keys are split, also the logarithm (base 2) of the sum
    of attention weights, with which ``_combine`` combines the shares.
    """
    tl.static_assert(ROW == DIM or BLOCK_SIZE % 4 == 0)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), KEYS) * KEYS
    begin += split * share
    end = tl.minimum(begin + share, length)

    members = tl.arange(0, GROUP_TILE)
    place = tl.arange(0, DIM_TILE)
    is_member, is_place = members < GROUP, place < DIM
    first = (row.to(tl.int64) * NUM_KV_HEADS + head) * GROUP
    q_address = queries + (first + members)[:, None] * DIM + place[None, :]
    q = tl.load(q_address, mask=is_member[:, None] & is_place[None, :], other=0.0)
    keys = cache + head.to(tl.int64) * num_slots * ROW
    values = keys + NUM_KV_HEADS * num_slots.to(tl.int64) * ROW
    table = tables + row.to(tl.int64) * table_stride

    highest = tl.full([GROUP_TILE], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([GROUP_TILE], dtype=tl.float32)
    total = tl.zeros([GROUP_TILE, DIM_TILE], dtype=tl.float32)
    if HAS_SINKS:
        # Only the first split includes the sink.
        sink = tl.load(sinks + head * GROUP + members, mask=is_member, other=0.0)
        highest = tl.where(split == 0, sink * LOG2_E, highest)
        weight = tl.where(split == 0, 1.0, weight)
    for start in range(begin, end, KEYS):
        own = start + tl.arange(0, KEYS)
        has_key = own < end
        block = tl.load(table + own // BLOCK_SIZE, mask=has_key, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + own % BLOCK_SIZE
        k = load_rows(keys, slot, own, has_key, q.dtype, True, DIM, DIM_TILE, ROW)
        scores = dot(q, k, tl.zeros([GROUP_TILE, KEYS], dtype=tl.float32)) * scale
        scores = tl.where(has_key[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        v = load_rows(values, slot, own, has_key, q.dtype, False, DIM, DIM_TILE, ROW)
        total = dot(cast(weights, v.dtype), v, total * kept[:, None])
        weight = weight * kept + tl.sum(weights, 1)
        highest = higher

    is_empty = weight == 0.0  # there are more splits than tiles of keys
    known = tl.where(is_empty, 1.0, weight)
    total = total / known[:, None]
    target = (first + members) * SPLITS + split
    is_inside = is_member[:, None] & is_place[None, :]
    result = cast(total, out.dtype.element_ty)
    tl.store(out + target[:, None] * DIM + place[None, :], result, mask=is_inside)
    if SPLITS > 1:
        mark = tl.where(is_empty, float("-inf"), highest + tl.log2(known))
        tl.store(marks + target, mark, mask=is_member)


@jit
def _combine(
    parts: tl.pointer_type,
    marks: tl.pointer_type,
    out: tl.pointer_type,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Combine the outputs of all splits of the keys, for one query head and row in each program."""
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits, place = tl.arange(0, SPLITS), tl.arange(0, DIM_TILE)
    is_place = place < DIM
    mark = tl.load(marks + head * SPLITS + splits)
    highest = tl.max(mark, 0)
    weights = tl.exp2(mark - tl.where(highest == float("-inf"), 0.0, highest))
    address = parts + (head * SPLITS + splits)[:, None] * DIM + place[None, :]
    found = tl.load(address, mask=is_place[None, :], other=0.0)
    weight = tl.sum(weights, 0)
    total = tl.sum(found * weights[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + head * DIM + place, cast(total, out.dtype.element_ty), mask=is_place)
