"""Serve's proxy without Ray: its own queues between the proxy's ASGI side and a replica's."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

from ray.serve._private import http_util, proxy
from ray.serve._private.common import RequestMetadata
from starlette.types import ASGIApp, Receive, Scope, Send

_http: Any = http_util
_proxy: Any = proxy


class ServeQueues:
    """Serves one request of an application as Serve's proxy does; no queue has a bound."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answer = _http.MessageQueue()

    @property
    def num_waiting_bytes(self) -> int:
        """Bytes of the answer that the proxy has not sent."""
        return sum(len(message.get("body", b"")) for message in self._answer._message_queue)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = _http.MessageQueue()
        forward = _proxy.HTTPProxy.proxy_asgi_receive
        forwarding = asyncio.create_task(forward(None, receive, incoming))

        async def fetch(metadata: RequestMetadata) -> bytes:
            await incoming.wait_for_message()
            return pickle.dumps(incoming.get_messages_nowait())

        metadata = RequestMetadata(request_id="r", internal_request_id="r")
        proxied = _http.ASGIReceiveProxy(scope, metadata, fetch)
        fetching = asyncio.create_task(proxied.fetch_until_disconnect())
        serving = asyncio.create_task(self._serve(pickle.loads(pickle.dumps(scope)), proxied))
        waiting = self._answer._message_queue
        try:
            while waiting or not serving.done():
                await self._answer.wait_for_message()
                while waiting:
                    await send(waiting.popleft())
                self._answer.get_messages_nowait()
        finally:
            forwarding.cancel()
            fetching.cancel()
            await serving

    async def _serve(self, scope: Scope, receive: Receive) -> None:
        try:
            await self._app(scope, receive, self._answer)
        finally:
            self._answer.close()
