"""The types of HTTP request bodies.

Types are strict (``"5"`` is not a number), and unknown fields are ignored.
``gateway/core/field_checks.py`` checks values later, for all protocols.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from gateway.core.bodies import Items, StrictBody, Whole

TAG = "is "
"""Prefix of tags (pydantic's ``Tag``) of union types that a function discriminates."""
PromptField = str | Items[int] | Items[str] | Items[Items[int]]
"""One or more prompts, as text or token ids."""


class ContentPartBody(StrictBody):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = Field(
        default=None, description="replaces `text` in a `refusal` part of an assistant message"
    )


class CalledFunctionBody(StrictBody):
    """Name of the called function, and its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCallBody(StrictBody):
    """A tool call of an assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunctionBody


class ChatMessageBody(StrictBody):
    """One message. Unknown fields are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | Items[ContentPartBody] | None = None
    name: str | None = None
    tool_calls: Items[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: Any = Field(
        default=None, description="the reasoning of the model, in an assistant message"
    )
    reasoning: Any = Field(default=None, description="alias of `reasoning_content`")
    thinking: Any = Field(default=None, description="alias of `reasoning_content`")


class ChatStreamOptionsBody(StrictBody):
    """Additional data of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaBody(StrictBody):
    """``response_format.json_schema``."""

    name: Any = Field(default=None, description="gpt-oss gets it in the prompt, with the schema")
    description: Any = Field(
        default=None, description="gpt-oss gets it in the prompt, with the schema"
    )
    schema_: dict[str, Any] | str | None = Field(default=None, alias="schema")


class FunctionBody(StrictBody):
    """A function that the model may call. Its arguments match the schema. Keywords that a grammar
    cannot express are rejected if ``strict`` is set, and ignored otherwise."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(StrictBody):
    """One entry of ``tools``."""

    type: Literal["function"]
    function: FunctionBody


class FunctionNameBody(StrictBody):
    """``tool_choice.function``."""

    name: str


class ToolChoiceBody(StrictBody):
    """A ``tool_choice`` that names a function."""

    type: Literal["function"]
    function: FunctionNameBody


class ResponseFormatBody(StrictBody):
    """``response_format``."""

    type: str
    json_schema: JsonSchemaBody | None = None


class StructuredOutputsBody(StrictBody):
    """``structured_outputs``, with the field names of vLLM."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class CallBody(StrictBody):
    """Fields of all calls to the model."""

    model: str | None = None
    add_special_tokens: bool | None = None
    priority: Whole | None = None
    cache_salt: str | None = None


class ConversationBody(StrictBody):
    """Fields that control how messages are rendered."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = Field(
        default=None,
        description="a string sets this variable of the template; gpt-oss: low, medium, high",
    )
    tools: Items[ToolBody] | None = None


class PromptCacheOptionsBody(StrictBody):
    """``prompt_cache_options``."""

    mode: str | None = Field(default=None, description="ignored: all prefixes are cached")
    ttl: str | None = Field(
        default=None,
        description="default of `cache_ttl`, such as `30m`; at most `--max-cache-ttl-s`",
    )


class RetentionBody(StrictBody):
    """Fields that tell how long a call's KV cache is kept and which calls share it."""

    cache_ttl: float | None = Field(
        default=None, description="seconds to keep the KV cache of the call; 0: it is not reused"
    )
    session_id: str | None = Field(
        default=None, description="id of the conversation; default: header `x-session-id`"
    )
    prompt_cache_key: str | None = Field(
        default=None, description="alias of `session_id`, which takes precedence"
    )
    prompt_cache_options: PromptCacheOptionsBody | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        default=None,
        description="`24h`: like `24h` in `prompt_cache_options.ttl`, which takes precedence",
    )


class SamplingBody(CallBody):
    """Sampling fields that all OpenAI protocols share."""

    min_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Items[int] | None = None
    bad_words: Items[str] | None = None
    structured_outputs: StructuredOutputsBody | None = None
    stream: bool | None = None


class GenerateBody(RetentionBody, SamplingBody):
    """Fields that completions and chat share."""

    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n: Whole | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream_options: ChatStreamOptionsBody | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Whole | None = None
    logprob_token_ids: Items[int] | None = None
    response_format: ResponseFormatBody | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: str | None = None
    request_id: str | None = None


class CompletionBody(GenerateBody):
    """``POST /v1/completions``."""

    prompt: PromptField
    logprobs: Whole | None = None
    best_of: Whole | None = None
    echo: bool | None = None


class ChatBody(ConversationBody, GenerateBody):
    """``POST /v1/chat/completions``."""

    messages: Items[ChatMessageBody]
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tool_choice: str | ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(ConversationBody):
    """``POST /tokenize``."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessageBody] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(StrictBody):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Items[int]
