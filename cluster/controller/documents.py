"""Makes JSON documents about the cluster for clients, also before the cluster exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.controller.cluster import Cluster
from cluster.controller.workers import MODEL_FACTS
from cluster.core.states import ClusterState
from cluster.core.topology import LARGE_CLUSTER
from cluster.load import view

SHARED_S = 1.0
"""Seconds for which callers share stats and documents of a large cluster."""
_NO_BANKS: dict[str, Any] = {"schema": 1, "epoch": 0, "banks": []}


def is_large_cluster(cluster: Cluster) -> bool:
    """Return whether more than ``LARGE_CLUSTER`` workers are alive."""
    return len(cluster.workers.alive()) > LARGE_CLUSTER


class SharedDocuments:
    """Makes documents. In a large cluster, callers share each one for ``SHARED_S`` seconds, unless
    the state of the cluster changes."""

    def __init__(self) -> None:
        self._made: dict[Callable[..., Any], tuple[float, int, dict[str, Any]]] = {}

    def get(
        self, make: Callable[[Cluster | None], dict[str, Any]], cluster: Cluster | None, now: float
    ) -> dict[str, Any]:
        """Return the document that ``make`` makes of the cluster, or a shared one."""
        if cluster is None or not is_large_cluster(cluster):
            return make(cluster)
        made_at, version, document = self._made.get(make, (-SHARED_S, -1, {}))
        if now - made_at >= SHARED_S or version != cluster.version:
            document = make(cluster)
            self._made[make] = (now, cluster.version, document)
        return document


def placement_document(cluster: Cluster | None) -> dict[str, Any]:
    """Return the placement, load and balancedness of all banks, for ``placement --json``.

    ``cluster`` is None before the cluster exists; the document then has no banks.
    """
    if cluster is None:
        return _NO_BANKS
    return view.placement_report(cluster.placement, cluster.load, cluster.profile)


def load_document(cluster: Cluster | None) -> dict[str, Any]:
    """Return tokens by expert and by copy, and their balance, for ``load --json``.

    ``cluster`` is None before the cluster exists; the document then has no banks.
    """
    if cluster is None:
        return {**_NO_BANKS, "model": None, "top_k": 0, "tokens": 0}
    model = str(cluster.workers.model.get("name"))
    document = view.load_document(
        cluster.placement, cluster.load, cluster.profile, model, cluster.top_k
    )
    holders = cluster.workers.by_device(cluster.placement.num_devices)
    domains = [r.member.domain or r.member.node if r else "" for r in holders]
    for bank, entry in zip(cluster.placement.banks, document["banks"], strict=True):
        entry["at_risk"] = view.num_at_risk(bank, domains)
    return {**document, "workers": [r.name if r and not r.is_lost else None for r in holders]}


def snapshot_before_start() -> dict[str, Any]:
    """Return the stand-in for ``Controller.snapshot`` before the cluster has workers."""
    return {
        **dict.fromkeys(("version", "term", "generation", "placement_epoch"), 0),
        **dict.fromkeys(("error", "mode", "rebalance", "results")),
        "schema": 1,
        "state": ClusterState.STARTING.value,
        "mode_reason": "",
        "experts_complete": False,
        "model": dict.fromkeys(("name", "path", *MODEL_FACTS)),
        "start": [],
        "workers": [],
        "history": [],
    }
