"""Gateways that have fallen silent: their process or host is stopped, with all sockets open.

Gateways ping their streams. The requests of a gateway that stops pinging are dropped; other callers
of the engine stream, which never pinged, may stay silent. Pure: times are passed in, as monotonic
seconds.
"""

from __future__ import annotations

GATEWAY_SILENCE_LIMIT_S = 5.0
"""Longest silence of a gateway, which pings every second."""
LOOKS_PER_LIMIT = 5
"""Checks within one limit."""


class GatewaySilence:
    """The time of each gateway's last message."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._heard_at: dict[str, float] = {}

    @property
    def pause_s(self) -> float:
        """Time between two checks."""
        return self.limit_s / LOOKS_PER_LIMIT

    def heard(self, gateway: str, now: float, *, is_ping: bool) -> None:
        """A message came from a gateway; from its first ping on, it must not fall silent."""
        if is_ping or gateway in self._heard_at:
            self._heard_at[gateway] = now

    def forget(self, gateway: str) -> None:
        """The stream of a gateway has ended."""
        self._heard_at.pop(gateway, None)

    def look(self, now: float, looked_at: float) -> list[str]:
        """Gateways that have been silent too long; ``looked_at`` is the time of the last check.

        If this process was stopped in between, messages of that time may still be unread.
        """
        late_s = now - looked_at - self.pause_s
        if late_s > self.pause_s:
            self._heard_at = {n: min(now, at + late_s) for n, at in self._heard_at.items()}
        return [name for name, at in self._heard_at.items() if now - at > self.limit_s]
