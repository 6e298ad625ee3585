"""Which blocks of a sequence were computed before: for itself, another choice or another request.

Full blocks become known when the step that completed them is committed. Requests with the same salt
share common prefixes. Without ``enable_prefix_caching`` only the choices of one request share its
prompt.
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
    """Learns what sequences leave. The names of a prompt's blocks are the first of its turn's."""

    def prompt_done(self, sequence: SequenceState, use: TurnUse) -> None:
        """All blocks of the prompt are computed; the sequence holds them while it runs."""

    def ended(self, sequence: SequenceState, use: TurnUse) -> None:
        """A sequence ends and leaves this; its blocks are free next, but for those that others
        hold."""

    def stopped(self, sequence: SequenceState) -> None:
        """A sequence runs no more and leaves no turn: it may run again, or was given up."""


@dataclass(kw_only=True, slots=True)
class PrefixCache:
    """Finds and stores the blocks of sequences in a pool, and counts what that saved."""

    pool: BlockPool
    block_size: int
    is_enabled: bool
    length_matters_above: int | None = None
    """See ``ModelConfig.length_matters_above``."""
    states: StateSlots | None = None
    """Of a model with recurrent states: blocks are of use up to a state that is known."""
    contents: BlockContents | None = None
    """Gets what new blocks hold; None: nobody wants to know."""
    listener: TurnListener | None = None
    """None: there are no lower tiers."""
    num_queried_tokens: int = 0
    """Tokens of sequences at their first admission."""
    num_hit_tokens: int = 0
    """Those of them that were found."""
    num_cached_prompt_tokens: int = 0
    """Prompt tokens that were found, counted once a request."""
    _turns: dict[SequenceState, Turn] = field(default_factory=dict)
    """Of sequences that run."""

    def find(self, sequence: SequenceState) -> list[int]:
        """Known blocks from its first token on, as far as it can go on from. Changes nothing.

        Leaves out tokens that it must compute itself: see ``SequenceState.num_reusable``.
        """
        hashes = self._reusable(sequence)
        found = self.pool.find(hashes)
        if self.states is not None:
            del found[self.states.num_known(hashes[: len(found)]) :]
        return found

    def known_hashes(self, sequence: SequenceState) -> list[BlockHash]:
        """Hashes of its known blocks, with a known state behind them or without."""
        hashes = self._reusable(sequence)
        return hashes[: len(self.pool.find(hashes))]

    def begin(self, sequence: SequenceState) -> None:
        """A sequence runs from now on, with the blocks that were found."""
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
        """It runs no more: it has ended, or waits again. Its blocks have one holder less."""
        turn = self._turns.pop(sequence, None)
        if turn is not None and self.listener is not None:
            if has_ended:
                self.listener.ended(sequence, self._use(sequence, turn.hints))
            else:
                self.listener.stopped(sequence)
        if turn is not None and not has_ended:
            turn = self.pool.begin(())  # no turn of a session, and wanted whatever it says
        self.pool.release(sequence.blocks, turn)
        sequence.blocks.clear()

    def _use(self, sequence: SequenceState, hints: KeepHints) -> TurnUse:
        """What a sequence leaves. With recurrent states up to the last one that is known, and the
        last one that the same prompt can use."""
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
        """Positions ``first`` to ``num_computed`` - 1 were committed: their full blocks are known.

        A first block that was only partly full before is among them.
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
        """Assert that each of its blocks that can be found has the hash of its tokens."""
        for place, block in enumerate(sequence.blocks):
            known = self.pool.hash_of(block)
            if known is not None:
                assert (place + 1) * self.block_size <= sequence.num_computed
                assert known == self.hashes(sequence, place + 1)[place]

    def _reusable(self, sequence: SequenceState) -> list[BlockHash]:
        """Hashes of the blocks that it need not compute if they are known."""
        count = min(sequence.num_reusable // self.block_size, self.num_shared(sequence))
        return self.hashes(sequence, count)

    def num_shared(self, sequence: SequenceState) -> int:
        """Full blocks from the first on that others may share."""
        if not self.is_enabled and sequence.request.n == 1:
            return 0
        tokens = sequence.num_tokens if self.is_enabled else sequence.prompt_length
        return tokens // self.block_size

    def hashes(self, sequence: SequenceState, count: int) -> list[BlockHash]:
        """Hashes of the first ``count`` blocks; cached, as known tokens never change."""
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
