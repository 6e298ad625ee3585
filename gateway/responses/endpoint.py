"""The routes of Responses: create, read and delete responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway
from gateway.calls.running_call import RunningCall
from gateway.core.delta import Finish
from gateway.core.errors import StorageError
from gateway.core.headers import with_headers
from gateway.http.json_output import dump_long
from gateway.http.middleware import CancellableEndpoint, Responder
from gateway.http.pagination import Page, json_response
from gateway.http.parse import parse_body
from gateway.http.request_body import timeout_header_s
from gateway.offload.long_work import INLINE_SIZE
from gateway.responses.checked_request import (
    CheckedRequest,
    check_response_body,
    check_size,
    input_items,
    referenced_id,
)
from gateway.responses.conversation import rename_error_fields
from gateway.responses.format import OutputFormat
from gateway.responses.items import Item, ItemIdGenerator
from gateway.responses.output import OutputBuilder
from gateway.responses.resource import Resource, ResourceFormat
from gateway.responses.schema import ResponseBody
from gateway.responses.stored import ResponseStore, StoredItems, StoredReferences, id_of, read_items
from gateway.responses.stream import ResponseStream
from gateway.responses.unsupported import check_unsupported

logger = logging.getLogger(__name__)

PATH = "/v1/responses"
RESPONSE_PATH = f"{PATH}/{{response_id}}"
_MAX_LISTED, _DEFAULT_LISTED = 100, 20
"""Maximum and default number of items in a page."""


def routes(gateway: Gateway) -> list[BaseRoute]:
    api = StoredResponses(ResponseStore(gateway.state, gateway.disk))
    return [
        Route(PATH, ResponseEndpoint(gateway), methods=["POST"]),
        Route(RESPONSE_PATH, api.get, methods=["GET"]),
        Route(RESPONSE_PATH, api.delete, methods=["DELETE"]),
        Route(f"{RESPONSE_PATH}/cancel", api.cancel, methods=["POST"]),
        Route(f"{RESPONSE_PATH}/input_items", api.list_input, methods=["GET"]),
    ]


@dataclass(frozen=True, slots=True)
class _ResponseRequest:
    """A parsed body, with its references to stored items."""

    body: ResponseBody
    is_stored: bool
    references: StoredReferences
    checked: CheckedRequest | None
    """The checked request; None if it refers to stored items, which are read later."""


class ResponseEndpoint(CancellableEndpoint[_ResponseRequest]):
    """``POST /v1/responses``."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway)
        self._store = ResponseStore(gateway.state, gateway.disk)

    def _parse(self, request: Request, data: dict[str, Any]) -> _ResponseRequest:
        check_unsupported(data)
        check_size(data)
        body = parse_body(ResponseBody, data)
        is_stored = self._store.should_store(body.store)
        references = StoredReferences.from_ids(_references(body))
        if body.previous_response_id is not None or references.counts:
            return _ResponseRequest(body, is_stored, references, None)
        checked = self._check(body)
        rest = body.model_copy(update={"input": None, "tools": None})
        return _ResponseRequest(rest, is_stored, references, checked)

    async def _respond(
        self, request: Request, parsed: _ResponseRequest, responder: Responder
    ) -> None:
        body, is_stored = parsed.body, parsed.is_stored
        checked = parsed.checked or await self._check_with_stored_items(body, parsed.references)
        fields = with_headers(checked.call, request.headers, timeout_header_s(request))
        response_id = checked.ids.response_id
        with (
            rename_error_fields(checked.paths),
            await self._gateway.start(fields, response_id) as running,
        ):
            tools = checked.tools
            builder = OutputBuilder(
                checked.ids, tools.custom_names, checked.encodes_reasoning, tools.namespaced_names
            )
            output = OutputFormat(running.call, running.tokenizer, builder)
            resource = ResourceFormat(running, checked.repeated_fields, is_stored)
            complete = self._completion(body, checked, output, builder, resource, running.revision)
            if not body.stream:
                whole = await _collect_response(running, output, complete)
                await responder.json(msgspec.json.encode(whole))
                return
            stream = ResponseStream(
                gateway=self._gateway,
                responder=responder,
                request_id=request.state.request_id,
                builder=builder,
                output=output,
                resource=resource,
                complete=complete,
            )
            await stream.send(running)

    async def _check_with_stored_items(
        self, body: ResponseBody, references: StoredReferences
    ) -> CheckedRequest:
        """Check a body that refers to stored items, which count for the body size limit."""
        max_bytes = self._gateway.limits.max_body_bytes
        history = StoredItems([], 0)
        if body.previous_response_id is not None:
            history = await self._store.previous(body.previous_response_id, max_bytes)
        max_bytes -= history.num_bytes
        referenced = await self._store.items(references, "input", max_bytes)
        # in the thread, as joining all texts takes long
        size = INLINE_SIZE + 1
        make = self._check
        checked = await self._gateway.long_work.run(size, make, body, history.items, referenced)
        return replace(checked, call=replace(checked.call, last_revision=history.revision))

    def _check(
        self,
        body: ResponseBody,
        history: Sequence[Item] = (),
        referenced: Mapping[str, Item] | None = None,
    ) -> CheckedRequest:
        checked = check_response_body(
            body, ItemIdGenerator(self._store.new_id()), history, referenced
        )
        # encoded once, not in each event
        encode = msgspec.json.encode
        head = {name: msgspec.Raw(encode(value)) for name, value in checked.repeated_fields.items()}
        return replace(checked, repeated_fields=head)

    def _completion(
        self,
        body: ResponseBody,
        checked: CheckedRequest,
        output: OutputFormat,
        builder: OutputBuilder,
        resource: ResourceFormat,
        revision: str,
    ) -> Callable[[Finish], Awaitable[Resource]]:
        """Return a function that builds and stores the response when the call ends."""

        async def complete(finish: Finish) -> Resource:
            items, num_reasoning = builder.items, output.num_reasoning_tokens
            response = resource.final_response(items, finish, num_reasoning, resource.is_stored)
            if not resource.is_stored:
                return response
            try:
                await self._store.save(response, checked.history, checked.new_items, revision)
            except StorageError as err:
                if body.store:
                    raise
                logger.warning("could not store response %s: %s", response["id"], err)
                return resource.final_response(items, finish, num_reasoning, False)
            return response

        return complete


def _references(body: ResponseBody) -> list[str]:
    return [one for item in input_items(body) if (one := referenced_id(item)) is not None]


async def _collect_response(
    running: RunningCall, output: OutputFormat, complete: Callable[[Finish], Awaitable[Resource]]
) -> Resource:
    """Return the response of a call that is not streamed."""
    (choice,) = await collect(running)
    output.feed([choice])
    assert choice.finish is not None, "the choice has not finished"
    return await complete(choice.finish)


class StoredResponses:
    """The routes of stored responses."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def get(self, request: Request) -> Response:
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise UnsupportedParameterError(
                "stream is not supported for a stored response", "stream"
            )
        stored = await self._store.get(request.path_params["response_id"])
        return json_response(bytes(stored.response))

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        await self._store.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Reject the request: a stored response is complete and cannot be cancelled."""
        response_id = request.path_params["response_id"]
        await self._store.get(response_id)
        message = f"response_id ({response_id}): only responses with background can be cancelled"
        raise RequestError(message, "response_id")

    async def list_input(self, request: Request) -> Response:
        """Return a page of the input items of a response, by default the last item first."""
        page = Page.from_query(request.query_params, _MAX_LISTED, _DEFAULT_LISTED)
        stored = await self._store.get(request.path_params["response_id"])

        def read() -> bytes:
            items = page.select([*stored.history, *stored.input], id_of)
            return dump_long(page.to_body(read_items(items[: page.limit + 1])))

        return json_response(await asyncio.to_thread(read))
