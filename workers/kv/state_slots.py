"""Reference counts of recurrent states. Pure; the tensors are in ``workers.kv.cache``.

A slot holds the state of one sequence after some of its tokens. A step reads one slot and writes
another, because a failed step runs again and then needs the old state. At commit, the sequence
releases the slot that was read. The state after a full KV block can be found by the hash of that
block until its slot is reallocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from workers.kv.block_pool import BlockPool
from workers.model.state_runs import StateRun
from workers.requests.block_hash import BlockHash

_IN_A_STEP = 2
"""Number of slots of a running sequence in a step: one is read and one is written."""


@dataclass(frozen=True, slots=True)
class StateMove:
    """The state slots that a step reads and writes for one sequence."""

    first: int
    """Position of the first row: the number of tokens that led to the state that is read."""
    read: int
    """Slot of the state that is read."""
    last: int
    """One past the position of the last row."""
    write: int
    """Slot of the state after the last row, held for the sequence."""
    kept: tuple[tuple[int, int], ...] = ()
    """(tokens, slot) of intermediate states to store, ascending, held for this step."""

    def runs(self, first: int, last: int) -> Iterator[StateRun]:
        """Yield the runs of the rows at positions ``first`` to ``last`` - 1.

        If the rows are split between two micro-batches, the first one leaves its state in the slot
        ``write``, where the second one reads it.
        """
        slots = {self.first: self.read, **dict(self.kept), self.last: self.write}
        cuts = [first, *(p for p in slots if first < p < last), last]
        for begin, end in pairwise(cuts):
            read, write = (slots.get(place, self.write) for place in (begin, end))
            yield StateRun(begin, end, read, write)


class StateSlots:
    """Reference-counted slots 0 .. num_slots - 1.

    Running sequences always get their slots, as these are reserved. All other holders, such as
    copies to tiers, use the remaining *extra* slots, which may be exhausted.
    """

    def __init__(self, num_slots: int, max_num_seqs: int) -> None:
        """``num_slots`` must be at least two for each of ``max_num_seqs`` sequences."""
        assert num_slots >= _IN_A_STEP * max_num_seqs
        self.num_slots = num_slots
        self.zero = self.num_slots
        """Slot of the state before any token; never written."""
        self._pool = BlockPool(self.num_slots)
        self._num_spare = self.num_slots - _IN_A_STEP * max_num_seqs
        self.extra: list[int] = []
        """Slots held by others than running sequences, for example copies; once for each holder."""

    @property
    def num_free(self) -> int:
        """Number of slots without a holder."""
        return self._pool.num_free

    # Slots of running sequences

    def allocate(self) -> int:
        """Allocate a slot for one running sequence, which has at most two at a time."""
        return self._pool.allocate(1)[0]

    def take(self, block_hash: BlockHash) -> int:
        """Hold the slot of a known state for one running sequence."""
        found = self._pool.find((block_hash,))
        self._pool.share(found)
        return found[0]

    def share(self, slot: int) -> None:
        """Add a running sequence as a holder of another sequence's state."""
        self._pool.share((slot,))

    def release(self, slot: int) -> None:
        """Release a running sequence's slot."""
        self._pool.release((slot,))

    # Extra slots

    def allocate_extra(self) -> int | None:
        """Allocate a slot for a holder other than a sequence. None if no slot is left."""
        if len(self.extra) == self._num_spare:
            return None
        slot = self._pool.allocate(1)[0]
        self.extra.append(slot)
        return slot

    def hold_extra(self, block_hash: BlockHash) -> int | None:
        """Hold a cached state's slot to copy it. None if not cached or no extra slot is left."""
        found = self._pool.find((block_hash,))
        if not found or len(self.extra) == self._num_spare:
            return None
        self._pool.hold(found)
        self.extra += found
        return found[0]

    def release_extra(self, slot: int) -> None:
        """Release a slot of ``allocate_extra`` or ``hold_extra``."""
        self.extra.remove(slot)
        self._pool.release((slot,))

    # Contents of slots

    def num_known(self, hashes: Sequence[BlockHash]) -> int:
        """Number of blocks of a prefix up to its last cached state, or 0 if no state is cached."""
        counts = range(len(hashes), 0, -1)
        return next((count for count in counts if self._pool.is_known(hashes[count - 1])), 0)

    def store(self, slot: int, block_hash: BlockHash) -> bool:
        """Make the state in a held slot findable by the hash of its block.

        Returns False if another slot has the same state.
        """
        is_new = not self._pool.is_known(block_hash)
        self._pool.store(slot, block_hash)
        return is_new

    def mark_duplicated(self, slot: int) -> None:
        """Mark a state as copied by another worker, so that it is evicted first."""
        self._pool.mark_duplicated((slot,))

    def drop(self, block_hash: BlockHash) -> None:
        """Forget a replaced state unless another sequence has found it."""
        found = self._pool.find((block_hash,))
        if found and not self._pool.was_found(found[0]):
            self._pool.forget(found)

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """Remove the states after these blocks, so that they cannot be found."""
        for block_hash in hashes:
            self._pool.forget(self._pool.find((block_hash,)))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the holders of each slot are its entries in ``held`` and ``extra``."""
        self._pool.check_integrity([[slot] for slot in (*held, *self.extra)])
