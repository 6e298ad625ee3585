"""Configurations for clusters in which workers are lost, added and removed."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.serving_cluster import make_config
from cluster.config.cluster import ClusterConfig
from cluster.config.transport import TransportSection
from cluster.launch.model_source import bundled_checkpoint

DETECTION_LIMIT_S = TransportSection().detection_limit_s
"""Default detection limit of the product."""


def row_config(
    num_attention: int,
    num_experts: int,
    *,
    num_redundant: int = 0,
    mode: str = "disaggregated",
    transport: str = "sockets",
    detection_limit_s: float = DETECTION_LIMIT_S,
    **sections: dict[str, Any],
) -> ClusterConfig:
    """Configure the bundled model with ``--deterministic``; ``sections`` as in ``make_config``."""
    own: dict[str, dict[str, Any]] = {
        "workers": {"num_redundant_experts": num_redundant, "mode": mode},
        "engine": {
            "deterministic": "on",
            "kv_cache_bytes": 64 << 20,
            "max_num_batched_tokens": 64,
        },
        "transport": {"transport": transport, "detection_limit_s": detection_limit_s},
    }
    merged = {name: {**own.get(name, {}), **sections.get(name, {})} for name in {*own, *sections}}
    return make_config(bundled_checkpoint(), num_attention, num_experts, dtype="float32", **merged)
