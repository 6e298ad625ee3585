"""Formats running calls as OpenAI completions and chat completions: whole, and in chunks."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Any

from gateway.calls.answer import TextFormat, alternatives, clamp_logprob
from gateway.calls.running_call import RunningCall
from gateway.core.delta import ChoiceDelta, Finish, TokenText, Usage
from gateway.http.json_output import dump_json
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece
from workers.requests.request import FinishReason, TokenLogprob

_TEXT_PLACEHOLDER = secrets.token_hex(16)
"""Placeholder for text in a chunk that is prepared before the text is known."""


class OpenAIFormat(TextFormat, ABC):
    """Builds the response bodies of one endpoint.

    Args:
        running: the call.
        tokenizer: decodes tokens; None formats token ids.
        fingerprint: the value of ``system_fingerprint``.
        answer_id: the value of ``id``; None uses the id of the call.
    """

    object = ""
    chunk_object = ""
    shows_usage = False
    """Whether chunks have a ``usage`` field, which is null except in the last chunk."""

    def __init__(
        self,
        running: RunningCall,
        tokenizer: Tokenizer | None,
        fingerprint: str,
        answer_id: str | None = None,
    ) -> None:
        super().__init__(running.call, tokenizer)
        self._requests = running.requests
        self._pending_tokens: dict[int, list[TokenText]] = {}  # tokens that may be part of a call
        fields = running.call
        self._has_extra_fields = (
            fields.num_logprobs is not None
            or fields.return_token_ids
            or fields.tool_format is not None
            or fields.thinking is not None
        )
        self._text_chunk_parts: dict[int, tuple[bytes, bytes]] = {}
        self._head = {
            "id": answer_id or running.call_id,
            "created": running.created,
            "model": running.call.model,
            "system_fingerprint": fingerprint,
        }

    def response_body(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        body = {**self._head, "object": self.object, "choices": list(map(self._choice, choices))}
        return {**body, "usage": usage_object(usage)}

    @abstractmethod
    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        """Return one entry of ``choices`` in ``response_body``."""

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return the chunks for a delta of one choice."""

    def text_chunk(self, delta: ChoiceDelta) -> bytes | None:
        """Return a delta's chunk as JSON if the delta has only new text, else None."""
        if self._has_extra_fields or delta.is_first or delta.finish is not None or not delta.text:
            return None
        chunk_parts = self._text_chunk_parts.get(delta.index)
        if chunk_parts is None:
            (chunk,) = self.chunks(replace(delta, text=_TEXT_PLACEHOLDER, tokens=()))
            before, after = dump_json(chunk).split(_TEXT_PLACEHOLDER.encode())
            chunk_parts = self._text_chunk_parts[delta.index] = before[:-1], after[1:]
        return chunk_parts[0] + encode_basestring(delta.text).encode() + chunk_parts[1]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage_object(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.shows_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}

    def _prompt_logprobs(
        self, entries: Sequence[TokenLogprob | None] | None
    ) -> list[dict[str, Any] | None] | None:
        """Return log-probabilities by token id for each prompt token, None for the first token."""
        num_logprobs = self.call.prompt_logprobs
        if num_logprobs is None or entries is None:
            return None
        return [None if e is None else self._by_id(e, num_logprobs) for e in entries]

    def _by_id(self, entry: TokenLogprob, num_logprobs: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        sampled = (entry.token_id, entry.logprob, entry.rank)
        others = ((i, value, rank) for rank, (i, value) in enumerate(entry.top[:num_logprobs], 1))
        for token_id, logprob, rank in (sampled, *others):
            named = {
                "logprob": clamp_logprob(logprob),
                "rank": rank,
                "decoded_token": self._text(token_id),
            }
            entries.setdefault(str(token_id), named)
        return entries


class CompletionFormat(OpenAIFormat):
    """Builds the responses of ``/v1/completions``."""

    object = "text_completion"
    chunk_object = "text_completion"

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        return [self._chunk([self._choice(delta)])]

    def _choice(self, piece: ChoiceDelta) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs((*piece.echo_tokens, *piece.tokens)),
            **_finish_fields(piece.finish),
        }
        if self.call.return_token_ids:
            body["token_ids"] = [token.token_id for token in piece.tokens]
            ids = self._requests[piece.prompt_index].prompt
            body["prompt_token_ids"] = ids if piece.is_first else None
        if piece.is_first and self.call.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(piece.prompt_logprobs)
        return body

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        num_logprobs = self.call.num_logprobs
        if num_logprobs is None:
            return None
        return {
            "text_offset": [token.text_offset for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else clamp_logprob(token.logprob.logprob)
                for token in tokens
            ],
            "tokens": [self._name(token.token_id) for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else self._top(token.logprob, num_logprobs)
                for token in tokens
            ],
        }

    def _top(self, entry: TokenLogprob, num_logprobs: int) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in alternatives(entry, num_logprobs):
            top.setdefault(self._name(token_id), clamp_logprob(logprob))
        return top


class ChatFormat(OpenAIFormat):
    """Builds the responses of ``/v1/chat/completions``."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def response_body(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        body = super().response_body(choices, usage)
        if self.call.return_token_ids:
            body["prompt_token_ids"] = self._requests[0].prompt
        if self.call.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(choices[0].prompt_logprobs)
        return body

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
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
                chunks[0]["prompt_token_ids"] = self._requests[0].prompt
            if delta.prompt_logprobs is not None:
                chunks[0]["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs)
        if delta.text or delta.tokens or delta.finish:
            parsed, is_call = self._parse(delta)
            message_delta = _tool_delta(parsed)
            waiting = self._pending_tokens.setdefault(delta.index, [])
            waiting.extend(delta.tokens)
            if not (message_delta or delta.finish):
                return chunks  # these tokens may belong to a tool call
            choice: dict[str, Any] = {
                "index": delta.index,
                "delta": message_delta,
                "logprobs": self._logprobs(waiting),
                **_finish_fields(delta.finish, is_call),
            }
            if self.call.return_token_ids:
                choice["token_ids"] = [token.token_id for token in waiting]
            waiting.clear()
            chunks.append(self._chunk([choice]))
        return chunks

    def _choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        parsed, is_call = self._parse(choice)
        content = parsed.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.calls:
            named = [_call_object(call) for call in parsed.merge_calls().calls]
            message |= {"content": content or None, "tool_calls": named}
        body: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            **_finish_fields(choice.finish, is_call),
        }
        if self.call.return_token_ids:
            body["token_ids"] = [token.token_id for token in choice.tokens]
            body["prompt_token_ids"] = self._requests[choice.prompt_index].prompt
        return body

    def _logprobs(self, tokens: Iterable[TokenText]) -> dict[str, Any] | None:
        num_logprobs = self.call.num_logprobs
        if num_logprobs is None:
            return None
        return {
            "content": [
                self._entry(token.logprob, num_logprobs) for token in tokens if token.logprob
            ]
        }

    def _entry(self, entry: TokenLogprob, num_logprobs: int) -> dict[str, Any]:
        top = alternatives(entry, num_logprobs) if num_logprobs else []
        return {
            **self._token_entry(entry.token_id, entry.logprob),
            "top_logprobs": [self._token_entry(*pair) for pair in top[:num_logprobs]],
        }

    def _token_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": clamp_logprob(logprob),
            "bytes": list(self._bytes(token_id)),
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return body


def pooling_usage(usage: Usage) -> dict[str, Any]:
    """Return the ``usage`` object of a call that samples no tokens."""
    body = usage_object(usage)
    del body["completion_tokens"]
    return body


def _tool_delta(parsed: ParsedPiece) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": parsed.content} if parsed.content else {}
    if parsed.reasoning:
        delta["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        delta["tool_calls"] = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is None
            else {"index": call.index, **_call_object(call)}
            for call in parsed.merge_calls().calls
        ]
    return delta


def _call_object(call: CallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _finish_fields(finish: Finish | None, is_call: bool = False) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    ends_so = is_call and finish.reason is FinishReason.STOP
    fields: dict[str, Any] = {
        "finish_reason": "tool_calls" if ends_so else finish.reason.value,
        "stop_reason": finish.stop_reason,
    }
    return fields if finish.beam_score is None else {**fields, "beam_score": finish.beam_score}
