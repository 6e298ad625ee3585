"""Values of metrics in a controller's snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metric(snapshot: Mapping[str, Any], name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels; 0 without any."""
    return sum(
        float(value)
        for family in snapshot["metrics"]
        for sample, own, value in family["samples"]
        if sample == name and labels.items() <= own.items()
    )


def decisions(snapshot: Mapping[str, Any]) -> dict[str, int]:
    """Decisions to rebalance by their outcome, those that there were."""
    counts = {
        labels["outcome"]: int(value)
        for family in snapshot["metrics"]
        for sample, labels, value in family["samples"]
        if sample == "rebalance_total"
    }
    return {outcome: count for outcome, count in counts.items() if count}
