"""What changes a row of logits before a token is drawn from it: penalties, bias, masks.

In this order, on float32: repetition, frequency and presence penalty, ``logit_bias``; then the
masks, whose order does not matter, since each sets logits to minus infinity: all but
``allowed_token_ids``, the ends of ``bad_words``, the ending tokens below ``min_tokens``, and what
the grammar does not allow. Where a grammar leaves nothing but the end of the text, the text ends,
whatever the other masks say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.grammar import GrammarState, TokenMask
from workers.request import SamplingParams

_LARGEST_LOGIT = 1e30
"""Logits that penalties make are kept below; divided by any temperature it is still finite."""
_MASKED = float("-inf")


class TokenCounts:
    """How often a sequence has each token: what penalties need. Kept only where they are used."""

    def __init__(
        self, params: SamplingParams, prompt: Iterable[int], output: Iterable[int]
    ) -> None:
        self._place: dict[int, int] = {}
        self._tokens: list[int] = []
        self._in_output: list[int] = []
        if params.repetition_penalty != 1.0:
            for token in prompt:
                self._add(token, 0)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """Count an output token; called at commit only."""
        self._add(token, 1)

    def _add(self, token: int, count: int) -> None:
        place = self._place.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._in_output.append(0)
        self._in_output[place] += count

    def penalize(self, logits: Tensor, params: SamplingParams) -> None:
        """Change one row of float32 logits [V] in place."""
        if not self._tokens:
            return
        tokens = torch.tensor(self._tokens, device=logits.device)
        counts = torch.tensor(self._in_output, dtype=torch.float32, device=logits.device)
        values = logits[tokens]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        values = values - params.frequency_penalty * counts
        values = values - params.presence_penalty * (counts > 0)
        logits[tokens] = values.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def needs_counts(params: SamplingParams) -> bool:
    """Whether a request uses a penalty."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class BadWords:
    """Token sequences that must not be in an output: the last token is masked after the others.

    For example, with (4, 5) and (6,) token 6 is always masked, and 5 after a 4. Like in vLLM, only
    the output counts: a word that the prompt began may be finished.
    """

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        self._alone: list[int] = []
        self._after: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) == 1:
                self._alone.append(word[0])
            else:
                self._after.setdefault(word[-2], []).append(word)

    def banned(self, output: Sequence[int]) -> tuple[int, ...]:
        """Tokens that would complete a word after ``output``."""
        found = list(self._alone)
        for word in self._after.get(output[-1], ()) if output else ():
            begun = len(word) - 1
            if tuple(output[-begun:]) == word[:-1]:
                found.append(word[-1])
        return tuple(found)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits that a token is drawn from."""

    params: SamplingParams
    """Of its request."""
    choice: int
    """Which choice of it."""
    index: int
    """Place of the new token in the choice's output."""
    counts: TokenCounts | None = None
    """Set where penalties are used."""
    banned_tokens: tuple[int, ...] = ()
    """Tokens that must not be drawn now (``min_tokens``, ``bad_words``)."""
    grammar: GrammarState | None = None
    """What the output must follow."""

    @property
    def is_plain(self) -> bool:
        """Logits are used as they are."""
        params = self.params
        return (
            self.counts is None
            and self.grammar is None
            and not self.banned_tokens
            and not params.logit_bias
            and not params.allowed_token_ids
        )


def apply_rules(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits [rows, V] after each row's rules, float32 unless no row has any.

    The given logits stay as they are.
    """
    if all(row.is_plain for row in rows):
        return logits
    logits = logits.to(torch.float32, copy=True)
    for row, values in zip(rows, logits, strict=True):
        if not row.is_plain:
            _apply(row, values)
    return logits


def _apply(row: SamplingRow, values: Tensor) -> None:
    """Change one row [V] in place."""
    params = row.params
    if row.counts is not None:
        row.counts.penalize(values, params)
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        places = torch.tensor(ids, device=values.device)
        values.index_add_(0, places, torch.tensor(bias, device=values.device))
    mask = None if row.grammar is None else row.grammar.mask()
    if mask is None or not mask.must_end:
        if params.allowed_token_ids:
            _keep_only(values, params.allowed_token_ids)
        if row.banned_tokens:
            values[list(row.banned_tokens)] = _MASKED
    if mask is not None:
        _keep_allowed(values, mask)


def _keep_only(values: Tensor, tokens: Sequence[int]) -> None:
    places = torch.tensor(tokens, device=values.device)
    kept = values[places]
    values.fill_(_MASKED)
    values[places] = kept


def _keep_allowed(values: Tensor, mask: TokenMask) -> None:
    values.masked_fill_(mask.allowed.logical_not().to(values.device), _MASKED)
