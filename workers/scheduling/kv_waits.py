"""Waiting requests and the transfers of KV blocks for them. Pure.

The transfer starts when the request fits into the pool, not on its arrival. A pool full of running
sequences has no free blocks, and in a long queue the blocks would be evicted before the request is
admitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True)
class KvWaits:
    """Transfer state by request id. A request is returned once each time that it is queued."""

    _untried: set[str] = field(default_factory=set)
    _waiting: dict[str, int] = field(default_factory=dict)

    @property
    def has_untried(self) -> bool:
        """Whether there are requests that ``take_untried`` has not returned."""
        return bool(self._untried)

    def is_untried(self, request_id: str) -> bool:
        """Whether ``take_untried`` has not returned a request since it was queued."""
        return request_id in self._untried

    def __contains__(self, request_id: str) -> bool:
        """Whether a request waits for a transfer and cannot be admitted."""
        return request_id in self._waiting

    def num_fetching(self, request_id: str) -> int:
        """Number of blocks of the pool that are held for the transfer of a request."""
        return self._waiting.get(request_id, 0)

    def queue(self, request_id: str) -> None:
        """Record that a request was queued or preempted."""
        self._untried.add(request_id)

    def take_untried(self, admissible: Iterable[str], at_most: int) -> list[str]:
        """Return up to ``at_most`` requests not returned before, in order."""
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
        """Forget a request that runs or has ended."""
        self._untried.discard(request_id)
        self._waiting.pop(request_id, None)
