"""Rates and latencies computed from the arrival times of tokens. Pure: no clock, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""For each sequence, seconds from the start of a batch to each of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeInterval:
    """Tokens and times of the interval in which all sequences decode."""

    begin_s: float
    """Time at which every sequence has its first token."""
    end_s: float
    """Time at which the first sequence has all its tokens."""
    tokens: int
    """Number of tokens in the interval."""
    gaps_s: tuple[float, ...]
    """Times between two tokens of one sequence."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate; None if no token was decoded."""
        return self.tokens / (self.end_s - self.begin_s) if self.tokens else None

    @property
    def median_gap_ms(self) -> float | None:
        """Median time between two tokens; None if no token was decoded."""
        return 1e3 * statistics.median(self.gaps_s) if self.gaps_s else None


def decode_interval_of(times: Times) -> DecodeInterval:
    """The interval of one batch.

    A sequence that got its first token early has already decoded by the end of the prefill; these
    tokens do not count. Where nothing is left of the interval in which all decode (few tokens, long
    prefill), it is everything after the prefill.
    """
    begin = max(t[0] for t in times)
    end = min(t[-1] for t in times)
    if end <= begin:
        end = max(t[-1] for t in times)
    inside = [[t for t in mine if begin <= t <= end] for mine in times]
    gaps = tuple(b - a for mine in inside for a, b in pairwise(mine))
    new = sum(sum(t > begin for t in mine) for mine in inside)
    return DecodeInterval(begin_s=begin, end_s=end, tokens=new, gaps_s=gaps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Results of one batch, or medians of several batches."""

    tokens_per_s: float
    """All new tokens divided by the time from the start to the last token, prefill included."""
    prefill_s: float
    """Time from the start until every sequence has its first token."""
    decode_tokens_per_s: float
    """Rate while all sequences decode: from then until the first one has all its tokens."""
    itl_ms: float
    """Median time between two tokens of a sequence in that interval (inter-token latency)."""
    others_cores: float
    """CPU cores that other processes used during the batch."""


def sample_of(times: Times, others_cores: float = 0.0) -> Sample:
    """Results of one batch, whose sequences have at least two tokens each."""
    last, interval = max(t[-1] for t in times), decode_interval_of(times)
    assert interval.tokens_per_s is not None, "something was decoded"
    return Sample(
        tokens_per_s=sum(map(len, times)) / last,
        prefill_s=interval.begin_s,
        decode_tokens_per_s=interval.tokens_per_s,
        itl_ms=statistics.median(interval.gaps_s) * 1e3,
        others_cores=others_cores,
    )


def median_of(samples: Sequence[Sample]) -> Sample:
    """Median of each field."""
    return Sample(
        tokens_per_s=statistics.median(s.tokens_per_s for s in samples),
        prefill_s=statistics.median(s.prefill_s for s in samples),
        decode_tokens_per_s=statistics.median(s.decode_tokens_per_s for s in samples),
        itl_ms=statistics.median(s.itl_ms for s in samples),
        others_cores=statistics.median(s.others_cores for s in samples),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Speed of one system divided by that of another."""

    total: float
    """Ratio of ``tokens_per_s``."""
    decode: float
    """Ratio of ``decode_tokens_per_s``."""


def ratio_of(samples: Sequence[Sample], base: Sequence[Sample]) -> Ratio:
    """Median of the ratios within a repeat, in which other load affects both systems alike."""
    pairs = list(zip(samples, base, strict=True))
    return Ratio(
        total=statistics.median(s.tokens_per_s / b.tokens_per_s for s, b in pairs),
        decode=statistics.median(s.decode_tokens_per_s / b.decode_tokens_per_s for s, b in pairs),
    )
