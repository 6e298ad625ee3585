"""Logits processors: penalties, bias and masks that change logits before sampling.

The processors run on float32 in this order: repetition, frequency and presence penalty,
``logit_bias``, then the masks. Each mask sets logits to minus infinity, so the order of masks does
not matter. Masks exclude tokens outside ``allowed_token_ids``, tokens that would complete one of
``bad_words``, tokens that end the output before ``min_tokens``, and tokens that the grammar does
not allow. If the grammar allows only the end of the text, the other masks are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from workers.model.host_copies import to_device
from workers.requests.request import SamplingParams
from workers.requests.sequence import SequenceState
from workers.sampling.grammar import GrammarState

_LARGEST_LOGIT = 1e30
"""Bound of absolute logits after penalties, so that they stay finite when divided by a
temperature."""
_MASKED = float("-inf")
_MORE_TOKENS = 64
"""Number of entries added to the arrays of ``TokenCounts``, on top of doubling them, when they are
full."""
_GREEDY_BELOW = 1e-5
"""Temperature below which sampling selects the best token, as at temperature 0."""


class TokenCounts:
    """Counts of a sequence's tokens for penalties, in arrays that grow with the output."""

    def __init__(
        self, params: SamplingParams, prompt: Iterable[int], output: Sequence[int]
    ) -> None:
        """``output`` is the sequence's own list: tokens that are appended to it later count too."""
        known = dict.fromkeys(prompt) if params.repetition_penalty != 1.0 else {}
        self._place = {token: place for place, token in enumerate(known)}
        self._tokens: NDArray[np.int64] = np.array(list(known), dtype=np.int64)
        self._in_output: NDArray[np.float32] = np.zeros(len(known), dtype=np.float32)
        self._output = output
        self._num_counted = 0

    def _count(self, token: int) -> None:
        """Add one token of the output to the counts."""
        index = self._place.setdefault(token, len(self._place))
        if index == len(self._tokens):
            room = len(self._tokens) + _MORE_TOKENS
            self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
            self._in_output = np.concatenate([self._in_output, np.zeros(room, dtype=np.float32)])
        self._tokens[index] = token
        self._in_output[index] += 1

    def arrays(self, drafted: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct tokens [n] and their counts in the output [n]. Later calls change the
        arrays.

        With a repetition penalty, the tokens include those of the prompt. ``drafted``: draft tokens
        after the output, which count too.
        """
        for token in self._output[self._num_counted :]:
            self._count(token)
        self._num_counted = len(self._output)
        tokens, in_output = self._tokens[: len(self._place)], self._in_output[: len(self._place)]
        return self._with(drafted, tokens, in_output) if drafted else (tokens, in_output)

    def _with(
        self, drafted: Sequence[int], tokens: NDArray[np.int64], in_output: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return copies of the token and count arrays that include the ``drafted`` tokens."""
        new = [token for token in dict.fromkeys(drafted) if token not in self._place]
        index_of = self._place | dict(
            zip(new, range(len(tokens), len(tokens) + len(new)), strict=True)
        )
        counts = np.concatenate([in_output, np.zeros(len(new), dtype=np.float32)])
        for token in drafted:
            counts[index_of[token]] += 1
        return np.concatenate([tokens, np.array(new, dtype=np.int64)]), counts


class BadWords:
    """Finds the tokens to mask because they would complete a forbidden token sequence.

    Example: with (4, 5) and (6,), token 6 is always masked, and token 5 after a 4. As in vLLM,
    only the output matters: the output may complete a word that starts in the prompt.
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
        """Return the tokens that would complete a forbidden sequence after ``output``."""
        tokens = list(self._alone)
        for word in self._after.get(output[-1], ()) if output else ():
            begun = len(word) - 1
            if tuple(output[-begun:]) == word[:-1]:
                tokens.append(word[-1])
        return tuple(tokens)


class SamplingRow(Struct, frozen=True):
    """Parameters and history for one row of logits, from which one token is sampled."""

    params: SamplingParams
    choice: int
    """Index of the row's choice among the choices of its request."""
    index: int
    """Position of the new token in the choice's output."""
    counts: TokenCounts | None = None
    """Token counts for penalties; None without penalties."""
    banned_tokens: tuple[int, ...] = ()
    """Tokens that ``min_tokens``, ``bad_words`` or ``ignore_eos`` exclude for this row."""
    grammar: GrammarState | None = None
    drafted: tuple[int, ...] = ()
    """Draft tokens between the committed output and the new token; sampling assumes that they are
    accepted."""

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is selected without a random draw."""
        return self.params.temperature < _GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """Whether the row's logits are used unchanged: no penalties, bias or masks."""
        params = self.params
        return (
            self.counts is None
            and self.grammar is None
            and not self.banned_tokens
            and not params.logit_bias
            and not params.allowed_token_ids
        )


class LogitsProcessors:
    """Logits processors of one sequence, updated with its output."""

    def __init__(
        self,
        sequence: SequenceState,
        eos_token_ids: tuple[int, ...],
        grammar: GrammarState | None = None,
    ) -> None:
        """``grammar``: the sequence's own grammar state, or None."""
        params = sequence.params
        self._sequence = sequence
        self._eos = eos_token_ids
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            self._counts = TokenCounts(params, sequence.request.prompt, sequence.output)
        self._bad_words = BadWords(params.bad_words) if params.bad_words else None
        self.grammar = grammar
        """State of the sequence's grammar after the output; None without a grammar."""
        self._may_be_plain = (
            self._counts is None
            and grammar is None
            and not params.bad_words
            and not params.logit_bias
            and not params.allowed_token_ids
        )

    def rows(self, drafts: tuple[int, ...]) -> list[SamplingRow]:
        """Return the sampling rows for the next token and for the token after each draft token.

        A sequence with a grammar must have no drafts.
        """
        assert not drafts or self.grammar is None, "drafts are not supported with a grammar"
        return [self.row(drafts[:count]) for count in range(len(drafts) + 1)]

    def row(self, drafted: tuple[int, ...] = ()) -> SamplingRow:
        """Return the sampling row for the token after the output and the draft tokens
        ``drafted``."""
        sequence = self._sequence
        index = len(sequence.output) + len(drafted)
        banned = self._banned(index, drafted)
        return SamplingRow(
            sequence.params, sequence.choice, index, self._counts, banned, self.grammar, drafted
        )

    @property
    def stays_plain(self) -> bool:
        """Whether the row of the next token and all later rows are certainly plain
        (``SamplingRow.is_plain``)."""
        params = self._sequence.params
        bans_no_end = params.ignore_eos and not params.stop_token_ids
        has_enough = len(self._sequence.output) >= params.min_tokens
        return self._may_be_plain and (bans_no_end or has_enough)

    def _banned(self, index: int, drafted: tuple[int, ...]) -> tuple[int, ...]:
        params = self._sequence.params
        banned: tuple[int, ...] = ()
        if index < params.min_tokens:
            banned = (() if params.ignore_eos else self._eos) + params.stop_token_ids
        if params.ignore_eos and self.grammar is not None:
            banned += self._eos  # only a complete grammar may end the output
        if self._bad_words is not None:
            output = self._sequence.output
            banned += self._bad_words.banned([*output, *drafted] if drafted else output)
        return banned


def apply_processors(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits [rows, V] after penalties, bias and masks of each row, in float32.

    If no row changes its logits, the input itself is returned. The input is never changed.
    """
    if all(row.is_plain for row in rows):
        return logits
    logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    penalize(logits, rows)
    for row, values in zip(rows, logits, strict=True):
        if not row.is_plain:
            _apply(row, values)
    return logits


def penalize(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply repetition, frequency and presence penalties in place to contiguous float32 logits
    [rows, V]."""
    indices: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.float32]] = []
    for number, row in enumerate(rows):
        if row.counts is None:
            continue
        tokens, in_output = row.counts.arrays(row.drafted)
        params = row.params
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        column = np.empty((4, len(tokens)), dtype=np.float32)
        column[:3], column[3] = np.reshape(penalties, (3, 1)), in_output
        indices.append(tokens + number * logits.shape[1])
        columns.append(column)
    if not indices:
        return
    index = to_device(np.concatenate(indices), logits.device)
    joined = to_device(np.concatenate(columns, axis=1), logits.device)
    repetition, frequency, presence, counts = joined
    values = logits.view(-1)[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts
    values = values - presence * (counts > 0)
    logits.view(-1)[index] = values.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def _apply(row: SamplingRow, values: Tensor) -> None:
    """Apply the bias and masks of one row to its float32 logits [V] in place."""
    params = row.params
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        change = to_device(np.array(bias, dtype=np.float32), values.device)
        values.index_add_(0, to_device(ids, values.device), change)
    mask = None if row.grammar is None else row.grammar.mask()
    if mask is None or not mask.must_end:
        if params.allowed_token_ids:
            _keep_only(values, params.allowed_token_ids)
        if row.banned_tokens:
            values[to_device(row.banned_tokens, values.device)] = _MASKED
    if mask is not None:
        is_banned = mask.allowed.logical_not().numpy()
        values.masked_fill_(to_device(is_banned, values.device), _MASKED)


def _keep_only(values: Tensor, tokens: Sequence[int]) -> None:
    ids = to_device(tokens, values.device)
    kept = values[ids]
    values.fill_(_MASKED)
    values[ids] = kept
