"""Statistics of a workload in constant memory. Uses no clock and no sockets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_GROWTH = math.log(1.01)
"""Logarithm of the ratio of adjacent bucket bounds; quantiles are exact to half a bucket."""
MEASURES = ("ttft", "tpot", "itl", "e2e")
"""Names of measured times: to the first token, per further token, between pieces, of a request."""


class Distribution:
    """Distribution of positive numbers with an exact mean and quantiles exact to half a percent."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
        self._sum += value
        self._buckets[math.floor(math.log(max(value, 1e-9)) / _GROWTH)] += 1

    def quantile(self, part: float) -> float | None:
        """Return the ``part`` quantile (0 to 1), exact to half a percent; None without numbers."""
        left = max(1, math.ceil(part * self.count))
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return math.exp((bucket + 0.5) * _GROWTH)
        return None

    def summary(self) -> dict[str, float | None]:
        """Return mean, median, 90th and 99th percentile by name; None without numbers."""
        mean = self._sum / self.count if self.count else None
        parts = {"median": 0.5, "p90": 0.9, "p99": 0.99}
        return {"mean": mean, **{name: self.quantile(part) for name, part in parts.items()}}


@dataclass(frozen=True, slots=True)
class CompletedRequest:
    """Times of one completed request, in seconds since the request was sent."""

    pieces_s: Sequence[float]
    """Arrival time of each piece of the stream, in seconds after the request was sent."""
    end_s: float
    """End of the stream, in seconds after the request was sent."""
    prompt_tokens: int
    output_tokens: int

    def measures_ms(self) -> dict[str, list[float]]:
        """Return milliseconds by name in ``MEASURES``; ``itl`` has one value for each gap."""
        first, last = self.pieces_s[0], self.pieces_s[-1]
        gaps = [b - a for a, b in zip(self.pieces_s, self.pieces_s[1:], strict=False)]
        found = {
            "ttft": [first],
            "tpot": [(last - first) / (self.output_tokens - 1)] if self.output_tokens > 1 else [],
            "itl": gaps,
            "e2e": [self.end_s],
        }
        return {name: [1e3 * value for value in values] for name, values in found.items()}


@dataclass
class Tally:
    """Counts and times of the requests of a workload so far."""

    goals_ms: Mapping[str, float]
    """Upper limits of a good request in milliseconds, by measure; ``itl`` limits each gap."""
    successful: int = 0
    good: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    times_ms: Mapping[str, Distribution] = field(
        default_factory=lambda: {name: Distribution() for name in MEASURES}
    )
    late_ms: Distribution = field(default_factory=Distribution)
    """Delays in milliseconds from the arrival time of a request until the request was sent."""

    def begin(self, late_s: float = 0.0) -> None:
        """Record that a request is sent, ``late_s`` after its arrival time."""
        self.late_ms.add(1e3 * late_s)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def fail(self, code: str) -> None:
        """Record a failed request under its error code."""
        self.in_flight -= 1
        self.failures[code] += 1

    def take(self, answer: CompletedRequest) -> None:
        """Record a completed request."""
        self.in_flight -= 1
        self.successful += 1
        self.prompt_tokens += answer.prompt_tokens
        self.output_tokens += answer.output_tokens
        measures = answer.measures_ms()
        for name, values in measures.items():
            for value in values:
                self.times_ms[name].add(value)
        worst = {name: max(values, default=0.0) for name, values in measures.items()}
        self.good += all(worst[name] <= goal for name, goal in self.goals_ms.items())

    @property
    def ended(self) -> int:
        """Number of requests that have ended, completed or failed."""
        return self.successful + sum(self.failures.values())

    def results(self, duration_s: float) -> dict[str, Any]:
        """Return ``results`` of the document; requests that still run count as ``unfinished``."""
        span = max(duration_s, 1e-9)
        both = self.prompt_tokens + self.output_tokens
        return {
            "successful": self.successful,
            "failed": sum(self.failures.values()),
            "failures": dict(sorted(self.failures.items())),
            "unfinished": self.in_flight,
            "duration_s": duration_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "peak_concurrency": self.peak_in_flight,
            "requests_per_s": self.successful / span,
            "output_tokens_per_s": self.output_tokens / span,
            "tokens_per_s": both / span,
            "good_requests_per_s": self.good / span if self.goals_ms else None,
            "sent_late_ms": self.late_ms.summary(),
            **{f"{name}_ms": found.summary() for name, found in self.times_ms.items()},
        }
