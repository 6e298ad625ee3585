"""The OpenAPI document is that of what is really sent."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from gateway.http.api import HttpApi
from gateway.protocols import ENDPOINTS, PROTOCOLS, build_public_app, document
from tests.gateway.anthropic.test_messages import events_of
from tests.gateway.batches.client import make_batch, upload
from tests.gateway.responses.streams import PATH, respond, stream
from tests.gateway.sse_client import read_events
from tests.gateway.stack import MODEL, Stack

pytestmark = pytest.mark.heavy

USER = [{"role": "user", "content": "Who is there?"}]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {"word": {"enum": ["king", "queen"]}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
]
LOOK_UP: dict[str, Any] = {"type": "function", "name": "look_up"}
CUSTOM = {"type": "custom", "name": "say", "description": "Says it."}
ONE = {"type": "allowed_tools", "mode": "required", "tools": [LOOK_UP]}
ANY = {"type": "object", "properties": {"a": {"enum": [1]}}, "additionalProperties": False}
SHORT = {"max_tokens": 4}
REPORTS = {"return_token_ids": True, "prompt_logprobs": 1}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "ROMEO:", **SHORT}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, **SHORT}),
    (
        "/v1/completions",
        {"prompt": [5, 6], "stop_token_ids": list(range(1024)), **REPORTS, **SHORT},
    ),
    ("/v1/chat/completions", {"messages": USER, **SHORT}),
    ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2, **SHORT}),
    ("/v1/chat/completions", {"messages": USER, **REPORTS, **SHORT}),
    (
        "/v1/chat/completions",
        {"messages": USER, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    ),
    (PATH, {"input": "Who is there?", "max_output_tokens": 4}),
    (
        PATH,
        {
            "input": [*USER, {"role": "assistant", "content": "A friend.", "phase": "commentary"}],
            "instructions": "Be brief.",
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": ANY}},
            "metadata": {"a": "b"},
            "max_output_tokens": 4,
        },
    ),
    (
        PATH,
        {
            "input": "x",
            "tools": [LOOK_UP, CUSTOM],
            "tool_choice": ONE,
            "parallel_tool_calls": False,
            "store": False,
        },
    ),
    ("/v1/messages", {"model": MODEL, "messages": USER, "system": "Be brief.", "max_tokens": 4}),
    (
        "/v1/messages",
        {
            "model": MODEL,
            "messages": USER,
            "max_tokens": 300,
            "tools": [{"name": "look_up", "input_schema": TOOLS[0]["function"]["parameters"]}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        },
    ),
    ("/v1/messages/count_tokens", {"model": MODEL, "messages": USER}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/embeddings", {"input": [5, 6], "encoding_format": "base64"}),
    ("/classify", {"input": "a", "labels": ["x", "y"]}),
    ("/score", {"queries": "a", "documents": ["x", "y"]}),
    ("/v1/score", {"text_1": "a", "text_2": "x"}),
    ("/v1/inspect", {"token_ids": [5, 6, 7], "outputs": ["logprobs", "routes", "loss"]}),
    ("/v1/inspect", {"token_ids": [5, 6], "outputs": ["hidden_states", "router_logits"]}),
    ("/tokenize", {"prompt": "a b"}),
    ("/tokenize", {"messages": USER, "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6]}),
]
BAD: list[dict[str, Any]] = [
    {},
    {"model": "other", "prompt": "x", "messages": USER, "input": "x", "queries": "x"},
]


def schema_of(path: str, method: str, status: int, kind: str = "application/json") -> Any:
    """The document's schema of an answer; the components are in it."""
    described = document()
    answer = described["paths"][path][method]["responses"][str(status)]
    content = answer.get("content", {}).get(kind, {})
    schema = content.get("x-events") or content.get("schema")
    return schema and {**schema, "components": described["components"]}


def check(value: object, schema: Any) -> None:
    """Raises where the value does not follow the schema."""
    jsonschema.Draft202012Validator(schema).validate(value)


def test_the_document_names_every_route_and_no_other(stack: Stack) -> None:
    routes = [r for r in HttpApi(stack.gateway, PROTOCOLS).routes() if isinstance(r, Route)]
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        for method in route.methods or {"POST"}  # an application of its own has no methods
        if method != "HEAD"
    }
    assert served == {(endpoint.path, endpoint.method) for endpoint in ENDPOINTS}
    jsonschema.Draft202012Validator.check_schema(document()["components"]["schemas"])
    reached = stack.http.get("/openapi.json").json()
    assert reached == json.loads(json.dumps(document("")))
    assert reached["servers"] == [{"url": "/"}]
    assert document("/some/prefix")["servers"] == [{"url": "/some/prefix"}]


def test_the_document_is_served_under_a_prefix(stack: Stack) -> None:
    async def read(prefix: str) -> Any:
        transport = httpx.ASGITransport(build_public_app(stack.gateway), root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(f"{prefix}/openapi.json")).json()

    prefix = "/some/prefix"
    assert stack.run(read(prefix))["servers"] == [{"url": prefix}]
    assert stack.run(read(""))["servers"] == [{"url": "/"}]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_answers_follow_the_document(stack: Stack, path: str, body: dict[str, Any]) -> None:
    response = stack.http.post(path, json=body)
    assert response.status_code == 200, response.text
    check(response.json(), schema_of(path, "post", 200))
    headers = document()["paths"][path]["post"]["responses"]["200"]["headers"]
    assert set(headers) <= set(response.headers)
    if path == PATH:
        kind = schema_of(path, "post", 200, "text/event-stream")
        for event in stream(stack, **body):
            check(event, kind)
    if "choices" in response.json():
        chunk = schema_of(path, "post", 200, "text/event-stream")
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        for event in read_events(stack, path, **body, **options):
            check(event, chunk)
    if response.json().get("type") == "message":
        chunk = schema_of(path, "post", 200, "text/event-stream")
        events = events_of(stack.http.post(path, json={**body, "stream": True}).text)
        assert events[-1] == {"type": "message_stop"}
        for event in events:
            check(event, chunk)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda one: one.path)
def test_every_route_answers_as_the_document_says(stack: Stack, endpoint: Any) -> None:
    is_post = endpoint.method == "post"
    path = endpoint.path.format(
        model=MODEL,
        response_id=respond(stack, input="x", max_output_tokens=1)["id"],
        file_id=upload(stack, b"x")["id"],
        batch_id="unknown" if is_post else make_batch(stack, b"x")["id"],
    )
    if not is_post:
        response = stack.http.request(endpoint.method, path)
        assert response.status_code == 200
        kind = response.headers.get("content-type", "").partition(";")[0]
        described = document()["paths"][endpoint.path][endpoint.method]["responses"]["200"]
        assert set(described.get("content", {})) == ({kind} if response.content else set())
        if endpoint.answer:
            check(response.json(), schema_of(endpoint.path, endpoint.method, 200))
        return
    for body in BAD if endpoint.body else [{}]:
        response = stack.http.post(path, json=body)
        check(response.json(), schema_of(endpoint.path, "post", response.status_code))
        assert response.status_code in (400, 404)


def test_a_schema_that_is_not_kept_is_found(stack: Stack) -> None:
    """The check above can fail: objects are closed, and all their fields are asked for."""
    answer = stack.http.post("/tokenize", json={"prompt": "a"}).json()
    schema = schema_of("/tokenize", "post", 200)
    check(answer, schema)
    for wrong in ({**answer, "more": 1}, {**answer, "count": "1"}, {"count": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, schema)
