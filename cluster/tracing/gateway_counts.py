"""Counters and samples of all gateways, which each gateway and the controller store.

The gateways and the controller exchange new records, so that the history and totals of the web page
survive the end of any of these processes. Pure; times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

RETENTION_S = 600.0
"""Maximum age of a sample, relative to the newest one."""
MAX_GATEWAYS = 64
"""Maximum number of gateways whose records are kept; the most recent ones stay."""


class GatewayRecord(TypedDict):
    """Counters and samples of one gateway."""

    time: float
    """Time of the record."""
    created: float
    """Time of the gateway's start."""
    totals: dict[str, float]
    """Counters by name."""
    samples: list[dict[str, Any]]
    """Samples with their ``time``, oldest first: see ``gateway.observability.samples.Sample``."""


class GatewayCounts:
    """Stores the records of running and ended gateways by name."""

    def __init__(self) -> None:
        self._records: dict[str, GatewayRecord] = {}

    def merge(self, records: Mapping[str, GatewayRecord]) -> None:
        """Merge newer records; append their samples to the known ones."""
        for name, record in records.items():
            known = self._records.get(name)
            samples = known["samples"] if known else []
            last_s = samples[-1]["time"] if samples else 0.0
            fresh = [sample for sample in record["samples"] if sample["time"] > last_s]
            newest = record if known is None or record["time"] > known["time"] else known
            self._records[name] = {**newest, "samples": [*samples, *fresh]}
        self._drop_old_records()

    def newer_than(self, times: Mapping[str, float]) -> dict[str, GatewayRecord]:
        """Return the records newer than ``times`` by gateway, each with only its newer samples."""
        return {
            name: {
                **record,
                "samples": [s for s in record["samples"] if s["time"] > times.get(name, 0.0)],
            }
            for name, record in self._records.items()
            if record["time"] > times.get(name, 0.0)
        }

    def times(self) -> dict[str, float]:
        """Time of each record."""
        return {name: record["time"] for name, record in self._records.items()}

    def exchange(
        self, records: Mapping[str, GatewayRecord], times: Mapping[str, float]
    ) -> dict[str, Any]:
        """Merge ``records`` from a gateway; ``times`` are those of the records that it has.

        Returns the ``records`` that the gateway lacks, and the ``times`` of all records here.
        """
        self.merge(records)
        return {"records": self.newer_than(times), "times": self.times()}

    def ended(self, running: Iterable[str]) -> dict[str, GatewayRecord]:
        """Records of gateways that are not in ``running``."""
        known = set(running)
        return {name: record for name, record in self._records.items() if name not in known}

    def _drop_old_records(self) -> None:
        order = sorted(self._records, key=lambda name: self._records[name]["time"])
        for name in order[:-MAX_GATEWAYS]:
            del self._records[name]
        oldest_s = max((r["time"] for r in self._records.values()), default=0.0) - RETENTION_S
        for record in self._records.values():
            record["samples"] = [s for s in record["samples"] if s["time"] > oldest_s]
