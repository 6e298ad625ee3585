"""Usage of one key and its limits. Pure: callers pass the time.

Each rate is a token bucket with the capacity of one minute. A request is charged at its arrival,
prompt tokens at admission, output tokens at the end. The balance may become negative, so a
request is never too large for its key; later requests are refused until it is at least 1 again.
"""

from __future__ import annotations

from cluster.core.errors import KeyLimitError
from gateway.auth.key_file import KeyEntry, KeyLimits

_DEFAULT_RETRY_S = 1.0
"""Retry time in seconds until a first request of the key has ended."""
_MEMORY = 0.95
"""Decay per ended request of the mean duration, which thus covers about 20 requests."""


class Bucket:
    """A token bucket that gains ``per_minute`` tokens per minute; this is also its capacity."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until the balance is at least 1, or the capacity if that is less."""
        self._fill(now_s)
        least = min(1.0, self.per_minute)
        return max(0.0, least - self._level) * 60.0 / self.per_minute

    def spend(self, amount: float, now_s: float) -> None:
        """Withdraw ``amount``, below zero if necessary."""
        self._fill(now_s)
        self._level -= amount

    def _fill(self, now_s: float) -> None:
        gained = max(0.0, now_s - self._at_s) * self.per_minute / 60.0
        self._level = min(self.per_minute, self._level + gained)
        self._at_s = max(now_s, self._at_s)


class KeyUsage:
    """Usage of one key in one replica.

    Args:
        entry: the key.
        limits: its limits.
        now_s: current time.
    """

    def __init__(self, entry: KeyEntry, limits: KeyLimits, now_s: float) -> None:
        self.entry = entry
        self.is_admin = False
        """Whether the key opens the admin ports, and its callers may see the whole cluster."""
        self.num_running = 0
        self._busy_s = 0.0  # seconds of running requests; decays, as _num_ended does
        self._num_ended = 0.0
        self._at_s = now_s
        self._limits = KeyLimits()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(entry, limits, now_s)

    def change(self, entry: KeyEntry, limits: KeyLimits, now_s: float) -> None:
        """Change the limits. A limit that does not change keeps its usage."""
        old, self.entry, self._limits = self._limits, entry, limits
        if old.requests_per_minute != limits.requests_per_minute:
            self._requests = _bucket(limits.requests_per_minute, now_s)
        if old.tokens_per_minute != limits.tokens_per_minute:
            self._tokens = _bucket(limits.tokens_per_minute, now_s)

    def enter(self, now_s: float) -> None:
        """Count the start of a request. Raises ``KeyLimitError`` without counting it."""
        most = self._limits.max_concurrent
        if most is not None and self.num_running >= most:
            message = f"{self.num_running} requests of this key are running, at most {most}"
            raise KeyLimitError(message, self._end_s(now_s), "key_concurrency")
        if self._requests is not None:
            _check(self._requests, "requests", now_s)
            self._requests.spend(1, now_s)
        self._count_busy(now_s)
        self.num_running += 1

    def leave(self, now_s: float) -> None:
        """Count the end of a running request."""
        self._count_busy(now_s)
        self.num_running -= 1
        self._busy_s *= _MEMORY
        self._num_ended = _MEMORY * (self._num_ended + 1)

    def _count_busy(self, now_s: float) -> None:
        self._busy_s += self.num_running * max(0.0, now_s - self._at_s)
        self._at_s = max(now_s, self._at_s)

    def _end_s(self, now_s: float) -> float:
        """Seconds until one of the running requests ends: mean duration / number (Little's law)."""
        self._count_busy(now_s)
        if not self._num_ended:
            return _DEFAULT_RETRY_S
        return self._busy_s / self._num_ended / self.num_running

    def check_tokens(self, now_s: float) -> None:
        """Raise ``KeyLimitError`` while the token balance of the key is below 1."""
        if self._tokens is not None:
            _check(self._tokens, "tokens", now_s)

    def spend_tokens(self, count: int, now_s: float) -> None:
        """Withdraw ``count`` prompt or output tokens from the token balance of the key."""
        if self._tokens is not None:
            self._tokens.spend(count, now_s)


def _bucket(per_minute: float | None, now_s: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now_s)


def _check(bucket: Bucket, what: str, now_s: float) -> None:
    wait_s = bucket.wait_s(now_s)
    if wait_s > 0:
        message = f"this key may use {bucket.per_minute:g} {what} per minute and has used them up"
        raise KeyLimitError(message, wait_s, f"key_{what}")
