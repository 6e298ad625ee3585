"""Types of the response bodies and events of Responses, for the OpenAPI document.

Handlers build plain dicts; a test fails if a response has a field that is not declared here.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from gateway.http.http_types import ChatToken, Count, ErrorReason

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


class OtherText(TypedDict):
    type: Literal["input_text", "reasoning_text", "summary_text"]
    text: str


class MessageItem(TypedDict):
    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant", "developer", "system", "user"]
    content: list[OutputText | OtherText]
    phase: NotRequired[Literal["commentary", "final_answer"]]


class ReasoningItem(TypedDict):
    type: Literal["reasoning"]
    id: str
    summary: list[OtherText]
    content: list[OtherText]
    status: NotRequired[ItemStatus]
    encrypted_content: NotRequired[str]


class FunctionCallItem(TypedDict):
    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    arguments: str


class CustomCallItem(TypedDict):
    type: Literal["custom_tool_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    input: str


class CallOutputItem(TypedDict):
    type: Literal["function_call_output", "custom_tool_call_output"]
    id: str
    status: ItemStatus
    call_id: str
    output: str


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class InputDetails(TypedDict):
    cached_tokens: Count
    cache_write_tokens: Literal[0]


class ReasoningTokens(TypedDict):
    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class FunctionTool(TypedDict):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class CustomFormat(TypedDict):
    type: Literal["text"]


class CustomTool(TypedDict):
    type: Literal["custom"]
    name: str
    description: str | None
    format: CustomFormat


class NamespaceTool(TypedDict):
    type: Literal["namespace"]
    name: str
    description: str | None
    tools: list[FunctionTool | CustomTool]


class TextFormatObject(TypedDict):
    type: Literal["text", "json_object", "json_schema"]
    name: NotRequired[Any]
    description: NotRequired[Any]
    schema: NotRequired[dict[str, Any] | str]
    strict: NotRequired[bool]


class TextOptionsObject(TypedDict):
    format: TextFormatObject
    verbosity: Literal["low", "medium", "high"]


class ReasoningOptionsObject(TypedDict):
    effort: str | None
    summary: str | None


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ToolNameObject(TypedDict):
    type: Literal["function", "custom"]
    name: str


class ResponseError(TypedDict):
    code: str
    message: str


class ToolChoiceObject(TypedDict):
    type: Literal["function", "custom", "allowed_tools"]
    name: NotRequired[str]
    mode: NotRequired[Literal["auto", "required"]]
    tools: NotRequired[list[ToolNameObject]]


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    store: bool
    instructions: str | None
    max_output_tokens: Count | None
    max_tool_calls: Count | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningOptionsObject
    safety_identifier: str | None
    text: TextOptionsObject
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject
    tools: list[FunctionTool | CustomTool | NamespaceTool]
    top_logprobs: Count
    temperature: float
    top_p: float
    frequency_penalty: float
    presence_penalty: float
    truncation: Literal["disabled"]
    background: Literal[False]
    service_tier: Literal["default"]
    user: str | None


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[OutputItem | CallOutputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LifecycleEvent(TypedDict):
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Count
    response: ResponseObject


class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: Count
    output_index: Count
    item: OutputItem


class PartEvent(TypedDict):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    part: OutputText | OtherText


class TextDeltaEvent(TypedDict):
    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    delta: str
    logprobs: NotRequired[list[ChatToken]]


class TextDoneEvent(TypedDict):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    text: str
    logprobs: NotRequired[list[ChatToken]]


class CallInputDeltaEvent(TypedDict):
    type: Literal["response.function_call_arguments.delta", "response.custom_tool_call_input.delta"]
    sequence_number: Count
    item_id: str
    output_index: Count
    delta: str


class CallInputDoneEvent(TypedDict):
    type: Literal["response.function_call_arguments.done", "response.custom_tool_call_input.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    name: str
    arguments: NotRequired[str]
    input: NotRequired[str]


class ErrorEvent(TypedDict):
    type: Literal["error"]
    sequence_number: Count
    code: str | None
    message: str
    param: str | None
    error: ErrorReason


EVENTS = (
    *(LifecycleEvent, ItemEvent, PartEvent, TextDeltaEvent, TextDoneEvent),
    *(CallInputDeltaEvent, CallInputDoneEvent, ErrorEvent),
)
"""Types of server-sent events."""
