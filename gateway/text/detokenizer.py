"""From tokens to text as they come: whole characters only, stop strings, offsets.

``Detokenizer`` turns tokens into text without ever showing half a character; ``ChoiceText`` adds
stop strings, which it finds across token boundaries by holding back what could become one.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol

from gateway.core.delta import TokenText
from gateway.text.answer_region import AnswerRegion
from gateway.text.tokenizer import Tokenizer
from workers.requests.request import TokenLogprob

_MAX_PENDING_TOKENS = 8
"""Tokens that may wait for the rest of a character (a character has four bytes at most)."""
_MAX_PREFIX = 2 * _MAX_PENDING_TOKENS
"""Tokens before that decide about a token's text."""


class Detokenizer(Protocol):
    """Incremental decoding of one token list."""

    def feed(self, token_id: int) -> str:
        """Text that is certain now that this token is there; may be empty."""

    def flush(self) -> str:
        """What still waited at the end: a broken character, as U+FFFD."""


class ByteDetokenizer:
    """For byte-level vocabularies: equal to decoding the whole list, whatever the tokens are."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other vocabulary: the difference between two decodings of a short window.

    Source: the scheme of Hugging Face text-generation-inference (``decode_token``); the window
    starts with the end of the prompt, so that a leading space survives.

    Args:
        tokenizer: the vocabulary.
        skip_special_tokens: leave special tokens out of the text.
        before: the last tokens before the first one that is fed.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._prefix = list(before)[-_MAX_PENDING_TOKENS:]
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        new = self._difference()
        is_broken = new.endswith("\ufffd") and len(self._pending) < _MAX_PENDING_TOKENS
        return "" if is_broken else self._accept(new)

    def flush(self) -> str:
        return self._accept(self._difference())

    def _difference(self) -> str:
        before = self._decode(self._prefix)
        return self._decode(self._prefix + self._pending)[len(before) :]

    def _accept(self, new: str) -> str:
        # a token without text of its own may give the next one a space
        self._prefix = self._pending if new else (self._prefix + self._pending)[-_MAX_PREFIX:]
        self._pending = []
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


def make_detokenizer(
    tokenizer: Tokenizer, skip_special_tokens: bool = True, before: Sequence[int] = ()
) -> Detokenizer:
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens, before)


def place_tokens(
    detokenizer: Detokenizer | None, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> tuple[str, list[TokenText]]:
    """The text of a whole prompt, empty without ``detokenizer``, and where its tokens stand."""
    text = ""
    placed = []
    for place, token_id in enumerate(ids):
        placed.append(TokenText(token_id, len(text), logprobs[place] if logprobs else None))
        text += detokenizer.feed(token_id) if detokenizer else ""
    return text + (detokenizer.flush() if detokenizer else ""), placed


def aligned(given: str, text: str, tokens: Sequence[TokenText]) -> tuple[str, list[TokenText]]:
    """Tokens that were placed in ``text``, placed in the text that they were made of.

    What is decoded may have more in front: special tokens, and a space that some tokenizers add.
    Some decoders leave out a space of the first token.
    """
    is_end = text.endswith(given) or given.endswith(text)
    shift = len(text) - len(given) if is_end else 0
    first = 0 if shift < 0 else None
    return given, [
        TokenText(
            token.token_id,
            0 if place == first else min(max(0, token.text_offset - shift), len(given)),
            token.logprob,
        )
        for place, token in enumerate(tokens)
    ]


class StopStrings:
    """Finds the first stop string to end, and holds back what may become one.

    The result does not depend on how the text was cut into pieces: of several matches the one that
    ends first wins, of those that end together the longest.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self._strings = tuple(strings)
        self.is_included = include
        """The text has the stop that ended it."""
        self.held = ""
        """Text that is not certain yet: a proper prefix of a stop string, or empty."""

    def feed(self, new: str, can_stop: bool = True) -> tuple[str, str | None]:
        """Text that is certain after ``new``, and the stop string that ended it, if any.

        With ``can_stop`` False a stop string that ends within ``new`` is ordinary text.
        """
        if not self._strings:
            return new, None
        text = self.held + new
        if can_stop and (match := self._first_match(text, len(self.held))):
            end, start, stop = match
            self.held = ""
            return text[: end if self.is_included else start], stop
        keep = self._possible_start(text)
        self.held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self.held = self.held, ""
        return held

    def _first_match(self, text: str, seen: int) -> tuple[int, int, str] | None:
        matches = []
        for stop in self._strings:
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches, default=None)

    def _possible_start(self, text: str) -> int:
        earliest = len(text)
        for stop in self._strings:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < earliest:
                if stop.startswith(text[start:]):
                    earliest = start
                start = text.find(stop[0], start + 1)
        return earliest


class ChoiceText:
    """The text of one choice as its tokens come in.

    Tokens whose text is still open (half a character, a possible stop string) wait, with their
    log-probabilities, for the next piece of text.

    Args:
        detokenizer: None makes no text at all.
        stop: where the text ends.
        min_tokens: tokens before a stop counts.
        region: where the answer is, in which alone stops count; None: the whole text.
        stop_ids: tokens that end the text; those that the engine does not know.
    """

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stop: StopStrings,
        min_tokens: int,
        region: AnswerRegion | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._region = region
        self._stop_ids = stop_ids
        self._decoded_chars = 0
        self._text = ""
        self._tokens: list[TokenText] = []
        self.num_tokens = 0
        """Tokens that count, up to and with the one that completed a stop string."""

    def feed(
        self, token_id: int, logprob: TokenLogprob | None, hidden: bool = False
    ) -> str | int | None:
        """Add a token; returns the stop string that it completed or the stop token that it is.

        A ``hidden`` token (one that ended the choice) counts but has no text.
        """
        self.num_tokens += 1
        self._tokens.append(TokenText(token_id, self._decoded_chars, logprob))
        if self._detokenizer is None or hidden:
            return None
        may_stop = self._region is None or self._region.is_open
        is_stop = may_stop and token_id in self._stop_ids and self.num_tokens > self._min_tokens
        if is_stop and not self._stop.is_included:
            self.finish()
            return token_id
        new = self._detokenizer.feed(token_id)
        self._decoded_chars += len(new)
        stopped = self._add(new)
        if is_stop and stopped is None:
            self.finish()
            return token_id
        return stopped

    def finish(self) -> None:
        """Settle what still waits: the end came without a stop string of its own."""
        if self._detokenizer is not None:
            stopped = self._add(self._detokenizer.flush())
            if stopped is None and self._region is not None:
                stopped = self._add_answer(self._region.flush())
            if stopped is None:
                self._text += self._stop.flush()

    def take(self, always: bool = False) -> tuple[str, tuple[TokenText, ...]]:
        """Text and tokens that are ready; nothing while there is no text, unless ``always``."""
        if not self._text and not always and self._detokenizer is not None:
            return "", ()
        text, self._text = self._text, ""
        tokens, self._tokens = tuple(self._tokens), []
        return text, tokens

    def _add(self, new: str) -> str | None:
        if self._region is None:
            return self._add_answer(new)
        for part, is_answer in self._region.split(new):
            if not is_answer:
                self._text += self._stop.flush() + part
            elif (stopped := self._add_answer(part)) is not None:
                return stopped
        return None

    def _add_answer(self, new: str) -> str | None:
        text, stopped = self._stop.feed(new, self.num_tokens > self._min_tokens)
        self._text += text
        return stopped
