"""Which gateways have fallen silent: their process or host stands still, with all sockets open.

Gateways ping their streams. Nobody waits any more for the requests of one that has stopped to do
so; other callers of the engine stream, which never pinged, may be silent for ever. Pure; the time
is passed in, monotonic seconds.
"""

from __future__ import annotations

GATEWAY_SILENCE_LIMIT_S = 5.0
"""A gateway says nothing for so long only when it stands still: it pings every second."""
LOOKS_PER_LIMIT = 5
"""How often to look within a limit."""


class GatewaySilence:
    """When each gateway was heard last."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        """Longest silence."""
        self._heard_at: dict[str, float] = {}

    @property
    def pause_s(self) -> float:
        """Time between two looks."""
        return self.limit_s / LOOKS_PER_LIMIT

    def heard(self, gateway: str, now: float, *, is_ping: bool) -> None:
        """A gateway said something; its first ping makes it one that must not fall silent."""
        if is_ping or gateway in self._heard_at:
            self._heard_at[gateway] = now

    def forget(self, gateway: str) -> None:
        """Its stream has ended."""
        self._heard_at.pop(gateway, None)

    def look(self, now: float, looked_at: float) -> list[str]:
        """Who has been silent too long. ``looked_at`` is when the last look was.

        Where we stood still ourselves in between, what they said then is not read yet.
        """
        late_s = now - looked_at - self.pause_s
        if late_s > self.pause_s:
            self._heard_at = {n: min(now, at + late_s) for n, at in self._heard_at.items()}
        return [name for name, at in self._heard_at.items() if now - at > self.limit_s]
