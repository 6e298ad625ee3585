"""Replacement policy: which places of the cluster are empty, and when a new worker starts.

A place is a role and a rank that the cluster was started with. A lost worker leaves its place
empty; a new worker starts there under a fresh name (``expert-1.2`` after ``expert-1``), with the
same rank and device. Losses in quick succession delay the next start more and more. A place whose
workers die three times while they start is left out, with a reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from cluster.core.topology import ADDRESS_FIELDS, Member, Role

MAX_START_DEATHS = 3
"""Consecutive deaths while starting after which a place is left out."""
_CALM_S = 60.0
_MAX_DELAY_S = 30.0


@dataclass(slots=True)
class _Place:
    """One place of the cluster."""

    member: Member
    """Its newest worker."""
    number: int
    """Number of workers it has had."""
    is_empty: bool = False
    """Its worker is lost, and no other is starting."""
    is_starting: bool = False
    """Its worker has never been in a generation."""
    not_before: float = 0.0
    """Monotonic time at which the next one may be started."""
    start_deaths: int = 0
    """Deaths while starting since the last worker that served."""
    lost_at: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    """Monotonic times of the last losses."""
    left_out: str = ""
    """Why no worker starts here any more."""


class Replacements:
    """All places of a cluster. Owned by the controller; time passed in."""

    def __init__(self, members: Sequence[Member]) -> None:
        """``members`` are all workers so far, including the newest of each place."""
        by_age = sorted(members, key=lambda m: _number_of(m.name))
        self._places = {
            (m.role, m.rank): _Place(member=m, number=_number_of(m.name)) for m in by_age
        }

    def lost(self, name: str, reason: str, now: float) -> None:
        """A worker is lost. No effect if it left its place before."""
        place = self._place_of(name)
        if place is None or place.is_empty:
            return
        place.is_empty = True
        recent = sum(now - at < _CALM_S for at in place.lost_at)
        place.lost_at.append(now)
        place.not_before = now + (min(2.0 ** (recent - 1), _MAX_DELAY_S) if recent else 0.0)
        if place.is_starting:
            place.is_starting = False
            place.start_deaths += 1
            if place.start_deaths >= MAX_START_DEATHS:
                place.left_out = f"died {place.start_deaths} times while starting, last: {reason}"

    def leave(self, name: str) -> None:
        """A worker leaves on purpose: its place stays empty until ``reopen``."""
        place = self._place_of(name)
        if place is not None:
            place.is_empty = True
            place.left_out = "left on purpose"

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Start no worker in these places, with the reason of ``left_out``, but in all others."""
        for (role, rank), place in self._places.items():
            place.left_out = reasons.get(f"{role}-{rank}", "")

    def reopen(self, role: Role, rank: int) -> None:
        """Start a worker for a place that was left out."""
        place = self._places[role, rank]
        place.left_out = ""
        place.start_deaths = 0

    def joined(self, members: Iterable[Member]) -> None:
        """These workers are in a generation that runs."""
        for member in members:
            place = self._place_of(member.name)
            if place is not None and place.is_starting:
                place.is_starting = False
                place.start_deaths = 0

    def take_due(self, now: float) -> list[Member]:
        """New workers to start now; they report addresses and node themselves."""
        due = []
        for place in self._places.values():
            if not place.is_empty or place.left_out or now < place.not_before:
                continue
            old = place.member
            place.number += 1
            name = f"{old.role}-{old.rank}.{place.number}"
            unknown = dict.fromkeys(ADDRESS_FIELDS, "")
            place.member = replace(old, name=name, node="", pid=0, **unknown)
            place.is_empty, place.is_starting = False, True
            due.append(place.member)
        return due

    def is_full(self, members: Iterable[Member]) -> bool:
        """Whether these workers fill every place."""
        names = {m.name for m in members}
        return all(p.member.name in names for p in self._places.values())

    @property
    def are_due(self) -> bool:
        """A worker will be started for some place, now or later."""
        return any(p.is_empty and not p.left_out for p in self._places.values())

    @property
    def left_out(self) -> dict[str, str]:
        """``expert-1`` -> why no worker starts there any more."""
        return {
            f"{role}-{rank}": place.left_out
            for (role, rank), place in self._places.items()
            if place.left_out
        }

    def _place_of(self, name: str) -> _Place | None:
        found = (p for p in self._places.values() if p.member.name == name)
        return next(found, None)


def _number_of(name: str) -> int:
    """Number of workers that a place has had, from its newest worker's name."""
    _, _, number = name.partition(".")
    return int(number) if number.isdigit() else 1
