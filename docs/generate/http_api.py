"""The page of the HTTP interface, from its OpenAPI document."""

from __future__ import annotations

import json
from typing import Any

from docs.generate.markdown import code, page, prose, table
from gateway.protocols import document

Schema = dict[str, Any]
_INTRODUCTION = """This page lists every route of the HTTP port, with the types of its request body
and its response (*Answer*); `GET /openapi.json` returns the same as an OpenAPI document. Unknown
fields of a body are ignored. The tables do not mark fields of a response that can be null, and
[ClusterView](#clusterview) omits most fields. [Conformance](conformance.md) lists which fields each
endpoint accepts, [Sampling](sampling.md) and [Outputs](outputs.md) describe the values, and
[Errors](errors.md) lists the errors. If keys are configured, `/metrics` and `/cluster/v1/*` return
[less for a client key than for an admin key](security.md#what-a-clients-key-shows)."""


def http_api() -> str:
    """The page."""
    found = document()
    routes = [
        _route(path, method, operation)
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    ]
    types = [_type(name, one) for name, one in sorted(found["components"]["schemas"].items())]
    return page("HTTP", _INTRODUCTION, "## Routes", *routes, "## Types", *types)


def _route(path: str, method: str, operation: Schema) -> str:
    rows = [
        (code(one["name"]), one["in"], "yes" if one["required"] else "", prose(_about(one)))
        for one in operation["parameters"]
    ]
    parts = [
        f"### {method.upper()} {path}",
        f"{operation['summary']}.",
        *(f"*{label}:* {text}" for label, text in _contents(operation)),
        table(("Parameter", "In", "Required", "Description"), rows),
        f"*Other statuses:* {', '.join(s for s in operation['responses'] if s != '200')}.",
    ]
    return "\n\n".join(filter(None, parts))


def _about(parameter: Schema) -> str:
    text: str = parameter.get("description", "")
    return f"{text}." if text else ""


def _contents(operation: Schema) -> list[tuple[str, str]]:
    """What goes in and what comes out, with a label."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    found = [("Body", shown(body["schema"]))] if body else []
    for media, content in operation["responses"]["200"].get("content", {}).items():
        schema = content.get("x-events") or content.get("schema") or {}
        label = "Events with `stream`" if media == "text/event-stream" else "Answer"
        found.append((label, shown(schema) if media != "text/plain" else "text"))
    return found


def _type(name: str, schema: Schema) -> str:
    needed = schema.get("required", ())
    rows = [
        (
            code(field),
            shown(one),
            "yes" if field in needed else "",
            prose(one.get("description", "")),
        )
        for field, one in schema.get("properties", {}).items()
    ]
    fields = table(("Field", "Type", "Required", "Description"), rows) or shown(schema)
    return "\n\n".join(filter(None, [f"### {name}", prose(schema.get("description", "")), fields]))


def shown(schema: Schema) -> str:
    """A schema as text, with links to the types of the page."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = dict.fromkeys(shown(one) for one in schema[key] if one.get("type") != "null")
            return " or ".join(kinds)
    if "const" in schema:
        return code(json.dumps(schema["const"]).strip('"'))
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    if schema.get("type") == "array":
        return f"array of {shown(schema['items'])}" if schema.get("items") else "array"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {shown(schema['additionalProperties'])}"
    return str(schema.get("type", "anything"))
