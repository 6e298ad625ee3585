"""The HTTP routes, which convert OpenAI request bodies into calls to ``Gateway``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.core.errors import RequestError
from cluster.core.release import RELEASE, installed_version
from gateway.auth.auth import EVENTS, NUMBERS_BY_EXPERT, check_operator, is_operator
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway, new_call_id
from gateway.calls.request_trace import note_response_id
from gateway.core.call import ChatInput, GenerateCall
from gateway.core.delta import ChoiceDelta, Usage
from gateway.core.errors import RouteError, report_error
from gateway.core.field_checks import check_stream, require_one_of
from gateway.core.headers import with_headers
from gateway.core.protocols import error_body
from gateway.core.request_id import HEADER as REQUEST_ID
from gateway.core.request_id import check_request_id
from gateway.dashboard import http as dashboard
from gateway.http import messages, openapi
from gateway.http.convert import chat_call, chat_input, completion_call
from gateway.http.json_output import dump_json, dump_long
from gateway.http.middleware import (
    UNAUTHENTICATED_PATHS,
    CancellableEndpoint,
    HttpMiddleware,
    Responder,
    path_of,
)
from gateway.http.openai_format import ChatFormat, CompletionFormat, OpenAIFormat
from gateway.http.parse import parse_body
from gateway.http.pooling import PoolingEndpoint
from gateway.http.request_body import read_json, timeout_header_s, using_model
from gateway.http.schema import (
    ChatBody,
    ChatStreamOptionsBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from gateway.http.serve_paths import SERVE_PATHS, serve_routes
from gateway.http.sse import SseStream
from gateway.http.unsupported import check_unsupported
from gateway.observability.metrics import CONTENT_TYPE
from gateway.offload.long_work import free_gradually
from workers.requests.inspection import Pooling

_EXPOSED_HEADERS = (
    *(REQUEST_ID, "retry-after", "retry-after-ms", "x-should-retry", "openai-processing-ms"),
    *("openai-version", "x-expertmesh-placement-epoch", "x-expertmesh-replica", "request-id"),
)
"""Response headers that CORS lets a web page read."""
_ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Ends of paths that vLLM serves on its API port, and this gateway only on its admin port."""


@dataclass(frozen=True, slots=True)
class HttpProtocol:
    """The routes of a further protocol on the HTTP port, implemented in its own folder."""

    routes: Callable[[Gateway], Sequence[BaseRoute]]
    endpoints: tuple[openapi.EndpointSpec, ...]
    """Descriptions of the routes for the OpenAPI document."""


def build_http_app(
    gateway: Gateway, protocols: Sequence[HttpProtocol] = (), *, is_behind_serve: bool = False
) -> FastAPI:
    """Build the ASGI application; it works under ``/`` and under any prefix (``root_path``).

    Args:
        gateway: the gateway that serves the calls.
        protocols: additional protocols; see ``gateway.protocols``.
        is_behind_serve: whether Ray Serve's proxy adds request ids and sets ``root_path``.
    """
    api = HttpApi(gateway, protocols)
    app = FastAPI(
        title="expertmesh",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: route_error},
    )
    routes = [*api.routes(), *serve_routes(gateway), *dashboard.routes(gateway, is_admin=False)]
    app.router.routes.extend(routes)
    public = frozenset({"/metrics"} if gateway.limits.public_metrics else ())
    app.add_middleware(
        HttpMiddleware,
        gateway=gateway,
        keys=gateway.keys,
        routes=routes,
        adds_request_id=not is_behind_serve,
        root_path="" if is_behind_serve else gateway.limits.root_path,
        open_paths=UNAUTHENTICATED_PATHS | SERVE_PATHS | dashboard.open_paths() | public,
    )
    if gateway.limits.cors_origins:  # outermost layer, as the preflight of a browser has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.limits.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )
    return app


class HttpApi:
    def __init__(self, gateway: Gateway, protocols: Sequence[HttpProtocol] = ()) -> None:
        self._gateway = gateway
        self._protocols = protocols
        added = tuple(one for protocol in protocols for one in protocol.endpoints)
        self._endpoints = openapi.ENDPOINTS + added

    def routes(self) -> list[BaseRoute]:
        completions = GenerateEndpoint(self._gateway, "completion")
        chat = GenerateEndpoint(self._gateway, "chat")
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.get_model, methods=["GET"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            *(
                Route(path, endpoint, methods=["POST"])
                for path, endpoint in PoolingEndpoint.by_path(self._gateway).items()
            ),
            *messages.routes(self._gateway),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/v2/health/live", self.health, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/cluster/v1/status", self.status, methods=["GET"]),
            Route("/cluster/v1/placement", self.placement, methods=["GET"]),
            Route("/cluster/v1/load", self.load, methods=["GET"]),
            Route("/cluster/v1/events", self.events, methods=["GET"]),
            Route(openapi.PATH, self.openapi, methods=["GET"]),
            *(route for protocol in self._protocols for route in protocol.routes(self._gateway)),
        ]

    async def list_models(self, request: Request) -> Response:
        bodies = [_model_body(*one) for one in self._gateway.shared.models.names()]
        return _json_response({"object": "list", "data": bodies})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        return _json_response(_model_body(name, self._gateway.serving(name)))

    async def tokenize(self, request: Request) -> Response:
        gateway = self._gateway
        body, chat = await read_json(request, gateway, _read_tokenize)
        async with using_model(request, gateway, body.model) as model:
            ids = await model.prompts.tokenize(body.prompt or "", chat, body.add_special_tokens)
            tokenizer = model.prompts.require_tokenizer("prompt")
            facts = model.model.facts
            head = {"count": len(ids), "max_model_len": facts.max_model_len if facts else None}

            def render() -> bytes:
                named = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
                return dump_long({**head, "tokens": ids, "token_strs": named})

            return _json_response(await gateway.long_work.run(len(ids), render))

    async def detokenize(self, request: Request) -> Response:
        gateway = self._gateway
        body = await read_json(request, gateway, partial(parse_body, DetokenizeBody))
        async with using_model(request, gateway, body.model) as model:
            text = await model.prompts.decode(body.tokens, model.require_facts())
            return _json_response(
                await gateway.long_work.run(len(text), dump_json, {"prompt": text})
            )

    async def health(self, request: Request) -> Response:
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """Respond with status 200 if new requests can be served, else 503 with the reasons."""
        models = self._gateway.shared.models
        reasons = models.not_ready_reasons(is_operator(self._gateway.keys))
        status = 503 if reasons else 200
        return _json_response({"ready": not reasons, "reasons": reasons}, status)

    async def version(self, request: Request) -> Response:
        gateway = self._gateway
        return _json_response(
            {
                "version": RELEASE,
                "ray": installed_version("ray"),
                "torch": installed_version("torch"),
                "model": gateway.model.name,
                "placement_epoch": gateway.placement_epoch,
            }
        )

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of all replicas and workers; by expert or layer only for operators."""
        content = await self._gateway.status.render_metrics(is_operator(self._gateway.keys))
        return Response(content, headers={"content-type": CONTENT_TYPE})

    async def status(self, request: Request) -> Response:
        gateway = self._named(request)
        return _json_response(await gateway.status.read(is_operator(gateway.keys)))

    async def placement(self, request: Request) -> Response:
        """Return the worker of each copy of each expert."""
        check_operator(self._gateway.keys, NUMBERS_BY_EXPERT)
        return _json_response(await self._named(request).numbers.placement())

    async def load(self, request: Request) -> Response:
        """Return the number of tokens by expert and by copy, and the resulting balance."""
        check_operator(self._gateway.keys, NUMBERS_BY_EXPERT)
        return _json_response(await self._named(request).numbers.load())

    async def events(self, request: Request) -> Response:
        check_operator(self._gateway.keys, EVENTS)
        snapshot = await self._named(request).numbers.snapshot() or {}
        return _json_response({"schema": 1, "events": snapshot.get("history", [])})

    async def openapi(self, request: Request) -> Response:
        root_path = str(request.scope.get("root_path") or "")
        return _json_response(openapi.document(root_path, self._endpoints))

    def _named(self, request: Request) -> Gateway:
        """Return the gateway of the model that the query names, by default the first."""
        return self._gateway.serving(request.query_params.get("model"))


def _model_body(name: str, gateway: Gateway) -> dict[str, Any]:
    facts = gateway.model.facts
    cluster_model = (gateway.cluster.snapshot or {}).get("model") or {}
    return {
        "id": name,
        "object": "model",
        "created": gateway.status.created,
        "owned_by": "expertmesh",
        "root": gateway.model.name,
        "parent": None if name == gateway.model.name else gateway.model.name,
        "max_model_len": facts.max_model_len if facts else cluster_model.get("max_model_len"),
        "embedding_pooling": [kind.value for kind in Pooling],
    }


def _read_tokenize(data: dict[str, Any]) -> tuple[TokenizeBody, ChatInput | None]:
    check_unsupported(data, "tokenize")
    body = parse_body(TokenizeBody, data)
    require_one_of(prompt=body.prompt, messages=body.messages)
    chat = chat_input(body) if body.prompt is None else None
    return body.model_copy(update={"messages": None, "tools": None}), chat


class _GenerateRequest(NamedTuple):
    """A parsed call. It has no reference to the body, so that a large body is freed early."""

    call: GenerateCall
    stream: ChatStreamOptionsBody | None
    """Options of the stream; None if the response is not streamed."""
    request_id: str | None


class GenerateEndpoint(CancellableEndpoint[_GenerateRequest]):
    def __init__(self, gateway: Gateway, kind: Literal["completion", "chat"]) -> None:
        super().__init__(gateway)
        self._kind = kind
        self._format = ChatFormat if kind == "chat" else CompletionFormat

    def _parse(self, request: Request, data: dict[str, Any]) -> _GenerateRequest:
        check_unsupported(data, self._kind)
        body: GenerateBody
        if self._kind == "chat":
            body = parse_body(ChatBody, data)
            call = chat_call(body)
        else:
            body = parse_body(CompletionBody, data)
            call = completion_call(body)
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        if body.stream:
            check_stream(call)
        call = with_headers(call, request.headers, timeout_header_s(request))
        options = (body.stream_options or ChatStreamOptionsBody()) if body.stream else None
        return _GenerateRequest(call, options, body.request_id)

    async def _respond(
        self, request: Request, parsed: _GenerateRequest, responder: Responder
    ) -> None:
        call, stream_options, request_id = parsed
        call_id = new_call_id(call.kind)
        answer_id = None
        if request_id is not None:
            answer_id = f"{call_id.partition('-')[0]}-{check_request_id(request_id)}"
            note_response_id(answer_id)
        with await self._gateway.start(call, call_id) as running:
            for name in filter(None, (request_id, answer_id)):
                self._gateway.running.add(name, running.queue)
            formatter: OpenAIFormat = self._format(
                running, running.tokenizer, running.fingerprint, answer_id
            )
            if stream_options is None:
                choices = await collect(running)
                size = sum(choice.size for choice in choices)
                whole = await self._gateway.long_work.run(
                    size, _dump_whole, formatter, choices, running.usage
                )
                await responder.json(whole)
                return
            formatter.shows_usage = bool(stream_options.include_usage)
            stream = SseStream(
                gateway=self._gateway,
                responder=responder,
                formatter=formatter,
                request_id=request.state.request_id,
                options=stream_options,
            )
            await stream.send(running)


def _dump_whole(formatter: OpenAIFormat, choices: list[ChoiceDelta], usage: Usage) -> bytes:
    """Return the JSON of a complete response. Empties ``choices`` to free memory gradually."""
    body = formatter.response_body(choices, usage)
    raw = dump_long(body)
    free_gradually(body)
    free_gradually(choices)
    return raw


def _json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response; ``content`` may be bytes that are JSON already."""
    raw = content if isinstance(content, bytes) else dump_json(content)
    return Response(raw, status, headers, media_type="application/json")


async def route_error(request: Request, error: HTTPException) -> Response:
    """Respond with an error object if no route has the path (404) or allows the method (405)."""
    path = request.url.path[:256]
    if error.status_code == 405:
        message = f"{request.method} is not allowed for {path}"
    else:
        message = f"{request.method} {path} does not exist"
        if path.endswith(_ADMIN_PATHS):
            message += " on this port: use the admin port"
    report = report_error(RouteError(message, error.status_code))
    headers = {**report.headers(), **(error.headers or {})}
    body = error_body(path_of(request.scope), report, getattr(request.state, "request_id", ""))
    return _json_response(body, report.http_status, headers)
