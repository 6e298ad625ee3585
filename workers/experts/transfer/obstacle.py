"""What keeps a load order from being carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SlotOrder = tuple[int, int, int]
"""(bank, expert slot, logical expert or ``FREE_SLOT``) that an order names."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why slots must not be written now."""

    reason: str
    passes: bool
    """The epoch that the order is for is still to come to this worker."""


def no_obstacle(orders: Sequence[SlotOrder], epoch: int) -> Obstacle | None:
    """Every order may be carried out: nothing runs steps."""
    return None
