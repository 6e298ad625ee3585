"""The part of the cluster's state that clients with an API key may see. Pure.

Stats by expert and layer are omitted: from the number of tokens that a single request sent to each
expert, another tenant could reconstruct the request's text (source: arXiv 2602.04105). Addresses,
processes and paths of hosts are omitted, too.
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
"""Maps each address field of a gateway to the field with only its port, which clients see."""
_PREFIXES = ("expert_", "experts_", "dispatch_")
"""Name prefixes of metrics that reveal which experts tokens use, as a worker holds few experts."""
_OPEN_METRICS = frozenset({"expert_worker_up", "expert_worker_slots", "dispatch_seconds"})
"""Metrics that do not reveal which experts tokens use, although their names suggest it."""
_LABELS = frozenset({"layer", "expert", "bank"})


def client_status(status: Mapping[str, Any], opens_admin_ports: bool) -> dict[str, Any]:
    """Return the part of a cluster's status that a client with an API key may see.

    ``is_partial`` is True in the result.

    Args:
        status: the whole status.
        opens_admin_ports: whether API keys open the admin ports, as there is no admin key.
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
    """Return the workers of a cluster status without hosts, processes and most stats."""
    return [
        {**_picked(worker, _WORKER), "stats": _picked(worker.get("stats") or {}, _STATS)}
        for worker in status.get("workers") or ()
    ]


def client_samples(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return dashboard samples without the balance of experts."""
    return [_picked(sample, _SAMPLE) for sample in samples]


def client_families(families: Iterable[PlainFamily]) -> Iterator[PlainFamily]:
    """Yield metric families that do not reveal which experts tokens use, without node names."""
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
    """Return the name and the ports of a gateway, without its addresses."""
    shown = {
        name: int(str(found[address]).rpartition(":")[2])
        for address, name in ports.items()
        if found.get(address)
    }
    return {"name": found.get("name"), **shown}


def _picked(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
