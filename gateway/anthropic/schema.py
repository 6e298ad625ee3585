"""The types of the bodies of Anthropic's Messages.

Values are checked later, with those of the other protocols (``gateway/core/field_checks.py``), and
blocks and tools that are not built are refused by name in ``convert``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gateway.core.bodies import Items, StrictBody, Whole


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class CacheControlParam(StrictBody):
    """That the prompt up to here will be used again."""

    type: Literal["ephemeral"]
    ttl: str | None = Field(default=None, description="`5m` (default) or `1h`: see `cache_ttl`")


class Block(StrictBody):
    """A part of a message; which fields it has depends on its type."""

    type: str = Field(
        description="`text`, `tool_use`, `tool_result`, `tool_reference`, `thinking`, "
        "`redacted_thinking` or `mid_conv_system`"
    )
    text: str | None = None
    id: str | None = Field(default=None, description="of `tool_use`")
    name: str | None = Field(default=None, description="of `tool_use`: the function")
    input: dict[str, Any] | None = Field(default=None, description="of `tool_use`")
    tool_use_id: str | None = Field(default=None, description="of `tool_result`")
    content: Blocks | None = Field(
        default=None,
        description="of `tool_result` and `mid_conv_system`: text blocks; of `tool_result` also "
        "`tool_reference`",
    )
    tool_name: str | None = Field(
        default=None, description="of `tool_reference`: a tool that is shown here"
    )
    is_error: bool | None = Field(default=None, description="of `tool_result`")
    thinking: str | None = None
    cache_control: CacheControlParam | None = None


Blocks = Annotated[
    Items[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])
]
"""Blocks, or a text that stands for one text block."""


class MessageParam(StrictBody):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolParam(StrictBody):
    """A function that may be called."""

    name: str
    type: str | None = Field(default=None, description="`custom`; others are refused")
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of an object; required"
    )
    strict: bool | None = Field(
        default=None, description="refuse a schema that a grammar cannot express"
    )
    defer_loading: bool | None = Field(
        default=None, description="not shown, and not called, before a `tool_reference` names it"
    )
    cache_control: CacheControlParam | None = None


class ToolChoiceParam(StrictBody):
    """What may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(StrictBody):
    """Whether the model reasons first, and what of that is shown."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(default=None, description="checked, and not enforced")
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`summarized` shows all of it"
    )


class OutputFormatParam(StrictBody):
    """What the answer must follow."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigParam(StrictBody):
    """How the model answers."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="the template's variable `reasoning_effort`; `max` is `xhigh`"
    )
    format: OutputFormatParam | None = None


class MetadataParam(StrictBody):
    """About the request."""

    user_id: str | None = Field(
        default=None, description="a session is read from the ids that Claude Code sends"
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
        default=None, description="older name of `output_config.format`"
    )
    cache_control: CacheControlParam | None = None
    metadata: MetadataParam | None = None
    cache_ttl: float | None = Field(
        default=None,
        description="seconds to keep its KV; 0: nobody uses it again; else as `cache_control` says",
    )
    session_id: str | None = Field(
        default=None, description="calls that go on from each other; else that in `metadata`"
    )
    priority: Whole | None = Field(default=None, description="lower runs first; else `x-priority`")


Block.model_rebuild()
