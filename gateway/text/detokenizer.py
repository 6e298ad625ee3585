"""Incremental detokenization with whole characters, stop strings and offsets.

``Detokenizer`` converts tokens to text without partial characters. ``ChoiceText`` adds stop
strings: it holds back text that may be the start of a stop string which later tokens complete.
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
"""Maximum number of tokens that wait for the rest of a character (at most four bytes)."""
_MAX_PREFIX = 2 * _MAX_PENDING_TOKENS
"""Maximum number of preceding tokens that affect the text of a token."""


class Detokenizer(Protocol):
    """Incremental decoding of one token list."""

    def feed(self, token_id: int) -> str:
        """Add a token and return the text that is final; it may be empty."""

    def flush(self) -> str:
        """Return the rest of the text at the end, with U+FFFD for an incomplete character."""


class ByteDetokenizer:
    """Detokenizer for byte-level vocabularies. The pieces together equal the text of all tokens."""

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
    """Detokenizer for vocabularies that are not byte-level: decodes a short window of tokens twice,
    without and with the new tokens, and returns the difference.

    Source: the scheme of Hugging Face text-generation-inference (``decode_token``). The window
    starts with the end of the prompt, so that a leading space is kept.

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: whether to omit special tokens from the text.
        before: the tokens before the first call of ``feed``.
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
        # a token without text may add a space to the next token
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


def locate_tokens(
    detokenizer: Detokenizer | None, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> tuple[str, list[TokenText]]:
    """Return the text of a prompt (empty without ``detokenizer``) and its tokens with offsets."""
    text = ""
    placed = []
    for index, token_id in enumerate(ids):
        placed.append(TokenText(token_id, len(text), logprobs[index] if logprobs else None))
        text += detokenizer.feed(token_id) if detokenizer else ""
    return text + (detokenizer.flush() if detokenizer else ""), placed


def align_offsets(
    original: str, text: str, tokens: Sequence[TokenText]
) -> tuple[str, list[TokenText]]:
    """Convert token offsets in the decoded ``text`` of a prompt into offsets in ``original``.

    ``original`` is the client's text. The decoded text may start with special tokens, or with a
    space that some tokenizers add. Some decoders omit a space of the first token.
    """
    is_end = text.endswith(original) or original.endswith(text)
    shift = len(text) - len(original) if is_end else 0
    first = 0 if shift < 0 else None
    return original, [
        TokenText(
            token.token_id,
            0 if index == first else min(max(0, token.text_offset - shift), len(original)),
            token.logprob,
        )
        for index, token in enumerate(tokens)
    ]


class StopStringFinder:
    """Finds stop strings, and holds back text that may be the start of a stop string.

    The match that ends first counts; of several matches with the same end, the longest match. The
    result thus does not depend on how the text is split into pieces.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self._strings = tuple(strings)
        self.is_included = include
        """Whether the text includes the stop string that ended it."""
        self.held = ""
        """Text that is held back: a proper prefix of a stop string, or empty."""

    def feed(self, new: str, can_stop: bool = True) -> tuple[str, str | None]:
        """Add the next piece; return the final text, and the stop string that ended it or None.

        If ``can_stop`` is False, a stop string that ends within ``new`` is ordinary text.
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
        """Return the text that is held back at the end."""
        text, self.held = self.held, ""
        return text

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
    """The text of one choice, built token by token.

    Tokens with incomplete text (part of a character, a possible stop string) are held back with
    their logprobs until the next piece of text.

    Args:
        detokenizer: decodes tokens; None produces no text.
        stop: the stop strings.
        min_tokens: minimum number of tokens before a stop takes effect.
        region: the part of the text in which stops take effect; None for the whole text.
        stop_ids: ids of stop tokens at which the engine itself does not stop.
    """

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stop: StopStringFinder,
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
        """Number of added tokens, including the token that completed a stop string."""

    def feed(
        self, token_id: int, logprob: TokenLogprob | None, hidden: bool = False
    ) -> str | int | None:
        """Add a token; return the stop string or the stop token that ends the text, or None.

        A ``hidden`` token, which ended the choice, is counted but has no text.
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
        """Release the text that is held back, as the choice ended without a stop string."""
        if self._detokenizer is not None:
            stopped = self._add(self._detokenizer.flush())
            if stopped is None and self._region is not None:
                stopped = self._add_answer(self._region.flush())
            if stopped is None:
                self._text += self._stop.flush()

    def take(self, always: bool = False) -> tuple[str, tuple[TokenText, ...]]:
        """Return and remove the text and tokens that are ready.

        Tokens without text are returned only if ``always`` is True or there is no detokenizer.
        """
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
