"""Whether fetching KV blocks is cheaper than computing them, as measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_COST = 0.1
"""Taken for the cost until both have been measured: most links are faster than most models."""
FORGET_S = 60.0
"""A link is tried again so long after it was last measured."""
_MEMORY = 0.8
"""What a measurement weighs after the next one."""


@dataclass(slots=True)
class _Rate:
    """Tokens per second over the latest measurements."""

    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        self.tokens = self.tokens * _MEMORY + tokens
        self.seconds = self.seconds * _MEMORY + seconds


class KvPace:
    """How fast one worker computes prompts, and how fast it gets their blocks from others.

    Any thread may call it: what is read is at worst a measurement old.
    """

    def __init__(self) -> None:
        self._prefill = _Rate()
        self._fetch = _Rate()
        self._fetched_s = 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Prompt tokens that a step computed."""
        self._prefill.observe(tokens, seconds)

    def observe_fetch(self, tokens: int, seconds: float, now_s: float) -> None:
        """Tokens whose blocks came; fewer than asked for, or none, where it failed."""
        if now_s - self._fetched_s > FORGET_S:
            self._fetch = _Rate()
        self._fetch.observe(tokens, seconds)
        self._fetched_s = now_s

    def cost(self, now_s: float) -> float:
        """Prompt tokens that are computed in the time in which one is fetched.

        Example: 1,000 tokens a second computed and 8,000 fetched: 0.125.
        """
        prefill, fetch = self._prefill, self._fetch
        is_known = prefill.seconds and fetch.seconds and now_s - self._fetched_s <= FORGET_S
        if not is_known:
            return UNMEASURED_COST
        return prefill.tokens / prefill.seconds * fetch.seconds / max(fetch.tokens, 1.0)
