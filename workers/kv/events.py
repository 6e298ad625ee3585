"""Messages to gateways about the cached blocks of a worker. Pure; single-threaded."""

from __future__ import annotations

import math

from workers.kv.block_pool import HashChanges
from workers.requests.block_hash import SHORT_BYTES, KvEvents


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

    def whole(self) -> KvEvents:
        """Return a message with all blocks."""
        return KvEvents(
            number=self._number,
            is_whole=True,
            stored=tuple(self._known),
            fetch_cost=self.fetch_cost,
            num_free=self.num_free,
        )
