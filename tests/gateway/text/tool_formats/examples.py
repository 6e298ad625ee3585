"""Calls as models of each form write them, and what parsers make of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece, ParsedText

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"enum": ["metric", "imperial"]},
        "where": {"type": ["string", "null"]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}},
        "is_short": {"type": "boolean"},
        "note": {},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
TOOLS = (Tool(name="weather", parameters=WEATHER), Tool(name="now"))
USE = ToolUse(tools=TOOLS)
Calls = Iterable[tuple[str, Mapping[str, Any]]]
MARKS: dict[ToolCallFormat, tuple[str, ...]] = {
    ToolCallFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolCallFormat.MISTRAL: ("[TOOL_CALLS]",),
    ToolCallFormat.QWEN_CODER: (
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "</function>",
        "<parameter=",
        "</parameter>",
    ),
    ToolCallFormat.GLM: (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    ToolCallFormat.DEEPSEEK_V3: (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    ToolCallFormat.DEEPSEEK_V3_2: (
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
        "<｜DSML｜invoke",
        "</｜DSML｜invoke>",
        "<｜DSML｜parameter",
        "</｜DSML｜parameter>",
    ),
    ToolCallFormat.MINIMAX: (
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        "<invoke",
        "</invoke>",
        "<parameter",
        "</parameter>",
    ),
    ToolCallFormat.KIMI: (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    ),
}
MARKS[ToolCallFormat.DEEPSEEK_V3_1] = MARKS[ToolCallFormat.DEEPSEEK_V3]
TOKENS = tuple(
    dict.fromkeys(
        ["<think>", "</think>", "｜DSML｜"]
        + [
            mark
            for form, marks in MARKS.items()
            for mark in marks
            if form
            not in (ToolCallFormat.QWEN_CODER, ToolCallFormat.DEEPSEEK_V3_2, ToolCallFormat.MISTRAL)
            and mark.endswith(">")
            and "param" not in mark
            and "invoke" not in mark
        ]
    )
)
"""Marks that are tokens of the models' vocabularies."""


def written(form: ToolCallFormat, calls: Calls) -> str:
    """Calls in one form."""
    given = [(name, dict(arguments)) for name, arguments in calls]
    match form:
        case ToolCallFormat.HERMES:
            return "\n".join(
                f'<tool_call>\n{{"name": "{name}", "arguments": {_json(args)}}}\n</tool_call>'
                for name, args in given
            )
        case ToolCallFormat.MISTRAL:
            listed = [f'{{"name": "{name}", "arguments": {_json(args)}}}' for name, args in given]
            return f"[TOOL_CALLS][{', '.join(listed)}]"
        case ToolCallFormat.QWEN_CODER:
            return "\n".join(
                f"<tool_call>\n<function={name}>\n"
                + "".join(f"<parameter={k}>\n{_plain(v)}\n</parameter>\n" for k, v in args.items())
                + "</function>\n</tool_call>"
                for name, args in given
            )
        case ToolCallFormat.GLM:
            return "\n".join(
                f"<tool_call>{name}\n"
                + "".join(
                    f"<arg_key>{k}</arg_key>\n<arg_value>{_plain(v)}</arg_value>\n"
                    for k, v in args.items()
                )
                + "</tool_call>"
                for name, args in given
            )
        case ToolCallFormat.DEEPSEEK_V3:
            inner = "\n".join(
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(args)}\n```"
                "<｜tool▁call▁end｜>"
                for name, args in given
            )
            return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
        case ToolCallFormat.DEEPSEEK_V3_1:
            inner = "".join(
                f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(args)}<｜tool▁call▁end｜>"
                for name, args in given
            )
            return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
        case ToolCallFormat.DEEPSEEK_V3_2:
            return _invocations(given, "｜DSML｜", "<｜DSML｜function_calls>", True)
        case ToolCallFormat.MINIMAX:
            return _invocations(given, "", "<minimax:tool_call>", False)
        case ToolCallFormat.KIMI:
            inner = "".join(
                f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>"
                f"{_json(args)}<|tool_call_end|>"
                for place, (name, args) in enumerate(given)
            )
            return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
        case ToolCallFormat.HARMONY:
            return "<|end|><|start|>assistant".join(
                f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
                f"{_json(args)}"
                for name, args in given
            )


def _invocations(
    calls: list[tuple[str, dict[str, Any]]], prefix: str, section: str, says_kind: bool
) -> str:
    lines = [section]
    for name, arguments in calls:
        lines.append(f'<{prefix}invoke name="{name}">')
        for key, value in arguments.items():
            kind = f' string="{_json(isinstance(value, str))}"' if says_kind else ""
            opening, closing = f'<{prefix}parameter name="{key}"{kind}>', f"</{prefix}parameter>"
            lines.append(f"{opening}{_plain(value)}{closing}")
        lines.append(f"</{prefix}invoke>")
    return "\n".join([*lines, section.replace("<", "</")])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


class Parser(Protocol):
    """What reads one answer."""

    @property
    def has_calls(self) -> bool: ...

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece: ...


def read(parser: Parser, pieces: Iterable[str]) -> tuple[list[tuple[str, str]], bool]:
    """Kinds and texts in the order of the answer, and whether it ends with calls.

    Kinds are ``reasoning``, ``content`` and ``0 weather``, for example: place and name of a call.
    """
    parsed = [parser.feed(piece) for piece in pieces]
    parsed.append(parser.feed("", is_last=True))
    return in_order(parsed), parser.has_calls


def in_order(parsed: Iterable[ParsedPiece]) -> list[tuple[str, str]]:
    """The parts of pieces, with neighbours of one kind joined."""
    found: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    for part in (part for piece in parsed for part in piece.ordered_parts()):
        kind, text = _named(part, names)
        if found and found[-1][0] == kind:
            kind, text = kind, found.pop()[1] + text
        found.append((kind, text))
    return found


def _named(part: ParsedText | CallDelta, names: dict[int, str]) -> tuple[str, str]:
    if isinstance(part, ParsedText):
        return ("reasoning" if part.is_reasoning else "content"), part.text
    assert (part.name is None) is (part.call_id is None)
    if part.name is not None:
        assert part.index == len(names), "calls are numbered as they come"
        names[part.index] = part.name
    return f"{part.index} {names[part.index]}", part.arguments
