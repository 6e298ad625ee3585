"""Convert bodies of Anthropic's Messages into ``GenerateCall``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.anthropic.deferred import (
    REFERENCE,
    callable_tools,
    check_references,
    render_references,
)
from gateway.anthropic.hints import longest_ttl, session_of
from gateway.anthropic.schema import (
    ContentBlockParam,
    CountTokensBody,
    MessageParam,
    MessagesBody,
    OutputFormatParam,
    ThinkingParam,
    ToolParam,
)
from gateway.core.call import CallKind, ChatInput, GenerateCall, OutputSchema
from gateway.core.field_checks import require
from gateway.core.tool_use import CallArguments, Tool, ToolUse
from gateway.text.tool_formats.structured import schema_grammar
from gateway.text.tool_formats.tools import ToolFieldNames, make_tool_use
from workers.requests.request import Grammar

MIN_BUDGET_TOKENS = 1024
_EFFORTS = {"max": "xhigh"}
"""Anthropic's names of ``effort`` that differ from the names here."""
_CHOICES = {"any": "required", "tool": None}
_BILLING_PREFIX = "x-anthropic-billing-header:"
"""Prefix of a system block of Claude Code that is removed, as it differs in each request."""
_TOOL_NAMES = ToolFieldNames(name="name", parameters="input_schema")
_Message = dict[str, Any]


def message_call(body: MessagesBody) -> GenerateCall:
    """Convert a body into a call. Raises ``RequestError``."""
    _check_thinking(body.thinking, body.max_tokens)
    grammar = _grammar(body)
    chat = chat_input(body, grammar)
    return GenerateCall(
        kind=CallKind.CHAT,
        model=body.model,
        chat=chat,
        max_tokens=body.max_tokens,
        fits_context=True,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences or ()),
        stop_name="stop_sequences",
        grammar=grammar,
        priority=body.priority,
        cache_ttl=body.cache_ttl,
        cache_ttl_hint=longest_ttl(body),
        session_id=session_of(body) if body.session_id is None else body.session_id,
    )


def chat_input(body: CountTokensBody, grammar: Grammar | None = None) -> ChatInput:
    """Convert the conversation of a body for the chat template. Raises ``RequestError``."""
    check_references(body)
    messages = _merge_consecutive(_messages(body))
    continues = bool(messages) and messages[-1]["role"] == "assistant"
    if continues:
        last = messages[-1]
        has_text = bool(last["content"]) and not last.get("tool_calls")
        require(has_text, "messages", "must not end with an assistant message without text")
    config = body.output_config
    effort = config.effort if config else None
    thinks = shows_thinking(body.thinking)
    return ChatInput(
        messages=tuple(messages),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        template_kwargs={
            "enable_thinking": thinks,
            "thinking": thinks,
            **(body.chat_template_kwargs or {}),
        },
        reasoning_effort=_EFFORTS.get(effort, effort) if effort else None,
        tools=_tools(body),
        output_schema=OutputSchema(schema=grammar.text) if grammar else None,
    )


def shows_thinking(thinking: ThinkingParam | None) -> bool:
    """Whether the client has the model reason: ``thinking`` is set and not disabled."""
    return thinking is not None and thinking.type != "disabled"


def _check_thinking(thinking: ThinkingParam | None, max_tokens: int) -> None:
    name = "thinking.budget_tokens"
    if thinking is None or thinking.type != "enabled":
        return
    budget = thinking.budget_tokens
    if budget is None:
        raise RequestError.missing(name)
    is_fit = MIN_BUDGET_TOKENS <= budget < max_tokens
    rule = f"({budget}) must be at least {MIN_BUDGET_TOKENS} and below max_tokens ({max_tokens})"
    require(is_fit, name, rule)


def _grammar(body: MessagesBody) -> Grammar | None:
    config = body.output_config
    formats: dict[str, OutputFormatParam | None] = {
        "output_config.format": config.format if config else None,
        "output_format": body.output_format,
    }
    formats_set = {name: one for name, one in formats.items() if one is not None}
    require(len(formats_set) < 2, "output_format", "and output_config.format cannot both be set")
    for name, one in formats_set.items():
        return schema_grammar(one.schema_, f"{name}.schema")
    return None


# ---- tools ----------------------------------------------------------------------------------


def _tools(body: CountTokensBody) -> ToolUse | None:
    offered = callable_tools(body)
    tools = [_tool(tool, index) for index, tool in offered]
    names = replace(_TOOL_NAMES, entries=[f"tools[{index}]" for index, _ in offered])
    choice = body.tool_choice
    if choice is None:
        return make_tool_use(tools, names=names)
    if choice.type == "tool" and not choice.name:
        name = "tool_choice.name"
        raise RequestError.missing(name)
    return make_tool_use(
        tools,
        _CHOICES.get(choice.type, choice.type),
        choice.name if choice.type == "tool" else None,
        is_parallel=not choice.disable_parallel_tool_use,
        names=names,
    )


def _tool(tool: ToolParam, index: int) -> Tool:
    if tool.input_schema is None:
        name = f"tools[{index}].input_schema"
        raise RequestError.missing(name)
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        is_strict=bool(tool.strict),
        is_shown=not tool.defer_loading,
    )


# ---- messages -------------------------------------------------------------------------------


def _messages(body: CountTokensBody) -> list[_Message]:
    """Convert messages for chat templates; each tool result becomes a separate message."""
    messages: list[_Message] = []
    named = [(block, f"system[{index}]") for index, block in enumerate(body.system or ())]
    texts = [_only_text(block, path) for block, path in named if not _is_billing(block)]
    if system := "\n".join(texts):
        messages.append({"role": "system", "content": system})
    tools = {tool.name: tool for tool in body.tools or ()}
    for index, message in enumerate(body.messages):
        messages += _convert_message(message, f"messages[{index}].content", tools)
    return messages


def _convert_message(
    message: MessageParam, path: str, tools: Mapping[str, ToolParam]
) -> list[_Message]:
    if message.role == "system":
        return [_system_message(message.content, path)]
    if message.role == "assistant":
        return [_assistant_message(message.content, path)]
    return _user_messages(message.content, path, tools)


def _system_message(blocks: Sequence[ContentBlockParam], path: str) -> _Message:
    return {"role": "system", "content": _join_texts(blocks, path)}


def _is_billing(block: ContentBlockParam) -> bool:
    return block.type == "text" and (block.text or "").startswith(_BILLING_PREFIX)


def _user_messages(
    blocks: Sequence[ContentBlockParam], path: str, tools: Mapping[str, ToolParam]
) -> list[_Message]:
    messages: list[_Message] = []
    for index, block in enumerate(blocks):
        block_path = f"{path}[{index}]"
        match block.type:
            case "text":
                messages.append({"role": "user", "content": _text(block, block_path)})
            case "tool_result":
                messages.append(_tool_message(block, block_path, tools))
            case "mid_conv_system":
                messages.append(_system_message(block.content or (), f"{block_path}.content"))
            case _:
                raise _misplaced_block(block, block_path, "user")
    return messages or [{"role": "user", "content": ""}]


def _tool_message(block: ContentBlockParam, path: str, tools: Mapping[str, ToolParam]) -> _Message:
    if block.tool_use_id is None:
        name = f"{path}.tool_use_id"
        raise RequestError.missing(name)
    content = _result_text(block.content or (), f"{path}.content", tools)
    text = f"Error: {content}" if block.is_error else content
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _result_text(
    blocks: Sequence[ContentBlockParam], path: str, tools: Mapping[str, ToolParam]
) -> str:
    """Return the text of a tool result, with references replaced by tool declarations."""
    named = [(block, f"{path}[{index}]") for index, block in enumerate(blocks)]
    lines = []
    for is_reference, group in groupby(named, key=lambda pair: pair[0].type == REFERENCE):
        group_blocks, paths = zip(*group, strict=True)
        if is_reference:
            lines.append(render_references(group_blocks, paths, tools))
        else:
            lines += [_only_text(*pair) for pair in zip(group_blocks, paths, strict=True)]
    return "\n".join(lines)


def _assistant_message(blocks: Sequence[ContentBlockParam], path: str) -> _Message:
    texts: list[str] = []
    reasoning_texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        block_path = f"{path}[{index}]"
        match block.type:
            case "text":
                texts.append(_text(block, block_path))
            case "thinking":
                reasoning_texts.append(block.thinking or "")
            case "redacted_thinking":
                pass  # encrypted by another server; ignored
            case "tool_use":
                calls.append(_call(block, block_path))
            case _:
                raise _misplaced_block(block, block_path, "assistant")
    message: _Message = {"role": "assistant", "content": "\n".join(texts)}
    if reasoning := "\n".join(filter(None, reasoning_texts)):
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": calls} if calls else message


def _call(block: ContentBlockParam, path: str) -> dict[str, Any]:
    for name in ("id", "name"):
        if getattr(block, name) is None:
            raise RequestError.missing(f"{path}.{name}")
    try:
        text = json.dumps(block.input or {}, ensure_ascii=False, allow_nan=False)
    except ValueError as err:
        name = f"{path}.input"
        raise RequestError(f"{name} contains a value that JSON cannot represent", name) from err
    function = {"name": block.name, "arguments": CallArguments(block.input or {}, text)}
    return {"id": block.id, "type": "function", "function": function}


def _join_texts(blocks: Sequence[ContentBlockParam], path: str) -> str:
    """Return the text of blocks. Raises ``RequestError`` for blocks that are not text."""
    return "\n".join(_only_text(block, f"{path}[{i}]") for i, block in enumerate(blocks))


def _only_text(block: ContentBlockParam, path: str) -> str:
    if block.type != "text":
        raise _unsupported_block(block, path, "only text is")
    return _text(block, path)


def _text(block: ContentBlockParam, path: str) -> str:
    if block.text is None:
        name = f"{path}.text"
        raise RequestError.missing(name)
    return block.text


def _misplaced_block(block: ContentBlockParam, path: str, role: str) -> RequestError:
    if block.type in ("text", "thinking", "redacted_thinking", "tool_use", "tool_result"):
        name = f"{path}.type"
        return RequestError(f"{name} {block.type!r} cannot be in a message of role {role}", name)
    return _unsupported_block(block, path, "see the reference for the supported types")


def _unsupported_block(
    block: ContentBlockParam, path: str, supported: str
) -> UnsupportedParameterError:
    name = f"{path}.type"
    return UnsupportedParameterError(
        f"{name} {block.type[:64]!r} is not supported, {supported}", name
    )


def _merge_consecutive(messages: Sequence[_Message]) -> list[_Message]:
    """Merge consecutive messages of the same role, except tool results."""
    merged: list[_Message] = []
    for role, group in groupby(messages, key=itemgetter("role")):
        neighbours = list(group)
        merged += neighbours if role == "tool" else [_merge_messages(neighbours)]
    return merged


def _merge_messages(messages: Sequence[_Message]) -> _Message:
    """Return one message with the texts and calls of all ``messages``."""
    both: _Message = {}
    for message in messages:
        both |= message
    for name in ("content", "reasoning_content"):
        if name in both:
            both[name] = "\n".join(filter(None, (message.get(name) for message in messages)))
    if "tool_calls" in both:
        both["tool_calls"] = [
            call for message in messages for call in message.get("tool_calls", ())
        ]
    return both
