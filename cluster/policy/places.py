"""Places of the cluster: tracks the empty ones and decides when a new worker starts. Pure.

A place is a position in a pool: a role and a rank. Scaling adds and removes places. If a worker is
lost, a new worker starts in its place with the same rank and device under a new name
(``expert-1.2`` after ``expert-1``). Times are arguments.

    FILLED ──▶ EMPTY ◀──▶ STARTING ──▶ FILLED
       │         ▲           │ └─────▶ LEFT_OUT ──▶ EMPTY
       └─────▶ CORDONED ◀────┘

From each state except FILLED a place may be REMOVED; ``add`` makes it EMPTY again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import cast

from msgspec.structs import replace

from cluster.core.codec import Message
from cluster.core.states import next_state
from cluster.core.topology import ADDRESS_FIELDS, Member, Role, holds_experts

NodeIds = Mapping[str, frozenset[str]]
"""Address of a host -> ids of its live nodes; an old node counts until Ray notices its end."""
MAX_START_DEATHS = 3
"""Number of consecutive deaths during starts after which a place is skipped."""
LEFT_OUT_S = 300.0
"""Time until a skipped place gets one more try: the longest back-off of a restarted container in
Kubernetes."""
_CALM_S = 60.0
_MAX_DELAY_S = 30.0
"""Longest delay between two workers of a place, also of a skipped place while no generation
runs."""


class PlaceState(Enum):
    """State of a place."""

    FILLED = "filled"
    """Its worker has been in a generation, or belongs to the start of the cluster."""
    EMPTY = "empty"
    """Its worker is lost. Another one starts, with a delay if several were lost recently."""
    STARTING = "starting"
    """Its worker has never been in a generation."""
    LEFT_OUT = "left out"
    """Skipped: too many workers died while they started. Another one starts after ``LEFT_OUT_S``,
    or sooner if the cluster cannot run without it."""
    CORDONED = "cordoned"
    """Its worker was drained; no other starts before ``reopen``."""
    REMOVED = "removed"
    """Removed by scaling. The number of its workers is kept, so that names are not reused."""


_NEXT = {
    PlaceState.FILLED: {PlaceState.EMPTY, PlaceState.CORDONED},
    PlaceState.EMPTY: {PlaceState.STARTING, PlaceState.REMOVED},
    PlaceState.STARTING: {
        PlaceState.FILLED,
        PlaceState.EMPTY,
        PlaceState.LEFT_OUT,
        PlaceState.CORDONED,
        PlaceState.REMOVED,
    },
    PlaceState.LEFT_OUT: {PlaceState.EMPTY, PlaceState.REMOVED},
    PlaceState.CORDONED: {PlaceState.EMPTY, PlaceState.REMOVED},
    PlaceState.REMOVED: {PlaceState.EMPTY},
}
_CLOSED = (PlaceState.LEFT_OUT, PlaceState.CORDONED)
_HELD = (PlaceState.FILLED, PlaceState.STARTING)


class ClosedPlace(Message, frozen=True, kw_only=True):
    """A place in which no worker starts, as stored for the next controller."""

    state: PlaceState
    why: str
    node: str = ""
    """Address of the node that must leave first; empty if another event reopens the place."""
    node_ids: frozenset[str] = frozenset()
    """Ids of the nodes at that address; empty until known. A host may return as another node before
    its departure is noticed."""


@dataclass(slots=True)
class _Place:
    """One place of the cluster."""

    member: Member
    """Its newest worker."""
    number: int
    """Number of workers that the place has had."""
    state: PlaceState = PlaceState.FILLED
    not_before: float = 0.0
    """Monotonic time at which the next worker may start."""
    start_deaths: int = 0
    """Deaths during starts since the last worker that served."""
    lost_at: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Monotonic times of the last losses."""
    closed: ClosedPlace | None = None
    """Set while it is skipped or cordoned."""
    is_new: bool = False
    """Whether scaling is adding it: no worker of it has been in a generation, and the cluster runs
    without it."""

    @property
    def name(self) -> str:
        return place_name(self.member.role, self.member.rank)

    def enter(self, state: PlaceState) -> None:
        self.state, self.closed = next_state(self.state, state, _NEXT), None

    def close(self, state: PlaceState, why: str, node: str, node_ids: frozenset[str]) -> None:
        self.enter(state)
        self.closed = ClosedPlace(state=state, why=why, node=node, node_ids=node_ids)


class Places:
    """All places of a cluster. Owned by the controller."""

    def __init__(self, members: Sequence[Member]) -> None:
        """``members`` are all workers so far, including the newest of each place."""
        by_age = sorted(members, key=lambda m: _number_of(m.name))
        self._places = {
            place_name(m.role, m.rank): _Place(member=m, number=_number_of(m.name)) for m in by_age
        }
        self._alive: NodeIds = {}

    def lost(self, name: str, reason: str, now: float) -> None:
        """Record a lost worker. No effect if it has already left its place."""
        place = self._place_of(name)
        if place is None or place.state not in _HELD:
            return
        recent = sum(now - at < _CALM_S for at in place.lost_at)
        place.lost_at.append(now)
        place.not_before = now + (min(2.0 ** (recent - 1), _MAX_DELAY_S) if recent else 0.0)
        place.start_deaths += place.state is PlaceState.STARTING
        if place.state is PlaceState.STARTING and place.start_deaths >= MAX_START_DEATHS:
            why = f"died {place.start_deaths} times while starting, last: {reason}"
            place.close(PlaceState.LEFT_OUT, why, "", frozenset())
            place.not_before = now + LEFT_OUT_S
        else:
            place.enter(PlaceState.EMPTY)

    def cordon(self, name: str, node: str = "") -> None:
        """Keep the place of a drained worker empty until ``reopen``, or until ``node`` has left."""
        place = self._place_of(name)
        if place is not None and place.state in _HELD:
            ids = self._alive.get(node, frozenset())
            place.close(PlaceState.CORDONED, "left on purpose", node, ids)

    def reopen(self, name: str) -> None:
        """Allow a new worker in the place of this drained or failed one."""
        place = self._place_of(name)
        if place is not None and place.state in _CLOSED:
            place.enter(PlaceState.EMPTY)
            place.start_deaths, place.not_before = 0, 0.0

    def nodes_alive(self, alive: NodeIds) -> bool:
        """Reopen the places whose nodes have left; return whether any place has changed."""
        self._alive, before = alive, self.closed
        for place in self._places.values():
            closed = place.closed
            if closed is None or not closed.node:
                continue
            there = alive.get(closed.node, frozenset())
            if not there or (closed.node_ids and not closed.node_ids & there):
                self.reopen(place.member.name)
            elif not closed.node_ids:
                place.closed = replace(closed, node_ids=there)
        return self.closed != before

    def joined(self, members: Iterable[Member]) -> None:
        """Record that these workers are in a running generation."""
        for member in members:
            place = self._place_of(member.name)
            if place is not None and place.state is PlaceState.STARTING:
                place.enter(PlaceState.FILLED)
                place.start_deaths, place.is_new = 0, False

    def take_due(self, now: float, is_stalled: bool = False) -> list[Member]:
        """Return new workers to start now; they report addresses and node themselves.

        If the cluster cannot run (``is_stalled``), skipped places are tried sooner.
        """
        sooner_s = LEFT_OUT_S - _MAX_DELAY_S if is_stalled else 0.0
        due = []
        for place in self._places.values():
            if place.state is PlaceState.LEFT_OUT and now >= place.not_before - sooner_s:
                place.enter(PlaceState.EMPTY)
                place.not_before = now
            if place.state is not PlaceState.EMPTY or now < place.not_before:
                continue
            old = place.member
            place.number += 1
            name = place.name if place.number == 1 else f"{place.name}.{place.number}"
            unknown = dict.fromkeys(ADDRESS_FIELDS, "")
            place.member = replace(old, name=name, node="", pid=0, **unknown)
            place.enter(PlaceState.STARTING)
            due.append(place.member)
        return due

    def is_full(self, members: Iterable[Member]) -> bool:
        """Return whether these workers fill every place that is not new."""
        names = {m.name for m in members}
        return all(p.member.name in names for p in self._present() if not p.is_new)

    @property
    def are_due(self) -> bool:
        """Return whether a worker will be started for some place, now or later."""
        return any(p.state is PlaceState.EMPTY for p in self._places.values())

    # ---- scaling --------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Names of the places, such as ``expert-1``, by role and rank."""
        return tuple(p.name for p in self._present())

    def roles(self) -> dict[str, Role]:
        """Places of the cluster with their roles."""
        return {p.name: p.member.role for p in self._present()}

    def pools(self) -> dict[Role, int]:
        """Number of places of each role."""
        return dict(Counter(p.member.role for p in self._present()))

    def devices(self) -> frozenset[int]:
        """Devices with experts if every place is filled."""
        return frozenset(p.member.device for p in self._present() if p.member.holds_experts)

    def workers_of(self, names: Iterable[str]) -> list[str]:
        """The newest worker of each of these places."""
        return [self._places[name].member.name for name in names]

    def is_new(self, name: str) -> bool:
        """Whether scaling is adding this place: none of its workers has been in a running
        generation."""
        return self._places[name].is_new

    def to_add(self, role: Role, count: int) -> list[str]:
        """Return the places to add for ``count`` workers of a role: unused ones of the lowest
        ranks."""
        taken = {p.member.rank for p in self._present() if p.member.role == role}
        free = [rank for rank in range(count + len(taken)) if rank not in taken]
        return [place_name(role, rank) for rank in free[: max(count - len(taken), 0)]]

    def to_remove(self, role: Role, count: int) -> list[str]:
        """Return the places to remove for ``count`` workers of a role: first places without a
        worker, then high ranks."""
        own = [p for p in self._present() if p.member.role == role]
        own.sort(key=lambda p: (p.state is not PlaceState.FILLED, p.member.rank))
        return sorted(p.name for p in own[count:])

    def add(self, names: Iterable[str]) -> None:
        """Add empty places to the cluster."""
        for name in names:
            place = self._places.get(name)
            if place is None:
                self._places[name] = place = _Place(
                    member=_first_member(name), number=0, state=PlaceState.REMOVED
                )
            place.enter(PlaceState.EMPTY)
            place.is_new, place.start_deaths, place.not_before = True, 0, 0.0

    def remove(self, names: Iterable[str]) -> None:
        """Remove places from the cluster; none of them is filled."""
        for name in names:
            place = self._places[name]
            place.enter(PlaceState.REMOVED)
            place.is_new = False

    def _present(self) -> list[_Place]:
        found = [p for p in self._places.values() if p.state is not PlaceState.REMOVED]
        return sorted(found, key=lambda p: (p.member.role, p.member.rank))

    @property
    def closed(self) -> dict[str, ClosedPlace]:
        """Places in which no worker starts now, such as ``expert-1``, with the reason."""
        return {name: p.closed for name, p in self._places.items() if p.closed is not None}

    def restore(
        self,
        closed: Mapping[str, ClosedPlace],
        gone: Mapping[str, str],
        now: float,
        *,
        names: Collection[str] = (),
        new: Collection[str] = (),
        members: Collection[str] | None = None,
    ) -> None:
        """Restore places of an earlier controller; ``gone``: workers that left (name -> reason).

        ``names`` are all its places, empty if unknown, and ``new`` the places that it was adding.
        ``members`` are the workers of its newest generation, None if unknown.
        """
        self.add(name for name in names if name not in self._places)
        for name, place in self._places.items():
            place.is_new = name in new
            worker = place.member.name
            is_member = not place.is_new and (members is None or worker in members)
            if place.state is PlaceState.FILLED and not is_member and worker not in gone:
                place.state = PlaceState.STARTING  # restored, not a change
            if names and name not in names:
                place.state = PlaceState.REMOVED
                continue
            if (known := closed.get(name)) is not None:
                place.state, place.closed = known.state, known
                if place.state is PlaceState.LEFT_OUT:
                    place.start_deaths = MAX_START_DEATHS - 1
                    place.not_before = now + LEFT_OUT_S
            elif place.member.name in gone:
                self.lost(place.member.name, gone[place.member.name], now)

    def _place_of(self, name: str) -> _Place | None:
        found = (p for p in self._places.values() if p.member.name == name)
        return next(found, None)


def place_name(role: Role, rank: int) -> str:
    """Return the name of a place, such as ``expert-1``; its first worker has the same name."""
    return f"{role}-{rank}"


def place_of(worker: str) -> str:
    """Return the place of a worker: ``expert-1`` for ``expert-1.2``."""
    return worker.partition(".")[0]


def _first_member(place: str) -> Member:
    kind, _, rank = place.partition("-")
    role = cast("Role", kind)
    device = int(rank) if holds_experts(role) else -1
    return Member(name=place, role=role, rank=int(rank), device=device)


def _number_of(name: str) -> int:
    """Return the number of workers that a place has had, from its newest worker's name."""
    _, _, number = name.partition(".")
    return int(number) if number.isdigit() else 1
