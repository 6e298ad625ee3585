"""Measured cost of fetching KV blocks, relative to computing them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_COST = 0.1
"""Cost ratio until both rates are measured; below 1, as most links outrun most models."""
FORGET_S = 60.0
"""Seconds without a fetch after which ``UNMEASURED_COST`` applies, so that a fetch is tried."""
_MEMORY = 0.8
"""Factor by which each new measurement reduces the weight of the earlier ones."""


@dataclass(slots=True)
class Rate:
    """Tokens or bytes per second, averaged over the latest measurements."""

    amount: float = 0.0
    seconds: float = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        self.amount = self.amount * _MEMORY + amount
        self.seconds = self.seconds * _MEMORY + seconds

    def time_of(self, amount: float) -> float | None:
        """Return the seconds that ``amount`` takes, or None without a measurement."""
        return amount * self.seconds / max(self.amount, 1.0) if self.seconds else None


class FetchCost:
    """Rates at which one worker computes prompts, and fetches their blocks from other workers.

    Any thread may call the methods: a result is at most one measurement out of date.
    """

    def __init__(self) -> None:
        self._prefill = Rate()
        self._fetch = Rate()
        self._fetched_s = 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Record the prompt tokens that a step computed."""
        self._prefill.observe(tokens, seconds)

    def observe_fetch(self, tokens: int, seconds: float, now_s: float) -> None:
        """Record the tokens of fetched blocks: after a failure fewer than requested, or none."""
        if now_s - self._fetched_s > FORGET_S:
            self._fetch = Rate()
        self._fetch.observe(tokens, seconds)
        self._fetched_s = now_s

    def ratio(self, now_s: float) -> float:
        """Return the prompt tokens that are computed in the time of fetching one token.

        ``UNMEASURED_COST`` without both rates. Example: 1,000 and 8,000 tokens a second give 0.125.
        """
        fetch_s, token_s = self._fetch.time_of(1), self.compute_s(1)
        if not fetch_s or not token_s or now_s - self._fetched_s > FORGET_S:
            return UNMEASURED_COST
        return fetch_s / token_s

    def compute_s(self, tokens: int) -> float | None:
        """Return the seconds to compute ``tokens`` prompt tokens, or None without a measurement."""
        return self._prefill.time_of(tokens)
