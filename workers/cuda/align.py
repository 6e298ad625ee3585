"""Sorts (row, expert slot) pairs by slot, and divides them into blocks of pairs of one slot.

The order equals ``argsort(stable=True)`` of the slots. All shapes depend on the number of pairs
alone, so the host never waits for the device and a CUDA graph can capture the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import jit, power_of_two

_TILE_ELEMENTS = 4096
"""Number of comparisons (pairs x slots) that one program of the sorting kernel keeps in
registers."""
_MAX_TILE, _MIN_TILE = 64, 16
_SUMMED_TILES = 256
"""Number of tiles whose pair counts a program adds up at a time."""
_COUNTED_PAIRS = 1024
"""Maximum number of (row, expert slot) pairs for which every program of the sorting kernel counts
all pairs itself, which is faster than two more launches. On an H100, 2,048 pairs of 64 slots took
25 us this way, and 32,768 pairs took 850 us."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Pairs (row, expert slot), divided into blocks of at most ``height`` pairs of one slot. Unused
    blocks are last."""

    order: Tensor
    """Numbers of the pairs that have an expert slot, sorted by slot and then by number, [P]
    int32."""
    table: Tensor
    """Table of the blocks, [3, num_blocks] int32: slot of each block, or -1 if the block is unused;
    index of the block's first pair in ``order``; number of the block's pairs."""
    height: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks, including unused ones."""
        return self.table.shape[1]


def align(slots: Tensor, num_slots: int, height: int) -> Blocks:
    """Sort (row, expert slot) pairs by slot into blocks of at most ``height`` pairs of one slot.

    slots [T, k]: expert slots of each row as integers, -1 for none; pair p is
    ``slots.flatten()[p]``. Each row must be contiguous. A slot of ``num_slots`` or more counts as
    none.

    Example: slots [[2, 0], [2, -1], [2, 0]], height 2 -> order [1, 5, 0, 2, 4, ..], table
    [[0, 2, 2, -1, ..], [0, 2, 4, ..], [2, 2, 1, ..]].
    """
    num_pairs, top_k = slots.numel(), slots.shape[1]
    num_blocks = min(num_pairs, num_pairs // height + num_slots)
    order = torch.empty(num_pairs, dtype=torch.int32, device=slots.device)
    table = torch.empty(3, num_blocks, dtype=torch.int32, device=slots.device)
    padded = power_of_two(num_slots)
    tile = min(max(_TILE_ELEMENTS // padded, _MIN_TILE), _MAX_TILE)
    num_tiles = triton.cdiv(num_pairs, tile)
    is_counted = num_pairs > _COUNTED_PAIRS
    counts = sums = order
    if is_counted:
        counts = torch.empty(num_tiles, padded, dtype=torch.int32, device=slots.device)
        _count[(num_tiles,)](
            slots,
            counts,
            num_pairs,
            num_slots,
            slots.stride(0),
            TOP_K=top_k,
            SLOTS=padded,
            TILE=tile,
            num_warps=8,
        )
        sums = torch.empty_like(counts)
        _sum_tiles[(padded,)](counts, sums, num_tiles, SLOTS=padded, TILE=_SUMMED_TILES)
    _align[(num_tiles,)](
        slots,
        order,
        table,
        counts,
        sums,
        num_pairs,
        num_slots,
        num_blocks,
        slots.stride(0),
        TOP_K=top_k,
        HEIGHT=height,
        SLOTS=padded,
        TILE=tile,
        IS_COUNTED=is_counted,
        num_warps=8,
    )
    return Blocks(order, table, height)


@partial(jit, any_alignment=["slots"])
def _align(
    slots: tl.pointer_type,
    order: tl.pointer_type,
    table: tl.pointer_type,
    tile_counts: tl.pointer_type,
    tile_sums: tl.pointer_type,
    num_pairs: tl.tensor,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    IS_COUNTED: tl.constexpr,
) -> None:
    """Write the position of each pair in the order by slot, and the table of blocks.

    Each program handles the pairs of one tile; program i also writes the i-th block of each slot.
    Programs run in any order. ``IS_COUNTED``: ``tile_counts`` and ``tile_sums`` have the number of
    pairs of each slot in each tile and up to the end of each tile; otherwise each program counts
    all pairs.
    """
    begin = tl.program_id(0) * TILE
    own = begin + tl.arange(0, TILE)
    mine = _slots_of(slots, own, num_pairs, num_slots, slots_stride, TOP_K)
    known = tl.arange(0, SLOTS)
    counts = tl.zeros([SLOTS], dtype=tl.int32)
    before = tl.zeros([SLOTS], dtype=tl.int32)
    if IS_COUNTED:
        counts += tl.load(tile_sums + (tl.num_programs(0) - 1) * SLOTS + known)
        place_of_tile = tl.program_id(0) * SLOTS + known
        before += tl.load(tile_sums + place_of_tile) - tl.load(tile_counts + place_of_tile)
    else:
        for first in range(0, num_pairs, TILE):
            pairs = first + tl.arange(0, TILE)
            found = _slots_of(slots, pairs, num_pairs, num_slots, slots_stride, TOP_K)
            hits = tl.sum((found[:, None] == known[None, :]).to(tl.int32), 0)
            counts += hits
            before += tl.where(first < begin, hits, 0)
    starts = tl.cumsum(counts, 0) - counts

    is_earlier = (mine[:, None] == mine[None, :]) & (own[:, None] > own[None, :])
    place = tl.sum(is_earlier.to(tl.int32), 1)
    is_slot = mine[:, None] == known[None, :]
    place += tl.sum(tl.where(is_slot, (starts + before)[None, :], 0), 1)
    tl.store(order + place, own, mask=mine >= 0)

    num_of = (counts + HEIGHT - 1) // HEIGHT
    first_block = tl.cumsum(num_of, 0) - num_of
    for i in range(tl.program_id(0), tl.max(num_of, 0), tl.num_programs(0)):
        blocks, has_block = first_block + i, i < num_of
        done = i * HEIGHT
        tl.store(table + blocks, known, mask=has_block)
        tl.store(table + num_blocks + blocks, starts + done, mask=has_block)
        size = tl.minimum(counts - done, HEIGHT)
        tl.store(table + 2 * num_blocks + blocks, size, mask=has_block)
    is_unused = (own >= tl.sum(num_of, 0)) & (own < num_blocks)
    tl.store(table + own, -1, mask=is_unused)


@partial(jit, any_alignment=["slots"])
def _count(
    slots: tl.pointer_type,
    counts: tl.pointer_type,
    num_pairs: tl.tensor,
    num_slots: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Count the pairs of each slot in each tile; one program counts one tile."""
    pairs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    found = _slots_of(slots, pairs, num_pairs, num_slots, slots_stride, TOP_K)
    known = tl.arange(0, SLOTS)
    hits = tl.sum((found[:, None] == known[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * SLOTS + known, hits)


@jit
def _sum_tiles(
    counts: tl.pointer_type,
    sums: tl.pointer_type,
    num_tiles: tl.tensor,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Compute inclusive prefix sums, over tiles, of each slot's pair counts; one program sums one
    slot."""
    total = 0
    for first in range(0, num_tiles, TILE):
        tiles = first + tl.arange(0, TILE)
        places = tiles * SLOTS + tl.program_id(0)
        found = tl.load(counts + places, mask=tiles < num_tiles, other=0)
        tl.store(sums + places, total + tl.cumsum(found, 0), mask=tiles < num_tiles)
        total += tl.sum(found, 0)


@jit
def _slots_of(
    slots: tl.pointer_type,
    pairs: tl.tensor,
    num_pairs: tl.tensor,
    num_slots: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
) -> tl.tensor:
    """Return the expert slots of pairs (given by number), -1 for none or beyond the last pair."""
    places = (pairs // TOP_K) * slots_stride + pairs % TOP_K
    found = tl.load(slots + places, mask=pairs < num_pairs, other=-1).to(tl.int32)
    return tl.where(found < num_slots, found, -1)
