"""From one placement to the next: which slots change, and from where the weights come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.core.load_profile import BankLoad
from cluster.core.placement import FREE_SLOT
from cluster.planner.base import Ints, Move


def aligned(before: Ints, after: Ints) -> Ints:
    """``after`` with every expert that stays on its device in the slot it has there."""
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
    """Slots that hold another expert than before, by bank, device and slot.

    A slot that is only emptied is no move. ``nearness`` is the topology's.
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
    """The nearest device that holds the expert, the first of equals; -1 for none."""
    holders = np.nonzero((slots == expert).any(1))[0]
    return int(holders[np.argmax(nearness[holders])]) if len(holders) else -1
