"""The routes of Responses: make one, read it again, remove it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from operator import itemgetter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.delta import Finish
from gateway.core.errors import StorageError
from gateway.core.headers import with_headers
from gateway.generation.answer import collect
from gateway.generation.gateway import Gateway
from gateway.generation.generation import Generation
from gateway.http.middleware import Responder, WatchedEndpoint, timeout_header_s
from gateway.http.pages import Page, json_response
from gateway.http.parse import parse_body
from gateway.responses.conversation import named_as_input
from gateway.responses.format import OutputFormat
from gateway.responses.items import Item, ItemIds
from gateway.responses.output import OutputBuilder
from gateway.responses.resource import Resource, ResourceFormat
from gateway.responses.schema import ResponseBody
from gateway.responses.stored import ResponseStore, StoredResponse
from gateway.responses.stream import ResponseStream
from gateway.responses.turn import Turn, check_size, given_items, make_turn, reference_in
from gateway.responses.unsupported import check_unbuilt

logger = logging.getLogger(__name__)

PATH = "/v1/responses"
ONE = f"{PATH}/{{response_id}}"
_MOST_LISTED, _LISTED = 100, 20
"""Items of one page at most, and by default."""


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The routes."""
    api = StoredResponses(ResponseStore(gateway.state, gateway.disk))
    return [
        Route(PATH, ResponseEndpoint(gateway), methods=["POST"]),
        Route(ONE, api.get, methods=["GET"]),
        Route(ONE, api.delete, methods=["DELETE"]),
        Route(f"{ONE}/cancel", api.cancel, methods=["POST"]),
        Route(f"{ONE}/input_items", api.list_input, methods=["GET"]),
    ]


class ResponseEndpoint(WatchedEndpoint):
    """``POST /v1/responses``."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway)
        self._store = ResponseStore(gateway.state, gateway.disk)

    async def _answer(self, request: Request, data: dict[str, Any], responder: Responder) -> None:
        check_unbuilt(data)
        check_size(data)
        body = parse_body(ResponseBody, data)
        is_stored = self._store.stores(body.store)
        turn = await self._turn(body)
        fields = with_headers(turn.fields, request.headers, timeout_header_s(request))
        response_id = turn.ids.response_id
        with (
            named_as_input(turn.paths),
            await self._gateway.start(fields, response_id) as generation,
        ):
            tools = turn.tools
            builder = OutputBuilder(turn.ids, tools.custom, turn.seals_reasoning, tools.namespaced)
            output = OutputFormat(generation.call, self._gateway.tokenizer, builder)
            resource = ResourceFormat(generation, turn.head, is_stored)
            complete = self._completion(body, turn, output, builder, resource)
            if not body.stream:
                await responder.json(await _whole(generation, output, complete))
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
            await stream.send(generation)

    async def _turn(self, body: ResponseBody) -> Turn:
        history: list[Item] = []
        if body.previous_response_id is not None:
            history = (await self._store.previous(body.previous_response_id)).conversation
        wanted = [reference_in(item) for item in given_items(body)]
        referenced = await self._store.items([one for one in wanted if one is not None], "input")
        return make_turn(body, ItemIds(self._store.new_id()), history, referenced)

    def _completion(
        self,
        body: ResponseBody,
        turn: Turn,
        output: OutputFormat,
        builder: OutputBuilder,
        resource: ResourceFormat,
    ) -> Callable[[Finish], Awaitable[Resource]]:
        """What makes the response at its end, and stores it."""

        async def complete(finish: Finish) -> Resource:
            items, num_reasoning = builder.items, output.num_reasoning_tokens
            response = resource.ended(items, finish, num_reasoning, resource.is_stored)
            if not resource.is_stored:
                return response
            record = StoredResponse(
                response=response, history=list(turn.history), input=list(turn.new_items)
            )
            try:
                await self._store.save(record)
            except StorageError as err:
                if body.store:
                    raise
                logger.warning("response %s is not stored: %s", response["id"], err)
                return resource.ended(items, finish, num_reasoning, False)
            return response

        return complete


async def _whole(
    generation: Generation, output: OutputFormat, complete: Callable[[Finish], Awaitable[Resource]]
) -> Resource:
    """The response of a generation that is not streamed."""
    (choice,) = await collect(generation)
    output.feed([choice])
    assert choice.finish is not None, "it has ended"
    return await complete(choice.finish)


class StoredResponses:
    """The routes of stored responses."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def get(self, request: Request) -> Response:
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise UnsupportedParameterError("stream is not supported for a stored one", "stream")
        found = await self._store.get(request.path_params["response_id"])
        return json_response(found.response)

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        await self._store.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Responses are stored when they are complete: there is nothing to cancel."""
        response_id = request.path_params["response_id"]
        await self._store.get(response_id)
        message = f"response_id ({response_id}): only responses with background can be cancelled"
        raise RequestError(message, "response_id")

    async def list_input(self, request: Request) -> Response:
        """What the model was given for a response, the last item first."""
        page = Page.of(request.query_params, _MOST_LISTED, _LISTED)
        found = await self._store.get(request.path_params["response_id"])
        items = page.ordered([*found.history, *found.input], itemgetter("id"))
        return json_response(page.document(items))
