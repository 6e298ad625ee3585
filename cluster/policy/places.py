"""Places of the cluster: tracks the empty ones and decides when a new worker starts. Pure.

A place is a position in a pool of workers: a role and a rank. Scaling adds and removes places. If a
worker is lost, a new worker starts in its place with the same rank and device under a new name
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
from cluster.core.topology import ADDRESS_FIELDS, Member, Role, StepGroup, holds_experts

NodeIds = Mapping[str, frozenset[str]]
"""Address of a host -> ids of the live Ray nodes there; a dead node counts until Ray notices."""
MAX_START_DEATHS = 3
"""Number of consecutive workers that die while they start, after which their place is skipped."""
LEFT_OUT_S = 300.0
"""Seconds until another worker is started in a skipped place; the longest back-off of a restarted
container in Kubernetes."""
_CALM_S = 60.0
_MAX_DELAY_S = 30.0
"""Longest delay, in seconds, between the loss of a worker and the start of the next one in its
place; also for a skipped place while no generation runs."""


class PlaceState(Enum):
    """State of a place, a position for a worker in its pool."""

    FILLED = "filled"
    """The worker of the place has been in a generation, or was there at the cluster's start."""
    EMPTY = "empty"
    """The worker of the place is lost. Another one starts, later if several were lost recently."""
    STARTING = "starting"
    """The worker of the place starts, and has never been in a generation."""
    LEFT_OUT = "left out"
    """The place is skipped: too many workers died there while they started. Another worker starts
    after ``LEFT_OUT_S``, or sooner if the cluster cannot run."""
    CORDONED = "cordoned"
    """The worker of the place was drained; no other worker starts before ``Places.reopen``."""
    REMOVED = "removed"
    """The place was removed by scaling. It keeps its number of workers, so no name is reused."""


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
    """Address of the node that must leave before the place reopens; empty if it waits for none."""
    node_ids: frozenset[str] = frozenset()
    """Ids of the Ray nodes at address ``node`` when the place was closed; empty until known. A host
    may return as another node before Ray notices that the old node has left."""


@dataclass(slots=True)
class _Place:
    """One place (position for a worker) of the cluster, and the history of its workers."""

    member: Member
    """The newest worker of the place, perhaps lost; in a new place, the future first worker."""
    number: int
    """Number of workers that the place has had."""
    state: PlaceState = PlaceState.FILLED
    not_before: float = 0.0
    """Monotonic time from which the next worker may start in the place."""
    start_deaths: int = 0
    """Number of workers that died while they started, since a worker of the place last served."""
    lost_at: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Monotonic times at which workers of the place were lost; the newest eight."""
    closed: ClosedPlace | None = None
    """Reason why no worker starts in the place; None unless it is skipped or cordoned."""
    is_new: bool = False
    """Whether scaling is adding the place: none of its workers has been in a generation yet."""

    @property
    def name(self) -> str:
        return place_name(self.member.role, self.member.rank)

    def enter(self, state: PlaceState) -> None:
        self.state, self.closed = next_state(self.state, state, _NEXT), None

    def close(self, state: PlaceState, why: str, node: str, node_ids: frozenset[str]) -> None:
        self.enter(state)
        self.closed = ClosedPlace(state=state, why=why, node=node, node_ids=node_ids)


class Places:
    """All places (positions for workers) of a cluster. Owned by the controller."""

    def __init__(self, members: Sequence[Member]) -> None:
        """Create a place for each role and rank in ``members``, all workers so far."""
        by_age = sorted(members, key=lambda m: _number_of(m.name))
        self._places = {
            place_name(m.role, m.rank): _Place(member=m, number=_number_of(m.name)) for m in by_age
        }
        self.num_prefill = sum(
            p.member.group == "prefill" and p.member.runs_attention for p in self._places.values()
        )
        """Number of attention workers that compute prompts; 0 without step groups."""
        self._alive: NodeIds = {}

    def lost(self, name: str, reason: str, now: float) -> None:
        """Record that worker ``name`` is lost, so that another worker starts in its place.

        No effect if the worker has already left its place.
        """
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
        """Keep the place of drained worker ``name`` empty until ``reopen``.

        With the address of a ``node``, the place reopens once this node has left.
        """
        place = self._place_of(name)
        if place is not None and place.state in _HELD:
            ids = self._alive.get(node, frozenset())
            place.close(PlaceState.CORDONED, "left on purpose", node, ids)

    def reopen(self, name: str) -> None:
        """Allow a new worker in the closed place of drained or failed worker ``name``."""
        place = self._place_of(name)
        if place is not None and place.state in _CLOSED:
            place.enter(PlaceState.EMPTY)
            place.start_deaths, place.not_before = 0, 0.0

    def nodes_alive(self, alive: NodeIds) -> bool:
        """Reopen the places that wait for a node to leave, if the node is not in ``alive``.

        Returns whether any closed place has changed.
        """
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
        """Return new workers to start now, and mark their places as starting.

        The workers report their addresses and nodes later. If the cluster cannot run
        (``is_stalled``), skipped places are tried sooner.
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
        """Return whether ``members`` fill all places, except places that scaling is adding."""
        names = {m.name for m in members}
        return all(p.member.name in names for p in self._present() if not p.is_new)

    @property
    def are_due(self) -> bool:
        """Whether a place is empty and not closed, so that a worker will be started in it."""
        return any(p.state is PlaceState.EMPTY for p in self._places.values())

    # ---- scaling --------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Return the names of all places, such as ``expert-1``, by role and rank."""
        return tuple(p.name for p in self._present())

    def roles(self) -> dict[str, Role]:
        """Return place name -> role, for all places of the cluster."""
        return {p.name: p.member.role for p in self._present()}

    def pools(self) -> dict[Role, int]:
        """Return the number of places of each role."""
        return dict(Counter(p.member.role for p in self._present()))

    def devices(self) -> frozenset[int]:
        """Return the devices that hold experts if every place is filled."""
        return frozenset(p.member.device for p in self._present() if p.member.holds_experts)

    @property
    def have_own_experts(self) -> bool:
        """Whether each step group has expert workers of its own."""
        return any(p.member.group and p.member.role == "expert" for p in self._places.values())

    def workers_of(self, names: Iterable[str]) -> list[str]:
        """Return the name of the newest worker of each of these places."""
        return [self._places[name].member.name for name in names]

    def is_new(self, name: str) -> bool:
        """Return whether scaling is adding the place ``name``.

        If so, none of its workers has been in a running generation.
        """
        return self._places[name].is_new

    def to_add(self, role: Role, count: int) -> list[str]:
        """Return the names of places to add, so that a role has ``count`` places.

        These have the lowest unused ranks. Empty if the role has enough places.
        """
        taken = {p.member.rank for p in self._present() if p.member.role == role}
        free = [rank for rank in range(count + len(taken)) if rank not in taken]
        return [place_name(role, rank) for rank in free[: max(count - len(taken), 0)]]

    def to_remove(self, role: Role, count: int) -> list[str]:
        """Return the names of places to remove, so that a role has ``count`` places.

        Places without a serving worker come first, then high ranks.
        """
        own = [p for p in self._present() if p.member.role == role]
        own.sort(key=lambda p: (p.state is not PlaceState.FILLED, p.member.rank))
        return sorted(p.name for p in own[count:])

    def add(self, names: Iterable[str]) -> None:
        """Add empty places to the cluster, or removed places again; workers start there."""
        for name in names:
            place = self._places.get(name)
            if place is None:
                self._places[name] = place = _Place(
                    member=_first_member(name), number=0, state=PlaceState.REMOVED
                )
            if place.member.role == "attention" and self.num_prefill:
                place.member = replace(place.member, group="decode")
            place.enter(PlaceState.EMPTY)
            place.is_new, place.start_deaths, place.not_before = True, 0, 0.0

    def set_roles(self, num_prefill: int) -> None:
        """Divide the places of attention workers into step groups: the first ``num_prefill`` by
        rank compute prompts. With 0, there are no step groups."""
        self.num_prefill = num_prefill
        own = [p for p in self._present() if p.member.role == "attention" and num_prefill]
        for index, place in enumerate(own):
            group: StepGroup = "prefill" if index < num_prefill else "decode"
            place.member = replace(place.member, group=group)

    def group_of(self, name: str) -> StepGroup:
        """Return the step group of the place of worker ``name``; empty if it has left its place."""
        place = self._place_of(name)
        return "" if place is None else place.member.group

    def remove(self, names: Iterable[str]) -> None:
        """Remove places from the cluster; none of these places has a serving worker."""
        for name in names:
            place = self._places[name]
            place.enter(PlaceState.REMOVED)
            place.is_new = False

    def _present(self) -> list[_Place]:
        found = [p for p in self._places.values() if p.state is not PlaceState.REMOVED]
        return sorted(found, key=lambda p: (p.member.role, p.member.rank))

    @property
    def numbers(self) -> dict[str, int]:
        """Place name -> number of workers that the place has had; also of removed places."""
        return {name: place.number for name, place in self._places.items()}

    @property
    def closed(self) -> dict[str, ClosedPlace]:
        """Place name, such as ``expert-1`` -> reason why no worker starts there now."""
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
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        """Restore the places of an earlier controller.

        Args:
            closed: places in which no worker starts, with the reason.
            gone: workers that were lost or drained (name -> reason).
            now: monotonic time.
            names: all places; empty if unknown.
            new: places that the earlier controller was adding.
            members: workers of the newest generation; None if unknown.
            numbers: place name -> number of workers that the place has had; None if unknown.
        """
        numbers = numbers or {}
        self.add(name for name in (*names, *numbers) if name not in self._places)
        for name, place in self._places.items():
            place.number = max(place.number, numbers.get(name, 0))
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
    """Return the name of a worker's place: ``expert-1`` for the worker ``expert-1.2``."""
    return worker.partition(".")[0]


def _first_member(place: str) -> Member:
    kind, _, rank = place.partition("-")
    role = cast("Role", kind)
    device = int(rank) if holds_experts(role) else -1
    return Member(name=place, role=role, rank=int(rank), device=device)


def _number_of(name: str) -> int:
    """Return the number of workers that a place has had, from the name of its newest worker.

    It is 2 for ``expert-1.2`` and 1 for ``expert-1``.
    """
    _, _, number = name.partition(".")
    return int(number) if number.isdigit() else 1
