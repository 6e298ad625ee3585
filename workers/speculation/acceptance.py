"""Acceptance of guesses of the next tokens, and the rate of recent right guesses. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_DECAY = 0.95
"""Factor by which each new guess multiplies the weight of earlier guesses: about the last 20
matter."""


@dataclass(slots=True)
class Acceptance:
    """Acceptance rate of the guesses for one sequence. The initial rate is one right guess of
    two."""

    _right: float = 1.0
    _all: float = 2.0

    @property
    def share(self) -> float:
        """Expected share of right guesses for the next token, above 0 and below 1."""
        return self._right / self._all

    def note(self, num_right: int, num_wrong: int) -> None:
        """Count ``num_right`` right and ``num_wrong`` wrong guesses that were compared with sampled
        tokens.

        Guesses after the first wrong one of a draft do not count.
        """
        count = num_right + num_wrong
        kept = _DECAY**count
        self._right = max(kept * self._right + num_right, 1e-3)
        self._all = max(kept * self._all + count, self._right + 1e-3)

    def num_worthwhile(self, price: float, max_count: int) -> int:
        """Return how many guessed tokens are each worth a row, up to ``max_count``.

        The n-th guessed token is accepted with probability ``share ** n``, and its row costs as
        much time as ``price`` tokens. Example: share 0.8 and price 0.3 give 5, as 0.8 ** 5 is 0.33
        and 0.8 ** 6 is 0.26.
        """
        count, chance = 0, self.share
        while count < max_count and chance > price:
            count += 1
            chance *= self.share
        return count


def num_accepted(drafts: Sequence[int], drawn: Sequence[int], is_finite: Sequence[bool]) -> int:
    """Return the number of leading drafts that equal the token sampled from the row before.

    ``drawn`` and ``is_finite`` have an entry for the row of the newest token and of each draft; a
    negative ``drawn`` entry is a failure. A draft whose row yields no token is not accepted and
    runs again as the newest token, so tokens and errors are as in steps with one row per sequence.

        drafts 5 6 7, drawn 5 6 9 4: two are accepted, and the step gives 5 6 9
    """
    count = 0
    for index, draft in enumerate(drafts):
        has_token = drawn[index + 1] >= 0 and is_finite[index + 1]
        if drawn[index] != draft or not has_token:
            break
        count += 1
    return count
