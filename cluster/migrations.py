"""Weights that moved between workers, by the reason for it: plain numbers, for metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

MoveReason = Literal["rebalance", "recovery", "drain"]
"""The load asked for it; a lost worker's experts are loaded again; a worker is to go."""
_MOVE_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Durations:
    """A histogram of seconds."""

    def __init__(self, limits: Sequence[float]) -> None:
        """``limits``: inclusive upper bounds of the buckets, rising."""
        self._buckets = dict.fromkeys(limits, 0)
        self._sum = 0.0
        self._count = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self._sum += seconds
        self._count += 1
        for limit in self._buckets:
            self._buckets[limit] += seconds <= limit

    def to_dict(self) -> dict[str, Any]:
        """Count, sum, and cumulative buckets, fit for JSON."""
        buckets = [list(entry) for entry in self._buckets.items()]
        return {"buckets": buckets, "sum": self._sum, "count": self._count}


class Migrations:
    """Owned by the controller."""

    def __init__(self) -> None:
        self._slots: dict[MoveReason, int] = {}
        self._bytes: dict[MoveReason, int] = {}
        self._seconds: dict[MoveReason, Durations] = {}
        self.on_add: Callable[[MoveReason, int, int, float], None] = lambda *of: None
        """Called with the arguments of ``add``."""

    def add(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        """So many slots were filled with so many bytes, by one change that took so long."""
        self._slots[reason] = self._slots.get(reason, 0) + num_slots
        self._bytes[reason] = self._bytes.get(reason, 0) + num_bytes
        self._seconds.setdefault(reason, Durations(_MOVE_S)).add(seconds)
        self.on_add(reason, num_slots, num_bytes, seconds)

    def to_dict(self) -> dict[str, Any]:
        """Reason -> ``slots``, ``bytes`` and ``seconds``, fit for JSON."""
        return {
            reason: {
                "slots": self._slots[reason],
                "bytes": self._bytes[reason],
                "seconds": self._seconds[reason].to_dict(),
            }
            for reason in sorted(self._slots)
        }
