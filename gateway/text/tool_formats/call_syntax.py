"""The syntax of tool calls in each format, for the parser and for grammars.

A call consists of a delimiter, a head that names the function, the arguments and a tail. Some
formats have a section around all calls. The texts of this module include the white space that
models write between delimiters; the parser accepts any white space, or none.

Sources: chat templates of Qwen3-Coder, GLM-4.6 and 4.7, DeepSeek V3, V3.1 and V3.2, Kimi K2 and
MiniMax-M2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType

from gateway.core.tool_use import ToolCallFormat


class Placeholder(Enum):
    """A variable part in the syntax of a tool call."""

    NAME = auto()
    """Name of the called function."""
    NUMBER = auto()
    """Number of the call, in digits."""
    KEY = auto()
    """Name of an argument, up to the next fixed text."""
    IS_TEXT = auto()
    """``true`` or ``false``, which states whether an argument's value is a text."""
    BREAK = auto()
    """Optional line break, which some versions of the model write."""


Part = str | Placeholder


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSyntax:
    """Syntax of arguments that are written one by one, each with a name and a value."""

    head: tuple[Part, ...]
    """Parts before the value of an argument, including the argument's name."""
    end: str
    """Delimiter after the value of an argument. The value cannot contain the delimiter."""
    close: str
    """Delimiter after the last argument of a call."""
    has_breaks: bool = False
    """Whether a line break before and after a value is not part of the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSyntax:
    """Syntax of tool calls in one format."""

    section: str = ""
    """Delimiter before the first call of an answer; empty if the format has no section of calls."""
    begin: str
    """Delimiter before each call; only before the first call if ``next_begin`` is set."""
    next_begin: str = ""
    """Delimiter before all calls except the first; empty means ``begin``."""
    head: tuple[Part, ...]
    """Parts between the delimiter of a call and its arguments, including the function's name."""
    pairs: PairSyntax | None = None
    """Syntax of individual arguments; None if the arguments are a JSON object."""
    tail: tuple[Part, ...] = ()
    """Parts after the arguments of a call."""
    section_end: str = ""
    """Delimiter after the last call of an answer; empty if the format has no section of calls."""

    @property
    def first_delimiter(self) -> str:
        """First delimiter of an answer with calls: ``section``, or ``begin`` without a section."""
        return self.section or self.begin

    @property
    def texts_after_head(self) -> tuple[str, ...]:
        """Texts that may follow the head of a call, without white space."""
        if self.pairs is None:
            return ("{",)
        first = self.pairs.head[0]
        assert isinstance(first, str), "arguments begin with a delimiter"
        return first, self.pairs.close


_JSON_HEAD: tuple[Part, ...] = ('{"name": "', Placeholder.NAME, '", "arguments": ')
_GLM_PAIRS = PairSyntax(
    head=("<arg_key>", Placeholder.KEY, "</arg_key>", Placeholder.BREAK, "<arg_value>"),
    end="</arg_value>",
    close="</tool_call>",
)
_QWEN_PAIRS = PairSyntax(
    head=("<parameter=", Placeholder.KEY, ">"),
    end="</parameter>",
    close="</function>",
    has_breaks=True,
)
_MINIMAX_PAIRS = PairSyntax(
    head=('<parameter name="', Placeholder.KEY, '">'), end="</parameter>", close="</invoke>"
)
_DSML_PAIRS = PairSyntax(
    head=('<｜DSML｜parameter name="', Placeholder.KEY, '" string="', Placeholder.IS_TEXT, '">'),
    end="</｜DSML｜parameter>",
    close="</｜DSML｜invoke>",
)
_SEPARATOR, _CALL_END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_V3_1 = CallSyntax(
    section="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁call▁begin｜>",
    head=(Placeholder.NAME, _SEPARATOR),
    tail=(_CALL_END,),
    section_end="<｜tool▁calls▁end｜>",
)

SYNTAXES: Mapping[ToolCallFormat, CallSyntax] = MappingProxyType(
    {
        ToolCallFormat.DEEPSEEK_V3_2: CallSyntax(
            section="<｜DSML｜function_calls>",
            begin='<｜DSML｜invoke name="',
            head=(Placeholder.NAME, '">', Placeholder.BREAK),
            pairs=_DSML_PAIRS,
            section_end="</｜DSML｜function_calls>",
        ),
        ToolCallFormat.DEEPSEEK_V3: replace(
            _DEEPSEEK_V3_1,
            head=("function", _SEPARATOR, Placeholder.NAME, "\n```json\n"),
            tail=("\n```", _CALL_END),
        ),
        ToolCallFormat.DEEPSEEK_V3_1: _DEEPSEEK_V3_1,
        ToolCallFormat.KIMI: CallSyntax(
            section="<|tool_calls_section_begin|>",
            begin="<|tool_call_begin|>",
            head=(
                "functions.",
                Placeholder.NAME,
                ":",
                Placeholder.NUMBER,
                "<|tool_call_argument_begin|>",
            ),
            tail=("<|tool_call_end|>",),
            section_end="<|tool_calls_section_end|>",
        ),
        ToolCallFormat.MINIMAX: CallSyntax(
            section="<minimax:tool_call>",
            begin='<invoke name="',
            head=(Placeholder.NAME, '">', Placeholder.BREAK),
            pairs=_MINIMAX_PAIRS,
            section_end="</minimax:tool_call>",
        ),
        ToolCallFormat.GLM: CallSyntax(
            begin="<tool_call>", head=(Placeholder.NAME, Placeholder.BREAK), pairs=_GLM_PAIRS
        ),
        ToolCallFormat.QWEN_CODER: CallSyntax(
            begin="<tool_call>",
            head=("\n<function=", Placeholder.NAME, ">\n"),
            pairs=_QWEN_PAIRS,
            tail=("\n", "</tool_call>"),
        ),
        ToolCallFormat.HERMES: CallSyntax(
            begin="<tool_call>", head=("\n", *_JSON_HEAD), tail=("}\n", "</tool_call>")
        ),
        ToolCallFormat.MISTRAL: CallSyntax(
            section="[TOOL_CALLS]",
            begin="[",
            next_begin=", ",
            head=_JSON_HEAD,
            tail=("}",),
            section_end="]",
        ),
    }
)
"""Syntax of each tool call format except Harmony, which has a separate parser and grammar."""
