"""The types of the bodies of Responses, strict as those of ``gateway.http.schema``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from gateway.core.bodies import Items, StrictBody, Whole
from gateway.http.schema import TAG, RetentionBody, SamplingBody


class InputPart(StrictBody):
    """One part of a content: ``input_text``, ``output_text``, ``text``, ``refusal``,
    ``reasoning_text`` or ``summary_text``."""

    type: str
    text: str | None = None
    refusal: str | None = Field(default=None, description="of type `refusal`, in place of `text`")


class InputItem(StrictBody):
    """One item of a conversation; which fields are needed depends on its type."""

    type: str | None = Field(
        default=None,
        description="`message` (default), `function_call`, `function_call_output`, "
        "`custom_tool_call`, `custom_tool_call_output`, `reasoning` or `item_reference`",
    )
    id: str | None = Field(default=None, description="of an `item_reference`: a stored item")
    role: str | None = Field(default=None, description="of a message")
    content: str | Items[InputPart] | None = Field(
        default=None, description="of a message, or of reasoning"
    )
    phase: str | None = Field(
        default=None, description="of an assistant's message: `commentary` or `final_answer`"
    )
    call_id: str | None = Field(default=None, description="of calls and their outputs")
    status: str | None = Field(
        default=None, description="`incomplete` of a call: it was cut, and nobody made it"
    )
    name: str | None = Field(default=None, description="of calls")
    namespace: str | None = Field(default=None, description="of calls: that of the tool")
    arguments: str | None = Field(default=None, description="of a function call: JSON text")
    input: str | None = Field(default=None, description="of a custom tool's call")
    output: str | Items[InputPart] | None = Field(default=None, description="of outputs of calls")
    summary: Items[InputPart] | None = Field(default=None, description="of reasoning")
    encrypted_content: str | None = Field(
        default=None, description="of reasoning: as this server returned it"
    )


class ToolFormatBody(StrictBody):
    """The form of a custom tool's input."""

    type: str


class OfferedToolBody(StrictBody):
    """A function, a custom tool, whose input is any text, or a namespace of both. Arguments follow
    the schema; what a grammar cannot express of it is refused with ``strict``, and has no effect
    without."""

    type: str = Field(description="`function`, `custom` or `namespace`")
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="of a function")
    strict: bool | None = None
    format: ToolFormatBody | None = Field(default=None, description="of a custom tool: `text`")
    tools: Items[OfferedToolBody] | None = Field(
        default=None, description="of a namespace: functions and custom tools"
    )


class NamedToolBody(StrictBody):
    """One tool by its name."""

    type: str
    name: str | None = None


class ChosenToolBody(StrictBody):
    """The tool that must be called, or (``allowed_tools``) those that may be."""

    type: str = Field(description="`function`, `custom` or `allowed_tools`")
    name: str | None = None
    mode: str | None = Field(default=None, description="of `allowed_tools`: `auto` or `required`")
    tools: Items[NamedToolBody] | None = Field(default=None, description="of `allowed_tools`")


class TextFormatBody(StrictBody):
    """``text.format``."""

    type: str = Field(description="`text`, `json_object` or `json_schema`")
    name: Any = Field(default=None, description="gpt-oss: shown with the schema")
    description: Any = Field(default=None, description="gpt-oss: shown with the schema")
    schema_: dict[str, Any] | str | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="no effect: schemas are always followed")


class TextBody(StrictBody):
    """``text``."""

    format: TextFormatBody | None = None
    verbosity: str | None = Field(
        default=None, description="`low`, `medium` or `high`: sets that variable of the template"
    )


class ReasoningBody(StrictBody):
    """``reasoning``."""

    effort: str | None = Field(
        default=None, description="sets the template's variable `reasoning_effort`"
    )
    summary: str | None = Field(
        default=None, description="no effect: reasoning is returned as it is, not summarized"
    )
    generate_summary: str | None = Field(default=None, description="another name of `summary`")


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
"""A text, or items; errors name the item."""


class ResponseBody(RetentionBody, SamplingBody):
    """``POST /v1/responses``."""

    SHAPES: ClassVar[Mapping[str, str]] = {
        "input": "must be a string or a list of items",
        "output": "must be a string or a list of text parts",
        "tool_choice": "must be none, auto, required or name a tool",
    }
    input: InputField | None = None
    instructions: str | None = Field(default=None, description="before all items; not carried over")
    previous_response_id: str | None = Field(
        default=None, description="a stored response, whose conversation goes on"
    )
    store: bool | None = Field(
        default=None, description="by default whether the server has a folder for that"
    )
    tools: Items[OfferedToolBody] | None = None
    tool_choice: str | ChosenToolBody | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Whole | None = Field(
        default=None, description="no effect: it is about built-in tools, which are not here"
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
