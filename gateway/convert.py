"""Both codecs to the one call type: HTTP bodies and gRPC messages to ``GenerateFields``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.json_format import MessageToDict

from cluster.errors import RequestError, UnsupportedParameterError
from gateway.call import CallKind, ChatInput, GenerateFields
from gateway.field_checks import MAX_MESSAGES, check_length, check_messages
from gateway.schema import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    Message,
    TokenizeBody,
    ToolChoiceBody,
)
from gateway.structured import ResponseFormat, StructuredOutputs, make_grammar
from gateway.tool_use import Tool, ToolUse
from gateway.tools import MAX_TOOLS, make_tool_use
from protos import inference_pb2 as pb
from protos import types_pb2
from workers.prompt_embeds import PromptEmbeds, read_embeds
from workers.request import Grammar

PRIORITY_HEADER = "x-priority"
"""HTTP header and gRPC metadata for clients that cannot send the field."""
_PRIORITY_DIGITS = 10
_COMMON = (
    "model",
    "add_special_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "truncation_side",
)
"""Fields of a body that keep name and type."""
_SAMPLING = tuple(
    name
    for name in _COMMON
    if name not in ("model", "add_special_tokens", "prompt_logprobs")
    and not name.startswith("trunca")
)


def completion_fields(body: CompletionBody) -> GenerateFields:
    """Fields of ``POST /v1/completions``."""
    return GenerateFields(
        kind=CallKind.COMPLETION,
        prompts=prompt_list(body.prompt),
        logprobs=body.logprobs,
        best_of=body.best_of,
        echo=bool(body.echo),
        **_common_fields(body),
    )


def chat_fields(body: ChatBody) -> GenerateFields:
    """Fields of ``POST /v1/chat/completions``."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    return GenerateFields(
        kind=CallKind.CHAT,
        chat=chat_input(body),
        logprobs=_chat_logprobs(body),
        logprobs_name="top_logprobs",
        **_common_fields(body),
    )


def _chat_logprobs(body: ChatBody) -> int | None:
    if not body.logprobs or (body.top_logprobs is None and body.logprob_token_ids):
        return None  # logprob_token_ids alone say what is reported
    return body.top_logprobs or 0


def chat_input(body: ChatBody | TokenizeBody) -> ChatInput:
    """The conversation of a body with ``messages``."""
    return ChatInput(
        messages=tuple(
            _template_message(message, place) for place, message in enumerate(body.messages or ())
        ),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        template_kwargs=body.chat_template_kwargs or {},
        tools=_body_tools(body),
    )


def _body_tools(body: ChatBody | TokenizeBody) -> ToolUse | None:
    tools = [
        Tool(
            name=tool.function.name,
            description=tool.function.description,
            parameters=tool.function.parameters,
        )
        for tool in body.tools or ()
    ]
    if isinstance(body, TokenizeBody):
        return make_tool_use(tools, None, None, None)
    choice = body.tool_choice
    if isinstance(choice, ToolChoiceBody):
        return make_tool_use(tools, None, choice.function.name, body.parallel_tool_calls)
    return make_tool_use(tools, choice, None, body.parallel_tool_calls)


def grpc_fields(request: pb.GenerateRequest) -> GenerateFields:
    """Fields of ``Generate`` and ``GenerateStream``."""
    source = request.WhichOneof("input")
    if source is None:
        message = "one of text, token_ids, messages and embeddings is required"
        raise RequestError(message, "input", "missing_required_parameter")
    embeds = _grpc_embeds(request) if source == "embeddings" else None
    sampling, options = request.sampling_params, request.output_options
    if source == "messages" and options.echo:
        raise UnsupportedParameterError("echo is not supported for chat", "echo")
    given, drawn, told = _given(request), _given(sampling), _given(options)
    allowed = drawn.get("allowed_token_ids")
    alike: dict[str, Any] = {name: drawn.get(name) for name in _SAMPLING}
    return GenerateFields(
        kind=CallKind.CHAT if source == "messages" else CallKind.COMPLETION,
        model=request.model or None,
        prompt_name=source,
        prompts=_grpc_prompts(request, source) if embeds is None else ((0,) * embeds.num_tokens,),
        embeds=embeds,
        best_of=drawn.get("best_of"),
        chat=grpc_chat_input(request.messages) if source == "messages" else None,
        add_special_tokens=given.get("add_special_tokens"),
        max_tokens=drawn.get("max_tokens"),
        logit_bias=tuple(sorted(drawn.get("logit_bias", {}).items())),
        stop=tuple(drawn.get("stop", ())),
        stop_token_ids=tuple(drawn.get("stop_token_ids", ())),
        logprobs=told.get("logprobs"),
        prompt_logprobs=told.get("prompt_logprobs"),
        logprob_token_ids=tuple(told.get("logprob_token_ids", ())),
        allowed_token_ids=None if allowed is None else tuple(allowed.ids),
        bad_words=tuple(drawn.get("bad_words", ())),
        grammar=_grpc_grammar(sampling),
        echo=options.echo,
        token_ids_only=options.token_ids_only,
        return_token_ids=options.return_token_ids,
        priority=given.get("priority"),
        cache_salt=given.get("cache_salt"),
        return_tokens_as_token_ids=options.return_tokens_as_token_ids,
        truncate_prompt_tokens=given.get("truncate_prompt_tokens"),
        truncation_side=given.get("truncation_side"),
        **alike,
    )


def grpc_chat_input(chat: types_pb2.ChatMessages) -> ChatInput:
    """The conversation of a gRPC message."""
    most = chat.messages[: MAX_MESSAGES + 1]
    check_messages(len(chat.messages), sum(len(message.tool_calls) for message in most))
    return ChatInput(
        messages=tuple(
            _grpc_message(message, place) for place, message in enumerate(chat.messages)
        ),
        add_generation_prompt=_optional(chat, "add_generation_prompt"),
        continue_final_message=_optional(chat, "continue_final_message"),
        template=_optional(chat, "chat_template"),
        template_kwargs=MessageToDict(chat.chat_template_kwargs),
        tools=_grpc_tools(chat),
    )


def _grpc_tools(chat: types_pb2.ChatMessages) -> ToolUse | None:
    check_length("tools", len(chat.tools), MAX_TOOLS)
    tools = [
        Tool(
            name=tool.name,
            description=_optional(tool, "description"),
            parameters=_json_object(tool.parameters, f"tools[{place}].function.parameters")
            if tool.HasField("parameters")
            else None,
        )
        for place, tool in enumerate(chat.tools)
    ]
    return make_tool_use(
        tools,
        _optional(chat, "tool_choice"),
        _optional(chat, "tool_name"),
        _optional(chat, "parallel_tool_calls"),
    )


def with_header_priority(fields: GenerateFields, header: str | None) -> GenerateFields:
    """The same fields, with the priority of ``PRIORITY_HEADER`` where they have none.

    Raises ``RequestError`` if it is not a whole number.
    """
    given = header_priority(header)
    return (
        fields if given is None or fields.priority is not None else replace(fields, priority=given)
    )


def header_priority(header: str | None) -> int | None:
    """The number in ``PRIORITY_HEADER``.

    Raises ``RequestError`` if it is not a whole number, or one of more digits than any that fits.
    """
    if header is None:
        return None
    number = re.fullmatch(r"[+-]?([0-9]+)", header.strip())
    if number is None or len(number[1]) > _PRIORITY_DIGITS:
        rule = f"at least {-(2**31)} and at most {2**31 - 1}" if number else "a whole number"
        message = f"{PRIORITY_HEADER} ({header[:32]!r}) must be {rule}"
        raise RequestError(message, PRIORITY_HEADER)
    return int(header)


def _common_fields(body: GenerateBody) -> dict[str, Any]:
    has_new_name = body.max_completion_tokens is not None
    fields: dict[str, Any] = {name: getattr(body, name) for name in _COMMON}
    fields["max_tokens"] = body.max_completion_tokens if has_new_name else body.max_tokens
    fields["max_tokens_name"] = "max_completion_tokens" if has_new_name else "max_tokens"
    fields["logit_bias"] = _logit_bias(body.logit_bias or {})
    fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    fields["stop_token_ids"] = tuple(body.stop_token_ids or ())
    fields["return_token_ids"] = bool(body.return_token_ids)
    fields["priority"] = body.priority
    fields["cache_salt"] = body.cache_salt
    fields["return_tokens_as_token_ids"] = bool(body.return_tokens_as_token_ids)
    fields["logprob_token_ids"] = tuple(body.logprob_token_ids or ())
    allowed = body.allowed_token_ids
    fields["allowed_token_ids"] = None if allowed is None else tuple(allowed)
    fields["bad_words"] = tuple(body.bad_words or ())
    fields["grammar"] = _body_grammar(body)
    return fields


def _body_grammar(body: GenerateBody) -> Grammar | None:
    wanted, structured = body.response_format, body.structured_outputs
    schema = wanted.json_schema.schema_ if wanted and wanted.json_schema else None
    return make_grammar(
        None if wanted is None else ResponseFormat(type=wanted.type, schema=schema),
        None
        if structured is None
        else StructuredOutputs(
            json=structured.json_,
            regex=structured.regex,
            choice=structured.choice,
            grammar=structured.grammar,
            json_object=structured.json_object,
        ),
    )


def _grpc_grammar(sampling: types_pb2.SamplingParams) -> Grammar | None:
    wanted, structured = sampling.response_format, sampling.structured_outputs
    response_format = None
    if sampling.HasField("response_format"):
        schema = _optional(wanted.json_schema, "schema")
        response_format = ResponseFormat(type=wanted.type, schema=schema)
    kind = structured.WhichOneof("constraint")
    given: dict[str, Any] = {}
    if kind is not None:
        given[kind] = structured.choice.texts if kind == "choice" else getattr(structured, kind)
    return make_grammar(response_format, StructuredOutputs(**given))


def prompt_list(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several as a tuple."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(prompt),)  # type: ignore[arg-type]
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)  # type: ignore[arg-type]


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 16):
            raise RequestError(f"logit_bias: {key[:32]!r} is not a token id", "logit_bias")
    return tuple(sorted((int(key), value) for key, value in bias.items()))


def _template_message(message: Message, place: int) -> dict[str, Any]:
    """A message as the chat template sees it: content is one string."""
    path = f"messages[{place}]"
    extra = message.model_extra or {}
    for name in ("function_call", "audio"):
        if extra.get(name):
            raise UnsupportedParameterError(f"{path}.{name} is not supported", f"{path}.{name}")
    fields = {name: value for name, value in extra.items() if value is not None}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            _template_call(
                call.id, call.function.name, call.function.arguments, f"{path}.tool_calls[{index}]"
            )
            for index, call in enumerate(message.tool_calls)
        ]
    return {**fields, "role": message.role, "content": _content(message, path)}


def _template_call(call_id: str | None, name: str, arguments: str, path: str) -> dict[str, Any]:
    """A call of an earlier answer; templates read its arguments as an object."""
    told = {"name": name, "arguments": _json_object(arguments, f"{path}.function.arguments")}
    named = {} if call_id is None else {"id": call_id}
    return {**named, "type": "function", "function": told}


def _json_object(text: str, name: str) -> dict[str, Any]:
    """The object in a JSON text. Raises ``RequestError``."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{name} must be JSON text", name) from err
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be the JSON text of an object", name)
    return value


def _content(message: Message, path: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role != "assistant":
            raise RequestError(
                f"{path}.content is required", f"{path}.content", "missing_required_parameter"
            )
        return ""
    for part in message.content:
        if part.type != "text":
            raise UnsupportedParameterError(
                f"{path}.content: parts of type {part.type[:32]!r} are not supported, only text",
                f"{path}.content",
            )
        if part.text is None:
            raise RequestError(f"{path}.content: a text part needs text", f"{path}.content")
    return "\n".join(part.text or "" for part in message.content)


def _grpc_prompts(request: pb.GenerateRequest, source: str) -> tuple[str | tuple[int, ...], ...]:
    if source == "text":
        return (request.text,)
    return (tuple(request.token_ids.ids),) if source == "token_ids" else ()


def _grpc_embeds(request: pb.GenerateRequest) -> PromptEmbeds:
    """A prompt of embeddings, which goes without what needs its tokens."""
    options, sampling = request.output_options, request.sampling_params
    wanted = {
        "echo": options.echo,
        "prompt_logprobs": options.HasField("prompt_logprobs"),
        "return_token_ids": options.return_token_ids,
        "repetition_penalty": _optional(sampling, "repetition_penalty") not in (None, 1.0),
    }
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise UnsupportedParameterError(f"{name} is not supported for embeddings", name)
    return read_embeds(request.embeddings.shape, request.embeddings.data)


def _grpc_message(message: types_pb2.ChatMessage, place: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("name", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        path = f"messages[{place}].tool_calls"
        fields["tool_calls"] = [
            _template_call(_optional(call, "id"), call.name, call.arguments, f"{path}[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    return fields


def _given(message: Any) -> dict[str, Any]:
    """The fields that a message has, by name."""
    return {field.name: value for field, value in message.ListFields()}


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
