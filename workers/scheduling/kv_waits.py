"""Waiting requests whose KV blocks may come from elsewhere before they are admitted. Pure.

Blocks are brought into the pool when there is room for their request, and not when it comes: a
pool that is full of running sequences has none, and in a long queue the blocks would be gone again
before its turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True)
class KvWaits:
    """By request id. Each time a request is queued it is taken once, to be asked about."""

    _unasked: set[str] = field(default_factory=set)
    _waiting: dict[str, int] = field(default_factory=dict)

    @property
    def has_unasked(self) -> bool:
        """Whether there are requests that were not taken."""
        return bool(self._unasked)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request waits for blocks: it is not admitted meanwhile."""
        return request_id in self._waiting

    def num_coming(self, request_id: str) -> int:
        """Blocks of the pool that are held for a request meanwhile."""
        return self._waiting.get(request_id, 0)

    def queue(self, request_id: str) -> None:
        """A request has come, or was preempted."""
        self._unasked.add(request_id)

    def take_unasked(self, admissible: Iterable[str], at_most: int) -> list[str]:
        """Those of the next requests that were not taken, in order."""
        new = (name for name in dict.fromkeys(admissible) if name in self._unasked)
        found = [*islice(new, at_most)]
        self._unasked.difference_update(found)
        return found

    def begin(self, request_id: str, num_coming: int) -> None:
        """Blocks are on their way."""
        self._waiting[request_id] = num_coming

    def end(self, request_id: str) -> None:
        """They have come, or do not come any more."""
        self._waiting.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """A request runs, or has ended."""
        self._unasked.discard(request_id)
        self._waiting.pop(request_id, None)
