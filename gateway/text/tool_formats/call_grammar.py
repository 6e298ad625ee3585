"""Rules of grammars for answers with tool calls, in the Lark syntax of llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import require
from gateway.core.tool_use import Tool
from gateway.text.schemas.clean_schema import forbid_additional
from gateway.text.schemas.one_of import argument_schema
from gateway.text.schemas.patterns import grammar_regex
from gateway.text.schemas.references import without_keywords
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES
from workers.requests.request import Grammar, GrammarKind, GrammarPart

FIELD = "tools"
ANY_TEXT = r"/(.|\n)*/"
_OPTIONS = "x-guidance"
_COMPACT = {"whitespace_pattern": " "}
"""Grammar option that limits white space in JSON: small models may otherwise write it endlessly."""
_LENIENT = {"lenient": True}
"""Grammar option that ignores schema keywords that a grammar cannot express."""
_ANY_OBJECT = {"type": "object"}
_COUNTS = frozenset({"minProperties", "maxProperties"})
_OBJECT = frozenset({"type", "properties", "additionalProperties"})
"""JSON Schema keywords, each of which makes a schema describe an object."""


@dataclass(frozen=True, slots=True)
class GrammarRule:
    """A rule of a grammar in Lark syntax, written on one line."""

    name: str
    body: str
    label: str = ""
    """Name of the client's schema part for error messages; empty if the rule always compiles."""
    fallback: str | None = None
    """Body to use if ``body`` does not compile; None means that the request is rejected."""

    def __str__(self) -> str:
        return f"{self.name}: {self.body}"


ArgumentRules = Callable[[Tool, int], list[GrammarRule]]
"""Type of a function that returns, for a tool and its index INDEX, the grammar rule ``args_INDEX``
and the rules that this rule uses."""


def check_combinable_with_tools(answer: Grammar | None) -> None:
    """Raise ``RequestError`` for a grammar that cannot be combined with tools."""
    if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise RequestError(f"{answer.field} cannot be used with tools", answer.field)


def terminal(text: str, token_ids: Mapping[str, int]) -> str:
    """Return a grammar expression for a text: a token id if the text is a token, else a string."""
    return f"<[{token_ids[text]}]>" if text in token_ids else json.dumps(text)


def text_up_to(text: str, token_ids: Mapping[str, int], rule: str) -> tuple[str, list[str]]:
    """Return a grammar expression for any text up to and with a delimiter, and the rules it uses.

    The grammar must define the rule ``TEXT``, which cannot contain a delimiter that is a token.
    """
    if text in token_ids:
        return f"TEXT {terminal(text, token_ids)}", []
    return rule, [f"{rule}[lazy]: {ANY_TEXT} {json.dumps(text)}"]


def object_rules(tool: Tool, index: int) -> list[GrammarRule]:
    """Return the grammar rules for a tool's arguments as a JSON object."""
    clean = argument_schema(tool, tool.is_strict)
    root = forbid_additional(clean.resolve(clean.root))
    schema = {"type": "object", **clean.document(root)}
    if "object" in schema["type"]:
        schema["type"] = "object"  # arguments are never null
    body = json_rule(schema, tool.is_strict)
    fallback = None if tool.is_strict else json_rule(_ANY_OBJECT, False)
    return [GrammarRule(f"args_{index}", body, rule_label(tool), fallback)]


def call_rules(
    tools: Sequence[Tool],
    expressions_around: Mapping[str, tuple[str, str]],
    arguments: ArgumentRules = object_rules,
) -> list[GrammarRule]:
    """Return the grammar rule ``call`` (a call of one of the tools) and the rules that it uses.

    If the rules are too large, the largest tools that are not strict accept any arguments.

    Args:
        tools: the tools that may be called.
        expressions_around: expressions before and after the arguments of each tool, by name.
        arguments: creates the rules for arguments.

    Raises:
        RequestError: the schemas are too large, or a grammar cannot express a strict schema.
    """
    calls = [GrammarRule("call", " | ".join(f"call_{index}" for index in range(len(tools))))]
    for index, tool in enumerate(tools):
        before, after = expressions_around[tool.name]
        calls.append(GrammarRule(f"call_{index}", f"{before} args_{index} {after}"))
    by_tool = [arguments(tool, index) for index, tool in enumerate(tools)]
    sizes = list(map(_num_bytes, by_tool))
    for index in sorted(range(len(tools)), key=sizes.__getitem__, reverse=True):
        if sum(sizes) <= MAX_GRAMMAR_BYTES:
            break
        if not tools[index].is_strict:
            by_tool[index] = arguments(replace(tools[index], parameters={}, derived={}), index)
            sizes[index] = _num_bytes(by_tool[index])
    rule = f"have {sum(sizes)} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(sum(sizes) <= MAX_GRAMMAR_BYTES, FIELD, rule)
    return [*calls, *(rule for rules in by_tool for rule in rules)]


def rule_label(tool: Tool, part: str = "") -> str:
    return f"{tool.path} of {tool.name!r}{part and ': '}{part}"


def lark_grammar(rules: Sequence[GrammarRule | str], field: str) -> Grammar:
    parts = tuple(
        GrammarPart(rule=rule.name, label=rule.label, fallback=rule.fallback)
        for rule in rules
        if isinstance(rule, GrammarRule) and rule.label
    )
    text = "".join(f"{rule}\n" for rule in rules)
    return Grammar(kind=GrammarKind.LARK, text=text, field=field, parts=parts)


def _num_bytes(rules: Sequence[GrammarRule]) -> int:
    return sum(len(str(rule).encode("utf-8", "surrogatepass")) + 1 for rule in rules)


def json_rule(schema: Mapping[str, Any], is_strict: bool = True) -> str:
    """Return a grammar expression for JSON text that matches a schema.

    If ``is_strict`` is False, keywords that a grammar cannot express are ignored.
    """
    options = _COMPACT if is_strict else {**_COMPACT, **_LENIENT}
    followed = schema if is_strict else without_keywords(schema, _is_miscounted)
    plain = {**followed, _OPTIONS: options}
    return "%json " + json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _is_miscounted(schema: Mapping[str, Any], keyword: str) -> bool:
    """Whether ``keyword`` limits the number of keys in a way that the grammar compiler miscounts.

    The compiler counts only additional keys, which is wrong if named keys are optional.
    """
    if keyword not in _COUNTS or schema.get("additionalProperties") is False:
        return False
    are_needed = set(schema.get("properties", ())) <= set(schema.get("required", ()))
    return not are_needed or _OBJECT.isdisjoint(schema)


def answer_rule(answer: Grammar) -> str:
    """Return the grammar rule ``answer``, which matches structured output."""
    match answer.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"answer: {json_rule(json.loads(answer.text))}"
        case GrammarKind.CHOICE:
            return f"answer: {' | '.join(map(json.dumps, json.loads(answer.text)))}"
        case GrammarKind.REGEX:
            return f"answer: {grammar_regex(answer.text)}"
        case GrammarKind.LARK:
            return f"answer: %lark {{\n{answer.text}\n}}"
