"""Reads the KV cache hints of a body: ``cache_control`` and the session id in ``metadata``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from gateway.anthropic.schema import CacheControlParam, ContentBlockParam, MessagesBody
from gateway.core.field_checks import MAX_NAME_CHARS, require
from gateway.core.retention import parse_duration_s

_DEFAULT_TTL = "5m"
_TTLS = (_DEFAULT_TTL, "1h")
_MAX_USER_ID_CHARS = 1024
"""Maximum length of a ``user_id`` that may contain a session id."""
_SESSION = re.compile(rf"[0-9A-Za-z-]{{1,{MAX_NAME_CHARS}}}")
_OLD_USER_ID = re.compile(r"user_.*_session_([0-9A-Za-z-]+)", re.DOTALL)


def longest_ttl(body: MessagesBody) -> float | None:
    """Return the longest TTL of the ``cache_control`` objects in seconds; None if there are none.

    Raises:
        RequestError: a TTL is invalid; the error names the field.
    """
    return max((_seconds(one, name) for one, name in _cache_controls(body)), default=None)


def session_of(body: MessagesBody) -> str | None:
    """Return the session id if ``metadata.user_id`` has the format of Claude Code, else None."""
    user_id = body.metadata.user_id if body.metadata else None
    if user_id is None or len(user_id) > _MAX_USER_ID_CHARS:
        return None
    session = _in_json(user_id)
    if session is None and (match := _OLD_USER_ID.fullmatch(user_id)):
        session = match[1]
    return session if session is not None and _SESSION.fullmatch(session) else None


def _in_json(user_id: str) -> str | None:
    try:
        value = json.loads(user_id)
    except (ValueError, RecursionError):
        return None
    session = value.get("session_id") if isinstance(value, dict) else None
    return session if isinstance(session, str) else None


def _seconds(control: CacheControlParam, name: str) -> float:
    ttl = control.ttl or _DEFAULT_TTL
    name = f"{name}.ttl"
    require(ttl in _TTLS, name, f"({ttl[:32]!r}) must be one of {', '.join(_TTLS)}")
    return parse_duration_s(ttl, name)


def _cache_controls(body: MessagesBody) -> Iterator[tuple[CacheControlParam, str]]:
    """Yield each ``cache_control`` object with the name of its field."""
    if body.cache_control is not None:
        yield body.cache_control, "cache_control"
    for index, tool in enumerate(body.tools or ()):
        if tool.cache_control is not None:
            yield tool.cache_control, f"tools[{index}].cache_control"
    yield from _controls_in_blocks(body.system or (), "system")
    for index, message in enumerate(body.messages):
        yield from _controls_in_blocks(message.content, f"messages[{index}].content")


def _controls_in_blocks(
    blocks: Iterable[ContentBlockParam], path: str
) -> Iterator[tuple[CacheControlParam, str]]:
    for index, block in enumerate(blocks):
        if block.cache_control is not None:
            yield block.cache_control, f"{path}[{index}].cache_control"
        yield from _controls_in_blocks(block.content or (), f"{path}[{index}].content")
