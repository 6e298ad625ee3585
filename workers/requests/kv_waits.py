"""Waiting requests whose KV blocks may come from elsewhere before they are admitted. Pure.

Blocks are brought into the pool when there is room for their request, and not when it comes: a
pool that is full of running sequences has none, and in a long queue the blocks would be gone again
before its turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class KvWaits:
    """By request id. A request is asked about once each time it is queued."""

    _unasked: set[str] = field(default_factory=set)
    _waiting: set[str] = field(default_factory=set)

    @property
    def has_unasked(self) -> bool:
        """Whether there are requests that nobody was asked about."""
        return bool(self._unasked)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request waits for blocks: it is not admitted meanwhile."""
        return request_id in self._waiting

    def queue(self, request_id: str) -> None:
        """A request has come, or was preempted."""
        self._unasked.add(request_id)

    def ask(self, admissible: Iterable[str]) -> list[str]:
        """Those of the next requests that were not asked about, in order, each once."""
        found = [name for name in dict.fromkeys(admissible) if name in self._unasked]
        self._unasked.difference_update(found)
        return found

    def begin(self, request_id: str) -> None:
        """Blocks are on their way."""
        self._waiting.add(request_id)

    def end(self, request_id: str) -> None:
        """They have come, or do not come any more."""
        self._waiting.discard(request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._unasked.discard(request_id)
        self._waiting.discard(request_id)
