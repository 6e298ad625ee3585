"""The part of the cluster's state that a client's key may see, if keys are configured.

It leaves out all stats by expert and layer, as counts of a single request's routes let another
tenant reconstruct its text (source: arXiv 2602.04105), and the description of hosts: addresses,
processes and paths. Pure.
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
"""Addresses of a gateway -> name of the field with only the port."""
_PREFIXES = ("expert_", "experts_", "dispatch_")
"""Prefixes of metrics that follow from the routes of tokens: an expert worker holds few experts."""
_OPEN_METRICS = frozenset({"expert_worker_up", "expert_worker_slots", "dispatch_seconds"})
"""Metrics with such a prefix that do not follow from routes."""
_LABELS = frozenset({"layer", "expert", "bank"})


def client_status(status: Mapping[str, Any], opens_admin_ports: bool) -> dict[str, Any]:
    """The status of a cluster for a client's key, with ``is_partial`` set.

    Args:
        status: the whole status.
        opens_admin_ports: there is no admin key, so that this key opens the admin ports.
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
    """Workers without hosts and processes, and only with the stats that ``/metrics`` has too."""
    return [
        {**_picked(worker, _WORKER), "stats": _picked(worker.get("stats") or {}, _STATS)}
        for worker in status.get("workers") or ()
    ]


def client_samples(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of the web page's history without hosts and the balance of experts."""
    return [_picked(sample, _SAMPLE) for sample in samples]


def client_families(families: Iterable[PlainFamily]) -> Iterator[PlainFamily]:
    """Metrics without series by expert or layer, and without the addresses of nodes."""
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
    """A gateway with ports in place of addresses: clients know the host that they call."""
    shown = {
        name: int(str(found[address]).rpartition(":")[2])
        for address, name in ports.items()
        if found.get(address)
    }
    return {"name": found.get("name"), **shown}


def _picked(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
