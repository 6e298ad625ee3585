"""What fetching KV blocks costs beside computing them, as measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_COST = 0.1
"""Cost until both rates are measured: most links are faster than most models."""
FORGET_S = 60.0
"""Age after which a measurement of the link no longer counts, so that it is tried again."""
_MEMORY = 0.8
"""Weight of a measurement after the next one."""


@dataclass(slots=True)
class Rate:
    """What is done in a second, tokens or bytes, over the latest measurements."""

    amount: float = 0.0
    seconds: float = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        self.amount = self.amount * _MEMORY + amount
        self.seconds = self.seconds * _MEMORY + seconds

    def time_of(self, amount: float) -> float | None:
        """Seconds for so much; None: nothing is measured."""
        return amount * self.seconds / max(self.amount, 1.0) if self.seconds else None


class FetchCost:
    """Rates at which one worker computes prompts, and fetches their blocks from others.

    Any thread may call it: a value read is at worst one measurement old.
    """

    def __init__(self) -> None:
        self._prefill = Rate()
        self._fetch = Rate()
        self._fetched_s = 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Prompt tokens that a step computed."""
        self._prefill.observe(tokens, seconds)

    def observe_fetch(self, tokens: int, seconds: float, now_s: float) -> None:
        """Tokens whose blocks came: after a failure fewer than were asked for, or none."""
        if now_s - self._fetched_s > FORGET_S:
            self._fetch = Rate()
        self._fetch.observe(tokens, seconds)
        self._fetched_s = now_s

    def ratio(self, now_s: float) -> float:
        """Prompt tokens that are computed in the time that fetching one token takes.

        Example: 1,000 tokens a second computed and 8,000 fetched: 0.125.
        """
        fetch_s, token_s = self._fetch.time_of(1), self.compute_s(1)
        if not fetch_s or not token_s or now_s - self._fetched_s > FORGET_S:
            return UNMEASURED_COST
        return fetch_s / token_s

    def compute_s(self, tokens: int) -> float | None:
        """Seconds in which so many prompt tokens are computed; None: not measured."""
        return self._prefill.time_of(tokens)
