"""Types of the response bodies of Anthropic's Messages, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0)]
StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class AnthropicErrorReason(TypedDict):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "timeout_error",
        "api_error",
        "overloaded_error",
    ]
    message: str


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorReason
    request_id: str


class MessageUsage(TypedDict):
    input_tokens: Annotated[int, Field(ge=0, description="prompt tokens that were not cached")]
    cache_creation_input_tokens: Annotated[int, Field(description="always 0: caching is free")]
    cache_read_input_tokens: Count
    output_tokens: Count
    service_tier: NotRequired[Literal["standard"]]


class ContentBlock(TypedDict):
    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[Annotated[str, Field(description="a digest of the reasoning")]]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class EventDelta(TypedDict):
    type: NotRequired[
        Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    ]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    partial_json: NotRequired[str]
    stop_reason: NotRequired[StopReason]
    stop_sequence: NotRequired[str | None]


class MessageEvent(TypedDict):
    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: NotRequired[MessageAnswer]
    index: NotRequired[Count]
    content_block: NotRequired[ContentBlock]
    delta: NotRequired[EventDelta]
    usage: NotRequired[MessageUsage]


class TokenCount(TypedDict):
    input_tokens: Count
