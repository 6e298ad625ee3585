"""Receipts for the bytes that clients take, from Serve's proxy to the replica: see ``RECEIPTS``.

Upstream: neither Serve's message queue nor its streaming calls have a bound
(``_generator_backpressure_num_objects`` is not set). No issue known.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.core.receipts import RECEIPT, RECEIPTS, STEP_BYTES


class ReceiptSender:
    """ASGI middleware for Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("extensions", {})[RECEIPTS] = {}
        exchange = _Exchange(receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.close()


class _Exchange:
    """One request and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._next: asyncio.Future[Message] | None = None
        self._num_taken = 0
        self._changed = asyncio.Event()

    async def send(self, message: Message) -> None:
        await self._send(message)  # waits while the client's connection is full
        self._num_taken += len(message.get("body", b""))
        if self._num_taken >= STEP_BYTES:
            self._changed.set()

    async def receive(self) -> Message:
        """The client's next message, or a receipt if one is due before."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
            self._next.add_done_callback(lambda ended: self._changed.set())
        while not self._next.done() and self._num_taken < STEP_BYTES:
            self._changed.clear()
            await self._changed.wait()
        if self._next.done():
            message, self._next = self._next.result(), None
            return message
        num_bytes, self._num_taken = self._num_taken, 0
        return {"type": RECEIPT, "num_bytes": num_bytes}

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
