"""From the times at which a batch's tokens came to its rates. Pure: no clock, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""By sequence, seconds from the start of a batch to each of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSpan:
    """What happened while all sequences decoded."""

    begin_s: float
    """Every sequence has its first token: the prefill is over."""
    end_s: float
    """The first sequence has all its tokens."""
    tokens: int
    """That came in between."""
    gaps_s: tuple[float, ...]
    """Between two tokens of one sequence."""

    @property
    def tokens_per_s(self) -> float | None:
        """None where nothing was decoded."""
        return self.tokens / (self.end_s - self.begin_s) if self.tokens else None

    @property
    def median_gap_ms(self) -> float | None:
        """The same."""
        return 1e3 * statistics.median(self.gaps_s) if self.gaps_s else None


def decode_span_of(times: Times) -> DecodeSpan:
    """The span of one batch.

    A sequence that got its first token early has already decoded by the end of the prefill; these
    tokens do not count. Where nothing is left of the span in which all decode (few tokens, long
    prefill), it is everything after the prefill.
    """
    begin = max(t[0] for t in times)
    end = min(t[-1] for t in times)
    if end <= begin:
        end = max(t[-1] for t in times)
    inside = [[t for t in mine if begin <= t <= end] for mine in times]
    gaps = tuple(b - a for mine in inside for a, b in pairwise(mine))
    new = sum(sum(t > begin for t in mine) for mine in inside)
    return DecodeSpan(begin_s=begin, end_s=end, tokens=new, gaps_s=gaps)
