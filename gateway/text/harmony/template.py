"""A conversation as a prompt in the Harmony format.

The prompt begins with a system message about the model. The client's ``system`` and ``developer``
messages are instructions in a developer message, which also declares the tools. Reasoning is
repeated until the model's next answer on the channel ``final``, since its calls are part of it.
Calls are written as the model writes them, with the client's own JSON text.

Source: "Harmony response format" (OpenAI, 2025), https://github.com/openai/harmony.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.field_checks import require
from gateway.core.messages import REASONING_NAMES
from gateway.core.tool_use import CallArguments, ToolForm
from gateway.text.harmony.declarations import declare_functions
from gateway.text.harmony.marks import (
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
    OPENED,
    ROLE,
    START,
)

EFFORTS = ("low", "medium", "high")
_EFFORT = "reasoning_effort"
_DEFAULTS = {
    "model_identity": "You are ChatGPT, a large language model trained by OpenAI.",
    "knowledge_cutoff": "2024-06",
    _EFFORT: "medium",
}
_DATE = "conversation_start_date"
_INSTRUCTIONS = "# Instructions"
_INSTRUCTING = ("system", "developer")
_Message = Mapping[str, Any]


def _today() -> str:
    return datetime.date.today().isoformat()


class HarmonyTemplate:
    """Takes the place of a ``ChatTemplate`` for models of this format.

    Args:
        variables: special tokens by name, for templates of clients.
        today: the date in prompts.
    """

    has_tools = True
    tool_form = ToolForm.HARMONY

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
    ) -> str:
        """The prompt of a conversation.

        Args:
            variables: ``reasoning_effort`` (low, medium, high), ``model_identity``,
                ``knowledge_cutoff`` and ``conversation_start_date``; an empty text leaves out the
                line.

        Raises:
            RequestError: a message or variable does not fit the format.
        """
        values = {**_DEFAULTS, _DATE: self._today(), **(variables or {})}
        parts = [_system(values, bool(tools)), *_developer(messages, tools or ())]
        last = len(messages) - (not add_generation_prompt)
        answers = [place for place in range(last) if _is_answer(messages[place])]
        parts += _Turns(kept_from=max(answers, default=-1) + 1).render(messages)
        if continue_final_message:
            parts[-1] = _left_open(parts[-1])
        return "".join(parts) + (OPENED if add_generation_prompt else "")


class _Turns:
    """Renders messages behind the first instructions, one after the other.

    Args:
        kept_from: place of the first message whose reasoning is repeated.
    """

    def __init__(self, kept_from: int) -> None:
        self._kept_from = kept_from
        self._names: dict[str, str] = {}
        self._last_name = ""

    def render(self, messages: Sequence[_Message]) -> list[str]:
        parts: list[str] = []
        for place, message in enumerate(messages):
            if place >= _num_instructions(messages):
                parts += self._one(message, place)
        return parts

    def _one(self, message: _Message, place: int) -> list[str]:
        role, content = str(message.get("role")), str(message.get("content") or "")
        if role == ROLE:
            return self._assistant(message, content, place)
        if role in _INSTRUCTING:
            return [_message("developer", f"{_INSTRUCTIONS}\n\n{content}")]
        if role == "user":
            return [_message("user", content)]
        if role not in ("tool", "function"):
            raise _misfit(f"it has no role {role[:64]!r} (messages[{place}])")
        header = f"{FUNCTIONS}{self._function(message, place)} to={ROLE}{CHANNEL}{COMMENTARY}"
        return [_message(header, content)]

    def _assistant(self, message: _Message, content: str, place: int) -> list[str]:
        reasoning, calls = _reasoning(message, place), message.get("tool_calls") or ()
        parts = []
        if reasoning and place >= self._kept_from:
            parts.append(_message(f"{ROLE}{CHANNEL}{ANALYSIS}", reasoning))
        if content or not (reasoning or calls):
            parts.append(_message(f"{ROLE}{CHANNEL}{COMMENTARY if calls else FINAL}", content))
        return parts + [self._call(call) for call in calls]

    def _call(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        self._last_name = self._names[str(call.get("id"))] = function["name"]
        to = f"to={FUNCTIONS}{function['name']} {CONSTRAIN}json"
        arguments: CallArguments = function["arguments"]
        header = f"{ROLE}{CHANNEL}{COMMENTARY} {to}"
        return _message(header, arguments.text.strip() or "{}", CALL)

    def _function(self, message: _Message, place: int) -> str:
        """Whose result a message is: of the call that it names, else of the last call."""
        known = self._names.get(str(message.get("tool_call_id")))
        name = known or str(message.get("name") or "") or self._last_name
        if not name:
            raise _misfit(f"messages[{place}] is the result of no call")
        return name.removeprefix(FUNCTIONS)


def _system(values: Mapping[str, Any], has_tools: bool) -> str:
    _check(values)
    about = [
        values["model_identity"],
        values["knowledge_cutoff"] and f"Knowledge cutoff: {values['knowledge_cutoff']}",
        values[_DATE] and f"Current date: {values[_DATE]}",
    ]
    rule = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if has_tools:
        rule += "\nCalls to these tools must go to the commentary channel: 'functions'."
    sections = ["\n".join(filter(None, about)), f"Reasoning: {values[_EFFORT]}", rule]
    return _message("system", "\n\n".join(sections))


def _check(values: Mapping[str, Any]) -> None:
    field = "chat_template_kwargs"
    for name in (*_DEFAULTS, _DATE):
        require(isinstance(values[name], str), field, f"must have a text for {name}")
    effort = values[_EFFORT]
    rule = f"({effort[:32]!r}) must be {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}"
    require(effort in EFFORTS, _EFFORT, rule)
    if values.get("builtin_tools"):
        raise UnsupportedParameterError(f"{field}.builtin_tools is not supported", field)


def _developer(
    messages: Sequence[_Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[str] | tuple[()]:
    """The message of the first instructions and the tools, if there are any."""
    texts = [str(message["content"]) for message in messages[: _num_instructions(messages)]]
    sections = [_INSTRUCTIONS, *texts] if any(texts) else []
    if tools:
        sections.append(declare_functions(tools))
    return (_message("developer", "\n\n".join(sections)),) if sections else ()


def _num_instructions(messages: Sequence[_Message]) -> int:
    """Messages at the beginning that instruct."""
    return sum(1 for _ in takewhile(lambda message: message.get("role") in _INSTRUCTING, messages))


def _is_answer(message: _Message) -> bool:
    """Whether a message ends a turn of the model."""
    has_text = bool(message.get("content")) or not any(map(message.get, REASONING_NAMES))
    return message.get("role") == ROLE and has_text and not message.get("tool_calls")


def _reasoning(message: _Message, place: int) -> str:
    found = next(filter(None, map(message.get, REASONING_NAMES)), "")
    if not isinstance(found, str):
        raise _misfit(f"the reasoning of messages[{place}] must be a text")
    return found


def _message(header: str, text: str, end: str = END) -> str:
    return f"{START}{header}{MESSAGE}{text}{end}"


def _left_open(part: str) -> str:
    text = part.removesuffix(END)
    has_text = text != part and not text.endswith(MESSAGE)
    require(has_text, "continue_final_message", "needs a final message with content")
    return text


def _misfit(reason: str) -> RequestError:
    return RequestError(f"messages do not fit the model's chat template: {reason}", "messages")
