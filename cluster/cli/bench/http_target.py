"""Target of a workload that sends completions over HTTP."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from aiohttp.connector import Connection

from cluster.cli.bench.workload import RequestFailed
from cluster.cli.terminal.client import Client, response_error
from cluster.cli.terminal.exit_codes import ExitCode

_MAX_ERROR_BYTES = 1 << 16


class _Connector(aiohttp.TCPConnector):
    """Ends the connections that still close when it is closed itself.

    aiohttp waits only for connections in its pool. One that is not kept waits over TLS for the
    close_notify of the server, and would outlive the event loop.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._transports = weakref.WeakSet[asyncio.Transport]()

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None:
            self._transports.add(connection.transport)
        return connection

    async def close(self, **options: Any) -> None:
        await super().close(**options)
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0)  # a transport closes its socket in the next cycle of the loop


class HttpTarget:
    """Sends completions over HTTP, each on its own connection; see ``BenchTarget``."""

    def __init__(self, client: Client, model: str | None, cache_salt: str) -> None:
        """Must be called in the event loop that sends the requests."""
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, force_close=True, ssl=client.tls or True),
            headers=client.headers,
            timeout=aiohttp.ClientTimeout(),  # none: the workload limits the time of each request
        )
        self._url = f"{client.url}/v1/completions"
        self._fields: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "cache_salt": cache_salt,
            **({} if model is None else {"model": model}),
        }

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, on_piece: Callable[[], None]
    ) -> int:
        """Stream a completion; see ``BenchTarget.complete``.

        ``on_piece`` is called for each choice in an event, not for events without choices.
        """
        body = {"prompt": prompt, "max_tokens": max_tokens, **self._fields}
        try:
            async with self._session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    raise _refused(answer.status, await answer.content.read(_MAX_ERROR_BYTES))
                return await _count_tokens(answer.content, on_piece)
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as err:
            if isinstance(err, OSError):  # a connection that failed or was reset
                raise
            raise RequestFailed("cut off", "the response ended before it was complete") from err

    async def close(self) -> None:
        await self._session.close()


async def _count_tokens(lines: aiohttp.StreamReader, on_piece: Callable[[], None]) -> int:
    """Read an event stream to its end; return the number of output tokens.

    Raises ``RequestFailed`` for an error event or an incomplete stream.
    """
    tokens, is_whole = 0, False
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            break
        found = json.loads(data)
        if "error" in found:
            error = found["error"]
            if not isinstance(error, dict):  # from a server of another kind
                raise RequestFailed("error", str(error))
            raise RequestFailed(str(error["code"] or error["type"]), str(error["message"]))
        for choice in found["choices"]:
            is_whole |= choice["finish_reason"] is not None
            on_piece()
        if found.get("usage"):
            tokens = int(found["usage"]["completion_tokens"])
    if not is_whole:
        raise RequestFailed("cut off", "the stream ended before the text was finished")
    return tokens


def _refused(status: int, body: bytes) -> RequestFailed:
    """Convert an error response to ``RequestFailed``."""
    err = response_error(status, body)
    try:
        reason = f"{status} {json.loads(body)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        reason = str(status)
    return RequestFailed(reason, err.message, ExitCode(err.code))
