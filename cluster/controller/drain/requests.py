"""Requests of workers to be drained: they got a signal to end, or their nodes will leave."""

from __future__ import annotations

from collections.abc import Collection, Iterable

RETRY_S = 5.0
"""Pause after a drain that was refused or undone before its workers can request another."""
GATHER_S = 0.3
"""Time in which requests of workers count as one drain."""
LATE_S = 1.5
"""Time in which Ray's word that their node leaves follows the signal that its processes get."""


class DrainRequests:
    """Workers that wait for their drain. Times are monotonic seconds."""

    def __init__(self, *, follow_nodes: bool) -> None:
        """``follow_nodes``: it matters whether a node leaves, which is known a moment later."""
        self._follow_nodes = follow_nodes
        self._gather_s = LATE_S if follow_nodes else GATHER_S
        self._requested: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._on_leaving: set[str] = set()

    def add(self, name: str, now: float, *, node_leaves: bool) -> None:
        """A worker requests a drain, maybe again; no effect in the pause after its last one."""
        if node_leaves:
            self._on_leaving.add(name)
        if now >= self._not_before.get(name, now):
            self._requested.setdefault(name, now)

    def are_due(self, now: float) -> bool:
        """Some wait, and those that came together have come."""
        limits = {n: GATHER_S if n in self._on_leaving else self._gather_s for n in self._requested}
        return any(now - self._requested[n] >= limit_s for n, limit_s in limits.items())

    def take(self, alive: Collection[str]) -> tuple[str, ...]:
        """The workers to drain next: those of nodes that leave, else all that live."""
        names = {name for name in self._requested if name in alive}
        leaving = names & self._on_leaving
        taken = leaving or names
        self._requested = {n: t for n, t in self._requested.items() if n in names - taken}
        return tuple(sorted(taken))

    def remove_places(self, names: Iterable[str], node: str) -> bool:
        """Whether a drain removes the places, as the numbers of workers follow the nodes.

        ``node`` is the one that the drain is for; empty if it is for single workers.
        """
        return self._follow_nodes and (bool(node) or set(names) <= self._on_leaving)

    def pause(self, names: Iterable[str], now: float) -> None:
        """A drain of these workers was refused or has ended."""
        paused = dict.fromkeys(names, now + RETRY_S)
        self._not_before |= paused
        self._requested = {n: t for n, t in self._requested.items() if n not in paused}
