"""Sums of a load test in memory that does not grow with it. Pure: no clock, no sockets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_GROWTH = math.log(1.01)
"""Growth of the buckets: quantiles are exact to half a bucket."""
MEASURES = ("ttft", "tpot", "itl", "e2e")
"""First token, each token after it, gaps between pieces of a stream, the whole request."""


class Distribution:
    """Positive numbers: their mean exactly, their quantiles to half a percent."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
        self._sum += value
        self._buckets[math.floor(math.log(max(value, 1e-9)) / _GROWTH)] += 1

    def quantile(self, part: float) -> float | None:
        """The least number that ``part`` of all do not exceed; None without numbers."""
        left = max(1, math.ceil(part * self.count))
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return math.exp((bucket + 0.5) * _GROWTH)
        return None

    def summary(self) -> dict[str, float | None]:
        """Mean, median, 90th and 99th percentile."""
        mean = self._sum / self.count if self.count else None
        parts = {"median": 0.5, "p90": 0.9, "p99": 0.99}
        return {"mean": mean, **{name: self.quantile(part) for name, part in parts.items()}}


@dataclass(frozen=True, slots=True)
class Answer:
    """One request that was answered, in seconds since it was sent."""

    pieces_s: Sequence[float]
    """When each piece of the stream came."""
    end_s: float
    """When the stream ended."""
    prompt_tokens: int
    output_tokens: int

    def measures_ms(self) -> dict[str, list[float]]:
        """Milliseconds by measure; ``itl`` has one for each gap."""
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
    """Outcomes of the requests so far."""

    goals_ms: Mapping[str, float]
    """By measure: what a request must not exceed to be good, in none of its gaps for ``itl``."""
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
    """How long after its time of arrival each request was sent."""

    def begin(self, late_s: float = 0.0) -> None:
        """A request is sent, so long after it was due."""
        self.late_ms.add(1e3 * late_s)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def fail(self, code: str) -> None:
        """A request failed."""
        self.in_flight -= 1
        self.failures[code] += 1

    def take(self, answer: Answer) -> None:
        """A request was answered."""
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
        """Requests that came to an end, good or bad."""
        return self.successful + sum(self.failures.values())

    def results(self, duration_s: float) -> dict[str, Any]:
        """The document's numbers; what is still under way is ``unfinished``."""
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
