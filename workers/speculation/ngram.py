"""Guesses the next tokens of a text: the tokens that followed the same last tokens earlier. Pure.

Source: prompt lookup decoding (Saxena 2023), as in vLLM's n-gram method. A guess does not search
the text: each position stores the previous position with the same few tokens before it, so that the
cost does not depend on the length of the text. A text takes at most 125 bytes per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_TOKEN_BITS = 32
_MAX_POSITIONS = 16
"""Maximum number of earlier positions that a guess compares, the latest first."""


class NgramIndex:
    """A growing text and an index of its n-grams, for guesses of the next tokens.

    Example with ``min_tokens`` 2: after 5 6 7 8 5 6 the guess is 7 8 5 6 7 8 .., the tokens after
    the first 5 6.
    """

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        """Start an empty text. A guess continues from an earlier position where at least the last
        ``min_tokens`` tokens agree with the end of the text.

        Of several such positions, the one with the longest agreement (up to ``max_tokens``) is
        used; if agreements are equally long, the latest one.
        """
        self._least, self._most = min_tokens, max_tokens
        self._mask = (1 << _TOKEN_BITS * min_tokens) - 1
        self._key = 0  # of the last ``least`` tokens
        self._tokens = array("q")
        self._latest: dict[int, int] = {}  # latest end of the n-gram, by key
        self._before = array("q")  # at end - 1: the previous end with the same key, or 0

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
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
        """Guess the next ``count`` tokens; the result is empty if the last tokens have not occurred
        before."""
        position = self._best_position()
        if not position:
            return ()
        last = position + count
        tokens = self._tokens[position:last]
        while len(tokens) < count:  # the continuation reaches the end of the text, so it repeats
            tokens += tokens[: count - len(tokens)]
        return tuple(tokens)

    def _best_position(self) -> int:
        """Return the end of the earlier n-gram from which a guess continues; 0 if there is none."""
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
        """Return how many tokens before ``position`` equal the last tokens of the text."""
        tokens, count = self._tokens, self._least
        limit = min(self._most, position)
        while count < limit and tokens[position - count - 1] == tokens[-count - 1]:
            count += 1
        return count
