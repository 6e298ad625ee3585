"""Converts calls and responses to and from the messages of ``expertmesh.v1``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from expertmesh.errors import BadRequestError
from expertmesh.types import CompletionOutput, Logprob, LogprobsByToken, Query, RequestOutput
from protos import inference_pb2 as pb
from protos import types_pb2

_REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_OUTPUT_OPTIONS = frozenset({"logprobs", "prompt_logprobs"})


def generate_request(query: Query) -> pb.GenerateRequest:
    """Make the message of a call. Raises ``BadRequestError`` for a value of the wrong type."""
    request = pb.GenerateRequest(model=query.model or "")
    request.output_options.return_token_ids = True
    for name, value in query.params.given().items():
        is_output = name in _OUTPUT_OPTIONS
        _set(request.output_options if is_output else request.sampling_params, name, value)
    if query.prompt is None:
        for index, message in enumerate(query.messages):
            _add_message(request.messages, message, f"messages[{index}]")
        for name, value in query.chat.items():
            _set(request.messages, name, value)
        request.messages.SetInParent()
    elif isinstance(query.prompt, str):
        _set(request, "text", query.prompt)
    else:
        _set(request.token_ids, "ids", query.prompt)
        request.token_ids.SetInParent()
    return request


def _set(message: Any, name: str, value: Any) -> None:
    try:
        if name == "structured_outputs":
            _set_structured(message.structured_outputs, value)
        elif name == "allowed_token_ids":
            message.allowed_token_ids.ids.extend(value)
            message.allowed_token_ids.SetInParent()
        elif name in ("logit_bias", "chat_template_kwargs"):
            getattr(message, name).update(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as err:
        text = f"{name} ({str(value)[:64]}) has the wrong type: {err}"
        raise BadRequestError(text, "invalid_value", name, 400) from err


def _set_structured(message: types_pb2.StructuredOutputs, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name == "choice" and not isinstance(value, str):
            message.choice.texts.extend(value)
        elif name == "json" and not isinstance(value, str):
            message.json = json.dumps(value)
        else:
            setattr(message, name, value)


def _add_message(chat: types_pb2.ChatMessages, given: Mapping[str, Any], path: str) -> None:
    added = chat.messages.add()
    for name, value in given.items():
        if value is None:
            continue
        try:
            if name == "content" and not isinstance(value, str):
                value = "\n".join(part["text"] for part in value)
            setattr(added, "reasoning" if name == "reasoning_content" else name, value)
        except (TypeError, ValueError, AttributeError, KeyError) as err:
            text = f"{path}.{name} is not supported, or has the wrong type: {err}"
            raise BadRequestError(text, "invalid_value", f"{path}.{name}", 400) from err


def request_output(response: pb.GenerateResponse | pb.GenerateChunk, query: Query) -> RequestOutput:
    """Convert a whole response, or one piece of a stream."""
    scores: list[LogprobsByToken | None] | None = None
    if query.params.prompt_logprobs is not None:
        entries = response.prompt_logprobs
        scores = [_by_token(one) if one.HasField("logprob") else None for one in entries]
    if is_whole := isinstance(response, pb.GenerateResponse):
        outputs = [_output(choice.index, choice, query) for choice in response.choices]
    else:
        outputs = [_output(response.choice_index, response, query)]
    return RequestOutput(
        request_id=response.request_id,
        prompt=query.prompt if isinstance(query.prompt, str) else None,
        prompt_token_ids=list(response.prompt_token_ids),
        outputs=outputs,
        prompt_logprobs=scores if is_whole else scores or None,
        finished=is_whole,
    )


def _output(
    index: int, piece: pb.GenerateChoice | pb.GenerateChunk, query: Query
) -> CompletionOutput:
    has_ended, finish = piece.HasField("finish_info"), piece.finish_info
    stop = finish.WhichOneof("stop_reason") if has_ended else None
    has_logprobs = query.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=piece.text,
        token_ids=list(piece.token_ids),
        cumulative_logprob=sum(one.logprob for one in piece.logprobs) if has_logprobs else None,
        logprobs=[_by_token(one) for one in piece.logprobs] if has_logprobs else None,
        finish_reason=_REASONS[finish.reason] if has_ended else None,
        stop_reason=None if stop is None else getattr(finish, stop),
        reasoning=piece.reasoning,
    )


def _by_token(entry: types_pb2.TokenLogprob) -> LogprobsByToken:
    found = {entry.token_id: Logprob(entry.logprob, entry.rank, entry.token)}
    for rank, one in enumerate(entry.top_logprobs, 1):
        found.setdefault(one.token_id, Logprob(one.logprob, rank, one.token))
    return found
