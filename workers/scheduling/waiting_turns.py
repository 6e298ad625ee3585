"""Waiting sequences in the order in which tenants take turns, without a sort at each step. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from workers.requests.sequence import SequenceState
from workers.scheduling.fairness import ServedTokens

_ORDER = attrgetter("order")
_FROM_HEAP = -1
"""Position in turns of the heap, which may have outdated counts of served tokens."""

_Turn = tuple[float, tuple[int, bool, int, int], str, int]
"""Served tokens of a tenant, order of its first sequence, tenant, and position in its queue."""


class WaitingTurns:
    """Keeps the waiting sequences of each tenant in order, and the next turn of each tenant.

    Iteration yields the sequences as ``ServedTokens.in_turn`` does. A turn in the heap is a lower
    bound, as a tenant's count of served tokens only grows while it has sequences. It is corrected
    when it comes first, so that a step costs the same with 10 and with 1,000 waiting tenants.
    """

    def __init__(self, served: ServedTokens) -> None:
        self._served = served
        self._queues: dict[str, list[SequenceState]] = {}
        self._heap: list[_Turn] = []
        self._latest: dict[str, _Turn] = {}
        """The turn of each tenant in the heap; other turns of the tenant there are outdated."""

    def add(self, sequence: SequenceState) -> None:
        """Add a sequence of an active tenant."""
        tenant = sequence.request.tenant
        queue = self._queues.setdefault(tenant, [])
        insort(queue, sequence, key=_ORDER)
        if queue[0] is not sequence:
            return
        if len(self._heap) > 2 * len(self._queues):
            self._heap = list(self._latest.values())
            heapify(self._heap)
        self._latest[tenant] = turn = self._turn(tenant)
        heappush(self._heap, turn)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence that no longer waits."""
        tenant = sequence.request.tenant
        queue = self._queues[tenant]
        remove_in_order(queue, sequence)
        if not queue:
            del self._queues[tenant], self._latest[tenant]

    def __iter__(self) -> Iterator[SequenceState]:
        """Yield the waiting sequences of all tenants in turn. No sequence may be added, removed or
        charged meanwhile."""
        if len(self._queues) <= 1:
            for queue in self._queues.values():
                yield from queue
            return
        self._settle()
        turns = self._heap.copy()
        while turns:
            turn = heappop(turns)
            served, order, tenant, number = turn
            if number == _FROM_HEAP:
                if self._latest.get(tenant) is not turn:
                    continue
                served, order, _, _ = current = self._turn(tenant)
                number = 0
                if current > turn:
                    heappush(turns, (served, order, tenant, number))
                    continue
            queue = self._queues[tenant]
            sequence = queue[number]
            yield sequence
            if number + 1 < len(queue):
                share = sequence.num_missing / sequence.request.weight
                heappush(turns, (served + share, order, tenant, number + 1))

    def _turn(self, tenant: str) -> _Turn:
        return self._served.of(tenant), self._queues[tenant][0].order, tenant, _FROM_HEAP

    def _settle(self) -> None:
        """Correct the first turns of the heap, until the first is not outdated."""
        heap = self._heap
        while heap:
            tenant = heap[0][2]
            if self._latest.get(tenant) is not heap[0]:
                heappop(heap)
                continue
            turn = self._turn(tenant)
            if turn == heap[0]:
                return
            self._latest[tenant] = turn
            heapreplace(heap, turn)


def remove_in_order(ordered: list[SequenceState], sequence: SequenceState) -> None:
    """Remove a sequence from a list in ``SequenceState.order``, which must contain it."""
    index = bisect_left(ordered, sequence.order, key=_ORDER)
    while ordered[index] is not sequence:
        index += 1
    del ordered[index]
