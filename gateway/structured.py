"""Structured output as clients ask for it, to the one ``Grammar`` that an engine follows.

Both codecs come through here: ``response_format`` (OpenAI) and ``structured_outputs`` (vLLM). What
can be checked without a vocabulary is checked now; the engine compiles the grammar and has the last
word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import RequestError, UnsupportedParameterError
from gateway.field_checks import is_deeper
from workers.request import Grammar, GrammarKind

MAX_GRAMMAR_BYTES = 64 * 1024
"""UTF-8 bytes of a schema (as compact JSON), regular expression, list of choices or grammar."""
MAX_SCHEMA_DEPTH = 32
"""Levels of objects and lists in a JSON schema."""
_ANY_OBJECT = '{"type":"object"}'
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseFormat:
    """``response_format``; None is unset."""

    type: str
    """text, json_object or json_schema."""
    schema: Any = None
    """``json_schema.schema``: an object, or its JSON text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """``structured_outputs``; None is unset."""

    json: Any = None
    """A JSON schema: an object, or its JSON text."""
    regex: str | None = None
    """A regular expression for the whole output."""
    choice: Sequence[str] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """A Lark grammar."""
    json_object: bool | None = None
    """The output is any JSON object."""


def make_grammar(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """What a call asks for; None where its text is free.

    Raises:
        RequestError: it is wrong, too large, or asked for twice.
        UnsupportedParameterError: a format that is not built.
    """
    found = None if structured is None else _from_structured(structured)
    formatted = None if response_format is None else _from_format(response_format)
    if found and formatted:
        message = "response_format and structured_outputs cannot both be set"
        raise RequestError(message, "response_format")
    return found or formatted


def _from_format(wanted: ResponseFormat) -> Grammar | None:
    name = "response_format"
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_ANY_OBJECT, field=name)
    if wanted.type == "json_schema":
        field = f"{name}.json_schema.schema"
        if wanted.schema is None:
            message = f"{field} is required for type json_schema"
            raise RequestError(message, field, "missing_required_parameter")
        return _schema(wanted.schema, field)
    if wanted.type == "structural_tag":
        raise UnsupportedParameterError(f"{name} of type structural_tag is not supported", name)
    rule = "must be text, json_object or json_schema"
    raise RequestError(f"{name}.type ({wanted.type[:32]!r}) {rule}", f"{name}.type")


def _from_structured(wanted: StructuredOutputs) -> Grammar | None:
    prefix = "structured_outputs"
    given = [kind for kind in _KINDS if getattr(wanted, kind) not in (None, False)]
    if len(given) > 1:
        message = f"{prefix} has {' and '.join(given)}: only one of {', '.join(_KINDS)} may be set"
        raise RequestError(message, prefix)
    if not given:
        return None
    field = f"{prefix}.{given[0]}"
    if wanted.json_object:
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_ANY_OBJECT, field=field)
    if wanted.json is not None:
        return _schema(wanted.json, field)
    if wanted.choice is not None:
        return _choice(wanted.choice, field)
    if wanted.regex is not None:
        return _text(GrammarKind.REGEX, wanted.regex, field)
    return _text(GrammarKind.LARK, wanted.grammar or "", field)


def _schema(schema: Any, field: str) -> Grammar:
    if isinstance(schema, str):
        _check_size(schema, field)
        schema = _parse(schema, field)
    if not isinstance(schema, dict):
        raise RequestError(f"{field} must be a JSON schema: an object", field)
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _too_deep(field)
    try:
        text = json.dumps(schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as err:
        raise RequestError(f"{field} holds a value that JSON cannot say", field) from err
    _check_size(text, field)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text, field=field)


def _parse(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as err:
        raise _too_deep(field) from err
    except ValueError as err:
        reason = getattr(err, "msg", "not readable")
        raise RequestError(f"{field} is not valid JSON: {reason}", field) from err


def _choice(choices: Sequence[str], field: str) -> Grammar:
    if not choices:
        raise RequestError(f"{field} must not be empty", field)
    text = json.dumps(list(choices), ensure_ascii=False)
    _check_size(text, field)
    return Grammar(kind=GrammarKind.CHOICE, text=text, field=field)


def _text(kind: GrammarKind, text: str, field: str) -> Grammar:
    if not text:
        raise RequestError(f"{field} must not be empty", field)
    _check_size(text, field)
    return Grammar(kind=kind, text=text, field=field)


def _check_size(text: str, field: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        message = f"{field} has {size} bytes, at most {MAX_GRAMMAR_BYTES} are allowed"
        raise RequestError(message, field)


def _too_deep(field: str) -> RequestError:
    message = f"{field} is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels are allowed"
    return RequestError(message, field)
