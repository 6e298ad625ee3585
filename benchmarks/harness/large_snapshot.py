"""What the controller of a large cluster tells gateways: a snapshot and the experts' load."""

from __future__ import annotations

from typing import Any

from cluster.core.topology import Role
from gateway.observability.cluster_metrics import WORKER_TEXTS

_NUM_BUCKETS = 15
_NUM_WATCHED = 8


def snapshot_of(num_attention: int, num_experts: int) -> dict[str, Any]:
    """A snapshot in which every worker has all of its numbers."""
    pools: dict[Role, int] = {"attention": num_attention, "expert": num_experts}
    workers = [_worker(role, rank) for role, count in pools.items() for rank in range(count)]
    return {"state": "SERVING", "workers": workers, "placement_epoch": 3, "metrics": ()}


def load_of_banks(num_layers: int, num_experts: int) -> dict[str, Any]:
    """The load document of a model with one bank of experts in each layer."""
    balance = {"achieved": 0.9, "predicted": 0.8}
    bank = {
        "bank": "mlp",
        "counts": [7] * num_experts,
        "watched": list(range(_NUM_WATCHED)),
        "watched_tokens": [7] * _NUM_WATCHED,
        "rest_tokens": 7 * (num_experts - _NUM_WATCHED),
        "copies": [1] * (num_experts - 4) + [2] * 4,
        "at_risk": num_experts - 4,
        "phases": {"prefill": balance, "decode": balance},
    }
    banks = [{**bank, "layer": layer} for layer in range(num_layers)]
    return {"banks": banks, "phases": bank["phases"]}


def _worker(role: Role, rank: int) -> dict[str, Any]:
    stats: dict[str, float] = {}
    for name in WORKER_TEXTS:
        if _is_of(role, name):
            stats |= _samples(name, float(rank))
    return {
        "name": f"{role}-{rank}",
        "role": role,
        "rank": rank,
        "node": f"node-{rank:040}",
        "state": "SERVING",
        "stats": stats,
        "kv_blocks_total": 4096,
        "kv_blocks_free": 7,
        "slots": 6,
    }


def _is_of(role: Role, name: str) -> bool:
    is_general = name.startswith(("gpu_", "steps_total", "bubble_"))
    is_of_experts = name.startswith(("expert_", "dispatch_bytes", "dispatch_padding"))
    return is_general or is_of_experts == (role == "expert")


def _samples(name: str, value: float) -> dict[str, float]:
    if not (name.endswith("_seconds") or name == "iteration_tokens_total"):
        return {name: value}
    buckets = {f'{name}_bucket{{le="{bound}"}}': value for bound in range(_NUM_BUCKETS)}
    return {**buckets, f'{name}_bucket{{le="+Inf"}}': 9e9, f"{name}_count": 9e9, f"{name}_sum": 1.0}
