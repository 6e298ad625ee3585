"""The cost of a further row in a decode step, measured in tokens. Pure: times are arguments.

The time of a step is modeled as a linear function of its rows, a + b * rows, fitted to recent
steps. n sequences without guesses yield n tokens in a + b * n seconds. A further row takes b
seconds, in which they would have yielded b * n / (a + b * n) tokens. This number is the row's
price: a guess is worth a row if its probability of being right is higher. The price is low with few
sequences, where a step mostly reads weights, and high where rows dominate the time. No line fits
few and many sequences at once, so each size class has a line: 1, 2, 3 .. 4, 5 .. 8 and so on.

A row costs the same for every sequence, so the rule raises the tokens per second of the batch.
"""

from __future__ import annotations

_DECAY = 0.98
"""Factor on the weight of earlier steps for each new one: about the last 50 matter."""
_FIRST_PRICE = 0.3
"""Assumed price while no steps of different sizes are known. As old steps lose weight, the price
returns to it, so that drafts are tried again from time to time."""
_FIRST_WEIGHT = 8.0
"""Weight of the assumed price, in squared rows: as much as eight steps with one row more than
others, or two steps with two rows more."""
_MIN_PRICE = 0.02
_MAX_OUTLIER = 1.5
"""Limit of a step's time, as a multiple of the expected time, against single slow steps."""


class StepCosts:
    """The cost lines of one engine."""

    def __init__(self) -> None:
        self._by_size: dict[int, DecodeStepCost] = {}

    def of(self, num_sequences: int) -> DecodeStepCost:
        """The cost line of steps with ``num_sequences`` sequences."""
        return self._by_size.setdefault(max(num_sequences - 1, 0).bit_length(), DecodeStepCost())


class DecodeStepCost:
    """The line that models the time of decode steps, fitted to decaying sums over the steps."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._rows = self._seconds = 0.0
        self._rows_rows = self._rows_seconds = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Record the time of a step with ``num_rows`` decode rows of all ranks and no others."""
        if self._seconds:
            begin, slope = self._line()
            seconds = min(seconds, _MAX_OUTLIER * (begin + slope * num_rows))
        self._weight = _DECAY * self._weight + 1
        self._rows = _DECAY * self._rows + num_rows
        self._seconds = _DECAY * self._seconds + seconds
        self._rows_rows = _DECAY * self._rows_rows + num_rows * num_rows
        self._rows_seconds = _DECAY * self._rows_seconds + num_rows * seconds

    def price(self, num_sequences: int) -> float:
        """Tokens that a further row must yield, from 0.02 to 1. ``num_sequences``: at least 1."""
        if not self._seconds:
            return _FIRST_PRICE
        begin, slope = self._line()
        price = slope * num_sequences / (begin + slope * num_sequences)
        return min(max(price, _MIN_PRICE), 1.0)

    def _line(self) -> tuple[float, float]:
        """Seconds of a step without rows, and seconds of each row; both at least 0."""
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        squares = max(self._rows_rows - self._rows * rows, 0.0)
        products = self._rows_seconds - self._rows * seconds
        first = _FIRST_PRICE * seconds / rows
        slope = (products + _FIRST_WEIGHT * first) / (squares + _FIRST_WEIGHT)
        slope = min(max(slope, 0.0), seconds / rows)
        return seconds - slope * rows, slope
