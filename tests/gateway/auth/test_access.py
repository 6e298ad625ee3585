"""Keys, their limits and tenants through both codecs of a running gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from starlette.routing import Route

from cluster.config.gateway import GatewaySection
from gateway.dashboard import http as dashboard
from gateway.http.middleware import UNAUTHENTICATED_PATHS
from gateway.http.serve_paths import SERVE_PATHS
from gateway.protocols import build_public_app
from protos import admin_pb2
from protos import inference_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.stack import WAIT_S, Stack, running_stack

BODY = {"prompt": "hello", "max_tokens": 4}
MESSAGE = request_of(text="hello", sampling_params={"max_tokens": 4})
SELDOM = 0.01
"""A minute: nothing comes back while a test runs, however slowly."""
KEYS = [
    {"name": "free", "key": "free"},
    {"name": "heavy", "key": "heavy", "weight": 3},
    {"name": "slow", "key": "slow", "requests_per_minute": SELDOM},
    {"name": "slow-grpc", "key": "slow-grpc", "requests_per_minute": SELDOM},
    {"name": "single", "key": "single", "max_concurrent": 1},
    {"name": "small", "key": "small", "tokens_per_minute": SELDOM},
    {"name": "small-grpc", "key": "small-grpc", "tokens_per_minute": SELDOM},
]
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway with keys of all kinds."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps({"keys": KEYS}))
    section = GatewaySection(api_key_file=str(file), admin_keys=("root",), request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        yield stack


@pytest.fixture(scope="module")
def stub(keyed: Stack) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(keyed.grpc_target) as channel:
        yield InferenceStub(channel)


def header(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def complete(stack: Stack, key: str) -> httpx.Response:
    return stack.http.post("/v1/completions", json=BODY, headers=header(key))


def refused(response: httpx.Response) -> None:
    """It is the 429 of a key's limit."""
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 60


def test_a_request_says_whose_it_is(keyed: Stack) -> None:
    for key, weight in (("free", 1.0), ("heavy", 3.0)):
        assert complete(keyed, key).status_code == 200
        request = keyed.engine.requests[-1]
        assert (request.tenant, request.weight) == (key, weight)


def test_a_rate_is_kept_over_http(keyed: Stack) -> None:
    headers = header("slow")
    assert keyed.http.get("/v1/models", headers=headers).status_code == 200
    for path in ("/v1/models", "/metrics", "/nope"):  # every path counts
        refused(keyed.http.get(path, headers=headers))
    assert complete(keyed, "free").status_code == 200


def test_a_rate_is_kept_over_grpc(stub: InferenceStub) -> None:
    asked, given = pb.ListModelsRequest(), metadata("slow-grpc")
    stub.ListModels(asked, metadata=given)
    for call in (
        lambda: stub.ListModels(asked, metadata=given),
        lambda: list(stub.GenerateStream(MESSAGE, metadata=given)),
    ):
        code, _, details = failure(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "rate_limit_exceeded"
        assert details["RetryInfo"].retry_delay.seconds >= 1


def test_requests_at_once_are_counted_over_both(keyed: Stack, stub: InferenceStub) -> None:
    given = metadata("single")
    keyed.engine.is_paused = True
    stream = stub.GenerateStream(MESSAGE, metadata=given)
    keyed.wait_for(lambda: bool(keyed.engine.running), "a request that runs")
    refused(complete(keyed, "single"))
    assert failure(lambda: stub.Generate(MESSAGE, metadata=given))[0] is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    stream.cancel()  # type: ignore[no-untyped-call]
    keyed.engine.is_paused = False
    account = keyed.gateway.keys.check(None, "single")
    assert account is not None
    keyed.wait_for(lambda: account.num_running == 0, "the end of the cancelled one")
    assert complete(keyed, "single").status_code == 200
    keyed.wait_for(lambda: account.num_running == 0, "the end of the request")


def test_tokens_are_counted_over_both(keyed: Stack, stub: InferenceStub) -> None:
    assert complete(keyed, "small").status_code == 200
    refused(complete(keyed, "small"))
    assert keyed.http.get("/v1/models", headers=header("small")).status_code == 200
    given = metadata("small-grpc")
    assert stub.Generate(MESSAGE, metadata=given).choices
    assert failure(lambda: stub.Generate(MESSAGE, metadata=given))[0] is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )


def test_refusals_are_counted(keyed: Stack) -> None:
    assert complete(keyed, "slow").status_code in (200, 429)
    refused(complete(keyed, "slow"))
    text = keyed.http.get("/metrics", headers=header("free")).text
    assert 'admission_rejections_total{model_name="tiny",reason="key_requests"}' in text


def test_tenants_share_no_prefix(keyed: Stack, stub: InferenceStub) -> None:
    def salts() -> list[str]:
        found = [request.cache_salt for request in keyed.engine.requests]
        keyed.engine.requests.clear()
        return found

    keyed.engine.requests.clear()
    salted = {**BODY, "cache_salt": "mine"}
    for key in ("free", "single"):
        for body in (BODY, salted):
            answer = keyed.http.post("/v1/completions", json=body, headers=header(key))
            assert answer.status_code == 200, answer.text
    by_key = salts()
    assert len(set(by_key)) == 4, by_key
    stub.Generate(MESSAGE, metadata=metadata("free"))
    assert salts() == [by_key[0]], "the same key has the same prefixes over both codecs"
    for key, salt in (("free", by_key[0]), ("single", by_key[2])):
        # what the engine is asked is looked at: this one does not embed
        keyed.http.post("/v1/embeddings", json={"input": "hello"}, headers=header(key))
        assert salts() == [salt], "and for pooling"


def test_the_admin_key_is_one_of_its_own(keyed: Stack) -> None:
    url = f"http://{keyed.admin.http}/admin/v1/operations"
    assert httpx.get(url, timeout=WAIT_S).status_code == 401
    denied = httpx.get(url, headers=header("free"), timeout=WAIT_S)
    assert denied.status_code == 403
    assert denied.json()["error"]["type"] == "permission_error"
    assert httpx.get(url, headers=header("root"), timeout=WAIT_S).status_code == 200
    assert keyed.http.get("/cluster/v1/status", headers=header("root")).status_code == 200
    with grpc.insecure_channel(keyed.admin.grpc) as channel:
        admin, asked = AdminStub(channel), admin_pb2.ListOperationsRequest()
        codes = grpc.StatusCode
        for given, code in (
            ((), codes.UNAUTHENTICATED),
            (metadata("free"), codes.PERMISSION_DENIED),
        ):
            refusal = failure(lambda given=given: admin.ListOperations(asked, metadata=given))
            assert refusal[0] is code
        admin.ListOperations(asked, metadata=metadata("root"))


def test_every_route_and_procedure_asks_for_a_key(keyed: Stack) -> None:
    app = build_public_app(keyed.gateway)
    routes = {r.path: r.methods or set() for r in app.router.routes if isinstance(r, Route)}
    assert len(routes) > 15
    for path, methods in routes.items():
        for method in (*methods, "OPTIONS", "TRACE", "PATCH"):
            status = keyed.http.request(method, path).status_code
            is_open = path in UNAUTHENTICATED_PATHS | SERVE_PATHS | dashboard.open_paths()
            assert status in ((200, 405) if is_open else (401,)), path
    for target, service in (
        (keyed.grpc_target, pb.DESCRIPTOR.services_by_name["Inference"]),
        (keyed.admin.grpc, admin_pb2.DESCRIPTOR.services_by_name["Admin"]),
    ):
        with grpc.insecure_channel(target) as channel:
            assert len(service.methods) > 5
            for procedure in service.methods:
                name = f"/{service.full_name}/{procedure.name}"
                call = channel.unary_stream(name, bytes, bytes)
                code = failure(lambda call=call: list(call(b"")))[0]
                assert code is grpc.StatusCode.UNAUTHENTICATED, name


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic cm9vdDpyb290"},
        {"authorization": "Bearer root\x00"},
        {"authorization": "Bearer free, Bearer root"},
        {"api-key": ""},
        {"cookie": "api-key=root"},
        {"x-api-key": ""},
        {"x-api-key": "Bearer root"},
        {"x-key": "root"},
    ],
)
def test_what_is_no_key_is_refused(keyed: Stack, headers: dict[str, str]) -> None:
    try:
        answer = keyed.http.get("/v1/models", headers=headers)
    except (httpx.LocalProtocolError, ValueError):
        return  # not even the client sends it
    assert answer.status_code in (400, 401), answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("//health", "/health/", "/health/../v1/models", "/v1/models/../../health", "/HEALTH"),
        *("/health%2f", "/%2e/health", "/v1/models?x=/health", "/v1/models;/health", "/ready/x"),
        *("/docs", "/openapi.json", "/health?/../v1/models", "http://x/v1/models"),
    ],
)
def test_no_spelling_of_a_path_goes_around_the_keys(keyed: Stack, path: str) -> None:
    host, _, port = keyed.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.putrequest("GET", path)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
    is_health = path.startswith("/health?")
    assert answer.status in ((200,) if is_health else (400, 401)), path


def test_metrics_are_open_only_by_option() -> None:
    section = GatewaySection(api_keys=("k",), public_metrics=True)
    with running_stack(section) as stack:
        assert stack.http.get("/metrics").status_code == 200
        assert stack.http.get("/v1/models").status_code == 401


def test_a_key_file_changes_while_serving(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("before")
    with running_stack(GatewaySection(api_key_file=str(file))) as stack:
        assert stack.http.get("/v1/models", headers=header("before")).status_code == 200
        new = tmp_path / "new"
        new.write_text("after")
        new.rename(file)

        def is_open(key: str) -> bool:
            return stack.http.get("/v1/models", headers=header(key)).status_code == 200

        stack.wait_for(lambda: is_open("after"), "the new key")
        assert not is_open("before")
