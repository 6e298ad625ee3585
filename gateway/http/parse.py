"""Parses JSON into the typed fields of HTTP bodies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.core.checks import is_deeper
from cluster.core.errors import RequestError
from gateway.core.bodies import StrictBody
from gateway.core.field_checks import (
    MAX_ENTRIES,
    MAX_MESSAGES,
    check_length,
    check_messages,
)
from gateway.http.schema import TAG
from gateway.offload.json_text import check_writable, load_json
from gateway.text.tool_formats.tools import MAX_TOOLS

Body = TypeVar("Body", bound=StrictBody)

_SURROGATE_ESCAPES = ("\\ud", "\\uD")

_PROMPT_SHAPE = "must be a string, a list of strings, a list of token ids or a list of such lists"
_SHAPES = {
    "prompt": _PROMPT_SHAPE,
    "stop": "must be a string or a list of strings",
    "input": _PROMPT_SHAPE,
    "queries": _PROMPT_SHAPE,
    "documents": _PROMPT_SHAPE,
    "text_1": _PROMPT_SHAPE,
    "text_2": _PROMPT_SHAPE,
    "attention_mask": "must be a list of 0 and 1, or a list of such lists",
    "content": "must be a string or a list of text parts",
    "system": "must be a string or a list of text blocks",
    "tool_choice": "must be none, auto, required or name a function",
    "early_stopping": "must be false, true or never",
    "schema": "must be a JSON schema: an object, or its JSON text",
    "json": "must be a JSON schema: an object, or its JSON text",
}
"""Error text for each field that accepts several types."""
_MOST_ENTRIES = {
    "tools": MAX_TOOLS,
    "logit_bias": MAX_ENTRIES["logit_bias"],
}
"""Maximum length by field, checked before the entries are validated."""
_MAX_NAME_CHARS = 64
"""Longest name in the path of a field; a client's object may have longer keys."""


def parse_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        RequestError: the body is not JSON, not an object, too deeply nested or has too many values.
    """
    try:
        text = raw.decode(json.detect_encoding(raw))
        data = load_json(text, "body")
        if any(escape in text for escape in _SURROGATE_ESCAPES):
            check_writable(data)
    except RecursionError as err:
        raise _too_deep(max_depth) from err
    except ValueError as err:  # includes undecodable bytes, lone surrogates and too long integers
        reason = "not readable"
        if isinstance(err, json.JSONDecodeError):
            reason = f"{err.msg} at line {err.lineno}, column {err.colno}"
        raise RequestError(f"the body is not valid JSON: {reason}", code="json_invalid") from err
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object", code="json_invalid")
    if is_deeper(data, max_depth):
        raise _too_deep(max_depth)
    return data


def parse_body(kind: type[Body], data: Mapping[str, Any]) -> Body:
    """Validate a body. Raises ``RequestError`` for the first invalid field."""
    for name, max_length in _MOST_ENTRIES.items():
        value = data.get(name)
        if name in kind.model_fields and isinstance(value, list | dict):
            check_length(name, len(value), max_length)
    messages = data.get("messages")
    if "messages" in kind.model_fields and isinstance(messages, list):
        check_messages(len(messages), _num_parts(messages[: MAX_MESSAGES + 1]))
    try:
        return kind.model_validate(data)
    except ValidationError as err:
        raise _validation_error(err, kind.SHAPES) from err


def _num_parts(messages: Sequence[object]) -> int:
    """Total number of fields, content parts and tool calls of the messages."""
    named = [message for message in messages if isinstance(message, dict)]
    inner = [message.get(name) for message in named for name in ("content", "tool_calls")]
    return sum(map(len, named)) + sum(len(one) for one in inner if isinstance(one, list))


def _too_deep(max_depth: int) -> RequestError:
    return RequestError(
        f"the body is nested too deeply: at most {max_depth} levels", code="json_invalid"
    )


def _validation_error(error: ValidationError, shapes: Mapping[str, str]) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = _field_path(first["loc"])
    name = path.rpartition(".")[2].partition("[")[0]
    if first["type"] == "missing":
        return RequestError.missing(path)
    is_entry = name in shapes and path.endswith("]")
    if not is_entry and (shape := {**_SHAPES, **shapes}.get(name)):
        return RequestError(f"{path} {shape}", path)
    rule = first["msg"].removeprefix("Input ").removeprefix("should ")
    return RequestError(f"{path} must {rule}" if rule != first["msg"] else f"{path}: {rule}", path)


def _field_path(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.startswith(TAG):
            continue  # a tag of a union type, omitted from error texts
        elif len(part) > _MAX_NAME_CHARS or not part.isidentifier():
            break
        elif part in ("str", "int", "bool"):
            break  # a member of a union type
        else:
            path += f".{part}" if path else part
    return path
