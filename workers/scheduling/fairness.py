"""Whose turn it is: tenants share a worker by the tokens that it has served them. Pure.

The waiting sequence of the tenant that was served least, for its weight, goes first. A tenant that
comes back after a pause begins where the least served of the others is: what it did not use is
gone.
Source: the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI
2024); here rows of prompts and of decodes count the same, and cached tokens do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from workers.requests.sequence import SequenceState


class ServedTokens:
    """Tokens by tenant, over the tenant's weight; only their differences matter."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: Counter[str] = Counter()
        """Sequences by tenant."""

    def enter(self, sequence: SequenceState) -> None:
        """A tenant has one more sequence, which waits or runs."""
        tenant = sequence.request.tenant
        if tenant not in self._active:
            least = min((self._served.get(other, 0.0) for other in self._active), default=None)
            kept = {} if least is None else self._served  # alone it is owed nothing, and owes none
            # those that have left behind the others are as good as new when they come back
            self._served = {t: x for t, x in kept.items() if x >= (least or 0.0)}
            self._served[tenant] = max(self._served.get(tenant, 0.0), least or 0.0)
        self._active[tenant] += 1

    def leave(self, sequence: SequenceState) -> None:
        """A sequence of a tenant has ended."""
        tenant = sequence.request.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def charge(self, sequence: SequenceState, num_rows: int) -> None:
        """Rows of a sequence have been computed."""
        if len(self._active) > 1:
            tenant, weight = sequence.request.tenant, sequence.request.weight
            self._served[tenant] = self._served.get(tenant, 0.0) + num_rows / weight

    def in_turn(self, ordered: Sequence[SequenceState]) -> Iterator[SequenceState]:
        """The sequences as tenants take turns, each tenant's in the given order.

        Example: a was served 12 tokens less than b, all prompts have 8 tokens: a, a, b, a, b, ...
        """
        if len(self._active) <= 1:
            yield from ordered
            return
        queues: dict[str, list[SequenceState]] = {}
        for sequence in ordered:
            queues.setdefault(sequence.request.tenant, []).append(sequence)
        turns = [(self._served.get(t, 0.0), place, t, 0) for place, t in enumerate(queues)]
        heapify(turns)
        while turns:
            served, place, tenant, number = heappop(turns)
            sequence = queues[tenant][number]
            yield sequence
            if number + 1 < len(queues[tenant]):
                share = sequence.num_missing / sequence.request.weight
                heappush(turns, (served + share, place, tenant, number + 1))
