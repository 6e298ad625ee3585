"""What happened to the cluster while requests ran: moments that belong into their traces. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import spans
from cluster.spans import Value
from cluster.topology import holds_experts

_KEPT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Something happened."""

    name: str
    """An event's, in ``cluster.spans``."""
    when_s: float
    """``time.monotonic``; of the cluster's, when this gateway heard of it."""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    """What it was about."""


class ClusterMoments:
    """The last ones, seen in the controller's snapshots."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque(maxlen=_KEPT)
        self._epochs: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_KEPT)
        self._living: frozenset[str] = frozenset()

    def take(self, snapshot: Mapping[str, Any], now_s: float) -> None:
        """A snapshot came."""
        epoch = int(snapshot.get("placement_epoch") or 0)
        if epoch != self._epochs[-1][1]:
            self._add(spans.EPOCH_CHANGED, now_s, spans.PLACEMENT_EPOCH, epoch)
            self._epochs.append((now_s, epoch))
        workers = [w for w in snapshot.get("workers", ()) if holds_experts(w["role"])]
        lost = {w["name"] for w in workers if w["state"] == "LOST"}
        for name in sorted(self._living & lost):
            self._add(spans.EXPERT_WORKER_LOST, now_s, spans.WORKER, name)
        self._living = frozenset(w["name"] for w in workers) - lost

    def epoch_at(self, when_s: float) -> int:
        """The placement that was in force, as far as was known here."""
        known = (epoch for since_s, epoch in reversed(self._epochs) if since_s <= when_s)
        return next(known, self._epochs[0][1])

    def between(self, began_s: float, ended_s: float) -> Iterator[Moment]:
        """Those of a period."""
        return (moment for moment in self._moments if began_s <= moment.when_s <= ended_s)

    def _add(self, name: str, now_s: float, attribute: str, value: Value) -> None:
        self._moments.append(Moment(name=name, when_s=now_s, attributes={attribute: value}))
