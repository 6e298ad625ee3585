"""Tools that a request offers to the model, and the forms in which models call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class ToolForm(Enum):
    """How a model writes a call; the value is text by which a chat template shows the form."""

    HERMES = "<tool_call>"
    """``<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>`` (Qwen, Hermes). The value is
    the text before a call."""
    MISTRAL = "[TOOL_CALLS]"
    """``[TOOL_CALLS][{"name": "f", "arguments": {}}]``, a list of all calls (Mistral). The value is
    the text before the list."""
    HARMONY = "<|channel|>"
    """``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`` (gpt-oss).
    Messages that are no calls have a channel, too, so that every answer is read by this form."""


class CallArguments(dict[str, Any]):
    """Arguments of an earlier call: templates read the object, Harmony prompts its JSON text."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text
        """As the client sent it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One function that the model may call."""

    name: str
    """Letters, digits, ``_``, ``.`` and ``-``."""
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """JSON schema of its arguments, an object; None takes none."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters or {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools of a request; at least one."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    """The answer is a call (``tool_choice`` required, or a name)."""
    only: tuple[str, ...] = ()
    """Names of the tools that may be called; empty allows all."""
    is_parallel: bool = True

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """Tools that the answer may call."""
        return tuple(tool for tool in self.tools if not self.only or tool.name in self.only)

    def for_template(self) -> list[dict[str, Any]]:
        """All tools as chat templates read them."""
        return [tool.for_template() for tool in self.tools]
