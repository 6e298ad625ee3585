"""Request ids: the client's own if it is valid."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from cluster.core.errors import RequestError

HEADER = "x-request-id"
"""HTTP header and gRPC metadata with the id, in requests and answers."""
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
"""Id of the request that the running task serves; empty outside a request."""
_FIT = re.compile(r"[A-Za-z0-9._-]{1,128}")


def choose_request_id(wanted: str | None) -> str:
    """The client's own id if it is valid, else a new one."""
    if wanted and _FIT.fullmatch(wanted):
        return wanted
    return uuid.uuid4().hex


def check_request_id(wanted: str) -> str:
    """The field ``request_id`` as it is. Raises ``RequestError`` if it is not fit."""
    if not _FIT.fullmatch(wanted):
        rule = "must be 1 to 128 letters, digits, ., _ or -"
        raise RequestError(f"request_id ({wanted[:32]!r}) {rule}", "request_id")
    return wanted
