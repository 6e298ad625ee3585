"""Generations as OpenAI's bodies: completions and chat, whole and in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import fsum
from typing import Any, Protocol

from gateway.call import GenerateCall
from gateway.delta import ChoiceDelta, Finish, Usage
from gateway.generation import Generation
from gateway.text import TokenText
from gateway.tokenizer import Tokenizer
from gateway.tool_calls import ToolNews, ToolParser, parse_answer
from workers.request import FinishReason, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(slots=True)
class CollectedChoice:
    """All news of one choice, put together."""

    index: int
    prompt_index: int
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    echo_tokens: tuple[TokenText, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None


async def collect(generation: Generation) -> list[CollectedChoice]:
    """Run a generation to its end; its choices by index. Raises what ``next`` raises."""
    choices: dict[int, CollectedChoice] = {}
    while deltas := await generation.next():
        for delta in deltas:
            choice = choices.get(delta.index)
            if choice is None:
                choice = CollectedChoice(delta.index, delta.prompt_index)
                choices[delta.index] = choice
            choice.text += delta.text
            choice.tokens.extend(delta.tokens)
            choice.echo_tokens = choice.echo_tokens or delta.echo_tokens
            choice.prompt_logprobs = choice.prompt_logprobs or delta.prompt_logprobs
            choice.finish = delta.finish
    found = [choices[index] for index in sorted(choices)]
    best = generation.call.num_best
    return found if best is None else _keep_best(found, best)


def _keep_best(choices: Sequence[CollectedChoice], count: int) -> list[CollectedChoice]:
    """Of each prompt the choices with the greatest mean log-probability, best first."""
    kept: list[CollectedChoice] = []
    for _, drawn in groupby(choices, key=lambda choice: choice.prompt_index):
        kept += sorted(drawn, key=_mean_logprob, reverse=True)[:count]
    for index, choice in enumerate(kept):
        choice.index = index
    return kept


def _mean_logprob(choice: CollectedChoice) -> float:
    values = [token.logprob.logprob for token in choice.tokens if token.logprob is not None]
    return fsum(values) / len(values) if values else 0.0


class ResponseFormat(Protocol):
    """One endpoint's bodies."""

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """The chunks that tell a choice's news."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the usage alone."""


class _Format:
    """What both endpoints share.

    Args:
        generation: what is told.
        tokenizer: names tokens; None names them by number.
        fingerprint: ``system_fingerprint``.
        answer_id: ``id``; None is the generation's own.
    """

    object = ""
    chunk_object = ""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer | None,
        fingerprint: str,
        answer_id: str | None = None,
    ) -> None:
        self.call: GenerateCall = generation.call
        self._tokenizer = tokenizer
        self._parsers: dict[int, ToolParser] = {}
        self._untold: dict[int, list[TokenText]] = {}  # they wait for what they are part of
        self._head = {
            "id": answer_id or generation.call_id,
            "created": generation.created,
            "model": generation.call.model,
            "system_fingerprint": fingerprint,
        }

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """See ``ResponseFormat``."""
        return {**self._chunk([]), "usage": usage_body(usage)}

    def _whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        body = {**self._head, "object": self.object, "choices": choices}
        return {**body, "usage": usage_body(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _prompt_ids(self, prompt_index: int) -> list[int]:
        return list(self.call.prompts[prompt_index].ids)

    def _name(self, token_id: int) -> str:
        """A token as log-probabilities name it."""
        shown = None if self.call.return_tokens_as_token_ids else self._tokenizer
        return token_name(shown, token_id)

    def _prompt_logprobs(
        self, entries: Sequence[TokenLogprob | None] | None
    ) -> list[dict[str, Any] | None] | None:
        """One object a prompt token, by token id; None for the first one."""
        wanted = self.call.prompt_logprobs
        if wanted is None or entries is None:
            return None
        return [None if e is None else self._by_id(e, wanted) for e in entries]

    def _by_id(self, entry: TokenLogprob, wanted: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        own = (entry.token_id, entry.logprob, entry.rank)
        others = ((i, value, rank) for rank, (i, value) in enumerate(entry.top[:wanted], 1))
        for token_id, logprob, rank in (own, *others):
            named = {
                "logprob": clamp_logprob(logprob),
                "rank": rank,
                "decoded_token": token_name(self._tokenizer, token_id),
            }
            told.setdefault(str(token_id), named)
        return told


class CompletionFormat(_Format):
    """``/v1/completions``."""

    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage) -> dict[str, Any]:
        """See ``ResponseFormat``."""
        return self._whole([self._choice(choice, is_first=True) for choice in choices], usage)

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """See ``ResponseFormat``."""
        return [self._chunk([self._choice(delta, is_first=delta.is_first)])]

    def _choice(self, news: CollectedChoice | ChoiceDelta, is_first: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": news.index,
            "text": news.text,
            "logprobs": self._logprobs((*news.echo_tokens, *news.tokens)),
            **_finish_fields(news.finish),
        }
        if self.call.return_token_ids:
            body["token_ids"] = [token.token_id for token in news.tokens]
            body["prompt_token_ids"] = self._prompt_ids(news.prompt_index) if is_first else None
        if is_first and self.call.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(news.prompt_logprobs)
        return body

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        wanted = self.call.logprobs
        if wanted is None:
            return None
        return {
            "text_offset": [token.text_offset for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else clamp_logprob(token.logprob.logprob)
                for token in tokens
            ],
            "tokens": [self._name(token.token_id) for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else self._top(token.logprob, wanted)
                for token in tokens
            ],
        }

    def _top(self, entry: TokenLogprob, wanted: int) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in alternatives(entry, wanted):
            top.setdefault(self._name(token_id), clamp_logprob(logprob))
        return top


class ChatFormat(_Format):
    """``/v1/chat/completions``."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[CollectedChoice], usage: Usage) -> dict[str, Any]:
        """See ``ResponseFormat``."""
        body = self._whole([self._choice(choice) for choice in choices], usage)
        if self.call.return_token_ids:
            body["prompt_token_ids"] = self._prompt_ids(0)
        if self.call.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(choices[0].prompt_logprobs)
        return body

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """See ``ResponseFormat``."""
        chunks = []
        if delta.is_first:
            opening = {
                "index": delta.index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                **_finish_fields(None),
            }
            chunks.append(self._chunk([opening]))
            if self.call.return_token_ids:
                chunks[0]["prompt_token_ids"] = self._prompt_ids(0)
            if delta.prompt_logprobs is not None:
                chunks[0]["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs)
        if delta.text or delta.tokens or delta.finish:
            told, is_call = self._delta(delta)
            untold = self._untold.setdefault(delta.index, [])
            untold.extend(delta.tokens)
            if not (told or delta.finish):
                return chunks  # what came may be part of a call
            choice: dict[str, Any] = {
                "index": delta.index,
                "delta": told,
                "logprobs": self._logprobs(untold),
                **_finish_fields(delta.finish, is_call),
            }
            if self.call.return_token_ids:
                choice["token_ids"] = [token.token_id for token in untold]
            untold.clear()
            chunks.append(self._chunk([choice]))
        return chunks

    def _delta(self, delta: ChoiceDelta) -> tuple[dict[str, Any], bool]:
        """A chunk's ``delta``, and whether the choice ends with calls."""
        form = self.call.tool_form
        if form is None:
            return ({"content": delta.text} if delta.text else {}), False
        parser = self._parsers.setdefault(delta.index, ToolParser(form))
        news = parser.feed(delta.text, is_last=delta.finish is not None)
        return _tool_delta(news), parser.has_calls

    def _message(self, choice: CollectedChoice) -> tuple[dict[str, Any], bool]:
        """A choice's ``message``, and whether it ends with calls."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        form = self.call.tool_form
        if form is None:
            return message, False
        content, calls, has_calls = parse_answer(form, choice.text)
        if not calls:
            return {**message, "content": content}, False
        named = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        return {**message, "content": content or None, "tool_calls": named}, has_calls

    def _choice(self, choice: CollectedChoice) -> dict[str, Any]:
        message, is_call = self._message(choice)
        body: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            **_finish_fields(choice.finish, is_call),
        }
        if self.call.return_token_ids:
            body["token_ids"] = [token.token_id for token in choice.tokens]
            body["prompt_token_ids"] = self._prompt_ids(choice.prompt_index)
        return body

    def _logprobs(self, tokens: Iterable[TokenText]) -> dict[str, Any] | None:
        wanted = self.call.logprobs
        if wanted is None:
            return None
        return {
            "content": [self._entry(token.logprob, wanted) for token in tokens if token.logprob]
        }

    def _entry(self, entry: TokenLogprob, wanted: int) -> dict[str, Any]:
        top = alternatives(entry, wanted) if wanted else []
        return {
            **self._named(entry.token_id, entry.logprob),
            "top_logprobs": [self._named(*pair) for pair in top[:wanted]],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": clamp_logprob(logprob),
            "bytes": list(token_bytes(self._tokenizer, token_id)),
        }


def alternatives(entry: TokenLogprob, wanted: int) -> list[tuple[int, float]]:
    """The ``wanted`` most probable tokens, best first, then the token itself if not among them."""
    top = list(entry.top[:wanted])
    if all(token_id != entry.token_id for token_id, _ in top):
        top.append((entry.token_id, entry.logprob))
    return top


def clamp_logprob(value: float) -> float:
    """A log-probability that JSON can carry."""
    return LOWEST_LOGPROB if math.isnan(value) else min(max(value, LOWEST_LOGPROB), 0.0)


def token_name(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token for people to read."""
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def token_bytes(tokenizer: Tokenizer | None, token_id: int) -> bytes:
    """What a token stands for, exactly; empty without a tokenizer."""
    return b"" if tokenizer is None else tokenizer.token_bytes(token_id)


def usage_body(usage: Usage) -> dict[str, Any]:
    """The ``usage`` object."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return body


def _tool_delta(news: ToolNews) -> dict[str, Any]:
    told: dict[str, Any] = {"content": news.content} if news.content else {}
    if news.calls:
        told["tool_calls"] = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is None
            else {
                "index": call.index,
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in news.calls
        ]
    return told


def _finish_fields(finish: Finish | None, is_call: bool = False) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    ends_so = is_call and finish.reason is FinishReason.STOP
    return {
        "finish_reason": "tool_calls" if ends_so else finish.reason.value,
        "stop_reason": finish.stop_reason,
    }
