"""What became of rebalancings: plain numbers, for ``status`` and for metrics."""

from __future__ import annotations

from typing import Any

from cluster.migrations import Durations

OUTCOMES = ("applied", "skipped_gain", "skipped_churn", "failed", "cancelled")
"""Ends of a decision."""
_STALL_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class RebalanceCounts:
    """Owned by ``Rebalancing``."""

    def __init__(self) -> None:
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._num_bytes = 0
        self._num_moved = 0
        self._stalls = Durations(_STALL_S)

    def decided(self, outcome: str) -> None:
        """A decision came to one of ``OUTCOMES``."""
        self._outcomes[outcome] += 1

    def changed(self, num_moved: int, num_bytes: int) -> None:
        """A change has ended, however far it got."""
        self._num_moved += num_moved
        self._num_bytes += num_bytes

    def switched(self, stall_s: float) -> None:
        """An epoch came into force, and steps waited so long for it."""
        self._stalls.add(stall_s)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "outcomes": dict(self._outcomes),
            "bytes": self._num_bytes,
            "slots_moved": self._num_moved,
            "stalls": self._stalls.to_dict(),
        }
