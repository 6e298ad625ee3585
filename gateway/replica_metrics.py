"""Metrics of several gateway replicas: families on their way, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

LABEL = "gateway"
"""Label that tells the replicas' series apart."""


def families_to_plain(families: Iterable[Metric]) -> list[dict[str, Any]]:
    """Plain data that ``ReplicaFamilies`` reads."""
    return [
        {
            "name": family.name,
            "text": family.documentation,
            "type": family.type,
            "samples": [(s.name, dict(s.labels), s.value) for s in family.samples],
        }
        for family in families
    ]


class ReplicaFamilies(CollectorRegistry):
    """Every family once, with the samples of all replicas.

    Args:
        replicas: what ``families_to_plain`` made, by replica.
    """

    def __init__(self, replicas: Mapping[str, list[dict[str, Any]]]) -> None:
        super().__init__()
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """See the class."""
        merged: dict[str, Metric] = {}
        for replica, families in self._replicas.items():
            for found in families:
                name = found["name"]
                if name not in merged:
                    merged[name] = Metric(name, found["text"], found["type"])
                for sample, labels, value in found["samples"]:
                    merged[name].add_sample(sample, {**labels, LABEL: replica}, value)
        yield from merged.values()
