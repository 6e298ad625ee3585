"""Accounting of recurrent states. Pure; the tensors are in ``workers.kv.cache``.

A slot holds the state of one sequence after some of its tokens. A step that fails is run again, so
it never changes a state that it reads: it reads one slot and writes another one, and at commit the
sequence leaves the first for the second. A state behind a full KV block can be found by the hash of
that block, as long as its slot is not needed for something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from workers.kv.block_pool import BlockPool
from workers.model.state_runs import StateRun
from workers.requests.block_hash import BlockHash

_IN_A_STEP = 2
"""Slots of a running sequence: what a step reads, and what it writes."""


@dataclass(frozen=True, slots=True)
class StateMove:
    """The states of one sequence in a step."""

    first: int
    """Position of the first row, the number of tokens behind the state that is read."""
    read: int
    """Its slot."""
    last: int
    """One past the position of the last row."""
    write: int
    """Slot of the state after it, held for the sequence."""
    kept: tuple[tuple[int, int], ...] = ()
    """(tokens, slot) of states between the two, ascending, held for this step."""

    def runs(self, first: int, last: int) -> Iterator[StateRun]:
        """The runs of the rows at positions ``first`` to ``last`` - 1, counted by position.

        Rows may be cut anywhere, for two micro-batches: the state there is in the slot that is
        written in the end.
        """
        slots = {self.first: self.read, **dict(self.kept), self.last: self.write}
        cuts = [first, *(p for p in slots if first < p < last), last]
        for begin, end in pairwise(cuts):
            read, write = (slots.get(place, self.write) for place in (begin, end))
            yield StateRun(begin, end, read, write)


class StateSlots:
    """Slots 0 .. num_slots - 1, each with a count of holders.

    Running sequences always get what a step needs. Whoever else holds a slot takes one of those
    that are left: there may be none.
    """

    def __init__(self, num_slots: int, max_num_seqs: int) -> None:
        """At least two slots for each of ``max_num_seqs`` sequences."""
        assert num_slots >= _IN_A_STEP * max_num_seqs
        self.num_slots = num_slots
        self.zero = self.num_slots
        """Slot of the state before any token; never written."""
        self._pool = BlockPool(self.num_slots)
        self._num_spare = self.num_slots - _IN_A_STEP * max_num_seqs
        self.extra: list[int] = []
        """Slots that are held for others than running sequences, once for each holder."""

    @property
    def num_free(self) -> int:
        """Slots without a holder."""
        return self._pool.num_free

    # Of running sequences

    def allocate(self) -> int:
        """A slot for one running sequence, which has at most two at a time."""
        return self._pool.allocate(1)[0]

    def take(self, block_hash: BlockHash) -> int:
        """The slot of a known state, for one running sequence."""
        found = self._pool.find((block_hash,))
        self._pool.share(found)
        return found[0]

    def share(self, slot: int) -> None:
        """One more running sequence goes on from the state of another."""
        self._pool.share((slot,))

    def release(self, slot: int) -> None:
        """A running sequence leaves a slot."""
        self._pool.release((slot,))

    # Of others

    def allocate_extra(self) -> int | None:
        """A slot for somebody else; None where none is left."""
        if len(self.extra) == self._num_spare:
            return None
        slot = self._pool.allocate(1)[0]
        self.extra.append(slot)
        return slot

    def hold_extra(self, block_hash: BlockHash) -> int | None:
        """The slot of a state that is copied; None where it is not known, or no slot is left."""
        found = self._pool.find((block_hash,))
        if not found or len(self.extra) == self._num_spare:
            return None
        self._pool.hold(found)
        self.extra += found
        return found[0]

    def release_extra(self, slot: int) -> None:
        """The holder of an extra slot leaves it."""
        self.extra.remove(slot)
        self._pool.release((slot,))

    # What slots hold

    def num_known(self, hashes: Sequence[BlockHash]) -> int:
        """Blocks of a prefix up to the last one whose state is known; 0: none is."""
        counts = range(len(hashes), 0, -1)
        return next((count for count in counts if self._pool.is_known(hashes[count - 1])), 0)

    def store(self, slot: int, block_hash: BlockHash) -> bool:
        """A held slot has the state behind a block: it can be found from now on.

        False where another slot has the same state.
        """
        is_new = not self._pool.is_known(block_hash)
        self._pool.store(slot, block_hash)
        return is_new

    def lend(self, slot: int) -> None:
        """Another worker has a copy of this state: it is evicted first."""
        self._pool.lend((slot,))

    def drop(self, block_hash: BlockHash) -> None:
        """Forget a state that nobody has found, and that a later one replaces."""
        found = self._pool.find((block_hash,))
        if found and not self._pool.was_found(found[0]):
            self._pool.forget(found)

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """The states behind these blocks must not be found."""
        for block_hash in hashes:
            self._pool.forget(self._pool.find((block_hash,)))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the holders are exactly these sequences' slots, and the extra ones."""
        self._pool.check_integrity([[slot] for slot in (*held, *self.extra)])
