"""Prefix cache: finds blocks that an earlier sequence, or the sequence itself, has computed.

A full block can be found after the step that filled it is committed. Requests with the same salt
share common prefixes. Without ``enable_prefix_caching``, only the choices of one request (``n``
above 1) share its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from workers.kv.block_pool import BlockPool
from workers.kv.contents import BlockContents
from workers.kv.state_slots import StateSlots
from workers.kv.turns import KeepHints, Turn, TurnUse
from workers.requests.block_hash import BlockHash, chain_hash, request_root
from workers.requests.sequence import SequenceState


class TurnListener(Protocol):
    """Callbacks about the blocks that sequences leave; ``use`` lists the prompt's blocks first."""

    def prompt_done(self, sequence: SequenceState, use: TurnUse) -> None:
        """All blocks of the prompt are computed; the sequence holds them while it runs."""

    def ended(self, sequence: SequenceState, use: TurnUse) -> None:
        """A sequence ends and leaves the blocks of ``use``.

        They become free after this call, except those that other sequences hold.
        """

    def stopped(self, sequence: SequenceState) -> None:
        """A sequence stops and leaves no turn: it was preempted or aborted."""


@dataclass(kw_only=True, slots=True)
class PrefixCache:
    """Finds and stores the blocks of sequences in a pool, and counts the tokens found."""

    pool: BlockPool
    block_size: int
    is_enabled: bool
    length_matters_above: int | None = None
    """See ``ModelConfig.length_matters_above``."""
    states: StateSlots | None = None
    """Slots of a model with recurrent states, which can use blocks only up to a known state."""
    contents: BlockContents | None = None
    """Receives the contents of new blocks; None if KV events are disabled."""
    listener: TurnListener | None = None
    """None if there are no lower tiers."""
    num_queried_tokens: int = 0
    """Total tokens of all sequences, counted at their first admission."""
    num_hit_tokens: int = 0
    """The part of ``num_queried_tokens`` that was found in the cache."""
    num_cached_prompt_tokens: int = 0
    """Prompt tokens that were found, counted once for each request."""
    _turns: dict[SequenceState, Turn] = field(default_factory=dict)
    """Turns of running sequences."""

    def find(self, sequence: SequenceState) -> list[int]:
        """Return the known blocks, from the first on, that a sequence can reuse. Changes nothing.

        Tokens that the sequence must compute itself are excluded; see
        ``SequenceState.num_reusable``.
        """
        hashes = self._reusable(sequence)
        found = self.pool.find(hashes)
        if self.states is not None:
            del found[self.states.num_known(hashes[: len(found)]) :]
        return found

    def known_hashes(self, sequence: SequenceState) -> list[BlockHash]:
        """Return the hashes of the cached blocks that a sequence may reuse, ignoring states."""
        hashes = self._reusable(sequence)
        return hashes[: len(self.pool.find(hashes))]

    def begin(self, sequence: SequenceState) -> None:
        """Begin the turn of an admitted sequence, if prefix caching is enabled."""
        if not self.is_enabled:
            return
        request = sequence.request
        hints = KeepHints(
            tenant=request.tenant,
            session=request.session,
            keep_s=request.cache_ttl_s,
            priority=request.priority,
        )
        hashes = self.hashes(sequence, sequence.prompt_length // self.block_size)
        self._turns[sequence] = self.pool.begin(hashes, hints)

    def release(self, sequence: SequenceState, *, has_ended: bool) -> None:
        """Drop the sequence's hold on its blocks, because it has ended or was preempted."""
        turn = self._turns.pop(sequence, None)
        if turn is not None and self.listener is not None:
            if has_ended:
                self.listener.ended(sequence, self._use(sequence, turn.hints))
            else:
                self.listener.stopped(sequence)
        if turn is not None and not has_ended:
            turn = self.pool.begin(())  # without the session and the keep time of the request
        self.pool.release(sequence.blocks, turn)
        sequence.blocks.clear()

    def _use(self, sequence: SequenceState, hints: KeepHints) -> TurnUse:
        """Return the blocks and states that a sequence leaves.

        With recurrent states, the blocks end at the last known state. The result has this state
        and the last one that a request with the same prompt could use.
        """
        size, prompt = self.block_size, sequence.prompt_length
        names, states = self.hashes(sequence, sequence.num_computed // size), list[BlockHash]()
        if self.states is not None:
            ends = [
                self.states.num_known(names[: (prompt - 1) // size]),
                self.states.num_known(names),
            ]
            names = names[: ends[-1]]
            states = [names[end - 1] for end in sorted(set(ends)) if end]
        return TurnUse(
            names=names,
            num_prompt=prompt // size,
            hints=hints,
            states=states,
            may_outlive=not sequence.request.adapter,
        )

    def store(self, sequence: SequenceState, first: int) -> None:
        """Store the full blocks of the committed positions ``first`` to ``num_computed`` - 1.

        They include a first block that was partly full before.
        """
        begin, end = first // self.block_size, sequence.num_computed // self.block_size
        if begin == end:
            return  # most decodes
        end = min(end, self.num_shared(sequence))
        hashes = self.hashes(sequence, end)
        for block in range(begin, end):
            parent = hashes[block - 1] if block else None
            self.pool.store(sequence.blocks[block], hashes[block], parent)
        if self.contents is not None:
            self.contents.note(sequence, hashes, begin, end)
        num_prompt = sequence.prompt_length // self.block_size
        if self.listener is not None and begin < num_prompt <= end:
            self.listener.prompt_done(sequence, self._use_of_prompt(sequence, num_prompt))

    def _use_of_prompt(self, sequence: SequenceState, num_prompt: int) -> TurnUse:
        return TurnUse(
            names=self.hashes(sequence, num_prompt),
            num_prompt=num_prompt,
            hints=self._turns[sequence].hints,
            may_outlive=not sequence.request.adapter,
        )

    def count(self, sequence: SequenceState, num_found: int) -> None:
        """Count the tokens found for a sequence at its first admission."""
        if sequence.num_cached_tokens is not None:
            return  # admitted again after a preemption
        if self.contents is not None:
            num_blocks = min(num_found, sequence.num_tokens) // self.block_size
            self.contents.note_found(sequence, self.hashes(sequence, num_blocks))
        if not self.is_enabled:
            num_found = 0
        sequence.num_cached_tokens = min(num_found, sequence.prompt_length)
        if self.is_enabled:
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += num_found
        if sequence.first_choice is None:
            self.num_cached_prompt_tokens += sequence.num_cached_tokens

    def check_integrity(self, sequence: SequenceState) -> None:
        """Assert that each findable block of the sequence has the hash of its tokens."""
        for place, block in enumerate(sequence.blocks):
            known = self.pool.hash_of(block)
            if known is not None:
                assert (place + 1) * self.block_size <= sequence.num_computed
                assert known == self.hashes(sequence, place + 1)[place]

    def _reusable(self, sequence: SequenceState) -> list[BlockHash]:
        """Return the hashes of the blocks that a sequence may reuse if they are known."""
        count = min(sequence.num_reusable // self.block_size, self.num_shared(sequence))
        return self.hashes(sequence, count)

    def num_shared(self, sequence: SequenceState) -> int:
        """Number of full blocks, from the first on, that other sequences may share."""
        if not self.is_enabled and sequence.request.n == 1:
            return 0
        tokens = sequence.num_tokens if self.is_enabled else sequence.prompt_length
        return tokens // self.block_size

    def hashes(self, sequence: SequenceState, count: int) -> list[BlockHash]:
        """Return the hashes of the first ``count`` blocks; cached, as tokens never change."""
        known, size = sequence.block_hashes, self.block_size
        if not known and sequence.first_choice is not None:
            known += sequence.first_choice.block_hashes[: sequence.prompt_length // size]
        for first in range(len(known) * size, count * size, size):
            parent = known[-1] if known else self._root(sequence)
            known.append(chain_hash(parent, sequence.tokens(first, first + size)))
        return known[:count]

    def _root(self, sequence: SequenceState) -> BlockHash:
        request = sequence.request
        owner = "" if self.is_enabled else request.request_id
        return request_root(request, self.length_matters_above, owner)
