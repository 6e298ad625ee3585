"""Store of the counters and samples of all gateways; each gateway and the controller has one.

The gateways and the controller exchange new records, so that the history and totals of the web page
survive the end of any of these processes. Pure; times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

RETENTION_S = 600.0
"""Maximum age of a stored sample in seconds, relative to the newest record."""
MAX_GATEWAYS = 64
"""Maximum number of gateways with stored records; the oldest records are dropped."""


class GatewayRecord(TypedDict):
    """Counters and samples of one gateway."""

    time: float
    """Time of the record, in seconds since 1970."""
    created: float
    """Time of the gateway's start, in seconds since 1970."""
    totals: dict[str, float]
    """Values of the gateway's counters, by counter name."""
    samples: list[dict[str, Any]]
    """Samples of the gateway, oldest first: ``gateway.observability.samples.Sample`` as dicts."""


class GatewayCounts:
    """Stores the records of running and ended gateways by gateway name."""

    def __init__(self) -> None:
        self._records: dict[str, GatewayRecord] = {}

    def merge(self, records: Mapping[str, GatewayRecord]) -> None:
        """Merge records by gateway name: keep the newer counters, and append newer samples."""
        for name, record in records.items():
            known = self._records.get(name)
            samples = known["samples"] if known else []
            last_s = samples[-1]["time"] if samples else 0.0
            fresh = [sample for sample in record["samples"] if sample["time"] > last_s]
            newest = record if known is None or record["time"] > known["time"] else known
            self._records[name] = {**newest, "samples": [*samples, *fresh]}
        self._drop_old_records()

    def newer_than(self, times: Mapping[str, float]) -> dict[str, GatewayRecord]:
        """Return records newer than their gateway's time in ``times``, with only newer samples."""
        return {
            name: {
                **record,
                "samples": [s for s in record["samples"] if s["time"] > times.get(name, 0.0)],
            }
            for name, record in self._records.items()
            if record["time"] > times.get(name, 0.0)
        }

    def times(self) -> dict[str, float]:
        """Return the time of each gateway's record, by gateway name."""
        return {name: record["time"] for name, record in self._records.items()}

    def exchange(
        self, records: Mapping[str, GatewayRecord], times: Mapping[str, float]
    ) -> dict[str, Any]:
        """Merge ``records`` from a gateway, and return the records that the gateway lacks.

        ``times``: time of each record that the gateway has, by gateway name. Returns ``records``,
        and ``times`` of all records in this store.
        """
        self.merge(records)
        return {"records": self.newer_than(times), "times": self.times()}

    def ended(self, running: Iterable[str]) -> dict[str, GatewayRecord]:
        """Return, by gateway name, the records of gateways that are not in ``running``."""
        known = set(running)
        return {name: record for name, record in self._records.items() if name not in known}

    def _drop_old_records(self) -> None:
        order = sorted(self._records, key=lambda name: self._records[name]["time"])
        for name in order[:-MAX_GATEWAYS]:
            del self._records[name]
        oldest_s = max((r["time"] for r in self._records.values()), default=0.0) - RETENTION_S
        for record in self._records.values():
            record["samples"] = [s for s in record["samples"] if s["time"] > oldest_s]
