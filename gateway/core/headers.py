"""What HTTP headers and gRPC metadata say of a request: its priority, session and time limit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from cluster.core.errors import RequestError
from gateway.core.call import GenerateCall
from gateway.core.field_checks import MAX_NAME_CHARS

PRIORITY_HEADER = "x-priority"
"""HTTP header and gRPC metadata for clients that cannot send the field."""
SESSION_HEADER = "x-session-id"
"""The same for the field ``session_id``."""
AGENT_SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "session_id")
"""Where Claude Code and Codex (also earlier ones) name their session."""
_PRIORITY_DIGITS = 10
_SESSION = re.compile(rf"[!-~]{{1,{MAX_NAME_CHARS}}}")


def with_headers(
    call: GenerateCall, headers: Mapping[str, str], timeout_s: float | None
) -> GenerateCall:
    """The same call, with what headers say of those that the body left out.

    Args:
        call: of the body.
        headers: by name, in small letters.
        timeout_s: the client's own limit.

    Raises:
        RequestError: names the header.
    """
    given = _read_priority(headers.get(PRIORITY_HEADER))
    names = (call.session_id, call.prompt_cache_key)
    is_named = any(name is not None for name in names)  # an empty name is refused later
    return replace(
        call,
        priority=given if call.priority is None else call.priority,
        session_id=call.session_id if is_named else _read_session(headers),
        timeout_s=timeout_s,
    )


def _read_priority(header: str | None) -> int | None:
    """The number in ``PRIORITY_HEADER``.

    Raises ``RequestError`` if it is not a whole number, or one of more digits than any that fits.
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
    """The session's name in the first of the headers that is there.

    Raises ``RequestError`` if it is no name.
    """
    for name in (SESSION_HEADER, *AGENT_SESSION_HEADERS):
        if (session := headers.get(name)) is None:
            continue
        if not _SESSION.fullmatch(session):
            rule = f"1 to {MAX_NAME_CHARS} characters of ASCII without white space"
            raise RequestError(f"{name} ({session[:32]!r}) must be {rule}", name)
        return session
    return None
