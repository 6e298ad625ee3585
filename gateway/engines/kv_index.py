"""Which attention worker holds which prefix, from their block events. Pure.

A block is named by the hash of its tokens and of all tokens before, so one table serves all
workers: hash -> bits, one for each worker that has the block. A worker that has a block has those
before it (the pool evicts the ends of sequences first), so a search may skip blocks.

Blocks of a prompt that was just routed to a worker are expected there before its events arrive:
requests with the same beginning often arrive together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.requests.block_hash import KvEvents

_LEAP = 16
"""Blocks that the search skips while all workers with the first of them have the last."""


@dataclass(slots=True)
class _Worker:
    bit: int
    number: int = 0
    reported: set[bytes] = field(default_factory=set)
    expected: Counter[bytes] = field(default_factory=Counter)


class KvIndex:
    """The blocks of all workers. Hashes are the short ones of ``block_hash``."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._everyone = 0
        self._names: dict[int, str] = {}

    def apply(self, worker: str, events: KvEvents) -> bool:
        """Apply a message; False if messages before it were missed: the complete list is needed.

        Until the complete list arrives, the old entries stay.
        """
        known = self._workers.get(worker)
        if events.is_whole:
            known = known or self._add(worker)
            self._forget(known, known.reported - set(events.stored))
        elif known is None or events.number != known.number + 1:
            return False
        known.number = events.number
        self._forget(known, events.removed)
        known.reported.update(events.stored)
        self._hold(known, events.stored)
        return True

    def expect(self, worker: str, hashes: Sequence[bytes]) -> None:
        """These blocks will be computed there; undone by ``settle``."""
        if (known := self._workers.get(worker)) is not None:
            known.expected.update(hashes)
            self._hold(known, hashes)

    def settle(self, worker: str, hashes: Sequence[bytes]) -> None:
        """The blocks are computed, or never will be; events have reported them."""
        if (known := self._workers.get(worker)) is None:
            return
        for name in hashes:
            if known.expected[name] <= 1:
                del known.expected[name]
                if name not in known.reported:
                    self._clear(name, known.bit)
            else:
                known.expected[name] -= 1

    def drop(self, worker: str) -> None:
        """A worker has left, with its blocks."""
        if (known := self._workers.pop(worker, None)) is not None:
            self._everyone &= ~known.bit
            for name in known.reported | known.expected.keys():
                self._clear(name, known.bit)

    def matches(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Blocks from the first on that each worker has; workers without any are left out.

        Workers come in the order of their blocks, the fewest first.

        Example: a has blocks 1 to 3, b has block 1: hashes of blocks 1, 2, 9 give a 2, b 1.
        """
        look, names, found = self._holders.get, self._names, dict[str, int]()
        have, depth = self._everyone, 0
        while have and depth < len(hashes):
            if look(hashes[min(depth + _LEAP, len(hashes)) - 1], 0) & have == have:
                depth += _LEAP
                continue
            for place, name in enumerate(hashes[depth : depth + _LEAP], depth):
                still = look(name, 0) & have
                if still != have:  # some worker has no further blocks
                    ended, have = have ^ still, still
                    if not place:
                        continue
                    if ended in names:  # one worker, the most frequent case
                        found[names[ended]] = place
                    else:
                        self._note(ended, place, found)
            depth += _LEAP
        if hashes:
            self._note(have, len(hashes), found)
        return found

    def best_holder(self, hashes: Sequence[bytes], matches: dict[str, int]) -> tuple[str, int]:
        """The worker with the longest prefix to fetch, by its events, not by expectation.

        ``matches`` are those of ``hashes``, in their order. None without blocks.

        Example: a has reported 2 of 3 blocks and is about to compute the third, b has reported 1:
        a, 2.
        """
        best, most = "", 0
        for worker, depth in reversed(matches.items()):
            if depth <= most:
                break
            reported = self._workers[worker].reported
            depth = bisect_left(hashes, True, 0, depth, key=lambda name: name not in reported)
            if depth > most:
                best, most = worker, depth
        return best, most

    def _note(self, workers: int, depth: int, found: dict[str, int]) -> None:
        """Note a depth for each of these bits."""
        names = self._names
        while workers:
            bit = workers & -workers
            found[names[bit]] = depth
            workers ^= bit

    def _add(self, worker: str) -> _Worker:
        bit = ~self._everyone & (self._everyone + 1)  # the lowest that is not taken
        self._everyone |= bit
        self._workers[worker] = known = _Worker(bit)
        self._names[bit] = worker
        return known

    def _hold(self, known: _Worker, hashes: Iterable[bytes]) -> None:
        holders, bit = self._holders, known.bit
        for name in hashes:
            holders[name] = holders.get(name, 0) | bit

    def _forget(self, known: _Worker, hashes: Iterable[bytes]) -> None:
        for name in hashes:
            if name in known.reported:
                known.reported.discard(name)
                if name not in known.expected:
                    self._clear(name, known.bit)

    def _clear(self, name: bytes, bit: int) -> None:
        left = self._holders.get(name, 0) & ~bit
        if left:
            self._holders[name] = left
        else:
            self._holders.pop(name, None)
