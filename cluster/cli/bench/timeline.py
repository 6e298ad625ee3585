"""What a load test saw over time, in memory that does not grow with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_BINS = 240
"""Where more would be needed, bins become twice as wide."""
_FIRST_WIDTH_S = 0.25


@dataclass(slots=True)
class _Bin:
    tokens: float = 0.0
    ended: int = 0
    started: int = 0
    ttft_ms: float = 0.0
    """Sum over the requests that were sent in this bin and answered."""

    def add(self, other: _Bin) -> None:
        self.tokens += other.tokens
        self.ended += other.ended
        self.started += other.started
        self.ttft_ms += other.ttft_ms


class Timeline:
    """Sums over bins of time since the beginning of the measurement."""

    def __init__(self) -> None:
        self._width_s = _FIRST_WIDTH_S
        self._bins: list[_Bin] = []

    def add_first(self, sent_s: float, ttft_ms: float) -> None:
        """A request that was sent at this time had its first token so much later."""
        self._at(sent_s).add(_Bin(started=1, ttft_ms=ttft_ms))

    def add_tokens(self, at_s: float, tokens: float) -> None:
        self._at(at_s).tokens += tokens

    def add_end(self, at_s: float) -> None:
        self._at(at_s).ended += 1

    def _at(self, time_s: float) -> _Bin:
        while time_s >= MAX_BINS * self._width_s:
            self._widen()
        index = max(int(time_s / self._width_s), 0)
        self._bins += [_Bin() for _ in range(index + 1 - len(self._bins))]
        return self._bins[index]

    def _widen(self) -> None:
        for odd in range(1, len(self._bins), 2):
            self._bins[odd - 1].add(self._bins[odd])
        self._bins = self._bins[::2]
        self._width_s *= 2

    def series(self) -> dict[str, Any]:
        """``bin_s``, and a list for each number; a mean TTFT of None: nothing was sent."""
        return {
            "bin_s": self._width_s,
            "output_tokens_per_s": [b.tokens / self._width_s for b in self._bins],
            "requests_per_s": [b.ended / self._width_s for b in self._bins],
            "ttft_ms": [b.ttft_ms / b.started if b.started else None for b in self._bins],
        }
