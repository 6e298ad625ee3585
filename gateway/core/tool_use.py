"""Tools that a request offers to the model, and the forms in which models call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ToolForm(Enum):
    """How a model writes a call; the value is what a chat template that shows the form holds.

    A template is of the first form whose texts it all holds. ``gateway.text.forms.call_syntax``
    has the marks of each.
    """

    HARMONY = ("<|channel|>",)
    """``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`` (gpt-oss).
    Messages that are no calls have a channel, too, so that every answer is read by this form."""
    DEEPSEEK_V3_2 = ("｜DSML｜",)
    """``<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">`` and so on."""
    DEEPSEEK_V3 = ("<｜tool▁calls▁begin｜>", "```json")
    """``function<｜tool▁sep｜>f``, then the arguments as a block of code (DeepSeek R1, V3)."""
    DEEPSEEK_V3_1 = ("<｜tool▁calls▁begin｜>",)
    """``<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>``."""
    KIMI = ("<|tool_calls_section_begin|>",)
    """``<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>``, where
    the text before the arguments is also the call's id."""
    MINIMAX = ("<minimax:tool_call>",)
    """``<invoke name="f"><parameter name="a">1</parameter></invoke>``, without white space."""
    GLM = ("<tool_call>", "<arg_key>")
    """``<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`` (GLM-4.5 to 4.7)."""
    QWEN_CODER = ("<tool_call>", "<function=", "<parameter=")
    """``<tool_call><function=f><parameter=a>1</parameter></function></tool_call>``, with line
    breaks (Qwen3-Coder, Qwen3.5)."""
    HERMES = ("<tool_call>",)
    """``<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>`` (Qwen, Hermes)."""
    MISTRAL = ("[TOOL_CALLS]",)
    """``[TOOL_CALLS][{"name": "f", "arguments": {}}]``, a list of all calls."""

    def is_shown_by(self, template: str) -> bool:
        """Whether the source of a chat template holds the form's texts."""
        return all(text in template for text in self.value)


class CallArguments(dict[str, Any]):
    """Arguments of an earlier call: most templates read the object, some its JSON text.

    Templates of DeepSeek join the text with marks by ``+``; Harmony prompts repeat it.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text
        """As the client sent it."""

    def __add__(self, other: object) -> str:
        return self.text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self.text if isinstance(other, str) else NotImplemented


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One function that the model may call."""

    name: str
    """Letters, digits, ``_``, ``.`` and ``-``."""
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """JSON schema of its arguments, an object; None takes none."""
    is_strict: bool = True
    """Arguments follow all of the schema; else what grammars cannot express of it has no effect."""
    is_shown: bool = True
    """Among the tools of the chat template; else a message of the conversation shows it."""
    path: str = "tools"
    """The client's field that has its schema, for messages."""
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was found of its schema; filled by ``gateway.text.schemas.arguments``."""

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
        """The tools that chat templates show, as they read them."""
        return [tool.for_template() for tool in self.tools if tool.is_shown]
