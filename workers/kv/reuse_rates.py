"""Learned probabilities that cached prefixes are used again, by kind and age. Pure.

A *turn* is the set of blocks that one request used last. Its age is the number of blocks that were
freed since. Ages are divided into bins, each of which ends at twice the age of the one before. For
each kind of turn and each bin, this module counts the fraction of turns that are reused there. The
value of a turn is the maximum, over all keep times, of the probability of reuse divided by the
expected keep time. The turn with the least value is evicted first.

Sources: the index is from Gittins, "Bandit Processes and Dynamic Allocation Indices" (1979);
learned reuse by class and age is from Beckmann et al., "LHD: Improving Cache Hit Rate by Maximizing
Hit Density" (NSDI 2018). Here an object is a turn of a chat, and evicted turns are observed too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST_BIN = 64
"""Width of the first bin, in blocks freed. Within a bin, older turns have less value."""
NUM_BINS = 28
"""Number of bins: the last one begins after more blocks than a worker frees in days."""
NEW_RATE = 0.2
"""Initial fraction of new turns that are reused in each bin. As it is equal in all bins, the least
recently used turn is evicted first until the real fractions are learned."""
USED_RATE = 4 / 11
"""Like ``NEW_RATE``, for turns that continue others. It gives twice the value of a new turn of the
same age, as chats that were continued once are more likely to be continued: on the Mooncake trace
with a probability of 0.6 within ten minutes, new ones with 0.24."""
_PRIOR_TURNS = 20.0
"""Weight of an initial rate: as much as this number of observed turns."""
_MAX_TURNS = 4096.0
"""Turns of a kind after which all its counts are halved."""
_REFRESH = 128
"""Counted turns after which values are recomputed."""
_DEPTHS = 5
"""Number of classes of turns by their number of earlier turns: 0, 1, 2 or 3, 4 to 7, more."""


@dataclass(slots=True)
class _Kind:
    rate: float
    reached: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    reused: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    scores: list[float] = field(default_factory=list)
    """Value of a turn times its age, by bin."""
    num_counted: int = 0
    """Turns counted since the scores were computed."""

    def compute(self) -> None:
        prior = _PRIOR_TURNS
        parts = [
            (again + prior * self.rate) / (all_turns + prior)
            for again, all_turns in zip(self.reused, self.reached, strict=True)
        ]
        self.scores = [_score(parts, first) for first in range(NUM_BINS)]
        self.num_counted = 0

    def forget_half(self) -> None:
        self.reached = [count / 2 for count in self.reached]
        self.reused = [count / 2 for count in self.reused]


class ReuseRates:
    """Learns how often turns of each kind are reused, and computes the value of keeping them."""

    def __init__(self, used_rate: float = USED_RATE) -> None:
        """``used_rate``: initial reuse rate of turns that continue others; see ``USED_RATE``."""
        rates = [NEW_RATE, *[used_rate] * (_DEPTHS - 1)]
        self._kinds = [_Kind(rate) for _ in (False, True) for rate in rates]
        for kind in self._kinds:
            kind.compute()

    @staticmethod
    def kind(num_before: int, *, has_session: bool) -> int:
        """Return the number of the class (kind) of a turn with ``num_before`` earlier turns."""
        return min(num_before.bit_length(), _DEPTHS - 1) + (_DEPTHS if has_session else 0)

    def note_reached(self, kind: int, age_bin: int) -> None:
        """Count a turn that has reached ``age_bin``."""
        found = self._kinds[kind]
        found.reached[age_bin] += 1
        found.num_counted += 1
        if found.reached[0] > _MAX_TURNS:
            found.forget_half()

    def note_reused(self, kind: int, age_bin: int) -> None:
        """Count a turn that is used again in ``age_bin``, even if its blocks were evicted."""
        self._kinds[kind].reused[age_bin] += 1

    def value(self, kind: int, age_bin: int, age: int) -> float:
        """Return the value of a turn in ``age_bin``, infinite at age 0; the lowest is evicted."""
        found = self._kinds[kind]
        if found.num_counted >= _REFRESH:
            found.compute()
        return found.scores[age_bin] / age if age else math.inf


def bin_end(age_bin: int) -> int:
    """Return the age at which a turn moves to the next bin."""
    return FIRST_BIN << age_bin


def bin_of(age: int) -> int:
    return min((age // FIRST_BIN).bit_length(), NUM_BINS - 1)


def _score(parts: list[float], first: int) -> float:
    """Return the maximum, over all keep times, of expected uses divided by expected keep time.

    The turn has reached bin ``first``, whose width is the time unit. ``parts``: reused part by bin.
    Example: 0.5 and 0, in bins of width 1. Keeping a turn for one bin gives 0.5 uses in a mean time
    of 0.75, as reused turns leave after half of the bin; for two bins, 0.5 uses in 1.25.
    """
    best = kept = uses = 0.0
    alive, width = 1.0, 1.0
    for place, part in enumerate(parts[first:], first):
        kept += alive * width * (1 - part / 2)
        uses += alive * part
        alive *= 1 - part
        best = max(best, uses / kept)
        width = width * 2 if place else width  # the second bin is as wide as the first
    return round(best, 9)
