"""Adapters as clients and operators see them, over both codecs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from cluster.config.api_keys import digest_of, hash_key
from cluster.config.gateway import GatewaySection
from cluster.core.errors import RequestError
from gateway.calls.prompts import PromptMaker
from gateway.calls.validate import make_requests
from gateway.cluster.serve_replicas import ReplicaCall
from gateway.core.call import CallKind, GenerateCall
from gateway.core.errors import error_from_engine, report_error
from gateway.core.model import ModelFacts
from protos import admin_pb2, inference_pb2
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import BACKEND
from tests.gateway.stack import MODEL, WAIT_S, Stack, complete, post, running_stack
from workers.requests.block_hash import prompt_hashes
from workers.requests.request import Request

pytestmark = pytest.mark.heavy

HELLO = BACKEND.encode("hello world").ids
SQL = {"lora_name": "sql", "lora_path": "/adapters/sql"}


@pytest.fixture
def stack() -> Iterator[Stack]:
    """One of its own: adapters stay."""
    with running_stack() as found:
        yield found


@pytest.fixture
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{stack.admin.http}", timeout=WAIT_S) as client:
        yield client


def load(admin: httpx.Client, **changes: Any) -> httpx.Response:
    return admin.post("/v1/load_lora_adapter", json={**SQL, **changes})


def ids(stack: Stack) -> list[str]:
    return [model["id"] for model in stack.http.get("/v1/models").json()["data"]]


def test_adapters_are_listed_with_their_parent(stack: Stack, admin: httpx.Client) -> None:
    assert ids(stack) == [MODEL]
    answer = load(admin)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"schema": 1, **SQL, "state": "READY", "key": "sql@0", "tenants": []}
    base, adapter = stack.http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == (MODEL, None)
    assert adapter == {**base, "id": "sql", "parent": MODEL}
    assert stack.http.get("/v1/models/sql").json() == adapter
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        models = stub.ListModels(inference_pb2.ListModelsRequest()).models
        info = stub.GetModelInfo(inference_pb2.GetModelInfoRequest(model="sql"))
    assert [(m.id, m.parent) for m in models] == [(MODEL, ""), ("sql", MODEL)]
    assert info == models[1]


def test_requests_select_them_by_name(stack: Stack, admin: httpx.Client) -> None:
    load(admin)
    for model in ("sql", MODEL, None):
        fields: dict[str, Any] = {} if model is None else {"model": model}
        answer = complete(stack, prompt=HELLO, max_tokens=2, **fields)
        assert answer["model"] == model or model is None
    messages = [{"role": "user", "content": "hello"}]
    for path, fields in (
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 2}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/score", {"text_1": "hello", "text_2": " world"}),
    ):
        post(stack, path, model="sql", **fields)
    with grpc.insecure_channel(stack.grpc_target) as channel:
        asked = inference_pb2.GenerateRequest(model="sql", text="hello")
        InferenceStub(channel).Generate(asked)
    found = [request.adapter for request in stack.engine.requests]
    assert found == ["sql@0", "", "", "sql@0", "sql@0", "sql@0", "sql@0"]
    with_adapter, without = stack.engine.requests[:2]
    assert prompt_hashes(with_adapter, 1, None) != prompt_hashes(without, 1, None)


def test_unloaded_ones_are_unknown_models(stack: Stack, admin: httpx.Client) -> None:
    unknown = post(stack, "/v1/completions", model="sql", prompt="hello")
    assert unknown.status_code == 404
    load(admin)
    assert load(admin, lora_name="chat").status_code == 200
    answer = admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert (answer.status_code, answer.json()) == (200, {"schema": 1})
    assert ids(stack) == [MODEL, "chat"]
    again = post(stack, "/v1/completions", model="sql", prompt="hello")
    assert again.json() == unknown.json()
    listed = admin.get("/admin/v1/lora_adapters").json()["adapters"]
    assert [(a["lora_name"], a["state"]) for a in listed] == [
        ("sql", "UNLOADING"),
        ("chat", "READY"),
    ]


def test_both_codecs_refuse_alike(stack: Stack, admin: httpx.Client) -> None:
    refused = load(admin, lora_path="/elsewhere")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["message"]) == ("lora_path", "lora_path: no such folder")
    missing = admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    unknown = admin.post("/v1/load_lora_adapter", json={**SQL, "load_inplace": True})
    assert unknown.status_code == 400
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        stub = AdminStub(channel)
        order = admin_pb2.LoadLoraAdapterRequest(lora_name="sql", lora_path="/elsewhere")
        with pytest.raises(grpc.RpcError) as caught:
            stub.LoadLoraAdapter(order)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            stub.UnloadLoraAdapter(admin_pb2.UnloadLoraAdapterRequest(lora_name="sql"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        order.lora_path = SQL["lora_path"]
        assert stub.LoadLoraAdapter(order).state == "READY"
        (listed,) = stub.ListLoraAdapters(admin_pb2.ListLoraAdaptersRequest()).adapters
        assert listed.key == "sql@0"
        stub.UnloadLoraAdapter(admin_pb2.UnloadLoraAdapterRequest(lora_name="sql"))
    assert ids(stack) == [MODEL]


def test_orders_need_the_admin_port_and_its_key() -> None:
    with running_stack(GatewaySection(admin_keys=(hash_key("boss"),))) as stack:
        public = stack.http.post("/v1/load_lora_adapter", json=SQL)
        assert public.status_code == 404
        assert "use the admin port" in public.json()["error"]["message"]
        url = f"http://{stack.admin.http}/v1/load_lora_adapter"
        assert httpx.post(url, json=SQL).status_code == 401
        key = {"authorization": "Bearer boss"}
        assert httpx.post(url, json=SQL, headers=key).status_code == 200


def test_an_engine_without_the_adapter_makes_a_404() -> None:
    error = error_from_engine("the adapter of the request was unloaded", "model_not_found", True)
    assert report_error(error).http_status == 404
    assert report_error(error).grpc_code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("is_loaded_again", [True, False])
def test_the_adapter_of_a_request_is_in_use_while_its_prompt_is_made(
    stack: Stack, admin: httpx.Client, is_loaded_again: bool
) -> None:
    """An adapter is freed some seconds after no request has it; long prompts may take as long."""
    load(admin)
    gateway = stack.gateway
    call = GenerateCall(kind=CallKind.COMPLETION, model="sql", prompts=(tuple(HELLO),))

    async def make(
        facts: ModelFacts, prompt_maker: PromptMaker
    ) -> tuple[GenerateCall, list[Request]]:
        await stack.controller.unload_adapter({"name": "sql"})
        if is_loaded_again:
            await stack.controller.load_adapter({"name": "sql", "path": "/adapters/other"})
        wanted = ["sql@1"] if is_loaded_again else []
        while gateway.model.adapters.keys != wanted:
            await asyncio.sleep(0.001)
        assert gateway.model.adapters.in_use == ("sql@0",)
        complete, prompts = await gateway.prompts.make(call, facts)
        return complete, make_requests(complete, prompts, facts, lambda: 0, ())

    generation = stack.run(gateway.start(call, "c", make))
    assert [request.adapter for request in generation.requests] == ["sql@0"]
    stack.call(generation.close)
    assert gateway.model.adapters.in_use == ()


def test_a_refused_request_uses_no_adapter(stack: Stack, admin: httpx.Client) -> None:
    load(admin)
    call = GenerateCall(kind=CallKind.COMPLETION, model="sql", prompts=(tuple(HELLO),), n=0)
    with pytest.raises(RequestError):
        stack.run(stack.gateway.start(call, "c"))
    assert stack.gateway.model.adapters.in_use == ()


class OtherReplica:
    """A replica that learns of an unloaded adapter when it is asked for the third time."""

    num_asked = 0

    async def call(self, question: ReplicaCall, *details: Any) -> dict[str, Any]:
        """See ``ServeReplicas``."""
        self.num_asked += 1
        return {"other": ["sql@0"] if self.num_asked < 3 else []}


def test_unload_waits_for_replicas_that_know_more_than_this_one(
    stack: Stack, admin: httpx.Client
) -> None:
    load(admin)
    stack.gateway.status.replicas = other = OtherReplica()
    stack.gateway.model.adapters.follow({})  # its snapshot is an old one
    answer = admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert answer.status_code == 200
    assert other.num_asked == 3


KEYS = GatewaySection(
    api_keys=tuple(hash_key(key) for key in ("acme-key", "other-key")),
    admin_keys=(hash_key("boss"),),
)
ACME = digest_of("acme-key").hex()
"""The tenant of a key without a name."""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("key", "names"),
    [("acme-key", ["sql", "open"]), ("other-key", ["open"]), ("boss", ["sql", "open"])],
)
def test_a_key_sees_and_uses_its_adapters_only(key: str, names: list[str]) -> None:
    """What it may not use is an unknown model, word for word, at every endpoint."""
    with running_stack(KEYS) as stack:
        url, head = f"http://{stack.admin.http}/v1/load_lora_adapter", bearer(key)
        orders = [{**SQL, "tenants": [ACME]}, {"lora_name": "open", "lora_path": "/adapters/open"}]
        for order in orders:
            answer = httpx.post(url, json=order, headers=bearer("boss"))
            assert answer.status_code == 200, answer.text
        assert httpx.get(
            f"http://{stack.admin.http}/admin/v1/lora_adapters", headers=bearer("boss")
        ).json()["adapters"][0]["tenants"] == [ACME]
        listed = stack.http.get("/v1/models", headers=head).json()["data"]
        assert [model["id"] for model in listed] == [MODEL, *names]
        status = stack.http.get("/cluster/v1/status", headers=head).json()
        assert [adapter["name"] for adapter in status["adapters"]] == names
        expected = 200 if "sql" in names else 404
        for path, fields in (
            ("/v1/completions", {"prompt": "hello", "max_tokens": 1}),
            ("/tokenize", {"prompt": "hello"}),
            ("/detokenize", {"tokens": HELLO}),
        ):
            answer = stack.http.post(path, json={"model": "sql", **fields}, headers=head)
            assert answer.status_code == expected, answer.text
            if expected == 404:
                unknown = stack.http.post(path, json={"model": "none", **fields}, headers=head)
                assert answer.text.replace("sql", "none") == unknown.text
        assert stack.http.get("/v1/models/sql", headers=head).status_code == expected
        meta = (("authorization", f"Bearer {key}"),)
        with grpc.insecure_channel(stack.grpc_target) as channel:
            stub = InferenceStub(channel)
            models = stub.ListModels(inference_pb2.ListModelsRequest(), metadata=meta).models
            assert [model.id for model in models] == [MODEL, *names]
            request = inference_pb2.GetModelInfoRequest(model="sql")
            if expected == 200:
                assert stub.GetModelInfo(request, metadata=meta).id == "sql"
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.GetModelInfo(request, metadata=meta)
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_controller_learns_which_adapters_calls_have(stack: Stack, admin: httpx.Client) -> None:
    """Also of calls that wait for a worker here."""
    load(admin)
    gateway = stack.gateway
    found = [gateway.model.adapters.in_use]
    fields = GenerateCall(kind=CallKind.COMPLETION, model="sql", prompts=(tuple(HELLO),))
    generation = stack.run(gateway.start(fields, "c"))
    found.append(gateway.model.adapters.in_use)
    stack.call(generation.close)
    found.append(gateway.model.adapters.in_use)
    assert found == [(), ("sql@0",), ()]


def test_an_adapter_that_no_worker_could_load_is_not_unknown(
    stack: Stack, admin: httpx.Client
) -> None:
    load(admin)
    known = stack.controller.state["adapters"]
    names = [worker["name"] for worker in stack.controller.state["workers"]]
    stack.run(_change(stack, [{**known[0], "lacking": names}]))
    answer = post(stack, "/v1/completions", model="sql", prompt="hello", max_tokens=1)
    assert answer.status_code == 503
    assert "no worker could load the adapter sql" in answer.json()["error"]["message"]
    assert ids(stack) == [MODEL, "sql"]
    stack.run(_change(stack, known))
    assert post(stack, "/v1/completions", model="sql", prompt="hello").status_code == 200


async def _change(stack: Stack, adapters: list[dict[str, Any]]) -> None:
    stack.controller.change(adapters=adapters)
    key, lacks = "sql@0", bool(adapters[0].get("lacking"))
    while stack.gateway.engines.workers.has_adapter(key) is lacks:
        await asyncio.sleep(0.001)
