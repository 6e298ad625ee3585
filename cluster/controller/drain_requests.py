"""Collects drain requests of workers that received SIGTERM or whose nodes will leave."""

from __future__ import annotations

from collections.abc import Collection, Iterable

RETRY_S = 5.0
"""Time after a rejected or rolled back drain in which its workers cannot request another one."""
GATHER_S = 0.3
"""Time in which the requests of several workers are combined into one drain."""
LATE_S = 1.5
"""Longest time from a signal to a node's processes until Ray reports that the node leaves."""


class DrainRequests:
    """Collects drain requests of workers. Times are monotonic seconds."""

    def __init__(self, *, follow_nodes: bool) -> None:
        """``follow_nodes``: wait ``LATE_S`` until it is known whether a worker's node leaves."""
        self._follow_nodes = follow_nodes
        self._gather_s = LATE_S if follow_nodes else GATHER_S
        self._requested: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._on_leaving: set[str] = set()

    def add(self, name: str, now: float, *, node_leaves: bool) -> None:
        """Add a request. It is ignored if it is repeated or within ``RETRY_S`` after a drain."""
        if node_leaves:
            self._on_leaving.add(name)
        if now >= self._not_before.get(name, now):
            self._requested.setdefault(name, now)

    def are_due(self, now: float) -> bool:
        """Return whether a worker has waited long enough for the requests of others."""
        limits = {n: GATHER_S if n in self._on_leaving else self._gather_s for n in self._requested}
        return any(now - self._requested[n] >= limit_s for n, limit_s in limits.items())

    def take(self, alive: Collection[str]) -> tuple[str, ...]:
        """Remove and return the workers to drain next: those of leaving nodes first, else all."""
        names = {name for name in self._requested if name in alive}
        leaving = names & self._on_leaving
        taken = leaving or names
        self._requested = {n: t for n, t in self._requested.items() if n in names - taken}
        return tuple(sorted(taken))

    def remove_places(self, names: Iterable[str], node: str) -> bool:
        """Return whether a drain removes the places because the pool sizes follow the nodes.

        ``node`` is the drained node; empty if the drain is for single workers.
        """
        return self._follow_nodes and (bool(node) or set(names) <= self._on_leaving)

    def pause(self, names: Iterable[str], now: float) -> None:
        """Ignore requests of these workers for ``RETRY_S`` after their drain."""
        paused = dict.fromkeys(names, now + RETRY_S)
        self._not_before |= paused
        self._requested = {n: t for n, t in self._requested.items() if n not in paused}
