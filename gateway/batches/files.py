"""Routes to store, list, read and delete files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import RequestError, UnknownNameError
from gateway.batches.file_store import FileStore
from gateway.batches.forms import FormPart, read_form
from gateway.batches.objects import FileFacts, read_or_none
from gateway.calls.gateway import Gateway
from gateway.core.field_checks import require
from gateway.http.downloads import StreamedContentResponse
from gateway.http.pagination import Page, current_tenant, json_response
from gateway.http.request_body import limit_time, read_body
from gateway.state.reader import StoredReader

PATH = "/v1/files"
ONE = f"{PATH}/{{file_id}}"
_MAX_NAME_CHARS = 512
_MIN_TTL_S, _MAX_TTL_S = 3600, 30 * 24 * 3600
"""OpenAI's limits of ``expires_after``, in seconds."""
_MOST_LISTED = 10_000


class FileRoutes:
    """Handlers of the routes of files.

    Args:
        gateway: the replica.
        files: store of the files.
    """

    def __init__(self, gateway: Gateway, files: FileStore) -> None:
        self._gateway = gateway
        self._disk = gateway.disk
        self._files = files
        self._seats = asyncio.Semaphore(gateway.tuning.max_uploads)

    def routes(self) -> list[BaseRoute]:
        """Make the routes."""
        return [
            Route(PATH, self.make, methods=["POST"]),
            Route(PATH, self.list, methods=["GET"]),
            Route(ONE, self.get, methods=["GET"]),
            Route(ONE, self.delete, methods=["DELETE"]),
            Route(f"{ONE}/content", self.content, methods=["GET"]),
        ]

    async def make(self, request: Request) -> Response:
        """Store an uploaded file. Reads the body once fewer than ``max_uploads`` uploads run."""
        async with limit_time(request, self._gateway), self._seats:
            form = await _read_form(request, self._gateway)
            file_id, facts = await self._disk.run(
                partial(
                    self._files.put, current_tenant(), form.filename, form.content, ttl_s=form.ttl_s
                )
            )
        return json_response(facts.to_response(file_id))

    async def list(self, request: Request) -> Response:
        """List a page of files, newest first."""
        purpose = request.query_params.get("purpose")
        page = Page.from_query(request.query_params, _MOST_LISTED, _MOST_LISTED)
        owner, files = current_tenant(), self._files

        def read(file_id: str) -> dict[str, Any] | None:
            facts = read_or_none(files.facts, owner, file_id)
            if facts is None or purpose not in (None, facts.purpose):
                return None
            return facts.to_response(file_id)

        def read_all() -> dict[str, Any]:
            return page.read(files.list_ids(owner), read)

        return json_response(await self._disk.run(read_all))

    async def get(self, request: Request) -> Response:
        """Return the metadata of a file."""
        file_id = request.path_params["file_id"]
        facts = await self._disk.run(self._files.facts, current_tenant(), file_id)
        if facts is None:
            raise _unknown(file_id)
        return json_response(facts.to_response(file_id))

    async def content(self, request: Request) -> Response:
        """Return the content of a file."""
        file_id = request.path_params["file_id"]
        disk = self._disk
        found = await disk.run(self._files.open, current_tenant(), file_id, release=_close)
        if found is None:
            raise _unknown(file_id)
        facts, reader = found
        return StreamedContentResponse(reader, facts.bytes, run=disk.run, run_later=disk.run_later)

    async def delete(self, request: Request) -> Response:
        """Delete a file. Batches are not affected: they have copies of their requests."""
        file_id = request.path_params["file_id"]
        if not await self._disk.run(self._files.delete, current_tenant(), file_id):
            raise _unknown(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})


class _Form(NamedTuple):
    filename: str
    content: bytes
    ttl_s: float | None


async def _read_form(request: Request, gateway: Gateway) -> _Form:
    """Read and check a form. Raises ``RequestError`` and the errors of ``read_body``."""
    raw = await read_body(request, gateway.tuning.max_file_bytes, gateway.tuning)
    parts = await asyncio.to_thread(read_form, request.headers.get("content-type", ""), raw)
    for name in ("file", "purpose"):
        if name not in parts:
            raise RequestError(f"{name} is missing", name, "missing_required_parameter")
    file, purpose = parts["file"], parts["purpose"].text
    require(file.filename is not None, "file", "must be a file with a name")
    require(purpose == "batch", "purpose", f"({purpose[:32]!r}) must be batch")
    name = file.filename or "file"
    rule = f"must have a name of at most {_MAX_NAME_CHARS} characters"
    require(len(name) <= _MAX_NAME_CHARS, "file", rule)
    return _Form(name, file.content, _ttl_s(parts))


def _ttl_s(parts: Mapping[str, FormPart]) -> float | None:
    """Retention time in seconds that a form requests; None selects the default."""
    names = [f"expires_after[{key}]" for key in ("anchor", "seconds")]
    if not any(name in parts for name in names):
        return None
    anchor, seconds = (parts[name].text if name in parts else "" for name in names)
    require(anchor == "created_at", names[0], f"({anchor[:32]!r}) must be created_at")
    is_number = seconds.isascii() and seconds.isdecimal() and len(seconds) <= len(str(_MAX_TTL_S))
    is_inside = is_number and _MIN_TTL_S <= int(seconds) <= _MAX_TTL_S
    require(is_inside, names[1], f"({seconds[:32]!r}) must be {_MIN_TTL_S} to {_MAX_TTL_S}")
    return float(seconds)


def _close(found: tuple[FileFacts, StoredReader] | None) -> None:
    if found is not None:
        found[1].close()


def _unknown(file_id: str) -> UnknownNameError:
    return UnknownNameError(f"there is no file {file_id[:64]!r}")
