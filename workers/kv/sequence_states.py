"""Assignment of recurrent states to running sequences and to the prefix cache. Pure.

A state is stored where a later prompt can continue: after the last full block that the same prompt
would reuse, and after the last full block of each chunk and of the output so far. If a prompt had
cached blocks without a state, a state is also stored after these, as other prompts are likely to
branch there. The latest state of a sequence replaces its previous latest state.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.kv.prefix_cache import PrefixCache
from workers.kv.state_slots import StateMove, StateSlots
from workers.requests.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class SequenceStates:
    """Decides which state slots the steps of running sequences read, write and keep."""

    slots: StateSlots
    prefixes: PrefixCache
    """Prefix cache, which finds only blocks up to a state that is in ``slots``."""

    def admit(self, sequence: SequenceState) -> None:
        """Hold the state after an admitted sequence's cached blocks, from which it starts."""
        num_found = len(sequence.blocks)
        hashes = self.prefixes.known_hashes(sequence)
        sequence.state = self.slots.take(hashes[num_found - 1]) if num_found else None
        num_known = len(hashes)
        sequence.branch = num_known * self.prefixes.block_size if num_known > num_found else 0

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """Share the parent's state with the child."""
        if parent.state is not None:
            self.slots.share(parent.state)
        child.state = parent.state

    def plan(self, sequence: SequenceState, first: int, count: int) -> StateMove:
        """Allocate slots for the states after the ``count`` rows from position ``first`` on."""
        last, kept = first + count, []
        for tokens in sorted(self._wanted(sequence, first, last)):
            slot = self.slots.allocate_extra() if tokens < last else None
            if slot is not None:
                kept.append((tokens, slot))
        read = self.slots.zero if sequence.state is None else sequence.state
        return StateMove(first, read, last, self.slots.allocate(), tuple(kept))

    def commit(self, sequence: SequenceState, move: StateMove, *, has_failed: bool) -> None:
        """Apply a move after its rows ran. States of a failed sequence are not stored."""
        if sequence.state is not None:
            self.slots.release(sequence.state)
        sequence.state = move.write
        if not has_failed:
            self._store(sequence, move)
        for _, slot in move.kept:
            self.slots.release_extra(slot)

    def abandon(self, move: StateMove) -> None:
        """Free the slots of a move whose rows did not run."""
        self.slots.release(move.write)
        for _, slot in move.kept:
            self.slots.release_extra(slot)

    def release(self, sequence: SequenceState) -> None:
        """Release the state of a sequence that no longer runs."""
        if sequence.state is not None:
            self.slots.release(sequence.state)
        sequence.state = None
        sequence.branch = 0

    def _wanted(self, sequence: SequenceState, first: int, last: int) -> set[int]:
        """Return token counts, above ``first`` up to ``last``, after which to store a state."""
        size = self.prefixes.block_size
        if last // size == first // size:
            return set()  # most decodes
        found = {last // size * size, sequence.branch}
        if last >= sequence.prompt_length:
            found.add(self._prompt_end(sequence))
        limit = self.prefixes.num_shared(sequence) * size
        return {tokens for tokens in found if first < tokens <= min(last, limit)}

    def _prompt_end(self, sequence: SequenceState) -> int:
        """Number of tokens, in full blocks, that a request with the same prompt can reuse."""
        size = self.prefixes.block_size
        return (sequence.prompt_length - 1) // size * size

    def _store(self, sequence: SequenceState, move: StateMove) -> None:
        size, slots = self.prefixes.block_size, dict(move.kept)
        slots[move.last] = move.write
        for tokens in sorted(self._wanted(sequence, move.first, move.last) & slots.keys()):
            name = self.prefixes.hashes(sequence, tokens // size)[-1]
            is_new = self.slots.store(slots[tokens], name)
            if tokens in (sequence.branch, self._prompt_end(sequence)):
                continue
            if sequence.latest_state is not None and sequence.latest_state != name:
                self.slots.drop(sequence.latest_state)
            sequence.latest_state = name if is_new else None
