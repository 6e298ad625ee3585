"""Guesses at the next tokens of a text, from earlier positions after the same tokens. Pure.

Source: prompt lookup decoding (Saxena 2023), as in vLLM's n-gram method. Texts are not searched:
each position stores the previous one that ends with the same few tokens, so the cost of a guess
does not depend on the length of the text. A text takes at most 125 bytes of memory per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_TOKEN_BITS = 32
_MAX_POSITIONS = 16
"""Number of earlier positions to compare, the latest first."""


class NgramIndex:
    """A growing text and its n-grams.

    For example, with ``least`` 2: after 5 6 7 8 5 6 the guess is 7 8 5 6 7 8 .., which followed the
    first 5 6.
    """

    def __init__(self, least: int, most: int) -> None:
        """``least`` last tokens must agree. Of several positions, the one with the longest
        agreement (up to ``most`` tokens) is used, and of these the latest.
        """
        self._least, self._most = least, most
        self._mask = (1 << _TOKEN_BITS * least) - 1
        self._key = 0  # of the last ``least`` tokens
        self._tokens = array("q")
        self._latest: dict[int, int] = {}  # by key: where its n-gram ended last
        self._before = array("q")  # by end - 1: the end before with the same key; 0: none

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append these tokens to the text."""
        end, key, latest = len(self._tokens), self._key, self._latest
        for token in tokens:
            end += 1
            key = (key << _TOKEN_BITS | token) & self._mask
            self._tokens.append(token)
            if end < self._least:
                self._before.append(0)
                continue
            self._before.append(latest.get(key, 0))
            latest[key] = end
        self._key = key

    def guess(self, count: int) -> tuple[int, ...]:
        """Guess the next ``count`` tokens if the text repeats itself; else none."""
        place = self._best_position()
        if not place:
            return ()
        last = place + count
        found = self._tokens[place:last]
        while len(found) < count:  # the continuation reaches the end of the text, so it repeats
            found += found[: count - len(found)]
        return tuple(found)

    def _best_position(self) -> int:
        """The end of the earlier n-gram to continue from; 0 if there is none."""
        place = self._before[-1] if self._before else 0
        best = longest = 0
        for _ in range(_MAX_POSITIONS):
            if not place:
                break
            agreeing = self._num_agreeing(place)
            if agreeing > longest:
                best, longest = place, agreeing
            if longest == self._most:
                break
            place = self._before[place - 1]
        return best

    def _num_agreeing(self, place: int) -> int:
        """Number of tokens before ``place`` that equal the last ones."""
        tokens, count = self._tokens, self._least
        most = min(self._most, place)
        while count < most and tokens[place - count - 1] == tokens[-count - 1]:
            count += 1
        return count
