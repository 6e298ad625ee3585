"""Changes of the cluster that request traces show, as span events or as linked traces. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.core.topology import holds_experts
from cluster.tracing import names

_KEPT = 256


class Event(NamedTuple):
    when_s: float
    """Time by ``time.monotonic``; for a change of the cluster, when its snapshot arrived."""
    name: str
    """Name of the event, from ``cluster.tracing.names``."""
    attributes: Mapping[str, str | int] | None = None


@dataclass(slots=True)
class TracedChange:
    """A change of the cluster that the controller traces. Times are by ``time.monotonic``."""

    name: str
    """Name of the change's span."""
    span_id: bytes
    began_s: float
    ended_s: float = math.inf


class ClusterEvents:
    """Keeps the latest events and traced changes of the cluster, found in controller snapshots."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._epochs: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_KEPT)
        self._living: frozenset[str] = frozenset()
        self._changes: dict[str, TracedChange] = {}

    def take(self, snapshot: Mapping[str, Any], now_s: float) -> None:
        epoch = int(snapshot.get("placement_epoch") or 0)
        if epoch != self._epochs[-1][1]:
            self._events.append(Event(now_s, names.EPOCH_CHANGED, {names.PLACEMENT_EPOCH: epoch}))
            self._epochs.append((now_s, epoch))
        workers = [w for w in snapshot.get("workers", ()) if holds_experts(w["role"])]
        lost = {w["name"] for w in workers if w["state"] == "LOST"}
        for name in sorted(self._living & lost):
            self._events.append(Event(now_s, names.EXPERT_WORKER_LOST, {names.WORKER: name}))
        self._living = frozenset(w["name"] for w in workers) - lost
        self._take_changes(snapshot.get("changes", ()), now_s)

    def _take_changes(self, told: Iterable[Mapping[str, Any]], now_s: float) -> None:
        """Update the traced changes from a snapshot.

        A change ends when the snapshot has its duration, or no longer has the change.
        """
        going_on = {
            span_id for span_id, change in self._changes.items() if change.ended_s == math.inf
        }
        for change in told:
            span_id, seconds = str(change["span_id"]), change["seconds"]
            if span_id not in self._changes:
                self._changes[span_id] = TracedChange(change["name"], bytes.fromhex(span_id), now_s)
                going_on.add(span_id)
            known = self._changes[span_id]
            if seconds is None:
                going_on.discard(span_id)
            elif span_id in going_on:
                known.began_s = min(known.began_s, now_s - seconds)
        for span_id in going_on:
            self._changes[span_id].ended_s = now_s
        while len(self._changes) > _KEPT:
            del self._changes[next(iter(self._changes))]

    def epoch_at(self, when_s: float) -> int:
        """Return the placement epoch that was active at the monotonic time ``when_s``.

        The epoch is from the received snapshots; the oldest known epoch if ``when_s`` is earlier.
        """
        known = (epoch for since_s, epoch in reversed(self._epochs) if since_s <= when_s)
        return next(known, self._epochs[0][1])

    def changes(self, began_s: float, ended_s: float) -> Iterator[TracedChange]:
        """Return the traced changes that overlap the time from ``began_s`` to ``ended_s``."""
        return (
            change
            for change in self._changes.values()
            if change.began_s <= ended_s and change.ended_s >= began_s
        )

    def between(self, began_s: float, ended_s: float) -> Iterator[Event]:
        return (event for event in self._events if began_s <= event.when_s <= ended_s)
