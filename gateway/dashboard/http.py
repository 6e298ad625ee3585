"""Routes of the dashboard, for the public port and for the admin port."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import RequestError
from gateway.calls.gateway import Gateway
from gateway.dashboard.data import PageData

PAGES = ("/", "/dashboard")
_FOLDER = Path(__file__).parent / "static"
_STATIC = "/dashboard/static/"
_PUBLIC_PORT, _ADMIN_PORT = b'data-port="public"', b'data-port="admin"'
"""HTML attribute that tells the page which port serves it."""
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """Read the static files, by path relative to their folder."""
    return {
        path.relative_to(_FOLDER).as_posix(): _file(path.read_bytes(), path.suffix)
        for path in sorted(_FOLDER.rglob("*"))
        if path.suffix in _TYPES
    }


def _file(content: bytes, suffix: str) -> _File:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return _File(content, f"{_TYPES[suffix]}; charset=utf-8", etag)


def open_paths() -> frozenset[str]:
    """Return the paths that need no key, as they reveal nothing about the cluster."""
    return frozenset(PAGES) | {_STATIC + name for name in _files()}


def routes(gateway: Gateway, *, is_admin: bool) -> list[BaseRoute]:
    """Make the routes of the page (with operation buttons if ``is_admin``), its files and data."""
    keys = gateway.admin_keys if is_admin else gateway.keys
    data, page = PageData(gateway, keys), _files()["index.html"]
    if is_admin:
        page = _file(page.content.replace(_PUBLIC_PORT, _ADMIN_PORT), ".html")
    files = [
        Route(_STATIC + name, _serve(file), methods=["GET"]) for name, file in _files().items()
    ]

    async def bank(request: Request) -> Any:
        number = request.query_params.get("bank", "0")
        if not (number.isascii() and number.isdecimal() and len(number) < 9):
            raise RequestError(f"bank ({number[:32]!r}) must be a whole number", "bank")
        return await data.bank_load(int(number))

    async def history(request: Request) -> Any:
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdecimal() and len(after) < 16):
            raise RequestError(f"after ({after[:32]!r}) must be a whole number of seconds", "after")
        return await data.history(float(after))

    async def whole(request: Request) -> Any:
        return await data.state()

    return [
        *(Route(path, _serve(page), methods=["GET"]) for path in PAGES),
        *files,
        Route("/dashboard/api/state", _answer(whole), methods=["GET"]),
        Route("/dashboard/api/history", _answer(history), methods=["GET"]),
        Route("/dashboard/api/load", _answer(bank), methods=["GET"]),
    ]


def _serve(file: _File) -> Callable[[Request], Awaitable[Response]]:
    headers = {**_HEADERS, "etag": file.etag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

    return serve


def _answer(make: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        content = json.dumps(await make(request), separators=(",", ":"), allow_nan=False)
        return Response(
            content, headers={"cache-control": "no-store"}, media_type="application/json"
        )

    return answer
