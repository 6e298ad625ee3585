"""A reverse proxy that notes what clients send and get, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from expertmesh.loop_thread import LoopThread
from gateway.core.headers import AGENT_SESSION_HEADERS

SENT_BY_CLIENTS = Path(__file__).parent / "clients" / "fields.json"
"""By client and route: the fields that it sends, and what worked. Tests compare it with what they
see; with ``EXPERTMESH_WRITE_FIELDS`` set they write it anew."""

_OWN_HOP = frozenset({"connection", "transfer-encoding", "content-length", "host"})
Sent = dict[str, set[str]]
"""Fields by route; a field of an object is ``outer.inner``."""
ERRORS = "errors"
"""The feature of clients that know an error for what it is."""
_WHOLE, _SESSIONS = "without streaming", "sessions"
_SESSION_HEADERS = frozenset(AGENT_SESSION_HEADERS)
_ASKED_BY = {
    "streaming": ("stream",),
    "tools": ("tools",),
    "structured output": (
        *("response_format", "text.format", "output_config.format", "output_format"),
    ),
    "reasoning": ("reasoning", "reasoning_effort", "thinking"),
    "stored responses": ("previous_response_id",),
    _SESSIONS: ("prompt_cache_key", "session_id", "metadata.user_id"),
}
"""Features by the fields that ask for them."""
_SHOWN_BY = {
    "tool results": ("tool_call_id", "tool_result", "function_call_output"),
    "retention": ("cache_control", "cache_ttl", "prompt_cache_options"),
}
"""Features by names that are somewhere in a body."""
FEATURES = (_WHOLE, *_ASKED_BY, *_SHOWN_BY, ERRORS)


class Recorder:
    """Passes requests on to a server and their answers back, as they come."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner
        self.sent: Sent = {}
        self.features: Sent = {}
        """By route: what clients asked for and got."""
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
            self._note_features(request, raw, answer.status)
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
        fields = self.sent.setdefault(route_of(path), set())
        body = _body(raw)
        for name, value in body.items():
            fields.add(name)
            if name in ("stream_options", "response_format") and isinstance(value, dict):
                fields.update(f"{name}.{inner}" for inner in value)

    def _note_features(self, request: web.Request, raw: bytes, status: int) -> None:
        found = self.features.setdefault(route_of(request.path), set())
        if status >= 400:
            found.add(ERRORS)
            return
        headers = {name.lower(): value for name, value in request.headers.items()}
        found.update(features_of(_body(raw), headers))


def _body(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw) if raw.startswith(b"{") else {}
    return body if isinstance(body, dict) else {}


def route_of(path: str) -> str:
    """A path as the OpenAPI document names it."""
    path = re.sub(r"^/v1/models/.+", "/v1/models/{model}", path)
    return re.sub(r"^/v1/responses/[^/]+", "/v1/responses/{response_id}", path)


def features_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[str]:
    """What a request uses, by the names of the table in docs/reference/conformance.md."""
    if body and not body.get("stream"):
        yield _WHOLE
    for feature, paths in _ASKED_BY.items():
        if any(_value_at(body, path) for path in paths):
            yield feature
    text = json.dumps(body)
    for feature, marks in _SHOWN_BY.items():
        if any(f'"{mark}"' in text for mark in marks):
            yield feature
    if _SESSION_HEADERS.intersection(headers):
        yield _SESSIONS


def _value_at(body: Mapping[str, Any], path: str) -> object:
    value: Any = body
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


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


@contextlib.contextmanager
def expecting(target: str, client: str) -> Iterator[Recorder]:
    """A recorder for the length of a ``with`` block, in which a client must send what is known."""
    with recording(target) as recorder:
        yield recorder
    if not recorder.sent:
        return  # skipped, or it failed before it sent anything
    known = json.loads(SENT_BY_CLIENTS.read_text())
    seen = {
        route: {"features": sorted(recorder.features.get(route, ())), "fields": sorted(fields)}
        for route, fields in sorted(recorder.sent.items())
    }
    if os.environ.get("EXPERTMESH_WRITE_FIELDS"):
        known[client] = seen
        SENT_BY_CLIENTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert seen == known.get(client), "set EXPERTMESH_WRITE_FIELDS to write the table anew"
