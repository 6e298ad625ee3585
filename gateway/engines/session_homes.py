"""Which worker served a session last. Pure."""

from __future__ import annotations

from collections import OrderedDict

from workers.requests.request import Request

MAX_SESSIONS = 8192
"""Sessions of one tenant that are remembered, those that were used last."""


class SessionHomes:
    """Workers by tenant and session."""

    def __init__(self) -> None:
        self._homes: dict[str, OrderedDict[str, str]] = {}

    def get(self, request: Request) -> str:
        """The worker of the last request of the same session; empty: it has none, or is new."""
        homes = self._homes.get(request.tenant)
        return "" if homes is None else homes.get(request.session, "")

    def put(self, request: Request, worker: str) -> None:
        """A request goes to a worker."""
        if not request.session:
            return
        homes = self._homes.setdefault(request.tenant, OrderedDict())
        homes[request.session] = worker
        homes.move_to_end(request.session)
        if len(homes) > MAX_SESSIONS:
            homes.popitem(last=False)
