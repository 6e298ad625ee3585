"""Converts a body to a call, and to the request fields that the response repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.call import CallKind, ChatInput, GenerateCall
from gateway.core.field_checks import MAX_MESSAGES, MAX_PARTS, check_length, check_metadata, require
from gateway.http.convert import retention_hint, sampling_fields, structured_constraints
from gateway.responses.conversation import ConversationBuilder
from gateway.responses.items import Item, ItemIdGenerator, read_item
from gateway.responses.schema import InputItem, ResponseBody
from gateway.responses.tools import OfferedTools, read_tools, response_tool_choice, response_tools
from gateway.text.tool_formats.structured import FormatFieldNames, make_grammar, make_output_schema

REFERENCE = "item_reference"
LOGPROBS, ENCRYPTED_REASONING = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = (
    LOGPROBS,
    ENCRYPTED_REASONING,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""Accepted values of ``include``. Only the first two have an effect; the others concern items that
are not supported."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SUMMARIES = ("auto", "concise", "detailed", "none")
VERBOSITIES = ("low", "medium", "high")
_FORMAT = FormatFieldNames("text.format", "text.format.schema")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRequest:
    """One request after all checks that do not need the model."""

    call: GenerateCall
    repeated_fields: Mapping[str, Any]
    """Fields of the request that the response repeats."""
    paths: Sequence[str]
    """Name of each message's body field; see ``ConversationBuilder.paths``."""
    history: Sequence[Item]
    """Items of the previous responses."""
    new_items: Sequence[Item]
    """Items of the body."""
    ids: ItemIdGenerator
    tools: OfferedTools
    encodes_reasoning: bool


def check_size(data: Mapping[str, Any]) -> None:
    """Raise ``RequestError`` for too many items, fields or parts, before they are parsed."""
    raw_items = data.get("input")
    if not isinstance(raw_items, list):
        return
    check_length("input", len(raw_items), MAX_MESSAGES)
    items = [item for item in raw_items if isinstance(item, dict)]
    inner = [item.get(name) for item in items for name in ("content", "output", "summary")]
    num_parts = sum(map(len, items)) + sum(len(one) for one in inner if isinstance(one, list))
    rule = f"has {num_parts} fields and parts, at most {MAX_PARTS} are allowed"
    require(num_parts <= MAX_PARTS, "input", rule)


def input_items(body: ResponseBody) -> Sequence[InputItem]:
    """Return ``input`` as items."""
    if isinstance(body.input, str):
        return [InputItem(role="user", content=body.input)]
    return body.input or ()


def referenced_id(item: InputItem) -> str | None:
    """Return the id in an ``item_reference``, whose type is optional; None for other items."""
    is_bare = item.type is None and item.role is None and item.content is None
    return item.id if item.type == REFERENCE or is_bare else None


def check_response_body(
    body: ResponseBody,
    ids: ItemIdGenerator,
    history: Sequence[Item] = (),
    referenced: Mapping[str, Item] | None = None,
) -> CheckedRequest:
    """Check a body and convert it.

    Args:
        body: the parsed body.
        ids: creates the ids of the items.
        history: items of the previous responses.
        referenced: stored items by the ids in ``item_reference``.

    Raises:
        RequestError: a field is invalid; the error names it.
    """
    _check(body)
    tools = read_tools(body)
    new_items = _read_items(body, ids, referenced or {})
    conversation = ConversationBuilder()
    if body.instructions:
        conversation.add_instructions(body.instructions, "instructions")
    for item in history:
        conversation.add(item, "previous_response_id")
    for index, item in enumerate(new_items):
        path = "input" if isinstance(body.input, str) else f"input[{index}]"
        conversation.add(item, path)
    require(bool(new_items or history), "input", "must not be empty")
    return CheckedRequest(
        call=_make_call(body, conversation, tools),
        repeated_fields=_repeated_fields(body),
        paths=conversation.paths,
        history=history,
        new_items=new_items,
        ids=ids,
        tools=tools,
        encodes_reasoning=ENCRYPTED_REASONING in (body.include or ()),
    )


def _check(body: ResponseBody) -> None:
    """Check the values that no other module checks."""
    if body.input is None and body.previous_response_id is None:
        raise RequestError.missing("input")
    for index, value in enumerate(body.include or ()):
        _check_choice(f"include[{index}]", value, INCLUDABLE)
    reports = LOGPROBS in (body.include or ())
    rule = f"needs {LOGPROBS} in include"
    require(not body.top_logprobs or reports, "top_logprobs", rule)
    if (reasoning := body.reasoning) is not None:
        _check_choice("reasoning.effort", reasoning.effort, EFFORTS)
        _check_choice("reasoning.summary", reasoning.summary, SUMMARIES)
        _check_choice("reasoning.generate_summary", reasoning.generate_summary, SUMMARIES)
    if body.text is not None:
        _check_choice("text.verbosity", body.text.verbosity, VERBOSITIES)
    max_tool_calls = body.max_tool_calls
    require(
        max_tool_calls is None or max_tool_calls >= 1,
        "max_tool_calls",
        f"({max_tool_calls}) must be at least 1",
    )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")
    check_metadata(body.metadata or {})


def _check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    rule = f"({str(value)[:64]!r}) must be one of {', '.join(choices)}"
    require(value is None or value in choices, name, rule)


def _read_items(
    body: ResponseBody, ids: ItemIdGenerator, referenced: Mapping[str, Item]
) -> list[Item]:
    items = []
    for index, input_item in enumerate(input_items(body)):
        path = "input" if isinstance(body.input, str) else f"input[{index}]"
        if (stored_id := referenced_id(input_item)) is None:
            items.append(read_item(input_item, path, ids))
            continue
        stored_item = referenced.get(stored_id)
        rule = f"({stored_id[:64]!r}) must be the id of a stored item"
        require(stored_item is not None, f"{path}.id", rule)
        assert stored_item is not None, "required"
        items.append(stored_item)
    return items


def _make_call(
    body: ResponseBody, conversation: ConversationBuilder, tools: OfferedTools
) -> GenerateCall:
    fields = sampling_fields(body)
    text_format = body.text.format if body.text is not None else None
    kind, schema = (text_format.type, text_format.schema_) if text_format else (None, None)
    grammar = make_grammar(kind, schema, structured_constraints(body.structured_outputs), _FORMAT)
    name, description = (text_format.name, text_format.description) if text_format else (None, None)
    variables = dict(body.chat_template_kwargs or {})
    if body.text is not None and body.text.verbosity is not None:
        variables.setdefault("verbosity", body.text.verbosity)
    chat = ChatInput(
        messages=conversation.finish(),
        template=body.chat_template,
        template_kwargs=variables,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        tools=tools.tool_use,
        output_schema=make_output_schema(grammar, name, description, _FORMAT),
    )
    reports = LOGPROBS in (body.include or ())
    return GenerateCall(
        kind=CallKind.CHAT,
        chat=chat,
        max_tokens=body.max_output_tokens,
        max_tokens_name="max_output_tokens",
        logprobs=(body.top_logprobs or 0) if reports else None,
        logprobs_name="top_logprobs",
        grammar=grammar,
        cache_ttl_hint=retention_hint(body),
        **fields,
    )


def _repeated_fields(body: ResponseBody) -> dict[str, Any]:
    """Return the fields that the response repeats, with defaults for fields that are not set."""
    text, reasoning = body.text, body.reasoning
    text_format = text.format if text is not None else None
    format_object: dict[str, Any] = {"type": text_format.type if text_format else "text"}
    if text_format is not None and text_format.type == "json_schema":
        format_object = text_format.model_dump(by_alias=True)
        format_object["strict"] = True
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "text": {"format": format_object, "verbosity": (text and text.verbosity) or "medium"},
        "tool_choice": response_tool_choice(body),
        "tools": response_tools(body),
        "top_logprobs": body.top_logprobs or 0,
        "temperature": _or_default(body.temperature, 1.0),
        "top_p": _or_default(body.top_p, 1.0),
        "frequency_penalty": _or_default(body.frequency_penalty, 0.0),
        "presence_penalty": _or_default(body.presence_penalty, 0.0),
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        "user": body.user,
    }


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value
