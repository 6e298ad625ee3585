"""The protocol of each HTTP path, which determines the format of errors.

Paths of Anthropic's Messages use Anthropic's format. All other paths, including unknown ones, use
OpenAI's.
"""

from __future__ import annotations

import json
from typing import Any

from gateway.core.errors import ErrorReport

MESSAGES = "/v1/messages"
"""Path of Anthropic's Messages; its subpaths use the same format."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's error type by HTTP status; other client errors are ``invalid_request_error``."""
_TOO_LONG = "prompt is too long: "
"""Prefix of an error text by which clients detect that they must shorten a conversation."""


def is_messages(path: str) -> bool:
    """Whether ``path``, given without the route prefix, is a path of Anthropic's Messages."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def error_body(path: str, report: ErrorReport, request_id: str) -> dict[str, Any]:
    """Make the body of an error. ``path`` excludes the route prefix."""
    return anthropic_error(report, request_id) if is_messages(path) else report.body()


def error_event(path: str, report: ErrorReport, request_id: str) -> bytes:
    """Make the last event of a stream that ends with an error."""
    data = json.dumps(error_body(path, report, request_id), separators=(",", ":")).encode()
    if is_messages(path):
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\ndata: [DONE]\n\n"


def anthropic_error(report: ErrorReport, request_id: str) -> dict[str, Any]:
    """Make the error object of Anthropic's protocol."""
    status = report.http_status
    known = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    kind = "overloaded_error" if report.type == "overloaded_error" else known
    lead = _TOO_LONG if report.code == "context_length_exceeded" else ""
    error = {"type": kind, "message": lead + report.message}
    return {"type": "error", "error": error, "request_id": request_id}
