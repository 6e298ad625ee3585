"""Responses with long contents, read and sent in pieces."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.http.middleware import PIECE_BYTES, Responder, run_until_disconnect


class ContentReader(Protocol):
    """Reads a content sequentially; its methods block."""

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes, at most ``num_bytes``; empty at the end."""

    def close(self) -> None:
        """Release the content."""


class StreamedContentResponse(Response):
    """Sends a content of known size, one piece in memory at a time: the next piece is read when the
    client has read the current one.

    An error of the reader after the first piece closes the connection, as the status was sent.

    Args:
        reader: the content; it is closed at the end.
        size: length of the content in bytes.
        status_code: HTTP status.
        run: runs ``reader.read`` outside the event loop.
        run_later: runs ``reader.close`` outside the event loop, without waiting for it.
    """

    media_type = "application/octet-stream"

    def __init__(
        self,
        reader: ContentReader,
        size: int,
        status_code: int = 200,
        *,
        run: Callable[..., Awaitable[Any]],
        run_later: Callable[[Callable[[], None]], object],
    ) -> None:
        super().__init__(status_code=status_code)
        self._run_later = run_later
        self._run = run
        self._reader = reader
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        responder = Responder.from_scope(scope, send)
        try:
            await run_until_disconnect(receive, responder, self._send(responder))
        finally:
            self._run_later(self._reader.close)

    async def _send(self, responder: Responder) -> None:
        piece = await self._read()
        headers = {"content-type": str(self.media_type), "content-length": str(self._size)}
        await responder.start(self.status_code, headers)
        while piece:
            await responder.body(piece, more=True)
            piece = await self._read()
        await responder.body(b"")

    async def _read(self) -> bytes:
        piece: bytes = await self._run(self._reader.read, PIECE_BYTES)
        return piece
