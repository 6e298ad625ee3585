"""Tools of a request, and the formats in which models write tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ToolCallFormat(Enum):
    """Format of a model's tool calls. The value has texts that occur in chat templates.

    A template has the first format whose texts all occur in it.
    ``gateway.text.tool_formats.call_syntax`` defines the delimiters of each format.
    """

    HARMONY = ("<|channel|>",)
    """``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`` (gpt-oss).
    Other messages have channels, too, so all output is parsed in this format."""
    DEEPSEEK_V3_2 = ("｜DSML｜",)
    """``<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">`` (DeepSeek V3.2)."""
    DEEPSEEK_V3 = ("<｜tool▁calls▁begin｜>", "```json")
    """``function<｜tool▁sep｜>f``, then the arguments as a block of code (DeepSeek R1, V3)."""
    DEEPSEEK_V3_1 = ("<｜tool▁calls▁begin｜>",)
    """``<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>``."""
    KIMI = ("<|tool_calls_section_begin|>",)
    """``<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>``; the text
    before the arguments is also the id of the call."""
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
    """``[TOOL_CALLS][{"name": "f", "arguments": {}}]``, one list of all calls."""

    def is_shown_by(self, template: str) -> bool:
        """Whether the source of a chat template contains the texts of the format."""
        return all(text in template for text in self.value)


class CallArguments(dict[str, Any]):
    """Arguments of an earlier tool call, which templates use as an object or as JSON text.

    DeepSeek's templates join the text with delimiters by ``+``; Harmony prompts contain the text.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text
        """JSON text as the client sent it."""

    def __add__(self, other: object) -> str:
        return self.text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self.text if isinstance(other, str) else NotImplemented


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One function that the model may call."""

    name: str
    """Name of the function: letters, digits, ``_``, ``.`` and ``-``."""
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments, an object; None if the function has no arguments."""
    is_strict: bool = True
    """Whether arguments must match the whole schema. If False, rules that a grammar cannot
    express are ignored."""
    is_shown: bool = True
    """Whether the chat template declares the tool. If False, a message declares it."""
    path: str = "tools"
    """Name of the client's field with the schema, for error messages."""
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Values derived from the schema; set by ``gateway.text.schemas.arguments``."""

    def for_template(self) -> dict[str, Any]:
        """Return the tool in OpenAI's format, for chat templates."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters or {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools of a request, at least one."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    """Whether the output must be a tool call (``tool_choice`` is ``required`` or a name)."""
    only: tuple[str, ...] = ()
    """Names of the tools that may be called; empty allows all tools."""
    is_parallel: bool = True

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """Tools that the model may call."""
        return tuple(tool for tool in self.tools if not self.only or tool.name in self.only)

    def for_template(self) -> list[dict[str, Any]]:
        """Return the shown tools in OpenAI's format, for chat templates."""
        return [tool.for_template() for tool in self.tools if tool.is_shown]
