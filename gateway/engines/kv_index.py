"""Index of cached prefixes by attention worker, built from the workers' block events. Pure.

One table maps the hash of a block to the bit set of the workers that have the block. The hash is
of the block's tokens and all tokens before it. A worker that has a block also has the blocks before
it, as the pool evicts the ends of sequences first. A search may therefore skip blocks.

From the routing of a prompt until the events arrive, its blocks count as expected at the worker,
because requests with a common prefix often arrive together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.requests.block_hash import KvEvents

_SKIP_BLOCKS = 16
"""Number of blocks that a search skips at once if all workers with the preceding blocks also have
the last skipped block."""


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
        self._holders: dict[bytes, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._all_bits = 0
        self._names: dict[int, str] = {}

    def apply(self, worker: str, events: KvEvents) -> bool:
        """Apply a worker's message about its blocks; return False if earlier messages are missing.

        In this case the known blocks of the worker remain until it sends its complete list.
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
        if (known := self._workers.pop(worker, None)) is not None:
            self._all_bits &= ~known.bit
            for name in known.reported | known.expected.keys():
                self._clear(name, known.bit)

    def matches(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Return, by worker, the number of leading blocks of ``hashes`` that the worker has.

        Workers with fewer blocks come first; workers without the first block are omitted.

        Example: a has blocks 1 to 3, b has block 1. Hashes of blocks 1, 2, 9 give b: 1, a: 2.
        """
        look, names, found = self._holders.get, self._names, dict[str, int]()
        have, depth = self._all_bits, 0
        while have and depth < len(hashes):
            if look(hashes[min(depth + _SKIP_BLOCKS, len(hashes)) - 1], 0) & have == have:
                depth += _SKIP_BLOCKS
                continue
            for place, name in enumerate(hashes[depth : depth + _SKIP_BLOCKS], depth):
                still = look(name, 0) & have
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
        bit = ~self._all_bits & (self._all_bits + 1)  # the lowest free bit
        self._all_bits |= bit
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
