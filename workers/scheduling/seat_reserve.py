"""Seats that a tenant above its share leaves free for other tenants. Pure, no torch.

If long requests of one tenant had all seats, a request of another tenant could start only when one
of them ends. With a few free seats it starts at once, at the price of slightly smaller steps. A
tenant that has been alone for a while gets all seats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from workers.requests.sequence import SequenceState

RESERVED_DIVISOR = 16
"""One in this many seats is left free, and blocks up to the same fraction."""
_REMEMBERED_STEPS = 1000
"""Number of steps for which seats stay free for a tenant after its last sequence."""


class SeatReserve:
    """Tracks the tenants that have sequences, or had some in recent steps."""

    def __init__(self, num_seats: int) -> None:
        self._num_free = num_seats // RESERVED_DIVISOR
        self._step = 0
        self._seen: dict[str, tuple[int, float]] = {}
        """Last step in which each tenant is known to have had sequences, and its weight."""

    def note(self, sequence: SequenceState) -> None:
        """Record the tenant of a sequence that has arrived or ended."""
        request = sequence.request
        self._seen[request.tenant] = self._step, request.weight

    def count_step(self) -> None:
        """Count a step that ran."""
        self._step += 1
        if not self._step % _REMEMBERED_STEPS:
            oldest = self._step - _REMEMBERED_STEPS
            self._seen = {t: s for t, s in self._seen.items() if s[0] >= oldest}

    def above_share(self, running: Iterable[SequenceState]) -> set[str]:
        """Tenants that have more than one running sequence, and more than their share of them."""
        if self._has_one:
            return set()
        counts = Counter(s.request.tenant for s in running)
        one_more = counts.total() + 1
        shares = self._shares()
        return {t for t, count in counts.items() if count > max(1.0, shares.get(t, 1.0) * one_more)}

    @property
    def _has_one(self) -> bool:
        """Whether at most one tenant has or recently had sequences; it may then use all seats."""
        return len(self._seen) < 2

    def _shares(self) -> dict[str, float]:
        whole = sum(weight for _, weight in self._seen.values())
        return {tenant: weight / whole for tenant, (_, weight) in self._seen.items()}

    def seats_left_free(self, running: Iterable[SequenceState]) -> SeatsLeftFree:
        """The seats to leave free in a plan. ``running``: the sequences that already run."""
        counts = Counter[str]() if self._has_one else Counter(s.request.tenant for s in running)
        return SeatsLeftFree(self._num_free, self._shares(), counts)


class SeatsLeftFree:
    """Counts the seats to leave free while sequences are chosen for one plan."""

    def __init__(self, num_free: int, shares: dict[str, float], counts: Counter[str]) -> None:
        self._num_free = num_free
        self._shares = shares
        self._counts = counts

    def of(self, sequence: SequenceState) -> int:
        """Number of seats that must stay free if this sequence gets one.

        Example: with 64 seats and two tenants of equal weight, 4 for the tenant with more sequences
        and 0 for the other, or 0 for both if their numbers are equal.
        """
        tenant, num_seats = sequence.request.tenant, self._counts.total() + 1
        is_above = self._counts[tenant] >= self._shares.get(tenant, 1.0) * num_seats
        return self._num_free if is_above else 0

    def take(self, sequence: SequenceState) -> None:
        """Record that the sequence gets a seat."""
        self._counts[sequence.request.tenant] += 1
