"""Sorting of pairs by expert slot, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from tests.workers.cuda.device import DEVICE
from workers.cuda.align import Blocks, align


def found_blocks(blocks: Blocks) -> list[tuple[int, list[int]]]:
    """(slot, pairs) of each used block."""
    order = blocks.order.tolist()
    found = []
    table = blocks.table.T.tolist()
    used = [slot >= 0 for slot, _, _ in table]
    assert used == sorted(used, reverse=True), "unused blocks come last"
    for slot, first, size in table[: sum(used)]:
        assert 0 < size <= blocks.height
        found.append((slot, order[first : first + size]))
    return found


def plain(slots: list[int], num_slots: int, height: int) -> list[tuple[int, list[int]]]:
    """The same, slot after slot."""
    found = []
    for slot in range(num_slots):
        pairs = [pair for pair, own in enumerate(slots) if own == slot]
        found += [(slot, pairs[i : i + height]) for i in range(0, len(pairs), height)]
    return found


@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_slots", "height"),
    [(1, 1, 1, 16), (3, 2, 4, 2), (40, 4, 6, 16), (10, 8, 70, 16), (150, 1, 2, 64), (5, 3, 200, 4)],
)
def test_blocks_have_all_pairs_of_their_slot_in_order(
    num_rows: int, top_k: int, num_slots: int, height: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, num_slots, (num_rows, top_k), generator=generator)
    blocks = align(slots.to(DEVICE), num_slots, height)
    assert found_blocks(blocks) == plain(slots.flatten().tolist(), num_slots, height)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "num_slots"), [(600, 6), (1100, 70), (9000, 2)])
def test_many_pairs_are_counted_tile_by_tile(num_rows: int, num_slots: int) -> None:
    """9,000 rows: more tiles than are added up at a time."""
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(-1, num_slots, (num_rows, 2), generator=generator)
    blocks = align(slots.to(DEVICE), num_slots, 64)
    assert found_blocks(blocks) == plain(slots.flatten().tolist(), num_slots, 64)


def test_one_slot_may_have_all_pairs_or_none() -> None:
    slots = torch.full((70, 2), 3, device=DEVICE)
    assert found_blocks(align(slots, 8, 16)) == plain([3] * 140, 8, 16)
    assert found_blocks(align(slots * 0 - 1, 8, 16)) == []


def test_rows_may_be_part_of_longer_ones_and_missing_slots_count_as_none() -> None:
    sent = torch.tensor([[2, 0, 7, 1], [2, -1, 7, 1], [9, 0, 7, 1]], device=DEVICE)
    blocks = align(sent[:, :2], 4, 2)
    assert found_blocks(blocks) == [(0, [1, 5]), (2, [0, 2])]
