"""Collects the state and metrics of all gateway replicas, and aborts calls on any replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.config.gateway import GatewaySection
from cluster.core.metric_families import PlainFamily
from cluster.core.states import is_gone
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.calls.served_models import SharedParts
from gateway.cluster.client_view import client_status
from gateway.cluster.serve_replicas import ReplicaHandlers, ServeReplicas
from gateway.cluster.view import Snapshot
from gateway.cluster.worker_stats import WorkerStats
from gateway.observability.metrics import GatewayMetrics, render_metrics
from gateway.observability.samples import TOTALS, SampleRing, total

if TYPE_CHECKING:
    from gateway.calls.gateway import Gateway


class ServiceStatus:
    """Combines the state of all gateway replicas, without details that the caller may not see.

    Args:
        name: name of this replica.
        limits: limits of the gateway.
        numbers: statistics of the workers.
        metrics: metrics of this replica.
        adapters: adapters that each caller may use.
        shared: running calls of this replica, which other replicas may abort, and all its models.
    """

    def __init__(
        self,
        name: str,
        limits: GatewaySection,
        numbers: WorkerStats,
        metrics: GatewayMetrics,
        adapters: AdapterCatalog,
        shared: SharedParts,
    ) -> None:
        self.name = name
        self.created = int(time.time())
        """Unix time at which this gateway replica started, in seconds."""
        self.addresses: dict[str, Any] = {}
        """Process id and ports of this gateway replica; empty until its servers have started."""
        self.samples = SampleRing()
        self._limits = limits
        self._numbers = numbers
        self._metrics = metrics
        self._adapters = adapters
        self._models = shared.models
        self.answers = ReplicaHandlers(
            name,
            {
                "describe": self.describe,
                "metrics": self.own_families,
                "summary": self.summary,
                "samples": self.samples.after,
                "abort": shared.running.abort,
                "adapters": self.adapter_keys,
            },
        )
        self.replicas: ServeReplicas = self.answers

    async def read(self, is_whole: bool = True) -> dict[str, Any]:
        """Return the state of the cluster and all gateway replicas, as ``status --json`` prints it.

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
        """Combine a snapshot of the cluster with the ``describe`` replies of the gateway replicas.

        Adapters that the caller may not use are omitted and, unless ``is_whole``, also details that
        clients may not see. Without a snapshot, the cluster is shown as starting.
        """
        status = self._adapters.without_others(snapshot or {"state": "STARTING"})
        status |= {"schema": 1, "gateway": list(replicas)}
        entries = [
            _model_entry(route.name, name, gateway)
            for route in self._models.usable_routes
            for name, gateway in route.revisions.items()
        ]
        if len(entries) > 1:
            status["models"] = entries
        return status if is_whole else client_status(status, not self._limits.requires_admin_keys)

    async def abort_calls(self, names: Sequence[str]) -> list[str]:
        """Abort calls by name on all replicas; return the names that had a running call."""
        answers = (await self.replicas.call("abort", list(names))).values()
        return [name for name in dict.fromkeys(names) if any(name in found for found in answers)]

    async def render_metrics(self, is_whole: bool = True) -> bytes:
        """Render the metrics of all gateway replicas and workers for Prometheus.

        Unless ``is_whole``, details that clients may not see are omitted. Series of adapters that
        the caller may not use are always omitted.
        """
        replicas = None
        models = list(self._models)
        refreshed = asyncio.gather(*(model.numbers.refresh() for model in models))
        if self._limits.num_gateway_replicas == 1:
            await refreshed
        else:
            replicas, _ = await asyncio.gather(self.replicas.call("metrics"), refreshed)
        metrics = self._models.usable_metrics
        exposition = render_metrics(metrics, replicas, is_whole) if metrics else b""
        for model in models:
            exposition = model.model.adapters.without_series_of_others(exposition)
        return exposition

    def own_families(self) -> dict[str, list[PlainFamily]]:
        """Return the metrics that this replica counts, by model and revision, as plain data."""
        metrics = {model.metrics.key: model.metrics for model in self._models}
        return {key: one.own_families() for key, one in metrics.items()}

    def adapter_keys(self) -> list[str]:
        """Return the keys of the adapters that requests to this replica may name."""
        return [key for model in self._models for key in model.model.adapters.keys]

    def describe(self) -> dict[str, Any]:
        """Return the entry of this gateway replica in the status: name, process id and ports."""
        return {"name": self.name, **self.addresses}

    def summary(self) -> dict[str, Any]:
        """Return this replica's entry in the status, start time and totals of some metrics."""
        families = self._metrics.own_samples(TOTALS)
        totals = {name: total(families, name) for name in TOTALS}
        return {"describe": self.describe(), "totals": totals, "created": self.created}


def _model_entry(model: str, revision: str, gateway: Gateway) -> dict[str, Any]:
    """Return a revision's entry in the status: names, state, and number of running workers."""
    snapshot = gateway.cluster.snapshot or {"state": "STARTING"}
    running = [w for w in snapshot.get("workers", ()) if not is_gone(w["state"])]
    return {
        "name": model,
        "revision": revision,
        "state": snapshot["state"],
        "num_workers": len(running),
    }
