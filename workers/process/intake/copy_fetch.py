"""Fetches the KV blocks of one sequence from another worker into the lower tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.errors import ProtocolError
from workers.kv.cache import KVCache
from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.turn_copier import as_bytes
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.wire import KeepCopy
from workers.transport.peer_link import MAX_ITEMS, PeerClient, view_bytes

BATCH_BLOCKS = 16
"""Number of blocks that the other worker pins at once."""


@dataclass(slots=True)
class CopyFetch:
    """The fetch of one session copy: the blocks of one turn, as ``message`` lists them."""

    tiers: KvTiers
    cache: KVCache
    """Defines the shapes of a block and a state."""
    message: KeepCopy
    num_blocks: int = 0
    """Number of blocks received and stored."""
    num_bytes: int = 0
    """Number of bytes received."""
    _names: Sequence[BlockHash] = ()
    """Blocks of ``message``; with recurrent states, only up to the last known or fetched state."""
    _state: Tensor | None = None
    """The received recurrent state after the last block of ``_names``; None if none was."""

    @property
    def is_whole(self) -> bool:
        """Whether host memory has all requested blocks and the recurrent state."""
        names, has = self.message.hashes, self.tiers.host.has
        is_state_here = not self.cache.states or has(state_key(names[-1]))
        return is_state_here and all(map(has, names))

    def mark_used(self) -> None:
        """Mark the blocks as recently used; host memory has all of them."""
        self.tiers.end(self.tiers.begin(self._turn_use(self.message.hashes)))

    def run(self, client: PeerClient) -> None:
        """Fetch the missing blocks that the other worker has and that fit into the tiers.

        Raises ``TransportError`` and errors of the client's ``before_chunk``; received blocks stay.
        """
        self._names = self.message.hashes
        if self.cache.states:
            self._receive_state(client)
        if not self._names:
            return
        turn = self.tiers.begin(self._turn_use(self._names))
        try:
            if self._receive_blocks(client, turn) and self._state is not None:
                last = self._names[-1]
                self.tiers.put(turn, state_key(last), last, self._state)
        finally:
            self.tiers.end(turn)

    def _turn_use(self, names: Sequence[BlockHash]) -> TurnUse:
        message = self.message
        return TurnUse(
            names=names,
            num_prompt=min(message.num_prompt, len(names)),
            hints=KeepHints(
                tenant=message.tenant,
                session=message.session,
                keep_s=message.cache_ttl_s,
                priority=message.priority,
            ),
            states=self._states_of(names),
            may_outlive=message.may_outlive,
        )

    def _states_of(self, names: Sequence[BlockHash]) -> list[BlockHash]:
        """Blocks after which states are kept: the last block, and the last two before it that have
        a known state, as the next turn may diverge at the end of the prompt.
        """
        if not self.cache.states:
            return []
        known = [name for name in names[:-1] if self.tiers.host.has(state_key(name))]
        return [*known[-2:], names[-1]]

    def _receive_state(self, client: PeerClient) -> None:
        """Fetch the peer's last state of these blocks that is later than all states known here."""
        names, has = self._names, self.tiers.host.has
        num_known = next((n for n in range(len(names), 0, -1) if has(state_key(names[n - 1]))), 0)
        first = max(num_known, len(names) - MAX_ITEMS)
        keys = [*map(state_key, names[first:])]
        index, data = torch.zeros(1, dtype=torch.int64), torch.empty(self.cache.state_shape)
        parts = [view_bytes(index), view_bytes(data)]
        if not keys or not client.fetch("a recurrent state", keys, parts, is_spare=True):
            self._names = names[:num_known]
            return
        if not 0 <= int(index) < len(keys):
            raise ProtocolError(
                f"a recurrent state from {client.peer} has index {int(index)} among "
                f"{len(keys)} keys"
            )
        self._names, self._state = names[: first + int(index) + 1], as_bytes(data)
        self.num_bytes += data.nbytes

    def _receive_blocks(self, client: PeerClient, turn: TierTurn) -> bool:
        """Load blocks into host memory from disk or the peer; False if some are still missing."""
        for first, end in self._missing():
            if self.tiers.has(self._names[first]):  # on disk
                is_here = self._load_from_disk(turn, first)
            else:
                is_here = self._receive_batch(client, turn, first, end)
            if not is_here:
                return False
        return True

    def _load_from_disk(self, turn: TierTurn, index: int) -> bool:
        held = self.tiers.read(self._names[index])
        return held is not None and self._put(turn, index, held.data)

    def _receive_batch(self, client: PeerClient, turn: TierTurn, first: int, end: int) -> bool:
        """Fetch blocks ``first`` to ``end - 1``; False if some were not sent or did not fit."""
        buffer = torch.empty(self.cache.block_shape, dtype=self.cache.dtype)
        num_before = self.num_blocks

        def keep(index: int) -> None:
            self.num_bytes += buffer.nbytes
            self.num_blocks += self._put(turn, first + index, as_bytes(buffer).clone())

        missing = self._names[first:end]
        client.fetch("a KV block", missing, [view_bytes(buffer)], keep, is_spare=True)
        return self.num_blocks - num_before == len(missing)

    def _put(self, turn: TierTurn, index: int, data: Tensor) -> bool:
        parent = self._names[index - 1] if index else None
        return self.tiers.put(turn, self._names[index], parent, data)

    def _missing(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) for blocks that host memory lacks: one block that is on disk, or a
        batch of missing blocks.
        """
        has, host, names = self.tiers.has, self.tiers.host, self._names
        indices = [index for index, name in enumerate(names) if not host.has(name)]
        while indices:
            batch, first = indices[:BATCH_BLOCKS], indices[0]
            ends = (n for n, at in enumerate(batch) if n and (at != first + n or has(names[at])))
            count = 1 if has(names[first]) else next(ends, len(batch))
            yield first, first + count
            del indices[:count]
