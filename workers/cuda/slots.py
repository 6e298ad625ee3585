"""Expert slots of dispatched rows: choice on an attention rank, validation on an expert rank.

References: ``workers.dispatch.expert_maps.ExpertMaps`` and
``workers.dispatch.slot_checker.HostSlotChecker``.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import jit, power_of_two

_TILE_PAIRS = 512
"""Maximum number of (row, slot) pairs of a program."""


def slots_by_rank(
    decode_slots: Tensor, topk_ids: Tensor, weights: Tensor | None, is_row: Tensor | None
) -> Tensor:
    """Return the slots of each row's experts on every expert rank, [ranks, T, k] int32.

    decode_slots [ranks, E] int32: slot of each expert, -1 on another rank; topk_ids [T, k] int64.
    With weights [T, k], of any floating-point dtype, the result is [ranks, T, 2k]: their bits as
    float32 follow the slots. is_row [T] int64: 0 for a row without a request, whose slots are -1.
    """
    (num_ranks, num_experts), (num_rows, top_k) = decode_slots.shape, topk_ids.shape
    width = top_k if weights is None else 2 * top_k
    shape, device = (num_ranks, num_rows, width), topk_ids.device
    sent = torch.empty(shape, dtype=torch.int32, device=device)
    if not num_rows:
        return sent
    padded = power_of_two(top_k)
    tile = max(_TILE_PAIRS // padded, 1)
    _choose_slots[(triton.cdiv(num_rows, tile), num_ranks)](
        decode_slots,
        topk_ids.contiguous(),
        topk_ids if weights is None else weights.contiguous(),
        topk_ids if is_row is None else is_row,
        sent,
        num_rows,
        num_experts,
        HAS_WEIGHTS=weights is not None,
        HAS_ROWS=is_row is not None,
        TOP_K=top_k,
        TOP_TILE=padded,
        TILE=tile,
    )
    return sent


@partial(jit, any_alignment=["decode_slots", "topk_ids", "weights", "is_row", "sent"])
def _choose_slots(
    decode_slots: tl.pointer_type,
    topk_ids: tl.pointer_type,
    weights: tl.pointer_type,
    is_row: tl.pointer_type,
    sent: tl.pointer_type,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_TILE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Choose the slots of ``TILE`` rows on one rank in each program."""
    rank = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    columns = tl.arange(0, TOP_TILE)[None, :]
    is_pair = (rows < num_rows) & (columns < TOP_K)
    ids = tl.load(topk_ids + rows * TOP_K + columns, mask=is_pair, other=0)
    slot = tl.load(decode_slots + rank * num_experts + ids, mask=is_pair, other=-1)
    if HAS_ROWS:
        slot = tl.where(tl.load(is_row + rows, mask=rows < num_rows, other=0) != 0, slot, -1)
    width = 2 * TOP_K if HAS_WEIGHTS else TOP_K
    target = sent + (rank * num_rows + rows) * width + columns
    tl.store(target, slot, mask=is_pair)
    if HAS_WEIGHTS:
        factor = tl.load(weights + rows * TOP_K + columns, mask=is_pair, other=0.0)
        bits = factor.to(tl.float32).to(tl.int32, bitcast=True)
        tl.store(target + TOP_K, bits, mask=is_pair)


def check_slots(
    slots: Tensor, filled: Tensor, checked: Tensor, bins: Tensor, flags: Tensor
) -> None:
    """Validate the slots of some rows, and count them.

    slots [T, k]: integers in rows of any stride, -1 for an expert of another rank. filled [S + 1]
    bool: whether each slot has an expert; the last entry is ignored. checked [T, k] int64 gets the
    slots, with -1 for invalid ones. Added to are: bins [S] int64, pairs of each slot; flags [3]
    int64, invalid slots, rows with a pair on this rank, and pairs on this rank.
    """
    num_rows, top_k = slots.shape
    if not num_rows:
        return
    padded = power_of_two(top_k)
    tile = max(_TILE_PAIRS // padded, 1)
    _check[(triton.cdiv(num_rows, tile),)](
        slots,
        filled,
        checked,
        bins,
        flags,
        num_rows,
        len(filled) - 1,
        slots.stride(0),
        TOP_K=top_k,
        TOP_TILE=padded,
        TILE=tile,
    )


@partial(jit, any_alignment=["slots", "filled", "checked", "bins", "flags"])
def _check(
    slots: tl.pointer_type,
    filled: tl.pointer_type,
    checked: tl.pointer_type,
    bins: tl.pointer_type,
    flags: tl.pointer_type,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
    TOP_TILE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Check ``TILE`` rows in each program."""
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    columns = tl.arange(0, TOP_TILE)[None, :]
    is_pair = (rows < num_rows) & (columns < TOP_K)
    slot = tl.load(slots + rows * slots_stride + columns, mask=is_pair, other=-1).to(tl.int64)
    is_inside = (slot >= 0) & (slot < num_slots)
    is_here = is_inside & (tl.load(filled + slot, mask=is_inside, other=0) != 0)
    tl.store(checked + rows * TOP_K + columns, tl.where(is_here, slot, -1), mask=is_pair)
    tl.atomic_add(bins + slot, tl.full([TILE, TOP_TILE], 1, tl.int64), mask=is_here)
    is_wrong = (slot != -1) & (is_here == 0)
    pairs = tl.sum(is_here.to(tl.int64), 1)
    tl.atomic_add(flags, tl.sum(tl.sum(is_wrong.to(tl.int64), 1), 0))
    tl.atomic_add(flags + 1, tl.sum((pairs > 0).to(tl.int64), 0))
    tl.atomic_add(flags + 2, tl.sum(pairs, 0))
