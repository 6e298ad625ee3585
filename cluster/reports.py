"""Answers for people and tools that are more than one object's own data."""

from __future__ import annotations

from typing import Any

from cluster.states import ClusterState

MODEL_KEYS = ("name", "path", "model_type", "dtype", "max_model_len", "vocab_size")
"""Keys of a snapshot's ``model``."""


def snapshot_before_start() -> dict[str, Any]:
    """``Controller.snapshot`` of a cluster that has no workers yet."""
    return {
        "version": 0,
        "schema": 1,
        "state": ClusterState.STARTING.value,
        "error": None,
        "mode": None,
        "mode_reason": "",
        "term": 0,
        "generation": 0,
        "placement_epoch": 0,
        "experts_complete": False,
        "model": dict.fromkeys(MODEL_KEYS),
        "rebalance": None,
        "workers": [],
        "gateway": [],
        "history": [],
    }
