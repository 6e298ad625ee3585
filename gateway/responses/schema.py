"""The types of request bodies of Responses. They are strict, like ``gateway.http.schema``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from gateway.core.bodies import Items, StrictBody, Whole
from gateway.http.schema import TAG, RetentionBody, SamplingBody


class InputPart(StrictBody):
    """One content part: ``input_text``, ``output_text``, ``text``, ``refusal``, ``reasoning_text``
    or ``summary_text``."""

    type: str
    text: str | None = None
    refusal: str | None = Field(default=None, description="replaces `text` in a `refusal` part")


class InputItem(StrictBody):
    """One item of a conversation. Its type determines the required fields."""

    type: str | None = Field(
        default=None,
        description="`message` (default), `function_call`, `function_call_output`, "
        "`custom_tool_call`, `custom_tool_call_output`, `reasoning` or `item_reference`",
    )
    id: str | None = Field(default=None, description="in `item_reference`: id of a stored item")
    role: str | None = Field(default=None, description="in messages")
    content: str | Items[InputPart] | None = Field(
        default=None, description="in messages and reasoning"
    )
    phase: str | None = Field(
        default=None, description="in assistant messages: `commentary` or `final_answer`"
    )
    call_id: str | None = Field(default=None, description="in calls and their outputs")
    status: str | None = Field(
        default=None, description="in calls: an `incomplete` call was cut off and is ignored"
    )
    name: str | None = Field(default=None, description="in calls: name of the tool")
    namespace: str | None = Field(default=None, description="in calls: namespace of the tool")
    arguments: str | None = Field(default=None, description="in function calls: JSON text")
    input: str | None = Field(default=None, description="in calls of custom tools")
    output: str | Items[InputPart] | None = Field(default=None, description="in outputs of calls")
    summary: Items[InputPart] | None = Field(default=None, description="in reasoning")
    encrypted_content: str | None = Field(
        default=None, description="in reasoning: the text that this server returned, unchanged"
    )


class ToolFormatBody(StrictBody):
    """The format of a custom tool's input."""

    type: str


class OfferedToolBody(StrictBody):
    """A function, a custom tool (its input is any text) or a namespace of both. Arguments match the
    schema. Keywords that a grammar cannot express are rejected if ``strict`` is set, and ignored
    otherwise."""

    type: str = Field(description="`function`, `custom` or `namespace`")
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="for functions: JSON schema"
    )
    strict: bool | None = None
    format: ToolFormatBody | None = Field(default=None, description="for custom tools: `text`")
    tools: Items[OfferedToolBody] | None = Field(
        default=None, description="for namespaces: functions and custom tools"
    )


class NamedToolBody(StrictBody):
    """A reference to a tool by name."""

    type: str
    name: str | None = None


class ChosenToolBody(StrictBody):
    """The tool that must be called, or (``allowed_tools``) the tools that may be called."""

    type: str = Field(description="`function`, `custom` or `allowed_tools`")
    name: str | None = None
    mode: str | None = Field(default=None, description="for `allowed_tools`: `auto` or `required`")
    tools: Items[NamedToolBody] | None = Field(default=None, description="for `allowed_tools`")


class TextFormatBody(StrictBody):
    """``text.format``."""

    type: str = Field(description="`text`, `json_object` or `json_schema`")
    name: Any = Field(default=None, description="gpt-oss gets it in the prompt, with the schema")
    description: Any = Field(
        default=None, description="gpt-oss gets it in the prompt, with the schema"
    )
    schema_: dict[str, Any] | str | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="ignored: schemas are always enforced")


class TextBody(StrictBody):
    """``text``."""

    format: TextFormatBody | None = None
    verbosity: str | None = Field(
        default=None, description="`low`, `medium` or `high`: sets this variable of the template"
    )


class ReasoningBody(StrictBody):
    """``reasoning``."""

    effort: str | None = Field(
        default=None, description="sets the template's variable `reasoning_effort`"
    )
    summary: str | None = Field(
        default=None, description="ignored: reasoning is returned in full, without a summary"
    )
    generate_summary: str | None = Field(default=None, description="alias of `summary`")


class StreamOptionsBody(StrictBody):
    """``stream_options``."""

    include_obfuscation: bool | None = None


def _kind_of_input(value: object) -> str | None:
    if isinstance(value, str):
        return f"{TAG}text"
    return f"{TAG}items" if isinstance(value, list) else None


InputField = Annotated[
    Annotated[str, Tag(f"{TAG}text")] | Annotated[Items[InputItem], Tag(f"{TAG}items")],
    Discriminator(_kind_of_input),
]
"""A string or a list of items. Errors name the invalid item."""


class ResponseBody(RetentionBody, SamplingBody):
    """``POST /v1/responses``."""

    SHAPES: ClassVar[Mapping[str, str]] = {
        "input": "must be a string or a list of items",
        "output": "must be a string or a list of text parts",
        "tool_choice": "must be none, auto, required or name a tool",
    }
    input: InputField | None = None
    instructions: str | None = Field(
        default=None, description="inserted before all items, in this request only"
    )
    previous_response_id: str | None = Field(
        default=None, description="id of the stored response that this request continues"
    )
    store: bool | None = Field(
        default=None, description="default: true if the server has a state folder"
    )
    tools: Items[OfferedToolBody] | None = None
    tool_choice: str | ChosenToolBody | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Whole | None = Field(
        default=None, description="ignored: it limits built-in tools, which are not supported"
    )
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    max_output_tokens: Whole | None = None
    include: Items[str] | None = None
    top_logprobs: Whole | None = None
    metadata: dict[str, str] | None = None
    stream_options: StreamOptionsBody | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
