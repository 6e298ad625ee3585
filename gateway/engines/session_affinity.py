"""Which worker served a session last. Pure."""

from __future__ import annotations

from collections import OrderedDict

from workers.requests.request import Request

MAX_SESSIONS = 8192
"""Sessions of one tenant that are remembered, those that were used last."""


class SessionAffinity:
    """Workers by tenant and session."""

    def __init__(self) -> None:
        self._workers: dict[str, OrderedDict[str, str]] = {}

    def get(self, request: Request) -> str:
        """The worker of the last request of the same session; empty: it has none, or is new."""
        workers = self._workers.get(request.tenant)
        return "" if workers is None else workers.get(request.session, "")

    def put(self, request: Request, worker: str) -> None:
        """A request goes to a worker."""
        if not request.session:
            return
        workers = self._workers.setdefault(request.tenant, OrderedDict())
        workers[request.session] = worker
        workers.move_to_end(request.session)
        if len(workers) > MAX_SESSIONS:
            workers.popitem(last=False)
