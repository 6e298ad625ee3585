"""Messages to gateways about the cached blocks of a worker. Pure; single-threaded."""

from __future__ import annotations

import math

from workers.kv.block_pool import HashChanges
from workers.requests.block_hash import SHORT_BYTES, KvEvents

_BLOCKS_PER_MESSAGE = 4096
"""Maximum number of blocks in each message of a full list, which a gateway handles in 5 ms."""


class KvFeed:
    """Makes numbered messages: changes, or the full list for a gateway that lacks earlier ones."""

    def __init__(self) -> None:
        self._known: dict[bytes, None] = {}
        self._number = 0
        self.fetch_cost = math.inf
        """Value of ``KvEvents.fetch_cost`` in the next messages; ``num_free`` likewise."""
        self.num_free = 0

    def change(self, changes: HashChanges) -> KvEvents:
        """Return the next message to all gateways that have the full list."""
        stored = tuple(block_hash[:SHORT_BYTES] for block_hash in changes.stored)
        removed = tuple(block_hash[:SHORT_BYTES] for block_hash in changes.removed)
        for name in removed:
            self._known.pop(name, None)
        self._known.update(dict.fromkeys(stored))
        self._number += 1
        return KvEvents(
            number=self._number,
            stored=stored,
            removed=removed,
            fetch_cost=self.fetch_cost,
            num_free=self.num_free,
        )

    def whole(self) -> list[KvEvents]:
        """Return messages with all blocks, the last with the number of the last change.

        A gateway handles other messages between them.
        """
        known = tuple(self._known)
        starts = range(0, max(len(known), 1), _BLOCKS_PER_MESSAGE)
        return [
            KvEvents(
                number=self._number - len(starts) + place,
                is_whole=place == 1,
                stored=known[start : start + _BLOCKS_PER_MESSAGE],
                fetch_cost=self.fetch_cost,
                num_free=self.num_free,
            )
            for place, start in enumerate(starts, 1)
        ]
