"""Fair sharing of a worker between tenants, by the tokens served to each. Pure.

The next waiting sequence belongs to the tenant with the fewest served tokens, relative to the
tenant's weight. A tenant that returns after a pause starts at the lowest count of the active
tenants, so it cannot save up unused service. Source: the virtual token counter of Sheng et al.,
"Fairness in Serving Large Language Models" (OSDI 2024). Unlike in the paper, prompt and decode rows
count the same, and cached tokens do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from workers.requests.sequence import SequenceState


class ServedTokens:
    """Counts the tokens that each tenant was served, divided by the tenant's weight.

    Only the differences between tenants have a meaning.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: Counter[str] = Counter()
        """Number of waiting and running sequences by tenant."""

    def add(self, sequence: SequenceState) -> None:
        """Record a new sequence, waiting or running. A tenant with sequences is active."""
        tenant = sequence.request.tenant
        if tenant not in self._active:
            lowest = min((self._served.get(other, 0.0) for other in self._active), default=None)
            kept = {} if lowest is None else self._served  # a sole tenant needs no counts
            # a tenant that left with a lower count would start at the lowest count anyway
            self._served = {t: x for t, x in kept.items() if x >= (lowest or 0.0)}
            self._served[tenant] = max(self._served.get(tenant, 0.0), lowest or 0.0)
        self._active[tenant] += 1

    def remove(self, sequence: SequenceState) -> None:
        """Remove an ended sequence. A tenant without sequences is no longer active."""
        tenant = sequence.request.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def charge(self, sequence: SequenceState, num_rows: int) -> None:
        """Count ``num_rows`` computed rows of a sequence as tokens served to its tenant."""
        if len(self._active) > 1:
            tenant, weight = sequence.request.tenant, sequence.request.weight
            self._served[tenant] = self._served.get(tenant, 0.0) + num_rows / weight

    def in_turn(self, ordered: Sequence[SequenceState]) -> Iterator[SequenceState]:
        """Yield the sequences of all tenants in turn, first of the tenant that was served least.

        Sequences of one tenant stay in the order of ``ordered``. Example: tenant a was served 12
        tokens fewer than tenant b, and all prompts have 8 tokens: a, a, b, a, b, ...
        """
        if len(self._active) <= 1:
            yield from ordered
            return
        queues: dict[str, list[SequenceState]] = {}
        for sequence in ordered:
            queues.setdefault(sequence.request.tenant, []).append(sequence)
        turns = [(self._served.get(t, 0.0), index, t, 0) for index, t in enumerate(queues)]
        heapify(turns)
        while turns:
            served, index, tenant, number = heappop(turns)
            sequence = queues[tenant][number]
            yield sequence
            if number + 1 < len(queues[tenant]):
                share = sequence.num_missing / sequence.request.weight
                heappush(turns, (served + share, index, tenant, number + 1))
