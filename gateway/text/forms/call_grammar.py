"""Parts of the grammars of answers with calls, in the language of llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
)
"""Parts of a schema that may allow arguments which ``properties`` does not name."""


def check_goes_with_tools(answer: Grammar | None) -> None:
    """Raise ``RequestError`` for a grammar of answers that cannot be one of two choices."""
    if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise RequestError(f"{answer.field} cannot go with tools", answer.field)


def mark(text: str, special_ids: Mapping[str, int]) -> str:
    """A special token by its number, any other text as it is."""
    return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)


def call_rules(tools: Sequence[Tool], around: Mapping[str, tuple[str, str]]) -> list[str]:
    """The rule ``call`` and those that it names.

    Args:
        tools: what may be called.
        around: what stands before and behind the arguments of each, by name.

    Raises:
        RequestError: the schemas are too large.
    """
    lines = [f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}"]
    for place, tool in enumerate(tools):
        before, behind = around[tool.name]
        schema = {"type": "object", **_closed(tool.parameters)}
        lines.append(f"call_{place}: {before} args_{place} {behind}")
        lines.append(f"args_{place}: {json_rule(schema)}")
    size = sum(len(line.encode("utf-8", "surrogatepass")) + 1 for line in lines)
    rule = f"have {size} bytes of schemas, at most {MAX_GRAMMAR_BYTES} are allowed"
    require(size <= MAX_GRAMMAR_BYTES, FIELD, rule)
    return lines


def _closed(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A schema without arguments that it does not name, unless it says otherwise itself.

    JSON schema allows any others, and small models make use of that without end.
    """
    schema = {"properties": {}} if parameters is None else parameters
    is_open = "properties" not in schema or not _OPENING.isdisjoint(schema)
    return schema if is_open else {**schema, "additionalProperties": False}


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON text that follows a schema."""
    plain = {**schema, _OPTIONS: _COMPACT}
    return "%json " + json.dumps(plain, ensure_ascii=False, allow_nan=False)
