"""A reverse proxy that notes which fields clients send, and changes nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import aiohttp
from aiohttp import web

from tests.harness.loop_thread import LoopThread

_OWN_HOP = frozenset({"connection", "transfer-encoding", "content-length", "host"})
Sent = dict[str, set[str]]
"""Fields by route; a field of an object is ``outer.inner``."""


class Recorder:
    """Passes requests on to a server and their answers back, as they come."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner
        self.sent: Sent = {}
        self.url = ""

    async def start(self) -> None:
        """Listen on a free loopback port."""
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """End it."""
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self._note(request.path, raw)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OWN_HOP}
        url = f"{self._target}{request.path_qs}"
        async with self._session.request(request.method, url, data=raw, headers=headers) as answer:
            copied = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _OWN_HOP:
                    copied.headers[name] = value
            await copied.prepare(request)
            async for piece in answer.content.iter_any():
                await copied.write(piece)
            await copied.write_eof()
            return copied

    def _note(self, path: str, raw: bytes) -> None:
        fields = self.sent.setdefault(path, set())
        body = json.loads(raw) if raw.startswith(b"{") else {}
        for name, value in body.items():
            fields.add(name)
            if name in ("stream_options", "response_format") and isinstance(value, dict):
                fields.update(f"{name}.{inner}" for inner in value)


@contextlib.contextmanager
def recording(target: str) -> Iterator[Recorder]:
    """A recorder before ``target`` for the length of a ``with`` block."""
    thread = LoopThread(60.0)
    recorder = Recorder(target)
    thread.run(recorder.start())
    try:
        yield recorder
    finally:
        thread.run(recorder.stop())
        thread.close()
