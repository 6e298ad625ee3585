"""History of the cluster, and the state that a controller leaves to the next one.

The workers store a ``ControllerMemory`` as plain data.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

from msgspec import field, structs

from cluster.controller.drain_operation import Drain
from cluster.controller.operations import Operation
from cluster.controller.scale_operation import Scale
from cluster.controller.workers import WorkerRecord
from cluster.core.codec import Message, to_plain
from cluster.core.frames import AdapterRecord
from cluster.core.placement import ExpertPlacement
from cluster.core.states import AdapterState, WorkerState
from cluster.core.topology import LARGE_CLUSTER, Member
from cluster.policy.places import ClosedPlace

_KEPT = 256
_LEFT_TO_NEXT = 64
"""Number of history entries that a restarted controller gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryEntry:
    """One change of the cluster in its history, with cause and effect."""

    generation: int
    """Number of the cluster's newest generation after the change."""
    time: float
    """Time of day of the change, in seconds since 1970."""
    cause: str
    effect: str
    took_s: float | None = None
    """Seconds from the change until the generation ran or, with ``is_felt``, for which token
    streams paused; None if unknown."""
    is_felt: bool = False
    """Whether ``took_s`` is the longest pause of token streams that a gateway has reported."""


class History:
    """The latest changes of the cluster, newest last."""

    def __init__(self, wall_time_offset_s: float) -> None:
        """``wall_time_offset_s`` plus a monotonic time is the time of day."""
        self._offset_s = wall_time_offset_s
        self._entries: deque[HistoryEntry] = deque(maxlen=_KEPT)

    def restore(self, entries: Iterable[HistoryEntry]) -> None:
        """Restore the entries of an earlier controller."""
        self._entries.extend(entries)

    def newest(self) -> tuple[HistoryEntry, ...]:
        """Return the newest entries, which a restarted controller passes to ``restore``."""
        return tuple(self._entries)[-_LEFT_TO_NEXT:]

    def add(self, generation: int, now: float, cause: str, effect: str) -> None:
        time = round(now + self._offset_s, 3)
        self._entries.append(
            HistoryEntry(generation=generation, time=time, cause=cause, effect=effect)
        )

    def superseded(self, generation: int, by: int) -> None:
        """Record that generation ``by`` runs instead of ``generation``, for the same cause."""
        for place, entry in enumerate(self._entries):
            if entry.generation == generation:
                self._entries[place] = replace(entry, generation=by)
                return

    def runs(self, generation: int, first_step: int, now: float) -> None:
        """Record in the history that ``generation`` now runs, from step ``first_step`` on."""
        place = next((i for i, e in enumerate(self._entries) if e.generation == generation), -1)
        entry = self._entries[place]
        took_s = round(now + self._offset_s - entry.time, 3)
        self._entries[place] = replace(
            entry,
            generation=generation,
            took_s=took_s,
            effect=f"{entry.effect}; runs from step {first_step} after {took_s:.3f} s",
        )

    def paused(self, generation: int, pause_s: float) -> None:
        """Record for how many seconds a gateway's token streams paused until ``generation`` ran."""
        for place, entry in enumerate(self._entries):
            if entry.generation == generation and entry.took_s is not None:
                longest_s = max(pause_s, entry.took_s if entry.is_felt else 0.0)
                felt = replace(entry, took_s=round(longest_s, 3), is_felt=True)
                self._entries[place] = felt
                return

    def to_list(self) -> list[dict[str, Any]]:
        """Return all entries of the history, oldest first, as JSON-compatible data."""
        return [asdict(e) for e in self._entries]


class LostWorker(Message, frozen=True, kw_only=True):
    """A worker that was lost or drained."""

    member: Member
    state: WorkerState
    """State of the worker: LOST or DRAINED."""
    reason: str


class KeptAdapter(Message, frozen=True, kw_only=True):
    """A LoRA adapter that the workers have loaded, are loading or will free."""

    adapter: AdapterRecord
    state: AdapterState
    number: int
    """Number from which on commands to the workers contain the adapter."""
    lacking: tuple[str, ...] = ()
    """Names of the workers that serve without the adapter, because they could not load it."""


class ControllerMemory(Message, frozen=True, kw_only=True):
    """State that the workers store for a restarted controller (``Cluster.memory``)."""

    version: int = 0
    """Version of the controller snapshot; a restarted controller uses the newest one."""
    history: tuple[HistoryEntry, ...] = ()
    """The newest entries of the cluster's history, oldest first."""
    lost: tuple[LostWorker, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """Arguments of the cluster's start: load profile, experts per token, requested options."""
    desired: ExpertPlacement | None = None
    """The desired placement (for the complete cluster); None if it equals the one in force."""
    places: tuple[str, ...] = ()
    """Names of all places, including those that scaling has added."""
    num_prefill: int = 0
    """Number of attention workers that compute prompts; 0 without step groups."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Place name -> number of workers that the place has had; also of removed places."""
    closed: dict[str, ClosedPlace] = field(default_factory=dict)
    """Place name -> reason why no worker starts in the place."""
    operations: tuple[Operation, ...] = ()
    """The newest operations (drains, scalings, rebalancings), oldest first."""
    drain: Drain | None = None
    """The running drain; None if no drain runs."""
    scale: Scale | None = None
    """The running scaling, until all new workers serve; None without one."""
    known_nodes: frozenset[str] = frozenset()
    """Ids of nodes that ``NodeFollower`` does not treat as new: pool sizes include them."""
    adapters: tuple[KeptAdapter, ...] = ()
    has_ordered_adapters: bool = False
    """Whether workers may have received a command about adapters."""


def memory_keepers(workers: Sequence[WorkerRecord]) -> tuple[str, ...]:
    """Return the names of those of the live ``workers`` that store the next ``ControllerMemory``.

    In a large cluster these are ``LARGE_CLUSTER`` workers in as many failure domains, and there on
    as many hosts, as possible, since the memory may contain a placement, and a restarted controller
    uses the newest memory of any worker.
    """
    if len(workers) <= LARGE_CLUSTER:
        return tuple(record.name for record in workers)
    # a starting worker may not have connected yet
    members = [r.member for r in workers if r.state is not WorkerState.STARTING]
    by_host = _spread(members, lambda member: member.node)
    by_domain = _spread(by_host, lambda member: member.domain or member.node)
    return tuple(member.name for member in by_domain[:LARGE_CLUSTER])


def _spread(members: Iterable[Member], place: Callable[[Member], str]) -> list[Member]:
    """Return the members so that the first of them are in as many places as possible."""
    counts, order = Counter[str](), []
    for member in members:
        order.append((counts[place(member)], member))
        counts[place(member)] += 1
    return [member for _, member in sorted(order, key=itemgetter(0))]


def plain_memory(memory: ControllerMemory) -> dict[str, Any]:
    """Return a controller's memory as plain data, for ``ControllerSnapshot.memory``."""
    plain: dict[str, Any] = to_plain(structs.replace(memory, desired=None))
    if memory.desired is not None:
        plain["desired"] = _plain_placement(memory.desired)
    return plain


@lru_cache(maxsize=2)
def _plain_placement(placement: ExpertPlacement) -> Any:
    """Convert a placement, which stays the same in most changes of a cluster. Do not change it."""
    return to_plain(placement)
