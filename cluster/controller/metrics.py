"""Prometheus metrics of the controller: rebalancing, moved weights, recoveries."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

from prometheus_client import Counter, Histogram

from cluster.core.metric_families import PlainFamily, new_registry, to_plain
from cluster.core.topology import Role

MoveReason = Literal["rebalance", "recovery", "drain", "scale"]
"""Cause of a move of expert weights: a rebalancing, a lost worker, a drain or a scaling."""
RebalanceOutcome = Literal["applied", "skipped_gain", "skipped_churn", "failed", "cancelled"]
"""Outcome of a decision on rebalancing; skipped: too little gain, or too soon after the last."""
_OUTCOMES: tuple[RebalanceOutcome, ...] = get_args(RebalanceOutcome)
_SWITCH_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_MIGRATION_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_RECOVERY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class ControllerMetrics:
    """Prometheus metrics of the controller: rebalancing, moved weights, recoveries."""

    def __init__(self, roles: Iterable[Role]) -> None:
        """``roles``: roles of the cluster's workers, each of which labels metrics of recoveries."""
        self._registry = new_registry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self._decisions = counter(
            "rebalance", "Decisions on the placement, by outcome", ["outcome"]
        )
        self._switches = histogram(
            "rebalance_stall_seconds",
            "Time that pending work waited for the first step header of a new placement epoch",
            buckets=_SWITCH_S,
        )
        self._bytes = counter("migration_bytes", "Bytes of weights that moved", ["reason"])
        self._slots = counter("migration_slots_moved", "Expert slots that were filled", ["reason"])
        self._seconds = histogram(
            "migration_seconds",
            "Time from the decision to move experts (in a recovery: the load command) to the end",
            ["reason"],
            buckets=_MIGRATION_S,
        )
        self._recoveries = counter("recoveries", "Recoveries from lost workers", ["cause"])
        self._stalls = histogram(
            "recovery_stall_seconds",
            "Time from the detection of a loss to the next generation that runs",
            ["cause"],
            buckets=_RECOVERY_S,
        )
        for outcome in _OUTCOMES:  # create the label sets, so that counters start at 0
            self._decisions.labels(outcome)
        for role in roles:
            self._recoveries.labels(f"{role}_worker")
            self._stalls.labels(f"{role}_worker")
        for reason in get_args(MoveReason):
            for moved in (self._bytes, self._slots, self._seconds):
                moved.labels(reason)

    def decided(self, outcome: RebalanceOutcome) -> None:
        """Count a decision on rebalancing, by its outcome."""
        self._decisions.labels(outcome).inc()

    def switched(self, stall_s: float) -> None:
        """Record a switch to a new placement epoch, for which steps waited ``stall_s`` seconds."""
        self._switches.observe(stall_s)

    def moved(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        """Record that ``num_bytes`` of weights moved into ``num_slots`` slots in ``seconds``."""
        self._slots.labels(reason).inc(num_slots)
        self._bytes.labels(reason).inc(num_bytes)
        self._seconds.labels(reason).observe(seconds)

    def recovered(self, roles: Iterable[Role], seconds: float) -> None:
        """Record that a generation runs ``seconds`` after workers of these roles were lost."""
        for role in roles:
            self._recoveries.labels(f"{role}_worker").inc()
            self._stalls.labels(f"{role}_worker").observe(seconds)

    def to_plain(self) -> list[PlainFamily]:
        """Return all metrics of the controller as JSON-compatible data, by family."""
        return to_plain(self._registry)
