"""How often members were lost, and for how long nothing ran then. Plain numbers, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from cluster.topology import Member, Role

BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Inclusive upper bounds, seconds."""


class Stalls:
    """Counts by who was lost. Owned by the controller; ``now`` is in monotonic seconds."""

    def __init__(self) -> None:
        self._counts: dict[Role, list[int]] = {}
        self._sums: dict[Role, float] = {}
        self._roles: set[Role] = set()
        self._names: set[str] = set()
        self._since = 0.0
        self.on_ran: Callable[[list[str], float], None] = lambda *of: None
        """Called with who was lost, and the seconds until it was made good."""

    def lost(self, members: Iterable[Member], now: float) -> None:
        """Members of a generation are gone; nothing runs from now on."""
        if not self._roles:
            self._since = now
        self._roles |= {m.role for m in members}
        self._names |= {m.name for m in members}

    def ran(self, now: float) -> None:
        """A generation runs: whoever was lost before is made good."""
        for role in self._roles:
            counts = self._counts.setdefault(role, [0] * (len(BUCKETS_S) + 1))
            counts[bisect_left(BUCKETS_S, now - self._since)] += 1
            self._sums[role] = self._sums.get(role, 0.0) + now - self._since
        if self._names:
            self.on_ran(sorted(self._names), now - self._since)
        self._roles.clear()
        self._names.clear()

    def to_dict(self) -> dict[str, Any]:
        """``expert_worker`` -> count, sum, and cumulative buckets, fit for JSON."""
        found: dict[str, Any] = {}
        for role, counts in sorted(self._counts.items()):
            below = [sum(counts[: i + 1]) for i in range(len(BUCKETS_S))]
            found[f"{role}_worker"] = {
                "count": sum(counts),
                "sum": round(self._sums[role], 3),
                "buckets": [[limit, count] for limit, count in zip(BUCKETS_S, below, strict=True)],
            }
        return found
