"""Fetches the blocks of one sequence from another worker, into the tiers below the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.errors import ProtocolError
from workers.kv.cache import KVCache
from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.turn_copies import as_bytes
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.wire import KeepCopy
from workers.transport.peer_link import MAX_ITEMS, PeerClient, view_bytes

BATCH_BLOCKS = 16
"""Blocks that the other worker holds at once."""


@dataclass(slots=True)
class CopyFetch:
    """One copy on its way."""

    tiers: KvTiers
    cache: KVCache
    """Says what a block and a state look like."""
    message: KeepCopy
    num_blocks: int = 0
    """Blocks that have come and are kept."""
    num_bytes: int = 0
    """Bytes that have come."""
    _names: Sequence[BlockHash] = ()
    """Blocks that are of use: all, or those up to a state."""
    _state: Tensor | None = None
    """A state that has come, behind the last of them."""

    @property
    def is_whole(self) -> bool:
        """Whether all that is wanted is here, in host memory."""
        names, has = self.message.hashes, self.tiers.host.has
        is_state_here = not self.cache.states or has(state_key(names[-1]))
        return is_state_here and all(map(has, names))

    def renew(self) -> None:
        """All is here: a turn has used it."""
        self.tiers.end(self.tiers.begin(self._use(self.message.hashes)))

    def run(self, client: PeerClient) -> None:
        """Fetch what is not here, as far as the other worker has it and there is room.

        Raises ``TransportError``, and what ``client`` raises before chunks; what came is kept.
        """
        self._names = self.message.hashes
        if self.cache.states:
            self._receive_state(client)
        if not self._names:
            return
        turn = self.tiers.begin(self._use(self._names))
        try:
            if self._receive_blocks(client, turn) and self._state is not None:
                last = self._names[-1]
                self.tiers.put(turn, state_key(last), last, self._state)
        finally:
            self.tiers.end(turn)

    def _use(self, names: Sequence[BlockHash]) -> TurnUse:
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
        """Blocks behind which the state is kept: the last one, and the last two that are here, as a
        next turn may part from this one where its prompt ended."""
        if not self.cache.states:
            return []
        known = [name for name in names[:-1] if self.tiers.host.has(state_key(name))]
        return [*known[-2:], names[-1]]

    def _receive_state(self, client: PeerClient) -> None:
        """Get the last state that the other worker has behind those that are here."""
        names, has = self._names, self.tiers.host.has
        num_known = next((n for n in range(len(names), 0, -1) if has(state_key(names[n - 1]))), 0)
        first = max(num_known, len(names) - MAX_ITEMS)
        keys = [*map(state_key, names[first:])]
        place, data = torch.zeros(1, dtype=torch.int64), torch.empty(self.cache.state_shape)
        parts = [view_bytes(place), view_bytes(data)]
        if not keys or not client.fetch("a recurrent state", keys, parts, is_spare=True):
            self._names = names[:num_known]
            return
        if not 0 <= int(place) < len(keys):
            raise ProtocolError(
                f"a recurrent state from {client.peer} has place {int(place)} among "
                f"{len(keys)} keys"
            )
        self._names, self._state = names[: first + int(place) + 1], as_bytes(data)
        self.num_bytes += data.nbytes

    def _receive_blocks(self, client: PeerClient, turn: TierTurn) -> bool:
        """Get the blocks that are not in host memory; False: not all of them are there now."""
        for first, end in self._missing():
            if self.tiers.has(self._names[first]):  # on disk
                is_here = self._raise_block(turn, first)
            else:
                is_here = self._receive_batch(client, turn, first, end)
            if not is_here:
                return False
        return True

    def _raise_block(self, turn: TierTurn, place: int) -> bool:
        held = self.tiers.read(self._names[place])
        return held is not None and self._put(turn, place, held.data)

    def _receive_batch(self, client: PeerClient, turn: TierTurn, first: int, end: int) -> bool:
        """Fetch blocks ``first`` to ``end`` - 1; False: some did not come, or have no room."""
        buffer = torch.empty(self.cache.block_shape, dtype=self.cache.dtype)
        num_before = self.num_blocks

        def keep(place: int) -> None:
            self.num_bytes += buffer.nbytes
            self.num_blocks += self._put(turn, first + place, as_bytes(buffer).clone())

        wanted = self._names[first:end]
        client.fetch("a KV block", wanted, [view_bytes(buffer)], keep, is_spare=True)
        return self.num_blocks - num_before == len(wanted)

    def _put(self, turn: TierTurn, place: int, data: Tensor) -> bool:
        parent = self._names[place - 1] if place else None
        return self.tiers.put(turn, self._names[place], parent, data)

    def _missing(self) -> Iterator[tuple[int, int]]:
        """First and end of each run of blocks that are not in host memory: one that is on disk, or
        a batch of others at most."""
        has, host, names = self.tiers.has, self.tiers.host, self._names
        places = [place for place, name in enumerate(names) if not host.has(name)]
        while places:
            batch, first = places[:BATCH_BLOCKS], places[0]
            ends = (n for n, at in enumerate(batch) if n and (at != first + n or has(names[at])))
            count = 1 if has(names[first]) else next(ends, len(batch))
            yield first, first + count
            del places[:count]
