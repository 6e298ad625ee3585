"""Reads priority, session and revision of a request from HTTP headers or gRPC metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from cluster.core.errors import RequestError
from cluster.core.model_table import REVISION_HEADER
from gateway.core.call import GenerateCall
from gateway.core.field_checks import MAX_NAME_CHARS

PRIORITY_HEADER = "x-priority"
"""HTTP header and gRPC metadata for the field ``priority``."""
SESSION_HEADER = "x-session-id"
"""HTTP header and gRPC metadata for the field ``session_id``."""
AGENT_SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "session_id")
"""Session headers of Claude Code and of Codex, including earlier versions."""
_PRIORITY_DIGITS = 10
_SESSION = re.compile(rf"[!-~]{{1,{MAX_NAME_CHARS}}}")


def with_headers(
    call: GenerateCall, headers: Mapping[str, str], timeout_s: float | None
) -> GenerateCall:
    """Set ``timeout_s`` and ``revision``, and fill unset priority and session from headers.

    Args:
        call: the call of the body.
        headers: values by lowercase name.
        timeout_s: the client's time limit in seconds; None without one.

    Raises:
        RequestError: a header is invalid; the error names it.
    """
    given = _read_priority(headers.get(PRIORITY_HEADER))
    names = (call.session_id, call.prompt_cache_key)
    is_named = any(name is not None for name in names)  # check_fields refuses an empty name
    return replace(
        call,
        priority=given if call.priority is None else call.priority,
        session_id=call.session_id if is_named else _read_session(headers),
        timeout_s=timeout_s,
        revision=headers.get(REVISION_HEADER) or None,
    )


def _read_priority(header: str | None) -> int | None:
    """Parse ``PRIORITY_HEADER``.

    Raises ``RequestError`` if it is not an integer, or has too many digits.
    """
    if header is None:
        return None
    number = re.fullmatch(r"[+-]?([0-9]+)", header.strip())
    if number is None or len(number[1]) > _PRIORITY_DIGITS:
        rule = f"at least {-(2**31)} and at most {2**31 - 1}" if number else "a whole number"
        message = f"{PRIORITY_HEADER} ({header[:32]!r}) must be {rule}"
        raise RequestError(message, PRIORITY_HEADER)
    return int(header)


def _read_session(headers: Mapping[str, str]) -> str | None:
    """Return the session id in the first session header of the request.

    Raises ``RequestError`` if it is not valid.
    """
    for name in (SESSION_HEADER, *AGENT_SESSION_HEADERS):
        if (session := headers.get(name)) is None:
            continue
        if not _SESSION.fullmatch(session):
            rule = f"1 to {MAX_NAME_CHARS} characters of ASCII without white space"
            raise RequestError(f"{name} ({session[:32]!r}) must be {rule}", name)
        return session
    return None
