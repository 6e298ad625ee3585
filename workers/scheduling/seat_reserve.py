"""Seats that a tenant above its share leaves free for others. Pure, no torch.

When one tenant's long requests have all seats, a request of another tenant has its turn only when
one of them ends. A few seats that stay free take it at once, at the price of slightly smaller
steps; a tenant that has been alone for a while has all seats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from workers.requests.sequence import SequenceState

RESERVED_ONE_IN = 16
"""Part of the seats, and at most of the blocks, that is left free."""
_REMEMBERED_STEPS = 1000
"""Steps for which seats are left free for a tenant without sequences."""


class SeatReserve:
    """Which tenants have sequences, or had some lately."""

    def __init__(self, num_seats: int) -> None:
        self._num_free = num_seats // RESERVED_ONE_IN
        self._step = 0
        self._seen: dict[str, tuple[int, float]] = {}
        """By tenant the last step at which it had sequences, as far as known, and its weight."""

    def note(self, sequence: SequenceState) -> None:
        """A sequence has come or ended."""
        request = sequence.request
        self._seen[request.tenant] = self._step, request.weight

    def count_step(self) -> None:
        """A step has run."""
        self._step += 1
        if not self._step % _REMEMBERED_STEPS:
            oldest = self._step - _REMEMBERED_STEPS
            self._seen = {t: s for t, s in self._seen.items() if s[0] >= oldest}

    def above_share(self, running: Iterable[SequenceState]) -> set[str]:
        """Tenants that have more than one sequence, and more than their share of those that run."""
        if self._has_one:
            return set()
        counts = Counter(s.request.tenant for s in running)
        one_more = counts.total() + 1
        shares = self._shares()
        return {t for t, count in counts.items() if count > max(1.0, shares.get(t, 1.0) * one_more)}

    @property
    def _has_one(self) -> bool:
        """Only one tenant, if any, has sequences: all seats are for it."""
        return len(self._seen) < 2

    def _shares(self) -> dict[str, float]:
        whole = sum(weight for _, weight in self._seen.values())
        return {tenant: weight / whole for tenant, (_, weight) in self._seen.items()}

    def seats_left_free(self, running: Iterable[SequenceState]) -> SeatsLeftFree:
        """For a plan, in which these sequences run already."""
        counts = Counter[str]() if self._has_one else Counter(s.request.tenant for s in running)
        return SeatsLeftFree(self._num_free, self._shares(), counts)


class SeatsLeftFree:
    """Of one plan, while sequences are chosen for it."""

    def __init__(self, num_free: int, shares: dict[str, float], counts: Counter[str]) -> None:
        self._num_free = num_free
        self._shares = shares
        self._counts = counts

    def of(self, sequence: SequenceState) -> int:
        """Seats that must stay free when this sequence gets one.

        Example: 64 seats, two tenants of equal weight: 4 for the one that has more, 0 for the
        other, and 0 where both have as many.
        """
        tenant, num_seats = sequence.request.tenant, self._counts.total() + 1
        is_above = self._counts[tenant] >= self._shares.get(tenant, 1.0) * num_seats
        return self._num_free if is_above else 0

    def take(self, sequence: SequenceState) -> None:
        """The sequence gets a seat."""
        self._counts[sequence.request.tenant] += 1
