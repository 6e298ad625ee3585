"""Converts gRPC request messages to ``GenerateCall``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import MessageToDict

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import FIELD_NAMES, CallKind, ChatInput, GenerateCall
from gateway.core.field_checks import MAX_MESSAGES, check_length, check_messages
from gateway.core.tool_use import Tool, ToolUse
from gateway.offload.long_work import copy_numbers
from gateway.text.tool_formats.structured import make_grammar, make_output_schema
from gateway.text.tool_formats.tools import MAX_TOOLS, json_object, make_tool_use, template_call
from protos import inference_pb2 as pb
from protos import types_pb2
from workers.requests.prompt_embeds import PromptEmbeds, parse_embeds
from workers.requests.request import Grammar

_SCALARS = (str, int, float)


def grpc_call(request: pb.GenerateRequest) -> GenerateCall:
    source = input_name(request, "input")
    embeds = _grpc_embeds(request) if source == "embeddings" else None
    sampling, options = request.sampling_params, request.output_options
    is_chat = source == "messages"
    if is_chat and options.echo:
        raise UnsupportedParameterError("echo is not supported for chat", "echo")
    fields = {**read_set_fields(request), **read_set_fields(sampling), **read_set_fields(options)}
    fields["logit_bias"] = tuple(sorted(sampling.logit_bias.items()))
    if sampling.HasField("allowed_token_ids"):
        fields["allowed_token_ids"] = copy_numbers(sampling.allowed_token_ids.ids)
    grammar = _grpc_grammar(sampling)
    return GenerateCall(
        kind=CallKind.CHAT if is_chat else CallKind.COMPLETION,
        prompt_name=source,
        prompts=_grpc_prompts(request, source) if embeds is None else ((0,) * embeds.num_tokens,),
        embeds=embeds,
        chat=_grpc_chat(request, grammar) if is_chat else None,
        grammar=grammar,
        **fields,
    )


def _grpc_chat(request: pb.GenerateRequest, grammar: Grammar | None) -> ChatInput:
    name = request.sampling_params.response_format.json_schema.name or None
    answer = make_output_schema(grammar, name)
    return replace(grpc_chat_input(request.messages), output_schema=answer)


def grpc_chat_input(chat: types_pb2.ChatMessages) -> ChatInput:
    most = chat.messages[: MAX_MESSAGES + 1]
    check_messages(len(chat.messages), sum(len(message.tool_calls) for message in most))
    return ChatInput(
        messages=tuple(
            _grpc_message(message, place) for place, message in enumerate(chat.messages)
        ),
        add_generation_prompt=optional(chat, "add_generation_prompt"),
        continue_final_message=optional(chat, "continue_final_message"),
        template=optional(chat, "chat_template"),
        template_kwargs=_template_variables(chat),
        tools=_grpc_tools(chat),
    )


def _template_variables(chat: types_pb2.ChatMessages) -> dict[str, Any]:
    name = "chat_template_kwargs"
    try:
        return MessageToDict(chat.chat_template_kwargs)
    except ValueError as err:  # NaN or infinity
        raise RequestError(f"{name} contains a value that JSON cannot represent", name) from err


def _grpc_tools(chat: types_pb2.ChatMessages) -> ToolUse | None:
    check_length("tools", len(chat.tools), MAX_TOOLS)
    tools = [
        Tool(
            name=tool.name,
            description=optional(tool, "description"),
            parameters=json_object(tool.parameters, f"tools[{place}].function.parameters")
            if tool.HasField("parameters")
            else None,
            is_strict=False,
        )
        for place, tool in enumerate(chat.tools)
    ]
    return make_tool_use(
        tools,
        optional(chat, "tool_choice"),
        optional(chat, "tool_name"),
        optional(chat, "parallel_tool_calls"),
    )


def _grpc_grammar(sampling: types_pb2.SamplingParams) -> Grammar | None:
    wanted, structured = sampling.response_format, sampling.structured_outputs
    kind = structured.WhichOneof("constraint")
    constraints: dict[str, Any] = {}
    if kind is not None:
        value = getattr(structured, kind)
        constraints[kind] = value.texts if kind == "choice" else value
    return make_grammar(
        wanted.type if sampling.HasField("response_format") else None,
        optional(wanted.json_schema, "schema"),
        constraints,
    )


def _grpc_prompts(request: pb.GenerateRequest, source: str) -> tuple[str | tuple[int, ...], ...]:
    if source == "text":
        return (request.text,)
    return (copy_numbers(request.token_ids.ids),) if source == "token_ids" else ()


def _grpc_embeds(request: pb.GenerateRequest) -> PromptEmbeds:
    """Read prompt embeddings. Raises ``RequestError`` for options that need the prompt's tokens."""
    options, sampling = request.output_options, request.sampling_params
    wanted = {
        "echo": options.echo,
        "prompt_logprobs": options.HasField("prompt_logprobs"),
        "return_token_ids": options.return_token_ids,
        "repetition_penalty": optional(sampling, "repetition_penalty") not in (None, 1.0),
    }
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise UnsupportedParameterError(f"{name} is not supported for embeddings", name)
    return parse_embeds(request.embeddings.shape, request.embeddings.data)


def _grpc_message(message: types_pb2.ChatMessage, place: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("name", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.HasField("reasoning"):
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        path = f"messages[{place}].tool_calls"
        fields["tool_calls"] = [
            template_call(optional(call, "id"), call.name, call.arguments, f"{path}[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    return fields


def read_set_fields(message: Any) -> dict[str, Any]:
    """Return the values of the set fields that ``GenerateCall`` has under the same name.

    Maps and messages are omitted. Fields of other names are not read, which saves decoding them.
    """
    optionals, others = _shared_fields(message.DESCRIPTOR)
    found = {name: getattr(message, name) for name in optionals if message.HasField(name)}
    for name in others:
        if value := getattr(message, name):
            found[name] = value if isinstance(value, _SCALARS) else tuple(value)
    return found


@cache
def _shared_fields(kind: Descriptor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields also in ``GenerateCall``: (names with presence, names without)."""
    shared = [
        field
        for field in kind.fields
        if field.name in FIELD_NAMES and field.name not in ("logit_bias", "allowed_token_ids")
    ]
    return (
        tuple(field.name for field in shared if field.has_presence),
        tuple(field.name for field in shared if not field.has_presence),
    )


def input_name(message: Any, param: str, path: str = "") -> str:
    """Return which field of the oneof ``input`` is set. Raises ``RequestError`` if none is."""
    source: str | None = message.WhichOneof("input")
    if source is None:
        *names, last = (field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields)
        text = f"{path}one of {', '.join(names)} and {last} is required"
        raise RequestError(text, param, "missing_required_parameter")
    return source


def optional(message: Any, name: str) -> Any:
    """Return the value of a field; None if it is not set."""
    return getattr(message, name) if message.HasField(name) else None
