"""Formats a running call as items and events. Its text is split at token boundaries, so that items
and their tokens do not depend on streaming or on the number of tokens per delta.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise, takewhile
from operator import attrgetter

from gateway.calls.answer import TextFormat, alternatives, clamp_logprob
from gateway.core.call import GenerateCall
from gateway.core.delta import ChoiceDelta, TokenText
from gateway.responses.items import Item
from gateway.responses.output import Event, OutputBuilder
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece
from workers.requests.request import FinishReason, TokenLogprob

_OFFSET = attrgetter("text_offset")


class OutputFormat(TextFormat):
    """Parses a choice and passes the pieces to an ``OutputBuilder``.

    Args:
        call: the call; it has one choice.
        tokenizer: decodes tokens.
        builder: builds the items.
    """

    def __init__(
        self, call: GenerateCall, tokenizer: Tokenizer | None, builder: OutputBuilder
    ) -> None:
        super().__init__(call, tokenizer)
        self._builder = builder
        self._num_chars = 0
        """Number of characters parsed so far."""
        self._pending_text = ""
        """End of the parsed text that is not part of an item yet."""
        self._tokens: deque[TokenText] = deque()
        """Tokens of ``_pending_text`` and of the text that is not parsed yet."""
        self.num_reasoning_tokens = 0

    def feed(self, deltas: Iterable[ChoiceDelta]) -> list[Event]:
        """Return the events of the next deltas."""
        return [event for delta in deltas for event in self._feed(delta)]

    def _feed(self, delta: ChoiceDelta) -> Iterator[Event]:
        is_call = False
        self._tokens.extend(delta.tokens)
        for text in self._split(delta.text):
            parsed, is_call = self._parse(replace(delta, text=text, tokens=(), finish=None))
            yield from self._add_parsed(text, parsed)
        if delta.finish is not None:
            parsed, is_call = self._parse(replace(delta, text="", tokens=()))
            yield from self._add_parsed("", parsed)
            has_ended = delta.finish.reason is not FinishReason.LENGTH
            yield from self._builder.end(has_ended, is_call)

    def _split(self, text: str) -> list[str]:
        """Split a piece of text at the start of its tokens."""
        start, end = self._num_chars, self._num_chars + len(text)
        # from the last token on, as many earlier ones may wait for the end of a long value
        offsets = takewhile(lambda offset: offset > start, map(_OFFSET, reversed(self._tokens)))
        cuts = {offset for offset in offsets if offset < end}
        places = [start, *sorted(cuts), end] if text else []
        return [text[a - start : b - start] for a, b in pairwise(places)]

    def _add_parsed(self, text: str, parsed: ParsedPiece) -> Iterator[Event]:
        """Add ``parsed``, the result of parsing ``text``, to the output items; yield the events."""
        self._num_chars += len(text)
        self._pending_text += text
        for part in parsed.ordered_parts():
            if isinstance(part, CallDelta):
                yield from self._builder.add_call(part)
            elif part.is_reasoning:
                self.num_reasoning_tokens += len(self._take_tokens(part.text))
                yield from self._builder.add_reasoning(part.text)
            else:
                logprobs = self._logprobs(self._take_tokens(part.text))
                yield from self._builder.add_text(part.text, logprobs)
        if parsed.calls:
            self._drop_text(self._num_chars)

    def _take_tokens(self, text: str) -> list[TokenText]:
        """Return the tokens of ``text``; drop the pending text up to the end of ``text``."""
        before = self._num_chars - len(self._pending_text)
        position = self._pending_text.rfind(text)
        start = before + max(position, 0)
        end = start + len(text) if position >= 0 else self._num_chars
        return [token for token, token_end in self._drop_text(end) if token_end > start]

    def _drop_text(self, end: int) -> list[tuple[TokenText, int]]:
        """Drop the text before ``end`` and return the tokens that start in it, with their ends.

        A token without text is the first part of a character that the next token completes.
        """
        self._pending_text = self._pending_text[len(self._pending_text) - (self._num_chars - end) :]
        dropped = []
        while self._tokens and self._tokens[0].text_offset < end:
            dropped.append(self._tokens.popleft())
        following = [*dropped[1:], *islice(self._tokens, 1)]
        ends = [token.text_offset for token in following[: len(dropped)]]
        ends += [self._num_chars] * (len(dropped) - len(ends))
        for index in reversed(range(len(dropped) - 1)):
            if ends[index] == dropped[index].text_offset:
                ends[index] = ends[index + 1]
        return list(zip(dropped, ends, strict=True))

    def _logprobs(self, tokens: Sequence[TokenText]) -> list[Item]:
        num_logprobs = self.call.num_logprobs
        if num_logprobs is None:
            return []
        return [self._entry(token.logprob, num_logprobs) for token in tokens if token.logprob]

    def _entry(self, entry: TokenLogprob, num_logprobs: int) -> Item:
        top = alternatives(entry, num_logprobs)[:num_logprobs] if num_logprobs else []
        named = [self._token_entry(token_id, logprob) for token_id, logprob in top]
        return {**self._token_entry(entry.token_id, entry.logprob), "top_logprobs": named}

    def _token_entry(self, token_id: int, logprob: float) -> Item:
        return {
            "token": self._name(token_id),
            "logprob": clamp_logprob(logprob),
            "bytes": list(self._bytes(token_id)),
        }
