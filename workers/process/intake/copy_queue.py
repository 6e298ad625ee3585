"""Queue of session copies that a worker has not started to fetch. Pure; single-threaded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from workers.requests.wire import KeepCopy
from workers.transport.peer_link import PeerEndpoint

MAX_WAITING = 64
"""Maximum number of queued copies of a tenant; a new one replaces the oldest."""
MAX_TENANTS = 1024
"""Maximum number of tenants with queued copies; copies of further tenants are skipped."""


@dataclass(frozen=True, slots=True)
class QueuedCopy:
    """A copy to fetch: the blocks of a sequence, and the worker that has them."""

    message: KeepCopy
    peer: PeerEndpoint


@dataclass(slots=True)
class CopyQueue:
    """Queue that serves tenants in turn, each with its oldest copy.

    A turn of a session includes the blocks of earlier turns. If a copy is a prefix of another one,
    only the longer one is queued.
    """

    _tenants: OrderedDict[str, list[QueuedCopy]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def put(self, copy: QueuedCopy) -> int:
        """Add a copy; returns how many copies (this or older ones) a full queue has dropped."""
        tenant, names = copy.message.tenant, copy.message.names
        waiting = self._tenants.get(tenant)
        if waiting is None:
            if len(self._tenants) >= MAX_TENANTS:
                return 1
            waiting = self._tenants[tenant] = []
        for index, known in enumerate(waiting):
            if names.startswith(known.message.names):
                waiting[index] = copy
                return 0
            if known.message.names.startswith(names):
                return 0
        waiting.append(copy)
        num_skipped = max(len(waiting) - MAX_WAITING, 0)
        del waiting[:num_skipped]
        return num_skipped

    def take(self) -> QueuedCopy | None:
        """Remove and return the next copy, or None."""
        if not self._tenants:
            return None
        tenant, waiting = self._tenants.popitem(last=False)
        copy = waiting.pop(0)
        if waiting:
            self._tenants[tenant] = waiting
        return copy
