"""Request ids, chosen by clients or generated."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from cluster.core.errors import RequestError

HEADER = "x-request-id"
"""HTTP header and gRPC metadata with the id, in requests and responses."""
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
"""Id of the request that the current task serves; empty outside a request."""
_VALID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def choose_request_id(wanted: str | None) -> str:
    """Return the client's id if it is valid, otherwise a new id."""
    if wanted and _VALID.fullmatch(wanted):
        return wanted
    return uuid.uuid4().hex


def check_request_id(wanted: str) -> str:
    """Return the field ``request_id``. Raises ``RequestError`` if it is not valid."""
    if not _VALID.fullmatch(wanted):
        rule = "must be 1 to 128 letters, digits, ., _ or -"
        raise RequestError(f"request_id ({wanted[:32]!r}) {rule}", "request_id")
    return wanted
