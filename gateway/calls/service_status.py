"""Collects the state and metrics of all replicas, and aborts their calls, on any replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.config.gateway import GatewaySection
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.calls.output_queue import CallRegistry
from gateway.cluster.client_view import client_status
from gateway.cluster.serve_replicas import ReplicaHandlers, ServeReplicas
from gateway.cluster.view import Snapshot
from gateway.cluster.worker_stats import WorkerStats
from gateway.observability.metrics import GatewayMetrics
from gateway.observability.samples import TOTALS, SampleRing, total


class ServiceStatus:
    """Combines the state of all replicas, without details that the caller may not see.

    Args:
        name: name of the replica.
        limits: limits of the gateway.
        numbers: statistics of the workers.
        metrics: metrics of the replica.
        adapters: adapters that each caller may use.
        running: running calls, which other replicas may abort.
    """

    def __init__(
        self,
        name: str,
        limits: GatewaySection,
        numbers: WorkerStats,
        metrics: GatewayMetrics,
        adapters: AdapterCatalog,
        running: CallRegistry,
    ) -> None:
        self.name = name
        self.created = int(time.time())
        """Unix time of the start in seconds."""
        self.addresses: dict[str, Any] = {}
        """Process id and ports of this replica; set by ``app``."""
        self.samples = SampleRing()
        self._limits = limits
        self._numbers = numbers
        self._metrics = metrics
        self._adapters = adapters
        self.answers = ReplicaHandlers(
            name,
            {
                "describe": self.describe,
                "metrics": metrics.own_families,
                "summary": self.summary,
                "samples": self.samples.after,
                "abort": running.abort,
                "adapters": lambda: adapters.keys,
            },
        )
        self.replicas: ServeReplicas = self.answers

    async def read(self, is_whole: bool = True) -> dict[str, Any]:
        """Return the state of the cluster and all replicas, as printed by ``status --json``.

        Unless ``is_whole``, details that clients may not see are omitted.
        """
        found, replicas = await asyncio.gather(
            self._numbers.snapshot(), self.replicas.call("describe")
        )
        return self.combine(found, replicas.values(), is_whole)

    def combine(
        self,
        snapshot: Snapshot | None,
        replicas: Iterable[Mapping[str, Any]],
        is_whole: bool = True,
    ) -> dict[str, Any]:
        """Combine a snapshot and the ``describe`` replies of the replicas.

        Adapters that the caller may not use are omitted.
        """
        status = self._adapters.without_others(snapshot or {"state": "STARTING"})
        status |= {"schema": 1, "gateway": list(replicas)}
        return status if is_whole else client_status(status, not self._limits.requires_admin_keys)

    async def abort_calls(self, names: Sequence[str]) -> list[str]:
        """Abort calls by name on all replicas; return the names for which a call was running."""
        answers = (await self.replicas.call("abort", list(names))).values()
        return [name for name in dict.fromkeys(names) if any(name in found for found in answers)]

    async def render_metrics(self, is_whole: bool = True) -> bytes:
        """Render the metrics of all replicas and workers, without duplicates.

        Unless ``is_whole``, details that clients may not see are omitted. Series of adapters that
        the caller may not use are always omitted.
        """
        replicas = None
        if self._limits.num_gateway_replicas == 1:
            await self._numbers.refresh()
        else:
            replicas, _ = await asyncio.gather(
                self.replicas.call("metrics"), self._numbers.refresh()
            )
        return self._adapters.without_series_of_others(self._metrics.render(replicas, is_whole))

    def describe(self) -> dict[str, Any]:
        """Return the entry of this replica in the status."""
        return {"name": self.name, **self.addresses}

    def summary(self) -> dict[str, Any]:
        """Return the entry of this replica in the status, its start time and its totals."""
        families = self._metrics.own_samples(TOTALS)
        totals = {name: total(families, name) for name in TOTALS}
        return {"describe": self.describe(), "totals": totals, "created": self.created}
