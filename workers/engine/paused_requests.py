"""Requests whose gateways move them to another worker. Pure."""

from __future__ import annotations

from collections.abc import Callable, Set


class PausedRequests:
    """Decides from when on a request that is to be paused has no rows."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        """Request id -> tokens that each of its choices must have before."""
        self._names: set[str] = set()

    @property
    def names(self) -> Set[str]:
        """Those that are paused."""
        return self._names

    def ask(self, request_id: str, num_tokens: int) -> None:
        """Pause a request once each of its choices has ``num_tokens`` with the prompt."""
        self._asked[request_id] = num_tokens

    def forget(self, request_id: str) -> None:
        """It goes on, or has ended."""
        self._asked.pop(request_id, None)
        self._names.discard(request_id)

    def take(self, num_tokens: Callable[[str], int], not_now: Set[str]) -> list[str]:
        """Requests that are paused from now on, none of ``not_now``.

        ``num_tokens``: those that each of a request's choices has.
        """
        names = self._asked.keys() - not_now
        found = [name for name in names if num_tokens(name) >= self._asked[name]]
        for name in found:
            del self._asked[name]
        self._names.update(found)
        return found
