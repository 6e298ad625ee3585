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
"""Divisor that gives the number of seats left free for other tenants: one in 16 seats. KV blocks
are left free up to the same fraction."""
_REMEMBERED_STEPS = 1000
"""Minimum number of steps, after a sequence of a tenant has arrived or ended, for which seats stay
free for this tenant."""


class SeatReserve:
    """Decides how many seats tenants above their share leave free for other tenants.

    For this it tracks the tenants with sequences that arrived or ended in recent steps.
    """

    def __init__(self, num_seats: int) -> None:
        self._num_free = num_seats // RESERVED_DIVISOR
        self._step = 0
        self._seen: dict[str, tuple[int, float]] = {}
        """For each tenant, the latest step in which a sequence arrived or ended, and its weight."""
        self._sum: float | None = None
        """Sum of the weights in ``_seen``; None after a change of them."""

    def note(self, sequence: SequenceState) -> None:
        """Record the tenant of a sequence that has arrived or ended."""
        request = sequence.request
        _, weight = self._seen.get(request.tenant, (0, None))
        self._seen[request.tenant] = self._step, request.weight
        if request.weight != weight:
            self._sum = None

    def count_step(self, running: Iterable[SequenceState]) -> None:
        """Count a committed step; every 1,000 steps forget tenants without recent sequences.

        ``running``: the sequences that run; their tenants are not forgotten.
        """
        self._step += 1
        if not self._step % _REMEMBERED_STEPS:
            oldest, tenants = self._step - _REMEMBERED_STEPS, {s.request.tenant for s in running}
            self._seen = {t: s for t, s in self._seen.items() if s[0] >= oldest or t in tenants}
            self._sum = None

    def above_share(self, running: Counter[str]) -> set[str]:
        """Return the tenants with more than one running sequence and more than their share of them.

        ``running``: number of running sequences by tenant. A tenant's share is its weight divided
        by the sum of the weights of all tenants. Empty if there is only one tenant.
        """
        if self._has_one:
            return set()
        one_more = running.total() + 1
        several = (t for t, count in running.items() if count > 1)
        return {t for t in several if running[t] > self.share(t) * one_more}

    @property
    def _has_one(self) -> bool:
        """Whether at most one tenant has or recently had sequences; it may then use all seats."""
        return len(self._seen) < 2

    def share(self, tenant: str) -> float:
        """Return the weight of a tenant divided by the sum of all; 1 for a tenant that is not
        known."""
        if tenant not in self._seen:
            return 1.0
        if self._sum is None:
            self._sum = sum(weight for _, weight in self._seen.values())
        return self._seen[tenant][1] / self._sum

    def seats_left_free(self, running: Counter[str]) -> SeatsLeftFree:
        """Return the counter of seats to leave free while sequences are chosen for one plan.

        ``running``: number of running sequences by tenant.
        """
        return SeatsLeftFree(self._num_free, self, Counter() if self._has_one else running)


class SeatsLeftFree:
    """Tells how many seats to leave free for other tenants while a plan's sequences are chosen."""

    def __init__(self, num_free: int, reserve: SeatReserve, running: Counter[str]) -> None:
        self._num_free = num_free
        self._reserve = reserve
        self._running = running
        self._taken: Counter[str] = Counter()
        self._num_seats = running.total()

    def of(self, sequence: SequenceState) -> int:
        """Number of seats that must stay free if this sequence gets a seat.

        It is 0 for a tenant below its share. Example: with 64 seats and two tenants of equal
        weight, 4 for the tenant with more running sequences and 0 for the other tenant.
        """
        tenant = sequence.request.tenant
        count = self._running[tenant] + self._taken[tenant]
        is_above = count >= self._reserve.share(tenant) * (self._num_seats + 1)
        return self._num_free if is_above else 0

    def take(self, sequence: SequenceState) -> None:
        """Record that the sequence gets a seat in the plan."""
        self._taken[sequence.request.tenant] += 1
        self._num_seats += 1
