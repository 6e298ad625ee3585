"""Which calls the gateways run on each fleet, as they report with their polls."""

from __future__ import annotations

from collections.abc import Mapping

SETTLE_S = 20.0
"""Seconds for which a new actor waits for the polls of all gateways before it ends a fleet."""
SILENCE_S = 30.0
"""Seconds after its last poll at which a gateway is taken for dead."""
_STALL_S = 15.0
"""Seconds without a poll of any gateway after which the actor may have been stopped itself."""


class GatewayCalls:
    """The gateways that follow the table, and the calls that they run on each fleet."""

    def __init__(self, now_s: float, settle_s: float) -> None:
        """``settle_s``: seconds from ``now_s`` on in which gateways may not have polled yet."""
        self._settled_s = now_s + settle_s
        self._polled_s = now_s
        self._polls: dict[str, tuple[int, Mapping[str, int], float]] = {}

    def poll(self, gateway: str, version: int, calls: Mapping[str, int], now_s: float) -> None:
        """Record a poll of a gateway that knows the table of ``version``."""
        self._note_time(now_s)
        self._polled_s = now_s
        self._polls[gateway] = version, calls, now_s

    def have_ended(self, fleet: str, version: int, now_s: float) -> bool:
        """Whether no gateway can have a call on a fleet that gets none since ``version``."""
        self._note_time(now_s)
        polls = self._polls.values()
        return now_s >= self._settled_s and all(
            known >= version and not calls.get(fleet) for known, calls, _ in polls
        )

    def _note_time(self, now_s: float) -> None:
        """Forget dead gateways; wait for the polls of all again if none could be heard."""
        if now_s > self._polled_s + _STALL_S:
            self._settled_s = now_s + SILENCE_S
        self._polls = {k: one for k, one in self._polls.items() if now_s < one[2] + SILENCE_S}
