"""Limits of a weight transfer: its rate in bytes per second, and its duration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cluster.core.errors import TransferAbortedError

_BURST_S = 0.02
"""Size of the token bucket: the number of seconds at the full rate that its bytes last."""


class RateLimit:
    """Token bucket that limits the rate of a weight transfer, and the time limit of the transfer.
    Used by one thread."""

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        limit_s: float | None = None,
        cancelled: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``bytes_per_s``: rate; ``limit_s``: seconds from now to the end; None: no limit. If
        ``cancelled`` is set, ``take`` raises."""
        self._rate = bytes_per_s
        self._clock = clock
        self._cancelled = cancelled or threading.Event()
        self._free_at = clock()
        self._limit_s = limit_s
        self._ends_at = float("inf") if limit_s is None else clock() + limit_s

    def delay_s(self, num_bytes: int) -> float:
        """Take bytes from the bucket; return the seconds to wait before they may be transferred, 0
        without a rate limit."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._free_at = max(self._free_at, now - _BURST_S) + num_bytes / self._rate
        return max(self._free_at - now, 0.0)

    def take(self, num_bytes: int) -> None:
        """Take bytes from the bucket and wait until they may be transferred.

        Raises ``TransferAbortedError`` if the transfer was cancelled or would exceed its time
        limit.
        """
        delay_s = self.delay_s(num_bytes)
        left_s = self._ends_at - self._clock()
        if self._cancelled.wait(max(min(delay_s, left_s), 0.0)):
            raise TransferAbortedError("it was cancelled")
        if delay_s > left_s:
            raise TransferAbortedError(f"not done within {self._limit_s:g} s")
