"""Seats, KV blocks and recurrent states of running sequences. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workers.kv.block_pool import BlockPool
from workers.kv.block_tables import BlockTables
from workers.kv.prefix_cache import PrefixCache
from workers.kv.sequence_states import SequenceStates
from workers.kv.state_slots import StateMove
from workers.requests.sequence import SequenceState, SequenceStatus
from workers.scheduling.step_plan import PlannedRows

_RUNNING = SequenceStatus.RUNNING


class BlockManager:
    """Allocates and frees the seat, KV blocks and recurrent states of each sequence.

    At admission a sequence gets KV blocks for all its tokens, and later one more block whenever a
    decode row needs one. Blocks found in the prefix cache are not computed again.
    """

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        prefixes: PrefixCache,
        states: SequenceStates | None,
        max_model_len: int,
    ) -> None:
        """``states``: recurrent states of sequences; None if the model has none."""
        self._pool = pool
        self._tables = tables
        self._prefixes = prefixes
        self._states = states
        self._max_model_len = max_model_len
        self._block_size = prefixes.block_size

    @property
    def num_free(self) -> int:
        """Number of KV blocks without a reference, which can be allocated."""
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        """Total number of KV blocks, free or in use."""
        return self._pool.num_blocks

    # Queries

    def num_blocks_of(self, sequence: SequenceState) -> int:
        """Number of KV blocks that hold all tokens of a sequence."""
        return self._num_blocks_for(sequence.num_tokens)

    def cached_blocks(self, waiting: SequenceState) -> list[int]:
        """Return the cached KV blocks of a waiting sequence's prefix, which it need not compute."""
        return self._prefixes.find(waiting)

    def num_to_compute(self, waiting: SequenceState, known: Sequence[int] | None = None) -> int:
        """Number of rows that a waiting sequence has to compute if it is admitted now.

        ``known``: result of ``cached_blocks``; None: find the cached blocks.
        """
        cached = self.cached_blocks(waiting) if known is None else known
        return waiting.num_tokens - len(cached) * self._block_size

    def num_to_take(self, waiting: SequenceState, known: Iterable[int]) -> int:
        """Number of free blocks that the admission of a waiting sequence takes.

        ``known``: its cached blocks. Cached blocks with a reference are not free, and so not
        counted.
        """
        held = sum(not self._pool.is_free(block) for block in known)
        return self._num_blocks_for(waiting.num_tokens) - held

    def fits_with(self, waiting: SequenceState, stay: Sequence[SequenceState]) -> bool:
        """Whether a waiting sequence would fit if only the sequences in ``stay`` held blocks."""
        held = {block for s in stay for block in s.blocks}
        missing = self._num_blocks_for(waiting.num_tokens) - len(
            held.intersection(self.cached_blocks(waiting))
        )
        return missing <= self._pool.num_blocks - len(held) - self.reserve(stay)

    def num_shared_tokens(self, sequence: SequenceState) -> int:
        """Number of tokens in the full prompt blocks that all choices of a request share.

        At least one prompt token is not shared.
        """
        return (sequence.prompt_length - 1) // self._block_size * self._block_size

    def has_shared(self, sequence: SequenceState, known: Sequence[int]) -> bool:
        """Whether ``known``, cached blocks of a sequence, has all blocks that choices share."""
        return len(known) * self._block_size >= self.num_shared_tokens(sequence)

    def reserve(self, sequences: Iterable[SequenceState]) -> int:
        """Number of blocks that an admission must leave free for ``sequences``.

        It is one for each sequence that may need a further block before its end.
        """
        return sum(
            s.max_blocks > len(s.blocks)
            if s.status is _RUNNING
            else self._max_blocks(s) > self._num_blocks_for(s.num_tokens)
            for s in sequences
        )

    def still_fits(self, admissible: SequenceState, running: Sequence[SequenceState]) -> bool:
        """Whether a waiting sequence, which fitted before other admissions, still fits.

        The sequence needs more blocks if another admission has evicted a cached block or recurrent
        state of its prefix.
        """
        missing = self.num_to_take(admissible, self.cached_blocks(admissible))
        has_enough = self._pool.can_allocate(missing + len(running))  # each needs one at most
        return has_enough or self._pool.can_allocate(missing + self.reserve(running))

    def can_grow(self, decoding: Sequence[SequenceState]) -> bool:
        """Whether enough blocks are free for the next row of all sequences in ``decoding``."""
        has_enough = self._pool.can_allocate(len(decoding))  # each needs one block at most
        missing = (self._num_blocks_for(s.num_tokens) - len(s.blocks) for s in decoding)
        return has_enough or self._pool.can_allocate(sum(missing))

    def can_fork(self, child: SequenceState, running: Sequence[SequenceState]) -> bool:
        """Whether enough blocks are free for ``child``, a forked beam, to run in the next step.

        The sequences in ``running`` must still be able to grow.
        """
        return self._pool.can_allocate(1 + self.reserve((*running, child)))

    def _max_blocks(self, sequence: SequenceState) -> int:
        """Return the number of KV blocks that a sequence needs at its maximum length."""
        read = sequence.prompt_length + sequence.params.max_tokens - 1  # the last token gets no row
        return self._num_blocks_for(min(read, self._max_model_len))

    # Changes

    def admit(self, sequence: SequenceState) -> int:
        """Assign a seat, and KV blocks for all tokens, to a waiting sequence.

        Cached blocks are shared. Returns the number of newly allocated blocks.
        """
        sequence.seat = self._tables.take_seat()
        sequence.max_blocks = self._max_blocks(sequence)
        self._extend(sequence, self.cached_blocks(sequence))
        self._pool.share(sequence.blocks)
        self._prefixes.begin(sequence)
        if self._states is not None:
            self._states.admit(sequence)
        sequence.num_computed = len(sequence.blocks) * self._block_size
        return self.grow(sequence)

    def fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Assign a seat to ``child``, and share the computed full blocks of ``parent`` with it.

        Returns (source, destination) of a partly filled block, which the caller must copy at once;
        None if there is no such block.
        """
        child.seat, child.num_computed = self._tables.take_seat(), parent.num_computed
        child.max_blocks = self._max_blocks(child)
        num_full = parent.num_computed // self._block_size
        self._extend(child, parent.blocks[:num_full])
        self._pool.share(child.blocks)
        copied = self._pool.allocate(self._num_blocks_for(parent.num_computed) - num_full)
        self._extend(child, copied)
        self._prefixes.begin(child)
        if self._states is not None:
            self._states.fork(parent, child)
        return (parent.blocks[num_full], copied[0]) if copied else None

    def grow(self, sequence: SequenceState, num_ahead: int = 0) -> int:
        """Allocate the KV blocks that a running sequence lacks for its tokens and ``num_ahead``
        more: drafts, or a token that is not known yet.

        Returns the number of allocated blocks. Enough blocks must be free.
        """
        missing = self._num_blocks_for(sequence.num_tokens + num_ahead) - len(sequence.blocks)
        if missing <= 0:  # most decodes continue in their last block
            return 0
        self._extend(sequence, self._pool.allocate(missing))
        return missing

    def plan_decodes(
        self, decoding: Iterable[SequenceState], admitted: Sequence[SequenceState]
    ) -> list[PlannedRows]:
        """Plan a decode row of each sequence, and allocate its KV block and recurrent state.

        Each sequence must lack only its newest token. ``admitted``: the sequences that the plan
        admitted. Enough blocks must be free.
        """
        size, states, grow = self._block_size, self._states, self.grow
        return [
            PlannedRows(
                s,
                s.num_computed,
                1,
                True,
                0 if s.num_computed < len(s.blocks) * size else grow(s),  # most continue a block
                s in admitted,
                None if states is None else states.plan(s, s.num_computed, 1),
            )
            for s in decoding
        ]

    def num_drafts_that_fit(self, sequence: SequenceState) -> int:
        """Number of draft tokens that fit into a sequence's blocks and all free blocks."""
        capacity = (len(sequence.blocks) + self._pool.num_free) * self._block_size
        return capacity - sequence.num_tokens

    def move(self, sequence: SequenceState, first: int, count: int) -> StateMove | None:
        """Allocate the recurrent states that ``count`` rows from position ``first`` on write.

        Returns None if the model has no recurrent states.
        """
        return None if self._states is None else self._states.plan(sequence, first, count)

    def release(self, sequence: SequenceState, *, has_ended: bool = False) -> None:
        """Free the seat, blocks and states of a sequence that has ended or is preempted.

        ``has_ended``: whether the request's turn has ended, so that its blocks may be retained for
        its session or for ``cache_ttl_s``.
        """
        self._prefixes.release(sequence, has_ended=has_ended)
        sequence.num_computed = 0
        if self._states is not None:
            self._states.release(sequence)
        if sequence.seat is not None:
            self._tables.free_seat(sequence.seat)
            sequence.seat = None

    def commit(self, planned: PlannedRows, *, has_failed: bool) -> None:
        """Keep the recurrent states that committed rows have written.

        ``SequenceState.num_computed`` must include the rows. ``has_failed``: the sequence failed,
        so its states do not enter the prefix cache.
        """
        if self._states is not None and planned.states is not None:
            self._states.commit(planned.sequence, planned.states, has_failed=has_failed)

    def store(self, planned: PlannedRows) -> None:
        """After a commit, free the blocks of rejected drafts, and add full blocks to the prefix
        cache."""
        sequence = planned.sequence
        if planned.drafts:
            needed = self._num_blocks_for(sequence.num_computed)
            self._pool.release(sequence.blocks[needed:])
            del sequence.blocks[needed:]
        self._prefixes.store(sequence, planned.first)

    def abandon(self, planned: PlannedRows) -> None:
        """Free the blocks and states that a plan allocated for rows whose step failed."""
        sequence = planned.sequence
        if self._states is not None and planned.states is not None:
            self._states.abandon(planned.states)
        if planned.is_admitted:
            self.release(sequence)
        elif planned.num_new_blocks:
            self._pool.release(sequence.blocks[-planned.num_new_blocks :])
            del sequence.blocks[-planned.num_new_blocks :]

    def check_integrity(
        self,
        running: Sequence[SequenceState],
        others: Iterable[list[int]],
        planned: Iterable[PlannedRows],
    ) -> None:
        """Assert that known holders hold exactly the blocks and states in use; for tests.

        Holders of blocks are ``running`` sequences and ``others`` (lists of blocks). Holders of
        states are running sequences and ``planned`` rows that are not committed.
        """
        self._pool.check_integrity([*(s.blocks for s in running), *others])
        for sequence in running:
            assert sequence.num_computed <= len(sequence.blocks) * self._block_size
            assert sequence.seat is not None
            table = self._tables.array[sequence.seat, : len(sequence.blocks)]
            assert table.tolist() == sequence.blocks, "block table and sequence differ"
            self._prefixes.check_integrity(sequence)
        if self._states is not None:
            states = [s.state for s in running if s.state is not None]
            states += [rows.states.write for rows in planned if rows.states is not None]
            self._states.slots.check_integrity(states)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _extend(self, sequence: SequenceState, blocks: list[int]) -> None:
        """Append blocks to the block table of a sequence that has a seat."""
        assert sequence.seat is not None, "only running sequences get blocks"
        self._tables.put(sequence.seat, len(sequence.blocks), blocks)
        sequence.blocks += blocks
