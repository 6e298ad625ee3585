"""How fast a replica's requests leave while others wait. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections import deque

from gateway.generation.tenant_queues import CallDemand

_WINDOW = 128
"""Requests over which the rate is measured."""
_LEAST_LEFT = 8
"""Requests below which the rate is unknown."""
_CALM_S = 30.0
"""Time without anybody waiting that ends a saturated time. Requests that began together end
together, and for a moment none waits."""
_MOMENT_S = 1.0
"""Such a moment: a queue that was empty for longer did not stand."""


class DrainRate:
    """Counts what leaves on a clock that stands still at quiet times.

    At those times requests leave as fast as they come, and could leave faster.
    """

    def __init__(self) -> None:
        self._clock_s = 0.0
        self._since_s: float | None = None  # of the last event, while the clock runs
        self._began_s = 0.0
        self._stands_since_s = 0.0
        self._ended_s = -math.inf  # of the last saturated time
        self._left: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_WINDOW)
        self._num_tokens = 0  # of all in the window but the first
        # seconds, places times seconds, and tokens, by request
        self._held: deque[tuple[float, float, int]] = deque(maxlen=_WINDOW)

    def advance(self, now_s: float, is_saturated: bool) -> None:
        """The clock has reached ``now_s``, and runs from now on while ``is_saturated``."""
        if self._since_s is not None:
            self._clock_s += now_s - self._since_s
            self._ended_s = now_s
        elif is_saturated:
            if now_s - self._ended_s > _CALM_S:
                self._began_s = now_s
            if now_s - self._ended_s > _MOMENT_S:
                self._stands_since_s = now_s
        self._since_s = now_s if is_saturated else None

    def saturated_for_s(self, now_s: float) -> float:
        """Time since others began to wait, but for moments; 0 where none do."""
        return 0.0 if self._since_s is None else now_s - self._began_s

    def stands_for_s(self, now_s: float) -> float:
        """The same, where an earlier queue that was gone for over a second does not count."""
        return 0.0 if self._since_s is None else now_s - self._stands_since_s

    def note(self, demand: CallDemand, held_s: float, was_saturated: bool) -> None:
        """Requests of a call have left that was held for so long."""
        each = demand.num_tokens // demand.num_requests
        self._held.extend([(held_s, held_s * demand.num_choices, each)] * demand.num_requests)
        if not was_saturated:
            return
        for _ in range(demand.num_requests):
            if len(self._left) == _WINDOW:
                self._num_tokens -= self._left[1][1]
            self._left.append((self._clock_s, each))
            self._num_tokens += each

    @property
    def is_running(self) -> bool:
        """Whether others wait, by the last event."""
        return self._since_s is not None

    @property
    def requests_per_s(self) -> float | None:
        """None while that is not known."""
        return self._per_s(len(self._left) - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that the requests that left had asked for; None while that is not known."""
        return self._per_s(self._num_tokens)

    @property
    def mean_held_s(self) -> float | None:
        """How long the last requests were held; None before the first has left."""
        return sum(held_s for held_s, _, _ in self._held) / len(self._held) if self._held else None

    @property
    def tokens_per_place_s(self) -> float | None:
        """Tokens that one place would let leave per second, were it no slower beside others; None
        while that is not known."""
        place_s = sum(place_s for _, place_s, _ in self._held)
        tokens = sum(tokens for _, _, tokens in self._held)
        return tokens / place_s if len(self._held) >= _LEAST_LEFT and place_s > 0 else None

    def _per_s(self, count: int) -> float | None:
        span_s = self._clock_s - self._left[0][0]
        return count / span_s if len(self._left) > _LEAST_LEFT and span_s > 0 else None
