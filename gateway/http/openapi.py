"""The OpenAPI document of the HTTP interface, which FastAPI builds from the types of the bodies.

Served at ``/openapi.json``. Paths are relative to the route prefix in ``servers``. The admin
interface is not included: it has a separate port.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from cluster.core.release import RELEASE
from gateway.anthropic.message_types import AnthropicError, MessageAnswer, MessageEvent, TokenCount
from gateway.anthropic.schema import CountTokensBody, MessagesBody
from gateway.http import http_types
from gateway.http.pooling import ClassifyBody, EmbeddingsBody, InspectBody, ScoreBody
from gateway.http.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

PATH = "/openapi.json"
_REF = "#/components/schemas/{model}"
_STRING = {"type": "string"}
_IN_PATH = re.compile(r"\{(\w+)\}")
_OPEN = {"ClusterView", "BankRoutes"}
"""Response types that may have further fields."""


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    path: str
    """Path relative to the route prefix."""
    summary: str
    answer: type | None = None
    body: type[BaseModel] | None = None
    """Type of the JSON request body; None without a body."""
    events: tuple[type, ...] = ()
    """Types of the server-sent events of a streamed response."""
    media: type[Response] = JSONResponse
    statuses: tuple[int, ...] = ()
    """Status codes in addition to the common ones of the method."""
    method_override: Literal["", "post", "delete"] = ""
    """The HTTP method; empty is POST for a route with a body and GET without one."""
    query: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = ()
    """Query parameters: name, description, members of the schema."""
    error: type = http_types.ErrorObject

    @property
    def method(self) -> str:
        return self.method_override or ("get" if self.body is None else "post")


_COMPLETION_EVENTS = (http_types.CompletionChunk, http_types.ErrorObject)
_COMPLETION = (http_types.Completion, CompletionBody, _COMPLETION_EVENTS)
_CHAT = (
    http_types.ChatCompletion,
    ChatBody,
    (http_types.ChatCompletionChunk, http_types.ErrorObject),
)
_MESSAGES = (MessageAnswer, MessagesBody, (MessageEvent, AnthropicError))
_READY = (http_types.ReadinessObject, None, (), JSONResponse, (503,))
_VIEW = (http_types.ClusterView, None, (), JSONResponse, (503,))

ENDPOINTS: tuple[EndpointSpec, ...] = (
    EndpointSpec("/v1/models", "The served model", http_types.ModelList),
    EndpointSpec(
        "/v1/models/{model}", "One model by name", http_types.ModelObject, statuses=(404,)
    ),
    EndpointSpec("/v1/completions", "Complete prompts", *_COMPLETION),
    EndpointSpec("/v1/chat/completions", "Generate the next message of a conversation", *_CHAT),
    EndpointSpec("/v1/messages", "Anthropic Messages", *_MESSAGES, error=AnthropicError),
    EndpointSpec(
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation",
        TokenCount,
        CountTokensBody,
        error=AnthropicError,
    ),
    EndpointSpec("/v1/embeddings", "Embed prompts", http_types.Embeddings, EmbeddingsBody),
    EndpointSpec("/classify", "Classify prompts", http_types.Classifications, ClassifyBody),
    EndpointSpec("/score", "Score documents for queries", http_types.Scores, ScoreBody),
    EndpointSpec("/v1/score", "Score documents for queries", http_types.Scores, ScoreBody),
    EndpointSpec(
        "/v1/inspect",
        "Return hidden states, attention and routing",
        http_types.InspectionObject,
        InspectBody,
    ),
    EndpointSpec(
        "/tokenize", "Convert text to token ids", http_types.TokenizedObject, TokenizeBody
    ),
    EndpointSpec(
        "/detokenize", "Convert token ids to text", http_types.DetokenizedObject, DetokenizeBody
    ),
    EndpointSpec("/health", "The process is alive", media=Response),
    EndpointSpec("/ready", "Whether requests can be served", *_READY),
    EndpointSpec("/v2/health/live", "Same as /health", media=Response),
    EndpointSpec("/v2/health/ready", "Same as /ready", *_READY),
    EndpointSpec("/version", "Versions of the server", http_types.VersionObject),
    EndpointSpec("/metrics", "Prometheus metrics", media=PlainTextResponse),
    EndpointSpec("/cluster/v1/status", "The cluster's state", http_types.ClusterView),
    EndpointSpec("/cluster/v1/placement", "The worker of each copy of each expert", *_VIEW),
    EndpointSpec("/cluster/v1/load", "Number of tokens by expert", *_VIEW),
    EndpointSpec("/cluster/v1/events", "Recent events of the cluster", http_types.ClusterView),
    EndpointSpec(PATH, "This interface as an OpenAPI document"),
)
"""The routes of this folder in the order of the document; other protocols add more."""
_ERRORS = {
    400: "The request is invalid: error.param names the field",
    401: "The API key is missing or unknown",
    403: "The API key does not permit this request",
    404: "The model does not exist",
    408: "The request timed out before it started",
    409: "An operator aborted the request",
    413: "The body is larger than the limit",
    429: "The server or the API key is at its limit: see Retry-After",
    500: "Internal server error",
    503: "The server cannot serve requests now: see Retry-After",
    504: "The request timed out while it was running",
}
_OF_GET = (401, 403, 500)
_HEADERS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("x-request-id", "Id of the request; an invalid id is replaced", _STRING),
    ("x-request-timeout-ms", "Timeout in ms", {**_STRING, "pattern": "^[0-9]{1,11}$"}),
    (
        "x-priority",
        "Priority: lower runs first",
        {**_STRING, "pattern": "^[+-]?[0-9]{1,10}$"},
    ),
    ("x-session-id", "Id of the conversation", {**_STRING, "pattern": "^[!-~]{1,256}$"}),
)
_ANSWER_HEADERS = (
    *("x-request-id", "openai-processing-ms", "openai-version"),
    "x-expertmesh-placement-epoch",
)


def document(
    root_path: str = "", endpoints: tuple[EndpointSpec, ...] = ENDPOINTS
) -> dict[str, Any]:
    """Return the OpenAPI document of the given routes."""
    return {**_document(endpoints), "servers": [{"url": root_path or "/"}]}


@cache
def _document(endpoints: tuple[EndpointSpec, ...]) -> dict[str, Any]:
    app = FastAPI(
        title="expertmesh",
        version=RELEASE,
        description="OpenAI's protocol and Anthropic's Messages for a mixture-of-experts model. "
        "Unknown fields are ignored; known fields that are not supported are rejected by name.",
        separate_input_output_schemas=False,
    )
    for endpoint in endpoints:
        _add(app, endpoint)
    document = app.openapi()
    events = {event for endpoint in endpoints for event in endpoint.events}
    closed_types = {*events, *(endpoint.error for endpoint in endpoints)}
    closed = {**document["components"]["schemas"], **_schemas(closed_types)}
    for name in closed.keys() - _OPEN:
        closed[name]["additionalProperties"] = False
    bodies = {endpoint.body for endpoint in endpoints if endpoint.body}
    document["components"] = {
        "schemas": {**_schemas(bodies), **closed},
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    return {**document, "security": [{}, {"key": []}, {"header": []}]}


def _schemas(types: Iterable[type]) -> dict[str, Any]:
    """Return the schemas of the given types, and of the types that they contain, by name."""
    adapters: list[tuple[str, Literal["validation"], TypeAdapter[Any]]] = [
        (one.__name__, "validation", TypeAdapter(one))
        for one in sorted(types, key=lambda one: one.__name__)
    ]
    defined: dict[str, Any] = TypeAdapter.json_schemas(adapters, ref_template=_REF)[1]["$defs"]
    return defined


def _add(app: FastAPI, endpoint: EndpointSpec) -> None:
    path_name = endpoint.path.strip("/").translate(str.maketrans("/{}.", "____"))
    app.add_api_route(
        endpoint.path,
        lambda: None,  # for the document only: gateway.http.api serves the route
        methods=[endpoint.method],
        operation_id=f"{endpoint.method}_{path_name}",
        summary=endpoint.summary,
        response_model=endpoint.answer,
        response_class=endpoint.media,
        responses=_responses(endpoint),
        openapi_extra=_request(endpoint),
    )


def _responses(endpoint: EndpointSpec) -> dict[int | str, dict[str, Any]]:
    success: dict[str, Any] = {
        "description": endpoint.summary,
        "headers": {name: {"schema": _STRING, "required": True} for name in _ANSWER_HEADERS},
    }
    if endpoint.events:  # all events except the final [DONE] of OpenAI
        event = {"anyOf": [*map(_ref, endpoint.events)]}
        success["content"] = {"text/event-stream": {"schema": _STRING, "x-events": event}}
    responses: dict[int | str, dict[str, Any]] = {200: success}
    for status in sorted({*(_OF_GET if endpoint.body is None else _ERRORS), *endpoint.statuses}):
        is_readiness = status == 503 and endpoint.answer is http_types.ReadinessObject
        schema = _ref(http_types.ReadinessObject if is_readiness else endpoint.error)
        content = {"application/json": {"schema": schema}}
        responses[status] = {"description": _ERRORS[status], "content": content}
    return responses


def _request(endpoint: EndpointSpec) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        for name, text, schema in (_HEADERS if endpoint.body is not None else _HEADERS[:1])
    ]
    for name in _IN_PATH.findall(endpoint.path):
        parameters.append({"name": name, "in": "path", "required": True, "schema": _STRING})
    for name, text, schema in endpoint.query:
        parameter = {"name": name, "in": "query", "required": False, "description": text}
        parameters.append({**parameter, "schema": dict(schema)})
    if endpoint.body is None:
        return {"parameters": parameters}
    content = {"application/json": {"schema": _ref(endpoint.body)}}
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
