"""Collects drain requests of workers that received SIGTERM or whose nodes will leave."""

from __future__ import annotations

from collections.abc import Collection, Iterable

RETRY_S = 5.0
"""Seconds after a drain ended or was rejected in which its workers cannot request another drain."""
GATHER_S = 0.3
"""Seconds in which drain requests of several workers are combined into one drain."""
LATE_S = 1.5
"""Longest time, in seconds, from SIGTERM at a node's workers until Ray reports that it leaves."""


class DrainRequests:
    """Collects drain requests of workers. Times are monotonic seconds."""

    def __init__(self, *, follow_nodes: bool) -> None:
        """``follow_nodes``: whether the pool sizes follow the nodes of the Ray cluster.

        A request then waits ``LATE_S`` instead of ``GATHER_S``, for Ray's report that the worker's
        node leaves.
        """
        self._follow_nodes = follow_nodes
        self._gather_s = LATE_S if follow_nodes else GATHER_S
        self._requested: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._on_leaving: set[str] = set()

    def add(self, name: str, now: float, *, node_leaves: bool) -> None:
        """Add the drain request of worker ``name``; ``node_leaves``: the worker's node will leave.

        A repeated request, or one within ``RETRY_S`` after a drain of the worker, is ignored.
        """
        if node_leaves:
            self._on_leaving.add(name)
        if now >= self._not_before.get(name, now):
            self._requested.setdefault(name, now)

    def are_due(self, now: float) -> bool:
        """Return whether any request has waited long enough for requests of other workers."""
        limits = {n: GATHER_S if n in self._on_leaving else self._gather_s for n in self._requested}
        return any(now - self._requested[n] >= limit_s for n, limit_s in limits.items())

    def take(self, alive: Collection[str]) -> tuple[str, ...]:
        """Remove and return the workers to drain next, sorted by name.

        These are the workers of leaving nodes or, without any, all workers with a request. Requests
        of workers that are not in ``alive`` are dropped.
        """
        names = {name for name in self._requested if name in alive}
        leaving = names & self._on_leaving
        taken = leaving or names
        self._requested = {n: t for n, t in self._requested.items() if n in names - taken}
        return tuple(sorted(taken))

    def remove_places(self, names: Iterable[str], node: str) -> bool:
        """Return whether a drain of workers ``names`` also removes their places.

        The places are removed if the pool sizes follow the nodes, and either ``node`` is drained
        (empty for a drain of single workers) or all the workers are on leaving nodes.
        """
        return self._follow_nodes and (bool(node) or set(names) <= self._on_leaving)

    def pause(self, names: Iterable[str], now: float) -> None:
        """Drop the requests of these workers, and ignore new ones for ``RETRY_S``."""
        paused = dict.fromkeys(names, now + RETRY_S)
        self._not_before |= paused
        self._requested = {n: t for n, t in self._requested.items() if n not in paused}
