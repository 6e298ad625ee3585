"""What reading KV blocks from the tiers costs beside computing them, as measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv.transfer.fetch_cost import FORGET_S, UNMEASURED_COST, FetchCost, Rate


@dataclass(slots=True)
class RestoreCost:
    """Rates at which one worker reads blocks of each tier.

    Any thread may call it: a value read is at worst one measurement old.
    """

    computing: FetchCost
    """Knows how fast prompts are computed."""
    bytes_per_token: float
    """Of KV blocks."""
    _rates: dict[str, Rate] = field(default_factory=dict)
    _measured_s: dict[str, float] = field(default_factory=dict)

    def observe(self, tier: str, num_bytes: int, seconds: float, now_s: float) -> None:
        """Bytes that were read from a tier, and written to the pool."""
        if self._is_old(tier, now_s):
            self._rates[tier] = Rate()
        self._rates[tier].observe(num_bytes, seconds)
        self._measured_s[tier] = now_s

    def tokens(self, tier: str, num_bytes: int, now_s: float) -> float:
        """Prompt tokens that are computed in the time that reading so much takes.

        Example: 1,000 tokens a second computed, 1 MB a second read: 1,000 bytes cost one token.
        """
        read_s = None if self._is_old(tier, now_s) else self._rates[tier].time_of(num_bytes)
        token_s = self.computing.compute_s(1)
        if not read_s or not token_s:
            return UNMEASURED_COST * num_bytes / self.bytes_per_token
        return read_s / token_s

    def _is_old(self, tier: str, now_s: float) -> bool:
        """Nothing is measured, or too long ago: the tier is tried again."""
        return now_s - self._measured_s.get(tier, -FORGET_S) >= FORGET_S
