"""Liveness of gateways: a live gateway always polls the controller for the next snapshot.

A gateway that dies sends no message, but stops polling. Pure; times are monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SILENCE_LIMIT_S = 5.0
"""Seconds without a poll after which a gateway counts as dead; a live gateway always polls."""
_KEPT = 64


@dataclass(slots=True)
class _Poll:
    num_open: int = 0
    answered_at: float = 0.0


class GatewayPolls:
    """Tracks which gateways poll the controller for snapshots, to find dead gateways."""

    def __init__(self) -> None:
        self._polls: dict[str, _Poll] = {}
        self._gone: deque[str] = deque(maxlen=_KEPT)

    def begin(self, gateway: str) -> bool:
        """Record that a gateway polls; return whether ``take_gone`` had returned the gateway."""
        self._polls.setdefault(gateway, _Poll()).num_open += 1
        if gateway not in self._gone:
            return False
        self._gone.remove(gateway)
        return True

    def end(self, gateway: str, now: float) -> None:
        """Record that a poll of the gateway has ended."""
        if (poll := self._polls.get(gateway)) is not None:
            poll.num_open, poll.answered_at = poll.num_open - 1, now

    def leave(self, gateway: str) -> bool:
        """Remove a gateway that shuts down; return whether it was known."""
        return self._polls.pop(gateway, None) is not None

    def take_gone(self, now: float) -> list[str]:
        """Remove and return the gateways that have not polled for ``SILENCE_LIMIT_S``."""
        gone = [
            name
            for name, poll in self._polls.items()
            if not poll.num_open and now - poll.answered_at > SILENCE_LIMIT_S
        ]
        for name in gone:
            del self._polls[name]
            self._gone.append(name)
        return gone
