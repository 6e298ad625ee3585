"""Acceptance rate of the recent guesses at a sequence's next token. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_DECAY = 0.95
"""Weight of earlier guesses for each new one: about the last 20 count."""


@dataclass(slots=True)
class Acceptance:
    """Acceptance rate of one sequence. Starts with one right guess of two."""

    _right: float = 1.0
    _all: float = 2.0

    @property
    def share(self) -> float:
        """Expected share of right guesses, above 0 and below 1."""
        return self._right / self._all

    def note(self, num_right: int, num_wrong: int) -> None:
        """Count guesses that were compared with sampled tokens, each after right ones only."""
        count = num_right + num_wrong
        kept = _DECAY**count
        self._right = max(kept * self._right + num_right, 1e-3)
        self._all = max(kept * self._all + count, self._right + 1e-3)

    def num_worthwhile(self, price: float, max_count: int) -> int:
        """Number of guesses worth running, up to ``max_count``: the n-th yields a token with
        probability ``share ** n``, and costs ``price`` tokens.

        Example: with share 0.8 and price 0.3, 5 rows, as 0.8 ** 5 is 0.33 and 0.8 ** 6 is 0.26.
        """
        count, chance = 0, self.share
        while count < max_count and chance > price:
            count += 1
            chance *= self.share
        return count
