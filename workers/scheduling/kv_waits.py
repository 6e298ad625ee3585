"""Records which waiting requests may start, or wait for, a transfer of KV blocks. Pure.

A transfer starts when the request fits into the pool, not when it arrives. A pool full of running
sequences has no free blocks for it, and in a long queue the blocks would be evicted before the
request is admitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True)
class KvWaits:
    """Transfer state by request id. A transfer is tried once each time a request is queued."""

    _untried: set[str] = field(default_factory=set)
    _waiting: dict[str, int] = field(default_factory=dict)

    @property
    def has_untried(self) -> bool:
        """Whether there are queued requests that ``take_untried`` has not returned yet."""
        return bool(self._untried)

    def is_untried(self, request_id: str) -> bool:
        """Whether ``take_untried`` has not returned the request since it was last queued."""
        return request_id in self._untried

    def __contains__(self, request_id: str) -> bool:
        """Whether the request waits for a transfer, so that it cannot be admitted."""
        return request_id in self._waiting

    def num_fetching(self, request_id: str) -> int:
        """Number of blocks of the pool that are reserved for the request's transfer."""
        return self._waiting.get(request_id, 0)

    def queue(self, request_id: str) -> None:
        """Record that a request was queued or preempted."""
        self._untried.add(request_id)

    def take_untried(self, admissible: Iterable[str], at_most: int) -> list[str]:
        """Return, in order, up to ``at_most`` requests that have not been returned yet."""
        new = (name for name in dict.fromkeys(admissible) if name in self._untried)
        taken = [*islice(new, at_most)]
        self._untried.difference_update(taken)
        return taken

    def begin(self, request_id: str, num_coming: int) -> None:
        """Record that a transfer of ``num_coming`` blocks has started."""
        self._waiting[request_id] = num_coming

    def end(self, request_id: str) -> None:
        """Record that the transfer has ended or failed."""
        self._waiting.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Remove a request that runs or has ended."""
        self._untried.discard(request_id)
        self._waiting.pop(request_id, None)
