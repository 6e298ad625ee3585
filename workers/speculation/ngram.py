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

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        """``min_tokens`` last tokens must agree. Of several positions, the one with the longest
        agreement (up to ``max_tokens`` tokens) is used, and of these the latest.
        """
        self._least, self._most = min_tokens, max_tokens
        self._mask = (1 << _TOKEN_BITS * min_tokens) - 1
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
        position = self._best_position()
        if not position:
            return ()
        last = position + count
        tokens = self._tokens[position:last]
        while len(tokens) < count:  # the continuation reaches the end of the text, so it repeats
            tokens += tokens[: count - len(tokens)]
        return tuple(tokens)

    def _best_position(self) -> int:
        """The end of the earlier n-gram to continue from; 0 if there is none."""
        position = self._before[-1] if self._before else 0
        best = longest = 0
        for _ in range(_MAX_POSITIONS):
            if not position:
                break
            agreeing = self._num_agreeing(position)
            if agreeing > longest:
                best, longest = position, agreeing
            if longest == self._most:
                break
            position = self._before[position - 1]
        return best

    def _num_agreeing(self, position: int) -> int:
        """Number of tokens before ``position`` that equal the last ones."""
        tokens, count = self._tokens, self._least
        limit = min(self._most, position)
        while count < limit and tokens[position - count - 1] == tokens[-count - 1]:
            count += 1
        return count
