"""From the times at which tokens came to the numbers of the tables. Pure: no clock, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.cli.bench.batch_times import Times, decode_span_of


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
    """Median time between two tokens of a sequence in that span (inter-token latency)."""
    others_cores: float
    """CPU cores that other processes used meanwhile."""


def sample_of(times: Times, others_cores: float = 0.0) -> Sample:
    """Numbers of one batch; at least two tokens each."""
    last, span = max(t[-1] for t in times), decode_span_of(times)
    assert span.tokens_per_s is not None, "something was decoded"
    return Sample(
        tokens_per_s=sum(map(len, times)) / last,
        prefill_s=span.begin_s,
        decode_tokens_per_s=span.tokens_per_s,
        itl_ms=statistics.median(span.gaps_s) * 1e3,
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
