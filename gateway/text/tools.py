"""Tools that a model may call: what a request offers, and the grammar that its calls must follow.

Both codecs come through here. A model that can call tools shows its form in its chat template; the
grammar makes every call well-formed: the name is one that was offered, and the arguments follow
that tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import check_length, is_deeper, require
from gateway.core.tool_use import Tool, ToolForm, ToolUse
from gateway.text.harmony import CALL, CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE, START
from gateway.text.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from workers.requests.request import Grammar, GrammarKind

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPTIONS = "x-guidance"
_COMPACT = {"whitespace_pattern": " "}
"""White space between the parts of arguments: small models may otherwise write nothing else."""
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
)
"""Parts of a schema that may allow arguments which ``properties`` does not name."""
_ANY_TEXT = r"/(.|\n)*/"


def make_tool_use(
    tools: Sequence[Tool],
    choice: str | None = None,
    name: str | None = None,
    is_parallel: bool | None = None,
) -> ToolUse | None:
    """What was asked for, checked; None where the model is to know of no tool.

    Args:
        tools: those offered.
        choice: ``none``, ``auto`` or ``required``; None is ``auto`` with tools, else ``none``.
        name: the one that must be called, in place of ``choice``.
        is_parallel: ``parallel_tool_calls``.

    Raises:
        RequestError: names the field.
    """
    field = "tool_choice"
    known = ("none", "auto", "required")
    rule = f"({str(choice)[:32]!r}) must be {', '.join(known)} or name a function"
    require(choice is None or choice in known, field, rule)
    needs = name is not None or choice == "required"
    require(bool(tools) or not needs, field, "needs tools")
    _check(tools)
    if not tools or (choice == "none" and name is None):
        return None
    is_known = name is None or any(tool.name == name for tool in tools)
    require(is_known, field, f"names {str(name)[:64]!r}, which is not among tools")
    return ToolUse(
        tools=tuple(tools), must_call=needs, only=name, is_parallel=is_parallel is not False
    )


def _check(tools: Sequence[Tool]) -> None:
    check_length("tools", len(tools), MAX_TOOLS)
    seen: set[str] = set()
    for place, tool in enumerate(tools):
        path = f"tools[{place}].function"
        rule = "must be 1 to 64 letters, digits, _, . or -"
        fits = _NAME.fullmatch(tool.name) is not None
        require(fits, f"{path}.name", f"({tool.name[:64]!r}) {rule}")
        if tool.name in seen:
            raise RequestError(f"tools has {tool.name!r} twice", f"{path}.name")
        seen.add(tool.name)
        schema = tool.parameters or {}
        kind = schema.get("type", "object")
        name = f"{path}.parameters"
        require(kind == "object", name, "must be a JSON schema of an object")
        deep = is_deeper(schema, MAX_SCHEMA_DEPTH)
        require(not deep, name, f"is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels")


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
    if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise RequestError(f"{answer.field} cannot go with tools", answer.field)
    called = [tool for tool in use.tools if use.only in (None, tool.name)]
    schema = None if use.must_call or answer is None else answer.text
    lines = [_start(use, form, special_ids, schema), *_calls(called)]
    text = "\n".join(lines) + "\n"
    size = len(text.encode("utf-8", "surrogatepass"))
    rule = f"have {size} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(size <= MAX_GRAMMAR_BYTES, "tools", rule)
    return Grammar(kind=GrammarKind.LARK, text=text, field="tools")


def harmony_grammar(
    use: ToolUse | None, special_ids: Mapping[str, int], answer: Grammar | None
) -> Grammar | None:
    """What an answer in the Harmony format must follow; None: anything.

    Reasoning and words before calls may come first. Marks are special tokens, which text cannot
    hold; a vocabulary without them has no grammar but ``answer``.

    Args:
        use: what may be called; None: there are no tools.
        special_ids: special tokens by text.
        answer: what the answer must follow where it is not a call.

    Raises:
        RequestError: the tools are too large, or ``answer`` cannot go with tools.
    """
    marks = (CHANNEL, MESSAGE, CONSTRAIN, START, END, CALL)
    if use is None and (answer is None or answer.kind is not GrammarKind.JSON_SCHEMA):
        return answer
    if not all(mark in special_ids for mark in marks):
        require(use is None or not use.must_call, "tool_choice", "needs a model with its own marks")
        return answer if use is None else None
    if use is not None and answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise RequestError(f"{answer.field} cannot go with tools", answer.field)
    channel, message, constrain, start, end, call = (_mark(m, special_ids) for m in marks)
    must_call = use is not None and use.must_call
    ends = [] if must_call else ["final"]
    lines = []
    if use is not None:
        ends.append("tool")
        called = [tool for tool in use.tools if use.only in (None, tool.name)]
        names = (f"call_{place}" for place in range(len(called)))
        lines.append(f"tool: {' | '.join(names)}")
        for place, tool in enumerate(called):
            to = json.dumps(f"commentary to={FUNCTIONS}{tool.name} ")
            schema = {"type": "object", **_closed(tool.parameters)}
            rule = f'{channel} {to} {constrain} "json" {message} args_{place} {call}'
            lines += [f"call_{place}: {rule}", f"args_{place}: {_json(schema)}"]
    schema_text = None if must_call or answer is None else answer.text
    body = "TEXT" if schema_text is None else "answer"
    if not must_call:
        lines.append(f'final: {channel} "final" {message} {body}')
    if schema_text is not None:
        lines.append(f"answer: {_json(json.loads(schema_text))}")
    before = f'{channel} ("analysis" | "commentary") {message} TEXT {end} {start} "assistant"'
    text = "\n".join(
        [f"start: before* ({' | '.join(ends)})", f"before: {before}", *lines, f"TEXT: {_ANY_TEXT}"]
    )
    size = len(text.encode("utf-8", "surrogatepass"))
    rule = f"have {size} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(size <= MAX_GRAMMAR_BYTES, "tools", rule)
    field = "tools" if use is not None or answer is None else answer.field
    return Grammar(kind=GrammarKind.LARK, text=f"{text}\n", field=field)


def _start(use: ToolUse, form: ToolForm, special_ids: Mapping[str, int], schema: str | None) -> str:
    mark = _mark(form.value, special_ids)
    if form is ToolForm.HERMES:
        end = _mark("</tool_call>", special_ids)
        body, more = rf'"\n" call "\n" {end}', rf'("\n" {mark} "\n" call "\n" {end})*'
    else:
        repeated = '(", " call)*' if use.is_parallel else ""
        body, more = f'" "? "[" call {repeated} "]"', ""
    if not use.is_parallel:
        more = ""
    if use.must_call:
        return f"start: {mark} {body} {more}"
    if schema is not None:
        return f"start: answer | {mark} {body} {more}\nanswer: {_json(json.loads(schema))}"
    if form.value in special_ids:  # the text can never hold the mark
        return f"start: TEXT | TEXT {mark} {body} {more}\nTEXT: {_ANY_TEXT}"
    head = f"head[lazy]: {_ANY_TEXT} {mark}"
    return f"start: TEXT | head {body} {more}\n{head}\nTEXT: {_ANY_TEXT}"


def _mark(text: str, special_ids: Mapping[str, int]) -> str:
    """A special token by its number, any other text as it is."""
    return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)


def _calls(tools: Sequence[Tool]) -> list[str]:
    names = (f"call_{place}" for place in range(len(tools)))
    lines = [f"call: {' | '.join(names)}"]
    for place, tool in enumerate(tools):
        opening = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines.append(f'call_{place}: {opening} args_{place} "}}"')
        lines.append(f"args_{place}: {_json({'type': 'object', **_closed(tool.parameters)})}")
    return lines


def _closed(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A schema without arguments that it does not name, unless it says otherwise itself.

    JSON schema allows any others, and small models make use of that without end.
    """
    schema = {"properties": {}} if parameters is None else parameters
    is_open = "properties" not in schema or not _OPENING.isdisjoint(schema)
    return schema if is_open else {**schema, "additionalProperties": False}


def _json(schema: Mapping[str, Any]) -> str:
    plain = {**schema, _OPTIONS: _COMPACT}
    return "%json " + json.dumps(plain, ensure_ascii=False, allow_nan=False)


def template_call(call_id: str | None, name: str, arguments: str, path: str) -> dict[str, Any]:
    """A call of an earlier answer; templates read its arguments as an object."""
    function = {"name": name, "arguments": json_object(arguments, f"{path}.function.arguments")}
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
