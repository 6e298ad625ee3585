"""The OpenAPI document of the HTTP interface, made of the types that read the bodies.

Served at ``/openapi.json``. Paths are relative to the route prefix, which ``servers`` names. The
admin interface is not in it: it has a port of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway import versions
from gateway.inspect_json import InspectBody
from gateway.openapi_answers import STRING, Schema, answer_schemas, ref
from gateway.readings_http import ClassifyBody, EmbeddingsBody, ScoreBody
from gateway.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

PATH = "/openapi.json"
"""Where it is served."""
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """One route as the document tells it."""

    path: str
    """Below the route prefix."""
    summary: str
    """For people."""
    answer: str | None = None
    """Name of the answer's schema; None: see ``media_type``."""
    body: type[BaseModel] | None = None
    """What a POST sends; None is a GET."""
    streams: bool = False
    """Server-sent events with ``stream``."""
    media_type: str | None = None
    """Of an answer that is not JSON; None with no ``answer``: it is empty."""
    statuses: tuple[int, ...] = ()
    """That the route has beside those that all routes of its method share."""

    @property
    def method(self) -> str:
        """Lower case."""
        return "get" if self.body is None else "post"


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(path="/v1/models", summary="The served model", answer="ModelList"),
    Endpoint(
        path="/v1/models/{model}", summary="One model by name", answer="Model", statuses=(404,)
    ),
    Endpoint(
        path="/v1/completions",
        summary="Text after prompts",
        answer="Completion",
        body=CompletionBody,
        streams=True,
    ),
    Endpoint(
        path="/v1/chat/completions",
        summary="The next message of a conversation",
        answer="ChatCompletion",
        body=ChatBody,
        streams=True,
    ),
    Endpoint(
        path="/v1/embeddings",
        summary="Vectors of prompts",
        answer="Embeddings",
        body=EmbeddingsBody,
    ),
    Endpoint(
        path="/classify", summary="Classes of prompts", answer="Classifications", body=ClassifyBody
    ),
    Endpoint(path="/score", summary="Scores of documents", answer="Scores", body=ScoreBody),
    Endpoint(path="/v1/score", summary="Scores of documents", answer="Scores", body=ScoreBody),
    Endpoint(
        path="/v1/inspect",
        summary="What goes on inside the model",
        answer="Inspection",
        body=InspectBody,
    ),
    Endpoint(path="/tokenize", summary="Text to token ids", answer="Tokens", body=TokenizeBody),
    Endpoint(path="/detokenize", summary="Token ids to text", answer="Text", body=DetokenizeBody),
    Endpoint(path="/health", summary="The process is alive"),
    Endpoint(
        path="/ready",
        summary="Whether requests can be served",
        answer="Readiness",
        statuses=(503,),
    ),
    Endpoint(path="/v2/health/live", summary="Same as /health"),
    Endpoint(
        path="/v2/health/ready", summary="Same as /ready", answer="Readiness", statuses=(503,)
    ),
    Endpoint(path="/version", summary="Versions of what runs here", answer="Version"),
    Endpoint(path="/metrics", summary="Prometheus metrics", media_type="text/plain"),
    Endpoint(path="/cluster/v1/status", summary="The cluster's state", answer="ClusterView"),
    Endpoint(
        path="/cluster/v1/placement",
        summary="Which device holds which copy of which expert",
        answer="ClusterView",
        statuses=(503,),
    ),
    Endpoint(
        path="/cluster/v1/load",
        summary="Tokens by expert",
        answer="ClusterView",
        statuses=(503,),
    ),
    Endpoint(
        path="/cluster/v1/events", summary="What happened to the cluster", answer="ClusterView"
    ),
    Endpoint(path=PATH, summary="This document", media_type="application/json"),
)
"""All routes, in the order of the interface."""
_ERRORS = {
    400: "The request is wrong: error.param names the field",
    401: "No key, or one that is not known",
    403: "The key does not allow this",
    404: "No such model",
    408: "The request's time was over before it began",
    409: "An operator ended the request",
    413: "The body is above the limit",
    429: "Too much is going on: see Retry-After",
    500: "A mistake of the server",
    503: "Nothing can be served now: see Retry-After",
    504: "The request's time was over while it ran",
}
_OF_POST = (400, 401, 403, 404, 408, 409, 413, 429, 500, 503, 504)
_OF_GET = (401, 403, 500)
_HEADERS: tuple[tuple[str, str, Schema], ...] = (
    ("x-request-id", "Names the request; one that is not fit is replaced", STRING),
    (
        "x-request-timeout-ms",
        "Time that the client gives it",
        {"type": "string", "pattern": "^[0-9]{1,11}$"},
    ),
    ("x-priority", "Lower runs first", {"type": "string", "pattern": "^[+-]?[0-9]{1,10}$"}),
)


def document(root_path: str = "") -> dict[str, Any]:
    """The document for a route prefix."""
    return {**_document(), "servers": [{"url": root_path or "/"}]}


@cache
def _document() -> dict[str, Any]:
    bodies = sorted({e.body for e in ENDPOINTS if e.body is not None}, key=lambda b: b.__name__)
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths[endpoint.path] = {endpoint.method: _operation(endpoint)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "expertmesh",
            "version": versions.own_version(),
            "description": "OpenAI's protocol for a mixture-of-experts model. Unknown fields are "
            "ignored; known ones that are not built are refused by name.",
        },
        "paths": paths,
        "components": {
            "schemas": {**_body_schemas(bodies), **answer_schemas()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _body_schemas(bodies: Sequence[type[BaseModel]]) -> dict[str, Schema]:
    _, defined = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    found: dict[str, Schema] = copy.deepcopy(defined["$defs"])
    return found


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    words = endpoint.path.strip("/").translate(str.maketrans("/{}.", "____"))
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method}_{words}",
        "summary": endpoint.summary,
        "responses": {"200": _answer(endpoint), **_errors(endpoint)},
    }
    parameters = [
        {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        for name, text, schema in (_HEADERS if endpoint.body is not None else _HEADERS[:1])
    ]
    if "{model}" in endpoint.path:
        model = {"name": "model", "in": "path", "required": True, "schema": STRING}
        parameters.append(model)
    operation["parameters"] = parameters
    if endpoint.body is not None:
        schema = ref(endpoint.body.__name__)
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answer(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.answer is not None:
        content["application/json"] = {"schema": ref(endpoint.answer)}
    elif endpoint.media_type is not None:
        is_json = endpoint.media_type == "application/json"
        content[endpoint.media_type] = {"schema": {"type": "object"} if is_json else STRING}
    if endpoint.streams:
        events = ref(f"{endpoint.answer}Chunk")  # of each but the last, [DONE]
        content["text/event-stream"] = {"schema": STRING, "x-events": events}
    told: dict[str, Any] = {"description": endpoint.summary, "headers": _answer_headers()}
    return {**told, "content": content} if content else told


def _answer_headers() -> dict[str, Any]:
    return {
        "x-request-id": {"schema": STRING, "required": True},
        "openai-processing-ms": {"schema": STRING, "required": True},
        "openai-version": {"schema": STRING, "required": True},
        "x-expertmesh-placement-epoch": {"schema": STRING, "required": True},
    }


def _errors(endpoint: Endpoint) -> dict[str, Any]:
    statuses = {*(_OF_GET if endpoint.body is None else _OF_POST), *endpoint.statuses}
    told = {}
    for status in sorted(statuses):
        is_readiness = status == 503 and endpoint.answer == "Readiness"
        schema = ref("Readiness" if is_readiness else "Error")
        content = {"application/json": {"schema": schema}}
        told[str(status)] = {"description": _ERRORS[status], "content": content}
    return told
