"""Converts structured output requests to a ``Grammar`` for the engine.

Handles ``response_format`` (OpenAI) and ``structured_outputs`` (vLLM) of HTTP and gRPC. The checks
of this module do not need the vocabulary; the engine compiles the grammar and may still reject it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.checks import is_deeper
from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import OutputSchema
from gateway.core.field_checks import check_length, require
from gateway.text.schemas.formats import without_annotations
from gateway.text.schemas.one_of import make_resolver, replace_one_of
from gateway.text.schemas.references import MAX_LEVELS, MAX_SCHEMA_DEPTH, References, is_too_deep
from workers.requests.request import Grammar, GrammarKind

MAX_GRAMMAR_BYTES = 64 * 1024
"""Maximum UTF-8 size of a schema (compact JSON), regular expression, list of choices or grammar."""
_ANY_OBJECT = '{"type":"object"}'
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class FormatFieldNames:
    """Field names of the output format in a protocol, for error messages."""

    field: str = "response_format"
    schema: str = "response_format.json_schema.schema"


CHAT_NAMES = FormatFieldNames()
"""Field names of the output format in completions and chat completions."""


def make_grammar(
    format_type: str | None,
    format_schema: Any,
    constraints: Mapping[str, Any],
    names: FormatFieldNames = CHAT_NAMES,
) -> Grammar | None:
    """Return the grammar that a model's output must match; None if the output is not constrained.

    Args:
        format_type: ``response_format.type``; None if it is not set.
        format_schema: ``response_format.json_schema.schema``: an object, or its JSON text.
        constraints: ``structured_outputs`` by name; None for fields that are not set.
        names: field names of the protocol.

    Raises:
        RequestError: a value is invalid or too large, or several fields are set.
        UnsupportedParameterError: the format is not supported.
    """
    structured = _from_structured(constraints)
    formatted = None if format_type is None else _from_format(format_type, format_schema, names)
    if structured and formatted:
        message = f"{names.field} and structured_outputs cannot both be set"
        raise RequestError(message, names.field)
    return structured or formatted


def schema_grammar(schema: Any, field: str) -> Grammar:
    """Return the grammar of JSON texts that match ``schema``, given as an object or JSON text.

    Raises:
        RequestError: the schema is invalid; the error names ``field``.
    """
    if isinstance(schema, str):
        _check_size(schema, field)
        schema = _parse(schema, field)
    require(isinstance(schema, dict), field, "must be a JSON schema: an object")
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _too_deep(field)
    if is_too_deep(References(schema)):
        rule = f"is too large or nested too deeply through $ref: at most {MAX_LEVELS} levels"
        raise RequestError(f"{field} {rule}", field)
    plain = without_annotations(schema)
    _check_size(_to_text(plain, field), field)  # the next step takes long for large schemas
    text = _to_text(replace_one_of(plain, make_resolver(schema)), field)
    return _grammar(GrammarKind.JSON_SCHEMA, text, field)


def make_output_schema(
    grammar: Grammar | None,
    name: object,
    description: object = None,
    names: FormatFieldNames = CHAT_NAMES,
) -> OutputSchema | None:
    """Return the part of ``response_format`` that the prompt shows; None if it has no schema.

    Args:
        grammar: the result of ``make_grammar``.
        name: ``response_format.json_schema.name``; ignored if it is not a text.
        description: ``response_format.json_schema.description``; ignored if it is not a text.
        names: field names of the protocol.
    """
    if grammar is None or grammar.field != names.schema:
        return None
    texts = [text if isinstance(text, str) else None for text in (name, description)]
    return OutputSchema(schema=grammar.text, name=texts[0], description=texts[1])


def _from_format(kind: str, schema: Any, names: FormatFieldNames) -> Grammar | None:
    name = names.field
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_ANY_OBJECT, field=name)
    if kind == "json_schema":
        if schema is None:
            message = f"{names.schema} is required for type json_schema"
            raise RequestError(message, names.schema, "missing_required_parameter")
        return schema_grammar(schema, names.schema)
    if kind == "structural_tag":
        raise UnsupportedParameterError(f"{name} of type structural_tag is not supported", name)
    rule = "must be text, json_object or json_schema"
    raise RequestError(f"{name}.type ({kind[:32]!r}) {rule}", f"{name}.type")


def _from_structured(constraints: Mapping[str, Any]) -> Grammar | None:
    prefix = "structured_outputs"
    kinds_set = [kind for kind in _KINDS if constraints.get(kind) not in (None, False)]
    if len(kinds_set) > 1:
        message = (
            f"{prefix} has {' and '.join(kinds_set)}: only one of {', '.join(_KINDS)} may be set"
        )
        raise RequestError(message, prefix)
    if not kinds_set:
        return None
    kind = kinds_set[0]
    value, field = constraints[kind], f"{prefix}.{kind}"
    if kind == "json_object":
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_ANY_OBJECT, field=field)
    if kind == "json":
        return schema_grammar(value, field)
    if kind == "choice":
        text = json.dumps(list(value), ensure_ascii=False) if value else ""
        return _grammar(GrammarKind.CHOICE, text, field)
    return _grammar(GrammarKind.REGEX if kind == "regex" else GrammarKind.LARK, value, field)


def _to_text(schema: Any, field: str) -> str:
    try:
        text = json.dumps(schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as err:
        raise RequestError(f"{field} contains a value that JSON cannot represent", field) from err
    return text


def _parse(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as err:
        raise _too_deep(field) from err
    except ValueError as err:
        reason = getattr(err, "msg", "not readable")
        raise RequestError(f"{field} is not valid JSON: {reason}", field) from err


def _grammar(kind: GrammarKind, text: str, field: str) -> Grammar:
    require(len(text) > 0, field, "must not be empty")
    _check_size(text, field)
    return Grammar(kind=kind, text=text, field=field)


def _check_size(text: str, field: str) -> None:
    check_length(field, len(text.encode("utf-8", "surrogatepass")), MAX_GRAMMAR_BYTES, "bytes")


def _too_deep(field: str) -> RequestError:
    message = f"{field} is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels are allowed"
    return RequestError(message, field)
