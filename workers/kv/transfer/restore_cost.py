"""Measured cost of reading KV blocks from the tiers, relative to computing them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv.transfer.fetch_cost import FORGET_S, UNMEASURED_COST, FetchCost, Rate


@dataclass(slots=True)
class RestoreCost:
    """Rates at which one worker reads blocks of each tier.

    Any thread may call the methods: a result is at most one measurement out of date.
    """

    computing: FetchCost
    """Source of the measured speed of computing prompts."""
    bytes_per_token: float
    """Size of the KV blocks for each token."""
    _rates: dict[str, Rate] = field(default_factory=dict)
    _measured_s: dict[str, float] = field(default_factory=dict)

    def observe(self, tier: str, num_bytes: int, seconds: float, now_s: float) -> None:
        """Record bytes that were read from a tier and written to the pool."""
        if self._is_old(tier, now_s):
            self._rates[tier] = Rate()
        self._rates[tier].observe(num_bytes, seconds)
        self._measured_s[tier] = now_s

    def tokens(self, tier: str, num_bytes: int, now_s: float) -> float:
        """Return the prompt tokens that are computed in the time of reading ``num_bytes``.

        Example: if 1,000 tokens are computed and 1 MB is read a second, 1,000 bytes cost 1 token.
        """
        read_s = None if self._is_old(tier, now_s) else self._rates[tier].time_of(num_bytes)
        token_s = self.computing.compute_s(1)
        if not read_s or not token_s:
            return UNMEASURED_COST * num_bytes / self.bytes_per_token
        return read_s / token_s

    def _is_old(self, tier: str, now_s: float) -> bool:
        """Whether the tier was not measured within ``FORGET_S``, so that it should be tried."""
        return now_s - self._measured_s.get(tier, -FORGET_S) >= FORGET_S
