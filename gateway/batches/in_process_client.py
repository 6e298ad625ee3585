"""Sends the requests of batches to the HTTP routes of this process, without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Router
from starlette.types import Message, Scope

from cluster.batches.requests import BatchRequest
from cluster.batches.run import BatchResponse
from gateway.auth.auth import CALLER, KeyRing
from gateway.auth.key_limits import KeyUsage
from gateway.calls.gateway import Gateway
from gateway.core.headers import PRIORITY_HEADER
from gateway.core.request_id import HEADER as REQUEST_ID
from gateway.http.json_output import dump_json
from gateway.http.middleware import HttpMiddleware


class InProcessClient:
    """Sends requests on behalf of one client.

    Args:
        gateway: the replica.
        routes: routes that requests may use.
        account: key of the client; None if the server requires no key.
        priority: default priority of the requests.
    """

    def __init__(
        self,
        gateway: Gateway,
        routes: Sequence[BaseRoute],
        account: KeyUsage | None,
        priority: int,
    ) -> None:
        ring = _SingleKeyRing(account)
        self._app = HttpMiddleware(Router(routes), gateway, ring, routes, open_paths=frozenset())
        self._headers = [
            (b"content-type", b"application/json"),
            (PRIORITY_HEADER.encode(), str(priority).encode()),
        ]

    async def send(self, request: BatchRequest) -> BatchResponse:
        """Send one request; implements ``cluster.batches.run.SendRequest``."""
        body = dump_json(request.body)
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": request.url,
            "root_path": "",
            "query_string": b"",
            "headers": self._headers,
        }
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, headers, content = 0, Headers(), bytearray()

        async def receive() -> Message:
            if messages:
                return messages.pop()
            stays: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            return await stays

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            else:
                content.extend(message.get("body", b""))

        # a task has its own context, with the request id and the caller
        await asyncio.create_task(self._app(scope, receive, send))
        pause = headers.get("retry-after", "")
        return BatchResponse(
            status,
            json.loads(content),
            headers.get(REQUEST_ID, ""),
            float(pause) if pause.isdecimal() else None,
        )


class _SingleKeyRing(KeyRing):
    """Key ring that accepts every request as a request of one client."""

    def __init__(self, account: KeyUsage | None) -> None:
        super().__init__()
        self._account = account

    def enter(self, authorization: str | None, api_key: str | None = None) -> KeyUsage | None:
        if self._account is not None:
            self._account.enter(self._clock())
        CALLER.set(self._account)
        return self._account
