"""Grammars for tool call formats that write arguments one by one.

Strings are written without quotes and end at the delimiter after the value; other values are JSON.
Texts and JSON values support all schema keywords that grammars of JSON support.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import (
    NON_STRING_TYPES,
    UnsupportedSchemaError,
    WorkLimit,
    alternatives,
    types_of_alternative,
)
from gateway.text.schemas.arguments import ArgumentSet, ToolArguments, tool_arguments
from gateway.text.schemas.clean_schema import unsupported_schema
from gateway.text.schemas.patterns import full_match, grammar_regex
from gateway.text.schemas.text_rules import TextRule, text_rules
from gateway.text.tool_formats.call_grammar import (
    FIELD,
    GrammarRule,
    json_rule,
    rule_label,
    terminal,
)
from gateway.text.tool_formats.call_syntax import PairSyntax, Part, Placeholder
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES

BREAK = "BREAK?"
BREAK_RULE = r"BREAK: /[ \n]/"
_MAX_COUNTED = 1000
"""Highest number of arguments that a grammar counts, and maximum number of rules for it."""
_TEXT, _NO_TEXT = '"true"', '"false"'
_ANY_TEXT = "VALUE"
_OTHER_KEY = r"/[^\s\x00-\x1f\"<>\x7f]([^\x00-\x1f\"<>\x7f]{0,62}[^\s\x00-\x1f\"<>\x7f])?/"
"""Regular expression of the names of additional arguments, without characters of delimiters and
without outer spaces."""


def parts_expression(
    parts: tuple[Part, ...],
    token_ids: Mapping[str, int],
    substitutions: Mapping[Placeholder, str],
) -> str:
    """Return a grammar expression for the parts of a tool call.

    ``substitutions`` has the expressions for the variable parts.
    """
    return " ".join(
        substitutions[part] if isinstance(part, Placeholder) else terminal(part, token_ids)
        for part in parts
    )


@dataclass(frozen=True, slots=True)
class PairRules:
    """Creates the grammar rules for arguments that a format writes one by one."""

    syntax: PairSyntax
    token_ids: Mapping[str, int]

    def shared_rules(self) -> list[GrammarRule]:
        """Return the grammar rules that all tools share."""
        return [GrammarRule(_ANY_TEXT, self.text_terminal(TextRule().expression(self.syntax.end)))]

    def tool_rules(self, tool: Tool, index: int) -> list[GrammarRule]:
        """Return the grammar rule ``args_INDEX`` for a tool's arguments, and the rules it uses.

        If the rules are too large, a tool that is not strict accepts any arguments.

        Raises:
            RequestError: the tool is strict, and its rules are too large, or a grammar cannot
                express its schema.
        """
        arguments = tool_arguments(tool, tool.is_strict)
        try:
            return _ToolRules(self, tool, index, arguments).make()
        except _TooLargeError as err:
            if tool.is_strict:
                rule = f"have more than {MAX_GRAMMAR_BYTES} bytes of schemas"
                raise RequestError(f"{FIELD} {rule}", FIELD) from err
            return self.tool_rules(replace(tool, parameters={}, derived={}), index)

    def text_terminal(self, expression: str) -> str:
        """Return a grammar terminal for a text value that matches ``expression``.

        The terminal includes the delimiter after the value unless the delimiter is a token.
        """
        end = self.syntax.end
        suffix = "\n" if self.syntax.has_breaks else ""
        suffix += "" if end in self.token_ids else end
        return f"({expression}) {json.dumps(suffix)}" if suffix else expression

    @property
    def after_text(self) -> str:
        """Expression of the delimiter after a text value; empty if the delimiter is no token."""
        return (
            terminal(self.syntax.end, self.token_ids) if self.syntax.end in self.token_ids else ""
        )

    @property
    def after_json(self) -> str:
        opening = f"{json.dumps(chr(10))} " if self.syntax.has_breaks else ""
        return opening + terminal(self.syntax.end, self.token_ids)

    @property
    def states_type(self) -> bool:
        """Whether calls in the format state for each argument whether its value is a text."""
        return Placeholder.IS_TEXT in self.syntax.head

    def argument_head(self, key: str, truth: str) -> str:
        substitutions = {
            Placeholder.KEY: key,
            Placeholder.IS_TEXT: truth,
            Placeholder.BREAK: BREAK,
        }
        opening = json.dumps("\n") if self.syntax.has_breaks else ""
        before = parts_expression(self.syntax.head, self.token_ids, substitutions)
        return " ".join(filter(None, [BREAK, before, opening]))


class _TooLargeError(Exception):
    """Raised if the rules of one tool are larger than those of all tools together may be."""


@dataclass(slots=True)
class _ToolRules:
    """Creates the grammar rules of one tool, without duplicates."""

    pairs: PairRules
    tool: Tool
    index: int
    arguments: ToolArguments
    _rules: list[GrammarRule] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)
    """Names of the rules by their bodies."""
    _values: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Results of ``_value_rules`` by the JSON text of the schema."""
    _num_chars_left: int = MAX_GRAMMAR_BYTES
    """Number of characters that the bodies of further rules may have. Each argument may copy the
    definitions of the whole schema to its rule."""
    _work: WorkLimit = field(default_factory=WorkLimit)
    """Limit for the alternatives of all arguments: each may expand a large definition."""

    def make(self) -> list[GrammarRule]:
        expressions = list(
            dict.fromkeys(map(self._argument_set_expression, self.arguments.argument_sets))
        )
        close = terminal(self.pairs.syntax.close, self.pairs.token_ids)
        body = f"({' | '.join(expressions)}) {BREAK} {close}"
        return [GrammarRule(f"args_{self.index}", body), *self._rules]

    def _argument_set_expression(self, argument_set: ArgumentSet) -> str:
        """Return a grammar expression for the arguments of a set, in the schema's order."""
        names = [
            (
                self._add_rule("arg", self._argument(json.dumps(key), schema, key)),
                key in argument_set.required,
            )
            for key, schema in argument_set.properties.items()
        ]
        taken = " | ".join(map(json.dumps, argument_set.properties))
        excluded = f" & ~({taken})" if taken else ""
        others: list[str] = []
        for pattern, schema in argument_set.patterns.items():
            if (matching := full_match(pattern)) is None:
                self._reject(("patternProperties", pattern), "has anchors that are not at its ends")
                continue
            key = f"{grammar_regex(matching)} & {_OTHER_KEY}{excluded}"
            others.append(self._additional_argument(key, schema, pattern))
        if argument_set.others is not False:
            not_matching = "".join(
                f" & ~{grammar_regex(matching)}"
                for pattern in argument_set.patterns
                if (matching := full_match(pattern)) is not None
            )
            key = f"{_OTHER_KEY}{excluded}{not_matching}"
            others.append(
                self._additional_argument(key, argument_set.others, "additionalProperties")
            )
        if counted := self._counted_arguments(argument_set, names, " | ".join(others)):
            return counted
        parts = [name if is_required else f"{name}?" for name, is_required in names]
        if others:
            parts.append(f"({' | '.join(others)})*")
        return " ".join(parts) or '""'

    def _counted_arguments(
        self, argument_set: ArgumentSet, names: Sequence[tuple[str, bool]], others: str
    ) -> str:
        """Return a grammar expression that limits the number of arguments of a set.

        The rules of the expression count the arguments. Empty if the limits have no effect, or if
        the tool is not strict and a grammar cannot express the limits. For example, two arguments
        with at least one required give ``a: arg_0 a1 | arg_1``, ``a1: arg_1?``.
        """
        min_arguments, max_arguments = argument_set.min_arguments, argument_set.max_arguments
        fits = max_arguments is None or (not others and max_arguments >= len(names))
        if fits and min_arguments <= len(argument_set.required):
            return ""
        highest = min(min_arguments if fits or max_arguments is None else max_arguments, len(names))
        if max(min_arguments, max_arguments or 0, len(names) * highest) > _MAX_COUNTED:
            self._reject((), f"needs more than {_MAX_COUNTED} rules to count arguments")
            return ""
        after = [
            _remaining_arguments(count, min_arguments, None if fits else max_arguments, others)
            for count in range(highest + 1)
        ]
        for name, is_required in reversed(names):
            named = [None if one is None else self._add_rule("args", one) for one in after]
            after = []
            for count in range(highest + 1):
                following = named[min(count + 1, highest)] if fits or count < highest else None
                ways = [] if following is None else [f"{name} {following}"]
                if not is_required and (left_out := named[count]) is not None:
                    ways.append(left_out)
                after.append(f"({' | '.join(ways)})" if ways else None)
        if after[0] is None:
            self._reject((), "allows no arguments")
        return after[0] or ""

    def _additional_argument(self, key: str, schema: Any, about: str) -> str:
        fallback = None if self.tool.is_strict else _OTHER_KEY
        name = self._add_rule("KEY", key, rule_label(self.tool, about), fallback)
        return self._add_rule("arg", self._argument(name, schema, about))

    def _argument(self, key: str, schema: Any, about: str) -> str:
        """Return a grammar expression for one argument with its name and value.

        ``key`` is the expression for the name; errors mention ``about``.
        """
        schema_text = json.dumps(schema)
        if schema_text not in self._values:
            self._values[schema_text] = self._value_rules(schema, about)
        pairs, text, value = self.pairs, *self._values[schema_text]
        ways: dict[str, list[str]] = {}
        if text:
            suffix = f"{text} {pairs.after_text}".strip()
            ways.setdefault(pairs.argument_head(key, _TEXT), []).append(suffix)
        if value and not (text == _ANY_TEXT and not pairs.states_type):
            head = pairs.argument_head(key, _NO_TEXT)
            ways.setdefault(head, []).append(f"{value} {pairs.after_json}")
        return " | ".join(f"{head} ({' | '.join(each)})" for head, each in ways.items())

    def _value_rules(self, schema: Any, about: str) -> tuple[str, str]:
        """Return the names of the rules for a value as text and as JSON.

        A name is empty if the schema does not allow a value of this kind.
        """
        clean, is_strict = self.arguments.clean, self.tool.is_strict
        try:
            schema_alternatives = alternatives(schema, clean, is_strict, self._work)
            rules = text_rules(schema_alternatives, is_strict)
            kinds = frozenset[str]().union(*map(types_of_alternative, schema_alternatives))
            if is_strict and not schema_alternatives:
                raise UnsupportedSchemaError("allows no value")
        except UnsupportedSchemaError as err:
            self._reject((about,), str(err))
            rules, kinds = [TextRule()], frozenset(NON_STRING_TYPES)
        label = rule_label(self.tool, about)
        text = value = ""
        if rules:
            expressions = [f"({rule.expression(self.pairs.syntax.end)})" for rule in rules]
            fallback = None if is_strict else self.pairs.shared_rules()[0].body
            is_any = any(rule.is_any for rule in rules)
            body = self.pairs.text_terminal(" | ".join(expressions))
            text = _ANY_TEXT if is_any else self._add_rule("V", body, label, fallback)
        others = [kind for kind in NON_STRING_TYPES if kind in kinds - _included_types(kinds)]
        if others or not rules:
            limited = {"allOf": [schema, {"type": others}]} if rules else schema
            body = json_rule(clean.document(limited), is_strict)
            value = self._add_rule("v", body, label, None if is_strict else json_rule({}, False))
        return text, value

    def _reject(self, path: tuple[str, ...], rule: str) -> None:
        if self.tool.is_strict:
            raise unsupported_schema(self.tool, path, rule)

    def _add_rule(self, kind: str, body: str, label: str = "", fallback: str | None = None) -> str:
        """Add a rule and return its name, which starts with ``kind`` (upper case for terminals)."""
        if body not in self._names:
            self._num_chars_left -= len(body)
            if self._num_chars_left < 0:
                raise _TooLargeError
            name = f"{kind}_{self.index}_{len(self._names)}"
            self._names[body] = name
            self._rules.append(GrammarRule(name, body, label, fallback))
        return self._names[body]


def _remaining_arguments(
    count: int, min_arguments: int, max_arguments: int | None, others: str
) -> str | None:
    """Return a grammar expression for the additional arguments after ``count`` named arguments.

    None if the minimum cannot be reached.
    """
    low, high = (
        max(0, min_arguments - count),
        "" if max_arguments is None else str(max_arguments - count),
    )
    if not others or high == "0":
        return None if low else '""'
    return f"({others}){{{low},{high}}}"


def _included_types(kinds: frozenset[str]) -> frozenset[str]:
    """Return the types in ``kinds`` that another type in ``kinds`` includes."""
    return frozenset({"integer"}) if "number" in kinds else frozenset()
