"""Convert HTTP bodies into ``GenerateCall``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import FIELD_NAMES, CallKind, ChatInput, GenerateCall
from gateway.core.messages import REASONING_NAMES
from gateway.core.retention import parse_duration_s
from gateway.core.tool_use import Tool, ToolUse
from gateway.http.schema import (
    CallBody,
    ChatBody,
    ChatMessageBody,
    CompletionBody,
    ContentPartBody,
    GenerateBody,
    ResponseFormatBody,
    RetentionBody,
    SamplingBody,
    StructuredOutputsBody,
    TokenizeBody,
    ToolChoiceBody,
)
from gateway.text.tool_formats.structured import make_grammar, make_output_schema
from gateway.text.tool_formats.tools import make_tool_use, template_call
from workers.requests.request import Grammar

_OPTIONAL_FIELDS = ("name", "tool_call_id", *REASONING_NAMES)
_DURATIONS = ("24h",)
"""Values of ``prompt_cache_retention`` that are durations."""


def completion_call(body: CompletionBody) -> GenerateCall:
    prompts = prompt_list(body.prompt)
    return GenerateCall(kind=CallKind.COMPLETION, prompts=prompts, **_common_fields(body))


def chat_call(body: ChatBody) -> GenerateCall:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    fields = {**_common_fields(body), "logprobs": _chat_logprobs(body)}
    schema = body.response_format and body.response_format.json_schema
    named = (schema.name, schema.description) if schema else (None, None)
    chat = replace(chat_input(body), output_schema=make_output_schema(fields["grammar"], *named))
    return GenerateCall(kind=CallKind.CHAT, chat=chat, logprobs_name="top_logprobs", **fields)


def _chat_logprobs(body: ChatBody) -> int | None:
    if not body.logprobs or (body.top_logprobs is None and body.logprob_token_ids):
        return None  # only logprob_token_ids selects the reported tokens
    return body.top_logprobs or 0


def chat_input(body: ChatBody | TokenizeBody) -> ChatInput:
    """Return the conversation of a body with ``messages``."""
    effort = body.reasoning_effort
    return ChatInput(
        messages=tuple(
            _template_message(message, index) for index, message in enumerate(body.messages or ())
        ),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        template_kwargs=body.chat_template_kwargs or {},
        reasoning_effort=effort if isinstance(effort, str) else None,
        tools=_body_tools(body),
    )


def _body_tools(body: ChatBody | TokenizeBody) -> ToolUse | None:
    functions = [tool.function for tool in body.tools or ()]
    tools = [
        Tool(
            name=one.name,
            description=one.description,
            parameters=one.parameters,
            is_strict=bool(one.strict),
        )
        for one in functions
    ]
    if isinstance(body, TokenizeBody):
        return make_tool_use(tools)
    choice, is_parallel = body.tool_choice, body.parallel_tool_calls
    if isinstance(choice, ToolChoiceBody):
        return make_tool_use(tools, name=choice.function.name, is_parallel=is_parallel)
    return make_tool_use(tools, choice, is_parallel=is_parallel)


def _common_fields(body: GenerateBody) -> dict[str, Any]:
    fields = sampling_fields(body)
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
        fields["max_tokens_name"] = "max_completion_tokens"
    if isinstance(body.early_stopping, bool):
        fields["early_stopping"] = str(body.early_stopping).lower()
    grammar = _grammar(body.response_format, body.structured_outputs)
    return {**fields, "grammar": grammar, "cache_ttl_hint": retention_hint(body)}


def sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """Return the fields of ``GenerateCall`` that a body sets, by name, without the grammar."""
    fields = set_fields(body)
    if isinstance(body.stop, str):
        fields["stop"] = (body.stop,)
    return {**fields, "logit_bias": _logit_bias(body.logit_bias or {})}


def retention_hint(body: RetentionBody) -> float | None:
    """Return a body's ``cache_ttl_hint`` in seconds, None if not set. Raises ``RequestError``."""
    options = body.prompt_cache_options
    if options is not None and options.ttl is not None:
        return parse_duration_s(options.ttl, "prompt_cache_options.ttl")
    retention = body.prompt_cache_retention
    return (
        parse_duration_s(retention, "prompt_cache_retention") if retention in _DURATIONS else None
    )


def set_fields(body: CallBody) -> dict[str, Any]:
    """Return the fields of a body that are not None and have the same name in a call."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in body
        if name in FIELD_NAMES and value is not None
    }


def _grammar(
    response_format: ResponseFormatBody | None, structured: StructuredOutputsBody | None
) -> Grammar | None:
    schema = (
        response_format.json_schema.schema_
        if response_format and response_format.json_schema
        else None
    )
    return make_grammar(
        response_format.type if response_format else None,
        schema,
        structured_constraints(structured),
    )


def structured_constraints(structured: StructuredOutputsBody | None) -> dict[str, Any]:
    """Return all fields of ``structured_outputs`` by name; empty if ``structured`` is None."""
    return {name.rstrip("_"): value for name, value in structured or ()}


def prompt_list(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(prompt),)  # type: ignore[arg-type]
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)  # type: ignore[arg-type]


def mask_list(mask: list[int] | list[list[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Return the mask of each prompt; a flat list is for the only prompt. Empty for None."""
    if not mask:
        return ()
    if isinstance(mask[0], int):
        return (tuple(number for number in mask if isinstance(number, int)),)
    return tuple(tuple(one) for one in mask if isinstance(one, list))


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 16):
            raise RequestError(f"logit_bias: {key[:32]!r} is not a token id", "logit_bias")
    return tuple(sorted((int(key), value) for key, value in bias.items()))


def _template_message(message: ChatMessageBody, message_index: int) -> dict[str, Any]:
    """Return a message for the chat template, with its content as one string."""
    path = f"messages[{message_index}]"
    extra = message.model_extra or {}
    for name in ("function_call", "audio"):
        if extra.get(name):
            raise UnsupportedParameterError(f"{path}.{name} is not supported", f"{path}.{name}")
    named = {name: getattr(message, name) for name in _OPTIONAL_FIELDS} | extra
    fields = {name: value for name, value in named.items() if value is not None}
    if message.tool_calls:
        fields["tool_calls"] = [
            template_call(
                call.id, call.function.name, call.function.arguments, f"{path}.tool_calls[{index}]"
            )
            for index, call in enumerate(message.tool_calls)
        ]
    return {**fields, "role": message.role, "content": _content(message, path)}


def _content(message: ChatMessageBody, path: str) -> str:
    if not message.content and (refusal := (message.model_extra or {}).get("refusal")):
        return str(refusal)
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role != "assistant":
            raise RequestError.missing(f"{path}.content")
        return ""
    return "\n".join(_part_text(part, message.role, f"{path}.content") for part in message.content)


def _part_text(part: ContentPartBody, role: str, path: str) -> str:
    is_refusal = part.type == "refusal" and role == "assistant"
    if part.type != "text" and not is_refusal:
        message = f"{path}: parts of type {part.type[:32]!r} are not supported, only text"
        raise UnsupportedParameterError(message, path)
    text = part.refusal if is_refusal else part.text
    if text is None:
        raise RequestError(f"{path}: a {part.type} part needs {part.type}", path)
    return text
