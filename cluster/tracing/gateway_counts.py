"""What the gateways of a cluster have counted, kept by each of them and by the controller.

The gateways and the controller tell each other what is new, so that the history and the totals of
the web page outlive any one of these processes. Pure; times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

KEPT_S = 600.0
"""Age of the oldest sample, counted from the newest of all."""
MAX_GATEWAYS = 64
"""Gateways whose records are kept; those that counted last."""


class GatewayRecord(TypedDict):
    """What one gateway has counted."""

    time: float
    """Of the count."""
    created: float
    """When the gateway started."""
    totals: dict[str, float]
    """Counters by name."""
    samples: list[dict[str, Any]]
    """Each with its ``time``, the oldest first: see ``gateway.observability.samples.Sample``."""


class GatewayCounts:
    """The records of gateways, by name: of those that run and of those that have ended."""

    def __init__(self) -> None:
        self._records: dict[str, GatewayRecord] = {}

    def merge(self, records: Mapping[str, GatewayRecord]) -> None:
        """Take in newer records; their samples follow those that are known."""
        for name, record in records.items():
            known = self._records.get(name)
            samples = known["samples"] if known else []
            last_s = samples[-1]["time"] if samples else 0.0
            fresh = [sample for sample in record["samples"] if sample["time"] > last_s]
            newest = record if known is None or record["time"] > known["time"] else known
            self._records[name] = {**newest, "samples": [*samples, *fresh]}
        self._forget()

    def after(self, times: Mapping[str, float]) -> dict[str, GatewayRecord]:
        """The records that are newer than ``times``, by gateway, with the newer samples alone."""
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
        """Take in the records of a gateway that has those of ``times``.

        Returns ``records`` that it lacks, and ``times`` of all that are here now.
        """
        self.merge(records)
        return {"records": self.after(times), "times": self.times()}

    def ended(self, running: Iterable[str]) -> dict[str, GatewayRecord]:
        """Records of the gateways that are not among ``running``."""
        known = set(running)
        return {name: record for name, record in self._records.items() if name not in known}

    def _forget(self) -> None:
        order = sorted(self._records, key=lambda name: self._records[name]["time"])
        for name in order[:-MAX_GATEWAYS]:
            del self._records[name]
        oldest_s = max((r["time"] for r in self._records.values()), default=0.0) - KEPT_S
        for record in self._records.values():
            record["samples"] = [s for s in record["samples"] if s["time"] > oldest_s]
