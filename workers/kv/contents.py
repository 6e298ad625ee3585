"""Tokens of newly cached blocks, for routers of other projects. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.kv.block_pool import BlockPool
from workers.kv.router_events import BlockContent, extra_of
from workers.requests.block_hash import BlockHash
from workers.requests.sequence import SequenceState


@dataclass(kw_only=True, slots=True)
class BlockContents:
    """Collects the contents of new blocks until they are taken. Unused without KV events."""

    pool: BlockPool
    block_size: int
    length_matters_above: int | None
    """See ``ModelConfig.length_matters_above``."""
    _new: dict[BlockHash, BlockContent] = field(default_factory=dict)
    _fetched: set[BlockHash] = field(default_factory=set)
    """Fetched or restored blocks that no sequence has used; their tokens are unknown."""

    def note_fetched(self, hashes: Sequence[BlockHash]) -> None:
        """Record the hashes of fetched or restored blocks, until a sequence uses them."""
        self._fetched.update(hashes)
        if len(self._fetched) > self.pool.num_blocks:
            self._fetched = {name for name in self._fetched if self.pool.is_known(name)}

    def note(
        self, sequence: SequenceState, hashes: Sequence[BlockHash], first: int, end: int
    ) -> None:
        """Collect the contents of blocks ``first`` to ``end`` - 1 of a sequence, now cached."""
        for place in range(first, end):
            self._new[hashes[place]] = self._content(sequence, hashes, place)

    def note_found(self, sequence: SequenceState, hashes: Sequence[BlockHash]) -> None:
        """Collect the contents of fetched blocks among a sequence's first blocks, ``hashes``."""
        if self._fetched:
            for place, name in enumerate(hashes):
                if name in self._fetched:
                    self._fetched.discard(name)
                    self._new[name] = self._content(sequence, hashes, place)

    def take(self) -> dict[BlockHash, BlockContent]:
        """Return the contents collected since the last call, by hash."""
        new, self._new = self._new, {}
        return new

    def _content(
        self, sequence: SequenceState, hashes: Sequence[BlockHash], place: int
    ) -> BlockContent:
        first = place * self.block_size
        request = sequence.request
        return BlockContent(
            parent=hashes[place - 1] if place else None,
            token_ids=tuple(sequence.tokens(first, first + self.block_size)),
            extra=() if place else extra_of(request, self.length_matters_above),
            adapter=request.adapter,
        )
