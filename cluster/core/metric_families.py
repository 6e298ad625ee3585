"""Prometheus metrics as plain data, on their way from the process that counts to the one scraped.

It imports ``prometheus_client``; nothing else in this folder does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PlainFamily = dict[str, Any]
"""``name``, ``text`` (help), ``type`` and ``samples``: [name, labels, value]."""


def new_registry() -> CollectorRegistry:
    """An empty registry whose metrics have no ``_created`` series."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def to_plain(registry: CollectorRegistry) -> list[PlainFamily]:
    """All families of a registry, which ``MergedFamilies`` reads."""
    return [
        {
            "name": family.name,
            "text": family.documentation,
            "type": family.type,
            "samples": [[s.name, dict(s.labels), s.value] for s in family.samples],
        }
        for family in registry.collect()
    ]


class MergedFamilies(Collector):
    """Plain families of several processes, each family once; all names get ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: dict[str, Metric] = {}

    def add(self, added: Iterable[PlainFamily], **labels: str) -> None:
        """Add families of one process, whose samples get more labels."""
        for found in added:
            name = self._prefix + found["name"]
            family = self._families.setdefault(name, Metric(name, found["text"], found["type"]))
            for sample, own_labels, value in found["samples"]:
                family.add_sample(self._prefix + sample, {**own_labels, **labels}, value)

    def collect(self) -> Iterable[Metric]:
        """In the order in which they were added."""
        return self._families.values()
