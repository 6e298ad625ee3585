"""The cost of one more row in a decode step, measured in tokens. Pure: times are arguments.

The time of a step is modeled as a linear function of its rows, a + b * rows, fitted to recent
steps. n sequences without guesses yield n tokens in a + b * n seconds. A further row takes b
seconds, in which these sequences would have yielded b * n / (a + b * n) tokens. This number is the
row's price: a guess is worth a row if its probability of being right is higher. The price is low
with few sequences, where a step mostly reads weights, and high where rows dominate the time. No
line fits few and many sequences at once, so each size class has a line: 1, 2, 3 .. 4, 5 .. 8 and so
on.

A row costs the same for every sequence, so the rule raises the tokens per second of the batch.
"""

from __future__ import annotations

_DECAY = 0.98
"""Factor by which each new step multiplies the weight of earlier steps: about the last 50
matter."""
_FIRST_PRICE = 0.3
"""Assumed price of a row, in tokens, while no steps of different sizes are known. As old steps lose
weight, the price returns to this value, so that drafts are tried again from time to time."""
_FIRST_WEIGHT = 8.0
"""Weight of ``_FIRST_PRICE`` in the fit: as much as eight steps with one row more than the mean, or
two steps with two rows more."""
_MIN_PRICE = 0.02
_MAX_OUTLIER = 1.5
"""Limit of a step's recorded time, as a multiple of the expected time, so that a single slow step
has little effect."""


class StepCosts:
    """Cost models of an engine's decode steps, one for each size class of the number of
    sequences."""

    def __init__(self) -> None:
        self._by_size: dict[int, DecodeStepCost] = {}

    def of(self, num_sequences: int) -> DecodeStepCost:
        """Return the cost model of steps with ``num_sequences`` sequences."""
        return self._by_size.setdefault(max(num_sequences - 1, 0).bit_length(), DecodeStepCost())


class DecodeStepCost:
    """Linear model of the time of decode steps, fitted to decaying sums over the steps."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._rows = self._seconds = 0.0
        self._rows_rows = self._rows_seconds = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Record the time of a step that had ``num_rows`` decode rows, on all ranks, and no prefill
        rows."""
        if self._seconds:
            begin, slope = self._line()
            seconds = min(seconds, _MAX_OUTLIER * (begin + slope * num_rows))
        self._weight = _DECAY * self._weight + 1
        self._rows = _DECAY * self._rows + num_rows
        self._seconds = _DECAY * self._seconds + seconds
        self._rows_rows = _DECAY * self._rows_rows + num_rows * num_rows
        self._rows_seconds = _DECAY * self._rows_seconds + num_rows * seconds

    def price(self, num_sequences: int) -> float:
        """Return the number of tokens that a further row must yield to be worth its time, from 0.02
        to 1.

        ``num_sequences``: number of decoding sequences, at least 1.
        """
        if not self._seconds:
            return _FIRST_PRICE
        begin, slope = self._line()
        price = slope * num_sequences / (begin + slope * num_sequences)
        return min(max(price, _MIN_PRICE), 1.0)

    def _line(self) -> tuple[float, float]:
        """Return the seconds of a step without rows, and the seconds of each row; both are at least
        0."""
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        squares = max(self._rows_rows - self._rows * rows, 0.0)
        products = self._rows_seconds - self._rows * seconds
        first = _FIRST_PRICE * seconds / rows
        slope = (products + _FIRST_WEIGHT * first) / (squares + _FIRST_WEIGHT)
        slope = min(max(slope, 0.0), seconds / rows)
        return seconds - slope * rows, slope
