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
from heapq import heapify, heappop, heappush, heapreplace

from workers.requests.sequence import SequenceState


class ServedTokens:
    """Counts the tokens that each tenant was served, divided by the tenant's weight.

    Only the differences between tenants have a meaning.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: Counter[str] = Counter()
        """Number of waiting and running sequences by tenant."""
        self._lowest: list[tuple[float, str]] = []
        """Heap with a lower bound of the count of each active tenant, and of some others."""
        self._in_heap: set[str] = set()

    def of(self, tenant: str) -> float:
        """Return the count of an active tenant, which never decreases while the tenant is."""
        return self._served.get(tenant, 0.0)

    def add(self, sequence: SequenceState) -> None:
        """Record a new sequence, waiting or running. A tenant with sequences is active."""
        tenant = sequence.request.tenant
        if tenant not in self._active:
            lowest = self._lowest_active()
            self._served[tenant] = max(self._served.get(tenant, 0.0), lowest)
            if tenant not in self._in_heap:
                self._in_heap.add(tenant)
                heappush(self._lowest, (self._served[tenant], tenant))
        self._active[tenant] += 1

    def remove(self, sequence: SequenceState) -> None:
        """Remove an ended sequence. A tenant without sequences is no longer active."""
        tenant = sequence.request.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def _lowest_active(self) -> float:
        """Return the lowest count of an active tenant; 0, and forget all counts, without one."""
        if not self._active:  # a sole tenant needs no counts
            self._served.clear()
            self._lowest.clear()
            self._in_heap.clear()
        heap = self._lowest
        while heap:
            count, tenant = heap[0]
            if self._served[tenant] > count:
                heapreplace(heap, (self._served[tenant], tenant))
            elif tenant in self._active:
                return count
            else:  # if it comes back, it starts at the lowest count anyway
                heappop(heap)
                self._in_heap.remove(tenant)
                del self._served[tenant]
        return 0.0

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
