"""Checks the tools of a request, and reads the tool calls of earlier messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.checks import is_deeper
from cluster.core.errors import RequestError
from gateway.core.field_checks import check_length, require
from gateway.core.tool_use import CallArguments, Tool, ToolUse
from gateway.offload.json_text import check_writable, load_json
from gateway.text.schemas.references import MAX_SCHEMA_DEPTH

MAX_TOOLS = 128
NAME_RULE = "must be 1 to 128 letters, digits, _, . or -"
MAX_SHOWN_DEPTH = 64
"""Maximum nesting of the schema of a tool that is not strict. Grammars use only the first
``MAX_SCHEMA_DEPTH`` levels of the schema."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_SHOWN_CHARS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFieldNames:
    """Field names of an entry of ``tools`` in a protocol, for error messages."""

    name: str = "function.name"
    parameters: str = "function.parameters"
    entries: Sequence[str] = ()
    """Names of the entries of ``tools``; empty means ``tools[0]`` and so on."""


def make_tool_use(
    tools: Sequence[Tool],
    choice: str | None = None,
    name: str | None = None,
    is_parallel: bool | None = None,
    *,
    among: Collection[str] = (),
    names: ToolFieldNames | None = None,
) -> ToolUse | None:
    """Check the tools of a request; return None if no tool is declared to the model.

    Args:
        tools: the offered tools.
        choice: ``none``, ``auto`` or ``required``. None is ``auto`` with tools, else ``none``.
        name: the tool that must be called, in place of ``choice``.
        is_parallel: ``parallel_tool_calls``.
        among: names of the tools that may be called; empty allows all.
        names: field names of the protocol; None uses OpenAI's.

    Raises:
        RequestError: a field is invalid; the error names the field.
    """
    field = "tool_choice"
    choices = ("none", "auto", "required")
    rule = f"({str(choice)[:32]!r}) must be {', '.join(choices)} or name a function"
    require(choice is None or choice in choices, field, rule)
    needs = name is not None or choice == "required"
    require(bool(tools) or not needs, field, "needs tools")
    tools = _check_tools(tools, names or ToolFieldNames())
    only = tuple(among) if name is None else (name,)
    if not tools or (choice == "none" and name is None):
        return None
    offered = {tool.name for tool in tools}
    for one in only:
        rule = f"names {one[:_SHOWN_CHARS]!r}, which is not among tools"
        require(one in offered, field, rule)
    return ToolUse(
        tools=tuple(tools), must_call=needs, only=only, is_parallel=is_parallel is not False
    )


def _check_tools(tools: Sequence[Tool], names: ToolFieldNames) -> list[Tool]:
    """Check the tools; return copies with ``path`` set. Raises ``RequestError``."""
    check_length("tools", len(tools), MAX_TOOLS)
    checked: list[Tool] = []
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        entry = names.entries[index] if names.entries else f"tools[{index}]"
        path = f"{entry}.{names.name}"
        require(is_function_name(tool.name), path, f"({tool.name[:_SHOWN_CHARS]!r}) {NAME_RULE}")
        if tool.name in seen:
            raise RequestError(f"tools has {tool.name!r} twice", path)
        seen.add(tool.name)
        checked.append(replace(tool, path=f"{entry}.{names.parameters}"))
        _check_schema(checked[-1])
    return checked


def _check_schema(tool: Tool) -> None:
    """Check the nesting and the values of a tool's schema, and that it describes an object."""
    schema = tool.parameters or {}
    kind = schema.get("type", "object")
    is_object = "object" in kind if isinstance(kind, list) else kind == "object"
    require(is_object, tool.path, "must be a JSON schema of an object")
    max_depth = MAX_SCHEMA_DEPTH if tool.is_strict else MAX_SHOWN_DEPTH
    rule = f"is nested too deeply: at most {max_depth} levels"
    require(not is_deeper(schema, max_depth), tool.path, rule)
    try:
        check_writable(schema)
    except ValueError as err:
        message = f"{tool.path} contains a value that JSON cannot represent"
        raise RequestError(message, tool.path) from err


def is_function_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def template_call(call_id: str | None, name: str, arguments: str, path: str) -> dict[str, Any]:
    """Return a tool call of an earlier message as chat templates read it.

    The templates read the arguments as an object; ``path`` names the call in errors.
    """
    value = json_object(arguments, f"{path}.function.arguments")
    function = {"name": name, "arguments": CallArguments(value, arguments)}
    named = {} if call_id is None else {"id": call_id}
    return {**named, "type": "function", "function": function}


def json_object(text: str, name: str) -> dict[str, Any]:
    """Return the object in a JSON text; empty for an empty text.

    Raises ``RequestError`` for the field ``name`` if the text is not a JSON object.
    """
    if not text.strip():
        return {}
    try:
        value = load_json(text, name)
        check_writable(value)
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{name} must be JSON text", name) from err
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be the JSON text of an object", name)
    return value
