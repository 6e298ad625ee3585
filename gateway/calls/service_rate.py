"""Rate at which requests of a gateway replica finish while other requests wait.

Pure: callers pass the time.
"""

from __future__ import annotations

import math
from collections import deque

from gateway.calls.tenant_queues import CallDemand

_WINDOW = 128
"""Number of last finished requests over which the rate is measured."""
_MIN_FINISHED = 8
"""Minimum number of finished requests; with fewer, the service rate is unknown."""
_CALM_S = 30.0
"""Seconds without waiting requests after which a saturated period has ended. Shorter gaps are
ignored, as requests that began together finish together and leave the queue empty for a moment."""
_MAX_GAP_S = 1.0
"""Longest time, in seconds, without waiting requests that does not start a new queue."""


class ServiceRate:
    """Measures how fast requests finish, on a clock that runs only while other requests wait.

    While no request waits, requests finish at the rate at which they arrive.
    """

    def __init__(self) -> None:
        self._clock_s = 0.0
        self._since_s: float | None = None  # time of the last event while the clock runs, else None
        self._began_s = 0.0
        self._queue_since_s = 0.0
        self._ended_s = -math.inf  # end of the last saturated period
        self._finished: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_WINDOW)
        self._num_tokens = 0  # tokens of the window, except its first entry
        # by request: seconds, choices times seconds, tokens
        self._held: deque[tuple[float, float, int]] = deque(maxlen=_WINDOW)

    def advance(self, now_s: float, is_saturated: bool) -> None:
        """Advance the clock to ``now_s``; then let it run if ``is_saturated``, otherwise stop it.

        ``is_saturated``: whether requests wait, or the queue is full, from now on.
        """
        if self._since_s is not None:
            self._clock_s += now_s - self._since_s
            self._ended_s = now_s
        elif is_saturated:
            if now_s - self._ended_s > _CALM_S:
                self._began_s = now_s
            if now_s - self._ended_s > _MAX_GAP_S:
                self._queue_since_s = now_s
        self._since_s = now_s if is_saturated else None

    def saturated_for_s(self, now_s: float) -> float:
        """Return the seconds since requests began to wait; 0 if no request waits.

        Gaps without waiting requests of up to ``_CALM_S`` are ignored.
        """
        return 0.0 if self._since_s is None else now_s - self._began_s

    def queue_age_s(self, now_s: float) -> float:
        """Return the seconds since the current queue formed; 0 if no request waits.

        A gap of more than one second without waiting requests starts a new queue.
        """
        return 0.0 if self._since_s is None else now_s - self._queue_since_s

    def note(self, demand: CallDemand, held_s: float, was_saturated: bool) -> None:
        """Record the requests of a call that has finished ``held_s`` seconds after its admission.

        ``was_saturated``: whether the clock ran when the call finished.
        """
        each = demand.num_tokens // demand.num_requests
        self._held.extend([(held_s, held_s * demand.num_choices, each)] * demand.num_requests)
        if not was_saturated:
            return
        for _ in range(demand.num_requests):
            if len(self._finished) == _WINDOW:
                self._num_tokens -= self._finished[1][1]
            self._finished.append((self._clock_s, each))
            self._num_tokens += each

    @property
    def is_running(self) -> bool:
        """Whether the clock runs, because requests waited at the last call of ``advance``."""
        return self._since_s is not None

    @property
    def requests_per_s(self) -> float | None:
        """Number of requests that finish per second while others wait; None while unknown."""
        return self._per_s(len(self._finished) - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second that finishing requests had requested; None while unknown."""
        return self._per_s(self._num_tokens)

    @property
    def mean_held_s(self) -> float | None:
        """Mean seconds from admission to end of the last requests; None before the first end."""
        return sum(held_s for held_s, _, _ in self._held) / len(self._held) if self._held else None

    @property
    def tokens_per_seat_s(self) -> float | None:
        """Requested tokens per second of one choice (sequence); None while unknown.

        If many choices run concurrently, each may be slower.
        """
        seat_s = sum(seat_s for _, seat_s, _ in self._held)
        tokens = sum(tokens for _, _, tokens in self._held)
        return tokens / seat_s if len(self._held) >= _MIN_FINISHED and seat_s > 0 else None

    def _per_s(self, count: int) -> float | None:
        span_s = self._clock_s - self._finished[0][0]
        return count / span_s if len(self._finished) > _MIN_FINISHED and span_s > 0 else None
