"""Finds the slots that change between two placements, and the sources of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.core.load_profile import BankLoad
from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Ints, Move


def aligned(before: Ints, after: Ints) -> Ints:
    """Return the slots ``after``, with experts that stay on a device in their slots of ``before``.

    The shape of the arrays is [num_banks, num_devices, num_slots].
    """
    result = np.full_like(after, FREE_SLOT)
    for b in range(len(after)):
        for d in range(after.shape[1]):
            wanted = [e for e in after[b, d].tolist() if e != FREE_SLOT]
            row = [e if e in wanted else FREE_SLOT for e in before[b, d].tolist()]
            new = [e for e in wanted if e not in row]
            for slot, expert in enumerate(row):
                if expert == FREE_SLOT and new:
                    row[slot] = new.pop(0)
            result[b, d] = row
    return result


def find_moves(
    loads: Sequence[BankLoad], before: Ints, after: Ints, nearness: Ints
) -> tuple[Move, ...]:
    """Return a move for each slot that holds another expert than before, by bank, device and slot.

    A slot that is only emptied is not a move. ``loads`` identify the banks; ``nearness`` is
    ``PlannedTopology.nearness``.
    """
    moves = []
    for b, d, s in np.argwhere((before != after) & (after != FREE_SLOT)).tolist():
        expert = int(after[b, d, s])
        moves.append(
            Move(
                bank=loads[b].bank,
                layer=loads[b].layer,
                device=d,
                slot=s,
                expert=expert,
                source=_source(before[b], expert, nearness[d]),
            )
        )
    return tuple(moves)


def _source(slots: Ints, expert: int, nearness: Ints) -> int:
    """Return the nearest device that holds the expert, the first of equally near ones; else -1."""
    holders = np.nonzero((slots == expert).any(1))[0]
    return int(holders[np.argmax(nearness[holders])]) if len(holders) else -1
