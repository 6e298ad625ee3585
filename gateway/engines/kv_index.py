"""Index of cached prefixes by attention worker, built from the workers' block events. Pure.

Tables map the hash of a block to the bit set of the workers that have the block. The hash is of the
block's tokens and all tokens before it. A worker that has a block also has the blocks before it, as
the pool evicts the ends of sequences first. A search may therefore skip blocks.

The event loop must not stop for long. Therefore there are many small tables, as a dict of millions
of blocks takes seconds to grow, and each message removes only a few blocks of dropped workers.
Memory: about 135 bytes for each cached block of each worker.

From the routing of a prompt until the events arrive, its blocks count as expected at the worker,
because requests with a common prefix often arrive together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.requests.block_hash import KvEvents

_SKIP_BLOCKS = 16
"""Number of blocks that a search skips at once if all workers with the preceding blocks also have
the last skipped block."""
_NUM_TABLES = 256
"""Number of tables. A block is in the table with the number that is the last byte of its hash."""
_REMOVED_AT_A_TIME = 2048
"""Number of blocks of dropped workers that each message about blocks removes, in about 1 ms."""


@dataclass(slots=True)
class _Worker:
    bit: int
    number: int = -1
    """Number of the last applied message; -1 before the first one."""
    reported: set[bytes] = field(default_factory=set)
    expected: Counter[bytes] = field(default_factory=Counter)


class KvIndex:
    """Index of the KV blocks that each worker has, by the short hash of a block."""

    def __init__(self) -> None:
        self._tables: list[dict[bytes, int]] = [{} for _ in range(_NUM_TABLES)]
        self._workers: dict[str, _Worker] = {}
        self._dropped: deque[_Worker] = deque()  # with blocks in the tables
        self._all_bits = 0  # of the workers, without the dropped ones
        self._used_bits = 0  # of both
        self._names: dict[int, str] = {}
        self._lacking: set[str] = set()  # workers whose full list is on its way

    @property
    def num_blocks(self) -> int:
        """Number of different blocks in the tables, including blocks of dropped workers only."""
        return sum(map(len, self._tables))

    def apply(self, worker: str, events: KvEvents) -> bool:
        """Apply a worker's message about its blocks; return False if earlier messages are missing.

        In this case the known blocks of the worker remain until the first part of its full list,
        and messages before it are ignored.
        """
        self._remove_dropped(len(events.stored))  # so that full lists in a row need no more memory
        known = self._workers.get(worker)
        if events.is_whole:
            expected = Counter[bytes]() if known is None else known.expected.copy()
            self.drop(worker)
            known = self._add(worker)
            known.expected = expected
            self._hold(known, expected)
        elif known is None or events.number != known.number + 1:
            is_first = worker not in self._lacking
            self._lacking.add(worker)
            return not is_first
        self._lacking.discard(worker)
        known.number = events.number
        self._forget(known, events.removed)
        known.reported.update(events.stored)
        self._hold(known, events.stored)
        return True

    def expect(self, worker: str, hashes: Sequence[bytes]) -> None:
        """Count blocks as expected (soon reported) at a worker, until ``end_expectation``.

        The worker may not have sent a message yet.
        """
        if hashes:
            known = self._workers.get(worker) or self._add(worker)
            known.expected.update(hashes)
            self._hold(known, hashes)

    def end_expectation(self, worker: str, hashes: Sequence[bytes]) -> None:
        """Undo one ``expect`` call: the worker has reported the blocks or will not compute them."""
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
        """Remove a worker and its blocks from the index."""
        self._lacking.discard(worker)
        if (known := self._workers.pop(worker, None)) is not None:
            self._all_bits &= ~known.bit
            self._dropped.append(known)
            self._remove_dropped()

    def matches(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Return, by worker, the number of leading blocks of ``hashes`` that the worker has.

        Workers with fewer blocks come first; workers without the first block are omitted.

        Example: a has blocks 1 to 3, b has block 1. Hashes of blocks 1, 2, 9 give b: 1, a: 2.
        """
        tables, names, found = self._tables, self._names, dict[str, int]()
        have, depth = self._all_bits, 0
        while have and depth < len(hashes):
            last = hashes[min(depth + _SKIP_BLOCKS, len(hashes)) - 1]
            if tables[last[-1]].get(last, 0) & have == have:
                depth += _SKIP_BLOCKS
                continue
            for place, name in enumerate(hashes[depth : depth + _SKIP_BLOCKS], depth):
                still = tables[name[-1]].get(name, 0) & have
                if still != have:  # some worker has no further blocks
                    ended, have = have ^ still, still
                    if not place:
                        continue
                    if ended in names:  # one worker, the most frequent case
                        found[names[ended]] = place
                    else:
                        self._note(ended, place, found)
            depth += _SKIP_BLOCKS
        if hashes:
            self._note(have, len(hashes), found)
        return found

    def best_holder(self, hashes: Sequence[bytes], matches: dict[str, int]) -> tuple[str, int]:
        """Return the worker with the longest fetchable prefix, and the prefix's length in blocks.

        Only reported blocks count, not expected blocks. ``matches`` is the unchanged result of
        ``matches(hashes)``. Returns ("", 0) if no worker has reported the first block.

        Example: a has reported 2 of 3 blocks and will compute the third; b has reported 1 block.
        The result is ("a", 2).
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
        """Record ``depth`` in ``found`` for each worker in the bit set ``workers``."""
        names = self._names
        while workers:
            bit = workers & -workers
            found[names[bit]] = depth
            workers ^= bit

    def _add(self, worker: str) -> _Worker:
        bit = ~self._used_bits & (self._used_bits + 1)  # the lowest free bit
        self._all_bits |= bit
        self._used_bits |= bit
        self._workers[worker] = known = _Worker(bit)
        self._names[bit] = worker
        return known

    def _remove_dropped(self, num_stored: int = 0) -> None:
        """Remove some blocks of dropped workers, at least ``num_stored``; their bits are free after
        the last block."""
        for _ in range(max(num_stored, _REMOVED_AT_A_TIME)):
            if not self._dropped:
                return
            known = self._dropped[0]
            if known.reported:
                self._clear(known.reported.pop(), known.bit)
            elif known.expected:
                self._clear(known.expected.popitem()[0], known.bit)
            else:
                self._used_bits &= ~known.bit
                self._dropped.popleft()

    def _hold(self, known: _Worker, hashes: Iterable[bytes]) -> None:
        tables, bit = self._tables, known.bit
        for name in hashes:
            table = tables[name[-1]]
            others = table.get(name)
            table[name] = bit if others is None else others | bit  # one object for all blocks

    def _forget(self, known: _Worker, hashes: Iterable[bytes]) -> None:
        for name in hashes:
            if name in known.reported:
                known.reported.discard(name)
                if name not in known.expected:
                    self._clear(name, known.bit)

    def _clear(self, name: bytes, bit: int) -> None:
        table = self._tables[name[-1]]
        left = table.get(name, 0) & ~bit
        if left:
            table[name] = left
        else:
            table.pop(name, None)
