"""The types of the request bodies of Anthropic's Messages.

``gateway/core/field_checks.py`` checks values later, for all protocols. ``convert`` rejects
unsupported blocks and tools.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gateway.core.bodies import Items, StrictBody, Whole


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class CacheControlParam(StrictBody):
    """Retention of the KV cache of the whole prompt, regardless of this object's position."""

    type: Literal["ephemeral"]
    ttl: str | None = Field(default=None, description="`5m` (default) or `1h`; the longest is used")


class ContentBlockParam(StrictBody):
    """A part of a message; its type determines its fields."""

    type: str = Field(
        description="`text`, `tool_use`, `tool_result`, `tool_reference`, `thinking`, "
        "`redacted_thinking` or `mid_conv_system`"
    )
    text: str | None = None
    id: str | None = Field(default=None, description="in `tool_use`")
    name: str | None = Field(default=None, description="in `tool_use`: name of the function")
    input: dict[str, Any] | None = Field(default=None, description="in `tool_use`")
    tool_use_id: str | None = Field(default=None, description="in `tool_result`")
    content: Blocks | None = Field(
        default=None,
        description="in `tool_result` and `mid_conv_system`: text blocks; in `tool_result` also "
        "`tool_reference`",
    )
    tool_name: str | None = Field(
        default=None, description="in `tool_reference`: name of the tool to insert here"
    )
    is_error: bool | None = Field(default=None, description="in `tool_result`")
    thinking: str | None = None
    cache_control: CacheControlParam | None = None


Blocks = Annotated[
    Items[ContentBlockParam],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[ContentBlockParam]),
]
"""A list of blocks, or a string, which is equivalent to one text block."""


class MessageParam(StrictBody):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolParam(StrictBody):
    """A function that the model may call."""

    name: str
    type: str | None = Field(default=None, description="`custom`; other types are rejected")
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of an object; a tool without it is rejected"
    )
    strict: bool | None = Field(
        default=None, description="reject a schema that a grammar cannot express"
    )
    defer_loading: bool | None = Field(
        default=None, description="hide the tool until a `tool_reference` names it"
    )
    cache_control: CacheControlParam | None = None


class ToolChoiceParam(StrictBody):
    """The tools that may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(StrictBody):
    """Whether the model reasons first, and whether the client receives the reasoning."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(default=None, description="checked but not enforced")
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`summarized` returns all reasoning"
    )


class OutputFormatParam(StrictBody):
    """JSON schema that the output must match."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigParam(StrictBody):
    """Options of the model's output."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="sets the template's `reasoning_effort`; `max` sets `xhigh`"
    )
    format: OutputFormatParam | None = None


class MetadataParam(StrictBody):
    """``metadata``."""

    user_id: str | None = Field(
        default=None, description="ids in the format of Claude Code contain the session id"
    )


class CountTokensBody(StrictBody):
    """``POST /v1/messages/count_tokens``."""

    model: str
    messages: Items[MessageParam]
    system: Blocks | None = None
    tools: Items[ToolParam] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfigParam | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="variables of the chat template"
    )


class MessagesBody(CountTokensBody):
    """``POST /v1/messages``."""

    max_tokens: Whole
    stop_sequences: Items[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    output_format: OutputFormatParam | None = Field(
        default=None, description="deprecated alias of `output_config.format`"
    )
    cache_control: CacheControlParam | None = None
    metadata: MetadataParam | None = None
    cache_ttl: float | None = Field(
        default=None,
        description="seconds to keep the KV cache; 0: no reuse; default: longest `cache_control`",
    )
    session_id: str | None = Field(
        default=None, description="id of the conversation; default: the id in `metadata`"
    )
    priority: Whole | None = Field(
        default=None, description="lower values run first; default: header `x-priority`"
    )


ContentBlockParam.model_rebuild()
