"""Records which waiting requests may start, or wait for, a transfer of KV blocks. Pure.

A transfer starts when the request fits into the pool of blocks, not when the request arrives. A
pool full of running sequences has no free blocks for the transfer, and in a long queue the blocks
would be evicted before the request is admitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True)
class KvWaits:
    """Tracks which waiting requests have yet to try, or wait for, a transfer of KV blocks.

    A transfer is tried once each time a request is queued.
    """

    _untried: set[str] = field(default_factory=set)
    _waiting: dict[str, int] = field(default_factory=dict)

    @property
    def has_untried(self) -> bool:
        """Whether any queued request has yet to be returned by ``take_untried``."""
        return bool(self._untried)

    @property
    def is_any_waiting(self) -> bool:
        """Whether any request waits for a transfer of KV blocks."""
        return bool(self._waiting)

    def is_untried(self, request_id: str) -> bool:
        """Whether the request has yet to be returned by ``take_untried`` since it was queued."""
        return request_id in self._untried

    def __contains__(self, request_id: str) -> bool:
        """Whether the request waits for a transfer of KV blocks, and so cannot be admitted."""
        return request_id in self._waiting

    def num_fetching(self, request_id: str) -> int:
        """Number of free KV blocks that a request's transfer has taken; 0 without a transfer."""
        return self._waiting.get(request_id, 0)

    def queue(self, request_id: str) -> None:
        """Record that a request was queued or preempted."""
        self._untried.add(request_id)

    def take_untried(self, admissible: Iterable[str], at_most: int) -> list[str]:
        """Return up to ``at_most`` of the ``admissible`` requests, in order, to try a transfer for.

        A request is returned only once after each ``queue``.
        """
        new = (name for name in dict.fromkeys(admissible) if name in self._untried)
        taken = [*islice(new, at_most)]
        self._untried.difference_update(taken)
        return taken

    def begin(self, request_id: str, num_coming: int) -> None:
        """Record that a transfer for a request has started, which took ``num_coming`` blocks."""
        self._waiting[request_id] = num_coming

    def end(self, request_id: str) -> None:
        """Record that the transfer for a request has ended or failed. Unknown ids are ignored."""
        self._waiting.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Remove a request that was admitted or has ended."""
        self._untried.discard(request_id)
        self._waiting.pop(request_id, None)
