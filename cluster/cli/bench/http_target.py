"""Completions over HTTP, many at once: asyncio's streams, and of HTTP/1.1 what an answer needs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from cluster.cli.bench.load import RequestFailed
from cluster.cli.client import Client, refusal
from cluster.cli.exit_codes import ExitCode

_MAX_ERROR_BYTES = 1 << 16


class HttpTarget:
    """See ``Target``. Every request has a connection of its own."""

    def __init__(self, client: Client, model: str | None, cache_salt: str) -> None:
        url = urlsplit(client.url)
        self._tls = client.tls
        self._host = url.hostname or ""
        self._port = url.port or (443 if self._tls else 80)
        headers = {**client.headers, "Host": url.netloc, "Connection": "close"}
        self._head = f"POST {url.path}/v1/completions HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        self._fields: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "cache_salt": cache_salt,
            **({} if model is None else {"model": model}),
        }

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, saw: Callable[[], None]
    ) -> int:
        """See ``Target``. A piece is an event with text: a token that has none yet comes later."""
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, **self._fields}).encode()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            return await _read_answer(reader, saw)
        except (asyncio.IncompleteReadError, ValueError, KeyError, IndexError) as err:
            raise RequestFailed("cut off", "the answer ended before it was whole") from err
        finally:
            writer.close()

    async def close(self) -> None:
        """Nothing is kept."""


async def _read_answer(reader: asyncio.StreamReader, saw: Callable[[], None]) -> int:
    """Tokens of a stream that is whole."""
    status = int((await reader.readline()).split()[1])
    is_chunked = False
    while line := (await reader.readline()).strip().lower():
        is_chunked |= line.startswith(b"transfer-encoding:") and line.endswith(b"chunked")
    pieces = _chunks(reader) if is_chunked else _rest(reader)
    if status != 200:
        raise await _refused(status, pieces)
    tokens, is_whole = 0, False
    async for event in _events(pieces):
        if event == b"[DONE]":
            break
        found = json.loads(event)
        if "error" in found:
            error = found["error"]
            raise RequestFailed(str(error["code"] or error["type"]), str(error["message"]))
        for choice in found["choices"]:
            is_whole |= choice["finish_reason"] is not None
            saw()
        if found.get("usage"):
            tokens = int(found["usage"]["completion_tokens"])
    if not is_whole:
        raise RequestFailed("cut off", "the stream ended before the text was finished")
    return tokens


async def _refused(status: int, pieces: AsyncIterator[bytes]) -> RequestFailed:
    """From an answer with an error object."""
    body = b""
    async for piece in pieces:
        body = (body + piece)[:_MAX_ERROR_BYTES]
    err = refusal(status, body)
    try:
        reason = f"{status} {json.loads(body)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        reason = str(status)
    return RequestFailed(reason, err.message, ExitCode(err.code))


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a chunked body. Raises ``IncompleteReadError`` where it is cut."""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body up to the end of its connection."""
    while piece := await reader.read(1 << 16):
        yield piece


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What follows ``data:`` in a stream of events."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()
