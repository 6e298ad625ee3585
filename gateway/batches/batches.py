"""Routes to create, list, read and cancel batches."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.batches.requests import ENDPOINTS
from cluster.core.errors import ConflictError, RequestError, UnknownNameError
from gateway.batches.batch_store import BatchStore
from gateway.batches.objects import ENDED, WINDOW_S, StoredBatch, read_or_none
from gateway.calls.gateway import Gateway
from gateway.core.bodies import StrictBody
from gateway.core.field_checks import check_metadata, require
from gateway.http.pagination import Page, current_tenant, json_response
from gateway.http.parse import parse_body
from gateway.http.request_body import read_json

PATH = "/v1/batches"
ONE = f"{PATH}/{{batch_id}}"
_MOST_LISTED, _LISTED = 100, 20


class OutputExpiry(StrictBody):
    """Retention of output files."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 24 * 3600)]


class BatchBody(StrictBody):
    """Body of a new batch."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiry | None = None


class BatchRoutes:
    """Handlers of the routes of batches.

    Args:
        gateway: the replica.
        batches: store of the batches.
    """

    def __init__(self, gateway: Gateway, batches: BatchStore) -> None:
        self._gateway = gateway
        self._disk = gateway.disk
        self._batches = batches

    def routes(self) -> list[BaseRoute]:
        """Make the routes."""
        return [
            Route(PATH, self.make, methods=["POST"]),
            Route(PATH, self.list, methods=["GET"]),
            Route(ONE, self.get, methods=["GET"]),
            Route(f"{ONE}/cancel", self.cancel, methods=["POST"]),
        ]

    async def make(self, request: Request) -> Response:
        """Store a batch, which a gateway runs later."""
        body = await read_json(request, self._gateway, partial(parse_body, BatchBody))
        rule = f"({body.endpoint[:64]!r}) must be one of {', '.join(ENDPOINTS)}"
        require(body.endpoint in ENDPOINTS, "endpoint", rule)
        rule = f"({body.completion_window[:32]!r}) must be 24h"
        require(body.completion_window == "24h", "completion_window", rule)
        check_metadata(body.metadata or {})
        owner, batches = current_tenant(), self._batches
        file = await self._disk.run(batches.files.get, owner, body.input_file_id)
        if file is None:
            message = f"input_file_id ({body.input_file_id[:64]!r}) names no file"
            raise RequestError(message, "input_file_id")
        now_s, expiry = int(time.time()), body.output_expires_after
        batch = StoredBatch(
            id=batches.new_id(),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            created_at=now_s,
            expires_at=now_s + WINDOW_S,
            metadata=body.metadata,
            output_ttl_s=expiry.seconds if expiry is not None else None,
        )
        await self._disk.run(batches.make, owner, batch, file[1])
        return json_response(batch.to_response())

    async def list(self, request: Request) -> Response:
        """List a page of batches, newest first."""
        page = Page.from_query(request.query_params, _MOST_LISTED, _LISTED)
        owner, batches = current_tenant(), self._batches

        def read(batch_id: str) -> dict[str, Any] | None:
            batch = read_or_none(batches.get, owner, batch_id)
            return None if batch is None else batch.to_response()

        def read_all() -> dict[str, Any]:
            return page.read(batches.list_ids(owner), read)

        return json_response(await self._disk.run(read_all))

    async def get(self, request: Request) -> Response:
        """Return a batch."""
        return json_response((await self._find(request)).to_response())

    async def cancel(self, request: Request) -> Response:
        """Cancel a batch; its finished responses are kept."""
        batch = await self._find(request)
        if batch.status in ENDED:
            raise ConflictError(f"the batch is {batch.status} already")
        await self._disk.run(self._batches.cancel, batch.id)
        asked = msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(time.time()))
        return json_response(asked.to_response())

    async def _find(self, request: Request) -> StoredBatch:
        batch_id = request.path_params["batch_id"]
        found = await self._disk.run(self._batches.get, current_tenant(), batch_id)
        if found is None:
            raise UnknownNameError(f"there is no batch {batch_id[:64]!r}")
        return found
