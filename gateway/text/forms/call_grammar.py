"""Parts of the grammars of answers with calls, in the language of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import require
from gateway.core.tool_use import Tool
from gateway.text.forms.structured import MAX_GRAMMAR_BYTES
from workers.requests.request import Grammar, GrammarKind

FIELD = "tools"
ANY_TEXT = r"/(.|\n)*/"
_OPTIONS = "x-guidance"
_COMPACT = {"whitespace_pattern": " "}
"""White space between the parts of arguments: small models may otherwise write nothing else."""
_LENIENT = {"lenient": True}
"""What a grammar cannot express of a schema has no effect."""
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
)
"""Parts of a schema that may allow arguments which ``properties`` does not name."""
_NOTES = frozenset({"description", "title", "default", "examples", "$comment", "$schema", "$id"})
"""Parts of a schema that allow and forbid nothing."""
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Parts of a schema that are schemas by name."""

_PATTERN = "pattern"
_NOT_REGULAR = re.compile(r"\(\?(?:=|!|<=|<!|>)|\\[1-9kbBG]")
"""Look-around, atomic groups, references to groups, and bounds of words."""

ArgumentRules = Callable[[Tool, int], list[str]]
"""From a tool and its place to the rule ``args_PLACE`` and those that it names."""


def check_goes_with_tools(answer: Grammar | None) -> None:
    """Raise ``RequestError`` for a grammar of answers that cannot be one of two choices."""
    if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise RequestError(f"{answer.field} cannot go with tools", answer.field)


def mark(text: str, mark_ids: Mapping[str, int]) -> str:
    """A mark that is a token by its number, any other text as it is."""
    return f"<[{mark_ids[text]}]>" if text in mark_ids else json.dumps(text)


def up_to(text: str, mark_ids: Mapping[str, int], rule: str) -> tuple[str, list[str]]:
    """What any text up to a mark, and the mark, is called; the rules that this needs.

    The rule ``TEXT`` must be there. Texts cannot hold a mark that is a token.
    """
    if text in mark_ids:
        return f"TEXT {mark(text, mark_ids)}", []
    return rule, [f"{rule}[lazy]: {ANY_TEXT} {json.dumps(text)}"]


def object_rules(tool: Tool, place: int) -> list[str]:
    """Arguments as a JSON object."""
    return [f"args_{place}: {json_rule(closed_schema(tool.parameters), tool.is_strict)}"]


def call_rules(
    tools: Sequence[Tool],
    around: Mapping[str, tuple[str, str]],
    arguments: ArgumentRules = object_rules,
) -> list[str]:
    """The rule ``call`` and those that it names.

    Args:
        tools: what may be called.
        around: what stands before and behind the arguments of each, by name.
        arguments: how arguments are written.

    Raises:
        RequestError: the schemas are too large.
    """
    lines = [f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}"]
    for place, tool in enumerate(tools):
        before, behind = around[tool.name]
        lines.append(f"call_{place}: {before} args_{place} {behind}")
        lines += arguments(tool, place)
    size = sum(len(line.encode("utf-8", "surrogatepass")) + 1 for line in lines)
    rule = f"have {size} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(size <= MAX_GRAMMAR_BYTES, FIELD, rule)
    return lines


def closed_schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A schema without arguments that it does not name, unless it says otherwise itself.

    JSON schema allows any others, and small models make use of that without end.
    """
    schema = {"properties": {}} if parameters is None else parameters
    is_open = "properties" not in schema or not _OPENING.isdisjoint(schema)
    closed = schema if is_open else {**schema, "additionalProperties": False}
    return {"type": "object", **closed}


def json_rule(schema: Mapping[str, Any], is_strict: bool = True) -> str:
    """A JSON text that follows a schema."""
    options = _COMPACT if is_strict else {**_COMPACT, **_LENIENT}
    plain = {**_plain(schema, is_strict), _OPTIONS: options}
    return "%json " + json.dumps(plain, ensure_ascii=False, allow_nan=False)


def answer_rule(answer: Grammar) -> str:
    """The rule ``answer``: what structured output asks for."""
    match answer.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"answer: {json_rule(json.loads(answer.text))}"
        case GrammarKind.CHOICE:
            return f"answer: {' | '.join(map(json.dumps, json.loads(answer.text)))}"
        case GrammarKind.REGEX:
            return f"answer: /{_escape_slashes(answer.text)}/"
        case GrammarKind.LARK:
            return f"answer: %lark {{\n{answer.text}\n}}"


def _plain(schema: Any, is_strict: bool) -> Any:
    """A schema without what only people and models read; not strict, also without patterns that
    automata cannot follow, which llguidance refuses even where it is lenient."""
    if isinstance(schema, list):
        return [_plain(part, is_strict) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, part in schema.items():
        if name in ("enum", "const"):
            found[name] = part
        elif name in _BY_NAME and isinstance(part, Mapping):
            found[name] = {key: _plain(inner, is_strict) for key, inner in part.items()}
        elif name not in _NOTES and (is_strict or name != _PATTERN or _is_regular(part)):
            found[name] = _plain(part, is_strict)
    return found


def _is_regular(pattern: object) -> bool:
    return not isinstance(pattern, str) or _NOT_REGULAR.search(pattern) is None


def _escape_slashes(regex: str) -> str:
    """A regular expression as it stands between slashes: ``a/b`` is ``a\\/b``."""
    parts: list[str] = []
    is_escaped = False
    for char in regex:
        slash = "/" if is_escaped else "\\/"
        parts.append({"/": slash, "\n": "n" if is_escaped else "\\n"}.get(char, char))
        is_escaped = char == "\\" and not is_escaped
    return "".join(parts)
