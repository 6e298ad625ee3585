"""Both codecs to the one call type: HTTP bodies and gRPC messages to ``GenerateFields``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from cluster.errors import RequestError, UnsupportedParameterError
from gateway.call import CallKind, ChatInput, GenerateFields
from gateway.schema import ChatBody, CompletionBody, GenerateBody, Message, TokenizeBody
from protos import inference_pb2 as pb
from protos import types_pb2

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
)
"""Fields of a body that keep name and type."""
_SAMPLING = tuple(name for name in _COMMON if name not in ("model", "add_special_tokens"))


def completion_fields(body: CompletionBody) -> GenerateFields:
    """Fields of ``POST /v1/completions``."""
    return GenerateFields(
        kind=CallKind.COMPLETION,
        prompts=_prompts(body.prompt),
        logprobs=body.logprobs,
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
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_name="top_logprobs",
        **_common_fields(body),
    )


def chat_input(body: ChatBody | TokenizeBody) -> ChatInput:
    """The conversation of a body with ``messages``."""
    return ChatInput(
        messages=tuple(
            _template_message(message, place) for place, message in enumerate(body.messages or ())
        ),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs or {},
    )


def grpc_fields(request: pb.GenerateRequest) -> GenerateFields:
    """Fields of ``Generate`` and ``GenerateStream``."""
    source = request.WhichOneof("input")
    if source is None:
        message = "one of text, token_ids and messages is required"
        raise RequestError(message, "input", "missing_required_parameter")
    if source == "embeddings":
        raise UnsupportedParameterError("embeddings is not supported", "embeddings")
    sampling, options = request.sampling_params, request.output_options
    if options.HasField("prompt_logprobs"):
        raise UnsupportedParameterError("prompt_logprobs is not supported", "prompt_logprobs")
    if source == "messages" and options.echo:
        raise UnsupportedParameterError("echo is not supported for chat", "echo")
    return GenerateFields(
        kind=CallKind.CHAT if source == "messages" else CallKind.COMPLETION,
        model=request.model or None,
        prompts=_grpc_prompts(request, source),
        chat=grpc_chat_input(request.messages) if source == "messages" else None,
        add_special_tokens=_optional(request, "add_special_tokens"),
        max_tokens=_optional(sampling, "max_tokens"),
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logprobs=_optional(options, "logprobs"),
        echo=options.echo,
        token_ids_only=options.token_ids_only,
        return_token_ids=options.return_token_ids,
        priority=request.priority,
        **{name: _optional(sampling, name) for name in _SAMPLING},
    )


def grpc_chat_input(chat: types_pb2.ChatMessages) -> ChatInput:
    """The conversation of a gRPC message."""
    return ChatInput(
        messages=tuple(_grpc_message(message) for message in chat.messages),
        add_generation_prompt=_optional(chat, "add_generation_prompt"),
        continue_final_message=_optional(chat, "continue_final_message"),
        template_kwargs=MessageToDict(chat.chat_template_kwargs),
    )


def _common_fields(body: GenerateBody) -> dict[str, Any]:
    has_new_name = body.max_completion_tokens is not None
    fields: dict[str, Any] = {name: getattr(body, name) for name in _COMMON}
    fields["max_tokens"] = body.max_completion_tokens if has_new_name else body.max_tokens
    fields["max_tokens_name"] = "max_completion_tokens" if has_new_name else "max_tokens"
    fields["logit_bias"] = _logit_bias(body.logit_bias or {})
    fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    fields["stop_token_ids"] = tuple(body.stop_token_ids or ())
    fields["return_token_ids"] = bool(body.return_token_ids)
    return fields


def _prompts(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(int(token) for token in prompt),)  # type: ignore[arg-type]
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
    for name in ("tool_calls", "function_call", "audio"):
        if extra.get(name):
            raise UnsupportedParameterError(f"{path}.{name} is not supported", f"{path}.{name}")
    fields = {name: value for name, value in extra.items() if value is not None}
    if message.name is not None:
        fields["name"] = message.name
    return {**fields, "role": message.role, "content": _content(message, path)}


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


def _grpc_message(message: types_pb2.ChatMessage) -> dict[str, Any]:
    fields = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        fields["name"] = message.name
    return fields


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
