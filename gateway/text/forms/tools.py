"""Tools that a model may call: what a request offers, and the grammar that its calls must follow.

Both codecs come through here. A model that can call tools shows its form in its chat template; the
grammar makes every call well-formed: the name is one that was offered, and the arguments follow
that tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import check_length, is_deeper, require
from gateway.core.tool_use import CallArguments, Tool, ToolForm, ToolUse
from gateway.text.forms.call_grammar import (
    ANY_TEXT,
    FIELD,
    call_rules,
    check_goes_with_tools,
    json_rule,
    mark,
)
from gateway.text.forms.structured import MAX_SCHEMA_DEPTH
from workers.requests.request import Grammar, GrammarKind

MAX_TOOLS = 128
NAME_RULE = "must be 1 to 64 letters, digits, _, . or -"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldNames:
    """What a protocol calls the parts of an entry of ``tools``, for messages."""

    name: str = "function.name"
    parameters: str = "function.parameters"


def make_tool_use(
    tools: Sequence[Tool],
    choice: str | None = None,
    name: str | None = None,
    is_parallel: bool | None = None,
    *,
    names: FieldNames | None = None,
    among: Collection[str] = (),
) -> ToolUse | None:
    """What was asked for, checked; None where the model is to know of no tool.

    Args:
        tools: those offered.
        choice: ``none``, ``auto`` or ``required``; None is ``auto`` with tools, else ``none``.
        name: the one that must be called, in place of ``choice``.
        is_parallel: ``parallel_tool_calls``.
        names: of the protocol; None is OpenAI's.
        among: names of those that may be called; empty allows all.

    Raises:
        RequestError: names the field.
    """
    field = "tool_choice"
    known = ("none", "auto", "required")
    rule = f"({str(choice)[:32]!r}) must be {', '.join(known)} or name a function"
    require(choice is None or choice in known, field, rule)
    needs = name is not None or choice == "required"
    require(bool(tools) or not needs, field, "needs tools")
    _check(tools, names or FieldNames())
    only = tuple(among) if name is None else (name,)
    if not tools or (choice == "none" and name is None):
        return None
    offered = {tool.name for tool in tools}
    for one in only:
        require(one in offered, field, f"names {one[:64]!r}, which is not among tools")
    return ToolUse(
        tools=tuple(tools), must_call=needs, only=only, is_parallel=is_parallel is not False
    )


def _check(tools: Sequence[Tool], names: FieldNames) -> None:
    check_length("tools", len(tools), MAX_TOOLS)
    seen: set[str] = set()
    for place, tool in enumerate(tools):
        path = f"tools[{place}].{names.name}"
        require(is_name(tool.name), path, f"({tool.name[:64]!r}) {NAME_RULE}")
        if tool.name in seen:
            raise RequestError(f"tools has {tool.name!r} twice", path)
        seen.add(tool.name)
        schema = tool.parameters or {}
        kind = schema.get("type", "object")
        name = f"tools[{place}].{names.parameters}"
        require(kind == "object", name, "must be a JSON schema of an object")
        deep = is_deeper(schema, MAX_SCHEMA_DEPTH)
        require(not deep, name, f"is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels")


def is_name(text: str) -> bool:
    """Whether a function may be called so."""
    return _NAME.fullmatch(text) is not None


def tool_grammar(
    use: ToolUse, form: ToolForm, special_ids: Mapping[str, int], answer: Grammar | None
) -> Grammar:
    """What an answer must follow: free text (or ``answer``) or calls.

    Args:
        use: what may be called, and whether something must be.
        form: how.
        special_ids: special tokens by text; marks among them can be written in no other way.
        answer: what the answer must follow where it is not a call.

    Raises:
        RequestError: the tools are too large, or ``answer`` cannot go with tools.
    """
    check_goes_with_tools(answer)
    schema = None if use.must_call or answer is None else answer.text
    opening = {tool.name: f'{{"name": "{tool.name}", "arguments": ' for tool in use.allowed}
    around = {name: (json.dumps(text), '"}"') for name, text in opening.items()}
    lines = [_start(use, form, special_ids, schema), *call_rules(use.allowed, around)]
    return Grammar(kind=GrammarKind.LARK, text="\n".join(lines) + "\n", field=FIELD)


def _start(use: ToolUse, form: ToolForm, special_ids: Mapping[str, int], schema: str | None) -> str:
    begin = mark(form.value, special_ids)
    if form is ToolForm.HERMES:
        end = mark("</tool_call>", special_ids)
        body, more = rf'"\n" call "\n" {end}', rf'("\n" {begin} "\n" call "\n" {end})*'
    else:
        repeated = '(", " call)*' if use.is_parallel else ""
        body, more = f'" "? "[" call {repeated} "]"', ""
    if not use.is_parallel:
        more = ""
    if use.must_call:
        return f"start: {begin} {body} {more}"
    if schema is not None:
        return f"start: answer | {begin} {body} {more}\nanswer: {json_rule(json.loads(schema))}"
    if form.value in special_ids:  # the text can never hold the mark
        return f"start: TEXT | TEXT {begin} {body} {more}\nTEXT: {ANY_TEXT}"
    head = f"head[lazy]: {ANY_TEXT} {begin}"
    return f"start: TEXT | head {body} {more}\n{head}\nTEXT: {ANY_TEXT}"


def template_call(call_id: str | None, name: str, arguments: str, path: str) -> dict[str, Any]:
    """A call of an earlier answer; templates read its arguments as an object."""
    value = json_object(arguments, f"{path}.function.arguments")
    function = {"name": name, "arguments": CallArguments(value, arguments)}
    named = {} if call_id is None else {"id": call_id}
    return {**named, "type": "function", "function": function}


def json_object(text: str, name: str) -> dict[str, Any]:
    """The object in a JSON text. Raises ``RequestError``."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{name} must be JSON text", name) from err
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be the JSON text of an object", name)
    return value
