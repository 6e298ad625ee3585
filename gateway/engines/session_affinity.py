"""Remembers the attention worker of each session's last request. Pure."""

from __future__ import annotations

from collections import OrderedDict

from workers.requests.request import Request

MAX_SESSIONS = 8192
"""Maximum number of remembered sessions per tenant; the least recently used ones are forgotten."""


class SessionAffinity:
    """Maps each session of a tenant to the worker of the session's last request."""

    def __init__(self) -> None:
        self._workers: dict[str, OrderedDict[str, str]] = {}

    def get(self, request: Request) -> str:
        """Return the worker of the last request of ``request``'s session; empty without a session
        or for a new session."""
        workers = self._workers.get(request.tenant)
        return "" if workers is None else workers.get(request.session, "")

    def put(self, request: Request, worker: str) -> None:
        """Record the worker of a request as the last worker of its session."""
        if not request.session:
            return
        workers = self._workers.setdefault(request.tenant, OrderedDict())
        workers[request.session] = worker
        workers.move_to_end(request.session)
        if len(workers) > MAX_SESSIONS:
            workers.popitem(last=False)
