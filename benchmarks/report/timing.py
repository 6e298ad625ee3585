"""From the times at which tokens came to the numbers of the tables. Pure: no clock, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Times = Sequence[Sequence[float]]
"""By sequence, seconds from the start of a batch to each of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeInterval:
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
    """What one batch took, or the medians of several."""

    tokens_per_s: float
    """All new tokens by the time from the start to the last one, prefill included."""
    prefill_s: float
    """From the start until every sequence has its first token."""
    decode_tokens_per_s: float
    """Rate while all sequences decode: from then until the first one has all its tokens."""
    itl_ms: float
    """Median time between two tokens of a sequence in that interval (inter-token latency)."""
    others_cores: float
    """CPU cores that other processes used meanwhile."""


def sample_of(times: Times, others_cores: float = 0.0) -> Sample:
    """Numbers of one batch; at least two tokens each."""
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
    """Each number's own median."""
    return Sample(
        tokens_per_s=statistics.median(s.tokens_per_s for s in samples),
        prefill_s=statistics.median(s.prefill_s for s in samples),
        decode_tokens_per_s=statistics.median(s.decode_tokens_per_s for s in samples),
        itl_ms=statistics.median(s.itl_ms for s in samples),
        others_cores=statistics.median(s.others_cores for s in samples),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How many times as fast one system is as another."""

    total: float
    """By ``tokens_per_s``."""
    decode: float
    """By ``decode_tokens_per_s``."""


def ratio_of(samples: Sequence[Sample], base: Sequence[Sample]) -> Ratio:
    """Median over repeats of the ratio within a repeat: load that comes and goes hits both."""
    pairs = list(zip(samples, base, strict=True))
    return Ratio(
        total=statistics.median(s.tokens_per_s / b.tokens_per_s for s, b in pairs),
        decode=statistics.median(s.decode_tokens_per_s / b.decode_tokens_per_s for s, b in pairs),
    )
