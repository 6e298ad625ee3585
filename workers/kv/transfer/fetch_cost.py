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
class _Rate:
    """Tokens per second over the latest measurements."""

    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        self.tokens = self.tokens * _MEMORY + tokens
        self.seconds = self.seconds * _MEMORY + seconds


class FetchCost:
    """Rates at which one worker computes prompts, and fetches their blocks from others.

    Any thread may call it: a value read is at worst one measurement old.
    """

    def __init__(self) -> None:
        self._prefill = _Rate()
        self._fetch = _Rate()
        self._fetched_s = 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Prompt tokens that a step computed."""
        self._prefill.observe(tokens, seconds)

    def observe_fetch(self, tokens: int, seconds: float, now_s: float) -> None:
        """Tokens whose blocks came: after a failure fewer than were asked for, or none."""
        if now_s - self._fetched_s > FORGET_S:
            self._fetch = _Rate()
        self._fetch.observe(tokens, seconds)
        self._fetched_s = now_s

    def ratio(self, now_s: float) -> float:
        """Prompt tokens that are computed in the time that fetching one token takes.

        Example: 1,000 tokens a second computed and 8,000 fetched: 0.125.
        """
        prefill, fetch = self._prefill, self._fetch
        is_known = prefill.seconds and fetch.seconds and now_s - self._fetched_s <= FORGET_S
        if not is_known:
            return UNMEASURED_COST
        return prefill.tokens / prefill.seconds * fetch.seconds / max(fetch.tokens, 1.0)
