"""Answers for people and tools that are more than one object's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.load_profile import LoadProfile, balancedness
from cluster.placement import ExpertPlacement
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
        "generation": 0,
        "placement_epoch": 0,
        "experts_complete": False,
        "model": dict.fromkeys(MODEL_KEYS),
        "workers": [],
        "gateway": [],
        "history": [],
    }


def placement_report(
    placement: ExpertPlacement, load: Mapping[str, Sequence[float]], profile: LoadProfile | None
) -> dict[str, Any]:
    """``placement --json``: maps, observed load, and what balance they make.

    ``load`` is ``"bank:layer"`` -> tokens per logical expert. Balancedness is ``predicted`` from
    the profile that the cluster was started with, ``achieved`` from the observed load; None where
    there is no load.
    """
    banks = []
    for bank in placement.banks:
        counts = list(load.get(f"{bank.bank}:{bank.layer}", ()))
        expected = profile.counts(bank.bank, bank.layer) if profile else ()
        banks.append(
            {
                "bank": bank.bank,
                "layer": bank.layer,
                "physical_to_logical": [list(s) for s in bank.physical_to_logical],
                "load": counts,
                "balancedness": {
                    "predicted": balancedness(bank, expected),
                    "achieved": balancedness(bank, counts),
                },
            }
        )
    return {"schema": 1, "epoch": placement.epoch, "banks": banks}
