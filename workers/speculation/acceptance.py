"""How often guesses at a sequence's next token were right of late. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.95
"""Weight of what came before, for each guess that is counted: about the last 20 count."""


@dataclass(slots=True)
class Acceptance:
    """Of one sequence. Begins with one right guess of two."""

    _right: float = 1.0
    _all: float = 2.0

    @property
    def share(self) -> float:
        """Expected share of right guesses, above 0 and below 1."""
        return self._right / self._all

    def note(self, num_right: int, num_wrong: int) -> None:
        """Count guesses that were compared with the tokens drawn, each after right ones only."""
        count = num_right + num_wrong
        kept = _MEMORY**count
        self._right = max(kept * self._right + num_right, 1e-3)
        self._all = max(kept * self._all + count, self._right + 1e-3)

    def num_worth(self, price: float, most: int) -> int:
        """Rows of guesses that pay, up to ``most``: the n-th gives a token with probability
        ``share`` to the power n, and costs ``price`` tokens.

        Share 0.8, price 0.3: 5 rows, as 0.8 ** 5 is 0.33 and 0.8 ** 6 is 0.26.
        """
        count, chance = 0, self.share
        while count < most and chance > price:
            count += 1
            chance *= self.share
        return count
