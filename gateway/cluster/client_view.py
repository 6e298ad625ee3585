"""The part of the cluster's state that clients with a key may see. Pure.

Stats by expert and layer are omitted: with the counts of a single request's routes, another
tenant could reconstruct its text (source: arXiv 2602.04105). Addresses, processes and paths of
hosts are omitted, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.core.metric_families import PlainFamily

_STATUS = (
    *("schema", "version", "release", "state", "mode", "term", "generation", "placement_epoch"),
    *("experts_complete", "results"),
)
_WORKER = (
    *("name", "role", "rank", "state", "slots", "kv_blocks_free", "kv_blocks_total", "kv_usage"),
)
_STATS = ("num_requests_running", "num_requests_waiting")
_SAMPLE = (
    *("time", "seconds", "prompt", "output", "moved", "again", "ttft", "itl", "waiting", "kv"),
)
_PORTS = {"grpc": "grpc_port", "admin_http": "admin_port"}
"""Maps the name of a gateway's address to the name of the field that replaces it by the port."""
_PREFIXES = ("expert_", "experts_", "dispatch_")
"""Prefixes of metrics that reveal routes of tokens, as an expert worker holds few experts."""
_OPEN_METRICS = frozenset({"expert_worker_up", "expert_worker_slots", "dispatch_seconds"})
"""Metrics with one of ``_PREFIXES`` that do not reveal routes."""
_LABELS = frozenset({"layer", "expert", "bank"})


def client_status(status: Mapping[str, Any], opens_admin_ports: bool) -> dict[str, Any]:
    """Return the status of a cluster for a client, with ``is_partial`` set.

    Args:
        status: the whole status.
        opens_admin_ports: whether this key opens the admin ports, as there is no admin key.
    """
    ports = _PORTS if opens_admin_ports else {"grpc": "grpc_port"}
    model = {n: v for n, v in (status.get("model") or {}).items() if n != "path"}
    return {
        **_picked(status, _STATUS),
        "is_partial": True,
        "model": model,
        "adapters": [_picked(one, ("name", "state")) for one in status.get("adapters") or ()],
        "workers": client_workers(status),
        "gateway": [_gateway(one, ports) for one in status.get("gateway") or ()],
    }


def client_workers(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the workers without hosts and processes, with only the stats of ``/metrics``."""
    return [
        {**_picked(worker, _WORKER), "stats": _picked(worker.get("stats") or {}, _STATS)}
        for worker in status.get("workers") or ()
    ]


def client_samples(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return samples for the dashboard without hosts and the balance of experts."""
    return [_picked(sample, _SAMPLE) for sample in samples]


def client_families(families: Iterable[PlainFamily]) -> Iterator[PlainFamily]:
    """Yield metrics without series by expert or layer, and without addresses of nodes."""
    for family in families:
        name, samples = family["name"], family["samples"]
        follows_routes = name.startswith(_PREFIXES) and name not in _OPEN_METRICS
        if follows_routes or any(_LABELS & labels.keys() for _, labels, _ in samples):
            continue
        shown = [
            [n, {**labels, "node": ""} if "node" in labels else labels, value]
            for n, labels, value in samples
        ]
        yield {**family, "samples": shown}


def _gateway(found: Mapping[str, Any], ports: Mapping[str, str]) -> dict[str, Any]:
    """Describe a gateway with ports in place of addresses."""
    shown = {
        name: int(str(found[address]).rpartition(":")[2])
        for address, name in ports.items()
        if found.get(address)
    }
    return {"name": found.get("name"), **shown}


def _picked(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
