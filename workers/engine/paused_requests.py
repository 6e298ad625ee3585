"""Requests that are paused because a gateway moves them to another worker. Pure."""

from __future__ import annotations

from collections.abc import Callable, Set


class PausedRequests:
    """Tracks which requests are to be paused, and which have reached their token limit."""

    def __init__(self) -> None:
        self._token_limits: dict[str, int] = {}
        """For each request that is to be paused, the tokens that each choice must reach first."""
        self._request_ids: set[str] = set()

    def __bool__(self) -> bool:
        """Whether a request is paused or to be paused."""
        return bool(self._token_limits or self._request_ids)

    @property
    def request_ids(self) -> Set[str]:
        """Ids of paused requests."""
        return self._request_ids

    def request_pause(self, request_id: str, num_tokens: int) -> None:
        """Pause a request once each choice has ``num_tokens`` tokens, including the prompt."""
        self._token_limits[request_id] = num_tokens

    def forget(self, request_id: str) -> None:
        """Forget a request that continues or has ended."""
        self._token_limits.pop(request_id, None)
        self._request_ids.discard(request_id)

    def take_paused(self, num_tokens: Callable[[str], int], not_now: Set[str]) -> list[str]:
        """Pause the requests that have reached their token limit, and return their ids.

        ``num_tokens``: returns the number of tokens that each choice of a request has at least.
        ``not_now``: requests that must not be paused by this call.
        """
        names = self._token_limits.keys() - not_now
        paused = [name for name in names if num_tokens(name) >= self._token_limits[name]]
        for name in paused:
            del self._token_limits[name]
        self._request_ids.update(paused)
        return paused
