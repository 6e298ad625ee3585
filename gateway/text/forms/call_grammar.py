"""Parts of the grammars of answers with calls, in the language of llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.field_checks import require
from gateway.core.tool_use import Tool
from gateway.text.forms.structured import MAX_GRAMMAR_BYTES
from gateway.text.schemas.clean_schema import closed
from gateway.text.schemas.one_of import argument_schema
from gateway.text.schemas.patterns import in_grammar
from gateway.text.schemas.references import without_keywords
from workers.requests.request import Grammar, GrammarKind, GrammarPart

FIELD = "tools"
ANY_TEXT = r"/(.|\n)*/"
_OPTIONS = "x-guidance"
_COMPACT = {"whitespace_pattern": " "}
"""White space between the parts of arguments: small models may otherwise write nothing else."""
_LENIENT = {"lenient": True}
"""What a grammar cannot express of a schema has no effect."""
_ANY_OBJECT = {"type": "object"}
_COUNTS = frozenset({"minProperties", "maxProperties"})
_OBJECT = frozenset({"type", "properties", "additionalProperties"})
"""Keywords of a schema that is an object's by itself."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a grammar, one line."""

    name: str
    body: str
    label: str = ""
    """What it is about, for messages. Empty: it compiles, whatever a client sends."""
    fallback: str | None = None
    """A body in its place where it does not compile; None refuses the request."""

    def __str__(self) -> str:
        return f"{self.name}: {self.body}"


ArgumentRules = Callable[[Tool, int], list[Rule]]
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


def object_rules(tool: Tool, place: int) -> list[Rule]:
    """Arguments as a JSON object."""
    clean = argument_schema(tool, tool.is_strict)
    root = closed(clean.resolved(clean.root))
    schema = {"type": "object", **clean.document(root)}
    if "object" in schema["type"]:
        schema["type"] = "object"  # arguments are never null
    body = json_rule(schema, tool.is_strict)
    fallback = None if tool.is_strict else json_rule(_ANY_OBJECT, False)
    return [Rule(f"args_{place}", body, label_of(tool), fallback)]


def call_rules(
    tools: Sequence[Tool],
    around: Mapping[str, tuple[str, str]],
    arguments: ArgumentRules = object_rules,
) -> list[Rule]:
    """The rule ``call`` and those that it names.

    Where they are too large, tools that are not strict take any arguments, the largest first.

    Args:
        tools: what may be called.
        around: what stands before and behind the arguments of each, by name.
        arguments: how arguments are written.

    Raises:
        RequestError: the schemas are too large, or a strict one is not followed.
    """
    calls = [Rule("call", " | ".join(f"call_{place}" for place in range(len(tools))))]
    for place, tool in enumerate(tools):
        before, behind = around[tool.name]
        calls.append(Rule(f"call_{place}", f"{before} args_{place} {behind}"))
    by_tool = [arguments(tool, place) for place, tool in enumerate(tools)]
    sizes = list(map(_size, by_tool))
    for place in sorted(range(len(tools)), key=sizes.__getitem__, reverse=True):
        if sum(sizes) <= MAX_GRAMMAR_BYTES:
            break
        if not tools[place].is_strict:
            by_tool[place] = arguments(replace(tools[place], parameters={}, derived={}), place)
            sizes[place] = _size(by_tool[place])
    rule = f"have {sum(sizes)} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(sum(sizes) <= MAX_GRAMMAR_BYTES, FIELD, rule)
    return [*calls, *(rule for rules in by_tool for rule in rules)]


def label_of(tool: Tool, part: str = "") -> str:
    """What a rule of a tool is about, for messages."""
    return f"{tool.path} of {tool.name!r}{part and ': '}{part}"


def lark_grammar(rules: Sequence[Rule | str], field: str) -> Grammar:
    """The grammar of all rules."""
    parts = tuple(
        GrammarPart(rule=rule.name, label=rule.label, fallback=rule.fallback)
        for rule in rules
        if isinstance(rule, Rule) and rule.label
    )
    text = "".join(f"{rule}\n" for rule in rules)
    return Grammar(kind=GrammarKind.LARK, text=text, field=field, parts=parts)


def _size(rules: Sequence[Rule]) -> int:
    return sum(len(str(rule).encode("utf-8", "surrogatepass")) + 1 for rule in rules)


def json_rule(schema: Mapping[str, Any], is_strict: bool = True) -> str:
    """A JSON text that follows a clean schema."""
    options = _COMPACT if is_strict else {**_COMPACT, **_LENIENT}
    followed = schema if is_strict else without_keywords(schema, _is_uncounted)
    plain = {**followed, _OPTIONS: options}
    return "%json " + json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _is_uncounted(schema: Mapping[str, Any], keyword: str) -> bool:
    """Whether it limits the number of keys where the compiler would count others alone: where keys
    that have names may be left out, and others are allowed.
    """
    if keyword not in _COUNTS or schema.get("additionalProperties") is False:
        return False
    are_needed = set(schema.get("properties", ())) <= set(schema.get("required", ()))
    return not are_needed or _OBJECT.isdisjoint(schema)


def answer_rule(answer: Grammar) -> str:
    """The rule ``answer``: what structured output asks for."""
    match answer.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"answer: {json_rule(json.loads(answer.text))}"
        case GrammarKind.CHOICE:
            return f"answer: {' | '.join(map(json.dumps, json.loads(answer.text)))}"
        case GrammarKind.REGEX:
            return f"answer: {in_grammar(answer.text)}"
        case GrammarKind.LARK:
            return f"answer: %lark {{\n{answer.text}\n}}"
