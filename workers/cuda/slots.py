"""Validation and counts of the expert slots that an expert rank receives, in one kernel.

Reference: ``workers.dispatch.slot_checker.HostSlotChecker``.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import jit, power_of_two

_TILE_PAIRS = 512
"""Maximum number of (row, slot) pairs of a program."""


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
