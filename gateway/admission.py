"""Who may come in: bounds on requests and tokens, and how long the others should wait.

Pure apart from its own counters; the time is passed in.
"""

from __future__ import annotations

from collections import deque

from cluster.errors import QueueFullError
from gateway.errors import clamp_retry_s

_RATE_WINDOW = 64
"""Finished requests over which the drain rate is measured."""
_UNKNOWN_RATE_RETRY_S = 5.0


class Ticket:
    """A place in the queue; give it back with ``release``, more than once does no harm."""

    def __init__(self, admission: Admission, num_requests: int, num_tokens: int) -> None:
        self._admission = admission
        self._num_requests = num_requests
        self._num_tokens = num_tokens
        self._is_held = True

    def release(self, now_s: float) -> None:
        """Give the place back."""
        if self._is_held:
            self._is_held = False
            self._admission._release(self._num_requests, self._num_tokens, now_s)


class Admission:
    """Counts what a replica holds.

    Args:
        max_requests: engine requests (one per prompt) held at once.
        max_tokens: prompt and output tokens that they may need together.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._finished_s: deque[float] = deque(maxlen=_RATE_WINDOW)
        self.num_requests = 0
        """Requests held now."""
        self.num_tokens = 0
        """Tokens that they may need."""

    def admit(self, num_requests: int, num_tokens: int, now_s: float) -> Ticket:
        """Take a place for one call. Raises ``QueueFullError`` with a retry time."""
        over = self.num_requests + num_requests - self._max_requests
        if over > 0:
            raise QueueFullError(
                f"the queue is full: {self.num_requests} requests, at most {self._max_requests}",
                self.retry_after_s(over, now_s),
            )
        if self.num_requests and self.num_tokens + num_tokens > self._max_tokens:
            raise QueueFullError(
                f"the queue is full: {self.num_tokens} tokens wanted, at most {self._max_tokens}",
                self.retry_after_s(1, now_s),
            )
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        return Ticket(self, num_requests, num_tokens)

    def drain_rate(self, now_s: float) -> float | None:
        """Requests finished per second of late; None while that is not known."""
        if len(self._finished_s) < 2 or now_s <= self._finished_s[0]:
            return None
        return len(self._finished_s) / (now_s - self._finished_s[0])

    def retry_after_s(self, num_requests: int, now_s: float) -> float:
        """Time until ``num_requests`` will have left, as far as the past tells."""
        rate = self.drain_rate(now_s)
        return clamp_retry_s(num_requests / rate if rate else _UNKNOWN_RATE_RETRY_S)

    def queue_time_s(self, num_waiting: int, now_s: float) -> float:
        """Time until ``num_waiting`` requests have left; 0 while the rate is not known."""
        rate = self.drain_rate(now_s)
        return num_waiting / rate if rate else 0.0

    def _release(self, num_requests: int, num_tokens: int, now_s: float) -> None:
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens
        self._finished_s.extend([now_s] * num_requests)
