"""Stats of all workers, which the controller collects on request."""

from __future__ import annotations

from typing import Any

from gateway.cluster.shared_result import SharedResult
from gateway.cluster.view import Snapshot, SnapshotFollower


class WorkerStats:
    """Fetches the stats of all workers from the controller, and shares them among callers.

    Args:
        cluster: calls the controller.
        age_s: seconds for which callers share one result. Sharing hides the effect of single steps
            and limits the cost of many callers. 0: each call collects new stats.
    """

    def __init__(self, cluster: SnapshotFollower, age_s: float) -> None:
        self._cluster = cluster
        self.age_s = age_s
        self._snapshot = SharedResult(cluster.fresh, age_s)
        self._refresh = SharedResult(cluster.refresh, age_s)
        self._load = SharedResult(lambda: cluster.call("load"), age_s)
        self._placement = SharedResult(lambda: cluster.call("placement"), age_s)

    async def snapshot(self) -> Snapshot | None:
        """Return the state of the cluster with stats that are at most ``age_s`` seconds old, or the
        last known state if the controller does not respond; None if no state is known.
        """
        if not self.age_s:
            return await self._cluster.fresh()
        await self._snapshot.get()
        return self._cluster.snapshot  # may be newer than the stats

    async def refresh(self) -> None:
        """Update ``snapshot`` and ``known_load`` of ``cluster`` if older than ``age_s`` seconds."""
        await (self._refresh.get() if self.age_s else self._cluster.refresh())

    async def load(self) -> Any:
        """Return token counts of experts and expert copies, and balancedness.

        Raises ``NotReadyError`` if the controller does not respond.
        """
        return await (self._load.get() if self.age_s else self._cluster.call("load"))

    async def placement(self) -> Any:
        """Return placement, current load and balancedness of all expert banks.

        Raises ``NotReadyError`` if the controller does not respond.
        """
        if self.age_s:
            return await self._placement.get()
        return await self._cluster.call("placement")
