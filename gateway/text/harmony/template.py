"""Renders a conversation to a prompt in the Harmony format.

The prompt begins with a system message about the model. The client's ``system`` and ``developer``
messages are instructions in a developer message, which also declares the tools. Reasoning
before the model's last answer on the channel ``final`` is omitted; later reasoning is kept.
Calls are written as the model writes them, with the JSON text of the client. An assistant message
with the phase ``commentary`` is on the channel ``commentary``.

The prompt distinguishes special tokens from client texts, so that no text can create a message.

Source: "Harmony response format" (OpenAI, 2025), https://github.com/openai/harmony.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import OutputSchema
from gateway.core.field_checks import require
from gateway.core.messages import COMMENTARY_PHASE, PHASE, REASONING_NAMES
from gateway.core.tool_use import CallArguments, ToolCallFormat
from gateway.text.harmony.declarations import comment, declare_functions
from gateway.text.harmony.special_tokens import (
    ANALYSIS,
    CALL,
    CHANNEL,
    CHANNELS,
    COMMENTARY,
    CONSTRAIN,
    END,
    FINAL,
    FUNCTIONS,
    MESSAGE,
    ROLE,
    START,
    HarmonyPrompt,
)
from gateway.text.tool_formats.tools import NAME_RULE, is_function_name

_EFFORTS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
}
"""Maps each reasoning effort of OpenAI's API to a reasoning effort of the model."""
_EFFORT = "reasoning_effort"
_DEFAULTS = {
    "model_identity": "You are ChatGPT, a large language model trained by OpenAI.",
    "knowledge_cutoff": "2024-06",
    _EFFORT: "medium",
}
_DATE = "conversation_start_date"
_KWARGS = "chat_template_kwargs"
_INSTRUCTIONS = "# Instructions"
_UNNAMED = "response"
_INSTRUCTING = ("system", "developer")
_Message = Mapping[str, Any]
_Parts = list[str]
"""Type of a message in a Harmony prompt: special tokens and texts in order; the last two are the
message text and the end token."""


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class HarmonyTemplate:
    """Renders conversations for models with the Harmony format, in place of a ``ChatTemplate``.

    Args:
        variables: special tokens by name, for chat templates that clients send.
        today: returns the date in prompts; by default the date in UTC.
    """

    has_tools = True
    tool_format = ToolCallFormat.HARMONY
    has_thinking = False
    """Always False, as reasoning has its own channel and no ``<think>`` tags."""

    def __init__(
        self, variables: Mapping[str, str] | None = None, today: Callable[[], str] = _today
    ) -> None:
        self.variables = dict(variables or {})
        self._today = today

    def render(
        self,
        messages: Sequence[_Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        output_schema: OutputSchema | None = None,
    ) -> HarmonyPrompt:
        """Render a conversation to a prompt.

        Args:
            variables: ``reasoning_effort``, ``model_identity``, ``knowledge_cutoff`` and
                ``conversation_start_date``; None sets the default, and an empty text omits the
                line.
            output_schema: the schema of ``response_format`` that the prompt shows.

        Raises:
            RequestError: a message or variable does not fit the format.
        """
        set_variables = {
            name: value for name, value in (variables or {}).items() if value is not None
        }
        values = {**_DEFAULTS, _DATE: self._today(), **set_variables}
        before = [
            _system_message(values, bool(tools)),
            *_developer_message(messages, tools or (), output_schema),
        ]
        last = len(messages) - (not add_generation_prompt)
        answers = [index for index in range(last) if _is_answer(messages[index])]
        turns = _MessageRenderer(kept_from=max(answers, default=-1) + 1).render(messages)
        if continue_final_message:
            turns = _without_last_end(turns)
        parts = [part for message in [*before, *turns] for part in message]
        return HarmonyPrompt([*parts, START, ROLE] if add_generation_prompt else parts)

    @staticmethod
    def knows_effort(effort: str | None) -> bool:
        return effort in _EFFORTS


class _MessageRenderer:
    """Renders the messages after the system and developer messages at the start.

    Args:
        kept_from: index of the first message that is rendered with its reasoning.
    """

    def __init__(self, kept_from: int) -> None:
        self._kept_from = kept_from
        self._names: dict[str, str] = {}
        self._last_name = ""

    def render(self, messages: Sequence[_Message]) -> list[_Parts]:
        rendered: list[_Parts] = []
        for index in range(_num_instructions(messages), len(messages)):
            rendered += self._render_message(messages[index], index)
        return rendered

    def _render_message(self, message: _Message, index: int) -> list[_Parts]:
        role, content = str(message.get("role")), str(message.get("content") or "")
        if role == ROLE:
            return self._render_assistant(message, content, index)
        if role in _INSTRUCTING:
            return [_render_parts(["developer"], f"{_INSTRUCTIONS}\n\n{content}")]
        if role == "user":
            return [_render_parts(["user"], content)]
        if role not in ("tool", "function"):
            raise _template_error(f"it has no role {role[:64]!r} (messages[{index}])")
        header = [
            f"{FUNCTIONS}{self._function_of_result(message, index)} to={ROLE}",
            CHANNEL,
            COMMENTARY,
        ]
        return [_render_parts(header, content)]

    def _render_assistant(self, message: _Message, content: str, index: int) -> list[_Parts]:
        reasoning, calls = _reasoning_text(message, index), message.get("tool_calls") or ()
        parts = []
        if reasoning and index >= self._kept_from:
            parts.append(_render_parts([ROLE, CHANNEL, ANALYSIS], reasoning))
        if content or not (reasoning or calls):
            channel = COMMENTARY if calls or _is_commentary(message) else FINAL
            parts.append(_render_parts([ROLE, CHANNEL, channel], content))
        return parts + [self._render_call(call, index) for call in calls]

    def _render_call(self, call: Mapping[str, Any], index: int) -> _Parts:
        function = call["function"]
        self._last_name = name = _checked_name(function["name"], index)
        if call_id := call.get("id"):
            self._names[call_id] = name
        arguments: CallArguments = function["arguments"]
        header = [ROLE, CHANNEL, f"{COMMENTARY} to={FUNCTIONS}{name} ", CONSTRAIN, "json"]
        return _render_parts(header, arguments.text.strip() or "{}", CALL)

    def _function_of_result(self, message: _Message, index: int) -> str:
        """Return the function name for a tool result: by call id, by name, or the last call's."""
        called = self._names.get(message.get("tool_call_id") or "")
        name_field = str(message.get("name") or "")
        name = called or (_checked_name(name_field, index) if name_field else self._last_name)
        if not name:
            raise _template_error(f"messages[{index}] is the result of no call")
        return name


def _checked_name(name: str, index: int) -> str:
    """Return a function's name without ``functions.``. Raises ``RequestError`` if it is invalid."""
    plain = name.removeprefix(FUNCTIONS)
    if not is_function_name(plain):
        raise _template_error(f"the function's name in messages[{index}] {NAME_RULE}")
    return plain


def _system_message(values: Mapping[str, Any], has_tools: bool) -> _Parts:
    _check_variables(values)
    about = [
        values["model_identity"],
        values["knowledge_cutoff"] and f"Knowledge cutoff: {values['knowledge_cutoff']}",
        values[_DATE] and f"Current date: {values[_DATE]}",
    ]
    rule = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if has_tools:
        rule += "\nCalls to these tools must go to the commentary channel: 'functions'."
    sections = ["\n".join(filter(None, about)), f"Reasoning: {_EFFORTS[values[_EFFORT]]}", rule]
    return _render_parts(["system"], "\n\n".join(sections))


def _check_variables(values: Mapping[str, Any]) -> None:
    for name in (*_DEFAULTS, _DATE):
        require(isinstance(values[name], str), _KWARGS, f"must have a text for {name}")
    effort = values[_EFFORT]
    rule = f"must have one of {', '.join(_EFFORTS)} for {_EFFORT}, not {effort[:32]!r}"
    require(effort in _EFFORTS, _KWARGS, rule)
    if values.get("builtin_tools"):
        raise UnsupportedParameterError(f"{_KWARGS}.builtin_tools is not supported", _KWARGS)


def _developer_message(
    messages: Sequence[_Message],
    tools: Sequence[Mapping[str, Any]],
    output_schema: OutputSchema | None,
) -> tuple[_Parts, ...]:
    """Return the developer message: instructions, tools and answer format; empty without them."""
    texts = [str(message["content"]) for message in messages[: _num_instructions(messages)]]
    sections = [_INSTRUCTIONS, *texts] if any(texts) else []
    if tools:
        sections.append(declare_functions(tools))
    if output_schema is not None:
        sections += _format_sections(output_schema)
    return (_render_parts(["developer"], "\n\n".join(sections)),) if sections else ()


def _format_sections(output_schema: OutputSchema) -> list[str]:
    name = (
        output_schema.name
        if output_schema.name and is_function_name(output_schema.name)
        else _UNNAMED
    )
    schema_text = "\n".join([*comment(output_schema.description), output_schema.schema])
    return ["# Response Formats", f"## {name}", schema_text]


def _num_instructions(messages: Sequence[_Message]) -> int:
    """Return the number of system and developer messages at the start of a conversation."""
    return sum(1 for _ in takewhile(lambda message: message.get("role") in _INSTRUCTING, messages))


def _is_answer(message: _Message) -> bool:
    """Whether a message of a conversation ends a turn of the model."""
    has_text = bool(message.get("content")) or not any(map(message.get, REASONING_NAMES))
    goes_on = message.get("tool_calls") or _is_commentary(message)
    return message.get("role") == ROLE and has_text and not goes_on


def _is_commentary(message: _Message) -> bool:
    """Whether a message has the phase ``commentary``: more messages of its turn follow."""
    return message.get(PHASE) == COMMENTARY_PHASE


def _reasoning_text(message: _Message, index: int) -> str:
    """Return the reasoning of a message, which is a text or a list of text parts, as one text."""
    reasoning = next(filter(None, map(message.get, REASONING_NAMES)), "")
    parts = reasoning if isinstance(reasoning, list) else [{"type": "text", "text": reasoning}]
    reasoning = [part.get("text") if isinstance(part, dict) else None for part in parts]
    texts = [text for text in reasoning if isinstance(text, str)]
    if len(texts) != len(parts):
        raise _template_error(f"the reasoning of messages[{index}] must be a text")
    return "\n".join(texts)


def _render_parts(header: Sequence[str], text: str, end: str = END) -> _Parts:
    return [START, *header, MESSAGE, text, end]


def _without_last_end(turns: list[_Parts]) -> list[_Parts]:
    """Return the messages without the end token of the last message.

    Raises ``RequestError`` if the last message is a call or has no text.
    """
    *before, last = turns or [[""]]
    has_text = last[-1] == END and bool(last[-2])
    require(has_text, "continue_final_message", "needs a final message with content")
    return [*before, last[:-1]]


def _template_error(reason: str) -> RequestError:
    return RequestError(f"messages do not fit the model's chat template: {reason}", "messages")
