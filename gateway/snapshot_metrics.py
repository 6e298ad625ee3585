"""What collectors of the controller's snapshot have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Snapshot = Callable[[], Mapping[str, Any] | None]
"""The controller's latest, None while there is none."""


class SnapshotCollector(Collector):
    """Reads the controller's snapshot at each scrape; what it makes of it is up to ``collect``.

    Args:
        model_name: label of every series.
        prefix: in front of every name.
        snapshot: the controller's latest, None while there is none.
    """

    def __init__(self, model_name: str, prefix: str, snapshot: Snapshot) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing is fixed beforehand."""
        return []


def buckets_of(limited: Sequence[tuple[float, float]], count: float) -> list[tuple[str, float]]:
    """Buckets of a histogram as Prometheus wants them: (limit, count up to it), all at the end."""
    return [*((str(float(limit)), number) for limit, number in limited), ("+Inf", count)]
