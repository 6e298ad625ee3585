"""Tools of a body, and the choice of the tools that may be called.

A custom tool takes any text. It is declared to the model as a function with one argument ``input``,
which ``CustomInputReader`` extracts. A tool of a namespace is declared under the joined names of
both, for example ``mcp__files__read``; items have two separate fields, as Codex requires.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.field_checks import require
from gateway.core.tool_use import Tool, ToolUse
from gateway.responses.schema import ChosenToolBody, NamedToolBody, OfferedToolBody, ResponseBody
from gateway.text.tool_formats.tools import ToolFieldNames, make_tool_use

KINDS = ("function", "custom")
NAMESPACE = "namespace"
INPUT = "input"
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')
_INCOMPLETE_ESCAPE = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z")
_BACKSLASH = re.compile(rf"({_ESCAPE.pattern})|\\")
_HIGH_SURROGATE = re.compile(r"\\u[dD][89abAB]")
_MODES = ("auto", "required")
_NAMES = ToolFieldNames(name="name", parameters="parameters")


@dataclass(frozen=True, slots=True)
class ToolName:
    """Name of a tool in items, with its namespace; ``for_model`` joins both."""

    name: str
    namespace: str | None = None

    @property
    def for_model(self) -> str:
        return self.name if self.namespace is None else f"{self.namespace}__{self.name}"


@dataclass(frozen=True, slots=True)
class _OfferedTool:
    """One tool of a body, with its namespace."""

    tool: OfferedToolBody
    path: str
    namespace: str | None = None
    preface: str | None = None
    """Description of the namespace, which only the first tool of the namespace has."""

    @property
    def name(self) -> ToolName:
        return ToolName(self.tool.name or "", self.namespace)


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools of a body."""

    tool_use: ToolUse | None
    """Tools and tool choice for the model; None without tools."""
    custom_names: frozenset[str]
    """Names of the custom tools, as declared to the model."""
    namespaced_names: Mapping[str, ToolName]
    """Tools of namespaces, by the name that is declared to the model."""


def read_tools(body: ResponseBody) -> OfferedTools:
    """Read the tools of a body. Raises ``RequestError``, which names the invalid field."""
    offers = list(_offers(body))
    tools = [_tool(offer) for offer in offers]
    custom = frozenset(one.name.for_model for one in offers if one.tool.type == "custom")
    namespaced = {one.name.for_model: one.name for one in offers if one.namespace is not None}
    use = _tool_use(body, tools, custom, [offer.path for offer in offers])
    return OfferedTools(use, custom, namespaced)


def _offers(body: ResponseBody) -> Iterator[_OfferedTool]:
    for index, tool in enumerate(body.tools or ()):
        path = f"tools[{index}]"
        if tool.type != NAMESPACE:
            yield _OfferedTool(tool, path)
            continue
        if tool.name is None:
            raise RequestError.missing(f"{path}.name")
        require(bool(tool.name), f"{path}.name", "must not be empty")
        for inner_index, inner in enumerate(tool.tools or ()):
            preface = tool.description if inner_index == 0 else None
            yield _OfferedTool(inner, f"{path}.tools[{inner_index}]", tool.name, preface)


def _tool_use(
    body: ResponseBody, tools: Sequence[Tool], custom: frozenset[str], paths: Sequence[str]
) -> ToolUse | None:
    choice, is_parallel, names = body.tool_choice, body.parallel_tool_calls, _names(paths)
    if not isinstance(choice, ChosenToolBody):
        return make_tool_use(tools, choice, is_parallel=is_parallel, names=names)
    if choice.type == "allowed_tools":
        among = _allowed_names(choice.tools or (), custom)
        mode = choice.mode
        rule = f"({str(mode)[:32]!r}) must be one of {', '.join(_MODES)}"
        require(mode in _MODES, "tool_choice.mode", rule)
        return make_tool_use(tools, mode, is_parallel=is_parallel, among=among, names=names)
    name = _referenced_name(choice.type, choice.name, custom, "tool_choice")
    return make_tool_use(tools, name=name, is_parallel=is_parallel, names=names)


def _names(paths: Sequence[str]) -> ToolFieldNames:
    return replace(_NAMES, entries=tuple(paths))


def _tool(offer: _OfferedTool) -> Tool:
    tool, path = offer.tool, offer.path
    if tool.type not in KINDS:
        raise UnsupportedParameterError(
            f"{path}.type: tools of type {tool.type[:64]!r} are not supported, only functions, "
            "custom tools and namespaces of them",
            f"{path}.type",
        )
    if tool.name is None:
        raise RequestError.missing(f"{path}.name")
    name = offer.name.for_model
    description = "\n".join(filter(None, [offer.preface, tool.description])) or None
    if tool.type == "function":
        return Tool(
            name=name,
            description=description,
            parameters=tool.parameters,
            is_strict=bool(tool.strict),
        )
    if tool.format is not None and tool.format.type != "text":
        raise UnsupportedParameterError(
            f"{path}.format: the format {tool.format.type[:32]!r} is not supported, only text",
            f"{path}.format",
        )
    return Tool(name=name, description=description, parameters=_CUSTOM_PARAMETERS)


def _allowed_names(tools: Sequence[NamedToolBody], custom: frozenset[str]) -> tuple[str, ...]:
    require(len(tools) > 0, "tool_choice.tools", "must not be empty")
    names = [
        _referenced_name(tool.type, tool.name, custom, f"tool_choice.tools[{index}]")
        for index, tool in enumerate(tools)
    ]
    return tuple(dict.fromkeys(names))


def _referenced_name(kind: str, name: str | None, custom: frozenset[str], path: str) -> str:
    """Check a reference to a tool and return its ``name``. Raises ``RequestError``."""
    if kind not in KINDS:
        message = f"{path}.type: tools of type {kind[:64]!r} are not supported"
        raise UnsupportedParameterError(message, f"{path}.type")
    if name is None:
        raise RequestError.missing(f"{path}.name")
    rule = f"({name[:64]!r}) must be the name of a tool of type {kind}"
    require((name in custom) is (kind == "custom"), f"{path}.name", rule)
    return name


def response_tools(body: ResponseBody) -> list[dict[str, Any]]:
    """Return the field ``tools`` of the response."""
    return [_shown(tool) for tool in body.tools or ()]


def _shown(tool: OfferedToolBody) -> dict[str, Any]:
    head: dict[str, Any] = {"type": tool.type, "name": tool.name, "description": tool.description}
    if tool.type == NAMESPACE:
        return {**head, "tools": [_shown(inner) for inner in tool.tools or ()]}
    if tool.type == "custom":
        return {**head, "format": {"type": "text"}}
    return {**head, "parameters": tool.parameters, "strict": bool(tool.strict)}


def response_tool_choice(body: ResponseBody) -> str | dict[str, Any]:
    """Return the field ``tool_choice`` of the response."""
    choice = body.tool_choice
    if isinstance(choice, ChosenToolBody):
        return choice.model_dump(exclude_none=True)
    return choice or "auto"


class CustomInputReader:
    """Incrementally extracts the input text from the arguments of a custom tool call.

    A backslash that begins no escape of JSON is part of the text.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._is_open = False
        self._is_over = False

    def feed(self, arguments: str) -> str:
        """Add a piece of the arguments; return the input text that has become available."""
        self._pending += arguments
        if not self._is_open:
            opening = _OPENING.match(self._pending)
            if opening is None:
                return ""
            self._is_open, self._pending = True, self._pending[opening.end() :]
        return "" if self._is_over else self._read()

    def _read(self) -> str:
        text, position = self._pending, 0
        while position < len(text) and text[position] != '"':
            if not (end := _end_of_character(text, position)):
                break
            position = end
        self._is_over = text[position : position + 1] == '"'
        self._pending = text[position:]
        escaped = _BACKSLASH.sub(lambda match: match[0] if match[1] else r"\\", text[:position])
        read = str(json.loads(f'"{escaped}"', strict=False))
        return read.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _end_of_character(text: str, position: int) -> int:
    """Return the end of the character at ``position`` of a JSON string; 0 if it is incomplete."""
    if text[position] != "\\":
        return position + 1
    escape = _ESCAPE.match(text, position)
    if escape is None:
        return 0 if _INCOMPLETE_ESCAPE.match(text, position) else position + 1
    end = escape.end()
    if not _HIGH_SURROGATE.match(escape[0]):
        return end
    if (low := _ESCAPE.match(text, end)) is not None:  # the low surrogate
        return low.end()
    return 0 if _INCOMPLETE_ESCAPE.match(text, end) else end
