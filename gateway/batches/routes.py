"""Routes of Files and Batches, with their entries in the OpenAPI document."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import UnsupportedParameterError
from gateway.batches import batch_types
from gateway.batches.batch_store import BatchStore
from gateway.batches.batches import BatchBody, BatchRoutes
from gateway.batches.files import FileRoutes
from gateway.calls.gateway import Gateway
from gateway.http.downloads import StreamedContentResponse
from gateway.http.openapi import EndpointSpec

_LISTING = (
    ("limit", "Maximum number of objects", (("type", "integer"), ("minimum", 1))),
    ("order", "asc or desc (default)", (("type", "string"), ("pattern", "^(asc|desc)$"))),
    ("after", "Id of the object before the first one to list", (("type", "string"),)),
)
_PURPOSE = ("purpose", "batch or batch_output", (("type", "string"),))
_FILE, _BATCH = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
ENDPOINTS = (
    EndpointSpec(
        "/v1/files",
        "Store a file: multipart/form-data with file and purpose",
        batch_types.StoredFile,
        statuses=(400, 408, 413, 429, 504),
        method_override="post",
    ),
    EndpointSpec(
        "/v1/files",
        "Stored files",
        batch_types.FileList,
        statuses=(400,),
        query=(_PURPOSE, *_LISTING),
    ),
    EndpointSpec(_FILE, "One file", batch_types.StoredFile, statuses=(400, 404)),
    EndpointSpec(
        _FILE,
        "Remove a file",
        batch_types.DeletedFile,
        statuses=(400, 404),
        method_override="delete",
    ),
    EndpointSpec(
        f"{_FILE}/content", "A file's bytes", media=StreamedContentResponse, statuses=(400, 404)
    ),
    EndpointSpec("/v1/batches", "Run a file of requests", batch_types.BatchObject, BatchBody),
    EndpointSpec("/v1/batches", "Batches", batch_types.BatchList, statuses=(400,), query=_LISTING),
    EndpointSpec(_BATCH, "One batch", batch_types.BatchObject, statuses=(400, 404)),
    EndpointSpec(
        f"{_BATCH}/cancel",
        "End a batch",
        batch_types.BatchObject,
        statuses=(404, 409),
        method_override="post",
    ),
)
"""Endpoints in the order of the documentation."""


def routes(gateway: Gateway) -> list[BaseRoute]:
    """Make the routes. Without a state folder, each route responds with an error."""
    if gateway.state is None:
        paths = dict.fromkeys(endpoint.path for endpoint in ENDPOINTS)
        return [Route(path, _refuse, methods=["GET", "POST", "DELETE"]) for path in paths]
    batches = BatchStore(gateway.state)
    return [
        *FileRoutes(gateway, batches.files).routes(),
        *BatchRoutes(gateway, batches).routes(),
    ]


async def _refuse(request: Request) -> Response:
    what = "files" if "/v1/files" in request.url.path else "batches"
    message = f"{what} are not supported: the server was started without --state-dir"
    raise UnsupportedParameterError(message, what)
